"""Prometheus metrics: the engine's numbers as they are at the time of asking, and times of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from foveate import __version__

from .current_request import CURRENT, CurrentRequest
from .document_metrics import disk_metrics
from .engine_protocol import EngineLike
from .mass import BOUNDS
from .request import Delta, Event, Failed, Finished, Progress, Usage
from .tracing import Moments

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
_LENGTH_BUCKETS = tuple(4**power for power in range(1, 11))  # 4 to 1,048,576 tokens
_SHARE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class _EngineCollector(Collector):
    def __init__(self, engine: Callable[[], EngineLike | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine()
        ready = engine is not None and engine.state == "ready"
        yield GaugeMetricFamily("foveate_ready", "1 while requests are taken.", value=float(ready))
        if engine is None:
            return
        build = InfoMetricFamily("foveate_build", "What is served, and by which version.")
        build.add_metric([], {"version": __version__, "model": engine.model_name, "dtype": str(engine.dtype)})
        yield build
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
        yield from disk_metrics(snapshot.disk)


class ServerMetrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, engine: Callable[[], EngineLike | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token of a prompt.", _REQUEST_BUCKETS
        )
        self.inter_token = self._histogram("inter_token_seconds", "Between two tokens of a choice.", _TOKEN_BUCKETS)
        self.request = self._histogram(
            "request_seconds", "From submission to the end of a prompt's last choice.", _REQUEST_BUCKETS
        )
        self.queue = self._histogram(
            "queue_seconds", "From submission until a prompt's first chunk is computed.", _REQUEST_BUCKETS
        )
        self.prefill = self._histogram(
            "prefill_seconds", "From the first chunk of a prompt to its first token.", _REQUEST_BUCKETS
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTH_BUCKETS)
        self.answer_length = self._histogram(
            "request_generated_tokens", "Tokens of all choices of a prompt.", _LENGTH_BUCKETS
        )
        self.keys_read = self._histogram(
            "keys_read_fraction",
            "Keys that a request read over those that dense attention would have read.",
            _SHARE_BUCKETS,
            "scheme",
        )
        self.prefix = Counter(
            "foveate_prefix_cache_lookups",
            "Prompts whose beginning was in the prefix cache (hit), or was not (miss).",
            ["result"],
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
        self.http = Counter(
            "foveate_http_requests",
            "HTTP requests by route and status; 499 where the client left unanswered.",
            ["route", "status"],
            registry=self.registry,
        )

    def timer(self) -> RequestTimer:
        """Follows one engine request, which is submitted now."""
        return RequestTimer(self, CURRENT.get())

    def render(self) -> bytes:
        """The text that a Prometheus server reads."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"foveate_{name}", text, labels, buckets=buckets, registry=self.registry)


class RequestTimer:
    """Times and sizes of one engine request, from its events; its trace too, where there is one."""

    def __init__(self, metrics: ServerMetrics, current: CurrentRequest | None) -> None:
        self._metrics = metrics
        self._current = current
        self._start = time.monotonic()
        self._waited: float | None = None
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._reason = "error"

    def saw(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Progress():
                if self._waited is None:
                    self._waited = event.waited_seconds
                    self._metrics.queue.observe(event.waited_seconds)
            case Delta():
                self._saw_tokens(event, now)
            case Finished(usage):
                self._saw_end(usage, now)
            case Failed():
                self._metrics.finished.labels("error").inc()
                self._trace(None, "error")

    def cut_off(self) -> None:
        """Its caller ended it."""
        self._metrics.finished.labels("abort").inc()
        self._trace(None, "abort")

    def _saw_tokens(self, event: Delta, now: float) -> None:
        if self._first is None:
            self._first = now - self._start
            self._metrics.first_token.observe(self._first)
            if self._waited is not None:
                self._metrics.prefill.observe(max(self._first - self._waited, 0.0))
        if event.index in self._last:
            self._metrics.inter_token.observe(now - self._last[event.index])
        self._last[event.index] = now
        if event.finish_reason is not None:
            self._reason = event.finish_reason
            self._metrics.finished.labels(event.finish_reason).inc()

    def _saw_end(self, usage: Usage, now: float) -> None:
        metrics = self._metrics
        metrics.request.observe(now - self._start)
        metrics.prompt_length.observe(usage.prompt_tokens)
        metrics.answer_length.observe(usage.completion_tokens)
        metrics.keys_read.labels(usage.scheme).observe(usage.keys_read_fraction)
        metrics.prefix.labels("hit" if usage.cached_tokens else "miss").inc()
        if self._current is not None:
            self._current.add(usage)
        self._trace(usage, self._reason)

    def _trace(self, usage: Usage | None, outcome: str) -> None:
        if self._current is not None and self._current.trace is not None:
            moments = Moments.at(time.time_ns(), time.monotonic() - self._start, self._waited, self._first)
            self._current.trace.prompt(moments, usage, outcome)
