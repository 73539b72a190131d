"""Released checkpoints (`torch.save` zip files) into safetensors, without running their pickle.

Specification, sections 12 and 12.1. Here, and in `heads.canonical_name`, are the only
renames of tensors: a `module.` prefix goes, aliases go.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ttt3r.config import ModelConfig
from ttt3r.heads import canonical_name
from ttt3r.known_weights import KNOWN_WEIGHTS, RELEASED_LICENCE, RELEASED_SEGMENT_FRAMES
from ttt3r.torch_zip import StoredTensor, TorchZip
from ttt3r.weights_file import (
    WeightsInfo,
    build_model,
    require_safetensors,
    save_weights,
    unique_names,
)

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
RELEASED_IMAGE_SIZES = {"dpt": 512, "linear": 224}  # pixels, by head


def import_checkpoint(
    pth: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    licence: str = RELEASED_LICENCE,
    source: str | None = None,
    segment_frames: int = RELEASED_SEGMENT_FRAMES,
    notes: str = "",
    enc_num_heads: int = 16,
    dec_num_heads: int = 12,
    state_dec_num_heads: int = 16,
    image_size: int | None = None,
) -> WeightsInfo:
    """Turn a checkpoint in the released format into safetensors; nothing in it is run.

    Args:
        pth: local torch zip file: a dict whose `model` maps names to float32 tensors.
        out: file to write, ending in .safetensors; replaced atomically.
        name: name to record; the stem of `out` by default.
        licence: licence to record; that of the released weights by default.
        source: where the file came from; its file name by default.
        segment_frames: recommended length of a segment, frames.
        notes: free text to record.
        enc_num_heads, dec_num_heads, state_dec_num_heads: attention heads of the encoder, of
            the image side and of the state side of the decoder. Shapes cannot tell them.
        image_size: long side of the images in pixels; 512 for a DPT head, 224 for a linear one
            by default.

    Returns:
        The record that was stored. `identity` says whether the file is the publicly known one.

    Raises:
        ValueError: not such a file, tensors that are missing, unexpected, misshapen or not
            float32, or (RefusedPickle) a pickle that names anything beyond the inert names.

    Tensors stream from the mapped file: memory stays far below the size of the file.
    """
    pth, out = Path(pth), require_safetensors(out)
    if not pth.is_file():
        raise ValueError(f"there is no file {pth} to import")
    archive = TorchZip(pth)
    stored = model_tensors(archive)
    config = infer_config(
        {name: place.shape for name, place in stored.items()},
        enc_num_heads=enc_num_heads,
        dec_num_heads=dec_num_heads,
        state_dec_num_heads=state_dec_num_heads,
        image_size=image_size,
    )
    tensors = {name: torch.from_numpy(archive.array(place)) for name, place in stored.items()}
    build_model(config, tensors)  # refuses tensors that do not fit
    source_sha256 = file_sha256(pth)
    info = WeightsInfo(
        name=name or out.stem,
        config=config,
        sha256="",
        licence=licence,
        source=source or pth.name,
        segment_frames=segment_frames,
        trained=True,
        notes=notes,
        source_sha256=source_sha256,
        identity=_identity(pth, source_sha256),
    )
    return save_weights(out, tensors, info)


def model_tensors(archive: TorchZip) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint's `model`, under the names of the specification.

    Raises ValueError for anything else in `model`: other values, names, dtypes, or an alias
    that differs from the tensor it should equal.
    """
    content = archive.content
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content)
        raise ValueError(f"{archive.path} holds {found}; expected a dict with a dict 'model'")
    model = content["model"]
    for name, tensor in model.items():
        _check_tensor(archive.path, name, tensor)
    model = _strip_module(model)
    _check_aliases(archive, model)
    return {canonical: model[name] for canonical, name in unique_names(model)}


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
        raise ValueError(f"{path}: 'model' holds the name {str(name)[:80]!r}, not a parameter's")
    if not isinstance(tensor, StoredTensor):
        raise ValueError(
            f"{path}: 'model' holds a {type(tensor).__name__} as {name!r}; expected only tensors"
        )
    if tensor.dtype != "float32":
        raise ValueError(f"{path}: {name!r} is {tensor.dtype}; released tensors are float32")


def _strip_module(model: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    if not all(name.startswith("module.") for name in model):
        return model
    return {name.removeprefix("module."): tensor for name, tensor in model.items()}


def _check_aliases(archive: TorchZip, model: dict[str, StoredTensor]) -> None:
    for name, alias in model.items():
        canonical = canonical_name(name)
        if canonical not in model or alias == model[canonical]:
            continue
        if not np.array_equal(archive.array(alias), archive.array(model[canonical])):
            raise ValueError(
                f"{archive.path}: {name!r} should equal {canonical!r} but differs; which of the "
                "two the network used is unknown"
            )


def infer_config(
    shapes: Mapping[str, Shape],
    *,
    enc_num_heads: int = 16,
    dec_num_heads: int = 12,
    state_dec_num_heads: int = 16,
    image_size: int | None = None,
) -> ModelConfig:
    """The configuration that tensors of these shapes belong to (specification, section 12.1).

    Heads and `image_size` are those of the released files unless given. Raises ValueError if a
    tensor that tells a size is missing, or if the widths do not divide into so many heads.
    """
    patch = _shape(shapes, "patch_embed.proj.weight", 4)
    head_type: Literal["dpt", "linear"] = (
        "dpt" if _has(shapes, "downstream_head.dpt_self.") else "linear"
    )
    try:
        return ModelConfig(
            enc_embed_dim=patch[0],
            enc_depth=_count_blocks(shapes, "enc_blocks"),
            enc_num_heads=enc_num_heads,
            dec_embed_dim=_shape(shapes, "decoder_embed.weight", 2)[0],
            dec_depth=_count_blocks(shapes, "dec_blocks"),
            dec_num_heads=dec_num_heads,
            state_dec_num_heads=state_dec_num_heads,
            state_size=_shape(shapes, "register_tokens.weight", 2)[0],
            local_mem_size=_shape(shapes, "pose_retriever.mem", 3)[1],
            head_type=head_type,
            patch_size=patch[2],
            image_size=image_size or RELEASED_IMAGE_SIZES[head_type],
            mlp_ratio=_shape(shapes, "enc_blocks.0.mlp.fc1.weight", 2)[0] / patch[0],
            ray_map_encoder=_has(shapes, "patch_embed_ray_map."),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"these tensors fit no configuration: {error}. Shapes do not tell the numbers of "
            "heads: pass enc_num_heads, dec_num_heads and state_dec_num_heads if they are not "
            f"{enc_num_heads}, {dec_num_heads} and {state_dec_num_heads}"
        ) from error


def _shape(shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions:
        raise ValueError(
            f"{name!r} is {'missing' if shape is None else f'of shape {tuple(shape)}'}; a CUT3R "
            f"checkpoint has it with {dimensions} dimensions"
        )
    return shape


def _has(shapes: Mapping[str, Shape], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _count_blocks(shapes: Mapping[str, Shape], stack: str) -> int:
    numbers = (re.match(rf"{stack}\.(\d+)\.", name) for name in shapes)
    return len({number[1] for number in numbers if number})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path, sha256: str) -> str:
    for known in KNOWN_WEIGHTS.values():
        if known.sha256 == sha256:
            return f"matches the publicly reported {known.name} file"
    logger.warning(
        "%s has the SHA-256 %s, which is not that of a publicly reported checkpoint (%s); its "
        "tensors are safe to load but nothing says that they are the released ones",
        path,
        sha256,
        ", ".join(KNOWN_WEIGHTS),
    )
    return "does not match any publicly reported file"
