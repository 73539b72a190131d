"""Procedural worlds, rendered with exact depth, poses and intrinsics."""

from ttt3r.synthetic.sequence import (
    HELD_OUT_SEED,
    Sequences,
    WorldName,
    camera_path,
    render,
    render_chunks,
)

__all__ = ["HELD_OUT_SEED", "Sequences", "WorldName", "camera_path", "render", "render_chunks"]
