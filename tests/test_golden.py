"""tools/check_golden.py on the archives in tests/golden, on changed copies, and on archives of other networks.

The archives of other networks are computed here from the weight rule, with CLIP's two towers in float64 NumPy and
without open_clip or vlprompt.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

GOLDEN = Path(__file__).parent / "golden"
TOOL = Path(__file__).parents[1] / "tools" / "check_golden.py"
DIMS = {
    "embed_dim": 96,
    "image_size": 48,
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 2,
    "text_width": 192,
    "text_layers": 3,
    "context_length": 77,
    "vocab_size": 49408,
}
NAMES = ["snow leopard", "sea_lake", "F-16A/B", "crème brûlée", "x-ray"]
Array = np.ndarray


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_golden", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- archives of the project ------------------------------------------------------------------------------------------
def known_archives() -> list[str]:
    """Return the archives of methods in the tool's ``CHECKS``."""
    text = TOOL.read_text() + "".join(path.read_text() for path in TOOL.parent.glob("golden_*.py"))
    return sorted(path.stem for path in GOLDEN.glob("*.npz") if f'"{method_of(path)}": check_' in text)


def method_of(path: Path) -> str:
    with np.load(path, allow_pickle=False) as archive:
        return str(json.loads(archive["meta"].item())["method"])


def test_the_main_archives_are_known() -> None:
    assert {"clip_core", "zeroshot", "coop", "mocoop"} <= set(known_archives())


