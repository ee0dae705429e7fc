"""Pictures of a real diffusers pipeline of tiny random weights, from its configuration to the views of a test image."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask, FileSource, Sample, find_card
from vlprompt.errors import ConfigError, DataError
from vlprompt.generation import GenerationSettings, open_bank
from vlprompt.generation import pipeline as module
from vlprompt.generation.bank import create_bank
from vlprompt.generation.making import fill
from vlprompt.generation.pipeline import PipelineGenerator, load_generator
from vlprompt.generation.tiny import TINY, save_tiny
from vlprompt.needs import TestViews

FEW = GenerationSettings(pipeline="tiny", steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(tmp_path_factory.mktemp(name), name) for name in TINY}


@pytest.fixture(scope="module")
def makers(folders: dict[str, Path]) -> dict[str, PipelineGenerator]:
    return {name: maker(folders[name]) for name in TINY}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def maker(folder: Path, **settings: Any) -> PipelineGenerator:
    return load_generator(dataclasses.replace(FEW, pipeline=str(folder), **settings), "cpu")


def image(number: int, size: tuple[int, int] = (30, 40)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def numbers(pictures: Sequence[Image.Image | None]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


@pytest.mark.parametrize("name", TINY)
def test_images_depend_on_source_and_seed_but_not_on_the_batch(name: str, makers: dict[str, PipelineGenerator]) -> None:
    images, seeds = [image(n) for n in (1, 2, 3, 1, 1)], [1, 2, 3, 1, 4]
    torch.manual_seed(0)
    whole = numbers(makers[name].generate(images, seeds))
    assert whole.shape == (5, 16, 16, 3)
    torch.manual_seed(99)
    alone = np.concatenate(
        [numbers(makers[name].generate([one], [seed])) for one, seed in zip(images, seeds, strict=True)]
    )
    assert np.abs(whole - alone).max() <= 1, "a rounding at most"
    assert np.array_equal(whole, numbers(makers[name].generate(images, seeds))), "and the same batch to the bit"
    assert np.abs(whole[0] - whole[3]).max() <= 1 and np.abs(whole[0] - whole[4]).mean() > 10
    other = numbers(makers[name].generate([image(2)], [1]))
    assert np.abs(whole[0] - other[0]).max() > 1, "the image matters"


def test_the_condition_is_difftpts(makers: dict[str, PipelineGenerator], monkeypatch: pytest.MonkeyPatch) -> None:
    """ToTensor, Resize to a square without antialiasing, CLIP's Normalize (image_generator_R.py)."""
    from torchvision import transforms

    one = makers["tiny"]
    official = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.Normalize([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ]
    )
    seen: dict[str, Any] = {}
    usual = one._pipe

    def watched(**inputs: Any) -> Any:
        seen.update(inputs)
        return usual(**inputs)

    monkeypatch.setattr(one, "_pipe", watched)
    one.generate([image(1), image(2)], [1, 2])
    assert torch.equal(seen["image"], torch.stack([official(image(1)), official(image(2))]))
    assert (seen["guidance_scale"], seen["num_inference_steps"], seen["eta"]) == (3.0, 2, 0.0)
    assert [one.initial_seed() for one in seen["generator"]] == [1, 2]
    assert {one.device.type for one in seen["generator"]} == {"cpu"}


def test_strength_says_how_much_of_the_image_stays(folders: dict[str, Path]) -> None:
    start = np.asarray(image(1, (16, 16)).resize((16, 16))).astype(int)
    ways = [maker(folders["tiny-img2img"], strength=strength, steps=10) for strength in (0.1, 1.0)]
    assert len({one.recipe.id for one in ways}) == 2
    near, far = (numbers(one.generate([image(1, (16, 16))], [1]))[0] for one in ways)
    assert not np.array_equal(near, far) and near.shape == start.shape
    with pytest.raises(ConfigError, match="strength is 0.05, which leaves none of 10 steps"):
        maker(folders["tiny-img2img"], strength=0.05, steps=10)


def test_recipes_tell_apart_what_changes_pictures(folders: dict[str, Path], tmp_path: Path) -> None:
    first = maker(folders["tiny"])
    changes: list[dict[str, Any]] = [
        {"steps": 3},
        {"guidance": 2.0},
        {"eta": 0.5},
        {"size": 24},
        {"seed": 1},
        {"format": "webp"},
        {"precision": "bf16"},
        {"scheduler": "DDIMScheduler"},
    ]
    found = {first.recipe.id, *(maker(folders["tiny"], **change).recipe.id for change in changes)}
    found.add(maker(save_tiny(tmp_path / "other", seed=1)).recipe.id)
    found.add(maker(folders["tiny-img2img"]).recipe.id)
    assert len(found) == len(changes) + 3
    same = [maker(folders["tiny"], strength=0.5, prompt="x"), load_generator(FEW, "cpu")]
    assert {one.recipe.id for one in same} == {first.recipe.id}, "neither where it lies nor img2img's options"
    assert maker(folders["tiny-img2img"], prompt="x").recipe.id not in found


