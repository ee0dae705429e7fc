"""What is wrong with a data set, collected while it is read: every problem at once, each with its rule's code.

The codes S01 to S20 are those of the validation rules (datasets.md 6.3). Reading for a run and ``vlprompt data check``
share the readers; a run stops at the end of reading if there are errors, a check shows all there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from vlprompt.errors import DataError

_SHOWN = 20
#: What each rule asks for, in a few words: for ``vlprompt data check --help`` and its JSON.
RULES = {
    "S01": "the file is readable: UTF-8, JSON or text lines, not too large, no repeated keys",
    "S02": "the file has the parts train, val and test; only val may be empty",
    "S03": "every item has its three or four values",
    "S04": "paths are relative, inside the image folder, in their simplest form",
    "S05": "no link leads out of the image folder",
    "S06": "labels are whole numbers from 0",
    "S07": "labels have no gaps and all occur in train",
    "S08": "labels start at 0, not at 1",
    "S09": "one usable name per label",
    "S10": "no two labels with one name",
    "S11": "no image twice",
    "S12": "no identical image files in train and test (--hash-images)",
    "S13": "sizes are those on the card",
    "S14": "the content is the published one",
    "S15": "all files and folders are there",
    "S16": "images are whole; with --decode: all decode to RGB of 8 x 8 pixels or more",
    "S17": "every class has enough training images",
    "S18": "a few-shot list belongs to this split",
    "S19": "class names hold no path separators (they are kept for prompts)",
    "S20": "classes are those of the card, in its order",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        code: The rule, ``S01`` to ``S20``.
        text: What is wrong and where.
        warning: Whether the data can be used all the same.
    """

    code: str
    text: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


class Report:
    """Collects the problems of one data set.

    Args:
        subject: What is read, for the headline: ``Data set 'dtd' under /data/dtd``.
        remedy: What helps if it cannot be used.
    """

    def __init__(self, subject: str, remedy: str) -> None:
        self.subject, self.remedy = subject, remedy
        self.problems: list[Problem] = []
        #: Facts found on the way, for the command that shows them.
        self.facts: dict[str, object] = {}

    def error(self, code: str, text: str) -> None:
        """Note a problem that makes the data unusable."""
        self.problems.append(Problem(code, text))

    def errors(self, code: str, texts: Iterable[str]) -> None:
        """Note several problems under one rule."""
        self.problems += [Problem(code, text) for text in texts]

    def warn(self, code: str, text: str) -> None:
        """Note a problem that the data can be used with."""
        self.problems.append(Problem(code, text, warning=True))

    @property
    def failed(self) -> bool:
        """Whether there is an error."""
        return any(not problem.warning for problem in self.problems)

    def stop(self) -> NoReturn:
        """Raise what was found; for where reading cannot go on."""
        raise DataError(self._text([problem for problem in self.problems if not problem.warning]))

    def finish(self) -> None:
        """Raise a :class:`~vlprompt.errors.DataError` if there are errors; hand the warnings to ``warnings``."""
        if self.failed:
            self.stop()
        for problem in self.problems:
            warnings.warn(f"{self.subject}: {problem.text}", stacklevel=3)

    def _text(self, problems: Sequence[Problem]) -> str:
        count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        lines = "\n".join(f"  - {line}" for line in problem_lines(problems))
        return f"{self.subject} cannot be used: {count}.\n{lines}\n{self.remedy}"


def problem_lines(problems: Sequence[Problem], shown: int = _SHOWN) -> list[str]:
    """Return about ``shown`` lines at most, shared out over the rules so that none hides another."""
    by_code: dict[str, list[Problem]] = {}
    for problem in problems:
        by_code.setdefault(problem.code, []).append(problem)
    each = max(3, shown // max(1, len(by_code)))
    lines = []
    for code, own in by_code.items():
        lines += [str(problem) for problem in own[:each]]
        if len(own) > each:
            lines.append(f"{code} ... and {len(own) - each:,} more")
    return lines
