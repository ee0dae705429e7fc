"""``vlprompt cache list | prune``: list and prune the feature store."""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import Any

from vlprompt._terminal import show, text_of
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, read_command_line, refuse
from vlprompt.errors import did_you_mean

CACHE_HELP = """\
vlprompt cache list
vlprompt cache prune [--all] [--older-than DAYS] [--max-size SIZE] [--dry-run]

Image features are computed once and stored in $VLPROMPT_CACHE/features, or ~/.cache/vlprompt/features. They can always
be recomputed.

  list              show the entries, most recently used first. An entry follows the content of its images, or, for
                    more than 256 MB of images, their sizes and times
  prune             remove damaged entries, those of other versions, and files of killed processes; and also:
  --all             every entry
  --older-than D    entries not used for D days
  --max-size SIZE   the least recently used entries, until at most SIZE is left, such as 500MB or 2GB
  --dry-run         print what would be removed and remove nothing

Example: vlprompt cache prune --older-than 30 --max-size 2GB
"""

ACTIONS = ("list", "prune")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def cache(words: list[str]) -> int:
    """Run ``vlprompt cache`` with ``words`` and return its exit status.

    Raises:
        ConfigError: Options are not accepted; the text lists all of them.
        DataError: A file cannot be removed.
    """
    line = read_command_line(
        words, "cache", flags=("all", "dry-run"), options=("older-than", "max-size"), operands=True
    )
    for key in (*line.overrides, *(["config"] if line.configs else [])):
        line.refuse(key, ())
    action = line.operands[0] if line.operands else ""
    if not action:
        line.problems.append(f"{COMMAND_LINE}: cache what? Accepted: {', '.join(ACTIONS)}")
    elif action not in ACTIONS:
        line.problems.append(f"{COMMAND_LINE}: there is no `vlprompt cache {action}`.{did_you_mean(action, ACTIONS)}")
    for extra in line.operands[1:]:
        line.problems.append(f"{COMMAND_LINE}: {extra!r} is one word too many")
    if action == "list":
        for name in (*line.flags, *line.options):
            line.problems.append(f"{COMMAND_LINE}: --{name} has no meaning for `vlprompt cache list`")
    days, size = _days(line), _size(line)
    if line.problems:
        refuse(line.problems, "cache")
    if action == "list":
        return _list()
    return _prune("all" in line.flags, days, size, "dry-run" in line.flags)


def _days(line: CommandLine) -> float | None:
    text = line.options.get("older-than")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        line.problems.append(f"{COMMAND_LINE}: --older-than is {text!r}; accepted: a number of days, such as 30")
        return None
    return float(text)


def _size(line: CommandLine) -> int | None:
    text = line.options.get("max-size")
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", text)
    unit = match[2].upper() or "B" if match else ""
    if match is None or unit not in _UNITS:
        line.problems.append(f"{COMMAND_LINE}: --max-size is {text!r}; accepted: a size such as 500MB, 2GB or 1.5GiB")
        return None
    return int(float(match[1]) * _UNITS[unit])


#: Kinds of transforms by a part of their description (:func:`vlprompt.data.transforms.describe_transform`).
_VIEWS = {"random": "random", "center pad": "pad", "resize to": "squash"}


def _list() -> int:
    from rich.table import Table

    from vlprompt.data.eviction import entries
    from vlprompt.data.features import default_folder

    stored = entries(default_folder())
    if stored:
        table = Table("entry", "data set", "split", "backbone", "view", "shape", "follows", box=None, pad_edge=False)
        table.add_column("size", justify="right")
        table.add_column("last used")
        for entry in stored:
            view = entry.key.get("view", "")
            view = next((kind for text, kind in _VIEWS.items() if text in view), "center" if view else entry.why)
            view += f", seed {entry.key['seed']}, epoch {entry.key['epoch']}" if "epoch" in entry.key else ""
            table.add_row(
                entry.path.stem[:12],
                *(str(entry.key.get(name, "-")) for name in ("dataset", "split")),
                str(entry.key.get("backbone", "-"))[:12],
                view,
                "x".join(map(str, entry.shape)) or "-",
                str(entry.key.get("stamps", "size and time" if entry.key else "-")),
                size_text(entry.size),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            )
        show(text_of(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else 1_000))
    show(_total(stored, f"in {default_folder()}"))
    return 0


def _prune(everything: bool, days: float | None, size: int | None, dry_run: bool) -> int:
    from vlprompt.data.eviction import prune, remove
    from vlprompt.data.features import default_folder

    folder = default_folder()
    removed, kept = prune(folder, everything=everything, older_than=days, max_size=size)
    if not dry_run:
        remove(folder, removed)
    for entry in removed:
        name = entry.path.name if entry.path.suffix == ".tmp" else entry.path.stem[:12]
        about = f" {entry.key['dataset']}" if "dataset" in entry.key else ""
        show(f"{name}{about} ({size_text(entry.size)}): {entry.why}")
    show(f"{_total(removed, 'would be removed' if dry_run else 'removed')}; {_total(kept, 'left')}")
    return 0


def _total(entries: list[Any], where: str) -> str:
    count = "1 file" if len(entries) == 1 else f"{len(entries)} files"
    return f"{count}, {size_text(sum(entry.size for entry in entries))}, {where}"


def size_text(size: int) -> str:
    """Return a size with its unit, such as ``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"
