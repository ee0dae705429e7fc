"""Validated dataclasses: strict types, bounds, nesting, contradictions, and every problem in one text."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprompt.config import types as config_types
from vlprompt.config.types import (
    Above0,
    Below1,
    Count,
    Fraction,
    Ge,
    Gt,
    Holds,
    Le,
    Lines,
    MaxLen,
    MinLen,
    Name,
    NonNegative,
    Positive,
    Problem,
    Seed,
    Template,
    Words,
    accepted_values,
    convert,
    field_hints,
    from_text,
    literals,
    validate,
    validated,
)
from vlprompt.errors import ConfigError


@validated("objectives.knowledge")
class Knowledge:
    """Settings of an objective."""

    weight: NonNegative = 8.0
    template: Template = "a photo of a {}."

    def __post_init__(self) -> None:
        if self.weight == 0 and self.template != "a photo of a {}.":
            raise ConfigError("objectives.knowledge.template has no effect; accepted: objectives.knowledge.weight > 0")


@validated()
class Base:
    """Settings that another class extends."""

    what: ClassVar[str] = "not a field"
    length: Annotated[int, Ge(1), Le(12)] = 4
    mode: Literal["front", "end"] = "end"

    def __post_init__(self) -> None:
        if self.length > 10 and self.mode == "front":
            raise ConfigError(f"settings.length is {self.length}; accepted with settings.mode 'front': at most 10")


@validated()
class Settings(Base):
    """Every kind of type."""

    mode: Literal["front", "end"] = "front"
    texts: Sequence[str] = ("a {}.",)
    pair: tuple[int, int] = (1, 2)
    rate: Above0 = 0.5
    momentum: Below1 = 0.9
    start: str | None = None
    depth: Literal["auto"] | Positive = "auto"
    switch: bool = False
    knowledge: Knowledge = Knowledge(weight=4.0)
    parts: Mapping[str, Fraction] = field(default_factory=dict)


def problems_of(kind: type, where: str | None = None, **values: Any) -> list[str]:
    instance, problems = validate(kind, values, where)
    assert (instance is None) == bool(problems)
    return [problem.text for problem in problems]


# -- a dataclass as any other -----------------------------------------------------------------------------------------
def test_the_stdlib_works_on_it() -> None:
    made = Settings(length=3)
    assert dataclasses.replace(made, length=5).length == 5
    assert dataclasses.asdict(made)["knowledge"] == {"weight": 4.0, "template": "a photo of a {}."}
    defaults = {entry.name: entry.default for entry in dataclasses.fields(Settings)}
    assert defaults["length"] == 4 and defaults["knowledge"] == Knowledge(weight=4.0)
    assert [entry.name for entry in dataclasses.fields(Settings)] == list(field_hints(Settings))
    assert copy.deepcopy(made) == made
    assert hash(Base()) == hash(Base()) and Settings(3, "end") == Settings(length=3, mode="end")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.length = 5  # type: ignore[misc]
    with pytest.raises(ConfigError, match="settings.length is 13"):
        dataclasses.replace(made, length=13)
    with pytest.raises(TypeError, match="each once"):
        Base(3, length=3)  # type: ignore[misc]


def test_lists_become_tuples_and_numbers_floats() -> None:
    made = Settings(texts=["a {}", "b {}"], rate=1, knowledge={"weight": 2}, parts={"x": 1})  # type: ignore[arg-type]
    assert made.texts == ("a {}", "b {}") and type(made.rate) is float
    assert made.knowledge == Knowledge(2.0) and type(made.knowledge.weight) is float
    assert made.parts == {"x": 1.0}


def test_a_mapping_replaces_only_what_it_names_of_a_nested_default() -> None:
    @validated("")
    class Outer:
        inner: Settings = Settings(length=7, knowledge=Knowledge(3.0))
        maybe: Knowledge | None = None

    made, _ = validate(Outer, {"inner": {"knowledge": {"template": "my {}"}}, "maybe": {"weight": 1}})
    assert made is not None and made.inner.length == 7
    assert made.inner.knowledge == Knowledge(3.0, "my {}") and made.maybe == Knowledge(1.0)


# -- what is refused --------------------------------------------------------------------------------------------------
REFUSED: list[tuple[str, Any, str]] = [
    ("length", True, "settings.length is True; accepted: a whole number from 1 to 12"),
    ("length", "3", "settings.length is '3'; accepted: a whole number from 1 to 12"),
    ("length", 3.0, "settings.length is 3.0; accepted: a whole number from 1 to 12"),
    ("length", None, "settings.length is None; accepted: a whole number from 1 to 12"),
    ("length", 0, "settings.length is 0; accepted: a whole number from 1 to 12"),
    ("mode", "ende", "settings.mode is 'ende'; accepted: 'front' or 'end'. Did you mean 'end'?"),
    ("mode", ["end"], "settings.mode is ['end']; accepted: 'front' or 'end'"),
    ("texts", "one", "settings.texts is 'one'; accepted: a list, each item a text"),
    ("texts", ["a", 3], "settings.texts[1] is 3; accepted: a text, in quotes"),
    ("texts", {"a"}, "settings.texts is {'a'}; accepted: a list, each item a text"),
    ("pair", [1], "settings.pair is [1]; accepted: a list of 2: a whole number, a whole number"),
    ("pair", [1, 2, 3], "settings.pair is [1, 2, 3]; accepted: a list of 2: a whole number, a whole number"),
    ("pair", [1, "2"], "settings.pair[1] is '2'; accepted: a whole number"),
    ("rate", 0, "settings.rate is 0; accepted: a finite number above 0"),
    ("rate", float("nan"), "settings.rate is nan; accepted: a finite number above 0"),
    ("rate", float("inf"), "settings.rate is inf; accepted: a finite number above 0"),
    ("rate", 10**400, "settings.rate is 1" + "0" * 69 + "..." + "0" * 20 + "; accepted: a finite number above 0"),
    ("rate", True, "settings.rate is True; accepted: a finite number above 0"),
    ("momentum", 1, "settings.momentum is 1; accepted: a finite number from 0 to below 1"),
    ("start", "a\x07", "settings.start is 'a\\x07' (the text holds control characters or is not valid UTF-8); "
     "accepted: a text or null"),
    ("start", "a\udcff", "settings.start is 'a\\udcff' (the text holds control characters or is not valid UTF-8); "
     "accepted: a text or null"),
    ("depth", "atuo", "settings.depth is 'atuo'; accepted: 'auto', or a whole number of 1 or more. "
     "Did you mean 'auto'?"),
    ("depth", 0, "settings.depth is 0; accepted: 'auto', or a whole number of 1 or more"),
    ("depth", True, "settings.depth is True; accepted: 'auto', or a whole number of 1 or more"),
    ("switch", 1, "settings.switch is 1; accepted: true or false"),
    ("knowledge", 3, "settings.knowledge is 3; accepted: a table of weight, template"),
    ("knowledge", {"weight": -1}, "settings.knowledge.weight is -1; accepted: a finite number of 0 or more"),
    ("knowledge", {"wieght": 1}, "there is no key 'settings.knowledge.wieght'. Did you mean "
     "'settings.knowledge.weight'?"),
    ("knowledge", {"template": "a"}, "settings.knowledge.template is 'a'; accepted: a text with {} once, for the class "
     "name"),
    ("knowledge", {"weight": 0, "template": "{}"}, "settings.knowledge.template has no effect; accepted: "
     "settings.knowledge.weight > 0"),
    ("parts", {"x": 2}, "settings.parts.x is 2; accepted: a finite number from 0 to 1"),
    ("parts", {1: 1}, "settings.parts: a key is 1; accepted: a text, in quotes"),
    ("parts", [1], "settings.parts is [1]; accepted: a table"),
    ("lenght", 3, "there is no key 'settings.lenght'. Did you mean 'settings.length'?"),
    ("zzz", 3, "there is no key 'settings.zzz'. Accepted: settings.length, settings.mode, settings.texts, settings.pair"
     ", settings.rate, settings.momentum, settings.start, settings.depth, settings.switch, settings.knowledge, "
     "settings.parts."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "text"), REFUSED)
def test_a_value_that_is_not_accepted_is_named_with_what_is(name: str, value: Any, text: str) -> None:
    assert problems_of(Settings, **{name: value}) == [text]
    with pytest.raises(ConfigError) as caught:
        Settings(**{name: value})
    assert str(caught.value) == text


def test_a_literal_is_of_its_own_type() -> None:
    @validated()
    class Choice:
        one: Literal[1, 2] = 1

    for value, near in ((True, ""), (1.0, ""), ("1", ". Did you mean 1?")):
        assert problems_of(Choice, one=value) == [f"settings.one is {value!r}; accepted: 1 or 2{near}"]
    assert Choice(one=2).one == 2


def test_missing_values_are_named() -> None:
    @validated()
    class Needy:
        width: Positive
        name: Name

    assert problems_of(Needy) == [
        "settings.width is missing; accepted: a whole number of 1 or more",
        "settings.name is missing; accepted: a text that is not empty",
    ]
    assert problems_of(Needy, width=1, name="") == ["settings.name is ''; accepted: a text that is not empty"]


def test_all_problems_are_listed_with_their_keys_and_contradictions_among_them() -> None:
    @validated("")
    class Run:
        seed: Seed = 1
        one: Settings = Settings()
        two: Knowledge = Knowledge()

        def __post_init__(self) -> None:
            if self.seed > 5 and self.one.pair != (1, 2):
                raise ConfigError("one.pair and seed\nseed and two.weight")

    values = {
        "seed": 9,
        "one": {"pair": [2, 2], "length": 11, "rate": -1, "lenght": 1},
        "two": {"weight": 0, "template": "x {}"},
    }
    _, problems = validate(Run, values)
    assert problems == [
        Problem("one.rate", "one.rate is -1; accepted: a finite number above 0"),
        Problem("one.lenght", "there is no key 'one.lenght'. Did you mean 'one.length'?"),
        Problem("one.length", "one.length is 11; accepted with one.mode 'front': at most 10"),
        Problem("two.template", "two.template has no effect; accepted: two.weight > 0"),
        Problem("one.pair", "one.pair and seed"),
        Problem("seed", "seed and two.weight"),
    ]
    # A contradiction with a value that is refused itself says nothing new.
    values["seed"] = -1
    assert [problem.key for problem in validate(Run, values)[1]] == [
        "seed", "one.rate", "one.lenght", "one.length", "two.template",
    ]  # fmt: skip


def test_where_replaces_the_section_of_the_class() -> None:
    assert problems_of(Knowledge, "objectives.mine", weight=0, template="{}") == [
        "objectives.mine.template has no effect; accepted: objectives.mine.weight > 0"
    ]
    assert problems_of(Knowledge, "", weight=-1) == ["weight is -1; accepted: a finite number of 0 or more"]


def test_a_class_has_to_be_decorated() -> None:
    class Derived(Base):
        pass

    for kind in (Derived, dataclasses.make_dataclass("Plain", ["x"])):
        with pytest.raises(TypeError, match="is not decorated with @validated"):
            validate(kind, {})


def test_a_text_of_several_lines_is_one_where_the_hint_says_so() -> None:
    @validated("")
    class Card:
        notes: Lines = ""
        name: str = ""

    assert Card(notes="one\ntwo").notes == "one\ntwo"
    assert problems_of(Card, notes="a\x07", name="one\ntwo") == [
        "notes is 'a\\x07' (the text holds control characters or is not valid UTF-8); accepted: a text",
        "name is 'one\\ntwo' (the text holds control characters or is not valid UTF-8); accepted: a text",
    ]


# -- words ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float, "a finite number"),
        (bool, "true or false"),
        (str, "a text"),
        (str | None, "a text or null"),
        (Any, "any value"),
        (dict[str, Any], "a table"),
        (list, "a list"),
        (Path, "Path"),
        (Literal["all"], "'all'"),
        (Literal["all", "base", "new"], "'all', 'base' or 'new'"),
        (list[str], "a list, each item a text"),
        (tuple[Positive, ...], "a list, each item a whole number of 1 or more"),
        (tuple[int, float], "a list of 2: a whole number, a finite number"),
        (Annotated[Sequence[int], MinLen(1)], "a list that is not empty, each item a whole number"),
        (Annotated[Sequence[int], MinLen(2), MaxLen(3)], "a list from 2 to 3 items, each item a whole number"),
        (Count, "a whole number of 0 or more"),
        (Seed, "a whole number from 0 to 4294967295"),
        (Annotated[float, Gt(0), Le(1)], "a finite number above 0, at most 1"),
        (Annotated[int, Le(5)], "a whole number of at most 5"),
        (Annotated[Count | None, Words("0 or more views, or null")], "0 or more views, or null"),
        (Annotated[str, Holds(str.isalpha, "letters")], "letters"),
        (Count | None, "a whole number of 0 or more, or null"),
        (Literal["a", "b"] | Count | None, "'a' or 'b', a whole number of 0 or more, or null"),
        (Knowledge, "a table of weight, template"),
    ],
)
def test_a_hint_says_in_words_what_it_accepts(hint: Any, words: str) -> None:
    assert accepted_values(hint) == words


def test_literals_are_found_in_unions() -> None:
    assert literals(field_hints(Settings)["depth"]) == ["auto"]
    assert literals(Literal["a", "b"] | int | None) == ["a", "b"] and literals(int) == []


# -- single values ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "-1", -1),
        (float, "1", 1.0),
        (float, "1e-3", 1e-3),
        (float | None, "null", None),
        (bool, "false", False),
        (list[Literal["wandb"]], "[wandb]", ("wandb",)),
        (str, "a photo: {}, or [not].", "a photo: {}, or [not]."),
        (str | None, "123", "123"),
        (str | None, "~", None),
        (Name, "12", "12"),
        (Literal["auto"] | Positive, "3", 3),
        (Literal["auto"] | Positive, "auto", "auto"),
        (Sequence[str] | str, "[a, b]", ("a", "b")),
        (Sequence[str] | str, "a {}: b", "a {}: b"),
        (dict[str, Any], "{a: [1, x]}", {"a": [1, "x"]}),
        (Any, "[1, 2]", [1, 2]),
        (int | str, "3", 3),
        (int | str, "three: [", "three: ["),
    ],
)
def test_a_text_is_read_by_its_hint(hint: Any, text: str, value: Any) -> None:
    found = from_text(hint, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "why"),
    [
        (int, "four", ""),
        (int, "4.5", ""),
        (int, "true", ""),
        (int, "010", ""),
        (int, '"3"', ""),
        (int, "", ""),
        (Positive, "0", ""),
        (int, "9" * 5000, "not usable"),
        (float, ".nan", ""),
        (list[str], "[a", "not valid YAML"),
        (list[str], "[a, 3]", ""),
        (tuple[int, int], "!!python/object:os.x []", "tags"),
        (tuple[int, int], "[&a 1, *a]", "aliases"),
        (str, "a\x07b", "control characters"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(hint: Any, text: str, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_text(hint, text)
    assert why in str(caught.value) and bool(why) == bool(str(caught.value))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(values=st.dictionaries(st.sampled_from([*field_hints(Settings), "x"]), ANY, max_size=5))
def test_any_values_give_an_instance_or_problems_that_name_each_of_them(values: dict[str, Any]) -> None:
    made, problems = validate(Settings, values)
    assert (made is None) == bool(problems)
    assert all(problem.key.split(".")[1] in values for problem in problems)
    if made is not None:
        assert Settings(**values) == made == dataclasses.replace(made)


@given(value=ANY)
def test_a_converted_value_is_converted_to_itself(value: Any) -> None:
    for hint in (int, float, str | None, Sequence[str], Literal["auto"] | int, dict[str, float]):
        try:
            first = convert(hint, value)
        except ValueError:
            continue
        assert convert(hint, first) == first


# -- the module -------------------------------------------------------------------------------------------------------
def test_its_example_is_true() -> None:
    assert doctest.testmod(config_types).failed == 0


def test_importing_the_package_does_not_import_it() -> None:
    code = "import sys, vlprompt; sys.exit('pydantic' in sys.modules or 'vlprompt.config.types' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
