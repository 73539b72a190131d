"""Bounds of what is read from a store that somebody else may have written.

A document or an array that is none of ours is refused before anything is allocated for it.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from zarr.core.array import Array
from zarr.core.metadata import ArrayV3Metadata

from storage.codecs import PCODEC, PCODEC_SETTINGS
from storage.errors import DataDamaged
from storage.layout import FIXED_SIZES, ArraySpec
from storage.records import MOST_FRAMES
from storage.shards import PACKED, TURNED_UPRIGHT

MOST_OBJECT_BYTES = 2**30  # of an object, before compression
MOST_WHOLE_BYTES = 2**32  # of an array that is read as a whole
MOST_METADATA_BYTES = 2**16  # of zarr.json of an array; ours have some 2 kB
MOST_RECORDS_BYTES = 2**31  # of all commits together; those of 2^24 frames have half of it
MOST_DIMENSIONS = 8
MOST_PARTS = 2**16  # of an object that are compressed each by itself
MOST_STRIPS = 2**12  # of an image
CODECS = frozenset({"bytes", "blosc", "crc32c", "sharding_indexed", PCODEC})
# What a parser raises at metadata that are none.
ILLEGIBLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def check_array(path: str, document: bytes, spec: ArraySpec) -> None:
    """Make sure that zarr.json is that of an array that is laid out as `spec` says.

    Raises:
        DataDamaged: it is not, or it is so large that reading it would fill the memory.
    """
    fault = _fault_of(document, spec)
    if fault:
        raise DataDamaged(f"array {path} is none of this software's: {fault}")


def is_array(document: bytes | None, spec: ArraySpec) -> bool:
    """Whether it is there and `check_array` takes it."""
    return document is not None and _fault_of(document, spec) is None


def _fault_of(document: bytes, spec: ArraySpec) -> str | None:
    if len(document) > MOST_METADATA_BYTES:
        return f"its metadata has {len(document)} bytes"
    return _fault(document, spec)


@lru_cache(maxsize=256)
def _fault(document: bytes, spec: ArraySpec) -> str | None:
    """What is not as in the layout."""
    try:
        node = json.loads(document)
        fault = _fault_of_shape(node, spec)
        if fault is None:
            ArrayV3Metadata.from_dict(node)
        return fault
    except ILLEGIBLE as error:
        return f"its metadata cannot be understood ({type(error).__name__}: {error})"


def _fault_of_shape(node: Mapping[str, Any], spec: ArraySpec) -> str | None:
    shape = _lengths(node["shape"])
    cut = _lengths(node["chunk_grid"]["configuration"]["chunk_shape"])
    fixed = [FIXED_SIZES.get(dim) for dim in spec.dims]
    found = node["node_type"], node["data_type"], node.get("storage_transformers", [])
    if found != ("array", spec.dtype, []):
        return f"{reprlib.repr(found)} instead of an array of {spec.dtype}"
    if len(shape) != len(fixed) or any(
        f not in (None, n) for f, n in zip(fixed, shape, strict=True)
    ):
        return f"shape {shape} instead of {spec.dims}"
    row_bytes = math.prod(shape[1:]) * np.dtype(spec.dtype).itemsize
    if shape[0] > MOST_FRAMES or cut[0] * row_bytes > MOST_OBJECT_BYTES:
        return f"shape {shape} in objects of {cut} is larger than anything that fits"
    return _fault_of_codecs(node["codecs"], cut, shape)


def _fault_of_codecs(codecs: Sequence[Any], cut: list[int], shape: list[int]) -> str | None:
    """What is unknown of codecs, or cut otherwise than along the first axis and into strips."""
    if min(cut, default=0) < 1 or cut[1:] != shape[1:]:
        return f"objects of {cut} of an array of {shape}"
    names = [codec["name"] for codec in codecs]
    if not CODECS.issuperset(names):
        return f"codecs {reprlib.repr(names)}"
    settings_of_pcodec = [c.get("configuration") for c in codecs if c["name"] == PCODEC]
    if any(settings != PCODEC_SETTINGS for settings in settings_of_pcodec):
        return f"pcodec with {reprlib.repr(settings_of_pcodec)}"
    inner = [codec["configuration"] for codec in codecs if codec["name"] == "sharding_indexed"]
    for settings in inner:
        parts = _lengths(settings["chunk_shape"])
        if math.prod(cut) > math.prod(parts) * MOST_PARTS:
            return f"objects of {cut} in parts of {parts}"
        within, inner_codecs = shape, settings["codecs"]
        if inner_codecs[:1] == [TURNED_UPRIGHT] and len(parts) == len(shape) == 3:
            if shape[1] % parts[1] or shape[1] > parts[1] * MOST_STRIPS:
                return f"strips of {parts} of images of {shape}"
            within, inner_codecs = [shape[0], parts[1], shape[2]], inner_codecs[1:]
            if [codec["name"] for codec in inner_codecs] != PACKED:
                return f"codecs {reprlib.repr(settings['codecs'])}"
        fault = _fault_of_codecs(settings["index_codecs"], cut, shape) or _fault_of_codecs(
            inner_codecs, parts, within
        )
        if fault:
            return fault
    return None


def _lengths(values: Any) -> list[int]:
    lengths = list(values)
    if len(lengths) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError(f"lengths {reprlib.repr(lengths)}")
    return lengths


def is_range(frames: Any) -> bool:
    """Whether it is [start, stop], of frames that a drive may have."""
    is_pair = isinstance(frames, list) and [type(n) for n in frames] == [int, int]
    return is_pair and 0 <= frames[0] < frames[1] <= MOST_FRAMES


def check_whole(path: str, array: Array[Any]) -> None:
    """Refuse an array that does not fit into memory as a whole.

    Raises:
        DataDamaged: it does not; none of those that are read so is as large.
    """
    if array.nbytes > MOST_WHOLE_BYTES:
        raise DataDamaged(f"array {path} has {array.nbytes} bytes; it is not read as a whole")
