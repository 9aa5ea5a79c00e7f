"""OpenTelemetry traces of requests, sent by OTLP over HTTP where ``--otlp-endpoint`` says so.

A request is one server span, under the client's own where it sent a W3C ``traceparent``. Below it every prompt has
three: ``queue`` (submitted until its first chunk is computed), ``prefill`` (until its first token) and ``decode``
(until its end). They hold sizes and shares, never text.

The library is an extra (``pip install 'foveate[otel]'``) and is imported only when traces are made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate import __version__

if TYPE_CHECKING:
    from .request import Usage

_NANOSECONDS = 1_000_000_000
_CLOSE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Moments:
    """When a prompt reached its stages, in nanoseconds of Unix time; ``None`` for one that it did not reach."""

    submitted: int
    started: int | None
    first_token: int | None
    ended: int

    @classmethod
    def at(cls, now: int, age: float, waited: float | None, first_token: float | None) -> Moments:
        """From the time ``now`` and the seconds that passed since, or after, the submission."""
        submitted = now - round(age * _NANOSECONDS)
        started = None if waited is None else submitted + round(waited * _NANOSECONDS)
        first = None if first_token is None else submitted + round(first_token * _NANOSECONDS)
        return cls(submitted, started, first, now)


class Tracing:
    """Makes the spans of one server and sends them from a thread of its own, so that no request waits for it.

    Args:
        endpoint: URL of an OTLP/HTTP collector; ``/v1/traces`` is added where it has no path.
        model: What the server is asked for, an attribute of every span.
        exporter: Takes the spans instead, in tests.

    Raises:
        ValueError: one of OpenTelemetry's own variables is wrong.
    """

    def __init__(self, endpoint: str, model: str, exporter: Any = None) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        try:
            self._provider = _provider(endpoint, exporter)
        except ValueError as error:
            raise ValueError(f"traces cannot be made as the OTEL_... variables say: {error}") from error
        self._tracer = self._provider.get_tracer("foveate", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def begin(self, method: str, headers: list[tuple[bytes, bytes]]) -> RequestTrace:
        """The span of a request that just came."""
        from opentelemetry.trace import SpanKind

        carrier: dict[str, str] = {}
        for name, value in headers:
            if name.lower() in (b"traceparent", b"tracestate"):
                carrier[name.lower().decode()] = value.decode("latin-1")
        span = self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "gen_ai.request.model": self._model},
        )
        return RequestTrace(self._tracer, span, method)

    def close(self) -> None:
        """Sends what is left, for ``_CLOSE_SECONDS`` at most; the library itself waits 10 for a silent collector."""
        closing = threading.Thread(target=self._provider.shutdown, name="foveate-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


class RequestTrace:
    """The span of one HTTP request, and those of its prompts below it."""

    def __init__(self, tracer: Any, span: Any, method: str) -> None:
        self._tracer, self._span, self._method = tracer, span, method

    def prompt(self, moments: Moments, usage: Usage | None, outcome: str) -> None:
        """Adds the spans of one prompt, which has ended with ``outcome``: a finish reason, ``error`` or ``abort``."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        common: dict[str, Any] = {"foveate.outcome": outcome}
        if usage is not None:
            common["foveate.attention.scheme"] = usage.scheme
        stages = [
            ("queue", moments.submitted, moments.started, {}),
            ("prefill", moments.started, moments.first_token, _of_prompt(usage)),
            ("decode", moments.first_token, moments.ended, _of_answer(usage)),
        ]
        for name, start, end, attributes in stages:
            if start is None:
                break
            # A stage that was not left ended with the request.
            end = moments.ended if end is None else max(end, start)
            span = self._tracer.start_span(name, context=context, start_time=start, attributes=common | attributes)
            span.end(end)

    def end(self, status: int, route: str | None, label: str) -> None:
        """Ends the request's span."""
        from opentelemetry.trace import Status, StatusCode

        if route is not None:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attribute("foveate.request_id", label)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _provider(endpoint: str, exporter: Any) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=_traces_url(endpoint))
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # OTEL_SERVICE_NAME does not say
        resource = resource.merge(Resource({"service.name": "foveate"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _of_prompt(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {}
    return {"gen_ai.usage.input_tokens": usage.prompt_tokens, "foveate.cached_tokens": usage.cached_tokens}


def _of_answer(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {}
    attributes: dict[str, Any] = {
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "foveate.keys_read_fraction": usage.keys_read_fraction,
        "foveate.kv_pages": usage.pages,
    }
    return attributes if usage.mass_kept is None else attributes | {"foveate.mass_kept": usage.mass_kept}


def _traces_url(endpoint: str) -> str:
    rest = endpoint.partition("://")[2]
    return endpoint if rest.partition("/")[2] else endpoint.rstrip("/") + "/v1/traces"
