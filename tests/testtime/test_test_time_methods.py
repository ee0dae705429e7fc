"""The test-time methods: scores of views, initial contexts, saved heads and refusals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method, load_head
from vlprompt.backbone import Backbone
from vlprompt.errors import ConfigError, HeadError
from vlprompt.io.head import Head
from vlprompt.methods import PromptMethod

NAMES = ["golden_retriever", "jack-o'-lantern", "Boeing 737-200", "annual crop land", "cat"]
EPISODIC = ["tpt", "difftpt", "mta", "zero", "promptalign"]
SMALL: Mapping[str, dict[str, Any]] = {
    "difftpt": {"steps": 2, "generated": 2},
    "promptalign": {"alignment_weight": 0.0, "images_at_once": 2},
}


def make(backbone: Backbone, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_method(name, backbone, NAMES, **{**SMALL.get(name, {}), **options})


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    """Views ``[3, 6, 3, 64, 64]``."""
    drawn: Tensor = torch.from_numpy(tiny_clip.draw_images("views", 18, 64))
    return drawn.reshape(3, 6, 3, 64, 64)


@pytest.fixture(scope="module")
def maple(tiny_backbone: Backbone) -> PromptMethod:
    torch.manual_seed(5)
    return create_method("maple", tiny_backbone, NAMES, depth=3)


# -- views ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EPISODIC)
def test_images_are_scored_independently_of_their_batch(tiny_backbone: Backbone, images: Tensor, name: str) -> None:
    method = make(tiny_backbone, name)
    with torch.inference_mode():  # adaptation computes gradients even then
        together = method(images)
        alone = torch.cat([method(views[None]) for views in images])
    assert together.shape == (3, 5) and not together.requires_grad
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)
    assert method(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("name", ["tpt", "difftpt", "mta", "zero", "tda"])
def test_views_can_be_images_or_features(tiny_backbone: Backbone, images: Tensor, name: str) -> None:
    method = make(tiny_backbone, name)
    features = tiny_backbone.encode_image(images.flatten(0, 1)).unflatten(0, (3, 6))
    expected = method(images)
    method.reset()
    torch.testing.assert_close(method(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EPISODIC)
def test_one_image_is_scored_without_adaptation_and_with_a_warning(
    tiny_backbone: Backbone, images: Tensor, name: str
) -> None:
    method = make(tiny_backbone, name)
    with pytest.warns(UserWarning, match=r"give it \d+ views"):
        logits = method(images[:, 0])
    expected = tiny_backbone.logit_scale * F.normalize(method.image_features(images[:, 0]), dim=-1)
    torch.testing.assert_close(logits, expected @ method.initial_text_features().t())
    with pytest.warns(UserWarning, match="without adaptation"):
        assert torch.equal(method.text_features(), method.initial_text_features())


@pytest.mark.parametrize(
    ("name", "count"), [("tpt", 64), ("difftpt", 128), ("mta", 64), ("zero", 64), ("promptalign", 64)]
)
def test_number_of_views_is_that_of_the_papers(tiny_backbone: Backbone, name: str, count: int) -> None:
    views = create_method(name, tiny_backbone, NAMES).needs.test_views
    assert views is not None and views.count == count and not views.augmix
    assert create_method(name, tiny_backbone, NAMES, augmix=True).needs.test_views != views
    assert create_method("tda", tiny_backbone, NAMES).needs.test_views is None


@pytest.mark.parametrize("name", ["mta", "zero", "tda"])
@pytest.mark.parametrize("count", [1, 7])
def test_one_identical_view_is_zero_shot(tiny_backbone: Backbone, images: Tensor, name: str, count: int) -> None:
    options = {"positive": False, "negative": False} if name == "tda" else {}
    expected = create_method("zeroshot", tiny_backbone, NAMES)(images[:, 0])
    got = make(tiny_backbone, name, **options)(images[:, :1].expand(-1, count, -1, -1, -1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*EPISODIC, "tda"])
def test_one_class_and_equal_prompts_are_supported(tiny_backbone: Backbone, images: Tensor, name: str) -> None:
    options = SMALL.get(name, {})
    single = create_method(name, tiny_backbone, ["cat"], **options)(images)
    assert single.shape == (3, 1) and bool(single.isfinite().all())
    with pytest.warns(UserWarning, match="'cat' \\(class 0\\), 'Cat' \\(class 2\\)"):
        twice = create_method(name, tiny_backbone, ["cat", "dog", "Cat"], **options)(images)
    assert bool(twice.isfinite().all())
    if name not in ("zero", "tda"):  # votes and cache slots go to the first of equal classes
        torch.testing.assert_close(twice[:, 0], twice[:, 2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["tpt", "difftpt", "mta", "promptalign"])
def test_permuting_classes_permutes_logits(tiny_backbone: Backbone, images: Tensor, name: str) -> None:
    method, order = make(tiny_backbone, name), [3, 0, 4, 1, 2]
    moved = method.with_classes([NAMES[i] for i in order])
    torch.testing.assert_close(moved(images), method(images)[:, order], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", EPISODIC)
def test_half_precision_backbones_give_finite_logits(tiny_state_dict: Any, images: Tensor, name: str) -> None:
    backbone = Backbone.from_state_dict(tiny_state_dict(), precision="bf16")
    logits = make(backbone, name)(images)
    assert logits.dtype == torch.float32 and bool(logits.isfinite().all())


# -- initial contexts and heads ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("source", ["coop", "kgcoop", "prograd"])
def test_tpt_starts_from_a_trained_context(tiny_backbone: Backbone, images: Tensor, source: str, length: int) -> None:
    torch.manual_seed(2)
    trained = create_method(source, tiny_backbone, NAMES, context_init="", context_length=length)
    method = make(tiny_backbone, "tpt", lr=0.0)
    method.start_from(trained.trained_state())
    assert method.layout.context_length == length
    torch.testing.assert_close(method(images), trained(images[:, 0]).detach(), rtol=1e-4, atol=1e-3)
    moved = method.with_classes(["cat", "sea lake"])
    torch.testing.assert_close(
        moved(images), trained.with_classes(["cat", "sea lake"])(images[:, 0]).detach(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [("coop", {"class_specific": True}, "per class"), ("cocoop", {}, "meta_net"), ("zeroshot", {}, "nothing learned")],
)
def test_unsuitable_initial_contexts_are_refused(
    tiny_backbone: Backbone, source: str, options: dict[str, Any], reason: str
) -> None:
    method = make(tiny_backbone, "difftpt")
    before = method.ctx.clone()
    with pytest.raises(HeadError, match=reason):
        method.start_from(create_method(source, tiny_backbone, NAMES, **options).trained_state())
    assert torch.equal(method.ctx, before)


@pytest.mark.parametrize("name", [*EPISODIC, "tda"])
def test_heads_are_saved_and_loaded(tiny_backbone: Backbone, images: Tensor, name: str, tmp_path: Path) -> None:
    method = make(tiny_backbone, name)
    assert not method.trainable_parameters() and not method.parameter_groups(0.1)
    Head(method).save_pretrained(tmp_path / "head")
    loaded = load_head(tmp_path / "head", tiny_backbone)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), method(images), rtol=1e-4, atol=1e-3)


def test_a_saved_head_keeps_its_initial_context(tiny_backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    method = make(tiny_backbone, "tpt", steps=2)
    method.start_from({"prompt.ctx": torch.randn(6, 128) * 0.02})
    Head(method).save_pretrained(tmp_path / "head")
    loaded: Any = load_head(tmp_path / "head", tiny_backbone).method
    assert torch.equal(loaded.ctx, method.ctx)
    torch.testing.assert_close(loaded(images), method(images), rtol=1e-4, atol=1e-3)


# -- TDA --------------------------------------------------------------------------------------------------------------
def test_the_stream_changes_resets_and_continues(tiny_backbone: Backbone, images: Tensor) -> None:
    method = make(tiny_backbone, "tda")
    stream = images.flatten(0, 1)
    whole = method(stream)
    assert not torch.equal(method(stream), whole)  # the caches hold images of the first pass
    method.reset()
    first = method(stream[:10])
    torch.testing.assert_close(first, whole[:10], rtol=1e-4, atol=1e-4)
    other = make(tiny_backbone, "tda")
    other.load_stream_state(method.stream_state())
    torch.testing.assert_close(other(stream[10:]), whole[10:], rtol=1e-4, atol=1e-4)
    assert method.with_classes(["cat", "dog"]).caches.seen == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            method.logits(method.image_features(stream)), create_method("zeroshot", tiny_backbone, NAMES)(stream)
        )
    with pytest.raises(HeadError, match="do not match this TDA stream"):
        method.with_classes(["cat", "dog"]).load_stream_state(method.stream_state())


# -- PromptAlign ------------------------------------------------------------------------------------------------------
def test_promptalign_without_steps_or_rate_is_maple(
    tiny_backbone: Backbone, images: Tensor, maple: PromptMethod
) -> None:
    expected = maple(images[:, 0]).detach()
    for options in ({"steps": 0}, {"lr": 0.0}):
        method = make(tiny_backbone, "promptalign", **options)
        method.start_from(maple.trained_state())
        torch.testing.assert_close(method(images), expected, rtol=1e-4, atol=1e-3)


def test_promptalign_equals_a_plain_loop_over_maple(
    tiny_backbone: Backbone, images: Tensor, maple: PromptMethod
) -> None:
    """The loop tunes MaPLe with torch's AdamW on each image, with the block inputs of the most confident views."""
    import copy

    from vlprompt.testtime.alignment import block_inputs
    from vlprompt.testtime.selection import marginal_entropy, most_confident

    options = {"alignment_weight": 100.0, "lr": 0.004, "confidence": 0.5, "steps": 2, "images_at_once": 2}
    method = make(tiny_backbone, "promptalign", **options)
    method.start_from(maple.trained_state())
    source = images.flatten(0, 1).flip(-1)
    method.measure_source(source.split(5))
    with torch.no_grad(), block_inputs(tiny_backbone.image, 2) as seen:
        maple.image_features(source)
    torch.testing.assert_close(method.source_mean, torch.stack(seen).mean(dim=1), rtol=1e-4, atol=1e-5)
    variance = torch.stack(seen).var(dim=1, unbiased=False)
    torch.testing.assert_close(method.source_variance, variance, rtol=1e-3, atol=1e-5)
    rows = []
    for views in images:
        tuned: Any = create_method("maple", tiny_backbone, NAMES, depth=3)
        tuned.load_trained_state(copy.deepcopy(maple.trained_state()))
        optimizer = torch.optim.AdamW([p for _, p in tuned.trainable_parameters()], 0.004)
        chosen = most_confident(tuned(views)[None].detach(), 0.5)[0]
        for _ in range(2):
            with block_inputs(tiny_backbone.image, 2) as seen:
                loss = marginal_entropy(tuned(views[chosen]))
            for layer, tokens in enumerate(seen):
                mean = (tokens.mean(dim=0) - method.source_mean[layer]).abs().mean()
                spread = (tokens.var(dim=0, unbiased=False) - method.source_variance[layer]).abs().mean()
                loss = loss + 100 / 3 * 0.5 * (mean + spread)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rows.append(tuned(views[:1])[0].detach())
    torch.testing.assert_close(method(images), torch.stack(rows), rtol=1e-3, atol=2e-3)


