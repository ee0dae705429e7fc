"""Predictions of a saved head: which images, in which order, as which pixels, and what is said of others."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.cli.main import main
from vlprompt.datasets import load_dataset
from vlprompt.errors import ConfigError, DataError, HeadError
from vlprompt.io import Head, load_head
from vlprompt.runs.predict import image_files, predict

NAMES = ["grinning face", "red_apple", "hot beverage", "dog"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as far as prediction is concerned: it holds head/."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), NAMES, context_length=2)
    folder = tmp_path_factory.mktemp("run")
    Head(method).save_pretrained(folder / "head")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of every mode, in nested folders."""
    folder = tmp_path_factory.mktemp("photos")
    picture = load_dataset("demo", shots=1).test[0].source.open()
    modes = {"b/grey.png": "L", "b/palette.png": "P", "a/alpha.png": "RGBA", "a/print.JPG": "CMYK", "bits.bmp": "1"}
    for name, mode in modes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        picture.convert(mode).save(folder / name)
    picture.resize((300, 90)).save(folder / "b" / "wide.webp")
    picture.save(folder / "B.png")
    (folder / "b" / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"no picture")
    (folder / "b" / "._grey.png").write_bytes(b"no picture")
    return folder


ORDER = ["B.png", "a/alpha.png", "a/print.JPG", "b/grey.png", "b/palette.png", "b/wide.webp", "bits.bmp"]


def test_folders_are_searched_in_byte_order_and_files_keep_theirs(photos: Path) -> None:
    assert image_files([photos]) == [photos / name for name in ORDER]
    chosen = [photos / "b" / "wide.webp", photos / "a", photos / "B.png"]
    assert [path.name for path in image_files(chosen)] == ["wide.webp", "alpha.png", "print.JPG", "B.png"]


def test_every_mode_gets_probabilities_that_add_up(run_folder: Path, photos: Path) -> None:
    found = predict(run_folder, [photos], top=99)
    assert [entry["path"] for entry in found] == [str(photos / name) for name in ORDER]
    for entry in found:
        values = [guess["probability"] for guess in entry["classes"]]
        assert sorted(guess["name"] for guess in entry["classes"]) == sorted(NAMES)
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-5)


def test_the_numbers_are_those_of_the_head(run_folder: Path, photos: Path) -> None:
    from vlprompt.data.transforms import test_transform

    head = load_head(run_folder)
    image = test_transform(head.backbone.preprocess)(Image.open(photos / "a" / "alpha.png").convert("RGB"))
    expected = head(image[None]).softmax(-1)[0]
    (entry,) = predict(run_folder / "head", [photos / "a" / "alpha.png"], top=2)
    assert [guess["name"] for guess in entry["classes"]] == [NAMES[i] for i in expected.topk(2).indices.tolist()]
    assert [guess["probability"] for guess in entry["classes"]] == pytest.approx(expected.topk(2).values.tolist())


def test_batches_make_no_difference(run_folder: Path, photos: Path) -> None:
    whole, single = (predict(run_folder, [photos], batch_size=size) for size in (64, 1))
    for one, other in zip(whole, single, strict=True):
        assert [g["name"] for g in one["classes"]] == [g["name"] for g in other["classes"]]
        both = ([guess["probability"] for guess in entry["classes"]] for entry in (one, other))
        np.testing.assert_allclose(*both, rtol=1e-5)


def test_json_and_table_say_the_same(run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(run_folder), str(photos / "B.png"), str(photos / "a"), "--top", "2"]
    assert main([*words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [Path(entry["path"]).name for entry in found] == ["B.png", "alpha.png", "print.JPG"]
    assert main(words) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 6
    guesses = [guess for entry in found for guess in entry["classes"]]
    for row, guess in zip(rows, guesses, strict=True):
        assert guess["name"] in row and row.rstrip().endswith(f"{100 * guess['probability']:.1f} %")


def test_all_bad_images_are_named_at_once(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        predict(run_folder, [tmp_path / "first.png", photos, tmp_path / "second.png"], batch_size=2)
    assert all(str(tmp_path / name) in str(caught.value) for name in ("first.png", "second.png"))
    with pytest.raises(DataError, match=r"^Image .*first\.png cannot be decoded"):
        predict(run_folder, [photos, tmp_path / "first.png"])


def test_all_missing_paths_are_named_at_once(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        predict(run_folder, [tmp_path / "gone.png", photos, tmp_path / "empty", tmp_path / "lost", "n" * 5000])
    text = str(caught.value)
    assert f"{tmp_path / 'gone.png'}: there is no such file" in text and f"{tmp_path / 'lost'}: there is no" in text
    assert f"{tmp_path / 'empty'}: a folder without images" in text and len(text) < 1500
    with pytest.raises(DataError, match="no images were given"):
        predict(run_folder, [])


@pytest.mark.parametrize("top", [0, -1])
def test_at_least_one_class_is_shown(run_folder: Path, photos: Path, top: int) -> None:
    with pytest.raises(ConfigError, match=f"--top is {top}"):
        predict(run_folder, [photos], top=top)


def test_an_unfinished_run_says_so(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: coop\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(HeadError, match="unfinished run has none yet; run its train command again"):
        predict(tmp_path, [photos])


def test_an_unfinished_run_says_so_on_the_command_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("method: coop\n")
    assert main(["predict", str(tmp_path), str(photos / "B.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "the run is not finished" in err and "Traceback" not in err


@pytest.mark.parametrize("own", [True, False])
def test_the_reading_is_that_of_the_training_on_own_images_unless_it_is_given(
    own: bool, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"pixels": {"orientation": "ignore", "background": None}} | ({"place_sha256": "x"} if own else {})
    Head(load_head(run_folder).method, {"data": data}).save_pretrained(tmp_path / "head")
    path = tmp_path / "clear.png"
    Image.new("RGBA", (64, 64), (200, 30, 30, 40)).save(path)
    words = ["predict", str(tmp_path), str(path), "--json"]
    said: dict[str, tuple[Any, str]] = {}
    for background in ("", "none", "white"):
        assert main([*words, *(["--data.background", background] if background else [])]) == 0
        shown = capsys.readouterr()
        said[background] = json.loads(shown.out), shown.err
    assert said[""][0] == said["none" if own else "white"][0] != said["white" if own else "none"][0]
    assert said["none"][1] == "" and "note: 1 with transparent pixels of 1 images: they are read" in said["white"][1]
    assert main([*words, "--data.orientation", "up"]) == 2 and "'tag', 'ignore'" in capsys.readouterr().err
    assert main([*words, "--data.shots", "2"]) == 2
    assert "'--data.shots' is not an option of `vlprompt predict`" in capsys.readouterr().err
