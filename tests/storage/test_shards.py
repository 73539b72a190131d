"""Shards that we encode ourselves are those that Zarr would write."""

import json

import numpy as np
import pytest
import zarr
from numcodecs.pcodec import PCodec
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec
from zarr.core.buffer.cpu import Buffer as CPUBuffer
from zarr.storage import MemoryStore

from storage.codecs import BoundedPCodec
from storage.layout import round_to_half
from storage.shards import NotPlain, encode_shard, pack, shard_reader, unpack

DAMAGED = "checksum|buffer|bytes"
BLOSC = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")
BY_BLOSC = {"compressors": (BLOSC, Crc32cCodec())}
BY_PCODEC = {"serializer": BoundedPCodec(level=8), "compressors": (Crc32cCodec(),)}
UPRIGHT = BY_PCODEC | {"filters": (TransposeCodec(order=(0, 2, 1)),)}
WHOLE, STRIPS = (2, 12, 20), (2, 4, 20)  # parts of images of 12 by 20
TYPES = ("float16", "float32", "int64")
KINDS = [
    *(pytest.param(t, WHOLE, BY_BLOSC, id=t) for t in (*TYPES, "uint8")),
    *(pytest.param(t, WHOLE, BY_PCODEC, id=f"{t}-pcodec") for t in TYPES),
    *(pytest.param(t, STRIPS, UPRIGHT, id=f"{t}-strips") for t in TYPES),
]


def written_by_zarr(values, start, **options):
    """The array's zarr.json, and the objects that Zarr makes of `values` at row `start`."""
    held = {}
    shape = (10, *values.shape[1:])
    options = {"filters": None, **options}
    array = zarr.create_array(MemoryStore(held), shape=shape, dtype=values.dtype, **options)
    array = array.with_config({"write_empty_chunks": True})
    document = held["zarr.json"].to_bytes()
    array[start : start + len(values)] = values
    return document, {n: b.to_bytes() for n, b in held.items() if n != "zarr.json"}


def read_by_zarr(document, objects):
    held = {name: CPUBuffer.from_bytes(data) for name, data in objects.items()}
    held["zarr.json"] = CPUBuffer.from_bytes(document)
    return zarr.open_array(MemoryStore(held), mode="r")[...]


@pytest.mark.parametrize(
    ("start", "rows", "separator"),
    [(0, 4, "."), (4, 4, "."), (8, 2, "."), (0, 3, "."), (4, 4, "/")],
)
@pytest.mark.parametrize(("dtype", "parts", "packing"), KINDS)
def test_shard_of_images_equals_that_of_zarr(start, rows, separator, dtype, parts, packing):
    values = np.random.default_rng(0).normal(10, 3, (rows, 12, 20)).astype(dtype)
    document, expected = written_by_zarr(
        values,
        start,
        chunks=parts,
        shards=(4, 12, 20),
        fill_value=np.nan if values.dtype.kind == "f" else 0,
        chunk_key_encoding={"name": "default", "separator": separator},
        **packing,
    )
    made = encode_shard(document, start, values)
    if parts == STRIPS:  # Zarr writes them in another order
        np.testing.assert_array_equal(
            read_by_zarr(document, made), read_by_zarr(document, expected)
        )
        assert [len(data) for data in made.values()] == [len(data) for data in expected.values()]
    else:
        assert made == expected


@pytest.mark.parametrize("compressors", [(BLOSC, Crc32cCodec()), (Crc32cCodec(),)])
@pytest.mark.parametrize("values", [np.arange(12.0).reshape(4, 3), np.array([True, False])])
def test_plain_chunk_equals_that_of_zarr(compressors, values):
    document, expected = written_by_zarr(
        values, 4, chunks=(4, *values.shape[1:]), compressors=compressors, fill_value=0
    )
    assert encode_shard(document, 4, values) == expected


def test_arrays_of_other_codecs_are_left_to_zarr():
    values = np.zeros((4, 3))
    document, _ = written_by_zarr(values, 0, chunks=(4, 3), compressors=(GzipCodec(),))
    with pytest.raises(NotPlain, match="gzip"):
        encode_shard(document, 0, values)


