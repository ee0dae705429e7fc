"""Class names: validation, and their words in prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vlprompt.errors import ClassNameError, bulleted


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Return ``class_names`` as a list of usable names (underscores kept; prompts replace them by spaces).

    Raises:
        ClassNameError: A plain string, no names, or entries that are not printable text.
    """
    if isinstance(class_names, str):
        raise ClassNameError(f"class_names is one text, {class_names!r}; expected a list of names, [{class_names!r}]")
    if not isinstance(class_names, Iterable):
        raise ClassNameError(f"class_names is {class_names!r}; expected a list of names")
    names = list(class_names)
    if not names:
        raise ClassNameError("class_names is empty; at least one class name is needed")
    wrong = [f"class {i}: {name!r}" for i, name in enumerate(names) if not _printable(name)]
    if wrong:
        raise ClassNameError("class names must be texts of printable characters:\n" + bulleted(wrong))
    return names


def _printable(name: object) -> bool:
    if not isinstance(name, str):
        return False
    # Zero-width joiners occur in emoji sequences, Persian and Hindi; without other characters they are no name.
    shown = name.replace("\u200c", "").replace("\u200d", "")
    return bool(shown.replace("_", " ").strip()) and shown.isprintable()


def words_of(name: str) -> str:
    """Return a class name as used in prompts: underscores become spaces (CoOp: trainers/coop.py 103)."""
    return name.replace("_", " ")


def rows_of(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the index of each of the ``wanted`` names in ``class_names``; repeated names are taken in turn."""
    seen: Counter[str] = Counter()
    rows = []
    for name in wanted:
        places = [row for row, known in enumerate(class_names) if known == name]
        rows.append(places[min(seen[name], len(places) - 1)])
        seen[name] += 1
    return rows
