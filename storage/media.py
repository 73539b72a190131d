"""Open recordings anywhere and decode them packet by packet, errors included.

What probing and reading share. A recording is a path or any fsspec URL; remote bytes are
streamed, never copied to disk. One bad packet costs one frame, not the rest of the file.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from storage.failures import failure_behind

log = logging.getLogger(__name__)

WEB = "http://", "https://"
# fmt: off
VIDEO_SUFFIXES = frozenset([
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts",
    ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".insv", ".lrv", ".dav",
    ".mjpeg", ".mjpg", ".h264", ".264", ".h265", ".265", ".hevc",
])
PREVIEW_SUFFIXES = frozenset([".lrv"])  # small copies that cameras put beside their videos
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"])
# fmt: on
LARGEST_SIDE = 16384  # pixels; beyond it a header is taken to be false
LARGEST_PICTURE = 2**27  # pixels: 16384 x 8192; a few bytes may ask for more than memory holds
REMOTE_BLOCK = 4 * 2**20  # bytes a request of a remote file reads ahead
DEMUX_TRIES = 8  # damaged stretches in a row, without a packet between, before giving up
# Only plain containers, and no file but the one handed over: a playlist or a script named .mp4
# could make FFmpeg open others.
OPEN_OPTIONS = {
    "protocol_whitelist": "none",
    "format_whitelist": (
        "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,h264,hevc,mjpeg,m4v,mxf,ivf,nut,obu,"
        "dhav,yuv4mpegpipe,gif,wtv,vc1,mpeg2video"
    ),
}
# Some containers order seeking by decoding time, which comes before the time of showing.
SEEK_BACK_S = (0, 2, 10)
NO_PATH = (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
UNSPECIFIED = 2  # FFmpeg's number of the colour space that is not given
SINGLE_THREAD = "NONE"
ALL_THREADS = "AUTO"


class UnreadableVideo(ValueError):
    """A recording, or a frame of it, that cannot be had; the message says why and what to do."""


class Step(NamedTuple):
    """What one packet gave: frames, and an error where it could not be decoded."""

    packet: Packet | None  # None: what the decoder still held at the end, or a damaged stretch
    frames: list[VideoFrame]
    error: str | None


def url_path(location: str) -> str:
    """Path of a URL without its server; a web address has a query too, elsewhere "?" is a letter.

    A location without a scheme is a path already.
    """
    if location.startswith(WEB):
        return urlsplit(location).path
    _, scheme, rest = location.partition("://")
    return f"/{rest.partition('/')[2]}" if scheme else location


def file_name(location: str) -> str:
    """Last part of a path or URL, without a query."""
    return PurePosixPath(url_path(location).rstrip("/")).name


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that puts clip2 before clip10."""
    parts = re.split(r"(\d+)", name.casefold())
    numbered = [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]
    return numbered, name


def has_suffix(location: str, suffixes: frozenset[str]) -> bool:
    """Whether the file name ends in one of `suffixes` and is not hidden."""
    name = file_name(location)
    return PurePosixPath(name).suffix.lower() in suffixes and not name.startswith(".")


def videos_among(locations: Iterable[str]) -> list[str]:
    """Those named like videos; previews only where there is nothing else."""
    videos = [location for location in locations if has_suffix(location, VIDEO_SUFFIXES)]
    return [v for v in videos if not has_suffix(v, PREVIEW_SUFFIXES)] or videos


def list_folder(location: str) -> tuple[list[str], list[str]]:
    """(files, folders) directly inside, in natural name order, hidden ones left out.

    So are names that are not UTF-8, and links that lead out of the folder: whoever fills a
    folder could otherwise name any file of this machine. A link that is given as a location
    itself is followed.
    """
    fs, path = url_to_fs(location)
    entries = sorted(fs.ls(path, detail=True), key=lambda e: natural_key(file_name(e["name"])))
    files: list[str] = []
    folders: list[str] = []
    for entry in entries:
        name = entry["name"]
        if file_name(name).startswith(".") or name.rstrip("/") == path.rstrip("/"):
            continue
        if isinstance(fs, LocalFileSystem) and is_passed_over(name):
            continue
        (folders if entry["type"] == "directory" else files).append(qualified(fs, name))
    return files, folders


