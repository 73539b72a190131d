import json

import fsspec
import numpy as np
import pytest

from tasks.ledger import Usage
from tasks.planner import predict
from tasks.rates import (
    BYTES,
    CPU_STAGES,
    Observation,
    Workload,
    by_most_common_device,
    fit,
    fit_rates,
    read_benchmark,
)


def work(frames: int, megapixels_each: float = 0.25) -> Workload:
    return Workload(frames, 1.25 * frames, megapixels_each * frames, frames / 6)


def test_one_drive_is_predicted_as_it_was_and_one_twice_as_long_nearly_twice():
    seen = Observation("a", "cpu", work(100), {"probe": 8.0, "infer": 20.0, BYTES: 1e6})
    rates = fit_rates([seen])
    assert rates.predict(work(100)) == pytest.approx(seen.amounts)
    doubled = rates.predict(work(200))
    # Of a single drive the prior says that 5 % of probe and infer are fixed, 2 % of the bytes.
    assert doubled == pytest.approx({"probe": 15.6, "infer": 39.0, BYTES: 1.98e6})


def test_drives_of_different_lengths_tell_the_fixed_part_from_the_part_by_frame():
    def took(frames: int) -> Observation:
        return Observation(str(frames), "cpu", work(frames), {"infer": 12 + 0.1 * frames})

    rates = fit_rates([took(50), took(200), took(1000)])
    for frames in (30, 400, 3000):
        assert rates.predict(work(frames))["infer"] == pytest.approx(12 + 0.1 * frames, rel=0.06)


def test_recordings_of_different_sizes_tell_decoding_from_the_network():
    def took(frames: int, megapixels_each: float) -> Observation:
        seconds = 0.05 * 1.25 * frames + 0.02 * megapixels_each * frames
        return Observation("", "cpu", work(frames, megapixels_each), {"infer": seconds})

    rates = fit_rates([took(300, 0.2), took(300, 0.9), took(800, 2.0), took(500, 0.2)])
    asked = work(600, 4.0)
    assert rates.predict(asked)["infer"] == pytest.approx(0.0625 * 600 + 0.08 * 600, rel=0.1)


def test_no_part_is_negative():
    rng = np.random.default_rng(0)
    units = np.column_stack([np.ones(6), rng.uniform(10, 1000, (6, 4))])
    found = fit(units, rng.uniform(1, 100, 6), (0.2, 0.2, 0.2, 0.2, 0.2))
    assert (found >= 0).all()


def test_what_is_not_known_of_a_stage_is_not_predicted():
    rates = fit_rates([Observation("a (unfinished)", "cpu", work(100), {"infer": 36.0})])
    left = predict(rates, work(100), {})
    assert left == Usage(pytest.approx(0.01), None, None)


def test_losses_and_shares_that_are_done_change_what_is_left():
    amounts = dict.fromkeys(CPU_STAGES, 36.0) | {"infer": 72.0, BYTES: 1000.0}
    rates = fit_rates([Observation("a", "cpu", work(100), amounts, lost_share=0.2)])
    whole = predict(rates, work(100), {})
    assert whole.gpu_hours == pytest.approx(0.02 / 0.8)
    assert whole.cpu_hours == pytest.approx(0.05)
    half = predict(rates, work(100), {"probe": 0, "plan": 0, "infer": 0.5, BYTES: 0.5})
    assert half.gpu_hours == pytest.approx(0.0125)
    assert half.cpu_hours == pytest.approx(0.03)
    assert half.stored_bytes == pytest.approx(500)


def test_rates_are_of_one_kind_of_device():
    seen = [Observation(kind, kind, work(10), {"infer": 1.0}) for kind in ("cpu", "H100", "H100")]
    assert [o.source for o in by_most_common_device(seen, None)] == ["H100", "H100"]
    assert [o.source for o in by_most_common_device(seen, "cpu")] == ["cpu"]
    assert by_most_common_device(seen, "A10") == []
    assert by_most_common_device([], None) == []


def test_the_json_of_benchmarks_gives_rates(tmp_path):
    stages = {"probe": 4.0, "plan": 0.5, "infer": 30.0, "align": 2.0, "report": 1.0}
    stages |= {"plan-tiles": 3.0, "fuse-tiles": 6.0, "merge-tiles": 1.0}
    row = {"frames": 400, "video_size": "640x360", "run": {"stage_seconds": stages}}
    file = tmp_path / "pipeline.json"
    file.write_text(json.dumps({"results": [row]}))
    (seen,) = read_benchmark(str(file), recommended_frames=8)
    assert seen.work.megapixels == pytest.approx(400 * 0.2304)
    assert (seen.amounts["infer"], seen.amounts["fuse"]) == (30.0, 10.0)
    assert seen.device_kind == "cpu"
    file.write_text(json.dumps({"results": [{**row, "device_kind": "NVIDIA L4"}]}))
    (seen,) = read_benchmark(str(file), recommended_frames=8)
    assert seen.device_kind == "NVIDIA L4"
    file.write_text(json.dumps({"frames_per_second": 20.0, "device": "cpu"}))
    (seen,) = read_benchmark(str(file), recommended_frames=8)
    assert seen.amounts["infer"] / seen.work.frames_inferred == pytest.approx(0.05)


@pytest.mark.parametrize(
    "text",
    ["[1]", '{"results": [', "[" * 100_000, '{"frames_per_second": 0}', " " * 2_000_000 + "{}"],
)
def test_what_is_no_benchmark_is_said_in_a_line(tmp_path, text):
    file = tmp_path / "pipeline.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=r"pipeline\.json is not the JSON of .*pipeline\.py"
    ) as error:
        read_benchmark(str(file), recommended_frames=8)
    assert "\n" not in str(error.value)


def test_a_benchmark_is_read_from_a_url():
    url = "memory://rates/throughput.json"
    with fsspec.open(url, "w") as file:
        json.dump({"frames_per_second": 20.0}, file)
    (seen,) = read_benchmark(url, recommended_frames=8)
    assert seen.source == url
    with pytest.raises(FileNotFoundError):
        read_benchmark("memory://rates/none.json", recommended_frames=8)
