"""Tip-Adapter's search: full matrix products for every grid point, as published, compared with grouped sums.

Run: python bench/testtime_caches.py [--classes 1000] [--json], or bench/testtime.py --method tip_adapter

``naive`` is the published loop: for every (beta, alpha) it multiplies the validation features with all keys and with
the text classifier, and the affinities with dense one-hot values. ``ours`` is :meth:`vlprompt.caches.TipAdapter.search`
on the same inputs. Features are random, of ViT-B/16's size, near a random text classifier. Both return the accuracy of
every grid point; ``max_rel_diff`` is the largest relative difference of these accuracies and of the logits at the
chosen point.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlprompt.caches.search import grid
from vlprompt.caches.tip_adapter import TipAdapter  # noqa: E402

SCALE, TOPS = 100.0, (7.0, 3.0)


def tip_search_row(
    classes: int = 1000, *, shots: int = 16, images: int = 100, dim: int = 512, steps: tuple[int, int] = (10, 20)
) -> dict[str, Any]:
    """Return the seconds of both sides, their ratio and the largest relative difference of their results.

    Args:
        classes: C.
        shots: Keys per class.
        images: Validation images.
        dim: Feature size; 512 is ViT-B/16's.
        steps: Numbers of betas and alphas. The official grid has 200 and 20; fewer betas shorten the naive side and
            hardly change the ratio.
    """
    text, keys, labels, val, truth = _problem(classes, shots, images, dim)
    betas, alphas = (grid(top, count) for top, count in zip(TOPS, steps, strict=True))
    cache = TipAdapter(text, SCALE).fit(keys, labels)
    stored, values = F.normalize(keys, dim=-1).t(), F.one_hot(labels, classes).float()
    unit = F.normalize(val, dim=-1)
    cache.search(val[:8], truth[:8], betas[:1], alphas[:1])  # warms up both sides
    naive_logits(unit[:8], stored, values, text.t(), betas[0], alphas[0])
    start = time.perf_counter()
    result = cache.search(val, truth, betas, alphas)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    accuracy, best = naive_search(unit, truth, stored, values, text.t(), betas, alphas)
    naive = time.perf_counter() - start
    naive_result = naive_logits(unit, stored, values, text.t(), *best)
    same = list(result.values.values()) == list(best)
    return {
        "method": "tip_adapter",
        "what": "search",
        "classes": classes,
        "points": len(betas) * len(alphas),
        "ours": {"seconds": ours},
        "naive": {"seconds": naive},
        "ratio_seconds": naive / ours,
        "max_rel_diff": max(
            float((result.accuracy - accuracy).abs().max() / accuracy.max()),
            float((cache.logits(val) - naive_result).abs().max() / naive_result.abs().max()) if same else float("inf"),
        ),
    }


def naive_logits(val: Tensor, keys: Tensor, values: Tensor, text: Tensor, beta: float, alpha: float) -> Tensor:
    """Return the logits ``[M, C]`` of unit features ``[M, D]``, computed with three full matrix products.

    Args:
        val: ``[M, D]``.
        keys: ``[D, N]``, unit columns.
        values: ``[N, C]``, one-hot.
        text: ``[D, C]``, unit columns.
        beta: Sharpness.
        alpha: Weight of the cache.
    """
    affinity = val @ keys
    return SCALE * val @ text + ((-1) * (beta - beta * affinity)).exp() @ values * alpha


def naive_search(
    val: Tensor,
    truth: Tensor,
    keys: Tensor,
    values: Tensor,
    text: Tensor,
    betas: Sequence[float],
    alphas: Sequence[float],
) -> tuple[Tensor, tuple[float, float]]:
    """Return the accuracy of every grid point ``[len(betas), len(alphas)]`` and the first best (beta, alpha)."""
    accuracy = torch.zeros(len(betas), len(alphas), dtype=torch.float64)
    best, chosen = -1.0, (betas[0], alphas[0])
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            logits = naive_logits(val, keys, values, text, beta, alpha)
            accuracy[i, j] = (logits.argmax(dim=-1) == truth).double().mean()
            if accuracy[i, j] > best:
                best, chosen = float(accuracy[i, j]), (beta, alpha)
    return accuracy, chosen


def _problem(classes: int, shots: int, images: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return unit text ``[C, D]``, raw keys ``[N, D]``, their labels, raw validation features ``[M, D]``, labels."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = F.normalize(noise(classes, dim), dim=-1)
    # The images of a class surround a centre that is near the text feature of the class.
    centres = F.normalize(text + 3.5 * noise(classes, dim) / dim**0.5, dim=-1)
    labels = torch.arange(classes).repeat_interleave(shots)
    truth = torch.randint(classes, (images,), generator=generator)
    keys = centres[labels] + 2.0 * noise(len(labels), dim) / dim**0.5
    return text, keys, labels, centres[truth] + 2.0 * noise(images, dim) / dim**0.5, truth


def main(argv: list[str] | None = None) -> int:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description="Tip-Adapter's search: full products and grouped sums.")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes (default 1000)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args(argv)
    row = tip_search_row(options.classes)
    print(
        f"tip_adapter search, {row['classes']} classes, {row['points']} points: ours {row['ours']['seconds']:.2f} s, "
        f"naive {row['naive']['seconds']:.2f} s, x{row['ratio_seconds']:.1f}, diff {row['max_rel_diff']:.1e}"
    )
    if options.json:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
