"""What CLIP-LoRA, R-AMT and APT have beside other methods: they change the inside of the towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import vlprompt
from vlprompt.backbone import Added, Backbone
from vlprompt.backbone.added import run_block
from vlprompt.config.run import RecipeConfig
from vlprompt.errors import ConfigError, HeadError
from vlprompt.io import Head, load_head

NAMES = ["cat", "annual crop land", "sea_lake"]
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("inside", 4, 64))


def make(backbone: Backbone, name: str, **own: Any) -> Any:
    torch.manual_seed(0)
    return vlprompt.create_method(name, backbone, NAMES, **own)


def trained(backbone: Backbone, name: str, images: Tensor, **own: Any) -> Any:
    """Two steps of Adam from learnables that were moved away from their start."""
    method = make(backbone, name, **own)
    spread = 0.004 if name == "ramt" else 0.1
    method.load_trained_state({k: v + spread * torch.randn_like(v) for k, v in method.trained_state().items()})
    optimizer = torch.optim.Adam(method.parameter_groups(1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack(list(method.losses(images, LABELS).values())).sum().backward()
        optimizer.step()
    return method.eval()


def equals_frozen(method: Any, images: Tensor) -> bool:
    """Whether both towers give the frozen features, bit for bit."""
    backbone = method.backbone
    plain = backbone.encode_image(images, added=Added())  # the same steps with nothing in between
    text = not method.has_text_prompts() or torch.equal(
        method.text_features(), F.normalize(backbone.text.encode(method.layout)[0], dim=-1)
    )
    return text and torch.equal(method.image_features(images), plain)


# -- where training starts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("clip_lora", {}),
        ("clip_lora", {"encoder": "vision", "params": ["q", "k", "v", "o"]}),
        ("ramt", {"side": "both", "candidates": "all"}),
        ("apt_approximated", {"zero_init_values": True}),
    ],
)
def test_training_starts_from_zero_shot_clip(
    tiny_backbone: Backbone, images: Tensor, name: str, own: dict[str, Any]
) -> None:
    method, zeroshot = make(tiny_backbone, name, **own).eval(), make(tiny_backbone, "zeroshot")
    with torch.no_grad():
        assert equals_frozen(method, images)
        torch.testing.assert_close(method(images), zeroshot(images), rtol=1e-5, atol=1e-5)


def test_apt_with_tokens_of_zero_is_zero_shot_clip_exactly(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "apt_approximated")
    zeroshot = make(tiny_backbone, "zeroshot")(images)
    assert not torch.allclose(method(images), zeroshot, atol=1e-3), "as published it starts elsewhere"
    method.load_trained_state(
        {k: v if k.endswith(("down.weight", "sigma")) else v * 0 for k, v in method.trained_state().items()}
    )
    with torch.no_grad():
        assert equals_frozen(method, images)


# -- CLIP-LoRA --------------------------------------------------------------------------------------------------------
def test_lora_drops_in_training_steps_and_never_scores_so(tiny_backbone: Backbone, images: Tensor) -> None:
    method = trained(tiny_backbone, "clip_lora", images, dropout=0.5).train()
    losses = [float(method.losses(images, LABELS)["ce"].detach()) for _ in range(3)]
    assert len(set(losses)) == 3
    assert torch.equal(method(images), method(images)) and torch.equal(method(images), method.eval()(images))
    assert float(method.losses(images, LABELS)["ce"].detach()) == float(
        F.cross_entropy(method(images), LABELS).detach()
    )


@pytest.mark.parametrize(
    ("own", "blocks"),
    [
        ({"position": "half-bottom"}, [0, 1, 2, 3]),
        ({"layers": [3, 0, 40]}, [0, 3]),
    ],
)
def test_lora_updates_the_chosen_blocks(tiny_backbone: Backbone, own: dict[str, Any], blocks: list[int]) -> None:
    names = [name for name, _ in make(tiny_backbone, "clip_lora", **own).trainable_parameters()]
    assert {int(name.split("resblocks.")[1].split(".")[0]) for name in names} == set(blocks)
    assert len(names) == 2 * 2 * 3 * len(blocks)


# loralib/utils.py 7-37 of MaxZanella/CLIP-LoRA 358f0d7: the same indices for every tower, and a table for ViT-L/14.
_TWELVE = {"all": range(12), "bottom": range(4), "mid": range(4, 8), "up": range(8, 12), "top3": range(9, 12)}
_TWELVE |= {"half-bottom": range(6), "half-up": range(6, 12)}
_TWENTY_FOUR = {"all": range(24), "half-bottom": range(12), "half-up": range(12, 24)}


@pytest.mark.parametrize("position", _TWELVE)
@pytest.mark.parametrize("depth", [12, 4, 5, 9, 24])
def test_lora_positions_are_the_published_blocks(position: str, depth: int) -> None:
    found = vlprompt.methods.get_method_class("clip_lora").Settings(position=position).blocks(depth)
    if depth <= 12:
        assert found == [block for block in _TWELVE[position] if block < depth]
    elif position in _TWENTY_FOUR:
        assert found == list(_TWENTY_FOUR[position])
    else:  # the official code has no such position for this depth
        assert found == [block for half in _TWELVE[position] for block in (2 * half, 2 * half + 1)]


def test_lora_leaves_a_tower_alone_that_lacks_the_blocks(tiny_clip: Any, images: Tensor) -> None:
    dims = tiny_clip.TinyClipDims(vision_layers=6, text_layers=2)
    uneven = Backbone.from_state_dict(tiny_clip.build_state_dict(dims), name="uneven")
    method = trained(uneven, "clip_lora", images, position="mid")
    names = {name.split("attn")[0] for name, _ in method.trainable_parameters()}
    assert names == {f"base_model.model.visual.transformer.resblocks.{block}." for block in (4, 5)}
    frozen = make(uneven, "zeroshot", templates=method.settings.templates[:1])
    with torch.no_grad():
        torch.testing.assert_close(method.text_features(), frozen.text_features())
        assert not torch.allclose(method(images), frozen(images), atol=1e-3)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"layers": [9]}, r"no block of the vision tower \(4 blocks\) or the text tower \(4 blocks\)"),
        (
            {"position": "top3", "encoder": "text"},
            r"position is 'top3', which is no block of the text tower \(4",
        ),
        ({"params": []}, "a list that is not empty, each item .q., .k., .v. or .o."),
        ({"rank": 0}, "settings.rank is 0"),
        ({"dropout": 1.0}, "settings.dropout is 1.0"),
        ({"logit_scale": -1.0}, "settings.logit_scale is -1.0"),
    ],
)
def test_lora_settings_that_are_not_accepted(tiny_backbone: Backbone, own: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(tiny_backbone, "clip_lora", **own)


@pytest.mark.parametrize("name", ["clip_lora", "ramt"])
def test_an_open_clip_model_takes_the_image_side(tiny_backbone: Backbone, images: Tensor, name: str) -> None:
    method = trained(tiny_backbone, name, images)
    model: Any = Head(method).attach(tiny_backbone.model)
    with torch.no_grad():
        found = model.encode_image(images)
        torch.testing.assert_close(found, method.image_features(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, tiny_backbone.encode_image(images), atol=1e-3)


@pytest.mark.parametrize("name", ["apt_approximated", "vpt"])
def test_an_open_clip_model_cannot_hold_what_is_no_weight(tiny_backbone: Backbone, name: str) -> None:
    with pytest.raises(HeadError, match=f"the image-side parameters of {name} are not weights of the tower"):
        Head(make(tiny_backbone, name)).attach(tiny_backbone.model)


# -- R-AMT ------------------------------------------------------------------------------------------------------------
def test_a_block_without_output_weights_gives_its_bias_alone(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "ramt")
    name = "transformer.resblocks.1.attn.out_proj.weight"
    method.masks.get_parameter(f"visual.{name}.scores").data.zero_()
    bias = tiny_backbone.image.parameters()[name.replace("weight", "bias")]
    alone = Added(after_attention={1: lambda normed, result: bias.expand_as(result)})
    torch.testing.assert_close(method.image_features(images), tiny_backbone.encode_image(images, added=alone))


def test_the_penalty_pulls_every_tensor_alike(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "ramt", side="both")
    penalty = method.terms(method.step(images, LABELS))["penalty"]
    for gradient in torch.autograd.grad(penalty, list(method.masks.parameters())):
        assert float(gradient.norm()) == pytest.approx(1e-4, rel=1e-3)


def test_without_strength_the_dropout_is_none(tiny_backbone: Backbone, images: Tensor) -> None:
    found = []
    for own in ({"gradient_dropout": None}, *({"gradient_dropout": {"strength": strength}} for strength in (0.0, 1.0))):
        method = make(tiny_backbone, "ramt", **own)
        torch.manual_seed(1)  # with and without the dropout's own seed
        method.load_trained_state({k: v + 0.004 * torch.randn_like(v) for k, v in method.trained_state().items()})
        torch.stack(list(method.losses(images, LABELS).values())).sum().backward()
        found.append(torch.cat([p.grad.flatten() for _, p in method.trainable_parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-8)
    assert 0 < int((found[2] == 0).sum()) < found[2].numel()


def test_a_head_holds_bits_and_scores_alike(tiny_backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    method = trained(tiny_backbone, "ramt", images, side="both")
    folder = Head(method).save_pretrained(tmp_path / "head")
    kept = {k: v for k, v in load_file(str(folder / "head.safetensors")).items() if k.startswith("learnable.masks.")}
    numbers = sum(p.numel() for _, p in method.trainable_parameters())
    assert {v.dtype for v in kept.values()} == {torch.uint8} and sum(v.numel() for v in kept.values()) == numbers / 8
    head = load_head(folder, tiny_backbone)
    with torch.no_grad():
        assert torch.equal(head(images), method(images))
        other = head.with_classes(["sea_lake", "dog"])
        torch.testing.assert_close(other(images)[:, 0], method(images)[:, 2], rtol=1e-4, atol=1e-4)
    # Another head starts from it: scores as far from the threshold on either side as they can get.
    follower = make(tiny_backbone, "ramt", side="both")
    follower.start_from(method.head_state())
    assert torch.equal(follower.eval()(images), method(images))
    values = torch.cat([p.detach().flatten() for _, p in follower.trainable_parameters()])
    assert values.unique().tolist() == pytest.approx([0.0, 0.01])
    name = next(iter(method.head_state()))
    with pytest.raises(HeadError, match="expected uint8"):
        follower.start_from({**method.head_state(), name: torch.zeros(3)})


def test_masks_of_the_published_kinds() -> None:
    backbone = vlprompt.backbone.shapes_only("ViT-B-16")
    sizes = {
        kind: sum(
            p.numel()
            for _, p in vlprompt.create_method("ramt", backbone, NAMES, candidates=kind).trainable_parameters()
        )
        for kind in ("attention", "mlp", "all")
    }
    assert sizes == {"attention": 28_901_376, "mlp": 56_623_104, "all": 28_901_376 + 56_623_104}


def test_a_resnet_is_masked_as_well() -> None:
    backbone = vlprompt.backbone.shapes_only("RN50")
    names = [name for name, _ in vlprompt.create_method("ramt", backbone, NAMES).trainable_parameters()]
    assert (
        "masks.visual.layer1.0.conv1.weight.scores" in names and "masks.visual.attnpool.c_proj.weight.scores" in names
    )
    assert not any(".bn" in name or ".bias" in name for name in names)
    with pytest.raises(ConfigError, match="settings.candidates is 'mlp', and RN50 has no such weights"):
        vlprompt.create_method("ramt", backbone, NAMES, candidates="mlp")
    small = vlprompt.load_backbone("demo-rn")
    method = make(small, "ramt")
    size = small.preprocess.size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(method.image_features(pixels), small.encode_image(pixels))
    torch.stack(list(method.losses(pixels, LABELS).values())).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for _, p in method.trainable_parameters())


# -- APT --------------------------------------------------------------------------------------------------------------
def test_softmax_lambda_is_the_identity_that_apt_approximates(tiny_backbone: Backbone) -> None:
    """(1 - l) Attn(q; X) + l Attn(q; P), l = Z_P / (Z_X + Z_P), head by head."""
    torch.manual_seed(0)
    block = tiny_backbone.model.visual.transformer.resblocks[0]
    attention, width = block.attn, tiny_backbone.image.width
    x, rows = torch.randn(2, 7, width), torch.randn(5, width)
    heads = attention.num_heads
    seen: list[Tensor] = []
    hook = attention.out_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        run_block(block, x, 0, Added(rows={0: rows}))
    finally:
        hook.remove()

    def parts(tokens: Tensor) -> Tensor:
        both = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, heads, -1))
        return both.movedim(-3, 0).transpose(-3, -2)  # [3, ..., H, N, d]

    (q, k, v), (_, own_k, own_v) = parts(block.ln_1(x)), parts(rows)
    scale = q.shape[-1] ** -0.5
    to_x, to_p = (scale * q @ k.transpose(-1, -2)).exp(), (scale * q @ own_k.transpose(-1, -2)).exp()
    share = to_p.sum(-1, keepdim=True) / (to_x.sum(-1, keepdim=True) + to_p.sum(-1, keepdim=True))
    of_x, of_p = to_x / to_x.sum(-1, keepdim=True) @ v, to_p / to_p.sum(-1, keepdim=True) @ own_v
    expected = ((1 - share) * of_x + share * of_p).transpose(-3, -2)  # [B, N, H, d]
    found = seen[0].unflatten(-1, (heads, -1))
    for head in range(heads):
        assert float((found[..., head, :] - expected[..., head, :]).detach().abs().max()) < 1e-5


def test_softmax_lambda_is_trained_and_refuses_what_it_has_not(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "apt_approximated", normaliser="softmax-lambda", text_tokens=3, image_tokens=4)
    assert {tuple(p.shape) for _, p in method.trainable_parameters()} == {(3, 128), (4, 128)}
    optimizer = torch.optim.Adam(method.parameter_groups(0.05))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = method.losses(images, LABELS)["ce"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    other = method.with_classes(["sea_lake", "dog"])
    with torch.no_grad():
        torch.testing.assert_close(other(images)[:, 0], method(images)[:, 2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="variants of normaliser relu-max"):
        make(tiny_backbone, "apt_approximated", normaliser="softmax-lambda", per_head=True)
    with pytest.raises(ConfigError, match="are both 0"):
        make(tiny_backbone, "apt_approximated", text_tokens=0, image_tokens=0)


# -- resuming ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("clip_lora", RecipeConfig(3, lr=1e-3, optimizer="adamw", schedule="step", final_lr=1e-6, warmup_epochs=0)),
        ("ramt", RecipeConfig(3, lr=3e-3, optimizer="adam", weight_decay=0.0, warmup_epochs=0)),
    ],
)
def test_a_resumed_training_draws_and_steps_as_one_that_went_through(
    tiny_backbone: Backbone, images: Tensor, name: str, recipe: RecipeConfig, tmp_path: Path
) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, LABELS), batch_size=2)  # type: ignore

    def fit(method: Any, *callbacks: pl.Callback, start: Path | None = None) -> None:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
        )
        module = vlprompt.PromptModule(method.train(), recipe)
        trainer.fit(module, loader, ckpt_path=start and str(start), weights_only=True)

    def moved() -> Any:
        method = make(tiny_backbone, name)
        if name == "ramt":
            method.load_trained_state({k: v + 0.004 * torch.randn_like(v) for k, v in method.trained_state().items()})
        return method

    whole, again = moved(), moved()
    fit(whole, pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    torch.manual_seed(99)
    fit(again, start=tmp_path / "epoch=1.ckpt")
    half = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(half[f"method.{key}"], value) for key, value in whole.trained_state().items())
    torch.testing.assert_close(again.trained_state(), whole.trained_state(), rtol=0, atol=0)
