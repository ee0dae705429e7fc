"""Values of a configuration that have no effect: named once, and recorded as their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vlprompt.config.effect import without_effect
from vlprompt.config.keys import as_plain
from vlprompt.config.meta import MetaRunConfig
from vlprompt.config.run import RunConfig
from vlprompt.config.texts import depends_on_data
from vlprompt.config.types import field_default, make
from vlprompt.errors import bulleted
from vlprompt.methods.registry import get_method_class, given_texts
from vlprompt.objectives import get_objective_class
from vlprompt.prompts.decomposed import get_decomposition_class

C = TypeVar("C", RunConfig, MetaRunConfig)
_NAMED: dict[str, Callable[[str], Any]] = {"objectives": get_objective_class, "decomposition": get_decomposition_class}


def idle_keys(config: RunConfig) -> dict[str, str]:
    """Return the values of ``config`` without effect by dotted key, each with the reason; defaults are included.

    Args:
        config: A configuration with all settings (:func:`vlprompt.runs.session.complete`).
    """
    kind = get_method_class(config.method)
    settings: Any = make(kind.Settings, config.settings)
    off = _of_parts(config)
    off |= without_effect(config.recipe, "recipe") | kind.idle(config)
    own = kind.texts_setting(settings)
    if own is not None and not any(
        map(depends_on_data, given_texts(config.method, config.settings, config.objectives).values())
    ):
        off["data.template"] = f"the texts of {config.method} are settings.{own}"
    return off


def _of_parts(config: RunConfig | MetaRunConfig) -> dict[str, str]:
    """Return the settings without effect of the method, its objectives and its decomposition."""
    off = without_effect(make(get_method_class(config.method).Settings, config.settings), "settings")
    for section, find in _NAMED.items():
        for name, values in getattr(config, section).items():
            off |= without_effect(make(find(name).Settings, values), f"{section}.{name}")
    return off


def searched_over(config: RunConfig) -> dict[str, str]:
    """Return the settings that the method's own search replaces by dotted key, each with the reason."""
    settings: Any = make(get_method_class(config.method).Settings, config.settings)
    found = settings.searched() if hasattr(settings, "searched") else {}
    return {f"settings.{name}": reason for name, reason in found.items()}


def without_idle(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return ``config`` with defaults for its values without effect, and a line for each value that differs.

    Args:
        config: A configuration with all settings.
    """
    defaults = {"recipe": as_plain(get_method_class(config.method).recipe)}
    defaults |= {name: as_plain(field_default(RunConfig, name)) for name in ("data", "trainer")}
    return _reset(config, idle_keys(config), defaults)


def without_idle_meta(config: MetaRunConfig) -> tuple[MetaRunConfig, list[str]]:
    """Return :func:`without_idle` of a meta-training."""
    off = _of_parts(config) | without_effect(config.tasks, "tasks") | without_effect(config.meta, "meta")
    defaults = {name: as_plain(field_default(MetaRunConfig, name)) for name in ("tasks", "meta")}
    return _reset(config, off, defaults)


def _reset(config: C, off: Mapping[str, str], defaults: dict[str, Any]) -> tuple[C, list[str]]:
    """Return ``config`` with defaults for the values ``off``, and a line for each value that differs.

    Args:
        config: The configuration.
        off: Its keys without effect, with the reasons.
        defaults: The defaults of its sections other than settings, objectives and decomposition.
    """
    plain, sections = as_plain(config), list(defaults)
    defaults = {"settings": as_plain(make(get_method_class(config.method).Settings, {})), **defaults}
    for section, find in _NAMED.items():
        defaults[section] = {name: as_plain(make(find(name).Settings, {})) for name in getattr(config, section)}
    lines = []
    for key, reason in off.items():
        *path, last = key.split(".")
        values, default = plain, defaults
        for name in path:
            values, default = values[name], default[name]
        if values.get(last, default[last]) != default[last]:
            lines.append(f"{key} {values[last]!r}: {reason}")
            values[last] = default[last]
    if not lines:
        return config, []
    changed = {name: plain[name] for name in ("settings", *_NAMED)}
    made = {name: make(type(getattr(config, name)), plain[name], name) for name in sections}
    return dataclasses.replace(config, **changed, **made), lines


def note(lines: list[str]) -> str:
    """Return the text that names values without effect."""
    few = len(lines) == 1
    count, them = ("a setting has", "it") if few else (f"{len(lines)} settings have", "them")
    return f"{count} no effect, and the record of the run leaves {them} out:\n{bulleted(lines)}"
