"""Codecs that write no more than a chunk holds, whatever a store of somebody else says.

Zarr knows them by their usual names, so that its own reading is bounded likewise.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import zarr
from zarr.codecs import BloscCodec
from zarr.codecs.numcodecs import PCodec
from zarr.core.array_spec import ArraySpec as ChunkSpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from storage.shards import check_compressed, pack, unpack

PCODEC = "numcodecs.pcodec"
PCODEC_SETTINGS = {"level": 8}  # with others, of somebody else, nothing is written


class BoundedBlosc(BloscCodec):
    """Blosc that decompresses what is there to the size of the chunk, or not at all."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ChunkSpec) -> Buffer:
        wanted = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        check_compressed(chunk_bytes.to_bytes(), wanted)
        return super()._decode_sync(chunk_bytes, chunk_spec)


class BoundedPCodec(PCodec):
    """Pcodec, likewise; it packs as our own writing does."""

    def __init__(self, **settings: Any) -> None:
        # Zarr's own warns that the format's specification does not list it; see docs/decisions.
        object.__setattr__(self, "codec_config", {**settings, "id": "pcodec"})

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ChunkSpec) -> Buffer:
        if dict(self.codec_config) != {**PCODEC_SETTINGS, "id": "pcodec"}:
            return await super()._encode_single(chunk_data, chunk_spec)
        packed = await asyncio.to_thread(pack, chunk_data.as_numpy_array(), **PCODEC_SETTINGS)
        return chunk_spec.prototype.buffer.from_bytes(packed)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ChunkSpec) -> NDBuffer:
        shape, dtype = chunk_spec.shape, chunk_spec.dtype.to_native_dtype()
        values = await asyncio.to_thread(unpack, chunk_data.to_bytes(), shape, dtype)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)


_OURS = {"blosc": BoundedBlosc, PCODEC: BoundedPCodec}
for _name, _codec in _OURS.items():
    register_codec(_name, _codec)
_CHOSEN = {name: f"{codec.__module__}.{codec.__qualname__}" for name, codec in _OURS.items()}
zarr.config.set({"codecs": zarr.config.get("codecs") | _CHOSEN})
