"""Folders of images read as a drive: natural name order, EXIF orientation applied."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.media import (
    IMAGE_SUFFIXES,
    UnreadableVideo,
    has_suffix,
    list_folder,
    open_bytes,
    qualified,
)
from storage.records import Clip
from storage.scenes import THUMBNAIL, SceneMeter, SceneSeries

ASSUMED_HZ = 10.0
LARGEST_IMAGE = 2**26  # pixels, more than cameras have; decoding takes some 8 bytes of memory each
LISTING_S = 60  # that the listing of a server's folder is kept
REMEDY = "probe it again"
ORIENTATION = 0x0112  # EXIF tag
CLOCKWISE_DEGREES = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}
PICTURE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
# Whatever a file is named: for others Pillow may start a program (EPS: Ghostscript).
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
# What Pillow raises for a file that is wrong; an OSError may be the disk's or a server's too.
SENSELESS = (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, struct.error)
BAD_IMAGE = (*SENSELESS, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageScan:
    """What a folder of images holds."""

    images: tuple[str, ...]  # locations in name order
    index: NDArray[np.int32]  # [N] positions in `images` that can be read
    lost: dict[int, str]  # the other positions, and why
    width: int
    height: int
    rotation: int  # degrees clockwise that EXIF asks for, of the first frame
    codec: str
    size_bytes: int
    series: SceneSeries


@dataclass(frozen=True)
class _Image:
    size: tuple[int, int]  # width, height after orientation
    rotation: int
    codec: str
    bytes: int
    thumbnail: NDArray[np.uint8]


def list_images(location: str) -> list[str]:
    """Images directly in a folder, in natural name order."""
    return [file for file in list_folder(location)[0] if has_suffix(file, IMAGE_SUFFIXES)]


@contextmanager
def open_image(location: str) -> Iterator[Image.Image]:
    """The image at a path or URL, its header read; raises one of BAD_IMAGE for a wrong file."""
    with open_bytes(location) as file, Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(
                f"its header gives {image.width} x {image.height} pixels; at most {LARGEST_IMAGE} "
                "are read: make it smaller"
            )
        yield image


def is_picture(location: str) -> bool:
    """Whether an image holds a picture rather than measurements, such as 16-bit depth."""
    try:
        with open_image(location) as image:
            return image.mode in PICTURE_MODES
    except BAD_IMAGE as error:
        _raise_if_servers(error, location)
        return True  # probing says what is wrong with it


def read_image(location: str) -> NDArray[np.uint8]:
    """Upright RGB picture, uint8 [H, W, 3].

    Raises:
        UnreadableVideo: no image, cut off, or no 8-bit picture.
    """
    image, _, _ = _load(location)
    return np.asarray(image)


def scan_images(location: str, progress: Callable[[int], None] | None = None) -> ImageScan:
    """Decode every image of a folder; those of another size than most cannot be used.

    Raises:
        UnreadableVideo: no image can be read.
    """
    images = list_images(location)
    meter = SceneMeter()
    lost: dict[int, str] = {}
    positions: list[int] = []
    first: _Image | None = None
    size_bytes = 0
    size = _common_size(images, lost)
    for position, image in enumerate(images):
        if position in lost:
            continue
        try:
            one = _measure(image)
        except UnreadableVideo as error:
            lost[position] = str(error).removeprefix(f"{image}: ")
            continue
        first = first or one
        positions.append(position)
        size_bytes += one.bytes
        meter.add(one.thumbnail)
        if progress:
            progress(len(positions))
    if first is None:
        why = next(iter(lost.values()), "it holds none")
        raise UnreadableVideo(f"{location}: no image of the folder can be read: {why}")
    return ImageScan(
        tuple(images),
        np.array(positions, np.int32),
        dict(sorted(lost.items())),
        *size,
        first.rotation,
        first.codec,
        size_bytes,
        meter.finish(),
    )


def read_images(
    clip: Clip, index: NDArray[np.int32], count: int, size: tuple[int, int], rows: Iterable[int]
) -> Iterator[NDArray[np.uint8]]:
    """Images of a folder that is as it was when probed, as far as the record tells.

    Args:
        clip: the folder's record.
        index: [N] positions, among all images of the folder, of those that could be read.
        count: images that the folder held.
        size: (width, height) in pixels of those that could be read.
        rows: which of them are wanted.

    Raises:
        UnreadableVideo: the folder's images are others than when it was probed.
    """
    images = _as_probed(clip, index, count)
    for row in rows:
        try:
            image = read_image(images[index[row]])
        except FileNotFoundError:
            _listed.cache_clear()
            raise
        if image.shape[1::-1] != size:
            found = f"{images[index[row]]}: its size is {image.shape[1]} x {image.shape[0]} pixels"
            raise UnreadableVideo(f"{found}, {size[0]} x {size[1]} when it was probed; {REMEDY}")
        yield image


def _as_probed(clip: Clip, index: NDArray[np.int32], count: int) -> tuple[str, ...]:
    """All images of the folder, if they are as many, and their files as large, as when probed."""
    fault = ""
    for _ in range(2):  # what is kept of a server may be of before
        images, sizes = _listed(clip.location, _listing_mark(clip.location))
        if len(images) != count:
            fault = f"holds {len(images)} images, {count} when it was probed"
        elif (used := sizes[index]).all() and used.sum() != clip.size_bytes:
            fault = f"its images have {used.sum()} bytes, {clip.size_bytes} when it was probed"
        else:
            return images
        _listed.cache_clear()
    raise UnreadableVideo(f"{clip.location}: {fault}; {REMEDY}")


@lru_cache(maxsize=4)
def _listed(location: str, mark: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The images of a folder, and their sizes in bytes, 0 where not known.

    Reading some frames must not list and sort the whole folder each time.
    """
    fs, path = url_to_fs(location)
    fs.invalidate_cache(path)
    sizes = {qualified(fs, e["name"]): int(e["size"] or 0) for e in fs.ls(path, detail=True)}
    images = list_images(location)
    return tuple(images), np.array([sizes.get(image, 0) for image in images], np.int64)


