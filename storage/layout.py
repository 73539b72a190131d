"""What a reconstruction holds: every array's name, dimensions, type, unit, codec and error.

One Zarr v3 group per drive; docs/decisions/0001-zarr-layout.md gives the reasons.

    zarr.json                attributes: schema, drive record, plan, configuration, ...
    frames/                  FRAME_ARRAYS, one row a frame of the drive
    segments/0000/           SEGMENT_ARRAYS, one row a frame of the segment
    segments/0000/state/     STATE_ARRAYS, one row a chunk
    trajectory/              TRAJECTORY_ARRAYS
    fusion/  report/         plain files: meshes, pictures
    commits/                 plain JSON objects: what is finished
    claims/                  plain JSON objects: who is at work, gone when the work is

Rounding: an array with `mantissa_bits` is kept as float16 rounded to that many bits. A stored
value is within max(2^-(bits+1) * |value|, 2^-23) of the value given; magnitudes above 65504,
infinities included, are kept as 65504 with their sign; NaN stays NaN. All other arrays are
exact.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec

from storage.codecs import PCODEC_SETTINGS, BoundedPCodec
from storage.objects import check_name
from storage.records import DAMAGED, DUPLICATE, KEYFRAME
from storage.shards import MOST_STRIP_ROWS

SCHEMA = "ttt3r-reconstruction"
# Since 2 depth and confidence may be packed by pcodec; since 3 the objects of an array lie in its
# folder, not in folders below it; since 4 depth may lie in strips.
SCHEMA_VERSION = 4

FRAMES, SEGMENTS, TRAJECTORY, COMMITS = "frames", "segments", "trajectory", "commits"
CLAIMS = "claims"
FILE_FOLDERS = ("fusion", "report")
GROUPS = (FRAMES, SEGMENTS, TRAJECTORY, COMMITS, CLAIMS, *FILE_FOLDERS)

LARGEST_HALF = 65504.0  # largest finite float16
HALF_ABSOLUTE_ERROR = 2.0**-23  # where float16 runs out of exponents, below 6.1e-5
FRAMES_PER_READ = 8  # images that are decoded together: the least that a read costs
LEAST_STRIP_ROWS = 4  # of an image; lower strips cost more than they save
ROWS_PER_OBJECT = 65536  # arrays that are written as a whole
GATE_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MOTION_COSTS = "motion_costs"  # in a chunk's record: see `ttt3r.motion_scale`
Packing = Literal["blosc", "pcodec"]
FIXED_SIZES = {"row3": 3, "col3": 3, "row4": 4, "col4": 4}  # dimensions of one length always


@dataclass(frozen=True)
class ArraySpec:
    """One array: the single source of truth for its shape, type, meaning and codec."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str  # UDUNITS; "1" for plain numbers
    long_name: str
    mantissa_bits: int | None = None  # rounding of float16 arrays
    packing: Packing | None = "blosc"
    images: bool = False  # large rows: shards that hold a few frames per inner chunk
    strips: bool = False  # images of small shards are cut into strips, whose columns are packed
    notes: tuple[tuple[str, Any], ...] = ()  # further attributes
    optional: bool = False  # zero where the writer gives none

    @property
    def relative_error(self) -> float:
        """Bound of |stored - given| / |given| for normal float16 magnitudes; 0 if exact."""
        return 0.0 if self.mantissa_bits is None else 2.0 ** -(self.mantissa_bits + 1)

    @property
    def fill_value(self) -> Any:
        """What a reader sees where nothing was written: never a plausible number if avoidable."""
        kind = np.dtype(self.dtype).kind
        return {"f": np.nan, "i": -1, "u": 0, "b": False}[kind]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Lengths of the dimensions, looked up by name."""
        return tuple(sizes[dim] for dim in self.dims)

    def attributes(self) -> dict[str, Any]:
        """Zarr attributes: unit, meaning, and the error that storing adds."""
        attributes: dict[str, Any] = {"units": self.units, "long_name": self.long_name}
        if self.mantissa_bits is not None:
            attributes |= {
                "maximum_relative_error": self.relative_error,
                "maximum_absolute_error_near_zero": HALF_ABSOLUTE_ERROR,
                "clipped_to": [-LARGEST_HALF, LARGEST_HALF],
            }
        return attributes | dict(self.notes)

    def codecs(self) -> dict[str, Any]:
        """How `zarr.create_array` is to write chunks: a checksum at the end, so damage raises."""
        if self.packing == "pcodec":
            return {"serializer": BoundedPCodec(**PCODEC_SETTINGS), "compressors": (Crc32cCodec(),)}
        blosc = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")
        return {"compressors": (*([blosc] if self.packing else []), Crc32cCodec())}

    def encode(self, values: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Values as they will be stored.

        Raises:
            ValueError: another shape than expected, or values that the type cannot hold.
        """
        array = np.asarray(values)
        if array.shape != shape:
            raise ValueError(
                f"array {self.name!r} has shape {array.shape}; expected {shape} for {self.dims}"
            )
        if self.mantissa_bits is not None:
            return round_to_half(array, self.mantissa_bits)
        if not np.can_cast(array.dtype, self.dtype, casting="same_kind"):
            raise ValueError(f"array {self.name!r} is {array.dtype}; expected {self.dtype}")
        return np.ascontiguousarray(array, dtype=self.dtype)


