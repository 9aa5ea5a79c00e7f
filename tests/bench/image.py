"""Builds a Dockerfile of deploy/ without Docker and asks the server in it, as a container with few rights would run it.

    sudo tests/bench/image.py deploy/Dockerfile --model ~/.cache/foveate/models/smollm2-135m

Every ``FROM`` is a root that debootstrap makes (of the same packages as Docker's own image), every ``RUN`` runs in
it by chroot. Then the server starts as the image says, as its user, with a read-only root, a tmpfs at /tmp, no new
privileges, no network but loopback, and as process 1; it must become healthy by the image's own check, answer a
completion, find its kernels, write nowhere but into the volume, and stop cleanly on SIGTERM.

Needs root, debootstrap and util-linux. Takes minutes and a few GB below ``--work``; a second run uses what is there.
``--bind`` shows a path of this machine to the steps (a folder of wheels, pip's settings).
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {"LABEL", "EXPOSE", "ARG", "STOPSIGNAL"}
PASSED = ("PIP_", "SSL_CERT_", "REQUESTS_CA_")  # variables of this machine that the steps see
READY_SECONDS = 180
STOP_SECONDS = 40


@dataclass
class Image:
    """What a stage came to: its root, and how it wants to be run."""

    root: str
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    volume: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: word and rest, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


class Builder:
    """Runs the instructions of one Dockerfile."""

    def __init__(self, dockerfile: Path, work: Path, binds: list[Path]) -> None:
        self.work, self.binds = work, binds
        ignore = dockerfile.with_name(dockerfile.name + ".dockerignore")
        self.rules = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
        self.stages: dict[str, Image] = {}
        self.image = Image("")
        self.done = hashlib.sha256()
        self.waiting: list[tuple[str, Callable[[Path], None]]] = []
        self.used: set[Path] = set()

    def run(self, word: str, rest: str) -> None:
        if word not in IGNORED:
            getattr(self, "do_" + word.lower())(rest)

    def do_from(self, rest: str) -> None:
        self.finish()
        base, _, name = rest.partition(" AS ")
        self.done = hashlib.sha256(base.encode())
        self.image = Image("")
        self.stages[name or "final"] = self.image
        distribution, _, tag = base.partition(":")
        if distribution != "debian":
            sys.exit(f"debootstrap makes no {base}")
        suite = tag.removesuffix("-slim")
        made = self.work / f"base-{suite}"
        if not made.exists():
            say(f"debootstrap {suite}")
            fresh = made.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            check(["debootstrap", "--variant=minbase", suite, str(fresh)])
            fresh.rename(made)
        self.image.root = str(made)

    def do_run(self, rest: str) -> None:
        self.done.update(rest.encode())

        def run(root: Path) -> None:
            say(rest)
            check(enter(root, ["/bin/sh", "-c", rest], self.binds), env=self._variables())

        self._layer(run)

    def do_copy(self, rest: str) -> None:
        words = shlex.split(rest)
        flags = [word for word in words if word.startswith("--")]
        *sources, target = [word for word in words if word not in flags]
        origin, ignored = ROOT, self.rules
        for flag in flags:
            if not flag.startswith("--from="):
                sys.exit(f"COPY {flag} is not known here")
            origin, ignored = Path(self.stages[flag.removeprefix("--from=")].root), []
        content = hashlib.sha256()
        files = []
        for source in sources:
            top = origin / source.lstrip("/")
            if not top.exists():
                sys.exit(f"COPY: there is no {top}")
            into = target.lstrip("/") + (top.name if target.endswith("/") and top.is_file() else "")
            found = (
                [top]
                if top.is_file()
                else sorted(path for path in top.rglob("*") if path.is_file() or path.is_symlink())
            )
            found = [path for path in found if not ignored or sent(path.relative_to(origin), ignored)]
            if not found:
                sys.exit(f"COPY: {source} is kept out by the .dockerignore")
            for path in found:
                files.append((path, into if path == top else f"{into}/{path.relative_to(top)}"))
                if not flags:
                    content.update(str(path).encode() + path.read_bytes())

        def copy(root: Path) -> None:
            for path, to in files:
                (root / to).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, root / to, follow_symlinks=False)

        previous = str(origin).encode() if flags else b""
        self.done.update(rest.encode() + previous + content.digest())
        self.waiting.append((f"COPY {rest}", copy))

    def do_env(self, rest: str) -> None:
        self.image.env |= dict(item.split("=", 1) for item in shlex.split(rest))

    def do_user(self, rest: str) -> None:
        self.image.user = rest

    def do_workdir(self, rest: str) -> None:
        self.image.workdir = rest

    def do_volume(self, rest: str) -> None:
        self.image.volume = rest

    def do_entrypoint(self, rest: str) -> None:
        self.image.entrypoint = json.loads(rest)

    def do_cmd(self, rest: str) -> None:
        self.image.command = json.loads(rest)

    def do_healthcheck(self, rest: str) -> None:
        self.image.health = json.loads(rest.partition("CMD ")[2])

    def finish(self) -> None:
        """Ends a stage: what was copied after its last RUN becomes a layer too."""
        if self.waiting:
            self._layer(lambda root: None)

    def prune(self) -> None:
        """Removes the layers of earlier builds that this one did not use."""
        for layer in self.work.glob("layer-*"):
            if layer not in self.used:
                shutil.rmtree(layer)

    def _layer(self, act: Callable[[Path], None]) -> None:
        """A copy of the layer before, with what waits to be copied and what ``act`` does, under the hash of it all."""
        layer = self.work / f"layer-{self.done.hexdigest()[:16]}"
        if not layer.exists():
            fresh = layer.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            check(["cp", "-a", "--reflink=auto", self.image.root, str(fresh)])
            for label, copy in self.waiting:
                say(label)
                copy(fresh)
            act(fresh)
            fresh.rename(layer)
        self.waiting.clear()
        self.image.root = str(layer)
        self.used.add(layer)

    def _variables(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
        return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **mine, **self.image.env}


def sent(path: Path, rules: list[str]) -> bool:
    """Whether Docker would send ``path`` to the builder; the last rule that matches counts."""
    kept = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        names = [str(path), *map(str, path.parents)]
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern[3:]) for part in path.parts)
        else:
            matches = any(fnmatch.fnmatch(name, pattern) for name in names)
        if matches:
            kept = rule.startswith("!")
    return kept


def enter(root: Path, command: list[str], binds: list[Path]) -> list[str]:
    """``command`` in ``root``, which sees /proc, /dev, the names of hosts and ``binds`` for as long as it runs."""
    script = ['mount --bind "$R" "$R"', 'mount -t proc proc "$R/proc"', 'mount --rbind /dev "$R/dev"']
    script += ['cp /etc/resolv.conf "$R/etc/resolv.conf"']
    for bind in binds:
        to = f'"$R"{shlex.quote(str(bind))}'
        make = f"mkdir -p {to}" if bind.is_dir() else f'mkdir -p "$(dirname {to})"; touch {to}'
        script += [make, f"mount --bind -o ro {shlex.quote(str(bind))} {to}"]
    script += ['exec chroot "$R" "$@"']
    return ["unshare", "--mount", "env", f"R={root}", "sh", "-euc", "; ".join(script), "sh", *command]


def say(text: str) -> None:
    print(f"[image] {text}", flush=True)


def check(command: list[str], env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=env)


def serve(image: Image, work: Path, model: Path) -> None:
    """Runs the image and asks it. This process has mounts and a network of its own."""
    loopback_up()
    uid, gid = map(int, image.user.split(":"))
    root, volume = Path(image.root), work / "volume"
    shutil.rmtree(volume, ignore_errors=True)
    volume.mkdir(mode=0o750)
    shutil.copytree(model, volume / "foveate" / "models" / model.name)
    for path in [volume, *volume.rglob("*")]:
        os.chown(path, uid, gid)
    for command in (
        ["mount", "--bind", str(root), str(root)],
        ["mount", "-o", "remount,bind,ro", str(root)],
        ["mount", "-t", "proc", "proc", str(root / "proc")],
        ["mount", "--rbind", "/dev", str(root / "dev")],
        ["mount", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", str(root / "tmp")],
        ["mount", "--bind", str(volume), str(root) + image.volume],
    ):
        check(command)

    def inside(command: list[str], init: bool = False) -> list[str]:
        first = ["unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"] if init else []
        change = [
            shutil.which("setpriv"),
            "--no-new-privs",
            shutil.which("chroot"),
            f"--userspec={image.user}",
            "--groups=",
            str(root),
        ]
        return [*first, *change, "/bin/sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", image.workdir, *command]

    def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(inside(command), env=image.env, capture_output=True, text=True, check=False)

    doctor = ask([*image.entrypoint, "doctor"]).stdout
    say(doctor)
    assert "attention kernels on cpu:    native" in doctor, "the kernels are not in use"
    environment = {**image.env, "FOVEATE_MODEL": model.name, "FOVEATE_LOG_FORMAT": "json"}
    log = work / "server.log"
    with log.open("w") as output:
        started = time.monotonic()
        server = subprocess.Popen(
            inside([*image.entrypoint, *image.command], init=True), env=environment, stdout=output, stderr=output
        )
    try:
        while (health := ask(image.health)).returncode:
            if server.poll() is not None or time.monotonic() - started > READY_SECONDS:
                sys.exit(f"the server did not become healthy: {health.stderr}\n{log.read_text()}")
            time.sleep(0.5)
        say(f"healthy after {time.monotonic() - started:.1f} s")
        main = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0]
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{main}/status").read_text().splitlines())
        say(f"runs as uid {status['Uid'].split()}, NSpid {status['NSpid'].split()}, NoNewPrivs {status['NoNewPrivs']}")
        assert status["Uid"].split() == [str(uid)] * 4
        assert status["NSpid"].split()[-1] == "1"
        assert int(status["CapEff"], 16) == 0
        for path, allowed in (("/x", False), ("/opt/foveate/x", False), ("/tmp/x", True), (f"{image.volume}/x", True)):
            assert (ask(["touch", path]).returncode == 0) == allowed, path
        body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
        say(f"answered: {body['prompt']}{text}")
        assert text.strip(), "the answer is empty"
        os.kill(int(main), signal.SIGTERM)
        began = time.monotonic()
        assert server.wait(STOP_SECONDS) == 0, f"exit status {server.returncode}\n{log.read_text()}"
        say(f"stopped with 0, {time.monotonic() - began:.1f} s after SIGTERM")
    finally:
        server.kill()
        print(log.read_text())
    say("every check passed")


def loopback_up() -> None:
    """A new network namespace has its loopback down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, UP and RUNNING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="directory of a model, copied into the volume")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/foveate-image"), help="where roots are kept")
    parser.add_argument("--bind", type=Path, action="append", default=[], help="path of this machine for the steps")
    parser.add_argument("--build-only", action="store_true", help="build, and do not serve")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the second half, in namespaces
    given = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("this needs root and debootstrap")
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    record = work / f"{given.dockerfile.name}.json"
    if given.serve:
        serve(Image(**json.loads(record.read_text())), work, given.model.resolve())
        return
    builder = Builder(given.dockerfile.resolve(), work, [path.resolve() for path in given.bind])
    for word, rest in instructions(given.dockerfile):
        builder.run(word, rest)
    builder.finish()
    builder.prune()
    record.write_text(json.dumps(asdict(builder.image)))
    say(f"built {builder.image.root}")
    if not given.build_only:
        check(["unshare", "--mount", "--net", sys.executable, *sys.argv, "--serve"])


if __name__ == "__main__":
    main()
