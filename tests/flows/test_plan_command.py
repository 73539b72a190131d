"""`ttt3r plan`, the budget and the ledger, over real drives."""

import json
import sys
from pathlib import Path

import pytest
from recordings import moving_squares, write_video

from flows.cli import main
from storage.reconstruction import ReconstructionStore
from tasks.ledger import write_ledger
from tasks.prices import Prices

pytestmark = pytest.mark.usefixtures("prefect_server")

PRICES = 'currency = "EUR"\nper_cpu_hour = 1000\nper_gb_month = 0\n[per_gpu_hour]\ncpu = 4000\n'


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `ttt3r ARGS`; returns exit code, standard output and standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ttt3r", *map(str, args), "--weights", "untrained"])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return call


def test_plan_predicts_from_finished_drives_and_the_budget_guards_the_rest(run, tmp_path):
    logs, out, prices = tmp_path / "logs", tmp_path / "out", tmp_path / "prices.toml"
    logs.mkdir()
    prices.write_text(PRICES)
    for name, frames in (("a", 14), ("b", 28), ("c", 28)):
        write_video(logs / f"{name}.mp4", moving_squares(frames))
    (logs / "d.mp4").write_text("no video")
    everything = (f"{logs}/*.mp4", "--output", out)

    code, text, _ = run("plan", *everything, "--json")
    found = json.loads(text)
    assert code == 0
    assert [(d["name"], d["stage"], d["frames"]) for d in found["drives"]] == [
        ("a", "new", 14),
        ("b", "new", 28),
        ("c", "new", 28),
        ("d", "unreadable", 0),
    ]
    assert found["left"] is None
    assert not out.exists()  # a dry run writes nothing
    code, _, err = run("reconstruct", *everything, "--max-gpu-hours", 100)
    assert code == 2
    assert "no drive is finished" in err

    assert run("reconstruct", logs / "a.mp4", "--output", out, "--prices", prices)[0] == 0
    ledger = ReconstructionStore.open(out / "a.zarr").read_commit("ledger")
    assert (ledger["frames"], ledger["device_kind"], ledger["currency"]) == (14, "cpu", "EUR")
    used = ledger["used"]
    assert ledger["cost"] == pytest.approx(4000 * used["gpu_hours"] + 1000 * used["cpu_hours"])
    assert ledger["cost_per_video_hour"] == pytest.approx(ledger["cost"] / (1.4 / 3600), rel=0.1)
    assert set(ledger["seconds"]) == {"probe", "plan", "infer", "align", "fuse", "report"}
    assert ledger["predicted"] is None
    assert ledger["lost_seconds"] == {}

    plan = json.loads(run("plan", *everything, "--prices", prices, "--json")[1])
    a, b, c, d = plan["drives"]
    assert (a["stage"], a["left"]["gpu_hours"], a["cost"]) == ("done", 0, 0)
    assert b["left"] == c["left"]
    assert plan["left"]["gpu_hours"] == pytest.approx(2 * b["left"]["gpu_hours"])
    assert plan["cost"] == pytest.approx(2 * b["cost"])
    assert (d["stage"], d["cost"]) == ("unreadable", 0)
    text = run("plan", *everything, "--prices", prices)[1]
    assert "EUR" in text
    assert "predicted from 1: a" in text
    assert "d is unreadable: " in text
    code, _, err = run("plan", *everything, "--device-kind", "H200")
    assert code == 2
    assert "no drive was inferred on a device 'H200'; most were on 'cpu'" in err

    code, _, err = run("reconstruct", *everything, "--max-gpu-hours", 0)
    assert code == 2
    assert "all 4 drives" in err
    assert "without b, c" in err
    code, _, err = run("reconstruct", *everything, "--max-cost", 1)
    assert code == 2
    assert "price table" in err
    assert not (out / "b.zarr").exists()

    limit = ("--max-cost", 1.5 * b["cost"], "--take-what-fits", "--prices", prices)
    code, text, err = run("reconstruct", f"{logs}/[abc].mp4", "--output", out, *limit)
    assert (code, "1 of 3 drives are left" in err) == (3, True)
    assert "left for the next run" in text
    assert not (out / "c.zarr").exists()
    summary = json.loads((out / "collection.json").read_text())["drives"]
    assert [(d["name"], d["left"]) for d in summary] == [("a", False), ("b", False), ("c", True)]
    ledger = ReconstructionStore.open(out / "b.zarr").read_commit("ledger")
    assert ledger["predicted"]["gpu_hours"] == pytest.approx(b["left"]["gpu_hours"])
    assert ledger["predicted"]["from"] == ["a"]
    assert ledger["cost_predicted"] == pytest.approx(b["cost"])


