"""Which recordings a location holds: one drive, or a collection of them."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from itertools import count
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from storage.errors import (
    Claimed,
    DataDamaged,
    NotAStore,
    StoreError,
    StoreMissing,
    StoreRefused,
    StoreTooNew,
)
from storage.failures import explaining, is_refused_everything
from storage.images import is_picture
from storage.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    WEB,
    file_name,
    has_suffix,
    is_file,
    is_passed_over,
    is_there,
    list_folder,
    natural_key,
    pass_over,
    qualified,
    url_path,
    videos_among,
)
from storage.reconstruction import ReconstructionStore
from storage.remote_folder import REMOTE_OPTIONS

log = logging.getLogger(__name__)

DEEPEST = 8  # folders below the collection that are looked into
LONGEST_NAME = 120  # characters
MOST_NAME_BYTES = 200  # a file system takes 255, with what we append
LOOKERS = 32  # threads that look whose a name is

TakesOver = Callable[[str, str], bool]  # of a store's URL and a drive's location


@dataclass(frozen=True)
class DriveLocation:
    """Where a drive is, and the name of its results: unique, and safe as a file name."""

    name: str
    location: str


def list_drives(
    collection: str, output: str | None = None, may_take_over: TakesOver | None = None
) -> list[DriveLocation]:
    """The drives at a path, fsspec URL or glob, in natural name order.

    - A video file is a drive, named after the file.
    - A folder that directly holds videos is one drive of clips, named after the folder; if
      subfolders hold drives too, each video is a drive, and so is each of those.
    - A folder that directly holds two or more images, and no video, is one drive. Folders of
      16-bit or float images (depth maps) are passed over.
    - Any other folder: what its subfolders hold, at any depth up to 8; hidden ones and Zarr
      groups (results of earlier runs, whose reports hold pictures) are ignored.
    - A glob: what each match holds, by the rules above.
    - Previews that cameras put beside their videos (.lrv) are no videos where there are others.
    - Links in a folder or glob that lead out of their own folder, or nowhere, names that are not
      UTF-8, and folders found that may not be read are passed over.

    Names that clash are prefixed by those of their parent folders. With the `output` that takes
    `<name>.zarr` a drive keeps the name under which it is there, for as long as it is; others are
    prefixed, also when that drive has left the collection. A store made for another location is a
    drive's own where `may_take_over` says so.

    Raises:
        ValueError: nothing is found; says what was looked for.
        StoreUnavailable: the location or the output cannot be read.
    """
    if not collection.strip():
        raise ValueError("no drives are given; expected a video, a folder or a glob of these")
    with explaining(collection):
        roots = _roots(collection)
        found = [location for root in roots for location in _drives_in(root, 0, root == collection)]
    if not found:
        if "://" not in collection and not has_magic(collection) and not os.path.exists(collection):
            raise ValueError(f"{collection}: there is no such file or folder; check the path")
        raise ValueError(
            f"{collection}: no drive is found; expected a video file "
            f"({_some(VIDEO_SUFFIXES, '.mp4 .mov .mkv .avi')}), a folder of videos, of two or "
            "more 8-bit images (.jpg, .png, ...), of such folders, or a glob of these"
        )
    return _named(list(dict.fromkeys(found)), output and output.rstrip("/"), may_take_over)


def stores_in(location: str) -> list[str]:
    """Names, without `.zarr`, of the stores directly in a folder; none where nothing is there.

    Raises:
        StoreUnavailable: it cannot be read.
    """
    with explaining(location):
        fs, path = url_to_fs(location, **REMOTE_OPTIONS)
        found = fs.ls(path, detail=False) if is_there(fs, path) else []
    names = sorted(name.rstrip("/").rpartition("/")[2] for name in found)
    return [name.removesuffix(".zarr") for name in names if name.endswith(".zarr")]


def store_url(output: str, name: str) -> str:
    """Where the reconstruction of the drive `name` lies under `output`."""
    return f"{output.rstrip('/')}/{name}.zarr"


def require_output(output: str) -> None:
    """Make sure that reconstructions can be under `output`, as far as its address tells.

    Raises:
        ValueError: it is empty, on a web server, a file, a reconstruction itself, or a mistyped
            URL.
    """
    if not output.strip():
        raise ValueError("the output is empty; expected a folder or URL")
    if output.startswith(WEB):
        raise ValueError(
            f"output {output} is on a web server, which takes no results; expected a local folder "
            "or object storage, s3://BUCKET/FOLDER"
        )
    if mistyped := re.match(r"(s3a?|gs|gcs|abfs|az):/(?!/)", output):
        raise ValueError(f"output {output} is no URL; expected {mistyped[1]}://BUCKET/FOLDER")
    if "://" not in output and os.path.isfile(output):
        raise ValueError(f"output {output} is a file; give a folder, which is made if needed")
    with suppress(StoreError):
        ReconstructionStore.attributes_at(output)
        raise ValueError(
            f"output {output} is a reconstruction itself; give the folder that holds it"
        )


def absolute(location: str) -> str:
    """The location as stores record it, which is found from any working directory."""
    fs, path = url_to_fs(location)
    return str(path) if isinstance(fs, LocalFileSystem) else location.rstrip("/")


def store_name(url: str) -> str:
    """Name of the drive whose reconstruction is at `url`: "street" of "out/street.zarr"."""
    return url.rstrip("/").rpartition("/")[2].removesuffix(".zarr")


def hold_name(url: str, location: str) -> None:
    """Make the store at `url`, unless it is there, and say in it which drive it is for.

    A store that holds no drive yet may have been another's; one that a run is at work on is left.

    Raises:
        StoreUnavailable, NotAStore, StoreTooNew: as of `ReconstructionStore.create`.
    """
    held = {"location": absolute(location)}
    try:
        store = ReconstructionStore.open(url)
    except StoreMissing:
        ReconstructionStore.create(url, held)
        return
    if not _is_held(store.attributes, held):
        with suppress(Claimed), store.claim("drive"):
            if not _is_held(store.attributes, held):
                store.update_attributes(held)


def _is_held(attributes: Mapping[str, Any], held: Mapping[str, str]) -> bool:
    return "drive" in attributes or held.items() <= attributes.items()


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
    images = [file for file in files if has_suffix(file, IMAGE_SUFFIXES)]
    return videos_among(files), images


def is_zarr(location: str) -> bool:
    """Whether a folder's name says that it is a Zarr group, such as a reconstruction."""
    return file_name(location).lower().endswith(".zarr")


