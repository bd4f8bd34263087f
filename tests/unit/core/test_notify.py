import uuid

import pytest

from pipeline.core.notify import decode_agent_ids, encode_agent_id, encode_agent_id_chunks
from pipeline.errors import DecodeError


@pytest.mark.parametrize(
    ("agent_id", "encoded"),
    [
        ("00000000-0000-0000-0000-000000000000", "A" * 22),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", "/" * 21 + "w"),
        ("00112233-4455-6677-8899-aabbccddeeff", "ABEiM0RVZneImaq7zN3u/w"),
        ("fbefbefb-efbe-fbef-befb-efbefbefbefb", "+" * 21 + "w"),
    ],
)
def test_encode_agent_id_is_coders_own_text(agent_id, encoded):
    assert encode_agent_id(uuid.UUID(agent_id)) == encoded


@pytest.mark.parametrize(
    ("count", "lengths"),
    [(0, []), (1, [22]), (363, [7986]), (364, [7986, 22]), (600, [7986, 5214]), (1000, [7986, 7986, 6028])],
)
def test_encode_agent_id_chunks_holds_363_ids_a_payload(count, lengths):
    ids = [uuid.uuid4() for _ in range(count)]
    payloads = encode_agent_id_chunks(ids)
    assert [len(payload) for payload in payloads] == lengths
    assert [agent_id for payload in payloads for agent_id in decode_agent_ids(payload)] == ids


@pytest.mark.parametrize("payload", ["A" * 21, "A" * 43, "!" * 22])
def test_decode_agent_ids_refuses_what_is_no_list_of_ids(payload):
    with pytest.raises(DecodeError):
        decode_agent_ids(payload)


def test_decode_agent_ids_of_nothing_is_nothing():
    assert list(decode_agent_ids("")) == []


@pytest.mark.parametrize("size", [22, 30])
def test_encode_agent_id_writes_into_a_buffer(size):
    agent_id = uuid.uuid4()
    buffer = bytearray(b"." * size)
    assert encode_agent_id(agent_id, buffer) == buffer[:22].decode()
    assert buffer[22:] == b"." * (size - 22)


def test_encode_agent_id_writes_into_a_part_of_a_payload():
    agent_ids = [uuid.uuid4(), uuid.uuid4()]
    payload = bytearray(44)
    for number, agent_id in enumerate(agent_ids):
        encode_agent_id(agent_id, memoryview(payload)[number * 22 : number * 22 + 22])
    assert decode_agent_ids(payload.decode()) == agent_ids


def test_encode_agent_id_refuses_a_buffer_that_is_too_small():
    buffer = bytearray(21)
    with pytest.raises(ValueError, match="a buffer of 21 bytes is too small: an agent id takes 22"):
        encode_agent_id(uuid.uuid4(), buffer)
    assert buffer == bytearray(21)
