"""One step after another: what is computed, drawn and told, and which requests a fault ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from foveate.kv_cache.errors import CacheError
from foveate.kv_cache.manager import KVCacheManager

from .admission import Admission
from .containment import check_device, failure, raise_if_fatal, sample_contained
from .document_cache import DocumentCache
from .exceptions import BadLogits, EngineError, RequestFailed, StepFailed
from .loader import LoadedModel
from .options import EngineOptions
from .output import Outbox
from .pace import Pace, context_of_equal_cost
from .prompt_scores import PromptScores
from .request import Delta, Failed, Finished, PromptLogprobs
from .runner import Runner, StepResult
from .sampling import Sampled
from .scheduler import Scheduler, SequenceFault
from .sequence import Chunk, RequestGroup, Sequence

log = logging.getLogger(__name__)


class Stepper:
    """The requests in the engine, and the step that moves them on. Only the engine's thread uses it.

    A fault ends the requests that it touched and no other: the work on one request (its pages, its
    sampling, its text, its caller's function) ends that request; the forward pass of a step ends
    those that took part. What they held is free before the next step. An inconsistency of the page
    ledger itself is no such fault: nobody could say any more whose keys a page holds, so it raises.

    Attributes:
        scheduler: Chooses the chunks of each step.
        pace: Learns how long steps take.
        runner: Computes them.
        outbox: Tells of them.
        groups: Requests that have not ended, by id.
        documents: Keeps pages of prompts on disk, if the engine has one.
    """

    def __init__(
        self, loaded: LoadedModel, cache: KVCacheManager, options: EngineOptions, admission: Admission
    ) -> None:
        self.pace = Pace(options.step_seconds, context_of_equal_cost(loaded))
        self.scheduler = Scheduler(
            cache, max_batch_tokens=options.max_batch_tokens, max_running=options.seats, pace=self.pace
        )
        self.runner = Runner(loaded, cache, options.audit_rate)
        self.outbox = Outbox()
        self.groups: dict[str, RequestGroup] = {}
        self.documents: DocumentCache | None = None
        self._loaded = loaded
        self._cache = cache
        self._admission = admission

    def start(self, group: RequestGroup) -> None:
        """Queues a request's first sequence; its scheme's page statistics are kept from now on.

        Pages written before have none, and need none: another scheme never reads them, because a
        prefix is found only by a request of the same policy.
        """
        try:
            self._cache.pool.declare(group.request.scheme.page_stats(self._cache.pool.geometry))
            self.scheduler.add(group.sequences[0])
        except Exception as error:  # no memory for them: that is this request's failure alone
            log.exception("no page statistics for %s", group.request.scheme.name)
            told = StepFailed(f"there is no memory for the page statistics of {group.request.scheme.name}")
            told.__cause__ = error
            self.end(group, Failed(told))

    def abort(self, request_id: str, error: EngineError) -> None:
        """Ends a request with ``error``; an unknown id is ignored."""
        group = self.groups.get(request_id)
        if group is not None:
            self.outbox.aborted += 1
            self.end(group, Failed(error))

    def step(self) -> None:
        """Computes one step of what the scheduler chooses."""
        chunks = self._schedule()
        if not chunks:
            return
        began = time.perf_counter()
        for group in (chunk.sequence.group for chunk in chunks):
            if group.waited_seconds is None:
                group.waited_seconds = time.monotonic() - group.request.arrival
        try:
            result = self.runner.run(chunks)
            self.outbox.count_step(chunks, result.keys_read, result.mass_kept)
        except Exception as error:
            # Nothing can be said of what this step wrote, so all that took part in it ends here.
            log.exception("a step failed")
            self._fail([chunk.sequence.group for chunk in chunks], "the step that computed this request failed", error)
            check_device(self._loaded.device)
            return
        try:
            for chunk in chunks:
                if chunk.ends_sequence and not chunk.sequence.num_generated:
                    self.scheduler.prompt_done(chunk.sequence)
                if not chunk.sequence.num_generated and not self.outbox.tell_progress(chunk):
                    self.end(chunk.sequence.group, None)
            for chunk, scores in zip(chunks, result.prompt_scores, strict=True):
                self._tell_scores(chunk.sequence, scores)
            self._draw(chunks, result)
        except CacheError:
            raise
        except Exception as error:  # every known seam has a narrower net than this one
            log.exception("the outcome of a step could not be told")
            self._fail([chunk.sequence.group for chunk in chunks], "the step of this request failed", error)
        self.pace.observe(chunks, time.perf_counter() - began)

    def _schedule(self) -> list[Chunk]:
        """Chunks of the next step; requests that stand in the way of one are ended."""
        empty = 0
        while self.scheduler.has_work:
            try:
                chunks = self.scheduler.schedule()
            except SequenceFault as fault:
                log.exception("no pages for a request")
                self.end(fault.sequence.group, Failed(failure(fault)))
                continue
            except Exception as error:
                log.exception("no step could be chosen")
                held = self.scheduler.running or self.scheduler.waiting
                self._fail([sequence.group for sequence in held], "no step could be chosen for this request", error)
                continue
            if chunks:
                return chunks
            empty += 1
            if empty > 1:  # work that nothing can be done of must not wait for ever
                log.error("there is work, but no step could be made of it")
                held = self.scheduler.waiting or self.scheduler.running
                self._fail([held[0].group], "there were no pages for this request", None)
        return []

    def _draw(self, chunks: list[Chunk], result: StepResult) -> None:
        """Draws a token for each sequence whose last token was computed, and tells of it."""
        drawing: list[Sequence] = []
        rows: list[int] = []
        for row, chunk in enumerate(chunk for chunk in chunks if chunk.ends_sequence):
            if chunk.sequence not in chunk.sequence.group.sequences:
                continue  # it ended just now
            if not chunk.sequence.group.max_tokens:
                self._end_unanswered(chunk.sequence)
                continue
            with self._alone(chunk.sequence.group):
                choices = self._choices(chunk.sequence)
                drawing += choices
                rows += [row] * len(choices)
        whole = rows == list(range(len(result.logits)))  # as a rule, and then nothing need be gathered
        drawn = sample_contained(
            result.logits if whole else result.logits[rows], [sequence.sampler for sequence in drawing]
        )
        for sequence, token in zip(drawing, drawn, strict=True):
            if sequence in sequence.group.sequences:  # a choice with bad logits ends the others, too
                with self._alone(sequence.group):
                    self._take(sequence, token)
        if any(isinstance(token.error, RequestFailed) for token in drawn):
            check_device(self._loaded.device)

    def _tell_scores(self, sequence: Sequence, scores: PromptScores) -> None:
        group = sequence.group
        if scores is None or sequence not in group.sequences:
            return
        if isinstance(scores, BadLogits):
            self._fail_logits(sequence, scores)
            return
        group.num_scored += len(scores)
        if not self.outbox.send(group, PromptLogprobs(scores)):
            self.end(group, None)

    def _end_unanswered(self, sequence: Sequence) -> None:
        """Ends a request that wanted its prompt read and nothing else."""
        group = sequence.group
        if self.documents is not None:
            self.documents.prompt_done(sequence)
        group.pages = len(sequence.pages)
        deltas = [Delta(index, "", (), None, "length") for index in range(group.request.sampling.n)]
        sent = all([self.outbox.send(group, delta) for delta in deltas])
        self.end(group, Finished(self.outbox.usage(group)) if sent else None)

    def _fail_logits(self, sequence: Sequence, error: BadLogits) -> None:
        self.outbox.bad_logits += 1
        # Keys that are not finite would spoil every later request with the same beginning.
        if sequence.table is not None:
            if self.documents is not None:
                self.documents.prompt_bad(sequence)
            self._cache.forget(sequence.table)
        self.end(sequence.group, Failed(error))

    def _choices(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from this one's logits: itself, and when its prompt is done its other choices."""
        group = sequence.group
        if sequence.num_generated or sequence.index:
            return [sequence]
        assert sequence.table is not None
        for index in range(1, group.request.sampling.n):
            choice = self._admission.sequence(group, index)
            group.sequences.append(choice)
            choice.table = self._cache.fork(sequence.table)
            choice.num_computed = sequence.num_computed
            self.scheduler.add(choice)
        return list(group.sequences)

    def _take(self, sequence: Sequence, drawn: Sampled) -> None:
        """Adds a drawn token to its sequence, tells of it, and ends what is finished."""
        group = sequence.group
        if drawn.error is not None:
            if isinstance(drawn.error, BadLogits):
                self._fail_logits(sequence, drawn.error)
            else:
                self.end(group, Failed(drawn.error))
            return
        if self.documents is not None and not sequence.num_generated and not sequence.index:
            self.documents.prompt_done(sequence)
        delta = self._delta(sequence, drawn)
        if delta.finish_reason is not None:
            group.pages = max(group.pages, len({page for item in group.sequences for page in item.pages}))
            self.scheduler.remove(sequence)
            group.sequences.remove(sequence)
        if not self.outbox.send(group, delta):
            self.end(group, None)
        elif not group.sequences:
            self.end(group, Finished(self.outbox.usage(group)))

    def _delta(self, sequence: Sequence, drawn: Sampled) -> Delta:
        sequence.tokens.append(drawn.token_id)
        sequence.sampler.output_token_ids.append(drawn.token_id)
        return self.outbox.delta(sequence, drawn, self._loaded.eos_token_ids)

    @contextmanager
    def _alone(self, group: RequestGroup) -> Iterator[None]:
        """What fails inside ends ``group`` and nobody else."""
        try:
            yield
        except CacheError:
            raise
        except BaseException as error:
            raise_if_fatal(error)
            log.exception("the work on one request failed")
            self.end(group, Failed(failure(error)))

    def _fail(self, groups: list[RequestGroup], words: str, error: BaseException | None) -> None:
        for group in {id(group): group for group in groups}.values():
            told = StepFailed(words)
            told.__cause__ = error
            self.end(group, Failed(told))

    def end(self, group: RequestGroup, event: Finished | Failed | None) -> None:
        """Forgets a request, frees what it still holds, and tells its last event."""
        self.groups.pop(group.request.request_id, None)
        for sequence in group.sequences:
            self.scheduler.remove(sequence)
        group.sequences.clear()
        if event is not None:
            self.outbox.send(group, event)
