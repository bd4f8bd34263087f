"""Protobuf: records in any schema that a registry holds, as plain Python values."""

from __future__ import annotations

import base64
import binascii
import errno
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError as ProtobufError
from google.protobuf.message_factory import GetMessageClass

from pipeline.core.report import Report
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.formats.framing import read_message_indexes
from pipeline.formats.messages import converter
from pipeline.formats.reports import protobuf_report_reader

_MAIN: Final = "schema.proto"
_COMPILE_SECONDS: Final = 60.0
_WELL_KNOWN: Final = re.compile(r"google/protobuf/[a-z_]+\.proto")
# What protoc's libraries log besides its complaints.
_NOTE: Final = re.compile(r"WARNING: All log messages|[IW]\d{4} ")
# Of an import whose name no file can have, or that is the folder of another one.
_BAD_NAME: Final = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_BAD_BYTES: Final = (ProtobufError, UnicodeDecodeError)


class ProtobufSchema:
    """A schema as a registry holds it, ready to read records, which say by indexes which of its messages they are."""

    def __init__(self, text: str, references: Mapping[str, str] | None = None) -> None:
        """Compile a schema; `references` are the files that it imports, by the names that it imports them by.

        Raises:
            DecodeError: it is no Protobuf schema, or imports what is not there.
            ServiceUnavailable: this machine can't compile now: no schema is to blame, so try again.
        """
        files = _compile({**(references or {}), _MAIN: text})
        pool = DescriptorPool()
        try:
            for file in files:
                pool.Add(file)
        except TypeError as error:
            raise DecodeError(f"not a Protobuf schema: {error}") from error
        self._readers: dict[tuple[int, ...], Callable[[bytes], object]] = {}
        self._classes: dict[tuple[int, ...], Any] = {}
        main = files[-1]
        for index, message in enumerate(main.message_type):
            self._add((index,), message, f"{main.package}.{message.name}".lstrip("."), pool)
        first = self._classes.get((0,))
        self._read_report: Callable[[bytes], Report] | None = None
        if first is not None and _is_report(first.DESCRIPTOR):
            self._read_report = protobuf_report_reader(first.FromString)

    @property
    def is_report(self) -> bool:
        """Whether its first message has the fields of topics/report.proto, with any numbers, and perhaps others."""
        return self._read_report is not None

    def read(self, payload: bytes) -> object:
        """Read message indexes and a message: a dict of its fields by name, without those that are absent.

        Raises:
            DecodeError: these bytes are not what the schema describes.
        """
        indexes, start = read_message_indexes(payload)
        read = self._readers.get(indexes)
        if read is None:
            raise DecodeError(f"its Protobuf schema has no message {list(indexes)[:8]}")
        try:
            return read(payload[start:])
        except _BAD_BYTES as error:
            raise _not_as_described(error) from error

    def read_report(self, payload: bytes) -> Report:
        """Read message indexes and a report, directly; only where `is_report`.

        Raises:
            DecodeError: these bytes are not the schema's first message; `read` knows the others too.
        """
        indexes, start = read_message_indexes(payload)
        if indexes != (0,) or self._read_report is None:
            raise DecodeError("not the first message of its Protobuf schema")
        try:
            return self._read_report(payload[start:])
        except _BAD_BYTES as error:
            raise _not_as_described(error) from error

    def _add(self, indexes: tuple[int, ...], message: DescriptorProto, name: str, pool: DescriptorPool) -> None:
        descriptor = pool.FindMessageTypeByName(name)
        message_class = self._classes[indexes] = GetMessageClass(descriptor)
        convert = converter(descriptor)
        self._readers[indexes] = lambda data: convert(message_class.FromString(data))
        for index, nested in enumerate(message.nested_type):
            self._add((*indexes, index), nested, f"{name}.{nested.name}", pool)


