"""DePT and EPT against their equations, written out position by position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone, shapes_only
from vlprompt.methods import PromptMethod
from vlprompt.prompts import Decomposition, list_decompositions

NAMES = ["golden_retriever", "cat", "Boeing 737-200", "annual crop land"]
LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("decomposed", 4, 64))


def make(backbone: Backbone, name: str, *, trained: bool = True, **more: Any) -> PromptMethod:
    """Return a method; ``trained`` draws everything that starts at zero, so that every part matters."""
    torch.manual_seed(0)
    method = create_method(name, backbone, NAMES, **more)
    if trained:
        with torch.no_grad():
            for parameter in own(method).parameters():
                if not bool(parameter.any()):
                    parameter.normal_(std=0.3)
    return method


def own(method: PromptMethod) -> Any:
    assert isinstance(method.decomposition, Decomposition)
    return method.decomposition


# -- the equations, in loops ------------------------------------------------------------------------------------------
def by_hand(backbone: Backbone, context: Tensor, update: Tensor, reach: str) -> Tensor:
    """Return unit features ``[C, D]`` of ``[SOS; ctx; name + dE; period; EOT; padding]``, all of 77 tokens."""
    model, tokenizer, rows = backbone.model, backbone.text.tokenizer, []
    for name in NAMES:
        placeholder = " ".join(["X"] * len(context))
        ids = tokenizer([f"{placeholder} {name.replace('_', ' ')}."])[0]
        x = model.token_embedding(ids).clone()
        end, first = int(ids.argmax()), 1 + len(context)
        count = len(tokenizer.encode(name.replace("_", " ")))
        for m in range(len(context)):
            x[1 + m] = context[m]
        for position in range(77):
            name_token = first <= position < first + count
            behind = first + count <= position < end and reach != "name"
            if name_token or behind or (position == end and reach == "end-of-text"):
                x[position] = x[position] + update[position - first]
        x = (x + model.positional_embedding)[None]
        for block in model.transformer.resblocks:
            x = block(x, attn_mask=model.attn_mask)
        rows.append(F.normalize(model.ln_final(x)[0, end] @ model.text_projection, dim=-1))
    return torch.stack(rows)


def low_rank(decomposition: Any) -> Tensor:
    """Return alpha / sqrt(r) (AB), entry by entry."""
    a, b, settings = decomposition.A, decomposition.B, decomposition.settings
    rows = [sum(a[j, k] * b[k] for k in range(settings.rank)) for j in range(len(a))]
    return settings.alpha / math.sqrt(settings.rank) * torch.stack(rows)  # type: ignore[arg-type]


def absorbed(p: Any, context: Tensor, update: Tensor) -> Tensor:
    """Return EPT's context: every vector attends to every row, then every subspace adds its gated share."""
    wq, wk, wv = p.query_in @ p.query_out, p.key_in @ p.key_out, p.value_in @ p.value_out
    fused = []
    for vector in context:
        scores = torch.stack([(vector @ wq) @ (row @ wk) / math.sqrt(len(vector)) for row in update])
        taken = sum(w * (row @ wv) for w, row in zip(scores.softmax(0), update, strict=True))
        fused.append(vector + taken)
    gates = torch.stack([row @ (sum(fused) / len(fused)) for row in p.gate]).softmax(0)
    out = []
    for vector in fused:
        shares = [g * (u @ (v @ vector).clamp(min=0)) for g, u, v in zip(gates, p.U, p.V, strict=True)]
        out.append(vector + sum(shares))
    return torch.stack(out)


