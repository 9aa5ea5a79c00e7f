"""Fields that say nothing about the answer: labels, checked and then without effect, and how a stream is kept alive."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from .validation import Body, at_most

MAX_LABEL_CHARS = 512
MAX_PAIRS = 16  # OpenAI's bounds of metadata, as the two below
_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Field(max_length=MAX_PAIRS), at_most(MAX_PAIRS)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False

    @field_validator("include_obfuscation")
    @classmethod
    def _not_offered(cls, value: bool) -> bool:
        if value:
            raise ValueError("obfuscation of streams is not supported")
        return value


class LabelledBody(Body):
    """Labels and stream options of every request for generation.

    Attributes:
        user: Who asks, for the client's own books, as the next two. The server neither keeps nor shows them.
        safety_identifier: As ``user``.
        prompt_cache_key: Prefixes are found by their tokens; ``cache_salt`` keeps them apart.
        metadata: The client's own notes.
        request_id: The answer's id is made of it. It names nothing inside the server.
        sse_ping_interval: Seconds between comments in a stream that has nothing else to say.
    """

    user: str | None = Field(None, max_length=MAX_LABEL_CHARS)
    safety_identifier: str | None = Field(None, max_length=MAX_LABEL_CHARS)
    prompt_cache_key: str | None = Field(None, max_length=MAX_LABEL_CHARS)
    metadata: Metadata | None = None
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")

    stream: bool = False
    stream_options: StreamOptions | None = None
    sse_ping_interval: int | None = Field(None, ge=1, le=3600)

    @field_validator("stream_options", "sse_ping_interval")
    @classmethod
    def _of_a_stream(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and not info.data.get("stream"):
            raise ValueError(f"{info.field_name} needs stream=true")
        return value
