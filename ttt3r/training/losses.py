"""What the network is punished for: points, depth, confidence, camera poses, and its gate.

Errors are relative: points to their distance, translations and rotations to the motion of
their sequence. A metre matters where the camera moved ten centimetres, not where it drove ten
metres. Without this the pose gets no gradient worth having until the depth is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix, depth_to_pointmap
from ttt3r.model import Predictions

FAR = 90.0  # metres; pixels beyond are sky for the loss: their depth is taken to be this
_SKY_WEIGHT = 0.5  # of a sky pixel against one of the scene
_NEAR_DISTANCE = 1.0  # metres added to a distance before an error is divided by it
_LEAST_STEP = 0.02  # share of the scene's mean distance that is added to a motion, likewise
_LEAST_TURN = 0.02  # radians
_SCALE_SHARE = 0.2  # of the error of a sequence's scale against that of the depth within it
_CONFIDENCE_PRICE = 0.4  # the relative error at which confidence is none, that is 1
_WORST = 20.0  # relative errors above are clipped: one bad sequence must not rule a batch


@dataclass(frozen=True)
class Targets:
    """The truth about L sequences of T frames, relative to each first camera."""

    pointmap_cam: Tensor  # [L, T, H, W, 3] metres
    pointmap_world: Tensor  # [L, T, H, W, 3] metres, in the first camera's frame
    valid: Tensor  # [L, T, H, W] bool
    T_seg_cam: Tensor  # [L, T, 4, 4]

    @property
    def least_step(self) -> Tensor:
        """Motion [L, 1] that is hardly one: a fiftieth of the distance to what is seen."""
        distance = (self.pointmap_cam.norm(dim=-1) * self.valid).sum(dim=(1, 2, 3))
        return (0.02 + _LEAST_STEP * distance / self.valid.sum(dim=(1, 2, 3)).clamp(min=1))[:, None]

    @classmethod
    def build(
        cls, depth: Tensor, valid: Tensor, T_world_cam: Tensor, intrinsics: Tensor
    ) -> Targets:
        """From z-depth [L, T, H, W], its validity, poses [L, T, 4, 4], intrinsics [L, 3, 3]."""
        frames = depth.shape[1]
        near = valid & (depth < FAR)
        # Sky must come out far, or fusion makes a ceiling of it.
        depth = torch.where(near, depth, FAR)
        lens = intrinsics[:, None].expand(-1, frames, -1, -1)
        cam = depth_to_pointmap(depth.flatten(0, 1), lens.flatten(0, 1)).unflatten(
            0, depth.shape[:2]
        )
        T_seg_cam = torch.linalg.inv(T_world_cam[:, :1].double()) @ T_world_cam.double()
        return cls(cam, cam, near, T_seg_cam.float()).turned(T_seg_cam[..., :3, :3].float())

    def turned(self, R_seg_cam: Tensor) -> Targets:
        """The same views from the same places with other rotations [L, T, 3, 3], the first too.

        Losses of rotation are then against these, not the truth.
        """
        T_seg_cam = self.T_seg_cam.clone()
        T_seg_cam[..., :3, :3] = R_seg_cam
        turned = torch.einsum("ltij,lthwj->lthwi", R_seg_cam, self.pointmap_cam)
        world = turned + T_seg_cam[:, :, None, None, :3, 3]
        return replace(self, pointmap_world=world, T_seg_cam=T_seg_cam)


@dataclass(frozen=True)
class LossWeights:
    """How the parts add up."""

    cam: float = 3.0
    depth: float = 0.0  # see `depth_loss`: what the other parts leave of it is hardly learnt
    world: float = 1.0
    translation: float = 3.0
    rotation: float = 3.0
    steps: float = 3.0  # motion between neighbouring frames
    wide: float = 5.0  # squared errors of all motions, over the batch's mean squared motion
    shift: float = 0.3  # what a point's coordinates change by from camera to segment
    gate: float = 0.02
    # Not a weight:
    gate_logit: float = -0.85  # sigmoid gives 0.3, the median published for the large weights

    @property
    def of_stills(self) -> LossWeights:
        """Those of single pictures, which have no motion."""
        return LossWeights(
            cam=self.cam, depth=self.depth, world=0, translation=0, rotation=0, steps=0,
            wide=0, shift=0, gate=0,
        )  # fmt: skip

    @property
    def needs_poses(self) -> bool:
        """Whether camera poses are learnt."""
        return max(self.translation, self.rotation, self.steps, self.wide) > 0

    @property
    def needs_world(self) -> bool:
        """Whether the points in the segment's frame are learnt: the dearest of the heads."""
        return self.world > 0 or self.shift > 0

    @property
    def outputs(self) -> frozenset[str]:
        """What the network has to predict."""
        wanted = {"trace"}
        if self.cam > 0 or self.depth > 0 or self.shift > 0:
            wanted.add("cam")
        if self.needs_world:
            wanted.add("world")
        return frozenset(wanted)