@pytest.mark.parametrize("name", known_archives())
def test_archive_agrees(tool: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(GOLDEN / f"{name}.npz")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    count, worst = last.split(" arrays, max rel err ")
    assert int(count) >= 4 and float(worst) <= 1e-4


def test_a_given_size_replaces_the_scale_of_a_reference_near_zero(tool: Any) -> None:
    value, reference = np.array([3e-7, 0.0]), np.array([1e-7, 0.0])
    assert tool.relative_error(value, reference) == pytest.approx(2)
    assert tool.relative_error(value, reference, 0.1) == pytest.approx(2e-6)
    assert tool.relative_error(value, reference, 1e-9) == pytest.approx(2), "a smaller size has no effect"


def test_slack_and_scales_by_column(tool: Any) -> None:
    value, reference = np.array([[1.0, 200.0], [2.0, 100.0]]), np.array([[1.0, 200.0], [2.2, 101.0]])
    assert tool.relative_error(value, reference) == pytest.approx(1 / 200)
    assert tool.relative_error(value, reference, axis=0) == pytest.approx(0.2 / 2.2)
    slack = np.array([[0.0, 0.0], [0.2, 0.5]])
    assert tool.relative_error(value, reference, axis=0, slack=slack) == pytest.approx(0.5 / 200)
    assert tool.relative_error(value, np.array([[1.0, np.nan], [2.0, 100.0]]), slack=9.0) == float("inf")


@pytest.mark.parametrize("text", ["Adam(lr, eps=0.1)", "AdamW(lr, betas 0.9/0.999)", "SGD(lr, eps 1e-3)"])
def test_an_optimiser_that_cannot_be_followed_ends_the_program(tool: Any, text: str) -> None:
    golden = tool.Golden(GOLDEN / "tip_adapter.npz")
    assert golden.optimizer("AdamW(lr, eps=1e-3, weight_decay 0.2)", "AdamW", "eps", "weight_decay") == {
        "eps": 1e-3,
        "weight_decay": 0.2,
    }
    with pytest.raises(SystemExit, match="the metadata says"):
        golden.optimizer(text, "AdamW", "eps")


def test_several_files_are_summed_up(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(GOLDEN / "zeroshot.npz"), str(GOLDEN / "zeroshot.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("20 arrays, ")


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Array], dict[str, Any]], None]) -> str:
    """Copy an archive with changed arrays and metadata."""
    with np.load(source, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(arrays.pop("meta").item())
    change(arrays, meta)
    np.savez(target, meta=np.array(json.dumps(meta)), **arrays)
    return str(target)


@pytest.mark.parametrize("name", ["single/eval_logits", "ensemble/text_features"])
def test_a_perturbed_array_fails(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    def perturb(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        arrays[name].flat[0] += 1e-3 * np.abs(arrays[name]).max()

    path = rewritten(GOLDEN / "zeroshot.npz", tmp_path / "perturbed.npz", perturb)
    assert tool.main([path]) == 1
    assert f"max rel err {1e-3:.2e}"[:-5] in capsys.readouterr().out.splitlines()[-1]
    assert tool.main([path, "--tol", "0.01"]) == 0


def test_a_wrong_token_fails_at_any_tolerance(tool: Any, tmp_path: Path) -> None:
    def perturb(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        arrays["ctx_init/tokens"][0, 3] += 1

    path = rewritten(GOLDEN / "coop.npz", tmp_path / "tokens.npz", perturb)
    assert tool.main([path, "--tol", "1e9"]) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reference_that_is_not_finite_fails(tool: Any, tmp_path: Path, value: float) -> None:
    def perturb(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        arrays["single/eval_logits"][0, 0] = value

    assert tool.main([rewritten(GOLDEN / "zeroshot.npz", tmp_path / "nan.npz", perturb)]) == 1


def test_a_result_that_is_not_finite_fails(tool: Any) -> None:
    reference = np.array([1.0, 2.0])
    assert tool.relative_error(np.array([1.0, np.nan]), reference) == float("inf")
    assert tool.relative_error(np.array([np.inf, 2.0]), reference) == float("inf")
    assert tool.relative_error(np.array([1.0, 2.0, 3.0]), reference) == float("inf")
    assert tool.relative_error(np.array([1.0, 2.5]), reference) == pytest.approx(0.25)
    masked = np.array([-np.inf, 2.0])
    assert tool.relative_error(masked.copy(), masked) == 0.0
    assert tool.relative_error(np.array([0.0, 2.0]), masked) == float("inf")


def test_an_uncompared_array_fails(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        arrays["single/something_new"] = np.ones(3)

    assert tool.main([rewritten(GOLDEN / "zeroshot.npz", tmp_path / "more.npz", add)]) == 1
    assert "single/something_new" in capsys.readouterr().out


def test_an_archive_of_other_weights_is_refused(tool: Any, tmp_path: Path) -> None:
    def reseed(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        meta["weights_seed"] = 5

    with pytest.raises(SystemExit, match="another network"):
        tool.main([rewritten(GOLDEN / "zeroshot.npz", tmp_path / "seed.npz", reseed)])


def test_an_unknown_method_and_a_missing_file_are_refused(tool: Any, tmp_path: Path) -> None:
    def rename(arrays: dict[str, Array], meta: dict[str, Any]) -> None:
        meta["method"] = "no_such_method"

    with pytest.raises(SystemExit, match="no_such_method"):
        tool.main([rewritten(GOLDEN / "zeroshot.npz", tmp_path / "method.npz", rename)])
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "nowhere.npz")])


# -- archives of other networks, computed with NumPy ----------------------------------------------------------------
class Naive:
    """CLIP in float64 NumPy, following OpenAI's clip/model.py."""

    def __init__(self, tiny_clip: Any, seed: int) -> None:
        self.state = tiny_clip.build_state_dict(tiny_clip.TinyClipDims(**DIMS), seed)
        self.sha256 = tiny_clip.checksum(self.state)
        self.w = {name: tensor.double().numpy() for name, tensor in self.state.items()}
        self.tokenizer = SimpleTokenizer()

    def norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def block(self, x: Array, name: str, causal: bool) -> Array:
        count, length, width = x.shape
        normed = self.norm(x, f"{name}.ln_1") @ self.w[f"{name}.attn.in_proj_weight"].T
        qkv = (normed + self.w[f"{name}.attn.in_proj_bias"]).reshape(count, length, 3, width // 64, 64)
        q, k, v = np.moveaxis(qkv, 2, 0)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 8
        if causal:
            scores = scores + np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        seen = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(count, length, width)
        x = x + seen @ self.w[f"{name}.attn.out_proj.weight"].T + self.w[f"{name}.attn.out_proj.bias"]
        hidden = self.norm(x, f"{name}.ln_2") @ self.w[f"{name}.mlp.c_fc.weight"].T + self.w[f"{name}.mlp.c_fc.bias"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        return x + hidden @ self.w[f"{name}.mlp.c_proj.weight"].T + self.w[f"{name}.mlp.c_proj.bias"]

    def tokens(self, texts: list[str]) -> Array:
        return np.asarray(self.tokenizer(texts))

    def text(self, ids: Array, ctx: Array | None = None) -> Array:
        """Return the features of token ids, with ``ctx`` at positions 1 to M."""
        x = self.w["token_embedding.weight"][ids]
        if ctx is not None:
            x = np.concatenate([x[:, :1], np.broadcast_to(ctx, (len(x), *ctx.shape)), x[:, 1 + len(ctx) :]], axis=1)
        x = x + self.w["positional_embedding"]
        for layer in range(DIMS["text_layers"]):
            x = self.block(x, f"transformer.resblocks.{layer}", causal=True)
        return self.norm(x, "ln_final")[np.arange(len(x)), ids.argmax(-1)] @ self.w["text_projection"]

    def image(self, images: Array) -> Array:
        count, side, grid = len(images), DIMS["patch_size"], DIMS["image_size"] // DIMS["patch_size"]
        patches = images.astype(np.float64).reshape(count, 3, grid, side, grid, side).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.w["visual.conv1.weight"]
        x = patches.reshape(count, grid * grid, -1) @ kernel.reshape(len(kernel), -1).T
        first = np.broadcast_to(self.w["visual.class_embedding"], (count, 1, x.shape[-1]))
        x = np.concatenate([first, x], axis=1) + self.w["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre")
        for layer in range(DIMS["vision_layers"]):
            x = self.block(x, f"visual.transformer.resblocks.{layer}", causal=False)
        return self.norm(x[:, 0], "visual.ln_post") @ self.w["visual.proj"]

    def logits(self, images: Array, text: Array) -> Array:
        return np.exp(self.w["logit_scale"]) * unit(self.image(images)) @ unit(text).T


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def save(path: Path, naive: Naive, seed: int, method: str, cases: dict[str, Any], arrays: dict[str, Array]) -> str:
    meta = {
        "method": method,
        "format_version": 1,
        "dims": DIMS,
        "weights_seed": seed,
        "weights_sha256": naive.sha256,
        "class_names": NAMES,
        "cases": cases,
    }
    floats = {k: np.asarray(v, np.float32 if np.asarray(v).dtype.kind == "f" else None) for k, v in arrays.items()}
    np.savez(path, meta=np.array(json.dumps(meta)), **floats)
    return str(path)


@pytest.fixture(scope="module")
def naive(tiny_clip: Any) -> Naive:
    return Naive(tiny_clip, seed=11)


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Array:
    return np.asarray(tiny_clip.draw_images("another network", 3, DIMS["image_size"], seed=11))


def test_a_zero_shot_archive_of_another_network(
    tool: Any, naive: Naive, images: Array, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {"one": {"templates": ["a sketch of a {}."]}, "three": {"templates": ["{}", "the {} there.", "many {}"]}}
    arrays = {"images": images, "labels": np.array([0, 4, 2])}
    for case, options in cases.items():
        words = [name.replace("_", " ") for name in NAMES]
        each = [unit(naive.text(naive.tokens([t.format(w) for w in words]))) for t in options["templates"]]
        arrays[f"{case}/text_features"] = unit(np.mean(each, axis=0))
        arrays[f"{case}/eval_logits"] = naive.logits(images, arrays[f"{case}/text_features"])
    path = save(tmp_path / "zeroshot.npz", naive, 11, "zeroshot", cases, arrays)
    assert tool.main([path]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 arrays, ")


def test_a_coop_archive_of_another_network(
    tool: Any, naive: Naive, images: Array, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length, labels = 3, np.array([0, 4, 2])
    option = {"n_ctx": length, "n_ctx_option": length, "class_specific": False, "ctx_init": ""}
    cases = {"plain": {**option, "class_token_position": "end"}}
    ctx = (0.02 * np.random.RandomState(0).standard_normal((length, DIMS["text_width"]))).astype(np.float32)
    words = [name.replace("_", " ") for name in NAMES]
    ids = naive.tokens([f"X X X {word}." for word in words])
    text = naive.text(ids, ctx.astype(np.float64))
    logits = naive.logits(images, text)

    def loss(context: Array) -> float:
        scores = naive.logits(images, naive.text(ids, context))
        log_sum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
        return float((log_sum - scores[np.arange(3), labels]).mean())

    arrays = {
        "images": images,
        "labels": labels,
        "image_features_raw": naive.image(images),
        "plain/param/ctx": ctx,
        "plain/tokens": ids,
        "plain/name_lens": np.array([len(naive.tokenizer.encode(word)) for word in words]),
        "plain/text_features_raw": text,
        "plain/train_logits": logits,
        "plain/eval_logits": logits,
        "plain/loss/total": np.array(loss(ctx.astype(np.float64))),
    }
    path = save(tmp_path / "coop.npz", naive, 11, "coop", cases, arrays)
    assert tool.main([path]) == 0
    # All arrays except the inputs: images, labels and the context.
    assert capsys.readouterr().out.splitlines()[-1].startswith("7 arrays, ")
    # The gradient along a random direction: central differences in float64 compared with vlprompt's method.
    direction = np.random.RandomState(1).standard_normal(ctx.shape)
    step = 1e-5
    slope = (loss(ctx + step * direction) - loss(ctx - step * direction)) / (2 * step)
    assert slope_of_method(naive, images, labels, ctx, direction) == pytest.approx(slope, rel=1e-3)


def slope_of_method(naive: Naive, images: Array, labels: Array, ctx: Array, direction: Array) -> float:
    import torch

    from vlprompt import create_method
    from vlprompt.backbone import Backbone

    method = create_method("coop", Backbone.from_state_dict(naive.state), NAMES, context_length=len(ctx))
    method.load_trained_state({"prompt.ctx": torch.from_numpy(ctx)})
    features = method.image_features(torch.from_numpy(images))
    sum(method.losses(features, torch.from_numpy(labels)).values()).backward()
    return float((method.prompt.ctx.grad.numpy() * direction).sum())
