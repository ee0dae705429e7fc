"""The cards, and for each card an invented mini data set in its exact layout."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlprompt.data
from vlprompt.data import Card, card_class_names, data_root, find_card, list_datasets, load_dataset
from vlprompt.data.cards import read_card
from vlprompt.data.readers import read_dataset
from vlprompt.errors import ClassNameError, ConfigError, DataError

ELEVEN = {
    "imagenet": 1000,
    "caltech101": 100,
    "oxford_pets": 37,
    "stanford_cars": 196,
    "oxford_flowers": 102,
    "food101": 101,
    "fgvc_aircraft": 100,
    "sun397": 397,
    "dtd": 47,
    "eurosat": 10,
    "ucf101": 101,
}
DEMOS = ["demo", "demo-2", "demo-3", "demo-kinds", "demo-pairs", "demo-styles"]
REPOSITORY = Path(__file__).parents[2]


def test_all_cards_load() -> None:
    assert list_datasets() == sorted([*ELEVEN, *DEMOS, "folder"])
    assert list_datasets("oxford_*") == ["oxford_flowers", "oxford_pets"]
    for name, classes in ELEVEN.items():
        card = find_card(name)
        assert card.classes == classes and card.template.count("{}") == 1
        assert card.sizes is not None and set(card.sizes) == {"train", "val", "test"}
    assert not list((REPOSITORY / "datasets").rglob("*.py"))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("OxfordFlowers", "oxford_flowers"),
        ("flowers102", "oxford_flowers"),
        ("DTD", "dtd"),
        ("cars", "stanford_cars"),
        ("DescribableTextures", "dtd"),
        ("caltech-101", "caltech101"),
        ("oxford-pets", "oxford_pets"),
        ("food-101", "food101"),
        ("Aircraft", "fgvc_aircraft"),
        ("eurosat_clip", "eurosat"),
        ("ImageNet", "imagenet"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert find_card(alias).name == name


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Unknown data set 'caltech100'. Did you mean 'caltech101'"):
        find_card("caltech100")
    with pytest.raises(ConfigError, match="by its name, not by 7"):
        find_card(7)  # type: ignore[arg-type]


def write_layout(card: Card, root: Path, picture: bytes) -> list[str]:
    """Write two train images, one val and one test image per class; return the expected class names."""
    base, count = root / card.folder, card.classes or 0
    names = [f"class_{chr(97 + index // 26 % 26)}{chr(97 + index % 26)}_{index:04d}" for index in range(count)]
    files: dict[str, bytes] = {}
    if card.reader == "split_json":
        split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
        for label, name in enumerate(names):
            for index, part in enumerate(("train", "train", "val", "test")):
                split[part].append([f"{label:04d}/{index}.jpg", label, name])
                files[f"{card.image_dir}/{label:04d}/{index}.jpg"] = picture
        files[card.split_file or ""] = json.dumps(split).encode()
    elif card.reader == "fgvc":
        names[3], names[4] = "F-16A/B", "Cessna 525 B"
        files["variants.txt"] = "\n".join(names).encode() + b"\n"
        for offset, part in enumerate(("train", "val", "test")):
            lines = [f"{offset * count + label:07d} {name}" for label, name in enumerate(names)]
            files[f"images_variant_{part}.txt"] = "\n".join(lines).encode() + b"\n"
            files |= {f"images/{line.split()[0]}.jpg": picture for line in lines}
    else:
        names = card_class_names(card) or []
        for label in range(count):
            files |= {f"images/train/n{label:08d}/{index}.JPEG": picture for index in (1, 0)}
            files[f"images/val/n{label:08d}/ILSVRC2012_val_{label:08d}.JPEG"] = picture
    for path, data in files.items():
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(data)
    return names


@pytest.mark.parametrize("name", sorted(ELEVEN))
def test_every_card_reads_its_layout(name: str, tmp_path: Path, paint: Callable[..., Path]) -> None:
    card = find_card(name)
    names = write_layout(card, tmp_path, paint(tmp_path / "picture.jpg").read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lists = read_dataset(card, tmp_path)
    assert lists.class_names == names
    per_class = 1 if card.reader == "fgvc" else 2
    assert [len(part) for part in (lists.train, lists.val, lists.test)] == [per_class * len(names), *[len(names)] * 2]
    assert sorted({sample.label for sample in lists.train}) == list(range(len(names)))
    assert lists.train[-1].source.open().size == (20, 24)
    assert bool(caught) is (card.reader == "split_json")  # a mini split is not the published one, and that is said


def test_imagenet_few_shot_and_names(tmp_path: Path, paint: Callable[..., Path]) -> None:
    card = find_card("imagenet")
    write_layout(card, tmp_path, paint(tmp_path / "picture.jpg").read_bytes())
    task = load_dataset("imagenet", root=tmp_path, shots=1, seed=1, classes="new")
    assert (len(task.class_names), len(task.train), len(task.val), len(task.test)) == (500, 500, 500, 500)
    assert task.train[0].label == 0 and task.train[0].id.startswith("train/n00000500/")
    assert task.all_class_names[0] == "tench" and len(task.all_class_names) == 1000
    names = card_class_names(card)
    assert names is not None and names.count("missile") == 2 and names.count("sunglasses") == 2
    assert task.sampler == "sorted-v1"


def test_flat_imagenet_validation(tmp_path: Path, paint: Callable[..., Path]) -> None:
    images = tmp_path / "imagenet" / "images"
    (images / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="0 class folders; 1,000 are expected"):
        load_dataset("imagenet", root=tmp_path)
    (images / "train").rmdir()
    with pytest.raises(DataError, match="images/train .does not exist."):
        load_dataset("imagenet", root=tmp_path)
    write_layout(find_card("imagenet"), tmp_path, paint(tmp_path / "picture.jpg").read_bytes())
    shutil.rmtree(images / "val")
    paint(images / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="lie flat; expected one folder per class"):
        load_dataset("imagenet", root=tmp_path)
    paint(images / "val" / "n00000000" / "1.JPEG")
    with pytest.raises(DataError, match="1 class folders; 1,000 are expected"):
        load_dataset("imagenet", root=tmp_path)


def test_broken_aircraft_lists(tmp_path: Path, paint: Callable[..., Path]) -> None:
    card = find_card("fgvc_aircraft")
    write_layout(card, tmp_path, paint(tmp_path / "picture.jpg").read_bytes())
    base = tmp_path / "fgvc_aircraft"
    (base / "images" / "0000007.jpg").unlink()
    with pytest.raises(DataError, match="1 of 300 images of fgvc_aircraft are missing(.|\n)*0000007.jpg"):
        read_dataset(card, tmp_path)
    good = (base / "images_variant_val.txt").read_text()
    (base / "images_variant_val.txt").write_text("0000001 F-16A/B\n../x F-16A/B\n0000999 F-16A/C\n" + good)
    with pytest.raises(DataError, match="3 problems") as caught:
        read_dataset(card, tmp_path)
    for piece in ("already in images_variant_train.txt", "leaves the image folder", "Did you mean 'F-16A/B'"):
        assert piece in str(caught.value)
    (base / "variants.txt").write_text("one\ntwo\ntwo\n")
    with pytest.raises(DataError, match="'two' appears twice(.|\n)*3 names; 100 are expected"):
        read_dataset(card, tmp_path)
    (base / "variants.txt").unlink()
    with pytest.raises(DataError, match="variants.txt .does not exist."):
        read_dataset(card, tmp_path)


@pytest.mark.parametrize("name", sorted(ELEVEN))
def test_missing_data_fit_one_screen(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, root=tmp_path)
    text, card = str(caught.value), find_card(name)
    assert str(tmp_path / card.folder) in text and card.home in text and card.licence in text
    assert "--data.root FOLDER" in text and "VLPROMPT_DATA" in text
    assert len(text.splitlines()) <= 24 and (card.split_file or "") in text


def test_a_root_one_level_too_deep_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "food-101").mkdir()
    with pytest.raises(DataError, match=f"--data.root {tmp_path}$"):
        load_dataset("food101", root=tmp_path / "food-101")


def test_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLPROMPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data_root() == tmp_path / "data"
    monkeypatch.setenv("VLPROMPT_DATA", "elsewhere")
    assert data_root() == tmp_path / "elsewhere"
    assert data_root("here") == tmp_path / "here"


def test_cards_without_images() -> None:
    assert len(card_class_names(find_card("imagenet")) or []) == 1000
    assert len(card_class_names(find_card("demo")) or []) == 100
    assert card_class_names(find_card("dtd")) is None


def test_describe_names_what_a_run_depends_on() -> None:
    one, two = load_dataset("demo", shots=2, seed=1), load_dataset("mix100", shots=2, seed=2, template="a {} sign")
    assert one.split_sha256 == two.split_sha256 and one.shots_sha256 != two.shots_sha256
    assert two.describe()["template"] == "a {} sign" and two.describe()["seed"] == 2
    with pytest.raises(ConfigError, match="no other half"):
        one.counterpart()


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"shots": 0}, ConfigError, "shots is 0"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"classes": "old"}, ConfigError, "classes is 'old'.*all, base, new"),
        ({"template": "a photo"}, ClassNameError, "exactly once"),
        ({"template": "{} and {}"}, ClassNameError, "exactly once"),
        ({"template": "{} {0}"}, ClassNameError, "exactly once"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        load_dataset("demo", **settings)


GOOD = (REPOSITORY / "datasets" / "dtd.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "not a table"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
        (GOOD.replace("schema: 1", "schema: 2"), "schema is 2"),
        (GOOD.replace("licence:", "license:"), "Did you mean 'licence'"),
        (GOOD.replace("reader: split_json", "reader: splitjson"), "Did you mean 'split_json'"),
        (GOOD.replace("split_file: split_zhou", "notes2: split_zhou"), "needs the field 'split_file'"),
        (GOOD.replace("folder: dtd", "folder: ../dtd"), "inside the data root"),
        (GOOD.replace('"{} texture."', '"texture"'), "exactly once"),
        (GOOD.replace("classes: 47", "classes: many"), "classes is 'many'"),
        (GOOD.replace("val: 1128", "val: -1"), "sizes is"),
        (GOOD.replace("home: ", "home: 7 #"), "home is 7"),
        (GOOD + "packaged: 3\n", "packaged is 3"),
        (GOOD.replace("aliases: [", "aliases: [1, "), "aliases is"),
    ],
)
def test_malformed_cards(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_card(path)
    assert str(path) in str(caught.value)


def test_card_fields_are_all_documented() -> None:
    assert all(f"        {field.name}:" in (Card.__doc__ or "") for field in dataclasses.fields(Card))


def test_import_is_quick_and_lazy() -> None:
    code = (
        "import sys, vlprompt.data as d; d.list_datasets(); d.load_dataset('demo')\n"
        "print([m for m in ('torch', 'torchvision', 'pytorch_lightning', 'PIL') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    assert all(getattr(vlprompt.data, name) is not None for name in vlprompt.data.__all__)
    assert set(vlprompt.data.__all__) == set(dir(vlprompt.data))
    with pytest.raises(AttributeError, match="load_datasets"):
        vlprompt.data.load_datasets  # noqa: B018
