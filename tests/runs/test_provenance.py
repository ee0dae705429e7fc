"""Heads and the images that they are evaluated on: kept splits, changed folders, other places of the weights."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.main import main
from vlprompt.config.run import RunConfig
from vlprompt.datasets import load_dataset
from vlprompt.datasets.kept_split import KEPT_SPLIT, read_kept
from vlprompt.datasets.readers.folder import cut_class
from vlprompt.errors import ConfigError, DataError, HeadError
from vlprompt.io.head import load_head
from vlprompt.protocols.compare import compare
from vlprompt.runs.provenance import backbone_of
from vlprompt.runs.run import Run, evaluate_head, run

Tiny = Callable[..., RunConfig]


@pytest.fixture
def pictures(image_folder: Path, tmp_path: Path) -> Path:
    """One folder per class, which the reader cuts."""
    folder = tmp_path / "pictures"
    for path in sorted(image_folder.rglob("*.png")):
        place = folder / path.parent.name / f"{path.parent.parent.name}-{path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


@pytest.fixture
def done(tiny: Tiny, pictures: Path) -> Run:
    return run(tiny("coop", epochs=1).with_data(root=str(pictures)))


def parts(folder: Path, split: str | None = None) -> dict[str, str]:
    """The part of each image of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lists = load_dataset("folder", root=folder, shots=1, split=split).lists
    assert lists is not None
    return {sample.id: part for part in ("train", "val", "test") for sample in getattr(lists, part)}


# -- the cut ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_no_file_moves_when_files_come_and_go(seed: int) -> None:
    draw = random.Random(seed)
    files = [f"{number}.png" for number in range(draw.randint(2, 40))]
    kept = {file: part for part, members in cut_class("a", files).items() for file in members}
    for _ in range(5):
        files = [file for file in files if draw.random() < 0.8]
        files += [f"new-{draw.random()}.png" for _ in range(draw.randint(1, 9))]
        cut = {file: part for part, members in cut_class("a", files, kept).items() for file in members}
        assert set(cut) == set(files)
        assert all(cut[file] == kept[file] for file in files if file in kept)
        kept |= cut


def test_new_files_fill_the_parts_that_lack_most() -> None:
    first = [f"{number}.png" for number in range(10)]
    kept = {file: part for part, members in cut_class("a", first).items() for file in members}
    grown = cut_class("a", [*first, *(f"n{number}.png" for number in range(90))], kept)
    assert {part: len(members) for part, members in grown.items()} == {"train": 50, "val": 20, "test": 30}


def test_nothing_kept_is_the_plain_cut() -> None:
    files = [f"{number}.png" for number in range(17)]
    assert cut_class("a", files, {}) == cut_class("a", files)


# -- runs ---------------------------------------------------------------------------------------------------------
def test_a_run_keeps_its_split(done: Run, pictures: Path) -> None:
    assert read_kept(done.folder / KEPT_SPLIT) == parts(pictures)


def test_no_test_image_was_trained_on_after_files_are_removed(done: Run, pictures: Path) -> None:
    before = parts(pictures)
    for folder in pictures.iterdir():
        sorted(folder.iterdir())[0].unlink()
    moved = {name for name, part in parts(pictures).items() if part != before[name]}
    assert moved, "the plain cut cuts all files again, which this test is about"
    with pytest.warns(UserWarning, match="images of the split in .*split.json are not there any more"):
        scores = evaluate_head(done.folder, done_config(done).data)
    remaining = [name for name, part in before.items() if part == "test" and (pictures / name).is_file()]
    assert scores["total"] == len(remaining)


def done_config(done: Run) -> RunConfig:
    from vlprompt.cli.parse import parse_run

    return parse_run(["--config", str(done.folder / "config.yaml")])


def test_later_images_join_in_new_runs_too(done: Run, tiny: Tiny, pictures: Path) -> None:
    before = parts(pictures)
    for folder in pictures.iterdir():
        picture = sorted(folder.iterdir())[0]
        for number in range(4):
            shutil.copy(picture, folder / f"later {number}.png")
    joined = parts(pictures, str(done.folder))
    assert len(joined) == len(before) + 4 * len(list(pictures.iterdir()))
    assert {name: joined[name] for name in before} == before
    other = run(tiny("coop", epochs=1).with_data(root=str(pictures), split=str(done.folder)))
    assert read_kept(other.folder / KEPT_SPLIT) == joined