def _compile(files: dict[str, str]) -> list[FileDescriptorProto]:
    """Return all files and what they import, each after what it imports itself; the last is the schema."""
    described = {name: _descriptor(name, text) for name, text in files.items()}
    if all(described.values()):
        return _with_well_known([file for file in described.values() if file is not None])
    try:
        with tempfile.TemporaryDirectory(prefix="agent-metadata-protobuf-") as folder:
            for name, text in files.items():
                _write(folder, name, text)
            return list(FileDescriptorSet.FromString(_run_protoc(folder)).file)
    except OSError as error:
        raise ServiceUnavailable(
            f"a Protobuf schema can't be compiled on this machine now: {error}; the temporary folder "
            "(TMPDIR) must be writable and have room, and there must be memory for another process"
        ) from error


def _write(folder: str, name: str, text: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise DecodeError(f"a Protobuf schema may not import {name!r}")
    path = Path(folder, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in _BAD_NAME:
            raise
        raise DecodeError(f"a Protobuf schema can't be compiled: {error}") from error


def _run_protoc(folder: str) -> bytes:
    """Run protoc, from grpcio-tools, in a process of its own: it writes its errors to stderr."""
    output = Path(folder, "descriptors")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"-I{_include_folder()}"]
    command += ["--include_imports", f"--descriptor_set_out={output}", _MAIN]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_COMPILE_SECONDS, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        raise ServiceUnavailable(
            f"a Protobuf schema was not compiled within {_COMPILE_SECONDS:.0f} s: give this process more CPU"
        ) from None
    if done.returncode < 0:
        raise ServiceUnavailable(
            f"protoc was ended by signal {-done.returncode} while it compiled a Protobuf schema: give this process "
            "more memory"
        )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").replace(f"{folder}/", "").splitlines()
        said = " ".join(line for line in lines if not _NOTE.match(line))
        raise DecodeError(f"not a Protobuf schema: {said[:300]}")
    return output.read_bytes()


def _include_folder() -> Path:
    """Return where grpcio-tools keeps google/protobuf/*.proto."""
    return Path(str(import_module("grpc_tools").__file__)).parent / "_proto"


def _descriptor(name: str, text: str) -> FileDescriptorProto | None:
    """Decode a schema that was registered compiled, in Base64, as confluent-kafka for Python does; else None."""
    try:
        file = FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, ProtobufError):
        return None
    file.name = name
    return file


def _with_well_known(files: list[FileDescriptorProto]) -> list[FileDescriptorProto]:
    found: dict[str, FileDescriptorProto] = {}

    def find(name: str) -> None:
        if name not in found and _WELL_KNOWN.fullmatch(name):
            file = FileDescriptorProto()
            import_module(f"{name.removesuffix('.proto').replace('/', '.')}_pb2").DESCRIPTOR.CopyToProto(file)
            for dependency in file.dependency:
                find(dependency)
            found[name] = file

    try:
        for file in files:
            for dependency in file.dependency:
                find(dependency)
    except ImportError as error:
        raise DecodeError(f"not a Protobuf schema: {error}") from error
    return [*found.values(), *files]


def _is_report(message: Any) -> bool:
    entries = message.fields_by_name.get("entries")
    return (
        _are_texts(message, "agent_id")
        and _is_time(message.fields_by_name.get("collected_at"))
        and entries is not None
        and entries.is_repeated
        and entries.message_type is not None
        and not entries.message_type.GetOptions().map_entry
        and _are_texts(entries.message_type, "key", "value", "error")
        and _is_time(entries.message_type.fields_by_name.get("collected_at"))
    )


def _are_texts(message: Any, *names: str) -> bool:
    fields = [message.fields_by_name.get(name) for name in names]
    return all(field is not None and field.type == field.TYPE_STRING and not field.is_repeated for field in fields)


def _is_time(field: Any) -> bool:
    return (
        field is not None
        and not field.is_repeated
        and field.message_type is not None
        and field.message_type.full_name == "google.protobuf.Timestamp"
    )


def _not_as_described(error: Exception) -> DecodeError:
    return DecodeError(f"not what its Protobuf schema describes: {error}"[:300])
