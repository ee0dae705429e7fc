"""Error text for missing data."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.datasets.card import Card
from vlprompt.datasets.options import FolderOptions


def remark(path: Path) -> str:
    """Return what is wrong with a ``path`` that is not a file."""
    if path.is_dir():
        return "is a folder, not a file"
    return "is a link to nothing, a pipe or a device, not a file" if os.path.lexists(path) else "does not exist"


def missing_text(card: Card, base: Path, looked_for: str) -> str:
    """Return the one-screen error text for missing data.

    Args:
        card: The card of the data set.
        base: Its absolute folder.
        looked_for: The missing path, absolute, with a remark.
    """
    if card.packaged:
        return (
            f"Data set {card.name!r} is part of vlprompt, but its files are missing.\n  missing:  {looked_for}\n"
            "Install vlprompt again: pip install --force-reinstall vlprompt"
        )
    if isinstance(card.options, FolderOptions) and not card.options.splits:
        return (
            f"The folder of images was not found.\n  looked for:  {looked_for}\n"
            "Give the folder that holds one folder of images per class: --data.root FOLDER"
        )
    lines = [f"Data set {card.name!r} is not there.", f"  looked for:  {looked_for}"]
    pages = dict.fromkeys(source.page for source in card.sources if source.page)
    lines += [f"  where from:  {page}" for page in pages]
    lines += [f"  licence:     {card.licence.text}", f"  how:         {card.notes.strip()}"]
    split_file, facts = getattr(card.options, "split_file", None), card.facts
    if split_file:
        hashes = [
            f"{kind} SHA-256 {value}"
            for kind, value in (("file", facts.file_sha256), ("content", facts.content_sha256))
            if value
        ]
        known = f" ({'; '.join(hashes)})" if hashes else ""
        lines.append(f"  split file:  {base / split_file}{known}")
    if any(source.url for source in card.sources):
        lines.append(f"  fetch it:    vlprompt data get {card.name}")
    root, folder = base.parent, card.folders[0]
    if root.name == folder and not base.exists():
        lines.append(f"{root} looks like the data set itself; the data root is the folder above it:")
        lines.append(f"  --data.root {root.parent}")
    else:
        lines.append(f"Then run again, or point to the folder that holds {folder}/:")
        lines.append("  --data.root FOLDER      (or: export VLPROMPT_DATA=FOLDER)")
    return "\n".join(lines)
