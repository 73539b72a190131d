import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ttt3r.alignment import AlignmentError, Sim3
from ttt3r.metrics import (
    associate,
    ate,
    depth_metrics,
    evaluate_trajectory,
    kitti_drift,
    kitti_text,
    path_lengths,
    read_kitti_indexed,
    read_tum,
    relative_pose_errors,
    scale_poses,
    tum_text,
)

KEYS = {
    "ate_none_m",
    "ate_se3_m",
    "ate_sim3_m",
    "rpe_trans_m",
    "rpe_rot_deg",
    "kitti_t_rel_percent",
    "kitti_r_rel_deg_per_100m",
    "scale",
    "distance_m",
    "frames",
}


def along_z(positions: list[float] | np.ndarray) -> np.ndarray:
    T = np.tile(np.eye(4), (len(positions), 1, 1))
    T[:, 2, 3] = positions
    return T


def winding(frames: int, seed: int = 0) -> np.ndarray:
    """A drive with curves: about 1 m a frame."""
    rng = np.random.default_rng(seed)
    T = np.tile(np.eye(4), (frames, 1, 1))
    step = np.eye(4)
    for k in range(1, frames):
        step[:3, :3] = Rotation.from_rotvec([0, 0.02 * np.sin(k / 15), 0.001]).as_matrix()
        step[2, 3] = rng.uniform(0.8, 1.2)
        T[k] = T[k - 1] @ step
    return T


# --- against published and evo's own numbers ------------------------------------------------------


