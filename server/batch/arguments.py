"""Flags of ``foveate batch``."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

from ..settings import ENGINE_FIELDS

EXAMPLES = """examples:
  foveate batch requests.jsonl -o answers.jsonl
  foveate batch requests.jsonl -o answers.jsonl --errors errors.jsonl --model ./my-model --attention streaming

Each line of the input is one request, as OpenAI's batch files have them:
  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "smollm2-135m", "prompt": "Hi"}}

Stop it whenever you like, even with kill -9, and run the same command again: it goes on where it was, and every
custom_id is answered once. Answers come in the order in which they are finished.
"""
# What a line's body is held to.
_LIMITS = ("max_running", "batch_in_flight", "max_body_bytes", "max_sequences", "max_messages")
SETTINGS = ("served_model_name", *ENGINE_FIELDS, *_LIMITS)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that are no settings."""
    parser.add_argument("input", metavar="INPUT", type=Path, help="requests, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUTPUT", help="file of answers to write")
    parser.add_argument(
        "--errors", type=Path, metavar="ERRORS", help="file of error records to write (default: among the answers)"
    )
    parser.add_argument(
        "--model",
        default=SUPPRESS,
        metavar="MODEL",
        help="packaged name, local directory or hub id of the model (default: what the first line names)",
    )
    parser.add_argument("--restart", action="store_true", help="throw away what is done, and begin anew")
