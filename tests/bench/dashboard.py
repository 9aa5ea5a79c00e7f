"""Asks a real Prometheus every query of the Grafana dashboard, while it reads a server that answers requests.

    tests/bench/dashboard.py MODEL --prometheus /usr/bin/prometheus --promtool /usr/bin/promtool

Fails where Prometheus refuses the configuration, the metrics or a query, or where a query has no answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS_PORT = 19090


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prometheus", default="prometheus")
    parser.add_argument("--promtool", default="promtool")
    given = parser.parse_args()
    foveate = Path(sys.executable).with_name("foveate")
    command = [foveate, "serve", given.model, "--port", "0", "--audit-rate", "1"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = next(line for line in server.stdout if "ready on" in line).split()[-1]
            check(given, url, Path(folder))
        finally:
            server.terminate()


def check(given: argparse.Namespace, url: str, folder: Path) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    config["global"]["scrape_interval"] = config["global"]["scrape_timeout"] = "1s"
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run([given.promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml"], check=True)
    command = [given.prometheus, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}", "--log.level=error"]
    with subprocess.Popen(command) as prometheus:
        try:
            for _ in range(8):
                complete(url, {"scheme": "streaming", "budget_tokens": 16})
                time.sleep(1)
            metrics = urllib.request.urlopen(url + "/metrics").read()
            linted = subprocess.run(
                [given.promtool, "check", "metrics"], input=metrics, capture_output=True, check=False
            )
            print(
                "promtool check metrics:",
                linted.returncode,
                (linted.stdout + linted.stderr).decode().strip() or "nothing",
            )
            if linted.returncode == 1:
                sys.exit("the metrics cannot be read")
            ask_all()
        finally:
            prometheus.terminate()


def complete(url: str, attention: dict[str, object]) -> None:
    body = {"prompt": "Some words " * 40, "max_tokens": 8, "attention": attention}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request).read()


def ask_all() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/foveate.json").read_text())
    failed = 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = urllib.parse.urlencode({"query": target["expr"].replace("$__rate_interval", "1m")})
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query?{query}") as response:
                    values = [series["value"][1] for series in json.load(response)["data"]["result"]]
            except OSError as error:
                values = [f"REFUSED {error}"]
            bad = not values or any(value == "NaN" or value.startswith("REFUSED") for value in values)
            failed += bad
            name = f"{panel['title']}: {target['legendFormat']}"
            print(f"{'BAD ' if bad else 'ok  '} {name} = {', '.join(values) or 'nothing'}")
    if failed:
        sys.exit(f"{failed} queries have no answer")


if __name__ == "__main__":
    main()
