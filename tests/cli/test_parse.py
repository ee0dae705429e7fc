"""Configurations from files and command line: typed, order-free, every problem reported at once with its culprit."""

import dataclasses
import random
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprompt.cli.parse import check_config, check_run, key_table, parse_run, read_command_line, source_of
from vlprompt.config.book import list_books
from vlprompt.config.keys import RUN_KEYS, SECTIONS, to_yaml
from vlprompt.config.meta import MetaRunConfig
from vlprompt.config.run import DataConfig, RecipeConfig, RunConfig, TrainerConfig
from vlprompt.config.source import origin_of
from vlprompt.config.types import Fraction, NonNegative, OpenTemplates, validated
from vlprompt.config.yaml import MAX_CONFIG_BYTES, find_config
from vlprompt.errors import ConfigError, did_you_mean

CONFIG_ROOT = Path(__file__).parents[2] / "configs"
META = [f"gram/{path.stem}" for path in sorted((CONFIG_ROOT / "gram").glob("*.yaml"))]
CONFIGS = [*META, *(f"{book}/{data}" for book in list_books() for data in ("imagenet", "demo", "folder"))]


@validated()
class ToySettings:
    """Settings with every kind of type that a method may use."""

    texts: Sequence[str] = ("a {}.",)
    length: int = 4
    pair: tuple[int, int] = (1, 2)
    weight: float = 0.5
    mode: Literal["front", "end"] = "end"
    start: str | None = None
    depth: Literal["auto"] | int = "auto"
    switch: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts."""
        if self.length > 10 and self.mode == "front":
            raise ConfigError(f"settings.length is {self.length}; accepted with settings.mode 'front': at most 10")


@validated()
class NeedySettings:
    """A setting without a default, and one that the data set's template fills."""

    width: int
    templates: OpenTemplates = ()


@validated("objectives.part")
class PartSettings:
    """Settings of a part."""

    weight: NonNegative = 8.0
    mode: Literal["code", "paper"] = "code"


