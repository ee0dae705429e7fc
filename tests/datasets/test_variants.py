"""Variants: fixed changes of an image, applied when it is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlprompt.datasets.variants import NOISE_DEVIATION, VariantSource, split_variant, variant_problem


@dataclass(frozen=True)
class Drawn:
    """A red square on white."""

    def open(self):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill=(200, 30, 30))
        return image

    def stamp(self):
        return "drawn"


def pixels(variant, key="a/1F408.webp"):
    return np.asarray(VariantSource(Drawn(), variant, key).open()).astype(int)


@pytest.mark.parametrize("variant", ["1", "2", "15", "noise", "blur"])
def test_a_variant_is_deterministic(variant):
    first = pixels(variant)
    assert first.shape == (64, 64, 3) and (first == pixels(variant)).all()
    assert (first != np.asarray(Drawn().open())).any()


def test_variants_differ_from_each_other_and_between_images():
    assert (pixels("1") != pixels("2")).any()
    assert (pixels("1") != pixels("1", "b/1F408.webp")).any()
    assert (pixels("noise") != pixels("noise", "b/1F408.webp")).any()


def test_moved_variants_keep_the_drawing():
    for variant in map(str, range(1, 30)):
        red = (pixels(variant)[..., 0] - pixels(variant)[..., 1]) > 80
        assert 300 < red.sum() < 1300  # 1,024 pixels, zoomed by 0.75 to 1.05 each way


def test_noise_has_the_stated_deviation():
    flat = Image.new("RGB", (256, 256), (128, 128, 128))

    class Flat(Drawn):
        def open(self):
            return flat

    noise = np.asarray(VariantSource(Flat(), "noise", "a").open()).astype(float) - 128
    assert noise.std() == pytest.approx(255 * NOISE_DEVIATION, rel=0.02) and abs(noise.mean()) < 0.3
    third, fourth = (noise**3).mean() / noise.std() ** 3, (noise**4).mean() / noise.std() ** 4
    assert abs(third) < 0.05 and fourth == pytest.approx(2.9, abs=0.1)  # twelve uniform numbers: 3 - 6/5/12


def test_blur_spreads_edges_and_keeps_brightness():
    clean, soft = np.asarray(Drawn().open()).astype(float), pixels("blur").astype(float)
    assert abs(np.diff(soft, axis=0)).max() < abs(np.diff(clean, axis=0)).max()
    assert soft.mean() == pytest.approx(clean.mean(), abs=1)


def test_stamps_differ_between_variants():
    stamps = {VariantSource(Drawn(), variant, "a").stamp() for variant in ("1", "2", "noise")}
    assert len(stamps) == 3 and all("drawn" in stamp for stamp in stamps)


def test_names_of_variants():
    assert split_variant("a/b.webp#12") == ("a/b.webp", "12") and split_variant("a/b.webp") == ("a/b.webp", "")
    for path in ("a/b.webp", "a/b.webp#1", "a/b.webp#noise", "a/b.webp#blur"):
        assert variant_problem(path) is None
    for path in ("a/b.webp#", "a/b.webp#fog", "a/b.webp#-1", "a/b.webp#1#2", "a/b.webp#1000", "a/b.webp#²"):
        assert "accepted: noise, blur, or a number" in str(variant_problem(path))
