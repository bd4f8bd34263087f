import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest

import pipeline.core.report
from pipeline.core.report import (
    AGENT_NAMESPACE,
    MAX_TIMESTAMP_US,
    MIN_TIMESTAMP_US,
    AgentIds,
    Entry,
    Report,
    agent_uuid,
    decode_report,
    encode_report,
    key_problem,
    limit_value,
    moment_from_us,
    timestamp_us,
)
from pipeline.errors import DecodeError

AGENT = "00112233-4455-6677-8899-aabbccddeeff"


def raw(entries: str, more: str = "") -> bytes:
    return f'{{"agent_id":"{AGENT}","entries":[{entries}]{more}}}'.encode()


def test_decode_report_round_trips_what_encode_report_wrote():
    report = Report(AGENT, [Entry("cpu", "12%"), Entry("mem", error="gone")], datetime(2026, 1, 2, tzinfo=UTC))
    assert decode_report(encode_report(report)) == (report, None)


def test_decode_report_ignores_unknown_fields():
    report, problem = decode_report(raw('{"key":"cpu","value":"1","unit":"%"}', ',"version":7'))
    assert (report.entries, problem) == ([Entry("cpu", "1")], None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no value"),
        (b"", "truncated"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"entries":[]}', "missing required field `agent_id`"),
        (raw('{"key":1}'), "Expected `str`, got `int`"),
        (b'{"agent_id":null,"entries":[]}', "got `null`"),
        (raw('{"key":"k"}', ',"collected_at":"2026-01-01T00:00:00"'), "timezone"),
        (raw('{"key":"k"}', ',"collected_at":12'), "got `int`"),
        (raw('{"key":"k"}') + b"x", "trailing"),
        (b"\xef\xbb\xbf" + raw('{"key":"k"}'), "malformed"),
        (b'{"x":' + b"[" * 100_000, "deep"),
    ],
)
def test_decode_report_unreadable_says_why(value, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_report(value)


def test_decode_report_lone_surrogate_becomes_replacement_character():
    report, _ = decode_report(raw('{"key":"k","value":"a\\ud800b \\ud83d\\ude00"}'))
    assert report.entries[0].value == "a\N{REPLACEMENT CHARACTER}b \N{GRINNING FACE}"


def test_decode_report_nul_becomes_replacement_character():
    report, _ = decode_report(raw('{"key":"k\\u0000","value":"a\\u0000b","error":"\\u0000"}'))
    assert report.entries[0] == Entry("k\ufffd", "a\ufffdb", "\ufffd")


def test_decode_report_keys_over_their_sum_are_left_out_with_a_reason():
    entries = ",".join(f'{{"key":"{index:0100}"}}' for index in range(70))
    report, problem = decode_report(raw(entries))
    assert len(report.entries) == 61
    assert problem == "keys exceeded 6144 bytes: the last 9 entries were left out"


@pytest.mark.parametrize(
    ("given", "limited"),
    [
        (("a" * 2048, ""), ("a" * 2048, "")),
        (("a" * 2049, ""), ("a" * 2048, "value of 2049 bytes exceeded 2048 bytes")),
        (("é" * 1024, ""), ("é" * 1024, "")),
        (("a" + "é" * 1024, ""), ("a" + "é" * 1023, "value of 2049 bytes exceeded 2048 bytes")),
        (("", "e" * 2048), ("", "e" * 2048)),
        (("", "e" * 2049), ("", "error of 2049 bytes exceeded 2048 bytes")),
        (("a" * 3000, "e" * 2049), ("a" * 2048, "error of 2049 bytes exceeded 2048 bytes")),
        (("a\0b\ud800", "\0"), ("a\ufffdb\ufffd", "\ufffd")),
    ],
)
def test_limit_value_cuts_by_bytes_at_a_character(given, limited):
    assert limit_value(*given) == limited


def test_key_problem_counts_characters():
    assert key_problem("é" * 127) is None
    assert key_problem("k" * 128).startswith("key of 128 characters exceeds 127")


def test_agent_uuid_accepts_any_spelling_of_a_uuid():
    assert agent_uuid(AGENT.upper().replace("-", "")) == AGENT


@pytest.mark.parametrize("spelling", [f"{{{AGENT}}}", f"urn:uuid:{AGENT}", AGENT.upper(), AGENT.replace("-", "")])
def test_spellings_of_a_uuid_are_the_same_agent(spelling):
    assert agent_uuid(spelling) == AGENT


@pytest.mark.parametrize(
    "name",
    [
        "1234_5678_9abc_def0_1234_5678_9a",
        "0x112233445566778899001122334455",
        "\N{ARABIC-INDIC DIGIT ONE}" * 32,
        "+1122334455667788990011223344556",
        f"-{AGENT}",
        "0011-2233445566778899aabbccddee-ff",
    ],
)
def test_what_only_python_takes_for_a_uuid_is_a_name(name):
    assert agent_uuid(name) == str(uuid.uuid5(AGENT_NAMESPACE, name))


def test_uuid_among_thousands_of_dashes_is_no_agent():
    with pytest.raises(DecodeError, match="characters"):
        agent_uuid("-" * 900_000 + AGENT)


def test_agent_uuid_of_a_name_is_its_uuid5_in_a_namespace_that_never_changes():
    """The literal is what rows hold already."""
    assert agent_uuid("host-17") == "a086788e-a15d-5b01-b250-93cdec4c3e67"
    assert agent_uuid("host-17") == str(uuid.uuid5(AGENT_NAMESPACE, "host-17"))
    assert agent_uuid("a\0") == agent_uuid("a\ufffd")


@pytest.mark.parametrize("text", ["", "x" * 256])
def test_agent_uuid_of_an_empty_or_long_text_is_refused(text):
    with pytest.raises(DecodeError, match=f"agent_id has {len(text)} characters; it must have 1 to 255"):
        agent_uuid(text)


def test_agent_ids_know_the_names_of_those_that_are_called_by_one():
    agent_ids = AgentIds()
    assert agent_ids.learn("host-17") == agent_uuid("host-17")
    agent_ids.learn(AGENT)
    assert agent_ids.names == {agent_uuid("host-17"): "host-17"}


def test_agent_ids_of_uuids_only_refuse_names():
    with pytest.raises(DecodeError, match="not a UUID: 'agent-7'"):
        AgentIds(uuids_only=True).learn("agent-7")


def test_agent_ids_are_learned_by_spelling_and_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(pipeline.core.report, "MAX_KNOWN_AGENTS", 2)
    agent_ids = AgentIds()
    assert agent_ids.learn(AGENT.upper()) == AGENT
    assert agent_ids.learn(AGENT) == AGENT
    assert agent_ids.known == {AGENT.upper(): AGENT, AGENT: AGENT}
    with pytest.raises(DecodeError):
        agent_ids.learn("")
    other = str(uuid.UUID(int=8))
    agent_ids.learn(other)
    assert agent_ids.known == {other: other}


@pytest.mark.parametrize(
    ("moment", "microseconds"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(2026, 1, 1, 14, tzinfo=timezone(timedelta(hours=14))), 1_767_225_600_000_000),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))), MIN_TIMESTAMP_US),
        (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-14))), MAX_TIMESTAMP_US),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC), MAX_TIMESTAMP_US),
    ],
)
def test_timestamp_us_is_exact_and_stays_within_years_1_to_9999(moment, microseconds):
    assert timestamp_us(moment) == microseconds


