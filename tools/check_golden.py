"""Compare vlprompt with reference tensors of the official implementations on a tiny CLIP.

Run: python tools/check_golden.py tests/golden/*.npz [--tol 1e-4]

Only the format of a file is assumed (tests/golden/README.md). Dimensions, weight seed, class names, names of cases and
every setting come from the file, methods are created through the public API, and every array in the file is either an
input or compared. A setting that the file states and a comparison cannot follow ends the program. The output lists the
largest relative error of each array, max|x - ref| / max|ref|, and ends with ``N arrays, max rel err X``. The exit
status is 1 if an error is above ``--tol`` or an array was not compared.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "golden")]

import tiny_clip  # noqa: E402

import vlprompt  # noqa: E402
from vlprompt.backbone import Backbone, TokenLayout  # noqa: E402
from vlprompt.errors import ConfigError, VlpromptError  # noqa: E402
from vlprompt.methods.mocoop import routing_target  # noqa: E402
from vlprompt.prompts import template_layout  # noqa: E402

Arrays = Mapping[str, np.ndarray]
#: Name, value, and options of :func:`relative_error`.
Results = Iterator[tuple[Any, ...]]


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata and the arrays of an archive.

    Raises:
        ConfigError: The file is damaged or has no metadata.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("meta").item())
    except KeyError:
        raise ConfigError("it has no meta") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"it is no golden archive, or is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"its meta is {meta!r}, not a JSON object")
    return meta, arrays


class Golden:
    """One archive: its metadata, its arrays and, if it has one, its backbone."""

    def __init__(self, path: Path) -> None:
        self.meta, self.arrays = read_archive(path)
        self.inputs = {"images", "labels"}
        self.path = path

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The tiny CLIP of the weight rule, checked against the archive's checksum."""
        state = tiny_clip.build_state_dict(tiny_clip.TinyClipDims(**self.meta["dims"]), self.meta["weights_seed"])
        if tiny_clip.checksum(state) != self.meta["weights_sha256"]:
            raise SystemExit(f"{self.path}: the weight rule gives another network than that of the archive")
        return Backbone.from_state_dict(state, name=f"golden-{self.path.stem}")

    def tensor(self, name: str) -> torch.Tensor:
        """Return an input array as a tensor and mark it as an input."""
        self.inputs.add(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def expect(self, condition: bool, text: str) -> None:
        """End the program if the archive states something that its comparison cannot follow."""
        if not condition:
            raise SystemExit(f"{self.path}: {text}")

    def words(self, pattern: str, text: str) -> re.Match[str]:
        """Return the match of ``pattern`` in a ``text`` of the metadata that states settings in words."""
        match = re.search(pattern, text)
        self.expect(match is not None, f"the metadata says {text!r}; expected: {pattern}")
        assert match is not None
        return match

    def optimizer(self, text: str, kind: str, *names: str) -> dict[str, float]:
        """Return the settings ``names`` of an optimiser of a ``kind``, such as SGD, that is described in words."""
        self.words(rf"^{kind}\b", text)
        numbers = [self.words(rf"\b{name.replace('_', '[ _]')}[ =]([\d.]+(e-?\d+)?)", text)[1] for name in names]
        return {name: float(number) for name, number in zip(names, numbers, strict=True)}

    def tokens(self, texts: list[str], *, cut: bool = False) -> np.ndarray:
        """Return token ids padded with zeros to the tower's length ``[N, 77]``."""
        length = self.backbone.text.context_length
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.backbone.text.tokens(text)
            if cut and len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            row[: len(ids)] = ids
        return rows


def check_clip_core(golden: Golden) -> Results:
    """Compare tokens, features after every block, features, logits, and the gradient with respect to pixels."""
    backbone, texts = golden.backbone, golden.meta["texts"]
    yield "tokens", golden.tokens(texts)
    yield "tokens_truncated", golden.tokens([golden.meta["long_text"]], cut=True)
    images = golden.tensor("images").requires_grad_()
    # In class names, template_layout would replace underscores.
    layout = TokenLayout.from_rows([[backbone.text.tokens(text) for text in texts]])
    rows = torch.tensor([len(backbone.text.tokens(text)) - 1 for text in texts])
    seen: dict[str, list[torch.Tensor]] = {"block_cls": [], "block_eot": []}

    def keep(name: str, pick: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        return lambda block, inputs, output: seen[name].append(pick(output))

    model = backbone.model
    hooks = [b.register_forward_hook(keep("block_cls", lambda x: x[:, 0])) for b in model.visual.transformer.resblocks]
    eot = keep("block_eot", lambda x: x[torch.arange(len(rows)), rows])
    hooks += [b.register_forward_hook(eot) for b in model.transformer.resblocks]
    image = backbone.encode_image(images)
    backbone.text.encode(layout, algorithm="padded")  # only the padded algorithm has block outputs
    for hook in hooks:
        hook.remove()
    text = backbone.text.encode(layout)[0]
    logits = backbone.logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t()
    (logits * golden.tensor("cotangent")).sum().backward()
    yield from ((name, torch.stack(values)) for name, values in seen.items())
    yield "image_features_raw", image
    yield "text_features_raw", text
    yield "logits_per_image", logits
    yield "logits_per_text", logits.t()
    yield "grad_images", images.grad
    yield "logit_scale", backbone.logit_scale if golden.arrays["logit_scale"] > 5 else backbone.logit_scale.log()


def check_zeroshot(golden: Golden) -> Results:
    """Compare text features and logits of single templates and ensembles."""
    images = golden.tensor("images")
    for case, options in golden.meta["cases"].items():
        names = golden.meta["class_names"]
        method = vlprompt.create_method("zeroshot", golden.backbone, names, templates=options["templates"])
        yield f"{case}/text_features", method.text_features()
        yield f"{case}/eval_logits", method(images)


def check_coop(golden: Golden) -> Results:
    """Compare features, logits, loss and the gradient of the context for every variant of context."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    names = golden.meta["class_names"]
    yield "image_features_raw", golden.backbone.encode_image(images)
    for case, options in golden.meta["cases"].items():
        method = vlprompt.create_method(
            "coop",
            golden.backbone,
            names,
            context_length=options["n_ctx_option"],
            context_init=options["ctx_init"],
            # With initial words the official code ignores class-specific contexts (trainers/coop.py 67-86).
            class_specific=options["class_specific"] and not options["ctx_init"],
            class_token_position=options["class_token_position"],
        )
        start = golden.tensor(f"{case}/param/ctx")
        if options["ctx_init"]:  # the words determine the initial context
            drawn = f"{case}/official_init/ctx" in golden.arrays
            yield f"{case}/{'official_init' if drawn else 'param'}/ctx", method.prompt.ctx.detach().clone()
        method.load_trained_state({"prompt.ctx": start})
        words = [name.replace("_", " ") for name in names]
        yield f"{case}/tokens", golden.tokens([f"{method.prompt.placeholder} {word}." for word in words])
        yield f"{case}/name_lens", [len(golden.backbone.text.tokens(word)) - 2 for word in words]
        yield f"{case}/text_features_raw", golden.backbone.text.encode(method.layout, method.prompt.ctx)[0]
        yield from _trained(method, case, images, labels, {"prompt.ctx": "ctx"})


def _trained(method: Any, case: str, images: torch.Tensor, labels: torch.Tensor, names: dict[str, str]) -> Results:
    """Compare logits, loss and gradients of a case; ``names`` maps parameters to their published names."""
    features = method.image_features(images)
    yield f"{case}/train_logits", method.logits(features)
    terms = method.losses(features, labels)
    total = torch.stack(list(terms.values())).sum()
    yield f"{case}/loss/total", total
    total.backward()
    for name, parameter in method.trainable_parameters():
        yield f"{case}/grad/{names[name]}", parameter.grad
    method.eval()
    yield f"{case}/eval_logits", method(images)


def check_mocoop(golden: Golden) -> Results:
    """Compare prototypes, routing, experts, mixture, loss terms, gradients, and evaluation on new classes."""
    for case, options in golden.meta["cases"].items():
        used = options["images_used"]
        images, labels = golden.tensor("images")[:used], golden.tensor(f"{case}/labels")
        method = vlprompt.create_method(
            "mocoop",
            golden.backbone,
            options["classes"],
            all_class_names=options["all_classes"],
            templates=options["templates"],
            groups=options["groups"],
            top_k=options["top_k"],
            text_loss_weight=options["text_loss_weight"],
            gate_loss_weight=options["gate_loss_weight"],
            text_correction=options["text_correction"],
            tune_layer_norms=options["finetune_image_layernorm"],
            drop_unused_experts=options["config_batch_size"] < 4,
        )
        names = {"gate.weight": "gate.weight", "gate.bias": "gate.bias", "w": "w"}
        for g in range(options["num_experts"]):
            for side in ("before", "after"):
                names[f"experts.{side}.{g}"] = f"ctx_{side}_{g}"
                yield f"{case}/official_init/ctx_{side}_{g}", getattr(method.experts, side)[g].detach().clone()
        for i, name in enumerate(method.norms.names if method.norms else []):
            names[f"norms.values.{i}"] = f"image_encoder.{name}"
        initial = method.trained_state()
        sources = {name: f"{case}/param/{names[name]}" for name in initial}
        state = {
            name: golden.tensor(source) if source in golden.arrays else initial[name]
            for name, source in sources.items()
        }
        method.load_trained_state(state)
        yield from ((f"{case}/{name}", value) for name, value in _mocoop_parts(method, golden, options, images, labels))
        yield from _trained(method, case, images, labels, names)
        if f"{case}/new_class_eval_logits" in golden.arrays:
            new = method.with_classes(options["all_classes"][len(options["classes"]) :])
            yield f"{case}/new_class_eval_logits", new(golden.tensor("images"))


def _mocoop_parts(method: Any, golden: Golden, options: Any, images: torch.Tensor, labels: torch.Tensor) -> Results:
    text = golden.backbone.text
    for g, (before, after) in enumerate(method.experts.parts):
        for suffix, period, classes in (("", "", options["classes"]), ("_dot", ".", options["all_classes"])):
            words = [name.replace("_", " ") for name in classes]
            yield f"tokens{suffix}_{g}", golden.tokens([f"{before} {word}".strip() + after + period for word in words])
    hard = [template.replace(".", "") + "." for template in options["templates"]]
    layout = template_layout(text, options["all_classes"], hard)
    yield "class_text_features", F.normalize(text.encode(layout), dim=-1)
    prototypes = method.prototypes
    yield "grouped_prototypes", prototypes
    unit = F.normalize(method.image_features(images), dim=-1)
    routing, gates = method.route(unit)
    weights, chosen = gates.topk(options["top_k"], dim=-1)
    yield "gate_logits", routing
    yield "topk_indices", chosen
    yield "topk_weights", weights
    used = (gates > 0).any(dim=0) if method.settings.drop_unused_experts else None
    experts = method.expert_text_features(used)
    yield "expert_text_features", experts
    yield "mixed_text_features", torch.einsum("bg,gcd->bcd", gates, experts)
    whole = method.expert_text_features(used, virtual=True) if method.virtual else experts
    yield "text_loss_logits", (whole @ prototypes.transpose(1, 2)).flatten(0, 1)
    affinity = torch.einsum("bd,gbd->bg", unit, prototypes[:, labels])
    yield "group_affinity", affinity
    yield "gate_target", routing_target(affinity, options["top_k"])
    terms = method.losses(method.image_features(images), labels)
    scales = {"text": options["text_loss_weight"], "gate": options["gate_loss_weight"]}
    yield from ((f"loss/{name}", term / scales.get(name, 1.0)) for name, term in terms.items())


CHECKS = {
    "clip_core": check_clip_core,
    "zeroshot": check_zeroshot,
    "coop": check_coop,
    "mocoop": check_mocoop,
}
for _module in sorted((ROOT / "tools").glob("golden_*.py")):
    CHECKS |= importlib.import_module(_module.stem).CHECKS


def relative_error(
    value: Any, reference: np.ndarray, size: float = 0.0, slack: Any = 0.0, axis: int | None = None
) -> float:
    """Return max|value - reference| / max|reference|; infinity if integers or values that are not finite differ.

    Args:
        value: What vlprompt computes.
        reference: The array of the archive.
        size: Replaces ``max|reference|`` if it is larger, for references that are zero up to rounding.
        slack: Absolute difference, of each entry, that counts as none.
        axis: Axis along which ``max|reference|`` is taken, for arrays whose columns have different scales.
    """
    got = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if got.shape != reference.shape:
        return float("inf")
    if reference.size == 0:
        return 0.0
    if np.issubdtype(reference.dtype, np.integer):
        return 0.0 if np.array_equal(got, reference) else float("inf")
    got, reference = got.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(got[~finite], reference[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    got, reference = np.where(finite, got, 0.0), np.where(finite, reference, 0.0)
    difference = np.maximum(np.abs(got - reference) - np.asarray(slack, dtype=np.float64), 0.0)
    scale = np.maximum(size, np.abs(reference).max(axis=axis, initial=0.0))
    return float((difference.max(axis=axis) / np.where(scale > 0, scale, 1.0)).max())


def check_file(path: Path) -> tuple[int, float, list[str]]:
    """Print the errors of one archive; return the number of compared arrays, largest error and uncompared arrays."""
    golden = Golden(path)
    method = golden.meta["method"]
    if method not in CHECKS:
        raise SystemExit(f"{path}: method {method!r} is not checked yet; known: {', '.join(CHECKS)}")
    print(f"{path}  ({method}" + (f", weights seed {golden.meta['weights_seed']})" if "dims" in golden.meta else ")"))
    if "dims" in golden.meta:
        _ = golden.backbone  # raises if it is another network
    count, worst, done = 0, 0.0, set()
    for name, value, *allowed in CHECKS[method](golden):
        if name not in golden.arrays:
            continue
        error = relative_error(value, golden.arrays[name], **(allowed[0] if allowed else {}))
        print(f"  {name:<70} {error:.1e}")
        count, worst = count + 1, max(worst, error)
        done.add(name)
    return count, worst, [name for name in golden.arrays if name not in done | golden.inputs]


def main(argv: list[str] | None = None) -> int:
    """Check all given files."""
    parser = argparse.ArgumentParser(description="Compare vlprompt with golden tensors.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tol", type=float, default=1e-4, help="largest accepted relative error (default 1e-4)")
    options = parser.parse_args(argv)
    count, worst, uncompared = 0, 0.0, []
    for path in options.files:
        if not path.is_file():
            parser.error(f"there is no file {path}")
        try:
            compared, error, missing = check_file(path)
        except VlpromptError as error_text:
            raise SystemExit(f"{path}: {error_text}") from error_text
        count, worst = count + compared, max(worst, error)
        uncompared += [f"{path.name}:{name}" for name in missing]
    if uncompared:
        print(f"not compared: {', '.join(uncompared)}")
    print(f"{count} arrays, max rel err {worst:.2e}")
    return int(bool(uncompared) or not worst <= options.tol or not count)


if __name__ == "__main__":
    sys.exit(main())
