"""The registry: enrolment, listing, and what is said about unknown names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vlprompt.config.types import validated
from vlprompt.errors import ConfigError
from vlprompt.methods import PromptMethod, get_method_class, list_methods, register, registry


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry._METHODS, "_known", dict(registry._METHODS._known))
    yield


def test_methods_are_listed_by_wildcard_in_order() -> None:
    everything = list_methods()
    assert {"coop", "mocoop", "zeroshot"} <= set(everything) and everything == sorted(everything)
    assert {"coop", "mocoop"} <= set(list_methods("*coop*"))
    assert "zeroshot" not in list_methods("*coop*")
    assert list_methods("no such method") == []


@pytest.mark.parametrize(("wrong", "right"), [("mocop", "mocoop"), ("CoOp", "coop"), ("zero-shot", "zeroshot")])
def test_an_unknown_method_names_its_neighbours(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=repr(wrong)) as caught:
        get_method_class(wrong)
    assert repr(right) in str(caught.value) and "vlprompt list methods" in str(caught.value)


def test_a_decorator_is_the_whole_enrolment(clean_registry: None, tiny_backbone: Any) -> None:
    @validated()
    class Settings:
        strength: float = 1.0

    @register("mine")
    class Mine(PromptMethod):
        def build(self) -> None:
            self.strength = self.settings.strength

    Mine.Settings = Settings
    assert "mine" in list_methods("m*") and get_method_class("mine") is Mine and Mine.name == "mine"
    method = registry.create_method("mine", tiny_backbone, ["cat"], strength=2)
    assert method.strength == 2 and method.trainable_parameters() == [] and method.parameter_groups(0.1) == []


def test_a_name_is_given_once(clean_registry: None) -> None:
    with pytest.raises(ValueError, match="'coop' is taken by CoOp"):
        register("coop")(type("Other", (PromptMethod,), {}))
    assert register("coop")(get_method_class("coop")) is get_method_class("coop")
