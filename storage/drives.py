"""Which recordings a location holds: one drive, or a collection of them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from storage.errors import NotAStore, StoreMissing, StoreTooNew
from storage.images import is_picture
from storage.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    file_name,
    has_suffix,
    is_file,
    is_passed_over,
    is_there,
    list_folder,
    natural_key,
    pass_over,
    qualified,
)
from storage.objects import explaining, is_expired
from storage.reconstruction import ReconstructionStore

log = logging.getLogger(__name__)

DEEPEST = 8  # folders below the collection that are looked into
LONGEST_NAME = 120  # characters
LOOKERS = 32  # threads that look whose a name is


@dataclass(frozen=True)
class DriveLocation:
    """Where a drive is, and the name of its results: unique, and safe as a file name."""

    name: str
    location: str


def list_drives(collection: str, output: str | None = None) -> list[DriveLocation]:
    """The drives at a path, fsspec URL or glob, in natural name order.

    - A video file is a drive, named after the file.
    - A folder that directly holds videos is one drive of clips, named after the folder; if
      subfolders hold drives too, each video is a drive, and so is each of those.
    - A folder that directly holds two or more images, and no video, is one drive. Folders of
      16-bit or float images (depth maps) are passed over.
    - Any other folder: what its subfolders hold, at any depth up to 8; hidden ones and Zarr
      groups (results of earlier runs, whose reports hold pictures) are ignored.
    - A glob: what each match holds, by the rules above.
    - Links in a folder or glob that lead out of their own folder, names that are not UTF-8, and
      folders found that may not be read are passed over.

    Names that clash are prefixed by those of their parent folders. With the `output` that takes
    `<name>.zarr` a drive keeps the name under which it is there, and only others are prefixed.

    Raises:
        ValueError: nothing is found; says what was looked for.
        StoreUnavailable: the location, or an output that is looked into, cannot be read.
    """
    with explaining(collection):
        roots = _roots(collection)
        found = [location for root in roots for location in _drives_in(root, 0, root == collection)]
    if not found:
        raise ValueError(
            f"{collection}: no drive is found; expected a video file "
            f"({_some(VIDEO_SUFFIXES, '.mp4 .mov .mkv .avi')}), a folder of videos, of two or "
            "more 8-bit images (.jpg, .png, ...), of such folders, or a glob of these"
        )
    return _named(list(dict.fromkeys(found)), output and output.rstrip("/"))


def hold_name(url: str, location: str) -> None:
    """Make the store at `url`, unless it is there, and say in it which drive it is for.

    Raises:
        StoreUnavailable, NotAStore, StoreTooNew: as of `ReconstructionStore.create`.
    """
    try:
        ReconstructionStore.open(url)
    except StoreMissing:
        ReconstructionStore.create(url, {"location": _whole(location)})


def is_collection(location: str) -> bool:
    """Whether `location` is a glob or a folder of drives rather than one drive.

    Raises:
        ValueError: nothing is found at `location`.
    """
    drives = list_drives(location)
    is_glob = _is_glob(location)
    return is_glob or len(drives) > 1 or not _is_same(drives[0].location, location)


def drive_name(location: str) -> str:
    """Name of a drive's results: that of the file without its suffix, or of the folder."""
    return _safe(_parts(location)[-1])


def drive_files(location: str) -> tuple[list[str], list[str]]:
    """(videos, images) directly in a folder, in natural name order."""
    files, _ = list_folder(location)
    videos = [file for file in files if has_suffix(file, VIDEO_SUFFIXES)]
    images = [file for file in files if has_suffix(file, IMAGE_SUFFIXES)]
    return videos, images


def is_zarr(location: str) -> bool:
    """Whether a folder's name says that it is a Zarr group, such as a reconstruction."""
    return file_name(location).lower().endswith(".zarr")


def _some(suffixes: frozenset[str], first: str) -> str:
    return f"{', '.join(first.split())} and {len(suffixes) - len(first.split())} other kinds"


def _is_glob(location: str) -> bool:
    """Whether it is a pattern; a file may have brackets in its name, a URL a query."""
    if not has_magic(location) or location.startswith(("http://", "https://")):
        return False
    fs, path = url_to_fs(location)
    return not fs.exists(path)


def _roots(collection: str) -> list[str]:
    fs, path = url_to_fs(collection)
    fs.invalidate_cache()  # of a process that lives long: new drives are looked for
    if _is_glob(collection):
        matches = sorted((str(m) for m in fs.glob(path)), key=natural_key)
        if isinstance(fs, LocalFileSystem):
            matches = [m for m in matches if not is_passed_over(m)]
        roots = [qualified(fs, m) for m in matches if not file_name(m).startswith(".")]
        is_folder = [fs.isdir(r) and not is_zarr(r) for r in roots]
        kept = zip(roots, is_folder, strict=True)
        return [root for root, folder in kept if folder or has_suffix(root, VIDEO_SUFFIXES)]
    return [collection] if is_there(fs, path) and not is_zarr(path) else []


