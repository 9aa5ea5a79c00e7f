"""``foveate eval``: one model load, every task, length, depth and sample, dense beside each policy."""

from __future__ import annotations

import logging
import random
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from foveate.patches.errors import PatchError
from foveate.patches.fingerprint import fingerprint
from foveate.sparse_attn.errors import SchemeError

from ..calibrate import options_of
from ..engine import Engine
from ..exceptions import EngineError, PoolTooSmall
from ..journal import OtherResults
from ..llm import LLM
from ..loader import LoadedModel, load
from ..options import EngineOptions
from ..packaged import PackagedModelError
from ..request import SamplingParams
from ..settings import Settings
from . import forced, policies
from .arguments import schemes_of
from .policies import Policy, Refused
from .report import write_report
from .tasks import TASKS, VERSION, Depths, Prompt
from .text import Text, read_text
from .trials import Said, Trial, Trials

log = logging.getLogger(__name__)

# Prompts in one batch. A CPU gains nothing by more, and writes its trials down one by one.
BATCH = {"cpu": 1, "cuda": 8}

# Tokens along which a policy is compared with dense.
AGREEMENT_TOKENS = 32

# Task, length and depths.
CellKey = tuple[str, int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for.

    Attributes:
        tasks: Names, in order.
        lengths: Tokens of prompt and answer.
        depths: For tasks that have one.
        samples: Per cell.
        seed: Of every prompt.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    seed: int

    def cells(self) -> Iterator[CellKey]:
        """Task, length and depths; short ones first, so that something can be seen soon."""
        depths: dict[Depths, Sequence[tuple[float, ...]]] = {
            Depths.NONE: [()],
            Depths.EACH: [(depth,) for depth in self.depths],
            Depths.ALL: [tuple(self.depths)],
        }
        for length in sorted(self.lengths):
            for task in self.tasks:
                for at in depths[TASKS[task].depths]:
                    yield task, length, at

    def rng(self, task: str, length: int, depths: tuple[float, ...], sample: int) -> random.Random:
        """The generator of one prompt."""
        return random.Random(f"{self.seed} {task} {length} {depths} {sample}")


def run(given: Namespace, settings: Settings) -> int:
    """Runs what is missing in ``given.output``, and reports on all that is there.

    Returns:
        Exit code: 1 if nothing could be run, or the report not be written.
    """
    options = replace(EngineOptions.of(settings), prefix_reuse=False)
    try:
        wanted = policies.choices(schemes_of(given), options_of(given.option), given.policy, given.budgets)
        # Loading takes minutes where a model is large: what is wrong with files is told before.
        if given.text is not None:
            given.text.read_text(encoding="utf-8")
        given.output.mkdir(parents=True, exist_ok=True)
        loaded = load(options)
    except (SchemeError, PatchError, PackagedModelError, EngineError, OSError, ValueError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    fitting = [length for length in given.lengths if length <= loaded.context_length]
    for length in given.lengths:
        if length not in fitting:
            print(f"foveate: {length} tokens left out: the context is {loaded.context_length}", file=sys.stderr)
    if not fitting:
        return 1
    longest = max(fitting)
    # The pool is made for so many contexts as run at once, so the context is no longer than needed.
    loaded = replace(loaded, context_length=longest)
    try:
        engine = Engine(loaded, replace(options, max_running=BATCH.get(loaded.device.type, 1)))
    except EngineError as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    try:
        if engine.cache.capacity_tokens < longest:
            raise PoolTooSmall(longest, engine.cache.capacity_tokens)
        text = read_text(given.text, loaded.tokenizer)
        if any(TASKS[task].write is None for task in given.tasks):
            text.piece(random.Random(0), longest)  # says now, not hours later, if it is too short
        plan = Plan(given.tasks, fitting, given.depths, given.samples, given.seed)
        evaluation = Evaluation(engine, loaded, plan, text, options.max_batch_tokens)
        evaluation.try_prompts()
        trials = Trials(given.output, evaluation.header, given.fresh)
        made, refused = policies.build(wanted, engine.build_scheme)
        refused += evaluation.run(made, trials)
    except (OtherResults, EngineError, OSError, ValueError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    finally:
        engine.shutdown(0)
    try:
        told = write_report(given.output, trials, refused)
    except OSError as error:
        print(f"foveate: {error}; every trial is kept: the same command writes them up", file=sys.stderr)
        return 1
    print(told)
    return 0


class Evaluation:
    """Runs trials over one engine.

    Args:
        engine: Without prefix reuse; nobody else uses it.
        loaded: Its model.
        plan: What to run.
        text: For the tasks that read text.
        chunk_tokens: Prompt tokens per forward pass, the engine's.
    """

    def __init__(self, engine: Engine, loaded: LoadedModel, plan: Plan, text: Text, chunk_tokens: int) -> None:
        self._engine, self._loaded, self._plan, self._text = engine, loaded, plan, text
        self._chunk_tokens = chunk_tokens
        self._geometry = engine.cache.pool.geometry
        self._failed: dict[str, Refused] = {}

    @property
    def header(self) -> Mapping[str, Any]:
        """What two results must share to be compared."""
        return {
            "model": self._loaded.name,
            "fingerprint": fingerprint(self._loaded.model),
            "dtype": str(self._loaded.dtype).removeprefix("torch."),
            "quantization": self._engine.identity["quantization"],
            "kv_dtype": str(self._geometry.dtype).removeprefix("torch."),
            "page_size": self._geometry.page_size,
            "chunk_tokens": self._chunk_tokens,
            "seed": self._plan.seed,
            "tasks": VERSION,
            "text": {"name": self._text.name, "sha256": self._text.digest},
        }

    def try_prompts(self) -> None:
        """Makes the shortest prompt of each task, so that what cannot be made is told before anything is computed.

        Of a task that reads text it makes all, since the text may be too short for the longest.

        Raises:
            ValueError: a task has no room, or too many facts; or the text is too short.
        """
        shortest = min(self._plan.lengths)
        for cell in self._plan.cells():
            write = TASKS[cell[0]].write
            if write is None:
                self._given(cell, 0)
            elif cell[1] == shortest:
                write(self._plan.rng(*cell, 0), self._encode, cell[1], cell[2])

    def run(self, made: Sequence[Policy], trials: Trials) -> list[Refused]:
        """Runs the trials that are not written down yet; returns the policies that failed while they ran."""
        total = sum(len(self._missing(cell, policy, trials)) for cell in self._plan.cells() for policy in made)
        with tqdm(total=total, unit=" trials", file=sys.stderr) as bar:
            for cell in self._plan.cells():
                run = self._retrieve if TASKS[cell[0]].write else self._read
                for policy, trial in run(cell, made, trials):
                    trials.add(trial)
                    bar.set_description(f"{cell[0]} {cell[1]} {policy.label}")
                    bar.update()
        return list(self._failed.values())

    def _missing(self, cell: CellKey, policy: Policy, trials: Trials) -> list[int]:
        if policy.digest in self._failed:
            return []
        return [sample for sample in range(self._plan.samples) if (*cell, sample, policy.digest) not in trials]

    def _retrieve(self, cell: CellKey, made: Sequence[Policy], trials: Trials) -> Iterator[tuple[Policy, Trial]]:
        """Tasks that ask for something."""
        write = TASKS[cell[0]].write
        assert write is not None
        prompts: dict[int, Prompt] = {}
        for policy in made:
            missing = self._missing(cell, policy, trials)
            while missing:
                now, missing = missing[: self._engine.max_running], missing[self._engine.max_running :]
                for sample in now:
                    if sample not in prompts:
                        prompts[sample] = write(self._plan.rng(*cell, sample), self._encode, cell[1], cell[2])
                try:
                    done = self._ask(policy, [prompts[sample] for sample in now], cell[1])
                except Exception as error:
                    self._fail(policy, error)
                    break
                for sample, (answers, fraction, mass) in zip(now, done, strict=True):
                    named = (*cell, sample, policy.attention, policy.digest)
                    score = {"score": prompts[sample].score(answers)}
                    yield policy, Trial(*named, score, fraction, mass, _said(prompts[sample], answers))

    def _ask(
        self, policy: Policy, prompts: Sequence[Prompt], length: int
    ) -> list[tuple[Sequence[str], float, float | None]]:
        """Answers, keys read and attention mass kept. One question is the engine's to answer, as for any client."""
        if any(len(prompt.turns) > 1 for prompt in prompts):
            found = [
                forced.converse(
                    self._loaded, policy.scheme, prompt, self._chunk_tokens, tokens=length, geometry=self._geometry
                )
                for prompt in prompts
            ]
            return [(answers, fraction, None) for answers, fraction in found]
        sampling = SamplingParams(temperature=0, max_tokens=max(prompt.turns[0].tokens for prompt in prompts))
        texts = [prompt.text for prompt in prompts]
        done = LLM.over(self._engine).generate(texts, sampling, dict(policy.attention))
        return [([one.text], one.usage.keys_read_fraction, one.usage.mass_kept) for one in done]

    def _read(self, cell: CellKey, made: Sequence[Policy], trials: Trials) -> Iterator[tuple[Policy, Trial]]:
        """Tasks that look at the distributions along given tokens."""
        for sample in range(self._plan.samples):
            waiting = [policy for policy in made if sample in self._missing(cell, policy, trials)]
            if not waiting:
                continue
            ids = self._given(cell, sample)
            dense = None
            if cell[0] == "agreement":
                reference = self._engine.build_scheme({"scheme": policies.DENSE})
                # Of keys and values in full, so that what int8 costs is seen.
                full = replace(self._geometry, dtype=self._loaded.dtype)
                dense = forced.answer(self._loaded, reference, ids, AGREEMENT_TOKENS, self._chunk_tokens, geometry=full)
            for policy in waiting:
                try:
                    values, fraction = self._measure(policy, ids, dense)
                except Exception as error:
                    self._fail(policy, error)
                    continue
                yield policy, Trial(*cell, sample, policy.attention, policy.digest, values, fraction)

    def _given(self, cell: CellKey, sample: int) -> list[int]:
        """The tokens that a task reads which looks at the distributions along them.

        Raises:
            ValueError: the length has no room for them, or the text is too short.
        """
        task, length, _ = cell
        spare = AGREEMENT_TOKENS if task == "agreement" else 0
        # One token of the text at least, and for perplexity another before it.
        least = spare + max(len(self._text.prefix) + 1, 1 if spare else 2)
        if length < least:
            raise ValueError(f"{length} tokens have no room for {task}, which needs {least} at least")
        return self._text.piece(self._plan.rng(*cell, sample), length - spare)

    def _measure(self, policy: Policy, ids: list[int], dense: forced.Answer | None) -> tuple[dict[str, float], float]:
        if dense is None:
            nats, fraction = forced.loss(
                self._loaded, policy.scheme, ids, len(ids) // 2, self._chunk_tokens, geometry=self._geometry
            )
            return {"loss": nats}, fraction
        other = forced.answer(
            self._loaded,
            policy.scheme,
            ids,
            len(dense.tokens),
            self._chunk_tokens,
            forced=dense.tokens,
            geometry=self._geometry,
        )
        return forced.agreement(dense, other), other.keys_read_fraction

    def _encode(self, text: str) -> list[int]:
        return self._engine.tokenize(text, True)

    def _fail(self, policy: Policy, error: Exception) -> None:
        """Gives a policy up; the others go on."""
        cause = error.__cause__ or error
        log.debug("%s failed", policy.label, exc_info=error)
        reason = str(cause) if isinstance(cause, SchemeError) else f"{type(cause).__name__}: {cause}"
        self._failed[policy.digest] = Refused(policy.attention, reason)


def _said(prompt: Prompt, answers: Sequence[str]) -> tuple[Said, ...]:
    """Answers beside what was expected; those that were not reached are empty."""
    answers = [*answers, *[""] * (len(prompt.turns) - len(answers))]
    return tuple(
        Said(answer, turn.answer, found, turn.depth)
        for turn, answer, found in zip(prompt.turns, answers, prompt.found(answers), strict=True)
    )
