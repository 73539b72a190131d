import json
import shutil

import numpy as np
import pytest

from ttt3r.config import ModelConfig
from ttt3r.parity import LIMIT_L2, LIMIT_MAX, verify_file, verify_folder
from ttt3r.synthetic_weights import synthetic_tensor

SEQUENCES = (
    "dpt_landscape_cut3r",
    "dpt_landscape_ttt3r",
    "dpt_masks_ttt3r",
    "dpt_portrait_reset_ttt3r",
    "linear_square_ttt3r",
    "linear_wide_cut3r",
)
ALWAYS = {
    "pts3d_self",
    "conf_self",
    "pts3d_other",
    "conf_other",
    "rgb",
    "camera_pose",
    "cam2world",
    "state",
    "mem",
    "state_candidate",
    "gate_raw",
    "gate_applied",
    "pose_token_in",
    "pose_token_out",
    "state_pos",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_network_agrees_with_the_reference(golden, name):
    rows = verify_file(golden / f"{name}.npz")
    wrong = [row for row in rows if not row.ok]
    assert not wrong
    checked = {row.array for row in rows}
    assert checked >= ALWAYS
    if "reset" in name:
        assert checked >= {"stitched_view_index", "stitched_cam2world", "stitched_pts_world"}
    assert all(row.worst_l2 <= LIMIT_L2 and row.worst_max <= LIMIT_MAX for row in rows)


def test_limits_are_the_specification_s():
    assert (LIMIT_L2, LIMIT_MAX) == (1e-4, 3e-4)


def test_synthetic_weights_agree_with_the_reference(golden):
    units = np.load(golden / "units.npz")
    for name, shape, first, total in zip(
        units["weights_names"],
        units["weights_shapes"],
        units["weights_first8"],
        units["weights_sum"],
        strict=True,
    ):
        values = synthetic_tensor(str(name), _shape(str(shape)), 1, 2.0)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values.ravel()[: len(first)], first[: values.size])
        assert values.sum(dtype=np.float64) == pytest.approx(total, rel=1e-12)


def _shape(text):
    return tuple(int(n) for n in "".join(c if c.isdigit() else " " for c in text).split())


@pytest.fixture
def sequence(golden, tmp_path):
    """Write a variant of a recorded sequence; None drops an array."""

    def write(changes=(), config=(), name="linear_wide_cut3r"):
        arrays = dict(np.load(golden / f"{name}.npz"))
        arrays |= dict(changes)
        if "config_json" in arrays and arrays["config_json"] is not None:
            settings = {**json.loads(str(arrays["config_json"])), **dict(config)}
            settings = {k: v for k, v in settings.items() if v is not None}
            arrays["config_json"] = np.array(json.dumps(settings))
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{n: a for n, a in arrays.items() if a is not None})
        return path

    return write


def test_verify_finds_a_value_that_is_off_in_a_single_view(golden, sequence):
    points = np.load(golden / "linear_wide_cut3r.npz")["pts3d_self"]
    points[5] *= 1.001
    rows = {row.array: row for row in verify_file(sequence({"pts3d_self": points}))}
    assert not rows["pts3d_self"].ok
    assert rows["pts3d_self"].worst_l2 == pytest.approx(1e-3, rel=0.05)
    assert rows["camera_pose"].ok


def test_verify_finds_a_network_without_the_encoder_s_rounding(golden, monkeypatch):
    class Unrounded(ModelConfig):
        def __post_init__(self):
            object.__setattr__(self, "encoder_rope_fp16", False)

    monkeypatch.setattr("ttt3r.parity.ModelConfig", Unrounded)
    rows = verify_file(golden / "linear_square_ttt3r.npz")
    assert not all(row.ok for row in rows)


def test_verify_finds_the_wrong_rule(sequence):
    rows = {row.array: row for row in verify_file(sequence(config={"update_type": "ttt3r"}))}
    assert not rows["state"].ok
    assert rows["gate_applied"].worst_l2 > 0.1


def test_verify_counts_nan_as_wrong(golden, sequence):
    points = np.load(golden / "linear_wide_cut3r.npz")["conf_self"]
    points[0, 0, 0] = np.nan
    rows = {row.array: row for row in verify_file(sequence({"conf_self": points}))}
    assert not rows["conf_self"].ok


def test_verify_takes_subsampled_pixels(golden, sequence):
    arrays = np.load(golden / "linear_wide_cut3r.npz")
    names = ("pts3d_self", "conf_self", "pts3d_other", "conf_other", "rgb")
    fewer = {name: arrays[name][:, ::3, ::3] for name in names}
    assert all(row.ok for row in verify_file(sequence(fewer, {"pixel_stride": 3})))


def test_verify_folder_reports_all_sequences_and_leaves_other_archives_out(golden, tmp_path):
    for name in ("linear_wide_cut3r", "linear_square_ttt3r", "units"):
        shutil.copy(golden / f"{name}.npz", tmp_path)
    rows = verify_folder(tmp_path)
    assert {row.file for row in rows} == {"linear_wide_cut3r.npz", "linear_square_ttt3r.npz"}
    assert all(row.ok for row in rows)


def test_verify_folder_refuses_a_folder_without_sequences(tmp_path):
    with pytest.raises(ValueError, match="holds no sequence file"):
        verify_folder(tmp_path)


def test_verify_folder_refuses_a_truncated_archive(golden, tmp_path):
    whole = (golden / "linear_wide_cut3r.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz is no \.npz archive"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"config_json": None}, {}, "no sequence file"),
        ({"images": None, "camera_pose": None}, {}, "lacks the arrays images, camera_pose"),
        ({}, {"dec_depth": None, "weight_seed": None}, "lacks dec_depth, weight_seed"),
        ({"view_source_frame": np.full(8, 99)}, {}, "outside its 8 images"),
        ({"reset": np.zeros(3, bool)}, {}, r"reset of .* is \(3,\) for 8 views"),
        ({"mem": np.zeros((9, 1, 96))}, {}, "mem of .* the network gives"),
        ({}, {"reset_interval": 3}, "not those of a reset every 3 frames"),
    ],
)
def test_verify_refuses_a_file_that_is_no_complete_sequence(sequence, changes, config, message):
    with pytest.raises(ValueError, match=message):
        verify_file(sequence(changes, config))
