import numpy as np
import pytest

from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage
from tasks.config import AlignConfig, FuseConfig
from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage
from tasks.meshes import read_ply

VOXEL_M = 0.1


@pytest.fixture
def fused(corridor_drive):
    """The mesh of the corridor and the metres of its world per metre."""
    corridor_drive.infer_perfectly()
    url, infer = corridor_drive.url, corridor_drive.config.infer
    align_stage.fn(url, AlignConfig(scale_prior_sigma=100.0), infer)
    config = FuseConfig(voxel_m=VOXEL_M, depth_limit_m=6.0, smallest_piece=1)
    for batch in range(plan_tiles_stage.fn(url, config, infer)):
        fuse_tiles_stage.fn(url, batch, config, infer)
    merge_tiles_stage.fn(url, config)
    store = ReconstructionStore.open(url)
    return read_ply(store.get_file("fusion/mesh.ply")), store.read_trajectory()["scale"][0]


def test_fuse_puts_the_walls_where_they_are_without_a_step_at_the_seam(fused):
    mesh, unit = fused
    x, y, z = (mesh.vertices / unit).T
    to_wall = np.minimum(abs(abs(x) - 2.0), abs(abs(y) - 1.5))
    assert np.quantile(to_wall, 0.95) < VOXEL_M
    left = (x < -1.8) & (abs(y) < 1.2)
    # Frames 16 to 23 are seen by both segments, frame 20 is the seam: at z = 3 m.
    before, after = x[left & (z > 3.5) & (z < 4.5)], x[left & (z > 5.5) & (z < 6.5)]
    assert min(len(before), len(after)) > 50
    assert abs(before.mean() - after.mean()) < 0.1 * VOXEL_M


def test_fuse_keeps_the_colours_of_the_walls(fused):
    mesh, unit = fused
    x, y, _ = (mesh.vertices / unit).T
    left = mesh.colors[(x < -1.9) & (abs(y) < 1.0)].astype(float).mean(axis=0)
    right = mesh.colors[(x > 1.9) & (abs(y) < 1.0)].astype(float).mean(axis=0)
    assert left[0] > 150 > 100 > left[1]
    assert right[1] > 120 > 100 > right[0]


def test_fuse_commits_and_is_not_done_again(corridor_drive, fused):
    store = ReconstructionStore.open(corridor_drive.url)
    before = store.commits("fuse")
    config = FuseConfig(voxel_m=VOXEL_M, depth_limit_m=6.0, smallest_piece=1)
    for batch in range(plan_tiles_stage.fn(store.url, config, corridor_drive.config.infer)):
        fuse_tiles_stage.fn(store.url, batch, config, corridor_drive.config.infer)
    merge_tiles_stage.fn(store.url, config)
    assert store.commits("fuse") == before
