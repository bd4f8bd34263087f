import json

import pytest

from pipeline.core.batch import Batch, Source, WindowSpan, decode_batch, encode_batch
from pipeline.errors import DecodeError

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
