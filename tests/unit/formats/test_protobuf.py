"""Protobuf: any message of a schema becomes plain values, and our own report a report."""

import base64
import errno
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import Parse
from google.protobuf.message_factory import GetMessageClass

from pipeline.core.report import SHORT_BYTES, Entry, Report, apply_limits
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.formats import protobuf as protobuf_module
from pipeline.formats.protobuf import ProtobufSchema, _compile
from pipeline.formats.reports import write_protobuf_report

OWN = (Path(__file__).parents[3] / "topics" / "report.proto").read_text()
T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
COMMON = 'syntax = "proto3"; package common; message Site { uint64 id = 1; }'
FOREIGN = """
syntax = "proto3";
package x.y;
import "common.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/timestamp.proto";
import "google/protobuf/wrappers.proto";
message Sample {
  enum Kind { A = 0; B = 1; }
  message Inner { Sample sample = 1; string text = 2; }
  float single = 1;
  google.protobuf.Timestamp at = 2;
  google.protobuf.Duration took = 3;
  google.protobuf.Struct any = 4;
  google.protobuf.Int64Value wrapped = 5;
  map<string, float> by_name = 6;
  map<bool, Inner> by_flag = 7;
  repeated Kind kinds = 8;
  bytes raw = 9;
  optional string maybe = 10;
  common.Site site = 11;
  oneof choice { string text = 12; int64 number = 13; }
}
message Other { repeated string texts = 1; }
"""
FILES = {"common.proto": COMMON}


@pytest.fixture(scope="module")
def foreign():
    return ProtobufSchema(FOREIGN, FILES)


@pytest.fixture(scope="module")
def own():
    return ProtobufSchema(OWN)


def encoded(text, files, message, value):
    """Encode by Google's own JSON format."""
    pool = DescriptorPool()
    for file in _compile({**files, "schema.proto": text}):
        pool.Add(file)
    return Parse(json.dumps(value), GetMessageClass(pool.FindMessageTypeByName(message))()).SerializeToString()


def test_message_is_a_dict_of_python_values(foreign):
    value = {
        "single": 21.7, "at": "2026-01-02T03:04:05.678901Z", "took": "-1.5s", "any": {"a": [1, 2.5, None, True, {}]},
        "wrapped": "4", "byName": {"a": 0.1}, "byFlag": {"true": {"text": "deep", "sample": {"single": 1}}},
        "kinds": ["B", "A", 7], "raw": "AQ==", "maybe": "", "site": {"id": str(2**63)}, "number": "5",
    }  # fmt: skip
    read = foreign.read(b"\0" + encoded(FOREIGN, FILES, "x.y.Sample", value))
    inner = read["by_flag"].pop("true")
    assert (inner["text"], inner["sample"]["single"]) == ("deep", 1.0)
    assert read == {
        "single": 21.7, "at": T0, "took": "-1.5s", "any": {"a": [1, 2.5, None, True, {}]}, "wrapped": 4,
        "by_name": {"a": 0.1}, "by_flag": {}, "kinds": ["B", "A", 7], "raw": b"\1", "maybe": "",
        "site": {"id": 2**63}, "number": 5,
    }  # fmt: skip


def test_absent_field_with_presence_is_left_out_and_others_have_their_defaults(foreign):
    assert foreign.read(b"\0") == {"single": 0.0, "by_name": {}, "by_flag": {}, "kinds": [], "raw": b""}


def test_message_indexes_choose_the_message(foreign):
    assert foreign.read(b"\2\2" + b"\n\1a\n\1b") == {"texts": ["a", "b"]}
    assert foreign.read(b"\4\0\0" + b"\x12\4deep") == {"text": "deep"}
    with pytest.raises(DecodeError, match=r"has no message \[9\]"):
        foreign.read(b"\2\x12")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "Expected top-level statement"),
        ('syntax = "proto3"; import "no.proto";', "no.proto"),
        ('syntax = "proto3"; message A { B b = 1; }', '"B" is not defined'),
    ],
)
def test_what_is_no_schema_is_refused_with_protocs_reason(text, reason):
    with pytest.raises(DecodeError) as raised:
        ProtobufSchema(text)
    assert reason in str(raised.value)
    assert "/tmp" not in str(raised.value)


@pytest.mark.parametrize("name", ["/etc/hosts.proto", "../../escape.proto", "a/../../escape.proto", "nul\0.proto"])
def test_import_never_leaves_its_folder(name):
    with pytest.raises(DecodeError, match="may not import"):
        ProtobufSchema('syntax = "proto3";', {name: COMMON})


@pytest.mark.parametrize("names", [["a" * 300], ["a", "a/b"], ["a/b", "a"], ["a/b", "a/b/c"], ["."]])
def test_import_that_no_file_can_be_is_refused(names):
    with pytest.raises(DecodeError, match="can't be compiled"):
        ProtobufSchema('syntax = "proto3";', dict.fromkeys(names, COMMON))


