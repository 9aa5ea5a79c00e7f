"""``foveate generate``: one answer, written to the terminal as it comes."""

from __future__ import annotations

import sys
from argparse import Namespace
from time import monotonic

from tqdm import tqdm

from .chat_template import ChatTemplate
from .errors import ApiError
from .exceptions import EngineError, InvalidRequest
from .request import Delta, Event, Progress, SamplingParams, Usage
from .sampling_limits import check_sampling
from .schemas_chat import ChatPromptBody
from .settings import ENGINE_FIELDS, Settings


def run(given: Namespace, settings: Settings) -> int:
    """Answers ``given.prompt``: text on standard output, progress and figures on standard error."""
    from .llm import LLM

    prompt = given.prompt
    if given.file is not None:
        try:
            prompt = f"{given.file.read_text(encoding='utf-8')}\n\n{prompt}"
        except (OSError, UnicodeDecodeError) as error:
            print(f"foveate: cannot read {given.file}: {error}", file=sys.stderr)
            return 1
    sampling = SamplingParams(
        max_tokens=given.max_tokens, temperature=given.temperature, top_p=given.top_p, seed=given.seed
    )
    try:
        check_sampling(sampling, sys.maxsize)  # now, not after the model is loaded; no flag names a token
    except InvalidRequest as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    options = {name: getattr(settings, name) for name in ENGINE_FIELDS}
    try:
        llm = LLM(settings.model, **options)
    except Exception as error:  # whatever is wrong with a model, its loader says it best
        print(f"foveate: cannot load {settings.model}: {error}", file=sys.stderr)
        return 1
    try:
        tokenizer = llm.engine.tokenizer
        if tokenizer.chat_template and not given.raw:
            chat = ChatPromptBody.model_validate({"messages": [{"role": "user", "content": prompt}]})
            ids = ChatTemplate(tokenizer).render(chat)
        else:
            ids = llm.engine.tokenize(prompt, True)
        with Terminal(len(ids)) as terminal:
            [completion] = llm.generate([ids], sampling, on_event=terminal.show)
        terminal.sum_up(completion.usage)
    except (ApiError, EngineError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    finally:
        llm.close()
    return 0


class Terminal:
    """Shows the events of one request: a bar for the prompt, then the text."""

    def __init__(self, prompt_tokens: int) -> None:
        self._bar = tqdm(total=prompt_tokens, desc="reading the prompt", unit=" tokens", leave=False, mininterval=0)
        self._start = monotonic()
        self._first: float | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def show(self, prompt: int, event: Event) -> None:
        """Takes one event of the only prompt."""
        if isinstance(event, Progress):
            self._bar.update(event.processed - self._bar.n)
        elif isinstance(event, Delta):
            self._bar.close()
            if self._first is None:
                self._first = monotonic()
            print(event.text, end="\n" if event.finish_reason else "", flush=True)

    def sum_up(self, usage: Usage) -> None:
        """One line of figures."""
        end = monotonic()
        first = end if self._first is None else self._first
        written = f"{usage.completion_tokens} written"
        if usage.completion_tokens > 1 and end > first:  # a rate is of what lies between two tokens
            written += f" at {(usage.completion_tokens - 1) / (end - first):.1f} tokens/s"
        mass = "" if usage.mass_kept is None else f", {usage.mass_kept:.1%} of the attention mass kept"
        print(
            f"{usage.prompt_tokens} tokens read in {first - self._start:.2f} s, "
            f"{written}; {usage.scheme}: {usage.keys_read_fraction:.1%} of the keys read{mass}, {usage.pages} pages",
            file=sys.stderr,
        )
