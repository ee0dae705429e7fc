"""Text context of CoOp: a set of vectors before, around or after every class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vlprompt.backbone.layout import TokenLayout, check_row_lengths, context_slot
from vlprompt.backbone.text_tower import TextTower
from vlprompt.config.types import Ge, Le
from vlprompt.errors import ConfigError, HeadError
from vlprompt.prompts.words import words_of

Position = Literal["end", "middle", "front"]
ContextLength: TypeAlias = Annotated[int, Ge(1), Le(74)]
"""M, limited by the length of the text tower."""
CONTEXT_STD = 0.02
"""Standard deviation of randomly initialised context vectors (CoOp: trainers/coop.py)."""


def template_layout(tower: TextTower, class_names: Sequence[str], templates: Sequence[str]) -> TokenLayout:
    """Return the layout of hand-written prompts: one group per template, no context slots.

    Raises:
        ClassNameError: Prompts are too long for the text tower; all of them are listed.
    """
    groups = []
    for template in templates:
        rows = [tower.tokens(template.replace("{}", words_of(name))) for name in class_names]
        check_row_lengths(class_names, [len(row) for row in rows], tower.context_length, f"template {template!r}")
        groups.append(rows)
    return TokenLayout.from_rows(groups)


def text_layout(tower: TextTower, texts: Sequence[str]) -> TokenLayout:
    """Return the layout of N whole texts, such as captions, without any replacement of underscores.

    Raises:
        ClassNameError: Texts are too long for the text tower; all of them are listed.
    """
    rows = [tower.tokens(text) for text in texts]
    check_row_lengths(texts, [len(row) for row in rows], tower.context_length, "the text")
    return TokenLayout.from_rows([rows])


def context_layout(
    tower: TextTower,
    class_names: Sequence[str],
    placeholder: str,
    length: int,
    position: Position,
    *,
    class_specific: bool = False,
) -> TokenLayout:
    """Return the layout of ``length`` context vectors and ``NAME.`` as in CoOp's trainers/coop.py, lines 72-182.

    The prompt ``placeholder + " NAME."`` is tokenised as a whole; its first ``length`` tokens become context slots,
    placed before (end), around (middle, ``length // 2`` before) or after (front) the tokens of the name.

    Raises:
        ClassNameError: Prompts are too long for the text tower; all of them are listed.
    """
    rows, names = [], []
    slots = [context_slot(m) for m in range(length)]
    fixed = max(0, len(tower.tokens(placeholder)) - 2 - length)  # words of the placeholder that stay before the name
    for name in class_names:
        start, *tokens = tower.tokens(f"{placeholder} {words_of(name)}.")
        name_length = len(tower.tokens(words_of(name))) - 2
        rest = tokens[length:]
        before = {"end": length, "middle": length // 2, "front": 0}[position]
        inside = 0 if position == "end" else name_length
        rows.append([start, *slots[:before], *rest[:inside], *slots[before:], *rest[inside:]])
        # Positions in rest, which ends with end-of-text.
        name_positions = range(fixed, min(fixed + name_length, len(rest) - 1))
        names.append([1 + at + (before if at < inside else length) for at in name_positions])
    what = f"{length} context tokens, the name and a period"
    check_row_lengths(class_names, [len(row) for row in rows], tower.context_length, what)
    return TokenLayout.from_rows([rows], class_specific=class_specific, names=[names])


class TextContext(nn.Module):
    """Context vectors ``ctx``: ``[M, W]`` for all classes, or ``[C, M, W]`` class-specific; float32.

    Args:
        tower: The text tower whose width W and word embeddings are used.
        length: M, if no ``words`` are given.
        words: Initial words; M is then their number counted by spaces, and the vectors are initialised with the
            embeddings of the first M tokens. With words the context is generic (CoOp: trainers/coop.py 72-110).
        classes: C for class-specific context, None for generic.
    """

    def __init__(self, tower: TextTower, length: int, words: str = "", classes: int | None = None) -> None:
        super().__init__()
        words = words_of(words)
        if words:
            tokens = tower.tokens(words)[1:-1]
            self.length = len(words.split(" "))
            if len(tokens) < self.length:
                raise ConfigError(
                    f"context_init {words!r} counts {self.length} words by its spaces but has {len(tokens)} tokens; "
                    "accepted: words parted by single spaces, none at the ends"
                )
            vectors = tower.embed(tokens[: self.length])
            self.class_specific = False
        else:
            self.length = length
            shape = (length, tower.width) if classes is None else (classes, length, tower.width)
            vectors = torch.randn(shape) * CONTEXT_STD
            self.class_specific = classes is not None
        self.placeholder = words or " ".join(["X"] * self.length)
        self.ctx = nn.Parameter(vectors)

    def layout(self, tower: TextTower, class_names: Sequence[str], position: Position) -> TokenLayout:
        """Return the layout of the prompts of ``class_names``."""
        return context_layout(
            tower, class_names, self.placeholder, self.length, position, class_specific=self.class_specific
        )


def generic_context(method: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return the generic context vectors ``[M, W]`` of another head.

    Args:
        method: Name of the method that is initialised from the head, for messages.
        state: The head's trained tensors: those of CoOp, KgCoOp, ProGrad or the method itself.

    Raises:
        HeadError: The head has other tensors, or class-specific context.
    """
    trained = {name: value for name, value in state.items() if not name.startswith("objectives.")}
    if set(trained) not in ({"ctx"}, {"prompt.ctx"}):
        raise HeadError(
            f"{method} starts from one set of context vectors, that of a CoOp, KgCoOp, ProGrad or TPT head; "
            f"this one has {', '.join(sorted(trained)) or 'nothing learned'}"
        )
    (context,) = trained.values()
    if context.ndim != 2:
        raise HeadError(f"{method} needs generic context [M, W]; this head has {list(context.shape)}, per class")
    return context
