"""Published weights into the cache: downloaded, checked, and imported if they are a .pth.

The cache holds `weights/<name>.safetensors` and `weights/<stem>-<digest of URL>.safetensors`;
`downloads/` holds what is on its way.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ttt3r.checkpoint_import import file_sha256, import_checkpoint
from ttt3r.download import (
    DownloadFailed,
    Progress,
    Retry,
    download,
    locked,
    without_secrets,
)
from ttt3r.known_weights import (
    KNOWN_WEIGHTS,
    RELEASED_LICENCE,
    RELEASED_SEGMENT_FRAMES,
    KnownWeights,
)
from ttt3r.weights_file import read_local_info

HUB = "https://huggingface.co"
HUB_FILE = re.compile(r"(?:hub:|hf://)([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+)")


class WeightsMissing(ValueError):
    """There are no such weights here; the message says how to get them."""


class HashMismatch(ValueError):
    """A file that was fetched is not the one asked for; it was removed."""


def default_cache_dir() -> Path:
    """Where fetched weights are kept unless the caller says otherwise."""
    return Path.home() / ".cache" / "ttt3r"


def fetch(
    source: str,
    *,
    expected_sha256: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    retry: Retry | None = None,
) -> Path:
    """Download weights into the cache, and import them if they are a released .pth.

    Args:
        source: a name in KNOWN_WEIGHTS, `hub:ORG/REPO[@REVISION]/FILE`, or any fsspec URL.
        expected_sha256: of the file at the source; that of KNOWN_WEIGHTS for a name.
        cache_dir: where to keep them; `default_cache_dir()` if None.
        progress: called with the bytes received and the bytes in all, if known.
        retry: how long to insist on a failing connection.

    Returns:
        The .safetensors file; it is fetched only if it is not there yet. Afterwards the name,
        or the URL, can be passed to `load_model`.

    Raises:
        DownloadFailed: see `download.download`; what came is kept and continued next time.
        HashMismatch: the file is not the one expected; it was removed.
        WeightsMissing: `source` is neither a known name nor a URL.
        ValueError: the file is not weights that we can take (see `import_checkpoint`), or
            `expected_sha256` is no SHA-256: nothing is fetched.
    """
    if expected_sha256 is not None:
        expected_sha256 = _plain_sha256(expected_sha256)
    known = KNOWN_WEIGHTS.get(source)
    if known is not None:
        return _fetch_known(known, expected_sha256, cache_dir, progress, retry)
    url = plain_url(source)
    if url is None:
        raise WeightsMissing(
            f"{source!r} is neither a URL, nor hub:ORG/REPO/FILE, nor one of "
            f"{', '.join(KNOWN_WEIGHTS)}"
        )
    destination = cached_path(url, cache_dir)
    return _Order(url, destination, expected_sha256, destination.stem).fetch(progress, retry)


def _plain_sha256(digest: str) -> str:
    """The digest as `file_sha256` writes it; some tools print capitals."""
    plain = digest.strip().lower()
    if not re.fullmatch("[0-9a-f]{64}", plain):
        raise ValueError(
            f"{digest!r} is no SHA-256: expected 64 hexadecimal digits, as `sha256sum` prints them"
        )
    return plain


@dataclass(frozen=True)
class _Order:
    """One file to fetch, and what is known of it beforehand."""

    url: str
    destination: Path
    expected_sha256: str | None
    name: str
    known: KnownWeights | None = None

    def fetch(self, progress: Progress | None, retry: Retry | None) -> Path:
        with locked(self.destination):
            if not self._is_there():
                downloaded = self._download(progress, retry)
                try:
                    self._install(downloaded)
                except ValueError:
                    if self.expected_sha256 is None:  # perhaps a page instead of the file
                        downloaded.unlink()
                    raise
        return self.destination

    def _is_there(self) -> bool:
        if not self.destination.exists():
            return False
        if self.expected_sha256 is None:
            return True
        source_sha256 = read_local_info(self.destination).source_sha256
        return self.expected_sha256 == (source_sha256 or file_sha256(self.destination))

    def _download(self, progress: Progress | None, retry: Retry | None) -> Path:
        folder = self.destination.parent.parent / "downloads"
        downloaded = download(
            self.url,
            folder / f"{_key(self.url)}{suffix_of(self.url)}",
            expected_size=self.known.size_bytes if self.known else None,
            progress=progress,
            retry=retry,
        )
        found = file_sha256(downloaded)
        if self.expected_sha256 not in (None, found):
            downloaded.unlink()
            raise HashMismatch(
                f"{without_secrets(self.url)} has the SHA-256 {found}, expected "
                f"{self.expected_sha256}: it is not the file that was asked for, and was removed"
            )
        return downloaded

    def _install(self, downloaded: Path) -> None:
        if downloaded.suffix == ".safetensors":
            read_local_info(downloaded)
            os.replace(downloaded, self.destination)
            return
        known = self.known
        import_checkpoint(
            downloaded,
            self.destination,
            name=self.name,
            source=without_secrets(self.url),
            licence=known.licence if known else RELEASED_LICENCE,
            segment_frames=known.segment_frames if known else RELEASED_SEGMENT_FRAMES,
            notes=known.notes if known else "",
        )
        downloaded.unlink()


def _fetch_known(
    known: KnownWeights,
    expected_sha256: str | None,
    cache_dir: str | Path | None,
    progress: Progress | None,
    retry: Retry | None,
) -> Path:
    destination = weights_dir(cache_dir) / f"{known.name}.safetensors"
    failures = []
    for mirror in known.mirrors:
        url = plain_url(mirror) or mirror
        order = _Order(url, destination, expected_sha256 or known.sha256, known.name, known)
        try:
            return order.fetch(progress, retry)
        except (DownloadFailed, HashMismatch) as error:
            failures.append(error)
    raise failures[0] if len(failures) == 1 else DownloadFailed("; ".join(map(str, failures)))


def plain_url(weights: str | Path) -> str | None:
    """The plain URL that `weights` names, or None if it names something local."""
    text = str(weights)
    if text.startswith(("hub:", "hf://")):
        found = HUB_FILE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not of the form hub:ORG/REPO[@REVISION]/FILE")
        return f"{HUB}/{found[1]}/resolve/{found[2] or 'main'}/{found[3]}"
    return text if "://" in text else None


def weights_dir(cache_dir: str | Path | None) -> Path:
    """The folder of the cache with what is ready to load."""
    return Path(cache_dir or default_cache_dir()) / "weights"


def cached_path(url: str, cache_dir: str | Path | None) -> Path:
    """Where the weights of a URL are, or will be, in the cache."""
    stem = re.sub(r"[^\w-]", "_", PurePosixPath(urlsplit(url).path).stem)[:80]
    return weights_dir(cache_dir) / f"{stem}-{_key(url)}.safetensors"


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def suffix_of(url: str) -> str:
    """File extension in a URL, its query left out."""
    return PurePosixPath(urlsplit(url).path).suffix
