"""Weights on disk: a safetensors file whose header says what the tensors are.

The header's `ttt3r` entry is JSON: the fields of `WeightsInfo`. Nothing in the file can run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ttt3r.config import ModelConfig
from ttt3r.heads import canonical_name
from ttt3r.model import Model

RECORD_KEY = "ttt3r"
_OPTIONAL = ("notes", "source_sha256", "identity", "principal_offset")  # fields of WeightsInfo
LARGEST_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format


@dataclass(frozen=True)
class WeightsInfo:
    """What a set of weights is, where it comes from and what may be done with it."""

    name: str
    config: ModelConfig
    sha256: str  # of the configuration and tensors (`tensors_sha256`), not of the file's bytes
    licence: str
    source: str
    segment_frames: int  # recommended length of a segment, frames
    trained: bool
    notes: str = ""
    source_sha256: str = ""  # of the file that was imported; empty if these are the originals
    identity: str = ""  # whether source_sha256 is the publicly reported one, in words
    principal_offset: float = 0.0  # pixels, of its training pictures (`geometry.principal_point`)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WeightsInfo:
        """Inverse of `to_json`; ValueError names fields that are missing or unknown."""
        _check_fields(cls, data, optional=_OPTIONAL)
        config = data["config"]
        _check_fields(ModelConfig, config, optional=tuple(f.name for f in fields(ModelConfig)))
        return cls(**{**data, "config": ModelConfig(**config)})


def _check_fields(record: type, data: Any, optional: tuple[str, ...]) -> None:
    known = {field.name for field in fields(record)}
    if not isinstance(data, dict) or set(data) - known or known - set(data) - set(optional):
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"a {record.__name__} with the fields {found}; expected {sorted(known)}: the file was "
            "written by another version of this software"
        )


def tensors_sha256(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """Digest of what decides the network's output: the configuration and all tensors.

    It does not depend on the order of the tensors, nor on name, licence or notes, so it names
    the same network in whatever file it is stored. One pass over the data, on the CPU.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(
    path: str | Path, model_or_state_dict: nn.Module | Mapping[str, Tensor], info: WeightsInfo
) -> WeightsInfo:
    """Write tensors and their record as safetensors, atomically.

    Args:
        path: the file to write, ending in .safetensors.
        model_or_state_dict: a model, or tensors by name; aliases are stored once.
        info: what to write about them; its sha256 is computed here.

    Returns:
        `info` with the sha256 that was stored.
    """
    path = require_safetensors(path)
    tensors = _tensors(model_or_state_dict)
    info = replace(info, sha256=tensors_sha256(info.config, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", RECORD_KEY: json.dumps(info.to_json())}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        save_file(tensors, partial, metadata=metadata)
        plain = Path(folder) / "plain"
        plain.touch()
        shutil.copymode(plain, partial)  # safetensors makes files that nobody else may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    return info


def _tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: named[key].detach().cpu().contiguous() for name, key in unique_names(named)}


def unique_names(named: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(canonical name, name it has) of each tensor, aliases of a present tensor left out."""
    present = set(named)
    for name in sorted(present):
        canonical = canonical_name(name)
        if canonical == name or canonical not in present:
            yield canonical, name


def require_safetensors(path: str | Path) -> Path:
    """`path`, unless it is not named .safetensors: then ValueError says what to do."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file: run `ttt3r weights import {path}` to turn a "
            "released checkpoint into one, without running code from it"
        )
    return path


def read_info(file: BinaryIO, name: str) -> WeightsInfo:
    """The record in the header of an open safetensors file; reads no tensor.

    Raises ValueError if the file is not safetensors, or has no record of ours.
    """
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= LARGEST_HEADER_BYTES:
        raise ValueError(f"{name} is not a safetensors file: its header would have {size} bytes")
    try:
        header = json.loads(file.read(size))
        record = header.get("__metadata__", {}).get(RECORD_KEY)
        known = None if record is None else json.loads(record)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not a safetensors file, or is truncated: {error}") from error
    if known is None:
        raise ValueError(
            f"{name} does not say which network it is for: write it with save_weights, or import "
            "the checkpoint it was made from with `ttt3r weights import`"
        )
    try:
        return WeightsInfo.from_json(known)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def read_local_info(path: Path) -> WeightsInfo:
    """`read_info` of a local file."""
    with path.open("rb") as file:
        return read_info(file, str(path))


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a local safetensors file, on the CPU, paged in when used.

    Raises ValueError if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Model:
    """A network without values, on the meta device, whose parameters have the types to load."""
    with torch.device("meta"):
        return Model(config).set_precision(dtype)


def build_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Model:
    """A network whose parameters are `tensors` themselves where they have the type to load.

    Raises ValueError naming the tensors that are missing, unexpected or misshapen.
    """
    model = empty_model(config, dtype)
    model.load_tensors(tensors)
    return model


def verify_weights(path: str | Path) -> WeightsInfo:
    """Read every tensor of a local file and compare the digest with the recorded one.

    Raises ValueError if they differ.
    """
    path = require_safetensors(path)
    info = read_local_info(path)
    found = tensors_sha256(info.config, dict(read_tensors(path)))
    if found != info.sha256:
        raise ValueError(
            f"{path}: its tensors have the digest {found} but its header says {info.sha256}; the "
            "file is damaged or was edited: fetch or import it again"
        )
    return info
