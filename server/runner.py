"""From chunks to logits: packs a step, runs the model, keeps the cache's books."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.view import Rows, upload
from foveate.patches.interface import PackedStep
from foveate.sparse_attn import budget
from foveate.sparse_attn.audit import Audit
from foveate.sparse_attn.protocol import Phase, Roles, Scheme, StepGroup, StepState

from .loader import LoadedModel
from .prompt_scores import PromptScorer, PromptScores
from .sequence import Chunk


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries of one chunk that share policy and phase."""

    owner: int
    chunk: Chunk
    start: int
    count: int

    @property
    def ends_sequence(self) -> bool:
        """Does a token follow on its last query that nobody knows yet?"""
        chunk = self.chunk
        return chunk.ends_sequence and self.start + self.count == chunk.start + chunk.count


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """
    Attributes:
        logits: ``[N, vocab]`` for the chunks that end their sequence, in order.
        keys_read: Per chunk ``(reads done, reads of dense attention)``.
        mass_kept: Per chunk the share of attention mass that was kept, ``None`` if it was not audited.
        prompt_scores: Per chunk what was asked for of its prompt's tokens, ``None`` if nothing was.
    """

    logits: torch.Tensor
    keys_read: list[tuple[float, float]]
    mass_kept: list[float | None]
    prompt_scores: list[PromptScores]


class Runner:
    """Runs steps of one model over one cache; ``audit_rate`` is the share of decode steps that are audited."""

    def __init__(self, loaded: LoadedModel, cache: KVCacheManager, audit_rate: float = 0.0) -> None:
        self.loaded = loaded
        self.cache = cache
        self._device = loaded.device  # a model looks for a parameter to tell
        self.audit = Audit(audit_rate, loaded.attached.facts.windows)
        self._roles: Roles = WeakKeyDictionary()  # asking for them anew took 0.2 ms of each step

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> StepResult:
        """Computes all chunks in one forward pass, as one ragged row ``[1, T]``.

        K and V go to the reserved pages, and the sequences' ``num_computed`` move on.
        """
        device = self._device
        scorer = PromptScorer(self.loaded, chunks)
        groups, parts = self._pack(chunks, scorer.asks)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_row: dict[int, int] = {}
        for part in parts:
            table = part.chunk.sequence.table
            assert table is not None
            scorer.place(part.owner, part.start, part.count, len(ids))
            ids += part.chunk.sequence.tokens[part.start : part.start + part.count]
            positions += range(part.start, part.start + part.count)
            slots += self.cache.slots(table, part.start, part.start + part.count)
            last_row[part.owner] = len(ids) - 1
        wanted = [last_row[owner] for owner, chunk in enumerate(chunks) if chunk.ends_sequence]
        # Logits of the last tokens only; a step in the middle of a prompt still needs one row.
        row, slot_row, id_row, logit_rows = upload(
            (positions, slots, ids, wanted or [len(ids) - 1]), torch.int64, device
        )
        audit = self.audit.begin(groups, len(chunks), device)
        step = StepState(
            pool=self.cache.pool,
            slots=slot_row,
            positions=row,
            groups=groups,
            rotary=self.loaded.rotary,
            keys_read=torch.zeros(len(chunks), 2, dtype=torch.float64, device=device),
            roles=self._roles,
            observer=audit,
        )
        with scorer.watching() as more_logits:
            output = self.loaded.model(
                input_ids=id_row[None],
                position_ids=row[None],
                use_cache=False,
                logits_to_keep=logit_rows,
                foveate_step=PackedStep(step),
            )
            scores = scorer.scores(more_logits)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.start + chunk.count
            assert sequence.table is not None
            self.cache.commit(sequence.table, sequence.tokens, sequence.num_computed)
        reads = [(read, dense) for read, dense in step.keys_read.tolist()]
        mass: list[float | None] = [None] * len(chunks)
        if audit is not None:
            mass = [kept / layers if layers else None for kept, layers in audit.kept.tolist()]
        logits = output.logits[0]
        return StepResult(logits if wanted else logits[:0], reads, mass, scores)

    def _pack(self, chunks: list[Chunk], all_wanted: bool) -> tuple[list[StepGroup], list[_Part]]:
        """Sorts the chunks' queries into groups of one policy and phase, each a run of the packed row.

        Args:
            chunks: At least one.
            all_wanted: Somebody wants logits of other tokens than the last ones.
        """
        members: dict[tuple[Scheme | None, Phase], list[_Part]] = defaultdict(list)
        split: list[tuple[tuple[Scheme | None, Phase], list[_Part]]] = []
        for owner, chunk in enumerate(chunks):
            request = chunk.sequence.group.request
            prompt_tokens = len(request.prompt_token_ids)
            if chunk.start >= prompt_tokens and chunk.count == 1:
                members[request.scheme.for_phase(Phase.DECODE), Phase.DECODE].append(
                    _Part(owner, chunk, chunk.start, 1)
                )
                continue
            scheme = request.scheme.for_phase(Phase.PREFILL)
            spans: list[tuple[tuple[Scheme | None, Phase], list[_Part]]] = []
            for start, stop, dense in budget.spans(
                chunk.start, chunk.start + chunk.count, prompt_tokens, scheme.options
            ):
                if start >= prompt_tokens:  # a preempted answer is read again as it was: token by token
                    answer = [_Part(owner, chunk, position, 1) for position in range(start, stop)]
                    spans.append(((request.scheme.for_phase(Phase.DECODE), Phase.DECODE), answer))
                else:
                    reader = None if dense else scheme
                    spans.append(((reader, Phase.PREFILL), [_Part(owner, chunk, start, stop - start)]))
            if len(spans) == 1:
                members[spans[0][0]] += spans[0][1]
            else:  # side by side, so that a page which two of them write is one run for `write_kv`
                split += spans
        groups, parts, first = [], [], 0
        for (policy, phase), group in [*members.items(), *split]:
            rows = Rows.build(
                [part.chunk.sequence.pages for part in group],
                [part.start + part.count for part in group],
                [part.count for part in group],
                self._device,
                [len(part.chunk.sequence.group.request.prompt_token_ids) for part in group],
                [part.chunk.sequence.tokens for part in group] if policy and policy.needs_token_ids else None,
            )
            wanted = all_wanted or any(part.ends_sequence for part in group)
            groups.append(StepGroup(policy, phase, first, rows, tuple(part.owner for part in group), wanted=wanted))
            parts += group
            first += rows.num_queries
        return groups, parts
