"""Depth and confidence of the bundled street take an eighth of their float32 arrays."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stored_bytes import measure

from ttt3r.weights import load_model

STREET = Path(__file__).parents[2] / "flows" / "samples" / "street.mp4"


def test_depth_and_confidence_of_the_street_take_an_eighth_of_float32():
    model, _ = load_model("compact")
    found = measure(str(STREET), model, frames=32, segment_frames=16)
    assert found["share_of_float32"] <= 1 / 8  # measured: 1/8.9
    assert found["largest_relative_error"]["depth"] <= 1e-3
    assert found["largest_relative_error"]["confidence"] <= 2**-3
