"""TDA: caches of confident test images that grow along the stream (Karmanov et al., CVPR 2024; arXiv 2403.18293).

Entropies and predictions determine which image enters which slot; the scores of the caches do not matter. The
insertions of a block of images are therefore simulated first, on plain numbers. Then two matrix products per block
give every image's affinities to the items present at its turn. The result is exact for every image and does not depend
on the block size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt._shapes import check_shape
from vlprompt.errors import HeadError
from vlprompt.testtime.selection import gather_views, most_confident

_BLOCK = 256  # images whose affinities are computed together
_NEVER = 2**62


@dataclass(frozen=True)
class PositiveCache:
    """Confident images with their predicted class.

    Attributes:
        capacity: Images per class.
        alpha: Weight of the cache's logits.
        beta: Sharpness of affinities.
    """

    capacity: int = 3
    alpha: float = 2.0
    beta: float = 5.0


@dataclass(frozen=True)
class NegativeCache:
    """Uncertain images with their possible classes.

    Attributes:
        capacity: Images per class.
        alpha: Weight of the cache's logits, which are subtracted.
        beta: Sharpness of affinities.
        entropy: Exclusive bounds of the entropy in nats divided by log2(C), for images that may enter. The ratio is at
            most 0.693, because the published code divides by an entropy in bits.
        mask: Exclusive bounds of the probabilities of classes that an image counts against.
    """

    capacity: int = 2
    alpha: float = 0.117
    beta: float = 1.0
    entropy: tuple[float, float] = (0.2, 0.5)
    mask: tuple[float, float] = (0.03, 1.0)


@dataclass(frozen=True)
class Summary:
    """Inputs of the caches for B images.

    Attributes:
        features: ``[B, D]``, mean of the kept unit features, not normalised again.
        logits: ``[B, C]``, mean of the kept logits.
        probabilities: ``[B, C]``, mean of the kept softmaxes.
        entropies: ``[B]``, entropy of ``probabilities`` in nats.
        predictions: ``[B]``, argmax of ``logits``.
    """

    features: Tensor
    logits: Tensor
    probabilities: Tensor
    entropies: Tensor
    predictions: Tensor


def summarise(views: Tensor, text_features: Tensor, scale: Tensor | float, confidence: float = 0.1) -> Summary:
    """Return the summary of the most confident of unit ``views`` ``[B, V, D]``; a single view is always kept.

    Args:
        views: Unit features.
        text_features: ``[C, D]``.
        scale: Factor of the cosines.
        confidence: Fraction of the views that are kept, at least one.

    Raises:
        DataError: ``views`` of another shape, or that are no floats.
    """
    check_shape(views, "views", ("B", "V", text_features.shape[1]))
    logits = scale * views @ text_features.t()
    if views.shape[1] > 1:
        chosen = most_confident(logits, confidence)
        views, logits = gather_views(views, chosen), gather_views(logits, chosen)
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
    log_mean = log_mean.clamp(min=torch.finfo(log_mean.dtype).min)
    entropies = -(log_mean * log_mean.exp()).sum(dim=-1)
    mean_logits = logits.mean(dim=1)
    return Summary(views.mean(dim=1), mean_logits, log_mean.exp(), entropies, mean_logits.argmax(dim=-1))


@dataclass(frozen=True)
class Scored:
    """Logits ``[B, C]`` of B images: ``logits = zeroshot + positive - negative``."""

    logits: Tensor
    zeroshot: Tensor
    positive: Tensor
    negative: Tensor


class Slots:
    """S slots for each of C classes, lowest entropy first; empty slots have infinite entropy.

    Args:
        classes: C.
        width: D, the width of keys.
        capacity: S.
        values: Whether items hold their class probabilities ``[C]``.
        device: Device of the slots.
    """

    def __init__(self, classes: int, width: int, capacity: int, *, values: bool, device: torch.device | str) -> None:
        self.keys = torch.zeros(classes, capacity, width, device=device)
        self.entropies = torch.full((classes, capacity), float("inf"), device=device)
        self.index = torch.full((classes, capacity), -1, dtype=torch.int64, device=device)
        self.values = torch.zeros(classes, capacity, classes if values else 0, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Return keys ``[C, S, D]``, entropies ``[C, S]``, stream positions ``[C, S]`` (-1: empty) and values."""
        return {"keys": self.keys, "entropies": self.entropies, "index": self.index, "values": self.values}

    def insert(self, summary: Summary, allowed: list[bool], seen: int) -> Items:
        """Insert B images in order and return all items with the turns at which they are present.

        An image enters a slot of its predicted class: an empty slot, or that of the item with the highest entropy if
        the image's entropy is lower.

        Args:
            summary: The images in order.
            allowed: Whether each image may enter.
            seen: Number of earlier images.
        """
        classes, capacity = self.entropies.shape
        size = classes * capacity  # item i < size: slot i before the block; item size + t: image t
        predictions, entropies = summary.predictions.tolist(), summary.entropies.tolist()
        touched = sorted(set(predictions))
        rows = self.entropies[touched].tolist() if touched else []
        held = {
            c: [(h, c * capacity + s) for s, h in enumerate(row) if h < float("inf")]
            for c, row in zip(touched, rows, strict=True)
        }
        entered: list[int] = []
        gone = [_NEVER] * (size + len(predictions))
        for t, (c, h) in enumerate(zip(predictions, entropies, strict=True)):
            items = held[c]
            if not allowed[t] or (len(items) == capacity and not h < items[-1][0]):
                continue
            if len(items) == capacity:
                gone[items.pop()[1]] = t
            entered.append(t)
            items.append((h, size + t))
            items.sort(key=lambda item: item[0])  # stable: equal entropies keep their order
        device = self.keys.device
        old, new = (self.index.flatten() >= 0).nonzero().squeeze(1), torch.tensor(entered, dtype=torch.int64).to(device)
        numbers = torch.cat([old, size + new])
        values = summary.probabilities[:, : self.values.shape[-1]]
        entries = Items(
            keys=torch.cat([self.keys.flatten(0, 1)[old], summary.features[new]]),
            values=torch.cat([self.values.flatten(0, 1)[old], values[new]]),
            classes=torch.cat([old // capacity, summary.predictions[new]]),
            born=torch.cat([torch.full_like(old, -1), new]),
            gone=torch.tensor(gone, dtype=torch.int64).to(device)[numbers],
        )
        # Classes that were never predicted keep their slots.
        slots = [c * capacity + s for c, items in held.items() for s in range(len(items))]
        sources = torch.tensor([item for items in held.values() for _, item in items], dtype=torch.int64).to(device)
        self._settle(torch.tensor(slots, dtype=torch.int64).to(device), sources, numbers, entries, summary, seen)
        return entries

    def _settle(
        self, slots: Tensor, sources: Tensor, numbers: Tensor, entries: Items, summary: Summary, seen: int
    ) -> None:
        """Write the items numbered ``sources`` into ``slots``; ``numbers`` are the numbers of ``entries``, in order."""
        at = torch.searchsorted(numbers, sources)
        stream = seen + torch.arange(len(summary.entropies), device=sources.device)
        entropies = torch.cat([self.entropies.flatten(), summary.entropies])[sources]
        index = torch.cat([self.index.flatten(), stream])[sources]
        self.keys.flatten(0, 1)[slots] = entries.keys[at]
        self.values.flatten(0, 1)[slots] = entries.values[at]
        self.entropies.view(-1)[slots] = entropies
        self.index.view(-1)[slots] = index


@dataclass(frozen=True)
class Items:
    """N items of a cache: those present before a block of images and those inserted during it.

    Attributes:
        keys: ``[N, D]``.
        values: ``[N, C]`` class probabilities, or ``[N, 0]``.
        classes: ``[N]``.
        born: ``[N]``: index of the item's image in the block, or -1.
        gone: ``[N]``: index of the image that replaced the item. Image t uses the items with ``born <= t < gone``.
    """

    keys: Tensor
    values: Tensor
    classes: Tensor
    born: Tensor
    gone: Tensor

    def affinities(self, features: Tensor, beta: float) -> Tensor:
        """Return ``[N, B]``: ``exp(-beta (1 - f k))`` for items present at an image's turn, else 0."""
        turn = torch.arange(len(features), device=features.device)
        alive = (self.born[:, None] <= turn) & (turn < self.gone[:, None])
        return torch.where(alive, (-beta * (1 - self.keys @ features.t())).exp(), 0.0)


class TDAStream:
    """The two caches and the number of images seen so far.

    Args:
        classes: C.
        width: D.
        positive: Settings of the positive cache; None disables it.
        negative: Settings of the negative cache; None disables it.
        device: Device of the caches.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        positive: PositiveCache | None = PositiveCache(),  # noqa: B008  # frozen
        negative: NegativeCache | None = NegativeCache(),  # noqa: B008
        device: torch.device | str = "cpu",
    ) -> None:
        self.classes, self.width, self.device = classes, width, device
        self.positive, self.negative = positive, negative
        self.reset()

    def reset(self) -> None:
        """Empty both caches."""
        self.seen = 0
        self.slots = {
            name: Slots(self.classes, self.width, settings.capacity, values=name == "negative", device=self.device)
            for name, settings in (("positive", self.positive), ("negative", self.negative))
            if settings is not None
        }

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors of the stream by name, on the CPU, ready for safetensors."""
        tensors = {f"{name}.{key}": x.cpu().clone() for name, s in self.slots.items() for key, x in s.tensors().items()}
        return {"seen": torch.tensor([self.seen]), **tensors}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of :meth:`state`.

        Raises:
            HeadError: Names or shapes do not match; the stream is unchanged in that case.
        """
        expected = self.state()
        wrong = [f"{name}: missing" for name in expected if name not in state]
        wrong += [f"{name}: unknown" for name in state if name not in expected]
        wrong += [
            f"{name}: {list(state[name].shape)} of {state[name].dtype}, expected {list(x.shape)} of {x.dtype}"
            for name, x in expected.items()
            if name in state and (state[name].shape, state[name].dtype) != (x.shape, x.dtype)
        ]
        if wrong:
            raise HeadError("these tensors do not match this TDA stream:\n  " + "\n  ".join(wrong))
        self.seen = int(state["seen"])
        for name, slots in self.slots.items():
            for key in slots.tensors():
                setattr(slots, key, state[f"{name}.{key}"].to(self.device, copy=True))

    def score(self, summary: Summary) -> Scored:
        """Score B images in order; an image that enters a cache does so before it is scored."""
        blocks = [self._block(block) for block in _split(summary)]
        if not blocks:
            return Scored(*[summary.logits] * 4)
        added, removed = (torch.cat(column) for column in zip(*blocks, strict=True))
        return Scored(summary.logits + added - removed, summary.logits, added, removed)

    def _block(self, summary: Summary) -> tuple[Tensor, Tensor]:
        added, removed = torch.zeros_like(summary.logits), torch.zeros_like(summary.logits)
        if self.positive is not None:
            everyone = [True] * len(summary.features)
            items = self.slots["positive"].insert(summary, everyone, self.seen)
            weights = items.affinities(summary.features, self.positive.beta)
            # Values are one-hot, so their product with the weights is a sum over the items of each class.
            sums = weights.new_zeros(self.classes, len(summary.features)).index_add_(0, items.classes, weights)
            added = self.positive.alpha * sums.t()
        if self.negative is not None:
            negative = self.negative
            gate = summary.entropies / max(math.log2(self.classes), torch.finfo(torch.float32).tiny)
            allowed = ((gate > negative.entropy[0]) & (gate < negative.entropy[1])).tolist()
            items = self.slots["negative"].insert(summary, allowed, self.seen)
            weights = items.affinities(summary.features, negative.beta)
            against = ((items.values > negative.mask[0]) & (items.values < negative.mask[1])).to(weights.dtype)
            removed = negative.alpha * weights.t() @ against
        self.seen += len(summary.features)
        return added, removed


def _split(summary: Summary) -> list[Summary]:
    fields = (summary.features, summary.logits, summary.probabilities, summary.entropies, summary.predictions)
    columns = [x.split(_BLOCK) for x in fields] if len(summary.features) else []
    return [Summary(*row) for row in zip(*columns, strict=True)]
