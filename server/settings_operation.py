"""Settings of how a server is operated: configuration file, TLS, browsers, log, traces."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource

from .config_file import file_source
from .names import origin_of
from .settings_checks import require_opentelemetry

PREFIX = "FOVEATE_"
_NOT_SETTINGS = {"FOVEATE_CPU_ISA"}  # read by the kernels themselves


class OperationSettings(BaseSettings):
    """A flag wins over a variable, a variable over the file, the file over the default.

    Raises:
        ConfigFileError: the file is wrong.
        pydantic.ValidationError: a value is.
    """

    config: Path | None = Field(
        None, description="TOML or YAML file of settings by name, such as max_context = 4096; flags and variables win"
    )
    tls_cert: Path | None = Field(None, description="PEM file of the certificate chain; with it the server speaks TLS")
    tls_key: Path | None = Field(
        None, description="PEM file of its private key, if the certificate's file does not hold it"
    )
    cors_origin: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origin whose pages may call the server from a browser, such as https://app.example.org, or * "
        "(several: repeat the flag); none if unset",
    )
    log_format: Literal["text", "json"] = Field("text", description="form of the log: text, or a JSON object per line")
    otlp_endpoint: str | None = Field(
        None, description="where traces go: an OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        return init_settings, env_settings, file_source(settings_cls, Path(path))

    @field_validator("cors_origin", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("cors_origin")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin if origin == "*" else origin_of(origin) for origin in value)

    @field_validator("otlp_endpoint")
    @classmethod
    def _traces_can_be_sent(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an http:// or https:// URL")
            require_opentelemetry()
        return value

    @model_validator(mode="after")
    def _tls_is_complete(self) -> OperationSettings:
        if self.tls_cert is None:
            if self.tls_key is not None:
                raise ValueError("--tls-key needs --tls-cert")
            return self
        for path in (self.tls_cert, self.tls_key):
            try:
                if path is not None:
                    path.open("rb").close()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
        try:
            # No password: asked for on a terminal, it would keep the server from starting.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, password=b"")
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"--tls-cert and --tls-key are no certificate and its key without a password: {error}"
            ) from None
        return self


def told_by(name: str, given: dict[str, Any]) -> str:
    """Where the value of setting ``name`` came from, as its user wrote it; ``given`` are the flags."""
    variable = PREFIX + name.upper()
    if name not in given and os.environ.get(variable):
        return variable
    file = given.get("config") or os.environ.get(PREFIX + "CONFIG")
    return f"{file}: {name}" if file and name not in given else f"--{name.replace('_', '-')}"


def unknown_variables(names: set[str]) -> list[str]:
    """Variables that look like settings and are none."""
    known = {PREFIX + name.upper() for name in names} | _NOT_SETTINGS
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
