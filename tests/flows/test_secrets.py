"""Credentials stay where they were given: nothing that a run writes or says holds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recordings import moving_squares, write_video
from web import running_web

from storage.credentials import refuse_credentials

KEY, SECRET = "CANARYKEY4711", "canary-secret-0815"
SETTINGS = ("--weights", "untrained", "--segment-frames", "8", "--chunk-frames", "4")


def run(folder: Path, source: str, output: str, **environment: str) -> tuple[int, bytes]:
    """`ttt3r reconstruct` with a home of its own in `folder`; exit code and all it said."""
    home = {"HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_"))}
    command = [sys.executable, "-m", "flows.cli", "reconstruct", source, "--output", output]
    done = subprocess.run(
        [*command, *SETTINGS],
        env={**quiet, **home, "PREFECT_LOGGING_LEVEL": "DEBUG", **environment},
        capture_output=True,
        timeout=280,
    )
    return done.returncode, done.stdout + done.stderr


def assert_nowhere(folder: Path, said: bytes) -> None:
    """No canary in what was said, nor in any file, databases and stores included."""
    for canary in (KEY.encode(), SECRET.encode()):
        assert canary not in said
        for path in folder.rglob("*"):
            if path.is_file():
                assert canary not in path.read_bytes(), path


@pytest.mark.parametrize(
    "location",
    [
        f"s3://{KEY}:{SECRET}@bucket/out",
        f"s3://{KEY}:with/{SECRET}@bucket/out",
        f"s3://{KEY}:12/{SECRET}@bucket/out",
        f"https://host/a.mp4?X-Amz-Signature={SECRET}",
        f"https://host/a.mp4?x=1&token={SECRET}",
        f"simplecache::s3://{KEY}:{SECRET}@bucket/out",
        f"sftp://{KEY}@host/out",
    ],
)
def test_credentials_in_a_location_are_refused_and_not_repeated(location):
    with pytest.raises(ValueError, match="holds credentials") as refusal:
        refuse_credentials(location)
    assert KEY not in str(refusal.value)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    "location",
    [
        "/a@b/c.mp4",
        "s3://bucket/a@b.mp4",
        "https://h/a.mp4?id=3",
        "http://host:8080/a.mp4",
        "http://[::1]:8080/a.mp4",
    ],
)
def test_locations_without_credentials_are_taken(location):
    assert refuse_credentials(location) == location


def test_run_that_is_given_credentials_in_its_url_stores_nothing(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(8))
    code, said = run(tmp_path, str(video), f"s3://{KEY}:{SECRET}@bucket/out")
    assert code == 2
    assert b"holds credentials" in said
    assert_nowhere(tmp_path, said)


@pytest.mark.slow
def test_run_that_the_store_refuses_tells_no_secret(tmp_path, seaweed):
    video = write_video(tmp_path / "squares.mp4", moving_squares(8))
    wrong = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    code, said = run(tmp_path, str(video), seaweed.url, **{**seaweed.environment, **wrong})
    assert code == 2
    assert b"access denied" in said
    assert_nowhere(tmp_path, said)


@pytest.mark.slow
def test_finished_run_on_s3_stores_no_secret(tmp_path, seaweed):
    write_video(tmp_path / "squares.mp4", moving_squares(8))
    output = f"{seaweed.url}/{tmp_path.name}"
    code, said = run(tmp_path, str(tmp_path / "squares.mp4"), output, **seaweed.environment)
    assert code == 0, said[-2000:]
    filesystem = seaweed.filesystem()
    found = filesystem.find(output.removeprefix("s3://"))
    assert any(name.endswith("report.html") for name in found)
    contents = [filesystem.cat_file(name) for name in found]
    contents += [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert all(seaweed.secret.encode() not in content for content in [*contents, said])


@pytest.mark.slow
def test_run_that_is_led_to_a_signed_address_tells_no_signature(tmp_path):
    write_video(tmp_path / "squares.mp4", moving_squares(8))
    with running_web(tmp_path) as web:
        web.signature = f"X-Amz-Credential={KEY}&X-Amz-Signature={SECRET}"
        web.fail = lambda request: 403 if "Range" in request.headers else None
        code, said = run(
            tmp_path,
            f"{web.url}/squares.mp4",
            str(tmp_path / "out"),
            PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS="[0, 0, 0]",
        )
    assert code == 1
    assert b"access denied (HTTP status 403)" in said
    assert_nowhere(tmp_path, said)