def move_to_two_gpus(folder: Path) -> None:
    """Make the records of a reconstructed drive those of two attempts on two kinds of GPU."""
    (first,) = folder.glob("commits/attempts/infer-*")
    took = json.loads(first.read_text())
    second = first.with_name(first.name.replace(first.name[6:18], "0123456789ab"))
    first.write_text(json.dumps(took | {"device_kind": "GPU A", "seconds": 36.0}))
    second.write_text(json.dumps(took | {"device_kind": "GPU B", "seconds": 72.0}))
    chunks = sorted(folder.glob("commits/infer/*/*"))
    for i, chunk in enumerate(chunks):
        record = json.loads(chunk.read_text())
        is_second = i >= len(chunks) // 2
        attempt = "0123456789ab" if is_second else record["attempt"]
        kind = "GPU B" if is_second else "GPU A"
        chunk.write_text(json.dumps(record | {"device_kind": kind, "attempt": attempt}))


def test_a_drive_that_two_kinds_of_gpu_inferred_has_predictions_and_a_cost(run, tmp_path):
    video, out = write_video(tmp_path / "a.mp4", moving_squares(28)), tmp_path / "out"
    cut = ("--segment-frames", 16, "--overlap-frames", 4, "--chunk-frames", 8)
    assert run("reconstruct", video, "--output", out, *cut)[0] == 0
    url = str(out / "a.zarr")
    move_to_two_gpus(out / "a.zarr")
    usage = {"cpu_hours": 1.0, "stored_bytes": 10.0, "seconds": {"infer": 1.0}}
    by_device = {
        kind: {**usage, "gpu_hours": hours, "from": [kind[-1]]}
        for kind, hours in (("GPU A", 2.0), ("GPU B", 4.0))
    }
    store = ReconstructionStore.open(url)
    store.commit("predicted", {"plan_key": "k", "by_device": by_device})

    prices = Prices("EUR", {"GPU A": 100.0, "GPU B": 1000.0}, per_cpu_hour=1.0)
    ledger = write_ledger(url, prices)
    assert ledger["device_kind"] == "GPU B"
    assert {k: d["seconds"] for k, d in ledger["devices"].items()} == {"GPU A": 36, "GPU B": 72}
    assert ledger["used"]["gpu_hours"] == pytest.approx(0.03)
    assert ledger["cost"] == pytest.approx(1.0 + 20.0 + ledger["used"]["cpu_hours"])
    shares = {k: d["frames_inferred"] / 32 for k, d in ledger["devices"].items()}
    assert shares == {"GPU A": 0.5, "GPU B": 0.5}
    assert ledger["predicted"]["gpu_hours"] == pytest.approx(3.0)
    assert ledger["predicted"]["from"] == ["A", "B"]
    assert ledger["cost_predicted"] == pytest.approx(0.5 * 200 + 0.5 * 4000 + 1)

    lone = write_ledger(url, Prices("EUR", {"GPU A": 100.0}, per_cpu_hour=1.0))
    assert (lone["cost"], lone["cost_predicted"]) == (None, None)
    kinds = {
        kind: json.loads(
            run(
                "plan",
                video,
                "--output",
                out,
                *cut,
                "--rule",
                "cut3r",
                "--device-kind",
                kind,
                "--json",
            )[1]
        )["left"]["gpu_hours"]
        for kind in ("GPU A", "GPU B")
    }
    assert kinds["GPU B"] == pytest.approx(2 * kinds["GPU A"])


