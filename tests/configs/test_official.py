"""Every resolved run of a protocol has the values of the official code, which official.yaml lists with their sources.

A block of ``methods`` is a ``--config``: a method, with a layer after ``+`` for a variant. It holds

- ``publishes``: the protocols of the official code, each with its ``datasets``, and ``shots`` and ``backbones`` where
  they are several (a backbone is set by ``--backbone.name``, on top of the runs with the book's own); or ``none``, the
  reason why there is no official code to compare with;
- ``entries``: values by dotted key, for all published runs or for those of the given ``protocols``, ``datasets``,
  ``shots`` and ``backbones`` (the book's own backbone is ``null``). A later entry overrides an earlier one, and the
  entries of ``shared`` come first.

A source is ``REPOSITORY's FILE:LINES``, with the repository and its commit in ``repositories``, or an author's words in
``REPOSITORY's issues/NUMBER``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlprompt.cli.parse import read_command_line, source_of
from vlprompt.config.keys import as_plain
from vlprompt.config.run import RecipeConfig
from vlprompt.config.yaml import yaml_node, yaml_value
from vlprompt.datasets import find_card
from vlprompt.methods import get_method_class, list_methods
from vlprompt.methods.registry import resolved_templates
from vlprompt.protocols.groups import dataset_names
from vlprompt.protocols.plan import Overrides, Training, plan_protocol
from vlprompt.protocols.protocol_files import find_protocol, list_protocols

FILE = Path(__file__).with_name("official.yaml")
LINES = r"[0-9]+(-[0-9]+)?(, [0-9]+(-[0-9]+)?)*"
SOURCE = re.compile(rf"(?P<repository>[\w.-]+)'s ([\w./+-]+:{LINES}|issues/[0-9]+)")
FEW_SHOT = dataset_names(["group:fewshot11"])
FILTERS = ("protocols", "datasets", "shots", "backbones")
#: Keys that every run of a trained method has pinned; of alternatives, one.
RECIPE = ("lr", "batch_size", "optimizer", "weight_decay", "epochs|steps", "warmup_epochs|warmup_steps")


def read() -> dict[str, Any]:
    loader, node = yaml_node(FILE.read_text(encoding="utf-8"))
    assert node is not None
    content = yaml_value(loader, node)
    assert isinstance(content, dict) and set(content) == {"repositories", "shared", "methods"}
    return content


OFFICIAL = read()


@dataclass(frozen=True)
class Group:
    """The published runs of a block with one protocol and backbone (None: that of the book)."""

    block: str
    protocol: str
    backbone: str | None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.block, self.protocol, self.backbone)))

    @property
    def published(self) -> Mapping[str, Any]:
        return published(self.block)[self.protocol]


def listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def published(block: str) -> dict[str, Mapping[str, Any]]:
    table = OFFICIAL["methods"][block].get("publishes", {})
    return {protocol: runs for names, runs in table.items() for protocol in listed(names)}


GROUPS = [
    Group(block, protocol, backbone)
    for block in OFFICIAL["methods"]
    for protocol, runs in published(block).items()
    for backbone in (None, *runs.get("backbones", ()))
]


def entries(block: str) -> list[dict[str, Any]]:
    """Return the entries of a block, least important first."""
    method = block.split("+")[0]
    shared = [entry for entry in OFFICIAL["shared"] if method in entry["methods"]]
    return [*shared, *OFFICIAL["methods"][block].get("entries", ())]


@functools.cache
def names(text: str) -> tuple[str, ...]:
    return tuple(dataset_names([text]))


def applies(entry: Mapping[str, Any], group: Group, training: Training) -> bool:
    data = training.config.data
    datasets = [name for text in entry.get("datasets", [data.name]) for name in names(text)]
    return (
        group.protocol in entry.get("protocols", [group.protocol])
        and data.name in datasets
        and data.shots in entry.get("shots", [data.shots])
        and group.backbone in entry.get("backbones", [group.backbone])
    )


@functools.cache
def trainings(group: Group) -> list[Training]:
    """Return the published runs; those on targets are separate runs of methods that learn from no labelled images."""
    words = ["--config", group.block, *([] if group.backbone is None else ["--backbone.name", group.backbone])]
    words += [] if get_method_class(group.block.split("+")[0]).starts_from is None else ["--init_from", "a run"]
    overrides = Overrides(datasets=group.published["datasets"], shots=group.published.get("shots"))
    plan = plan_protocol(find_protocol(group.protocol), [source_of(read_command_line(words))], overrides, dry=True)
    return [
        run for training in plan.trainings for run in (training, *(training.targets if training.per_target else ()))
    ]


def expected(group: Group, training: Training) -> dict[str, tuple[Any, int]]:
    """Return the official values of a run by dotted key, each with the identity of its entry."""
    values: dict[str, tuple[Any, int]] = {}
    for entry in entries(group.block):
        if applies(entry, group, training):
            values |= {key: (value, id(entry)) for key, value in entry["values"].items()}
    return values


def resolved(training: Training) -> dict[str, Any]:
    """Return the values of a run by dotted key, with all templates written out."""
    config = training.config
    texts = find_card(config.data.name).texts(config.data.template)
    templates = resolved_templates(config.method, config.settings, config.objectives, texts)
    return {**dict(flat(as_plain(config))), **training.values, **templates}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_resolved_run_has_the_official_values(group: Group) -> None:
    differences = []
    for training in trainings(group):
        data, ours = training.config.data, resolved(training)
        for key, (value, _) in expected(group, training).items():
            found = plain(ours.get(key, f"no key {key}"))
            if found != value:
                differences.append(f"{data.name}, {data.shots} shots: {key} is {found!r}, officially {value!r}")
    assert not differences, "\n".join(differences)


def test_every_method_has_a_block_with_its_protocols() -> None:
    """Each of the 11 data sets occurs in every protocol over data sets; the others train on a source."""
    blocks = OFFICIAL["methods"]
    assert {block.split("+")[0] for block in blocks} == set(list_methods())
    assert [block for block, content in blocks.items() if ("none" in content) == ("publishes" in content)] == []
    assert all(content.get("none", "a reconstruction").startswith("a reconstruction") for content in blocks.values())
    for group in GROUPS:
        assert group.protocol in list_protocols(), group
        missing = set(FEW_SHOT) - set(dataset_names(group.published["datasets"]))
        part = find_protocol(group.protocol).test.part
        assert not missing or part == "datasets" or group.published.get("absent"), (group, missing)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_values_that_decide_a_run_are_pinned(group: Group) -> None:
    method = get_method_class(group.block.split("+")[0])
    needed = [f"recipe.{names}" for names in RECIPE] if method.recipe != RecipeConfig() else []
    fixed = {"backbone.name"} if "shots" in group.published else {"backbone.name", "data.shots"}
    for training in trainings(group):
        keys = set(expected(group, training))
        missing = [
            key for key in needed if not keys & {f"recipe.{name}" for name in key.removeprefix("recipe.").split("|")}
        ]
        assert not missing and fixed <= keys, (training.config.data.name, missing)
        assert any(key.startswith("settings.") for key in keys), training.config.data.name


def test_every_value_counts_for_a_run_and_names_its_source() -> None:
    used = {
        (key, entry)
        for group in GROUPS
        for training in trainings(group)
        for key, (_, entry) in expected(group, training).items()
    }
    problems = []
    blocks = {"shared": OFFICIAL["shared"]} | {
        name: block.get("entries", []) for name, block in OFFICIAL["methods"].items()
    }
    for block, given in blocks.items():
        for entry in given:
            problems += [f"{block}: {key} counts for no run" for key in entry["values"] if (key, id(entry)) not in used]
            unknown = set(entry) - {*FILTERS, "values", "source"} - ({"methods"} if block == "shared" else set())
            problems += [f"{block}: {key} is no key of an entry" for key in unknown]
            for source in entry["source"]:
                found = SOURCE.fullmatch(source)
                if not found or found["repository"] not in OFFICIAL["repositories"]:
                    problems.append(f'{block}: {source!r} is no "REPOSITORY\'s FILE:LINES"')
    assert not problems, "\n".join(problems)
    for repository in OFFICIAL["repositories"].values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40}", repository), repository
