"""Kernels of our own for a GPU: what else takes many passes over memory, or many launches, in one.

Used where Triton (part of torch for CUDA) and the C compiler that it needs are at hand. Who calls
them has the same arithmetic in torch, which is the definition and runs everywhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1024

log = logging.getLogger(__name__)


class Kernels:
    """The kernels, until one of them cannot be built here."""

    def __init__(self) -> None:
        self._is_off = importlib.util.find_spec("triton") is None

    def apply_to(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether kernels that read `x` and write `dtype` are to be used."""
        return dtype == torch.bfloat16 and not torch.is_grad_enabled() and self.are_on(x.device)

    def are_on(self, device: torch.device) -> bool:
        """Whether `device` has kernels at all."""
        return device.type == "cuda" and not self._is_off

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, through_fp16: bool) -> Tensor | None:
        """`layers.rotate` of [B, tokens, heads, head_dim]; None where it cannot be built."""
        batch, tokens, heads, width = x.shape
        if x.stride(3) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        quarter = width // 4
        return self._run(
            out, "rotate", (batch * tokens,),
            x, cos, sin, out, tokens, x.stride(0), x.stride(1), x.stride(2),
            heads=heads, quarter=quarter,
            heads_block=_power_of_two(heads), quarter_block=_power_of_two(quarter),
            through_fp16=through_fp16,
        )  # fmt: skip

    def normalise(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor | None:
        """Layer norm over the last axis, rounded to `dtype`; None where it cannot be built."""
        x = x.contiguous()
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        width = x.shape[-1]
        return self._run(
            out, "normalise", (x.numel() // width,),
            x, weight, bias, out, width, eps, block=_power_of_two(width),
        )  # fmt: skip

    def unit(self, keys: Tensor, name: int, index: Tensor) -> Tensor | None:
        """`Dice.unit` of int64 keys [B] and int64 index [B or 1, ...]; None likewise."""
        index = index.contiguous()
        shape = (keys.shape[0], *index.shape[1:])
        out = torch.empty(shape, device=keys.device)
        columns = out[0].numel()
        return self._run(
            out, "unit", (-(-out.numel() // _BLOCK),),
            keys, index, out, out.numel(), columns, columns if index.shape[0] > 1 else 0, name,
            block=_BLOCK,
        )  # fmt: skip

    def _run(
        self, out: Tensor, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any
    ) -> Tensor | None:
        try:
            kernels = importlib.import_module("ttt3r.triton_kernels")
            with torch.cuda.device_of(out):
                getattr(kernels, name)[grid](*arguments, **constants)
        except Exception as error:  # whatever Triton and the compiler have to say
            if torch.cuda.is_current_stream_capturing():
                raise
            self._is_off = True
            log.warning("kernels are not built, and inference is slower for it: %s", error)
            return None
        return out


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


KERNELS = Kernels()
