"""Everything that vlprompt prints: nothing that was read from a file can control the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from vlprompt.errors import OutputError, escaped, printable

if TYPE_CHECKING:
    from rich.table import Table


def show(text: str, *, end: str = "\n", error: bool = False, flush: bool = False) -> None:
    """Print ``text`` with control characters as escape sequences, which the encoding of the output can represent.

    Args:
        text: The text.
        end: What follows the text.
        error: Whether it goes to the standard error.
        flush: Whether it is written at once.

    Raises:
        OutputError: The output cannot be written: its reader has ended, or its disk is full.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text).encode(encoding, "backslashreplace").decode(encoding) + end
    try:
        stream.write(shown)
        if flush:
            stream.flush()
    except OSError as problem:
        raise _lost(problem) from problem


def show_problem(text: str) -> None:
    """Print the text of an error or a note on the standard error, in :func:`one_screen`. Raises as :func:`show`."""
    show(one_screen(printable(text)), error=True)


def one_screen(text: str, rows: int = 22, columns: int = 200) -> str:
    """Return ``text`` without the middle of very long lines, and of more lines than ``rows`` rows of ``columns`` hold.

    Names in files may have any length. The first lines say what is wrong, the last ones what to do.
    """

    def height(lines: list[str]) -> int:
        return sum(max(1, -(-len(line) // columns)) for line in lines)

    def cut(line: str) -> str:
        return line if len(line) <= 4 * columns else f"{line[: 2 * columns]} ... {line[-columns:]}"

    lines = [cut(line) for line in text.split("\n")]
    if height(lines) <= rows:
        return "\n".join(lines)
    first, last = 0, len(lines)
    while height(lines[last - 1 :]) <= rows // 3:
        last -= 1
    while height([*lines[: first + 1], *lines[last:]]) < rows:
        first += 1
    return "\n".join([*lines[:first], f"  ... {last - first:,} lines are left out", *lines[last:]])


def show_json(value: Any, indent: int = 1) -> None:
    """Print a plain value as JSON; what is not JSON is shown as text. Raises :class:`OutputError` as :func:`show`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    show("\n".join(escaped(line, "\\u{:04x}") for line in text.split("\n")))


def flush() -> None:
    """Write what was printed.

    Raises:
        OutputError: The standard output cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as problem:
        raise _lost(problem) from problem


def text_of(table: Table, width: int = 120) -> str:
    """Return a table as plain text of at most ``width`` columns. Brackets and colons in cells have no meaning."""
    from rich.console import Console

    out = io.StringIO()
    Console(
        file=out, width=width, force_terminal=False, color_system=None, markup=False, emoji=False, highlight=False
    ).print(table)
    return printable(out.getvalue()).rstrip("\n")


def _lost(problem: OSError) -> OutputError:
    # The interpreter would flush the same stream again when it ends.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return OutputError(
        f"the output cannot be written: {problem.strerror or problem}", closed=isinstance(problem, BrokenPipeError)
    )