def load_pair(folder: Path, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    est, gt = folder / entry["estimate"], folder / entry["reference"]
    if entry["association"] == "line by line":
        return read_kitti_indexed(est)[1], read_kitti_indexed(gt)[1]
    (t_est, T_est), (t_gt, T_gt) = read_tum(est), read_tum(gt)
    i, j = associate(t_est, t_gt, 0.01)
    return T_est[i], T_gt[j]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_trajectory_errors_equal_those_of_evo(shared_data, index):
    folder = shared_data / "trajectories"
    entry = json.loads((folder / "evo_reference.json").read_text())["results"][index]
    est, gt = load_pair(folder, entry)
    got = evaluate_trajectory(est, gt)
    assert got["frames"] == entry["pairs"]
    aligned = entry["ape_translation_sim3_aligned"]
    assert got["scale"] == pytest.approx(aligned["scale"], rel=1e-9)
    assert got["ate_sim3_m"] == pytest.approx(aligned["rmse"], rel=1e-9)
    assert got["ate_se3_m"] == pytest.approx(entry["ape_translation_se3_aligned"]["rmse"], rel=1e-9)
    assert got["ate_none_m"] == pytest.approx(
        entry["ape_translation_no_alignment"]["rmse"], rel=1e-9
    )
    rpe = entry["rpe_translation_1_frame_sim3_aligned"]
    assert got["rpe_trans_m"] == pytest.approx(rpe["rmse"], rel=1e-9)
    turn = entry["rpe_rotation_deg_1_frame_sim3_aligned"]
    assert got["rpe_rot_deg"] == pytest.approx(turn["rmse"], rel=1e-9)
    ten = relative_pose_errors(scale_poses(est, got["scale"]), gt, delta=10)[0]
    expected = entry["rpe_translation_10_frames_all_pairs_sim3_aligned"]
    assert len(ten) == expected["n"]
    assert np.median(ten) == pytest.approx(expected["median"], rel=1e-9)


def test_trajectory_errors_equal_evo_run_now():
    evo_metrics = pytest.importorskip("evo.core.metrics")
    from evo.core.trajectory import PosePath3D

    gt, rng = winding(60), np.random.default_rng(1)
    est = gt.copy()
    est[:, :3, 3] = 0.4 * est[:, :3, 3] + rng.normal(0, 0.1, (60, 3))
    est[:, :3, :3] @= Rotation.from_rotvec(rng.normal(0, 0.01, (60, 3))).as_matrix()
    paths = PosePath3D(poses_se3=list(gt)), PosePath3D(poses_se3=list(est))
    paths[1].align(paths[0], correct_scale=True)
    expected = {}
    for name, metric in (
        ("ate_sim3_m", evo_metrics.APE(evo_metrics.PoseRelation.translation_part)),
        ("rpe_trans_m", evo_metrics.RPE(evo_metrics.PoseRelation.translation_part)),
        ("rpe_rot_deg", evo_metrics.RPE(evo_metrics.PoseRelation.rotation_angle_deg)),
    ):
        metric.process_data(paths)
        expected[name] = metric.get_statistic(evo_metrics.StatisticsType.rmse)
    got = evaluate_trajectory(est, gt)
    assert {k: got[k] for k in expected} == pytest.approx(expected, rel=1e-9)


# Published by kitti_odom_eval for its example_0 with 7dof alignment.
PUBLISHED = {
    "09": {"t": 2.884, "r": 0.249, "ate": 8.387, "rpe": 0.343, "rpe_digits": 3, "turn": 0.0634},
    "10": {"t": 3.298, "r": 0.305, "ate": 6.630, "rpe": 0.0474, "rpe_digits": 4, "turn": 0.0663},
}


@pytest.mark.parametrize("sequence", ["09", "10"])
def test_kitti_figures_equal_the_published_ones(shared_data, sequence):
    folder, expected = shared_data / "trajectories" / "kitti_odom_eval", PUBLISHED[sequence]
    frames, est = read_kitti_indexed(folder / f"{sequence}_example_0.txt")
    gt = read_kitti_indexed(folder / f"{sequence}_gt.txt")[1][frames]
    got = evaluate_trajectory(est, gt)
    assert round(got["ate_sim3_m"], 3) == expected["ate"]
    scaled = scale_poses(est, got["scale"])
    # That tool starts its stretches at frames 10, 20, .. of the recording.
    tenth = -frames[0] % 10
    t_rel, r_rel = kitti_drift(scaled[tenth:], gt[tenth:])
    assert (round(t_rel, 3), round(r_rel, 3)) == (expected["t"], expected["r"])
    # Stretches from the first pose on are as good a sample of the drift.
    assert got["kitti_t_rel_percent"] == pytest.approx(expected["t"], rel=0.02)
    assert got["kitti_r_rel_deg_per_100m"] == pytest.approx(expected["r"], rel=0.02)
    # It reports means, and takes angles by the arccosine of a trace, which reads the six digits
    # of the reference file 0.4 % too small.
    trans, turn = relative_pose_errors(scaled, gt)
    assert round(trans.mean(), expected["rpe_digits"]) == expected["rpe"]
    assert turn.mean() == pytest.approx(expected["turn"], rel=0.006)


def test_ground_truth_of_a_real_drive_has_no_error_against_itself(shared_data):
    timestamps, T = read_tum(shared_data / "kitti03_head" / "groundtruth_tum.txt")
    _, truth = read_kitti_indexed(shared_data / "kitti03_head" / "groundtruth_kitti.txt")
    got = evaluate_trajectory(T, truth)
    assert (len(timestamps), got["frames"]) == (500, 500)
    assert got["distance_m"] == pytest.approx(371.8, abs=0.1)
    assert got["scale"] == pytest.approx(1, abs=1e-7)
    for key in ("ate_none_m", "ate_se3_m", "ate_sim3_m", "kitti_t_rel_percent"):
        assert got[key] < 1e-4, key


# --- by hand --------------------------------------------------------------------------------------


def test_evaluation_forgives_a_similarity_and_says_its_scale():
    gt = winding(300)
    turn = Rotation.from_rotvec([0.3, -1.0, 0.2]).as_matrix()
    got = evaluate_trajectory(Sim3(0.25, turn, np.array([5.0, -3.0, 2.0])).apply_pose(gt), gt)
    assert set(got) == KEYS
    assert json.loads(json.dumps(got)) == got
    assert got["scale"] == pytest.approx(4.0, rel=1e-9)
    assert got["ate_sim3_m"] < 1e-9
    assert got["kitti_t_rel_percent"] < 1e-9
    assert got["rpe_trans_m"] < 1e-9
    assert got["ate_se3_m"] > 1
    assert got["ate_none_m"] > got["ate_se3_m"]


def test_ate_is_the_root_mean_square_distance():
    gt = winding(3)
    est = gt.copy()
    est[0, :3, 3] += [3.0, 0.0, 0.0]
    est[1, :3, 3] += [0.0, 4.0, 0.0]
    assert ate(est, gt, "none") == pytest.approx(math.sqrt((9 + 16 + 0) / 3))


def test_relative_errors_are_those_of_the_motion_between_frames():
    gt, est = along_z([0, 1, 2]), along_z([0, 1.5, 3.5])
    est[2, :3, :3] = Rotation.from_euler("z", 2, degrees=True).as_matrix()
    trans, turn = relative_pose_errors(est, gt)
    np.testing.assert_allclose(trans, [0.5, 1.0], atol=1e-12)
    np.testing.assert_allclose(turn, [0, 2], atol=1e-9)
    assert relative_pose_errors(est, gt, delta=2)[0] == pytest.approx([1.5])
    assert len(relative_pose_errors(est, gt, delta=3)[0]) == 0


def test_kitti_drift_by_hand_is_the_excess_of_motion_per_length():
    # 1 m a frame, the estimate 3 % too long: a stretch of 100 m ends 101 frames on.
    gt = along_z(np.arange(150.0))
    t_rel, r_rel = kitti_drift(scale_poses(gt, 1.03), gt)
    assert t_rel == pytest.approx(100 * 0.03 * 101 / 100)
    assert r_rel == 0
    # An evaluation scales first, which takes that away.
    assert evaluate_trajectory(scale_poses(gt, 1.03), gt)["kitti_t_rel_percent"] < 1e-9


def test_kitti_drift_counts_degrees_per_100_m():
    gt, est = along_z(np.arange(202.0)), along_z(np.arange(202.0))
    est[5:, :3, :3] = Rotation.from_euler("y", 0.5, degrees=True).as_matrix()
    # Of the stretches from frames 0, 50 and 100 only the first contains the turn. The arccosine
    # of a trace loses half of the digits.
    r_rel = kitti_drift(est, gt, lengths_m=(100.0,), step=50)[1]
    assert r_rel == pytest.approx(0.5 / 3, rel=1e-4)


def test_kitti_figures_of_a_short_drive_are_none_unless_shorter_lengths_are_asked_for():
    gt = winding(60)
    got = evaluate_trajectory(scale_poses(gt, 2.0), gt)
    assert got["kitti_t_rel_percent"] is None
    assert got["kitti_r_rel_deg_per_100m"] is None
    assert got["ate_sim3_m"] < 1e-9
    t_rel, _ = kitti_drift(gt, gt, lengths_m=(10.0, 20.0))
    assert t_rel == pytest.approx(0, abs=1e-9)


def test_straight_drive_is_evaluated_though_its_roll_is_open():
    gt = along_z(np.arange(120.0))
    turned = Sim3(0.5, Rotation.from_rotvec([0.4, 0.2, 0.1]).as_matrix(), np.ones(3))
    got = evaluate_trajectory(turned.apply_pose(gt), gt)
    assert got["scale"] == pytest.approx(2.0)
    assert got["ate_sim3_m"] < 1e-9
    assert got["rpe_trans_m"] < 1e-9


@pytest.mark.parametrize(
    ("est", "gt"),
    [
        (along_z([5, 5, 5, 5]), along_z([0, 1, 2, 3])),
        (along_z([0, 1, 2, 3]), along_z([5, 5, 5, 5])),
        (along_z(5 + 1e-12 * np.arange(4)), along_z([0, 1, 2, 3])),
    ],
    ids=["estimate stands", "truth stands", "estimate moves by rounding"],
)
def test_trajectory_without_motion_has_no_scale(est, gt):
    got = evaluate_trajectory(est, gt)
    assert got["scale"] is None
    # 1.5, 0.5, 0.5 and 1.5 m off the common middle.
    assert got["ate_se3_m"] == pytest.approx(math.sqrt(1.25))
    assert got["ate_sim3_m"] == got["ate_se3_m"]
    assert got["rpe_trans_m"] == pytest.approx(1)
    with pytest.raises(AlignmentError, match="no scale"):
        ate(est, gt, "sim3")


def test_one_and_two_poses_have_an_ate_and_no_scale():
    one = evaluate_trajectory(along_z([3]), along_z([1]))
    assert (one["ate_none_m"], one["ate_se3_m"], one["scale"]) == (2, 0, None)
    assert (one["rpe_trans_m"], one["rpe_rot_deg"], one["distance_m"]) == (None, None, 0)
    two = evaluate_trajectory(along_z([0, 3]), along_z([0, 1]))
    assert two["scale"] is None
    assert two["ate_sim3_m"] == pytest.approx(1)
    assert two["rpe_trans_m"] == pytest.approx(2)


def test_evaluation_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="2 estimated and 3 true"):
        evaluate_trajectory(along_z([0, 1]), along_z([0, 1, 2]))
    with pytest.raises(ValueError, match=r"expected \[N, 4, 4\] with N > 0"):
        evaluate_trajectory(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))
    with pytest.raises(ValueError, match="T_est is not finite at pose 1"):
        evaluate_trajectory(along_z([0, np.nan]), along_z([0, 1]))
    with pytest.raises(ValueError, match="expected 'none', 'se3' or 'sim3'"):
        ate(along_z([0]), along_z([0]), "Sim3")


