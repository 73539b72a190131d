import pytest


@pytest.mark.slow
def test_two_workers_on_one_drive_never_mix_their_results(campaign):
    found = campaign("races.py", "--races", "4", "--s3", "1", "--seed", "7")
    assert found["races"] == 4
    assert any(kind.startswith("no claims") for kind in found["kinds"])
