import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.core.decoding import Decoded, RecordDecoder, SchemaNeeded
from pipeline.core.record import KafkaRecord
from pipeline.core.report import Entry, Report, agent_uuid, decode_report, encode_report
from pipeline.core.window import MAX_REJECTED_BYTES, OpenWindow
from pipeline.testing import record

A1, A2 = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
T0 = datetime(2024, 1, 1, tzinfo=UTC)
T0_MS = 1_704_067_200_000
MS = timedelta(milliseconds=1)


@pytest.fixture
def window():
    return OpenWindow(0.0, capacity=1000, max_clock_skew=timedelta(seconds=60))


def rows(window):
    return {(row.agent_id, row.key): (row.value, row.collected_at) for row in window.close("scheduled", 1.0).rows}


def test_fold_keeps_the_newest_whatever_the_order(window):
    window.fold([record(0, A1, T0 + 1 * MS, k="newer"), record(1, A1, T0, k="older"), record(2, A2, T0, k="x")])
    assert rows(window) == {(A1, "k"): ("newer", T0 + 1 * MS), (A2, "k"): ("x", T0)}


def test_fold_on_equal_times_keeps_the_later_arrival(window):
    window.fold([record(0, A1, T0, k="first"), record(1, A1, T0, k="second")])
    assert rows(window) == {(A1, "k"): ("second", T0)}


def test_fold_duplicate_key_in_one_report_keeps_the_last(window):
    value = encode_report(Report(A1, [Entry("k", "first"), Entry("k", "last")], T0))
    window.fold([KafkaRecord(0, T0_MS, None, value)])
    assert rows(window) == {(A1, "k"): ("last", T0)}


def test_fold_replaces_value_error_and_time_as_one(window):
    reports = [Report(A1, [Entry("k", "", "broken")], T0), Report(A1, [Entry("k", "fine")], T0 + 1 * MS)]
    window.fold([KafkaRecord(i, T0_MS, None, encode_report(report)) for i, report in enumerate(reports)])
    assert window.close("scheduled", 1.0).rows[0][2:4] == ("fine", "")


def test_fold_without_collected_at_takes_the_brokers_time(window):
    window.fold([record(0, A1, k="v", appended_ms=T0_MS + 5)])
    assert rows(window) == {(A1, "k"): ("v", T0 + 5 * MS)}


def test_fold_entry_time_overrides_the_reports(window):
    report = Report(A1, [Entry("k", "v", collected_at=T0 - 1 * MS), Entry("l", "w")], T0)
    window.fold([KafkaRecord(0, T0_MS, None, encode_report(report))])
    assert rows(window) == {(A1, "k"): ("v", T0 - 1 * MS), (A1, "l"): ("w", T0)}


@pytest.mark.parametrize("is_entry_time", [False, True])
def test_fold_clock_too_far_ahead_is_set_to_the_brokers_and_counted(window, is_entry_time):
    wrong, believed = T0 + timedelta(seconds=61), T0 + timedelta(seconds=60)
    for offset, moment in enumerate((believed, wrong)):
        entry = Entry(f"k{offset}", "v", collected_at=moment if is_entry_time else None)
        report = Report(A1, [entry], T0 if is_entry_time else moment)
        window.fold([KafkaRecord(offset, T0_MS, None, encode_report(report))])
    assert rows(window) == {(A1, "k0"): ("v", believed), (A1, "k1"): ("v", T0)}
    assert window.close("scheduled", 1.0).clamped == 1


def test_fold_spellings_of_one_agent_id_are_one_agent(window):
    window.fold([record(0, A1.upper(), T0, k="a"), record(1, A1.replace("-", ""), T0, k="b")])
    assert rows(window) == {(A1, "k"): ("b", T0)}


def test_fold_bad_record_costs_itself_alone(window):
    bad = [KafkaRecord(1, T0_MS, None, b"{"), KafkaRecord(2, T0_MS, None, None), record(3, "", T0, k="v")]
    records = [record(0, A1, T0, k="before"), *bad, record(4, A2, T0, k="after")]
    assert window.fold(records) == 5
    closed = window.close("scheduled", 1.0)
    assert [rejected.record.offset for rejected in closed.rejected] == [1, 2, 3]
    assert [row.value for row in closed.rows] == ["before", "after"]
    assert closed.rows == sorted(closed.rows)
    assert (closed.first, closed.last) == (0, 4)


def test_fold_key_too_long_is_rejected_and_the_reports_others_stay(window):
    value = encode_report(Report(A1, [Entry("k" * 128, "v"), Entry("fine", "v")], T0))
    window.fold([KafkaRecord(0, T0_MS, None, value)])
    closed = window.close("scheduled", 1.0)
    assert [row.key for row in closed.rows] == ["fine"]
    assert "128 characters" in closed.rejected[0].reason


