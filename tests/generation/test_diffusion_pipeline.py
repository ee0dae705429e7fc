"""A diffusers pipeline with tiny random weights, from its settings to the views of a test image."""

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
from vlprompt.generation.libraries import import_diffusers
from vlprompt.generation.making import fill
from vlprompt.generation.pipeline import PipelineGenerator, load_generator
from vlprompt.generation.tiny import TINY, save_tiny
from vlprompt.needs import TestViews

FEW = GenerationSettings(pipeline="tiny", steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(tmp_path_factory.mktemp(name), name) for name in TINY}


@pytest.fixture(scope="module")
def generators(folders: dict[str, Path]) -> dict[str, PipelineGenerator]:
    return {name: generator(folders[name]) for name in TINY}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def generator(folder: Path, **settings: Any) -> PipelineGenerator:
    return load_generator(dataclasses.replace(FEW, pipeline=str(folder), **settings), "cpu")


def image(number: int, size: tuple[int, int] = (30, 40)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def numbers(images: Sequence[Image.Image | None]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize("name", TINY)
def test_images_do_not_depend_on_the_batch(name: str, generators: dict[str, PipelineGenerator]) -> None:
    images, seeds = [image(n) for n in (1, 2, 3, 1, 1)], [1, 2, 3, 1, 4]
    torch.manual_seed(0)
    whole = numbers(generators[name].generate(images, seeds))
    assert whole.shape == (5, 16, 16, 3)
    torch.manual_seed(99)
    alone = np.concatenate(
        [numbers(generators[name].generate([source], [seed])) for source, seed in zip(images, seeds, strict=True)]
    )
    assert np.abs(whole - alone).max() <= 1, "equal up to rounding"
    assert np.array_equal(whole, numbers(generators[name].generate(images, seeds))), "the same batch is bit-identical"
    assert np.abs(whole[0] - whole[3]).max() <= 1 and np.abs(whole[0] - whole[4]).mean() > 10
    other = numbers(generators[name].generate([image(2)], [1]))
    assert np.abs(whole[0] - other[0]).max() > 1, "the source image matters"


def test_the_condition_is_difftpts(generators: dict[str, PipelineGenerator], monkeypatch: pytest.MonkeyPatch) -> None:
    """ToTensor, Resize to a square without antialiasing, CLIP's Normalize (image_generator_R.py)."""
    from torchvision import transforms

    tiny = generators["tiny"]
    official = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.Normalize([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ]
    )
    seen: dict[str, Any] = {}
    pipe = tiny._pipe

    def watched(**inputs: Any) -> Any:
        seen.update(inputs)
        return pipe(**inputs)

    monkeypatch.setattr(tiny, "_pipe", watched)
    tiny.generate([image(1), image(2)], [1, 2])
    assert torch.equal(seen["image"], torch.stack([official(image(1)), official(image(2))]))
    assert (seen["guidance_scale"], seen["num_inference_steps"], seen["eta"]) == (3.0, 2, 0.0)
    assert [draws.initial_seed() for draws in seen["generator"]] == [1, 2]
    assert {draws.device.type for draws in seen["generator"]} == {"cpu"}


def test_strength_changes_the_result(folders: dict[str, Path]) -> None:
    start = np.asarray(image(1, (16, 16)).resize((16, 16))).astype(int)
    ways = [generator(folders["tiny-img2img"], strength=strength, steps=10) for strength in (0.1, 1.0)]
    assert len({way.recipe.id for way in ways}) == 2
    near, far = (numbers(way.generate([image(1, (16, 16))], [1]))[0] for way in ways)
    assert not np.array_equal(near, far) and near.shape == start.shape
    with pytest.raises(ConfigError, match="strength is 0.05, which leaves none of 10 steps"):
        generator(folders["tiny-img2img"], strength=0.05, steps=10)


def test_recipes_differ_if_images_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    first = generator(folders["tiny"])
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
    ids = {first.recipe.id, *(generator(folders["tiny"], **change).recipe.id for change in changes)}
    ids.add(generator(save_tiny(tmp_path / "other", seed=1)).recipe.id)
    ids.add(generator(folders["tiny-img2img"]).recipe.id)
    assert len(ids) == len(changes) + 3
    same = [generator(folders["tiny"], strength=0.5, prompt="x"), load_generator(FEW, "cpu")]
    assert {equal.recipe.id for equal in same} == {first.recipe.id}, "independent of the path and img2img's options"
    assert generator(folders["tiny-img2img"], prompt="x").recipe.id not in ids


def test_other_sizes_types_and_schedulers(folders: dict[str, Path]) -> None:
    large = generator(folders["tiny"], size=24, precision="bf16", scheduler="DDIMScheduler")
    (generated,) = large.generate([image(1)], [1])
    assert generated is not None and generated.size == (24, 24) and np.asarray(generated).std() > 1
    assert large.recipe.facts["precision"] == "bf16" and large.recipe.facts["scheduler"]["class"] == "DDIMScheduler"
    assert large._pipe.unet.dtype == torch.bfloat16
    assert generator(folders["tiny"]).recipe.facts["precision"] == "fp32", "auto, on the CPU"


def test_flagged_images_are_none(folders: dict[str, Path]) -> None:
    tiny = generator(folders["tiny"])

    def checker(images: torch.Tensor, clip_input: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        flags = [number % 2 == 1 for number in range(len(images))]
        return torch.stack([image * (not bad) for image, bad in zip(images, flags, strict=True)]), flags

    tiny._pipe.safety_checker = checker
    generated = tiny.generate([image(n) for n in range(3)], [1, 2, 3])
    assert [image is None for image in generated] == [False, True, False]


def test_a_checker_is_loaded_unless_it_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionImageVariationPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(folders["tiny"], safety_checker=checker)
    pipe.save_pretrained(tmp_path / "checked")
    on, off = (generator(tmp_path / "checked", safety_checker=word) for word in ("on", "off"))
    assert on._pipe.safety_checker is not None and off._pipe.safety_checker is None
    assert (on.recipe.facts["safety_checker"], off.recipe.facts["safety_checker"]) == (True, False)
    assert generator(folders["tiny"]).recipe.facts["safety_checker"] is False, "on, but the pipeline has none"
    assert len(on.generate([image(1)], [1])) == len(off.generate([image(1)], [1])) == 1


def test_errors_name_pipeline_value_and_remedy(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--pipeline './nowhere': there is no such folder.*tiny or tiny-img2img"):
        load_generator(dataclasses.replace(FEW, pipeline="./nowhere"), "cpu")
    with pytest.raises(ConfigError, match=r"no model_index.json"):
        generator(tmp_path)
    with pytest.raises(ConfigError, match=r"nobody/nothing \(revision r\) cannot be fetched.*hf download nobody"):
        load_generator(dataclasses.replace(FEW, pipeline="nobody/nothing", revision="r"), "cpu", offline=True)
    with pytest.raises(ConfigError, match=r"--scheduler is 'DDIMSchedule'. Did you mean 'DDIMScheduler'"):
        generator(folders["tiny"], scheduler="DDIMSchedule")
    with pytest.raises(ConfigError, match=r"steps is 0; accepted: a whole number of 1 or more"):
        generator(folders["tiny"], steps=0)
    (tmp_path / "audio").mkdir()
    index = {"_class_name": "AudioLDMPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "audio" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"audio is a AudioLDMPipeline, which does not generate images from images"):
        generator(tmp_path / "audio")
    damaged = save_tiny(tmp_path / "damaged")
    (damaged / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="does not name the pipeline"):
        generator(damaged)
    weights = next((save_tiny(damaged) / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"Pipeline .*damaged cannot be loaded.*hf download"):
        generator(damaged)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlprompt\[diffusion\]'"):
        generator(folders["tiny"])


def test_too_large_a_batch(generators: dict[str, PipelineGenerator], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(generators["tiny"], "_pipe", full)
    with pytest.raises(ConfigError, match="--batch-size is 2, too large for"):
        generators["tiny"].generate([image(1), image(2)], [1, 2])


def test_reading_a_bank_does_not_import_diffusers() -> None:
    import subprocess

    code = "import sys, vlprompt.generation; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parents[2])


@pytest.mark.parametrize("name", TINY)
def test_from_pipeline_to_views(
    name: str, generators: dict[str, PipelineGenerator], tmp_path: Path, paint: Callable[..., Path], preprocess: Any
) -> None:
    splits = {
        split: [
            Sample(f"{n}.png", n % 2, FileSource(str(paint(tmp_path / split / f"{n}.png", n)))) for n in range(count)
        ]
        for split, count in (("train", 2), ("test", 3))
    }
    task = FewShotTask(
        "toy",
        ["a", "b"],
        ["a", "b"],
        "a {}.",
        **splits,
        val=[],
        shots=1,
        seed=1,
        classes="all",
        split_sha256="s",
        shots_sha256="t",
        card=find_card("folder"),
    )
    bank = create_bank(tmp_path / "bank", generators[name].recipe)
    filled = fill(bank, generators[name], task.test, 2, 4)
    assert (filled.images, filled.made) == (3, 6)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, ::97]

    views: dict[str, Any] = {"test_views": TestViews(2, True, 2), "generated": open_bank(tmp_path / "bank")}
    settings: dict[str, Any] = {"encode": encode, "fingerprint": "f", "features": tmp_path / "store", "workers": 0}
    (batch,) = FewShotData(task, preprocess, **settings, **views).test_dataloader()
    assert batch["features"].shape == (3, 5, 8)
    assert len({tuple(view.tolist()) for view in batch["features"].flatten(0, 1)}) == 15
    # A replaced image equals the lost one, up to rounding in another batch.
    path = next(bank.folder.rglob("001.png"))
    before = np.asarray(Image.open(path)).astype(int)
    path.unlink()
    assert fill(bank, generators[name], task.test, 2, 4).remade == 1
    assert np.abs(np.asarray(Image.open(path)).astype(int) - before).max() <= 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"unet": ["os", "system"]}, "unet is of the library 'os'"),
        ({"unet": ["evil", "E"]}, "unet is of the library 'evil'"),
        ({"unet": ["diffusers", 1]}, "expected a library and a class"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "'../unet', which is not a name"),
        ({"_class_name": ["a", "b"]}, "does not name the pipeline's class"),
        ({"_class_name": "../x"}, "does not name the pipeline's class"),
        ("[" * 99_999, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
    ],
)
def test_an_index_that_names_other_code_is_refused(
    change: Any, match: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    index = json.loads((folders["tiny"] / "model_index.json").read_text())
    text = change if isinstance(change, str) else json.dumps({**index, **change})
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(DataError, match=match):
        module._index(tmp_path, "p")


@pytest.mark.parametrize("file", ["None.py", "pipeline.py", "unet/evil.py", "unet/config.json"])
def test_a_pipeline_with_code_is_refused_and_not_run(file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = (folders["tiny"] / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index)
    code = '{"auto_map": {"AutoModel": "evil.E"}}' if file.endswith("json") else "raise SystemExit('code was run')"
    (tmp_path / file).write_text(code)
    with pytest.raises(DataError, match=file):
        load_generator(dataclasses.replace(FEW, pipeline=str(tmp_path)), "cpu")


@pytest.mark.parametrize(
    ("version", "accepted"), [("0.30.3", False), ("0.37.1", False), ("0.38.0", True), ("1.0", True)]
)
def test_a_diffusers_that_runs_code_of_pipelines_is_refused(
    version: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", version)
    if accepted:
        assert import_diffusers()[0] is diffusers
    else:
        with pytest.raises(ConfigError, match="diffusers>=0.38"):
            import_diffusers()
