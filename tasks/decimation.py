"""Quadric edge collapse, in a process of its own.

`fast_simplification` works in global arrays that keep the size of the largest mesh ever, some 300
bytes a triangle: a process that lives long would hold hundreds of megabytes for its previews.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

Collapsed = tuple[np.ndarray, np.ndarray, np.ndarray]


def collapse(points: np.ndarray, triangles: np.ndarray, target_triangles: int) -> Collapsed:
    """Simplify a mesh to about `target_triangles` triangles.

    Args:
        points: float64 [V,3].
        triangles: int32 [F,3] rows of `points`.
        target_triangles: at least 1.

    Returns:
        The points [W,3] and triangles [G,3] that are left, and the row among the former [V] into
        which each of `points` was collapsed.

    Raises:
        MemoryError: the process was killed, as the system does when memory gives out.
        RuntimeError: it failed; says how.
        StoreUnavailable: no space is left for temporary files.
    """
    from storage.failures import DISK_FULL, scratch_folder  # it is no script's

    with scratch_folder() as folder:
        given, made = folder / "given.npz", folder / "made.npz"
        np.savez(given, points=points, triangles=triangles, target=target_triangles)
        # -P: the folder of this file is no place to import from.
        command = [sys.executable, "-P", __file__, str(given), str(made)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode < 0:
            raise MemoryError(
                f"the process that simplifies a mesh of {len(triangles):,} triangles was ended by "
                f"signal {-done.returncode}; is there memory left?"
            )
        if done.returncode in DISK_FULL:
            raise OSError(done.returncode, os.strerror(done.returncode), str(made))
        if done.returncode:
            raise RuntimeError(
                f"a mesh of {len(triangles):,} triangles could not be simplified: "
                f"{done.stderr.strip().rpartition(chr(10))[2]}"
            )
        with np.load(made) as arrays:
            return arrays["points"], arrays["triangles"], arrays["target"]


def main(given: str, made: str) -> None:
    """What that process does; an error of the disk is its exit code."""
    import fast_simplification

    with np.load(given) as arrays:
        points, triangles, wanted = arrays["points"], arrays["triangles"], int(arrays["target"])
    _, _, collapses = fast_simplification.simplify(
        points, triangles, target_count=wanted, return_collapses=True
    )
    # The replay tells where each vertex went; the simplification itself does not.
    points, triangles, target = fast_simplification.replay_simplification(
        points, triangles, collapses
    )
    try:
        np.savez(made, points=points, triangles=triangles, target=target)
    except OSError as error:
        sys.exit(error.errno)


if __name__ == "__main__":
    main(*sys.argv[1:])
