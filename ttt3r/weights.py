"""Weights by name, path or URL: load, describe, list, fetch.

    compact, untrained          come with the package
    cut3r_512_dpt               once fetched (`fetch`, or `ttt3r weights fetch`)
    path/to/file.safetensors    written by `save_weights` or `import_checkpoint`
    s3://..., https://..., hub:ORG/REPO/FILE    fetched into the cache when first used

A released `.pth` is never loaded: `import_checkpoint` and `fetch` turn it into safetensors
without running its pickle.
"""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import torch

from ttt3r.checkpoint_import import import_checkpoint, infer_config
from ttt3r.config import COMPACT
from ttt3r.download import DownloadFailed, Retry, without_secrets
from ttt3r.fetch import (
    HashMismatch,
    WeightsMissing,
    cached_path,
    default_cache_dir,
    fetch,
    plain_url,
    suffix_of,
    weights_dir,
)
from ttt3r.known_weights import KNOWN_WEIGHTS
from ttt3r.model import Model
from ttt3r.weights_file import (
    WeightsInfo,
    empty_model,
    read_info,
    read_local_info,
    read_tensors,
    require_safetensors,
    save_weights,
    tensors_sha256,
    verify_weights,
)

__all__ = [
    "KNOWN_WEIGHTS",
    "UNTRAINED",
    "DownloadFailed",
    "HashMismatch",
    "Retry",
    "WeightsEntry",
    "WeightsInfo",
    "WeightsMissing",
    "default_cache_dir",
    "fetch",
    "import_checkpoint",
    "infer_config",
    "list_weights",
    "load_model",
    "save_weights",
    "verify_weights",
    "weights_info",
]

BUNDLED_DIR = Path(__file__).parent / "checkpoints"
BUNDLED = {  # and what their results are worth
    "compact": "a small network, a working example: once their scale is fitted, depth is 13 % off "
    "in rendered streets and the path 2.4 % on KITTI 03 (docs/model-card.md)"
}
UNTRAINED = "untrained"
UNTRAINED_CONFIG = COMPACT
UNTRAINED_SEED = 0
UNTRAINED_SEGMENT_FRAMES = 32
OWN_LICENCE = "Apache-2.0"
NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class WeightsEntry:
    """One line of the list of weights."""

    name: str  # what to pass as `weights`
    where: str  # "bundled", "cached" or "fetchable"
    licence: str
    size_bytes: int
    trained: bool
    notes: str
    path: Path | None  # None if not on this machine, or made when loaded


