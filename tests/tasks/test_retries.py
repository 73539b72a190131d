import pytest

from storage.errors import NotAStore, StoreRefused, StoreUnavailable
from tasks.retries import is_worth_retrying


class Failed:
    """A Prefect state that holds an exception."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self, raise_on_failure: bool) -> Exception:
        return self._error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailable("the server does not answer"), True),
        (ConnectionError("reset"), True),
        (StoreRefused("access denied"), False),
        (NotAStore("something else is there"), False),
        (ValueError("unknown rule"), False),
        (ImportError("no open3d"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert is_worth_retrying(None, None, Failed(error)) is expected
