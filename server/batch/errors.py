"""Why a batch cannot begin or go on, in words for whoever started it.

BatchError
├── CannotResume    the input, the model or the output is not what the last run had
│   └── Damaged         the state file no longer says what the last run had
├── InUse           another process writes to the same output
└── EngineStopped   the engine takes no more requests; what is done is safe
"""

from __future__ import annotations


class BatchError(Exception):
    """A batch cannot begin or go on."""


class CannotResume(BatchError):
    """The input, the model or the output is not what the last run had."""


class Damaged(CannotResume):
    """The state file no longer says what the last run had, and cannot be written either."""


class InUse(BatchError):
    """Another process writes to the same output."""


class EngineStopped(BatchError):
    """The engine takes no more requests."""