def test_a_split_that_trains_on_test_images_is_refused(done: Run, tiny: Tiny, pictures: Path) -> None:
    kept = json.loads((done.folder / KEPT_SPLIT).read_text(encoding="utf-8"))
    kept["train"], kept["test"] = kept["test"], kept["train"]
    (pictures / "swapped.json").write_text(json.dumps(kept), encoding="utf-8")
    data = done_config(done).with_data(split="swapped.json").data
    match = r"(\d+) of the \1 test images of folder are images that the head was trained on"
    with pytest.raises(ConfigError, match=match):
        evaluate_head(done.folder, data)
    plain = run(tiny("zeroshot").with_data(root=str(pictures)))
    assert evaluate_head(plain.folder, data)["total"]  # it was trained on nothing


def test_a_head_without_its_run_says_that_images_cannot_be_compared(done: Run, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(done.head_dir, tmp_path / "alone")
    for folder in pictures.iterdir():
        sorted(folder.iterdir())[0].unlink()
    with pytest.warns(UserWarning, match="another split here .* may be among the test images"):
        evaluate_head(tmp_path / "alone", done_config(done).data)


def test_other_classes_are_named(done: Run, pictures: Path) -> None:
    first = sorted(pictures.iterdir())[0]
    first.rename(first.with_name("zebra crossing"))
    with pytest.warns(UserWarning, match="1 of the 5 classes of folder are not those of the head, first 'zebra cross"):
        evaluate_head(done.folder, done_config(done).data)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"train": [], "val": [], "test": [1]}', b"[" * 100_000, b"\xff"]
)
def test_damaged_kept_splits_are_refused(content: bytes, done: Run) -> None:
    (done.folder / KEPT_SPLIT).write_bytes(content)
    with pytest.raises(DataError, match="The kept split .*split.json (cannot be read|is damaged)"):
        evaluate_head(done.folder, done_config(done).data)


def test_only_runs_on_folders_can_be_named_as_split(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.split is '.*'; folder has no splits. Accepted: the folder of a run"):
        load_dataset("folder", root=pictures, split=str(tmp_path / "none"))


def test_compare_tells_folders_apart(done: Run, tiny: Tiny, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "copy")
    other = run(tiny("coop", epochs=1).with_data(root=str(tmp_path / "copy")))
    assert other.folder != done.folder
    assert any(line.startswith("folder of the images") for line in compare(done.folder, other.folder).data)


@pytest.mark.parametrize("name", ["split", "choice of shots", "backbone", "class names", "preprocessing"])
def test_runs_are_not_resumed_from_other_inputs(name: str, done: Run) -> None:
    path = done.folder / "env.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    recorded["inputs"][name] = "0" * 64
    path.write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"was started from another {name};.*another --output.*--force"):
        run(done_config(done))


def test_runs_of_older_versions_are_reused(done: Run) -> None:
    path = done.folder / "env.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    del recorded["inputs"]["class names"], recorded["inputs"]["preprocessing"]
    path.write_text(json.dumps(recorded), encoding="utf-8")
    assert run(done_config(done)).reused


# -- the place of the weights -------------------------------------------------------------------------------------
def moved_weights(folder: Path) -> Path:
    """A folder with the demo's weights in open_clip's form."""
    from safetensors.torch import save_file

    from vlprompt.backbone.demo import read_demo

    settings, state, _ = read_demo("demo")
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def test_weights_in_another_place_are_those_of_the_head(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    weights = moved_weights(tmp_path / "there" / "mine")
    monkeypatch.chdir(tmp_path / "there")
    config = tiny("zeroshot")
    done = run(replace(config, backbone=replace(config.backbone, name="local-dir:mine")))
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(done.folder), "--device", "cpu"]) == 0  # the head records an absolute path
    weights = weights.rename(tmp_path / "moved")
    assert main(["eval", str(done.folder), "--device", "cpu"]) == 2
    assert f"there is no folder '{tmp_path / 'there' / 'mine'}'" in capsys.readouterr().err
    for words in (["eval", str(done.folder)], ["predict", str(done.folder), str(config.data.root), "--workers", "2"]):
        assert main([*words, "--backbone.name", f"local-dir:{weights}", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["eval", str(done.folder), "--backbone.name", "demo-rn"]) == 2
    assert "was trained on another backbone" in capsys.readouterr().err
    with pytest.raises(HeadError, match="another backbone"):
        load_head(done.folder, backbone_of(done.folder, {"name": "demo", "precision": "bf16"}, "cpu"))


@pytest.mark.parametrize("device", ["cuda:1", "gpu", "tpu", ""])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_devices_that_are_not_accepted(command: str, device: str, capsys: Any) -> None:
    assert main([command, "run", "x.png", "--device", device]) == 2
    error = capsys.readouterr().err
    assert "--device" in error and ("accepted: auto, cpu, cuda" in error or not device)
