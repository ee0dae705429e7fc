"""Runs with texts of classes: their identity, their zero-shot row, and what configuration files say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlprompt import load_head
from vlprompt.cli.parse import parse_run
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.config.run import RunConfig
from vlprompt.datasets import find_card
from vlprompt.errors import ConfigError
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.cross import cross_dataset
from vlprompt.protocols.fewshot import few_shot
from vlprompt.protocols.plan import make_plan
from vlprompt.runs.folder import config_sha256
from vlprompt.runs.run import run
from vlprompt.runs.session import Session

Tiny = Callable[..., RunConfig]
CACHE = {"search": False, "views": 0, "alpha": 0.0}


@pytest.fixture
def sentences(image_folder: Path, tmp_path: Path) -> Path:
    """A file with a sentence of every class of the folder of images."""
    names = sorted(place.name for place in (image_folder / "train").iterdir())
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps({name: [f"an emoji with a {name}", "a small picture of a {}"] for name in names}))
    return path


# -- the zero-shot row ----------------------------------------------------------------------------------------------
def test_the_zero_shot_row_is_that_of_the_methods_templates_and_names_them(tiny: Tiny) -> None:
    """A cache without weight is its own zero-shot row."""
    done = run(tiny("tip_adapter", {**CACHE, "templates": "ensemble:selected"}))
    assert done.results["zeroshot"] == done.results["results"]
    facts = done.results["zeroshot_classifier"]
    assert facts["name"] == "ensemble:selected" and len(facts["templates"]) == 7 and not facts["published"]
    assert "zero-shot (ensemble:selected)" in done.table()
    plain = run(tiny("tip_adapter", CACHE))
    assert plain.results["zeroshot_classifier"]["name"] == find_card("folder").template
    assert plain.results["zeroshot"] != done.results["zeroshot"]
    assert "zero-shot " in plain.table() and "zero-shot (" not in plain.table()


def test_methods_with_the_same_classifier_share_its_row(tiny: Tiny) -> None:
    """Tables have a zero-shot row for each classifier, in front of the methods that have it."""
    seven = {**CACHE, "templates": "ensemble:selected"}
    configs = [tiny("tip_adapter", seven), tiny("coop"), tiny("zeroshot", {"templates": "ensemble:selected"})]
    results, table = few_shot(configs, (1,), (1,))
    names = [line.split("│")[2].strip() for line in table.splitlines() if line.startswith("│")]
    assert names == ["zero-shot (ensemble:selected)", "tip_adapter", "zero-shot", "coop"]
    cells = {cell["method"]: cell for cell in results["cells"]}
    assert cells["tip_adapter"]["rows"]["zero-shot"] == cells["zeroshot"]["rows"]["zeroshot"]
    assert cells["coop"]["rows"]["zero-shot"] != cells["tip_adapter"]["rows"]["zero-shot"]


def test_averages_name_the_classifiers_of_their_data_sets(tiny: Tiny, toy_sets: Path) -> None:
    config = replace(
        tiny("zeroshot", {"templates": "ensemble:coop"}), data=replace(tiny().data, name="demo", root=None)
    )
    config = config.with_data(root=str(toy_sets))
    _, table = base_to_new([config], (1,), datasets=["toy-plain", "toy-styles"])
    assert table.count("zero-shot (ensemble:coop)") == 4  # two data sets, their average, and its harmonic mean


# -- identity -------------------------------------------------------------------------------------------------------
def test_a_run_is_identified_by_the_content_of_its_files(tiny: Tiny, sentences: Path, tmp_path: Path) -> None:
    config = tiny("zeroshot", {"templates": [f"file:{sentences}"]})
    first = run(config)
    facts = first.results["zeroshot_classifier"]
    assert facts["name"] == "file:sentences.json" and facts["templates"] == ["sentences of 5 classes"]
    moved = tmp_path / "elsewhere.json"
    moved.write_text(json.dumps(json.loads(sentences.read_text()), indent=1))
    assert run(tiny("zeroshot", {"templates": [f"file:{moved}"]})).folder == first.folder
    content = json.loads(sentences.read_text())
    sentences.write_text(json.dumps({name: texts[:1] for name, texts in content.items()}))
    changed = run(config)
    assert changed.folder != first.folder and not changed.reused
    sentences.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        config_sha256(config)
    head = load_head(first.head_dir)  # a head keeps the sentences themselves
    assert head.method.settings.templates == ({name: tuple(texts) for name, texts in content.items()},)


def test_texts_of_the_objectives_identify_a_run_too(tiny: Tiny, sentences: Path) -> None:
    config = tiny("coop", objectives={"knowledge": {"templates": f"file:{sentences}"}})
    before = config_sha256(config)
    sentences.write_text(json.dumps({**json.loads(sentences.read_text()), "more": ["a text"]}))
    assert config_sha256(config) != before


def test_a_run_whose_ensemble_has_changed_is_not_continued(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("zeroshot", {"templates": "ensemble:selected"})
    run(config)
    monkeypatch.setitem(ENSEMBLES, "selected", ("a {}.",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="started from another templates"):
        run(config)


# -- files and data sets --------------------------------------------------------------------------------------------
def test_classes_that_the_data_set_does_not_have_are_reported(tiny: Tiny, sentences: Path) -> None:
    content = json.loads(sentences.read_text())
    name = next(iter(content))
    sentences.write_text(json.dumps({**content, f"{name}s": ["a text"]}))
    session = Session(tiny("kgcoop", {"knowledge": {"templates": f"file:{sentences}"}}))
    with pytest.warns(UserWarning, match=rf"1 classes are not used.*\n.*'{name}s' \(nearest: '{name}'\)"):
        assert session.method.name == "kgcoop"


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.json").write_text('{"cat": ["a pet"]}')
    (tmp_path / "mine.yaml").write_text(
        "method: tip_adapter\nsettings: {templates: ['ensemble:clip', 'file:texts/mine.json']}\n"
    )
    monkeypatch.chdir(tmp_path)
    expected = ["ensemble:clip", "file:texts/mine.json"]
    assert parse_run(["--config", "mine.yaml"]).settings["templates"] == expected
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    found = parse_run(["--config", "../mine.yaml"]).settings["templates"]
    assert found == ["ensemble:clip", f"file:{Path('../texts/mine.json')}"] and Path(found[1][5:]).is_file()
    monkeypatch.chdir(tmp_path)
    words = ["--method", "kgcoop", "--objectives.knowledge.templates", "file:texts/mine.json"]
    assert parse_run(words).settings["knowledge"]["templates"] == ["file:texts/mine.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ensemble:clip", ["ensemble:clip"]),
        ("[ensemble:selected, ensemble:single]", ["ensemble:selected", "ensemble:single"]),
        ("[['a {}.', 2], {cat: [a pet]}]", [["a {}.", 2.0], {"cat": ["a pet"]}]),
        ("{cat: [a pet, [a friend, 0.5]]}", [{"cat": ["a pet", ["a friend", 0.5]]}]),
    ],
)
def test_the_command_line_and_files_take_all_forms(text: str, expected: list[Any], tmp_path: Path) -> None:
    assert parse_run(["--method", "zeroshot", "--settings.templates", text]).settings["templates"] == expected
    (tmp_path / "mine.yaml").write_text(f"method: zeroshot\nsettings:\n  templates: {text}\n")
    assert parse_run(["--config", str(tmp_path / "mine.yaml")]).settings["templates"] == expected


def test_a_plan_shows_references_and_refuses_unknown_ones(tiny: Tiny) -> None:
    (training,) = make_plan([tiny("tip_adapter")], (1,), "few-shot", "same").trainings
    assert training.values["settings.templates"] == (find_card("folder").template,)
    with pytest.raises(ConfigError, match="there is no ensemble 'clip' of folder; accepted: coop, "):
        make_plan([tiny("tip_adapter", {"templates": "ensemble:clip"})], (1,), "few-shot", "same")


def test_a_protocol_checks_its_texts_before_anything_is_trained(tiny: Tiny, sentences: Path, toy_sets: Path) -> None:
    """A file without the classes of the second data set is reported before the first one is run."""
    config = tiny("zeroshot", {"templates": f"file:{sentences}"})
    place = Path(config.output)
    with pytest.raises(ConfigError, match=r"(?s)nothing was run, because of the texts for demo:.*have no sentences"):
        few_shot([config.with_data(root=None)], (1,), (1,), datasets=["demo"])
    with pytest.raises(ConfigError, match=r"(?s)nothing was run, because of the texts for demo:.*have no sentences"):
        cross_dataset([config], ["demo"], (1,))
    assert not place.exists()


def test_an_ensemble_is_that_of_the_data_set_that_is_tested(tiny: Tiny) -> None:
    """References follow the target of a transfer, as unset templates do."""
    session = Session(tiny("zeroshot", {"templates": "ensemble:coop"}))
    target = replace(session.drawn, template="a drawing of a {}.")
    moved = session.moved(session.method, target)
    assert session.method.settings.templates[-1] == find_card("folder").template
    assert moved.settings.templates[-1] == "a drawing of a {}." and len(moved.settings.templates) == 8
