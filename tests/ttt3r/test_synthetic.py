"""The rendered worlds: exact geometry, one seed one sequence, cameras in free space."""

import math

import pytest
import torch
from torch import Tensor

from ttt3r.synthetic import HELD_OUT_SEED, Sequences, render, render_chunks
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.road import Road
from ttt3r.synthetic.rooms import Rooms
from ttt3r.synthetic.solids import BOX, CYLINDER, ELLIPSOID, TRIANGLE, Solids
from ttt3r.synthetic.streets import Streets

WORLDS = ("streets", "rooms")


def lift(sequences: Sequences, frame: int) -> Tensor:
    """World points [B, H, W, 3] that a frame sees."""
    depth = sequences.depth[:, frame]
    rows, columns = torch.meshgrid(
        torch.arange(depth.shape[1]), torch.arange(depth.shape[2]), indexing="ij"
    )
    focal = sequences.intrinsics[:, 0, 0, None, None]
    x = (columns - sequences.intrinsics[:, 0, 2, None, None]) / focal * depth
    y = (rows - sequences.intrinsics[:, 1, 2, None, None]) / focal * depth
    pose = sequences.T_world_cam[:, frame]
    points = torch.stack([x, y, depth], dim=-1)
    return torch.einsum("bij,bhwj->bhwi", pose[:, :3, :3], points) + pose[:, None, None, :3, 3]


