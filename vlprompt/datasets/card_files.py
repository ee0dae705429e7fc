"""Reads a card's YAML file: typed, bounded, every problem at once. A card is data: no tags, code or paths outside."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlprompt.config.yaml import yaml_node, yaml_value
from vlprompt.datasets.card import Card, Classes, Licence
from vlprompt.datasets.options import OPTIONS
from vlprompt.datasets.records import class_name_problem
from vlprompt.errors import ConfigError, DataError, bulleted, did_you_mean

_LARGEST_CARD = 1_000_000
_REQUIRED = ("schema", "name", "task", "reader", "reader_options", "classes", "templates", "metric")
#: Fields of a card that are not written in its file.
_NOT_IN_FILE = ("split", "options", "file")
_PARTS = ("train", "val", "test")


class _Wrong(ValueError):
    """A value that a field does not accept; the text says what it does accept."""


def read_card(path: Path, *, own: bool = False) -> Card:
    """Read and check one card file.

    Args:
        path: The file.
        own: Whether it is the user's own, which may name an absolute ``root``.

    Raises:
        DataError: If the file is not YAML, or has missing, unknown or ill-typed fields; all are listed.
    """
    try:
        if path.stat().st_size > _LARGEST_CARD:
            raise DataError(f"Data set card {path} is larger than {_LARGEST_CARD:,} bytes.")
        loader, node = yaml_node(path.read_text(encoding="utf-8"))
        content = None if node is None else yaml_value(loader, node)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"Data set card {path} cannot be read: {first.rstrip('.')}.") from error
    if not isinstance(content, dict):
        raise DataError(f"Data set card {path} is not a table of fields.")
    problems: list[str] = []
    card = _card(content, own, problems)
    if card is None or problems:
        raise DataError(f"Data set card {path} is not valid:\n{bulleted(problems)}")
    return dataclasses.replace(card, file=str(path))


def _card(content: dict[Any, Any], own: bool, problems: list[str]) -> Card | None:
    problems += [f"field {name!r} is missing" for name in _REQUIRED if name not in content]
    if "schema" in content and (content["schema"] != 1 or isinstance(content["schema"], bool)):
        problems.append(f"schema is {content['schema']!r}; this version reads schema 1")
    rest = {key: value for key, value in content.items() if key not in ("schema", "reader_options")}
    reader = content.get("reader")
    options = None
    if not isinstance(reader, str) or reader not in OPTIONS:
        problems.append(f"reader is {reader!r}.{did_you_mean(str(reader), OPTIONS)}")
    else:
        options = _table(OPTIONS[reader], content.get("reader_options"), "reader_options", problems)
        rest["splits"] = _with_readers(rest.get("splits", {}), reader, problems)
    hidden = () if own else ("root",)
    fields = _fields(Card, rest, "", problems, (*_NOT_IN_FILE, *hidden))
    if problems or options is None:
        return None
    card = Card(options=options, split=next(iter(fields.get("splits", {})), ""), **fields)
    problems += _card_problems(card)
    return card


def _with_readers(splits: Any, reader: str, problems: list[str]) -> Any:
    """Return ``splits`` whose own ``reader_options`` are read by the split's reader, or else the card's."""
    if not isinstance(splits, dict):
        return splits
    filled = {}
    for name, split in splits.items():
        if isinstance(split, dict) and ("reader" in split or "reader_options" in split):
            own = split.get("reader", reader)
            if not isinstance(own, str) or own not in OPTIONS:
                problems.append(f"splits.{name}.reader is {own!r}.{did_you_mean(str(own), OPTIONS)}")
                continue
            where = f"splits.{name}.reader_options"
            split = {
                **split,
                "reader": own,
                "reader_options": _table(OPTIONS[own], split.get("reader_options"), where, problems),
            }
        filled[name] = split
    return filled


# -- typed values -----------------------------------------------------------------------------------------------------
def _table(kind: type[Any], content: Any, where: str, problems: list[str]) -> Any:
    """Return a ``kind`` filled from ``content``, or None where that cannot be done."""
    if content is None:
        content = {}
    if kind is Licence and isinstance(content, str):
        content = {"text": content}
    if not isinstance(content, dict):
        problems.append(f"{where} is {content!r}; a table is expected")
        return None
    before = len(problems)
    fields = _fields(kind, content, f"{where}.", problems, ())
    needed = [entry.name for entry in dataclasses.fields(kind) if _needed(entry) and entry.name not in content]
    problems += [f"{where}.{name} is missing" for name in needed]
    return kind(**fields) if len(problems) == before else None


def _needed(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _fields(
    kind: type[Any], content: Mapping[Any, Any], prefix: str, problems: list[str], hidden: Iterable[str]
) -> dict[str, Any]:
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in hidden}
    found = {}
    for key, value in content.items():
        if key not in hints:
            problems.append(f"unknown field {prefix + str(key)!r}.{did_you_mean(str(key), hints)}")
            continue
        try:
            found[key] = _value(hints[key], value, prefix + key, problems)
        except _Wrong as error:
            problems.append(f"{prefix}{key} is {_shown(value)}; {error}")
    return found


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if dataclasses.is_dataclass(value):  # options that _with_readers has read already
            return value
        return _value(next(arg for arg in args if arg is not type(None)), value, where, problems)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise _Wrong(did_you_mean(str(value), map(str, args)).strip() or "another word is expected")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _table(hint, value, where, problems)
    if origin is tuple:
        listed = [value] if isinstance(value, str) and args[0] is str else value
        if not isinstance(listed, list):
            raise _Wrong("a list is expected")
        return tuple(_value(args[0], one, f"{where}[{index}]", problems) for index, one in enumerate(listed))
    if origin is Mapping:
        if args == (str, str) and isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = {one: one for one in value}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _Wrong("a table is expected")
        return {key: _value(args[1], one, f"{where}.{key}", problems) for key, one in value.items()}
    return _plain(hint, value)


def _plain(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint is bool and not isinstance(value, bool):
        raise _Wrong("true or false is expected")
    if hint is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _Wrong("a count is expected")
    if hint is str and not isinstance(value, str):
        raise _Wrong("text is expected (quote it)")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- what the fields mean together ------------------------------------------------------------------------------------
def _card_problems(card: Card) -> list[str]:
    problems = [
        f"{where} is {path!r}; a path inside the data root is expected" for where, path in _paths(card) if _leaves(path)
    ]
    templates = {"single": (card.templates.single,), **card.templates.ensembles}
    for name, group in templates.items():
        wrong = [one for one in group if one.count("{}") != 1 or one.count("{") != 1 or one.count("}") != 1]
        problems += [f"templates.{name} has {template!r}; it needs {{}} exactly once" for template in wrong[:3]]
        if not group:
            problems.append(f"templates.{name} is empty")
    if card.multilabel != card.metric.startswith("map"):
        problems.append(f"task is {card.task} but metric is {card.metric}; map and map_11point go with multilabel")
    problems += _class_problems(card.classes)
    for name in card.splits:
        if name.endswith(".json"):
            problems.append(f"splits.{name}: a name that ends in .json means a split file of the user's")
    by_part = getattr(card.options, "splits", {})
    problems += [
        f"reader_options.splits.{part} is no part.{did_you_mean(part, _PARTS)}"
        for part in by_part
        if part not in _PARTS
    ]
    for word in [card.name, *card.aliases, *card.group, *card.domains]:
        if not word or not word.isprintable() or "," in word or word != word.strip():
            problems.append(f"the name {word!r} is not usable; letters, digits, - and _ are")
    if not card.folders:
        problems.append("folders is empty; the data set's folder under the data root is expected")
    return problems


def _class_problems(classes: Classes) -> list[str]:
    count, problems = classes.count, []
    if count == 0:
        problems.append("classes.count is 0; one class or more is expected")
    if classes.names_from == "list" and not classes.names:
        problems.append("classes.names_from is list but classes.names is missing")
    for field in ("names", "keys"):
        listed = getattr(classes, field)
        if listed and len(listed) != count:
            problems.append(f"classes.{field} has {len(listed)} entries but classes.count is {count}")
    problems += [
        f"classes.names[{i}]: {text}" for i, name in enumerate(classes.names) if (text := class_name_problem(name))
    ]
    if len(set(classes.keys)) != len(classes.keys):
        problems.append("classes.keys names something twice")
    return problems


def _paths(card: Card) -> Iterable[tuple[str, str]]:
    """Yield every path that the card holds, with the field it stands in."""
    yield from (("folders", path) for path in card.folders)
    yield from (("domains", path) for path in card.domains.values())
    yield from (("excluded", path) for path in card.excluded)
    for source in card.sources:
        yield from (("sources", path) for path in (source.unpack, source.strip, source.inner, source.to) if path)
    for options in [card.options, *(split.reader_options for split in card.splits.values())]:
        for name in ("image_dir", "split_file", "archive", "names_file"):
            if isinstance(path := getattr(options, name, None), str):
                yield f"reader_options.{name}", path
        if not isinstance(splits := getattr(options, "splits", {}), Mapping):
            continue
        for paths in [*splits.values(), tuple(getattr(options, "folders", {}).values())]:
            yield from (("reader_options.splits", path) for path in paths if isinstance(paths, tuple))


def _leaves(path: str) -> bool:
    return path.startswith(("/", "~")) or "\\" in path or ".." in path.split("/") or path[1:2] == ":" or "\0" in path
