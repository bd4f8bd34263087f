"""Unpack compressed record batches within a bound: a megabyte of zstd can hold gigabytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import cramjam

from pipeline.errors import DecodeError

# Sixty times Kafka's default limit of a record batch, which JSON that repeats itself may well reach; beyond it a batch
# costs a worker more memory and time than its records are worth.
MAX_UNPACKED_BYTES: Final = 64 * 1024 * 1024
# Unpacking into memory that is there already is as fast as into new memory. Most batches fit here.
_SCRATCH_BYTES: Final = 1024 * 1024
_WITH_GZIP_HEADER: Final = 31  # zlib's wbits

_Unpack = Callable[[bytes, memoryview], int]


class PackedTooTightly(DecodeError):
    """A record batch is corrupt, or larger than MAX_UNPACKED_BYTES; `packed` holds its records as they came."""

    def __init__(self, problem: object, packed: bytes) -> None:
        super().__init__(f"can't be unpacked within {MAX_UNPACKED_BYTES:,} bytes: {problem}")
        self.packed = packed


# Memory that no thread is using: cramjam releases the interpreter's lock while it writes.
_free: Final[list[memoryview]] = []


def unpack_gzip(packed: bytes) -> bytes:
    """Unpack; raises PackedTooTightly."""
    stream = zlib.decompressobj(_WITH_GZIP_HEADER)
    try:
        unpacked = stream.decompress(packed, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise PackedTooTightly(error, bytes(packed)) from error
    if not stream.eof:
        raise PackedTooTightly("there is more", bytes(packed))
    return unpacked


def unpack_lz4(packed: bytes) -> bytes:
    """Unpack; raises PackedTooTightly."""
    return _unpack(cramjam.lz4.decompress_into, packed)


def unpack_zstd(packed: bytes) -> bytes:
    """Unpack; raises PackedTooTightly."""
    return _unpack(cramjam.zstd.decompress_into, packed)


def _unpack(unpack_into: _Unpack, packed: bytes) -> bytes:
    try:
        scratch = _free.pop()
    except IndexError:
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
    try:
        return bytes(scratch[: unpack_into(packed, scratch)])
    except cramjam.DecompressionError:
        memory = memoryview(bytearray(MAX_UNPACKED_BYTES))  # which the kernel gives as it is written
    finally:
        _free.append(scratch)
    try:
        return bytes(memory[: unpack_into(packed, memory)])
    except cramjam.DecompressionError as error:
        raise PackedTooTightly(error, bytes(packed)) from error
