"""Search for hyperparameters of caches on labelled images: grids, and the search over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprompt.errors import ConfigError, DataError

#: Images compared at once; few on a CPU, so that their logits stay in its cache.
_IMAGES = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        values: The chosen value of each hyperparameter.
        accuracy: Accuracy, 0 to 1, of every point of the grid; one axis per hyperparameter, in the order of ``values``.
    """

    values: dict[str, float]
    accuracy: Tensor

    @property
    def best(self) -> float:
        """The accuracy of the chosen point."""
        return float(self.accuracy.max())


def grid(top: float, steps: int, start: float = 0.1) -> list[float]:
    """Return ``start + i (top - start) / steps`` for i from 0 to ``steps - 1``: Tip-Adapter's grid, without ``top``.

    Raises:
        ConfigError: Fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"a grid of {steps} steps holds nothing; accepted: 1 or more")
    return [start + i * (top - start) / steps for i in range(steps)]


def first_best(accuracy: Tensor) -> tuple[int, ...]:
    """Return the index of the largest entry; ties go to the first, in row-major order."""
    flat = accuracy.flatten()
    place = int((flat == flat.max()).nonzero()[0])
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), accuracy.shape))


@torch.no_grad()
def search_grid(
    labels: Tensor,
    prepare: Callable[[int, int], tuple[Tensor, Any]],
    evidences: Callable[[Any, float], Sequence[Tensor]],
    values: Mapping[str, Sequence[float]],
) -> SearchResult:
    """Return the best point of the grid of ``beta``, ``alpha`` and, where it is given, ``gamma``.

    Args:
        labels: Labels ``[M]`` of the images.
        prepare: ``prepare(start, stop)`` gives the zero-shot logits ``[B, C]`` of the images between, and the first
            argument of ``evidences``.
        evidences: ``evidences(prepared, beta)`` gives the evidence ``[C, B]`` of the cache, one for each gamma.
        values: The grid: ``beta``, then ``alpha``, then ``gamma`` or nothing.

    Raises:
        DataError: No images.
        ConfigError: An axis without values.
    """
    if not len(labels):
        raise DataError("there are no images to choose hyperparameters on")
    if empty := [name for name, axis in values.items() if not len(axis)]:
        raise ConfigError(f"the grid has no values of {', '.join(empty)}; accepted: 1 or more")
    betas, alphas, *rest = values.values()
    gammas = len(rest[0]) if rest else 1
    correct = torch.zeros(len(betas), len(alphas), gammas, dtype=torch.int64)
    images = _IMAGES.get(labels.device.type, 512)
    for start in range(0, len(labels), images):
        stop = min(start + images, len(labels))
        zeroshot, prepared = prepare(start, stop)
        for i, beta in enumerate(betas):
            for k, evidence in enumerate(evidences(prepared, beta)):
                correct[i, :, k] += _correct(zeroshot, evidence.t().contiguous(), labels[start:stop], alphas).cpu()
    accuracy = correct.double() / len(labels)
    accuracy = accuracy if rest else accuracy[..., 0]
    place = first_best(accuracy)
    chosen = {name: float(axis[i]) for (name, axis), i in zip(values.items(), place, strict=True)}
    return SearchResult(chosen, accuracy)


def _correct(zeroshot: Tensor, evidence: Tensor, labels: Tensor, alphas: Sequence[float]) -> Tensor:
    """Return the number of images that ``zeroshot + alpha evidence`` classifies correctly, for each alpha.

    Both are ``[B, C]``. The largest logit of the other classes is compared with that of the label, for all alphas at
    once, which is many times faster than argmax. Where they are equal up to rounding, argmax decides.
    """
    rows, steps = labels[:, None], torch.tensor(list(alphas)).to(zeroshot)
    label = zeroshot.gather(1, rows) + steps * evidence.gather(1, rows)
    others = torch.addcmul(zeroshot.scatter(1, rows, -torch.inf), steps[:, None, None], evidence).amax(dim=-1).t()
    right = label > others
    image, step = ((label - others).abs() <= 1e-5 * label.abs().clamp(min=1)).nonzero(as_tuple=True)
    if len(image):
        logits = zeroshot[image] + steps[step, None] * evidence[image]
        right[image, step] = logits.argmax(dim=-1) == labels[image]
    return right.sum(dim=0)


def decades(low: int, high: int) -> list[float]:
    """Return the powers of ten from ``10 ** low`` to ``10 ** high``."""
    return [math.pow(10.0, exponent) for exponent in range(low, high + 1)]


def search_scalar(name: str, values: Sequence[float], score: Callable[[float], float]) -> SearchResult:
    """Return the best value of one hyperparameter; ties go to the first.

    Raises:
        ConfigError: No values.
    """
    if not values:
        raise ConfigError(f"the grid has no values of {name}; accepted: 1 or more")
    accuracy = torch.tensor([score(value) for value in values], dtype=torch.float64)
    return SearchResult({name: float(values[first_best(accuracy)[0]])}, accuracy)


def search_exponent(exponents: Sequence[float], steps: int, score: Callable[[float], float]) -> float:
    """Return the exponent of ten of a hyperparameter: the best of a coarse grid, then refined by bisection.

    Ties in the grid go to the first point. The interval of a decade to either side of it is halved ``steps`` times,
    towards the better of its ends; ties go to the lower one. The last end kept is returned, as published, even if the
    peak is better (CoOp: lpclip/linear_probe.py).

    Args:
        exponents: The grid.
        steps: Number of halvings; with 0 the best of the grid is returned.
        score: The quantity to maximise; called once for each exponent.

    Raises:
        ConfigError: No exponents.
    """
    if not exponents:
        raise ConfigError("the grid has no exponents; accepted: 1 or more")
    scores = functools.cache(score)
    coarse = [float(exponent) for exponent in exponents]
    kept = coarse[first_best(torch.tensor([scores(exponent) for exponent in coarse], dtype=torch.float64))[0]]
    low, high = kept - 1, kept + 1
    for _ in range(steps):
        middle = (low + high) / 2
        if scores(low) < scores(high):
            kept, low = high, middle
        else:
            kept, high = low, middle
    return kept
