"""Plans: each training has the values of its own data set, shots and protocol, and what is printed is what is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.main import main
from vlprompt.cli.parse import read_command_line, source_of
from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets import task
from vlprompt.datasets.domains import card_rounds
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods.registry import get_method_class, list_methods
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.meta_compare import compare_starts
from vlprompt.protocols.plan import Overrides, Plan, make_plan, plan_protocol
from vlprompt.protocols.protocol_files import find_protocol
from vlprompt.protocols.protocols import run_plan
from vlprompt.runs import run as runs
from vlprompt.runs.run import Run

Tiny = Callable[..., RunConfig]
ELEVEN = [
    *("caltech101", "dtd", "eurosat", "fgvc_aircraft", "food101", "imagenet"),
    *("oxford_flowers", "oxford_pets", "stanford_cars", "sun397", "ucf101"),
]


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There are no data sets and no weights, and an attempt to load one fails."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan needs no data and no weights")

    monkeypatch.setenv("VLPROMPT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(task, "read_dataset", loaded)
    monkeypatch.setattr(runs, "run_session", loaded)


def source(*words: str) -> ConfigSource:
    return source_of(read_command_line(words))


def planned(protocol: str, *words: str, **overrides: Any) -> Plan:
    return plan_protocol(find_protocol(protocol), [source(*words)], Overrides(**overrides), dry=True)


def rows(plan: Plan, *keys: str) -> list[tuple[Any, ...]]:
    """The different values of ``keys``, in order; None where a training has the base's."""
    return list(dict.fromkeys(tuple(str(one.values.get(key)) for key in keys) for one in plan.trainings))


# -- values of every run --------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize(
    ("method", "keys", "number"),
    [
        ("tip_adapter", ["settings.alpha", "settings.search_alpha", "settings.search_beta", "settings.templates"], 11),
        ("kgcoop", ["settings.knowledge.templates"], 8),  # ImageNet, Caltech, cars and SUN397 share one
        ("mocoop", ["settings.templates", "settings.groups"], 10),  # Caltech and DTD share theirs
        ("clip_lora", ["recipe.steps"], 5),  # 16 shots take those of the method
    ],
)
def test_each_data_set_has_its_own_values(method: str, keys: list[str], number: int) -> None:
    plan = planned("few-shot", "--config", method)
    assert [(one.data.name, one.data.shots) for one in plan.configs] == [
        (name, shots) for name in ELEVEN for shots in (1, 2, 4, 8, 16)
    ]
    assert {one.data.classes for one in plan.configs} == {"all"} and len(rows(plan, *keys)) == number


def test_the_data_set_that_was_named_first_does_not_choose() -> None:
    for name in ("mocoop", "mocoop/dtd", "mocoop/imagenet"):
        plan = planned("few-shot", "--config", name, datasets=["eurosat", "dtd"], shots=[1])
        alone = [
            source("--config", f"mocoop/{data}").resolve(shots=1, protocol="few-shot") for data in ("eurosat", "dtd")
        ]
        assert [(one.settings, one.recipe) for one in plan.configs] == [(one.settings, one.recipe) for one in alone]


def test_what_a_paper_fixes_is_kept_unless_the_command_line_says_otherwise() -> None:
    expected = {"prograd": 4, "promptkd": -1, "coop": 16}
    for method, shots in expected.items():
        words = ("--config", method)
        assert {one.data.shots for one in planned("base-to-new", *words).configs} == {shots}
        assert {one.data.shots for one in planned("base-to-new", *words, shots=[2]).configs} == {2}
        assert {one.data.shots for one in planned("base-to-new", *words, "--data.shots", "3").configs} == {3}
        assert {one.data.shots for one in planned("few-shot", *words, datasets=["dtd"]).configs} == {1, 2, 4, 8, 16}


def test_a_variant_is_a_layer_over_a_book() -> None:
    plan = planned("cross-dataset", "--config", "ivlp+compositions/ivlp_maple", datasets=["imagenet"])
    assert [(one.method, one.settings["text_depth"], one.recipe.epochs) for one in plan.configs] == [("ivlp", 12, 5)]


def test_the_command_line_wins_over_every_table() -> None:
    plan = planned("few-shot", "--config", "clip_lora", "--recipe.epochs", "3")
    assert {one.recipe.epochs for one in plan.configs} == {3} and rows(plan, "recipe.epochs") == [("3",)]


def test_a_configuration_made_in_python_changes_its_data_set_and_shots_alone(tiny: Tiny) -> None:
    config = tiny("clip_lora", epochs=3)
    plan = make_plan([config], [1], "few-shot", "same", datasets=["dtd", "eurosat"], shots=[1, 2])
    assert plan.configs == [config.with_data(name=name, shots=shots) for name in ("dtd", "eurosat") for shots in (1, 2)]


@pytest.fixture
def book(tmp_path: Path, image_folder: Path) -> Callable[..., ConfigSource]:
    """``book("--seed", "2")``: a book for coop with tables of shots and protocols, and a command line over it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        f"""\