@validated()
class NestedSettings:
    """Settings with a part of their own and a mapping."""

    part: PartSettings = PartSettings(weight=2.0)
    shares: Mapping[str, Fraction] = dataclasses.field(default_factory=dict)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three methods, ``toy``, ``needy`` and ``nested``; a folder to work in."""
    methods = {
        "toy": types.SimpleNamespace(Settings=ToySettings, recipe=RecipeConfig()),
        "needy": types.SimpleNamespace(Settings=NeedySettings, recipe=RecipeConfig()),
        "nested": types.SimpleNamespace(Settings=NestedSettings, recipe=RecipeConfig()),
    }

    def get_method_class(name: str) -> Any:
        if name not in methods:
            raise ConfigError(f"there is no method {name!r}.{did_you_mean(name, methods)}")
        return methods[name]

    registry = types.ModuleType("vlprompt.methods.registry")
    vars(registry)["get_method_class"] = get_method_class
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*argv: str) -> list[str]:
    """The bullets of the ConfigError that ``argv`` gives."""
    with pytest.raises(ConfigError) as caught:
        parse_run(["--method", "toy", *argv])
    head, *rest = str(caught.value).splitlines()
    bullets = [line.removeprefix("  - ") for line in rest if line.startswith("  - ")]
    assert re.fullmatch(r"\d+ problems?:", head) and int(head.split()[0]) == len(bullets)
    assert rest[-1] == "See `vlprompt train --help`."
    return bullets


def refused_file(folder: Path, content: str | bytes, *argv: str) -> list[str]:
    """The bullets of the ConfigError that a file of this content gives."""
    path = folder / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return refused("--config", "bad.yaml", *argv)


# -- what is accepted -----------------------------------------------------------------------------------------------
def test_an_alias_becomes_the_data_sets_own_name(toys: Path) -> None:
    assert parse_run(["--method", "toy", "--data.name", "DescribableTextures"]).data.name == "dtd"


def test_defaults_are_the_dataclasses_with_the_methods_settings_filled_in(toys: Path) -> None:
    config = parse_run(["--method", "toy"])
    settings_given = dataclasses.asdict(ToySettings()) | {"texts": ["a {}."], "pair": [1, 2]}
    assert config == RunConfig(method="toy", settings=settings_given)


def test_later_files_win_over_earlier_ones_and_the_command_line_over_both(toys: Path) -> None:
    (toys / "one.yaml").write_text("method: toy\ndata: {shots: 1, name: folder}\nrecipe: {lr: 1e-3, epochs: 7}\n")
    (toys / "two.yaml").write_text("data:\n  shots: 2\nsettings: {length: 9}\n")
    config = parse_run(["--recipe.epochs", "3", "--config", "one.yaml", "--config=two.yaml"])
    assert (config.data.shots, config.data.name, config.recipe.epochs, config.settings["length"]) == (2, "folder", 3, 9)
    assert config.recipe.lr == 1e-3
    assert parse_run(["--recipe.epochs", "3", "--config", "one+two.yaml"]) == config
    with pytest.raises(ConfigError, match="--config 'three': there is no such file"):
        parse_run(["--config", "one+three"])
    (toys / "one+two.yaml").write_text("method: toy\nseed: 5\n")  # a file of this name is read as one
    assert (parse_run(["--config", "one+two.yaml"]).seed, parse_run(["--config", "one+two"]).seed) == (5, 5)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.shots", "-1", -1),
        ("recipe.lr", "1", 1.0),
        ("recipe.lr", "1e-3", 1e-3),
        ("recipe.gradient_clip", "null", None),
        ("trainer.progress", "false", False),
        ("trainer.loggers", "[wandb]", ("wandb",)),
        ("trainer.loggers", "[]", ()),
        ("data.template", "a photo: {}, or [not].", "a photo: {}, or [not]."),
        ("data.root", "123", "123"),
        ("data.root", "null", None),
        ("settings.texts", '["a {}", "b: {}"]', ["a {}", "b: {}"]),
        ("settings.pair", "[3, 4]", [3, 4]),
        ("settings.mode", "front", "front"),
        ("settings.depth", "3", 3),
        ("settings.depth", "auto", "auto"),
        ("settings.start", "", ""),
        ("settings.switch", "True", True),
    ],
)
def test_a_value_is_read_by_the_type_of_its_key(toys: Path, key: str, text: str, value: object) -> None:
    for words in ([f"--{key}", text], [f"--{key}={text}"]):
        config = parse_run(["--method", "toy", *words])
        part, _, name = key.partition(".")
        found = config.settings[name] if part == "settings" else getattr(getattr(config, part), name)
        assert found == value and type(found) is type(value)


def test_the_same_override_twice_with_the_same_value_is_no_error(toys: Path) -> None:
    assert parse_run(["--method", "toy", "--seed", "3", "--seed=3"]).seed == 3


def test_a_value_that_begins_with_dashes_is_given_with_an_equals_sign(toys: Path) -> None:
    assert parse_run(["--method", "toy", "--output=--odd"]).output == "--odd"


def test_a_template_that_the_data_set_fills_is_left_open_unless_given(toys: Path) -> None:
    assert parse_run(["--method", "needy", "--settings.width", "3"]).settings == {"width": 3, "templates": []}
    words = ["--method", "needy", "--settings.width", "3", "--settings.templates", "['b {}']"]
    assert parse_run(words).settings == {"width": 3, "templates": ["b {}"]}


OVERRIDES = {
    "data.shots": "4", "data.name": "folder", "seed": "7", "recipe.lr": "0.5", "trainer.loggers": "[wandb]",
    "settings.length": "2", "settings.texts": "['x {}']", "output": "elsewhere", "method": "toy",
}  # fmt: skip


@given(order=st.randoms(use_true_random=False), equals=st.lists(st.booleans(), min_size=9, max_size=9))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_the_command_line_makes_no_difference(
    toys: Path, order: random.Random, equals: list[bool]
) -> None:
    (toys / "file.yaml").write_text("data: {shots: 1}\nsettings: {length: 9, weight: 1}\nseed: 5\n")
    pieces = [[f"--{k}={v}"] if e else [f"--{k}", v] for (k, v), e in zip(OVERRIDES.items(), equals, strict=True)]
    pieces.append(["--config", "file.yaml"])
    expected = parse_run([word for piece in pieces for word in piece])
    order.shuffle(pieces)
    assert parse_run([word for piece in pieces for word in piece]) == expected
    assert (expected.data.shots, expected.settings["length"], expected.settings["weight"]) == (4, 2, 1.0)


LOOKALIKES = [
    "1e5",
    "null",
    "yes",
    "010",
    "2020-01-01",
    "~",
    "1:30",
    "<<",
    "=",
    "#",
    "0x1F",
    "1_000",
    ".inf",
    "- a",
    "a: b",
]
PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)


@given(
    name=PRINTABLE,
    root=st.none()
    | PRINTABLE
    | st.sampled_from(["1e5", "null", "yes", "010", "2020-01-01", "~", "1:30", "<<", "=", "#"]),
    texts=st.lists(PRINTABLE, max_size=4),
    lr=st.floats(1e-9, 1e9),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_to_yaml_is_read_back_to_an_equal_configuration(
    toys: Path, name: str, root: str | None, texts: list[str], lr: float, seed: int
) -> None:
    config = parse_run(["--method", "toy"])
    config = dataclasses.replace(
        config.with_data(root=root),
        backbone=dataclasses.replace(config.backbone, name=name),
        recipe=dataclasses.replace(config.recipe, lr=lr),
        seed=seed,
        settings=config.settings | {"texts": texts, "start": root},
    )
    (toys / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse_run(["--config", "again.yaml"]) == config


def test_to_yaml_keeps_every_key_and_short_lists_on_one_line(toys: Path) -> None:
    text = to_yaml(parse_run(["--method", "toy", "--trainer.loggers", "[wandb, tensorboard]"]))
    assert "  loggers: [wandb, tensorboard]\n" in text
    assert text.startswith("method: toy\nsettings:\n  texts: ['a {}.']\n  length: 4\n  pair: [1, 2]\n")
    for key in RUN_KEYS:
        assert re.search(rf"^ *{key.rpartition('.')[2]}:", text, re.MULTILINE), key


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_the_project_is_accepted_and_read_back(name: str, tmp_path: Path) -> None:
    root: type[Any] = MetaRunConfig if name.startswith("gram/") else RunConfig

    def read(file: str) -> Any:
        config, problems = check_config(read_command_line(["--config", file]), root)
        assert not problems
        return config

    config = read(name)
    for text in (to_yaml(config), to_yaml(config, lambda key: "a comment: with #, {} and 'quotes'")):
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        assert read(str(tmp_path / "again.yaml")) == config


def test_printed_values_say_where_they_come_from(toys: Path) -> None:
    (toys / "mine").mkdir()
    (toys / "mine" / "base.yaml").write_text("method: toy\nsettings: {length: 5}\ndatasets: {dtd: {recipe: {lr: 1}}}\n")
    (toys / "over.yaml").write_text("objectives:\n  knowledge: {}\n")
    source = source_of(
        read_command_line(["--config", "mine/dtd", "--config", "over.yaml", "--seed", "3", "--settings.mode", "front"])
    )
    given = source.given()
    text = to_yaml(source.resolve(), lambda key: origin_of(given, key))
    for key, value, origin in (
        ("method", "toy", "mine/base.yaml, line 1"),
        ("  length", "5", "mine/base.yaml, line 2"),
        ("  lr", "1.0", "mine/base.yaml, line 3"),
        ("  name", "dtd", "--config mine/dtd"),
        ("    weight", "8.0", "over.yaml, line 2"),
        ("seed", "3", "command line"),
        ("  mode", "front", "command line"),
        ("  weight", "0.5", "method"),
        ("  shots", "16", "default"),
    ):
        assert re.search(rf"^{key}: {value} +# {origin}$", text, re.MULTILINE), key


# -- malformed command lines ----------------------------------------------------------------------------------------
BAD_COMMAND_LINES = {
    "unknown key": (["--data.shot", "4"], r"command line: there is no key '--data.shot'\. Did you mean '--data.shots'"),
    "key without its section": (["--shots", "4"], r"no key '--shots'\. Did you mean '--data.shots'\?"),
    "key in another section": (["--trainer.lr", "1"], r"no key '--trainer.lr'\. Did you mean '--recipe.lr'\?"),
    "dash for underscore": (["--recipe.batch-size", "4"], r"'--recipe.batch-size'\. Did you mean '--recipe.b"),
    "unknown setting": (["--settings.lenght", "4"], r"'--settings.lenght'\. Did you mean '--settings.length'"),
    "misspelled config": (["--confg", "x"], r"no key '--confg'\. Did you mean '--config'\?"),
    "key nested too deep": (["--data.shots.x", "4"], r"no key '--data.shots.x'"),
    "empty key": (["--", "4"], r"'--' is not an option"),
    "only an equals sign": (["--=4"], r"'--=4' is not an option"),
    "section instead of key": (["--data", "demo"], r"--data is a section; its keys are --data.name, --data.root"),
    "settings as a whole": (["--settings", "{length: 3}"], r"--settings is a section; its keys are --settings.texts"),
    "text for int": (["--data.shots", "four"], r"--data.shots is 'four'; accepted: 1 or more images"),
    "float for int": (["--data.shots", "4.5"], r"--data.shots is '4.5'; accepted: 1 or more images"),
    "bool for int": (["--seed", "true"], r"--seed is 'true'; accepted: a whole number from 0 to 429"),
    "octal for int": (["--seed", "010"], r"--seed is '010'; accepted: a whole number from 0 to 429"),
    "base 60 for int": (["--seed", "1:30"], r"--seed is '1:30'; accepted: a whole number from 0 to 429"),
    "quoted number for int": (["--seed", '"3"'], r"--seed is '\"3\"'; accepted: a whole number from 0 to 429"),
    "nothing for int": (["--seed="], r"--seed is ''; accepted: a whole number from 0 to 429"),
    "null for int": (["--seed", "null"], r"--seed is 'null'; accepted: a whole number from 0 to 429"),
    "huge int": (["--seed", "9" * 5000], r"--seed is '9+\.\.\.9+' \(.*\); accepted: a whole number from 0 to 429"),
    "seed out of range": (["--seed", "-1"], r"^command line: --seed is '-1'; accepted: a whole number from 0 to 429"),
    "text for float": (["--recipe.lr", "fast"], r"--recipe.lr is 'fast'; accepted: a finite number above 0$"),
    "nan": (["--recipe.lr", ".nan"], r"--recipe.lr is '.nan'; accepted: a finite number above 0$"),
    "infinity": (["--recipe.momentum", ".inf"], r"--recipe.momentum is '.inf'; accepted: .* from 0 to below 1$"),
    "overflow": (["--recipe.lr", "1" + "0" * 400], r"--recipe.lr is '10+\.\.\.0+'; accepted: a finite number above 0$"),
    "yes for bool": (["--trainer.progress", "yes"], r"--trainer.progress is 'yes'; accepted: true or false$"),
    "1 for bool": (["--trainer.progress", "1"], r"--trainer.progress is '1'; accepted: true or false$"),
    "unknown choice": (["--backbone.precision", "fp8"], r"'fp8'; accepted: 'fp32', 'fp16' or 'bf16'\. Did"),
    "unknown list item": (["--trainer.loggers", "[wanb]"], r"'\[wanb\]'; accepted: a list, each item 'tensorboard' or"),
    "text for list": (["--trainer.loggers", "wandb"], r"--trainer.loggers is 'wandb'; accepted: a list"),
    "broken list": (["--trainer.loggers", "[wandb"], r"'\[wandb' \(not valid YAML: .*\); accepted: a list"),
    "number in a list of texts": (["--settings.texts", "[a, 3]"], r"'\[a, 3\]'; accepted: a list, each item a text$"),
    "wrong length of list": (["--settings.pair", "[1]"], r"'\[1\]'; accepted: a list of 2: a whole number, a whole"),
    "python object": (["--settings.pair", "!!python/object:os.x []"], r"tags \(tag:.*python/object:os.x\) are not"),
    "alias": (["--settings.pair", "[&a 1, *a]"], r"aliases \(\*name\) are not accepted"),
    "deep nesting": (["--settings.pair", "[" * 5000], r"nested too deeply"),
    "control character": (["--output", "a\x07b"], r"the text holds control characters"),
    "not UTF-8": (["--output", "a\udcffb"], r"is not valid UTF-8"),
    "empty text": (["--output", ""], r"--output is ''; accepted: a text that is not empty$"),
    "no value at the end": (["--data.shots"], r"--data.shots has no value; accepted: 1 or more images per class, or"),
    "no value before an option": (["--data.shots", "--seed", "3"], r"--data.shots has no value"),
    "config without a file": (["--config"], r"--config has no value; write --config VALUE"),
    "leftover word": (["demo"], r"'demo' has no key; a value follows its key"),
    "two values": (["--data.shots", "4", "8"], r"'8' has no key"),
    "short option": (["-c", "x"], r"'-c' is not an option"),
    "two different values": (["--seed", "1", "--seed=2"], r"--seed is given twice, '1' and '2'$"),
    "two methods": (["--method", "tou"], r"--method is given twice"),
    "unknown data set": (["--data.name", "Caltech-110"], r"data.name is 'Caltech-110', .*Did you mean 'caltech101'\?"),
    "no shots": (["--data.shots", "0"], r"data.shots is '0'; accepted: 1 or more images"),
    "template without a slot": (["--data.template", "photo"], r"data.template is 'photo'; accepted: a text with"),
    "batch that devices cannot share": (["--trainer.devices", "3"], r"line: recipe.batch_size is 32 .* 3 processes"),
    "settings that contradict": (
        ["--settings.length", "11", "--settings.mode", "front"],
        r"^command line: settings.length is 11; accepted with settings.mode 'front': at most 10$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_malformed_command_line_names_the_culprit(toys: Path, case: str) -> None:
    argv, expected = BAD_COMMAND_LINES[case]
    bullets = refused(*argv)
    assert any(re.search(expected, bullet) for bullet in bullets), bullets
    assert sum(map(len, bullets)) < 1500  # one screen
    assert not list(toys.iterdir())


def test_an_unknown_method_is_named_with_the_nearest_and_its_settings_are_not_judged(toys: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(["--method", "tou", "--settings.whatever", "1"])
    assert "command line: method: there is no method 'tou'. Did you mean 'toy'?" in str(caught.value)
    assert str(caught.value).startswith("1 problem:")


def test_a_setting_without_a_default_has_to_be_given(toys: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings\.width is missing; .* give it: --settings\.width VALUE"):
        parse_run(["--method", "needy"])


# -- settings in settings ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words",
    [
        ["--settings.part.mode", "paper"],
        ["--settings.part", "{mode: paper}"],
        ["--config", "mine.yaml"],
        ["--config", "mine.yaml", "--settings.part.mode", "paper"],
    ],
)
def test_a_setting_of_a_part_leaves_the_others_of_that_part_as_they_are(toys: Path, words: list[str]) -> None:
    (toys / "mine.yaml").write_text("settings:\n  part: {mode: paper}\n")
    config = parse_run(["--method", "nested", *words])
    assert config.settings == {"part": {"weight": 2.0, "mode": "paper"}, "shares": {}}


def test_files_and_command_line_fill_one_part_and_one_mapping_together(toys: Path) -> None:
    (toys / "one.yaml").write_text("settings: {part: {weight: 3}, shares: {a: 0.1, b: 0.2}}\n")
    (toys / "two.yaml").write_text("settings: {shares: {b: 0.5}}\n")
    config = parse_run(
        ["--method", "nested", "--config", "one.yaml", "--config", "two.yaml", "--settings.part.mode", "paper"]
    )
    assert config.settings == {"part": {"weight": 3.0, "mode": "paper"}, "shares": {"a": 0.1, "b": 0.5}}


def test_what_is_wrong_in_a_part_is_named_with_its_own_line(toys: Path) -> None:
    content = "method: nested\nsettings:\n  part:\n    weight: -1\n    mod: code\n  shares: {a: 2}\n"
    (toys / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_run(["--config", "bad.yaml", "--settings.part.mode", "papr"])
    for expected in (
        "bad.yaml, line 4: settings.part.weight is -1; accepted: a finite number of 0 or more",
        "bad.yaml, line 5: there is no key 'settings.part.mod'. Did you mean 'settings.part.mode'",
        "bad.yaml, line 6: settings.shares.a is 2; accepted: a finite number from 0 to 1",
        "command line: --settings.part.mode is 'papr'; accepted: 'code' or 'paper'. Did you mean 'paper'?",
    ):
        assert str(caught.value).count(expected) == 1, caught.value
    assert str(caught.value).startswith("4 problems")
    with pytest.raises(ConfigError, match="--settings.part is '3'; accepted: its settings in braces"):
        parse_run(["--method", "nested", "--settings.part", "3"])


# -- malformed files ------------------------------------------------------------------------------------------------
BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"^bad.yaml holds no keys"),
    "only comments": ("# nothing\n", r"^bad.yaml holds no keys"),
    "a list": ("- method: toy\n", r"^bad.yaml, line 1: found a list or a text"),
    "a text": ("\ntoy\n", r"^bad.yaml, line 2: found a list or a text"),
    "not YAML": ("data:\n  name: [demo\nseed: 1\n", r"^bad.yaml, line 3: not valid YAML"),
    "tab": ("data:\n\tname: demo\n", r"^bad.yaml, line 2: not valid YAML: .*'\\t'"),
    "two documents": ("seed: 1\n---\nseed: 2\n", r"^bad.yaml, line 2: not valid YAML"),
    "not UTF-8": (b"seed: 1\noutput: \xff\n", r"^bad.yaml, line 2: not UTF-8 text \(byte 0xff\)$"),
    "NUL byte": (b"seed: 1\noutput: a\x00b\n", r"^bad.yaml, not valid YAML: unacceptable character"),
    "too large": ("#" * MAX_CONFIG_BYTES + "\nseed: 1\n", r"^bad.yaml cannot be read: it has 1,000,009 bytes; at most"),
    "deep nesting": ("seed: " + "[" * 20000, r"^bad.yaml, not usable YAML: nested too deeply$"),
    "alias bomb": ("output: &a [x, x]\nseed: [*a, *a]\n", r"^bad.yaml, line 2: not valid YAML: aliases"),
    "python tag": ("seed: !!python/object/apply:os.system [ls]\n", r"^bad.yaml, line 1: .* tags \(tag:.*os.system\)"),
    "bad tag value": ("seed: !!int abc\n", r"^bad.yaml, line 1: not valid YAML: tags \(tag:.*:int\)"),
    "number with too many digits": (f"seed: {'9' * 5000}\n", r"line 1: not usable: Exceeds.*\(key 'seed'\)$"),
    "list as inner key": ("settings: {pair: {[1]: 2}}\n", r"line 1: a key is a list or a mapping"),
    "same key twice": ("seed: 1\noutput: x\nseed: 2\n", r"^bad.yaml, line 3: 'seed' is given twice \(first in line 1"),
    "same section twice": ("data: {shots: 1}\ndata: {shots: 2}\n", r"line 2: 'data' is given twice \(first in line 1"),
    "same inner key twice": ("data:\n  shots: 1\n  shots: 2\n", r"line 3: 'data.shots' is given twice"),
    "unknown key": ("seeds: 1\n", r"^bad.yaml, line 1: there is no key 'seeds'\. Did you mean 'seed'\?$"),
    "unknown inner key": ("data:\n  class: base\n", r"line 2: there is no key 'data.class'\. Did you mean 'data.c"),
    "key without its section": ("shots: 4\n", r"line 1: there is no key 'shots'\. Did you mean 'data.shots'\?$"),
    "dotted key": ("data.shots: 4\n", r"'data.shots': dotted keys are for .*'data: \{shots: \.\.\.\}'"),
    "number as key": ("1: x\n", r"line 1: there is no key '1'\."),
    "list as key": ("? [a, b]\n: 1\n", r"line 1: a key is a list or a mapping"),
    "section that is a text": ("data: demo\n", r"line 1: 'data' is a section: keys stand indented under it"),
    "section that is a list": ("data: [demo]\n", r"line 1: 'data' is a section"),
    "section left empty": ("seed: 1\ndata:\n", r"line 2: 'data' is a section"),
    "settings that are a list": ("settings: [1]\n", r"line 1: 'settings' is a section"),
    "text for int": ("data:\n  shots: four\n", r"^bad.yaml, line 2: data.shots is 'four'; accepted: 1 or more images"),
    "quoted int": ("seed: '3'\n", r"line 1: seed is '3'; accepted: a whole number from 0 to 429"),
    "bool for int": ("seed: true\n", r"line 1: seed is True; accepted: a whole number from 0 to 429"),
    "list for int": ("seed: [1]\n", r"line 1: seed is \[1\]; accepted: a whole number from 0 to 429"),
    "null for text": ("output: null\n", r"line 1: output is None; accepted: a text that is not empty$"),
    "number for text": ("output: 3\n", r"line 1: output is 3; accepted: a text that is not empty, in quotes$"),
    "mapping for text": ("output: {a: 1}\n", r"line 1: output is \{'a': 1\}; accepted: a text that is not empty$"),
    "number in quotes in a list": ("settings: {pair: [1, '2']}\n", r"pair\[1\] is '2'; accepted: a whole number$"),
    "inner duplicate in a value": ("settings: {pair: {a: 1, a: 2}}\n", r"line 1: 'settings.pair.a' is given twice"),
    "misspelled choice": ("data: {transform: centre}\n", r"'centre'; accepted: 'random', .*\. Did you mean 'center'"),
    "out of range": ("recipe:\n  epochs: 0\n", r"^bad.yaml, line 2: recipe.epochs is 0; accepted: .* of 1 or more, or"),
    "unknown data set": ("data:\n  name: dmo\n", r"^bad.yaml, line 2: data.name is 'dmo', .*Did you mean 'demo'"),
    "unknown setting": ("settings: {lenth: 3}\n", r"no key 'settings.lenth'\. Did you mean 'settings.length'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_names_file_line_and_culprit(toys: Path, case: str) -> None:
    content, expected = BAD_FILES[case]
    bullets = refused_file(toys, content)
    assert any(re.search(expected, bullet) for bullet in bullets), bullets
    assert sum(map(len, bullets)) < 1500
    assert [path.name for path in toys.iterdir()] == ["bad.yaml"]


def test_problems_of_two_places_name_both(toys: Path) -> None:
    bullets = refused_file(toys, "recipe:\n  batch_size: 30\n", "--trainer.devices", "4")
    assert bullets == [
        "bad.yaml, line 2 and command line: recipe.batch_size is 30 (the global batch), which 4 processes "
        "(trainer.devices) cannot share evenly; accepted: a multiple of trainer.devices"
    ]


def test_everything_is_reported_at_once_and_nothing_twice(toys: Path) -> None:
    content = "seeds: 1\ndata: {shots: x, transform: centre, name: dmo}\nrecipe: {lr: -1, epochs: 0}\nbackbone: 3\n"
    bullets = refused_file(
        toys, content, "--settings.mode", "middle", "--settings.x", "1", "--config", "absent", "--forced", "word"
    )
    expected = (
        *("'seeds'", "data.shots is 'x'", "data.transform is 'centre'", "data.name is 'dmo'", "recipe.lr is -1"),
        *("recipe.epochs is 0", "'backbone' is a section", "--settings.mode is 'middle'", "'--settings.x'"),
        *("--config 'absent'", "'--forced'"),
    )
    for culprit in expected:
        assert sum(culprit in bullet for bullet in bullets) == 1, (culprit, bullets)
    assert len(bullets) == len(expected)


def test_a_value_that_failed_is_not_judged_again_through_its_default(toys: Path) -> None:
    assert refused("--recipe.epochs", "x", "--recipe.warmup_epochs", "60") == [
        "command line: --recipe.epochs is 'x'; accepted: a whole number of 1 or more, or null"
    ]


# -- finding files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gram/coop", "gram/coop.yaml", "configs/gram/coop.yaml", "configs/gram/coop"])
def test_own_configurations_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name).resolve() == Path(__file__).parents[2] / "configs" / "gram" / "coop.yaml"


def test_a_file_in_the_current_folder_goes_before_our_own(toys: Path) -> None:
    (toys / "gram").mkdir()
    (toys / "gram" / "coop.yaml").write_text("method: toy\n")
    assert find_config("gram/coop").resolve() == toys / "gram" / "coop.yaml"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mocop/demo", "Did you mean mocoop/demo or "),
        ("configs/mocoop/caltech-102.yaml", "Did you mean mocoop/caltech101 or "),
        ("somewhere/else/configs/coop/dmo.yaml", "Did you mean coop/demo or "),
        ("mocop", "Did you mean mocoop or "),
        ("gram/coop-dmo", "Did you mean gram/coop-demo or "),
        ("x" * 5000, "there is no such file"),
        ("../../etc/hostname", "there is no such file"),
        (".", "this is a folder"),
    ],
)
def test_a_configuration_that_is_not_there_is_named_with_the_nearest(toys: Path, name: str, expected: str) -> None:
    (bullet,) = refused("--config", name)
    assert bullet.startswith("--config ") and expected in bullet and len(bullet) < 600


def test_an_unreadable_file_says_so(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toys / "bad.yaml").write_text("seed: 1\n")

    def deny(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vlprompt.config.yaml.read_bytes", deny)
    assert refused("--config", "bad.yaml") == ["bad.yaml cannot be read: Permission denied"]


# -- parts ----------------------------------------------------------------------------------------------------------
def test_sections_and_keys_are_those_of_the_dataclasses() -> None:
    assert SECTIONS == ("backbone", "data", "recipe", "trainer", "settings", "objectives", "decomposition")
    for part, kind in (("data", DataConfig), ("recipe", RecipeConfig), ("trainer", TrainerConfig)):
        assert [key for key in RUN_KEYS if key.startswith(part + ".")] == [
            f"{part}.{entry.name}" for entry in dataclasses.fields(kind)
        ]


def test_the_key_table_has_a_line_for_every_key_with_default_and_type() -> None:
    table = key_table()
    assert len(table.splitlines()) == len(RUN_KEYS)
    assert re.search(r"^  --data.shots +16 +1 or more images per class, or -1 for all of them$", table, re.MULTILINE)
    assert re.search(r"^  --settings.mode +end +'front' or 'end'$", key_table(ToySettings), re.MULTILINE)
    assert re.search(r"^  --settings.width +required +a whole number$", key_table(NeedySettings), re.MULTILINE)


def test_the_command_line_is_sorted_without_raising() -> None:
    words = ["--top", "3", "a.png", "--json", "--x=1", "b.png", "--config", "f"]
    line = read_command_line(words, "predict", flags=("json",), options=("top",), operands=True)
    assert (line.options, line.operands, line.flags) == ({"top": "3"}, ["a.png", "b.png"], {"json"})
    assert (line.overrides, line.configs, line.problems) == ({"x": "1"}, ["f"], [])


def test_a_flag_with_a_value_is_a_problem() -> None:
    assert read_command_line(["--force=yes"], flags=("force",)).problems == [
        "command line: --force takes no value, but has 'yes'"
    ]


def test_overrides_outside_of_what_a_command_takes_are_refused(toys: Path) -> None:
    (toys / "run.yaml").write_text("method: toy\nrecipe: {epochs: 3}\n")
    line = read_command_line(["--recipe.epochs", "5", "--data.shots", "2"], "eval")
    config, problems = check_run(line, ["run.yaml"], within=("data.", "seed"))
    assert problems == [
        "command line: '--recipe.epochs' is not an option of `vlprompt eval`. "
        "Accepted: --data.name, --data.root, --data.shots, --data.classes, --data.transform, --data.template, "
        "--data.workers, --data.source, --data.target, --data.split, --data.sampler, --data.shots_file, "
        "--data.on_bad_image, --data.cached_views, --data.bank, --data.order, --data.statistics, --data.orientation, "
        "--data.background, --seed."
    ]
    assert config is not None and (config.recipe.epochs, config.data.shots) == (3, 2)
