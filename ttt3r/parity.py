"""Does the network still say what the reference implementation said?

Checks recorded sequences ("golden vectors": `.npz` files with images, configuration and every
output) against a model of that configuration with synthetic weights, fed through `Stream`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt3r.config import ModelConfig
from ttt3r.geometry import camera_pose_to_matrix, estimate_focal, stitch_resets
from ttt3r.model import Model, Predictions, state_positions
from ttt3r.state import State
from ttt3r.stream import Stream, overlap_views
from ttt3r.synthetic_weights import synthetic_tensor

# Per view: ‖a - b‖ / ‖b‖ and max|a - b| / max|b| (specification, appendix B). Two faithful
# float32 implementations agree to 1e-6 .. 5e-5; leaving out a rounding costs about 1e-3.
LIMIT_L2 = 1e-4
LIMIT_MAX = 3e-4

_NETWORK_KEYS = (
    "enc_embed_dim", "enc_depth", "enc_num_heads", "dec_embed_dim", "dec_depth", "dec_num_heads",
    "state_dec_num_heads", "state_size", "local_mem_size", "head_type", "patch_size", "mlp_ratio",
    "rope_base",
)  # fmt: skip
_OTHER_KEYS = ("weight_seed", "qk_gain", "update_type")
_DEFAULTS: dict[str, Any] = {
    "reset_interval": None,
    "reset_frames_without_overlap": [],
    "pixel_stride": 1,
}
_INPUTS = ("images", "view_source_frame", "reset", "update")
_NEEDED_OUTPUTS = ("camera_pose", "pts3d_self", "conf_self")
_PER_PIXEL = ("pts3d_self", "conf_self", "pts3d_other", "conf_other", "rgb")
_VIEWS_AT_ONCE = 4  # bounds the memory of full-sized networks

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class FigureRow:
    """How far one array of one file is from the recorded one, at its worst view."""

    file: str
    array: str
    worst_l2: float  # ‖a - b‖ / ‖b‖
    worst_max: float  # max|a - b| / max|b|
    ok: bool


def verify_folder(folder: str | Path, device: str | torch.device = "cpu") -> list[FigureRow]:
    """Check every sequence file in `folder`; other `.npz` files (no `config_json`) are left out.

    Raises:
        ValueError: if there is none, or if one lacks what it needs.
    """
    paths = [p for p in sorted(Path(folder).glob("*.npz")) if _is_sequence(p)]
    if not paths:
        raise ValueError(
            f"{folder} holds no sequence file: expected *.npz files with the entry config_json"
        )
    return [row for path in paths for row in verify_file(path, device)]


def verify_file(path: str | Path, device: str | torch.device = "cpu") -> list[FigureRow]:
    """Compare what the file records with what the network says now.

    Some recorded intermediates are not compared (`dbg_raw_proj`, `dbg_raw_cross_proj`,
    `dbg_raw_rgb_proj`, `dbg_state_cross_logits`); what comes of them is.

    Args:
        path: a sequence file, as the golden vectors' README describes.
        device: where the network runs, in true float32.

    Raises:
        ValueError: if the file is no sequence file, or lacks an array, or has shapes that do
            not belong together.
    """
    golden, settings = _read(Path(path))
    with _true_float32(), torch.inference_mode():
        found = _recompute(golden, settings, torch.device(device))
    recorded = [name for name in golden if name in found]
    return [_compare(Path(path).name, n, found[n], golden[n]) for n in recorded]


# -- the file ----------------------------------------------------------------------------------


def _is_sequence(path: Path) -> bool:
    """Whether the archive holds a sequence; ValueError if it is no archive at all."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz archive (missing, truncated or of another kind)")
    with zipfile.ZipFile(path) as archive:
        return "config_json.npy" in archive.namelist()


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The file's arrays and settings, complete and of shapes that belong together."""
    if not _is_sequence(path):
        raise ValueError(
            f"{path} is no sequence file: expected a .npz archive with the entry config_json"
        )
    with np.load(path, allow_pickle=False) as archive:
        golden = {name: archive[name] for name in archive.files}
    missing = [name for name in (*_INPUTS, *_NEEDED_OUTPUTS) if name not in golden]
    if missing:
        raise ValueError(f"{path.name} lacks the arrays {', '.join(missing)}")
    settings = {**_DEFAULTS, **json.loads(str(golden.pop("config_json")))}
    missing = [key for key in (*_NETWORK_KEYS, *_OTHER_KEYS) if key not in settings]
    if missing:
        raise ValueError(f"the config_json of {path.name} lacks {', '.join(missing)}")
    _check_inputs(path.name, golden, settings)
    return golden, settings