@pytest.mark.parametrize("reach", ["name", "suffix", "end-of-text"])
@pytest.mark.parametrize("name", ["dept_lowrank", "ept"])
def test_features_and_gradients_are_those_of_the_equations(name: str, reach: str, tiny_backbone: Backbone) -> None:
    method = make(tiny_backbone, name, decomposition={name: {"reach": reach, "rank": 3}})
    context, part = method.get_parameter("prompt.ctx"), own(method)
    found = method.text_features()
    update = low_rank(part)
    changed = absorbed(part, context, update) if name == "ept" else context
    expected = by_hand(tiny_backbone, changed, update, reach)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    learnables = [parameter for _, parameter in method.trainable_parameters()]
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((one * cotangent).sum(), learnables) for one in (found, expected)]
    for (key, _), ours, theirs in zip(method.trainable_parameters(), *gradients, strict=True):
        assert bool(theirs.any()), key
        assert float((ours - theirs).abs().max()) <= 1e-3 * float(theirs.abs().max()), key


def test_what_follows_end_of_text_changes_nothing(tiny_backbone: Backbone) -> None:
    """Rows of the update that no name reaches have no effect, and so no gradient."""
    method = make(tiny_backbone, "dept_lowrank", decomposition={"dept_lowrank": {"reach": "end-of-text"}})
    before = method.text_features().detach()
    longest = max(len(tiny_backbone.text.tokens(name.replace("_", " "))) - 2 for name in NAMES)
    reached = longest + 2  # the period and end-of-text
    with torch.no_grad():
        own(method).A[reached:] = 1e3
    assert torch.equal(method.text_features().detach(), before)
    method.text_features().sum().backward()
    assert not bool(own(method).A.grad[reached:].any()) and bool(own(method).A.grad[:reached].any(dim=1).all())


# -- the start --------------------------------------------------------------------------------------------------------
def test_the_budget_is_the_papers() -> None:
    """l d = m d + (L + d) r: 16 vectors of CoOp against 4 and rank 10, on ViT-B/16 (arXiv 2309.05173)."""
    method = create_method("dept_lowrank", shapes_only("ViT-B-16"), ["cat"])
    counts = {name: parameter.numel() for name, parameter in method.trainable_parameters()}
    assert counts == {"prompt.ctx": 2_048, "decomposition.A": 770, "decomposition.B": 5_120}
    assert sum(counts.values()) == 7_938 <= 16 * 512 and (16 - 4) * 512 // (77 + 512) == 10
    method = create_method("ept", shapes_only("ViT-B-16"), ["cat"])
    assert (
        sum(parameter.numel() for _, parameter in method.trainable_parameters())
        == 7_938 + 6 * 512 * 8 + 3 * (2 * 32 + 1) * 512
    )


@pytest.mark.parametrize("name", ["dept_lowrank", "ept"])
def test_the_first_step_moves_b_and_not_a(name: str, tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, name, trained=False)
    part = own(method)
    assert not bool(part.B.any()) and float(part.A.detach().abs().max()) <= part.settings.rank**-0.5
    assert float(part.A.detach().std()) == pytest.approx(part.settings.rank**-0.5 / 3**0.5, rel=0.1)
    method.losses(images, LABELS)["ce"].backward()
    assert not bool(part.A.grad.any()) and bool(part.B.grad.any())


def test_epts_start_is_depts(tiny_backbone: Backbone, images: Tensor) -> None:
    """With the value map and the subspaces at zero, whatever A and B are (11.2)."""
    dept, ept = make(tiny_backbone, "dept_lowrank"), make(tiny_backbone, "ept", trained=False)
    with torch.no_grad():
        own(ept).A.copy_(own(dept).A)
        own(ept).B.copy_(own(dept).B)
    assert torch.equal(ept.get_parameter("prompt.ctx"), dept.get_parameter("prompt.ctx"))
    torch.testing.assert_close(ept(images), dept(images), rtol=1e-6, atol=1e-6)


