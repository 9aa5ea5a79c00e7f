"""Our side of a comparison: answers prompts as ``turns`` says. Started by ``compare_peers.py``."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import uuid
from pathlib import Path

from foveate.server.engine import Engine
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Event, Failed, Finished, GenerationRequest, SamplingParams


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--attention", type=json.loads, required=True)
    parser.add_argument("--quantization", required=True)
    parser.add_argument("--kv-dtype", required=True)
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--max-context", type=int, required=True)
    args = parser.parse_args()
    engine = Engine.load(
        EngineOptions(
            args.model,
            quantization=args.quantization,
            kv_dtype=args.kv_dtype,
            profile=args.profile,
            max_context=args.max_context,
            max_running=1,
            prefix_reuse=False,
        )
    )
    scheme = engine.build_scheme(args.attention)
    tell("ready")
    for line in sys.stdin:
        prompt = json.loads(Path(line.strip()).read_text())
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        params = SamplingParams(temperature=0, max_tokens=prompt["new_tokens"], ignore_eos=True)
        engine.submit(GenerationRequest(uuid.uuid4().hex, prompt["ids"], params, scheme, events.put))
        ids: list[int] = []
        while not isinstance(event := events.get(), Finished):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                if not ids:
                    tell("first")
                ids += event.token_ids
        tell("last", ids=ids)


if __name__ == "__main__":
    main()
