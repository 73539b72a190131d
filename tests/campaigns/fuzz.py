"""Feed mutated input to every parser of untrusted data and watch what it does.

    python tests/campaigns/fuzz.py --cases 1000000 [--seed N] [--only NAME] [--json FILE]

Each parser may return or raise its documented exceptions. A crash is any other exception; an
escape is an import, a process, a connection, or a file or folder opened, listed, linked, made,
changed or removed that is not the case's own (by Python's audit events). What once found something
is kept in `corpus/` and always run first.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import encodings
import importlib
import io
import json
import logging
import os
import pickle
import pkgutil
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import av
import fsspec.asyn
import fsspec.implementations
import google_crc32c
import numpy as np
from av.video.stream import VideoStream
from numcodecs.pcodec import PCodec
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from zarr.core.array import Array
from zarr.storage import MemoryStore, StorePath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from storage import claims, upkeep
from storage.arrays import UNDECODABLE
from storage.bounds import check_array
from storage.commits import Commits
from storage.drives import drive_name
from storage.encoding import StoredRows, whole_array
from storage.errors import Claimed, DataDamaged, NotAStore, StoreTooNew
from storage.folders import open_folder
from storage.glance import glance_at
from storage.images import ORIENTATION, is_picture, scan_images
from storage.layout import FRAME_ARRAYS, SEGMENT_ARRAYS, by_name
from storage.local_folder import LocalFolder
from storage.media import UnreadableVideo, natural_key
from storage.objects import MOST_DOCUMENT_BYTES, check_name
from storage.probe import probe_drive
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan, Segment
from storage.shards import shard_reader, unpack
from storage.video import read_frames
from storage.wording import redacted
from ttt3r.checkpoint_import import model_tensors
from ttt3r.download import without_secrets
from ttt3r.fetch import cached_path, plain_url
from ttt3r.metrics import read_kitti_indexed, read_tum
from ttt3r.pickle_data import Name, RefusedPickle, read_pickle
from ttt3r.torch_zip import TorchZip
from ttt3r.weights_file import WeightsInfo, read_info

DEPTH, TIMESTAMP = by_name(SEGMENT_ARRAYS)["depth"], by_name(FRAME_ARRAYS)["timestamp"]
CORPUS = Path(__file__).with_name("corpus")
LONGEST_CASE_S = 5.0
LARGEST_GROWTH_MIB = 1024
FORBIDDEN = (
    "import", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.",
    "exec", "compile", "ctypes.", "shutil.", "os.rename",
)  # fmt: skip
CYTHON_FRAME = ("compile", b"_getframe()")
# Decord reads what it was handed, and what it made, through ctypes.
DECORD_DATA = ("ctypes.cdata", "ctypes.cdata/buffer", "ctypes.addressof")
# Where in an event's arguments a path is, and the handle of the folder that it starts from. All of
# these must be below the case's own folder.
PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.listdir": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.scandir": ((0, None),),
    "os.symlink": ((0, 2), (1, 2)),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "shutil.copyfile": ((0, None), (1, None)),
    "shutil.rmtree": ((0, 1),),
}
# What a claim says of its holder.
HOLDER = re.compile(r"/proc/(sys/kernel/random/boot_id|-?[0-9]+/stat)")
WORDS = (
    b"../", b"/etc/passwd", b"\0", b"\xff" * 8, b"cposix\nsystem\n", b"c__builtin__\neval\n",
    b"R", b"-1", b"1e999", b"nan", b"9" * 30, b"[" * 40, b"[" * 20_000, b'{"a":', b"://", b"::",
    b"\\", b"\n", b"%s", b"\x80\x05", b"\x94", b"(", b"t", b"PK\x01\x02", b"\xed\xa0\x80",
)  # fmt: skip


@dataclass(frozen=True)
class Parser:
    """One entry point, valid inputs to start from, and what it may raise."""

    name: str
    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    raises: tuple[type[Exception], ...]
    share: int  # of the cases
    harmless: tuple[str, ...] = ()  # events that it needs


@dataclass
class Report:
    """What fuzzing one parser gave."""

    name: str
    cases: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    crashes: dict[str, str] = field(default_factory=dict)  # what happened: the input, in hex


class Watch:
    """Notes what code does while a case runs; installed once, as hooks cannot be removed."""

    def __init__(self) -> None:
        self.allowed: str | None = None  # folder that may be read; None: not watching
        self.harmless: tuple[str, ...] = ()  # of the events, for the parser that runs
        self.escapes: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open" and (type(arguments[0]) is int or HOLDER.fullmatch(str(arguments[0]))):
            return  # what a handle leads to was watched when it was opened
        if event in PATHS:
            places = ((arguments[at], _argument(arguments, handle)) for at, handle in PATHS[event])
            if not all(is_below(self.allowed, *place) for place in places):
                self.escapes.append(f"{event} {arguments!r:.120}")
        elif event.startswith(FORBIDDEN) and not self._is_own(event, arguments):
            self.escapes.append(f"{event} {arguments!r:.120}")

    def _is_own(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """What libraries do by themselves, whatever the input is.

        Modules that are loaded are found again, and Cython makes a frame for a traceback.
        """
        if event == "import":
            return arguments[0] in sys.modules
        return event in self.harmless or (event, *arguments[:1]) == CYTHON_FRAME


def _argument(arguments: tuple[Any, ...], at: int | None) -> Any:
    return None if at is None or at >= len(arguments) else arguments[at]


def is_below(folder: str, path: Any, handle: int | None) -> bool:
    """Whether a path, as the system follows it, leads to `folder` or below.

    Args:
        folder: without links.
        path: text or bytes, a handle, or None for the current folder.
        handle: of the folder that a relative path starts from; None or -1 for the current one.
    """
    if type(path) is int:
        path, handle = "", path
    start = os.getcwd() if handle in (None, -1) else os.readlink(f"/proc/self/fd/{handle}")
    whole = os.path.join(start, os.fsdecode(path or ""))
    if "\0" in whole:  # the system takes no such name
        return True
    return Path(os.path.realpath(whole)).is_relative_to(folder)


def mutate(seed: bytes, rng: np.random.Generator) -> bytes:
    """A few changes of bytes, lengths and words."""
    data = bytearray(seed)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(0, len(data) + 1))
        kind = int(rng.integers(0, 7))
        if kind == 0 and data:
            data[place % len(data)] = int(rng.integers(256))
        elif kind == 1 and data:
            data[place % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[place:place] = WORDS[int(rng.integers(len(WORDS)))]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 9))]
        elif kind == 4:
            stop = place + int(rng.integers(1, 40))
            data[place:place] = data[place:stop]
        elif kind == 5:
            size = int(rng.choice([2, 4, 8]))
            value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 2**63 - 1])) % 256**size
            data[place : place + size] = value.to_bytes(size, "little")
        else:
            del data[place:]
    return bytes(data)


# ---- the parsers


def _pickle(data: bytes) -> object:
    constructors = {Name("collections", "OrderedDict"): lambda _: {}, Name("typing", "Any"): None}
    return read_pickle(data, constructors, lambda key: ("persistent", str(key)[:50]))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _urls(data: bytes) -> object:
    text = _text(data)
    # A chained URL loads the file systems that it names; only the trusted caller can give one.
    named = drive_name(text) if "://" not in text and "::" not in text else ""
    if "/" in named or named in (".", ".."):
        raise AssertionError(f"drive name {named!r} is not one plain name")
    shown = redacted(text), without_secrets(text)
    url = plain_url(text)
    if url is not None and cached_path(url, "/cache").parent != Path("/cache/weights"):
        raise AssertionError("the cached file is outside the cache")
    return shown, natural_key(text), check_name(text)


def parsers(folder: Path) -> list[Parser]:
    """All parsers; those that need files use one in `folder`."""
    place = folder / "case"

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def parse(data: bytes) -> object:
            place.write_bytes(data)
            return read(place)

        return parse

    def record(kind: Any) -> Callable[[bytes], object]:
        return lambda data: kind.from_json(json.loads(data))

    commits = Commits(open_folder(str(folder / "store")))

    def commit(data: bytes) -> object:
        target = folder / "store" / "commits" / "probe.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return commits.read("probe")

    store = _StoreCase(folder)
    refused = (ValueError,)
    malformed = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
    poses = b"# times\n0.0 1 2 3 0 0 0 1\n0.1 1 2 3 0 0 0 1\n"
    matrices = b"1 0 0 0 0 1 0 0 0 0 1 0\n1 0 0 1 0 1 0 0 0 0 1 2\n"
    nested = {"model": collections.OrderedDict(a=[1, 2.5, ("x", b"y", None, True)]), "n": {1, 2}}
    pickles = tuple(pickle.dumps(nested, protocol) for protocol in (2, 3, 4, 5))
    return [
        Parser("pickle", _pickle, pickles, (RefusedPickle,), 50),
        Parser(
            "urls",
            _urls,
            (
                b"s3://key:secret@bucket/a/b.mp4",
                b"hub:a/b@c/d.pth",
                b"infer/0001/0002",
                b"https://u:p@h/x.safetensors?sig=1",
                b"/a/b c/d.mkv",
            ),
            refused,
            15,
        ),
        Parser("tum", from_file(read_tum), (poses,), refused, 8),
        Parser("kitti", from_file(read_kitti_indexed), (matrices,), refused, 8),
        Parser(
            "safetensors",
            lambda d: read_info(io.BytesIO(d), "case"),
            (_safetensors(),),
            refused,
            10,
        ),
        Parser(
            "torch_zip",
            from_file(lambda p: model_tensors(TorchZip(p))),
            (_torch_zip(),),
            refused,
            6,
        ),
        Parser("drive_record", record(DriveRecord), (_drive_record(),), malformed, 4),
        Parser(
            "plan",
            record(Plan),
            (
                b'{"frames":9,"chunk_frames":4,"segments":[{"index":0,"start":0,'
                b'"stop":9,"part":0}]}',
            ),
            malformed,
            4,
        ),
        Parser("weights_record", record(WeightsInfo), (_weights_record(),), malformed, 4),
        Parser(
            "commit",
            commit,
            (b'{"key": "abc", "digests": {"a/b": "00"}, "frames": [0, 4]}',),
            (),
            4,
        ),
        Parser("array_metadata", _array_metadata, _array_documents(), UNDECODABLE, 4),
        Parser("object", _object, (_object_of_zeros(),), (ValueError, RuntimeError), 4),
        Parser("image", partial(_image, folder / "images"), _images(), (UnreadableVideo,), 6),
        Parser(
            "video",
            partial(_video, folder / "videos"),
            _videos(),
            (UnreadableVideo,),
            3,
            DECORD_DATA,
        ),
        Parser("store", store.run, store.seeds, (NotAStore, StoreTooNew), 1),
        Parser("claim", partial(_claim, folder / "claimed"), _claims(), (Claimed, DataDamaged), 1),
        Parser("shard", _shard, (_shard_of_zeros(),), (ValueError, RuntimeError), 4),
        Parser("packed", _packed, _packed_maps(), (ValueError,), 4),
    ]


def _claims() -> tuple[bytes, ...]:
    """Names and records of claims: of a dead process of this machine, and of another machine."""
    dead = {**claims.this_process(), "started": "1", "token": "a", "progress": 0, "deaths": 1}
    away = {**dead, "machine": "another", "started": None}
    return tuple(f"000001.json\n{json.dumps(holder)}".encode() for holder in (dead, away))


def _claim(root: Path, data: bytes) -> object:
    """Take over a claim, which nobody else then gets.

    An input is its name, a line feed and its record.
    """
    name, _, content = data.partition(b"\n")
    place = root / "claims" / "drive"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        (place / _text(name.replace(b"/", b""))).write_bytes(content)
    except (OSError, ValueError):  # no file can have the name
        return None
    claim, second = (claims.Claim(open_folder(str(root)), "drive") for _ in range(2))
    with mock.patch.multiple(claims, LEASE_S=0.0, WATCH_S=0.0), claim:  # nobody renews it
        _require_refused(second)
        return claim.deaths


def _require_refused(second: claims.Claim) -> None:
    """A worker that comes second, in this process, sees that the first one lives."""
    try:
        with second:
            raise AssertionError("two workers hold the same claim")
    except Claimed:
        pass


class _NamedFolder(LocalFolder):
    """A folder that takes no name which leads out of it, whoever asks."""

    def read(self, name: str, most: int = MOST_DOCUMENT_BYTES) -> bytes | None:
        self._check(name)
        return super().read(name, most)

    def download(self, name: str, target: Path) -> None:
        self._check(name)
        super().download(name, target)

    def delete(self, name: str) -> None:
        self._check(name)
        super().delete(name)

    def delete_tree(self, prefix: str) -> None:
        for name in self.objects():
            if name.startswith(f"{prefix}/"):
                self.delete(name)

    def _check(self, name: str) -> None:
        if name.startswith("/") or ".." in name.split("/"):
            raise AssertionError(f"{name!r} leads out of the store")


_STORE_RECORDS = (
    "commits/infer/0000/0000.json", "commits/align.json", "commits/fuse/merged.json", "zarr.json",
    "segments/0000/zarr.json", "segments/0000/gate/zarr.json", "trajectory/scale/zarr.json",
)  # fmt: skip


class _StoreCase:
    """The four commands that look at a whole store, on one with a record that was mutated.

    An input is the record's name, a line feed and its content.
    """

    def __init__(self, folder: Path) -> None:
        tempfile.tempdir = str(folder)  # copies of files to be digested are the case's own
        self._root = folder / "drive.zarr"
        _fill_store(self._root)
        self._whole = {path: path.read_bytes() for path in self._root.rglob("*") if path.is_file()}
        self.seeds = tuple(
            f"{name}\n".encode() + (self._root / name).read_bytes() for name in _STORE_RECORDS
        )
        self._added: list[Path] = []

    def run(self, data: bytes) -> object:
        """Describe, verify, collect garbage and repair; then nothing is damaged any more."""
        name, _, content = data.partition(b"\n")
        self._restore()
        if not self._place(name, content):
            return None
        store = ReconstructionStore(_NamedFolder(self._root, str(self._root)))
        found = upkeep.describe(store), upkeep.list_garbage(store, 0), upkeep.verify(store)
        dropped = upkeep.repair(store)
        left = upkeep.verify(store)
        if left:
            raise AssertionError(f"still damaged after the repair: {left}")
        return *found, dropped

    def _restore(self) -> None:
        for path in self._added:
            path.unlink(missing_ok=True)
        self._added.clear()
        for path, content in self._whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _place(self, name: bytes, content: bytes) -> bool:
        """Put the record; False where no file can have the name."""
        path = self._root / _text(name)
        if b"\0" in name or b".." in name or not str(path).startswith(f"{self._root}/"):
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError:
            return False
        if path not in self._whole:
            self._added.append(path)
        return True


def _fill_store(root: Path) -> None:
    """A small store with a chunk, a trajectory, a mesh and a plan."""
    segment = Segment(0, 0, 2, 0)
    plan = {"frames": 2, "chunk_frames": 2, "segments": [segment.__dict__]}
    store = ReconstructionStore.create(root, {"plan": plan})
    store.create_segment(segment, 2, 2, 2, 2, (1, 2), (1, 2))
    (chunk,) = segment.chunks(2)
    shapes = {"depth": (2, 2, 2), "confidence": (2, 2, 2), "cam_to_seg": (2, 4, 4),
              "intrinsics": (2, 3, 3), "descriptor": (2, 2), "gate": (2, 5),
              "state_tokens": (1, 2), "state_pose_memory": (1, 2)}  # fmt: skip
    store.write_chunk(segment, chunk, {n: np.ones(s, np.float32) for n, s in shapes.items()})
    store.commit_chunk(segment, chunk, {"key": "key"})
    store.write_trajectory({"scale": np.ones(1)})
    store.commit("align", {"key": "key"})
    files = {"fusion/mesh.ply": store.put_file("fusion/mesh.ply", b"mesh")}
    store.commit("fuse/merged", {"key": "key", "files": files})


@lru_cache(maxsize=1)
def _array_documents() -> tuple[bytes, ...]:
    """zarr.json of depth, in shards, and of timestamps."""
    arrays = ((DEPTH, np.zeros((16, 8, 8), DEPTH.dtype)), (TIMESTAMP, np.zeros(8)))
    return tuple(whole_array("a", spec, values)["a/zarr.json"] for spec, values in arrays)


def _array_metadata(data: bytes) -> object:
    """What the store does with zarr.json before it reads a chunk."""
    spec = TIMESTAMP if b"float64" in data else DEPTH
    check_array("a", data, spec)
    StoredRows.of_small(data, slice(0, 4))
    return Array.from_dict(StorePath(MemoryStore()), json.loads(data))


def _object_of_zeros() -> bytes:
    return whole_array("a", TIMESTAMP, np.zeros(8))["a/c.0"][:-4]


def _object(data: bytes) -> object:
    """An object whose checksum is right, whatever is in it."""
    return shard_reader(_array_documents()[1]).decode(data + _checksum(data), 0, 8)


def _shard_of_zeros() -> bytes:
    return whole_array("a", DEPTH, np.zeros((16, 8, 8), np.float16))["a/c.0.0.0"][:-4]


def _shard(data: bytes) -> object:
    """A shard whose index has the right checksum; those of its parts are in the data."""
    index = data[-32:]  # of two parts
    return shard_reader(_array_documents()[0]).decode(data + _checksum(index), 0, 16)


def _packed_maps() -> tuple[bytes, ...]:
    """Depth of 2 x 8 x 8 pixels, packed: alike, smooth and noisy."""
    rng = np.random.default_rng(0)
    maps = (np.ones(128), np.geomspace(1, 60, 128), rng.uniform(0.5, 80, 128))
    return tuple(PCodec(level=8).encode(depth.astype(np.float16)) for depth in maps)


def _packed(data: bytes) -> object:
    """What a checksum would otherwise keep from the decoder."""
    return unpack(data, (2, 8, 8), np.dtype(np.float16))


def _checksum(data: bytes) -> bytes:
    return google_crc32c.value(data).to_bytes(4, "little")


def _images() -> tuple[bytes, ...]:
    """Small pictures of every kind that is read, with EXIF and text where it takes them."""
    exif = Image.Exif()
    exif.update({ORIENTATION: 6, 0x010F: "maker", 0x9286: b"comment"})
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    texts = PngInfo()
    texts.add_text("Comment", "text" * 9, zip=True)
    texts.add_itxt("Title", "text", "en", "Titel", zip=True)
    color.info["icc_profile"] = bytes(range(99))
    saved = [
        (color, "PNG", {"exif": exif, "pnginfo": texts}),
        (color.convert("P"), "PNG", {"transparency": 3}),
        (color, "JPEG", {"exif": exif, "progressive": True}),
        (color.convert("CMYK"), "JPEG", {}),
        (color, "TIFF", {"exif": exif}),
        (color, "TIFF", {"compression": "tiff_lzw"}),
        (color.convert("1"), "TIFF", {"compression": "group4"}),
        (color, "WEBP", {"exif": exif}),
        (color, "WEBP", {"lossless": True, "save_all": True, "append_images": [color]}),
        (color.convert("P"), "BMP", {}),
    ]
    return tuple(_saved(image, form, options) for image, form, options in saved)


def _saved(image: Image.Image, form: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _image(folder: Path, data: bytes) -> object:
    """What listing and probing do with a folder of one picture."""
    folder.mkdir(exist_ok=True)
    place = folder / "1.png"
    place.write_bytes(_with_right_checksums(data))
    return is_picture(str(place)), scan_images(str(folder))


def _with_right_checksums(data: bytes) -> bytes:
    """A PNG whose chunks, however long they say they are, pass Pillow's first check."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    right, place = bytearray(data), 8
    while place + 12 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if stop + 4 > len(data):
            break
        right[stop : stop + 4] = zlib.crc32(data[place + 4 : stop]).to_bytes(4, "big")
        place = stop + 4
    return bytes(right)