@pytest.mark.parametrize("microseconds", [MIN_TIMESTAMP_US, -1, 0, MAX_TIMESTAMP_US])
def test_moment_from_us_is_the_exact_inverse(microseconds):
    assert timestamp_us(moment_from_us(microseconds)) == microseconds


@pytest.mark.parametrize(
    ("microseconds", "clamped"),
    [(MIN_TIMESTAMP_US - 1, MIN_TIMESTAMP_US), (MAX_TIMESTAMP_US + 1, MAX_TIMESTAMP_US), (10**400, MAX_TIMESTAMP_US)],
)
def test_moment_from_us_stays_within_years_1_to_9999(microseconds, clamped):
    assert moment_from_us(microseconds) == moment_from_us(clamped)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12", "12"),
        ("12.50", "12.5"),
        ("-0.0", "-0.0"),
        ("1e400", None),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("true", "true"),
        ("false", "false"),
        ("null", ""),
        ('{"b" : 1, "a": [null, "x"]}', '{"b":1,"a":[null,"x"]}'),
        ("[ ]", "[]"),
    ],
)
def test_decode_report_makes_text_of_any_value_and_error(value, text):
    raw_report = raw(f'{{"key":"k","value":{value},"error":{value}}}')
    if text is None:
        with pytest.raises(DecodeError, match="out of range"):
            decode_report(raw_report)
    else:
        assert decode_report(raw_report) == (Report(AGENT, [Entry("k", text, text)]), None)


def test_decode_report_takes_a_number_as_the_name_of_an_agent():
    assert decode_report(b'{"agent_id":17,"entries":[]}') == (Report("17", []), None)


def test_decode_report_of_a_number_of_thousands_of_digits_is_text_or_refused():
    digits = "9" * 5000
    try:
        report, _ = decode_report(raw(f'{{"key":"k","value":{digits}}}'))
    except DecodeError:
        return
    assert report.entries[0].error == "value of 5000 bytes exceeded 2048 bytes"


def test_decode_report_cuts_a_text_that_is_longer_than_what_it_was_made_of():
    numbers = ",".join(["1e15"] * 400)
    report, _ = decode_report(raw(f'{{"key":"k","value":[{numbers}]}}'))
    assert len(report.entries[0].value) == 2048
    assert "exceeded 2048 bytes" in report.entries[0].error
