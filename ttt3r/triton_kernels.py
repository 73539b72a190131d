# mypy: ignore-errors
"""Triton's side of `fused.py`, which says what each kernel is and when it is used."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def rotate(
    x,
    cos,
    sin,
    out,
    tokens,
    stride_batch,
    stride_token,
    stride_head,
    heads: tl.constexpr,
    quarter: tl.constexpr,
    heads_block: tl.constexpr,
    quarter_block: tl.constexpr,
    through_fp16: tl.constexpr,
):
    """One program turns all heads of one token; see `layers.rotate`."""
    place = tl.program_id(0)
    batch, token = place // tokens, place % tokens
    head = tl.arange(0, heads_block)[:, None]
    channel = tl.arange(0, quarter_block)[None, :]
    inside = (head < heads) & (channel < quarter)
    source = x + batch.to(tl.int64) * stride_batch + token * stride_token
    source += head * stride_head + channel
    target = out + place.to(tl.int64) * (heads * quarter * 4) + head * (quarter * 4) + channel
    table = token * (quarter * 4) + channel
    for half in tl.static_range(2):  # rows turn the first half of the channels, columns the other
        first, second = 2 * half * quarter, (2 * half + 1) * quarter
        u = tl.load(source + first, mask=inside).to(tl.float32)
        v = tl.load(source + second, mask=inside).to(tl.float32)
        if through_fp16:
            u = u.to(tl.float16).to(tl.float32)
            v = v.to(tl.float16).to(tl.float32)
        c_u = tl.load(cos + table + first, mask=channel < quarter)
        c_v = tl.load(cos + table + second, mask=channel < quarter)
        s_u = tl.load(sin + table + first, mask=channel < quarter)
        s_v = tl.load(sin + table + second, mask=channel < quarter)
        turned_u = u * c_u + v * s_u
        turned_v = v * c_v + u * s_v
        if through_fp16:
            turned_u = turned_u.to(tl.float16).to(tl.float32)
            turned_v = turned_v.to(tl.float16).to(tl.float32)
        tl.store(target + first, turned_u.to(out.dtype.element_ty), mask=inside)
        tl.store(target + second, turned_v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalise(x, weight, bias, out, width, eps, block: tl.constexpr):
    """One program normalises one row; float32 inside."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / width
    away = tl.where(inside, value - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(away * away, axis=0) / width + eps)
    gain = tl.load(weight + column, mask=inside).to(tl.float32)
    shift = tl.load(bias + column, mask=inside).to(tl.float32)
    found = away * scale * gain + shift
    tl.store(out + row * width + column, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mix(x):
    """Murmur3's finaliser on int64 that hold 32 bits; see `synthetic.dice`."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


# Not specialised: every name would be compiled anew.
@triton.jit(do_not_specialize=["count", "columns", "index_stride", "name"])
def unit(keys, index, out, count, columns, index_stride, name, block: tl.constexpr):
    """Uniform float32 of (key of the row, name, index)."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    row, column = place // columns, place % columns
    key = _mix(tl.load(keys + row, mask=inside, other=0) ^ name)
    number = tl.load(index + row * index_stride + column, mask=inside, other=0)
    key = _mix(key ^ _mix((number + 0x9E3779B9) & 0xFFFFFFFF))
    tl.store(out + place, (key >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)
