"""Progress bars on the terminal, read from the store: the same for any number of workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from storage.wording import shown
from tasks.keys import STAGES
from tasks.summary import progress

POLL_S = 1.0


@contextmanager
def progress_of(urls: Sequence[str]) -> Iterator[None]:
    """Show how far the drives at `urls` are while the block runs; silent without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    stop = threading.Event()
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bars:
        watcher = threading.Thread(target=_watch, args=(bars, urls, stop), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def _watch(bars: Progress, urls: Sequence[str], stop: threading.Event) -> None:
    rows: dict[str, Any] = {}
    while not stop.wait(POLL_S):
        for url in urls:
            try:
                state = progress(url)
            except Exception:  # not there yet, not now, or damaged: only a bar depends on it
                continue
            if url not in rows:
                rows[url] = bars.add_task(shown(state["drive"]), total=None, stage=state["stage"])
            # The stages after inference count as a chunk each: a full bar's clock stands still.
            stages = [*STAGES, "done"]
            further = max(0, stages.index(state["stage"]) - stages.index("align"))
            bars.update(
                rows[url],
                total=state["chunks"] + 3 if state["chunks"] else None,
                completed=state["chunks_done"] + further,
                stage=state["stage"],
            )
