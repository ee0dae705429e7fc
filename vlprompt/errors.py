"""Errors that a user can fix, and helpers for their texts.

Every error that vlprompt raises on purpose is a :class:`VlpromptError`. Its text is complete: what was wrong, the
value, what is accepted, and the command or edit that fixes it. The command line prints only the text and exits with
status 2. Only a bug ends in a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