# -- EPT's parts ------------------------------------------------------------------------------------------------------
def test_the_folded_context_gives_the_same_logits_without_the_modules(tiny_backbone: Backbone, images: Tensor) -> None:
    ept, dept = make(tiny_backbone, "ept"), make(tiny_backbone, "dept_lowrank")
    part, context = own(ept), ept.get_parameter("prompt.ctx")
    with torch.no_grad():
        folded = part.context(context, part.update(), torch.ones(1, 4, dtype=torch.bool))[0]
        assert float((folded - context).abs().max()) > 1e-2
    state = {"prompt.ctx": folded, "decomposition.A": part.A.detach(), "decomposition.B": part.B.detach()}
    dept.load_trained_state(state)
    torch.testing.assert_close(dept(images), ept(images), rtol=1e-5, atol=1e-5)


def test_folding_happens_once_in_an_evaluation(
    tiny_backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, counts = make(tiny_backbone, "ept").eval(), {"update": 0, "context": 0}
    for what in counts:
        whole = getattr(type(own(method)), what)

        def counted(self: Any, *values: Any, what: str = what, whole: Any = whole) -> Tensor:
            counts[what] += 1
            found: Tensor = whole(self, *values)
            return found

        monkeypatch.setattr(type(own(method)), what, counted)
    with torch.no_grad():
        logits = [method(images) for _ in range(3)]
        assert counts == {"update": 1, "context": 1} and torch.equal(logits[0], logits[2])
        own(method).B.add_(1.0)
        assert not torch.allclose(method(images), logits[0]) and counts["context"] == 2


def test_gates_add_up_to_one_and_a_single_gate_is_one(tiny_backbone: Backbone) -> None:
    used = torch.tensor([[True, True, False]])
    contexts = torch.randn(5, 3, tiny_backbone.text.width, generator=torch.Generator().manual_seed(2))
    part = own(make(tiny_backbone, "ept"))
    gates = part.gates(contexts, used)
    assert gates.shape == (5, 3)
    torch.testing.assert_close(gates.sum(-1), torch.ones(5))
    assert float(gates.detach().std()) > 1e-3
    # Filling, as a mixture of prompts of unequal length has it, plays no part.
    filled = torch.cat([contexts[:, :2], 9 * contexts[:, 2:]], dim=1)
    torch.testing.assert_close(part.gates(filled, used), gates)
    assert not torch.allclose(part.gates(filled, torch.ones_like(used)), gates)
    single = own(make(tiny_backbone, "ept", decomposition={"ept": {"spaces": 1}}))
    assert torch.equal(single.gates(contexts, used), torch.ones(5, 1))


def test_subspaces_have_no_order(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "ept")
    before, order = method(images).detach(), [2, 0, 1]
    with torch.no_grad():
        for part in ("U", "V", "gate"):
            getattr(own(method), part).copy_(getattr(own(method), part)[order].clone())
    torch.testing.assert_close(method(images), before)
    with torch.no_grad():
        own(method).gate.copy_(own(method).gate[order].clone())
    assert not torch.allclose(method(images), before, rtol=1e-6, atol=1e-6)


def test_experts_of_unequal_length_are_each_treated_alone(tiny_backbone: Backbone) -> None:
    """MoCoOp's vectors are filled up with zeros; an expert beside longer ones is what it is alone."""
    words = {"text_loss_weight": 0.0, "gate_loss_weight": 0.0, "top_k": 1, "decomposition": {"ept": {}}}
    templates = ["a low resolution photo of the {}.", "a {}."]
    both = make(tiny_backbone, "mocoop", templates=templates, groups=[1, 1], **words)
    alone = make(tiny_backbone, "mocoop", templates=templates[1:], groups=[1], **words)
    for (key, value), (_, other) in zip(own(both).named_parameters(), own(alone).named_parameters(), strict=True):
        with torch.no_grad():
            other.copy_(value)
        assert key
    torch.testing.assert_close(
        both.expert_text_features()[1],
        alone.expert_text_features()[0],
        rtol=1e-5,
        atol=1e-5,  # type: ignore[operator]
    )


def test_both_are_enrolled() -> None:
    assert {"dept_lowrank", "ept"} <= set(list_decompositions())