def _some(suffixes: frozenset[str], first: str) -> str:
    return f"{', '.join(first.split())} and {len(suffixes) - len(first.split())} other kinds"


def _is_glob(location: str) -> bool:
    """Whether it is a pattern; a file may have brackets in its name, a URL a query."""
    if not has_magic(location) or location.startswith(WEB):
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
        folders = {root for root in roots if fs.isdir(root) and not is_zarr(root)}
        videos = set(videos_among(root for root in roots if root not in folders))
        return [root for root in roots if root in folders or root in videos]
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
        if is_given or is_refused_everything(error):
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


def _named(
    locations: Sequence[str], output: str | None, may_take_over: TakesOver | None
) -> list[DriveLocation]:
    """Names from the last part of each location, and as many parents as tell them apart.

    A drive keeps the name of its store, and none gets the name of another's.
    """
    own = [_names_of(location) for location in locations]
    holders = {} if output is None else _holders(output, own)
    kept = _kept(locations, holders)
    if output is not None and may_take_over is not None:
        kept |= _taken_over(locations, own, kept, holders, output, may_take_over)
    names = [kept.get(i, tried[0]) for i, tried in enumerate(own)]

    def without_name() -> list[int]:
        clashing = _clashing(names)
        free = [i for i in range(len(names)) if i not in kept]
        return [i for i in free if i in clashing or holders.get(names[i]) is not None]

    for length in range(1, max(map(len, own))):
        for i in without_name():
            names[i] = own[i][min(length, len(own[i]) - 1)]
    left = set(without_name())
    used = {name.casefold() for i, name in enumerate(names) if i not in left}
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(1))
    for i in sorted(left):
        numbered = (f"{names[i]}-{number}" for number in numbers[names[i].casefold()])
        names[i] = next(n for n in numbered if not holders.get(n) and n.casefold() not in used)
    return [DriveLocation(n, at) for n, at in zip(names, locations, strict=True)]


