"""Decompositions with every method that learns text prompts; all others refuse them with the reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt import Head, PromptModule, create_method, list_methods, load_head
from vlprompt.backbone import Backbone
from vlprompt.cli.parse import parse_run
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.engine.recipe import learning_rate
from vlprompt.errors import ConfigError, HeadError
from vlprompt.meta import adapted, differentiable, inner_rates, task_loss
from vlprompt.methods import PromptMethod
from vlprompt.methods.registry import get_method_class
from vlprompt.prompts import list_decompositions
from vlprompt.prompts.decomposed import decompositions_in
from vlprompt.runs import folder
from vlprompt.runs.folder import config_sha256
from vlprompt.runs.session import Session

NAMES = ["cat", "annual crop land", "aeroplane", "sea_lake"]
LABELS = torch.tensor([0, 1, 2, 3])
#: Methods that learn no text prompts in training, with a word of the reason.
REFUSED = {
    **dict.fromkeys(("zeroshot", "vpt", "visual_prompt", "clip_adapter", "ramt"), "learns no text prompts in training"),
    **dict.fromkeys(("clip_lora", "apt_approximated"), "its prompts are hand-written"),
    **{
        name: str(get_method_class(name).no_objectives)
        for name in list_methods()
        if get_method_class(name).no_objectives
    },
}
TEXT = [name for name in list_methods() if name not in REFUSED]


def every_pair(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check with each method that learns text prompts, by turns with each decomposition."""
    pairs = list(itertools.product(TEXT, list_decompositions()))
    return pytest.mark.covering(rows="name")(pytest.mark.parametrize(("name", "kind"), pairs)(check))


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("decompositions", 4, 64))


def make(backbone: Backbone, name: str, kind: str | None = None, **more: Any) -> PromptMethod:
    torch.manual_seed(0)
    return create_method(name, backbone, NAMES, decomposition={kind: {}} if kind else None, **more)


