import json
import uuid

import pytest

from pipeline.core import batch as batch_module
from pipeline.core.batch import Batch, Row, Source, WindowSpan, decode_batch, encode_batch, split
from pipeline.errors import DecodeError, NewerVersion

BATCH = Batch(Source("events", "id", 0, 0, 0), WindowSpan(0, 1), "scheduled", 1, 1, [], [], [], [], [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("partition", 2**31),
        ("partition", -1),
        ("first", 2**63),
        ("last", 2**63 - 1),
        ("last", -1),
        ("topic", "nul\0"),
        ("topic_id", "nul\0"),
    ],
)
def test_batch_whose_source_postgres_cant_store_is_no_batch(field, value):
    raw = json.loads(encode_batch(BATCH))
    assert decode_batch(json.dumps(raw).encode()) == BATCH
    raw["source"][field] = value
    with pytest.raises(DecodeError):
        decode_batch(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "raw",
    [
        {"version": 2},
        {"version": 10**30, "agent_ids": 7},
        {**json.loads(encode_batch(BATCH)), "version": 2},
        {**json.loads(encode_batch(BATCH)), "version": 2, "keys": ["of another length"]},
        {**json.loads(encode_batch(BATCH)), "version": 2, "source": {"offset_of_another_kind": []}},
    ],
)
def test_batch_of_a_newer_version_is_told_from_a_bad_record_whatever_it_holds(raw):
    with pytest.raises(NewerVersion, match=f"version {raw['version']}, .* reads version 1: upgrade the sinks first"):
        decode_batch(json.dumps(raw).encode())


@pytest.mark.parametrize("version", [0, -1, "2", 2.5, None, True, [2]])
def test_version_that_never_was_is_a_bad_record(version):
    for raw in ({"version": version}, {**json.loads(encode_batch(BATCH)), "version": version}):
        with pytest.raises(DecodeError):
            decode_batch(json.dumps(raw).encode())


def test_older_version_stays_readable(monkeypatch):
    monkeypatch.setattr(batch_module, "BATCH_VERSION", 2)
    assert decode_batch(encode_batch(BATCH)).version == 1


@pytest.mark.parametrize(("reason", "label"), [("scheduled", "scheduled"), ("bored", "other"), ("", "other")])
def test_reason_of_a_newer_worker_is_read_and_labelled_other(reason, label):
    batch = decode_batch(json.dumps({**json.loads(encode_batch(BATCH)), "reason": reason}).encode())
    assert (batch.reason, batch.reason_label) == (reason, label)


def test_split_gives_each_part_the_names_of_its_agents():
    ids = [str(uuid.UUID(int=number)) for number in range(3)]
    some = [Row(agent_id, key, "v", "", 0) for agent_id in ids for key in ("a", "b")]
    names = {ids[0]: "host-0", ids[2]: "host-2"}
    parts = split(some, source=BATCH.source, window=BATCH.window, reason="scheduled", batch_size=2, names=names)
    assert [decode_batch(encode_batch(part)).names for part in parts] == [{ids[0]: "host-0"}, {}, {ids[2]: "host-2"}]


def test_split_counts_long_names():
    some = [Row(str(uuid.UUID(int=number)), "k", "v", "", 0) for number in range(5000)]
    names = {row.agent_id: "\x01" * 255 for row in some}
    parts = split(some, source=BATCH.source, window=BATCH.window, reason="scheduled", batch_size=5000, names=names)
    assert sum(len(part.names) for part in parts) == 5000
    assert max(len(encode_batch(part)) for part in parts) < 1_000_000


@pytest.mark.parametrize("names", [{"no-uuid": "x"}, {str(uuid.UUID(int=1)): "a\0"}, {str(uuid.UUID(int=1)): ""}])
def test_batch_with_a_name_that_postgres_cant_store_is_no_batch(names):
    with pytest.raises(DecodeError):
        decode_batch(json.dumps({**json.loads(encode_batch(BATCH)), "names": names}).encode())
