"""Every recorded fact with everything that uses it: a fact that differs is refused or named, or nothing is reused.

Facts are changed where a user changes them: pictures, folders, weights, options. ``EXPECTED`` has what each consumer of
a run says of each fact, or why the fact cannot matter to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from open_clip import CLIP
from PIL import Image, ImageOps
from safetensors.torch import save_file

import vlprompt
from tests.fixtures.runs import tiny_run
from vlprompt.config.run import BackboneConfig, RunConfig
from vlprompt.errors import VlpromptError
from vlprompt.io.regulators import save_regulator
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.protocols.compare import compare
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.search import search
from vlprompt.runs.predict import predict
from vlprompt.runs.run import Run, evaluate_head, run

VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}


@dataclass
class World:
    """A folder of pictures, a folder of weights, and a finished run on both.

    Attributes:
        place: Folder of ``pictures/``, ``weights/``, ``other.safetensors`` and ``runs/``.
        config: The configuration of the run.
        done: The run.
    """

    place: Path
    config: RunConfig
    done: Run

    @property
    def pictures(self) -> Path:
        return self.place / "pictures"

    @property
    def classes(self) -> list[str]:
        return sorted(path.name for path in (self.pictures / "train").iterdir())


@pytest.fixture(scope="module")
def made(validated_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("world")
    shutil.copytree(validated_folder, place / "pictures")
    for path in (place / "pictures" / "val").rglob("*.png"):  # some are test images, too
        ImageOps.flip(Image.open(path)).save(path)
    (place / "weights").mkdir()
    settings = {"model_cfg": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (place / "weights" / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    state = {name: value.contiguous() for name, value in CLIP(32, VISION, TEXT).state_dict().items()}
    save_file(state, place / "weights" / "open_clip_model.safetensors")
    save_file({**state, "visual.proj": state["visual.proj"] + 1}, place / "other.safetensors")
    config = tiny_run(place / "pictures", place / "runs", "coop", epochs=1, shots=-1)
    config = dataclasses.replace(config, backbone=BackboneConfig(f"local-dir:{place / 'weights'}", None))
    done = run(config)
    few_shot([config], (4,), (1,))
    search(config, GRID)
    run(teaching(config, done))
    gram = place / "gram"
    shutil.copytree(done.head_dir, gram / "head")
    method = done.head().method
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    sha256 = done.results["inputs_sha256"]
    save_regulator(Regulator(shapes, method.backbone.embed_dim, RegulatorSettings()), gram, sha256)
    run(dataclasses.replace(config, init_from=f"gram:{gram}"))
    return World(place, config, done)


@pytest.fixture
def world(made: World, tmp_path: Path) -> Iterator[World]:
    """The world, which is restored afterwards."""
    for name in ("pictures", "weights"):
        shutil.copytree(made.place / name, tmp_path / name)
    yield made
    for name in ("pictures", "weights"):
        shutil.rmtree(made.place / name)
        shutil.copytree(tmp_path / name, made.place / name)


#: Warnings of other packages are not looked at.
PLACES = (str(Path(__file__)), str(Path(vlprompt.__file__).parent))
GRID = {"recipe.batch_size": [4, 8]}


def teaching(config: RunConfig, done: Run) -> RunConfig:
    return dataclasses.replace(
        config, method="promptkd", settings={"teacher": str(done.folder), "image_tokens": 1, "image_depth": 1}
    )


# -- what a user changes ----------------------------------------------------------------------------------------------
def other_split(world: World) -> RunConfig:
    """A training picture becomes a test picture."""
    name = world.classes[0]
    (world.pictures / "train" / name / "0.png").rename(world.pictures / "test" / name / "moved.png")
    return world.config


def other_images(world: World) -> RunConfig:
    """A test picture gets other content."""
    path = sorted((world.pictures / "test" / world.classes[0]).iterdir())[0]
    Image.new("RGB", (40, 40), "red").save(path)
    return world.config


def other_order(world: World) -> RunConfig:
    """Two classes exchange their names."""
    first, second, *others = world.classes
    names = {first: second, second: first, **{name: name for name in others}}
    (world.pictures / "classes.json").write_text(json.dumps(names), encoding="utf-8")
    return world.config


def other_weights(world: World) -> RunConfig:
    shutil.copy(world.place / "other.safetensors", world.place / "weights" / "open_clip_model.safetensors")
    return world.config


def other_preprocessing(world: World) -> RunConfig:
    path = world.place / "weights" / "open_clip_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return world.config


def other_reading(world: World) -> RunConfig:
    return world.config.with_data(background="none")


FACTS: dict[str, Callable[[World], RunConfig]] = {
    "split": other_split,
    "images": other_images,
    "class order": other_order,
    "weights": other_weights,
    "preprocessing": other_preprocessing,
    "reading": other_reading,
}


# -- what uses a record -----------------------------------------------------------------------------------------------
def again(config: RunConfig) -> None:
    done = run(config)
    if not done.reused:
        warnings.warn("a new run", stacklevel=1)


def predicted(world: World, config: RunConfig) -> None:
    path = world.place / "transparent.png"
    Image.new("RGBA", (40, 40), (9, 9, 9, 9)).save(path)
    predict(world.done.folder, [path], background=config.data.background)


def searched(world: World, config: RunConfig) -> None:
    before = set((world.place / "runs").iterdir())
    search(config, GRID)
    if set((world.place / "runs").iterdir()) != before:
        warnings.warn("a new run", stacklevel=1)


def shown(world: World, config: RunConfig) -> None:
    few_shot(
        [config], (4,), (1,), report=lambda done: None if done.reused else warnings.warn("a new run", stacklevel=1)
    )


def compared(world: World, config: RunConfig) -> None:
    other = run(dataclasses.replace(config, output=str(world.place / "elsewhere")), force=True)
    warnings.warn(compare(world.done.folder, other.folder).text(), stacklevel=1)


CONSUMERS: dict[str, Callable[[World, RunConfig], Any]] = {
    "train again": lambda world, config: again(config),
    "eval": lambda world, config: evaluate_head(world.done.folder, config.data),
    "predict": predicted,
    "compare": compared,
    "search": searched,
    "protocol": shown,
    "init_from": lambda world, config: run(
        dataclasses.replace(config, init_from=str(world.done.folder), output=str(world.place / "elsewhere"))
    ),
    "teacher": lambda world, config: run(
        dataclasses.replace(teaching(config, world.done), output=str(world.place / "elsewhere"))
    ),
    "regulator": lambda world, config: again(dataclasses.replace(config, init_from=f"gram:{world.place / 'gram'}")),
}
REFUSED = "was started from another .*{}.*another --output"
SEEN = "1 of the 14 test images .* was trained on, first 'test/.*/moved.png' .'train/.*/0.png' at the training"
ANOTHER = "was trained on another backbone.*{}"
EXPECTED: dict[str, dict[str, str | None]] = {
    "train again": {
        **{fact: REFUSED.format(fact) for fact in ("split", "images", "preprocessing")},
        **{"class order": REFUSED.format("class names"), "weights": REFUSED.format("backbone"), "reading": "a new run"},
    },
    "eval": {
        "split": SEEN,
        "images": "1 of the 13 test images have other contents than in the run of the head",
        "class order": "are in another order than the head's",
        "weights": ANOTHER.format("fingerprint"),
        "preprocessing": ANOTHER.format("preprocess.mean"),
        "reading": "read with orientation tag and background none, those of the head's training .*#ffffff",
    },
    "predict": {
        **dict.fromkeys(("split", "images", "class order")),  # it sees no data set
        "weights": ANOTHER.format("fingerprint"),
        "preprocessing": ANOTHER.format("preprocess.mean"),
        "reading": "1 with transparent pixels of 1 images: they are read with .*background none, .*#ffffff",
    },
    "compare": {
        "split": "content of the split file",
        "images": "content of the images",
        "class order": "class names or their order",
        "weights": "content of the weights",
        "preprocessing": "test transform",
        "reading": "reading of orientation tags and transparency",
    },
    "init_from": {
        "split": f"{SEEN}.*Omit init_from",
        "images": None,  # the new run records its own test images
        "class order": None,  # generic context belongs to no class; test_provenance has the others
        "weights": ANOTHER.format("fingerprint"),
        "preprocessing": ANOTHER.format("preprocess.mean"),
        "reading": None,  # the new run is trained on its own reading
    },
}
EXPECTED["protocol"] = EXPECTED["search"] = EXPECTED["train again"]
EXPECTED["teacher"] = {**EXPECTED["init_from"], "split": f"{SEEN}.*Omit settings.teacher"}
EXPECTED["regulator"] = {
    **EXPECTED["train again"],
    **{fact: EXPECTED["init_from"][fact] for fact in ("weights", "preprocessing")},
}


def test_every_fact_is_asked_of_every_consumer() -> None:
    assert EXPECTED.keys() == CONSUMERS.keys()
    assert all(expected.keys() == FACTS.keys() for expected in EXPECTED.values())


def said_by(consumer: str, world: World, config: RunConfig) -> str:
    """What a consumer warns of, and its refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CONSUMERS[consumer](world, config)
        except VlpromptError as error:
            warnings.warn(str(error), stacklevel=1)
    return "\n".join(str(warning.message) for warning in caught if warning.filename.startswith(PLACES))


@pytest.mark.parametrize(
    ("consumer", "fact"),
    [pair for pair in itertools.product(CONSUMERS, FACTS) if EXPECTED[pair[0]][pair[1]] is not None],
)
def test_a_fact_that_differs_is_not_passed_over(consumer: str, fact: str, world: World) -> None:
    expected, said = EXPECTED[consumer][fact], said_by(consumer, world, FACTS[fact](world))
    assert expected is not None and re.search(expected, said, re.DOTALL), said


@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name not in ("init_from", "teacher", "compare")])
def test_nothing_is_said_or_made_again_if_nothing_differs(consumer: str, world: World) -> None:
    assert said_by(consumer, world, world.config) == ""


def test_a_regulator_of_another_meta_training_is_refused(world: World) -> None:
    method = world.done.head().method
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    shutil.copytree(world.place / "gram", world.place / "mixed")
    save_regulator(Regulator(shapes, method.backbone.embed_dim, RegulatorSettings()), world.place / "mixed", "0" * 64)
    with pytest.raises(VlpromptError, match="is of another meta-training than the head in"):
        run(dataclasses.replace(world.config, init_from=f"gram:{world.place / 'mixed'}"))
