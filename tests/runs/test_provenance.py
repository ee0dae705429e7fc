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
    match = r"\d+ of the \d+ test images of folder are images that the head in .* was trained on.*: omit data.split"
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
    with (
        pytest.warns(UserWarning, match="1 of the 5 classes of folder are not those of the head, first 'zebra cross"),
        pytest.raises(ConfigError, match="first 'zebra crossing/.* at the training"),  # its pictures are cut again
    ):
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


def move(path: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    path.rename(place)


@pytest.fixture
def given(image_folder: Path, tmp_path: Path) -> Path:
    """A folder with train/ and test/ that may be changed."""
    shutil.copytree(image_folder, tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("how", ["moved", "copied", "renamed", "other place"])
def test_pictures_that_come_to_the_test_images_are_known_by_their_content(how: str, tiny: Tiny, given: Path) -> None:
    config = tiny("coop", epochs=1, shots=-1).with_data(root=str(given))
    done = run(config)
    before = evaluate_head(done.folder, config.data)["total"]
    name = sorted(path.name for path in (given / "train").iterdir())[0]
    first, place = given / "train" / name / "0.png", given / "test" / name / "x.png"
    if how in ("moved", "other place"):
        move(first, place)
    elif how == "copied":
        shutil.copy(first, place)
    else:
        (given / "train" / name).rename(given / "aside")
        (given / "test" / name).rename(given / "train" / name)
        (given / "aside").rename(given / "test" / name)
    data = config.data
    if how == "other place":
        shutil.move(given, given.with_name("elsewhere"))
        data = config.with_data(root=str(given.with_name("elsewhere"))).data
    match = rf"test/{name}/.*' \('train/{name}/.*' at the training\): scores on them would be too high. Move them back"
    with pytest.raises(ConfigError, match=match):
        evaluate_head(done.folder, data)
    if how == "copied":
        place.unlink()
        assert evaluate_head(done.folder, data)["total"] == before


def test_the_same_file_in_train_and_test_is_named_once_and_not_refused(tiny: Tiny, given: Path) -> None:
    config = tiny("coop", epochs=1, shots=-1).with_data(root=str(given))
    name = sorted(path.name for path in (given / "train").iterdir())[0]
    shutil.copy(given / "train" / name / "0.png", given / "test" / name / "0.png")
    with pytest.warns(UserWarning, match=f"1 of the 14 test images are the same files.*first 'test/{name}/0.png'"):
        done = run(config)
    assert evaluate_head(done.folder, config.data)["total"] == 14


def test_large_sets_are_compared_by_their_ids(tiny: Tiny, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.datasets.images.HASHED_BYTES", 0)
    config = tiny("coop", epochs=1, shots=-1).with_data(root=str(given))
    done = run(config)
    split = {"train": [], "val": [], "test": []}
    for path in sorted((given / "train").rglob("*.png")):
        split["test" if path.stem == "0" else "train"].append([f"train/{path.parent.name}/{path.name}", 0, "a"])
    for items in split.values():
        names = sorted({item[0].split("/")[1] for item in items})
        items[:] = [[item[0], names.index(item[0].split("/")[1]), item[0].split("/")[1]] for item in items]
    (given / "other.json").write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(ConfigError, match="5 of the 5 test images of folder are images that the head in"):
        evaluate_head(done.folder, config.with_data(split="other.json").data)


def test_pictures_replaced_under_their_names_are_other_inputs(tiny: Tiny, given: Path) -> None:
    config = tiny("coop", epochs=1).with_data(root=str(given))
    run(config)
    pictures = sorted((given / "train").rglob("*.png"))
    pictures[0].write_bytes(pictures[1].read_bytes())
    with pytest.raises(ConfigError, match="was started from another content of the images;.*another --output"):
        run(config)


def test_another_reading_is_named(tiny: Tiny, given: Path) -> None:
    config = tiny("coop", epochs=1).with_data(root=str(given))
    done = run(config)
    with pytest.warns(UserWarning, match="read with orientation tag and background none, those of the head's.*#ffffff"):
        evaluate_head(done.folder, config.with_data(background="none").data)


@pytest.mark.parametrize("key", ["init_from", "settings.teacher"])
def test_starts_that_were_trained_on_test_images_are_refused(key: str, done: Run, tiny: Tiny, pictures: Path) -> None:
    kept = json.loads((done.folder / KEPT_SPLIT).read_text(encoding="utf-8"))
    kept["train"], kept["test"] = kept["test"], kept["train"]
    (pictures / "swapped.json").write_text(json.dumps(kept), encoding="utf-8")
    if key == "init_from":
        config = tiny("coop", epochs=1, init_from=str(done.folder))
    else:
        config = tiny("promptkd", {"teacher": str(done.folder)}, epochs=1)
    swapped = config.with_data(root=str(pictures), split="swapped.json")
    with pytest.raises(ConfigError, match=f"scores on them would be too high. Omit {key}, or name a run that"):
        run(swapped)
    same = run(config.with_data(root=str(pictures)))
    assert same.head().training_facts["starts"][0]["split_sha256"] == done.results["data"]["split_sha256"]
    if key == "init_from":  # what its start was trained on is refused as well
        (same.folder / "images.json").rename(same.folder / "kept.json")
        with pytest.raises(ConfigError, match="are images that the head in .* was trained on"):
            evaluate_head(same.folder, swapped.data)
        (same.folder / "kept.json").rename(same.folder / "images.json")
        with pytest.raises(ConfigError, match="are images that the head in .* was trained on"):
            evaluate_head(same.folder, swapped.data)


def test_a_start_of_other_classes_is_refused_if_its_tensors_are_theirs(tiny: Tiny, given: Path) -> None:
    config = tiny("coop", {"class_specific": True, "context_init": "", "context_length": 2}, epochs=1)
    done = run(config.with_data(root=str(given)))
    first = sorted(path.name for path in (given / "train").iterdir())[0]
    for part in ("train", "test"):
        (given / part / first).rename(given / part / "zebra")
    from dataclasses import replace

    with pytest.raises(ConfigError, match="init_from is .*a head of other classes or in another order"):
        run(replace(config, init_from=str(done.folder)).with_data(root=str(given)))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"trained": {}, "tested": {"a": 1}, "starts": {}}', b"\xff"])
def test_damaged_kept_images_are_refused(content: bytes, done: Run) -> None:
    (done.folder / "images.json").write_bytes(content)
    with pytest.raises(DataError, match="The kept images .*images.json (cannot be read|are damaged)"):
        evaluate_head(done.folder, done_config(done).data)


def test_compare_tells_folders_apart(done: Run, tiny: Tiny, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "copy")
    other = run(tiny("coop", epochs=1).with_data(root=str(tmp_path / "copy")))
    assert other.folder != done.folder
    assert any(line.startswith("folder of the images") for line in compare(done.folder, other.folder).data)


@pytest.mark.parametrize(
    "name", ["split", "choice of shots", "backbone", "class names", "preprocessing", "content of the images"]
)
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
    for name in ("class names", "preprocessing", "content of the images"):
        del recorded["inputs"][name]
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
