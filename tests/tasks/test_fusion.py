"""TSDF fusion of rendered scenes whose geometry is known.

The room is 6 x 3 x 5 m (right, down, forward) with a ball and a crate inside, seen by
perfect cameras; depth comes from rays through pixel centres, with (0, 0) the centre of the
top-left pixel. Accuracy: distance from vertices of the mesh to the true surface.
Completeness: distance from measured points to the mesh.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import open3d as o3d
import pytest
import trimesh
from mesh_oracles import merge_meshes

from tasks.fusion import (
    FusionFrame,
    FusionGrid,
    FusionSettings,
    Tile,
    TileVolume,
    choose_grid,
    distinct_views,
    filter_depth,
    frames_of,
    fuse_tiles,
    group_tiles,
    measured_blocks,
    plan_tiles,
    prepare,
    touched_blocks,
    upsample_depth,
)
from tasks.meshes import Mesh, write_ply

H, W, FOCAL = 72, 96, 60.0
K = np.array([[FOCAL, 0, 47.5], [0, FOCAL, 35.5], [0, 0, 1]])
ROOM = (np.array([-3.0, -2.0, -2.5]), np.array([3.0, 1.0, 2.5]))
RED, BLUE = [200, 30, 20], [20, 30, 200]


class Scene:
    """Triangles to cast rays at, and to measure distances from."""

    def __init__(self, *solids):
        self.rays = o3d.t.geometry.RaycastingScene()
        for solid in solids:
            self.rays.add_triangles(
                o3d.core.Tensor(solid.vertices.astype(np.float32)),
                o3d.core.Tensor(solid.faces.astype(np.uint32)),
            )

    def distance(self, points):
        return self.rays.compute_distance(o3d.core.Tensor(points.astype(np.float32))).numpy()

    def depth(self, T_world_cam, intrinsics=K, height=H, width=W):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
        directions = pixels @ np.linalg.inv(intrinsics).T @ T_world_cam[:3, :3].T
        origins = np.broadcast_to(T_world_cam[:3, 3], directions.shape)
        rays = np.concatenate([origins, directions], axis=-1).astype(np.float32)
        # Directions have z = 1 in the camera, so the ray parameter is z-depth.
        depth = self.rays.cast_rays(o3d.core.Tensor(rays))["t_hit"].numpy()
        return np.where(np.isfinite(depth), depth, np.nan).astype(np.float32)


def solid_room():
    room = trimesh.creation.box(bounds=ROOM)
    room.invert()
    ball = trimesh.creation.icosphere(4, radius=0.6)
    ball.apply_translation([1.0, 0.2, 0.8])
    crate = trimesh.creation.box(bounds=[[-1.8, 0.2, -0.6], [-1.0, 1.0, 0.4]])
    return Scene(room, ball, crate)


def look_at(eye, target):
    """T_world_cam of a camera, y down."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    T_world_cam = np.eye(4)
    T_world_cam[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    T_world_cam[:3, 3] = eye
    return T_world_cam


def room_cameras(count=36):
    """From a circle around the middle, looking outwards, inwards and across, up and down."""
    cameras = []
    for i in range(count):
        a = 2 * np.pi * i / count
        eye = np.array([1.9 * np.cos(a), -0.6 + 0.3 * np.cos(3 * a), 1.5 * np.sin(a)])
        b = a + (0, np.pi, np.pi / 2)[i % 3]
        target = [3 * np.cos(b), -0.5 + 1.5 * np.sin(5 * a), 2.5 * np.sin(b)]
        cameras.append(look_at(eye, target))
    return cameras


def paint(points):
    """Right wall red, left wall blue, all else grey."""
    colors = np.full(points.shape, 90, np.uint8)
    colors[points[..., 0] > 2.999] = RED
    colors[points[..., 0] < -2.999] = BLUE
    return colors


def lift(depth, T_world_cam, intrinsics=K):
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    return (pixels * depth[..., None]) @ np.linalg.inv(intrinsics).T @ T_world_cam[
        :3, :3
    ].T + T_world_cam[:3, 3]


def settings(**changes):
    return FusionSettings(voxel_m=0.05, depth_limit_m=8.0, confidence_quantile=0.0, **changes)


def grid_of(**changes):
    return choose_grid(settings(**changes), np.array([3.0]), FOCAL)


def fuse_all(frames, grid):
    tiles = plan_tiles(frames, grid)
    return fuse_tiles(tiles, (frames[i] for i in frames_of(tiles)), grid), tiles


@pytest.fixture(scope="module")
def room():
    return solid_room()


@pytest.fixture(scope="module")
def frames(room):
    grid = grid_of(tile_m=12.0)
    frames = []
    for T_world_cam in room_cameras():
        depth = room.depth(T_world_cam)
        color = paint(lift(depth, T_world_cam))
        frames.append(FusionFrame(filter_depth(depth, None, FOCAL, grid), K, T_world_cam, color))
    return frames


@pytest.fixture(scope="module")
def whole(frames):
    """The room in one tile."""
    meshes, tiles = fuse_all(frames, grid_of(tile_m=12.0))
    assert len(tiles) == 1
    return meshes[0]


def test_fused_room_lies_within_a_voxel_of_the_true_surface(room, whole):
    distance = room.distance(whole.vertices)
    assert distance.mean() < 0.2 * 0.05
    assert np.quantile(distance, 0.95) < 0.5 * 0.05


def test_fused_room_covers_what_the_cameras_measured(frames, whole):
    points = np.concatenate([lift(f.depth, f.T_world_cam)[f.depth > 0][::20] for f in frames])
    distance = distance_to_mesh(whole, points)
    assert distance.mean() < 0.2 * 0.05
    assert np.quantile(distance, 0.95) < 0.5 * 0.05
    assert np.quantile(distance, 0.99) < 0.05  # the rest was seen by one camera only


def test_fused_triangles_face_the_cameras(frames, whole):
    centroids, normals = faces(whole)
    floor = (np.abs(centroids[:, 1] - 1) < 0.05) & (np.abs(normals[:, 1]) > 0.9)
    assert floor.sum() > 500
    assert (normals[floor, 1] < 0).all()  # y points down, so up is negative


def test_colours_stay_on_their_walls(whole):
    inside = np.abs(whole.vertices[:, 1] + 0.5) < 1.2
    inside &= np.abs(whole.vertices[:, 2]) < 2.2
    for x, color in ((3, RED), (-3, BLUE)):
        wall = inside & (np.abs(whole.vertices[:, 0] - x) < 0.02)
        assert wall.sum() > 500
        worst = np.abs(whole.colors[wall].astype(int) - color).max(axis=1)
        assert np.quantile(worst, 0.99) <= 2


def test_tiles_merge_into_exactly_the_mesh_of_one_tile(frames, whole):
    meshes, tiles = fuse_all(frames, grid_of(tile_m=2.0))
    assert len(tiles) > 12
    # Same bytes: no gap, no double layer, no step, anywhere.
    assert write_ply(merge_meshes(meshes)) == write_ply(whole)
    assert sum(len(mesh.triangles) for mesh in meshes) == len(whole.triangles)


def test_tiles_keep_inside_their_bounds(frames):
    grid = grid_of(tile_m=2.0)
    meshes, tiles = fuse_all(frames[:6], grid)
    for mesh, tile in zip(meshes, tiles, strict=True):
        low, high = grid.tile_bounds(tile.index)
        centroids, _ = faces(mesh)
        assert (centroids >= low).all()
        assert (centroids < high).all()


def test_plan_tiles_lists_exactly_the_frames_that_matter(frames):
    grid = grid_of(tile_m=2.0)
    tiles = plan_tiles(frames, grid)
    tile = next(tile for tile in tiles if 5 < len(tile.frames) < 20)
    every = fuse_tile(replace(tile, frames=tuple(range(len(frames)))), frames, grid)
    chosen = fuse_tile(tile, [frames[i] for i in tile.frames], grid)
    assert write_ply(every) == write_ply(chosen)
    assert len(chosen.triangles)


def test_frames_that_are_not_those_of_the_tiles_are_refused(frames):
    grid = grid_of(tile_m=2.0)
    tile = next(tile for tile in plan_tiles(frames, grid) if 5 < len(tile.frames) < 20)
    with pytest.raises(ValueError, match=f"more than {len(tile.frames)} frames"):
        fuse_tiles([tile], frames, grid)
    with pytest.raises(ValueError, match=f"1 of {len(tile.frames)} frames are missing"):
        fuse_tiles([tile], [frames[i] for i in tile.frames[1:]], grid)
    assert fuse_tiles([], [], grid) == []


def test_each_frame_goes_to_the_tiles_that_list_it_only(frames):
    grid = grid_of(tile_m=2.0)
    tiles = plan_tiles(frames, grid)
    first = [replace(tile, frames=tile.frames[:1]) for tile in tiles]
    fewer = fuse_tiles(first, [frames[i] for i in frames_of(first)], grid)
    assert len(frames_of(first)) > 1
    assert not any(len(mesh.triangles) for mesh in fewer)  # two views must agree


def test_groups_of_tiles_give_the_same_meshes_from_fewer_passes(frames):
    # Room for about 8,000 blocks of 5 x 5 x 5 voxels of 20 bytes at once.
    grid = grid_of(tile_m=2.0, max_volume_bytes=20_000_000)
    tiles = plan_tiles(frames, grid)
    groups = group_tiles(tiles, grid)
    assert 1 < len(groups) < len(tiles)
    assert sorted(tile.index for group in groups for tile in group) == [t.index for t in tiles]
    for group in groups:
        assert sum(tile.blocks for tile in group) * 2_500 <= 20_000_000 or len(group) == 1
    group = groups[1]
    together = fuse_tiles(group, [frames[i] for i in frames_of(group)], grid)
    for tile, mesh in zip(group, together, strict=True):
        alone = fuse_tile(tile, [frames[i] for i in tile.frames], grid)
        assert write_ply(alone) == write_ply(mesh)


def ball_frames():
    """A ball of radius 1 m at the origin, seen from all sides, against nothing."""
    scene = Scene(trimesh.creation.icosphere(5))
    golden = np.pi * (3 - np.sqrt(5))
    frames = []
    for i in range(40):
        y = 0.95 * (1 - 2 * (i + 0.5) / 40)
        r = np.sqrt(1 - y * y)
        eye = 3 * np.array([r * np.cos(golden * i), y, r * np.sin(golden * i)])
        T_world_cam = look_at(eye, [0, 0, 0])
        frames.append(FusionFrame(scene.depth(T_world_cam), K, T_world_cam))
    return frames


def test_closed_surface_across_tile_borders_has_no_hole_and_no_second_layer():
    # Tiles of 1.6 m centred on the origin: borders at +-0.8 m cut the ball six times.
    grid = grid_of(tile_m=1.6, truncation_voxels=4)
    assert grid.tile_m == pytest.approx(1.6)
    meshes, tiles = fuse_all(ball_frames(), grid)
    assert len(tiles) >= 7
    merged = merge_meshes(meshes)
    ball = trimesh.Trimesh(merged.vertices, merged.triangles, process=False)
    assert ball.is_watertight
    assert ball.is_winding_consistent
    assert ball.euler_number == 2
    assert ball.area == pytest.approx(4 * np.pi, rel=0.03)
    assert ball.volume == pytest.approx(4 / 3 * np.pi, rel=0.03)


def test_single_tile_of_a_split_surface_is_open_at_its_border_only():
    grid = grid_of(tile_m=1.6, truncation_voxels=4)
    meshes, _ = fuse_all(ball_frames(), grid)
    for mesh in filter(lambda mesh: len(mesh.triangles), meshes):
        border = mesh.vertices[boundary_vertices(mesh)]
        nearest = np.abs(np.abs(border) - 0.8).min(axis=1)
        assert nearest.max() <= 0.05  # a triangle reaches one voxel across


def test_pixel_centres_are_at_integers():
    # A wall that recedes to the right: half a pixel of error would move it by 0.4 voxels.
    normal = np.array([-0.5, 0, 1]) / np.sqrt(1.25)
    columns = np.arange(W)
    depth = np.tile(2 / (1 - 0.5 * (columns - 47.5) / FOCAL), (H, 1)).astype(np.float32)
    frame = FusionFrame(depth, K, np.eye(4), np.zeros((H, W, 3), np.uint8))
    signed = fuse_one(frame, voxel_m=0.02).vertices @ normal - 2 / np.sqrt(1.25)
    assert abs(signed.mean()) < 0.05 * 0.02
    assert np.abs(signed).max() < 0.3 * 0.02


def test_colours_meet_depth_at_the_pixel():
    # Columns 0 .. 47 are dark, 48 .. 95 bright: the border is at pixel 47.5, which is x = 0.
    color = np.zeros((H, W, 3), np.uint8)
    color[:, 48:] = 255
    wall = fuse_one(FusionFrame(np.full((H, W), 2, np.float32), K, np.eye(4), color), voxel_m=0.02)
    is_bright = wall.colors[:, 0] > 127
    assert wall.vertices[is_bright, 0].min() > -0.015
    assert wall.vertices[~is_bright, 0].max() < 0.015


def test_colours_are_not_shifted_beside_depth_on_average():
    # Column and row as colours: those of a vertex are, give or take half, what it projects to.
    color = np.zeros((H, W, 3), np.uint8)
    color[..., 0], color[..., 1] = 2 * np.arange(W), 2 * np.arange(H)[:, None]
    wall = fuse_one(FusionFrame(np.full((H, W), 2, np.float32), K, np.eye(4), color), voxel_m=0.03)
    column, row, _ = (wall.vertices @ K.T / wall.vertices[:, 2:]).T
    assert abs((wall.colors[:, 0] / 2 - column).mean()) < 0.1
    assert abs((wall.colors[:, 1] / 2 - row).mean()) < 0.1


def test_two_segments_meet_without_a_step():
    # Two sets of perfect frames along a corridor; 5 of 15 frames overlap.
    corridor = trimesh.creation.box(bounds=[[-2, -1.5, -5], [2, 1.5, 14]])
    corridor.invert()
    scene = Scene(corridor)
    cameras = [look_at([0.1, 0, z], [0, 0.2, z + 5]) for z in np.arange(0, 6.25, 0.25)]
    grid = choose_grid(replace(settings(), depth_limit_m=5.0), np.array([3.0]), FOCAL)
    frames = [FusionFrame(filter_depth(scene.depth(T), None, FOCAL, grid), K, T) for T in cameras]
    first, second = frames[:15], frames[10:]
    merged = merge_meshes(fuse_all(first + second, grid)[0])
    floor = merged.vertices[np.abs(merged.vertices[:, 0]) < 1.5]
    floor = floor[floor[:, 1] > 1.3]
    z = floor[:, 2]
    heights = [floor[(z > a) & (z < a + 1), 1].mean() for a in range(2, 9)]
    assert np.ptp(heights) < 0.1 * 0.05
    assert np.abs(floor[(z > 2) & (z < 9), 1] - 1.5).max() < 0.05


def test_same_frames_give_the_same_bytes(frames, whole):
    again, _ = fuse_all(frames, grid_of(tile_m=12.0))
    assert write_ply(again[0]) == write_ply(whole)


def test_surface_seen_too_rarely_is_left_out():
    frame = FusionFrame(np.full((H, W), 2, np.float32), K, np.eye(4))
    for needed, seen, is_there in ((1, 1, True), (2, 1, False), (2, 2, True), (3, 2, False)):
        tile = Tile((0, 0, 0), tuple(range(seen)), 1)
        grid = grid_of(min_observations=needed, tile_m=6.0)
        assert bool(len(fuse_tile(tile, [frame] * seen, grid).triangles)) is is_there


def test_frame_that_misses_the_tile_changes_nothing():
    grid = grid_of(tile_m=2.0)
    away = FusionFrame(np.full((H, W), 5, np.float32), K, look_at([0, 0, 5], [0, 0, 20]))
    volume = TileVolume(Tile((0, 0, 0), (0,), 0), grid)
    volume.integrate(prepare(away, grid))
    assert len(volume.mesh().triangles) == 0


def test_frame_without_measurement_touches_nothing():
    frame = FusionFrame(np.full((H, W), np.nan, np.float32), K, np.eye(4))
    assert plan_tiles([frame] * 3, grid_of()) == []


def test_far_from_the_origin_the_surface_is_as_good(frames, whole, room):
    # 20 km along the drive: float32 still resolves 2 mm there.
    shift = np.eye(4)
    shift[:3, 3] = [0, 0, 20000]
    moved = [replace(f, T_world_cam=shift @ f.T_world_cam) for f in frames]
    mesh = merge_meshes(fuse_all(moved, grid_of(tile_m=12.0))[0])
    distance = room.distance(mesh.vertices.astype(np.float64) - [0, 0, 20000])
    assert distance.mean() < 0.2 * 0.05
    assert len(mesh.triangles) == pytest.approx(len(whole.triangles), rel=0.01)


def test_touched_blocks_surround_the_surface():
    # 4-voxel blocks of 0.2 m; one pixel at (0.1, 0.1, 2.1): a block around its own spans
    # -0.2 .. 0.4 in x and y, 1.8 .. 2.4 in z, which meets 2 x 2 x 2 cubes of two blocks each way.
    grid = grid_of(truncation_voxels=4)
    depth = np.full((2, 2), np.nan)
    depth[0, 0] = 2.1
    at_point = np.array([[1.0, 0, -0.1 / 2.1], [0, 1.0, -0.1 / 2.1], [0, 0, 1]])
    blocks = touched_blocks(depth, at_point, np.eye(4), grid).tolist()
    across, along = (-2, -1, 0, 1), (8, 9, 10, 11)
    assert sorted(blocks) == [[x, y, z] for x in across for y in across for z in along]


def test_measured_blocks_hold_every_voxel_that_is_fused_and_few_others(frames):
    grid = grid_of()
    for frame in frames[:6]:
        # As much as is measured beside holes and borders: a band and a corner are missing.
        depth = np.nan_to_num(frame.depth)
        depth[30:34] = depth[:10, :20] = 0
        touched = touched_blocks(depth, K, frame.T_world_cam, grid)
        measured = set(map(tuple, measured_blocks(depth, K, frame.T_world_cam, grid).tolist()))
        voxels = np.indices((5, 5, 5)).reshape(3, -1).T + 5 * touched[:, None]
        world_to_cam = np.linalg.inv(frame.T_world_cam)
        points = voxels * grid.voxel_m @ world_to_cam[:3, :3].T + world_to_cam[:3, 3]
        z = points[..., 2]
        with np.errstate(divide="ignore"):
            column, row = np.floor((points @ K.T)[..., :2] / z[..., None] + 0.5).T.astype(int)
        is_seen = (z.T > 0) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
        at_pixel = np.where(is_seen, depth[row.clip(0, H - 1), column.clip(0, W - 1)], 0)
        is_fused = (at_pixel > 0) & (z.T - at_pixel <= 5 * grid.voxel_m)
        needed = set(map(tuple, touched[is_fused.any(axis=0)].tolist()))
        assert needed <= measured
        assert len(measured) < 0.9 * len(touched)


def test_upsample_depth_keeps_a_slanted_plane_exact():
    rows, columns = np.mgrid[:6, :8]
    plane = (1 / (0.5 - 0.02 * columns - 0.03 * rows)).astype(np.float32)
    intrinsics = np.array([[10.0, 0, 3.5], [0, 10.0, 2.5], [0, 0, 1]])
    dense, fine = upsample_depth(plane, intrinsics, 3)
    points = lift(plane, np.eye(4), intrinsics).reshape(-1, 3)
    normal = np.linalg.lstsq(points, np.ones(len(points)), rcond=None)[0]
    np.testing.assert_allclose(lift(dense, np.eye(4), fine) @ normal, 1, rtol=1e-5)
    assert dense.shape == (18, 24)


def test_upsample_depth_does_not_bridge_holes():
    depth = np.array([[2, np.nan, 8], [2, np.nan, 8]], np.float32)
    dense, _ = upsample_depth(depth, K, 2)
    np.testing.assert_allclose(dense[0], [2, 2, np.nan, np.nan, 8, 8])


def test_filter_depth_drops_flying_pixels_and_keeps_a_road():
    grid = replace(grid_of(), depth_limit_m=100.0)
    depth = np.full((5, 6), 4, np.float32)
    depth[:, 3] = 6  # between a near and a far wall
    depth[:, 4:] = 12
    kept = np.isfinite(filter_depth(depth, None, FOCAL, grid))
    np.testing.assert_array_equal(kept[2], [True, True, False, False, False, True])
    # 1.5 m above a road, rows 5 .. 40 pixels below the horizon: 18 m to 2.25 m ahead.
    road = np.repeat(1.5 * FOCAL / np.arange(5, 41.0)[:, None], 4, axis=1)
    assert np.isfinite(filter_depth(road, None, FOCAL, grid)).all()


def test_filter_depth_drops_surfaces_seen_too_obliquely():
    # 1.5 m above a road, 30 m ahead: the ray meets it at atan(30 / 1.5) = 87.1 degrees.
    grid = replace(grid_of(), depth_limit_m=100.0)
    rows_below_horizon = np.array([[29.0], [30.0], [31.0]])
    road = 1.5 * 600 / rows_below_horizon * np.ones(4)
    assert np.isnan(filter_depth(road, None, 600, grid)).all()


def test_filter_depth_drops_far_doubtful_and_impossible_pixels():
    grid = replace(grid_of(), min_confidence=2.0, depth_limit_m=3.1)
    depth = np.array([[3, 3, 3, np.nan], [3.0, 3, 0, 3.2]])
    confidence = np.array([[2.0, 1.9, np.nan, 9], [9, 9, 9, 9]])
    kept = np.isfinite(filter_depth(depth, confidence, FOCAL, grid))
    np.testing.assert_array_equal(kept, [[1, 0, 0, 0], [1, 1, 0, 0]])


def test_choose_grid_takes_a_pixel_at_the_median_depth():
    depths = np.array([np.nan, -1, 0, 8.0, 10.0, 12.0])
    grid = choose_grid(FusionSettings(truncation_voxels=4), depths, 100.0)
    assert grid.voxel_m == pytest.approx(0.1)
    assert grid.depth_limit_m == pytest.approx(30)
    assert grid.tile_m == pytest.approx(25.6)
    assert grid.upsampling == 2
    assert choose_grid(FusionSettings(), depths, 1000.0).upsampling == 1
    assert choose_grid(FusionSettings(), depths, 1000.0).voxel_m == pytest.approx(10 / 250)
    assert choose_grid(FusionSettings(), depths, 10.0).voxel_m == pytest.approx(10 / 40)


def moved(x: float, yaw: float = 0.0) -> np.ndarray:
    pose = np.eye(4)
    pose[[0, 0, 2, 2], [0, 2, 0, 2]] = np.cos(yaw), np.sin(yaw), -np.sin(yaw), np.cos(yaw)
    pose[0, 3] = x
    return pose


def test_views_are_distinct_where_the_camera_has_moved_a_share_of_the_depth_or_turned():
    waiting = [moved(0.0)] * 5
    driving = [moved(0.07 * i) for i in range(1, 7)]  # 0.42 m in the end
    turning = [moved(0.42, 0.03 * i) for i in range(1, 5)]
    poses = np.array(waiting + driving + turning)
    # 0.05 of 4 m are 0.2 m, and 0.05 rad.
    assert distinct_views(poses, 0.05, 4.0).tolist() == [0, 7, 10, 12, 14]
    assert distinct_views(poses, 0.0, 4.0).tolist() == list(range(len(poses)))
    assert distinct_views(poses[:5], 0.05, 4.0).tolist() == [0]


def test_choose_grid_drops_the_given_share_of_confidence():
    confidences = np.arange(100.0)
    grid = choose_grid(FusionSettings(confidence_quantile=0.2), np.ones(100), 50.0, confidences)
    assert (confidences < grid.min_confidence).sum() == 20
    confidences[7] = np.nan
    other = choose_grid(FusionSettings(confidence_quantile=0.2), np.ones(100), 50.0, confidences)
    assert (confidences < other.min_confidence).sum() == 20
    everything = choose_grid(FusionSettings(confidence_quantile=0), np.ones(100), 50.0, confidences)
    assert np.isfinite(
        filter_depth(np.ones((10, 10)), confidences.reshape(10, 10), 50.0, everything)
    ).all()


def test_confidence_of_what_is_too_far_to_be_fused_does_not_count():
    depths = np.concatenate([np.full(60, 1.0), np.full(40, 50.0)])
    confidences = np.concatenate([np.linspace(1, 2, 60), np.ones(40)])
    grid = choose_grid(FusionSettings(confidence_quantile=0.1), depths, 50.0, confidences)
    assert (confidences[:60] < grid.min_confidence).sum() == 6


@pytest.mark.parametrize(("unsure", "dropped"), [(13, 13), (19, 19), (21, 0)])
def test_of_equally_confident_measurements_as_many_are_dropped_as_come_nearest(unsure, dropped):
    confidences = np.concatenate([np.ones(unsure), np.full(100 - unsure, 2.0)])
    grid = choose_grid(FusionSettings(confidence_quantile=0.1), np.ones(100), 50.0, confidences)
    assert (confidences < grid.min_confidence).sum() == dropped


def test_tiles_too_large_for_memory_are_refused():
    with pytest.raises(ValueError, match="use smaller tiles"):
        choose_grid(FusionSettings(voxel_m=0.01, tile_m=50.0), np.ones(1), 100.0)


def test_scaled_poses_are_refused():
    T_world_cam = np.diag([2.0, 2, 2, 1])
    with pytest.raises(ValueError, match="not rigid"):
        FusionFrame(np.ones((H, W), np.float32), K, T_world_cam)


def test_scene_without_depth_is_refused():
    with pytest.raises(ValueError, match="nothing to fuse"):
        choose_grid(FusionSettings(), np.full(10, np.nan), 100.0)


def test_runaway_pose_is_refused():
    T_world_cam = np.eye(4)
    T_world_cam[0, 3] = 1e9
    with pytest.raises(ValueError, match="poses run away"):
        prepare(FusionFrame(np.ones((H, W), np.float32), K, T_world_cam), grid_of())


PEAK_MEMORY = """
import resource, sys
import numpy as np
from tasks.fusion import FusionFrame, FusionSettings, Tile, choose_grid, fuse_tiles
intrinsics = np.array([[60.0, 0, 47.5], [0, 60.0, 35.5], [0, 0, 1]])
rng = np.random.default_rng(0)
def frames(count):
    for _ in range(count):
        depth = 3 + 0.02 * rng.standard_normal((72, 96)).astype(np.float32)
        yield FusionFrame(depth, intrinsics, np.eye(4), np.zeros((72, 96, 3), np.uint8))
grid = choose_grid(FusionSettings(), np.array([3.0]), 60.0)
count = int(sys.argv[1])
(mesh,) = fuse_tiles([Tile((0, 0, 0), tuple(range(count)), 1000)], frames(count), grid)
assert len(mesh.triangles)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_a_tile_does_not_grow_with_the_frames():
    peaks = [peak_kilobytes(count) for count in (20, 400)]
    assert peaks[1] - peaks[0] < 20_000


def peak_kilobytes(frames):
    command = [sys.executable, "-c", PEAK_MEMORY, str(frames)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def fuse_tile(tile, frames, grid):
    return fuse_tiles([tile], frames, grid)[0]


def fuse_one(frame, **changes):
    grid = FusionGrid(
        depth_limit_m=8.0,
        min_confidence=None,
        tile_blocks=32,
        upsampling=2,
        settings=FusionSettings(min_observations=1),
        **changes,
    )
    return merge_meshes(fuse_all([frame], grid)[0])


def distance_to_mesh(mesh: Mesh, points):
    surface = trimesh.Trimesh(mesh.vertices, mesh.triangles, process=False)
    return Scene(surface).distance(points)


def faces(mesh):
    corners = mesh.vertices[mesh.triangles].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return corners.mean(axis=1), normals / lengths


def boundary_vertices(mesh):
    edges = np.sort(mesh.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges, counts = np.unique(edges, axis=0, return_counts=True)
    return np.unique(edges[counts == 1])
