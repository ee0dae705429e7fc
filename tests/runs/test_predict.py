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
from vlprompt.data.transforms import test_transform as test_view
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
    head = load_head(run_folder)
    image = test_view(head.backbone.preprocess)(Image.open(photos / "a" / "alpha.png").convert("RGB"))
    expected = head(image[None]).softmax(-1)[0]
    (entry,) = predict(run_folder / "head", [photos / "a" / "alpha.png"], top=2)
    assert [guess["name"] for guess in entry["classes"]] == [NAMES[i] for i in expected.topk(2).indices.tolist()]
    assert [guess["probability"] for guess in entry["classes"]] == pytest.approx(expected.topk(2).values.tolist())


# -- cosines and unknown images ---------------------------------------------------------------------------------------
def scores_of(found: list[dict[str, Any]], name: str = "probability") -> list[float]:
    return [entry["classes"][0][name] for entry in found]


def test_cosines_are_those_of_image_and_class(run_folder: Path, photos: Path) -> None:
    head = load_head(run_folder)
    found = predict(run_folder, [photos], top=99, scores="cosine")
    plain = predict(run_folder, [photos], top=99)
    scale = float(head.backbone.logit_scale)
    for entry, other in zip(found, plain, strict=True):
        assert [guess["name"] for guess in entry["classes"]] == [guess["name"] for guess in other["classes"]]
        cosines = torch.tensor([guess["cosine"] for guess in entry["classes"]])
        assert bool((cosines.abs() <= 1).all()) and "unknown" not in entry
        expected = [guess["probability"] for guess in other["classes"]]
        assert (scale * cosines).softmax(-1).tolist() == pytest.approx(expected, rel=1e-3)
    image = test_view(head.backbone.preprocess)(Image.open(photos / "B.png").convert("RGB"))[None]
    unit = head.method.unit_image(head.method.image_features(image))
    expected = (unit @ head.text_features().t()).max()
    (entry,) = predict(run_folder, [photos / "B.png"], top=1, scores="cosine")
    assert entry["classes"][0]["cosine"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "scale"),
    [("clip_lora", {"logit_scale": 30.0}, 30.0), ("zeroshot", {}, None), ("tip_adapter", {}, 0), ("tda", {}, 0)],
)
def test_methods_say_how_their_scores_are_made_of_cosines(
    method: str, settings: dict[str, Any], scale: float | None
) -> None:
    made = vlprompt.create_method(method, vlprompt.load_backbone("demo"), NAMES, **settings)
    expected = float(made.backbone.logit_scale) if scale is None else scale
    assert made.cosine_scale == (expected or None)


@pytest.mark.parametrize("scores", ["probability", "cosine"])
def test_images_below_the_threshold_are_unknown(scores: Any, run_folder: Path, photos: Path) -> None:
    best = scores_of(predict(run_folder, [photos], scores=scores), scores)
    threshold = sorted(best)[len(best) // 2]
    found = predict(run_folder, [photos], scores=scores, unknown=threshold)
    assert [entry["unknown"] for entry in found] == [value < threshold for value in best]
    assert {entry["unknown"] for entry in found} == {True, False}  # the threshold itself is known
    assert scores_of(found, scores) == pytest.approx(best)
    lowest = 0 if scores == "probability" else -1
    assert not any(entry["unknown"] for entry in predict(run_folder, [photos], scores=scores, unknown=lowest))
    assert all(entry["unknown"] for entry in predict(run_folder, [photos], scores=scores, unknown=1) if best[0] < 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unknown", "nan"], "--unknown is 'nan'; accepted: a number from 0 to 1, or from -1 to 1 with --scores"),
        (["--unknown", "inf"], "--unknown is 'inf'; accepted: a number"),
        (["--unknown", "50%"], "--unknown is '50%'; accepted: a number"),
        (["--unknown", "1.01"], "--unknown is 1.01; accepted: a probability from 0 to 1"),
        (["--unknown", "-0.1"], "--unknown is -0.1; accepted: a probability from 0 to 1"),
        (["--unknown", "-1.1", "--scores", "cosine"], "--unknown is -1.1; accepted: a cosine from -1 to 1"),
        (["--unknown"], "--unknown has no value"),
        (["--scores", "cosin"], "--scores is 'cosin'; accepted: probability or cosine. Did you mean 'cosine'?"),
    ],
)
def test_scores_and_thresholds_that_are_refused(
    words: list[str], message: str, run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run_folder), str(photos), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in " ".join(err.split())


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), -0.01, 1.01])
def test_thresholds_that_are_refused_in_python(unknown: float, run_folder: Path, photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"--unknown is .*; accepted: a probability from 0 to 1"):
        predict(run_folder, [photos], unknown=unknown)


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (NAMES[:1], {}, "the head has a single class, whose probability is always 1"),
        (NAMES, {"name": "voc2007", "metric": "map_11point"}, "images of voc2007 have several labels, which share"),
    ],
)
def test_probabilities_without_a_meaningful_threshold(
    names: list[str], data: dict[str, Any], message: str, tmp_path: Path, photos: Path
) -> None:
    method = vlprompt.create_method("zeroshot", vlprompt.load_backbone("demo"), names)
    Head(method, {"data": data}).save_pretrained(tmp_path / "head")
    with pytest.raises(ConfigError, match=f"{message}.*; accepted: a cosine, with --scores cosine"):
        predict(tmp_path, [photos / "B.png"], unknown=0.5)
    (entry,) = predict(tmp_path, [photos / "B.png"], scores="cosine", unknown=1.0)
    assert entry["unknown"] is True


def test_caches_have_no_cosines(tmp_path: Path, photos: Path) -> None:
    method = vlprompt.create_method("tip_adapter", vlprompt.load_backbone("demo"), NAMES)
    Head(method).save_pretrained(tmp_path / "head")
    with pytest.raises(ConfigError, match="the scores of tip_adapter are more than cosines .*; accepted: probability"):
        predict(tmp_path, [photos / "B.png"], scores="cosine")


def test_unknown_images_in_table_and_json(run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = scores_of(predict(run_folder, [photos], top=2))
    words = ["predict", str(run_folder), str(photos), "--top", "2", "--unknown", f"{sorted(best)[3]:.17g}"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(entry["unknown"] for entry in found) == 3 and len(found) == len(best)
    assert main(words) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["image", "answer", "class", "probability"]
    for entry, row in zip(found, rows[::2], strict=True):
        name = entry["classes"][0]["name"]
        assert row.split(entry["path"])[1].split() == [
            *("unknown" if entry["unknown"] else name).split(),
            *name.split(),
            f"{100 * entry['classes'][0]['probability']:.1f}",
            "%",
        ]
    assert main(["predict", str(run_folder), str(photos / "B.png"), "--scores", "cosine", "--top", "1"]) == 0
    title, row = capsys.readouterr().out.splitlines()
    (entry,) = predict(run_folder, [photos / "B.png"], top=1, scores="cosine")
    assert title.split() == ["image", "class", "cosine"] and row.split()[-1] == f"{entry['classes'][0]['cosine']:.4f}"


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
