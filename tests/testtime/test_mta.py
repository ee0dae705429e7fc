"""MTA's robust mean: reference values, independence of images and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.testtime.mta import bandwidths, density, inlierness_step, mean_shift, mode_step


def cloud(seed: int, images: int, views: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return unit views ``[B, V, 32]`` around one centre per image, and their logits ``[B, V, 6]``."""
    generator = torch.Generator().manual_seed(seed)
    centre = F.normalize(torch.randn(images, 1, 32, generator=generator), dim=-1)
    noise = F.normalize(torch.randn(images, views, 32, generator=generator), dim=-1)
    text = F.normalize(torch.randn(6, 32, generator=generator), dim=-1)
    unit = F.normalize(centre + spread * noise, dim=-1)
    return unit, 100 * unit @ text.t()


def test_logits_match_reference_values() -> None:
    rng = np.random.RandomState(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    text = torch.from_numpy(unit(rng.randn(7, 16)))
    views = torch.from_numpy(unit(unit(rng.randn(1, 16)) + 0.6 * unit(rng.randn(64, 16))))[None]
    result = mean_shift(views, 20 * views @ text.t())
    expected = [9.161828, -3.738809, 1.104933, -3.631958, 1.619083, 3.093603, 2.961292]
    assert (20 * result.mode @ text.t())[0].tolist() == pytest.approx(expected, abs=2e-6)


def test_images_of_a_batch_are_independent() -> None:
    # Double precision, because rounding near the tolerance could change the number of rounds.
    views, logits = (x.double() for x in cloud(1, 9, 24))
    together = mean_shift(views, logits)
    for i in range(len(views)):
        alone = mean_shift(views[i : i + 1], logits[i : i + 1])
        torch.testing.assert_close(alone.mode[0], together.mode[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.inlierness[0], together.inlierness[i], rtol=0, atol=1e-12)


def test_an_image_stops_like_a_plain_loop() -> None:
    views, logits = cloud(2, 1, 16)
    result = mean_shift(views, logits)
    mode, scores = views[:, 0], torch.full((1, 16), 1 / 16)
    for _ in range(5):
        kernel = density(views, mode, result.bandwidth)
        for _ in range(5):
            before, scores = scores, inlierness_step(kernel, result.affinity, scores, 4.0, 0.2)
            if float((scores - before).norm()) < 1e-6:
                break
        for _ in range(5):
            before, mode = mode, mode_step(views, mode, density(views, mode, result.bandwidth), scores)
            if float((mode - before).norm()) < 1e-6:
                break
    assert torch.equal(result.mode, mode) and torch.equal(result.inlierness, scores)


@pytest.mark.parametrize("views", [1, 2, 5, 40])
def test_the_mode_of_one_view_or_equal_views_is_that_view(views: int) -> None:
    view, logits = cloud(3, 4, 1)
    result = mean_shift(view.expand(-1, views, -1), logits.expand(-1, views, -1))
    torch.testing.assert_close(result.mode, view[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(result.inlierness, torch.full((4, views), 1 / views))


@pytest.mark.parametrize("views", [2, 3, 4])
def test_few_views_give_finite_results(views: int) -> None:
    unit, logits = cloud(4, 5, views)
    result = mean_shift(unit, logits)
    assert bool(result.mode.isfinite().all()) and bool(result.inlierness.isfinite().all())
    assert bool((bandwidths(unit) > 0).all())


def test_scores_sum_to_one_modes_are_unit_and_outliers_get_low_scores() -> None:
    views, logits = cloud(5, 3, 32, spread=0.4)
    views = views.clone()
    views[:, 20:] = F.normalize(torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(9)), dim=-1)
    result = mean_shift(views, logits)
    torch.testing.assert_close(result.inlierness.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(result.mode.norm(dim=-1), torch.ones(3))
    near = (result.mode[:, None] * views).sum(dim=-1)
    assert float(near[:, :20].min()) > float(near[:, 20:].max())
    assert float(result.inlierness[:, 20:].mean()) < float(result.inlierness[:, :20].mean())


def test_the_order_of_views_after_the_first_does_not_matter() -> None:
    views, logits = cloud(6, 2, 20)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(19)])
    torch.testing.assert_close(
        mean_shift(views[:, order], logits[:, order]).mode, mean_shift(views, logits).mode, rtol=1e-4, atol=1e-5
    )


def test_a_mode_with_zero_kernel_does_not_change() -> None:
    views, _ = cloud(7, 1, 4)
    kernel = torch.zeros(1, 4)
    assert torch.equal(mode_step(views, views[:, 0], kernel, torch.full((1, 4), 0.25)), views[:, 0])
