"""Memory that the allocator keeps."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give what was freed back to the system.

    glibc keeps freed memory in one arena a thread, and fragments of each stage's many threads
    would pile up over days. Other C libraries have no such call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
