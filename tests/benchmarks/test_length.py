"""The yardstick: its interface, its held-out drives of a given length, and real sequences."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import length
from numbered_video import encode

from ttt3r.metrics import tum_text
from ttt3r.synthetic import camera_path, render

FIGURES = {"world", "frames", "rule", "ate", "rpe_t", "rpe_r", "abs_rel", "delta_125"}


def measure(path: Path, *arguments: object) -> list[dict]:
    line = ["--weights", "untrained", "--json", path, *arguments]
    assert length.main([str(argument) for argument in line]) == 0
    return json.loads(path.read_text())["results"]


def test_results_hold_every_length_and_rule(tmp_path):
    results = measure(
        tmp_path / "rooms.json", "--world", "rooms", "--frames", 3, 6,
        "--rules", "cut3r", "ttt3r", "--seed", 2, "--sequences", 2, "--docs", tmp_path,
    )  # fmt: skip
    assert {(row["frames"], row["rule"]) for row in results} == {
        (3, "cut3r"), (3, "ttt3r"), (6, "cut3r"), (6, "ttt3r")
    }  # fmt: skip
    assert all(set(row) >= FIGURES and row["world"] == "rooms" for row in results)
    assert all(row["ate"] >= 0 and row["abs_rel"] > 0 for row in results)
    assert "| rooms | 6 | ttt3r |" in (tmp_path / "length-rooms.md").read_text()
    assert (tmp_path / "length-rooms.png").stat().st_size > 1000


def test_drives_end_where_they_have_come_so_far(tmp_path):
    results = measure(
        tmp_path / "drives.json", "--world", "streets", "--frames", 120, "--metres", 25,
        "--segment-frames", 8, "--overlap", 3, "--rules", "ttt3r", "constant", "--sequences", 2,
    )  # fmt: skip
    assert [row["rule"] for row in results] == ["ttt3r", "constant"]
    assert all(25 <= row["distance"] < 25 + 3.2 for row in results)
    assert results[0]["metres"] == 25
    assert results[1]["abs_rel"] is None


def test_reaching_passes_over_those_that_stay_behind():
    drives = dict(islice(length.reaching("streets", 0, 30.0, 30), 3))
    for seed in range(max(drives) + 1):
        place = camera_path("streets", [seed], 30)[0, :, :3, 3]
        way = place.diff(dim=0).norm(dim=-1)
        assert (float(way.sum()) >= 30) == (seed in drives)
        if seed in drives:
            assert float(way[: drives[seed] - 1].sum()) >= 30 - 1e-3
            assert float(way[: drives[seed] - 2].sum()) < 30
    with pytest.raises(ValueError, match="shorter way"):
        next(length.reaching("rooms", 0, 1e6, 5))


def test_camera_path_is_that_of_the_rendered_sequence():
    for world in ("streets", "rooms"):
        seen = render(world, [5, 6], 4, 8, 8)
        assert seen.T_world_cam.equal(camera_path(world, [5, 6], 4))


def test_a_real_video_with_known_poses_is_measured(tmp_path):
    video, truth = tmp_path / "drive" / "video.mp4", tmp_path / "truth.tum"
    video.parent.mkdir()
    encode(video, range(12))
    T = np.tile(np.eye(4), (12, 1, 1))
    T[:, 2, 3] = np.arange(12)
    T[:, 0, 3] = np.arange(12) ** 2 / 50
    truth.write_text(tum_text(np.arange(12) / 25, T), encoding="ascii")
    results = measure(
        tmp_path / "real.json", "--video", video, "--ground-truth", truth,
        "--frames", 6, 12, "--rules", "ttt3r", "constant",
    )  # fmt: skip
    assert {row["frames"] for row in results} == {6, 12}
    assert all(row["world"] == "drive" and row["ate"] > 0 for row in results)


def test_a_wrong_call_is_one_line(tmp_path):
    line = [sys.executable, length.__file__, "--world", "rooms", "--weights", tmp_path / "no.pth"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
