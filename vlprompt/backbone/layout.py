"""Token layouts: the token sequences of all prompts, with slots for context vectors.

A row is the sequence of slots of one class in one group (expert, template or image): start-of-text, fixed tokens and
context slots, up to and including the pooled position (end-of-text). Slots are integers: a token id if not negative,
and ``-1 - m`` for context vector ``m``. Nothing after the pooled position is kept, because it has no effect in a causal
transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vlprompt.errors import BackboneError, ClassNameError, bulleted

Row = Sequence[int]
Reach = Literal["name", "suffix", "end-of-text"]
"""Tokens of a row that a word update reaches: the class name's tokens only; also the fixed tokens after them; or also
end-of-text. Start-of-text, context and the tokens before the name are never reached."""


def context_slot(index: int) -> int:
    """Return the slot of context vector ``index`` (0, 1, ...)."""
    return -1 - index


@dataclass(eq=False)
class TokenLayout:
    """The slots of C classes in G groups.

    Attributes:
        slots: ``[G, C, L]`` int64 on the CPU: token ids, context slots, and 0 after the end of a row.
        lengths: ``[G, C]`` int64: number of slots per row; the last one is the pooled position.
        class_specific: Whether each class has its context vectors (``[G, C, M, W]``) or all share them (``[G, M, W]``).
        names: ``[G, C, L]`` booleans: slots that hold a token of the class name; None if not known.
    """

    slots: Tensor
    lengths: Tensor
    class_specific: bool = False
    names: Tensor | None = None
    plans: dict[tuple[torch.device, Reach | None], PackPlan] = field(default_factory=dict, repr=False)
    choices: dict[tuple[int, ...], TokenLayout] = field(default_factory=dict, repr=False)
    indices: dict[Reach, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_rows(
        cls,
        groups: Sequence[Sequence[Row]],
        *,
        class_specific: bool = False,
        names: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> TokenLayout:
        """Build a layout from the rows ``groups[g][c]``, one per class in every group.

        Args:
            groups: The rows.
            class_specific: Whether every class has its own context vectors.
            names: Positions of the class name's tokens in each row; context slots among them do not count.

        Raises:
            ValueError: No groups, no classes, groups of unequal size, or a row with fewer than two slots.
        """
        counts = {len(rows) for rows in groups}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"every group needs the same number of classes, at least one; got {sorted(counts)}")
        lengths = torch.tensor([[len(row) for row in rows] for rows in groups])
        if int(lengths.min()) < 2:
            raise ValueError("a row needs at least start-of-text and end-of-text")
        slots = torch.zeros(len(groups), counts.pop(), int(lengths.max()), dtype=torch.int64)
        for g, rows in enumerate(groups):
            for c, row in enumerate(rows):
                slots[g, c, : len(row)] = torch.tensor(row)
        if names is None:
            return cls(slots, lengths, class_specific)
        named = torch.zeros_like(slots, dtype=torch.bool)
        for g, positions in enumerate(names):
            for c, places in enumerate(positions):
                named[g, c, list(places)] = True
        return cls(slots, lengths, class_specific, named & (slots >= 0))

    @property
    def groups(self) -> int:
        """G: experts, templates or images."""
        return self.slots.shape[0]

    @property
    def classes(self) -> int:
        """C: classes."""
        return self.slots.shape[1]

    @property
    def context_length(self) -> int:
        """M: number of context vectors in the rows; 0 if there are none."""
        return max(0, -int(self.slots.min()))

    @cached_property
    def context_used(self) -> Tensor:
        """``[G, M]`` booleans: context vectors used by the rows of a group; a group may use fewer than M."""
        used = [(self.slots == context_slot(m)).flatten(1).any(dim=1) for m in range(self.context_length)]
        return torch.stack(used, dim=1) if used else torch.zeros(self.groups, 0, dtype=torch.bool)

    def word_index(self, reach: Reach) -> Tensor:
        """Return ``[G, C, L]`` int64: offset of a slot from the first token of the class name, or -1 out of reach.

        The result is cached.

        Raises:
            BackboneError: The positions of the class names are not known.
        """
        if reach not in self.indices:
            with torch.inference_mode(False):
                self.indices[reach] = self._word_index(reach)
        return self.indices[reach]

    def _word_index(self, reach: Reach) -> Tensor:
        if self.names is None:
            raise BackboneError(
                "an update of class tokens was given, but the layout does not hold the positions of the names"
            )
        place = torch.arange(self.slots.shape[2])
        first = self.names.long().argmax(dim=2, keepdim=True)
        reached = self.names
        if reach != "name":
            last = self.lengths[..., None] - 1
            after_name = (self.slots >= 0) & (place > first) & (place < last + (reach == "end-of-text"))
            reached = reached | (after_name & self.names.any(dim=2, keepdim=True))
        return torch.where(reached, place - first, -1)

    def select(self, start: int, stop: int) -> TokenLayout:
        """Return the layout of classes ``start`` to ``stop - 1``."""
        names = None if self.names is None else self.names[:, start:stop]
        return TokenLayout(self.slots[:, start:stop], self.lengths[:, start:stop], self.class_specific, names)

    def select_groups(self, groups: Sequence[int]) -> TokenLayout:
        """Return the layout of these groups; cached for every choice."""
        key = tuple(groups)
        if key not in self.choices:
            chosen = torch.tensor(key, dtype=torch.int64)
            names = None if self.names is None else self.names[chosen]
            self.choices[key] = TokenLayout(self.slots[chosen], self.lengths[chosen], self.class_specific, names)
        return self.choices[key]

    def repeat_groups(self, count: int) -> TokenLayout:
        """Return a one-group layout repeated ``count`` times: the same words with one context per image."""
        expand = (count, -1, -1)
        names = None if self.names is None else self.names.expand(expand)
        return TokenLayout(self.slots.expand(expand), self.lengths.expand(count, -1), self.class_specific, names)

    def prefix_lengths(self, reach: Reach | None = None) -> list[int]:
        """Return the number of leading slots that all classes of a group share, per group, without the pooled slot.

        With ``reach``, shared slots also have the same offset from the first token of the name.
        """
        same = (self.slots == self.slots[:, :1]).all(dim=1)  # [G, L]
        if reach is not None:
            index = self.word_index(reach)
            same &= (index == index[:, :1]).all(dim=1)
        if self.class_specific:
            same &= (self.slots >= 0).all(dim=1)
        shared = same.long().cumprod(dim=1).sum(dim=1)
        lengths: list[int] = torch.minimum(shared, self.lengths.min(dim=1).values - 1).tolist()
        return lengths

    def plan(self, device: torch.device, reach: Reach | None = None) -> PackPlan:
        """Return the packing of this layout on ``device`` for a word update of that reach; cached."""
        key = device, reach
        if key not in self.plans:
            with torch.inference_mode(False):  # a plan cached in evaluation is also used in training
                self.plans[key] = PackPlan(self, device, reach)
        return self.plans[key]

    def token_counts(self) -> tuple[int, int]:
        """Return ``(packed, padded)``: tokens of the packed algorithm, and rows times the longest row."""
        prefix = torch.tensor(self.prefix_lengths())
        packed = int(prefix.sum() + (self.lengths - prefix[:, None]).sum())
        return packed, self.lengths.numel() * self.slots.shape[2]


@dataclass(frozen=True)
class WordUpdate:
    """An update that is added to the embeddings of class tokens, the same for all classes.

    Attributes:
        vectors: ``[K, W]``; row j is added to the token j places after the first token of the class name.
        reach: Tokens that the update reaches.
    """

    vectors: Tensor
    reach: Reach = "name"


class PackPlan:
    """Index tensors that arrange a :class:`TokenLayout` as one packed ``[P + T, W]`` tensor.

    The shared prefixes of all groups (P tokens) come first, then the suffixes of all rows (T tokens). Rows are
    sorted by suffix length, so rows of equal length form a block without padding, then by group and class.
    """

    def __init__(self, layout: TokenLayout, device: torch.device, reach: Reach | None = None) -> None:
        groups, classes, longest = layout.slots.shape
        prefix = torch.tensor(layout.prefix_lengths(reach))
        suffix_lengths = (layout.lengths - prefix[:, None]).reshape(-1)  # [G * C]
        order = torch.argsort(suffix_lengths, stable=True)
        row_group = torch.arange(groups).repeat_interleave(classes)[order]
        row_class = torch.arange(classes).repeat(groups)[order]
        row_length = suffix_lengths[order]

        # Group, class (0 for all classes of a prefix) and position of each prefix token, then of each suffix token.
        token_row = torch.arange(len(order)).repeat_interleave(row_length)
        start = row_length.cumsum(0) - row_length
        offset = torch.arange(len(token_row)) - start[token_row]
        prefix_group = torch.arange(groups).repeat_interleave(prefix)
        prefix_start = prefix.cumsum(0) - prefix
        prefix_position = torch.arange(int(prefix.sum())) - prefix_start[prefix_group]
        suffix_group = row_group[token_row]
        group = torch.cat([prefix_group, suffix_group])
        class_ = torch.cat([torch.zeros_like(prefix_group), row_class[token_row]])
        position = torch.cat([prefix_position, prefix[suffix_group] + offset])
        slots = layout.slots[group, class_, position]

        self.prefix_tokens = int(prefix.sum())
        self.rows = len(order)
        self.position = position.to(device)
        self.token_ids = slots.clamp(min=0).to(device)
        self.context_at = (slots < 0).nonzero().squeeze(1).to(device)
        vector = -1 - slots[slots < 0]
        owner = group[slots < 0]
        if layout.class_specific:
            owner = owner * classes + class_[slots < 0]
        self.context_owner, self.context_vector = owner.to(device), vector.to(device)
        if reach is not None:  # packed tokens that a word update reaches, and its row for each
            index = layout.word_index(reach)[group, class_, position]
            self.word_at = (index >= 0).nonzero().squeeze(1).to(device)
            self.word_index = index[index >= 0].to(device)

        # Blocks of rows with one suffix length: (length, rows), in order; they determine the token ranges.
        lengths, counts = torch.unique_consecutive(row_length, return_counts=True)
        self.blocks: list[tuple[int, int]] = list(zip(lengths.tolist(), counts.tolist(), strict=True))
        self.pooled_at = (row_length.cumsum(0) - 1).to(device)  # among suffix tokens
        self.restore = torch.argsort(order).to(device)  # rows back into [G, C] order

        # Prefix tokens padded per group [G, Pmax], and a mask of the real ones.
        self.prefix_lengths = prefix.tolist()
        self.prefix_grid, self.prefix_real = _grid(prefix_group, groups, device)
        # Suffix queries that attend to their group's prefix: all of them, but only the pooled ones in the last layer.
        self.suffix_by_group = ByGroup(suffix_group, groups, device)
        self.pooled_by_group = ByGroup(row_group, groups, device)


class ByGroup:
    """Distributes ``[T, ...]`` tensors to ``[G, Tmax, ...]`` by group, and collects them again."""

    def __init__(self, group: Tensor, groups: int, device: torch.device) -> None:
        self.groups = groups
        grid, real = _grid(group, groups, device)
        back = torch.empty(len(group), dtype=torch.int64, device=device)
        flat = real.reshape(-1).nonzero().squeeze(1)
        back[grid.reshape(-1)[flat]] = flat
        self.grid, self.back = grid.reshape(-1), back
        self.padding = None if bool(real.all()) else (~real.reshape(-1)).nonzero().squeeze(1)
        self.straight = groups == 1

    def deal(self, x: Tensor) -> Tensor:
        """Distribute ``[T, ...]`` to ``[G, Tmax, ...]``; empty places repeat token 0 and are never read back."""
        if self.straight:
            return x.unsqueeze(0)
        dealt: Tensor = _Deal.apply(x, self)
        return dealt.reshape(self.groups, -1, *dealt.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        """Collect ``[G, Tmax, ...]`` back to ``[T, ...]``."""
        if self.straight:
            return x.squeeze(0)
        collected: Tensor = _Collect.apply(x.flatten(0, 1), self)
        return collected


class _Deal(torch.autograd.Function):
    """Gather by ``grid``. The gradient of a permutation is also a gather, which is much faster than scattered sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: ByGroup) -> Tensor:
        ctx.by = by
        return x.index_select(0, by.grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.by.back), None