def test_settings_change_what_is_planned_and_what_is_left(run, tmp_path):
    video = write_video(tmp_path / "a.mp4", moving_squares(30))
    here = (video, "--output", tmp_path / "out")

    def plan(*settings: object) -> tuple[str, int, dict | None]:
        (drive,) = json.loads(run("plan", *here, *settings, "--json")[1])["drives"]
        return drive["stage"], drive["segments"], drive["left"]

    assert plan() == ("new", 1, None)
    cut = ("--segment-frames", 16, "--overlap-frames", 2)
    assert plan(*cut) == ("new", 2, None)
    assert run("reconstruct", *here, *cut)[0] == 0
    nothing = {"gpu_hours": 0, "cpu_hours": 0, "stored_bytes": 0}
    assert plan(*cut) == ("done", 2, nothing)
    stage, _, left = plan(*cut, "--focal-px", 50)
    assert stage == "align"
    assert left["gpu_hours"] == 0 < left["cpu_hours"]
    stage, segments, left = plan()
    assert (stage, segments) == ("plan", 1)
    assert left["gpu_hours"] > 0
    assert plan(*cut, "--rule", "cut3r")[0] == "infer"


def test_what_is_out_of_date_is_left_to_do(run, tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", moving_squares(30))
    here = (video, "--output", tmp_path / "out", "--segment-frames", 16, "--overlap-frames", 2)

    def plan() -> tuple[str, int, float]:
        (drive,) = json.loads(run("plan", *here, "--json")[1])["drives"]
        return drive["stage"], drive["frames"], drive["left"]["gpu_hours"]

    assert run("reconstruct", *here)[0] == 0
    assert plan() == ("done", 30, 0)
    with monkeypatch.context() as newer:
        newer.setattr("tasks.fuse.VERSION", 1000)
        newer.setattr("tasks.finished.VERSIONS", [1000])
        assert plan() == ("fuse", 30, 0)
    store = ReconstructionStore.open(tmp_path / "out" / "a.zarr")
    chunk = store.read_commit("infer/0001/0000")
    store.commit("infer/0001/0000", {**chunk, "key": "of another network"})
    store.drop_commits("finished")
    stage, _, whole = plan()
    assert stage == "infer"
    write_video(video, moving_squares(40))
    stage, frames, left = plan()
    assert (stage, frames) == ("new", 40)
    assert 0 < whole < left


def test_a_budget_wants_prices_and_a_plan_says_what_is_wrong_with_them(run, tmp_path):
    video = write_video(tmp_path / "a.mp4", moving_squares(14))
    here = (video, "--output", tmp_path / "out")
    (tmp_path / "prices.toml").write_text("currency = 1\n")
    code, _, err = run("plan", *here, "--prices", tmp_path / "prices.toml")
    assert (code, "is not a price table" in err) == (2, True)
    code, _, err = run("plan", *here, "--prices", tmp_path / "none.toml")
    assert code == 2
    assert "none.toml" in err
    code, _, err = run("plan", *here, "--segment-frames", 8, "--overlap-frames", 5)
    assert code == 2
    assert "overlap_frames is 5" in err
    code, _, err = run("plan", *here, "--rule", "nope")
    assert code == 2
    assert "known: cut3r, ttt3r" in err
    (tmp_path / "rates.json").write_text('{"results": []}')
    code, _, err = run("plan", *here, "--rates", tmp_path / "rates.json")
    assert code == 2
    assert "it holds no results" in err
    for option in ("--take-what-fits",), ("--rates", tmp_path / "rates.json"):
        code, _, err = run("reconstruct", *here, *option)
        assert code == 2
        assert "give max_gpu_hours or max_cost" in err
