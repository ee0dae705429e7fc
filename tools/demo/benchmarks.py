"""Which drawings the demo's benchmarks consist of: split files in CoOp's format, and captioned pairs.

In every one of them shots, validation and test share no drawing. Variants (``#3``, ``#noise``) are made when an image
is read (:mod:`vlprompt.datasets.variants`), so an archive holds a drawing once.
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
#: A kind is a class when it has this many names; of more than the largest number, some are drawn.
FEWEST_NAMES, MOST_NAMES = 12, 20
PAIR_STYLES, PAIR_NAMES = ("noto", "twemoji", "emojione", "fxemoji"), 300


def path(style: str, one: Emoji) -> str:
    """Return where a drawing lies: the style's archive, and in it the code point."""
    return f"{style}/{one.hexcode}.webp"


def packaged(emoji: Sequence[Emoji]) -> list[Emoji]:
    """Return the emoji whose drawings in held-out styles are shipped: all but flags."""
    return [one for one in emoji if one.subgroup not in FLAGS and set(one.pictures) & set(HELD_OUT)]


def _views(one: Emoji, styles: Sequence[str], count: int) -> list[str]:
    """Return ``count`` paths: every drawing as it is, then variants of each in turn."""
    own = [style for style in styles if style in one.pictures]
    paths = []
    for index in range(count if own else 0):
        mark = f"#{index // len(own)}" if index >= len(own) else ""
        paths.append(path(own[index % len(own)], one) + mark)
    return paths


def names_split(emoji: Sequence[Emoji], draw: int) -> Split:
    """Return one draw of ``demo``: 50 names the model was trained on and 50 it never met, in alternation.

    So base and new classes, the first and the second half, hold both kinds alike.
    """
    pool = [
        one
        for one in packaged(emoji)
        if {*SHOT_STYLES, *FLUENT} <= set(one.pictures) and re.fullmatch(r"[a-z0-9' -]+", one.label)
    ]
    generator = random.Random(f"demo {draw}")
    seen = generator.sample([one for one in pool if not one.novel], NAMES_A_KIND)
    novel = generator.sample([one for one in pool if one.novel], NAMES_A_KIND)
    split: Split = {"train": [], "val": [], "test": []}
    for label, one in enumerate(one for pair in zip(seen, novel, strict=True) for one in pair):
        for part, styles, count in (
            ("train", SHOT_STYLES, SHOTS),
            ("val", VAL_STYLES, VAL_VIEWS),
            ("test", FLUENT, TEST_VIEWS),
        ):
            split[part] += [(entry, label, one.label) for entry in _views(one, styles, count)]
    return split


def kinds_split(emoji: Sequence[Emoji], corrupted: bool) -> Split:
    """Return ``demo-kinds``: the class is a kind of thing, and other names of it are tested than were shown.

    With ``corrupted``, that is for ``demo-styles``, every test drawing stands thrice: clean, noisy and blurred.
    """
    kinds: dict[str, list[Emoji]] = {}
    for one in packaged(emoji):
        if {"fluent-emoji-flat", "openmoji"} <= set(one.pictures):
            kinds.setdefault(KINDS[one.subgroup], []).append(one)
    classes = {}
    for kind, names in sorted(kinds.items()):
        if len(names) >= FEWEST_NAMES:
            parts = _cut(random.Random(f"kinds {kind}").sample(names, min(MOST_NAMES, len(names))))
            # Any one style must do for training, and for testing.
            if all(
                any(style in one.pictures for one in parts[part]) for style in HELD_OUT for part in ("train", "test")
            ):
                classes[kind] = parts
    split: Split = {"train": [], "val": [], "test": []}
    for label, (kind, parts) in enumerate(classes.items()):
        for part, members in parts.items():
            marks = ("", "#noise", "#blur") if corrupted and part == "test" else ("",)
            drawn = [path(style, one) for one in members for style in HELD_OUT if style in one.pictures]
            split[part] += [(entry + mark, label, kind) for entry in drawn for mark in marks]
    return split


def _cut(names: list[Emoji]) -> dict[str, list[Emoji]]:
    half, rest = len(names) // 2, round(len(names) * 0.65)
    return {"train": names[:half], "val": names[half:rest], "test": names[rest:]}


def pairs(emoji: Sequence[Emoji], splits: Sequence[Split]) -> list[dict[str, str]]:
    """Return ``demo-pairs``: drawings in styles the model knows, with their keywords; no name of ``demo`` is there."""
    taken = {name for split in splits for _, _, name in split["test"]}
    pool = [
        one
        for one in emoji
        if set(PAIR_STYLES) <= set(one.pictures) and one.subgroup not in FLAGS
        if not one.novel and one.label not in taken
    ]
    chosen = random.Random("pairs").sample(pool, PAIR_NAMES)
    return [
        {"image": path(style, one), "caption": ", ".join([one.label, *(tag for tag in one.tags if tag != one.label)])}
        for one in chosen
        for style in PAIR_STYLES
    ]


def unseen_pairs(emoji: Sequence[Emoji], splits: Sequence[Split]) -> list[dict[str, str]]:
    """Return ``demo-pairs-unseen``: drawings in styles the model never saw, with their names.

    The styles are those of ``demo``'s shots and validation images, not those of its tests. No name of ``demo`` is
    there, and none that the model never met.
    """
    taken = {name for split in splits for _, _, name in split["test"]}
    chosen = [one for one in packaged(emoji) if not one.novel and one.label not in taken]
    return [
        {"image": path(style, one), "caption": one.label}
        for one in chosen
        for style in (*SHOT_STYLES, *VAL_STYLES)
        if style in one.pictures
    ]


def split_text(split: Split) -> str:
    """Return a split file's text, an item a line."""
    parts = {part: ",\n".join(json.dumps(item) for item in items) for part, items in split.items()}
    return "{\n" + ",\n".join(f'"{part}": [\n{body}\n]' for part, body in parts.items()) + "\n}\n"
