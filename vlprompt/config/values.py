"""Values of configuration keys: what a type hint accepts in words, and a value checked and turned into that type.

jsonargparse judges the types; around it stand the rules that it leaves open: null only where the hint says so, quoted
numbers stay texts, and numbers are finite.
"""

from __future__ import annotations

import functools
import math
import types
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from vlprompt.config.yaml import yaml_node, yaml_value
from vlprompt.errors import ConfigError


def accepted_values(hint: Any) -> str:
    """Return in words what a type hint accepts: ``"a whole number"``, ``"'all', 'base' or 'new'"``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = [repr(value) for value in args]
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
    if origin in (Union, types.UnionType):
        return " or ".join(accepted_values(arg) for arg in args)
    if _is_list(hint):
        inner = [arg for arg in args if arg is not Ellipsis]
        if origin is tuple and Ellipsis not in args and inner:
            return f"a list of {len(inner)}: " + ", ".join(accepted_values(arg) for arg in inner)
        return f"a list, each item {accepted_values(inner[0])}" if inner else "a list"
    names_of: dict[Any, str] = {
        int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null",
        Any: "any value",
    }  # fmt: skip
    if hint in names_of:
        return names_of[hint]
    return "a mapping" if (origin or hint) in (dict, Mapping) else str(getattr(hint, "__name__", hint))


def _is_list(hint: Any) -> bool:
    return (get_origin(hint) or hint) in (list, tuple, Sequence, Iterable)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def literals(hint: Any) -> list[Any]:
    """Return the values that the Literal parts of ``hint`` name."""
    return [value for option in _options(hint) if get_origin(option) is Literal for value in get_args(option)]


@functools.cache
def _parser(hint: Any) -> ArgumentParser:
    # JSON mode: texts are not read as YAML a second time.
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")
    parser.add_argument("--value", type=hint)
    return parser


def convert(hint: Any, value: Any) -> Any:
    """Return ``value`` as ``hint`` wants it: an int becomes a float, a list a tuple.

    Raises:
        ValueError: It does not fit; the text, if any, says why.
    """
    _refuse_odd(value)
    options = _options(hint)
    if Any in options or (isinstance(value, str) and str in options):
        return value
    if value is None:
        if type(None) in options:
            return None
        raise ValueError
    try:
        result = _parser(hint).parse_object({"value": value}).value
    except (ArgumentError, OverflowError, RecursionError) as error:
        raise ValueError from error
    if not _same_texts(value, result):
        raise ValueError
    return result


def _refuse_odd(value: Any) -> None:
    """Raise ValueError for what no key means: numbers that are not finite, texts with control characters."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    if isinstance(value, str) and any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise ValueError("the text holds control characters or is not valid UTF-8")
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_odd(item)


def _same_texts(value: Any, result: Any) -> bool:
    """Return whether texts stayed texts: jsonargparse would read the quoted ``"3"`` as a number."""
    if isinstance(value, list):
        return len(value) == len(result) and all(_same_texts(a, b) for a, b in zip(value, result, strict=True))
    return not isinstance(value, str) or isinstance(result, str)


def from_text(hint: Any, text: str) -> Any:
    """Return the value of command-line ``text``: as it stands where ``hint`` takes texts, else read as YAML.

    Raises:
        ValueError: It does not fit; the text, if any, says why.
    """
    options = _options(hint)
    if text in ("null", "~") and type(None) in options:
        return None
    if text in literals(hint) or (str in options and not set(options) - {str, type(None)}):
        return convert(hint, text)
    try:
        loader, node = yaml_node(text)
        return convert(hint, None if node is None else yaml_value(loader, node))
    except ConfigError as error:
        if str not in options:
            raise ValueError(str(error).removeprefix("line 1: ")) from None
    except ValueError:
        if str not in options:
            raise
    return convert(hint, text)
