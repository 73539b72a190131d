import pytest

from tasks.ledger import Rates, Usage, rates_from


def ledger(name: str, frames: int, inferred: int, usage: Usage) -> dict:
    return {"drive": name, "frames": frames, "frames_inferred": inferred, "used": vars(usage)}


def test_rates_are_means_over_all_frames_and_predict_the_drives_they_come_from():
    short, long = Usage(1.0, 0.5, 100.0), Usage(5.0, 2.5, 300.0)
    rates = rates_from([ledger("a", 1000, 1200, short), ledger("b", 3000, 3600, long)])
    assert rates.drives == ("a", "b")
    assert rates.infer_s == pytest.approx(6 * 3600 / 4800)
    both = rates.predict(4000, 4800)
    assert (both.gpu_hours, both.cpu_hours) == pytest.approx((6.0, 3.0))
    assert both.stored_bytes == pytest.approx(400.0)


def test_no_ledger_gives_no_rates():
    assert rates_from([]) is None


def test_prediction_grows_with_overlaps_only_where_they_are_paid():
    rates = Rates(infer_s=3.6, other_s=7.2, stored_bytes=10.0)
    usage = rates.predict(frames=1000, frames_inferred=2000)
    assert usage == Usage(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(20_000.0))
