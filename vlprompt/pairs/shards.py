"""Image-caption pairs from webdataset shards, for :func:`vlprompt.load_pairs`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt._files import parse_json
from vlprompt.datasets.readers.tar_files import (
    IMAGES,
    LARGEST_TEXT,
    MOST_SHARDS,
    Index,
    ShardSource,
    by_key,
    checked_place,
    kept_index,
)
from vlprompt.datasets.report import Report
from vlprompt.errors import ConfigError
from vlprompt.pairs.files import CaptionedImage, caption_problem, captions_of

_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_SCHEMA = 2


def find_shards(path: Path) -> list[Path]:
    """Return the shards of ``path``: the file, those in the folder, or those of the pattern; else an empty list.

    Raises:
        ConfigError: If a range is descending, or covers more than 100,000 shards.
    """
    if os.path.isdir(path):
        try:
            names = sorted(os.listdir(path), key=os.fsencode)
        except OSError:
            return []  # the reader of folders reports the problem
        return [path / name for name in names if name.lower().endswith(".tar") and not name.startswith(".")]
    if path.suffix.lower() != ".tar":
        return []
    ranges = [(int(first), int(last)) for first, last in _RANGE.findall(str(path))]
    if os.path.exists(path) or not ranges:
        return [path]
    if any(first > last for first, last in ranges) or math.prod(b - a + 1 for a, b in ranges) > MOST_SHARDS:
        raise ConfigError(
            f"The pattern {path} has a range that cannot be used; accepted: {{FIRST..LAST}} with FIRST up to LAST, at "
            f"most {MOST_SHARDS:,} shards."
        )
    return [Path(name) for name in _expanded(str(path))]


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    # As in a shell, a leading zero pads all numbers to the same width.
    padded = any(len(end) > 1 and end.startswith("0") for end in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    head, tails = pattern[: match.start()], _expanded(pattern[match.end() :])
    return [f"{head}{n:0{width}}{tail}" for n in range(int(match[1]), int(match[2]) + 1) for tail in tails]


def read_shards(shards: Sequence[Path], report: Report) -> list[CaptionedImage]:
    """Return the images of shards with their captions, in order.

    The captions of a member ``KEY.jpg`` (or .jpeg, .png, .webp) are the lines of ``KEY.txt``, or, without that file,
    the ``caption`` in ``KEY.json``. The id of an image is ``<shard>/<member>``.

    Raises:
        DataError: If all shards are missing; other problems are added to ``report``.
    """
    base = os.path.commonpath([shard.parent for shard in shards])
    report.errors("S15", [f"shard {shard} is missing" for shard in shards if not os.path.isfile(shard)])
    shards = [shard for shard in shards if os.path.isfile(shard)]
    if not shards:
        report.stop()
    names = [Path(os.path.relpath(shard, base)).as_posix() for shard in shards]

    def read() -> Index:
        numbered = enumerate(zip(shards, names, strict=True))
        entries = [entry for number, (shard, name) in numbered for entry in _scan(shard, number, name, report)]
        return {"schema": _SCHEMA, "entries": entries}

    def check(content: Any) -> Index:
        if content["schema"] != _SCHEMA:
            raise ValueError("another schema")
        for *place, captions in content["entries"]:
            checked_place(place, len(shards))
            if not isinstance(captions, list) or any(map(caption_problem, captions)):
                raise ValueError(f"{captions!r} are not captions")
        return {"schema": _SCHEMA, "entries": content["entries"]}

    index = kept_index(shards, ["captions", _SCHEMA], check, read, report)
    images = [
        CaptionedImage(f"{names[number]}/{name}", caption, ShardSource(str(shards[number]), offset, size, name))
        for number, offset, size, name, captions in index["entries"]
        for caption in captions
    ]
    if not images and not report.failed:
        report.error("S02", "there are no images with captions")
    return images


def _scan(shard: Path, number: int, name: str, report: Report) -> list[tuple[int, int, int, str, list[str]]]:
    """Read one shard from start to end."""
    entries = []
    for key, members_of in by_key(shard, name, ("txt", "json"), report).items():
        image, text = members_of.get("image"), members_of.get("txt") or members_of.get("json")
        if image is None:
            report.error("S03", f"{name}: {key} has no image ({', '.join(IMAGES)})")
        elif text is None:
            report.error("S03", f"{name}: {key} has no caption (.txt or .json)")
        else:
            read = captions_of if "txt" in members_of else _json_caption
            captions = read(text.data, f"{name}: {text.name}", report)
            entries.append((number, image.offset, image.size, image.name, captions))
    return entries


def _json_caption(data: bytes | None, name: str, report: Report) -> list[str]:
    try:
        content = parse_json(data or b"")
    except ValueError:
        content = None
    if not isinstance(content, dict) or "caption" not in content:
        report.error("S03", f'{name}: an object with "caption" is expected, of at most {LARGEST_TEXT:,} bytes')
    elif problem := caption_problem(content["caption"]):
        report.error("S03", f"{name}: {problem}")
    else:
        return [content["caption"].strip()]
    return []
