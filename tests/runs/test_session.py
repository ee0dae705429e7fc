"""A session makes each thing once: what is read, loaded and built by a run, counted on the functions themselves."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt
from vlprompt.config.run import BackboneConfig, RunConfig
from vlprompt.data import FewShotData
from vlprompt.datasets import load_dataset, task
from vlprompt.errors import BackboneError, ConfigError
from vlprompt.protocols.base_to_new import base_to_new
from vlprompt.protocols.search import search
from vlprompt.runs import session as sessions
from vlprompt.runs.run import run, run_session
from vlprompt.runs.session import Session

Tiny = Callable[..., RunConfig]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often data sets are read, backbones loaded, methods and data modules made."""
    count: Counter[str] = Counter()

    def spy(module: Any, name: str, called: str) -> None:
        usual = getattr(module, name)

        @functools.wraps(usual)
        def counted(*args: Any, **values: Any) -> Any:
            count[called] += 1
            return usual(*args, **values)

        monkeypatch.setattr(module, name, counted)

    spy(task, "read_dataset", "data sets")
    spy(sessions, "load_backbone", "backbones")
    spy(sessions, "create_method", "methods")
    spy(FewShotData, "__init__", "data modules")
    return count


# -- each thing once ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "values", "modules"),
    [
        ("coop", {"classes": "all"}, 1),  # training, test and zero-shot
        ("coop", {"classes": "base"}, 2),  # the same, and the new classes
        ("vpt", {"classes": "base"}, 4),  # images for the method, features for zero-shot
        ("tip_adapter", {"classes": "base"}, 2),
    ],
)
def test_a_run_makes_each_thing_once(
    method: str, values: dict[str, Any], modules: int, tiny: Tiny, made: Counter[str]
) -> None:
    run(tiny(method, **values))
    assert made == {"data sets": 1, "backbones": 1, "methods": 2, "data modules": modules}


def test_domains_share_one_reading(tiny: Tiny, toy_sets: Path, made: Counter[str]) -> None:
    config = tiny("coop").with_data(name="toy-styles", root=str(toy_sets), source=["a"], target=["b", "c"])
    done = run(config)
    assert set(done.results["results"]["domains"]) == {"b", "c"}
    assert made["data sets"] == made["backbones"] == 1
    assert made["data modules"] == 3  # training, and the two domains


def test_a_finished_run_reads_and_loads_once(tiny: Tiny, made: Counter[str]) -> None:
    config = tiny("coop", classes="base")
    run(config)
    made.clear()
    assert run(config).reused
    assert made == {"data sets": 1, "backbones": 1, "methods": 1}


def test_parts_are_made_when_they_are_asked_for(tiny: Tiny, made: Counter[str]) -> None:
    session = Session(tiny("coop", classes="base"))
    assert not made
    assert session.drawn is session.drawn and made == {"data sets": 1}
    assert session.counterpart.classes == "new" and made == {"data sets": 1}
    assert session.method is session.method and session.backbone is session.method.backbone
    assert session.data(session.method, session.task) is session.data(session.zero_shot, session.task)
    assert made == {"data sets": 1, "backbones": 1, "methods": 2, "data modules": 1}


def test_the_counterpart_is_what_loading_it_gives(tiny: Tiny) -> None:
    session = Session(tiny("coop", classes="base", shots=1))
    other = load_dataset("folder", root=session.config.data.root, shots=1, classes="new", source=(), target=())
    assert session.counterpart == other and other.counterpart() == session.drawn


def test_a_regulator_s_file_is_read_once(tiny: Tiny, made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprompt.meta import Regulator, RegulatorSettings

    config = tiny("coop", init_from="gram:somewhere")
    plain = Session(tiny("coop")).method
    shapes = {name: tuple(prompt.shape) for name, prompt in plain.prompt_tensors()}
    monkeypatch.setattr(Session, "_initial_tensors", lambda *_: plain.trained_state())
    made.clear()
    reads: list[str] = []

    def load(folder: str, method: Any) -> Regulator:
        reads.append(folder)
        return Regulator(shapes, method.backbone.embed_dim, RegulatorSettings()).requires_grad_(False)

    monkeypatch.setattr(sessions, "load_regulator", load)
    run(config)
    assert reads == ["somewhere"] and made["data modules"] == 1  # the task's feature comes from the run's own module


def test_pictures_of_training_are_released_after_it(tiny: Tiny) -> None:
    session = Session(tiny("vpt", transform="random"))
    run_session(session)
    (module,) = [data for served, data in session._modules if not data.encode]
    assert "train" not in module._caches


# -- several sessions -----------------------------------------------------------------------------------------------
def test_runs_of_a_protocol_share_the_backbone(tiny: Tiny, made: Counter[str]) -> None:
    base_to_new([tiny("coop"), tiny("zeroshot")], (1, 2))
    assert made["backbones"] == 1


def test_a_search_reads_and_loads_once(tiny: Tiny, toy_sets: Path, made: Counter[str]) -> None:
    config = tiny("coop").with_data(name="toy-plain", root=str(toy_sets))
    search(config, {"recipe.epochs": [1, 2]})
    assert made["data sets"] == made["backbones"] == 1


def test_another_backbone_or_draw_is_not_taken_over(tiny: Tiny) -> None:
    first = Session(tiny("coop"))
    first.load()
    same = Session(tiny("kgcoop"), after=first)
    assert same.backbone is first.backbone and same.drawn is first.drawn
    other = Session(replace(tiny("coop", seed=2), backbone=BackboneConfig("demo-rn", None)), after=first)
    assert other.backbone is not first.backbone and other.drawn is not first.drawn


# -- given objects --------------------------------------------------------------------------------------------------
def test_a_session_of_given_objects_is_that_of_its_configuration(tiny: Tiny) -> None:
    config = tiny("coop", classes="base", seed=3)
    loaded = Session(config)
    method = vlprompt.create_method(
        "coop", vlprompt.load_backbone("demo"), loaded.drawn.class_names, context_init="an emoji of a"
    )
    recipe = {"epochs": 2, "batch_size": 4}
    given = Session.given(
        method, loaded.drawn, recipe=recipe, transform="center", trainer=config.trainer, seed=3, output=config.output
    )
    assert given.method is method and given.backbone is method.backbone and given.task is loaded.drawn
    again = Session(given.config)
    assert again.task.shots_sha256 == loaded.task.shots_sha256 and again.folder == given.folder
    torch.testing.assert_close(again.method.trained_state(), method.trained_state(), rtol=0, atol=0)


def test_what_is_missing_is_told_together(tiny: Tiny, tmp_path: Path) -> None:
    config = replace(tiny("coop"), backbone=BackboneConfig("ViT-B-16", str(tmp_path / "no.pt")))
    with pytest.raises(ConfigError, match=r"(?s)two things are missing.*1\. .*folder.*2\. .*no\.pt"):
        Session(config.with_data(root=str(tmp_path / "no"))).load()
    with pytest.raises(BackboneError, match="no.pt"):
        Session(config).load()
