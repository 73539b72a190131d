"""Recordings that are wrong in some way, made from small numbered videos and from bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from numbered_video import HEIGHT, RATE, WIDTH, X264, encode, picture
from PIL import Image

FRAMES = 60
GROUP = 10  # frames from key frame to key frame
NO_B_FRAMES = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
MPEG = {"g": "10", "qmin": "2", "qmax": "2"}
SECRET = "the first line of a file that no recording may show"
TEXTS = {
    "text": "not an image",
    "svg": "<svg/>",
    "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 96\n%%EndComments\nshowpage\n",
}
NOWHERE = "http://127.0.0.1:9/never.ts"


@dataclass(frozen=True)
class BadInput:
    """One recording, and what must come of it."""

    name: str  # of the file or folder; all are different
    make: Callable[[Path], object]  # makes it at a path
    error: str | None = None  # pattern of the one-line error; "" any; None: frames come
    either: bool = False  # an error will do too, if no frame must come
    least: int = 1  # frames that come at least; with `either` 0 for any number or an error
    numbered: str = ""  # a frame shows its number by "time", or by "index" in the clip
    hit: Callable[[], frozenset[int]] = frozenset  # first frames of groups whose bytes are hurt
    finding: str | None = None  # pattern that one of the listed problems matches
    quick: bool = False  # part of the default tests


@cache
def whole(container: str) -> bytes:
    """Sixty numbered frames in a container."""
    codec, options, form, extra = {
        "mp4": ("libx264", X264, "mp4", {}),
        "faststart.mp4": ("libx264", X264, "mp4", {"movflags": "faststart"}),
        "fragments.mp4": ("libx264", X264, "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        "mov": ("mpeg4", MPEG, "mov", {}),
        "mkv": ("libx264", X264, "matroska", {}),
        "webm": ("libvpx", {"g": "10", "b": "4M"}, "webm", {}),
        "ts": ("libx264", X264, "mpegts", {}),
        "avi": ("mpeg4", MPEG, "avi", {}),
        "mpg": ("mpeg2video", MPEG, "mpeg", {}),
        "flv": ("libx264", NO_B_FRAMES, "flv", {}),
        "h264": ("libx264", NO_B_FRAMES, "h264", {}),
        "mjpeg": ("mjpeg", {"qmin": "2", "qmax": "2"}, "mjpeg", {}),
    }[container]
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    with tempfile.NamedTemporaryFile() as file:  # "faststart" rewrites its own output
        path = Path(file.name)
        encode(path, range(FRAMES), codec, options, None, WIDTH, form, pixels, extra)
        return path.read_bytes()


CONTAINERS = (
    "mp4", "faststart.mp4", "fragments.mp4", "mov", "mkv", "webm", "ts", "avi", "mpg", "flv",
    "h264", "mjpeg",
)  # fmt: skip


def all_bad_inputs(url: str = NOWHERE) -> list[BadInput]:
    """Every case; names are unique. Scripts refer to `url`, which must not be asked."""
    makers = (
        cut_off, damaged, wrong_headers, not_videos, partial(references, url), odd_sizes,
        odd_times, odd_scenes, odd_pixels, odd_places, folders,
    )  # fmt: skip
    cases = [case for maker in makers for case in maker()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return cases


# ---- cut off, damaged


# Frames that came of each with PyAV 18.1, by share and last byte; by kind of damage.
# 0: any number, or an error.
CUT = {
    "mp4": (0, 0, 0, 0, 60),
    "faststart.mp4": (0, 0, 2, 40, 59),
    "fragments.mp4": (0, 0, 20, 48, 60),
    "mov": (0, 0, 0, 0, 0),
    "mkv": (0, 0, 18, 48, 60),
    "webm": (0, 4, 27, 50, 60),
    "ts": (0, 10, 30, 50, 59),
    "avi": (0, 0, 0, 50, 60),
    "mpg": (0, 15, 41, 60, 60),
    "flv": (0, 0, 24, 48, 60),
    "h264": (0, 0, 24, 49, 60),
    "mjpeg": (0, 12, 32, 51, 60),
}
DAMAGE = ("hole", "scattered", "missing_stretch", "doubled_stretch")
DAMAGED = {
    "mp4": (43, 53, 0, 0),
    "faststart.mp4": (40, 0, 0, 0),
    "fragments.mp4": (17, 60, 17, 17),
    "mov": (51, 0, 0, 0),
    "mkv": (16, 58, 16, 16),
    "webm": (26, 28, 26, 26),
    "ts": (59, 57, 52, 62),
    "avi": (60, 58, 43, 60),
    "mpg": (56, 60, 52, 61),
    "flv": (52, 51, 52, 67),
    "h264": (50, 49, 51, 67),
    "mjpeg": (60, 15, 54, 66),
}


def a_tenth_less(frames: int) -> int:
    """Decoders differ in what they make of damaged pictures."""
    return frames - frames // 10


def cut_off() -> Iterator[BadInput]:
    """Every container cut off in its header, in the middle of a group, and at its tail."""
    shares = {"header": 0.01, "early": 0.2, "middle": 0.53, "late": 0.85}
    for container in CONTAINERS:
        *counts, last = map(a_tenth_less, CUT[container])
        for (place, share), least in zip(shares.items(), counts, strict=True):
            name = f"cut_{place}.{container}"
            quick = place == "middle" and container in ("mp4", "mkv", "ts")
            yield BadInput(
                name,
                partial(_cut, container, share),
                either=True,
                least=least,
                numbered=_told_by(container),
                hit=partial(_groups_hit, container, share, 1.0),
                quick=quick,
            )
        yield BadInput(
            f"cut_last_byte.{container}",
            partial(_cut, container, None),
            either=True,
            least=last,
            numbered=_told_by(container),
            hit=partial(_groups_hit, container, 0.99, 1.0),
        )


def _cut(container: str, share: float | None, path: Path) -> None:
    data = whole(container)
    path.write_bytes(data[: -1 if share is None else int(len(data) * share)])


def _told_by(container: str) -> str:
    """What tells the number of a frame where some may be lost."""
    return "index" if container in ("h264", "mjpeg") else "time"


@cache
def _groups_hit(container: str, start: float, stop: float) -> frozenset[int]:
    """First frames of the groups with bytes between two shares of the file."""
    data = whole(container)
    with av.open(io.BytesIO(data), format=_demuxer(container)) as source:
        packets = [p for p in source.demux(video=0) if p.size and p.pos is not None]
    ends = [*(p.pos for p in packets[1:]), len(data)]
    return frozenset(
        number // GROUP * GROUP
        for number, (packet, end) in enumerate(zip(packets, ends, strict=True))
        if packet.pos < stop * len(data) and max(end, packet.pos + packet.size) > start * len(data)
    )


def _demuxer(container: str) -> str | None:
    return container if container in ("h264", "mjpeg") else None


def damaged() -> Iterator[BadInput]:
    """Every container with a hole, with scattered wrong bytes, and with a stretch taken out."""
    for container in CONTAINERS:
        for kind, came in zip(DAMAGE, DAMAGED[container], strict=True):
            yield BadInput(
                f"{kind}.{container}",
                partial(_damage, container, kind),
                either=True,
                least=a_tenth_less(came),
                numbered="time"
                if kind == "hole" and container not in ("h264", "mjpeg", "mpg")
                else "",
                hit=partial(_groups_hit, container, 0.49, 0.52 + 400 / len(whole(container))),
                quick=kind == "scattered" and container in ("mp4", "mkv"),
            )


def _damage(container: str, kind: str, path: Path) -> None:
    data = bytearray(whole(container))
    middle, rng = len(data) // 2, np.random.default_rng(len(data))
    if kind == "hole":
        data[middle : middle + 400] = bytes(400)
    elif kind == "scattered":
        for place in rng.integers(0, len(data), max(8, len(data) // 500)):
            data[place] = int(rng.integers(256))
    elif kind == "missing_stretch":
        del data[middle : middle + len(data) // 10]
    else:
        data[middle:middle] = data[middle - len(data) // 10 : middle]
    path.write_bytes(data)


# ---- headers that lie


def wrong_headers() -> Iterator[BadInput]:
    """Fields of an MP4 header that claim what is not so."""
    patches: dict[str, tuple[bytes, int, int, int]] = {
        # box, byte after its name, size of the field, value
        "100000_frames": (b"stts", 8, 4, 100_000),
        "all_frames_at_once": (b"stts", 12, 4, 0),
        "frames_a_year_long": (b"stts", 12, 4, 0x7FFFFFFF),
        "many_times": (b"stts", 4, 4, 0x0FFFFFFF),
        "many_samples": (b"stsz", 8, 4, 0x0FFFFFFF),
        "huge_samples": (b"stsz", 4, 4, 0x7FFFFFFF),
        "many_chunks": (b"stco", 4, 4, 0x0FFFFFFF),
        "chunk_outside": (b"stco", 8, 4, 0xFFFFFFF0),
        "many_sample_runs": (b"stsc", 4, 4, 0x0FFFFFFF),
        "samples_of_run": (b"stsc", 12, 4, 0x7FFFFFFF),
        "no_time_scale": (b"mdhd", 12, 4, 0),
        "huge_time_scale": (b"mdhd", 12, 4, 0xFFFFFFFF),
        "endless": (b"mdhd", 16, 4, 0xFFFFFFFF),
        "size_65535": (b"avc1", 24, 4, 0xFFFFFFFF),
        "size_0": (b"avc1", 24, 4, 0),
        "other_codec": (b"stsd", 12, 4, int.from_bytes(b"hev1", "big")),
        "unknown_codec": (b"stsd", 12, 4, int.from_bytes(b"zzzz", "big")),
        "no_codec_data": (b"avcC", -4, 4, int.from_bytes(b"free", "big")),
        "wrong_codec_data": (b"avcC", 0, 4, 0xFFFFFFFF),
        "no_sample_table": (b"stbl", -4, 4, int.from_bytes(b"free", "big")),
        "sound_track": (b"vide", 0, 4, int.from_bytes(b"soun", "big")),
        "text_track": (b"vide", 0, 4, int.from_bytes(b"text", "big")),
        "moov_too_long": (b"moov", -8, 4, 0x7FFFFFFF),
        "moov_too_short": (b"moov", -8, 4, 9),
        "key_frames_outside": (b"stss", 8, 4, 0x7FFFFFFF),
        "no_key_frames": (b"stss", 4, 4, 0),
    }
    still_read = {
        "100000_frames", "many_chunks", "samples_of_run", "endless", "size_65535", "size_0",
        "sound_track", "text_track", "moov_too_long", "key_frames_outside", "no_key_frames",
    }  # fmt: skip
    for name, patch in patches.items():
        quick = name in ("100000_frames", "many_samples")
        least = a_tenth_less(FRAMES) if name in still_read else 0
        yield BadInput(
            f"header_{name}.mp4", partial(_patch, patch), either=True, least=least, quick=quick
        )
    yield BadInput("header_nested.mp4", _nested_boxes, error="")
    yield BadInput("header_rotated.mp4", partial(_turn, 90))
    yield BadInput("header_turned_by_45.mp4", partial(_turn, 45))
    yield BadInput("header_matrix_of_noise.mp4", partial(_turn, None), either=True, least=54)


def _patch(patch: tuple[bytes, int, int, int], path: Path) -> None:
    box, offset, size, value = patch
    data = bytearray(whole("mp4"))
    kind = data.index(box)
    start = kind + len(box) + offset
    data[start : start + size] = value.to_bytes(size, "big")
    path.write_bytes(data)


def _nested_boxes(path: Path) -> None:
    body = b""
    for _ in range(20_000):
        body = struct.pack(">I4s", len(body) + 8, b"moov") + body
        if len(body) > 160_000:
            break
    path.write_bytes(whole("mp4")[:32] + body)


def _turn(degrees: int | None, path: Path) -> None:
    data = bytearray(whole("mp4"))
    matrix = data.index(b"tkhd") + 4 + 40
    if degrees is None:
        data[matrix : matrix + 36] = bytes(range(100, 136))
    else:
        c, s = (round(f(np.deg2rad(degrees)) * 65536) for f in (np.cos, np.sin))
        data[matrix : matrix + 36] = struct.pack(">9i", c, s, 0, -s, c, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


# ---- no video


def not_videos() -> Iterator[BadInput]:
    """Other kinds of files with the name of a video."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "one_byte": b"\0",
        "text": b"hello\n" * 100,
        "html": b"<!doctype html><html><body>404</body></html>",
        "json": json.dumps({"frames": [1] * 50}).encode(),
        "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;",
        "zeros": bytes(100_000),
        "ones": b"\xff" * 100_000,
        "noise": np.random.default_rng(0).bytes(100_000),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(60) + np.random.default_rng(1).bytes(5000),
        "gzip": gzip.compress(whole("mp4")),
        "pickle": pickle.dumps({"a": np.arange(10)}),
        "safetensors": struct.pack("<Q", 2**40) + b"{}",
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "wav": b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28),
        "ftyp_only": whole("mp4")[:32],
        "ebml_only": whole("mkv")[:40],
        "riff_only": b"RIFF\xff\xff\xff\xffAVI LIST\xff\xff\xff\xffhdrl",
        "ts_sync_only": (b"\x47" + bytes(187)) * 100,
        "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\n/etc/passwd\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    }
    for name, content in contents.items():
        # Noise may look like some format; it must not give frames.
        yield BadInput(
            f"{name}_named.mp4",
            partial(_write, content),
            error="empty" if name == "empty" else "",
            quick=name in ("empty", "text", "noise"),
        )
    yield BadInput("zip_named.mp4", _zip, error="")
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        yield BadInput(
            f"{form.lower()}_named.mp4", partial(_image, form), error="", either=True, least=0
        )
    yield BadInput("gif_named.mp4", _gif, least=3)
    yield BadInput("mkv_named.mp4", partial(_write_whole, "mkv"), least=60, numbered="index")
    yield BadInput("ts_named.avi", partial(_write_whole, "ts"), least=60, numbered="index")
    yield BadInput("mp4_named.jpg.ts", partial(_write_whole, "mp4"), least=60, numbered="index")
    yield BadInput("sound_only.mp4", partial(_sound, "mp4"), error="no video track")
    yield BadInput("sound_only.mkv", partial(_sound, "matroska"), error="no video track")
    yield BadInput("sound_with_cover.mp4", _cover, error="")


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _write_whole(container: str, path: Path) -> None:
    path.write_bytes(whole(container))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.mp4", bytes(2**22))


