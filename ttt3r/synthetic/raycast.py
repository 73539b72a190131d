"""Exact first hits of pixel rays with solids, and the surface seen there.

Solids are culled against each view, then each one is tested only against the pixels of
its bounding rectangle: the work grows with the picture area that solids cover, not with
rays times solids. A 64-bit key (depth bits, solid) lets one scatter-minimum find the
nearest hit, identically on CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.solids import (
    BOX,
    COLOUR_HIGH,
    COLOUR_LOW,
    COLOUR_MASK,
    CYLINDER,
    ELLIPSOID,
    GLOW,
    LAYER,
    MASK,
    MASK_OFFSET_ACROSS,
    MASK_OFFSET_DOWN,
    MASK_RATE_ACROSS,
    MASK_RATE_DOWN,
    OFFSET_ACROSS,
    OFFSET_DOWN,
    ON_OBJECT,
    TEXTURE,
    TEXTURE_RATE,
    TRIANGLE,
    Solids,
)

NEAR = 0.05  # metres; nothing closer than this is drawn
_MISS = 0x7F800000 << 32  # the key of an infinite depth
_SMALLEST = 0.35  # solids whose bounding sphere spans fewer pixels than this are left out
_PAIRS = torch.tensor([(i, j) for i in range(8) for j in range(i)])


@dataclass(frozen=True)
class Views:
    """Pinhole cameras, B sequences of T frames."""

    T_world_cam: Tensor  # [B, T, 4, 4]
    intrinsics: Tensor  # [B, 3, 3] pixels
    height: int
    width: int
    reach: Tensor | None = None  # [B, T, 2] lowest and highest station to draw
    distance: float = 1e9  # metres beyond which solids are left out

    @property
    def frames(self) -> int:
        """Number of pictures B * T."""
        return self.T_world_cam.shape[0] * self.T_world_cam.shape[1]


@dataclass(frozen=True)
class Light:
    """Sun (or lamp far away) and sky light of each sequence."""

    direction: Tensor  # [B, 3] unit vector towards the sun, world
    sun: Tensor  # [B, 3] linear RGB
    ambient: Tensor  # [B, 3] linear RGB


@dataclass(frozen=True)
class Surface:
    """What N pixels see, all linear RGB, metres, world frame."""

    pixel: Tensor  # [N] index into [B * T * H * W]
    frame: Tensor  # [N] index into [B * T]
    hit: Tensor  # [N] bool
    depth: Tensor  # [N] z-depth; meaningless without a hit
    direction: Tensor  # [3, N] ray, one unit of z-depth long
    point: Tensor  # [3, N]
    albedo: Tensor  # [3, N]
    light: Tensor  # [3, N]
    glow: Tensor  # [N]
    layer: Tensor  # [N]
    footprint: Tensor  # [N] width of the pixel on the surface


class RayCaster:
    """The solids of some views, ready to be intersected.

    `nearest` is exact geometry; `surfaces` adds colour and light, piece by piece so that
    the temporaries stay in cache.
    """

    def __init__(
        self, views: Views, static: Solids, moving: Solids | None, light: Light, piece: int = 32768
    ) -> None:
        self.views, self.piece = views, piece
        self._rows = _Rows(static, moving, light)
        self._aim(views)
        self._frame, self._row = self._visible(static, moving)
        self._project()

    def _aim(self, views: Views) -> None:
        """Flatten the cameras: origins [F, 3], ray matrices [F, 3, 3] from (x, y, 1) pixels."""
        frames = views.T_world_cam.shape[1]
        self._rotation = views.T_world_cam[..., :3, :3].flatten(0, 1)
        self._origin = views.T_world_cam[..., :3, 3].flatten(0, 1)
        lens = views.intrinsics.repeat_interleave(frames, dim=0)
        self._focal = lens[:, 0, 0]
        unproject = torch.zeros_like(lens)
        unproject[:, 0, 0], unproject[:, 0, 2] = 1 / lens[:, 0, 0], -lens[:, 0, 2] / lens[:, 0, 0]
        unproject[:, 1, 1], unproject[:, 1, 2] = 1 / lens[:, 1, 1], -lens[:, 1, 2] / lens[:, 1, 1]
        unproject[:, 2, 2] = 1.0
        self._lens, self._rays = lens, self._rotation @ unproject

    def _visible(self, static: Solids, moving: Solids | None) -> tuple[Tensor, Tensor]:
        """Pairs (frame, row) whose bounding sphere meets the view, ordered by kind."""
        views = self.views
        sequences, times = views.T_world_cam.shape[:2]
        seen = self._meets(static.centre.unsqueeze(1), static, 0)
        sequence, time, solid = seen.nonzero(as_tuple=True)
        frame, row = sequence * times + time, sequence * static.centre.shape[1] + solid
        if moving is not None:
            seen = self._meets(moving.centre, moving, static.centre[..., 0].numel())
            sequence, time, solid = seen.nonzero(as_tuple=True)
            flat = sequence * times + time
            frame = torch.cat([frame, flat])
            moved = static.centre[..., 0].numel() + flat * moving.centre.shape[2] + solid
            row = torch.cat([row, moved])
        order = torch.argsort(self._rows.kind[row], stable=True)
        return frame[order], row[order]

    def _meets(self, centre: Tensor, solids: Solids, first_row: int) -> Tensor:
        """[B, T, P] bool: present, in reach, and its bounding sphere cuts the view pyramid."""
        views = self.views
        sequences, times = views.T_world_cam.shape[:2]
        radius = self._rows.radius[first_row : first_row + solids.present.numel()]
        radius = radius.reshape(solids.present.shape)
        present, station = solids.present, solids.station
        if present.ndim == 2:
            present, station, radius = present[:, None], station[:, None], radius[:, None]
        offset = centre - views.T_world_cam[:, :, None, :3, 3]
        x, y, z = torch.einsum("btpi,btij->btpj", offset, views.T_world_cam[..., :3, :3]).unbind(-1)
        focal = views.intrinsics[:, None, None, 0, 0]
        across = views.width / focal * 0.55  # half a view, and room for an off-centre lens
        down = views.height / focal * 0.55
        margin_x, margin_y = radius * (1 + across**2).sqrt(), radius * (1 + down**2).sqrt()
        seen = present & (z > NEAR - radius) & (z - radius < views.distance)
        seen &= (x.abs() < z * across + margin_x) & (y.abs() < z * down + margin_y)
        seen &= radius * 2 * focal > _SMALLEST * z
        if views.reach is not None:
            low, high = views.reach[:, :, None, 0], views.reach[:, :, None, 1]
            seen &= (station >= low) & (station <= high)
        return seen

    def _project(self) -> None:
        """Ray transforms and pixel rectangles of all visible pairs, as columns [16, I]."""
        frame, row, rows = self._frame, self._row, self._rows
        offset = self._origin[frame] - rows.centre[row]
        inverse = rows.inverse[row]
        local_origin = torch.einsum("nij,nj->ni", inverse, offset)
        local_rays = torch.bmm(inverse, self._rays[frame])
        x0, y0, x1, y1 = self._rectangles(offset)
        filled = ((x1 > x0) & (y1 > y0)).nonzero()[:, 0]
        frame, row = frame[filled], row[filled]
        x0, y0, x1, y1 = x0[filled], y0[filled], x1[filled], y1[filled]
        self._frame, self._row = frame, row
        self._counts = ((x1 - x0) * (y1 - y0)).to(torch.int64)
        self._columns = torch.cat(
            [
                local_origin[filled].t(),
                local_rays[filled].reshape(-1, 9).t(),
                torch.stack([x0, y0, x1 - x0]),
            ]
        ).contiguous()

    def _rectangles(self, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half-open pixel bounds x0, y0, x1, y1 [I] (float, whole numbers)."""
        frame, row, rows = self._frame, self._row, self._rows
        turn = self._rotation[frame].transpose(1, 2)
        centre = -torch.einsum("nij,nj->ni", turn, offset)
        spread = torch.bmm(turn, rows.basis[row])
        shapes = _corner_table(offset.device)[rows.kind[row]]
        corners = centre[:, None] + torch.bmm(shapes, spread.transpose(1, 2))  # [I, 8, 3]
        lens = self._lens[frame]
        z = corners[..., 2]
        behind = (z < NEAR).any(dim=1)
        low, high = _pixel_bounds(corners, z >= NEAR, lens)
        clipped = behind.nonzero()[:, 0]
        if len(clipped):
            low[clipped], high[clipped] = _clipped_bounds(corners[clipped], lens[clipped])
        size = torch.tensor([self.views.width, self.views.height], device=low.device)
        low = torch.minimum((low - 0.01).ceil().clamp_(min=0), size)
        high = torch.minimum((high + 0.01).floor().clamp_(min=-1) + 1, size)
        return low[:, 0], low[:, 1], high[:, 0], high[:, 1]

    def nearest(self) -> tuple[Tensor, Tensor]:
        """z-depth [F * H * W] (inf: nothing hit) and the pair hit (-1: none)."""
        views = self.views
        keys = torch.full(
            (views.frames * views.height * views.width,), _MISS, device=self._row.device
        )
        kinds = self._rows.kind[self._row]
        for kind in (BOX, CYLINDER, ELLIPSOID, TRIANGLE):
            first = int((kinds < kind).sum())
            last = first + int((kinds == kind).sum())
            for start, stop in self._pieces(first, last):
                self._scatter(kind, start, stop, keys)
        hit = keys < _MISS
        depth = (keys >> 32).to(torch.int32).view(torch.float32)
        depth = torch.where(hit, depth, torch.inf)
        return depth, torch.where(hit, keys & 0xFFFFFFFF, -1)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Ranges of pairs with about `piece` pixels each."""
        if first == last:
            return
        total = torch.cumsum(self._counts[first:last], dim=0)
        marks = torch.arange(0, int(total[-1]), self.piece, device=total.device)[1:]
        cuts = [0, *torch.searchsorted(total, marks).tolist(), last - first]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            if stop > start:
                yield first + start, first + stop

    def _scatter(self, kind: int, start: int, stop: int, keys: Tensor) -> None:
        """Intersect pairs start..stop with the pixels of their rectangles."""
        counts = self._counts[start:stop]
        device = counts.device
        pair = torch.repeat_interleave(torch.arange(stop - start, device=device), counts)
        columns = self._columns[:, start:stop]
        firsts = (torch.cumsum(counts, 0) - counts).to(torch.float32)
        bases = (self._frame[start:stop] * (self.views.height * self.views.width))[None]
        columns = torch.cat([columns, firsts[None]]).index_select(1, pair)
        ox, oy, oz, xx, xy, x1, yx, yy, y1, zx, zy, z1, left, top, width, first = columns.unbind(0)
        place = torch.arange(len(pair), device=device, dtype=torch.float32) - first
        row = ((place + 0.5) / width).floor_()
        column = place.addcmul_(row, width, value=-1.0).add_(left)
        row = row.add_(top)
        dx = torch.addcmul(x1, xx, column).addcmul_(xy, row)
        dy = torch.addcmul(y1, yx, column).addcmul_(yy, row)
        dz = torch.addcmul(z1, zx, column).addcmul_(zy, row)
        depth, hit = _INTERSECT[kind](ox, oy, oz, dx, dy, dz)
        hit = hit & (depth > NEAR)
        depth = depth.masked_fill_(hit.logical_not_(), torch.inf)
        key = depth.view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
        key += pair
        key += start
        pixel = row.mul_(self.views.width).add_(column).to(torch.int64)
        pixel += bases[0].index_select(0, pair)
        keys.scatter_reduce_(0, pixel, key, "amin")

    def surfaces(self, depth: Tensor, pair: Tensor) -> Iterator[Surface]:
        """Colour and light of what `nearest` found, in pieces of pixels."""
        if len(self._row) == 0:
            raise ValueError("no solid is in view of any of these cameras")
        for start in range(0, len(depth), self.piece):
            stop = min(start + self.piece, len(depth))
            yield self._surface(start, depth[start:stop], pair[start:stop])

    def _surface(self, start: int, depth: Tensor, pair: Tensor) -> Surface:
        hit = pair >= 0
        pair = pair.clamp(min=0)
        depth = torch.where(hit, depth, 1.0)
        pixel = torch.arange(start, start + len(depth), device=depth.device)
        area = self.views.height * self.views.width
        frame = torch.div(pixel, area, rounding_mode="floor")
        place = (pixel - frame * area).to(torch.float32)
        y = ((place + 0.5) / self.views.width).floor_()
        x = place.addcmul_(y, torch.full_like(y, self.views.width), value=-1.0)
        rays = torch.cat([self._rays.reshape(-1, 9), self._origin, self._focal[:, None]], 1)
        rays = rays.t().contiguous().index_select(1, frame)
        direction = torch.stack(
            [rays[3 * i + 2] + rays[3 * i] * x + rays[3 * i + 1] * y for i in range(3)]
        )
        point = torch.addcmul(rays[9:12], direction, depth)
        local = self._columns[:12].index_select(1, pair)
        rows = self._rows.columns.index_select(1, self._row.index_select(0, pair))
        d = [local[5 + 3 * i] + local[3 + 3 * i] * x + local[4 + 3 * i] * y for i in range(3)]
        p = [local[i] + d[i] * depth for i in range(3)]
        length = (direction * direction).sum(0).sqrt_()
        facing = _Facing(rows, p, d, length)
        footprint = depth * length / rays[12] / facing.slant.sqrt()
        albedo = _albedo(rows, p, point, facing, footprint)
        light = rows[_AMBIENT] * (0.75 + 0.25 * facing.up) + rows[_SUN] * facing.sun.clamp_(min=0)
        paint = rows[_PAINT:]
        return Surface(
            pixel, frame, hit, depth, direction, point, albedo, light,
            paint[GLOW], paint[LAYER], footprint,
        )  # fmt: skip


# Columns of the row table: what shading needs of a solid.
_KIND, _INVERSE_SIZE, _TO_SUN, _UP = 0, slice(1, 4), slice(4, 7), slice(7, 10)
_SUN, _AMBIENT, _PAINT = slice(10, 13), slice(13, 16), 16


class _Rows:
    """Static solids, then moving ones, flattened to rows."""

    def __init__(self, static: Solids, moving: Solids | None, light: Light) -> None:
        parts = [static] if moving is None else [static, moving]
        self.kind = torch.cat([part.kind.flatten() for part in parts])
        self.centre = torch.cat([part.centre.reshape(-1, 3) for part in parts])
        self.basis = torch.cat([part.basis.reshape(-1, 3, 3) for part in parts])
        self.inverse = _invert(self.basis)
        self.radius = _bounding_radius(self.kind, self.basis)
        owner = torch.cat([_owner(part) for part in parts])
        paint = torch.cat([part.paint.flatten(0, -2) for part in parts])
        sun = torch.einsum("nij,nj->ni", self.inverse, light.direction[owner])
        self.columns = torch.cat(
            [
                self.kind[:, None].to(torch.float32),
                self.inverse.norm(dim=2),
                sun,
                -self.inverse[:, :, 1],  # world up is -y
                light.sun[owner],
                light.ambient[owner],
                paint,
            ],
            dim=1,
        ).t().contiguous()  # fmt: skip


def _owner(solids: Solids) -> Tensor:
    """Sequence of each solid, flattened."""
    sequence = torch.arange(solids.kind.shape[0], device=solids.kind.device)
    return sequence.reshape(-1, *[1] * (solids.kind.ndim - 1)).expand(solids.kind.shape).flatten()


def _invert(basis: Tensor) -> Tensor:
    """Inverse of [N, 3, 3] by cross products: far faster than LAPACK for many small ones."""
    a, b, c = basis.unbind(-1)
    rows = torch.stack(
        [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=1
    )
    return rows / (a * rows[:, 0]).sum(-1)[:, None, None]


def _bounding_radius(kind: Tensor, basis: Tensor) -> Tensor:
    """Radius about the centre (a triangle's first corner) of a sphere that holds the solid."""
    axes = basis.norm(dim=1)
    corner = axes.square().sum(-1).sqrt()
    side = torch.maximum(axes[:, 0], axes[:, 2])
    round_ = axes.amax(-1)
    return torch.where(kind == TRIANGLE, side, torch.where(kind == ELLIPSOID, round_, corner))


def _corner_table(device: torch.device) -> Tensor:
    """Corners [4 kinds, 8, 3] of a hull around each unit shape."""
    cube = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    triangle = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]])[[0, 1, 2, 0, 0, 0, 0, 0]]
    return torch.stack([cube, cube, cube, triangle]).to(device, torch.float32)


