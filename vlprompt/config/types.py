"""Validated dataclasses: types and bounds are read from annotations, and all problems are reported at once.

:func:`validated` makes a frozen dataclass whose values pydantic checks. Scalars are strict (``True`` is no int, ``"3"``
no number, ``3.0`` no int; an int is accepted for a float), lists become tuples, mappings become nested dataclasses, and
NaN and infinity are refused. Bounds are part of the annotation: ``depth: Annotated[int, Ge(1), Le(12)]``, or one of
the aliases below. Constraints between fields are checked by ``__post_init__``, which raises ConfigError.

Example:
    >>> from typing import Literal
    >>> @validated("settings")
    ... class Settings:
    ...     depth: Positive = 9
    ...     mode: Literal["front", "end"] = "end"
    >>> Settings(depth=2)
    Settings(depth=2, mode='end')
    >>> _, problems = validate(Settings, {"depth": 0, "mode": "ende"})
    >>> for problem in problems:
    ...     print(problem.text)
    settings.depth is 0; accepted: a whole number of 1 or more
    settings.mode is 'ende'; accepted: 'front' or 'end'. Did you mean 'end'?
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar, cast, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from vlprompt.config.hints import (
    Above0,
    Below1,
    Count,
    Fraction,
    Holds,
    Lines,
    Name,
    NonNegative,
    OpenTemplates,
    Positive,
    Seed,
    Template,
    Templates,
    Texts,
    Words,
    accepted_values,
    bare,
    cached,
    field_hints,
    is_dataclass,
    is_list,
    is_mapping,
    is_texts,
    literals,
    options,
    strict,
)
from vlprompt.config.texts import SINGLE, DataTexts
from vlprompt.config.yaml import shown, yaml_node, yaml_value
from vlprompt.errors import ConfigError, nearest

__all__ = [
    "Above0", "Below1", "Count", "Fraction", "Ge", "Gt", "Holds", "Le", "Lines", "Lt", "MaxLen", "MinLen",
    "Name", "NonNegative", "OpenTemplates", "Positive", "Problem", "Seed", "Template", "Templates", "Texts", "Words",
    "accepted_values", "convert", "expanded", "field_default", "field_hints", "fill_templates", "from_text", "literals",
    "make", "over_defaults", "refusal", "validate", "validated",
]  # fmt: skip

T = TypeVar("T")


# -- dataclasses ------------------------------------------------------------------------------------------------------
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)
"""Whether ``__post_init__`` is deferred: :func:`validate` calls it after all fields are set."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(where: str = "settings") -> Callable[[type[T]], type[T]]:
    """Return a decorator that makes a frozen dataclass with checked values.

    ``dataclasses.fields``, ``replace`` and ``asdict`` work as for any dataclass. ``__post_init__`` may raise
    ConfigError for contradicting values; its text has one line per problem and names fields as ``where.field``.

    Args:
        where: Section of the fields, for error messages; ``""`` for none.

    Raises:
        ConfigError: Raised by the class for values that are not accepted; the text lists all of them.
    """
    namespace = sys._getframe(1).f_locals

    def decorate(cls: type[T]) -> type[T]:
        hints = get_type_hints(cls, localns=namespace, include_extras=True)
        annotations = cls.__dict__.get("__annotations__", {})
        cls.__annotations__ = {
            name: hint if _is_class_variable(hint := hints[name]) else strict(hint) for name in annotations
        }
        if "__post_init__" in cls.__dict__:
            cls.__post_init__ = _deferrable(cls.__post_init__)  # type: ignore[attr-defined]
        checked_class: Any = pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls)
        checked_class.__init__ = _checked_init(checked_class, where)
        checked_class.__where__ = where
        return checked_class  # type: ignore[no-any-return]

    return decorate


def _is_class_variable(hint: Any) -> bool:
    return hint is ClassVar or get_origin(hint) is ClassVar


