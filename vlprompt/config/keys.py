"""Keys of configurations: the dotted names of a dataclass's fields, with their types."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, get_type_hints

from vlprompt.config.run import RunConfig
from vlprompt.config.yaml import yaml_text

NAMED = ("settings", "objectives", "decomposition")
"""Sections whose keys depend on what is named."""


def _hints(part: type, prefix: str = "") -> dict[str, Any]:
    """Return the dotted keys of a dataclass with their types; nested dataclasses are sections."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(part).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found.update(_hints(hint, f"{prefix}{name}."))
        elif name not in NAMED:  # typed by the method, the objectives and the decomposition themselves
            found[prefix + name] = hint
    return found


def keys_of(root: type[Any]) -> Mapping[str, Any]:
    """Return every key of a configuration dataclass but the method's settings, with its type."""
    return types.MappingProxyType(_hints(root))


def sections_of(root: type) -> tuple[str, ...]:
    """Return the keys that hold keys."""
    own = dict.fromkeys(key.partition(".")[0] for key in keys_of(root) if "." in key)
    return (*own, *NAMED)


RUN_KEYS, SECTIONS = keys_of(RunConfig), sections_of(RunConfig)


def settings_keys(settings: type) -> dict[str, Any]:
    """Return the ``settings.*`` keys of a method's ``Settings`` dataclass with their types."""
    hints = get_type_hints(settings)
    return {f"settings.{entry.name}": hints[entry.name] for entry in dataclasses.fields(settings) if entry.init}


def to_yaml(config: Any) -> str:
    """Return ``config`` as the text of a configuration file; reading it gives an equal configuration."""
    return yaml_text(dataclasses.asdict(config))
