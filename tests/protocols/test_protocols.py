"""Protocols as data: what the shipped descriptions say, what a user's file may say, and what is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vlprompt.config.run import RunConfig
from vlprompt.datasets import catalogue
from vlprompt.errors import ConfigError, DataError
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.domains import domain_generalisation
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.groups import dataset_names
from vlprompt.protocols.plan import Overrides, plan_protocol
from vlprompt.protocols.protocol_files import REPORTS, find_protocol, list_protocols, protocol_folder, read_protocol
from vlprompt.protocols.protocols import run_protocol

Tiny = Callable[..., RunConfig]
NAMES = [
    *("base-to-new", "cross-dataset", "few-shot", "imagenet-domains", "leave-one-out", "per-target"),
    *("single-source", "test-time"),
]


# -- descriptions ---------------------------------------------------------------------------------------------------
def test_the_shipped_ones_are_the_papers() -> None:
    assert list_protocols() == NAMES and list_protocols("*-shot") == ["few-shot"]
    found = {name: find_protocol(name) for name in NAMES}
    assert all(one.name == name and one.seeds == (1, 2, 3) and one.about for name, one in found.items())
    assert {name: (one.test.part, one.train.classes, one.train.shots) for name, one in found.items()} == {
        "base-to-new": ("halves", "base", (16,)),
        "cross-dataset": ("datasets", "all", (16,)),
        "few-shot": ("same", "all", (1, 2, 4, 8, 16)),
        "imagenet-domains": ("datasets", "all", (16,)),
        "leave-one-out": ("domains", "all", ()),
        "per-target": ("same", "all", (-1,)),
        "single-source": ("domains", "all", ()),
        "test-time": ("test-time", "all", ()),
    }
    assert found["base-to-new"].report == ("h_of_averages", "average_of_h")
    assert found["imagenet-domains"].train.data == ("imagenet",)
    variants = dataset_names(found["imagenet-domains"].test.data)
    assert sorted(variants) == ["imagenet_a", "imagenet_r", "imagenet_sketch", "imagenetv2"]
    few = dataset_names(found["few-shot"].train.data)
    assert dataset_names(found["base-to-new"].train.data) == few and len(few) == 11
    assert dataset_names(found["cross-dataset"].test.data) == [name for name in few if name != "imagenet"]
    assert found["per-target"].train.data == found["cross-dataset"].test.data
    assert all(found[name].domain_protocol == name for name in ("leave-one-out", "single-source"))
    assert sorted(dataset_names(found["test-time"].train.data)) == sorted([*few, *variants])


def test_a_name_may_be_spelled_otherwise() -> None:
    assert find_protocol("Few_Shot") == find_protocol("few-shot")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few-shots", "protocol is 'few-shots'; accepted: base-to-new, .*my.yaml. Did you mean 'few-shot'"),
        ("", "protocol is ''; accepted: base-to-new, cross-dataset, few-shot"),
        ("../few-shot", "protocol is '../few-shot'; accepted"),
        ("mine.yaml", "protocol 'mine.yaml': there is no such file; vlprompt's own: base-to-new"),
    ],
)
def test_names_that_are_none(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_protocol(name)


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., Path]:
    """``mine("few-shot", train={...}, seeds=...)``: a shipped description with other values; None takes a key away."""

    def write(base: str, **values: Any) -> Path:
        content = yaml.safe_load((protocol_folder() / f"{base}.yaml").read_text()) | values
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


def test_a_users_own_file(mine: Callable[..., Path]) -> None:
    path = mine("cross-dataset", name="tpt", seeds=[7], report=["mean_of_targets", "mean_with_source"])
    found = find_protocol(str(path))
    assert (found.name, found.seeds, found.report) == ("tpt", (7,), ("mean_of_targets", "mean_with_source"))
    assert found.test == find_protocol("cross-dataset").test


@pytest.mark.parametrize(
    ("base", "values", "messages"),
    [
        ("few-shot", {"seed": [1]}, ["line 10: there is no key 'seed'. Did you mean 'seeds'"]),
        ("few-shot", {"train": {"dat": ["demo"]}}, ["'train.dat'. Did you mean 'train.data'", "train.data is missing"]),
        ("few-shot", {"seeds": "1,2", "report": 3}, ["seeds is '1,2'; accepted: a list", "report is 3"]),
        ("few-shot", {"schema": None}, ["schema is missing; accepted: 1"]),
        ("few-shot", {"schema": 2}, ["schema is 2; accepted: 1"]),
        ("few-shot", {"name": "../up"}, ["name is '../up'; accepted: letters"]),
        ("few-shot", {"seeds": []}, ["seeds is []; accepted: a list of one or more"]),
        ("few-shot", {"seeds": [1, 1]}, ["seeds is [1, 1]; accepted: a list of one or more different numbers"]),
        ("few-shot", {"seeds": [1, -2]}, ["seeds[1] is -2; accepted: a whole number from 0 to 4294967295"]),
        ("few-shot", {"test": {"part": "sam"}}, ["test.part is 'sam'", "Did you mean 'same'"]),
        ("few-shot", {"test": {"part": "same", "data": ["demo"]}}, ["with test.part: same it has no meaning"]),
        ("few-shot", {"report": ["mean_of_dataset"]}, ["Did you mean 'mean_of_datasets'", "it holds"]),
        ("few-shot", {"train": {"data": ["config", "demo"], "classes": "all", "shots": [0, 1]}},
         ["accepted: 'config', the configuration's own data set, alone", "train.shots[0] is 0; accepted: 1 or more"]),
        ("few-shot", {"train": {"data": ["demo"], "classes": "all"}}, ["train.shots is empty"]),
        ("base-to-new", {"train": {"data": ["demo"], "classes": "all", "shots": [1, 2]}},
         ["train.classes is 'all'; with test.part: halves accepted: 'base'", "train.shots is [1, 2]; several are for"]),
        ("cross-dataset", {"test": {"part": "datasets"}}, ["with test.part: datasets it names the targets"]),
        ("leave-one-out", {"train": {"data": ["demo-styles"], "classes": "all"}}, ["train.domains is 'all'"]),
        ("few-shot", {"train": {"data": ["demo"], "classes": "all", "shots": [1], "domains": "one"}},
         ["train.domains is 'one'; with test.part: same accepted: 'all'"]),
        ("test-time", {"train": {"data": ["demo"], "classes": "all", "shots": [1]}},
         ["train.shots is [1]; with test.part: test-time it has no meaning"]),
    ],
)  # fmt: skip
def test_every_problem_of_a_file_is_named(
    base: str, values: dict[str, Any], messages: list[str], mine: Callable[..., Path]
) -> None:
    path = mine(base, **values)
    with pytest.raises(ConfigError, match="mine.yaml cannot be used:") as caught:
        read_protocol(path)
    assert all(message in str(caught.value) for message in messages), caught.value


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "name: !!python/object:os.system x", "\0"])
def test_files_that_are_no_description(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="mine.yml"):
        find_protocol(str(path))


def test_every_report_can_be_asked_for(mine: Callable[..., Path]) -> None:
    for base in NAMES:
        known = REPORTS[find_protocol(base).test.part]
        assert read_protocol(mine(base, report=list(known))).report == known


def test_names_of_several_data_sets() -> None:
    assert dataset_names(["demo", "DescribableTextures"]) == ["demo", "dtd"]
    for names, message in (
        (["dmo", "dtd", "calltech101"], "'dmo' is no data set. Did you mean 'demo'.*'calltech101' is no data set. Did"),
        (["dtd", "demo", "DescribableTextures"], "datasets: 'dtd' is named twice"),
        ([], "datasets: none is named; accepted: names with commas, demo,dtd"),
        ([""], "'' is no data set. Accepted: caltech101"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataset_names(names)


# -- groups ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three data sets in two groups."""
    cards = {
        name: SimpleNamespace(name=name, aliases=(), group=group)
        for name, group in (("a", ("g", "h")), ("b", ("g",)), ("c", ()))
    }
    monkeypatch.setattr(catalogue, "all_cards", lambda: cards)


