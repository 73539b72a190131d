"""Frames as the network wants them, and back to the pixels of the recording (section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

FAST_SHRINKAGE = 4  # from here on torch's kernel is within a grey level of Pillow's
WEIGHT_BITS = 22  # of the fixed-point weights by which Pillow resizes
SQUARE_SIZE = 224  # this image size means a square crop, all others keep the aspect


@dataclass(frozen=True)
class Fit:
    """Resize to `resized_*`, then crop `width` x `height` from (left, top); pixels."""

    resized_width: int
    resized_height: int
    left: int
    top: int
    width: int
    height: int


def fit(width: int, height: int, image_size: int, patch_size: int) -> Fit:
    """How frames of `width` x `height` pixels become the network's input.

    Args:
        width: of the recording, pixels.
        height: of the recording, pixels.
        image_size: target for the long side; 224 gives a square crop.
        patch_size: the sides of the result are multiples of it.

    Raises:
        ValueError: if no such result exists.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a frame of {width}x{height} pixels has nothing to resize")
    if patch_size < 2 or patch_size % 2:
        raise ValueError(f"the patch size is {patch_size}; expected a positive even number")
    long_side = max(width, height)
    target = image_size
    if image_size == SQUARE_SIZE:
        target = round(SQUARE_SIZE * max(width / height, height / width))
    resized = round(width * target / long_side), round(height * target / long_side)
    half_width, half_height = _half_crop(*resized, image_size, patch_size)
    result = Fit(
        *resized,
        left=resized[0] // 2 - half_width,
        top=resized[1] // 2 - half_height,
        width=2 * half_width,
        height=2 * half_height,
    )
    _check(result, (width, height), image_size, patch_size)
    return result


def _half_crop(width: int, height: int, image_size: int, patch_size: int) -> tuple[int, int]:
    """Half the sides of the centre crop of a resized image."""
    centre_x, centre_y = width // 2, height // 2
    if image_size == SQUARE_SIZE:
        return (min(centre_x, centre_y),) * 2
    half_width = 2 * centre_x // patch_size * (patch_size // 2)
    if width == height:  # square images become 4:3, in whole patches (the reference refuses rest)
        return half_width, 3 * half_width // 4 // (patch_size // 2) * (patch_size // 2)
    return half_width, 2 * centre_y // patch_size * (patch_size // 2)


def _check(found: Fit, source: tuple[int, int], image_size: int, patch_size: int) -> None:
    if found.width == 0 or found.height == 0:
        raise ValueError(
            f"a frame of {source[0]}x{source[1]} pixels is {found.resized_width}x"
            f"{found.resized_height} at image size {image_size}: too thin for one patch of "
            f"{patch_size} pixels; choose a larger image size or crop the recording"
        )


