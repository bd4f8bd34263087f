"""What a producer may have compressed, and what only looks like it, within a bound of memory."""

import contextlib
import gzip
import tracemalloc
import zlib

import cramjam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.compression import MAX_UNPACKED_BYTES, PackedTooTightly, unpack_gzip, unpack_lz4, unpack_zstd

CODECS = {
    "gzip": (gzip.compress, unpack_gzip),
    "lz4": (lambda data: bytes(cramjam.lz4.compress(data)), unpack_lz4),
    "zstd": (lambda data: bytes(cramjam.zstd.compress(data)), unpack_zstd),
}
codecs = pytest.mark.parametrize(("pack", "unpack"), CODECS.values(), ids=CODECS)


@codecs
@given(data=st.binary(), times=st.sampled_from([1, 1000, 100_000]))
def test_what_was_packed_comes_out_again(pack, unpack, data, times):
    data = (data * times)[: 3 * 1024 * 1024]
    assert unpack(pack(data)) == data


@codecs
def test_batch_that_is_as_large_as_allowed_is_unpacked(pack, unpack):
    assert len(unpack(pack(bytes(MAX_UNPACKED_BYTES - 1)))) == MAX_UNPACKED_BYTES - 1


@codecs
def test_batch_that_unpacks_to_more_is_refused_with_what_came(pack, unpack):
    packed = pack(bytes(4 * MAX_UNPACKED_BYTES))
    tracemalloc.start()
    with pytest.raises(PackedTooTightly, match=r"within 67,108,864 bytes") as refusal:
        unpack(packed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refusal.value.packed == packed
    assert peak < 2.1 * MAX_UNPACKED_BYTES  # zlib joins its blocks at the end


@codecs
@given(garbage=st.binary(max_size=200))
def test_what_is_not_compressed_is_refused(pack, unpack, garbage):
    with contextlib.suppress(PackedTooTightly):
        assert len(unpack(garbage)) <= MAX_UNPACKED_BYTES


@codecs
def test_batch_that_is_cut_is_refused(pack, unpack):
    packed = pack(zlib.compress(b"some text that compression does not shorten" * 50))
    with pytest.raises(PackedTooTightly):
        unpack(packed[: len(packed) // 2])