def _array(name: str, dims: str, dtype: str, units: str, long_name: str, **rest: Any) -> ArraySpec:
    return ArraySpec(name, tuple(dims.split()), dtype, units, long_name, **rest)


FRAME_ARRAYS = (
    _array("timestamp", "frame", "float64", "s", "time since the first frame of the drive"),
    _array("clip", "frame", "int32", "1", "source clip, position in the drive record"),
    _array("index", "frame", "int32", "1", "frame number in the source clip"),
    _array(
        "flags",
        "frame",
        "uint8",
        "1",
        "what is special about the frame",
        notes=(
            ("flag_masks", (KEYFRAME, DAMAGED, DUPLICATE)),
            ("flag_meanings", "keyframe damaged duplicate"),
        ),
    ),
)

SEGMENT_ARRAYS = (
    _array(
        "depth",
        "frame y x",
        "float16",
        "m",
        "distance along the optical axis, in the model's estimate of metres",
        mantissa_bits=9,
        packing="pcodec",
        images=True,
        strips=True,
    ),
    _array(
        "confidence",
        "frame y x",
        "float16",
        "1",
        "confidence of depth, 1 or more, higher is better",
        mantissa_bits=2,
        packing="pcodec",
        images=True,
    ),
    _array(
        "cam_to_seg",
        "frame row4 col4",
        "float32",
        "m",
        "x_seg = cam_to_seg @ x_cam; axes right, down, forward; rotation has no unit",
    ),
    _array(
        "intrinsics",
        "frame row3 col3",
        "float32",
        "pixel",
        "pinhole matrix of the stored depth, centre of the top-left pixel at (0, 0)",
    ),
    _array(
        "descriptor",
        "frame embed",
        "float16",
        "1",
        "mean encoder feature, for place recognition",
        mantissa_bits=10,
    ),
    _array(
        "gate",
        "frame quantile",
        "float32",
        "1",
        "quantiles over the state tokens of the learning rate applied at the frame",
        notes=(("quantiles", GATE_QUANTILES),),
    ),
)

STATE_ARRAYS = (
    _array("tokens", "chunk token channel", "float32", "1", "scene state", packing=None),
    _array("pose_memory", "chunk slot pair", "float32", "1", "pose memory", packing=None),
    _array(
        "first",
        "chunk",
        "bool",
        "1",
        "whether the frame after the chunk starts a new stream",
        packing=None,
        optional=True,
    ),
)

