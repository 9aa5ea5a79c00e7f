"""Files and batches as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .service import BatchService
from .store import STAGES, StoredBatch, StoredFile


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(service: BatchService, batch: StoredBatch) -> dict[str, Any]:
    answered, failed = service.counts(batch)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": service.store.output_id(batch, batch.output_file),
        "error_file_id": service.store.output_id(batch, batch.error_file),
        "created_at": batch.created_at,
        **{f"{stage}_at": batch.times.get(stage) for stage in STAGES},
        "expires_at": None,
        "expired_at": None,
        "request_counts": {"total": batch.total, "completed": answered, "failed": failed},
        "metadata": batch.metadata,
    }


def page(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of at most ``limit`` items; one more was looked for to know whether there are more."""
    shown = list(items[:limit])
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > limit}
