"""The dry run: what it says about runs that could start, and about those that lack images and weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.cli.main import main
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RunConfig
from vlprompt.errors import ConfigError, DataError
from vlprompt.runs.dry_run import dry_run

Tiny = Callable[..., RunConfig]


def lines_of(text: str) -> dict[str, str]:
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line[:1].strip()}


@pytest.mark.parametrize("method", ["coop", "mocoop", "zeroshot"])
def test_demo(method: str, tmp_path: Path) -> None:
    config = parse_run(["--config", f"{method}/demo", "--output", str(tmp_path / "out")])
    text = dry_run(config)
    found = lines_of(text)
    assert "demo" in found["backbone"] and "50 classes (base), 800 training and 450 test images" in found["data"]
    assert "note:" not in text and not (tmp_path / "out").exists()
    assert (found["parameters"] == "none") == ("steps" not in found) == (method == "zeroshot")
    if method != "zeroshot":
        epochs = config.recipe.epochs
        assert found["steps"] == f"25 per epoch x {epochs} epochs = {25 * epochs} updates"
        assert "GiB" in found["memory"] and "tokens a step (packed)" in found["text"]
        assert found["logits"].startswith("[32, 50]")


def test_numbers_are_the_run_s_own(tiny: Tiny) -> None:
    from vlprompt.runs.run import run

    config = tiny("mocoop", epochs=3, accumulate=2, shots=3, batch_size=4)
    text = dry_run(config)
    done = run(config)
    learned = done.head().method.trained_state()
    assert f"{sum(t.numel() for t in learned.values()):,} numbers in {len(learned)} tensors" in text
    assert "5 classes (all), 15 training and 13 test images" in text
    assert "3 per epoch x 3 epochs = 6 updates" in text
    assert str(done.folder) in text


def test_all_that_is_learned_is_counted(tmp_path: Path) -> None:
    example = ["--config", "maple/demo", "--config", "compositions/promptsrc_dept"]
    for classes in ("base", "new"):
        text = dry_run(parse_run([*example, "--data.classes", classes]))
        assert "115,010 numbers in 11 tensors" in text  # MaPLe's 112,320, and (77 + 192) 10 of the pair


def test_unlabelled_images_of_the_other_half_are_counted(tmp_path: Path) -> None:
    counts = []
    for method in ("coop", "promptkd"):
        text = dry_run(parse_run(["--config", f"{method}/demo", "--data.shots", "16", "--data.classes", "base"]))
        counts.append(int(text.partition("(base), ")[2].partition(" training")[0]))
    assert counts == [800, 1600]


def test_short_batch(tiny: Tiny) -> None:
    text = dry_run(tiny("coop", shots=1, batch_size=32))
    assert "[5, 5] per step" in text and "1 per epoch x 2 epochs = 2 updates" in text


def test_wrong_values(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="recipe.epochs is 0"):
        dry_run(tiny("coop", epochs=0))
    unknown = tiny("coop")
    unknown.settings["context_lenght"] = 3
    with pytest.raises(ConfigError, match="context_lenght.*context_length"):
        dry_run(unknown)


def test_what_a_run_would_lack_is_noted(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else known(name))
    text = dry_run(tiny("coop", init_from=str(tmp_path / "nowhere"), loggers=["wandb"]))
    assert f"note: no head for init_from: there is no folder {tmp_path / 'nowhere'}" in text
    assert "note: trainer.loggers requests 'wandb', which is not installed; run: pip install wandb" in text


def test_own_folder_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop").with_data(root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):  # nobody but the folder knows its classes
        dry_run(config)


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without images and weights."""
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path))
    monkeypatch.setenv("VLPROMPT_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("nothing")
def test_imagenet_without_images_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "configs/mocoop/imagenet.yaml", "--dry-run"]) == 0
    output = capsys.readouterr().out
    found = lines_of(output)
    assert "500 classes (base), 8000 training" in found["data"]
    assert found["steps"] == "8000 per epoch x 10 epochs = 80000 updates"
    assert "note: no images: " in output and "note: no weights, random ones stand in: " in output
    assert len(output.splitlines()) <= 40 and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.usefixtures("nothing")
def test_imagenet_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "runs")
    assert main(["train", "--config", "configs/mocoop/imagenet.yaml", "--output", out]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and len(errors.splitlines()) <= 30 and "Traceback" not in errors
    assert "two things are missing" in errors
    assert f"looked for:  {tmp_path}/imagenet" in errors and "where from:" in errors and "--data.root FOLDER" in errors
    assert "https://huggingface.co/timm/vit_base_patch16_clip_224.openai" in errors and str(tmp_path) in errors
    assert "--backbone.pretrained" in errors
    assert not (tmp_path / "runs").exists()
