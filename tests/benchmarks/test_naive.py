"""The naive mode and the benchmark around it: what they measure must be the same network."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import throughput
from naive import Naive

from ttt3r.config import RELEASED_512_DPT, TINY
from ttt3r.parity import synthetic_model

ALL = frozenset({"cam", "world", "rgb"})
LIMIT = 1e-4  # relative L2, as against the reference; measured: below 2e-5


@pytest.mark.parametrize("rule", ["cut3r", "ttt3r"])
@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, head_type="dpt", patch_size=16)], ids=["linear", "dpt"]
)
def test_naive_mode_says_what_the_network_says(config, rule):
    model = synthetic_model(config, weight_seed=1, qk_gain=2.0, device="cpu")
    images = torch.rand(5, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ours, _ = model.run(images[None], rule=rule, outputs=ALL)
    naive = Naive(model, rule)
    said = [naive.see(image) for image in images]
    assert len(naive.kept) == 5
    for name in ("pointmap_cam", "confidence", "pointmap_world", "camera_pose", "rgb", "rate"):
        found, expected = getattr(ours, name)[0], torch.stack([frame[name] for frame in said])
        assert (found - expected).norm() <= LIMIT * expected.norm(), name


def test_operations_are_those_of_the_specification():
    # Section 13: 1232 GFLOP with all heads, of which work that cannot matter is not done.
    every = replace(settings(RELEASED_512_DPT, 512, 288), outputs=("cam", "world", "rgb"))
    assert 0.97 * 1232 < throughput.count_gflop(every) < 1232
    cam = throughput.count_gflop(replace(every, outputs=("cam",)))
    saved = 140 + 140 + 18.4  # two DPT stacks and the conditioning
    assert throughput.count_gflop(every) - cam == pytest.approx(saved, rel=0.05)


def settings(config, width, height):
    return throughput.Settings(config, None, "cpu", "float32", 1, width, height)


@pytest.mark.slow
def test_throughput_writes_what_its_readers_need(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    arguments = "--config tiny --frames 3 --lanes 1 2 --repeats 1 --naive-frames 2 --json"
    throughput.main([*arguments.split(), str(path)])
    found = json.loads(path.read_text())
    for name in ("frames_per_second", "gflop_per_frame", "share_of_peak", "peak_memory_bytes"):
        assert np.isfinite(found[name]), name
        assert found[name] > 0, name
    assert found["speedup_over_naive"] > 0
    assert [row["lanes"] for row in found["rows"]] == [1, 2]
    assert max(found["relative_difference_to_naive"].values()) < LIMIT
    assert "frames/s" in capsys.readouterr().out
