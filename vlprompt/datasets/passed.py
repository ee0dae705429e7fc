"""Files that a reader passes over, counted by kind."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vlprompt.datasets.records import counted

#: Files that operating systems leave in folders, in lower case; names that begin with a dot are others.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_SHOWN = 6
_LONGEST = 40


class PassedOver:
    """Counts of files that a reader does not use, by kind, each with an example.

    Files of operating systems (``Thumbs.db``, ``.DS_Store``) and hidden files are counted apart, as ``litter``: they
    are no part of a data set.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}
        self.litter = 0

    def add(self, name: str, kind: str = "") -> None:
        """Count a file.

        Args:
            name: Its path, for the example.
            kind: Its kind; by default its suffix.
        """
        if is_litter(name.rpartition("/")[2]):
            self.litter += 1
            return
        kind = kind or kind_of(name)
        number, example = self._kinds.get(kind, (0, name))
        self._kinds[kind] = number + 1, example

    def merge(self, content: Mapping[str, tuple[int, str]], litter: int) -> None:
        """Add counts that :meth:`content` returned."""
        for kind, (number, example) in content.items():
            own, first = self._kinds.get(kind, (0, example))
            self._kinds[kind] = own + number, first
        self.litter += litter

    def content(self) -> dict[str, tuple[int, str]]:
        """Return number and example of every kind, the most frequent first."""
        return dict(sorted(self._kinds.items(), key=lambda item: (-item[1][0], item[0])))

    def counts(self) -> dict[str, int]:
        """Return the number of files of every kind, and of ``litter``, as JSON values."""
        numbers = {kind: number for kind, (number, _) in self.content().items()}
        return numbers | ({"litter": self.litter} if self.litter else {})

    def text(self) -> str:
        """Return the counts in words, without litter; empty if there is nothing else."""
        kinds = self.content()
        total = sum(number for number, _ in kinds.values())
        if not total:
            return ""
        shown = [f"{number:,} {kind} ({_short(example)})" for kind, (number, example) in list(kinds.items())[:_SHOWN]]
        if len(kinds) > _SHOWN:
            shown.append(f"and {counted(len(kinds) - _SHOWN, 'other kind')}")
        return f"{counted(total, 'file')} {'is' if total == 1 else 'are'} passed over: {', '.join(shown)}"


def is_litter(name: str) -> bool:
    """Return whether a file name is hidden or one that operating systems leave in folders."""
    return name.startswith(".") or name.lower() in _LITTER


def kind_of(name: str) -> str:
    """Return the suffix of a file name in lower case, or ``without suffix``."""
    suffix = os.path.splitext(name)[1].lower()
    return _short(suffix) if suffix.isprintable() and len(suffix) > 1 else "without suffix"


def _short(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= _LONGEST else "..." + printable[3 - _LONGEST :]
