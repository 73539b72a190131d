"""The Dockerfile: linted, and in step with what it copies and installs.

`deploy/check_image.py` carries it out; that takes minutes and root, and is run by hand.
"""

import json
import re
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


def steps(*instructions: str) -> list[str]:
    with DOCKERFILE.open("rb") as file:
        found = DockerfileParser(fileobj=file).structure
    return [step["value"] for step in found if step["instruction"] in instructions]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(HADOLINT), "--failure-threshold", "warning", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_dockerfile_passes_hadolint(tmp_path):
    assert lint(DOCKERFILE).returncode == 0, lint(DOCKERFILE).stdout
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))
    assert "DL3002" in lint(worse).stdout  # last user is root


def test_the_server_has_the_prefect_and_the_database_library_of_the_lock():
    server = DOCKERFILE.with_name("server.Dockerfile")
    assert lint(server).returncode == 0, lint(server).stdout
    lock = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^(prefect|sqlalchemy)==(\S+)", lock, re.MULTILINE))
    assert f"FROM prefecthq/prefect:{pinned['prefect']}-python3.11\n" in server.read_text()
    assert f" sqlalchemy=={pinned['sqlalchemy']}\n" in server.read_text()


def test_everything_copied_exists_and_is_let_in():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = set()
    for value in steps("COPY"):
        if "--from" not in value:
            copied |= set(value.split()[:-1])
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_versions_are_those_of_the_lock():
    (install,) = (value for value in steps("RUN") if "--requirement pyproject.toml" in value)
    assert "--constraint requirements.lock" in install
    assert "--verify-hashes" in install
    extras = set(re.findall(r"--extra (\S+)", install))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = (v.partition("=")[2] for v in steps("ARG") if v.startswith("TORCH="))
    assert f"TORCH ?= {torch}\n" in makefile


def settings(document: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at all depths of a JSON document."""
    if isinstance(document, dict):
        yield from document.items()
    for part in document.values() if isinstance(document, dict) else document:
        if isinstance(part, dict | list):
            yield from settings(part)


def test_pools_run_the_image_as_its_own_user_where_it_writes():
    user = steps("USER")[-1]
    environment = " ".join(steps("ENV"))
    assert user == "10001:10001"
    assert "HOME=/cache" in environment
    for name in ("kubernetes-cpu", "kubernetes-gpu", "docker-cpu", "docker-gpu"):
        pool = json.loads((ROOT / "deploy" / "pools" / f"{name}.json").read_text())
        users = [value for key, value in settings(pool) if key in ("user", "runAsUser")]
        groups = [value for key, value in settings(pool) if key in ("runAsGroup", "fsGroup")]
        if name.startswith("docker"):
            assert (users, groups) == ([user], [])
        else:
            assert (users, groups) == ([10001], [10001] * 2)
        assert "/cache" in json.dumps(pool)