def _pixel_bounds(corners: Tensor, valid: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest pixel coordinates [I, 2] of the valid corners [I, K, 3]."""
    scale = torch.stack([lens[:, 0, 0], lens[:, 1, 1]], dim=1)[:, None]
    shift = torch.stack([lens[:, 0, 2], lens[:, 1, 2]], dim=1)[:, None]
    pixels = corners[..., :2] / corners[..., 2:].clamp(min=NEAR * 0.5) * scale + shift
    outside = ~valid[..., None]
    low = pixels.masked_fill(outside, torch.inf).amin(dim=1)
    high = pixels.masked_fill(outside, -torch.inf).amax(dim=1)
    return low, high


def _clipped_bounds(corners: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of hulls that cross the near plane: their corners in front, and where they cross."""
    pairs = _PAIRS.to(corners.device)
    a, b = corners[:, pairs[:, 0]], corners[:, pairs[:, 1]]
    crosses = (a[..., 2] >= NEAR) != (b[..., 2] >= NEAR)
    share = (NEAR - a[..., 2]) / torch.where(crosses, b[..., 2] - a[..., 2], 1.0)
    crossing = a + share.clamp(0, 1)[..., None] * (b - a)
    points = torch.cat([corners, crossing], dim=1)
    valid = torch.cat([corners[..., 2] >= NEAR, crosses], dim=1)
    return _pixel_bounds(points, valid, lens)


Hit = tuple[Tensor, Tensor]  # depth [N], hit [N] bool


def _slab(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Depths at which -1 <= o + t d <= 1 begins and ends."""
    inverse = (d + 1e-20).reciprocal_()
    middle = -o * inverse
    reach = inverse.abs_()
    return middle - reach, middle + reach


def _hit_box(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    x0, x1 = _slab(ox, dx)
    y0, y1 = _slab(oy, dy)
    z0, z1 = _slab(oz, dz)
    near = torch.maximum(torch.maximum(x0, y0), z0)
    return near, near < torch.minimum(torch.minimum(x1, y1), z1)


def _hit_cylinder(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    a = dx * dx + dz * dz
    b = ox * dx + oz * dz
    c = ox * ox + oz * oz - 1
    inside = b * b - a * c
    root = inside.clamp(min=0).sqrt_()
    y0, y1 = _slab(oy, dy)
    near = torch.maximum((-b - root) / a, y0)
    return near, (inside > 0) & (near < torch.minimum((root - b) / a, y1))


def _hit_ellipsoid(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - 1
    inside = b * b - a * c
    return (-b - inside.clamp(min=0).sqrt_()) / a, inside > 0


def _hit_triangle(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    depth = -oy / (dy + 1e-20)
    x = ox + depth * dx
    z = oz + depth * dz
    # A hair's breadth of overlap: no ray slips between neighbours.
    return depth, (torch.minimum(x, z) > -1e-5) & (x + z < 1 + 1e-5)


_INTERSECT = {
    BOX: _hit_box,
    CYLINDER: _hit_cylinder,
    ELLIPSOID: _hit_ellipsoid,
    TRIANGLE: _hit_triangle,
}


class _Facing:
    """Which way the surface faces at local points p [3][N], seen along local rays d [3][N]."""

    def __init__(self, rows: Tensor, p: list[Tensor], d: list[Tensor], length: Tensor) -> None:
        kind = rows[_KIND]
        size = [q.abs() for q in p]
        flat = (kind == TRIANGLE).to(torch.float32)
        x = ((size[0] >= size[1]) & (size[0] >= size[2])).to(torch.float32) * (1 - flat)
        y = torch.maximum((size[1] >= size[2]).to(torch.float32) * (1 - x), flat)
        self.sides, self.tops = x, y
        ball = (kind == ELLIPSOID).to(torch.float32)
        tube = ((kind == CYLINDER) & (size[1] < 0.999)).to(torch.float32)
        bent = ball + tube
        straight = 1 - bent
        # Gradient of the unit shape; its image under inverse^T is the world normal.
        g = [
            straight * x * torch.sign(p[0]) + bent * p[0],
            straight * y * (torch.sign(p[1]) - flat) + ball * p[1],
            straight * (1 - x - y) * torch.sign(p[2]) + bent * p[2],
        ]
        scale = rows[_INVERSE_SIZE]
        norm = sum((g[i] * scale[i]).square_() for i in range(3)).sqrt_().clamp_(min=1e-12)  # type: ignore[union-attr]
        along = (g[0] * d[0] + g[1] * d[1] + g[2] * d[2]) / (norm * length)
        towards = -torch.sign(along) / norm  # turn the normal towards the viewer
        self.slant = along.abs().clamp_(0.02, 1.0)
        sun, up = rows[_TO_SUN], rows[_UP]
        self.sun = (g[0] * sun[0] + g[1] * sun[1] + g[2] * sun[2]) * towards
        self.up = (g[0] * up[0] + g[1] * up[1] + g[2] * up[2]) * towards


def _albedo(
    rows: Tensor, p: list[Tensor], point: Tensor, facing: _Facing, footprint: Tensor
) -> Tensor:
    """Paint at the hit: two colours mixed by the texture, a third over them by the mask."""
    paint, scale = rows[_PAINT:], rows[_INVERSE_SIZE]
    mx, my, mz = (p[i] / scale[i] for i in range(3))
    across = torch.lerp(mx, mz, facing.sides)
    down = torch.lerp(my, mz, facing.tops)
    fixed = (paint[LAYER] > ON_OBJECT).to(torch.float32)
    rate = paint[TEXTURE_RATE]
    grey = texture.sample(
        paint[TEXTURE],
        torch.lerp(across, point[0], fixed) * rate + paint[OFFSET_ACROSS],
        torch.lerp(down, point[2], fixed) * rate + paint[OFFSET_DOWN],
        footprint * rate,
    )
    cover = texture.sample(
        paint[MASK],
        across * paint[MASK_RATE_ACROSS] + paint[MASK_OFFSET_ACROSS],
        down * paint[MASK_RATE_DOWN] + paint[MASK_OFFSET_DOWN],
        footprint * torch.maximum(paint[MASK_RATE_ACROSS], paint[MASK_RATE_DOWN]),
    )
    cover = cover * (1 - facing.tops) * (paint[MASK] > 0.5).to(torch.float32)
    colour = torch.lerp(paint[COLOUR_LOW], paint[COLOUR_HIGH], grey)
    return torch.lerp(colour, paint[COLOUR_MASK], cover)
