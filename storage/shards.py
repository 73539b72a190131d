"""Shards encoded and decoded without Zarr's machinery, which costs ten times the compression.

The bytes are those that Zarr writes and reads, but for the order of strips in an object;
`tests/storage/test_shards.py` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

Encode = Callable[[np.ndarray], bytes]
Decode = Callable[[memoryview], np.ndarray]

SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
SEPARATORS = (".", "/")  # in names of objects; a slash before version 3 of the schema
LEFT_OUT = 2**64 - 1  # in a shard's index, of an inner chunk without rows
ORDERS = (1, 2)  # of differences between neighbours in a row; maps of depth take either
MOST_STRIP_ROWS = 16  # of an image: a value is then told from its own column and the one before
SAMPLE = 4  # one in so many rows, or columns of a strip, tells how to pack them all
UPRIGHT = [0, 2, 1]  # axes of images whose columns are packed one after the other
TURNED_UPRIGHT = {"name": "transpose", "configuration": {"order": UPRIGHT}}  # codec
PACKED = ["numcodecs.pcodec", "crc32c"]  # codecs
BLOSC_HEADER = 16  # bytes; 4 to 7 hold the size before compression, 12 to 15 that after it


class NotPlain(ValueError):
    """An array is not laid out as this software lays out its arrays; Zarr itself must write."""


@lru_cache(maxsize=256)
def parsed(document: bytes) -> dict[str, Any]:
    """The zarr.json of an array; not to be changed."""
    found: dict[str, Any] = json.loads(document)
    return found


def encode_shard(document: bytes, start: int, values: np.ndarray) -> dict[str, bytes]:
    """The object, by name, that holds `values` as the rows from `start` on.

    Args:
        document: zarr.json of the array, which is cut along its first axis only.
        start: a multiple of the rows of an object.
        values: at most that many rows, in the array's type; what lacks is filled up.

    Raises:
        NotPlain: other codecs or cuts than those of `storage.layout`.
    """
    node = parsed(document)
    shape = node["chunk_grid"]["configuration"]["chunk_shape"]
    _check_cut(node, shape, start, values)
    return {
        shard_name(node, start // shape[0]): _encoder(node["codecs"], shape[0], node["fill_value"])(
            values
        )
    }


def shard_name(node: Mapping[str, Any], number: int) -> str:
    """Name, below the array, of the object with its rows of this number."""
    separator: str = node["chunk_key_encoding"]["configuration"]["separator"]
    return separator.join(["c", str(number), *["0"] * (len(node["shape"]) - 1)])


def _check_cut(node: Mapping[str, Any], shape: list[int], start: int, values: np.ndarray) -> None:
    whole_rows = shape[1:] == node["shape"][1:] == list(values.shape[1:])
    fits = start % shape[0] == 0 and len(values) <= shape[0]
    if not whole_rows or not fits or values.dtype != np.dtype(node["data_type"]):
        raise NotPlain(f"{values.dtype} {values.shape} at row {start} of {node['shape']}")
    _check_keys(node)


def _check_keys(node: Mapping[str, Any]) -> None:
    found = node["chunk_key_encoding"]
    known = ({"name": "default", "configuration": {"separator": s}} for s in SEPARATORS)
    if found not in known:
        raise NotPlain(f"chunk keys {found}")


def _filled(values: np.ndarray, rows: int, fill: Any) -> np.ndarray:
    if len(values) == rows:
        return np.ascontiguousarray(values)
    whole = np.full((rows, *values.shape[1:]), np.nan if fill == "NaN" else fill, values.dtype)
    whole[: len(values)] = values
    return whole


def _encoder(codecs: list[dict[str, Any]], rows: int, fill: Any) -> Encode:
    """How `rows` rows become bytes; of fewer, the rest is filled up."""
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        return lambda values: _sharded(codecs[0]["configuration"], values, rows, fill)
    names = [codec["name"] for codec in codecs]
    if names[-2:] == PACKED:
        settings, turned = codecs[-2]["configuration"], _turning(codecs[:-2])
        if set(settings) != {"level"}:
            raise NotPlain(f"pcodec with {settings}")
        return lambda values: _checked(pack(turned(_filled(values, rows, fill)), **settings))
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    if names == ["bytes", "crc32c"] and endian == "little":
        return lambda values: _checked(_filled(values, rows, fill).tobytes())
    if names == ["bytes", "blosc", "crc32c"] and endian == "little":
        blosc = codecs[1]["configuration"]
        return lambda values: _checked(_compressed(blosc, _filled(values, rows, fill)))
    raise NotPlain(f"codecs {codecs}")


def _turning(filters: list[dict[str, Any]]) -> Callable[[np.ndarray], np.ndarray]:
    """What is done to values before they are packed, and undoes it after they are unpacked."""
    if not filters:
        return lambda values: values
    if filters != [TURNED_UPRIGHT]:
        raise NotPlain(f"codecs {filters}")
    return lambda images: images.transpose(UPRIGHT)


def _compressed(settings: Mapping[str, Any], rows: np.ndarray) -> bytes:
    if rows.dtype.itemsize != settings["typesize"]:
        raise NotPlain(f"{rows.dtype} with a typesize of {settings['typesize']}")
    shuffle = SHUFFLES[settings["shuffle"]]
    codec = Blosc(settings["cname"], settings["clevel"], shuffle, settings["blocksize"])
    return bytes(codec.encode(rows))


def _checked(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def _sharded(settings: Mapping[str, Any], values: np.ndarray, rows: int, fill: Any) -> bytes:
    """Inner chunks one after the other, then where each of them lies; empty ones are left out.

    Strips of the same images lie together.
    """
    inner = settings["chunk_shape"][0]
    strips = _strips(settings, values.shape[1:])
    encode = _encoder(settings["codecs"], inner, fill)
    parts = [
        encode(strip)
        for i in range(0, len(values), inner)
        for strip in np.split(values[i : i + inner], strips, axis=1)
    ]
    lengths = np.array([len(part) for part in parts], np.uint64)
    index = np.full((rows // inner * strips, 2), LEFT_OUT, "<u8")
    index[: len(parts)] = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    return b"".join([*parts, _checked(index.tobytes())])


def _strips(settings: Mapping[str, Any], image: tuple[int, ...]) -> int:
    """Into how many strips of whole rows images of this shape are cut."""
    index_codecs = [codec["name"] for codec in settings["index_codecs"]]
    plain_index = index_codecs == ["bytes", "crc32c"] and settings["index_location"] == "end"
    _, high, *wide = settings["chunk_shape"]
    if wide != list(image[1:]) or image[0] % high or not plain_index:
        raise NotPlain(f"shards of {settings['chunk_shape']}, index {index_codecs}")
    return image[0] // high


@dataclass(frozen=True)
class ShardReader:
    """How the objects of an array are read."""

    rows: int  # of an object
    size_bytes: int  # of an object before compression
    inner: int  # rows that are compressed together
    strips: int  # that each image is cut into; 0: objects are not shards
    decode_inner: Decode

    def decode(self, data: bytes, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, half-open, counted inside the whole object `data`.

        Raises:
            ValueError: the object is damaged.
        """
        if not self.strips:
            return self.decode_inner(memoryview(data))[start:stop]
        index_bytes = self.rows // self.inner * self.strips * 16 + 4
        stored = np.frombuffer(_unchecked(memoryview(data)[-index_bytes:]), "<u8")
        index = stored.reshape(-1, self.strips, 2)
        first, last = start // self.inner, -(-stop // self.inner)
        parts = [
            np.concatenate([self.decode_inner(_part(data, *span)) for span in spans], axis=1)
            for spans in index[first:last].tolist()
        ]
        return np.concatenate(parts)[start - first * self.inner : stop - first * self.inner]


