"""Type annotations of settings: bounds as metadata, their text in messages, and strict types for pydantic."""

from __future__ import annotations

import dataclasses
import functools
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, Strict
from pydantic_core import PydanticCustomError


# -- metadata of annotations ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Words:
    """Text that replaces the generated one in messages: ``Annotated[Positive | None, Words("1 or more, or null")]``."""

    words: str


@dataclasses.dataclass(frozen=True)
class Holds:
    """A condition on a value, with its text in messages: ``Annotated[str, Holds(str.isalpha, "letters")]``."""

    condition: Callable[[Any], bool]
    words: str


@dataclasses.dataclass(frozen=True)
class _Multiline:
    """Marks a text that may contain line breaks and tabs."""


@dataclasses.dataclass(frozen=True)
class TextList:
    """Marks a list of templates and texts; an empty list is replaced by the data set's template."""


Positive: TypeAlias = Annotated[int, Ge(1)]
Count: TypeAlias = Annotated[int, Ge(0)]
#: Larger whole numbers are not exact as JSON numbers, and libraries in C do not take them.
_LARGEST = 2**53
Seed: TypeAlias = Annotated[int, Ge(0), Le(2**32 - 1)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Above0: TypeAlias = Annotated[float, Gt(0)]
Fraction: TypeAlias = Annotated[float, Ge(0), Le(1)]
Below1: TypeAlias = Annotated[float, Ge(0), Lt(1)]
Name: TypeAlias = Annotated[str, MinLen(1)]
Lines: TypeAlias = Annotated[str, _Multiline()]
_TEMPLATE_WORDS = "a text with {} once, for the class name"
Template: TypeAlias = Annotated[str, Holds(lambda text: text.count("{}") == 1, _TEMPLATE_WORDS)]


# -- texts of classes -------------------------------------------------------------------------------------------------
REFERENCES = ("ensemble:", "file:", "descriptors:")
"""Prefixes of an entry that names templates or texts; see :mod:`vlprompt.config.texts`."""
Sentence: TypeAlias = str | tuple[str, float]
"""A sentence of one class, with its weight if that is not 1; ``{}`` in it stands for the class name."""
ClassTexts: TypeAlias = Mapping[str, tuple[Sentence, ...]]
"""Sentences by class name."""
Texts: TypeAlias = str | ClassTexts | tuple[str | ClassTexts, float]
"""An entry of a list of texts: a template, a reference or the sentences of each class, with a weight if any."""


def _is_reference(text: str) -> bool:
    return any(text.startswith(prefix) and text != prefix for prefix in REFERENCES)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and type(value[1]) in (int, float)


def _weighted(value: Any, check: Callable[[Any], Any]) -> Any:
    """Return ``check(value)``; of a pair of a value and a weight, the pair with its value checked."""
    if not _is_pair(value):
        return check(value)
    if not 0 < value[1] < float("inf"):
        raise _refused(f"the weight is {value[1]}, not a finite number above 0")
    return check(value[0]), float(value[1])


def _check_sentence(value: Any) -> str:
    """Return a sentence with single spaces; published files have line breaks, which CLIP's tokenizer removes."""
    if not isinstance(value, str) or not value.strip() or value.count("{}") > 1:
        raise _refused(f"{value!r} is no sentence")
    return _check_text(" ".join(value.split()))


def _check_class_texts(value: Mapping[Any, Any]) -> ClassTexts:
    checked: dict[str, tuple[Sentence, ...]] = {}
    if len(value) == 1 and f"{(name := next(iter(value)))}:" in REFERENCES:  # a data set has more than one class
        what = "PATH" if name != "ensemble" else "NAME"
        raise _refused(f"a mapping holds the sentences of each class, and {name!r} is no class; write '{name}:{what}'")
    for name, given in value.items():
        sentences = [given] if isinstance(given, str) else given
        if not isinstance(name, str) or not isinstance(sentences, (list, tuple)) or not sentences:
            raise _refused(f"class {name!r} has no list of sentences")
        checked[name] = tuple(_weighted(sentence, _check_sentence) for sentence in sentences)
    if not checked:
        raise _refused("there are no classes")
    return checked


def _check_texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _check_class_texts(value)
    if not isinstance(value, str) or (value.count("{}") != 1 and not _is_reference(value)):
        raise _refused()
    return _check_text(value)


def _texts_entry(value: Any) -> Any:
    return _weighted(value, _check_texts)


def checked_texts(values: Any) -> tuple[Texts, ...]:
    """Return a list of templates and texts; raises ValueError, if need be with the reason."""
    return tuple(map(_texts_entry, _check_list(values)))


def _texts_list(value: Any) -> Any:
    """Return a list; a reference and the sentences of classes may be given without one."""
    single = isinstance(value, Mapping) or (isinstance(value, str) and _is_reference(value))
    return [value] if single else value


TextsEntry: TypeAlias = Annotated[
    Texts,
    BeforeValidator(_texts_entry),
    Words(f"{_TEMPLATE_WORDS}, ensemble:NAME, file:PATH, or sentences by class; with a weight: [it, 0.5]"),
]
Templates: TypeAlias = Annotated[tuple[TextsEntry, ...], MinLen(1), BeforeValidator(_texts_list), TextList()]
OpenTemplates: TypeAlias = Annotated[tuple[TextsEntry, ...], BeforeValidator(_texts_list), TextList()]


# -- hints ------------------------------------------------------------------------------------------------------------
F = TypeVar("F", bound=Callable[..., Any])


def cached(function: F) -> F:
    """Return ``functools.cache`` of a function, with the signature kept for type checkers."""
    return functools.cache(function)  # type: ignore[return-value]


@cached
def field_hints(kind: type) -> Mapping[str, Any]:
    """Return the annotations of the init fields of a dataclass, with their bounds."""
    hints = get_type_hints(kind, include_extras=True)
    return types.MappingProxyType({entry.name: hints[entry.name] for entry in dataclasses.fields(kind) if entry.init})


def options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the hint itself."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (hint,)


def bare(hint: Any) -> Any:
    """Return a hint without its metadata, and without ``None`` if that leaves a single alternative."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    some = [option for option in options(hint) if option is not type(None)]
    return bare(some[0]) if len(some) < len(options(hint)) == 2 else hint


def literals(hint: Any) -> list[Any]:
    """Return the values of the Literals in a hint."""
    kinds = [bare(option) for option in options(hint)]
    return [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]


def is_list(hint: Any) -> bool:
    """Return whether a bare hint is a list or tuple."""
    return (get_origin(hint) or hint) in (list, tuple, Sequence, Iterable)


def is_mapping(hint: Any) -> bool:
    """Return whether a bare hint is a mapping with arbitrary keys."""
    return (get_origin(hint) or hint) in (dict, Mapping)


def is_dataclass(hint: Any) -> bool:
    """Return whether a bare hint is a dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def is_texts(hint: Any) -> bool:
    """Return whether a hint is a list of templates and texts."""
    return TextList() in _metadata(hint)


def _metadata(hint: Any) -> tuple[Any, ...]:
    return tuple(hint.__metadata__) if get_origin(hint) is Annotated else ()


# -- words ------------------------------------------------------------------------------------------------------------
_PLAIN_WORDS: Mapping[Any, str] = {
    int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null",
    Any: "any value",
}  # fmt: skip


def accepted_values(hint: Any) -> str:
    """Return the accepted values of a hint as text: ``"a whole number of 1 or more"``, ``"'all', 'base' or 'new'"``."""
    metadata = _metadata(hint)
    for entry in metadata:
        if isinstance(entry, Words | Holds):
            return entry.words
    inner = get_args(hint)[0] if metadata else hint
    args = get_args(inner)
    if get_origin(inner) is Literal:
        return _either([repr(value) for value in args])
    if get_origin(inner) in (Union, types.UnionType):
        return _either([accepted_values(option) for option in args])
    if is_list(inner):
        return _list_words(inner, metadata)
    if inner in _PLAIN_WORDS:
        return _PLAIN_WORDS[inner] + (_length_words(metadata) if inner is str else _range_words(metadata))
    if is_dataclass(inner):
        names = list(field_hints(inner))
        return "a table of " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return "a table" if is_mapping(inner) else str(getattr(inner, "__name__", inner))


def _either(words: list[str]) -> str:
    if len(words) == 1:
        return words[0]
    bounded = any(len(word.split()) > 3 for word in words)  # "a whole number of 1 or more, or null"
    return ", ".join(words[:-1]) + (", or " if bounded else " or ") + words[-1]


def _list_words(hint: Any, metadata: Iterable[Any]) -> str:
    args = get_args(hint)
    items = [arg for arg in args if arg is not Ellipsis]
    if get_origin(hint) is tuple and Ellipsis not in args and items:
        return f"a list of {len(items)}: " + ", ".join(accepted_values(item) for item in items)
    length = _length_words(metadata, "items")
    return f"a list{length}, each item {accepted_values(items[0])}" if items else f"a list{length}"


def _bounds(metadata: Iterable[Any], *names: str) -> Iterator[Any]:
    """Yield the bounds ``names`` of an annotation, None for a missing bound."""
    entries = list(metadata)
    for name in names:
        yield next((getattr(entry, name) for entry in entries if hasattr(entry, name)), None)


def _length_words(metadata: Iterable[Any], unit: str = "characters") -> str:
    least, most = _bounds(metadata, "min_length", "max_length")
    if (least, most) == (1, None):
        return " that is not empty"
    words = _range_words([Ge(least)] * (least is not None) + [Le(most)] * (most is not None))
    return words and f"{words} {unit}"


def _range_words(metadata: Iterable[Any]) -> str:
    """Return the text for bounds, to follow "a whole number"."""
    least, above, most, below = _bounds(metadata, "ge", "gt", "le", "lt")
    upper = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    if above is not None:
        return f" above {above}" + (f", {upper}" if upper else "")
    if least is None:
        return f" {'of ' if most is not None else ''}{upper}".rstrip()
    return f" from {least} to {upper.removeprefix('at most ')}" if upper else f" of {least} or more"


# -- strict hints for pydantic ----------------------------------------------------------------------------------------
def _refused(why: str = "") -> PydanticCustomError:
    return PydanticCustomError("refused", "{why}", {"why": why})


def _check_text(text: str, allowed: str = "") -> str:
    odd = "" if text.isprintable() else text.translate(dict.fromkeys(map(ord, allowed)))
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in odd):
        raise _refused("the text holds control characters or is not valid UTF-8")
    return text