# Written when a segment is created: known in advance, the same for all writers.
FRAME_COORDINATE = _array("frame", "frame", "int64", "1", "frame number in the drive")
STATE_FRAME = _array("frame", "chunk", "int64", "1", "first frame that the state has not seen")

TRAJECTORY_ARRAYS = (
    _array(
        "cam_to_world",
        "frame row4 col4",
        "float64",
        "m",
        "x_world = cam_to_world @ x_cam; world is the first camera of the part",
    ),
    _array(
        "seg_to_world",
        "segment_index row4 col4",
        "float64",
        "m",
        "x_world = seg_to_world @ x_seg, a similarity: scale times rotation, and translation",
    ),
    _array("scale", "segment_index", "float64", "1", "world metres per segment metre"),
    _array(
        "motion_scale",
        "segment_index",
        "float64",
        "1",
        "what translations of cam_to_seg are multiplied by first, to be metres of its depth",
    ),
    _array(
        "seam_residual",
        "segment_index",
        "float64",
        "1",
        "misfit with the segment before, relative to depth; NaN for the first of a part",
    ),
    _array(
        "seam_inlier_share",
        "segment_index",
        "float64",
        "1",
        "share of the overlap's points that agree; NaN for the first of a part",
    ),
    _array("intrinsics", "row3 col3", "float64", "pixel", "camera of the drive, stored depth"),
    _array("intrinsics_source", "row3 col3", "float64", "pixel", "camera of the drive, source"),
    _array("segment", "frame", "int32", "1", "segment that owns the frame"),
    _array("part", "frame", "int32", "1", "trajectory part; parts are not aligned to each other"),
    _array("confidence", "frame", "float32", "1", "median confidence of the frame"),
    _array("gate", "frame", "float32", "1", "median learning rate at the frame"),
    _array("focal", "frame", "float32", "pixel", "focal length estimated from the frame alone"),
)


def by_name(specs: Iterable[ArraySpec]) -> dict[str, ArraySpec]:
    """The specs of one group, by array name."""
    return {spec.name: spec for spec in specs}


def spec_at(path: str) -> ArraySpec:
    """The array that lies at a path of the store, such as "segments/0003/depth".

    Raises:
        KeyError: none does.
    """
    group, _, name = path.rpartition("/")
    if group in (FRAMES, TRAJECTORY):
        return by_name(FRAME_ARRAYS if group == FRAMES else TRAJECTORY_ARRAYS)[name]
    if segment_index(group) is None or group.count("/") > 1 + group.endswith("/state"):
        raise KeyError(path)
    if group.endswith("/state"):
        return by_name((*STATE_ARRAYS, STATE_FRAME))[name]
    return by_name((*SEGMENT_ARRAYS, FRAME_COORDINATE))[name]


def shard_at(name: str) -> tuple[str, str] | None:
    """Path of the array that an object has rows of, and its number; None of all other objects.

    An object is "segments/0003/depth/c.1.0.0", or ".../depth/c/1/0/0" in arrays from before
    version 3.
    """
    found = re.fullmatch(r"(.+?)/c(?:\.([0-9]+)(?:\.[0-9]+)*|/([0-9]+)(?:/[0-9]+)*)", name)
    return (found[1], found[2] or found[3]) if found else None


def check_file_name(name: str) -> str:
    """Return `name` if a file may be stored under it, else raise ValueError."""
    if check_name(name).split("/")[0] not in FILE_FOLDERS or "/" not in name:
        raise ValueError(f"{name!r} is not under one of the folders {FILE_FOLDERS}")
    if name.endswith("zarr.json"):
        raise ValueError(f"{name!r} is a name that Zarr uses; choose another")
    return name


def is_file_name(name: str) -> bool:
    """Whether `check_file_name` takes it."""
    try:
        return bool(check_file_name(name))
    except ValueError:
        return False


def segment_name(index: int) -> str:
    """Group of a segment inside the store."""
    return f"{SEGMENTS}/{index:04d}"