def _image(form: str, path: Path) -> None:
    Image.fromarray(picture(5)).save(path, form)


def _gif(path: Path) -> None:
    images = [Image.fromarray(picture(n)) for n in range(5)]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=100)


def _sound(container: str, path: Path) -> None:
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("aac", rate=16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def _cover(path: Path) -> None:
    """A sound file whose only picture is its cover."""
    buffer = io.BytesIO()
    Image.fromarray(picture(3)).save(buffer, "PNG")
    image = buffer.getvalue()
    data = struct.pack(">I4sII", len(image) + 16, b"data", 14, 0) + image
    for name in (b"covr", b"ilst"):
        data = struct.pack(">I4s", len(data) + 8, name) + data
    handler = struct.pack(">I4sII4s12xB", 33, b"hdlr", 0, 0, b"mdir", 0)
    meta = struct.pack(">I4sI", 12 + len(handler) + len(data), b"meta", 0) + handler + data
    udta = struct.pack(">I4s", len(meta) + 8, b"udta") + meta
    _sound("mp4", path)
    sound = bytearray(path.read_bytes())
    moov = sound.index(b"moov") - 4
    size = int.from_bytes(sound[moov : moov + 4], "big")
    sound[moov : moov + 4] = (size + len(udta)).to_bytes(4, "big")
    sound[moov + size : moov + size] = udta
    path.write_bytes(sound)


# ---- files that refer to other files


def references(url: str) -> Iterator[BadInput]:
    """Playlists and scripts that name other files or servers; none may be followed."""
    scripts = {
        "hls_local": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        "hls_video": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{video}\n#EXT-X-ENDLIST\n",
        "hls_http": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
        "hls_concat": "#EXTM3U\n#EXTINF:9,\nconcat:{secret}|{secret}\n#EXT-X-ENDLIST\n",
        "hls_key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{secret}"\n#EXTINF:9,\n{video}\n',
        "ffconcat": "ffconcat version 1.0\nfile '{video}'\nfile '{secret}'\n",
        "ffconcat_http": "ffconcat version 1.0\nfile '{url}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        '<Period><AdaptationSet><Representation id="1"><BaseURL>{url}</BaseURL>'
        '<SegmentList><SegmentURL media="{video}"/></SegmentList></Representation>'
        "</AdaptationSet></Period></MPD>",
        "rtsp_redirect": "RTSPtext\nrtsp://127.0.0.1:9/x\n",
        "asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "smooth": '<SmoothStreamingMedia MajorVersion="2"><StreamIndex Type="video" '
        'Url="{url}"/></SmoothStreamingMedia>',
        "ffmetadata": ";FFMETADATA1\ntitle={secret}\n",
    }
    endings = ("mp4", "m3u8", "ffconcat", "sdp", "mpd")
    for name, script in scripts.items():
        own = next((e for e in endings if name.startswith((e, "hls")) and e != "mp4"), "mp4")
        own = "m3u8" if name.startswith("hls") else own
        for ending in dict.fromkeys(("mp4", own)):
            yield BadInput(
                f"{name}.{ending}",
                partial(_script, script, url),
                error="",
                quick=name in ("hls_local", "hls_http", "ffconcat"),
            )
    yield BadInput("external_data.mov", _external_data, either=True, least=0)


def _script(script: str, url: str, path: Path) -> None:
    secret, video = path.parent / "secret.txt", path.parent / "other_video"
    secret.write_text(SECRET)
    video.write_bytes(whole("ts"))
    path.write_text(script.format(secret=secret, video=video, url=url))


def _external_data(path: Path) -> None:
    """A QuickTime header whose pictures are said to lie in another file."""
    other = path.parent / "other_video"
    other.write_bytes(whole("mov"))
    name = str(other).encode()
    target = struct.pack(">hH", 2, len(name)) + name + bytes(len(name) % 2)
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16)
    record += struct.pack(">hh", 1, 1) + bytes(16) + target + struct.pack(">hH", -1, 0)
    alias = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    data = bytearray(whole("mov"))
    moov = data.index(b"moov")
    kind = data.index(b"url ", data.index(b"dref", moov))
    grown = len(alias) - int.from_bytes(data[kind - 4 : kind], "big")
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = data.index(box, moov) - 4
        size = int.from_bytes(data[place : place + 4], "big")
        data[place : place + 4] = (size + grown).to_bytes(4, "big")
    data[kind - 4 : kind - 4 + len(alias) - grown] = alias
    path.write_bytes(data)


