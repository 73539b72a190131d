"""`ttt3r plan`, the budget and the ledger, over two real drives."""

import json
import sys

import pytest
from recordings import moving_squares, write_video

from flows.cli import main
from storage.reconstruction import ReconstructionStore

pytestmark = pytest.mark.usefixtures("prefect_server")


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
    logs, out = tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    write_video(logs / "a.mp4", moving_squares(14))
    write_video(logs / "b.mp4", moving_squares(28))
    everything = (f"{logs}/*.mp4", "--output", out)

    code, text, _ = run("plan", *everything, "--json")
    found = json.loads(text)
    assert code == 0
    assert [(d["name"], d["stage"], d["frames"]) for d in found["drives"]] == [
        ("a", "new", 14),
        ("b", "new", 28),
    ]
    assert found["left"] is None
    assert not out.exists()  # a dry run writes nothing
    code, _, err = run("reconstruct", *everything, "--max-gpu-hours", 100)
    assert code == 2
    assert "one drive" in err

    assert run("reconstruct", logs / "a.mp4", "--output", out)[0] == 0
    ledger = ReconstructionStore.open(out / "a.zarr").read_commit("ledger")
    assert ledger["frames"] == 14
    assert ledger["device_kind"] == "cpu"
    assert ledger["used"]["gpu_hours"] > 0
    assert "predicted" not in ledger

    left = json.loads(run("plan", *everything, "--json")[1])
    a, b = left["drives"]
    assert (a["stage"], a["left"]["gpu_hours"]) == ("done", 0)
    assert b["left"]["gpu_hours"] > 0
    assert left["left"] == b["left"]
    code, _, err = run("reconstruct", *everything, "--max-gpu-hours", 0)
    assert code == 2
    assert "--max-gpu-hours" in err
    assert not (out / "b.zarr").exists()

    assert run("reconstruct", *everything, "--max-gpu-hours", 100)[0] == 0
    ledger = ReconstructionStore.open(out / "b.zarr").read_commit("ledger")
    assert ledger["predicted"]["gpu_hours"] == pytest.approx(b["left"]["gpu_hours"])
    assert ledger["predicted_from"] == ["a"]