def segment_index(name: str) -> int | None:
    """Index of the segment whose group an object is or lies in; None for all other names."""
    found = re.match(rf"{SEGMENTS}/([0-9]{{4,9}})(/|$)", name)
    index = int(found[1]) if found else -1
    return index if found and segment_name(index) == f"{SEGMENTS}/{found[1]}" else None


def chunk_commit(segment: int, chunk: int) -> str:
    """Name of the commit that vouches for a chunk."""
    return f"{segment_claim(segment)}/{chunk:04d}"


def chunk_numbers(commit: str) -> tuple[int, int] | None:
    """Numbers of segment and chunk of the commit of a chunk; None of all other commits."""
    found = re.fullmatch(r"infer/([0-9]{4,9})/([0-9]{4,9})", commit)
    numbers = (int(found[1]), int(found[2])) if found else (-1, -1)
    return numbers if found and chunk_commit(*numbers) == commit else None


def is_chunk_commit(commit: str) -> bool:
    """Whether a commit is, or pretends to be, that of a chunk."""
    return commit.startswith("infer/")


def segment_claim(index: int) -> str:
    """Name of the claim of who infers a segment; the commits of its chunks lie below it."""
    return f"infer/{index:04d}"


def frames_per_read(chunk_frames: int) -> int:
    """Frames in one inner chunk: the largest divisor of the shard up to FRAMES_PER_READ."""
    return max(n for n in range(1, FRAMES_PER_READ + 1) if chunk_frames % n == 0)


def strip_rows(height: int) -> int | None:
    """Rows of the strips that images of this height are cut into; None: they are not."""
    fitting = [n for n in range(LEAST_STRIP_ROWS, MOST_STRIP_ROWS + 1) if height % n == 0]
    return max(fitting, default=None)


def check_names(
    given: Iterable[str], known: Mapping[str, ArraySpec], required: Collection[str] = ()
) -> None:
    """Raise ValueError where a given array is not known, or a required one not given."""
    unknown, missing = sorted(set(given) - set(known)), sorted(set(required) - set(given))
    if unknown or missing:
        raise ValueError(
            f"arrays unknown: {unknown}, missing: {missing}; expected names are {sorted(known)}"
        )


def dimension_sizes(specs: Iterable[ArraySpec], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Length of each named dimension, as the arrays agree on it.

    Raises:
        ValueError: an array has another number of dimensions than declared, or two arrays
            disagree on a length.
    """
    sizes = dict(FIXED_SIZES)
    for spec in specs:
        shape = np.shape(arrays[spec.name])
        expected = [sizes.get(dim, n) for dim, n in zip(spec.dims, shape, strict=False)]
        if len(shape) != len(spec.dims) or list(shape) != expected:
            known = {dim: sizes[dim] for dim in spec.dims if dim in sizes}
            raise ValueError(
                f"array {spec.name!r} has shape {shape}; expected {spec.dims} with {known}"
            )
        sizes |= dict(zip(spec.dims, shape, strict=True))
    return sizes


def round_to_half(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Round to float16 with `mantissa_bits` (1 to 10) bits after the leading one.

    Bits that are zero compress well. Rounds once, to nearest, ties to even; for the error
    and what becomes of values out of range see the top of this module.
    """
    with np.errstate(over="ignore"):  # beyond float32: infinite, and clipped below
        single = np.array(values, dtype=np.float32)
    np.clip(single, -LARGEST_HALF, LARGEST_HALF, out=single)
    dropped = 23 - mantissa_bits
    bits = single.view(np.uint32)
    finite = ~np.isnan(single)
    half_minus_one = np.uint32((1 << (dropped - 1)) - 1)
    rounded = bits + half_minus_one + ((bits >> np.uint32(dropped)) & np.uint32(1))
    rounded &= np.uint32(0xFFFFFFFF ^ ((1 << dropped) - 1))
    np.copyto(bits, rounded, where=finite)
    return np.clip(single, -LARGEST_HALF, LARGEST_HALF, out=single).astype(np.float16)
