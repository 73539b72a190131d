"""A drive's frames as the network takes them."""

import numpy as np
import pytest
import torch
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig, ReconstructionConfig
from tasks.frames import DEVICE_FRAMES, DriveInput
from tasks.plan import plan_stage
from tasks.probe import probe_stage
from ttt3r.weights import weights_info


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frames_resized_on_a_device_are_those_resized_by_pillow(tmp_path, device):
    frames = DEVICE_FRAMES + 3
    video = write_video(tmp_path / "squares.mp4", moving_squares(frames))
    url = str(tmp_path / "squares.zarr")
    probe_stage.fn(str(video), "squares", url)
    plan_stage.fn(url, ReconstructionConfig(infer=InferConfig(weights="untrained")))
    store, config = ReconstructionStore.open(url), weights_info("untrained").config
    host = list(DriveInput.from_store(store, config).read(0, frames))
    found = list(DriveInput.from_store(store, config, torch.device(device)).read(0, frames))
    assert len(found) == frames
    assert np.abs(np.stack(host).astype(int) - np.stack(found)).max() <= 1