@pytest.mark.usefixtures("grouped")
def test_groups_are_read_from_the_cards() -> None:
    assert catalogue.list_groups() == {"g": ["a", "b"], "h": ["a"]}
    assert dataset_names(["c", "group:g"]) == ["c", "a", "b"]
    assert dataset_names(["group:g"], leave_out=["a"]) == ["b"]


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["group:f"], "targets: no data set's card names the group 'f'. (Did you mean|Accepted)"),
        (["group:g", "a"], "targets: 'a' is named twice"),
        (["d", "group:f"], "targets: 'd' is no data set.* names the group 'f'"),
    ],
)
def test_groups_that_are_none(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset_names(names, "targets")


# -- runs -----------------------------------------------------------------------------------------------------------
def test_a_protocol_gives_what_its_function_gives(tiny: Tiny, toy_sets: Path) -> None:
    config = tiny("coop", lr=0.2).with_data(name="toy-styles", root=str(toy_sets))
    names, seeds = ["toy-plain", "toy-styles"], (2,)
    two = config.with_data(shots=2)
    for name, own, expected in (
        ("few-shot", Overrides(seeds, names, shots=(1, 2)), lambda: few_shot([config], (1, 2), seeds, datasets=names)),
        ("base-to-new", Overrides(seeds, names, shots=(2,)), lambda: base_to_new([two], seeds, datasets=names)),
        (
            "cross-dataset",
            Overrides(seeds, targets=["toy-plain"], shots=(2,)),
            lambda: cross_dataset([two], ["toy-plain"], seeds),
        ),
        ("single-source", Overrides(seeds), lambda: domain_generalisation([config], "single-source", seeds)),
    ):
        assert run_protocol(find_protocol(name), [config], own) == expected()


def test_a_users_protocol_is_called_by_its_name(mine: Callable[..., Path], tiny: Tiny, toy_sets: Path) -> None:
    config = tiny("coop").with_data(name="toy-styles", root=str(toy_sets))
    train = {"data": ["config"], "classes": "all", "shots": [2]}
    path = mine(
        "cross-dataset", name="tpt", train=train, test={"part": "datasets", "data": ["toy-plain"]},
        seeds=[1], report=["mean_of_targets", "mean_with_source"],
    )  # fmt: skip
    results, table = run_protocol(find_protocol(str(path)), [config])
    assert results["protocol"] == "tpt" and table.startswith("tpt: ") and "mean with the source" in table
    path = mine("few-shot", name="few-2", train=train, seeds=[1])
    results, table = run_protocol(find_protocol(str(path)), [config])
    assert results["protocol"] == "few-2" and table.startswith("few-2 accuracy")
    assert len(list(Path(config.output).glob("few_2-*.json"))) == 1


def test_configurations_of_a_protocol(tiny: Tiny) -> None:
    config = tiny("coop", shots=3)
    plan = plan_protocol(find_protocol("few-shot"), [config], Overrides(datasets=["demo", "dtd"], shots=[1, 2]))
    assert [(one.data.name, one.data.shots, one.data.classes) for one in plan.configs] == [
        (name, shots, "all") for name in ("demo", "dtd") for shots in (1, 2)
    ]
    styles = config.with_data(name="demo-styles", root=None)
    plan = plan_protocol(find_protocol("leave-one-out"), [styles])
    assert {(one.data.name, one.data.shots) for one in plan.configs} == {("demo-styles", 3)}  # its own


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (
            "test-time",
            Overrides(shots=[1]),
            "--shots has no meaning for test-time, which learns from no labelled images",
        ),
        (
            "test-time",
            Overrides(datasets=["demo"]),
            "learn from no labelled images, and coop learns from them; accepted: d",
        ),
        ("few-shot", Overrides(targets=["demo"]), "--targets has no meaning for few-shot"),
        ("base-to-new", Overrides(shots=[1, 2]), r"--shots is \[1, 2\]; base-to-new takes one number"),
        ("few-shot", Overrides(datasets=["dmo"]), "'dmo' is no data set"),
        ("few-shot", Overrides(datasets=["demo"], seeds=[]), "at least one configuration and one seed"),
    ],
)
def test_overrides_that_do_not_fit(name: str, own: Overrides, message: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_protocol(find_protocol(name), [tiny("coop")], own)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["base-to-new", "few-shot", "cross-dataset"])
def test_all_that_is_missing_is_told_first(name: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("coop").with_data(root=str(tmp_path / "nowhere"))
    own = Overrides(targets=["dtd", "eurosat"]) if name == "cross-dataset" else Overrides(datasets=["dtd", "eurosat"])
    with pytest.raises(DataError, match="dtd, eurosat"):
        run_protocol(find_protocol(name), [config], own)
    assert not (tmp_path / "runs").exists()