@lru_cache(maxsize=1)
def _videos() -> tuple[bytes, ...]:
    """Small videos, mostly header, of the containers and codecs that cameras write."""
    kinds = (
        ("mp4", "libx264", "yuv420p", {"bf": "2", "g": "4"}),
        ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
        ("matroska", "libx264", "yuv420p", {}),
        ("webm", "libvpx-vp9", "yuv420p", {}),
        ("mpegts", "mpeg2video", "yuv420p", {}),
        ("avi", "mpeg4", "yuv420p", {}),
        ("avi", "mjpeg", "yuvj420p", {}),
        ("mov", "mjpeg", "yuvj420p", {}),
    )
    return tuple(_encoded(*kind) for kind in kinds)


def _encoded(container: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for _ in range(6):
            picture = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def _video(folder: Path, data: bytes) -> object:
    """What planning, probing and inference do with a video: all its frames, the last one alone."""
    folder.mkdir(exist_ok=True)
    place = folder / "clip.mp4"  # what it is, the content says
    place.write_bytes(data)
    glance_at(str(place))
    record, table = probe_drive(str(place))
    frames = list(read_frames(record, table, 0, record.frames))
    (last,) = read_frames(record, table, record.frames - 1, record.frames)
    if len(frames) != record.frames or {frame.shape for frame in frames} != {last.shape}:
        raise AssertionError(f"{len(frames)} frames came of {record.frames}, or of other sizes")
    if record.clips[0].backend == "decord":
        by_pyav = replace(record, clips=(replace(record.clips[0], backend="pyav"),))
        others = list(read_frames(by_pyav, table, 0, record.frames))
        if repeated := _repeats(frames) - _repeats(others):
            raise AssertionError(f"by decord {repeated} repeat the frame before")
    return record.to_json()


def _repeats(frames: list[Any]) -> set[int]:
    """Frames that equal the one before."""
    return {i for i in range(1, len(frames)) if np.array_equal(frames[i], frames[i - 1])}


def _weights_record() -> bytes:
    from ttt3r.weights import weights_info

    return json.dumps(weights_info("compact").to_json()).encode()


def _safetensors() -> bytes:
    metadata = {"__metadata__": {"ttt3r": _weights_record().decode()}}
    header = json.dumps({**metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


def _drive_record() -> bytes:
    clip = {"location": "a.mp4", "frames": 3, "size_bytes": 9, "backend": "pyav"}
    lost = {"clip": 0, "index": 3, "reason": "gone", "count": 1}
    record = {"name": "a", "location": "a.mp4", "clips": [clip], "frames": 3, "width": 8,
              "height": 8, "fps": 10.0, "duration_s": 0.3, "codec": "h264", "rotation": 0,
              "cuts": [1], "unreadable": [lost], "problems": ["x"]}  # fmt: skip
    return json.dumps(record).encode()


def _torch_zip() -> bytes:
    """A checkpoint of one tensor, as torch.save lays it out."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0K\x02K\x02\x86K\x02K\x01\x86\x89}tR"
    )
    data = b"\x80\x02}" + text("model") + b"}" + text("a.weight") + tensor + b"ss."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(16))
    return buffer.getvalue()


# ---- running


def fuzz(parser: Parser, cases: int, seed: int, watch: Watch, folder: Path) -> Report:
    """Run one parser on its seeds, what once found something, and mutations."""
    report, rng = Report(parser.name), np.random.default_rng([seed, *parser.name.encode()])
    for one in parser.seeds:
        _run(parser, one, report, watch, folder)
    for one in regressions(parser.name):
        _run(parser, one, report, watch, folder)
    while report.cases < cases:
        start = parser.seeds[int(rng.integers(len(parser.seeds)))]
        _run(parser, mutate(start, rng), report, watch, folder)
    return report


def _run(parser: Parser, data: bytes, report: Report, watch: Watch, folder: Path) -> None:
    watch.escapes.clear()
    began = time.perf_counter()
    watch.allowed, watch.harmless = str(folder), parser.harmless
    try:
        parser.parse(data)
        report.accepted += 1
    except parser.raises:
        pass
    except Exception as error:
        watch.allowed = None
        report.crashes.setdefault(f"{type(error).__name__}: {str(error)[:120]}", data.hex())
    finally:
        watch.allowed = None
    taken = time.perf_counter() - began
    report.cases += 1
    report.slowest_s = max(report.slowest_s, taken)
    for escape in watch.escapes[:1]:
        report.crashes.setdefault(f"escape: {escape}", data.hex())
    if taken > LONGEST_CASE_S:
        report.crashes.setdefault(f"took {taken:.1f} s", data.hex())


def _load_what_is_loaded_on_first_use() -> None:
    """Codecs, and what fsspec needs for a URL: no doing of the input."""
    codecs = (module.name for module in pkgutil.iter_modules(encodings.__path__))
    names = [f"encodings.{name}" for name in codecs if name not in ("mbcs", "oem")]
    kinds = pkgutil.iter_modules(fsspec.implementations.__path__)
    for module in (*names, "s3fs", *(f"fsspec.implementations.{kind.name}" for kind in kinds)):
        with contextlib.suppress(ImportError):  # what it needs is not installed
            importlib.import_module(module)
    for document in _array_documents():
        _array_metadata(document)
    with tempfile.TemporaryDirectory() as folder:
        for video in _videos():
            _video(Path(folder), video)
    Image.init()
    fsspec.asyn.get_loop()  # a pair of sockets within this process


def regressions(parser: str) -> list[bytes]:
    """Inputs that once found a defect: files `<parser>-<what>.bin` of the corpus."""
    deep = [b"[" * 100_000]  # RecursionError from JSON
    return deep + [file.read_bytes() for file in sorted(CORPUS.glob(f"{parser}-*.bin"))]


def fuzz_all(cases: int, seed: int, only: str = "") -> list[Report]:
    """Fuzz all parsers, each with its share of `cases`."""
    logging.disable()
    warnings.simplefilter("ignore")  # Pillow's; to show one opens its source
    _load_what_is_loaded_on_first_use()
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        chosen = [p for p in parsers(folder) if only in p.name]
        total = sum(p.share for p in chosen)
        reports = []
        for parser in chosen:
            began = time.perf_counter()
            report = fuzz(parser, -(-cases * parser.share // total), seed, watch, folder)
            reports.append(report)
            print(
                f"{report.name:<16}{report.cases:>9} cases {report.accepted:>8} accepted "
                f"{len(report.crashes):>3} findings, slowest {report.slowest_s:.3f} s, "
                f"{time.perf_counter() - began:.0f} s in all",
                flush=True,
            )
    return reports


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a parser's name")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    before = peak_mib()
    reports = fuzz_all(arguments.cases, arguments.seed, arguments.only)
    grown = peak_mib() - before
    findings = sum(len(report.crashes) for report in reports)
    for report in reports:
        for what, data in report.crashes.items():
            print(f"{report.name}: {what}\n    {data[:400]}")
    total = sum(report.cases for report in reports)
    print(f"{total} cases, {findings} findings, {grown:.0f} MiB more memory")
    if arguments.json:
        rows = [report.__dict__ for report in reports]
        arguments.json.write_text(
            json.dumps({"cases": total, "memory_mib": grown, "parsers": rows})
        )
    return 1 if findings or grown > LARGEST_GROWTH_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
