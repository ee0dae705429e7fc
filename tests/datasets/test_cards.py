"""Cards: contents, refused cards, and cards of the user. Their layouts are in test_layouts.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlprompt.datasets
from vlprompt._files import sha256_lines
from vlprompt.datasets import Card, card_class_names, data_root, find_card, list_datasets, load_dataset
from vlprompt.datasets.card import ASSETS, Classes, Source, Split, imagenet_names
from vlprompt.datasets.card_files import read_card
from vlprompt.datasets.catalogue import list_groups
from vlprompt.datasets.options import OPTIONS
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
DEMOS = ["demo", "demo-2", "demo-3", "demo-kinds", "demo-pairs", "demo-pairs-unseen", "demo-styles"]
REPOSITORY = Path(__file__).parents[2]


OTHERS = {
    "imagenetv2": 1000, "imagenet_sketch": 1000, "imagenet_a": 200, "imagenet_r": 200, "pacs": 7, "vlcs": 5,
    "office_home": 65, "office31": 31, "visda17": 12, "terra_incognita": 10, "domainnet": 345, "cifar10": 10,
    "cifar100": 100, "mnist": 10, "svhn": 10,
    "stl10": 10, "resisc45": 45, "clevr_count": 8, "patch_camelyon": 2, "country211": 211, "gtsrb": 43, "fer2013": 7,
    "rendered_sst2": 2, "kitti_distance": 4, "hateful_memes": 2, "voc2007": 20, "coco2014": 80,
}  # fmt: skip


def test_all_cards_load() -> None:
    assert list_datasets() == sorted([*ELEVEN, *OTHERS, *DEMOS, "folder"])
    assert list_datasets("oxford_*") == ["oxford_flowers", "oxford_pets"]
    for name, classes in {**ELEVEN, **OTHERS}.items():
        card = find_card(name)
        assert card.classes.count == classes and card.template.count("{}") == 1
        assert card.sizes is not None and "test" in card.sizes and card.licence.text and card.notes
        names = card_class_names(card)
        assert names is not None and len(names) == classes
        assert card.classes.names_sha256 in (None, sha256_lines(names))
    for name in ELEVEN:
        assert set(find_card(name).sizes or ()) == {"train", "val", "test"}
    assert list_groups()["fewshot11"] == sorted(ELEVEN) and len(list_groups()["cross10"]) == 10
    assert not list((REPOSITORY / "datasets").rglob("*.py"))


FACTS = json.loads((Path(__file__).parents[1] / "golden" / "dataset_facts.json").read_text())
#: Cards that differ from the collected facts, with the reason (also in their notes).
DIFFER = {
    ("resisc45", "sizes"): "BlackVIP's split file, not ELEVATER's sample",
    ("gtsrb", "sizes"): "torchvision has no validation images",
    ("fer2013", "sizes"): "torchvision tests on both test sets together",
    ("rendered_sst2", "sizes"): "872 validation images, as torchvision documents",
    ("pacs", "sizes"): "one image is excluded, as in Dassl",
    ("vlcs", "sizes"): "only the test folders are tested, as in Dassl",
    ("domainnet", "sizes"): "the test lists only",
    ("clevr_count", "folder"): "torchvision's layout",
}


@pytest.mark.parametrize("facts", FACTS, ids=[facts["name"] for facts in FACTS])
def test_cards_agree_with_the_collected_facts(facts: dict[str, Any]) -> None:
    card = find_card(facts["name"])
    sizes = {split: size for split, size in facts["sizes"].items() if size is not None}
    same = {
        "folder": card.folders[0] == facts["folder"],
        "num_classes": card.classes.count == facts["num_classes"],
        "sizes": card.sizes is not None and all(card.sizes.get(split) == size for split, size in sizes.items()),
        "template": card.template == facts["template"],
        "metric": card.metric == {"mAP": "map", "11point_mAP": "map_11point"}.get(facts["metric"], facts["metric"]),
        "split_sha256": card.facts.file_sha256 == facts.get("split_sha256"),
        "aliases": all(find_card(alias) is card for alias in facts.get("aliases", ())),
    }
    differ = {key for key, equal in same.items() if not equal}
    assert differ == {key for name, key in DIFFER if name == card.name}
    if "base_new_classes" in facts:
        half = (facts["num_classes"] + 1) // 2
        assert facts["base_new_classes"] == [half, facts["num_classes"] - half]


def test_class_names_whose_order_differs_between_sources() -> None:
    names = {name: card_class_names(find_card(name)) or [] for name in [*ELEVEN, *OTHERS]}
    assert names["food101"][16:18] == ["cheese_plate", "cheesecake"]
    assert names["ucf101"][34:36] == ["Hammering", "Hammer_Throw"] and names["ucf101"][46] == "Jumping_Jack"
    assert names["sun397"][14] == "outdoor arrival_gate"
    assert names["oxford_pets"][:2] == ["abyssinian", "american_bulldog"]
    assert names["stanford_cars"][0] == "2000 AM General Hummer SUV"
    assert names["eurosat"][0] == "Annual Crop Land" and names["eurosat"][-1] == "Sea or Lake"
    assert names["caltech101"][:5] == ["face", "leopard", "motorbike", "accordion", "airplane"]
    assert names["clevr_count"] == [str(count) for count in range(3, 11)]
    assert names["office_home"].index("tv") == names["office_home"].index("table") - 1
    assert names["voc2007"] == sorted(names["voc2007"]) and names["coco2014"] == sorted(names["coco2014"])
    assert names["fer2013"][-1] == "neutral"
    assert {"F-16A/B", "F/A-18"} <= set(names["fgvc_aircraft"]) and "globe-flower" in names["oxford_flowers"]
    assert names["imagenet"][0] == "tench" and names["imagenet"][999] == "toilet paper"
    assert len(set(names["imagenet_a"]) & set(names["imagenet_r"])) >= 80 and names["imagenet_a"] != names["imagenet_r"]


def test_imagenet_names_are_the_published_file() -> None:
    digest = hashlib.sha256((ASSETS / "imagenet" / "classnames.txt").read_bytes()).hexdigest()
    assert digest == "89e0b642c6697a3a43a06a2bb65f9fefb3ca295ccc5f4ba9ce385f1a3a58c629"
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    assert list(imagenet_names().values()) == list(IMAGENET_CLASSNAMES)


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


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Unknown data set 'caltech100'. Did you mean 'caltech101'"):
        find_card("caltech100")
    with pytest.raises(ConfigError, match="name of a data set is text, not 7"):
        find_card(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted([*ELEVEN, *OTHERS]))
def test_the_text_for_missing_data_fits_one_screen(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, root=tmp_path)
    text, card = str(caught.value), find_card(name)
    assert str(tmp_path / card.folders[0]) in text and card.sources[0].page in text and card.licence.text in text
    assert "--data.root FOLDER" in text and "VLPROMPT_DATA" in text
    assert len(text.splitlines()) <= 24 and getattr(card.options, "split_file", "") in text


def test_a_root_one_level_too_deep_is_reported(tmp_path: Path) -> None:
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


def test_class_names_without_images() -> None:
    assert len(card_class_names(find_card("imagenet")) or []) == 1000
    assert len(card_class_names(find_card("demo")) or []) == 100
    assert (card_class_names(find_card("dtd")) or [])[0] == "banded"
    assert card_class_names(find_card("folder")) is None


def test_describe_names_what_a_run_depends_on() -> None:
    first, second = load_dataset("demo", shots=2, seed=1), load_dataset("mix100", shots=2, seed=2, template="a {} sign")
    assert first.split_sha256 == second.split_sha256 and first.shots_sha256 != second.shots_sha256
    assert second.describe()["template"] == "a {} sign" and second.describe()["seed"] == 2
    with pytest.raises(ConfigError, match="no other half"):
        first.counterpart()


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
        (GOOD + "name: twice\n", "is given twice"),
        (GOOD.replace("schema: 1", "schema: 2"), "schema is 2"),
        (GOOD.replace("licence:", "license:"), "Did you mean 'licence'"),
        (GOOD.replace("reader: split_json", "reader: splitjson"), "Did you mean 'split_json'"),
        (
            GOOD.replace("  split_file: split_zhou", "  split_fle: split_zhou"),
            "split_file is missing(.|\n)*Did you mean 'reader_options.split_file'",
        ),
        (GOOD.replace("folders: [dtd]", "folders: [../dtd]"), "inside the data root"),
        (GOOD.replace("image_dir: images", "image_dir: /images"), "image_dir is '/images'; accepted: a path in"),
        (GOOD.replace('"{} texture."', '"texture"'), "exactly once"),
        (GOOD.replace("count: 47", "count: many"), "classes.count is 'many'"),
        (GOOD.replace("count: 47", "count: 46"), "classes.names has 47 entries but classes.count is 46"),
        (GOOD.replace("val: 1128", "val: -1"), "splits.coop.val is -1; accepted: a whole number of 0 or more"),
        (GOOD.replace("metric: accuracy", "metric: acuracy"), "Did you mean 'accuracy'"),
        (GOOD.replace("metric: accuracy", "metric: map"), "go with multilabel"),
        (GOOD + "packaged: 3\n", "packaged is 3; accepted: true or false"),
        (GOOD + "root: /etc\n", "there is no field 'root'"),
        (GOOD.replace("aliases: [", "aliases: [1, "), r"aliases\[0\] is 1; accepted: a name of letters, .*, in quotes"),
        (GOOD.replace("task: multiclass\n", ""), "- task is missing"),
    ],
)
def test_malformed_cards(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_card(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [Card, Classes, Split, Source, *OPTIONS.values()])
def test_card_fields_are_all_documented(kind: Any) -> None:
    assert all(f"        {field.name}:" in (kind.__doc__ or "") for field in dataclasses.fields(kind))


CARDS = sorted((REPOSITORY / "datasets").glob("*.yaml"))
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@given(st.sampled_from(CARDS), st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_cards_give_our_error_only(tmp_path: Path, source: Path, data: st.DataObject) -> None:
    """A card with one field changed to an arbitrary value, at any depth, is read or refused without a crash."""
    content = yaml.safe_load(source.read_text())
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            place = inner
            continue
        place[key] = data.draw(ODD)
        break
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    try:
        card = read_card(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert card.name and card.base(tmp_path).is_absolute()


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "card.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match="card.yaml"):
        read_card(path)


def write_card(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)


def test_cards_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path / "cards"))
    mine = GOOD.replace("name: dtd", "name: mine").replace("aliases: [DescribableTextures, DTD]", "aliases: [my-set]")
    write_card(tmp_path / "cards", "mine", mine + f"root: {tmp_path}\n")
    assert "mine" in list_datasets() and find_card("My_Set").base() == tmp_path / "dtd"
    write_card(tmp_path / "cards", "taken", GOOD)
    with pytest.warns(UserWarning, match="your card is ignored.*taken.yaml both have the name"):
        assert "mine" in list_datasets()
    write_card(tmp_path / "cards", "taken", "schema: 7")
    with pytest.warns(UserWarning, match="your card is ignored.*taken.yaml is not valid"):
        assert find_card("dtd").file.endswith("datasets/dtd.yaml")


def test_several_folders_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = find_card("terra_incognita")
    (tmp_path / "two" / "terra_incognita").mkdir(parents=True)
    monkeypatch.setenv("VLPROMPT_DATA", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    assert card.base() == tmp_path / "two" / "terra_incognita"
    assert card.base(tmp_path / "one") == tmp_path / "one" / "terra"


def test_another_split() -> None:
    card = find_card("dtd")
    official = card.with_split("official")
    assert official.reader == "list_file" and official.sizes == {"train": 1880, "val": 1880, "test": 1880}
    mine = card.with_split("mine.json")
    assert mine.options.split_file == "mine.json" and mine.sizes is None and mine.reader == "split_json"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="data.split is 'offical'; dtd has: coop, official"):
        card.with_split("offical")
    with pytest.raises(ConfigError, match="leaves the image folder"):
        card.with_split("../mine.json")


def test_import_is_lazy() -> None:
    code = (
        "import sys, vlprompt.datasets as d; d.list_datasets(); d.load_dataset('demo')\n"
        "print([m for m in ('torch', 'torchvision', 'pytorch_lightning', 'PIL') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists() -> None:
    assert all(getattr(vlprompt.datasets, name) is not None for name in vlprompt.datasets.__all__)
    assert set(vlprompt.datasets.__all__) == set(dir(vlprompt.datasets))
    with pytest.raises(AttributeError, match="load_datasets"):
        vlprompt.datasets.load_datasets  # noqa: B018
