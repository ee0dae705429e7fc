"""Low-rank updates, masks, their bits, and draws, each against its formula."""

from __future__ import annotations

import pytest
import torch

from vlprompt.backbone import Backbone
from vlprompt.errors import HeadError
from vlprompt.prompts import Draws, LowRank, Masks
from vlprompt.prompts.inside import masked, pack, unpack

WIDTH = 12
CPU = torch.device("cpu")


def low_rank(dropout: float = 0.5) -> LowRank:
    torch.manual_seed(0)
    own = LowRank(2, 0.7071, dropout)
    own.add("visual.", WIDTH, [0, 3], ["q", "v", "o"])
    return own


def test_updates_are_named_and_start_as_published() -> None:
    own = low_rank()
    names = [name for name, _ in own.named_parameters()]
    assert names[:2] == [f"model.visual.transformer.resblocks.0.attn.q_proj.lora_{part}.weight" for part in "AB"]
    assert len(names) == 2 * 2 * 3 and "model.visual.transformer.resblocks.3.attn.out_proj.lora_B.weight" in names
    for name, value in own.named_parameters():
        if "lora_A" in name:  # uniform within 1 / sqrt(W), up to the ends
            assert value.shape == (2, WIDTH) and 0.6 * WIDTH**-0.5 < float(value.abs().max()) <= WIDTH**-0.5
        else:
            assert value.shape == (WIDTH, 2) and float(value.abs().max()) == 0
    assert own.added("").projections == {} and set(own.added("visual.").projections) == {
        (layer, part) for layer in (0, 3) for part in "qvo"
    }


def test_an_update_is_the_product_and_drops_in_training_steps_only() -> None:
    own, x = low_rank(), torch.randn(5, WIDTH)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter)
    a, b = (own.get_parameter(f"model.visual.transformer.resblocks.3.attn.v_proj.lora_{part}.weight") for part in "AB")
    update = own.added("visual.").projections[3, "v"]
    torch.testing.assert_close(update(x), 0.7071 * x @ (b @ a).t())
    with own.dropping(CPU):
        projections = own.added("visual.").projections
        ones = torch.ones(4000, WIDTH)
        q, v = projections[3, "q"], projections[3, "v"]
        assert not torch.equal(v(ones), v(ones)), "every call draws"
        mean = v(ones).mean(dim=0)
        assert not torch.equal(q(ones) == 0, v(ones) == 0)
    # What is kept is scaled up, so that the mean stays.
    torch.testing.assert_close(mean, update(ones[:1])[0], rtol=0.15, atol=0.3)
    assert torch.equal(update(x), own.added("visual.").projections[3, "v"](x))


def test_merged_weights_do_what_updates_do(tiny_backbone: Backbone) -> None:
    torch.manual_seed(0)
    own = LowRank(3, 0.5, 0.0)
    own.add("visual.", tiny_backbone.image.width, [1, 3], ["k", "v", "o"])
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, 64, 64)
    merged = own.merged("visual.", tiny_backbone.image.parameters())
    assert sorted(merged) == [
        f"transformer.resblocks.{layer}.attn.{name}"
        for layer in (1, 3)
        for name in ("in_proj_weight", "out_proj.weight")
    ]
    added = tiny_backbone.encode_image(images, added=own.added("visual."))
    torch.testing.assert_close(tiny_backbone.encode_image(images, overrides=merged), added, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_backbone.encode_image(images), added, atol=1e-3)


def test_the_gradient_goes_straight_through_the_threshold() -> None:
    torch.manual_seed(0)
    weight, scores = torch.randn(4, 6), (torch.rand(4, 6) * 0.01).requires_grad_()
    scores.data[0, 0] = 0.005  # at the threshold: masked out
    used = masked(weight, scores, 0.005)
    assert float(used.detach()[0, 0]) == 0 and torch.equal(used.detach(), weight * (scores.detach() > 0.005))
    pull = torch.randn(4, 6)
    used.backward(pull)
    assert torch.equal(scores.grad, pull * weight)  # type: ignore[arg-type]


def test_masks_change_only_where_scores_cross_the_threshold() -> None:
    weights = {"a.weight": torch.randn(30, 30)}
    masks = Masks(0.01, 0.005)
    masks.add("visual.", weights)
    (scores,) = masks.parameters()
    optimizer = torch.optim.Adam([scores], lr=8e-5)
    pull = torch.randn(30, 30)
    for step in range(70):
        used = masks.overrides("visual.", weights)["a.weight"]
        if step < 62:  # 0.005 / 8e-5 = 62.5 steps of full length
            assert torch.equal(used.detach(), weights["a.weight"])
        optimizer.zero_grad()
        (used * pull).sum().backward()
        optimizer.step()
    gone = masks.overrides("visual.", weights)["a.weight"] == 0
    assert torch.equal(gone, weights["a.weight"] * pull > 0)


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 3), (5, 2, 7)])
def test_bits_go_round(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    through = torch.rand(shape) > 0.4
    bits = pack(through)
    assert bits.dtype == torch.uint8 and len(bits) == -(-through.numel() // 8)
    assert torch.equal(unpack(bits, through.shape), through.float())


def test_foreign_bits_are_refused() -> None:
    masks = Masks(0.01, 0.005)
    masks.add("", {"a.weight": torch.zeros(3, 3)})
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(3, 3)):
        with pytest.raises(HeadError, match=r"masks.a.weight.scores: .* expected uint8, \[2\]"):
            masks.unpacked_state("masks.", {"masks.a.weight.scores": wrong})


def test_draws_are_those_of_the_seed_and_the_step() -> None:
    def drawn(draws: Draws) -> torch.Tensor:
        with draws.step(CPU):
            return torch.rand(4)

    torch.manual_seed(3)
    first = Draws()
    before = torch.random.get_rng_state()
    steps = [drawn(first) for _ in range(4)]
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's draws move"
    assert len({tuple(step.tolist()) for step in steps}) == 4
    torch.manual_seed(3)
    again = Draws()
    assert torch.equal(drawn(again), steps[0])
    # A checkpoint of the second step goes on with the third.
    state = {name: value.clone() for name, value in again.state_dict().items()}
    drawn(again)
    resumed = Draws()
    resumed.load_state_dict(state)
    assert torch.equal(drawn(resumed), steps[1])
    torch.manual_seed(4)
    assert not torch.equal(drawn(Draws()), steps[0])
