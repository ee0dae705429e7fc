"""Problems of a data set, collected while it is read, each with the code of its rule.

The rules S01 to S22 are listed in :data:`RULES`. Runs and ``vlprompt data check`` share the readers: a run raises after
reading if there are errors, a check shows all problems.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from vlprompt.datasets.passed import PassedOver
from vlprompt.errors import DataError

_SHOWN = 20
#: Requirement of each rule, for ``vlprompt data check --help`` and its JSON output.
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
    "S10": "no two labels share a name, nor names that give the same prompt",
    "S11": "no image occurs twice",
    "S12": "no identical image files in train and test (--hash-images)",
    "S13": "sizes match the card",
    "S14": "the content matches the published split",
    "S15": "all files and folders exist",
    "S16": "images are complete; with --decode, all decode to RGB of 8 x 8 pixels or more",
    "S17": "every class has enough training images",
    "S18": "a few-shot list belongs to this split",
    "S19": "class names have no path separators (they are kept for prompts)",
    "S20": "classes match the card, in its order",
    "S21": "no file is passed over",
    "S22": "class names are words, not numbers or identifiers",
}


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    Attributes:
        code: The rule, ``S01`` to ``S22``.
        text: What is wrong and where.
        warning: Whether the data can still be used.
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
        remedy: What to do if it cannot be used.
    """

    def __init__(self, subject: str, remedy: str) -> None:
        self.subject, self.remedy = subject, remedy
        self.problems: list[Problem] = []
        #: Files that the reader does not use.
        self.passed = PassedOver()
        #: Facts collected while reading, for ``vlprompt data check``.
        self.facts: dict[str, object] = {}

    def error(self, code: str, text: str) -> None:
        """Add an error: the data cannot be used."""
        self.problems.append(Problem(code, text))

    def errors(self, code: str, texts: Iterable[str]) -> None:
        """Add several errors of one rule."""
        self.problems += [Problem(code, text) for text in texts]

    def warn(self, code: str, text: str) -> None:
        """Add a warning: the data can still be used."""
        self.problems.append(Problem(code, text, warning=True))

    @property
    def failed(self) -> bool:
        """Whether there is an error."""
        return any(not problem.warning for problem in self.problems)

    def stop(self) -> NoReturn:
        """Raise a :class:`~vlprompt.errors.DataError` with the errors so far: reading cannot continue."""
        raise DataError(self._text([problem for problem in self.problems if not problem.warning]))

    def finish(self) -> None:
        """Raise a :class:`~vlprompt.errors.DataError` if there are errors, else issue the warnings."""
        if self.failed:
            self.stop()
        for text in [*(problem.text for problem in self.problems), self.passed.text()]:
            if text:
                warnings.warn(f"{self.subject}: {text}", stacklevel=3)

    def _text(self, problems: Sequence[Problem]) -> str:
        count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        lines = "\n".join(f"  - {line}" for line in problem_lines(problems))
        return f"{self.subject} cannot be used: {count}.\n{lines}\n{self.remedy}"


def problem_lines(problems: Sequence[Problem], shown: int = _SHOWN) -> list[str]:
    """Return about ``shown`` lines at most, divided among the rules so that each rule is shown."""
    by_code: dict[str, list[Problem]] = {}
    for problem in problems:
        by_code.setdefault(problem.code, []).append(problem)
    each = max(3, shown // max(1, len(by_code)))
    lines = []
    for code, members in by_code.items():
        lines += [str(problem) for problem in members[:each]]
        if len(members) > each:
            lines.append(f"{code} ... and {len(members) - each:,} more")
    return lines