def load_model(
    weights: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> tuple[Model, WeightsInfo]:
    """Build the network of `weights` with their values, in evaluation mode.

    Args:
        weights: a name (`list_weights`), a .safetensors path, or a URL of one (fetched once).
        device: where the parameters go; each is read straight to it.
        dtype: that the layers work in; see `Model.set_precision`.
        cache_dir: where fetched weights are kept; `default_cache_dir()` if None.

    Raises:
        WeightsMissing: no such weights here.
        ValueError: a .pth file, a damaged file, or tensors that do not fit the network.

    The tensors are copied one by one from the mapped file: memory holds them once.
    """
    if str(weights) == UNTRAINED:
        return _untrained_model().set_precision(dtype).to(device).eval(), _untrained_info()
    path = locate(weights, cache_dir)
    info = read_local_info(path)
    # Copied even on the CPU: in the file they are aligned as the header's length has it, and the
    # order of sums in a kernel, hence the last bits of the result, can follow the alignment.
    model = empty_model(info.config, dtype)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.load_tensors(
        {name: t.to(device, types.get(name), copy=True) for name, t in read_tensors(path)}
    )
    return model.eval(), info


def weights_info(weights: str | Path, cache_dir: str | Path | None = None) -> WeightsInfo:
    """What `weights` are, from the header alone; a URL that is not cached is not fetched.

    Raises as `load_model` does.
    """
    if str(weights) == UNTRAINED:
        return _untrained_info()
    url = plain_url(weights)
    if url is None or cached_path(url, cache_dir).exists():
        return read_local_info(locate(weights, cache_dir))
    _require_loadable(url)
    try:
        with fsspec.open(url, "rb") as file:
            return read_info(file, without_secrets(url))
    except FileNotFoundError as error:  # so fsspec calls any failure of a web server
        status = getattr(error.__cause__, "status", None)
        failure = type(error.__cause__ or error).__name__  # its text may hold the whole address
        reason = f"HTTP status {status}" if status else f"no such file, or no answer ({failure})"
        raise WeightsMissing(
            f"the weights {without_secrets(url)} cannot be read: {reason}; check the address"
        ) from None


def worth(info: WeightsInfo) -> str:
    """What results by these weights are worth, if they are bundled, else what is noted of them."""
    if info.name in BUNDLED:
        with suppress(ValueError):  # they may be missing here, or damaged
            if info.sha256 == weights_info(info.name).sha256:
                return BUNDLED[info.name]
    return info.notes


def locate(weights: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The local .safetensors file of `weights`; a URL is fetched when first used.

    Raises as `load_model` does.
    """
    url = plain_url(weights)
    if url is not None:
        cached = cached_path(url, cache_dir)
        if cached.exists():
            return cached
        _require_loadable(url)
        return fetch(url, cache_dir=cache_dir)
    if NAME.fullmatch(str(weights)):
        return _named(str(weights), cache_dir)
    path = require_safetensors(weights)
    if not path.is_file():
        raise WeightsMissing(f"there is no weights file {path}")
    return path


def list_weights(cache_dir: str | Path | None = None) -> list[WeightsEntry]:
    """All weights that have a name here: bundled, made on demand, cached, fetchable."""
    bundled = [_entry(path, "bundled") for path in sorted(BUNDLED_DIR.glob("*.safetensors"))]
    cached = [
        _entry(path, "cached") for path in sorted(weights_dir(cache_dir).glob("*.safetensors"))
    ]
    present = {entry.name for entry in cached}
    fetchable = [
        WeightsEntry(k.name, "fetchable", k.licence, k.size_bytes, True, k.notes, None)
        for k in KNOWN_WEIGHTS.values()
        if k.name not in present
    ]
    info = _untrained_info()
    untrained = WeightsEntry(info.name, "bundled", info.licence, 0, False, info.notes, None)
    return [*bundled, untrained, *cached, *fetchable]


def _entry(path: Path, where: str) -> WeightsEntry:
    size = path.stat().st_size
    try:
        info = read_local_info(path)
    except ValueError as error:
        return WeightsEntry(path.stem, where, "unknown", size, False, f"unusable: {error}", path)
    notes = "; ".join(filter(None, (worth(info), info.identity)))
    return WeightsEntry(path.stem, where, info.licence, size, info.trained, notes, path)


def _require_loadable(url: str) -> None:
    if suffix_of(url) != ".safetensors":
        raise ValueError(f"{url} is not a .safetensors file: run `ttt3r weights fetch {url}` first")


def _named(name: str, cache_dir: str | Path | None) -> Path:
    for folder in (BUNDLED_DIR, weights_dir(cache_dir)):
        path = folder / f"{name}.safetensors"
        if path.is_file():
            return path
    if name in BUNDLED:
        raise WeightsMissing(
            f"the weights {name!r} are not bundled with this installation ({BUNDLED_DIR.name}/"
            f"{name}.safetensors is missing); {UNTRAINED!r} runs everything on random weights"
        )
    if name in KNOWN_WEIGHTS:
        raise WeightsMissing(
            f"the weights {name!r} ({KNOWN_WEIGHTS[name].licence}) are not in the cache: run "
            f"`ttt3r weights fetch {name}`"
        )
    names = ", ".join(entry.name for entry in list_weights(cache_dir))
    raise WeightsMissing(f"there are no weights named {name!r}; there are {names}")


def _untrained_model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return Model(UNTRAINED_CONFIG)


@functools.cache
def _untrained_info() -> WeightsInfo:
    return WeightsInfo(
        name=UNTRAINED,
        config=UNTRAINED_CONFIG,
        sha256=tensors_sha256(UNTRAINED_CONFIG, _untrained_model().state_dict()),
        licence=OWN_LICENCE,
        source=f"random, seed {UNTRAINED_SEED}",
        segment_frames=UNTRAINED_SEGMENT_FRAMES,
        trained=False,
        notes="random weights: everything runs, the result means nothing",
    )