def _check_inputs(name: str, golden: Arrays, settings: Mapping[str, Any]) -> None:
    images, views = golden["images"], golden["view_source_frame"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images of {name} are {images.dtype} {images.shape}, not [T, H, W, 3]")
    if not len(views) or views.min() < 0 or views.max() >= len(images):
        raise ValueError(f"{name} has views of frames outside its {len(images)} images")
    for flag in ("reset", "update"):
        if golden[flag].shape != views.shape:
            raise ValueError(f"{flag} of {name} is {golden[flag].shape} for {len(views)} views")
    interval = settings["reset_interval"]
    if interval is not None and not settings["reset_frames_without_overlap"]:
        expected = overlap_views(len(images), interval)
        same_frames = np.array_equal(expected.frame, views)
        if not same_frames or not np.array_equal(expected.reset, golden["reset"]):
            raise ValueError(f"views of {name} are not those of a reset every {interval} frames")


# -- the network ---------------------------------------------------------------------------------


@contextmanager
def _true_float32() -> Iterator[None]:
    """No TF32: it alone costs 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def synthetic_model(config: ModelConfig, weight_seed: int, qk_gain: float, device: Any) -> Model:
    """A model on `device` with the weights of appendix A, one tensor at a time."""
    with torch.device("meta"):
        model = Model(config)
    model.load_tensors(
        {
            name: torch.from_numpy(synthetic_tensor(name, p.shape, weight_seed, qk_gain)).to(device)
            for name, p in model.named_parameters()
        }
    )
    return model.eval()


def _recompute(golden: Arrays, settings: Mapping[str, Any], device: torch.device) -> Arrays:
    """Every array that a sequence file may record, as the network gives it now."""
    images = golden["images"]
    network = {key: settings[key] for key in _NETWORK_KEYS}
    config = ModelConfig(**network, image_size=max(images.shape[1:3]), ray_map_encoder=False)
    model = synthetic_model(config, settings["weight_seed"], settings["qk_gain"], device)
    outputs = {"cam", "trace"}
    outputs |= {"world"} if {"pts3d_other", "conf_other"} & golden.keys() else set()
    outputs |= {"rgb"} if "rgb" in golden else set()
    stream = Stream(model, 1, settings["update_type"], outputs=outputs, batch_frames=_VIEWS_AT_ONCE)
    start = stream.state
    with _Probes(model, golden.keys()) as probes:
        predictions = stream.feed(
            images[golden["view_source_frame"]][None],
            update=golden["update"][None].astype(bool),
            reset=golden["reset"][None].astype(bool),
        )
    found = {**_named(predictions, start), **probes.arrays()}
    found["state_pos"] = state_positions(config.state_size)
    if settings["pixel_stride"] == 1:
        # Points of random weights obey no pinhole: their focal length is the rest of a
        # cancellation and amplifies rounding. So the estimator sees the recorded points.
        found["focal"] = estimate_focal(torch.from_numpy(golden["pts3d_self"]).to(device))
    arrays = {name: tensor.cpu().numpy() for name, tensor in found.items()}
    return _subsampled({**arrays, **_stitched(golden, settings, arrays)}, settings["pixel_stride"])


def _named(predictions: Predictions, start: State) -> dict[str, Tensor]:
    """The single lane's predictions under the names of the file."""
    trace, points = predictions.trace, predictions.pointmap_cam
    assert trace is not None
    assert points is not None
    named: dict[str, Tensor | None] = {
        "pts3d_self": points,
        "conf_self": predictions.confidence,
        "pts3d_other": predictions.pointmap_world,
        "conf_other": predictions.confidence_world,
        "rgb": predictions.rgb,
        "camera_pose": predictions.camera_pose,
        "cam2world": camera_pose_to_matrix(predictions.camera_pose),
        "gate_raw": trace.gate_logits.sigmoid(),
        "gate_applied": predictions.rate,
        "state_candidate": trace.candidate,
        "state": torch.cat((start.tokens[:, None], trace.tokens), dim=1),
        "mem": torch.cat((start.pose_memory[:, None], trace.pose_memory), dim=1),
        "pose_token_in": trace.pose_token_in,
        "pose_token_out": trace.pose_token_out,
    }
    return {name: tensor[0] for name, tensor in named.items() if tensor is not None}


def _stitched(golden: Arrays, settings: Mapping[str, Any], arrays: Arrays) -> Arrays:
    """One trajectory over all resets, and world points at the pixels that the file has."""
    if "stitched_cam2world" not in golden:
        return {}
    views = overlap_views(len(golden["images"]), settings["reset_interval"])
    poses = torch.from_numpy(arrays["cam2world"][views.kept])
    stitched = stitch_resets(poses, torch.from_numpy(views.reset[views.kept])).numpy()
    found = {"stitched_view_index": views.kept, "stitched_cam2world": stitched}
    if "stitched_pts_world" in golden:
        height, rows = golden["images"].shape[1], golden["stitched_pts_world"].shape[1]
        stride = max(1, round(height / max(rows, 1)))
        points = arrays["pts3d_self"][views.kept, ::stride, ::stride]
        moved = np.einsum("vij,vhwj->vhwi", stitched[:, :3, :3], points)
        found["stitched_pts_world"] = moved + stitched[:, None, None, :3, 3]
    return found


def _subsampled(arrays: Arrays, stride: int) -> Arrays:
    """Per-pixel arrays at the pixels that the file stores."""
    return {n: a[:, ::stride, ::stride] if n in _PER_PIXEL else a for n, a in arrays.items()}


class _Probes:
    """Outputs of inner modules, for the arrays `dbg_*` that a file may hold."""

    def __init__(self, model: Model, wanted: Any) -> None:
        self._modules = {n: m for n, m in _probed(model).items() if n in wanted}
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self._modules}
        self._stack = ExitStack()

    def __enter__(self) -> _Probes:
        for name, module in self._modules.items():
            handle = module.register_forward_hook(self._keeper(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _given: Any, output: Any) -> None:
            self._seen[name].append(output[0] if isinstance(output, tuple) else output)

        return keep

    def arrays(self) -> dict[str, Tensor]:
        """All views of each; the network's [V, H, W, C] as the file's [V, C, H, W]."""
        joined = {name: torch.cat(seen) for name, seen in self._seen.items()}
        return {n: t.movedim(-1, 1) if "raw_dpt" in n else t for n, t in joined.items()}


def _probed(model: Model) -> dict[str, nn.Module]:
    head, depth = model.downstream_head, model.config.dec_depth
    modules: dict[str, nn.Module] = {
        "dbg_patch_embed": model.patch_embed,
        "dbg_enc_out": model.enc_norm,
        "dbg_raw_pose": head.pose_head,
        f"dbg_dec_img{depth}": model.dec_norm,
    }
    modules |= {f"dbg_enc_block{i}": block for i, block in enumerate(model.enc_blocks)}
    modules |= {f"dbg_dec_img{i}": b for i, b in enumerate(model.dec_blocks, 1) if i < depth}
    modules |= {f"dbg_final_transform{i}": b for i, b in enumerate(head.final_transform)}
    for name in ("self", "cross", "rgb"):
        if hasattr(head, f"dpt_{name}"):
            modules[f"dbg_raw_dpt_{name}"] = getattr(head, f"dpt_{name}")
    return modules


# -- the comparison --------------------------------------------------------------------------------


def _compare(file: str, name: str, found: np.ndarray, golden: np.ndarray) -> FigureRow:
    if name.startswith("dbg_"):
        found = found[: len(golden)]  # recorded for the first views only
    if found.shape != golden.shape:
        raise ValueError(f"{name} of {file} is {golden.shape}; the network gives {found.shape}")
    if name == "focal":  # one number a view, most of them 0: compare them together
        found, golden = found[None], golden[None]
    error = (found.astype(np.float64) - golden).reshape(len(golden), -1)
    scale = golden.astype(np.float64).reshape(len(golden), -1)
    l2 = _worst_ratio(np.linalg.norm(error, axis=1), np.linalg.norm(scale, axis=1))
    peak = _worst_ratio(np.abs(error).max(axis=1), np.abs(scale).max(axis=1))
    return FigureRow(file, name, l2, peak, ok=l2 <= LIMIT_L2 and peak <= LIMIT_MAX)


def _worst_ratio(error: np.ndarray, scale: np.ndarray) -> float:
    """Largest error / scale; NaN counts as infinitely wrong, 0 / 0 as right."""
    safe = np.where(scale > 0, scale, 1.0)
    ratio = np.where(scale > 0, error / safe, np.where(error > 0, np.inf, 0.0))
    return float(np.where(np.isnan(error), np.inf, ratio).max())
