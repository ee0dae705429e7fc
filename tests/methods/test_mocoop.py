"""MoCoOp: its degenerate forms, its router, its counts, and the switches of the official configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.cli.parse import parse_run
from vlprompt.errors import ConfigError
from vlprompt.prompts import template_layout

NAMES = ["golden_retriever", "jack-o'-lantern", "Boeing 737-200", "cat"]
ALL_NAMES = [*NAMES, "aeroplane", "sea_lake"]
PLAIN = {"text_loss_weight": 0.0, "gate_loss_weight": 0.0, "text_correction": False, "tune_layer_norms": False}
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("mocoop", 6, 64))


@pytest.fixture
def mocoop(tiny_backbone: Backbone) -> Any:
    def make(names: list[str] = NAMES, **own: Any) -> Any:
        torch.manual_seed(0)
        return create_method("mocoop", tiny_backbone, names, **own)

    return make


def losses(method: Any, images: Tensor, labels: Tensor = LABELS) -> dict[str, Tensor]:
    return method.losses(method.image_features(images), labels[: len(images)])


# -- degenerate forms -----------------------------------------------------------------------------------------------
def test_one_expert_alone_is_coop(mocoop: Any, tiny_backbone: Backbone, images: Tensor) -> None:
    one = mocoop(templates=["a photo of a {}."], groups=[1], top_k=1, **PLAIN)
    coop = create_method("coop", tiny_backbone, NAMES, context_init="a photo of a")
    moved = coop.prompt.ctx.detach() + 0.05 * torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    coop.load_trained_state({"prompt.ctx": moved})
    with torch.no_grad():
        one.experts.before[0].copy_(moved)
    # CoOp's prompt ends in a period and the expert's, trained on all classes, does not: compare the same prompts.
    layout = one.experts.layout(tiny_backbone.text, NAMES, period=True)
    assert torch.equal(layout.slots, coop.layout.slots)
    one.layout = layout
    torch.testing.assert_close(one(images), coop(images), rtol=1e-5, atol=1e-5)
    own = losses(one, images)
    assert list(own) == ["ce"]
    own["ce"].backward()
    coop.losses(coop.image_features(images), LABELS)["ce"].backward()
    torch.testing.assert_close(own["ce"], coop.losses(coop.image_features(images), LABELS)["ce"])
    torch.testing.assert_close(one.experts.before[0].grad, coop.prompt.ctx.grad, rtol=1e-4, atol=1e-6)
    assert one.gate.weight.grad is None or float(one.gate.weight.grad.abs().max()) < 1e-7


def test_one_expert_starts_as_zero_shot_without_the_period(
    mocoop: Any, tiny_backbone: Backbone, images: Tensor
) -> None:
    one = mocoop(templates=["a photo of a {}."], groups=[1], top_k=1)
    zero_shot = create_method("zeroshot", tiny_backbone, NAMES, templates=["a photo of a {}"])
    torch.testing.assert_close(one(images), zero_shot(images), rtol=1e-5, atol=1e-5)


def test_identical_experts_are_one_expert_whatever_the_router_says(mocoop: Any, images: Tensor) -> None:
    same = mocoop(templates=["a photo of a {}."] * 3, groups=[1, 1, 1])
    one = mocoop(templates=["a photo of a {}."], groups=[1], top_k=1)
    for seed in range(3):
        torch.manual_seed(seed)
        torch.nn.init.normal_(same.gate.weight, std=3)
        torch.testing.assert_close(same(images), one(images), rtol=1e-4, atol=1e-4)


def test_permuted_experts_leave_logits_and_losses_alone(mocoop: Any, images: Tensor) -> None:
    templates = ["a photo of a {}", "itap of {}", "{} texture", "a {} in a video game", "a good photo of the {}"]
    method = mocoop(templates=templates, groups=[1, 1, 1, 2])
    order = [3, 1, 0, 2]
    own = [[templates[0]], [templates[1]], [templates[2]], templates[3:]]
    other = mocoop(templates=[t for g in order for t in own[g]], groups=[len(own[g]) for g in order])
    with torch.no_grad():
        for at, g in enumerate(order):
            noise = 0.05 * torch.randn(method.experts.before[g].shape, generator=torch.Generator().manual_seed(g))
            method.experts.before[g].add_(noise)
            other.experts.before[at].copy_(method.experts.before[g])
            other.experts.after[at].copy_(method.experts.after[g])
        other.gate.weight.copy_(method.gate.weight[order])
        other.gate.bias.copy_(method.gate.bias[order])
        other.w.copy_(method.w.normal_(std=0.1))
    torch.testing.assert_close(other(images), method(images), rtol=1e-4, atol=1e-4)
    for name, term in losses(method, images).items():
        torch.testing.assert_close(losses(other, images)[name], term, rtol=1e-4, atol=1e-5)


def test_token_counted_experts_start_as_plain_clip_with_the_template(mocoop: Any, tiny_backbone: Backbone) -> None:
    templates = ["a photo of a  {}.", "{} texture.", "a {} in a video game.", "a close-up photo of the {}."]
    method = mocoop(templates=templates, groups=[1, 1, 1, 1], context_counting="tokens")
    words = [template.removesuffix(".") for template in templates]
    plain = F.normalize(tiny_backbone.text.encode(template_layout(tiny_backbone.text, NAMES, words)), dim=-1)
    torch.testing.assert_close(method.expert_text_features(), plain, rtol=1e-4, atol=1e-5)


def test_text_term_is_a_unit_diagonal_at_the_start_with_periods_on_both_sides(mocoop: Any) -> None:
    method = mocoop(
        templates=["a photo of a {}.", "{} texture.", "itap of a {}."],
        groups=[1, 1, 1],
        context_counting="tokens",
        tune_layer_norms=False,
    )
    method = create_method("mocoop", method.backbone, NAMES, all_class_names=ALL_NAMES, **method.settings_dict())
    cosines = method.expert_text_features(virtual=True) @ method.prototypes.transpose(1, 2)
    assert cosines.shape == (3, 6, 6)
    torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(3, 6), rtol=0, atol=1e-5)


# -- router -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gates_are_a_softmax_over_the_top_experts(mocoop: Any, images: Tensor, top_k: int) -> None:
    method = mocoop(top_k=top_k)
    unit = F.normalize(method.image_features(images), dim=-1)
    logits, gates = method.route(unit)
    torch.testing.assert_close(logits, unit @ method.gate.weight.t() + method.gate.bias)
    assert bool(((gates > 0).sum(dim=-1) == top_k).all())
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(len(images)))
    for row, gate in zip(logits.tolist(), gates.tolist(), strict=True):
        best = sorted(range(4), key=lambda g: -row[g])[:top_k]
        total = sum(math.exp(row[g]) for g in best)
        assert gate == pytest.approx([math.exp(row[g]) / total if g in best else 0.0 for g in range(4)], abs=1e-6)


def test_gates_bear_mixed_precision_on_a_gpu(mocoop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU's autocast has linear layers in half precision and softmax in single; a CPU's leaves softmax as it is.
    usual = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, *args, **more: usual(self.float(), *args, **more))
    method = mocoop()
    unit = F.normalize(torch.randn(2, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gates = method.route(unit)
    assert logits.dtype == gates.dtype == torch.bfloat16
    torch.testing.assert_close(gates.float().sum(dim=-1), torch.ones(2), rtol=0, atol=1e-2)


def test_logits_are_those_of_the_mixed_text_features(mocoop: Any, images: Tensor) -> None:
    method = mocoop()
    features = method.image_features(images)
    unit = F.normalize(features, dim=-1)
    gates, experts = method.route(unit)[1], method.expert_text_features()
    mixed = method.text_features(features).detach()
    expected = torch.stack([sum(gates[i, g] * experts[g] for g in range(4)) for i in range(len(images))])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    # Not normalised again: experts that disagree shrink the logits (moe.py 441).
    assert bool((mixed.norm(dim=-1) <= 1 + 1e-6).all()) and float(mixed.norm(dim=-1).min()) < 0.99999
    with pytest.warns(UserWarning, match="per image"):
        assert method.text_features().shape == (4, 64)


def test_the_class_loss_teaches_the_top_experts_and_the_gate_loss_all(mocoop: Any, images: Tensor) -> None:
    method = mocoop(tune_layer_norms=False)
    picked = method.route(F.normalize(method.image_features(images[:1]), dim=-1))[1][0] > 0
    for term, expected in (("ce", picked), ("gate", torch.ones(4, dtype=torch.bool))):
        method.zero_grad()
        losses(method, images[:1])[term].backward()
        assert torch.equal(method.gate.bias.grad != 0, expected)
        assert torch.equal((method.gate.weight.grad != 0).any(dim=-1), expected)
    assert int(picked.sum()) == 2


def test_gate_loss_pulls_towards_the_prototypes_of_the_label(mocoop: Any, images: Tensor) -> None:
    method = mocoop(tune_layer_norms=False)
    unit = F.normalize(method.image_features(images), dim=-1)
    affinity = torch.stack([method.prototypes[:, label] @ row for row, label in zip(unit, LABELS, strict=True)])
    boosted = affinity + 10 * F.one_hot(affinity.topk(2).indices, 4).sum(dim=1)
    expected = -(boosted.softmax(-1) * method.gate(unit).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses(method, images)["gate"], expected)


# -- prototypes, virtual classes, correction ------------------------------------------------------------------------
def test_prototypes_are_normalised_group_means_of_templates_with_a_period(mocoop: Any, tiny_backbone: Backbone) -> None:
    method = mocoop(templates=["a photo of a {}", "itap of a {}.", "{} texture."], groups=[1, 2], top_k=2)
    rows = []
    for group in (["a photo of a {}."], ["itap of a {}.", "{} texture."]):
        ids = [tiny_backbone.text.tokenizer([t.format(n.replace("_", " ")) for n in NAMES]) for t in group]
        each = [F.normalize(tiny_backbone.model.encode_text(i), dim=-1) for i in ids]
        rows.append(F.normalize(sum(each), dim=-1))
    torch.testing.assert_close(method.prototypes, torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert not method.prototypes.requires_grad
    assert "prototypes" not in " ".join(method.state_dict())


def test_virtual_classes_are_in_the_text_term_with_a_period_and_nowhere_else(mocoop: Any, images: Tensor) -> None:
    own = mocoop(tune_layer_norms=False)
    torch.manual_seed(0)
    virtual = create_method("mocoop", own.backbone, NAMES, all_class_names=ALL_NAMES, tune_layer_norms=False)
    assert torch.equal(virtual(images), own(images)) and virtual(images).shape == (6, 4)
    ours, theirs = losses(virtual, images), losses(own, images)
    assert torch.equal(ours["ce"], theirs["ce"]) and torch.allclose(ours["gate"], theirs["gate"])
    features = virtual.backbone.text.encode(
        virtual.experts.layout(virtual.backbone.text, ALL_NAMES, period=True), virtual.experts.vectors()
    )
    cosines = F.normalize(features + virtual.w, dim=-1) @ virtual.prototypes.transpose(1, 2)
    expected = -5 * cosines.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean()
    torch.testing.assert_close(ours["text"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(ours["text"], theirs["text"])


def test_correction_is_added_before_normalisation_and_shared(mocoop: Any) -> None:
    method = mocoop()
    assert method.w.shape == (1, 64) and not method.w.any()
    raw = method.backbone.text.encode(method.layout, method.experts.vectors())
    with torch.no_grad():
        method.w.normal_()
    torch.testing.assert_close(method.expert_text_features(), F.normalize(raw + method.w, dim=-1))
    assert mocoop(text_correction=False).w is None


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_text_temperature_scales_the_cosines(mocoop: Any, images: Tensor, temperature: float) -> None:
    method = mocoop(text_temperature=temperature)
    cosines = temperature * method.expert_text_features() @ method.prototypes.transpose(1, 2)
    expected = -5 * cosines.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean()
    torch.testing.assert_close(losses(method, images)["text"], expected, rtol=1e-4, atol=1e-5)


def test_weights_scale_their_terms_and_zero_leaves_them_out(mocoop: Any, images: Tensor) -> None:
    one, two = losses(mocoop(text_loss_weight=1.0), images), losses(mocoop(gate_loss_weight=3.0), images)
    assert float((two["text"] / one["text"]).detach()) == pytest.approx(5.0, rel=1e-5)
    assert float((two["gate"] / one["gate"]).detach()) == pytest.approx(3.0, rel=1e-5)
    assert list(losses(mocoop(text_loss_weight=0.0), images)) == ["ce", "gate"]
    assert list(losses(mocoop(gate_loss_weight=0.0), images)) == ["ce", "text"]


# -- switches ---------------------------------------------------------------------------------------------------------
def test_dropped_experts_have_zero_features_and_no_gradient(mocoop: Any, images: Tensor) -> None:
    method = mocoop(drop_unused_experts=True, tune_layer_norms=False)
    whole = mocoop(tune_layer_norms=False)
    picked = method.route(F.normalize(method.image_features(images[:1]), dim=-1))[1][0] > 0
    terms, kept = losses(method, images[:1]), losses(whole, images[:1])
    torch.testing.assert_close(terms["ce"], kept["ce"])
    cosines = method.expert_text_features() @ method.prototypes.transpose(1, 2)
    each = -cosines.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean(dim=-1)
    expected = 5 * torch.where(picked, each, torch.full((4,), math.log(4))).mean()  # zero features: all alike
    torch.testing.assert_close(terms["text"], expected, rtol=1e-4, atol=1e-5)
    (terms["ce"] + terms["text"]).backward()
    for g in range(4):
        assert bool(method.experts.before[g].grad.any()) == bool(picked[g])
    # Evaluation drops nothing: an image's logits do not depend on its batch.
    assert torch.equal(method.eval()(images), whole.eval()(images))


def test_tuned_layer_norms_are_the_methods_own(mocoop: Any, tiny_backbone: Backbone, images: Tensor) -> None:
    method, plain = mocoop(), mocoop(tune_layer_norms=False)
    assert method.needs.images and not plain.needs.images
    before = tiny_backbone.encode_image(images)
    torch.testing.assert_close(method.image_features(images), before, rtol=1e-5, atol=1e-5)
    groups = method.parameter_groups(0.5)
    assert [group["lr"] for group in groups] == [0.5, pytest.approx(0.05)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in method.norms.parameters()}
    assert len(plain.parameter_groups(0.5)) == 1 and plain.image_overrides() == {}
    with torch.no_grad():
        for value in method.norms.values:
            value.mul_(1.5)
    assert not torch.allclose(method.image_features(images), before)
    assert torch.equal(tiny_backbone.encode_image(images), before)
    assert torch.equal(plain.image_features(images), before)


def test_gate_loss_reaches_the_layer_norms(mocoop: Any, images: Tensor) -> None:
    method = mocoop()
    losses(method, images)["gate"].backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in method.norms.values)


def test_parameter_counts_are_the_published_formula(tiny_state_dict: Any, tiny_backbone: Backbone) -> None:
    # sum (b_g + a_g) W + (D + 1) G + D + layer norms; the gate of ImageNet's 20 experts has 10,260.
    wide = Backbone.from_state_dict(tiny_state_dict(embed_dim=512, text_width=512, text_layers=1))
    method = create_method("mocoop", wide, NAMES, **parse_run(["--config", "mocoop/imagenet"]).settings)
    counts: dict[str, int] = {}
    for name, parameter in method.trainable_parameters():
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + parameter.numel()
    contexts = sum(b + a for b, a in method.experts.lengths)
    assert counts == {"experts": contexts * 512, "gate": 10_260, "w": 512, "norms": 4 * 2 * 2 * 128}
    # The published 36,864 layer-norm values belong to 12 blocks of width 768.
    assert counts["norms"] * (12 * 768) // (4 * 128) == 36_864
    for data_set in ("demo", "caltech101", "food101"):
        settings = parse_run(["--config", f"mocoop/{data_set}"]).settings
        method = create_method("mocoop", tiny_backbone, NAMES, **settings)
        experts, contexts = len(method.settings.groups), sum(b + a for b, a in method.experts.lengths)
        norms = 2048 if method.settings.tune_layer_norms else 0
        total = contexts * 128 + 65 * experts + (64 if method.settings.text_correction else 0) + norms
        assert sum(p.numel() for _, p in method.trainable_parameters()) == total


@pytest.mark.parametrize(
    "own",
    [
        {"groups": [1, 1, 4]},
        {"groups": [8, 0]},
        {"groups": []},
        {"groups": [True] * 8},
        {"groups": [4.0, 4.0]},
        {"groups": 8},
        {"groups": None},
        {"templates": ["a photo"] * 8},
        {"templates": "a photo of a {}."},
        {"templates": []},
        {"templates": None},
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": "2"},
        {"top_k": 1.5},
        {"top_k": True},
        {"text_loss_weight": -1},
        {"text_loss_weight": float("nan")},
        {"gate_loss_weight": float("inf")},
        {"layer_norm_lr_factor": -0.1},
        {"text_temperature": "100"},
        {"text_temperature": None},
        {"text_correction": "no"},
        {"tune_layer_norms": 1},
        {"drop_unused_experts": None},
        {"context_counting": "word"},
        {"context_counting": 3},
        {"experts": 4},
    ],
    ids=repr,
)
def test_malformed_settings_are_config_errors(tiny_backbone: Backbone, own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_method("mocoop", tiny_backbone, NAMES, **own)
    assert next(iter(own)) in str(caught.value)