def test_path_lengths_add_up():
    np.testing.assert_allclose(path_lengths(along_z([0, 2, 1])), [0, 2, 3])


# --- association ----------------------------------------------------------------------------------


def test_associate_takes_the_nearest_within_the_limit():
    i, j = associate([0.0, 0.1, 0.2, 5.0], [0.004, 0.096, 0.109, 0.25, 0.3], 0.02)
    assert (i.tolist(), j.tolist()) == ([0, 1], [0, 1])


def test_associate_uses_each_pose_once_whichever_list_is_longer():
    i, j = associate([1.0, 1.004, 2.0], [0.0, 1.003, 2.0, 3.0], 0.01)
    assert (i.tolist(), j.tolist()) == ([1, 2], [1, 2])
    j, i = associate([0.0, 1.003, 2.0, 3.0], [1.0, 1.004, 2.0], 0.01)
    assert (i.tolist(), j.tolist()) == ([1, 2], [1, 2])


def test_associate_works_with_one_timestamp():
    assert [k.tolist() for k in associate([1.0], [0.995, 1.001])] == [[0], [1]]
    assert [k.tolist() for k in associate([1.0], [1.0])] == [[0], [0]]


def test_associate_says_why_nothing_matches():
    with pytest.raises(ValueError, match=r"covers 0\.000\.\.1\.000 s.*closest are 99\.000 s apart"):
        associate([0, 1], [100, 101])
    with pytest.raises(ValueError, match="go back from 2"):
        associate([0, 2, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="N > 0"):
        associate([], [0])


# --- depth ----------------------------------------------------------------------------------------


def test_depth_metrics_by_hand():
    gt = np.array([1.0, 2.0, 4.0, 0.0, np.nan])
    got = depth_metrics(np.array([1.2, 2.0, 6.0, 9.0, 9.0]), gt, align="none")
    assert got["abs_rel"] == pytest.approx((0.2 + 0 + 0.5) / 3)
    assert got["delta_125"] == pytest.approx(2 / 3)
    assert got["pixels"] == 3


def test_depth_metrics_align_by_the_medians():
    gt = np.array([[1.0, 2.0, 4.0]])
    got = depth_metrics(3 * gt, gt)
    assert got["abs_rel"] == pytest.approx(0)
    assert got["scale"] == pytest.approx(1 / 3)
    assert depth_metrics(3 * gt, gt, align="none")["abs_rel"] == pytest.approx(2)


def test_depth_metrics_count_a_missing_estimate_as_wrong():
    got = depth_metrics([1.0, np.nan, -1.0, 1.0], np.ones(4), align="none")
    assert (got["abs_rel"], got["delta_125"]) == (0, 0.5)
    none = depth_metrics([np.nan], [1.0])
    assert (none["abs_rel"], none["delta_125"], none["scale"]) == (None, 0, None)


def test_depth_metrics_need_a_true_depth_of_the_same_shape():
    with pytest.raises(ValueError, match="none of 2 pixels"):
        depth_metrics([1.0, 1.0], [0.0, np.nan])
    with pytest.raises(ValueError, match="shapes differ"):
        depth_metrics([1.0], [1.0, 1.0])


# --- files ----------------------------------------------------------------------------------------


def test_trajectory_files_come_back_as_written(tmp_path):
    T, times = winding(40), np.arange(40) / 10 + 1.7e9
    (tmp_path / "t.txt").write_text(tum_text(times, T), encoding="ascii")
    (tmp_path / "k.txt").write_text(kitti_text(T), encoding="ascii")
    got_times, got = read_tum(tmp_path / "t.txt")
    np.testing.assert_allclose(got_times, times, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got, T, atol=1e-8)
    np.testing.assert_allclose(read_kitti_indexed(tmp_path / "k.txt")[1], T, rtol=1e-11, atol=1e-12)


def test_written_files_have_the_standard_order():
    T = along_z([3])
    T[0, :3, :3] = Rotation.from_euler("x", 90, degrees=True).as_matrix()
    half = "0.707106781187"
    expected = f"1.5 0 0 3 {half} 0 0 {half}".split()
    words = tum_text([1.5], T).split()
    assert [float(w) for w in words] == pytest.approx([float(w) for w in expected], abs=1e-11)
    numbers = [float(w) for w in kitti_text(T).split()]
    assert numbers == pytest.approx([1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 0, 3], abs=1e-12)


def test_broken_poses_become_no_text():
    with pytest.raises(ValueError, match="not finite at pose 0"):
        kitti_text(along_z([np.nan]))
    with pytest.raises(ValueError, match="expected 2 finite seconds"):
        tum_text([0.0], along_z([0, 1]))


def test_readers_accept_comments_blank_lines_and_windows_line_ends(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbf# head\r\n\r\n0 1 2 3 0 0 0 1 # tail\r\n  \n1 1 2 4 0 0 0 -1")
    times, T = read_tum(file)
    assert times.tolist() == [0, 1]
    np.testing.assert_allclose(T[1], along_z([4])[0] + np.outer([1, 2, 0, 0], [0, 0, 0, 1]))


def test_kitti_lines_may_start_with_the_frame_number(tmp_path):
    file = tmp_path / "k.txt"
    file.write_text("4 1 0 0 7 0 1 0 0 0 0 1 0\n9 1 0 0 8 0 1 0 0 0 0 1 0\n")
    frames, T = read_kitti_indexed(file)
    assert frames.tolist() == [4, 9]
    assert T[:, 0, 3].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no poses"),
        ("# only a comment\n", "holds no poses"),
        ("0 1 2 3 0 0 0 1\n1 2 3\n", "line 2: 3 numbers; expected 8"),
        ("0,1,2,3,0,0,0,1\n", "line 1: 1 numbers; expected 8 separated by blanks"),
        ("\n0 1 2 x 0 0 0 1\n", "line 2: 'x' is not a number"),
        ("0 1 2 nan 0 0 0 1\n", "line 1: 'nan'; poses must be finite"),
        ("0 1 2 3 0 0 0 0.5\n", "line 1: the quaternion has length 0.5"),
        ("0 1 2 3 0 0 0 0\n", "line 1: the quaternion has length 0"),
        ("0 " * 3000, "line 1: longer than 4096 bytes"),
        ("\x00\x01\xff", "line 1: 1 numbers"),
    ],
)
def test_malformed_tum_file_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "t.txt"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        read_tum(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0 0 1 0 0 0 0 1\n", "line 1: 11 numbers; expected 12 or 13"),
        ("1 0 0 0 0 1 0 0 0 0 1 0\n0 1 0 0 0 0 1 0 0 0 0 1 0\n", "line 2: 13 numbers; expected 12"),
        ("2 0 0 0 0 2 0 0 0 0 2 0\n", "line 1: the 3x3 part is not a rotation"),
        ("1 0 0 0 0 1 0 0 0 0 -1 0\n", "line 1: the 3x3 part is not a rotation"),
        ("0.5 1 0 0 0 0 1 0 0 0 0 1 0\n", "line 1: the frame number is 0.5"),
    ],
)
def test_malformed_kitti_file_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "k.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_kitti_indexed(file)


def test_metrics_need_no_evo_and_write_nothing_at_home(tmp_path):
    code = (
        "import sys, numpy as np; from ttt3r.metrics import evaluate_trajectory as e; "
        "e(np.tile(np.eye(4), (5, 1, 1)), np.tile(np.eye(4), (5, 1, 1))); "
        "sys.exit('evo' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
