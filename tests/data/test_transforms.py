"""The views against the recipe of datasets.md section 4, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vlprompt.data import describe_transform, train_transform
from vlprompt.data import test_transform as clip_view
from vlprompt.data.transforms import Transform, check_kind
from vlprompt.errors import ConfigError


class Preprocess:
    size, mean, std, interpolation = 32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic"
    resize_mode = "shortest"


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode).convert("RGB")


@pytest.mark.parametrize("size", [(32, 32), (50, 33), (33, 50), (20, 90), (7, 5), (301, 128)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_test_view_is_clips(size: tuple[int, int], mode: str) -> None:
    picture, side = noise(*size, mode), Preprocess.size
    width, height = picture.size
    short = min(width, height)
    new = (side, int(side * height / width)) if width == short else (int(side * width / height), side)
    resized = picture.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - side) / 2), round((new[1] - side) / 2)
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    mean, std = np.float32(Preprocess.mean), np.float32(Preprocess.std)
    expected = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())
    got = clip_view(Preprocess())(picture)
    assert got.shape == (3, side, side) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_random_view_uses_the_cpu_generator() -> None:
    view, picture = train_transform(Preprocess(), "random"), noise(64, 48)
    torch.manual_seed(3)
    first, second = view(picture), view(picture)
    torch.manual_seed(3)
    assert torch.equal(view(picture), first) and not torch.equal(first, second)
    assert first.shape == (3, 32, 32)


def test_center_view_is_the_test_view() -> None:
    picture = noise(40, 60)
    assert torch.equal(train_transform(Preprocess(), "center")(picture), clip_view(Preprocess())(picture))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(50, 33), (20, 90), (32, 32)])
def test_every_resize_mode_is_open_clips(mode: str, size: tuple[int, int]) -> None:
    class Weights(Preprocess):
        resize_mode = mode

    config = PreprocessCfg(32, mean=Preprocess.mean, std=Preprocess.std, interpolation="bicubic", resize_mode=mode)
    assert torch.equal(clip_view(Weights())(noise(*size)), image_transform_v2(config, is_train=False)(noise(*size)))


def test_refused() -> None:
    with pytest.raises(ConfigError, match="transform is 'centre'. Did you mean 'center'"):
        train_transform(Preprocess(), "centre")

    class Odd(Preprocess):
        interpolation = "bicubical"

    with pytest.raises(ConfigError, match="'bicubical'. Did you mean 'bicubic'"):
        clip_view(Odd())


def test_descriptions_tell_views_apart() -> None:
    class Larger(Preprocess):
        size = 48

    class Squashed(Preprocess):
        resize_mode = "squash"

    texts = {describe_transform(pre, kind) for pre in (Preprocess(), Larger()) for kind in ("random", "center")}
    texts.add(describe_transform(Squashed(), "center"))
    assert len(texts) == 5 and all("\n" not in text and "bicubic" in text for text in texts)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [(300, 200), (40, 60), (17, 900)])
def test_the_tensor_view_takes_the_same_crops_and_nearly_the_same_pixels(mode: str, size: tuple[int, int]) -> None:
    """Within 8 of 255 levels of Pillow's resize, and within half a level on average."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (size[1] // 8 + 2, size[0] // 8 + 2, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).convert("RGB")
    exact, quick = Transform(Preprocess(), "random"), Transform(Preprocess(), "random-tensor")
    for seed in range(8):
        torch.manual_seed(seed)
        expected = exact.pixels(picture).astype(int)
        after = torch.get_rng_state()
        for source in (picture, np.asarray(picture)):
            torch.manual_seed(seed)
            got = quick.pixels(source).astype(int)
            assert torch.equal(torch.get_rng_state(), after)
            assert np.abs(got - expected).max() <= 8 and np.abs(got - expected).mean() < 0.5
    assert "by tensor" in describe_transform(Preprocess(), "random-tensor")


@pytest.mark.parametrize("kind", ["crop", "random-half"])
def test_the_views_that_methods_ask_for_are_torchvisions(kind: str) -> None:
    """TPT: torchvision's defaults, bilinear; Tip-Adapter: from half of the area on, bicubic."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    crop = (
        transforms.RandomResizedCrop(32)
        if kind == "crop"
        else transforms.RandomResizedCrop(32, scale=(0.5, 1), interpolation=InterpolationMode.BICUBIC)
    )
    normalise = transforms.Normalize(Preprocess.mean, Preprocess.std)
    whole = transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5), transforms.ToTensor(), normalise])
    view, picture = Transform(Preprocess(), kind), noise(70, 50)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = whole(picture)
        torch.manual_seed(seed)
        assert torch.equal(view(picture), expected)


def test_views_that_methods_ask_for_are_no_data_views() -> None:
    for kind in ("crop", "augmix"):
        assert Transform(Preprocess(), kind).kind == kind
        with pytest.raises(ConfigError, match=f"transform is '{kind}'"):
            check_kind(kind)
    texts = {describe_transform(Preprocess(), kind) for kind in ("random", "random-half", "crop", "augmix", "center")}
    assert len(texts) == 5
    assert "scale 0.5-1 ratio 3/4-4/3 bicubic; mirror 0.5;" in describe_transform(Preprocess(), "random-half")
    assert "scale 0.08-1 ratio 3/4-4/3 bilinear; mirror 0.5; AugMix" in describe_transform(Preprocess(), "augmix")
