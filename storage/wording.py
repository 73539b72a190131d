"""Texts of errors, files and other people's records, made fit to be kept and to be shown."""

from __future__ import annotations

import logging
import re

OUR_LOGGERS = ("flows", "tasks", "storage", "ttt3r")
AFTER_URL = ".,:;'\"<>)]}"  # in a text; no part of the URL


def redacted(url: str) -> str:
    """`url` without a user name and password before the host."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else url


def shown(text: str) -> str:
    """`text` without what may be a secret, and without what would steer a terminal.

    URLs lose a user before the host and all of their query, which may be a signature. Characters
    that cannot be printed, line ends included, are written as Python escapes them.
    """
    plain = re.sub(r"\S+", _without_secrets, text) if "://" in text else text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


def on_one_line(text: str) -> str:
    """`text` as `shown`, with single spaces for line ends and other gaps."""
    return shown(" ".join(text.split()))


def reason_of(error: BaseException) -> str:
    """Kind and text of an error on one line, as failures are recorded."""
    return on_one_line(f"{type(error).__name__}: {error}")


def how_to_mend(url: str) -> str:
    """What to do about damaged data of the store, for the end of a message."""
    return f"run `ttt3r repair {redacted(url)}`, then `ttt3r reconstruct` again"


class PlainRecord(logging.LogRecord):
    """What a log is told, with lines of this software as `shown`."""

    def getMessage(self) -> str:
        """The text of the line."""
        text = super().getMessage()
        return shown(text) if self.name.split(".")[0] in OUR_LOGGERS else text


def use_plain_records() -> None:
    """Let the logs of this process be told `PlainRecord`s."""
    logging.setLogRecordFactory(PlainRecord)


def _without_secrets(found: re.Match[str]) -> str:
    url, mark, query = re.sub(r"://[^/\s]*@", "://", found[0]).partition("?")
    if not mark or "://" not in found[0]:
        return url + mark + query
    return f"{url}?...{query[len(query.rstrip(AFTER_URL)) :]}"