def _listing_mark(location: str) -> int:
    """Changes when images come, go or are renamed; on a server, which does not tell, with time."""
    fs, path = url_to_fs(location)
    if isinstance(fs, LocalFileSystem):
        return os.stat(path).st_mtime_ns
    return int(time.monotonic() // LISTING_S)


def _common_size(images: Sequence[str], lost: dict[int, str]) -> tuple[int, int]:
    """The size, after orientation, of most images; notes the others in `lost`."""
    sizes: dict[int, tuple[int, int]] = {}
    for position, location in enumerate(images):
        try:
            with open_image(location) as image:
                sizes[position] = _upright_size(image)
        except BAD_IMAGE as error:
            _raise_if_servers(error, location)
            lost[position] = _reason(error)
    common = Counter(sizes.values()).most_common(1)[0][0] if sizes else (0, 0)
    for position, size in sizes.items():
        if size != common:
            lost[position] = (
                f"its size is {size[0]} x {size[1]} instead of {common[0]} x {common[1]} pixels, "
                "that of most images"
            )
    return common


def _measure(location: str) -> _Image:
    image, rotation, codec = _load(location)
    rows, columns = THUMBNAIL
    grey = image.convert("L").resize((columns, rows), Image.Resampling.BOX, reducing_gap=2.0)
    with open_bytes(location) as file:
        size_bytes = file.seek(0, 2)
    return _Image(image.size, rotation, codec, size_bytes, np.asarray(grey))


def _load(location: str) -> tuple[Image.Image, int, str]:
    """(upright RGB image, degrees clockwise applied, format)."""
    try:
        with open_image(location) as image:
            if image.mode not in PICTURE_MODES:
                raise ValueError(
                    f"its pixels are {image.mode} (such as 16-bit depth), not 8-bit colour or grey"
                )
            rotation = CLOCKWISE_DEGREES.get(image.getexif().get(ORIENTATION, 1), 0)
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB"), rotation, (image.format or "").lower()
    except BAD_IMAGE as error:
        _raise_if_servers(error, location)
        raise UnreadableVideo(f"{location}: {_reason(error)}") from error


def _raise_if_servers(error: Exception, location: str) -> None:
    """Raise an error of a server again: an image that does not arrive is no bad image.

    Pillow's own errors are OSErrors without a number.
    """
    is_remote = split_protocol(location)[0] not in (None, "file", "local")
    kinds = ConnectionError | TimeoutError | PermissionError
    is_servers = isinstance(error, kinds) or getattr(error, "errno", None) is not None
    if is_remote and is_servers and not isinstance(error, FileNotFoundError):
        raise error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    is_turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if is_turned else image.size


def _reason(error: Exception) -> str:
    """What is wrong with an image; a lost file or connection rises instead."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that can be read"
    if isinstance(error, SENSELESS) or getattr(error, "errno", None) == errno.EINVAL:
        return f"its header makes no sense: {error}"  # EINVAL: it leads to before the file
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return str(error)
