"""Folders on a local disk, or on what is mounted as one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from storage.errors import (
    CommitExists,
    DataDamaged,
    ObjectUnreadable,
    StoreRefused,
)
from storage.failures import BROKEN, NO_FILE, explained, explaining, filling
from storage.objects import (
    MOST_DOCUMENT_BYTES,
    MOST_FILE_BYTES,
    WRITERS,
    Folder,
    ObjectInfo,
    check_size,
    in_parallel,
    is_unfinished,
)
from storage.wording import how_to_mend, redacted

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalFolder(Folder):
    """Objects as files: temporary name, fsync, rename, fsync of the directory."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url

    @explained
    def read(self, name: str, most: int = MOST_DOCUMENT_BYTES) -> bytes | None:
        path = _own_file(self.root, name)
        try:
            with _reading(self.root, path):
                check_size(name, path.stat().st_size, most)
                return path.read_bytes()
        except NO_FILE:
            return None

    @explained
    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda temporary: temporary.write_bytes(data), os.replace)

    @explained
    def write_many(self, objects: Mapping[str, bytes]) -> None:
        self._put_many(objects, os.replace)

    @explained
    def create_many(self, objects: Mapping[str, bytes]) -> list[str]:
        there: list[str] = []

        def create(temporary: Path, target: Path) -> None:
            try:
                _link(temporary, target)
            except FileExistsError:
                there.append(target.relative_to(self.root).as_posix())
            finally:
                temporary.unlink()

        self._put_many(objects, create)
        return sorted(n for n in there if self.read(n, MOST_FILE_BYTES) != objects[n])

    def _put_many(
        self, objects: Mapping[str, bytes], publish: Callable[[Path, Path], object]
    ) -> None:
        """Write all, then wait for the disk: one wait serves many files."""
        self._check_links(objects)
        places = {self.root / name: data for name, data in objects.items()}
        changed = {target.parent for target in places}
        for folder in sorted(changed):
            changed |= _make_missing(folder)
        written = {target: _temporary(target) for target in places}
        try:
            for target, temporary in written.items():
                _begin_to_write(temporary, places[target])
            _fsync_all(written.values())
            while written:
                target, temporary = written.popitem()
                publish(temporary, target)
        finally:
            for temporary in written.values():
                temporary.unlink(missing_ok=True)
        _fsync_all(changed)

    @explained
    def write_new(self, name: str, data: bytes) -> None:
        try:
            self._put(name, lambda temporary: temporary.write_bytes(data), _link)
        except FileExistsError as error:
            raise CommitExists(f"{redacted(self.object_url(name))} exists already") from error

    @explained
    def upload(self, name: str, source: Path) -> None:
        self._put(name, lambda temporary: shutil.copyfile(source, temporary), os.replace)

    def _put(
        self,
        name: str,
        fill: Callable[[Path], object],
        publish: Callable[[Path, Path], object],
    ) -> None:
        self._check_links([name])
        target = self.root / name
        _make_folder(target.parent)
        temporary = _temporary(target)
        try:
            fill(temporary)
            _fsync(temporary)
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(target.parent)

    def download(self, name: str, target: Path) -> None:
        path = _own_file(self.root, name)
        with _reading(self.root, path), filling(target):
            try:
                shutil.copyfile(path, target)
            except (NotADirectoryError, IsADirectoryError, shutil.SpecialFileError) as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error

    @explained
    def sha256(self, name: str) -> str | None:
        path = _own_file(self.root, name)
        try:
            with _reading(self.root, path), path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except NO_FILE:
            return None

    @explained
    def delete(self, name: str) -> None:
        self._check_links([name])
        target = self.root / name
        try:
            target.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        _fsync(target.parent)

    @explained
    def delete_tree(self, prefix: str) -> None:
        self._check_links([prefix])
        target = self.root / prefix
        if prefix and target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            return
        _fsync(target.parent)

    @explained
    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = self._walk(prefix)
        return {name: info.size for name, info in found.items() if not is_unfinished(name)}

    @explained
    def objects(self) -> dict[str, ObjectInfo]:
        return self._walk("")

    def _walk(self, prefix: str) -> dict[str, ObjectInfo]:
        self._check_links([f"{prefix}/"] if prefix else [])
        found: dict[str, ObjectInfo | None] = {}
        folders = [f"{prefix}/" if prefix else ""]
        while folders:
            folder = folders.pop()
            # A folder that is gone since it was listed is empty. One that cannot be read is an
            # error: a short listing would make garbage of what it lacks.
            with suppress(*NO_FILE), os.scandir(f"{self.root}/{folder}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif not _leads_to_folder(entry):  # such a link is neither listed nor followed
                        found[folder + entry.name] = _info(entry)
        return {name: info for name, info in sorted(found.items()) if info is not None}

    def _check_links(self, names: Iterable[str]) -> None:
        """Make sure that no folder above one of the objects is a link out of this one.

        Each folder is looked at once, however many objects are in it.
        """
        for folder in sorted(_folders_above(names)):
            path = self.root / folder
            if path.is_symlink() and not _is_inside(self.root, path):
                raise DataDamaged(
                    f"{redacted(self.url)}: {folder!r} is a link that leads out of the store, and "
                    "nothing is listed, written or removed through it; remove the link, and run "
                    "again"
                )

    @explained
    def is_file(self) -> bool:
        return self.root.is_file()

    def zarr_store(self) -> Store:
        return _OwnFiles(self.root)


class _OwnFiles(LocalStore):
    """A folder for zarr, that reads nothing outside of it."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As `LocalStore`; DataDamaged where a link leads out of the folder.

        An object that cannot be read is named.
        """
        with _reading(self.root, _own_file(self.root, key)):
            return await super().get(key, prototype, byte_range)


@contextmanager
def _reading(root: Path, path: Path) -> Iterator[None]:
    """Name the file of a store that cannot be read.

    Raises:
        ObjectUnreadable: the disk cannot read it, or finds that it is not as written.
        StoreUnavailable: anything else keeps it from being read, unless there is none.
    """
    with explaining(str(path), *NO_FILE):
        try:
            yield
        except OSError as error:
            if error.errno not in BROKEN:
                raise
            raise ObjectUnreadable(
                f"{path} cannot be read ({error.strerror}); where that stays so, "
                f"{how_to_mend(str(root))}"
            ) from error


def _link(temporary: Path, target: Path) -> None:
    """Give a finished file its name, unless that is taken.

    Raises:
        FileExistsError: it is.
        StoreRefused: the file system has no hard links.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        raise StoreRefused(
            f"{target.parent}: the file system has no hard links (FAT, exFAT, some network "
            "shares), which keep two workers from writing the same; choose another output"
        ) from None


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """False too of a link that leads nowhere, or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _info(entry: os.DirEntry[str]) -> ObjectInfo | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed since it was listed
        return None
    return ObjectInfo(found.st_size, found.st_mtime)


def _own_file(root: Path, name: str) -> Path:
    """Where an object lies; DataDamaged if it is a link to elsewhere, or a device or pipe."""
    path = root / name
    if _is_plain(root, name):
        return path
    if not _is_inside(root, path) or (path.exists() and not (path.is_file() or path.is_dir())):
        raise DataDamaged(f"{name} is no file of this store: a link out of it, a pipe or a device")
    return path


def _is_plain(root: Path, name: str) -> bool:
    """Whether the object is a file, a folder or nothing, reached without a link: by few looks."""
    parts = name.split("/")
    if ".." in parts or not parts[0]:
        return False
    mode = stat.S_IFDIR
    for part in accumulate(parts, "{}/{}".format):
        if not stat.S_ISDIR(mode):
            return False
        try:
            mode = os.lstat(f"{root}/{part}").st_mode
        except FileNotFoundError:
            return True
        except OSError:
            return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _is_inside(root: Path, path: Path) -> bool:
    """Whether a path ends in the folder once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _folders_above(names: Iterable[str]) -> set[str]:
    """Names of the folders that objects are in, at any depth."""
    parents = {name.rpartition("/")[0] for name in names} - {""}
    return {f for parent in parents for f in accumulate(parent.split("/"), "{}/{}".format)}


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")


def _make_folder(path: Path) -> None:
    """Make the folder and its parents so that they survive a loss of power."""
    for changed in _make_missing(path):
        _fsync(changed)


def _make_missing(path: Path) -> set[Path]:
    """Make the folder and its parents; return the folders that have new ones in them."""
    if path.is_dir():
        return set()
    changed = {path.parent}
    try:
        path.mkdir()
    except FileNotFoundError:
        changed |= _make_missing(path.parent)
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        if not path.is_dir():  # else another writer has made it meanwhile
            told = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, told, str(path)) from error
    return changed


def _begin_to_write(path: Path, data: bytes) -> None:
    """Write a new file; the system begins at once to store it, and `_fsync` waits for that.

    So files that are written together are stored together: what the first one waits for is what
    all wait for. Begun by `_fsync`, each would be stored by itself, one after the other.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        if sys.platform == "linux":  # there the advice begins it
            with suppress(OSError):  # no more than advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _fsync_all(paths: Iterable[Path]) -> None:
    """`_fsync` all, a few at a time, without a thread's change for each."""
    waiting = list(paths)

    def wait(share: list[Path]) -> None:
        for path in share:
            _fsync(path)

    in_parallel(wait, (waiting[first::WRITERS] for first in range(min(WRITERS, len(waiting)))))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
