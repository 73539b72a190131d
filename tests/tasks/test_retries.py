import os
import subprocess
import sys

import pytest
from botocore.exceptions import ClientError

from storage.errors import NotAStore, StoreRefused, StoreUnavailable
from tasks.probe import probe_stage
from tasks.retries import is_worth_retrying


class Failed:
    """A Prefect state that holds an exception."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self, raise_on_failure: bool) -> Exception:
        return self._error


def refused(code: str) -> PermissionError:
    """A refusal as s3fs raises it."""
    error = PermissionError("refused")
    error.__cause__ = ClientError({"Error": {"Code": code, "Message": ""}}, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailable("the server does not answer"), True),
        (ConnectionError("reset"), True),
        (refused("ExpiredToken"), True),
        (refused("AccessDenied"), False),
        (StoreRefused("access denied"), False),
        (NotAStore("something else is there"), False),
        (ValueError("unknown rule"), False),
        (ImportError("no open3d"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert is_worth_retrying(probe_stage, None, Failed(error)) is expected


def test_waits_between_attempts_are_prefects_setting_where_there_is_one():
    command = [
        sys.executable,
        "-c",
        "import tasks.probe as p; print(p.probe_stage.retry_delay_seconds)",
    ]
    setting = {"PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "[0.5, 2]"}
    said = subprocess.check_output(command, env={**os.environ, **setting}, text=True)
    assert said.split("\n")[0] == "[0.5, 2.0]"
    assert probe_stage.retry_delay_seconds == [10, 60, 300]