# ---- sizes


def odd_sizes() -> Iterator[BadInput]:
    """Pictures that are tiny, very long, larger than memory, or of several sizes."""
    for width, height in [(1, 1), (2, 2), (3, 5), (16, 2), (16384, 16), (16, 16384)]:
        yield BadInput(
            f"size_{width}x{height}.mkv",
            partial(_sized, width, height),
            least=3,
            quick=width in (1, 16384),
        )
    yield BadInput("size_20000x16.mkv", partial(_sized, 20000, 16), error="pixels")
    yield BadInput("size_bomb.mov", _png_bomb, error="", quick=True)
    yield BadInput("size_65535.gif.mp4", _gif_header, error="")
    yield BadInput("sizes_change.ts", partial(_sizes_change, "mpegts"), finding="size")
    yield BadInput("sizes_change.h264", partial(_sizes_change, "h264"), finding="size", quick=True)
    yield BadInput("size_grows_to_a_bomb.h264", _grows, either=True, least=108)
    yield BadInput("no_frame.mkv", partial(_frames, 0), error="")
    yield BadInput("one_frame.mp4", partial(_frames, 1), numbered="index")
    yield BadInput("two_frames.mp4", partial(_frames, 2), least=2, numbered="index")


def _sized(width: int, height: int, path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for number in range(3):
            image = np.full((height, width, 4), 60 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="bgra").reformat(format="bgr0")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_bomb(path: Path) -> None:
    """A few kilobytes that decode to a picture of 800 MB."""
    side = 16384
    packed = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    body = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)
    with av.open(str(path), "w", format="mov") as output:
        stream = output.add_stream("png", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        stream.codec_context.open()
        for number in range(3):
            packet = av.Packet(png)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, RATE), True
            output.mux(packet)


