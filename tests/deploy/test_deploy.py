"""Dockerfiles and the compose file, as far as they can be checked without Docker.

``tests/bench/image.py`` builds and runs the images in debootstrap roots, ``tests/bench/dashboard.py`` asks a real
Prometheus; both by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foveate.server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(path for path in DEPLOY.glob("Dockerfile*") if not path.name.endswith("ignore"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def instructions(path):
    joined = path.read_text().replace("\\\n", " ")
    return [line.split(None, 1) for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def test_there_are_two_dockerfiles():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfiles:
    def test_hadolint(self, path):
        linter = Path(sys.executable).with_name("hadolint")
        if not linter.exists():
            pytest.skip("hadolint is not installed")
        done = subprocess.run([linter, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    def test_every_run_is_a_script_of_ours(self, path):
        copied = {name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]}
        for word, rest in instructions(path):
            if word == "RUN":
                script = rest.split()[0].lstrip("/")
                assert script in copied
                assert (ROOT / script).stat().st_mode & 0o111

    def test_what_is_copied_is_there_and_is_sent(self, path):
        sent = path.with_name(path.name + ".dockerignore").read_text().splitlines()
        for word, rest in instructions(path):
            if word == "COPY" and not rest.startswith("--from"):
                for name in rest.split()[:-1]:
                    assert (ROOT / name).exists()
                    assert any(name == rule[1:] or name.startswith(rule[1:] + "/") for rule in sent if rule[0] == "!")

    def test_every_package_is_copied(self, path):
        import tomllib

        folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
        copied = {name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]}
        assert {folder.split("/")[0] for folder in folders} <= copied

    def test_it_runs_as_a_user_with_a_check(self, path):
        final = dict(instructions(path))
        assert final["USER"] == "10001:10001"
        assert "useradd --uid 10001" in (DEPLOY / "image/runtime.sh").read_text()
        assert final["VOLUME"] == final["WORKDIR"]
        assert json.loads(final["HEALTHCHECK"].partition("CMD ")[2])[-1].endswith("healthcheck.py")
        assert [rest for word, rest in instructions(path) if word == "FROM"][-1].startswith("debian:")

    def test_its_variables_are_settings(self, path):
        names = re.findall(r"(FOVEATE_\w+)=", path.read_text())
        assert names
        assert {name.removeprefix("FOVEATE_").lower() for name in names} <= set(Settings.model_fields)


def test_the_images_differ_where_they_must():
    cpu, cuda = (path.read_text() for path in DOCKERFILES)
    assert "install.sh torch cpu" in cpu
    assert "install.sh torch cuda" in cuda
    assert instructions(DOCKERFILES[0])[-1] == instructions(DOCKERFILES[1])[-1] == ["CMD", '["serve"]']


@pytest.mark.parametrize(
    "script", sorted([*DEPLOY.glob("*.sh"), *DEPLOY.glob("image/*.sh")]), ids=lambda path: path.name
)
def test_scripts_are_bash_and_stop_at_errors(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if script.name != "torch.sh":  # sourced by those that do
        assert "set -euo pipefail" in script.read_text()


def test_setup_through_a_link_keeps_the_environment(tmp_path):
    """Programs that stand in for Python and pip: all but an installation succeeds."""
    (tmp_path / "real/deploy").mkdir(parents=True)
    for name in ("setup.sh", "torch.sh"):
        (tmp_path / "real/deploy" / name).write_text((DEPLOY / name).read_text())
    programs = tmp_path / "real/.venv/bin"
    programs.mkdir(parents=True)
    for name, text in {
        "python": '#!/bin/sh\n[ "$1" != -m ]\n',
        "pip": f"#!{programs}/python\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "link").symlink_to("real")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(programs / "python"), "CXX": "true"}
    script = str(tmp_path / "link/deploy/setup.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert "is broken" not in done.stderr
    assert "installing foveate" in done.stderr, "it came so far"
    assert (programs / "pip").exists()


def test_docker_run_leaves_time_to_drain():
    run = (DEPLOY / "README.md").read_text().partition("docker run")[2]
    grace = float(re.search(r"--stop-timeout (\d+)", run)[1])
    assert grace > Settings.model_fields["drain_seconds"].default + 5


class TestCompose:
    def test_it_is_a_compose_file(self):
        compose_spec = pytest.importorskip("compose_spec")
        text = (DEPLOY / "compose.yaml").read_text()
        compose_spec.PyCompose.from_yaml(text).validate()
        with pytest.raises(Exception, match="nosuch_key"):
            compose_spec.PyCompose.from_yaml(text.replace("    init: true", "    nosuch_key: 1"))

    @pytest.mark.parametrize("name", COMPOSE["services"])
    def test_a_service_has_few_rights(self, name):
        service = COMPOSE["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "privileged" not in service
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] or ((DEPLOY / source).exists() and mount.endswith(":ro"))

    def test_foveate(self):
        service = COMPOSE["services"]["foveate"]
        assert (service["read_only"], service["init"]) == (True, True)
        names = {name.removeprefix("FOVEATE_").lower() for name in service["environment"]}
        assert names <= set(Settings.model_fields)
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace > Settings.model_fields["drain_seconds"].default + 5, "or Docker kills what still answers"

    def test_prometheus_asks_the_port_that_is_served(self):
        config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        assert job["static_configs"] == [{"targets": ["foveate:8000"]}]
        assert "metrics_path" not in job, "/metrics is Prometheus's own default"


def test_the_health_check_tells_well_from_ill():
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    status = [200]

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/health"
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *arguments):
            pass

    def check(port):
        environment = {"FOVEATE_PORT": str(port), "http_proxy": "http://127.0.0.1:1", "PATH": "/usr/bin:/bin"}
        script = DEPLOY / "image/healthcheck.py"
        return subprocess.run([sys.executable, script], env=environment, capture_output=True, check=False).returncode

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_port
        assert check(port) == 0
        status[0] = 503
        assert check(port) == 1
        server.shutdown()
        thread.join()
    assert check(port) == 1, "nobody listens any more"
