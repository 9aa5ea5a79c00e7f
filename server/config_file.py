"""``--config FILE``: settings from a TOML or YAML file, read by pydantic-settings."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

_SOURCES: dict[str, Any] = {
    ".toml": lambda settings, path: TomlConfigSettingsSource(settings, toml_file=path),
    ".yaml": lambda settings, path: YamlConfigSettingsSource(settings, yaml_file=path),
    ".yml": lambda settings, path: YamlConfigSettingsSource(settings, yaml_file=path),
}


class ConfigFileError(ValueError):
    """The file cannot be read, or holds something that is no setting. The message is one line and names the file."""


def file_source(settings: type[BaseSettings], path: Path) -> PydanticBaseSettingsSource:
    """The settings in ``path``.

    Raises:
        ConfigFileError: no such file, not the format that its name says, or a key that is no field of ``settings``.
    """
    read = _SOURCES.get(path.suffix.lower())
    if read is None:
        raise ConfigFileError(f"{path}: the name must end in {', '.join(_SOURCES)}")
    try:
        path.open("rb").close()  # pydantic-settings passes a missing file over
        source: PydanticBaseSettingsSource = read(settings, path)
        values = source()
    except OSError as error:
        raise ConfigFileError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:  # the last two: no table, or names that are no text
        raise ConfigFileError(f"{path}: {_one_line(error)}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        raise ConfigFileError(f"{path}: {_one_line(error)}") from None
    names = [name for name in settings.model_fields if name != "config"]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name).replace("-", "_"), names, 1)
            raise ConfigFileError(f"{path}: there is no setting {name!r}" + (f"; is it {near[0]!r}?" if near else ""))
    return source


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
