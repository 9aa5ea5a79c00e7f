"""What answers look like, for ``/openapi.json``."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: Schema, **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _const(value: Any) -> Schema:
    return {"const": value}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_LOGPROB: Schema = {"type": "number", "maximum": 0}
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls", "content_filter"]}

ERROR = _object({
    "error": _object({"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _maybe(_TEXT)}),
})  # fmt: skip

_ATTENTION = _object({
    "scheme": _TEXT,
    "keys_read_fraction": {"type": "number", "minimum": 0},
    "pages": _COUNT,
    "mass_kept": _maybe(_SHARE),
})  # fmt: skip
_USAGE = _object({
    "prompt_tokens": _COUNT,
    "completion_tokens": _COUNT,
    "total_tokens": _COUNT,
    "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    "attention": _ATTENTION,
})  # fmt: skip
_PROMPT_LOGPROBS = _list(_maybe({
    "type": "object",
    "additionalProperties": _object({"logprob": _LOGPROB, "rank": _maybe(_COUNT), "decoded_token": _TEXT}),
}))  # fmt: skip

_LISTS = _object({
    "tokens": _list(_TEXT),
    "token_logprobs": _list(_maybe(_LOGPROB)),
    "top_logprobs": _list(_maybe({"type": "object", "additionalProperties": _LOGPROB})),
    "text_offset": _list(_COUNT),
})  # fmt: skip
_TOKEN = {"token": _TEXT, "logprob": _LOGPROB, "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255})}
_TOKENS = _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))}))


def _answer(kind: str, choice: Schema, **more: Schema) -> Schema:
    return _object(
        {
            "id": _TEXT,
            "object": _const(kind),
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": _TEXT,
            "choices": _list(choice),
            "usage": _USAGE,
        },
        **more,
    )


COMPLETION = _answer(
    "text_completion",
    _object(
        {"index": _COUNT, "text": _TEXT, "logprobs": _maybe(_LISTS), "finish_reason": _FINISH},
        prompt_logprobs=_PROMPT_LOGPROBS,
    ),
)
CHAT = _answer(
    "chat.completion",
    _object({
        "index": _COUNT,
        "message": _object({"role": _const("assistant"), "content": _maybe(_TEXT), "refusal": {"type": "null"}}),
        "logprobs": _maybe(_object({"content": _maybe(_TOKENS), "refusal": {"type": "null"}})),
        "finish_reason": _FINISH,
    }),
    prompt_logprobs=_PROMPT_LOGPROBS,
)  # fmt: skip
_PART = _object({"type": _const("output_text"), "text": _TEXT, "annotations": _list({}), "logprobs": _TOKENS})
RESPONSE = _object({
    "id": _TEXT,
    "object": _const("response"),
    "created_at": _COUNT,
    "model": _TEXT,
    "status": {"enum": ["completed", "incomplete"]},
    "error": {"type": "null"},
    "incomplete_details": _maybe(_object({"reason": _TEXT})),
    "output": _list(_object({
        "type": _const("message"),
        "id": _TEXT,
        "status": _TEXT,
        "role": _const("assistant"),
        "content": _list(_PART),
    })),
    "store": _const(False),
    "usage": _object({
        "input_tokens": _COUNT,
        "input_tokens_details": _object({"cached_tokens": _COUNT}),
        "output_tokens": _COUNT,
        "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
        "total_tokens": _COUNT,
        "attention": _ATTENTION,
    }),
})  # fmt: skip
MODEL = _object({
    "id": _TEXT,
    "object": _const("model"),
    "created": _COUNT,
    "owned_by": _TEXT,
    "max_model_len": _COUNT,
    "dtype": _TEXT,
    "attention": _object({"default": _TEXT, "schemes": _list({"type": "object"})}),
})  # fmt: skip

# By path and method: the schema of the 200, and whether it may come as a stream of events instead.
ANSWERS: dict[tuple[str, str], tuple[Schema, bool]] = {
    ("/v1/completions", "post"): (COMPLETION, True),
    ("/v1/chat/completions", "post"): (CHAT, True),
    ("/v1/responses", "post"): (RESPONSE, True),
    ("/v1/models", "get"): (_object({"object": _const("list"), "data": _list(MODEL)}), False),
    ("/v1/models/{model}", "get"): (MODEL, False),
    ("/tokenize", "post"): (
        _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT)}),
        False,
    ),
    ("/detokenize", "post"): (_object({"prompt": _TEXT}), False),
    ("/health", "get"): (_object({"status": _const("ok")}), False),
}