def preprocess(frame: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
    """Resize and crop one RGB frame.

    Args:
        frame: [H, W, 3] uint8.
        image_size: see `fit`.
        patch_size: see `fit`.

    Returns:
        [h, w, 3] uint8.
    """
    shape, shrinks = _checked_fit(frame, image_size, patch_size)
    kernel = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    resized = Image.fromarray(frame).resize((shape.resized_width, shape.resized_height), kernel)
    return _cropped(np.asarray(resized), shape)


def preprocess_fast(frame: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
    """`preprocess` within one grey level; of much larger frames in a fifth to a tenth of its time.

    These are resized by torch's vectorised Lanczos. Of others that would be two grey levels off
    at times, as few pixels make each of the result, and of tall ones ten.
    """
    shape, shrinks = _checked_fit(frame, image_size, patch_size)
    shrinks_much = max(frame.shape) >= FAST_SHRINKAGE * max(
        shape.resized_height, shape.resized_width
    )
    if not (shrinks and shrinks_much) or _is_tall(*frame.shape[:2]):
        return preprocess(frame, image_size, patch_size)
    size = (shape.resized_height, shape.resized_width)
    planes = as_tensor(frame).permute(2, 0, 1)[None]
    resized = functional.interpolate(planes, size, mode="lanczos", antialias=True)
    return _cropped(resized[0].permute(1, 2, 0).numpy(), shape)


def preprocess_on_device(frames: Tensor, image_size: int, patch_size: int) -> Tensor:
    """`preprocess` of many frames where they are, within one grey level: made for a GPU.

    Pillow's own arithmetic, in whole numbers, first along rows, then along columns; the same to
    the last bit for all but very wide pictures. Tall ones are resized by Pillow itself.

    Args:
        frames: [T, H, W, 3] uint8 on any device.
        image_size: see `fit`.
        patch_size: see `fit`.

    Returns:
        [T, h, w, 3] uint8 on the same device.
    """
    height, width = frames.shape[1:3]
    if _is_tall(height, width):
        exact = [preprocess(frame, image_size, patch_size) for frame in frames.cpu().numpy()]
        return as_tensor(np.stack(exact)).to(frames.device)
    shape = fit(width, height, image_size, patch_size)
    shrinks = max(width, height) > max(shape.resized_width, shape.resized_height)
    resized = _resample(frames, 2, shape.resized_width, shrinks)
    resized = _resample(resized, 1, shape.resized_height, shrinks)
    rows = slice(shape.top, shape.top + shape.height)
    return resized[:, rows, shape.left : shape.left + shape.width].contiguous()


def _is_tall(height: int, width: int) -> bool:
    """Whether Pillow may resize along columns first, which rounds otherwise."""
    return height > 2 * width


def _resample(frames: Tensor, axis: int, count: int, shrinks: bool) -> Tensor:
    """Resize [T, H, W, 3] uint8 along one axis."""
    if frames.shape[axis] == count:
        return frames
    index, weight = (
        torch.from_numpy(table).to(frames.device)
        for table in _taps(frames.shape[axis], count, shrinks)
    )
    along = [-1 if dim == axis else 1 for dim in range(4)]
    size = [count if dim == axis else n for dim, n in enumerate(frames.shape)]
    total = torch.full(size, 1 << (WEIGHT_BITS - 1), dtype=torch.int32, device=frames.device)
    for place, factor in zip(index, weight, strict=True):
        total.addcmul_(frames.index_select(axis, place).int(), factor.view(along))
    return (total >> WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _taps(count: int, resized: int, shrinks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels make each pixel of the result, int64, and their weights, int32: [taps, resized].

    Lanczos where frames shrink, else bicubic; weights in units of 2^-WEIGHT_BITS.
    """
    reach, kernel = (3.0, _lanczos) if shrinks else (2.0, _bicubic)
    scale = count / resized
    stretch = max(scale, 1.0)
    centre = (np.arange(resized) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), count)
    place = first + np.arange((stop - first).max())[:, None]
    weight = np.where(place < stop, kernel((place - centre + 0.5) / stretch), 0.0)
    weight = weight / weight.sum(axis=0) * (1 << WEIGHT_BITS)
    rounded = np.trunc(weight + np.copysign(0.5, weight))
    return np.minimum(place, count - 1), np.where(weight == 0, 0, rounded).astype(np.int32)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _checked_fit(frame: np.ndarray, image_size: int, patch_size: int) -> tuple[Fit, bool]:
    """How the frame becomes the input, and whether it shrinks."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"a frame is {frame.dtype} {frame.shape}; expected uint8 [H, W, 3]")
    height, width = frame.shape[:2]
    shape = fit(width, height, image_size, patch_size)
    return shape, max(width, height) > max(shape.resized_width, shape.resized_height)


def _cropped(resized: np.ndarray, shape: Fit) -> np.ndarray:
    rows = slice(shape.top, shape.top + shape.height)
    return resized[rows, shape.left : shape.left + shape.width].copy()


def as_tensor(images: np.ndarray | Tensor) -> Tensor:
    """The same memory where torch allows it: read-only arrays are copied."""
    if isinstance(images, np.ndarray) and not images.flags.writeable:
        images = images.copy()
    return torch.as_tensor(images)


def normalise(images: np.ndarray | Tensor) -> Tensor:
    """Colours [..., h, w, 3] uint8 to the network's input [..., 3, h, w], float32 in [-1, 1]."""
    images = as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; expected uint8 [..., h, w, 3]"
        )
    return images.float().div_(255).sub_(0.5).div_(0.5).movedim(-1, -3)


def source_intrinsics(intrinsics: np.ndarray, shape: Fit, width: int, height: int) -> np.ndarray:
    """Pinhole matrix of the recording's own pixels: undoes crop and resize.

    Args:
        intrinsics: [3, 3] pinhole matrix, pixels of the network's input.
        shape: how frames became the network's input.
        width: of the recording, pixels.
        height: of the recording, pixels.

    Returns:
        [3, 3] float64; the centre of the top-left pixel is (0, 0).
    """
    scales = np.array([shape.resized_width / width, shape.resized_height / height])
    source = np.eye(3)
    source[[0, 1], [0, 1]] = intrinsics[[0, 1], [0, 1]] / scales
    source[:2, 2] = (intrinsics[:2, 2] + (shape.left, shape.top) + 0.5) / scales - 0.5
    return source
