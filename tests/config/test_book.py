"""The recipe book: which entries count for a run, in which order, and what is wrong with a file in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.parse import parse_run, read_command_line, source_of
from vlprompt.config.book import Book, Known, Selectors, find_book
from vlprompt.config.run import RunConfig
from vlprompt.config.source import ConfigSource, as_source
from vlprompt.errors import ConfigError

KNOWN = Known(("imagenet", "imagenet_r", "dtd", "demo", "demo-2"), ("few-shot", "cross-dataset"))
WHOLE = """\
method: coop
settings: {context_init: base}
recipe: {epochs: 10}
protocols:
  few-shot: {settings: {context_init: protocol}}
backbones:
  RN*: {settings: {context_init: backbone}}
datasets:
  dtd: {settings: {context_init: data set}}
  imagenet*: {settings: {context_init: wildcard}}
  imagenet:
    settings: {context_init: exact}
    protocols:
      few-shot: {settings: {context_init: both}}
    shots: {1: {recipe: {epochs: 1}}}
shots:
  any: {recipe: {epochs: 5}}
  2, 4: {recipe: {epochs: 2}}
"""
Make = Callable[..., Book]


@pytest.fixture
def book(tmp_path: Path) -> Make:
    """Make a book of files: ``base`` and those of data sets."""

    def make(**files: str) -> Book:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return Book(tmp_path, KNOWN)

    return make


def values(book: Book, **selectors: Any) -> dict[str, Any]:
    return {key: given.value for key, given in book.resolve(Selectors(**selectors)).items()}


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({}, "base"),
        ({"protocol": "few-shot"}, "protocol"),
        ({"protocol": "few-shot", "backbone": "RN50"}, "backbone"),
        ({"protocol": "few-shot", "backbone": "RN50", "dataset": "dtd"}, "data set"),
        ({"dataset": "imagenet_r"}, "wildcard"),
        ({"dataset": "imagenet", "backbone": "RN50"}, "exact"),
        ({"dataset": "imagenet", "protocol": "few-shot", "backbone": "RN50"}, "both"),
        ({"dataset": "imagenet", "protocol": "cross-dataset"}, "exact"),
    ],
)
def test_the_more_specific_entry_wins(book: Make, selectors: dict[str, Any], expected: str) -> None:
    assert values(book(base=WHOLE), **selectors)["settings.context_init"] == expected


def test_epochs_and_steps_override_each_other(book: Make) -> None:
    """The most specific entry that sets one of two exclusive keys counts; one entry cannot set both."""
    text = """\
recipe: {epochs: 10, warmup_steps: 3}
datasets:
  dtd: {recipe: {steps: 40}, shots: {2: {recipe: {epochs: 2, warmup_epochs: 1}}}}
  imagenet: {recipe: {epochs: 5, steps: 6}}
shots:
  1, 2: {recipe: {steps: 100}}
  4: {recipe: {steps: null}}
