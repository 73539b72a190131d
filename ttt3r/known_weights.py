"""Checkpoints that others publish and that `ttt3r weights fetch` can get."""

from __future__ import annotations

from dataclasses import dataclass

RELEASED_LICENCE = "CC BY-NC-SA 4.0"
RELEASED_SEGMENT_FRAMES = 100  # a reset about this often keeps the released weights from drifting


@dataclass(frozen=True)
class KnownWeights:
    """A published checkpoint: where it is, and what it must be."""

    name: str
    mirrors: tuple[str, ...]  # hub:ORG/REPO/FILE or URLs, tried in order
    sha256: str  # of the published file
    size_bytes: int
    licence: str
    segment_frames: int
    notes: str


# Size and digest: specification, section 12 (as several public repositories report them).
KNOWN_WEIGHTS = {
    "cut3r_512_dpt": KnownWeights(
        name="cut3r_512_dpt",
        mirrors=(
            "hub:liguang0115/cut3r/cut3r_512_dpt_4_64.pth",
            "hub:lmms-lab-si/third-party-models/cut3r_512_dpt_4_64.pth",
        ),
        sha256="45f7e98a0a64dbeb54901ae2b878cd8cd125f20a4497316483f0bd6f109f8103",
        size_bytes=3_173_761_006,
        licence=RELEASED_LICENCE,
        segment_frames=RELEASED_SEGMENT_FRAMES,
        notes="CUT3R 512-DPT as released: non-commercial use only, share alike",
    )
}
