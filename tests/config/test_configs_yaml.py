"""The run configurations as text: complete, parseable, consistent, and opened by a comment whose commands work."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlprompt.config.meta import MetaRunConfig
from vlprompt.config.run import RunConfig
from vlprompt.config.types import make
from vlprompt.methods import get_method_class
from vlprompt.runs.meta_run import meta_folder

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = (
    *("zeroshot", "coop", "mocoop", "cocoop", "kgcoop", "prograd"),
    *("vpt", "ivlp", "maple", "promptsrc", "restore"),
    *("tip_adapter", "tip_adapter_f", "tfup", "tfup_t", "ape", "gda"),
    *("dept", "ept"),
    *("clip_lora", "ramt", "apt"),
    *("visual_prompt", "upt", "promptkd"),
    *("clip_adapter", "taskres", "linear_probe", "lp_plus_plus"),
)
TEST_TIME = ("tpt", "difftpt", "tda", "mta", "zero", "promptalign")
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
FEW_SHOT = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
)
FILES = sorted(CONFIGS.rglob("*.yaml"))
META = [path for path in FILES if path.parent.name == "gram"]
RUNS = [path for path in FILES if path not in META]
MOCOOP = sorted((CONFIGS / "mocoop").glob("*.yaml"))

# seed_methods.md 1.a: templates N and group sizes; their number is the number of experts.
PUBLISHED_GROUPS = {
    "imagenet": (32, [1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 7, 2, 1, 2, 1, 1, 1, 1, 1, 1]),
    "caltech101": (9, [1, 1, 1, 4, 2]),
    "dtd": (9, [1, 1, 1, 4, 2]),
    "eurosat": (12, [1, 1, 2, 2, 4, 2]),
    "fgvc_aircraft": (9, [1, 1, 1, 4, 2]),
    "oxford_flowers": (9, [1, 1, 1, 4, 2]),
    "food101": (10, [1, 3, 4, 2]),
    "oxford_pets": (11, [1, 2, 1, 1, 4, 2]),
    "stanford_cars": (11, [3, 1, 1, 4, 2]),
    "sun397": (8, [1, 1, 4, 2]),
    "ucf101": (10, [1, 1, 1, 1, 4, 2]),
}
# seed_methods.md 1.a: a word of the first template of every group, in order.
PUBLISHED_FIRST = {
    "imagenet": "flower|person doing|centered satellite|aircraft|itap|large|art of the|small|a photo of a {}.|many"
    "|low resolution|cropped|bright|good|close-up|clean|video game|hard to see|origami|texture",
    "caltech101": "texture|a photo of a {}.|many|low resolution|good",
    "dtd": "texture|a photo of a {}.|many|low resolution|good",
    "eurosat": "centered satellite|a photo of a {}.|large|small|low resolution|good",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.|a photo of a {}.|many|low resolution|good",
    "oxford_flowers": "a photo of a {}, a type of flower.|a photo of a {}.|many|low resolution|good",
    "food101": "a photo of a {}.|delicious|low resolution|good",
    "oxford_pets": "small|large|a photo of a {}.|many|low resolution|good",
    "stanford_cars": "high-performance|a photo of a {}.|many|low resolution|good",
    "sun397": "a photo of a {}.|many|low resolution|good",
    "ucf101": "person doing|a {} in a video game.|a photo of a {}.|many|low resolution|good",
}
# seed_methods.md 1.c: epochs, batch, learning rate, warm-up epochs.
PUBLISHED_RECIPES = {
    **dict.fromkeys(("caltech101", "dtd", "ucf101"), (50, 32, 0.032, 5)),
    **dict.fromkeys(("fgvc_aircraft", "oxford_flowers", "oxford_pets", "stanford_cars", "sun397"), (25, 32, 0.032, 3)),
    "eurosat": (300, 32, 0.032, 7),
    "food101": (10, 32, 0.032, 1),
    "imagenet": (10, 1, 0.002, 1),
}


def named(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def header(path: Path) -> list[str]:
    """Return the comment lines that open the file, without their marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def command(path: Path, label: str) -> list[str]:
    """Return the words of the one command that the header shows behind ``label``."""
    found = [line.removeprefix(label).strip() for line in header(path) if line.startswith(label)]
    assert len(found) == 1, f"{path}: {len(found)} lines begin with {label!r}"
    return shlex.split(found[0])


def run_config(content: dict[str, Any], root: type[Any] = RunConfig) -> Any:
    """Return the typed configuration; a key that is not a field or a value that is not accepted fails."""
    return make(root, content)


