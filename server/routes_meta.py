"""Everything that is not generation: models, tokenize, detokenize, health, readiness, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from .engine_protocol import EngineLike
from .openapi import body_schema
from .prompts import chat_prompt, check_messages, check_token_ids, tokenize_text
from .schemas import DetokenizeBody
from .schemas_chat import TokenizeChatBody, TokenizeTextBody
from .state import state_of, unavailable
from .validation import parse_request, validate

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    engine = state_of(request).served().engine
    return JSONResponse({"object": "list", "data": [_model(engine)]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> JSONResponse:
    return JSONResponse(_model(state_of(request).served_as(model).engine))


def _model(engine: EngineLike) -> dict[str, Any]:
    return {
        "id": engine.model_name,
        "object": "model",
        "created": engine.created,
        "owned_by": "foveate",
        "max_model_len": engine.context_length,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "attention": {"default": engine.default_scheme.name, "schemes": engine.schemes()},
    }


@router.post("/tokenize", openapi_extra=body_schema(TokenizeTextBody, TokenizeChatBody))
async def tokenize(request: Request) -> JSONResponse:
    state = state_of(request)
    state.served()
    data = await parse_request(request)
    if data.get("messages") is not None:
        check_messages(data, "messages", state.settings.max_messages)
        chat = validate(TokenizeChatBody, data)
        served = state.served_as(chat.model)
        tokens = await chat_prompt(chat, served, state.text)
    else:
        text = validate(TokenizeTextBody, data)
        served = state.served_as(text.model)
        tokens = await tokenize_text(text.prompt, text.add_special_tokens, served.engine, state.text)
    return JSONResponse({"count": len(tokens), "max_model_len": served.engine.context_length, "tokens": tokens})


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
async def detokenize(request: Request) -> JSONResponse:
    state = state_of(request)
    state.served()
    body = validate(DetokenizeBody, await parse_request(request))
    engine = state.served_as(body.model).engine
    token_ids = check_token_ids(body.tokens, engine, "tokens")
    return JSONResponse({"prompt": await state.text.run(engine.tokenizer.decode, token_ids)})


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    condition = state_of(request).health
    if condition != "ready":
        raise unavailable(condition)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    condition = state_of(request).readiness
    if condition != "ready":
        raise unavailable(condition)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