def is_passed_over(path: str) -> bool:
    """Whether something found in a local folder is left alone; says why, once."""
    if not path.isascii() and path.encode(errors="replace").decode() != path:
        pass_over(ascii(path), "its name is not UTF-8, which no record can hold: rename it")
        return True
    if _leads_out(path):
        pass_over(path, "this link leads out of its folder")
        return True
    if os.path.islink(path) and not os.path.exists(path):
        pass_over(path, "this link leads nowhere")
        return True
    return False


@cache
def pass_over(path: str, why: str) -> None:
    """Say, once, that something found is left alone."""
    log.warning("%s: passed over, as %s", path, why)


def _leads_out(path: str) -> bool:
    """Whether a local path is a link to something that is not below the link's own folder."""
    if not os.path.islink(path):
        return False
    folder = os.path.realpath(os.path.dirname(path))
    return not os.path.realpath(path).startswith(f"{folder.rstrip('/')}/")


def qualified(fs: Any, path: str) -> str:
    """A path of a file system as a location that opens by itself."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def is_there(fs: Any, path: str) -> bool:
    """Whether something is at a path; an outage, to fsspec's `exists` an absence, rises."""
    try:
        if isinstance(fs, LocalFileSystem):
            os.stat(path)
        else:
            fs.info(path)
    except FileNotFoundError as error:
        if (failure := failure_behind(error)) is not error:
            raise failure from None
        return False
    except OSError as error:
        if error.errno not in NO_PATH:
            raise
        return False
    return True


def is_file(fs: Any, path: str) -> bool:
    """Whether what is at a path is a file; an outage, to fsspec's `isfile` a folder, rises."""
    if isinstance(fs, LocalFileSystem):
        return bool(fs.isfile(path))
    return bool(fs.info(path)["type"] == "file")


def require(location: str) -> tuple[Any, str]:
    """(file system, path) of something that is there.

    Raises:
        UnreadableVideo: nothing is at `location`.
    """
    fs, path = url_to_fs(location)
    if not is_there(fs, path):
        raise UnreadableVideo(f"{location}: there is no such file or folder; check the path")
    if isinstance(fs, LocalFileSystem) and not (fs.isfile(path) or fs.isdir(path)):
        raise UnreadableVideo(
            f"{location}: neither a file nor a folder but a pipe, socket or device; copy the "
            "recording into a file"
        )
    return fs, path


def size_of(location: str) -> int:
    """Bytes of a file; 0 where a server does not say."""
    fs, path = require(location)
    return int(fs.size(path) or 0)


@contextmanager
def open_bytes(location: str) -> Iterator[IO[bytes]]:
    """The file at a path or URL, open for reading, streamed in blocks where remote."""
    fs, path = url_to_fs(location)
    options = {} if isinstance(fs, LocalFileSystem) else {"block_size": REMOTE_BLOCK}
    with fs.open(path, "rb", **options) as file:
        yield file


class _Source:
    """A file as FFmpeg reads it: a place beyond what the disk can address is no error of the disk.

    FFmpeg drops what a signal's handler raises in its calls, and takes the data to end there:
    recordings are read beside the main thread (`tasks.interruption`), where no handler runs.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.read, self.tell = file, file.read, file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -errno.EINVAL


@contextmanager
def open_video(
    location: str, threads: str = ALL_THREADS
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video track.

    Args:
        location: path or fsspec URL of one file.
        threads: ALL_THREADS, or SINGLE_THREAD where errors must have the same effect each time.

    Raises:
        UnreadableVideo: missing, empty, no video, index lost, false size.
        OSError: the disk or server fails, as in all that is read of the container later.
    """
    fs, path = require(location)
    if fs.isfile(path) and fs.size(path) == 0:
        raise UnreadableVideo(f"{location}: the file is empty (0 bytes); copy it again")
    with ExitStack() as stack:
        # FFmpeg never opens the file: "I/O error" is also its word for data that make no sense.
        # Read from here, errors of the disk or server are those of Python, all others the data's.
        source = _Source(stack.enter_context(open_bytes(location)))
        try:
            container = stack.enter_context(
                av.open(source, mode="r", metadata_errors="replace", options=dict(OPEN_OPTIONS))
            )
        except FFmpegError as error:
            raise UnreadableVideo(f"{location}: {_why_not_a_video(location, error)}") from error
        stream = _first_video(location, container)
        stream.thread_type = threads
        yield container, stream


