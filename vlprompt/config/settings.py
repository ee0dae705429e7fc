"""Types of settings that come from Python or from a head's JSON; the command line has checked its own already."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlprompt.errors import ConfigError, did_you_mean


def check_types(settings: type, given: Mapping[str, Any], where: str = "settings") -> None:
    """Raise ConfigError that lists every value in ``given`` that is not of its field's type in ``settings``.

    Args:
        settings: The ``Settings`` dataclass of a method or an objective.
        given: Values by field name; names are those of fields.
        where: The section they stand in, for messages.
    """
    hints = get_type_hints(settings)
    wrong = []
    for name, value in given.items():
        if not _fits(hints[name], value):
            near = did_you_mean(value, get_args(hints[name])) if _is_choice(hints[name], value) else ""
            wrong.append(f"{where}.{name} is {value!r}; accepted: {_in_words(hints[name])}.{near}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _is_choice(hint: Any, value: Any) -> bool:
    return get_origin(hint) is Literal and isinstance(value, str)


def _fits(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin in (Sequence, list, tuple):
        item = args[0] if args else Any
        return isinstance(value, (list, tuple)) and all(_fits(item, entry) for entry in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return value is None if hint in (None, type(None)) else True


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(arg) for arg in args)
    if origin in (Sequence, list, tuple):
        return f"a list, each entry {_in_words(args[0])}" if args else "a list"
    words = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a text", type(None): "None"}
    return words.get(hint, str(hint))


def check_settings(settings: Any, where: str = "settings", **least: float) -> None:
    """Raise ConfigError unless the named settings are finite numbers, as large as said or larger."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not low <= value < float("inf"):
            raise ConfigError(f"{where}.{name} is {value}; accepted: {low:g} or more")