class _Collect(torch.autograd.Function):
    """Gather by ``back``; padded places get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: ByGroup) -> Tensor:
        ctx.by = by
        return x.index_select(0, by.back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        dealt = gradient.index_select(0, ctx.by.grid)
        if ctx.by.padding is not None:
            dealt.index_fill_(0, ctx.by.padding, 0)
        return dealt, None


def _grid(group: Tensor, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``[G, N]`` indices of the members of each group, padded with 0, and a mask of the real ones."""
    counts = torch.bincount(group, minlength=groups)
    widest = int(counts.max())
    real = torch.arange(widest)[None] < counts[:, None]
    grid = torch.zeros(groups, widest, dtype=torch.int64)
    grid[real] = torch.argsort(group, stable=True)
    return grid.to(device), real.to(device)


def check_row_lengths(names: Sequence[str], lengths: Sequence[int], limit: int, what: str) -> None:
    """Raise ClassNameError that lists every name whose prompt is too long.

    Args:
        names: The C class names.
        lengths: Number of tokens of each class's whole prompt, with start- and end-of-text.
        limit: Maximum number of tokens of the text tower (77 in CLIP).
        what: Description of the prompt, for the message.

    Raises:
        ClassNameError: At least one prompt is longer than ``limit``.
    """
    over = [(name, count) for name, count in zip(names, lengths, strict=True) if count > limit]
    if over:
        lines = bulleted((f"{name[:80]!r}: {count} tokens" for name, count in over), limit=10)
        raise ClassNameError(
            f"{len(over)} of {len(names)} class prompts are longer than the {limit} tokens of the text tower "
            f"({what}):\n{lines}\nShorten these names, or use fewer context tokens or a shorter template."
        )
