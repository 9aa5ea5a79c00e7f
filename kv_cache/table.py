"""The block table of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from .prefix import PrefixEntry


@dataclass(slots=True, eq=False)
class BlockTable:
    """Logical page -> physical page, and how far the sequence has come. Only the manager changes it.

    Attributes:
        namespace: What K and V depend on beside the tokens; see ``prefix``. ``None`` where they are nobody else's.
        pages: Physical pages in logical order; the last ones may be reserved and not yet written.
        num_tokens: Tokens whose K and V are written.
        num_cached: Tokens at its start that were found in the prefix index when it was opened.
        num_indexed: Full pages at its start that are in the prefix index.
        tail: Entry of the last of these; the next page is chained to it without hashing from the start.
    """

    namespace: bytes | None
    pages: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0
    num_indexed: int = 0
    tail: PrefixEntry | None = None
