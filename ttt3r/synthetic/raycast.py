"""Exact first hits of pixel rays with solids, and the surface seen there.

Solids are culled against each view, then each one is tested only against the pixels of
its bounding rectangle: the work grows with the picture area that solids cover, not with
rays times solids. A 64-bit key (depth bits, solid) lets one scatter-minimum find the
nearest hit, identically on CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

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
    LAYER,
    MASK,
    MASK_OFFSET_ACROSS,
    MASK_OFFSET_DOWN,
    MASK_RATE_ACROSS,
    MASK_RATE_DOWN,
    NOTE,
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


@dataclass(frozen=True)
class Views:
    """Pinhole cameras, B sequences of T frames."""

    T_world_cam: Tensor  # [B, T, 4, 4]
    intrinsics: Tensor  # [B, 3, 3] pixels
    height: int
    width: int
    reach: Tensor | None = None  # [B, T, 2] lowest and highest station to draw
    distance: float = 1e9  # metres from the camera beyond which solids are left out

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
    """What F frames see in P pixels each (the same ones); linear RGB, metres, world frame."""

    frames: slice  # of [B * T]
    pixels: slice  # of [H * W]
    hit: Tensor  # [F, P] bool
    depth: Tensor  # [F, P] z-depth; 1 without a hit
    direction: Tensor  # [3, F, P] ray, one unit of z-depth long
    length: Tensor  # [F, P] of `direction`
    point: Tensor  # [3, F, P]
    albedo: Tensor  # [3, F, P]
    light: Tensor  # [3, F, P]
    note: Tensor  # [F, P]
    layer: Tensor  # [F, P]
    footprint: Tensor  # [F, P] width of the pixel on the surface


class RayCaster:
    """The solids of some views, ready to be intersected.

    `nearest` is exact geometry; `surfaces` adds colour and light. Both work piece by piece,
    so that the temporaries stay in cache, and keep every quantity in a row of its own: torch
    is several times slower on many short vectors.
    """

    def __init__(
        self,
        views: Views,
        static: Solids,
        moving: Solids | None,
        light: Light,
        piece: int | None = None,
    ) -> None:
        device = static.centre.device
        self.views, self.light = views, light
        self.piece = piece or (24576 if device.type == "cpu" else 1 << 23)
        self._rows = _Rows(static, moving, light)
        self._aim(views)
        self._frame, self._row = self._visible(static, moving)
        self._project()

    def _aim(self, views: Views) -> None:
        """Flatten the cameras to columns [., F]: origin, rotation, rays per (x, y, 1) pixel."""
        frames = views.T_world_cam.shape[1]
        rotation = views.T_world_cam[..., :3, :3].flatten(0, 1)
        lens = views.intrinsics.repeat_interleave(frames, dim=0)
        unproject = torch.zeros_like(lens)
        unproject[:, 0, 0], unproject[:, 0, 2] = 1 / lens[:, 0, 0], -lens[:, 0, 2] / lens[:, 0, 0]
        unproject[:, 1, 1], unproject[:, 1, 2] = 1 / lens[:, 1, 1], -lens[:, 1, 2] / lens[:, 1, 1]
        unproject[:, 2, 2] = 1.0
        rays = (rotation @ unproject).reshape(-1, 9)
        origin = views.T_world_cam[..., :3, 3].reshape(-1, 3)
        self._cameras = torch.cat([origin, rotation.reshape(-1, 9), rays], dim=1).t().contiguous()
        self._lens = torch.stack(
            [lens[:, 0, 0], lens[:, 1, 1], lens[:, 0, 2], lens[:, 1, 2]]
        ).contiguous()

    def _visible(self, static: Solids, moving: Solids | None) -> tuple[Tensor, Tensor]:
        """Pairs (frame, row) whose bounding sphere meets the view, ordered by kind."""
        times = self.views.T_world_cam.shape[1]
        seen = self._meets(static, 0)
        sequence, time, solid = seen.nonzero(as_tuple=True)
        frame, row = sequence * times + time, sequence * static.present.shape[1] + solid
        if moving is not None:
            first = static.present.numel()
            sequence, time, solid = self._meets(moving, first).nonzero(as_tuple=True)
            flat = sequence * times + time
            frame = torch.cat([frame, flat])
            row = torch.cat([row, first + flat * moving.present.shape[2] + solid])
        order = torch.argsort(self._rows.kind.index_select(0, row), stable=True)
        return frame[order], row[order]

    def _meets(self, solids: Solids, first_row: int) -> Tensor:
        """[B, T, P] bool: present, in reach, and its bounding sphere cuts the view pyramid."""
        views = self.views
        span = slice(first_row, first_row + solids.present.numel())
        shape = solids.present.shape if solids.present.ndim == 3 else solids.present[:, None].shape
        centre = self._rows.columns[:3, span].reshape(3, *shape)
        radius = self._rows.radius[span].reshape(shape)
        cameras = self._cameras[:12].reshape(12, *views.T_world_cam.shape[:2], 1)
        offset = [centre[i] - cameras[i] for i in range(3)]
        x, y, z = (
            offset[0] * cameras[3 + j] + offset[1] * cameras[6 + j] + offset[2] * cameras[9 + j]
            for j in range(3)
        )
        focal = views.intrinsics[:, None, None, 0, 0]
        across = views.width / focal * 0.55  # half a view, and room for an off-centre lens
        down = views.height / focal * 0.55
        seen = solids.present.reshape(shape) & (z > NEAR - radius)
        seen &= _dot(offset, offset) < (radius + views.distance).square()
        seen &= x.abs() < z * across + radius * (1 + across**2).sqrt()
        seen &= y.abs() < z * down + radius * (1 + down**2).sqrt()
        seen &= radius * 2 * focal > _SMALLEST * z
        if views.reach is not None:
            station = solids.station.reshape(shape)
            low, high = views.reach[:, :, None, 0], views.reach[:, :, None, 1]
            seen &= ~((station < low) | (station > high))  # NaN is always in reach
        return seen

    def _project(self) -> None:
        """Ray transforms and pixel rectangles of all visible pairs, as columns [15, I]."""
        solid = self._rows.columns.index_select(1, self._row)
        camera = self._cameras.index_select(1, self._frame)
        offset = [camera[i] - solid[i] for i in range(3)]
        inverse, basis, rotation, rays = solid[3:12], solid[12:21], camera[3:12], camera[12:21]
        origin = [_dot(inverse[3 * i : 3 * i + 3], offset) for i in range(3)]
        turned = [_dot(inverse[3 * i : 3 * i + 3], rays[j::3]) for i in range(3) for j in range(3)]
        centre = [-_dot(rotation[j::3], offset) for j in range(3)]
        axes = [_dot(rotation[j::3], basis[k::3]) for k in range(3) for j in range(3)]
        bounds = self._rectangles(centre, axes)
        filled = ((bounds[2] > bounds[0]) & (bounds[3] > bounds[1])).nonzero()[:, 0]
        x0, y0, x1, y1 = bounds
        columns = torch.stack([*origin, *turned, x0, y0, x1 - x0, y1 - y0]).index_select(1, filled)
        self._columns = columns[:15]
        self._frame, self._row = self._frame[filled], self._row[filled]
        self._counts = (columns[14] * columns[15]).to(torch.int64)
        kinds = self._rows.kind.index_select(0, self._row)
        self._ends = torch.bincount(kinds, minlength=4).cumsum(0).tolist()

    def _rectangles(self, centre: list[Tensor], axes: list[Tensor]) -> list[Tensor]:
        """Half-open pixel bounds x0, y0, x1, y1 [I] (float, whole numbers).

        `centre` and `axes` (three axes of three coordinates) are in the camera's frame.
        """
        lens = self._lens.index_select(1, self._frame)
        triangles = int((self._rows.kind.index_select(0, self._row) < TRIANGLE).sum())
        parts = []
        for shape, span in ((_CUBE, slice(0, triangles)), (_TRIANGLE, slice(triangles, None))):
            parts.append(_bounds([c[span] for c in centre], [a[span] for a in axes], shape))
        u0, v0, u1, v1 = (torch.cat([a, b]) for a, b in zip(*parts, strict=True))
        width, height = self.views.width, self.views.height
        return [
            (u0 * lens[0] + (lens[2] - 0.01)).ceil_().clamp_(0, width),
            (v0 * lens[1] + (lens[3] - 0.01)).ceil_().clamp_(0, height),
            (u1 * lens[0] + (lens[2] + 0.01)).floor_().clamp_(-1, width - 1).add_(1),
            (v1 * lens[1] + (lens[3] + 0.01)).floor_().clamp_(-1, height - 1).add_(1),
        ]

    def nearest(self) -> tuple[Tensor, Tensor]:
        """z-depth [F, H * W] (inf: nothing hit) and the pair hit (-1: none)."""
        views = self.views
        area = views.height * views.width
        keys = torch.full((views.frames * area,), _MISS, device=self._row.device)
        first = 0
        for kind, end in zip((BOX, CYLINDER, ELLIPSOID, TRIANGLE), self._ends, strict=True):
            for start, stop in self._pieces(first, end):
                self._scatter(kind, start, stop, keys)
            first = end
        depth = (keys >> 32).to(torch.int32).view(torch.float32)
        pair = (keys & 0xFFFFFFFF).masked_fill_(keys >= _MISS, -1)
        return depth.reshape(-1, area), pair.reshape(-1, area)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Ranges of pairs with about `piece` pixels each."""
        if first == last:
            return
        total = torch.cumsum(self._counts[first:last], dim=0)
        marks = torch.arange(0, int(total[-1]), self.piece, device=total.device)[1:]
        cuts = [0, *torch.searchsorted(total, marks).tolist(), last - first]
        for start, stop in pairwise(cuts):
            if stop > start:
                yield first + start, first + stop

    def _scatter(self, kind: int, start: int, stop: int, keys: Tensor) -> None:
        """Intersect pairs start..stop with the pixels of their rectangles."""
        counts = self._counts[start:stop]
        number = torch.arange(start, stop, device=counts.device)
        pair = torch.repeat_interleave(number - start, counts)
        firsts = (torch.cumsum(counts, 0) - counts).to(torch.float32)
        columns = torch.cat([self._columns[:, start:stop], firsts[None]]).index_select(1, pair)
        ox, oy, oz, xx, xy, x1, yx, yy, y1, zx, zy, z1, left, top, width, first = columns.unbind(0)
        place = torch.arange(len(pair), device=counts.device, dtype=torch.float32).sub_(first)
        row = ((place + 0.5) / width).floor_()
        column = place.addcmul_(row, width, value=-1.0).add_(left)
        row = row.add_(top)
        dx = torch.addcmul(x1, xx, column).addcmul_(xy, row)
        dy = torch.addcmul(y1, yx, column).addcmul_(yy, row)
        dz = torch.addcmul(z1, zx, column).addcmul_(zy, row)
        depth, hit = _INTERSECT[kind](ox, oy, oz, dx, dy, dz)
        hit = hit.logical_and_(depth > NEAR)
        depth = depth.masked_fill_(hit.logical_not_(), torch.inf)
        key = depth.view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
        first_pixel = self._frame[start:stop] * (self.views.height * self.views.width)
        both = torch.stack([number, first_pixel]).index_select(1, pair)
        pixel = row.mul_(self.views.width).add_(column).to(torch.int64).add_(both[1])
        keys.scatter_reduce_(0, pixel, key.add_(both[0]), "amin")

    def surfaces(self, depth: Tensor, pair: Tensor) -> Iterator[Surface]:
        """Colour and light of what `nearest` found, in pieces of frames or of pixels."""
        if len(self._row) == 0:
            raise ValueError("no solid is in view of any of these cameras")
        frames, area = depth.shape
        together = max(1, self.piece // area)
        for frame in range(0, frames, together):
            for pixel in range(0, area, self.piece):
                chosen = slice(frame, min(frame + together, frames))
                part = slice(pixel, min(pixel + self.piece, area))
                yield self._surface(chosen, part, depth[chosen, part], pair[chosen, part])

    def _surface(self, frames: slice, pixels: slice, depth: Tensor, pair: Tensor) -> Surface:
        hit = pair >= 0
        depth = depth.masked_fill(~hit, 1.0)
        place = torch.arange(pixels.start, pixels.stop, device=depth.device)
        y = torch.div(place, self.views.width, rounding_mode="floor").float()
        x = (place % self.views.width).float()
        camera = self._cameras[:, frames, None]
        direction = torch.stack(
            [camera[12 + 3 * i] * x + camera[13 + 3 * i] * y + camera[14 + 3 * i] for i in range(3)]
        )
        length = (direction[0].square() + direction[1].square() + direction[2].square()).sqrt_()
        flat = pair.clamp(min=0).flatten()
        local = self._columns[:12].index_select(1, flat).reshape(12, *depth.shape)
        looks = self._rows.looks.index_select(1, self._row.index_select(0, flat))
        looks = looks.reshape(-1, *depth.shape)
        d = [
            torch.addcmul(local[5 + 3 * i], local[3 + 3 * i], x).addcmul_(local[4 + 3 * i], y)
            for i in range(3)
        ]
        p = [torch.addcmul(local[i], d[i], depth) for i in range(3)]
        facing = _Facing(looks, p, d, length)
        focal = self._lens[0, frames, None]
        # Between the widths of the pixel's long, slanted side and of its short one.
        blur = facing.slant.sqrt()
        footprint = depth * length / (focal * blur * blur.sqrt())
        point = torch.addcmul(camera[:3], direction, depth)
        albedo = _albedo(looks, p, point, facing, footprint)
        paint = looks[_PAINT:]
        light = self._shade(frames, facing)
        return Surface(
            frames, pixels, hit, depth, direction, length, point, albedo, light,
            paint[NOTE], paint[LAYER], footprint,
        )  # fmt: skip

    def _shade(self, frames: slice, facing: _Facing) -> Tensor:
        """Light [3, F, P] that falls on a surface."""
        times = self.views.T_world_cam.shape[1]
        sequence = torch.arange(frames.start, frames.stop, device=facing.up.device) // times
        sun, ambient = (v[sequence].t()[..., None] for v in (self.light.sun, self.light.ambient))
        sky = facing.up.mul_(0.25).add_(0.75)
        return (ambient * sky).addcmul_(sun, facing.sun.clamp_(min=0)[None])


# Columns of the table of looks: what shading needs of a solid.
_KIND, _INVERSE_SIZE, _TO_SUN, _UP, _PAINT = 0, slice(1, 4), slice(4, 7), slice(7, 10), 10


class _Rows:
    """Static solids, then moving ones, flattened to columns [., N]."""

    def __init__(self, static: Solids, moving: Solids | None, light: Light) -> None:
        parts = [static] if moving is None else [static, moving]
        self.kind = torch.cat([part.kind.flatten() for part in parts])
        centre = torch.cat([part.centre.reshape(-1, 3) for part in parts]).t()
        basis = torch.cat([part.basis.reshape(-1, 9) for part in parts]).t().contiguous()
        inverse = _invert(basis)
        self.radius = _bounding_radius(self.kind, basis)
        self.columns = torch.cat([centre, inverse, basis]).contiguous()
        owner = torch.cat([_owner(part) for part in parts])
        paint = torch.cat([part.paint.flatten(0, -2) for part in parts]).t()
        sun = light.direction.t().contiguous().index_select(1, owner)
        rows = [inverse[3 * i : 3 * i + 3] for i in range(3)]
        looks = [
            self.kind.to(torch.float32),
            *[_dot(row, row).sqrt_() for row in rows],
            *[_dot(row, sun) for row in rows],
            *[-row[1] for row in rows],  # world up is -y
        ]
        self.looks = torch.cat([torch.stack(looks), paint]).contiguous()


def _dot(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> Tensor:
    """Scalar products of vectors whose three coordinates are rows."""
    return torch.addcmul(a[0] * b[0], a[1], b[1]).addcmul_(a[2], b[2])


def _owner(solids: Solids) -> Tensor:
    """Sequence of each solid, flattened."""
    sequence = torch.arange(solids.kind.shape[0], device=solids.kind.device)
    return sequence.reshape(-1, *[1] * (solids.kind.ndim - 1)).expand(solids.kind.shape).flatten()


def _invert(basis: Tensor) -> Tensor:
    """Inverse of matrices [9, N] (row by row) by cofactors."""
    a, b, c, d, e, f, g, h, i = basis.unbind(0)
    cofactors = torch.stack(
        [
            e * i - f * h, c * h - b * i, b * f - c * e,
            f * g - d * i, a * i - c * g, c * d - a * f,
            d * h - e * g, b * g - a * h, a * e - b * d,
        ]
    )  # fmt: skip
    return cofactors / (a * cofactors[0] + b * cofactors[3] + c * cofactors[6])


def _bounding_radius(kind: Tensor, basis: Tensor) -> Tensor:
    """Radius about the centre (a triangle's first corner) of a sphere that holds the solid."""
    x, y, z = (_dot(basis[k::3], basis[k::3]) for k in range(3))
    corner = (x + y + z).sqrt()
    side = torch.maximum(x, z).sqrt()
    widest = torch.maximum(torch.maximum(x, y), z).sqrt()
    return torch.where(kind == TRIANGLE, side, torch.where(kind == ELLIPSOID, widest, corner))


# Corners of a hull around each unit shape.
_CUBE = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
_TRIANGLE = [(0, 0, 0), (1, 0, 0), (0, 0, 1)]


def _bounds(
    centre: list[Tensor], axes: list[Tensor], corners: list[tuple[int, int, int]]
) -> list[Tensor]:
    """Lowest x/z and y/z, then highest ones, [I] each, of hulls in the camera's frame."""
    places = []
    for sx, sy, sz in corners:
        places.append(
            [
                centre[j] + sum(s * axes[3 * k + j] for k, s in enumerate((sx, sy, sz)) if s)
                for j in range(3)
            ]
        )
    u, v, z = [], [], []
    for px, py, pz in places:
        inverse = pz.clamp(min=NEAR * 0.5).reciprocal_()
        u.append(px * inverse)
        v.append(py * inverse)
        z.append(pz)
    bounds = [_least(u), _least(v), _most(u), _most(v)]
    clipped = (_least(z) < NEAR).nonzero()[:, 0]
    if len(clipped):
        hulls = torch.stack([torch.stack(place, dim=-1)[clipped] for place in places], dim=1)
        for bound, value in zip(bounds, _clipped_bounds(hulls), strict=True):
            bound[clipped] = value
    return bounds


def _least(values: list[Tensor]) -> Tensor:
    return reduce(torch.minimum, values)


def _most(values: list[Tensor]) -> Tensor:
    return reduce(torch.maximum, values)


def _clipped_bounds(corners: Tensor) -> list[Tensor]:
    """The same of hulls [I, K, 3] that cross the near plane: what is in front of it counts."""
    pairs = torch.combinations(torch.arange(corners.shape[1], device=corners.device))
    a, b = corners[:, pairs[:, 0]], corners[:, pairs[:, 1]]
    crosses = (a[..., 2] >= NEAR) != (b[..., 2] >= NEAR)
    share = (NEAR - a[..., 2]) / torch.where(crosses, b[..., 2] - a[..., 2], 1.0)
    crossing = a + share.clamp(0, 1)[..., None] * (b - a)
    points = torch.cat([corners, crossing], dim=1)
    outside = ~torch.cat([corners[..., 2] >= NEAR, crosses], dim=1)[..., None]
    place = points[..., :2] / points[..., 2:].clamp(min=NEAR * 0.5)
    low = place.masked_fill(outside, torch.inf).amin(dim=1)
    high = place.masked_fill(outside, -torch.inf).amax(dim=1)
    return [low[:, 0], low[:, 1], high[:, 0], high[:, 1]]


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
    """Which way surfaces face, at local points p [3][...] seen along local rays d [3][...]."""

    def __init__(self, looks: Tensor, p: list[Tensor], d: list[Tensor], length: Tensor) -> None:
        kind = looks[_KIND]
        size = [q.abs() for q in p]
        flat = kind > ELLIPSOID + 0.5
        sides = ((size[0] >= size[1]) & (size[0] >= size[2]) & ~flat).float()
        tops = ((size[1] >= size[2]) | flat).float() * (1 - sides)
        self.sides, self.tops = sides, tops
        ball = (kind == ELLIPSOID).float()
        bent = ball + ((kind == CYLINDER) & (size[1] < 0.999)).float()
        straight = 1 - bent
        # Gradient of the unit shape; its image under inverse^T is the world normal.
        g = [
            torch.addcmul(bent * p[0], straight * sides, torch.sign(p[0])),
            torch.addcmul(ball * p[1], straight * tops, torch.sign(p[1]) - flat.float()),
            torch.addcmul(bent * p[2], straight * (1 - sides - tops), torch.sign(p[2])),
        ]
        scaled = [g[i] * looks[1 + i] for i in range(3)]
        norm = _dot(scaled, scaled).sqrt_().clamp_(min=1e-12)
        along = _dot(g, d) / (norm * length)
        towards = -torch.sign(along) / norm  # turn the normal towards the viewer
        self.slant = along.abs_().clamp_(0.02, 1.0)
        self.sun = _dot(g, looks[_TO_SUN]) * towards
        self.up = _dot(g, looks[_UP]) * towards


def _albedo(
    looks: Tensor, p: list[Tensor], point: Tensor, facing: _Facing, footprint: Tensor
) -> Tensor:
    """Paint at the hit: two colours mixed by the texture, a third over them by the mask."""
    paint = looks[_PAINT:]
    mx, my, mz = (p[i] / looks[1 + i] for i in range(3))
    across = torch.lerp(mx, mz, facing.sides)
    down = torch.lerp(my, mz, facing.tops)
    fixed = (paint[LAYER] > ON_OBJECT).float()
    rate = paint[TEXTURE_RATE]
    grey = texture.sample(
        paint[TEXTURE],
        torch.addcmul(paint[OFFSET_ACROSS], torch.lerp(across, point[0], fixed), rate),
        torch.addcmul(paint[OFFSET_DOWN], torch.lerp(down, point[2], fixed), rate),
        footprint * rate,
    )
    cover = texture.sample(
        paint[MASK],
        torch.addcmul(paint[MASK_OFFSET_ACROSS], across, paint[MASK_RATE_ACROSS]),
        torch.addcmul(paint[MASK_OFFSET_DOWN], down, paint[MASK_RATE_DOWN]),
        footprint * torch.maximum(paint[MASK_RATE_ACROSS], paint[MASK_RATE_DOWN]),
    )
    cover = cover * (1 - facing.tops) * (paint[MASK] > 0.5).float()
    colour = torch.lerp(paint[COLOUR_LOW], paint[COLOUR_HIGH], grey[None])
    return colour.lerp_(paint[COLOUR_MASK], cover[None])
