"""Keys of configurations: the dotted field names of dataclasses, their types, and values by key."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vlprompt.config.hints import bare, field_hints, is_dataclass
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.config.yaml import Given, plain, yaml_text

NAMED = ("settings", "objectives", "decomposition")
"""Sections with keys that depend on the method, objective or decomposition."""


def keys_of(root: type[Any], prefix: str = "") -> Mapping[str, Any]:
    """Return every key of a configuration or settings dataclass with its type; nested dataclasses are sections.

    The sections :data:`NAMED` are omitted: their keys depend on the method, the objectives and the decomposition.
    """
    keys: dict[str, Any] = {}
    for name, hint in field_hints(root).items():
        if is_dataclass(nested := bare(hint)):
            keys |= keys_of(nested, f"{prefix}{name}.")
        elif prefix + name not in NAMED:
            keys[prefix + name] = hint
    return types.MappingProxyType(keys)


def sections_of(root: type) -> tuple[str, ...]:
    """Return the keys of a configuration that are sections."""
    return (*dict.fromkeys(key.partition(".")[0] for key in keys_of(root) if "." in key), *NAMED)


RUN_KEYS, SECTIONS = keys_of(RunConfig), sections_of(RunConfig)
_RIVALS = {
    f"recipe.{name}": f"recipe.{other}"
    for name, implied in RecipeConfig.implied.items()
    for other, value in implied.items()
    if value is None
}


def rival_of(key: str, value: Any) -> str | None:
    """Return the key whose less specific value is void if ``key`` has this value: ``recipe.epochs`` for steps."""
    return None if value in (None, "null", "~") else _RIVALS.get(key)


def settings_keys(settings: type) -> Mapping[str, Any]:
    """Return the ``settings.*`` keys of a method's ``Settings`` dataclass with their types."""
    return keys_of(settings, "settings.")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):  # null came first; the section replaces it
                place[section] = {}
            place = place[section]
        place[name] = {**(place.get(name) or {}), **value} if isinstance(value, Mapping) else value
    return tree


def merged(values: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings merged; the values of ``more`` override those of ``values``."""
    both = dict(values) if isinstance(values, Mapping) else {}
    for name, value in more.items():
        both[name] = merged(both.get(name), value) if isinstance(value, Mapping) else value
    return both


def keys_in(text: str, known: Iterable[str]) -> list[str]:
    """Return the ``known`` keys named in the text of a problem; after "; accepted" only keys with a dot."""
    first, _, rest = text.partition(";")
    words = re.findall(r"\w+(?:\.\w+)*", first) + re.findall(r"\w+(?:\.\w+)+", rest)
    return [word for word in dict.fromkeys(words) if word in known]


def sources(keys: Iterable[str], given: Mapping[str, Given]) -> str:
    """Return the sources of the values of ``keys``."""
    return " and ".join(dict.fromkeys(given[key].source for key in keys if key in given)) or "defaults"


def as_plain(config: Any) -> dict[str, Any]:
    """Return a dataclass, such as a configuration, as nested mappings and lists that survive a JSON round trip."""
    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


def to_yaml(config: Any, origin: Callable[[str], str] | None = None) -> str:
    """Return ``config`` as the text of a configuration file that reads back as an equal configuration.

    Args:
        config: A configuration dataclass.
        origin: Returns the source of the value of a dotted key; it becomes a comment on the line.
    """
    values = as_plain(config)
    return yaml_text(values) if origin is None else "".join(f"{line}\n" for line in _annotated(values, origin))


def _annotated(values: Mapping[str, Any], origin: Callable[[str], str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _annotated(value, origin, f"{prefix}{name}.")
        else:
            first, *more = (indent + line for line in yaml_text({name: value}).splitlines())
            yield f"{first:<48}  # {origin(prefix + name)}"
            yield from more