def _drives_in(location: str, depth: int, is_given: bool = False) -> list[str]:
    """Locations of the drives at and below a file or folder, which the user gave or we found."""
    fs, path = url_to_fs(location)
    if depth == 0 and is_file(fs, path):
        return [location]
    try:
        videos, images = drive_files(location)
        folders = list_folder(location)[1] if depth < DEEPEST else []
    except PermissionError as error:
        if is_given or is_expired(error):
            raise
        pass_over(location, "this folder may not be read")
        return []
    below = [d for f in folders if not is_zarr(f) for d in _drives_in(f, depth + 1)]
    if videos:
        return [*videos, *below] if below else [location]
    if len(images) >= 2 and is_picture(images[0]):
        return [location, *below]
    if images:
        log.info("%s: its images are no drive (a single one, or depth maps)", location)
    return below


def _is_same(a: str, b: str) -> bool:
    return url_to_fs(a)[1].rstrip("/") == url_to_fs(b)[1].rstrip("/")


def _named(locations: Sequence[str], output: str | None) -> list[DriveLocation]:
    """Names from the last part of each location, and as many parents as tell them apart.

    Of drives whose names clash, one whose store has the name already keeps it.
    """
    parts = [_parts(location) for location in locations]
    names = [_safe(p[-1]) for p in parts]
    kept: set[int] = set()

    def without_name() -> list[int]:
        clashing = [i for i in _clashing(names) if i not in kept]
        own = [(names[i], locations[i]) for i in clashing]
        kept.update(i for i, held in zip(clashing, _are_held(own, output), strict=True) if held)
        return [i for i in clashing if i not in kept]

    for length in range(2, max(len(p) for p in parts) + 1):
        for i in without_name():
            names[i] = _safe("_".join(parts[i][-length:]))
    left = without_name()
    tried = [(i, number) for i in left for number in range(1, len(left) + 1)]
    are_held = _are_held([(f"{names[i]}-{n}", locations[i]) for i, n in tried], output)
    numbers = {i: number for (i, number), held in zip(tried, are_held, strict=True) if held}
    free = iter(sorted(set(range(1, len(left) + 1)) - set(numbers.values())))
    for i in left:
        names[i] = f"{names[i]}-{numbers[i] if i in numbers else next(free)}"
    return [DriveLocation(n, at) for n, at in zip(names, locations, strict=True)]


def _clashing(names: Sequence[str]) -> list[int]:
    """Positions of names that another name equals, upper and lower case being the same."""
    folded = [name.casefold() for name in names]
    counts = Counter(folded)
    return [i for i, name in enumerate(folded) if counts[name] > 1]


def _are_held(own: Sequence[tuple[str, str]], output: str | None) -> list[bool]:
    """Of names and locations of drives: whether the store of that name is that drive's."""
    names = sorted({name for name, _ in own}) if output is not None else []
    with ThreadPoolExecutor(LOOKERS) as pool:
        holders = pool.map(lambda name: _holder(f"{output}/{name}.zarr"), names)
        found = dict(zip(names, holders, strict=True))
    return [found.get(name) == _whole(location) for name, location in own]


def _holder(url: str) -> str | None:
    """Location of the drive that the store at `url` is for; None: there is none that says so."""
    try:
        attributes = ReconstructionStore.open(url).attributes
    except (StoreMissing, NotAStore, StoreTooNew):
        return None
    drive = attributes.get("drive", attributes)
    location = drive.get("location") if isinstance(drive, dict) else None
    return location.rstrip("/") if isinstance(location, str) else None


def _whole(location: str) -> str:
    """The location as stores record it: a local path is absolute."""
    fs, path = url_to_fs(location)
    return str(path if isinstance(fs, LocalFileSystem) else location).rstrip("/")


def _parts(location: str) -> list[str]:
    """Folders and name, the suffix of a video file left out."""
    path = urlsplit(location).path if "://" in location else url_to_fs(location)[1]
    netloc = urlsplit(location).hostname or "" if "://" in location else ""
    parts = [part for part in (netloc, *path.split("/")) if part] or ["drive"]
    last = PurePosixPath(parts[-1])
    if last.suffix.lower() in VIDEO_SUFFIXES:
        parts[-1] = last.stem
    return parts


def _safe(name: str) -> str:
    """A name that any file system and object store takes."""
    plain = re.sub(r"[^\w.\-]+", "_", name).strip("._-")
    return plain[:LONGEST_NAME] or "drive"
