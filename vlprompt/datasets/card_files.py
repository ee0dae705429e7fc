"""Reading of a card's YAML file, which is untrusted input: all problems at once; no tags, code or outside paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlprompt._files import read_text
from vlprompt.config.types import field_hints, refusal, validate
from vlprompt.config.yaml import yaml_node, yaml_value
from vlprompt.datasets.card import Card
from vlprompt.datasets.options import OPTIONS, FolderOptions
from vlprompt.errors import ConfigError, DataError, bulleted, did_you_mean

_LARGEST_CARD = 1_000_000
_REQUIRED = ("schema", "name", "task", "reader", "reader_options", "classes", "templates", "metric")
#: Fields of a card that are not in its file.
_NOT_IN_FILE = ("split", "options", "file", "kept")


def read_card(path: Path, *, of_user: bool = False) -> Card:
    """Read and check one card file.

    Args:
        path: The file.
        of_user: Whether it is a card of the user, which may have an absolute ``root``.

    Raises:
        DataError: If the file is not YAML, or has missing, unknown or ill-typed fields; all are listed.
    """
    try:
        loader, node = yaml_node(read_text(path, _LARGEST_CARD))
        content = None if node is None else yaml_value(loader, node)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"Data set card {path} cannot be read: {first.rstrip('.')}.") from error
    if not isinstance(content, dict):
        raise DataError(f"Data set card {path} is not a table of fields.")
    problems: list[str] = []
    card = _card(content, path, of_user, problems)
    if card is None or problems:
        raise DataError(f"Data set card {path} is not valid:\n{bulleted(problems)}")
    return card


def _card(content: dict[Any, Any], path: Path, of_user: bool, problems: list[str]) -> Card | None:
    problems += [f"{name} is missing" for name in _REQUIRED if name not in content]
    if "schema" in content and (content["schema"] != 1 or isinstance(content["schema"], bool)):
        problems.append(f"schema is {content['schema']!r}; this version reads schema 1")
    reader = content.get("reader", "folder")
    options = _options(reader, content.get("reader_options"), "reader", problems)
    hidden = _NOT_IN_FILE if of_user else (*_NOT_IN_FILE, "root")
    known = [name for name in field_hints(Card) if name not in hidden]
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in known:
            values[name] = value
        elif name not in ("schema", "reader_options"):
            problems.append(f"there is no field {name!r}.{did_you_mean(str(name), known)}")
    splits = values.get("splits", {})
    if isinstance(splits, Mapping):
        values["splits"] = {name: _split(name, split, reader, problems) for name, split in splits.items()}
        values["split"] = next(iter(splits), "")
    card, wrong = validate(Card, {**values, "options": options or FolderOptions(), "file": str(path)})
    problems += [problem.text for problem in wrong if not (problem.missing and problem.key in _REQUIRED)]
    return card


def _split(name: Any, split: Any, reader: Any, problems: list[str]) -> Any:
    """Return a split with its ``reader_options`` read by the split's reader, else the card's."""
    if not isinstance(split, Mapping) or not split.keys() & {"reader", "reader_options"}:
        return split
    reader = split.get("reader", reader)
    options = _options(reader, split.get("reader_options"), f"splits.{name}.reader", problems)
    return {**split, "reader": str(reader), "reader_options": options}


def _options(reader: Any, content: Any, where: str, problems: list[str]) -> Any:
    """Return the options of ``reader`` in ``content``, or None; problems are added to ``problems``."""
    if not isinstance(reader, str) or reader not in OPTIONS:
        problems.append(f"{where} is {reader!r}.{did_you_mean(str(reader), OPTIONS)}")
        return None
    if not isinstance(content, Mapping | None):
        problems.append(refusal(f"{where}_options", content, OPTIONS[reader]))
        return None
    options, wrong = validate(OPTIONS[reader], content or {}, f"{where}_options")
    problems += [problem.text for problem in wrong]
    return options
