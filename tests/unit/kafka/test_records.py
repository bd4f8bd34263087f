import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_LOG_APPEND_TIME, Message

from pipeline.core.dead_letter import dead_letter_headers
from pipeline.core.record import CREATE_TIME, LOG_APPEND_TIME, KafkaRecord
from pipeline.kafka.records import as_record, dead_letter_of


@pytest.mark.parametrize(
    ("clock", "timestamp_type"), [(TIMESTAMP_CREATE_TIME, CREATE_TIME), (TIMESTAMP_LOG_APPEND_TIME, LOG_APPEND_TIME)]
)
def test_message_becomes_a_record_whose_clock_is_known(clock, timestamp_type):
    message = Message(
        topic="t", partition=1, offset=7, key=b"k", value=b"v", headers=[("h", b"x")], timestamp=(clock, 1000)
    )
    assert as_record(message) == KafkaRecord(7, 1000, b"k", b"v", (("h", b"x"),), timestamp_type)


def test_tombstone_without_headers_becomes_a_record():
    message = Message(topic="t", partition=1, offset=7, timestamp=(TIMESTAMP_LOG_APPEND_TIME, 1000))
    assert as_record(message) == KafkaRecord(7, 1000, None, None)


def test_message_of_the_dead_letter_topic_becomes_a_dead_letter():
    headers = dead_letter_headers(
        topic="events", partition=3, offset=17, stage="worker", error_class="DecodeError", message="why"
    )
    message = Message(
        topic="dead", partition=1, offset=7, key=b"k", headers=[("h", b"x"), *headers], timestamp=(1, 1000)
    )
    letter = dead_letter_of(message)
    assert (letter.partition, letter.offset, letter.appended_ms, letter.key, letter.value) == (1, 7, 1000, b"k", None)
    assert (letter.original, letter.source, letter.reason) == ([("h", b"x")], "events[3]@17", "why")
