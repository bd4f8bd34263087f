"""Confluent's wire format is recognised in values and in headers."""

import uuid

import pytest
from confluent_kafka.schema_registry.serde import SchemaId

from pipeline.errors import DecodeError
from pipeline.formats.framing import VALUE_SCHEMA_ID_HEADER, frame, read_message_indexes, split_frame

GUID = "89791762-2336-4186-9674-299b90a802e2"
INDEXES = [[0], [1], [7, 0], [0, 0], [300, 2, 65]]


def test_frame_is_split_into_the_id_and_the_payload():
    assert split_frame(frame(7, b"payload")) == (7, b"payload")
    assert split_frame(b"\0\xff\xff\xff\xff") == (2**32 - 1, b"")


def test_guid_in_front_of_a_value_is_an_id_too():
    assert split_frame(b"\1" + uuid.UUID(GUID).bytes + b"payload") == (GUID, b"payload")


@pytest.mark.parametrize("value", [b"", b"{}", b"\n\x05hello", b"\2abcdefghijklmnopq"])
def test_value_without_a_magic_byte_has_no_frame(value):
    assert split_frame(value) is None


@pytest.mark.parametrize("value", [b"\0", b"\0\0\0\1", b"\1" + b"g" * 15])
def test_frame_that_is_cut_off_is_refused(value):
    with pytest.raises(DecodeError, match="cut off"):
        split_frame(value)


def test_header_counts_before_the_value():
    headers = [("other", b"x"), (VALUE_SCHEMA_ID_HEADER, SchemaId("AVRO", guid=GUID).guid_to_bytes())]
    assert split_frame(b"\0\0\0\0\1payload", headers) == (GUID, b"\0\0\0\0\1payload")
    assert split_frame(b"payload", [(VALUE_SCHEMA_ID_HEADER, SchemaId("AVRO", 5).id_to_bytes())]) == (5, b"payload")


@pytest.mark.parametrize("content", [b"", b"x", b"\0\0", None])
def test_header_without_an_id_is_refused(content):
    with pytest.raises(DecodeError):
        split_frame(b"{}", [(VALUE_SCHEMA_ID_HEADER, content)])


@pytest.mark.parametrize("indexes", INDEXES)
def test_message_indexes_are_read_as_confluent_writes_them(indexes):
    framed = SchemaId("PROTOBUF", 5, message_indexes=indexes).id_to_bytes() + b"message"
    schema_id, payload = split_frame(framed)
    found, start = read_message_indexes(payload)
    assert (schema_id, found, payload[start:]) == (5, tuple(indexes), b"message")


@pytest.mark.parametrize("indexes", INDEXES)
def test_message_indexes_in_the_header_are_in_front_of_the_payload(indexes):
    header = SchemaId("PROTOBUF", guid=GUID, message_indexes=indexes).guid_to_bytes()
    schema_id, payload = split_frame(b"message", [(VALUE_SCHEMA_ID_HEADER, header)])
    found, start = read_message_indexes(payload)
    assert (schema_id, found, payload[start:]) == (GUID, tuple(indexes), b"message")


@pytest.mark.parametrize("payload", [b"", b"\1", b"\4\0", b"\x80", b"\xff" * 20, b"\xfe\xff\xff\xff\xff\x0f"])
def test_message_indexes_that_make_no_sense_are_refused(payload):
    with pytest.raises(DecodeError):
        read_message_indexes(payload)
