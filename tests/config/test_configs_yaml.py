"""vlprompt's own configurations: every method on every data set, complete, consistent, and written once."""

import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlprompt.cli.parse import check_config, parse_run, read_command_line, source_of
from vlprompt.config.book import TABLES, list_books
from vlprompt.config.meta import MetaRunConfig
from vlprompt.config.source import ConfigSource
from vlprompt.datasets import list_datasets
from vlprompt.datasets.catalogue import list_groups
from vlprompt.methods import get_method_class, list_methods
from vlprompt.methods.fitted import FittedMethod
from vlprompt.protocols.protocol_files import find_protocol, list_protocols
from vlprompt.runs.effect import without_idle
from vlprompt.runs.meta_run import meta_folder
from vlprompt.runs.session import completed

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = list_methods()
FEW_SHOT = tuple(list_groups()["fewshot11"])
FILES = sorted(CONFIGS.rglob("*.yaml"))
META = [path for path in FILES if path.parent.name == "gram"]
BOOKS = [path for path in FILES if (path.parent / "base.yaml").is_file() and path.parent != CONFIGS]
COMPOSITIONS = [path for path in FILES if path.parent.name == "compositions"]


def named(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def header(path: Path) -> list[str]:
    """Return the comment lines that open the file, without their marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def command(path: Path, label: str) -> list[str]:
    """Return the words of the one command that the header shows behind ``label``."""
    commands = [line.removeprefix(label).strip() for line in header(path) if line.startswith(label)]
    assert len(commands) == 1, f"{path}: {len(commands)} lines begin with {label!r}"
    return shlex.split(commands[0])


@functools.cache
def book(method: str) -> ConfigSource:
    return source_of(read_command_line(["--config", method]))


# -- the books --------------------------------------------------------------------------------------------------------
def test_every_method_has_a_book_and_every_book_is_a_methods() -> None:
    assert list_books() == sorted(METHODS)
    assert {name: load(CONFIGS / name / "base.yaml")["method"] for name in METHODS} == {name: name for name in METHODS}


def test_every_file_is_a_book_a_data_set_of_one_a_meta_training_or_a_composition() -> None:
    assert [path for path in FILES if path not in (CONFIGS / "base.yaml", *BOOKS, *META, *COMPOSITIONS)] == []
    assert [path for path in BOOKS if path.stem not in ("base", *list_datasets())] == []
    assert len(FILES) <= 80


@pytest.mark.parametrize("method", METHODS)
def test_every_data_set_and_protocol_resolves(method: str) -> None:
    """All values have an effect. Those that differ in the names of data set and protocol alone are validated once."""
    points: list[dict[str, Any]] = [{"dataset": name} for name in list_datasets()]
    for protocol in list_protocols():
        for shots in find_protocol(protocol).train.shots or (None,):
            points += [{"protocol": protocol, "dataset": name, "shots": shots} for name in FEW_SHOT]
    validated = set()
    for point in points:
        values = {key: given.value for key, given in book(method).given(**point).items()}
        assert (values["method"], values.pop("data.name")) == (method, point["dataset"])
        assert point.get("shots") in (None, values.pop("data.shots", None))
        if str(sorted(values.items())) not in validated:
            config = book(method).resolve(**point)
            assert config.data.name == point["dataset"] and without_idle(completed(config))[1] == []
            validated.add(str(sorted(values.items())))
    assert book(method).problems() == []


@pytest.mark.parametrize("method", METHODS)
def test_a_book_does_not_repeat_the_methods_own_values(method: str) -> None:
    """Top-level values of a book differ from the values without the book."""
    values, defaults = (
        flat(load(CONFIGS / method / "base.yaml")),
        flat(dataclasses.asdict(parse_run(["--method", method]))),
    )
    assert {key for key, value in values.items() if key != "method" and defaults.get(key) == value} == set()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key, tables left out."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in TABLES:
            leaves |= flat(value, f"{prefix}{key}.")
        elif key not in TABLES:
            leaves[prefix + key] = value
    return leaves


@pytest.mark.parametrize("path", [*BOOKS, *COMPOSITIONS], ids=named)
def test_the_header_names_the_paper_and_a_command_that_works(path: Path) -> None:
    words = command(path, "Run:")
    assert words[:3] == ["vlprompt", "train", "--config"]
    config = parse_run(words[2:])
    assert without_idle(completed(config))[1] == []
    if path.stem == "base":
        assert re.search(r"\(arXiv \d{4}\.\d{5}[;,)]", " ".join(header(path)))
        assert config.method == path.parent.name and config.data.name == "dtd"
    elif path in BOOKS:
        assert (config.method, config.data.name) == (path.parent.name, path.stem)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_text_is_plain_and_fits_the_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii() and "\t" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert max(map(len, text.splitlines())) <= 120 and header(path)


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_runs_from_the_package_alone(method: str) -> None:
    for name in list_datasets("demo*"):
        config = book(method).resolve(dataset=name)
        assert config.backbone.name == "demo" and config.data.root is None and config.data.template is None
        assert config.data.classes == ("all" if issubclass(get_method_class(method), FittedMethod) else "base")


# -- published values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [*FEW_SHOT, "folder", "demo", "cifar10"])
def test_mocoop_groups_cover_the_templates(data: str) -> None:
    settings = book("mocoop").resolve(dataset=data).settings
    templates, groups = settings["templates"], settings["groups"]
    assert sum(groups) == len(templates)
    assert len(groups) >= 2, "two experts are chosen per image"
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{}") == 1 and template.endswith(".") and "  " not in template


def test_what_a_paper_fixes_is_kept_where_a_protocol_only_proposes_shots() -> None:
    for method, shots in (("prograd", 4), ("promptkd", -1), ("coop", 16), ("mocoop", 16)):
        assert book(method).resolve(protocol="base-to-new", dataset="dtd", default_shots=16).data.shots == shots
        assert book(method).resolve(protocol="base-to-new", dataset="dtd", shots=2).data.shots == 2


def test_maple_has_the_recipe_of_its_cross_data_set_runs_there_alone() -> None:
    for protocol, values in ((None, (9, 5, 0.0035)), ("cross-dataset", (3, 2, 0.0026)), ("few-shot", (9, 5, 0.0035))):
        config = book("maple").resolve(protocol=protocol, dataset="imagenet")
        assert (config.settings["depth"], config.recipe.epochs, config.recipe.lr) == values
    assert book("maple").resolve(protocol="cross-dataset", dataset="demo").recipe.epochs == 5


def test_every_data_set_of_a_protocol_has_its_own_values() -> None:
    """Tip-Adapter's grid is another one for each data set, which the plan of the protocol shows."""
    rows = [book("tip_adapter").differences(protocol="few-shot", dataset=name, shots=1) for name in FEW_SHOT]
    assert len({str(row) for row in rows}) == len(FEW_SHOT)
    assert all({"settings.alpha", "settings.search_alpha", "settings.search_beta"} <= set(row) for row in rows)


# -- meta-training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", META, ids=named)
def test_meta_training_goes_with_the_training_it_names(path: Path) -> None:
    words = command(path, "Run:")
    assert words == ["python", "tools/meta_train.py", "--config", f"configs/{named(path)}.yaml"]
    config, problems = check_config(read_command_line(command(path, "Override:")[2:]), MetaRunConfig)
    assert config is not None and problems == []
    config, problems = check_config(read_command_line(words[2:]), MetaRunConfig)
    assert config is not None and problems == [] and path.stem.removesuffix("-demo") == config.method
    then = command(path, "Then:")
    other = parse_run(then[2:])
    assert (other.method, other.backbone) == (config.method, config.backbone)
    assert other.init_from == f"gram:{meta_folder(config)}"
    # What is learned fits only prompts of the same shapes.
    assert other.settings == config.settings
