"""tools/make_diffusion_bank.py as a command, with a pipeline of random weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.processes import run_script
from vlprompt.cli import bank as cli_bank
from vlprompt.cli import main as cli
from vlprompt.cli.bank import time_text
from vlprompt.generation import open_bank
from vlprompt.generation.pipeline import PipelineGenerator


def main(argv: list[str]) -> int:
    """Run ``vlprompt bank``."""
    return cli.main(["bank", *argv])


TOOL = Path(__file__).parents[2] / "tools" / "make_diffusion_bank.py"


@pytest.fixture
def image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def words(image_folder: Path, *more: str) -> list[str]:
    bank = str(image_folder.parent / "bank")
    small = ["--pipeline", "tiny", "--steps", "2", "--device", "cpu"]
    return [
        "--bank",
        bank,
        "--data.name",
        "folder",
        "--data.root",
        str(image_folder),
        "--data.shots",
        "1",
        *small,
        *more,
    ]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    generate = PipelineGenerator.generate

    def counted(self: PipelineGenerator, images: Any, seeds: Any) -> Any:
        sizes.append(len(images))
        return generate(self, images, seeds)

    monkeypatch.setattr(PipelineGenerator, "generate", counted)
    return sizes


def test_filling_resuming_and_repairing(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = calls(monkeypatch)
    assert main(words(image_folder, "--count", "2", "--batch-size", "3")) == 0
    printed = capsys.readouterr().out
    assert (
        "4 test images of folder, 2 pictures each" in printed and "4 images: 0 pictures were there, 8 made" in printed
    )
    assert "making: 8 of 8, 0 s left" in printed
    assert sizes == [3, 3, 2]
    match = re.search(r"--data.bank (\S+)", printed)
    assert match is not None
    bank = open_bank(Path(match[1]))
    assert open_bank(image_folder.parent / "bank").recipe_id == bank.recipe_id
    from vlprompt.datasets import FileSource

    sources = [FileSource(str(path)) for path in sorted((image_folder / "test").rglob("*.png"))]
    assert [len(bank.images(source, 2)) for source in sources] == [2] * 4
    damaged = next(bank.folder.rglob("001.png"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert main(words(image_folder, "--count", "3", "--batch-size", "3")) == 0
    printed = capsys.readouterr().out
    assert "4 images: 7 pictures were there, 5 made (1 of them again: damaged or missing)" in printed
    assert sizes == [3, 3, 2, 3, 2]
    assert main(words(image_folder, "--count", "3")) == 0 and sizes == [3, 3, 2, 3, 2]
    assert "12 pictures were there, 0 made" in capsys.readouterr().out
    assert main(words(image_folder, "--count", "1", "--split", "val")) == 0
    assert "2 images: 0 pictures were there, 2 made" in capsys.readouterr().out
    assert main(words(image_folder, "--count", "1", "--split", "val", "--guidance", "2")) == 0
    assert "2 images: 0 pictures were there, 2 made" in capsys.readouterr().out
    assert len(list((image_folder.parent / "bank").glob("*/recipe.json"))) == 2


def test_images_that_cannot_be_read(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = image_folder / "test" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert main(words(image_folder, "--count", "1")) == 2
    assert f"{bad} cannot be decoded" in capsys.readouterr().err
    assert main(words(image_folder, "--count", "1", "--data.on_bad_image", "skip")) == 0
    assert "3 images: 0 pictures were there, 3 made; 1 images could not be read" in capsys.readouterr().out


def test_all_problems_are_reported_at_once(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--count", "0", "--batch-size", "many", "--split", "tests", "--guidanse", "2", "--steps", "0"]
    wrong += ["--safety-checker", "maybe", "--data.name", "folders", "--method", "coop", "--config", "x", "stray"]
    assert main(wrong) == 2
    text = capsys.readouterr().err
    for expected in (
        "--bank is missing; accepted: the folder where pictures are kept",
        "--count is '0'; accepted: a whole number of 1 or more",
        "--batch-size is 'many'; accepted: ",
        "--split is 'tests'; accepted: 'train', 'val' or 'test'. Did you mean 'test'",
        "'--guidanse' is not an option of `vlprompt bank`. Did you mean '--guidance'",
        "--steps is '0'; accepted: a whole number of 1 or more",
        "--safety-checker is 'maybe'; accepted: 'on' or 'off'",
        "data.name is 'folders', which is no data set",
        "'--method' is not an option",
        "--config has no meaning here",
        "'stray' has no key",
        "See `vlprompt bank --help`.",
    ):
        assert expected in text, expected
    assert "Traceback" not in text


def test_a_missing_pipeline(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(image_folder), "--pipeline=nobody/nothing"]) == 2  # given twice
    assert "--pipeline is given twice" in capsys.readouterr().err
    given = [word if word != "tiny" else "nobody/nothing" for word in words(image_folder)]
    assert main([*given, "--offline"]) == 2
    text = capsys.readouterr().err
    assert "--pipeline nobody/nothing" in text and "hf download nobody/nothing --local-dir FOLDER" in text


def test_an_interrupt_names_how_to_resume(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_bank, "bank", interrupted)
    assert main(words(image_folder)) == 130
    assert "the same command resumes it" in capsys.readouterr().err


def test_the_tool_runs_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    helped = run_script([sys.executable, TOOL, "--help"])
    assert helped.returncode == 0 and helped.stdout == cli_bank.BANK_HELP
    for name in cli_bank.OPTIONS + cli_bank.FLAGS:
        assert f"--{name}" in helped.stdout
    alone = run_script([sys.executable, TOOL])
    assert alone.returncode == 2 and "--bank is missing; accepted: the folder where pictures are kept" in alone.stderr


def test_times() -> None:
    assert [time_text(seconds) for seconds in (0.4, 89, 90, 3599, 3660)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 00 min",
        "1 h 01 min",
    ]
