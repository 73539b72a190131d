import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import moving_squares, write_video

from flows.cli import main
from storage.drives import require_output
from storage.errors import StoreMissing
from storage.reconstruction import ReconstructionStore
from ttt3r.config import TINY
from ttt3r.metrics import read_kitti_indexed, read_tum
from ttt3r.model import Model
from ttt3r.weights import WeightsInfo, save_weights

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SMALL_SEGMENTS = (
    "--weights", "untrained", "--segment-frames", 12, "--overlap-frames", 2,
    "--chunk-frames", 6, "--voxel-m", 0.1,
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `ttt3r ARGS`; returns exit code, standard output and standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ttt3r", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return call


@pytest.fixture(scope="module")
def store(prefect_server, tmp_path_factory) -> str:
    """A finished reconstruction of thirty frames."""
    folder = tmp_path_factory.mktemp("cli")
    video = write_video(folder / "squares.mp4", moving_squares(30))
    arguments = ["reconstruct", video, "--output", folder / "out", "--weights", "untrained"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ttt3r", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return str(folder / "out" / "squares.zarr")


def assert_one_line(code: int, err: str, *words: str) -> None:
    """A user's mistake: exit code 2, one line, no traceback, and it says what is wrong."""
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("ttt3r: ")
    for word in words:
        assert word in err


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    shown = re.findall(r"(?:^|`)ttt3r ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"repair", "gc", "weights"} < set(shown)
    for command in (*shown, "demo", "report", "verify", "train"):
        assert re.search(rf"^\W*{command} ", out, re.MULTILINE), command


def test_version_is_that_of_the_package(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"ttt3r {version('ttt3r-pipeline')}\n")


def test_probe_json_says_what_a_recording_holds(run, tmp_path):
    video = write_video(tmp_path / "v.mp4", moving_squares(12), rate=8)
    code, out, _ = run("probe", video, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["frames"], found["width"], found["height"]) == (12, 64, 48)
    assert found["fps"] == pytest.approx(8)
    assert found["duration_s"] == pytest.approx(1.5)
    assert (found["codec"], found["rotation"], found["problems"]) == ("h264", 0, [])


def test_missing_and_unreadable_videos_are_one_line_errors(run, tmp_path):
    code, _, err = run("probe", tmp_path / "nothing.mp4")
    assert_one_line(code, err, "nothing.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    code, _, err = run("probe", text)
    assert_one_line(code, err, "text.mp4")
    untrained = ("--weights", "untrained")
    code, _, err = run("reconstruct", tmp_path / "no", "--output", tmp_path / "o", *untrained)
    assert_one_line(code, err)
    assert not (tmp_path / "o").exists()


def test_segment_that_is_set_aside_gives_exit_code_3(run, prefect_server, tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    call = ("reconstruct", video, "--output", tmp_path / "out", *SMALL_SEGMENTS)
    assert run(*call)[0] == 0
    url = tmp_path / "out" / "squares.zarr"
    ReconstructionStore.open(url).drop_commits("infer/0001/0001")
    state = url / "segments/0001/state/tokens/c.0.0.0"  # from which the segment is to go on
    state.write_bytes(state.read_bytes()[:100])
    code, _, err = run(*call)
    assert code == 3
    assert "1 segments were set aside" in err


def test_meshes_of_all_parts_of_a_drive_are_named(run, prefect_server, tmp_path):
    dark = [frame // 8 for frame in moving_squares(12, seed=1)]
    video = write_video(tmp_path / "cut.mp4", [*moving_squares(12), *dark])
    call = ("reconstruct", video, "--output", tmp_path / "out", *SMALL_SEGMENTS)
    code, out, _ = run(*call)
    assert code == 0
    url = tmp_path / "out" / "cut.zarr"
    assert f"{url}/fusion/mesh.ply" in out
    assert f"{url}/fusion/part*/mesh.ply (shorter parts: 1)" in out
    assert len(list(url.glob("fusion/part*/mesh.ply"))) == 1
    report = (url / "report/report.html").read_text()
    assert "triangles, all parts" in report


def test_failed_drive_is_one_line_and_exit_code_1_and_its_store_says_why(
    run, prefect_server, tmp_path
):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    output = tmp_path / "o"
    code, _, err = run("reconstruct", text, "--output", output, "--weights", "untrained")
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "not a video" in err
    _, out, _ = run("status", output, "--json")
    assert "not a video" in json.loads(out)[0]["error"]


def test_names_and_records_of_others_cannot_steer_the_terminal(run, caplog, tmp_path):
    evil, output = "\x1b]0;owned\x07", tmp_path / "out"
    store = ReconstructionStore.create(output / "drive.zarr", {"drive": {"name": evil}})
    store.commit("failed", {"error": f"{evil}\nsecond line, http://h/?sig=s"})
    (tmp_path / f"{evil}.mp4").write_text("hello")
    (tmp_path / f"{evil}").symlink_to("/dev")
    calls = [("probe", tmp_path / f"{evil}.mp4"), ("status", output)]
    for arguments in (*calls, ("plan", tmp_path, "--output", output, "--weights", "untrained")):
        _, out, err = run(*arguments)
        lines = [*out.splitlines(), *err.splitlines(), *caplog.messages]
        assert all(line.isprintable() for line in lines), lines
        assert "owned" in " ".join(lines)
        assert "sig=s" not in out
    assert "passed over" in " ".join(lines)  # by the log, wherever that goes


def test_commands_on_a_store_that_is_not_there_are_one_line_errors(run, tmp_path):
    nothing = tmp_path / "nothing.zarr"
    for command in (("inspect",), ("report",), ("export", "--format", "ply")):
        code, _, err = run(command[0], nothing, *command[1:])
        assert_one_line(code, err, "no reconstruction")


def test_repair_of_a_drive_that_is_worked_on_is_a_one_line_error(run, tmp_path):
    url = tmp_path / "drive.zarr"
    with ReconstructionStore.create(url, {}).claim("drive"):
        code, out, err = run("repair", url)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "'drive' is being worked on by process" in err
    assert run("repair", url) == (0, "", "0 damaged commits and segments dropped\n")


def test_report_of_a_drive_that_failed_early_names_the_stage_that_is_missing(run, tmp_path):
    url = tmp_path / "drive.zarr"
    ReconstructionStore.create(url, {}).commit("failed", {"error": "nothing decodes"})
    code, _, err = run("report", url)
    assert_one_line(
        code, err, "stage 'probe' of", "has not finished; run `ttt3r reconstruct` again"
    )


def test_wrong_settings_are_one_line_errors_before_anything_is_computed(run, tmp_path):
    video = write_video(tmp_path / "v.mp4", moving_squares(4))
    wrong = {
        ("--weights", "no-such"): "no-such",
        ("--weights", "untrained", "--rule", "magic"): "magic",
        ("--weights", "untrained", "--device", "cuda"): "GPU",
        ("--weights", "untrained", "--segment-frames", "8", "--overlap-frames", "6"): "half",
        ("--weights", "untrained", "--focal-px", "-3"): "focal_px: Input should be greater than 0",
        ("--weights", "untrained", "--voxel-m", "0"): "voxel_m: Input should be greater than 0",
        ("--weights", "untrained", "--device", "gpu"): "device is 'gpu'; expected auto, cpu",
        ("--weights", "untrained", "--overlap-frames", "1000"): "overlap_frames is 1000 of",
        ("--weights", "untrained", "--lanes", "0"): "'--lanes': Input should be greater than",
        ("--weights", "untrained", "--prices", "no.toml"): "no.toml",
        ("--wibble",): "No such option: --wibble",
    }
    for options, word in wrong.items():
        code, _, err = run("reconstruct", video, "--output", tmp_path / "o", *options)
        assert_one_line(code, err, word)
    assert not (tmp_path / "o").exists()


def test_a_call_that_cannot_be_read_is_a_one_line_error(run):
    for command, said in {
        ("wibble",): "No such command 'wibble'",
        ("reconstruct", "x"): "Missing option '--output'",
        ("export", "x", "--format", "xyz"): "'--format': 'xyz' is not one of 'tum'",
    }.items():
        code, _, err = run(*command)
        assert_one_line(code, err, said)


def test_interruption_is_said_and_has_its_exit_code(run, monkeypatch):
    def interrupted(location: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.probe.probe_until_stopped", interrupted)
    code, _, err = run("probe", "x")
    assert (code, len(err.splitlines())) == (130, 1)
    assert "interrupted; run the same command again" in err


def test_closed_terminal_ends_a_command_like_sigterm():
    code = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests themselves run under
import tasks.probe
from flows import cli
tasks.probe.probe_until_stopped = lambda video: os.kill(os.getpid(), signal.SIGHUP)
sys.argv = ["ttt3r", "probe", "x"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (128 + signal.SIGTERM, 1)
    assert "run the same command again to go on where it stopped" in done.stderr


def test_help_says_what_options_are_by_default(run):
    _, out, _ = run("reconstruct", "--help")
    said = " ".join(out.replace("│", " ").split())
    for default in ("[default: compact]", "[default: a quarter]", "[default: from the depth]"):
        assert default in said


@pytest.mark.parametrize("command", ["reconstruct", "plan"])
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("{store}", "is a reconstruction itself; give the folder that holds it"),
        ("{video}", "is a file; give a folder"),
        ("http://127.0.0.1:1/out", "is on a web server, which takes no results"),
        ("s3:/bucket/out", "expected s3://BUCKET/FOLDER"),
        ("", "the output is empty"),
    ],
)
def test_output_that_takes_no_results_is_refused(run, store, tmp_path, command, output, reason):
    video = write_video(tmp_path / "v.mp4", moving_squares(4))
    output = output.format(store=store, video=video)
    code, _, err = run(command, video, "--output", output, "--weights", "untrained")
    assert_one_line(code, err, reason)


@pytest.mark.parametrize(
    "output", ["memory:///out", "local:///data/out", "file:///out", "s3://bucket/out", "drive1:/x"]
)
def test_other_outputs_are_left_to_their_file_systems(monkeypatch, tmp_path, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReconstructionStore, "attributes_at", raise_missing)
    require_output(output)


def raise_missing(url: str) -> None:
    raise StoreMissing(url)


@pytest.mark.parametrize("command", ["reconstruct", "plan"])
@pytest.mark.parametrize("option", ["--focal-px", "--depth-limit-m", "--voxel-m"])
def test_infinite_settings_are_refused_before_finished_work_is_dropped(run, store, command, option):
    before = sorted(ReconstructionStore.open(store).list_files(""))
    output = Path(store).parent
    video = output.parent / "squares.mp4"
    given = (video, "--output", output, "--weights", "untrained", option, "inf")
    code, _, err = run(command, *given)
    assert_one_line(code, err, option.removeprefix("--").replace("-", "_"), "finite")
    assert sorted(ReconstructionStore.open(store).list_files("")) == before


def test_report_of_a_recording_that_is_not_there_leaves_the_one_before(run, store, tmp_path):
    before = ReconstructionStore.open(store).read_commit("report")
    code, _, err = run("report", store, "--recording", tmp_path / "no.mp4")
    assert_one_line(code, err, "no.mp4")
    assert ReconstructionStore.open(store).read_commit("report") == before


def test_a_schedule_that_cannot_work_is_refused_before_anything_is_served(run):
    both = ("--collection", "/logs", "--output", "/out")
    for given in ((), both[:2], both[2:]):
        code, _, err = run("serve", "--cron", "0 3 * * *", *given)
        assert code == 2
        assert "--cron needs --collection and --output" in err
    for cron in ("nonsense", "61 3 * * *", ""):
        code, _, err = run("serve", "--cron", cron, *both)
        assert_one_line(code, err, "--cron", repr(cron), "0 3 * * *")
    secret = ("--collection", "s3://key:secret@logs/", "--output", "/out")
    code, _, err = run("serve", *secret)
    assert_one_line(code, err)
    assert "key:secret" not in err


def test_serve_waits_for_a_server_and_says_where_it_looked(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    code = """
import sys
from flows.cli import main
from flows.commands import serve
serve.SERVER_START_S = 3
sys.argv[1:] = ["serve"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    waiting, *_, end = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert waiting == f"waiting for the Prefect server at {url}"
    assert "run `prefect server start`" in end


def test_status_and_inspect_tell_what_is_finished(run, store):
    code, out, _ = run("status", Path(store).parent, "--json")
    assert code == 0
    assert [(row["drive"], row["stage"]) for row in json.loads(out)] == [("squares", "done")]
    code, out, _ = run("inspect", store, "--json", "--verify")
    found = json.loads(out)
    assert code == 0
    assert found["figures"]["frames"] == 30
    assert found["damaged"] == []


def test_status_shows_every_drive_whatever_is_wrong_with_one(run, tmp_path):
    for name in ("a", "b", "c", "d"):
        ReconstructionStore.create(tmp_path / f"{name}.zarr", {})
    (tmp_path / "killed.zarr").mkdir()  # before its root was published
    (tmp_path / "killed.zarr/.zarr.json.0.partial").write_text("{")
    ReconstructionStore.open(tmp_path / "a.zarr").commit("aside/x", {"reason": "none of ours"})
    ReconstructionStore.open(tmp_path / "b.zarr").commit("failed", {})
    ReconstructionStore.open(tmp_path / "c.zarr").update_attributes({"plan": {"frames": 1}})
    ReconstructionStore.create(tmp_path / "e.zarr", {"drive": {"name": ["e"]}})
    code, out, _ = run("status", tmp_path, "--json")
    rows = {row["drive"]: row for row in json.loads(out)}
    assert code == 0
    assert [rows[n]["stage"] for n in ("a", "b", "d")] == ["probe"] * 3
    assert rows["a"]["error"] is rows["d"]["error"] is None
    assert rows["a"]["set_aside"] == []
    assert rows["b"]["error"] == "the reason is not recorded"
    assert [rows[n]["stage"] for n in ("c", "killed")] == ["unknown"] * 2
    assert rows["c"]["error"] == "KeyError: 'segments'"
    assert "no reconstruction at" in rows["killed"]["error"]
    code, out, _ = run("status", tmp_path)
    assert (code, len(out.splitlines())) == (0, 6)


def test_inspect_verify_names_damaged_data(run, store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    shard = next((copy / "segments/0000/depth").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(bytes(data))
    code, _, err = run("inspect", copy, "--verify")
    assert code == 1
    assert "segments/0000/depth" in err
    assert run("repair", copy)[0] == 0
    assert run("inspect", copy, "--verify")[0] == 0
    _, out, _ = run("status", copy, "--json")
    state = json.loads(out)[0]
    assert state["chunks_done"] == state["chunks"] - 1


def test_drive_whose_root_is_lost_is_mended_and_not_inferred_anew(run, prefect_server, tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    call = ("reconstruct", video, "--output", tmp_path / "out", *SMALL_SEGMENTS)
    assert run(*call)[0] == 0
    url = tmp_path / "out" / "squares.zarr"
    inferred = ReconstructionStore.open(url).commits("infer")
    (url / "zarr.json").unlink()
    for command in (call, ("inspect", url, "--verify"), ("gc", url)):
        code, _, err = run(*command)
        assert code == (1 if command == call else 2)
        assert "zarr.json is missing or torn; `ttt3r repair` makes it anew" in err
    code, _, err = run("repair", url)
    assert code == 0
    assert "zarr.json is made anew" in err
    assert run(*call)[0] == 0
    assert ReconstructionStore.open(url).commits("infer") == inferred
    assert run("inspect", url, "--verify")[0] == 0
    _, out, _ = run("status", url, "--json")
    assert json.loads(out)[0]["stage"] == "done"


@pytest.mark.parametrize("lost", ["align", "infer/0000/0000", "fuse/merged"])
def test_inspect_verify_says_that_commits_were_lost(run, store, tmp_path, lost):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    ReconstructionStore.open(str(copy)).commit("failed", {"error": "of a later run"})
    assert run("inspect", copy, "--verify")[0] == 0
    (copy / f"commits/{lost}.json").unlink()
    code, _, err = run("inspect", copy, "--verify")
    assert code == 1
    assert "finished once, but commits are missing since: run `ttt3r reconstruct` again" in err


def test_gc_lists_what_killed_runs_left_and_removes_it_only_when_told(run, store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    left = copy / "fusion/tiles/left.ply"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"superseded")
    any_age = ("--older-than-hours", "0")
    for options, listed, stays in (
        (any_age, True, True),
        (("--delete",), False, True),  # it is not a day old
        (("--delete", *any_age), True, False),
    ):
        code, out, _ = run("gc", copy, *options)
        assert (code, "fusion/tiles/left.ply" in out) == (0, listed)
        assert left.exists() == stays
    assert run("inspect", copy, "--verify")[0] == 0


def test_report_is_left_alone_while_a_run_is_at_work_on_the_drive(run, store):
    opened = ReconstructionStore.open(store)
    before = opened.commits()
    with opened.claim("drive"):
        code, _, err = run("report", store)
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "'drive' is being worked on" in err
    assert opened.commits() == before
    code, _, err = run("report", store)
    assert code == 0
    assert "Frames of the recording are not shown" in err
    video = Path(store).parents[1] / "squares.mp4"
    code, _, err = run("report", store, "--recording", video)
    assert (code, err) == (0, "")
    assert 'alt="frame"' in opened.get_file("report/report.html").decode()
    assert opened.read_commit("report")["commit_id"] != before["report"]["commit_id"]


def test_export_writes_trajectories_that_read_back(run, store, tmp_path):
    assert run("export", store, "--format", "tum", "--to", tmp_path / "t.txt")[0] == 0
    assert run("export", store, "--format", "kitti", "--to", tmp_path / "k.txt")[0] == 0
    timestamps, poses = read_tum(tmp_path / "t.txt")
    comments = [n for n in (tmp_path / "t.txt").read_text().splitlines() if n.startswith("# ")]
    assert "# licence of the weights: Apache-2.0" in comments
    assert any("metres are the network's estimate" in line for line in comments)
    assert "#" not in (tmp_path / "k.txt").read_text()  # the format knows no comments
    np.testing.assert_allclose(timestamps, np.arange(30) / 10, atol=1e-6)
    np.testing.assert_allclose(poses, read_kitti_indexed(tmp_path / "k.txt")[1], atol=1e-6)


def test_exported_meshes_say_the_licence_of_the_weights(run, store, tmp_path):
    for format in ("ply", "glb"):
        target = tmp_path / f"mesh.{format}"
        assert run("export", store, "--format", format, "--to", target)[0] == 0
        assert b"licence of the weights: Apache-2.0" in target.read_bytes()[:3000]


def test_export_writes_the_part_that_is_asked_for(run, tmp_path):
    url = tmp_path / "drive.zarr"
    made = ReconstructionStore.create(url, {})
    number = np.arange(5)
    made.write_frames(number / 4, number * 0, number, np.zeros(5, np.uint8))
    made.commit("probe", {"key": "key"})
    cam_to_world = np.tile(np.eye(4), (5, 1, 1))
    cam_to_world[:, 0, 3] = number
    made.write_trajectory(
        {"cam_to_world": cam_to_world, "part": np.array([0, 0, -1, 1, 1], np.int32)}
    )
    made.commit("align", {"key": "key"})
    target = tmp_path / "t.txt"
    for part, frames in (("0", [0, 1]), ("1", [3, 4])):
        assert run("export", url, "--format", "tum", "--to", target, "--part", part)[0] == 0
        timestamps, poses = read_tum(target)
        assert timestamps.tolist() == [frame / 4 for frame in frames]
        assert poses[:, 0, 3].tolist() == frames
    code, _, err = run("export", url, "--format", "tum", "--to", target, "--part", "2")
    assert_one_line(code, err, "there is no trajectory part 2", "it has 2, from 0")


def test_export_without_a_target_is_named_after_the_store_whatever_the_store_says(
    run, store, tmp_path, monkeypatch
):
    copy, elsewhere = tmp_path / "copy.zarr", tmp_path / "elsewhere"
    shutil.copytree(store, copy)
    elsewhere.mkdir()
    group = json.loads((copy / "zarr.json").read_text())
    group["attributes"]["drive"]["name"] = str(elsewhere / "evil")
    (copy / "zarr.json").write_text(json.dumps(group))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("export", copy, "--format", "tum")
    assert (code, out.strip()) == (0, "copy.tum.txt")
    assert read_tum(tmp_path / "copy.tum.txt")
    assert not list(elsewhere.iterdir())


def test_export_that_fails_leaves_an_earlier_file(run, store, tmp_path, monkeypatch):
    target = tmp_path / "t.txt"
    target.write_text("earlier")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("full")))
    code, _, err = run("export", store, "--format", "tum", "--to", target)
    assert (code, err) == (1, "ttt3r: full\n")
    assert target.read_text() == "earlier"


LOCATION = "s3://AKIACANARY:canary/secret@bucket/x"


@pytest.mark.parametrize(
    "command",
    [
        ("probe", LOCATION),
        ("plan", "a.mp4", "--output", LOCATION),
        ("plan", "https://host/a.mp4?X-Amz-Signature=canary", "--output", "o"),
        ("reconstruct", LOCATION, "--output", "o"),
        ("reconstruct", "a.mp4", "--output", "o", "--prices", LOCATION),
        ("status", LOCATION),
        ("inspect", LOCATION),
        ("repair", LOCATION),
        ("gc", LOCATION),
        ("report", LOCATION),
        ("export", LOCATION, "--format", "tum"),
        ("export", "o", "--format", "tum", "--to", LOCATION),
        ("evaluate", "o", "--ground-truth", LOCATION, "--format", "tum"),
        ("serve", "--collection", LOCATION),
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_credentials_and_repeats_none(run, command):
    code, out, err = run(*command)
    assert code == 2
    assert_one_line(code, err, "holds credentials")
    assert "canary" not in (out + err).lower()


def test_evaluate_against_itself_has_no_error_and_against_another_scale_only_without_sim3(
    run, store, tmp_path
):
    run("export", store, "--format", "kitti", "--to", tmp_path / "k.txt")
    code, out, _ = run(
        "evaluate", store, "--ground-truth", tmp_path / "k.txt", "--format", "kitti", "--json"
    )
    figures = json.loads(out)
    assert code == 0
    assert figures["ate_none_m"] == pytest.approx(0, abs=1e-9)
    assert figures["frames"] == 30
    doubled = read_kitti_indexed(tmp_path / "k.txt")[1]
    doubled[:, :3, 3] *= 2
    rows = doubled[:, :3].reshape(len(doubled), 12)
    np.savetxt(tmp_path / "k2.txt", rows)
    _, out, _ = run(
        "evaluate", store, "--ground-truth", tmp_path / "k2.txt", "--format", "kitti", "--json"
    )
    figures = json.loads(out)
    assert figures["ate_sim3_m"] < 0.01 * figures["ate_none_m"]
    assert figures["scale"] == pytest.approx(2, rel=1e-3)


def test_evaluate_reads_what_export_writes_as_tum(run, store, tmp_path):
    truth = tmp_path / "t.txt"
    run("export", store, "--format", "tum", "--to", truth)
    code, out, _ = run("evaluate", store, "--ground-truth", truth, "--format", "tum", "--json")
    figures = json.loads(out)
    assert (code, figures["frames"]) == (0, 30)
    assert figures["ate_none_m"] == pytest.approx(0, abs=1e-6)


def test_evaluate_names_what_is_wrong_with_the_ground_truth(run, store, tmp_path):
    code, _, err = run("evaluate", store, "--ground-truth", tmp_path / "no.txt", "--format", "tum")
    assert_one_line(code, err, "no.txt")


def test_evaluate_opens_depth_as_png_whatever_else_a_file_is(run, store, tmp_path):
    run("export", store, "--format", "kitti", "--to", tmp_path / "k.txt")
    truth = ("--ground-truth", tmp_path / "k.txt", "--format", "kitti", "--depth", tmp_path)
    depth = np.full((48, 64), 5000, np.uint16)
    Image.fromarray(depth).save(tmp_path / "0.png")
    code, out, _ = run("evaluate", store, *truth, "--json")
    assert (code, json.loads(out)["depth_frames"]) == (0, 1)
    (tmp_path / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n")
    code, _, err = run("evaluate", store, *truth)
    assert_one_line(code, err, "0.png is no PNG file")


def test_verify_passes_on_golden_files_and_fails_on_a_changed_one(run, tmp_path):
    name = "linear_wide_cut3r.npz"
    shutil.copy(GOLDEN / name, tmp_path / name)
    code, out, _ = run("verify", "--golden", tmp_path)
    assert code == 0
    assert "FAIL" not in out
    arrays = dict(np.load(tmp_path / name))
    arrays["camera_pose"] = arrays["camera_pose"] + 0.01
    np.savez(tmp_path / name, **arrays)
    code, out, err = run("verify", "--golden", tmp_path)
    assert code == 1
    assert "FAIL" in out
    assert "beyond the limits" in err


def test_weights_at_an_address_that_does_not_answer_are_said_to_be_unreadable(run, tmp_path):
    video = write_video(tmp_path / "v.mp4", moving_squares(4))
    given = ("--output", tmp_path / "out", "--weights", "http://127.0.0.1:1/w.safetensors")
    code, _, err = run("plan", video, *given)
    assert_one_line(
        code, err, "http://127.0.0.1:1/w.safetensors cannot be read", "ClientConnectorError"
    )


def test_weights_list_and_show_name_the_licence(run):
    code, out, _ = run("weights", "list")
    assert code == 0
    assert "CC BY-NC-SA 4.0" in out
    code, out, _ = run("weights", "show", "untrained")
    assert code == 0
    assert json.loads(out)["trained"] is False


def test_result_says_whose_weights_made_it_and_that_metres_are_an_estimate(run, store):
    opened = ReconstructionStore.open(store)
    assert opened.attributes["weights"]["licence"] == "Apache-2.0"
    page = opened.get_file("report/report.html").decode()
    said = re.sub(r"<[^>]*>|\s+", " ", page.replace("&#39;", "'"))
    assert re.search(r"licence of the weights\s+Apache-2\.0", said)
    assert "Metres are the network's estimate" in said


def test_weights_are_fetched_and_verified_if_they_are_the_ones_asked_for(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = tmp_path / "tiny.safetensors"
    save_weights(source, Model(TINY), WeightsInfo("tiny", TINY, "", "CC0", "test", 20, True))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    url = source.as_uri()
    code, _, err = run("weights", "fetch", url, "--sha256", "0" * 64)
    assert_one_line(code, err.lstrip(), "not the file that was asked for")  # below the bar
    cache = tmp_path / "home" / ".cache" / "ttt3r"
    assert not list(cache.rglob("*.safetensors"))
    code, out, _ = run("weights", "fetch", url, "--sha256", digest)
    fetched = Path(out.strip())
    assert code == 0
    assert fetched.is_relative_to(cache)
    assert fetched.read_bytes() == source.read_bytes()
    code, out, _ = run("weights", "verify", fetched)
    assert (code, out.strip().endswith("as recorded")) == (0, True)
    damaged = bytearray(fetched.read_bytes())
    damaged[-1] ^= 1
    fetched.write_bytes(damaged)
    assert run("weights", "verify", fetched)[0] == 2


def test_checkpoint_is_imported_with_the_licence_and_name_that_are_given(run, tmp_path):
    checkpoint = tmp_path / "released.pth"
    torch.save({"args": None, "model": Model(TINY).state_dict(), "epoch": 1}, checkpoint)
    heads = (TINY.enc_num_heads, TINY.dec_num_heads, TINY.state_dec_num_heads)
    given = ("--name", "mine", "--licence", "CC0", "--image-size", TINY.image_size)
    code, out, err = run("weights", "import", checkpoint, *given, "--heads", *heads)
    assert (code, err) == (0, "")
    target = tmp_path / "released.safetensors"
    assert out.splitlines()[:2] == [str(target), "CC0"]
    shown = json.loads(run("weights", "show", target)[1])
    assert (shown["name"], shown["licence"]) == ("mine", "CC0")
    assert run("weights", "verify", target)[0] == 0