def _deferrable(check: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        if not _DEFERRED.get():
            check(self)

    return __post_init__


def _checked_init(cls: Any, where: str) -> Callable[..., None]:
    names = [entry.name for entry in dataclasses.fields(cls) if entry.init]

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & values.keys():
            raise TypeError(f"{cls.__name__} takes the values {', '.join(names)}, each once")
        vars(self).update(vars(make(cls, {**given, **values}, where)))

    return __init__


# -- validation -------------------------------------------------------------------------------------------------------
class Problem(NamedTuple):
    """A problem: the dotted ``key``, the full ``text``, and whether the value is ``missing``."""

    key: str
    text: str
    missing: bool = False


def validate(kind: type[T], values: Mapping[str, Any], where: str | None = None) -> tuple[T | None, list[Problem]]:
    """Return an instance of a dataclass built from ``values``, and every problem of the values.

    A field that is a dataclass accepts an instance, or a mapping that overrides values of the field's default.
    Contradictions (``__post_init__``) are listed together with values that are not accepted, unless they involve them.

    Args:
        kind: A :func:`validated` dataclass.
        values: Values by field name.
        where: Prefix of field names in keys; None for the prefix of the class, empty for none.

    Returns:
        The instance, or None if it cannot be built, and the list of problems.
    """
    if "__where__" not in vars(kind):
        raise TypeError(f"{kind.__qualname__} is not decorated with @validated")
    declared: str = vars(kind)["__where__"]
    where = declared if where is None else where
    problems: list[Problem] = []
    token = _DEFERRED.set(True)
    try:
        instance, refused = _make(kind, values, where, problems)
        if refused:  # the other values are checked with defaults in place of refused ones
            instance, _ = _make(kind, _without(values, refused), where, [])
    finally:
        _DEFERRED.reset(token)
    if instance is None:
        return None, problems
    wrong = {problem.key for problem in problems}
    for text in _contradictions(instance, where):
        keys = re.findall(r"\w+(?:\.\w+)*", text)
        if not wrong.intersection(keys):
            problems.append(Problem(keys[0] if keys else where, text))
    return (None if problems else instance), problems


def make(kind: type[T], values: Mapping[str, Any], where: str | None = None) -> T:
    """Return an instance of a dataclass built from ``values``; see :func:`validate`.

    Raises:
        ConfigError: Values are not accepted; the text lists all of them.
    """
    instance, problems = validate(kind, values, where)
    if instance is None:
        raise ConfigError("\n".join(problem.text for problem in problems))
    return instance


_Path: TypeAlias = tuple[str, ...]


def _make(kind: Any, values: Mapping[str, Any], where: str, problems: list[Problem]) -> tuple[Any, list[_Path]]:
    """Return an instance, or None and the paths of refused fields; problems are added to ``problems``."""
    complete = over_defaults(kind, values)
    try:
        return kind.__pydantic_validator__.validate_python(complete), []
    except ValidationError as error:
        by_path: dict[str, Problem] = {}
        refused = []
        for entry in error.errors(include_url=False):
            place = _Place(kind, complete, where).at(entry["loc"])
            refused.append(place.names)
            text, missing = place.text(entry.get("ctx", {}).get("why", "")), place.is_missing
            by_path.setdefault(place.path, Problem(place.key, text, missing))
        problems += by_path.values()
        return None, refused


@dataclasses.dataclass
class _Place:
    """A place in nested values: its hint, its value, the dotted path, and the field names that lead to it."""

    hint: Any
    value: Any
    path: str
    names: _Path = ()
    key: str = ""
    siblings: Sequence[str] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def at(self, steps: tuple[Any, ...]) -> _Place:
        """Return the place that pydantic's ``steps`` lead to; a union counts as one place."""
        for number, step in enumerate(steps):
            kind = bare(self.hint)
            if is_dataclass(kind) and isinstance(self.value, Mapping):
                hints = field_hints(kind)
                self.siblings, self.renamed = list(hints), getattr(kind, "renamed", {})
                self.hint, self.value = hints.get(step, MISSING), self.value.get(step, MISSING)
                self.path = f"{self.path}.{step}".removeprefix(".")
                self.names, self.key = (*self.names, str(step)), self.path
            elif is_list(kind) and isinstance(self.value, (list, tuple)) and step in range(len(self.value)):
                items = [arg for arg in get_args(kind) if arg is not Ellipsis] or [Any]
                self.hint, self.value = items[step if step < len(items) else 0], self.value[step]
                self.path += f"[{step}]"
            elif is_mapping(kind) and steps[number + 1 :] == ("[key]",):
                self.hint, self.value = (*get_args(kind), Any)[0], step
                self.path += ": a key"
                break
            elif is_mapping(kind) and step in self.value:
                self.hint, self.value = (*get_args(kind), Any, Any)[1], self.value[step]
                self.path += f".{step}"
            else:
                break
        return self

    def text(self, why: str = "") -> str:
        """Return the text of the problem here; ``why`` gives a reason beyond the accepted values."""
        if self.hint is MISSING:
            section = self.path.removesuffix(self.names[-1])
            if self.names[-1] in self.renamed:
                return f"there is no key {shown(self.path)}. It is called {section}{self.renamed[self.names[-1]]} now."
            near = nearest(self.names[-1][:100], self.siblings)
            names = [repr(section + name) for name in near] or [section + name for name in self.siblings[:12]]
            hint = f"Did you mean {' or '.join(names)}?" if near else f"Accepted: {', '.join(names)}."
            return f"there is no key {shown(self.path)}. {hint}"
        if self.is_missing:
            return f"{self.path} is missing; accepted: {accepted_values(self.hint)}"
        return refusal(self.path, self.value, self.hint, why)

    @property
    def is_missing(self) -> bool:
        """Whether a field without a default has no value."""
        return self.value is MISSING and self.hint is not MISSING


def refusal(key: str, value: Any, hint: Any, why: str = "") -> str:
    """Return the text for a value that ``hint`` does not accept, with the nearest accepted value."""
    choices = {str(choice): choice for choice in literals(hint)}
    near = nearest(value[:100], choices, 1) if isinstance(value, str) else []
    meant = f". Did you mean {choices[near[0]]!r}?" if near else ""
    takes_text = str in {bare(option) for option in options(hint)}
    quotes = ", in quotes" if takes_text and isinstance(value, (int, float)) else ""
    return f"{key} is {shown(value)}{f' ({why})' if why else ''}; accepted: {accepted_values(hint)}{quotes}{meant}"


def over_defaults(kind: Any, values: Mapping[str, Any], defaults: Any = None) -> dict[str, Any]:
    """Return the values of the instance ``defaults`` overridden by ``values``, nested dataclasses included.

    A class may declare ``implied``: values that other fields get from a value of a field, unless they are in
    ``values``, too.
    """
    complete = {} if defaults is None else {name: getattr(defaults, name) for name in field_hints(kind)}
    implied: Mapping[str, Mapping[str, Any]] = getattr(kind, "implied", {})
    for name, value in values.items():
        nested = bare(field_hints(kind).get(name))
        if is_dataclass(nested) and isinstance(value, Mapping):
            default = complete.get(name, field_default(kind, name))
            value = over_defaults(nested, value, default if isinstance(default, nested) else None)
        complete[name] = value
        if value is not None:
            complete |= {other: new for other, new in implied.get(name, {}).items() if other not in values}
    return complete


def field_default(kind: Any, name: str) -> Any:
    """Return the default of a dataclass field, or MISSING."""
    entry = next(entry for entry in dataclasses.fields(kind) if entry.name == name)
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _without(values: Mapping[str, Any], refused: Iterable[_Path]) -> dict[str, Any]:
    """Return a copy of nested mappings without the values at these paths."""
    inner: dict[str, list[_Path]] = {}
    for name, *rest in refused:
        inner.setdefault(name, []).append(tuple(rest))
    return {
        name: _without(value, inner[name]) if name in inner else value
        for name, value in values.items()
        if name not in inner or (isinstance(value, Mapping) and () not in inner[name])
    }


def _contradictions(instance: Any, where: str) -> list[str]:
    """Return the problems that ``__post_init__`` of this and of nested dataclasses raise; keys start with ``where``."""
    kind = type(instance)
    problems = []
    for name in field_hints(kind):
        for path, value in _items(getattr(instance, name), f"{where}.{name}".removeprefix(".")):
            problems += _contradictions(value, path)
    try:
        getattr(instance, "__post_init__", lambda: None)()
    except ConfigError as error:
        declared = kind.__where__
        text = (
            re.sub(rf"\b{re.escape(declared)}\.", f"{where}." if where else "", str(error)) if declared else str(error)
        )
        problems += text.splitlines()
    return problems


def _items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the validated dataclasses in ``value``, itself included, with their paths."""
    if hasattr(type(value), "__where__"):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _items(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _items(item, f"{path}.{key}")


# -- templates --------------------------------------------------------------------------------------------------------
def fill_templates(
    settings: T, data: DataTexts, class_names: Sequence[str] = (), templates: Sequence[Texts] = (SINGLE,)
) -> T:
    """Return validated settings with templates and sentences in every list of texts.

    An empty open list gets ``templates``, references get what they name. Nested settings use the templates of the outer
    settings if those have such a field. Settings with derived lists have a method ``with_derived_texts``.

    Args:
        settings: An instance of a :func:`validated` dataclass.
        data: The templates of the data set.
        class_names: Classes that files of sentences must have.
        templates: Default of empty lists.

    Raises:
        ConfigError: A reference cannot be resolved, or the number of templates contradicts other fields.
    """
    settings = expanded(settings)
    values: dict[str, Any] = {}
    hints = field_hints(type(settings))
    for name in (name for name, hint in hints.items() if is_texts(hint)):
        given = getattr(settings, name)
        key = f"{getattr(type(settings), '__where__', '')}.{name}".removeprefix(".")
        resolved = data.resolve(given or templates, key, class_names)
        if resolved != given:
            values[name] = resolved
        templates = resolved
    for name in hints:
        nested = getattr(settings, name)
        if hasattr(type(nested), "__where__"):
            filled = fill_templates(nested, data, class_names, templates)
            if filled is not nested:
                values[name] = filled
    return dataclasses.replace(cast(Any, settings), **values) if values else settings


def expanded(settings: T) -> T:
    """Return ``settings`` with derived lists of texts written out, if they have any."""
    derived: T = getattr(settings, "with_derived_texts", lambda: settings)()
    return derived


# -- single values ----------------------------------------------------------------------------------------------------
@cached
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(strict(hint), config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def convert(hint: Any, value: Any) -> Any:
    """Return ``value`` converted to ``hint``: int to float, list to tuple.

    Raises:
        ValueError: The value is not accepted; the text, if any, gives the reason.
    """
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        why = [entry.get("ctx", {}).get("why", "") for entry in error.errors(include_url=False)]
        raise ValueError("".join(why[:1])) from None


def from_text(hint: Any, text: str) -> Any:
    """Return the value of command-line ``text``: the text itself if ``hint`` accepts texts, else its YAML value.

    Raises:
        ValueError: The value is not accepted; the text, if any, gives the reason.
    """
    kinds = {bare(option) for option in options(hint)}
    if text in ("null", "~") and type(None) in kinds:
        return None
    if text in literals(hint) or (str in kinds and kinds <= {str, type(None)}):
        return convert(hint, text)
    try:
        loader, node = yaml_node(text)
        return convert(hint, None if node is None else yaml_value(loader, node))
    except ConfigError as error:
        if str not in kinds:
            raise ValueError(str(error).removeprefix("line 1: ")) from None
    except ValueError:
        if str not in kinds:
            raise
    return convert(hint, text)
