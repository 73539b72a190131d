"""The folder that a path or URL names; what folders promise is in `storage.objects`."""

from __future__ import annotations

import re
from pathlib import Path

import fsspec
from fsspec.core import split_protocol

from storage.local_folder import LocalFolder
from storage.objects import Folder
from storage.remote_folder import RemoteFolder
from storage.wording import redacted


def open_folder(url: str) -> Folder:
    """The folder at a local path or any fsspec URL; touches nothing yet.

    Raises:
        ValueError: the URL chains file systems, or has an empty part.
    """
    if "::" in url:
        raise ValueError(f"{redacted(url)} chains file systems with '::'; expected one plain URL")
    protocol, path = split_protocol(url)
    if protocol in (None, "file", "local"):
        return LocalFolder(Path(fsspec.core.url_to_fs(url)[1]), url)
    if "//" in path.strip("/"):
        single = redacted(url.replace(path, re.sub("/+", "/", path)))
        raise ValueError(
            f"{redacted(url)} has an empty part, which some servers never list; did you mean "
            f"{single}?"
        )
    return RemoteFolder(url)