def test_fold_counts_unique_pairs_and_stops_when_full():
    window = OpenWindow(0.0, capacity=2, max_clock_skew=timedelta(0))
    records = [record(0, A1, k="1"), record(1, A1, k="2"), record(2, A2, k="3"), record(3, A2, l="4")]
    assert window.fold(records) == 3
    assert (window.pairs, window.is_full, window.entries) == (2, True, 3)
    closed = window.close("capacity", 1.0)
    assert (closed.first, closed.last) == (0, 2)


def test_fold_never_splits_a_report():
    window = OpenWindow(0.0, capacity=2, max_clock_skew=timedelta(0))
    assert window.fold([record(0, A1, a="1", b="2", c="3"), record(1, A1, d="4")]) == 1
    assert len(window.close("capacity", 1.0).rows) == 3


def test_close_of_an_empty_window_has_no_range(window):
    closed = window.close("scheduled", 1.0)
    assert closed.first > closed.last


def test_fold_of_empty_reports_moves_the_range(window):
    window.fold([KafkaRecord(7, T0_MS, None, encode_report(Report(A1, [])))])
    assert window._agents == {}  # or new agents that report nothing would fill the memory
    closed = window.close("scheduled", 1.0)
    assert (closed.first, closed.last, closed.rows) == (7, 7, [])


def test_rejected_records_fill_a_window_like_pairs():
    window = OpenWindow(0.0, capacity=3, max_clock_skew=timedelta(seconds=60))
    records = [KafkaRecord(offset, T0_MS, None, b"no report") for offset in range(5)]
    assert window.fold([record(0, A1, T0, k="v"), *records]) == 3
    assert window.is_full
    assert (window.pairs, len(window.rejected)) == (1, 2)


