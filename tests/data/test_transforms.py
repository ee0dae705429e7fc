"""Image transforms against their recipes, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vlprompt.data import describe_transform, train_transform
from vlprompt.data import test_transform as clip_transform
from vlprompt.data.transforms import Transform, check_kind
from vlprompt.errors import ConfigError


class Preprocess:
    size, mean, std, interpolation = 32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic"
    resize_mode, fill_color = "shortest", 0


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode).convert("RGB")


@pytest.mark.parametrize("size", [(32, 32), (50, 33), (33, 50), (20, 90), (7, 5), (301, 128)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_test_transform_is_clips(size: tuple[int, int], mode: str) -> None:
    image, side = noise(*size, mode), Preprocess.size
    width, height = image.size
    short = min(width, height)
    new = (side, int(side * height / width)) if width == short else (int(side * width / height), side)
    resized = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - side) / 2), round((new[1] - side) / 2)
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    mean, std = np.float32(Preprocess.mean), np.float32(Preprocess.std)
    expected = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())
    got = clip_transform(Preprocess())(image)
    assert got.shape == (3, side, side) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_the_random_transform_uses_the_cpu_generator() -> None:
    transform, image = train_transform(Preprocess(), "random"), noise(64, 48)
    torch.manual_seed(3)
    first, second = transform(image), transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first) and not torch.equal(first, second)
    assert first.shape == (3, 32, 32)


def test_the_center_transform_is_the_test_transform() -> None:
    image = noise(40, 60)
    assert torch.equal(train_transform(Preprocess(), "center")(image), clip_transform(Preprocess())(image))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(50, 33), (20, 90), (32, 32)])
def test_every_resize_mode_is_open_clips(mode: str, size: tuple[int, int]) -> None:
    class Weights(Preprocess):
        resize_mode = mode

    config = PreprocessCfg(32, mean=Preprocess.mean, std=Preprocess.std, interpolation="bicubic", resize_mode=mode)
    expected = image_transform_v2(config, is_train=False)(noise(*size))
    assert torch.equal(clip_transform(Weights())(noise(*size)), expected)


@pytest.mark.parametrize(("kind", "mode"), [("pad", "longest"), ("squash", "squash")])
@pytest.mark.parametrize("size", [(50, 33), (20, 90), (32, 32), (7, 5)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fill", [0, 127])
def test_pad_and_squash_are_open_clips(
    kind: str, mode: str, size: tuple[int, int], interpolation: str, fill: int
) -> None:
    class Weights(Preprocess):
        fill_color = fill

    Weights.interpolation = interpolation
    config = PreprocessCfg(
        32, mean=Preprocess.mean, std=Preprocess.std, interpolation=interpolation, resize_mode=mode, fill_color=fill
    )
    expected = image_transform_v2(config, is_train=False)(noise(*size))
    assert torch.equal(train_transform(Weights(), kind)(noise(*size)), expected)


def test_refused() -> None:
    with pytest.raises(ConfigError, match="transform is 'centre'. Did you mean 'center'"):
        train_transform(Preprocess(), "centre")

    class Odd(Preprocess):
        interpolation = "bicubical"

    with pytest.raises(ConfigError, match="'bicubical'. Did you mean 'bicubic'"):
        clip_transform(Odd())


def test_descriptions_differ_between_transforms() -> None:
    class Larger(Preprocess):
        size = 48

    class Squashed(Preprocess):
        resize_mode = "squash"

    texts = {describe_transform(pre, kind) for pre in (Preprocess(), Larger()) for kind in ("random", "center")}
    texts.add(describe_transform(Squashed(), "center"))
    texts.add(describe_transform(Preprocess(), "pad"))
    assert describe_transform(Preprocess(), "squash") in texts  # it is the test transform of squashed weights

    class Grey(Preprocess):
        fill_color = 127

    texts.add(describe_transform(Grey(), "pad"))
    assert len(texts) == 7 and all("\n" not in text and "bicubic" in text for text in texts)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [(300, 200), (40, 60), (17, 900)])
def test_random_tensor_takes_the_same_crops_with_nearly_equal_pixels(mode: str, size: tuple[int, int]) -> None:
    """Within 8 of 255 levels of Pillow's resize, and within half a level on average."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (size[1] // 8 + 2, size[0] // 8 + 2, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).convert("RGB")
    exact, quick = Transform(Preprocess(), "random"), Transform(Preprocess(), "random-tensor")
    for seed in range(8):
        torch.manual_seed(seed)
        expected = exact.pixels(image).astype(int)
        after = torch.get_rng_state()
        for source in (image, np.asarray(image)):
            torch.manual_seed(seed)
            got = quick.pixels(source).astype(int)
            assert torch.equal(torch.get_rng_state(), after)
            assert np.abs(got - expected).max() <= 8 and np.abs(got - expected).mean() < 0.5
    assert "by tensor" in describe_transform(Preprocess(), "random-tensor")


@pytest.mark.parametrize("kind", ["crop", "random-half"])
def test_crop_and_random_half_match_torchvision(kind: str) -> None:
    """TPT: torchvision's defaults, bilinear; Tip-Adapter: at least half of the area, bicubic."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    crop = (
        transforms.RandomResizedCrop(32)
        if kind == "crop"
        else transforms.RandomResizedCrop(32, scale=(0.5, 1), interpolation=InterpolationMode.BICUBIC)
    )
    normalise = transforms.Normalize(Preprocess.mean, Preprocess.std)
    whole = transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5), transforms.ToTensor(), normalise])
    transform, image = Transform(Preprocess(), kind), noise(70, 50)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = whole(image)
        torch.manual_seed(seed)
        assert torch.equal(transform(image), expected)


def test_view_kinds_are_refused_for_training_images() -> None:
    for kind in ("crop", "augmix"):
        assert Transform(Preprocess(), kind).kind == kind
        with pytest.raises(ConfigError, match=f"transform is '{kind}'"):
            check_kind(kind)
    texts = {describe_transform(Preprocess(), kind) for kind in ("random", "random-half", "crop", "augmix", "center")}
    assert len(texts) == 5
    assert "scale 0.5-1 ratio 3/4-4/3 bicubic; mirror 0.5;" in describe_transform(Preprocess(), "random-half")
    assert "scale 0.08-1 ratio 3/4-4/3 bilinear; mirror 0.5; AugMix" in describe_transform(Preprocess(), "augmix")
