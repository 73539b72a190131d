import os
import subprocess
import sys

import pytest
from botocore.exceptions import ClientError

from storage.errors import ClaimLost, NotAStore, StoreRefused, StoreUnavailable
from tasks import retries
from tasks.probe import probe_stage
from tasks.retries import is_worth_retrying, retried


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
        (refused("RequestTimeTooSkewed"), False),
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


class Failing:
    """What fails with these errors, one after the other, before it succeeds."""

    __name__ = "failing"

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self, value: int) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return value


@pytest.mark.parametrize("delays", [0.01, [0.01], [0.01, 0.02, 0.01, 0.01]])
def test_what_a_flow_does_itself_is_tried_as_often_as_a_stage(monkeypatch, delays):
    monkeypatch.setattr(retries, "RETRY_DELAYS_S", delays)
    away = [StoreUnavailable("away"), ConnectionError("reset"), refused("ExpiredToken")]
    assert retried(Failing(*away))(3) == 3
    with pytest.raises(StoreUnavailable, match="the last"):
        retried(Failing(*away, StoreUnavailable("the last")))(3)


@pytest.mark.parametrize(
    "error",
    [StoreRefused("access denied"), ClaimLost("taken over"), ValueError("no"), refused("Other")],
)
def test_what_a_flow_does_itself_is_not_tried_again_where_that_changes_nothing(error):
    failing = Failing(error, ValueError("a second attempt"))
    with pytest.raises(type(error), match=str(error)):
        retried(failing)(3)
