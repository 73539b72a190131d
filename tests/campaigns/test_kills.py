import pytest


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_bytes_of_an_uninterrupted_one(campaign):
    found = campaign("kills.py", "--runs", "14", "--s3", "2", "--seed", "1")
    assert found["drives_killed"] >= 12
    assert found["finished_chunks_kept"] > 46