"""
    whole = book(base=text)
    chosen = {
        (dataset, shots): {
            key.removeprefix("recipe."): value for key, value in values(whole, dataset=dataset, shots=shots).items()
        }
        for dataset in ("food101", "dtd", "imagenet")
        for shots in (1, 2, 4)
    }
    assert chosen["food101", 1] == {"steps": 100, "warmup_steps": 3}
    assert chosen["food101", 4] == {"epochs": 10, "steps": None, "warmup_steps": 3}
    assert chosen["dtd", 1] == {"steps": 100, "warmup_steps": 3}
    assert chosen["dtd", 2] == {"epochs": 2, "warmup_epochs": 1}
    assert chosen["imagenet", 4] == {"epochs": 5, "steps": None, "warmup_steps": 3}
    assert values(whole, dataset="imagenet")["recipe.epochs"] == 5
    assert values(whole, dataset="imagenet")["recipe.steps"] == 6, "refused when the configuration is built"


@pytest.mark.parametrize(
    ("dataset", "shots", "epochs"), [("dtd", 16, 5), ("dtd", 4, 2), ("imagenet", 1, 1), ("dtd", -1, 5)]
)
def test_shots_win_over_data_sets_and_any_means_every_number(book: Make, dataset: str, shots: int, epochs: int) -> None:
    assert values(book(base=WHOLE), dataset=dataset, shots=shots)["recipe.epochs"] == epochs
    assert values(book(base=WHOLE), dataset=dataset)["recipe.epochs"] == 10


def test_entries_merge_key_by_key_and_lists_are_replaced(book: Make) -> None:
    whole = book(
        base="method: coop\nobjectives: {knowledge: {weight: 8, templates: ['a {}.', 'b {}.']}}\nrecipe: {lr: 1}\n"
        "datasets: {dtd: {objectives: {knowledge: {templates: ['c {}.']}}, recipe: {epochs: 3}}}\n"
    )
    assert values(whole, dataset="dtd") == {
        "method": "coop",
        "objectives.knowledge.weight": 8,
        "objectives.knowledge.templates": ["c {}."],
        "recipe.lr": 1,
        "recipe.epochs": 3,
    }


def test_every_value_knows_its_file_and_line(book: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = book(base=WHOLE, dtd="# a data set's own file\nrecipe: {lr: 0.5}\nshots: {1: {recipe: {lr: 0.1}}}\n")
    given = whole.resolve(Selectors(dataset="dtd", shots=2))
    assert {key: one.source for key, one in given.items()} == {
        "method": "base.yaml, line 1",
        "settings.context_init": "base.yaml, line 9",
        "recipe.epochs": "base.yaml, line 18",
        "recipe.lr": "dtd.yaml, line 2",
    }
    assert values(whole, dataset="dtd", shots=1)["recipe.lr"] == 0.1
    assert "recipe.lr" not in values(whole, dataset="imagenet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("datasets: {dtt: {}}", "line 1: datasets: there is no data set 'dtt'. Did you mean 'dtd'?"),
        ("datasets: {'dtd, imagnet': {}}", "there is no data set 'imagnet'. Did you mean 'imagenet' or 'imagenet_r'?"),
        ("datasets: {emoji*: {}}", "there is no data set 'emoji*'"),
        ("protocols: {fewshot: {}}", "protocols: there is no protocol 'fewshot'. Did you mean 'few-shot'?"),
        ("shots: {four: {}}", "shots: 'four' is no number of shots; accepted: 1 or more images per class, -1"),
        ("shots: {0: {}}", "'0' is no number of shots"),
        ("shots: [1, 2]", "shots is a table; its keys are names"),
        ("datasets: {dtd: 4}", "datasets: 'dtd' holds no sections; write dtd: {recipe: {...}}"),
        ("datasets: {dtd: {}, dtd: {}}", "datasets: 'dtd' is given twice"),
        ("datasets: {dtd: {datasets: {demo: {}}}}", "datasets is inside an entry that is already one of datasets"),
        (
            "datasets: {dtd: {data: {name: demo}}}",
            "data.name chooses entries of the book and cannot be set",
        ),
        ("shots: {1: {data: {shots: 2}}}", "data.shots chooses entries of the book and cannot be set inside shots"),
        (
            "protocols: {few-shot: {method: coop}}",
            "method chooses entries of the book and cannot be set",
        ),
        ("datasets: {dtd: {recipe.lr: 1}}", "dotted keys are for the command line"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(book: Make, text: str, expected: str) -> None:
    whole = book(base=f"{text}\n")
    whole.resolve(Selectors(dataset="dtd"))
    assert len(whole.problems) == 1 and expected in whole.problems[0] and "base.yaml, line 1" in whole.problems[0]


def test_two_entries_as_specific_must_agree(book: Make) -> None:
    whole = book(base="datasets:\n  dtd: {recipe: {epochs: 1, lr: 1}}\n  dtd, demo: {recipe: {epochs: 2, lr: 1}}\n")
    whole.resolve(Selectors(dataset="demo"))
    assert whole.problems == []
    whole.resolve(Selectors(dataset="dtd"))
    whole.resolve(Selectors(dataset="dtd"))
    (problem,) = whole.problems
    assert "base.yaml, line 3: recipe.epochs is 2, and 1 in" in problem and "as specific" in problem


# -- names ----------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2] / "configs"


def canonical(name: str) -> str | None:
    return {"demo": "demo", "dtd": "dtd", "DTD": "dtd", "imagenet": "imagenet"}.get(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coop", ("coop", None)),
        ("coop/", ("coop", None)),
        ("configs/coop", ("coop", None)),
        ("./configs/coop/base.yaml", ("coop", None)),
        ("coop/dtd", ("coop", "dtd")),
        ("coop/DTD", ("coop", "dtd")),
        ("configs/coop/dtd.yaml", ("coop", "dtd")),
        ("configs/mocoop/imagenet.yaml", ("mocoop", "imagenet")),
        (str(ROOT / "mocoop" / "imagenet.yaml"), ("mocoop", "imagenet")),
        (str(ROOT / "coop" / "dtd"), ("coop", "dtd")),
        ("coop/dmo", None),
        ("gram/coop", None),
        ("configs", None),
        ("base", None),
        ("../coop/dtd", None),
        ("x" * 5000, None),
    ],
)
def test_names_of_books(
    name: str, expected: tuple[str, str | None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    book = find_book(name, canonical)
    assert book == expected if expected is None or book is None else (book[0].name, book[1]) == expected
    assert (book is None) == (expected is None)


def test_a_file_in_the_current_folder_goes_before_a_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coop").mkdir()
    (tmp_path / "coop" / "demo.yaml").write_text("method: coop\n")
    (tmp_path / "kgcoop.yaml").write_text("method: kgcoop\n")
    assert find_book("coop/demo", canonical) is None and find_book("kgcoop", canonical) is None
    (tmp_path / "coop" / "base.yaml").write_text("method: coop\n")
    assert find_book("coop/demo", canonical) == (Path("coop"), "demo")


# -- layers ---------------------------------------------------------------------------------------------------------
def source(*words: str) -> ConfigSource:
    return source_of(read_command_line(words))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a book of its own, ``mine``, and a file to put over it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base.yaml").write_text(
        "method: coop\nrecipe: {epochs: 10}\ndata: {shots: 2, classes: base}\n"
        "datasets: {dtd: {recipe: {epochs: 20}}, food101: {backbone: {name: RN50}}, eurosat: {data: {shots: 4}}}\n"
        "backbones: {RN50: {recipe: {lr: 0.5}}}\n"
        "shots: {4: {recipe: {warmup_epochs: 0}}}\n"
        "protocols: {few-shot: {recipe: {epochs: 30}}}\n"
    )
    (tmp_path / "over.yaml").write_text("recipe: {batch_size: 8}\ndata: {name: dtd}\n")
    return tmp_path


def test_the_data_set_is_that_of_the_command_line_then_later_files_then_the_name(own: Path) -> None:
    for words, name, epochs in (
        (("--config", "mine"), "demo", 10),
        (("--config", "mine/dtd"), "dtd", 20),
        (("--config", "mine/eurosat", "--data.name", "DTD"), "dtd", 20),
        (("--config", "mine/eurosat", "--config", "over.yaml"), "dtd", 20),
        (("--config", "over.yaml", "--config", "mine/eurosat"), "eurosat", 10),
        (("--config", "over.yaml", "--config", "mine"), "dtd", 20),
        (("--config", "mine", "--data.name", "dtd", "--recipe.epochs", "7"), "dtd", 7),
    ):
        config = parse_run(words)
        assert (config.data.name, config.recipe.epochs) == (name, epochs), words
        assert config.recipe.batch_size == (8 if "over.yaml" in words else 32)


def test_backbone_and_shots_choose_with_the_values_of_the_data_set(own: Path) -> None:
    assert parse_run(["--config", "mine/food101"]).recipe.lr == 0.5
    assert parse_run(["--config", "mine/dtd"]).recipe.lr == RunConfig().recipe.lr
    assert parse_run(["--config", "mine/dtd", "--backbone.name", "RN50"]).recipe.lr == 0.5
    assert parse_run(["--config", "mine/dtd"]).recipe.warmup_epochs == 1
    assert parse_run(["--config", "mine/dtd", "--data.shots", "4"]).recipe.warmup_epochs == 0
    assert parse_run(["--config", "mine/eurosat"]).recipe.warmup_epochs == 0


def test_a_source_resolves_for_each_run_of_a_protocol(own: Path) -> None:
    mine = source("--config", "mine", "--recipe.batch_size", "4")
    runs = [
        mine.resolve(protocol="few-shot", dataset=name, shots=shots) for name in ("dtd", "eurosat") for shots in (1, 4)
    ]
    assert [(run.data.name, run.data.shots, run.recipe.epochs, run.recipe.warmup_epochs) for run in runs] == [
        ("dtd", 1, 20, 1),
        ("dtd", 4, 20, 0),
        ("eurosat", 1, 30, 1),
        ("eurosat", 4, 30, 0),
    ]
    assert mine.differences(protocol="few-shot", dataset="eurosat", shots=4) == {
        "recipe.epochs": 30,
        "recipe.warmup_epochs": 0,
        "recipe.batch_size": 4,
    }
    assert source("--config", "mine").differences() == {}


def test_differences_have_the_keys_that_the_user_wrote(own: Path) -> None:
    kgcoop = source("--config", "kgcoop", "--objectives.knowledge.weight", "4")
    assert kgcoop.differences(dataset="dtd")["objectives.knowledge.weight"] == "4"
    promptsrc = source("--config", "promptsrc", "--settings.aggregation", "null").differences(dataset="demo")
    assert promptsrc["settings.aggregation"] is None and "settings.aggregation.mean" not in promptsrc


def test_shots_of_a_protocol_yield_to_those_that_the_configuration_names(own: Path) -> None:
    (own / "none.yaml").write_text("method: coop\n")
    for words, shots in (
        (("--config", "mine"), 2),
        (("--config", "mine", "--data.shots", "8"), 8),
        (("--config", "mine/eurosat"), 4),
        (("--config", "none.yaml"), 16),
    ):
        assert source(*words).resolve(default_shots=16).data.shots == shots
        assert source(*words).resolve(shots=1, default_shots=16).data.shots == 1
    assert source("--config", "mine", "--data.shots", "4").resolve(dataset="dtd").recipe.warmup_epochs == 0


def test_a_configuration_made_in_python_is_a_source(own: Path) -> None:
    config = RunConfig(method="coop").with_data(shots=3)
    fixed = as_source(config)
    assert fixed.resolve() == config and fixed.differences(dataset="dtd") == {}
    assert fixed.resolve(protocol="few-shot", dataset="dtd", shots=1) == config.with_data(name="dtd", shots=1)
    assert as_source(fixed) is fixed


def test_two_books_are_refused_and_problems_of_a_book_are_reported(own: Path) -> None:
    with pytest.raises(ConfigError, match="books mine and .*kgcoop; accepted: one, and files of yours"):
        parse_run(["--config", "mine", "--config", "kgcoop"])
    (own / "mine" / "base.yaml").write_text("method: coop\nsettings: {contxt: 4}\ndatasets: {dtt: {}}\n")
    with pytest.raises(ConfigError) as caught:
        parse_run(["--config", "mine"])
    assert "mine/base.yaml, line 2" in str(caught.value) and "Did you mean 'settings.context_" in str(caught.value)
    assert "mine/base.yaml, line 3: datasets: there is no data set 'dtt'. Did you mean 'dtd'?" in str(caught.value)