def test_promptalign_keeps_its_statistics(tiny_backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    method = make(tiny_backbone, "promptalign", alignment_weight=10.0)
    with pytest.raises(ConfigError, match="measure_source"):
        method(images)
    method.measure_source([images[0], images[1]])
    Head(method).save_pretrained(tmp_path / "head")
    loaded: Any = load_head(tmp_path / "head", tiny_backbone).method
    assert torch.equal(loaded.source_mean, method.source_mean) and loaded.source_mean.shape == (2, 19, 128)
    torch.testing.assert_close(loaded(images), method(images), rtol=1e-3, atol=1e-2)
    # Statistics are valid only for the prompts that they were measured with.
    other = make(tiny_backbone, "promptalign", alignment_weight=10.0)
    other.start_from(method.trained_state())
    assert other.source_mean.numel() and other.source_variance.numel()
    other.start_from({k: v for k, v in method.trained_state().items() if not k.startswith("source_")})
    assert not other.source_mean.numel()
    with pytest.raises(ConfigError, match="no images"):
        other.measure_source([])
    with pytest.raises(ConfigError, match="needs images"):
        method(torch.zeros(1, 4, 64))


# -- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tpt", {"confidence": 0.0}),
        ("tpt", {"lr": -1.0}),
        ("tpt", {"steps": -1}),
        ("tpt", {"crops": -1}),
        ("tpt", {"images_at_once": 0}),
        ("tpt", {"context_init": "[CLS]"}),
        ("difftpt", {"similarity": 1.5}),
        ("difftpt", {"variant": "both"}),
        ("difftpt", {"generated": -1}),
        ("mta", {"lambda_y": 0.0}),
        ("mta", {"templates": ["no braces"]}),
        ("zero", {"confidence": 2.0}),
        ("tda", {"positive_capacity": 0}),
        ("tda", {"negative_entropy": [0.5, 0.2]}),
        ("tda", {"negative_mask": [0.1]}),
        ("promptalign", {"alignment_depth": 0}),
        ("promptalign", {"context_length": 0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(tiny_backbone: Backbone, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"settings.{next(iter(options))}"):
        create_method(name, tiny_backbone, NAMES, **options)
