"""Class names: validation, and their words in prompts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vlprompt.errors import ClassNameError, bulleted

#: Names that two classes of ImageNet share in the published lists (CoOp: classnames.txt).
PUBLISHED_TWINS = frozenset({"missile", "sunglasses"})


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


def check_distinct(class_names: Sequence[str], tokens: Callable[[str], Sequence[int]]) -> None:
    """Warn of class names whose prompts are equal: text cannot tell these classes apart.

    Names are compared as the tokenizer reads them: case, underscores, runs of spaces and Unicode forms do not
    distinguish them.

    Args:
        class_names: Names of the C classes.
        tokens: Byte-pair ids of a text, without truncation.

    Raises:
        ClassNameError: Two names are identical, apart from ImageNet's (:data:`PUBLISHED_TWINS`).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for label, name in enumerate(class_names):
        groups.setdefault(tuple(tokens(words_of(name))), []).append(label)
    equal = [labels for labels in groups.values() if len(labels) > 1]
    twins = [
        f"{name!r}: classes {', '.join(map(str, places))}"
        for labels in equal
        for name in dict.fromkeys(class_names[label] for label in labels)
        if name not in PUBLISHED_TWINS and len(places := [at for at in labels if class_names[at] == name]) > 1
    ]
    if twins:
        raise ClassNameError(
            "class names appear twice; their prompts would be equal, and one of the classes would never be predicted:\n"
            + bulleted(twins, limit=10)
        )
    alike = [
        ", ".join(f"{class_names[label]!r} (class {label})" for label in labels)
        for labels in equal
        if len({class_names[label] for label in labels}) > 1
    ]
    if alike:
        warnings.warn(
            "class names have the same tokens, and text cannot tell their classes apart:\n"
            f"{bulleted(alike, limit=10)}\nGive the classes other names, or merge them.",
            stacklevel=4,
        )


def rows_of(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the index of each of the ``wanted`` names in ``class_names``; repeated names are taken in turn."""
    seen: Counter[str] = Counter()
    rows = []
    for name in wanted:
        places = [row for row, known in enumerate(class_names) if known == name]
        rows.append(places[min(seen[name], len(places) - 1)])
        seen[name] += 1
    return rows
