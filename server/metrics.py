"""Prometheus metrics: the engine's numbers as they are at the time of asking, and times of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine_protocol import EngineLike
from .mass import BOUNDS
from .request import Delta, Event, Failed, Finished

_GAUGES = {
    "requests_running": ("running", "Requests in the batch."),
    "requests_waiting": ("waiting", "Requests not yet in the batch."),
    "kv_pages_total": ("pages_total", "Pages in the pool."),
    "kv_pages_free": ("pages_free", "Pages that hold nothing."),
    "kv_pages_cached": ("pages_cached", "Pages kept for prefix reuse alone."),
    "kv_pages_used": ("pages_used", "Pages that requests hold."),
    "loop_heartbeat_age_seconds": ("heartbeat_age_seconds", "Time since the engine's loop last turned."),
}
_COUNTERS = {
    "preempted": ("preemptions", "Requests put back to waiting because pages ran out."),
    "aborted": ("aborted", "Requests that the caller cut off."),
    "nan_logits": ("bad_logits", "Requests ended because logits were not finite."),
    "generated_tokens": ("generated_tokens", "Tokens sampled."),
    "prompt_tokens": ("prompt_tokens", "Tokens of admitted prompts."),
    "cached_tokens": ("cached_tokens", "Prompt tokens found in the prefix cache."),
    "keys_read": ("keys_read", "Key reads done, over queries, heads and layers."),
    "keys_dense": ("keys_dense", "Key reads that dense attention would have done."),
    "steps": ("steps", "Forward passes."),
}
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class _EngineCollector(Collector):
    def __init__(self, engine: Callable[[], EngineLike | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine()
        ready = engine is not None and engine.state == "ready"
        yield GaugeMetricFamily("foveate_ready", "1 while requests are taken.", value=float(ready))
        if engine is None:
            return
        snapshot = engine.snapshot()
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"foveate_{name}", text, value=getattr(snapshot, field))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"foveate_{name}", text, value=getattr(snapshot, field))
        mass = HistogramMetricFamily(
            "foveate_attention_mass_kept",
            "Share of dense attention's mass on the keys that were read, per audited token.",
            labels=["scheme"],
        )
        for scheme, histogram in snapshot.mass_kept.items():
            below = list(accumulate(histogram.counts))
            buckets = [(str(bound), float(count)) for bound, count in zip(BOUNDS, below, strict=True)]
            mass.add_metric([scheme], [*buckets, ("+Inf", float(below[-1]))], histogram.total)
        yield mass


class ServerMetrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, engine: Callable[[], EngineLike | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.first_token = Histogram(
            "foveate_time_to_first_token_seconds",
            "From submission to the first token of a prompt.",
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "foveate_inter_token_seconds",
            "Between two tokens of a choice.",
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.request = Histogram(
            "foveate_request_seconds",
            "From submission to the end of a prompt's last choice.",
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.finished = Counter(
            "foveate_choices_finished",
            "Choices by the reason of their end (error and abort: prompts).",
            ["reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "foveate_requests_rejected", "Answers with an error status.", ["status"], registry=self.registry
        )

    def timer(self) -> RequestTimer:
        return RequestTimer(self)

    def render(self) -> bytes:
        """The text that a Prometheus server reads."""
        return generate_latest(self.registry)


class RequestTimer:
    """Times of one engine request, from its events."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: dict[int, float] = {}

    def saw(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Delta):
            if not self._last:
                self._metrics.first_token.observe(now - self._start)
            if event.index in self._last:
                self._metrics.inter_token.observe(now - self._last[event.index])
            self._last[event.index] = now
            if event.finish_reason is not None:
                self._metrics.finished.labels(event.finish_reason).inc()
        elif isinstance(event, Finished):
            self._metrics.request.observe(now - self._start)
        elif isinstance(event, Failed):
            self._metrics.finished.labels("error").inc()

    def cut_off(self) -> None:
        self._metrics.finished.labels("abort").inc()