def _names_of(location: str) -> list[str]:
    """The names that a drive may get, but for numbers: with no parent, with one, with all."""
    parts = _parts(location)
    return [_safe("_".join(parts[-length:])) for length in range(1, len(parts) + 1)]


def _kept(locations: Sequence[str], holders: Mapping[str, str | None]) -> dict[int, str]:
    """By its position, the name of the store of each drive that has one."""
    by_length = sorted(holders, key=len, reverse=True)
    held = {holders[name]: name for name in by_length if holders[name] is not None}
    places = map(absolute, locations)
    return {i: held[place] for i, place in enumerate(places) if place in held}


def _taken_over(
    locations: Sequence[str],
    own: Sequence[Sequence[str]],
    kept: Mapping[int, str],
    holders: Mapping[str, str | None],
    output: str,
    may_take_over: TakesOver,
) -> dict[int, str]:
    """By its position, the name of a store made for another location that a drive may have."""
    others = {name for name, holder in holders.items() if holder is not None} - set(kept.values())

    def find(position: int) -> str | None:
        tried = [name for name in own[position] if name in others]
        at = locations[position]
        return next((n for n in tried if may_take_over(store_url(output, n), at)), None)

    open_ = [i for i in range(len(locations)) if i not in kept]
    with ThreadPoolExecutor(LOOKERS) as pool:
        found = dict(zip(open_, pool.map(find, open_), strict=True))
    first = {name: i for i, name in reversed(found.items()) if name is not None}
    return {i: name for name, i in first.items()}


def _clashing(names: Sequence[str]) -> set[int]:
    """Positions of names that another name equals, upper and lower case being the same."""
    folded = [name.casefold() for name in names]
    counts = Counter(folded)
    return {i for i, name in enumerate(folded) if counts[name] > 1}


def _holders(output: str, own: Sequence[Sequence[str]]) -> dict[str, str | None]:
    """By name, the location that each store is for whose name a drive could get; None: of none."""
    names = {name for tried in own for name in tried}
    bases = {tried[-1] for tried in own}
    there = [n for n in stores_in(output) if n in names or re.sub(r"-\d+$", "", n) in bases]
    with ThreadPoolExecutor(LOOKERS) as pool:
        found = pool.map(lambda name: _holder(store_url(output, name)), there)
        return dict(zip(there, found, strict=True))


def _holder(url: str) -> str | None:
    """Location of the drive that the store at `url` is for; None: there is none that says so."""
    try:
        attributes = ReconstructionStore.attributes_at(url)
    except (StoreMissing, NotAStore, StoreTooNew, StoreRefused, DataDamaged):  # its run will tell
        return None
    drive = attributes.get("drive", attributes)
    location = drive.get("location") if isinstance(drive, dict) else None
    return location.rstrip("/") or location if isinstance(location, str) else None


def _parts(location: str) -> list[str]:
    """Folders and name, the suffix of a video file left out."""
    path = url_path(location) if "://" in location else url_to_fs(location)[1]
    netloc = urlsplit(location).hostname or "" if "://" in location else ""
    parts = [part for part in (netloc, *path.split("/")) if part] or ["drive"]
    last = PurePosixPath(parts[-1])
    if last.suffix.lower() in VIDEO_SUFFIXES:
        parts[-1] = last.stem
    return parts


def _safe(name: str) -> str:
    """A name that any file system and object store takes."""
    plain = re.sub(r"[^\w.\-]+", "_", name).strip("._-")[:LONGEST_NAME]
    return plain.encode()[:MOST_NAME_BYTES].decode(errors="ignore") or "drive"
