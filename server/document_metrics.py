"""The document cache in Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_GAUGES = {
    "disk_bytes": "Bytes of the document cache on disk.",
    "disk_files": "Files of the document cache.",
}
_COUNTERS = {
    "disk_hit_tokens": "Prompt tokens whose keys came from disk.",
    "disk_written_bytes": "Bytes written to the document cache.",
    "disk_evicted_files": "Files of the document cache removed to keep its bound.",
    "disk_corrupt_files": "Files of the document cache found damaged, and removed.",
    "disk_write_errors": "Files of the document cache that the disk refused.",
    "disk_skipped_prompts": "Prompts not kept because too many waited to be written.",
}


def disk_metrics(numbers: Mapping[str, float]) -> Iterator[Metric]:
    """One metric per number of ``EngineSnapshot.disk``; none without a document cache."""
    if numbers:
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"foveate_{name}", text, value=numbers[name])
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"foveate_{name}", text, value=numbers[name])