@lru_cache(maxsize=256)
def shard_reader(document: bytes) -> ShardReader:
    """The reader of the array of which `document` is zarr.json.

    Raises:
        NotPlain: other codecs or cuts than those of `storage.layout`.
    """
    node = parsed(document)
    rows, *sides = node["chunk_grid"]["configuration"]["chunk_shape"]
    row, dtype = tuple(node["shape"][1:]), np.dtype(node["data_type"])
    _check_keys(node)
    if tuple(sides) != row:
        raise NotPlain(f"objects of {[rows, *sides]} in {node['shape']}")
    size = int(np.prod((rows, *row))) * dtype.itemsize
    if [codec["name"] for codec in node["codecs"]] != ["sharding_indexed"]:
        return ShardReader(rows, size, rows, 0, _decoder(node["codecs"], (rows, *row), dtype))
    settings = node["codecs"][0]["configuration"]
    inner, strips = settings["chunk_shape"], _strips(settings, row)
    decode = _decoder(settings["codecs"], tuple(inner), dtype)
    return ShardReader(rows, size, inner[0], strips, decode)


def _part(data: bytes, offset: int, length: int) -> memoryview:
    if offset + length > len(data):
        raise ValueError(f"an inner chunk at {offset} with {length} bytes in {len(data)} bytes")
    return memoryview(data)[offset : offset + length]