method: coop
settings: {{context_init: an emoji of a}}
backbone: {{name: demo, pretrained: null}}
data: {{name: folder, root: {image_folder}, transform: center}}
trainer: {{accelerator: cpu, progress: false}}
output: {tmp_path / "runs"}
recipe: {{epochs: 3, batch_size: 4}}
datasets: {{folder: {{recipe: {{lr: 0.1}}}}}}
shots: {{1: {{recipe: {{epochs: 1}}}}}}
protocols:
  few-shot:
    shots: {{2: {{recipe: {{epochs: 2}}}}}}
  base-to-new: {{recipe: {{batch_size: 2}}}}
"""
    )
    return lambda *words: source("--config", str(folder), *words)


def test_protocol_and_shots_choose_values(book: Callable[..., ConfigSource]) -> None:
    def found(name: str, **values: Any) -> list[tuple[int, int, float]]:
        plan = make_plan([book()], [1], name, "same", **values)
        return [(one.recipe.epochs, one.recipe.batch_size, one.recipe.lr) for one in plan.configs]

    assert found("few-shot", shots=[1, 2, 4]) == [(1, 4, 0.1), (2, 4, 0.1), (3, 4, 0.1)]
    assert found("base-to-new", shots=[1, 2]) == [(1, 2, 0.1), (3, 2, 0.1)]
    assert found("few-shot", default_shots=2) == [(2, 4, 0.1)]
    assert found("base-to-new") == [(3, 2, 0.1)]


def test_what_is_planned_is_what_is_run(book: Callable[..., ConfigSource]) -> None:
    done: list[Run] = []
    plan = make_plan([book()], [2], "few-shot", "same", shots=[1, 2])
    results, _ = run_plan(plan, report=done.append)
    kept = [(one.results["config"]["data"]["shots"], one.results["config"]["recipe"]["epochs"]) for one in done]
    assert kept == [(1, 1), (2, 2)] == [(one.data.shots, one.recipe.epochs) for one in plan.configs]
    assert [one.results["train"]["epochs"] for one in done] == [1, 2]
    assert few_shot([book()], [1, 2], [2])[0] == results


def test_meta_eval_resolves_the_book_too(book: Callable[..., ConfigSource], monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprompt.protocols import running

    asked: list[RunConfig] = []

    def stop(session: Any, **_: Any) -> Any:
        asked.append(session.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_session", stop)
    for shots in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            compare_starts([(book(), Path("somewhere"))], [shots], [1])
    assert [(one.data.shots, one.recipe.epochs, one.data.classes) for one in asked] == [(1, 1, "base"), (2, 3, "base")]


# -- methods that learn from no labelled images -----------------------------------------------------------------------
PER_TARGET = [name for name in list_methods() if get_method_class(name).per_target]


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("protocol", ["cross-dataset", "imagenet-domains"])
@pytest.mark.parametrize("name", PER_TARGET)
def test_a_target_has_its_own_values(name: str, protocol: str) -> None:
    start = ("--init_from", "somewhere") if get_method_class(name).starts_from else ()
    (one,) = planned(protocol, "--config", f"{name}/imagenet", *start).trainings
    assert one.config.data.name == "imagenet" and len(one.targets) == (10 if protocol == "cross-dataset" else 4)
    for target in one.targets:
        data = target.config.data.name
        alone = source("--config", f"{name}/{data}", *start).resolve(protocol=protocol, dataset=data)
        assert target.config == alone.with_data(classes="all")
        assert planned("test-time", "--config", name, *start, datasets=[data]).trainings == [target]


@pytest.mark.usefixtures("without_data")
def test_published_values_of_targets_are_those_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    start = ("--init_from", "somewhere")

    def values(protocol: str, name: str, key: str) -> dict[str, Any]:
        (one,) = planned(protocol, "--config", f"{name}/imagenet", *start).trainings
        return {target.config.data.name: target.config.settings[key] for target in (one, *one.targets)}

    for name in ("tpt", "difftpt"):
        assert values("cross-dataset", name, "augmix") == {data: data != "imagenet" for data in ELEVEN}
        assert not any(values("imagenet-domains", name, "augmix").values())
    assert values("cross-dataset", "promptalign", "lr") == {
        data: 0.04 if data == "imagenet" else 5e-4 for data in ELEVEN
    }
    assert set(values("imagenet-domains", "promptalign", "lr").values()) == {0.04}
    assert values("imagenet-domains", "tda", "crops") == {"imagenet": 0} | dict.fromkeys(
        ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenetv2"), 63
    )
    for name in ("mta", "zero", "promptalign"):
        (one,) = planned("cross-dataset", "--config", f"{name}/imagenet", *start).trainings
        assert {target.config.data.template for target in (one, *one.targets)} == {"a photo of a {}."}
    text = printed(
        ["eval", "--protocol", "cross-dataset", "--config", "tda/imagenet", "--config", "coop/imagenet"], capsys
    )
    assert text[0] == "cross-dataset: 2 trainings with seeds 1, 2, 3" and text[4].startswith("tested on caltech101, ")
    assert text[5] == "run on each target, with the values for it:" and len(text) == 6 + 10
    (cars,) = [line for line in text if line.split()[:2] == ["tda", "stanford_cars"]]
    assert "settings.positive_alpha=1.0  settings.positive_beta=7.0" in cars


# -- text -----------------------------------------------------------------------------------------------------------
def printed(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out.splitlines()


@pytest.mark.usefixtures("without_data")
def test_a_dry_run_prints_a_line_per_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head, columns, *lines = printed(["eval", "--protocol", "few-shot", "--config", "tip_adapter"], capsys)
    assert head == "few-shot: 55 trainings with seeds 1, 2, 3" and columns.split()[:4] == [
        *("method", "data", "classes", "shots")
    ]
    assert len(lines) == 55 and all(line.startswith("tip_adapter  ") for line in lines)
    assert lines[5].split()[:4] == ["tip_adapter", "dtd", "all", "1"] and "settings.search_alpha=13.0" in lines[5]
    assert len({line.split(maxsplit=4)[4] for line in lines}) == 11
    assert not list(tmp_path.iterdir())

    head, _, *lines = printed(
        ["base-to-new", "--config", "prograd", "--datasets", "dtd,eurosat", "--seeds", "4"], capsys
    )
    assert head == "base-to-new: 2 trainings with seed 4"
    assert [line.split()[:4] for line in lines] == [["prograd", name, "base", "4"] for name in ("dtd", "eurosat")]

    words = ["eval", "--protocol", "cross-dataset", "--config", "coop/imagenet", "--config", "kgcoop/imagenet"]
    head, _, first, second, tested = printed(words, capsys)
    assert head == "cross-dataset: 2 trainings with seeds 1, 2, 3"
    assert first.split()[:4] == ["coop", "imagenet", "all", "16"] and "recipe.epochs=50" in first
    assert second.startswith("kgcoop") and tested == "tested on " + ", ".join(n for n in ELEVEN if n != "imagenet")


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("protocol", ["few-shot", "base-to-new", "leave-one-out", "cross-dataset"])
@pytest.mark.parametrize("name", ["clip_lora", "tda", "zeroshot"])
def test_values_of_a_plan_are_those_of_its_runs(name: str, protocol: str) -> None:
    words = ["--config", name, "--data.classes", "base", "--data.source", "[a]", "--data.target", "[b]"]
    datasets = {} if protocol == "cross-dataset" else {"datasets": ["pacs" if protocol == "leave-one-out" else "dtd"]}
    trainings = planned(protocol, *words, **datasets).trainings
    for one in (*trainings, *(target for training in trainings for target in training.targets)):
        fields = {key: value for key, value in one.values.items() if key.startswith("data.")}
        assert fields == {key: getattr(one.config.data, key.removeprefix("data.")) for key in fields}


@pytest.mark.usefixtures("without_data")
def test_values_of_a_plan_are_short_and_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["eval", "--protocol", "few-shot", "--config", "mocoop", "--shots", "1"], capsys)
    assert len(lines) == 2 + 11 and max(map(len, lines)) < 350 and any("..." in line for line in lines)


def test_domains_without_data_are_the_card_s(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLPROMPT_DATA", str(tmp_path))
    words = ["domains", "--protocol", "single-source", "--config", "coop", "--data.name", "pacs"]
    head, _, *lines = printed(words, capsys)
    assert head == "single-source: 4 trainings with seeds 1, 2, 3"
    assert [line.split()[4] for line in lines] == ["art_painting", "cartoon", "photo", "sketch"]
    assert main(words) == 2 and "pacs" in capsys.readouterr().err
    with pytest.raises(DataError):
        make_plan([source("--config", "coop", "--data.name", "pacs")], [1], "x", "domains", domains="leave-one-out")
    with pytest.raises(ConfigError, match="dtd has no domains"):
        card_rounds("dtd", "leave-one-out")


def test_domains_with_data_have_corrupted_versions(tiny: Tiny, toy_sets: Path) -> None:
    config = tiny("coop").with_data(name="toy-styles", root=str(toy_sets))
    plan = make_plan([config], [1], "leave-one-out", "domains", domains="leave-one-out", dry=True)
    assert [one.data.target for one in plan.configs] == [
        ("c", "c+noise"), ("a", "a+blur", "a+noise"), ("b", "b+noise")
    ]  # fmt: skip
    without = make_plan(
        [replace(config).with_data(root=str(toy_sets / "no"))], [1], "x", "domains", domains="leave-one-out", dry=True
    )
    assert [one.data.target for one in without.configs] == [("c",), ("a",), ("b",)]


def test_a_plan_is_refused_as_a_whole() -> None:
    usual: dict[str, Any] = {"seeds": [1], "name": "x", "part": "datasets"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seeds": []}, "at least one configuration and one seed"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"datasets": ["dmo"]}, "'dmo' is no data set"),
        ({"targets": ["imagenet"]}, "'imagenet' is the source of coop"),
    ]
    for values, message in cases:
        with pytest.raises(ConfigError, match=message):
            make_plan([source("--config", "coop/imagenet")], **{**usual, **values})