def test_every_method_has_every_data_set() -> None:
    expected = {f"{method}/{data}" for method in METHODS for data in (*FEW_SHOT, "demo", "folder")}
    assert len(expected) == len(METHODS) * 13
    # Test-time methods: the papers' five ImageNet sets and ten others.
    expected |= {f"{method}/{data}" for method in TEST_TIME for data in (*FEW_SHOT, *SHIFTED, "demo")}
    assert expected <= {named(path) for path in FILES}


@pytest.mark.parametrize("path", RUNS, ids=named)
def test_keys_and_values_are_accepted(path: Path) -> None:
    content = load(path)
    run_config(content)
    assert content["method"] == path.relative_to(CONFIGS).parts[0]
    assert content["data"]["name"] == path.stem
    assert isinstance(content.get("settings", {}), dict)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_header_says_how_to_run_and_override_this_file(path: Path) -> None:
    meta = path in META
    tool = "tools/meta_train.py" if meta else "tools/train.py"
    start = ["python", tool, "--config", f"configs/{named(path)}.yaml"]
    assert len(header(path)) >= 3, "the header says what the file is, how to run it and how to override it"
    assert command(path, "Run:")[:4] == start
    override = command(path, "Override:")
    assert override[:4] == start
    assert len(override) > 4

    content = load(path)
    for flag, value in zip(override[4::2], override[5::2], strict=True):
        match = re.fullmatch(r"--(?:(\w+)\.)?(\w+)", flag)
        assert match, flag
        (content.setdefault(match[1], {}) if match[1] else content)[match[2]] = yaml.safe_load(value)
    run_config(content, MetaRunConfig if meta else RunConfig)


@pytest.mark.parametrize("path", META, ids=named)
def test_meta_training_goes_with_the_training_it_names(path: Path) -> None:
    content = load(path)
    config = run_config(content, MetaRunConfig)
    assert path.stem.removesuffix("-demo") == config.method
    then = command(path, "Then:")
    other = load(CONFIGS.parent / then[3])
    assert other["method"] == config.method and other["backbone"] == content["backbone"]
    assert then[then.index("--init") + 1] == f"gram:{meta_folder(config)}"
    # What is learned fits only prompts of the same shapes.
    kind = get_method_class(config.method).Settings
    own, others = kind(**content["settings"]), kind(**other.get("settings", {}))
    assert own == others


@pytest.mark.parametrize("path", FILES, ids=named)
def test_text_is_plain_and_fits_the_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii() and "\t" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", MOCOOP, ids=named)
def test_mocoop_groups_cover_the_templates(path: Path) -> None:
    settings = load(path)["settings"]
    templates, groups = settings["templates"], settings["groups"]
    assert sum(groups) == len(templates)
    assert len(groups) >= 2, "two experts are chosen per image"
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{}") == 1 and template.endswith(".") and "  " not in template


@pytest.mark.parametrize("data", FEW_SHOT)
def test_mocoop_experts_are_the_published_ones(data: str) -> None:
    settings = load(CONFIGS / "mocoop" / f"{data}.yaml")["settings"]
    count, groups = PUBLISHED_GROUPS[data]
    assert settings["groups"] == groups
    assert len(settings["templates"]) == count
    firsts = [settings["templates"][sum(groups[:index])] for index in range(len(groups))]
    words = PUBLISHED_FIRST[data].split("|")
    assert len(firsts) == len(words)
    for first, word in zip(firsts, words, strict=True):
        assert word in first


@pytest.mark.parametrize("data", FEW_SHOT)
def test_few_shot_protocol_is_the_published_one(data: str) -> None:
    mocoop, coop, zeroshot = (load(CONFIGS / method / f"{data}.yaml") for method in ("mocoop", "coop", "zeroshot"))
    for content in (mocoop, coop, zeroshot):
        assert content["backbone"] == {"name": "ViT-B-16", "pretrained": "openai"}
        assert content["data"]["classes"] == "base"
    for content in (mocoop, coop):
        assert content["data"]["shots"] == 16
        assert content["data"]["view"] == "random"

    recipe = mocoop["recipe"]
    assert tuple(recipe[key] for key in ("epochs", "batch_size", "lr", "warmup_epochs")) == PUBLISHED_RECIPES[data]
    assert recipe["gradient_clip"] == 1.0

    epochs = 50 if data == "imagenet" else 200
    assert coop["recipe"] == {"epochs": epochs, "batch_size": 32, "lr": 0.002, "warmup_epochs": 1}
    assert coop["settings"] == {"context_init": "a photo of a"}
    assert "recipe" not in zeroshot, "nothing is trained"


@pytest.mark.parametrize("method", [*METHODS, *TEST_TIME])
def test_demo_runs_from_the_package_alone(method: str) -> None:
    content = load(CONFIGS / method / "demo.yaml")
    assert content["backbone"] == {"name": "demo"}
    assert "root" not in content["data"]
    assert content["data"]["classes"] == ("all" if get_method_class(method).fits else "base")