def project(sequences: Sequences, frame: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, N, 2] and z-depth [B, N] of world points [B, N, 3] in a frame."""
    inverse = torch.linalg.inv(sequences.T_world_cam[:, frame].double()).float()
    seen = torch.einsum("bij,bnj->bni", inverse[:, :3, :3], points) + inverse[:, None, :3, 3]
    pixels = torch.einsum("bij,bnj->bni", sequences.intrinsics, seen / seen[..., 2:])
    return pixels[..., :2], seen[..., 2]


def sample(pictures: Tensor, pixels: Tensor) -> Tensor:
    """Bilinear values [B, N, C] of pictures [B, H, W, C] at pixels [B, N, 2]."""
    height, width = pictures.shape[1:3]
    scale = torch.tensor([2 / (width - 1), 2 / (height - 1)])
    grid = (pixels * scale - 1)[:, None]
    values = torch.nn.functional.grid_sample(
        pictures.permute(0, 3, 1, 2), grid, align_corners=True, padding_mode="zeros"
    )
    return values[:, :, 0].transpose(1, 2)


def test_reprojection_agrees_in_rooms_to_a_ten_thousandth():
    sequences = render("rooms", [5, 6, 7], 3, 90, 120, clean=True)
    points = lift(sequences, 0).flatten(1, 2)
    pixels, depth = project(sequences, 2, points)
    inside = ((pixels > 1) & (pixels < torch.tensor([118.0, 88.0]))).all(-1) & (depth > 0)
    # Inverse depth is linear on planes, so bilinear interpolation is exact on them.
    found = 1 / sample(1 / sequences.depth[:, 2, ..., None], pixels)[..., 0]
    error = ((found - depth).abs() / depth)[inside]
    assert inside.float().mean() > 0.5
    assert error.median() < 1e-4
    assert (error < 1e-3).float().mean() > 0.9


def test_reprojection_agrees_on_streets():
    sequences = render("streets", range(20, 24), 2, 90, 160, clean=True, motion=0.5)
    points = torch.nan_to_num(lift(sequences, 0).flatten(1, 2), posinf=1e6, neginf=-1e6)
    pixels, depth = project(sequences, 1, points)
    inside = ((pixels > 1) & (pixels < torch.tensor([158.0, 88.0]))).all(-1) & (depth > 0)
    inside &= sequences.valid[:, 0].flatten(1)
    inverse = torch.where(sequences.valid[:, 1], 1 / sequences.depth[:, 1], 0.0)
    found = 1 / sample(inverse[..., None], pixels)[..., 0].clamp(min=1e-6)
    error = ((found - depth).abs() / depth)[inside]
    assert error.median() < 1e-3
    assert (error < 0.02).float().mean() > 0.8


@pytest.mark.parametrize("world", WORLDS)
def test_clean_colours_stay_on_their_surfaces(world):
    sequences = render(world, range(40, 46), 2, 60, 80, clean=True, motion=0.4, supersample=2)
    points = torch.nan_to_num(lift(sequences, 0).flatten(1, 2), posinf=1e6, neginf=-1e6)
    pixels, depth = project(sequences, 1, points)
    inside = ((pixels > 1) & (pixels < torch.tensor([78.0, 58.0]))).all(-1) & (depth > 0)
    inside &= sequences.valid[:, 0].flatten(1)
    before = sequences.images[:, 0].flatten(1, 2).float()
    there = sample(sequences.images[:, 1].float(), pixels)
    start = _identity(sequences)
    unmoved = sample(sequences.images[:, 1].float(), start)
    error = (there - before).abs().mean(-1)[inside]
    assert error.median() < 2.5
    moved = inside & ((pixels - start).norm(dim=-1) > 1.5)
    assert moved.sum() > 500
    error, change = ((picture - before).abs().mean(-1)[moved] for picture in (there, unmoved))
    assert error.median() < 0.8 * change.median()


def _identity(sequences: Sequences) -> Tensor:
    height, width = sequences.depth.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(1, -1, 2).float()
    return pixels.expand(len(sequences.depth), -1, -1)


@pytest.mark.parametrize("world", WORLDS)
def test_a_sequence_depends_on_its_seed_alone(world):
    alone = render(world, [7], 3, 24, 32)
    among = render(world, [3, 7, HELD_OUT_SEED + 9], 6, 24, 32)
    same = torch.isclose(alone.depth[0], among.depth[1, :3], rtol=1e-4)
    assert same.float().mean() > 0.999
    torch.testing.assert_close(alone.T_world_cam[0], among.T_world_cam[1, :3])
    torch.testing.assert_close(alone.intrinsics[0], among.intrinsics[1])
    difference = (alone.images[0].int() - among.images[1, :3].int()).abs()
    assert (difference <= 1).float().mean() > 0.998


@pytest.mark.parametrize("world", WORLDS)
def test_time_slices_join_to_the_whole(world):
    whole = render(world, [11, 12], 7, 24, 32)
    slices = list(render_chunks(world, [11, 12], 7, 24, 32, chunk_frames=3))
    assert [piece.images.shape[1] for piece in slices] == [3, 3, 1]
    joined = torch.cat([piece.images for piece in slices], dim=1)
    assert ((joined.int() - whole.images.int()).abs() <= 1).float().mean() > 0.998


@pytest.mark.parametrize("world", WORLDS)
def test_two_seeds_give_two_worlds(world):
    sequences = render(world, [1, 2], 1, 24, 32)
    assert (sequences.images[0].int() - sequences.images[1].int()).abs().float().mean() > 8


def test_rooms_are_closed_and_streets_have_a_sky():
    rooms = render("rooms", range(16), 2, 24, 32)
    assert rooms.valid.all()
    assert rooms.depth.max() < 15
    streets = render("streets", range(16), 2, 24, 32)
    assert 0.03 < (~streets.valid).float().mean() < 0.6
    assert torch.equal(torch.isinf(streets.depth), ~streets.valid)


def inside_any(solids: Solids, places: Tensor, margin: float) -> Tensor:
    """Whether world places [B, N, 3] lie within `margin` metres of present solids [B, P]."""
    offset = places[:, :, None] - solids.centre[:, None]
    local = torch.einsum("bpij,bnpj->bnpi", torch.linalg.inv(solids.basis), offset)
    half = solids.basis.norm(dim=-2)[:, None]
    reach = (local.abs() * half - margin).clamp(min=0) / half
    kind = solids.kind[:, None]
    radial = reach[..., 0] ** 2 + reach[..., 2] ** 2
    hit = (kind == BOX) & (reach.amax(-1) <= 1)
    hit |= (kind == CYLINDER) & (radial <= 1) & (reach[..., 1] <= 1)
    hit |= (kind == ELLIPSOID) & (radial + reach[..., 1] ** 2 <= 1)
    return (hit & solids.present[:, None]).any(-1)


def test_cameras_in_rooms_keep_clear_of_everything():
    rooms = Rooms(Dice(range(60)), 1.0)
    places = rooms.poses(0, 400)[0][..., :3, 3]
    assert not inside_any(rooms.static(0, 400), places, margin=0.15).any()


def test_cameras_on_streets_keep_clear_of_everything():
    streets = Streets(Dice(range(30)), 1.0)
    places = streets.poses(0, 60)[0][..., :3, 3]
    for frame in range(0, 60, 12):
        solids = streets.static(frame, frame + 1)
        assert not inside_any(solids, places[:, frame : frame + 1], margin=0.2).any()
        moving = streets.moving(frame, frame + 1)
        here = Solids(**{name: value[:, 0] for name, value in vars(moving).items()})
        assert not inside_any(here, places[:, frame : frame + 1], margin=0.2).any()


def test_cameras_on_streets_stay_above_the_ground():
    streets = Streets(Dice(range(40)), 1.0)
    place = streets.poses(0, 50)[0][:, -1, :3, 3]
    solids = streets.static(49, 50)
    local = torch.einsum(
        "bpij,bpj->bpi", torch.linalg.inv(solids.basis), place[:, None] - solids.centre
    )
    over = (solids.kind == TRIANGLE) & (local[..., 0] >= 0) & (local[..., 2] >= 0)
    over &= local[..., 0] + local[..., 2] <= 1
    assert (over.sum(-1) >= 1).all()
    height = -local[..., 1][over]
    assert height.min() > 1.0
    assert height.max() < 2.2


def test_rooms_keep_positions_bounded_while_the_path_grows():
    path = render("rooms", range(4), 500, 4, 6).T_world_cam[..., :3, 3]
    assert path[..., [0, 2]].abs().max() < 3
    length = (path[:, 1:] - path[:, :-1]).norm(dim=-1).sum(1)
    assert (length > 2 * (path.amax(1) - path.amin(1)).norm(dim=-1)).all()


def test_streets_go_on_for_half_a_kilometre():
    last = None
    for piece in render_chunks("streets", [0], 400, 4, 6, chunk_frames=40):
        last = piece
    travelled = last.T_world_cam[:, -1, :3, 3].norm(dim=-1)
    assert travelled > 500
    assert last.valid.any(dim=-1).any(dim=-1).all()


def test_speeds_are_those_of_cars_and_hands():
    for world, fastest, turn in (("streets", 3.2, 0.12), ("rooms", 0.4, 0.25)):
        pose = render(world, range(32), 6, 6, 8).T_world_cam
        step = (pose[:, 1:, :3, 3] - pose[:, :-1, :3, 3]).norm(dim=-1)
        assert step.max() < fastest
        assert step.median() > 0.01
        relative = pose[:, :-1, :3, :3].transpose(-1, -2) @ pose[:, 1:, :3, :3]
        cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
        assert math.cos(turn) < cosine.min()


@pytest.mark.parametrize("world", WORLDS)
def test_motion_scales_the_steps(world):
    still, slow, full = (
        render(world, range(16), 3, 6, 8, motion=motion).T_world_cam[..., :3, 3]
        for motion in (0.0, 0.25, 1.0)
    )
    steps = [(path[:, 1:] - path[:, :-1]).norm(dim=-1).mean() for path in (still, slow, full)]
    assert steps[0] < 1e-5
    assert 0.2 < steps[1] / steps[2] < 0.35


def test_turn_scales_what_a_hand_turns_and_not_the_way_it_goes():
    calm, usual = (
        render("rooms", range(16), 3, 6, 8, turn=turn).T_world_cam for turn in (0.25, 1.0)
    )
    assert torch.equal(calm[..., :3, 3], usual[..., :3, 3])
    turned = [
        (path[:, 1:, :3, :3] - path[:, :-1, :3, :3]).flatten(-2).norm(dim=-1).mean()
        for path in (calm, usual)
    ]
    assert 0.2 < turned[0] / turned[1] < 0.35


def test_traffic_moves_and_parked_cars_do_not():
    streets = Streets(Dice(range(30)), 1.0)
    cars = streets.moving(0, 2)
    both = cars.present.all(1)
    step = (cars.centre[:, 1] - cars.centre[:, 0]).norm(dim=-1)[both]
    assert step.median() > 0.2


def test_road_locates_places_beside_it_from_a_rough_guess():
    road = Road(Dice(range(40)), 500.0)
    station = torch.linspace(120.0, 400.0, 60).expand(40, -1)
    side = torch.linspace(-6.0, 6.0, 7).repeat(9)[:60].expand(40, -1)
    x, z, _ = road.at(station, side)
    guess = station + 12.0 * torch.linspace(-1, 1, 60)
    sequence = torch.arange(40).repeat_interleave(60)
    found = road.locate(x.float().flatten(), z.float().flatten(), guess.flatten(), sequence)
    assert ((found[0] - station.flatten()).abs() < 0.5).float().mean() > 0.99
    assert ((found[1] - side.flatten()).abs() < 0.1).float().mean() > 0.99


def test_supersampling_smooths_colours_and_leaves_depth():
    plain = render("rooms", [3], 1, 30, 40, clean=True)
    smooth = render("rooms", [3], 1, 30, 40, clean=True, supersample=2)
    assert torch.equal(plain.depth, smooth.depth)
    assert not torch.equal(plain.images, smooth.images)
    assert (plain.images.float() - smooth.images.float()).abs().mean() < 6


def test_some_sequences_are_grey():
    images = render("rooms", range(100), 1, 6, 8).images
    grey = (images[..., :1] == images).flatten(1).all(dim=1)
    assert 5 <= grey.sum() <= 30


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="unknown world 'seas'"):
        render("seas", [0], 1, 8, 8)
    with pytest.raises(ValueError, match="non-negative"):
        render("rooms", [-1], 1, 8, 8)
    with pytest.raises(ValueError, match="at least 1"):
        render("rooms", [0], 0, 8, 8)