def _gif_header(path: Path) -> None:
    path.write_bytes(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b"," + bytes(4) + b"\xff" * 4)


def _sizes_change(container: str, path: Path) -> None:
    parts = []
    for width, numbers in ((128, range(20)), (256, range(20, 30)), (128, range(30, 50))):
        buffer = io.BytesIO()
        encode(
            buffer, numbers, options=NO_B_FRAMES, ticks=numbers, width=width, container=container
        )
        parts.append(buffer.getvalue())
    path.write_bytes(b"".join(parts))


def _grows(path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 16384, 8192, "yuv420p"
        frame = av.VideoFrame(16384, 8192, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    path.write_bytes(whole("h264") + buffer.getvalue() + whole("h264"))


def _frames(count: int, path: Path) -> None:
    encode(path, range(count))


# ---- times


def odd_times() -> Iterator[BadInput]:
    """Clocks that jump, go back, stand still or are missing."""
    count = 40
    clocks = {
        "jump_a_day": [i + (24 * 3600 * RATE if i >= 20 else 0) for i in range(count)],
        "jump_back": [i + (500 if i < 20 else 0) for i in range(count)],
        "jump_back_a_little": [i if i < 20 else i - 3 for i in range(count)],
        "stands_still": [0] * count,
        "backwards": list(range(count, 0, -1)),
        "doubled": [i // 2 * 2 for i in range(count)],
        "far_future": [i + 2**40 for i in range(count)],
        "before_zero": [i - 1000 for i in range(count)],
        "random": np.random.default_rng(3).integers(0, 10**6, count).tolist(),
    }
    # Frames that came of each. FFmpeg's muxer refuses these packets in AVI: no frame is there.
    came = {
        "jump_a_day": (40, 40, 0),
        "jump_back": (20, 20, 0),
        "jump_back_a_little": (31, 31, 0),
        "stands_still": (40, 40, 0),
        "backwards": (1, 1, 0),
        "doubled": (21, 40, 0),
        "far_future": (40, 40, 0),
        "before_zero": (40, 40, 0),
        "random": (2, 2, 0),
    }
    for name, ticks in clocks.items():
        for container, frames in zip(("ts", "mkv", "avi"), came[name], strict=True):
            yield BadInput(
                f"clock_{name}.{container}",
                partial(_clock, ticks, container),
                either=True,
                least=a_tenth_less(frames),
                numbered="index" if name in ("jump_a_day", "jump_back", "far_future") else "",
                quick=container == "ts" and name in ("jump_back", "stands_still"),
            )
    yield BadInput("no_times.h264", partial(_write_whole, "h264"), least=60, numbered="index")


def _clock(ticks: list[int], container: str, path: Path) -> None:
    """The packets of a video with other timestamps; what the container refuses is left out."""
    form = {"ts": "mpegts", "mkv": "matroska"}.get(container, container)
    with (
        av.open(io.BytesIO(whole("flv"))) as source,
        av.open(str(path), "w", format=form, options={"avoid_negative_ts": "disabled"}) as output,
    ):
        track = source.streams.video[0]
        stream = output.add_stream_from_template(track)
        packets = [packet for packet in source.demux(track) if packet.size]
        for packet, tick in zip(packets, ticks, strict=False):
            packet.stream, packet.time_base = stream, Fraction(1, RATE)
            packet.pts = packet.dts = tick
            try:
                output.mux(packet)
            except (av.FFmpegError, OverflowError):
                continue


# ---- what the pictures show


def odd_scenes() -> Iterator[BadInput]:
    """Hard cuts, frozen and black stretches."""
    scenes: dict[str, tuple[list[int], str]] = {
        "hard_cut": ([85] * 25 + [240] * 25, "hard cut"),
        "three_cuts": ([85] * 20 + [240] * 20 + [15] * 20 + [85] * 20, "hard cut"),
        "frozen": ([*range(20), *[20] * 100, *range(20, 40)], "does not change"),
        "all_frozen": ([85] * 100, "does not change"),
    }
    for name, (numbers, finding) in scenes.items():
        yield BadInput(
            f"{name}.mp4", partial(_numbers, numbers), least=len(numbers), finding=finding,
            quick=name == "hard_cut",
        )  # fmt: skip
    yield BadInput("black.mp4", partial(_black, 0), least=60, finding="black")
    yield BadInput("black_middle.mp4", partial(_black, 20), least=100, finding="black")


def _numbers(numbers: list[int], path: Path) -> None:
    encode(path, numbers)


def _black(around: int, path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options=X264)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        black = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 60
        seen = [picture(n) for n in range(around)]
        for number, image in enumerate([*seen, *black, *seen]):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


# ---- pixel formats


def odd_pixels() -> Iterator[BadInput]:
    """Formats that are not eight bits with quartered colour."""
    formats = {
        "444.mkv": ("libx264", "yuv444p", {}),
        "422.mkv": ("libx264", "yuv422p", {}),
        "10_bit.mkv": ("libx264", "yuv420p10le", {}),
        "gray.mkv": ("libx264", "gray", {}),
        "gray_16.mkv": ("ffv1", "gray16le", {}),
        "rgb.mov": ("png", "rgb24", {}),
        "gbr_float.mkv": ("ffv1", "gbrp16le", {}),
        "alpha.mov": ("prores", "yuva444p10le", {}),
        "bgr.avi": ("rawvideo", "bgr24", {}),
        "interlaced.mkv": ("libx264", "yuv420p", {"x264-params": "tff=1:keyint=10"}),
        "lossless.avi": ("huffyuv", "rgb24", {}),
        "wmv.wmv": ("wmv2", "yuv420p", {}),
        "apple.mov": ("qtrle", "rgb24", {}),
        "av1.mkv": ("libsvtav1", "yuv420p", {}),
        "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
        "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    }
    for name, (codec, pixels, options) in formats.items():
        yield BadInput(
            f"pixels_{name}", partial(_pixels, codec, pixels, options), least=12,
            numbered="index", quick=name in ("10_bit.mkv", "gray.mkv"),
        )  # fmt: skip


def _pixels(codec: str, pixels: str, options: dict[str, str], path: Path) -> None:
    encode(path, range(12), codec, options, pixels=pixels)


# ---- file systems


def odd_places() -> Iterator[BadInput]:
    """Things that are no plain readable files, and names that make trouble."""
    yield BadInput("folder.mp4", lambda path: path.mkdir(), error="", quick=True)
    yield BadInput("unreadable.mp4", _unreadable, error="access denied", quick=True)
    yield BadInput("dangling.mp4", lambda path: path.symlink_to("nowhere"), error="", quick=True)
    yield BadInput("loop.mp4", lambda path: path.symlink_to(path.name), error="")
    yield BadInput("passwd.mp4", lambda path: path.symlink_to("/etc/passwd"), error="", quick=True)
    yield BadInput("zero.mp4", lambda path: path.symlink_to("/dev/zero"), error="", quick=True)
    yield BadInput("tty.mp4", lambda path: path.symlink_to("/dev/tty"), error="")
    yield BadInput("pipe.mp4", os.mkfifo, error="", quick=True)
    yield BadInput("socket.mp4", _socket, error="")
    yield BadInput("a::b.mp4", partial(_write_whole, "mp4"), error="")  # reads as a chained URL
    names = {
        "line\nbreak.mp4", "\x1b[31mred.mp4", "<img src=x onerror=alert(1)>.mp4", "%s%n{0}.mp4",
        "-rf.mp4", "a b'c\"d`e$(f).mp4", "\udcff\udcfe.mp4", "x" * 240 + ".mp4", "ünï-日本-🚗.mp4",
        "..mp4.mp4", "con.mp4", "a;b&c|d.mp4", "[1-3]*?.mp4", "http:__x.mp4",
    }  # fmt: skip
    for name in sorted(names):
        yield BadInput(
            name,
            partial(_write_whole, "mp4"),
            least=60,
            numbered="index",
            quick="\x1b" in name or "\udcff" in name,
        )


def _unreadable(path: Path) -> None:
    path.write_bytes(whole("mp4"))
    path.chmod(0)


def _socket(path: Path) -> None:
    short = Path("/proc/self/fd", str(os.open(path.parent, os.O_RDONLY)))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(short / path.name))


# ---- folders


def folders() -> Iterator[BadInput]:
    """Drives of several clips or images, some of which are wrong."""
    yield BadInput("clips_of_two_sizes", _two_sizes, least=20, finding="left out")
    yield BadInput("clips_one_broken", _one_broken, least=20, finding="left out", quick=True)
    yield BadInput("clips_all_broken", _all_broken, error="no clip decodes", quick=True)
    yield BadInput("clips_and_a_folder_named.mp4", _clip_folder, least=10)
    yield BadInput("clips_with_links_out", _links_out, least=10)
    yield BadInput("empty_folder", lambda path: path.mkdir(), error="no videos or images")
    yield BadInput("text_folder", _text_folder, error="no videos or images")
    for kind in (
        "broken", "two_sizes", "empty", "text", "bomb", "bomb_first", "ztxt", "depth", "links",
        "svg", "eps",
    ):  # fmt: skip
        yield BadInput(
            f"images_{kind}",
            partial(_images, kind),
            least=3,
            finding=None if kind == "links" else "cannot be used",  # links out are passed over
            quick=kind in ("broken", "bomb", "bomb_first", "ztxt", "eps"),
        )
    yield BadInput("images_all_broken", partial(_images, "all"), error="no image")


def _two_sizes(path: Path) -> None:
    path.mkdir()
    encode(path / "1.mp4", range(10))
    encode(path / "2.mp4", range(10, 16), width=256)
    encode(path / "3.mp4", range(16, 26))


def _one_broken(path: Path) -> None:
    path.mkdir()
    encode(path / "1.mp4", range(10))
    (path / "2.mp4").write_bytes(whole("mp4")[:500])
    encode(path / "3.mp4", range(10, 20))


def _all_broken(path: Path) -> None:
    path.mkdir()
    for name in ("1.mp4", "2.mkv", "3.avi"):
        (path / name).write_bytes(b"nothing" * 30)


def _clip_folder(path: Path) -> None:
    path.mkdir()
    encode(path / "1.mp4", range(10))
    (path / "2.mp4").mkdir()


def _links_out(path: Path) -> None:
    path.mkdir()
    encode(path / "1.mp4", range(10))
    (path / "2.mp4").symlink_to("/etc/passwd")
    (path / "3.mp4").symlink_to("/dev/zero")
    os.mkfifo(path / "4.mp4")


def _text_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("none")


def _images(kind: str, path: Path) -> None:
    path.mkdir()
    for number in range(4):
        Image.fromarray(picture(number)).save(path / f"{number}.png")
    odd = path / ("0.png" if kind == "bomb_first" else "9.png")
    if kind == "broken":
        odd.write_bytes((path / "1.png").read_bytes()[:60])
    elif kind == "two_sizes":
        Image.fromarray(picture(1, 256)).save(odd)
    elif kind == "empty":
        odd.write_bytes(b"")
    elif kind in TEXTS:
        odd.write_text(TEXTS[kind])
    elif kind in ("bomb", "bomb_first"):
        Image.new("1", (30_000, 30_000)).save(odd)
    elif kind == "ztxt":
        odd.write_bytes(with_long_text((path / "1.png").read_bytes()))
    elif kind == "depth":
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(odd)
    elif kind == "links":
        odd.symlink_to("/etc/passwd")
        (path / "8.png").symlink_to("/dev/zero")
    else:
        for image in path.iterdir():
            image.write_bytes(b"not an image")


def with_long_text(png: bytes) -> bytes:
    """The image with a comment of 2 MiB, compressed to a few kB, behind its header."""
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 * 2**20)))
    return png[:33] + text + png[33:]
