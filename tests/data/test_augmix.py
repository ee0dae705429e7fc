"""AugMix against its recipe, written out by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlprompt.data import augmix as module
from vlprompt.data.augmix import OPERATIONS, augmix
from vlprompt.data.transforms import Transform


class Preprocess:
    size, mean, std, interpolation = 60, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic"
    resize_mode, fill_color = "shortest", 0


def noise(width: int = 60, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Scripted:
    """A generator that returns given numbers."""

    def __init__(self, weights: list[float], share: float, integers: list[int], uniforms: list[float]) -> None:
        self.weights, self.share, self.whole, self.numbers = weights, share, iter(integers), iter(uniforms)

    def dirichlet(self, alpha: Any) -> np.ndarray[Any, Any]:
        assert list(alpha) == [1, 1, 1]
        return np.array(self.weights)

    def beta(self, a: float, b: float) -> float:
        assert (a, b) == (1, 1)
        return self.share

    def integers(self, low: int, high: int | None = None) -> int:
        value = next(self.whole)
        assert (low <= value < high) if high is not None else 0 <= value < low
        return value

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        value = next(self.numbers)
        assert low <= value <= high and (low, high) in ((0.0, 1.0), (0.1, 1.0))
        return value


def test_the_mixture() -> None:
    image = noise()
    names = [operation.__name__ for operation in OPERATIONS]
    chains = [["equalize"], ["rotate", "solarize"], ["translate_x", "shear_y", "posterize"]]
    integers = [number for chain in chains for number in (len(chain), *(names.index(name) for name in chain))]
    levels = [(0.3, 0.1), (0.7, 0.1), (0.5, 0.9), (0.9, 0.1), (0.6, 0.9), (1.0, 0.1)]
    rng: Any = Scripted([0.5, 0.3, 0.2], 0.25, integers, [value for pair in levels for value in pair])
    got = augmix(image, rng)
    bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
    second = ImageOps.solarize(image.rotate(2, resample=bilinear), 256 - 12)
    third = image.transform((60, 60), affine, (1, 0, 1, 0, 1, 0), resample=bilinear)  # int(0.9 * 60 / 30)
    third = third.transform((60, 60), affine, (1, 0, 0, -0.018, 1, 0), resample=bilinear)
    first, third = ImageOps.equalize(image), ImageOps.posterize(third, 4)
    pixels = [np.asarray(changed, dtype=float) for changed in (first, second, third)]
    mixture = 0.5 * pixels[0] + 0.3 * pixels[1] + 0.2 * pixels[2]
    np.testing.assert_allclose(got, 0.25 * np.asarray(image, dtype=float) + 0.75 * mixture, atol=1e-4)
    assert got.dtype == np.float32 and got.shape == (60, 60, 3)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("size", [(60, 60), (224, 224), (7, 40)])
def test_operations_keep_size_and_mode(operation: module.Operation, size: tuple[int, int]) -> None:
    image = noise(*size)
    before = image.tobytes()
    for level, sign in ((0.1, 1), (1.0, -1)):
        changed = operation(image, level, sign)
        assert changed.size == size and changed.mode == "RGB"
    assert image.tobytes() == before


def test_levels_at_224_pixels() -> None:
    image = noise(224, 224)
    moved = np.asarray(module.translate_x(image, 0.99, 1))
    assert np.array_equal(moved[:, :-7], np.asarray(image)[:, 7:]), "int(7.47 * 0.99) pixels"
    assert module.rotate(image, 0.3, 1).tobytes() == image.tobytes(), "int(0.9) degrees"
    assert module.posterize(image, 1.0, 1).tobytes() == module.posterize(image, 0.1, 1).tobytes()


def test_every_operation_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[int] = Counter()

    def counted(number: int) -> module.Operation:
        def operation(image: Any, level: float, sign: int) -> Any:
            drawn[number] += 1
            return image

        return operation

    monkeypatch.setattr(module, "OPERATIONS", tuple(counted(number) for number in range(9)))
    rng = np.random.default_rng(0)
    for _ in range(300):
        augmix(noise(4, 4), rng)
    total = sum(drawn.values())
    assert set(drawn) == set(range(9)) and 1700 < total < 1900, "3 chains of 2 on average"
    assert max(drawn.values()) < 1.5 * total / 9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63))
def test_mixtures_stay_between_black_and_white(seed: int) -> None:
    mixed = augmix(noise(12, 12), np.random.default_rng(seed))
    assert mixed.min() >= 0 and mixed.max() <= 255
    again = augmix(noise(12, 12), np.random.default_rng(seed))
    assert np.array_equal(mixed, again)


def test_mixing_pixels_equals_mixing_normalised_images() -> None:
    """TPT normalises before it mixes."""
    transform = Transform(Preprocess(), "augmix")
    rng = np.random.default_rng(3)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 8, 8)).astype(np.float32)) for _ in range(4)]
    weights = torch.tensor([0.4, *(0.6 * rng.dirichlet(np.ones(3)))], dtype=torch.float32)
    mixed = transform.finish(sum(w * image for w, image in zip(weights, images, strict=True))[None])[0]  # type: ignore[index]
    expected = sum(w * transform.finish(image[None])[0] for w, image in zip(weights, images, strict=True))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_the_transform_mixes_the_crop() -> None:
    """``augmix`` takes the same crop as ``crop``, drawn from torch's generator."""
    crop, mixed, image = Transform(Preprocess(), "crop"), Transform(Preprocess(), "augmix"), noise(90, 70)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = crop.pixels(image)
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, (1,))))
        torch.manual_seed(seed)
        got = mixed.pixels(image)
        assert got.dtype == np.float32 and got.shape == (3, 60, 60)
        assert np.array_equal(got, augmix(Image.fromarray(expected.transpose(1, 2, 0)), rng).transpose(2, 0, 1))