def test_temporary_folder_that_is_missing_is_an_outage(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ServiceUnavailable, match="must be writable"):
        ProtobufSchema(OWN)
    monkeypatch.undo()
    assert ProtobufSchema(OWN).is_report


def test_full_disk_is_an_outage(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ServiceUnavailable, match="No space left"):
        ProtobufSchema(OWN)


@pytest.mark.parametrize(
    ("program", "reason"),
    [("exec sleep 9", "not compiled within"), ("kill -9 $$", "ended by signal 9"), ("no program", "No such file")],
)
def test_compiler_that_does_not_end_by_itself_is_an_outage(program, reason, monkeypatch, tmp_path):
    compiler = tmp_path / "python"
    if program != "no program":
        compiler.write_text(f"#!/bin/sh\n{program}\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(compiler))
    monkeypatch.setattr(protobuf_module, "_COMPILE_SECONDS", 0.2)
    with pytest.raises(ServiceUnavailable, match=reason):
        ProtobufSchema(OWN)


def test_schema_that_was_registered_compiled_is_read(foreign):
    def compiled(text, files, name):
        file = FileDescriptorProto()
        file.CopyFrom(_compile({**files, "schema.proto": text})[-1])
        file.name = name
        return base64.b64encode(file.SerializeToString()).decode()

    schema = ProtobufSchema(compiled(FOREIGN, FILES, "main"), {"common.proto": compiled(COMMON, {}, "common")})
    payload = b"\0" + encoded(FOREIGN, FILES, "x.y.Sample", {"single": 1, "at": "2026-01-02T03:04:05Z"})
    assert schema.read(payload) == foreign.read(payload)


REPORTS = [
    Report("host-17", []),
    Report("a", [Entry("cpu", "12%"), Entry("disk", "", "timed out", T0), Entry("")], T0),
    Report("ü" * 255, [Entry("\u20ac" * 100, "x" * 9000)], datetime(1, 1, 1, tzinfo=UTC)),
    Report("a", [Entry("k")], datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    Report("a", [Entry("k")], datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
]


@pytest.mark.parametrize("report", REPORTS)
def test_report_is_read_as_it_was_written(own, report):
    assert own.is_report
    assert own.read_report(b"\0" + write_protobuf_report(report)) == report


def test_report_is_written_as_google_writes_it(own):
    report = Report("a", [Entry("cpu", "12%"), Entry("disk", "", "timed out", T0)], T0)
    entries = [{"key": "cpu", "value": "12%"}, {"key": "disk", "error": "timed out", "collectedAt": T0.isoformat()}]
    value = {"agentId": "a", "collectedAt": T0.isoformat(), "entries": entries}
    assert write_protobuf_report(report) == encoded(OWN, {}, "agent_metadata.Report", value)


def test_nul_in_a_report_becomes_a_replacement_character(own):
    report = own.read_report(b"\0" + write_protobuf_report(Report("a", [Entry("k\0", "v\0", "e\0")])))
    assert report.entries == [Entry("k\ufffd", "v\ufffd", "e\ufffd")]


@pytest.mark.parametrize(
    "report", [Report("a", [Entry("k", "\0" * 1000)]), Report("a", [Entry("\0", "v", "\0" * 1000)])]
)
def test_nul_in_a_short_report_is_limited_as_anywhere(own, report):
    payload = write_protobuf_report(report)
    assert len(payload) <= SHORT_BYTES  # nothing checks it after the reader
    read = own.read_report(b"\0" + payload)
    apply_limits(report)
    assert read == report
    assert "of 3000 bytes exceeded 2048 bytes" in read.entries[0].error


def test_time_that_is_out_of_range_is_refused(own):
    late = b"\x12\x07\x08\xff\xff\xff\xff\xff\x7f"
    with pytest.raises(DecodeError, match="outside the years 1 to 9999"):
        own.read_report(b"\0" + late)
    with pytest.raises(DecodeError, match="outside the years 1 to 9999"):
        own.read(b"\0" + late)


@pytest.mark.parametrize("payload", [b"", b"\0\xff", b"\0\n\5abc", b"\0\n\1\xff", b"\2\2", b"\x05"])
def test_bytes_that_are_no_report_are_refused(own, payload):
    with pytest.raises(DecodeError):
        own.read_report(payload)


def test_schema_is_our_own_by_its_fields_whatever_their_numbers():
    renumbered = OWN.replace("agent_id = 1;", "agent_id = 11; string site = 1;").replace("message Report", "message R")
    assert ProtobufSchema(renumbered).is_report
    assert not ProtobufSchema(OWN.replace("string value", "double value")).is_report
    assert not ProtobufSchema(OWN.replace("repeated Entry", "Entry")).is_report
    assert not ProtobufSchema('syntax = "proto3";').is_report
