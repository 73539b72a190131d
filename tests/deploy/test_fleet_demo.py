"""What the demo of the fleet counts as wrong, and when it gives up waiting."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy"))

from fleet_demo import problems

FINISHED = {"error": None, "set_aside": []}
FAILED = {"error": "no frame could be decoded", "set_aside": []}
ASIDE = {"error": None, "set_aside": [3]}


def ended(*states: str) -> list[dict[str, str]]:
    return [{"state_type": state} for state in states]


@pytest.mark.parametrize(
    ("states", "drive", "again"),
    [
        (("COMPLETED", "COMPLETED"), FINISHED, 0),
        (("FAILED", "FAILED"), FAILED, 0),
        (("FAILED", "FAILED"), FAILED, 1),
        (("COMPLETED", "COMPLETED"), ASIDE, 1),
    ],
)
def test_what_ends_as_it_must_is_not_wrong(states, drive, again):
    assert problems(ended(*states), [FINISHED, drive], again) == []


@pytest.mark.parametrize(
    ("states", "drive", "again", "said"),
    [
        (("CRASHED", "COMPLETED"), FINISHED, 0, "ended CRASHED instead of COMPLETED"),
        (("COMPLETED", "CANCELLED"), FINISHED, 0, "ended CANCELLED"),
        (("FAILED", "COMPLETED"), FINISHED, 0, "ended FAILED instead of COMPLETED"),
        (("COMPLETED", "COMPLETED"), FINISHED, 2, "started 2 runs of the pool gpu"),
    ],
)
def test_what_ends_otherwise_is_named(states, drive, again, said):
    (problem,) = problems(ended(*states), [FINISHED, drive], again)
    assert said in problem
