"""Carry out deploy/Dockerfile without a container engine, and run the result locked down.

    deploy/check_image.py WORK [--build-arg NAME=VALUE ..] [--base FOLDER] [--bind PATH ..]

Each stage becomes a folder under WORK, its RUN steps run in a chroot there; the steps are read from
the Dockerfile itself. The base image is replaced by Debian 12 and its own Python 3.11, installed by
debootstrap: what this cannot show is that the base image has what Debian has. At the end the sample
drive is reconstructed as the image's user on a read-only root, with no network and no
capabilities, and the health check is run. Needs root, debootstrap and bubblewrap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[1]
# How pip and uv reach a package index from here is this machine's business, not the image's.
PASSED_ON = re.compile(r"(PIP|UV|SSL)_\w+|\w+_proxy")
FOREIGN = ("/etc/resolv.conf", "/etc/ssl/certs")


@dataclass
class Stage:
    """A stage of the build: its root, and what its instructions have set so far."""

    root: Path
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    args: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """`text` with $NAME and ${NAME} filled in."""
        known = {**self.args, **self.env}
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)


def main() -> None:
    """Build the stages, say how large they are, run the last one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for the stages; some GB")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--base", type=Path, help="root made by debootstrap before")
    parser.add_argument("--bind", action="append", default=[], help="shown in the chroot too")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.build_arg)
    base = options.base or make_base(options.work / "base")
    image = build(options.work, base, given, options.bind)
    size = int(subprocess.check_output(["du", "-sxm", str(image.root)]).split()[0])
    added = size - int(subprocess.check_output(["du", "-sxm", str(base)]).split()[0])
    print(f"image: {size} MiB uncompressed, of which {added} above the base")
    try_out(image)


def make_base(root: Path) -> Path:
    """Debian 12 with Python 3.11, where the official image has it."""
    run("debootstrap", "--variant=minbase", "bookworm", str(root))
    stage = Stage(root)
    in_chroot(
        stage,
        "apt-get update -qq && apt-get install -y -qq --no-install-recommends "
        "ca-certificates python3.11-venv",
        [],
    )
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")
    return root


def build(work: Path, base: Path, given: dict[str, str], binds: list[str]) -> Stage:
    """Carry out the instructions of the Dockerfile; return the last stage."""
    stages: dict[str, Stage] = {}
    stage = outside = Stage(work)
    for step in DockerfileParser(fileobj=(ROOT / "deploy/Dockerfile").open("rb")).structure:
        what, value = step["instruction"], step["value"]
        if what == "COMMENT":
            continue
        print(f"{what} {value}"[:160], flush=True)
        if what == "FROM":
            name = value.split(" AS ")[1] if " AS " in value else "image"
            stage = stages[name] = Stage(copied(base, work / name))
        elif what == "ARG":
            key, _, default = value.partition("=")
            (stage if stages else outside).args[key] = given.get(key, default)
        elif what == "ENV":
            stage.env |= dict(stage.expand(pair).split("=", 1) for pair in shlex.split(value))
        elif what == "RUN":
            in_chroot(stage, value, binds)
        elif what == "COPY":
            copy(stage, stages, value)
        elif what == "WORKDIR":
            stage.folder = value
            (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif what == "USER":
            stage.user = value
        elif what == "ENTRYPOINT":
            stage.entrypoint = json.loads(value)
        elif what == "CMD":
            stage.command = json.loads(value)
        elif what == "HEALTHCHECK":
            stage.health = json.loads(value.partition(" CMD ")[2])
        else:
            raise SystemExit(f"this script does not know {what}; teach it")
    return stage


def copied(base: Path, root: Path) -> Path:
    """A fresh copy of a root."""
    if root.exists():
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    run("cp", "-a", "--reflink=auto", str(base), str(root))
    return root


def copy(stage: Stage, stages: dict[str, Stage], value: str) -> None:
    """COPY, from the context or another stage; what .dockerignore leaves out is not there."""
    *sources, target = [word for word in shlex.split(value) if not word.startswith("--")]
    origin = re.search(r"--from=(\w+)", value)
    for source in sources:
        if origin:
            found = stages[origin[1]].root / source.lstrip("/")
        else:
            found = ROOT / source
            if not is_in_context(source):
                raise SystemExit(f"COPY {source}: .dockerignore leaves it out")
        place = stage.root / (Path(stage.folder) / target).as_posix().lstrip("/")
        inside = target.endswith("/") or target in (".", "./")
        place = place / found.name if inside and found.is_file() else place
        place.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            skip = None if origin else shutil.ignore_patterns("__pycache__")
            shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            shutil.copy2(found, place)


def is_in_context(source: str) -> bool:
    """Whether .dockerignore, which names what is let in, lets this in."""
    return f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()


def in_chroot(stage: Stage, command: str, binds: list[str]) -> None:
    """Run a shell command in the stage, as RUN does; mounts end with it."""
    mounts = ["mount -t proc proc proc", "mount --rbind /dev dev"]
    for path in [*FOREIGN, *binds]:
        inside = stage.root / path.lstrip("/")
        if Path(path).is_dir():
            inside.mkdir(parents=True, exist_ok=True)
        else:
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.touch()
        mounts.append(f"mount --bind {shlex.quote(path)} {shlex.quote(path.lstrip('/'))}")
    passed = {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k)}
    env = {**passed, "DEBIAN_FRONTEND": "noninteractive", **stage.args, **stage.env}
    # The step is an argument, so that no quoting of it can be wrong.
    script = " && ".join([*mounts, 'exec chroot . /bin/sh -c "$0"'])
    step = f"cd {stage.folder}\n{command}"
    shell = ["unshare", "--mount", "--fork", "sh", "-e", "-c", script, step]
    subprocess.run(shell, cwd=stage.root, env=env, check=True)


def try_out(image: Stage) -> None:
    """Run the image's parts as a cluster would: its user, read-only, nothing allowed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        cache, scratch = Path(folder, "cache"), Path(folder, "tmp")
        for place in (cache, scratch):
            place.mkdir()
            shutil.chown(place, *map(int, image.user.split(":")))
        locked_down(image, image.command, cache, scratch)
        locked_down(image, image.health, cache, scratch)
        locked_down(image, ["prefect", "worker", "start", "--help"], cache, scratch)
        forbidden = ["python", "-c", "open('/opt/ttt3r/x', 'w')"]
        locked_down(image, forbidden, cache, scratch, fails=True)
        locked_down(image, ["ttt3r", "demo", "--output", "/cache/out"], cache, scratch)
        print(f"the demo's reports: {[p.name for p in cache.rglob('report.html')]}")


def locked_down(
    image: Stage, words: list[str], cache: Path, scratch: Path, fails: bool = False
) -> None:
    """Run a command of the image; `fails` says that it must."""
    uid, gid = image.user.split(":")
    settings = [word for name, value in image.env.items() for word in ("--setenv", name, value)]
    sandbox = ["bwrap", "--unshare-all", "--cap-drop", "ALL", "--clearenv", "--as-pid-1"]
    sandbox += ["--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"]
    sandbox += ["--bind", str(cache), "/cache", "--bind", str(scratch), "/tmp"]
    sandbox += ["--chdir", image.folder, *settings, "--", *image.entrypoint, *words]
    as_user = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs"]
    done = subprocess.run([*as_user, *sandbox], capture_output=True, text=True)
    verdict = "refused" if done.returncode else "done"
    print(
        f"{verdict}: {' '.join(words)[:100]}\n{done.stdout[-600:]}{done.stderr[-600:]}", flush=True
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"exit code {done.returncode}")


def run(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