def test_large_rejected_records_fill_a_window_of_any_capacity(window):
    records = [KafkaRecord(offset, T0_MS, None, b"x" * (MAX_REJECTED_BYTES // 2)) for offset in range(3)]
    assert window.fold(records) == 2
    assert window.is_full
    closed = window.close("capacity", 1)
    assert (closed.last, closed.is_heavy) == (1, True)


def large(offset, agent_id, value):
    return record(offset, agent_id, T0, k=value)


def bounded(max_bytes):
    return OpenWindow(0.0, capacity=1000, max_bytes=max_bytes, max_clock_skew=timedelta(seconds=60))


def test_large_reports_fill_a_window_by_their_bytes():
    window = bounded(10_000)
    records = [large(offset, str(uuid.UUID(int=offset)), "x" * 1000) for offset in range(20)]
    assert window.fold(records) == 9
    assert window.is_full
    assert window.pairs == 9


def test_wide_characters_count_as_the_memory_they_take():
    window = bounded(10_000)
    records = [large(offset, str(uuid.UUID(int=offset)), "x" * 480 + "\N{GRINNING FACE}") for offset in range(20)]
    assert window.fold(records) < 6
    assert window.is_full


def test_large_value_that_is_replaced_again_and_again_fills_no_window():
    window = bounded(10_000)
    values = ["x" * 1000, "y" * 300] * 100
    records = [large(offset, A1, value) for offset, value in enumerate(values)]
    index = 0
    while index < len(records):
        index = window.fold(records, index)
        assert not window.is_full
    assert rows(window) == {(A1, "k"): ("y" * 300, T0)}


def test_older_values_that_replace_nothing_do_not_make_room():
    window = bounded(10_000)
    newer = [large(offset, str(uuid.UUID(int=offset)), "x" * 1000) for offset in range(8)]
    older = [record(8 + n, str(uuid.UUID(int=n)), T0 - MS, k="y" * 300) for n in range(8)]
    assert window.fold(newer) == 8
    assert window.fold(older) == 8
    assert window.fold([large(16, str(uuid.UUID(int=16)), "x" * 1000), large(17, A1, "x")]) == 1
    assert window.is_full


def test_small_reports_of_many_keys_are_left_to_the_capacity():
    window = bounded(1)
    assert window.fold([record(0, A1, T0, **{f"key{n}": "12.3%" for n in range(40)})]) == 1
    assert not window.is_full


def test_source_range_covers_offsets_without_a_record(window):
    window.fold([record(5, A1, T0, k="v")])
    window.pass_over(6, 9)
    closed = window.close("scheduled", 1.0)
    assert (closed.first, closed.last) == (5, 8)


def test_source_range_without_any_record_is_covered_too(window):
    window.pass_over(3, 9)
    closed = window.close("scheduled", 1.0)
    assert (closed.first, closed.last, closed.rows) == (3, 8, [])


class OfSeveralAgents(RecordDecoder):
    """A format whose records hold a list of reports, and need a schema; `loaded` are the schemas."""

    def __init__(self, *loaded):
        super().__init__()
        self.loaded = set(loaded)

    def reset(self):
        self.parse = lambda raw: decode_report(b"")[0]  # nothing is plain

    def decode(self, record):
        if record.key is not None and record.key not in self.loaded:
            raise SchemaNeeded(record.key.decode())
        parts = record.value.split(b"\n")
        return Decoded([decode_report(part)[0] for part in parts], "a part" if len(parts) > 2 else None)


def joined(offset, *values, key=None):
    return KafkaRecord(offset, T0_MS, key, b"\n".join(values))


def one(agent_id, **pairs):
    return encode_report(Report(agent_id, [Entry(key, value) for key, value in pairs.items()], T0))


def test_record_with_reports_of_several_agents_is_folded_whole():
    window = OpenWindow(0.0, capacity=1, max_clock_skew=timedelta(60), decoder=OfSeveralAgents())
    records = [joined(0, one(A1, k="1"), one("host-17", k="2")), joined(1, one(A1, k="3"))]
    assert window.fold(records) == 1
    assert window.is_full
    host = agent_uuid("host-17")
    assert rows(window) == {(A1, "k"): ("1", T0), (host, "k"): ("2", T0)}
    assert window.close("capacity", 1.0).names == {host: "host-17"}


def test_report_that_cant_be_used_leaves_those_beside_it_in_the_record():
    window = OpenWindow(0.0, capacity=9, max_clock_skew=timedelta(60), decoder=OfSeveralAgents())
    assert window.fold([joined(0, one("", k="1"), one(A1, k="2")), joined(1, one("", k="3"))]) == 2
    closed = window.close("scheduled", 1.0)
    assert [row[:3] for row in closed.rows] == [(A1, "k", "2")]
    assert [rejected.kind for rejected in closed.rejected] == ["over_limit", "undecodable"]


def test_fold_stops_in_front_of_a_record_whose_schema_is_to_be_loaded():
    decoder = OfSeveralAgents()
    window = OpenWindow(0.0, capacity=9, max_clock_skew=timedelta(60), decoder=decoder)
    records = [joined(0, one(A1, k="1")), joined(1, one(A1, k="2"), key=b"7"), joined(2, one(A1, k="3"))]
    assert (window.fold(records), window.schema_needed, window.last) == (1, "7", 0)
    assert (window.fold(records, 1), window.schema_needed, window.last) == (1, "7", 0)
    decoder.loaded.add(b"7")
    assert (window.fold(records, 1), window.schema_needed, window.last) == (3, None, 2)
    assert rows(window) == {(A1, "k"): ("3", T0)}
    assert window.entries == 3


def test_values_that_are_no_text_fold_as_text_and_text_after_them_as_it_is():
    window = OpenWindow(0.0, capacity=9, max_clock_skew=timedelta(60))
    mixed = b'{"agent_id":"%s","entries":[{"key":"n","value":1.5},{"key":"s","value":"x"}]}' % A1.encode()
    assert window.fold([KafkaRecord(0, T0_MS, None, mixed), KafkaRecord(1, T0_MS, None, mixed)]) == 2
    assert rows(window) == {(A1, "n"): ("1.5", T0), (A1, "s"): ("x", T0)}
    assert window.entries == 4


def test_closed_window_has_the_names_of_agents_in_it_and_of_no_others():
    window = OpenWindow(0.0, capacity=9, max_clock_skew=timedelta(60))
    window.fold([record(0, "host-1", T0, k="v"), record(1, "host-2", T0), record(2, A1, T0, k="v")])
    window.fold([record(3, "host-1", T0, l="v"), record(4, "host-3", T0, k="v")])
    assert window.close("scheduled", 1.0).names == {agent_uuid(name): name for name in ("host-1", "host-3")}
    following = OpenWindow(1.0, capacity=9, max_clock_skew=timedelta(60))
    assert following.close("scheduled", 2.0).names == {}


class OfPlainRecordsOnly(RecordDecoder):
    def decode(self, record):
        raise AssertionError("a plain record is parsed once")


def test_plain_record_of_a_new_agent_is_not_decoded_again():
    window = OpenWindow(0.0, capacity=9, max_clock_skew=timedelta(60), decoder=OfPlainRecordsOnly())
    assert window.fold([record(0, A1, T0, k="1"), record(1, "host-17", T0, k="2")]) == 2
    assert rows(window) == {(A1, "k"): ("1", T0), (agent_uuid("host-17"), "k"): ("2", T0)}
