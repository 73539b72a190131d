"""Small documents of the operator, as prices and rates: from any location, bounded."""

from __future__ import annotations

import fsspec

from storage.failures import explaining


def read_document(location: str, most: int) -> bytes:
    """All of a file at a path or fsspec URL.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more than `most` bytes; no more are read.
        StoreError: it cannot be read.
    """
    with explaining(location, FileNotFoundError), fsspec.open(location, "rb") as file:
        data: bytes = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return data