@pytest.mark.parametrize(
    ("start", "values"),
    [(2, np.zeros((4, 3))), (0, np.zeros((5, 3))), (0, np.zeros((4, 3), np.float32))],
)
def test_rows_that_are_not_one_whole_chunk_are_left_to_zarr(start, values):
    document, _ = written_by_zarr(np.zeros((4, 3)), 0, chunks=(4, 3), compressors=(Crc32cCodec(),))
    assert json.loads(document)["shape"] == [10, 3]
    with pytest.raises(NotPlain):
        encode_shard(document, start, values)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 2), (0, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize(("dtype", "parts", "packing"), KINDS)
def test_rows_of_a_shard_of_zarr_are_read(start, stop, dtype, parts, packing):
    values = np.random.default_rng(0).normal(10, 3, (4, 12, 20)).astype(dtype)
    document, objects = written_by_zarr(
        values,
        4,
        chunks=parts,
        shards=(4, 12, 20),
        fill_value=0,
        **packing,
    )
    rows = shard_reader(document).decode(objects["c/1/0/0"], start, stop)
    np.testing.assert_array_equal(rows, values[start:stop])


@pytest.mark.parametrize("compressors", [(BLOSC, Crc32cCodec()), (Crc32cCodec(),)])
@pytest.mark.parametrize("values", [np.arange(12.0).reshape(4, 3), np.array([True, False] * 2)])
def test_rows_of_a_plain_chunk_of_zarr_are_read(compressors, values):
    document, objects = written_by_zarr(
        values, 4, chunks=(4, *values.shape[1:]), compressors=compressors, fill_value=0
    )
    (data,) = objects.values()
    np.testing.assert_array_equal(shard_reader(document).decode(data, 1, 3), values[1:3])


@pytest.mark.parametrize(
    ("parts", "packing"),
    [(WHOLE, BY_BLOSC), (None, BY_BLOSC), (WHOLE, BY_PCODEC), (None, BY_PCODEC), (STRIPS, UPRIGHT)],
)
def test_damaged_objects_are_refused(parts, packing):
    values = np.random.default_rng(0).normal(10, 3, (4, 12, 20)).astype("float16")
    document, objects = written_by_zarr(
        values,
        0,
        chunks=parts or (4, 12, 20),
        shards=(4, 12, 20) if parts else None,
        fill_value=0,
        **packing,
    )
    (data,) = objects.values()
    reader, random = shard_reader(document), np.random.default_rng(1)
    for at in random.integers(0, len(data), 200).tolist():
        flipped = bytes([*data[:at], data[at] ^ (1 << at % 8), *data[at + 1 :]])
        with pytest.raises(ValueError, match=DAMAGED):
            reader.decode(flipped, 0, 4)
    for length in random.integers(0, len(data), 50).tolist():
        with pytest.raises(ValueError, match=DAMAGED):
            reader.decode(data[:length], 0, 4)


def slopes(noise: float, images: int = 2) -> np.ndarray:
    """Images of a curved surface, as depth is kept: rounded to 9 bits of float16's 10."""
    y, x = np.mgrid[:24, :80].astype(np.float32)
    rough = np.random.default_rng(0).normal(0, noise, (images, 24, 80))
    return round_to_half(5 + np.sin(x / 9) + y / 20 + rough, 9)


@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (0.05, 0.97)])
def test_rounded_images_take_less_than_pcodec_makes_of_them(noise, share):
    values = slopes(noise)
    assert len(pack(values, 8)) < share * len(PCodec(level=8).encode(values))


def test_upright_strips_of_images_take_less_than_whole_ones():
    # Each pixel is its upper and its left neighbour less the one between them, and some noise.
    rough = np.random.default_rng(1).normal(0, 0.01, (8, 24, 80)).cumsum(axis=1).cumsum(axis=2)
    values = round_to_half(slopes(0.0, images=8) + rough, 9)
    upright = [strip.transpose(0, 2, 1) for strip in np.split(values, 2, axis=1)]
    taken = sum(len(pack(strip, 8)) for strip in upright)
    assert taken < 0.9 * min(len(pack(values, 8)), len(pack(values.transpose(0, 2, 1), 8)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16"])
def test_anything_packed_is_read_bit_for_bit_without_our_code(dtype):
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, 6e-8, 60000.0]
    numbers = special if dtype.startswith("float") else [-3, 0, 7, 32767]
    for shape in ((len(numbers),), (1, len(numbers)), (3, 5, len(numbers)), (2, 50, 12)):
        values = np.resize(np.array(numbers, dtype), shape)
        read = np.frombuffer(PCodec().decode(pack(values, 8)), dtype)
        assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("rows", [4, 12, 16])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -0.0, 65504.0, -65504.0])
def test_strips_with_odd_values_are_read_bit_for_bit_without_our_code(odd, rows):
    values = np.ascontiguousarray(slopes(0.01)[:, :rows].transpose(0, 2, 1))
    values[0, 10:14, 1:3] = odd
    assert np.frombuffer(PCodec().decode(pack(values, 8)), "f2").tobytes() == values.tobytes()


@pytest.mark.parametrize("count", [0, 1, 239, 241, 2**24])
def test_packed_values_of_another_number_are_refused(count):
    packed = PCodec(level=8).encode(np.zeros(count, np.float16))
    with pytest.raises(ValueError, match="no packed chunk"):
        unpack(packed, (12, 20), np.dtype("float16"))


@pytest.mark.parametrize("dtype", ["float32", "int16", "float64"])
def test_packed_values_of_another_type_are_refused(dtype):
    packed = PCodec(level=8).encode(np.zeros(240, dtype))
    with pytest.raises(ValueError, match="no packed chunk"):
        unpack(packed, (12, 20), np.dtype("float16"))


def test_damaged_packed_values_are_refused_or_read_as_others():
    """What the checksum would have caught: never more values than asked for, no other error."""
    random = np.random.default_rng(3)
    packed = PCodec(level=8).encode(random.normal(10, 3, 240).astype("float16"))
    refused = 0
    for at in random.integers(0, len(packed), 500).tolist():
        damaged = bytes([*packed[:at], packed[at] ^ 255, *packed[at + 1 :]])
        try:
            unpack(damaged, (240,), np.dtype("float16"))
        except ValueError:
            refused += 1
    assert refused > 50


def test_reading_arrays_of_other_codecs_is_left_to_zarr():
    document, _ = written_by_zarr(np.zeros((4, 3)), 0, chunks=(4, 3), compressors=(GzipCodec(),))
    with pytest.raises(NotPlain, match="gzip"):
        shard_reader(document)
