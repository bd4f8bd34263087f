"""Whatever bytes a record in another format holds, it is read, or refused with a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.reports import read_avro_report, write_avro_report, write_protobuf_report
from tests.support.format_checks import REPORTS, TARGETS, damaged, outcome, own_protobuf, storable


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(target, data):
    outcome(target.check, data.draw(st.binary(max_size=200) | damaged(target.good)))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@given(data=st.data())
def test_what_is_good_is_read(target, data):
    good = data.draw(target.good)
    if target is not TARGETS["framing"]:
        assert outcome(target.check, good) == "decoded"


@given(REPORTS)
def test_report_is_the_same_after_a_round_trip(report):
    assert read_avro_report(write_avro_report(report)) == storable(report)
    assert own_protobuf().read_report(b"\0" + write_protobuf_report(report)) == storable(report)