def train(method: PromptMethod, images: Tensor, count: int = 2) -> PromptMethod:
    optimizer = torch.optim.SGD(method.parameter_groups(0.1), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        torch.stack(list(method.losses(images, LABELS).values())).sum().backward()
        assert all(p.grad is not None for _, p in method.trainable_parameters())
        torch.nn.utils.clip_grad_norm_([p for _, p in method.trainable_parameters()], 1.0)
        optimizer.step()
    return method


# -- every method -----------------------------------------------------------------------------------------------------
@every_pair
def test_every_text_prompt_starts_as_its_host_and_trains_from_there(
    name: str, kind: str, tiny_backbone: Backbone, images: Tensor
) -> None:
    method = make(tiny_backbone, name, kind)
    assert type(method.decomposition).name == kind  # type: ignore[union-attr]
    if not decompositions_in(type(method.settings)):
        host = make(tiny_backbone, name)
        assert torch.equal(method(images), host(images))  # the host's learnables are drawn as without it
        apart = {key for key, _ in method.trainable_parameters()} - {key for key, _ in host.trainable_parameters()}
        assert apart and all(key.startswith("decomposition.") for key in apart)
        assert [key for key, _ in method.prompt_tensors()] == [key for key, _ in host.prompt_tensors()]
    before = method(images).detach()
    with torch.no_grad():
        method.decomposition.B.normal_(std=0.1)  # type: ignore[union-attr]
    # Scores hang on it: what this method learns goes through encode_text.
    assert not torch.allclose(method(images), before, rtol=1e-3, atol=1e-3)
    state = train(method, images).trained_state()
    again = train(make(tiny_backbone, name, kind), images, 1)
    again.load_trained_state(state)
    assert torch.equal(again(images), method(images))


@every_pair
def test_a_head_keeps_it_and_takes_other_classes(
    name: str, kind: str, tiny_backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    method = train(create_method(name, tiny_backbone, NAMES, decomposition={kind: {"rank": 3}}), images).eval()
    place = Head(method).save_pretrained(tmp_path / "head")
    config = json.loads((place / "config.json").read_text())
    recorded = config["settings"] if name == kind else config["decomposition"]  # a method's own is one of its settings
    assert recorded[kind]["rank"] == 3
    head = load_head(place, tiny_backbone)
    with torch.no_grad():
        logits = method(images)
        assert torch.equal(head(images), logits)
        other = head.with_classes(["sea_lake", "cat"])
        torch.testing.assert_close(other(images), logits[:, [3, 0]], rtol=1e-4, atol=1e-4)
    assert head.method.decomposition.settings.rank == 3  # type: ignore[union-attr]


def test_heads_of_before_have_none(tiny_backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    place = Head(make(tiny_backbone, "coop")).save_pretrained(tmp_path / "head")
    config = json.loads((place / "config.json").read_text())
    assert config.pop("decomposition") == {}
    (place / "config.json").write_text(json.dumps(config))
    assert load_head(place, tiny_backbone).method.decomposition is None
    config["decomposition"] = ["dept_lowrank"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="decomposition is .*; accepted: a table"):
        load_head(place, tiny_backbone)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_without_text_prompts_refuse_with_the_reason(name: str, tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=f"decomposition 'dept_lowrank' cannot go with method '{name}'") as caught:
        make(tiny_backbone, name, "dept_lowrank")
    assert REFUSED[name] in str(caught.value)


def test_it_stands_beside_objectives(tiny_backbone: Backbone, images: Tensor) -> None:
    both = {"self_regularisation": {}, "aggregation": {"mean": 1.0}}
    method = make(tiny_backbone, "maple", "dept_lowrank", depth=2, objectives=both)
    assert set(method.losses(images, LABELS)) == {"ce", "scl_text", "scl_image", "scl_logits"}
    train(method, images)
    kept = method.trained_state()
    method.epoch_end(0, 2)
    method.epoch_end(1, 2)
    method.train_end()
    averaged = method.trained_state()
    # Both epochs ended alike, so their average is what they were; the pair is averaged with the rest.
    torch.testing.assert_close(averaged["decomposition.B"], kept["decomposition.B"])
    assert bool(kept["decomposition.B"].any())


def test_a_decomposition_of_the_configuration_takes_the_place_of_the_methods_own(tiny_backbone: Backbone) -> None:
    assert type(make(tiny_backbone, "dept_lowrank").decomposition).name == "dept_lowrank"  # type: ignore[union-attr]
    assert type(make(tiny_backbone, "dept_lowrank", "ept").decomposition).name == "ept"  # type: ignore[union-attr]


def test_dept_is_coop_with_the_decomposition(tiny_backbone: Backbone, images: Tensor) -> None:
    own = make(tiny_backbone, "dept_lowrank")
    composed = make(tiny_backbone, "coop", "dept_lowrank", context_init="a photo of a")
    assert torch.equal(train(own, images)(images), train(composed, images)(images))


# -- rates ------------------------------------------------------------------------------------------------------------
def test_two_rates_follow_one_schedule(tiny_backbone: Backbone) -> None:
    """2e-3 for the prompt and 2e-4 for the pair, each with its own warm-up and cosine."""
    method, recipe = make(tiny_backbone, "dept_lowrank"), RecipeConfig(epochs=4, lr=2e-3)
    made = PromptModule(method, recipe).configure_optimizers()
    groups, schedule = made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([2e-3, 2e-4])
    assert [len(group["params"]) for group in groups] == [1, 2]
    for epoch in range(4):
        wanted = [learning_rate(epoch, lr, recipe) for lr in (2e-3, 2e-4)]
        assert [group["lr"] for group in groups] == pytest.approx(wanted)
        made["optimizer"].step()
        schedule.step()


def test_rates_are_separate_from_those_of_layer_norms(tiny_backbone: Backbone) -> None:
    method = create_method(
        "mocoop", tiny_backbone, NAMES, layer_norm_lr_factor=0.5, decomposition={"dept_lowrank": {"lr_ratio": 0.01}}
    )
    groups = method.parameter_groups(1.0)
    assert [group["lr"] for group in groups] == [1.0, 0.5, 0.01]
    assert [id(p) for p in groups[2]["params"]] == [id(p) for p in method.decomposition.parameters()]  # type: ignore[union-attr]
    assert sum(len(group["params"]) for group in groups) == len(method.trainable_parameters())


# -- learning across tasks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["first", "second"])
def test_inner_steps_reach_the_decomposition_at_its_own_rate(
    order: Any, tiny_backbone: Backbone, images: Tensor
) -> None:
    method, seen = make(tiny_backbone, "coop", "ept", context_length=2), []

    def regulate(name: str, gradient: Tensor) -> Tensor:
        seen.append(name)
        return gradient

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return task_loss(method, tensors, images, LABELS, "infonce")

    rates = inner_rates(method, 0.1)
    assert rates["prompt.ctx"] == pytest.approx(0.1) and rates["decomposition.B"] == pytest.approx(0.01)
    with differentiable(order):
        moved = adapted(loss, dict(method.trainable_parameters()), rates, order=order, regulate=regulate)
        query = loss(moved)
    assert not torch.equal(moved["decomposition.B"], method.decomposition.B)  # type: ignore[union-attr]
    query.backward()
    assert all(parameter.grad is not None for _, parameter in method.trainable_parameters())
    assert "decomposition.B" in seen  # a regulator leaves it as it is: it is no prompt
    assert [name for name, _ in method.prompt_tensors()] == ["prompt.ctx"]


# -- configurations ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({"detp": {}}, "there is no decomposition 'detp'. Did you mean 'ept'"),
        ({"dept_lowrank": {}, "ept": {}}, "names 'dept_lowrank', 'ept'; accepted: one of them, or none"),
        ({"dept_lowrank": {"rnak": 1}}, "dept_lowrank.rnak'. Did you mean 'decomposition.dept_lowrank.rank'"),
        ({"dept_lowrank": {"rank": 2.5}}, "decomposition.dept_lowrank.rank is 2.5; accepted: a whole number"),
        ({"dept_lowrank": {"rank": 0}}, "decomposition.dept_lowrank.rank is 0; accepted: a whole number of 1 or more"),
        ({"dept_lowrank": {"lr_ratio": -1.0}}, "decomposition.dept_lowrank.lr_ratio is -1.0; accepted: a finite"),
        ({"dept_lowrank": {"reach": "names"}}, "decomposition.dept_lowrank.reach is 'names'; accepted: 'name'"),
        ({"ept": {"spaces": 0}}, "decomposition.ept.spaces is 0; accepted: a whole number of 1 or more"),
        ({"dept_lowrank": 3}, "decomposition.dept_lowrank is 3; accepted: its settings"),
        (["dept_lowrank"], "decomposition is .'dept_lowrank'.; accepted: a name with its settings"),
    ],
)
def test_wrong_decompositions(wanted: Any, match: str, tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=match):
        create_method("coop", tiny_backbone, NAMES, decomposition=wanted)


def test_all_that_is_wrong_on_a_command_line_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("method: coop\ndecomposition: {dept_lowrank: {rnk: 3, rank: 0}}\n")
    with pytest.raises(ConfigError) as caught:
        parse_run(["--config", str(tmp_path / "own.yaml"), "--decomposition.detp", "{}", "--decomposition.ept", "{}"])
    for words in ("no decomposition 'detp'", "dept_lowrank.rnk'", "rank is 0; accepted", "dept_lowrank and ept"):
        assert words in str(caught.value)


def test_a_single_setting_of_the_command_line_wins_over_the_files_table(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    text = "decomposition: {dept_lowrank: {rank: 3, alpha: 4}}\nobjectives: {knowledge: {weight: 4}}\nmethod: coop\n"
    path.write_text(text)
    words = ["--decomposition.dept_lowrank.rank", "5", "--objectives.knowledge.weight", "2"]
    for argv in (["--config", str(path), *words], [*words, "--config", str(path)]):
        config = parse_run(argv)
        decomposition, objective = config.decomposition["dept_lowrank"], config.objectives["knowledge"]
        assert (decomposition["rank"], decomposition["alpha"], objective["weight"]) == (5, 4.0, 2.0)


def test_runs_without_one_keep_their_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, decomposed = RunConfig(), RunConfig(decomposition={"dept_lowrank": {"rank": 3}})
    default = RunConfig(decomposition={"dept_lowrank": {}})
    assert config_sha256(plain) != config_sha256(decomposed) != config_sha256(default)
    hashed: list[dict[str, Any]] = []
    monkeypatch.setattr(folder, "sha256_json", hashed.append)
    config_sha256(plain)
    assert "decomposition" not in hashed[0]  # as before there were decompositions


def test_the_worked_example_is_maple_with_promptsrcs_terms_and_depts_update() -> None:

    config = parse_run(["--config", "maple/demo", "--config", "compositions/promptsrc_dept", "--data.shots", "1"])
    method = Session(config).method
    assert method.name == "maple" and [one.name for one in method.active] == ["self_regularisation", "aggregation"]
    assert method.decomposition.settings.lr_ratio == 0.1  # type: ignore[union-attr]
    terms = method.losses(torch.zeros(2, 3, 64, 64), torch.tensor([0, 1]))
    assert set(terms) == {"ce", "scl_text", "scl_image", "scl_logits"}