class SeekMissed(Exception):
    """A container did not lead to the key frame that it was asked for."""


def decode_steps(
    container: InputContainer, stream: VideoStream, key_pts: int | None = None
) -> Iterator[Step]:
    """Decode every packet, then what the decoder still holds.

    Damaged data become steps with an error; anything else, such as a lost connection, raises.

    Args:
        container: as opened, not read from yet.
        stream: its video track.
        key_pts: timestamp of the key frame to start at; None for the beginning.

    Raises:
        SeekMissed: seeking does not find that key frame.
    """
    for packet, error in _packets_from(container, stream, key_pts):
        if packet is None:
            yield Step(None, [], error)
            continue
        try:
            yield Step(packet, list(packet.decode()), None)
        except FFmpegError as failure:
            yield Step(packet, [], _words(failure))
    yield from _drain(stream)


def packets_from(
    container: InputContainer, stream: VideoStream, key_pts: int | None
) -> Iterator[Packet]:
    """The track's packets as `decode_steps` takes them, damaged stretches skipped."""
    steps = _packets_from(container, stream, key_pts)
    return (packet for packet, _ in steps if packet is not None)


def reformat(
    location: str, reformatter: VideoReformatter, frame: VideoFrame, **wanted: Any
) -> VideoFrame:
    """A frame of a recording in another format or size.

    A colour space without a meaning counts as not given.

    Raises:
        UnreadableVideo: FFmpeg cannot convert such pictures.
    """
    try:
        return reformatter.reformat(frame, **wanted)
    except FFmpegError:
        frame.colorspace = UNSPECIFIED
    try:
        return reformatter.reformat(frame, **wanted)
    except FFmpegError as failure:
        raise UnreadableVideo(
            f"{location}: pictures of the format {frame.format.name} cannot be converted: "
            f"{_words(failure)}"
        ) from failure


class RgbConverter:
    """Turns decoded frames into upright RGB arrays; keeps its scaling tables between frames."""

    def __init__(self, location: str) -> None:
        self._location, self._reformatter = location, VideoReformatter()
        self._is_mirrored: bool | None = None  # of the first frame, as probing looks at

    def convert(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] with the recording's rotation, and mirroring, applied."""
        if self._is_mirrored is None:
            self._is_mirrored = is_mirrored(frame)
        rgb = reformat(self._location, self._reformatter, frame, format="rgb24").to_ndarray()
        picture = rgb[::-1] if self._is_mirrored else rgb
        return np.ascontiguousarray(np.rot90(picture, quarter_turns(frame)))


def quarter_turns(frame: VideoFrame) -> int:
    """Anticlockwise quarter turns, 0 to 3, that put the frame upright.

    Where `is_mirrored`, after it was turned upside down as in a mirror.
    """
    return round(frame.rotation / 90) % 4


def is_mirrored(frame: VideoFrame) -> bool:
    """Whether the recording asks to show its pictures as in a mirror.

    PyAV keeps a frame that was asked until the garbage collector runs: ask one of a recording.
    """
    side_data: Any = frame.side_data  # of which PyAV's types know a part
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return bool(a * d < b * c)


def upright_size(frame: VideoFrame) -> tuple[int, int]:
    """(width, height) in pixels after rotation."""
    size = frame.width, frame.height
    return size if quarter_turns(frame) % 2 == 0 else size[::-1]


def _packets(
    container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Packet | None, str | None]]:
    failures = 0
    while failures < DEMUX_TRIES:
        try:
            for packet in container.demux(stream):
                failures = 0
                if packet.size:  # PyAV ends with an empty packet; draining is done by `_drain`
                    yield packet, None
            return
        except IndexError:  # PyAV's answer to a track that appears after the header: not ours
            continue
        except FFmpegError as failure:
            failures += 1
            yield None, _words(failure)


