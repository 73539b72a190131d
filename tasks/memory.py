"""Memory that is kept though nobody needs it, by Python and by the allocator.

The allocator's settings are glibc's; other C libraries have none of this.
"""

from __future__ import annotations

import ctypes
import gc

M_ARENA_MAX = -8  # of malloc.h


def use_one_arena() -> None:
    """Let all threads that start from now on share what was freed.

    By default threads have arenas of their own. Each drive has threads of its own, which leave
    some small blocks in this arena and some in that one: a process that lives long grows by
    some 0.4 MB a drive, though all that is in use stays the same.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give pages on which nothing is in use back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def collect_garbage() -> None:
    """Free what only refers to itself, and give its pages back.

    By itself Python looks for such objects once they are a quarter of all. With the 700,000 of the
    libraries that is after many drives, whose flow runs and their results are kept until then.
    """
    gc.collect()
    return_freed_memory()