def test_other_sizes_types_and_schedulers(folders: dict[str, Path]) -> None:
    large = maker(folders["tiny"], size=24, precision="bf16", scheduler="DDIMScheduler")
    (picture,) = large.generate([image(1)], [1])
    assert picture is not None and picture.size == (24, 24) and np.asarray(picture).std() > 1
    assert large.recipe.facts["precision"] == "bf16" and large.recipe.facts["scheduler"]["class"] == "DDIMScheduler"
    assert large._pipe.unet.dtype == torch.bfloat16
    assert maker(folders["tiny"]).recipe.facts["precision"] == "fp32", "auto, on the CPU"


def test_flagged_pictures_do_not_come_out_black(folders: dict[str, Path]) -> None:
    one = maker(folders["tiny"])

    def checker(images: torch.Tensor, clip_input: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        flags = [number % 2 == 1 for number in range(len(images))]
        return torch.stack([image * (not bad) for image, bad in zip(images, flags, strict=True)]), flags

    one._pipe.safety_checker = checker
    made = one.generate([image(n) for n in range(3)], [1, 2, 3])
    assert [picture is None for picture in made] == [False, True, False]


def test_a_checker_is_loaded_unless_it_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionImageVariationPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(folders["tiny"], safety_checker=checker)
    pipe.save_pretrained(tmp_path / "checked")
    on, off = (maker(tmp_path / "checked", safety_checker=word) for word in ("on", "off"))
    assert on._pipe.safety_checker is not None and off._pipe.safety_checker is None
    assert (on.recipe.facts["safety_checker"], off.recipe.facts["safety_checker"]) == (True, False)
    assert maker(folders["tiny"]).recipe.facts["safety_checker"] is False, "on, but there is none"
    assert len(on.generate([image(1)], [1])) == len(off.generate([image(1)], [1])) == 1


def test_errors_name_pipeline_value_and_what_to_do(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--pipeline './nowhere': there is no such folder.*tiny or tiny-img2img"):
        load_generator(dataclasses.replace(FEW, pipeline="./nowhere"), "cpu")
    with pytest.raises(ConfigError, match=r"no model_index.json"):
        maker(tmp_path)
    with pytest.raises(ConfigError, match=r"nobody/nothing \(revision r\) cannot be fetched.*hf download nobody"):
        load_generator(dataclasses.replace(FEW, pipeline="nobody/nothing", revision="r"), "cpu", offline=True)
    with pytest.raises(ConfigError, match=r"--scheduler is 'DDIMSchedule'. Did you mean 'DDIMScheduler'"):
        maker(folders["tiny"], scheduler="DDIMSchedule")
    with pytest.raises(ConfigError, match=r"steps is 0; accepted: a whole number of 1 or more"):
        maker(folders["tiny"], steps=0)
    (tmp_path / "audio").mkdir()
    index = {"_class_name": "AudioLDMPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "audio" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"audio is a AudioLDMPipeline, which does not generate images from images"):
        maker(tmp_path / "audio")
    damaged = save_tiny(tmp_path / "damaged")
    (damaged / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="does not name the pipeline"):
        maker(damaged)
    weights = next((save_tiny(damaged) / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"Pipeline .*damaged cannot be loaded.*hf download"):
        maker(damaged)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlprompt\[diffusion\]'"):
        maker(folders["tiny"])


def test_too_large_a_batch(makers: dict[str, PipelineGenerator], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(makers["tiny"], "_pipe", full)
    with pytest.raises(ConfigError, match="--batch-size is 2, too large for"):
        makers["tiny"].generate([image(1), image(2)], [1, 2])


def test_reading_a_bank_loads_no_diffusers() -> None:
    import subprocess

    code = "import sys, vlprompt.generation; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parents[2])


@pytest.mark.parametrize("name", TINY)
def test_from_pipeline_to_views(
    name: str, makers: dict[str, PipelineGenerator], tmp_path: Path, paint: Callable[..., Path], preprocess: Any
) -> None:
    parts = {
        part: [Sample(f"{n}.png", n % 2, FileSource(str(paint(tmp_path / part / f"{n}.png", n)))) for n in range(count)]
        for part, count in (("train", 2), ("test", 3))
    }
    task = FewShotTask(
        "toy",
        ["a", "b"],
        ["a", "b"],
        "a {}.",
        **parts,
        val=[],
        shots=1,
        seed=1,
        classes="all",
        split_sha256="s",
        shots_sha256="t",
        card=find_card("folder"),
    )
    bank = create_bank(tmp_path / "bank", makers[name].recipe)
    filled = fill(bank, makers[name], task.test, 2, 4)
    assert (filled.images, filled.made) == (3, 6)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, ::97]

    views: dict[str, Any] = {"test_views": TestViews(2, True, 2), "generated": open_bank(tmp_path / "bank")}
    settings: dict[str, Any] = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", "workers": 0}
    (batch,) = FewShotData(task, preprocess, **settings, **views).test_dataloader()
    assert batch["features"].shape == (3, 5, 8)
    assert len({tuple(view.tolist()) for view in batch["features"].flatten(0, 1)}) == 15
    # A picture that is remade is the one that was lost, up to a rounding in another batch.
    path = next(bank.folder.rglob("001.png"))
    before = np.asarray(Image.open(path)).astype(int)
    path.unlink()
    assert fill(bank, makers[name], task.test, 2, 4).remade == 1
    assert np.abs(np.asarray(Image.open(path)).astype(int) - before).max() <= 1