def _packets_from(
    container: InputContainer, stream: VideoStream, key_pts: int | None
) -> Iterator[tuple[Packet | None, str | None]]:
    """Packets from the key packet with timestamp `key_pts` on."""
    if key_pts is None:
        yield from _packets(container, stream)
        return
    for back_s in SEEK_BACK_S:
        _seek(container, stream, key_pts - round(back_s / (stream.time_base or 1)))
        found = False
        for packet, error in _packets(container, stream):
            if not found and packet is not None and packet.is_keyframe and packet.pts is not None:
                found = packet.pts == key_pts
                if packet.pts > key_pts:
                    break
            if found:
                yield packet, error
        if found:
            return
    raise SeekMissed(f"no key frame with timestamp {key_pts} is found by seeking")


def _seek(container: InputContainer, stream: VideoStream, pts: int) -> None:
    """Go to a packet at or before `pts`, or to the start.

    Raises:
        SeekMissed: the container leads to neither.
    """
    start = stream.start_time or 0
    for place, options in ((max(pts, start), {"backward": True}), (start, {"any_frame": True})):
        try:
            container.seek(place, stream=stream, **options)
        except FFmpegError as failure:  # such as where there is nothing before
            missed = failure
        else:
            return
    raise SeekMissed(f"seeking to {pts} fails: {_words(missed)}")


def _drain(stream: VideoStream) -> Iterator[Step]:
    for _ in range(1024):  # more than any decoder holds back: an error may repeat, not for ever
        try:
            frames = stream.decode(None)
        except EOFError:
            return
        except FFmpegError as failure:
            yield Step(None, [], _words(failure))
        else:
            yield Step(None, list(frames), None)


def _words(failure: FFmpegError) -> str:
    return str(failure.strerror or failure).lower()


def _first_video(location: str, container: InputContainer) -> VideoStream:
    """The first video track that is no cover picture and has a plausible size."""
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not tracks:
        found = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise UnreadableVideo(f"{location}: no video track; the file holds {found} only")
    stream = tracks[0]
    if stream.codec_context is None:
        raise UnreadableVideo(f"{location}: no decoder for its video track is installed")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise UnreadableVideo(
            f"{location}: the header gives a picture of {width} x {height} pixels; "
            f"1 to {LARGEST_SIDE} a side can be read"
        )
    # Pictures may grow later than in the header; the decoder refuses such a one.
    stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
    return stream


def _why_not_a_video(location: str, error: FFmpegError) -> str:
    """A reason, from the first bytes, why FFmpeg does not know the file."""
    if isinstance(error, MemoryError):
        return "its header asks for more memory than there is"
    with open_bytes(location) as file:
        head = file.read(16)
        if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free") and not _has_box(file, b"moov"):
            return (
                "the MP4 index (moov) is lost, so its frames cannot be found; the recording was "
                "cut off before it was closed: copy it again or repair it with a tool such as "
                "untrunc"
            )
    # Not the bytes themselves: a link named like a video may lead to anything.
    return f"not a video that can be read; it looks like {_kind_of(head)}"


def _kind_of(head: bytes) -> str:
    """What the first bytes of a file say that it is."""
    kinds = {b"PK": "a zip archive", b"\x1f\x8b": "a gzip file", b"\x7fELF": "a program"}
    kinds |= {b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"%PDF": "a PDF document"}
    known = [kind for start, kind in kinds.items() if head.startswith(start)]
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return known[0] if known else "text" if is_text else "unknown data"


def _has_box(file: IO[bytes], wanted: bytes) -> bool:
    """Whether an MP4 file holds the top-level box `wanted`."""
    position, end = 0, file.seek(0, os.SEEK_END)
    for _ in range(10_000):
        if position > end - 8:  # or where no disk can look, by a size that makes no sense
            return False
        file.seek(position)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if kind == wanted:
            return True
        if size < 8:
            return False
        position += size
    return False