def total_loss(
    found: Predictions, targets: Targets, weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts (scalars).

    Args:
        found: predictions with `weights.outputs`.
        targets: the truth.
        weights: how the parts add up; a part of no weight is not computed.
    """
    is_there = {
        "cam": found.pointmap_cam is not None,
        "world": found.pointmap_world is not None,
        "trace": found.trace is not None,
    }
    missing = [name for name in sorted(weights.outputs) if not is_there[name]]
    if missing:
        raise ValueError(f"the loss needs predictions with the outputs {missing}, too")
    assert found.trace is not None
    parts: dict[str, Tensor] = {}
    if weights.cam > 0:
        parts["cam"] = point_loss(
            found.pointmap_cam, found.confidence, targets.pointmap_cam, targets.valid
        )
    if weights.gate > 0:
        parts["gate"] = gate_loss(found.trace.gate_logits, weights.gate_logit)
    if weights.depth > 0:
        assert found.pointmap_cam is not None
        parts["depth"] = depth_loss(found.pointmap_cam, targets.pointmap_cam, targets.valid)
    if weights.needs_poses:
        parts |= _pose_parts(camera_pose_to_matrix(found.camera_pose), targets)
    if weights.world > 0:
        parts["world"] = point_loss(
            found.pointmap_world, found.confidence_world, targets.pointmap_world, targets.valid
        )
    if weights.shift > 0:
        parts["shift"] = shift_loss(found, targets)
    total = sum((getattr(weights, name) * part for name, part in parts.items()), torch.zeros(()))
    return total, parts


def _pose_parts(T_seg_cam: Tensor, targets: Targets) -> dict[str, Tensor]:
    least = targets.least_step
    translation, rotation = pose_errors(T_seg_cam, targets.T_seg_cam, least)
    step_translation, step_rotation = pose_errors(
        neighbour_motion(T_seg_cam), neighbour_motion(targets.T_seg_cam), least, skip=0
    )
    return {
        "wide": wide_loss(T_seg_cam, targets.T_seg_cam, least),
        "translation": translation.mean(),
        "rotation": rotation.mean(),
        "steps": step_translation.mean() + step_rotation.mean(),
    }


def relative_point_error(points: Tensor, truth: Tensor) -> Tensor:
    """Distance between points [..., 3], over the true distance from the origin plus 1 m."""
    return _norm(points - truth) / (truth.norm(dim=-1) + _NEAR_DISTANCE)


def point_loss(
    points: Tensor | None, confidence: Tensor | None, truth: Tensor, valid: Tensor
) -> Tensor:
    """Mean over valid pixels of confidence * relative error - 0.4 * log(confidence).

    Sky (not valid) has to be far, and its confidence has to be none, that is 1.
    """
    assert points is not None
    assert confidence is not None
    error = relative_point_error(points, truth).clamp(max=_WORST)
    each = confidence * error - _CONFIDENCE_PRICE * confidence.log()
    sky = _SKY_WEIGHT * (error + confidence.log())
    return torch.where(valid, each, sky).sum() / valid.sum().clamp(min=1)


def depth_loss(points: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Error of the logarithm of distances without each sequence's scale, and of the rays.

    A picture hardly shows its scale, and an error that holds for all pixels alike rules the
    gradient of `point_loss` at every one of them. Here the scale counts for a fifth (after
    Eigen, Puhrsch and Fergus 2014, with absolute instead of squared errors), and the angle of a
    ray, that is the focal length, is told apart from the distance along it. Sky has to be far.
    """
    distance, true_distance = _norm(points), _norm(truth)
    error = distance.log() - true_distance.log()
    count = valid.sum(dim=(1, 2, 3)).clamp(min=1)
    scale = (error * valid).sum(dim=(1, 2, 3)) / count
    within = ((error - scale[:, None, None, None]).abs() * valid).sum(dim=(1, 2, 3)) / count
    sky = _SKY_WEIGHT * (error.abs() * ~valid).mean()
    rays = _norm(points / distance[..., None] - truth / true_distance[..., None])
    return within.mean() + _SCALE_SHARE * (scale.abs().mean() + sky) + rays.mean()


def shift_loss(found: Predictions, targets: Targets) -> Tensor:
    """Error of (world point - camera point), relative to the mean true shift of the sequence.

    It does not feel the error of the depth, which would drown it, and it is dense: every patch
    has to find its own motion. Matching between views emerges from it far sooner than from the
    seven numbers of a pose.
    """
    assert found.pointmap_world is not None
    assert found.pointmap_cam is not None
    shift = found.pointmap_world - found.pointmap_cam.detach()
    true_shift = targets.pointmap_world - targets.pointmap_cam
    weight = targets.valid / (targets.pointmap_cam.norm(dim=-1) + _NEAR_DISTANCE)
    usual = _norm(true_shift)[:, 1:].mul(weight[:, 1:]).sum(dim=(1, 2, 3))
    usual = usual / weight[:, 1:].sum(dim=(1, 2, 3)).clamp(min=1e-3) + targets.least_step[:, 0]
    # The logarithm: two heads that still disagree by metres must not shout down all else.
    error = torch.log1p(_norm(shift - true_shift) / usual[:, None, None, None])
    return (error * weight).sum() / weight.sum().clamp(min=1e-3)


def neighbour_motion(T_seg_cam: Tensor) -> Tensor:
    """Motion from each frame to the next one [L, T-1, 4, 4], in the earlier camera's frame."""
    before, after = T_seg_cam[:, :-1], T_seg_cam[:, 1:]
    R_t = before[..., :3, :3].transpose(-1, -2)
    motion = torch.zeros_like(before)
    motion[..., :3, :3] = R_t @ after[..., :3, :3]
    motion[..., :3, 3:] = R_t @ (after[..., :3, 3:] - before[..., :3, 3:])
    motion[..., 3, 3] = 1.0
    return motion


def pose_errors(
    T: Tensor, truth: Tensor, least_step: Tensor, *, skip: int = 1
) -> tuple[Tensor, Tensor]:
    """Errors of translation and rotation [L, T - skip] relative to each sequence's motion.

    Args:
        T: poses or motions [L, T, 4, 4].
        truth: the true ones.
        least_step: [L, 1] metres added to each sequence's motion.
        skip: leading frames that take no part in the sequence's mean motion: the first camera
            is where it is by definition. They still are in the result's first column.
    """
    moved = truth[..., :3, 3].norm(dim=-1)[:, skip:].mean(dim=1, keepdim=True)
    turned = _angle(truth[..., :3, :3])[:, skip:].mean(dim=1, keepdim=True)
    translation = _norm(T[..., :3, 3] - truth[..., :3, 3]) / (moved + least_step)
    between = T[..., :3, :3] - truth[..., :3, :3]
    rotation = _norm(between.flatten(-2)) / 2**0.5 / (turned + _LEAST_TURN)
    return translation.clamp(max=_WORST), rotation.clamp(max=_WORST)


def wide_loss(T: Tensor, truth: Tensor, least_step: Tensor) -> Tensor:
    """Share of the squared motion of the whole batch that is not explained; wide motions lead.

    Errors relative to each sequence's own motion have a flat minimum at "has not moved" for a
    network that cannot see motion yet. Squares have not: they pull where motion is plain to see.
    """
    first = torch.eye(4, device=T.device)
    shares = []
    for said, true in ((T[:, 1:], truth[:, 1:]), (neighbour_motion(T), neighbour_motion(truth))):
        away = (said - true)[..., :3, 3] / least_step[..., None]
        moved = true[..., :3, 3] / least_step[..., None]
        shares.append(away.square().mean() / (moved.square().mean() + 0.1))
        turned = (true - first)[..., :3, :3].square().mean()
        shares.append((said - true)[..., :3, :3].square().mean() / (turned + 1e-5))
    return torch.stack(shares).clamp(max=_WORST).mean()


def gate_loss(logits: Tensor, wanted: float) -> Tensor:
    """Squared distance of each frame's mean gate logit [L, T, S] from `wanted`.

    The first frame has no part in it: it overwrites the state, whatever its logits are.

    Full overwriting leaves the gate's mean free, as softmax does not see a constant: the penalty
    settles that constant and nothing else. Under `ttt3r` it pulls at the rate of the update.
    """
    return (logits[:, 1:].mean(dim=-1) - wanted).square().mean()


def _norm(x: Tensor) -> Tensor:
    """Length of the last axis, with a gradient at zero."""
    return (x.square().sum(dim=-1) + 1e-10).sqrt()


def _angle(R: Tensor) -> Tensor:
    """Small-angle safe rotation angle of [..., 3, 3], radians: chord length over sqrt 2."""
    eye = torch.eye(3, device=R.device)
    return (R - eye).flatten(-2).norm(dim=-1) / 2**0.5
