"""The drawings of the demo's benchmarks: split files in CoOp's format, and captioned pairs.

Training, validation and test images share no drawing. Variants (``#3``, ``#noise``) are generated when an image is read
(:mod:`vlprompt.datasets.variants`), so an archive holds each drawing once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from sources import FLAGS, HELD_OUT, KINDS, Emoji

Items = list[tuple[str, int, str]]
Split = dict[str, Items]

FLUENT = ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast")
SHOT_STYLES, VAL_STYLES = ("openmoji", "emojione-v1"), ("streamline-emojis",)
DRAWS, NAMES_A_KIND, SHOTS, VAL_VIEWS, TEST_VIEWS = 3, 50, 16, 4, 9
#: Minimum and maximum number of names of a kind that is a class; names above the maximum are sampled.
FEWEST_NAMES, MOST_NAMES = 12, 20
PAIR_STYLES, PAIR_NAMES = ("noto", "twemoji", "emojione", "fxemoji"), 300


def path(style: str, symbol: Emoji) -> str:
    """Return the path of a drawing: the style's archive and the code point inside it."""
    return f"{style}/{symbol.hexcode}.webp"


def packaged(emoji: Sequence[Emoji]) -> list[Emoji]:
    """Return the emoji with shipped drawings in held-out styles, which are all except flags."""
    return [symbol for symbol in emoji if symbol.subgroup not in FLAGS and set(symbol.pictures) & set(HELD_OUT)]


def _views(symbol: Emoji, styles: Sequence[str], count: int) -> list[str]:
    """Return ``count`` paths: first every drawing, then variants of each in turn."""
    available = [style for style in styles if style in symbol.pictures]
    paths = []
    for index in range(count if available else 0):
        mark = f"#{index // len(available)}" if index >= len(available) else ""
        paths.append(path(available[index % len(available)], symbol) + mark)
    return paths


def names_split(emoji: Sequence[Emoji], draw: int) -> Split:
    """Return one draw of ``demo``: 50 trained and 50 novel names in alternation.

    Base and new classes (the first and the second half) therefore hold as many of each.
    """
    pool = [
        symbol
        for symbol in packaged(emoji)
        if {*SHOT_STYLES, *FLUENT} <= set(symbol.pictures) and re.fullmatch(r"[a-z0-9' -]+", symbol.label)
    ]
    generator = random.Random(f"demo {draw}")
    seen = generator.sample([symbol for symbol in pool if not symbol.novel], NAMES_A_KIND)
    novel = generator.sample([symbol for symbol in pool if symbol.novel], NAMES_A_KIND)
    split: Split = {"train": [], "val": [], "test": []}
    for label, symbol in enumerate(symbol for pair in zip(seen, novel, strict=True) for symbol in pair):
        for section, styles, count in (
            ("train", SHOT_STYLES, SHOTS),
            ("val", VAL_STYLES, VAL_VIEWS),
            ("test", FLUENT, TEST_VIEWS),
        ):
            split[section] += [(entry, label, symbol.label) for entry in _views(symbol, styles, count)]
    return split


def kinds_split(emoji: Sequence[Emoji], corrupted: bool) -> Split:
    """Return ``demo-kinds``. Classes are kinds of things, and the test names of a kind differ from its training names.

    With ``corrupted``, for ``demo-styles``, every test drawing occurs three times: clean, noisy and blurred.
    """
    kinds: dict[str, list[Emoji]] = {}
    for symbol in packaged(emoji):
        if {"fluent-emoji-flat", "openmoji"} <= set(symbol.pictures):
            kinds.setdefault(KINDS[symbol.subgroup], []).append(symbol)
    classes = {}
    for kind, names in sorted(kinds.items()):
        if len(names) >= FEWEST_NAMES:
            sections = _cut(random.Random(f"kinds {kind}").sample(names, min(MOST_NAMES, len(names))))
            # Every style must be sufficient for training and for testing.
            if all(
                any(style in symbol.pictures for symbol in sections[section])
                for style in HELD_OUT
                for section in ("train", "test")
            ):
                classes[kind] = sections
    split: Split = {"train": [], "val": [], "test": []}
    for label, (kind, sections) in enumerate(classes.items()):
        for section, members in sections.items():
            marks = ("", "#noise", "#blur") if corrupted and section == "test" else ("",)
            drawn = [path(style, symbol) for symbol in members for style in HELD_OUT if style in symbol.pictures]
            split[section] += [(entry + mark, label, kind) for entry in drawn for mark in marks]
    return split


def _cut(names: list[Emoji]) -> dict[str, list[Emoji]]:
    half, rest = len(names) // 2, round(len(names) * 0.65)
    return {"train": names[:half], "val": names[half:rest], "test": names[rest:]}


def pairs(emoji: Sequence[Emoji], splits: Sequence[Split]) -> list[dict[str, str]]:
    """Return ``demo-pairs``: drawings in trained styles with their keywords, without the names of ``demo``."""
    taken = {name for split in splits for _, _, name in split["test"]}
    pool = [
        symbol
        for symbol in emoji
        if set(PAIR_STYLES) <= set(symbol.pictures) and symbol.subgroup not in FLAGS
        if not symbol.novel and symbol.label not in taken
    ]
    chosen = random.Random("pairs").sample(pool, PAIR_NAMES)
    return [
        {
            "image": path(style, symbol),
            "caption": ", ".join([symbol.label, *(tag for tag in symbol.tags if tag != symbol.label)]),
        }
        for symbol in chosen
        for style in PAIR_STYLES
    ]


def unseen_pairs(emoji: Sequence[Emoji], splits: Sequence[Split]) -> list[dict[str, str]]:
    """Return ``demo-pairs-unseen``: drawings in held-out styles, with their names.

    The styles are those of ``demo``'s training and validation images, not those of its tests. Names of ``demo`` and
    novel names are excluded.
    """
    taken = {name for split in splits for _, _, name in split["test"]}
    chosen = [symbol for symbol in packaged(emoji) if not symbol.novel and symbol.label not in taken]
    return [
        {"image": path(style, symbol), "caption": symbol.label}
        for symbol in chosen
        for style in (*SHOT_STYLES, *VAL_STYLES)
        if style in symbol.pictures
    ]


def split_text(split: Split) -> str:
    """Return the text of a split file, one item per line."""
    bodies = {section: ",\n".join(json.dumps(item) for item in items) for section, items in split.items()}
    return "{\n" + ",\n".join(f'"{section}": [\n{body}\n]' for section, body in bodies.items()) + "\n}\n"
