"""Whatever other programs write, a mapping and OTLP's readers take it or say why not, and both ways of one agree."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.formats.mapping import CompiledMapping, MappingConfig
from tests.support.foreign import (
    CLOUD_EVENT,
    CONNECT,
    DEBEZIUM,
    DELETED,
    LISTED,
    MAPPINGS,
    OTLP_SEEDS,
    VALUES,
    check_mapping,
    check_mappings,
    check_otlp,
    mapped,
)
from tests.support.strategies import RECORD_VALUES


@given(mapped())
def test_fast_and_careful_way_of_any_mapping_agree_on_what_fits_it(case):
    fields, raw = case
    check_mapping(CompiledMapping(MappingConfig(**fields)), raw)


@given(st.sampled_from(MAPPINGS), VALUES.map(lambda value: json.dumps(value).encode()))
@example(MAPPINGS[0], b"null")
def test_any_json_is_mapped_or_refused_with_a_reason(mapping, raw):
    check_mapping(mapping, raw)


@given(RECORD_VALUES)
def test_any_bytes_are_mapped_or_refused_with_a_reason(raw):
    check_mappings(raw)


@given(RECORD_VALUES)
def test_any_bytes_are_metrics_or_refused_with_a_reason(raw):
    check_otlp(raw)


@given(st.sampled_from(OTLP_SEEDS), st.data())
def test_damaged_metrics_are_decoded_or_refused_with_a_reason(seed, data):
    raw = bytearray(seed)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_otlp(bytes(raw))


def test_each_envelope_is_taken_by_its_mapping():
    for mapping, value in zip(MAPPINGS, (CLOUD_EVENT, CONNECT, DEBEZIUM, DEBEZIUM, DEBEZIUM, LISTED), strict=False):
        assert check_mapping(mapping, json.dumps(value).encode()) == "decoded"
    assert check_mapping(MAPPINGS[2], json.dumps(DELETED).encode()) == "decoded"
    assert [check_otlp(seed) for seed in OTLP_SEEDS] == ["decoded"] * len(OTLP_SEEDS)
