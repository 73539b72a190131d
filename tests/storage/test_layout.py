"""The rounding that stored arrays go through, by hand-computed numbers and by its bounds."""

import numpy as np
import pytest

from storage import layout
from storage.layout import round_to_half

NINE_BITS = 2.0**-9  # spacing of 9-bit values between 1 and 2


def test_round_to_half_rounds_to_nearest_and_ties_to_even():
    given = np.array([1.0, 1 + 0.4 * NINE_BITS, 1 + 0.5 * NINE_BITS, 1 + 1.5 * NINE_BITS, 3.0])
    expected = np.array([1.0, 1.0, 1.0, 1 + 2 * NINE_BITS, 3.0])
    np.testing.assert_array_equal(round_to_half(given, 9), expected)


@pytest.mark.parametrize("bits", [7, 9, 10])
def test_round_to_half_stays_within_the_stated_relative_error(bits):
    magnitude = np.geomspace(6.2e-5, 65000, 200_001)
    given = np.concatenate([magnitude, -magnitude])
    error = np.abs(round_to_half(given, bits).astype(np.float64) - given) / np.abs(given)
    bound = 2.0 ** -(bits + 1)
    assert 0.95 * bound < error.max() <= bound * (1 + 1e-6)  # float32 in between adds 6e-8


def test_round_to_half_near_zero_stays_within_the_stated_absolute_error():
    given = np.linspace(-6.2e-5, 6.2e-5, 100_001)
    error = np.abs(round_to_half(given, 9).astype(np.float64) - given)
    assert error.max() <= layout.HALF_ABSOLUTE_ERROR
    assert round_to_half(np.array([0.0, -0.0]), 9).tolist() == [0.0, 0.0]


def test_round_to_half_clips_what_is_out_of_range_and_keeps_nan():
    given = np.array([65503.0, 65504.0, 1e6, 1e300, np.inf, -np.inf, -7e4, np.nan])
    rounded = round_to_half(given, 9)
    expected = [65472.0, 65504.0, 65504.0, 65504.0, 65504.0, -65504.0, -65504.0, np.nan]
    np.testing.assert_array_equal(rounded, np.array(expected, np.float16))


def test_depth_error_is_below_a_thousandth():
    specs = layout.by_name(layout.SEGMENT_ARRAYS)
    assert specs["depth"].relative_error < 1e-3
    assert specs["depth"].attributes()["maximum_relative_error"] == 2.0**-10


def test_fill_value_of_floats_is_nan_so_that_missing_data_cannot_pass_for_zero():
    specs = [*layout.SEGMENT_ARRAYS, *layout.STATE_ARRAYS, *layout.TRAJECTORY_ARRAYS]
    floats = [spec for spec in specs if spec.dtype.startswith("float")]
    assert len(floats) > 10
    assert all(np.isnan(spec.fill_value) for spec in floats)


@pytest.mark.parametrize(("chunk_frames", "expected"), [(64, 8), (12, 6), (61, 1), (1, 1)])
def test_frames_per_read_divides_the_shard(chunk_frames, expected):
    assert layout.frames_per_read(chunk_frames) == expected
