import pytest


@pytest.mark.slow
def test_drive_on_s3_whose_requests_are_broken_ends_with_the_bytes_of_an_unbroken_one(campaign):
    found = campaign("s3_faults.py", "--faults", "70", "--rate", "0.1", "--seed", "3")
    assert found["faults"] >= 70
    assert len(found["by_kind"]) >= 8
    assert found["chunks_seen_committed"] >= 10
    assert found["wrong"] == 0
