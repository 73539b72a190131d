"""Tensors of a `torch.save` zip file, without torch's loader and without running its pickle.

Specification, section 12. The archive holds `<root>/data.pkl`, a pickle whose tensors refer to
uncompressed entries `<root>/data/<key>`. The tensors are views of the memory-mapped file.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttt3r.pickle_data import Constructor, Inert, Name, RefusedPickle, read_pickle

LARGEST_PICKLE_BYTES = 64 * 2**20  # the pickle of the released file is below 1 MB
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of name, length of extra field

# Type of storage -> (name of dtype, bytes per element).
STORAGE_TYPES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
INERT_NAMES = (
    *(("omegaconf.base", name) for name in ("ContainerMetadata", "Metadata")),
    *(
        ("omegaconf.nodes", f"{name}Node")
        for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("argparse", "Namespace"),
    # NumPy scalars, perhaps in `best_so_far`; protocol 2 writes their bytes through _codecs.
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
)
MENTIONED_NAMES = (
    ("typing", "Any"),
    *(("builtins", name) for name in ("bool", "bytes", "dict", "float", "int", "list", "str")),
    *(("torch", name) for name in STORAGE_TYPES),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in the file; checked against the bounds of its storage."""

    storage: str  # key of the archive entry data/<key>
    dtype: str
    offset: int  # elements from the start of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Entry:
    start: int  # byte in the file
    size: int


class TorchZip:
    """A released checkpoint, opened: `content` is its pickle as plain data.

    Raises ValueError on opening if the file is not an uncompressed torch zip archive whose
    entries lie inside it side by side, and RefusedPickle if its pickle names anything but
    tensors and the inert names of this module.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = _read_entries(self.path)
        with self.path.open("rb") as file:
            # A private copy-on-write mapping: pages are read when used, the file never changes.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._check_byte_order()
        pickle = self._entries["data.pkl"]
        if pickle.size > LARGEST_PICKLE_BYTES:
            raise ValueError(
                f"{self.path}: data.pkl has {pickle.size} bytes; a checkpoint's pickle has less "
                f"than {LARGEST_PICKLE_BYTES}, as tensors are stored beside it"
            )
        try:
            self.content = read_pickle(self._read(pickle), self._constructors(), self._storage)
        except RefusedPickle as error:
            raise RefusedPickle(f"{self.path}: {error}") from error

    def array(self, tensor: StoredTensor) -> np.ndarray:
        """The values of a tensor: a view of the mapped file, of dtype `tensor.dtype`.

        Raises ValueError for bfloat16, which NumPy does not have.
        """
        if tensor.dtype == "bfloat16":
            raise ValueError(f"{self.path}: NumPy cannot hold a bfloat16 tensor")
        entry = self._entries[f"data/{tensor.storage}"]
        dtype = np.dtype(tensor.dtype).newbyteorder("<")
        return np.ndarray(
            tensor.shape,
            dtype,
            buffer=memoryview(self._bytes)[entry.start : entry.start + entry.size],
            offset=tensor.offset * dtype.itemsize,
            strides=tuple(stride * dtype.itemsize for stride in tensor.strides),
        )

    def _read(self, entry: _Entry) -> bytes:
        return self._bytes[entry.start : entry.start + entry.size]

    def _check_byte_order(self) -> None:
        entry = self._entries.get("byteorder")
        if entry is not None and self._read(entry) != b"little":
            raise ValueError(f"{self.path}: the tensors are not little-endian")

    def _constructors(self) -> Mapping[Name, Constructor | None]:
        return {
            **{Name(*name): _inert(Name(*name)) for name in INERT_NAMES},
            **{Name(*name): None for name in MENTIONED_NAMES},
            Name("collections", "defaultdict"): _empty_dict,
            Name("collections", "OrderedDict"): _empty_dict,
            Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        }

    def _storage(self, persistent_id: Any) -> _Storage:
        """Check a persistent id ("storage", type, key, device, elements) against the archive."""
        kind, key, elements = _split_persistent_id(persistent_id)
        dtype, itemsize = STORAGE_TYPES[kind.name]
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise RefusedPickle(f"storage {key!r} is not in the archive")
        if entry.size != elements * itemsize:
            raise RefusedPickle(
                f"storage {key!r} claims {elements} elements of {dtype} but the archive holds "
                f"{entry.size} bytes for it"
            )
        return _Storage(key, dtype, elements)


def _split_persistent_id(persistent_id: Any) -> tuple[Name, str, int]:
    expected = (str, Name, str, str, int)
    if not isinstance(persistent_id, tuple) or tuple(map(type, persistent_id)) != expected:
        raise RefusedPickle("a persistent id that is not (storage, type, key, device, elements)")
    tag, kind, key, _device, elements = persistent_id
    if tag != "storage" or kind.module != "torch" or elements < 0:
        raise RefusedPickle(f"a persistent id of kind {tag!r} for {elements} of {str(kind)!r}")
    return kind, key, elements


def _rebuild_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """Arguments of torch._utils._rebuild_tensor_v2, checked to stay inside the storage."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
        raise RefusedPickle(f"a tensor made of {len(arguments)} arguments without a storage")
    storage, offset, shape, strides = arguments[:4]
    if not (_is_extent(shape) and _is_extent(strides) and _is_extent((offset,))):
        raise RefusedPickle("a tensor whose offset, shape or strides are not natural numbers")
    if len(shape) != len(strides) or len(shape) > 8:
        raise RefusedPickle(f"a tensor of shape {shape} with strides {strides}")
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements and (last >= storage.elements or elements > storage.elements):
        raise RefusedPickle(
            f"a tensor of shape {shape}, strides {strides} at {offset} leaves its storage "
            f"{storage.key!r} of {storage.elements} elements"
        )
    if not elements:
        offset, strides = 0, (0,) * len(shape)
    return StoredTensor(storage.key, storage.dtype, offset, shape, strides)