def _check_size(number: int) -> int:
    if abs(number) > _LARGEST:
        raise _refused(f"it is beyond {_LARGEST:,}")
    return number


def _check_lines(text: str) -> str:
    return _check_text(text, "\n\t")


def _check_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _refused()
    return value


def _check_literal(choices: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise _refused()
    return value


def _check_condition(holds: Holds, value: Any) -> Any:
    if not holds.condition(value):
        raise _refused()
    return value


def strict(hint: Any) -> Any:
    """Return a hint for pydantic: strict scalars, tuples for lists and tuples, dicts for mappings."""
    metadata = _metadata(hint)
    if metadata:
        inner = get_args(hint)[0]
        checks = [
            AfterValidator(functools.partial(_check_condition, entry)) for entry in metadata if isinstance(entry, Holds)
        ]
        base = Annotated[str, Strict(), AfterValidator(_check_lines)] if _Multiline() in metadata else strict(inner)
        parts = (base, *metadata, *checks)
        return Annotated[parts]
    origin, args = get_origin(hint), get_args(hint)
    if hint is str:
        return Annotated[str, Strict(), AfterValidator(_check_text)]
    if hint is int:
        return Annotated[int, Strict(), AfterValidator(_check_size)]
    if hint in (float, bool):
        return Annotated[hint, Strict()]
    if origin is Literal:
        return Annotated[hint, BeforeValidator(functools.partial(_check_literal, args))]
    if origin in (Union, types.UnionType):
        return Union[tuple(strict(option) for option in args)]  # noqa: UP007
    if is_list(hint):
        of_any_length = origin is not tuple or Ellipsis in args
        items = tuple(strict(arg) for arg in args if arg is not Ellipsis) or (Any,)
        tuples = tuple[items[0], ...] if of_any_length else tuple[items]  # type: ignore[valid-type]
        return Annotated[tuples, BeforeValidator(_check_list)]
    if is_mapping(hint):
        key, value = args or (Any, Any)
        return dict[strict(key), strict(value)]  # type: ignore[misc]
    return hint
