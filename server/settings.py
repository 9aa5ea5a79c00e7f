"""Every setting of the server: one table, read by the command line, the environment and the code.

Each field is also the flag ``--field-name`` of ``foveate serve`` and the variable
``FOVEATE_FIELD_NAME``; a flag wins over a variable, and a variable over the file of ``--config``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeError

from .settings_checks import read_keys
from .settings_operation import PREFIX, OperationSettings

# Fields that shape the engine rather than the HTTP server: `foveate generate` takes these too.
ENGINE_FIELDS = (
    "dtype",
    "device",
    "quantization",
    "page_size",
    "kv_dtype",
    "kv_cache_gib",
    "max_context",
    "max_batch_tokens",
    "attention",
    "profile",
    "cache_dir",
    "cache_disk_gib",
    "cache_min_tokens",
    "audit_rate",
    "trust_remote_code",
)


class Settings(OperationSettings):
    """Settings of one server.

    Raises:
        pydantic.ValidationError: a value is out of range.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    model: str = Field(min_length=1, description="packaged name, local directory or hub id of the model")
    served_model_name: str | None = Field(None, min_length=1, description="name that clients use; the model's if unset")
    host: str = Field("127.0.0.1", description="address to listen on; others on the network see 0.0.0.0")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_key: Annotated[list[SecretStr], NoDecode] = Field(
        [],
        description="key that clients must send (several: repeat the flag, or separate by commas in the "
        "variable, which other users of the machine cannot read)",
    )
    api_key_file: Path | None = Field(None, description="file of such keys, one per line; read again on SIGHUP")
    admin_key: Annotated[list[SecretStr], NoDecode] = Field(
        [], description="key that the admin paths need, and that opens every other path too (several: as --api-key)"
    )
    admin_key_file: Path | None = Field(None, description="file of admin keys, one per line; read again on SIGHUP")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="element type of the model")
    device: str = Field("auto", description="torch device, such as cpu or cuda:0")
    quantization: Literal["none", "int8", "int8wo", "int4", "int4wo"] = Field(
        "none",
        description="weights of the linear layers in fewer bits, on a CPU: int8 and int4 (activations in 8), int8wo "
        "and int4wo (weights only)",
    )
    page_size: int | None = Field(None, description="tokens per KV page: 16, 32, 64 or 128; by device if unset")
    kv_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="element type of the KV cache: the model's, or int8 with a scale per token and head (CPU only)",
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="memory of the KV cache in GiB; a share of what is free if unset"
    )
    max_context: int | None = Field(None, ge=1, description="tokens of prompt and answer; the model's own if unset")
    max_batch_tokens: int = Field(512, ge=1, description="tokens computed per step; long prompts go in such chunks")
    max_running: int = Field(
        256,
        ge=1,
        description="answers written at once, each choice of a request one; at most half of max_batch_tokens",
    )
    step_seconds: float = Field(
        0.25,
        gt=0,
        allow_inf_nan=False,
        description="time of a step while answers are written: chunks of long prompts shrink to fit",
    )
    max_queued_requests: int = Field(256, ge=1, description="requests that may wait; more are answered 429")
    max_queued_tokens: int = Field(1_000_000, ge=1, description="prompt tokens that may wait; more are answered 429")
    attention: Annotated[dict[str, Any] | None, NoDecode] = Field(
        None,
        description="default attention: a scheme's name, or JSON such as "
        '\'{"scheme": "streaming", "budget_tokens": 1024}\'; dense if unset',
    )
    profile: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="calibration profile, as `foveate calibrate` writes it (several: repeat the flag)"
    )
    prefix_reuse: bool = Field(True, description="reuse KV pages of prompts that begin alike")
    cache_dir: str | None = Field(
        None, min_length=1, description="directory that keeps KV pages of prompts, so that they outlive the server"
    )
    cache_disk_gib: float = Field(
        16.0, gt=0, allow_inf_nan=False, description="bound of the files in --cache-dir in GiB; the oldest go first"
    )
    cache_min_tokens: int = Field(1, ge=1, description="shorter prompts are not kept in --cache-dir")
    audit_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of decode steps in which the attention mass that selections kept is measured",
    )
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral", "plain"] = Field(
        "auto", description="how the model writes calls of tools; auto sees that from its chat template"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="bytes of a request's body; more is answered 413")
    max_header_bytes: int = Field(32 * 2**10, ge=1024, description="bytes of a request's headers; more is answered 431")
    max_sequences: int = Field(64, ge=1, description="prompts times n of one request")
    max_messages: int = Field(2048, ge=1, description="messages of one chat request")
    batch_dir: Path | None = Field(
        None, description="directory of /v1/files and /v1/batches; without it these paths are closed"
    )
    batch_in_flight: int = Field(64, ge=1, description="lines of batch files that are in work at once")
    max_batch_lines: int = Field(50_000, ge=1, description="lines of one batch on the server")
    max_file_bytes: int = Field(256 * 2**20, ge=1024, description="bytes of an uploaded file; more is answered 413")
    max_stored_bytes: int = Field(
        16 * 2**30, ge=1024, description="bytes of all files in --batch-dir before uploads stop"
    )
    request_timeout: float = Field(
        3600, gt=0, allow_inf_nan=False, description="seconds for one answer, waiting included"
    )
    read_seconds: float = Field(30, gt=0, allow_inf_nan=False, description="time for a client to send its request")
    write_seconds: float = Field(
        30, gt=0, allow_inf_nan=False, description="time that a client may stop reading, or read too slowly"
    )
    stall_seconds: float = Field(
        120, ge=2, allow_inf_nan=False, description="time without a step of the engine before /health says so"
    )
    drain_seconds: float = Field(30, ge=0, allow_inf_nan=False, description="time for running answers after SIGTERM")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field("info", description="what is logged")

    @field_validator("host")
    @classmethod
    def _host_can_be_looked_up(cls, value: str) -> str:
        try:
            value.encode("idna")  # as the look-up does
        except UnicodeError:
            raise ValueError(f"{value!r} is no name of a host") from None
        return value

    @field_validator("api_key", "admin_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple)):
            return value
        keys = [key.strip() if isinstance(key, str) else key for key in value]
        if "" in keys:
            raise ValueError("an API key must not be empty")
        try:
            "".join(key for key in keys if isinstance(key, str)).encode()
        except UnicodeEncodeError:
            raise ValueError("an API key must be UTF-8 text") from None
        return keys

    @field_validator("api_key_file", "admin_key_file")
    @classmethod
    def _holds_keys(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_keys(value)
        return value

    @field_validator("profile", mode="before")
    @classmethod
    def _split_profiles(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("page_size")
    @classmethod
    def _page_size_is_power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value not in (16, 32, 64, 128):
            raise ValueError("must be 16, 32, 64 or 128")
        return value

    @field_validator("attention", mode="before")
    @classmethod
    def _name_or_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value.lstrip().startswith("{"):
            return {"scheme": value.strip()}
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a scheme's name and not valid JSON: {error}") from None

    @field_validator("attention")
    @classmethod
    def _scheme_exists(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Said before a model is loaded."""
        name, options = "dense", dict(value or {})
        if "scheme" in options:
            name = options.pop("scheme")
        if name not in registry.names():
            raise ValueError(f"unknown attention scheme {name!r}; there are: {', '.join(registry.names())}")
        if options:  # only then, since it takes torch
            try:
                registry.check(name, **options)
            except SchemeError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("profile")
    @classmethod
    def _profiles_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not Path(path).is_file():
                raise ValueError(f"there is no file {path}")
        return value