def _is_extent(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def _inert(name: Name) -> Constructor:
    return lambda _arguments: Inert(name)


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    # The items follow one by one; a defaultdict's only argument is the name of its factory.
    if not all(argument is None or isinstance(argument, Name) for argument in arguments):
        raise RefusedPickle("a dictionary made from arguments; expected its items one by one")
    return {}


def _read_entries(path: Path) -> dict[str, _Entry]:
    """Entries by name below the archive's root, each checked to lie where it claims to."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is not a torch zip archive: it may be a legacy torch file (a bare "
                "pickle, refused), a Git LFS pointer or a web page; save it with torch >= 1.6"
            )
        try:
            archive = zipfile.ZipFile(file)
        except (
            zipfile.BadZipFile,
            struct.error,
            ValueError,
            NotImplementedError,
            OSError,
        ) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        limits = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        entries = [
            (_plain_name(path, info), _entry(path, file, info, limit))
            for info, limit in zip(infos, limits, strict=True)
        ]
    return _below_root(path, entries)


def _entry(path: Path, file: Any, info: zipfile.ZipInfo, limit: int) -> _Entry:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{path}: entry {info.filename!r} is compressed; torch stores it plainly")
    if info.flag_bits & 0x1:
        raise ValueError(f"{path}: entry {info.filename!r} is encrypted")
    if info.header_offset < 0:
        raise ValueError(f"{path} is damaged: an entry at byte {info.header_offset}")
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) != LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is damaged: no entry at byte {info.header_offset}")
    _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    start = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if start + info.file_size > limit:
        raise ValueError(
            f"{path}: entry {info.filename!r} of {info.file_size} bytes at byte {start} runs into "
            f"what follows at byte {limit}"
        )
    return _Entry(start, info.file_size)


def _plain_name(path: Path, info: zipfile.ZipInfo) -> str:
    name = info.filename
    parts = name.split("/")
    if name != info.orig_filename or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(f"{path}: entry name {info.orig_filename!r} is not a plain relative path")
    return name


def _below_root(path: Path, entries: list[tuple[str, _Entry]]) -> dict[str, _Entry]:
    roots = {name.split("/")[0] for name, _ in entries}
    found = {name.partition("/")[2]: entry for name, entry in entries}
    if len(roots) != 1 or len(found) != len(entries) or "data.pkl" not in found:
        raise ValueError(
            f"{path} is a zip archive but not one of torch: expected one folder with data.pkl "
            f"and no name twice; found the folders {sorted(roots)[:5]}"
        )
    return found