def _decoder(codecs: list[dict[str, Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Decode:
    """How bytes become the rows of one object or inner chunk."""
    names = [codec["name"] for codec in codecs]
    if names[-2:] == PACKED:
        turned = _turning(codecs[:-2])
        packed = (shape[0], *reversed(shape[1:])) if codecs[:-2] else shape
        return lambda stored: turned(unpack(bytes(_unchecked(stored)), packed, dtype))
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    size = int(np.prod(shape)) * dtype.itemsize
    if names not in (["bytes", "crc32c"], ["bytes", "blosc", "crc32c"]) or endian != "little":
        raise NotPlain(f"codecs {codecs}")

    def decode(stored: memoryview) -> np.ndarray:
        content = _unchecked(stored)
        if "blosc" in names:
            check_compressed(content, size)
            content = memoryview(Blosc().decode(content))
        return np.frombuffer(content, dtype).reshape(shape)

    return decode


def pack(values: np.ndarray, level: int) -> bytes:
    """Values as pcodec packs them, given what it finds out by itself less well.

    Rounded floats end in bits that are zero in all of them, which it packs apart ("float quant").
    What it packs are differences of neighbours, or differences of these; where rows are short, also
    the errors of a linear prediction from the values before, the last row's among them, whose
    weights it fits. A sample of the values tells which takes least.

    Args:
        values: neighbours along the last axis are alike; the last but one is of rows.
        level: of compression, 0 to 12.
    """
    values = np.ascontiguousarray(values)
    zeros = _trailing_zeros(values)
    if not zeros:
        return standalone.simple_compress(values.reshape(-1), ChunkConfig(compression_level=level))

    def packed(some: np.ndarray, delta: DeltaSpec) -> bytes:
        mode = ModeSpec.try_float_quant(zeros)
        config = ChunkConfig(compression_level=level, mode_spec=mode, delta_spec=delta)
        return standalone.simple_compress(np.ascontiguousarray(some).reshape(-1), config)

    deltas, sample = [DeltaSpec.try_consecutive(order) for order in ORDERS], values
    if values.ndim > 2 and values.shape[-1] <= MOST_STRIP_ROWS:
        deltas.append(DeltaSpec.try_conv1(values.shape[-1] + 2))
        sample = values[:, : -(-values.shape[1] // SAMPLE)]  # its rows stay neighbours
    elif values.ndim > 1:
        sample = values[..., ::SAMPLE, :]
    return packed(values, min(deltas, key=lambda delta: len(packed(sample, delta))))


def _trailing_zeros(values: np.ndarray) -> int:
    """Bits of the mantissa that are zero in all values, counted from the last; 0 of integers."""
    if not np.issubdtype(values.dtype, np.floating):
        return 0
    used = int(np.bitwise_or.reduce(values.reshape(-1).view(f"u{values.itemsize}")))
    zeros = (used & -used).bit_length() - 1
    return max(0, min(zeros, np.finfo(values.dtype).nmant))


def unpack(packed: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Values that pcodec packed.

    Raises:
        ValueError: damaged, or not just so many values of that type.
    """
    values = np.empty(shape, dtype)
    try:
        progress = standalone.simple_decompress_into(packed, values.reshape(-1))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{len(packed)} bytes are no packed chunk: {error}") from None
    if progress.n_processed != values.size or not progress.finished:
        raise ValueError(f"{len(packed)} bytes are no packed chunk of {values.size} values")
    return values


def check_compressed(content: memoryview | bytes, size: int) -> None:
    """Make sure that Blosc reads what is there, no less and no more, and writes `size` bytes.

    Raises:
        ValueError: it would not; its library believes both sizes in the header.
    """
    sizes = content[4:8], content[12:BLOSC_HEADER]
    found = tuple(int.from_bytes(field, "little") for field in sizes)
    if len(content) < BLOSC_HEADER or found != (size, len(content)):
        raise ValueError(f"{len(content)} bytes are no compressed chunk of {size} bytes")


def _unchecked(data: memoryview) -> memoryview:
    """What `_checked` was given."""
    content, found = data[:-4], bytes(data[-4:])
    if google_crc32c.value(bytes(content)).to_bytes(4, "little") != found:
        raise ValueError("the checksum does not match")
    return content
