"""The operator's lines in README.md and docs/fleet.md, typed as printed on a server begun anew.

What they leave to the operator, the database's address and a run's ID, is filled in. The lines for
Debian, which make the database, need root and the machine's own PostgreSQL: they are not typed.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from local_fleet import REPOSITORY, LocalFleet, kill_tree, running_postgres
from recordings import moving_squares, write_video

from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.summary import progress

pytestmark = pytest.mark.slow

PORT = 4200  # Prefect's own, which the lines name
DATABASE = "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE"
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, start: str) -> list[str]:
    """What a document prints for the terminal, from a line that starts so to the next heading."""
    _, _, rest = (REPOSITORY / document).read_text().partition(f"\n{start}")
    return BLOCK.findall(rest.partition("\n## ")[0])


def run_ids(said: str) -> list[str]:
    """Of the runs that `prefect deployment run` says it has made."""
    return re.findall(r"UUID: (\S+)", said)


class Operator:
    """Somebody at the terminals of a machine on which nobody has used Prefect."""

    def __init__(self, home: Path, data: Path, stack: ExitStack) -> None:
        """`data`: what `/data` of the lines is; `stack` ends what is left running."""
        self._home, self._data, self._stack = home, data, stack
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AWS_"))}
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        self._environment = {**mine, **quiet, "HOME": str(home), "COLUMNS": "200"}

    def type(self, lines: str) -> str:
        """What the lines print, all of which must succeed."""
        done = subprocess.run(
            self._shell(lines),
            cwd=REPOSITORY,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}"
        return done.stdout

    def leave(self, lines: str) -> Callable[[], str]:
        """Type lines of which the last goes on; returns what tells what they have printed."""
        log = self._home / f"terminal-{time.monotonic_ns()}"
        with log.open("wb") as output:
            terminal = subprocess.Popen(
                self._shell(lines),
                cwd=REPOSITORY,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.callback(terminal.wait)
        self._stack.callback(kill_tree, terminal.pid)
        return lambda: log.read_text(errors="replace")

    def _shell(self, lines: str) -> list[str]:
        return ["bash", "-ec", lines.replace("/data/", f"{self._data}/")]


def wait_until(is_so: Callable[[], object], timeout_s: float = 300) -> None:
    """Wait for something."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def is_up(server: LocalFleet) -> bool:
    """Whether the operator's server answers."""
    try:
        return bool(server.get("health"))
    except OSError:
        return False


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Recordings and prices where the lines have them."""
    (tmp_path / "data" / "logs" / "drive2").mkdir(parents=True)
    for name in ("logs/drive1.mp4", "logs/drive2/front.mp4", "drive.mp4"):
        write_video(tmp_path / "data" / name, moving_squares(40))
    shutil.copy(REPOSITORY / "deploy" / "prices.toml", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def operator(tmp_path: Path, data: Path) -> Iterator[Operator]:
    """At this machine; the test skips where something has Prefect's port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"SKIPPED LOUDLY: something listens on port {PORT} of this machine")
    (tmp_path / "home").mkdir()
    with ExitStack() as stack:
        yield Operator(tmp_path / "home", data, stack)


@pytest.fixture
def server(tmp_path: Path) -> LocalFleet:
    """The operator's server, to ask it how runs are."""
    found = LocalFleet(tmp_path, "", {})
    found.url = f"http://127.0.0.1:{PORT}/api"
    return found


@pytest.fixture
def database() -> Iterator[str]:
    """URL of a PostgreSQL server for the operator's."""
    with running_postgres() as url:
        yield url


def test_fleet_from_an_empty_machine(database, operator, server, data):
    serve, set_up, cpu_worker, gpu_worker = blocks("docs/fleet.md", "## From an empty machine")
    (runs,) = blocks("docs/fleet.md", "## Runs")
    (within_budget,) = blocks("docs/fleet.md", "## Budget")
    assert DATABASE in serve
    operator.leave(serve.replace(DATABASE, database))
    wait_until(lambda: is_up(server))
    operator.type(set_up)
    said = operator.leave(cpu_worker)
    operator.leave(cpu_worker.rpartition("prefect worker")[0] + gpu_worker)

    here = "".join(set_up.splitlines(keepends=True)[:2])  # the same terminal
    collection, drive, others = re.split(
        r"^(?=prefect deployment run reconstruct-drive|prefect flow-run ls)", runs, flags=re.M
    )
    (run_id,) = run_ids(operator.type(here + collection))
    server.must_complete(run_id, 600)
    for name in ("drive1", "drive2"):
        url = f"{data}/reconstructions/{name}.zarr"
        assert progress(url)["stage"] == "done"
        assert upkeep.verify(ReconstructionStore.open(url)) == []

    (run_id,) = run_ids(operator.type(here + drive))
    assert run_id in operator.type(here + others.replace("cancel ID", f"cancel {run_id}"))
    assert server.wait_for(run_id, 400)["state_type"] == "CANCELLED"

    (run_id,) = run_ids(operator.type(here + within_budget))
    server.must_complete(run_id, 600)
    assert "Cancelled flow run" in said()
    assert "Hook subprocess" not in said(), "Prefect could not import the flow"


def test_schedule_on_one_machine(operator, server, data):
    (lines,) = blocks("README.md", "**On a schedule, with Prefect:**")
    activate = "source .venv/bin/activate\n"
    serve, offer, third = lines.split("\n", 2)
    operator.leave(activate + serve)
    said = operator.leave(activate + offer)
    wait_until(lambda: "deployments are being served" in said())
    for run_id in run_ids(operator.type(activate + third)):
        server.must_complete(run_id, 600)
    for name in ("drive1", "drive2", "drive"):
        assert progress(f"{data}/reconstructions/{name}.zarr")["stage"] == "done"
    due = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_until(lambda: server.ask("flow_runs/filter", due))
