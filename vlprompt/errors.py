"""Errors that a user can fix, and helpers for their texts.

Every error that vlprompt raises on purpose is a :class:`VlpromptError`. Its text is complete: what was wrong, the
value, what is accepted, and the command or edit that fixes it. The command line prints only the text and exits with
status 2. Only a bug ends in a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: Characters that a terminal obeys instead of showing them: C0 and C1 controls, line and paragraph separators, marks
#: that change the direction of text; and lone surrogates, which represent bytes of file names that are not UTF-8.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class VlpromptError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(VlpromptError):
    """A configuration key or value that is not accepted."""


class DataError(VlpromptError):
    """A data set, split file, image or card that cannot be used."""


class BackboneError(VlpromptError):
    """A backbone that cannot be loaded or does not support what was requested."""


class ClassNameError(VlpromptError):
    """Class names or templates that cannot be turned into prompts."""


class HeadError(VlpromptError):
    """A saved head that cannot be read or does not match the run."""


class OutputError(VlpromptError):
    """Output that cannot be written; ``closed`` says whether its reader has ended, as ``head`` does."""

    def __init__(self, text: str, *, closed: bool) -> None:
        """Keep the text and whether the reader has ended."""
        super().__init__(text)
        self.closed = closed


def has_controls(text: str) -> bool:
    """Return whether ``text`` has C0 or C1 controls, such as a line feed or an escape."""
    return _CONTROLS.search(text) is not None


def printable(text: str) -> str:
    """Return ``text`` with escape sequences in place of what a terminal would obey; line feeds and tabs remain.

    What is read from files, such as names and notes, is shown with this function.
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in "\n\t" else ascii(found[0])[1:-1], text)


def escaped(text: str, form: str) -> str:
    """Return ``text`` with ``form``, which has a slot for the code, in place of what a terminal would obey."""
    return _HIDDEN.sub(lambda found: form.format(ord(found[0])), text)


class NotFiniteError(VlpromptError):
    """A loss, a score or a learned tensor that is NaN or infinite; nothing made from it is saved."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C, so that everything that cleans up after Ctrl-C does so here."""


def nearest(value: str, accepted: Iterable[str], count: int = 3) -> list[str]:
    """Return the ``count`` accepted spellings nearest to ``value``, best first. Case and ``-``/``_`` are ignored."""

    def plain(text: str) -> str:
        return text.lower().replace("_", "-")

    by_plain: dict[str, str] = {}
    for name in accepted:
        by_plain.setdefault(plain(name), name)
    matches = difflib.get_close_matches(plain(value), list(by_plain), n=count, cutoff=0.5)
    return [by_plain[name] for name in matches]


def did_you_mean(value: str, accepted: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"``, or a list of the accepted values if none is near."""
    accepted = list(accepted)
    suggestions = nearest(value, accepted)
    if suggestions:
        return " Did you mean " + " or ".join(repr(name) for name in suggestions) + "?"
    shown = ", ".join(accepted[:12]) + (", ..." if len(accepted) > 12 else "")
    return f" Accepted: {shown}." if shown else ""


def bulleted(lines: Iterable[str], limit: int = 20) -> str:
    """Return ``lines`` as an indented list, at most ``limit`` of them, followed by the number of omitted lines."""
    lines = list(lines)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
