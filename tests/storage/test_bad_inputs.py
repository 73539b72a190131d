"""A quick part of the campaign over bad recordings; `tests/campaigns/bad_inputs.py` runs all."""

import pytest
from campaigns.bad_files import BadInput, all_bad_inputs
from campaigns.bad_inputs import check, watched_server

QUICK = [case for case in all_bad_inputs() if case.quick]


@pytest.mark.parametrize("case", QUICK, ids=[ascii(case.name) for case in QUICK])
def test_bad_recording_gives_right_frames_or_one_line(public_path, case: BadInput):
    case.make(public_path / case.name)
    outcome = check(case, public_path / case.name)
    assert outcome.failures == []


def test_scripts_lead_to_no_connection(tmp_path):
    with watched_server() as (url, came):
        cases = [c for c in all_bad_inputs(url) if "http" in c.name]
        for case in cases:
            case.make(tmp_path / case.name)
            assert check(case, tmp_path / case.name).failures == []
    assert len(cases) >= 3
    assert came == []
