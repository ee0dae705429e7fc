"""Context of a mixture of prompts: vectors before and after the name for every expert, initialised from a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlprompt.backbone.layout import TokenLayout, check_row_lengths, context_slot
from vlprompt.backbone.text_tower import TextTower
from vlprompt.prompts.words import words_of

Counting = Literal["words", "tokens"]


class ExpertContexts(nn.Module):
    """Vectors ``before[g]`` ``[b_g, W]`` and ``after[g]`` ``[a_g, W]`` of G experts, float32 (MoCoOp: moe.py 135-179).

    ``counting`` determines the number of vectors before and after the name. ``words``, the official rule, counts by
    spaces: text after the name may then replace the period or the pooled end-of-text token, and a doubled space the
    first token of the name (moe.py 161, 211). ``tokens`` counts byte-pair tokens and never replaces these.

    Args:
        tower: The text tower; its word embeddings initialise the vectors.
        templates: One template per expert, with ``{}`` for the class name and without periods.
        counting: How the lengths are counted.
    """

    def __init__(self, tower: TextTower, templates: Sequence[str], counting: Counting = "words") -> None:
        super().__init__()
        self.parts = [_parts(template) for template in templates]
        self.lengths = [(_count(tower, b, counting), _count(tower, a, counting)) for b, a in self.parts]
        self.before = nn.ParameterList()
        self.after = nn.ParameterList()
        for (before, after), (b, a) in zip(self.parts, self.lengths, strict=True):
            # End-of-text is included: the official rule uses it if there are more words than tokens.
            self.before.append(nn.Parameter(tower.embed(tower.tokens(before)[1 : 1 + b])))
            self.after.append(nn.Parameter(tower.embed(tower.tokens(after)[1 : 1 + a])))

    @property
    def experts(self) -> int:
        """G."""
        return len(self.parts)

    def vectors(self) -> Tensor:
        """Return ``[G, M, W]``: each expert's vectors before, then after the name, padded with zeros."""
        both = [torch.cat([b, a]) for b, a in zip(self.before, self.after, strict=True)]
        return pad_sequence(both, batch_first=True)

    def layout(self, tower: TextTower, class_names: Sequence[str], *, period: bool) -> TokenLayout:
        """Return the layout of all experts for C classes, with or without a final period in the prompt.

        Raises:
            ClassNameError: Prompts are too long for the text tower; all of them are listed.
        """
        groups, names = [], []
        for (before, after), (b, a) in zip(self.parts, self.lengths, strict=True):
            rows, name_positions = [], []
            first = len(tower.tokens(before)) - 1
            for name in class_names:
                text = f"{before} {words_of(name)}" if before else words_of(name)
                row = tower.tokens(text + after + ("." if period else ""))
                end = len(row)
                after_name = 1 + b + len(tower.tokens(words_of(name))) - 2
                for m in range(b):
                    row[1 + m] = context_slot(m)
                for m in range(a):
                    if after_name + m < end:  # a slot after end-of-text would have no effect
                        row[after_name + m] = context_slot(b + m)
                rows.append(row)
                name_positions.append(range(first, min(first + after_name - 1 - b, end - 1)))
            shown = f"{before} NAME{after}".strip()
            check_row_lengths(class_names, [len(row) for row in rows], tower.context_length, f"template {shown!r}")
            groups.append(rows)
            names.append(name_positions)
        return TokenLayout.from_rows(groups, names=names)


def _parts(template: str) -> tuple[str, str]:
    before, after = template.split("{}")
    return before.removesuffix(" "), after


def _count(tower: TextTower, text: str, counting: Counting) -> int:
    tokens = len(tower.tokens(text)) - 2
    if counting == "tokens":
        return tokens
    words = len(text.split(" ")) if text else 0
    return min(words, tokens + 1)  # at most the end-of-text token is replaced
