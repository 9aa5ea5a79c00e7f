"""The Grafana dashboard asks for what the server has. ``tests/bench/dashboard.py`` asks a real Prometheus, by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from foveate.server.mass import MassHistogram

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards/foveate.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAME = re.compile(r"\b(?:foveate|process)_\w+")
# Neither shown nor forgotten: constants, and what another panel says better.
LEFT_OUT = {
    "foveate_build_info",
    "foveate_ready",
    "foveate_kv_pages_total",
    "foveate_steps_total",
    "foveate_requests_rejected_total",
    "foveate_request_prompt_tokens",
    "foveate_request_generated_tokens",
}


@pytest.fixture
def samples(client, engine, monkeypatch):
    """Every sample of /metrics after requests of each outcome: its name and the names of its labels."""
    snapshot, kept = engine.snapshot, {"streaming": MassHistogram().plus(0.9)}
    monkeypatch.setattr(engine, "snapshot", lambda: replace(snapshot(), mass_kept=kept))
    client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
    client.post("/v1/completions", json={"prompt": 5})
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_queries_ask_for_metrics_and_labels_that_exist(samples):
    for expression in EXPRESSIONS:
        names = NAME.findall(expression)
        assert names, expression
        assert set(names) <= set(samples), expression
        labels = {label for name in names for label in samples[name]} | {"job", "instance"}
        asked = [label.strip() for clause in re.findall(r"by \((.*?)\)", expression) for label in clause.split(",")]
        assert {*asked, *re.findall(r"[{,](\w+)!?[=~]", expression)} <= labels, expression


def test_counters_are_asked_for_their_rate():
    for expression in EXPRESSIONS:
        for name in re.findall(r"\w+_total|\w+_bucket|foveate_\w+_(?:sum|count)", expression):
            assert re.search(rf"rate\({name}(\{{.*?\}})?\[\$__rate_interval\]\)", expression), expression


def test_every_metric_is_shown_or_left_out_knowingly(samples):
    def family(name):
        return re.sub(r"_(bucket|sum|count)$", "", name)

    shown = {family(name) for expression in EXPRESSIONS for name in NAME.findall(expression)}
    exist = {family(name) for name in samples if name.startswith("foveate_") and not name.endswith("_created")}
    assert exist - shown == LEFT_OUT


def test_panels_do_not_overlap_and_use_the_data_source():
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    uid = sources["datasources"][0]["uid"]
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} == {uid}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
