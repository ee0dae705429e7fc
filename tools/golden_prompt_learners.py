"""Comparison of the golden files of prompt learners and regularisers: one function per file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import vlprompt
from vlprompt.config.run import RecipeConfig
from vlprompt.engine.recipe import learning_rate, make_optimizer
from vlprompt.objectives.aggregation import gaussian_weights
from vlprompt.objectives.projection import project
from vlprompt.objectives.shift import gram_norms
from vlprompt.prompts import template_layout

Results = Iterator[tuple[Any, ...]]
Names = dict[str, str]


def make(golden: Any, case: str, names: Names, method: str, **settings: Any) -> Any:
    """Return the method with the parameters of a case; ``names`` maps our names to the published ones."""
    made = vlprompt.create_method(method, golden.backbone, golden.meta["class_names"], **settings)
    state = made.trained_state()
    made.load_trained_state(
        {ours: golden.tensor(f"{case}/param/{names[ours]}") if ours in names else state[ours] for ours in state}
    )
    return made.train()


def trained(made: Any, case: str, images: torch.Tensor, labels: torch.Tensor, names: Names) -> Results:
    """Yield the logits of both paths, every loss term and the gradients."""
    step = made.step(images, labels)
    yield f"{case}/train_logits", step.logits
    yield f"{case}/image_features_raw", step.features
    made.zero_grad()
    terms = made.losses(images, labels)
    total = torch.stack(list(terms.values())).sum()
    yield from ((f"{case}/loss/{name}", term) for name, term in terms.items())
    yield f"{case}/loss/total", total
    total.backward()
    yield from ((f"{case}/grad/{names[name]}", p.grad) for name, p in made.trainable_parameters() if name in names)
    made.eval()
    with torch.no_grad():
        yield f"{case}/eval_logits", made(images)


def prompts(golden: Any, case: str, placeholder: str) -> Results:
    """Yield the tokens of the class prompts."""
    words = [name.replace("_", " ") for name in golden.meta["class_names"]]
    yield f"{case}/tokens", golden.tokens([f"{placeholder} {word}." for word in words])


def check_cocoop(golden: Any) -> Results:
    """Compare shifts, text features of every image, logits and gradients."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    nets = [f"meta_net.linear{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    names = {"prompt.ctx": "ctx", **{name: name for name in nets}}
    for case, options in golden.meta["cases"].items():
        settings = {"context_length": options["n_ctx"], "context_init": options["ctx_init"], "images_at_once": 2}
        made = make(golden, case, names, "cocoop", **settings)
        used = images[: options["images_used"]]
        yield from prompts(golden, case, made.prompt.placeholder)
        unit = F.normalize(made.image_features(used), dim=-1)
        yield f"{case}/meta_bias", made.meta_net(unit)
        yield f"{case}/text_features_raw", golden.backbone.text.encode(made.layout, made.contexts(unit))
        yield from trained(made, case, used, labels[: options["images_used"]], names)


def check_kgcoop(golden: Any) -> Results:
    """Compare the frozen template, both terms and gradients."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    names = {"prompt.ctx": "ctx"}
    for case, options in golden.meta["cases"].items():
        # Any words mean these in the official code (KgCoOp/trainers/kgcoop.py 94-104), and no class-specific context.
        words = "a photo of a" if options["ctx_init"] else ""
        settings = {
            "context_length": options["n_ctx"],
            "context_init": words,
            "class_specific": options["class_specific"] and not words,
            "knowledge": {"weight": options["weight"], "templates": [options["frozen_template"]]},
        }
        made = make(golden, case, names, "kgcoop", **settings)
        if words:
            fresh = vlprompt.create_method("kgcoop", golden.backbone, golden.meta["class_names"], **settings)
            yield f"{case}/official_init/ctx", fresh.prompt.ctx.detach()
        yield from prompts(golden, case, made.prompt.placeholder)
        yield f"{case}/frozen_text_features", made.objectives[0].target
        yield f"{case}/text_features_raw", golden.backbone.text.encode(made.layout, made.prompt.ctx)[0]
        for name, value in trained(made, case, images, labels, names):
            yield name, value / options["weight"] if name.endswith("/knowledge") else value


def check_prograd(golden: Any) -> Results:
    """Compare both losses, both gradients and the applied gradient."""
    images, names = golden.tensor("images"), {"prompt.ctx": "ctx"}
    golden.inputs.add("labels")
    for case, options in golden.meta["cases"].items():
        labels = golden.tensor(f"{case}/labels")
        base_settings = {"context_length": options["n_ctx"]}
        base_settings["class_specific"] = options["class_specific"] and not options["ctx_init"]
        base_settings["projected_gradient"] = {
            "strength": options["lambda_"],
            "temperature": options["temperature"],
            "templates": [options["zeroshot_template"]],
        }
        base_settings["context_init"] = "template" if options["ctx_init"] else ""
        made = make(golden, case, names, "prograd", **base_settings)
        if f"{case}/official_init/ctx" in golden.arrays:
            fresh = vlprompt.create_method("prograd", golden.backbone, golden.meta["class_names"], **base_settings)
            yield f"{case}/official_init/ctx", fresh.prompt.ctx.detach()
        yield from prompts(golden, case, made.prompt.placeholder)
        projection, step = made.objectives[0], made.step(images, labels)
        target = golden.backbone.logit_scale * F.normalize(step.frozen_features(), dim=-1) @ projection.target.t()
        yield f"{case}/zeroshot_logits", target
        task = torch.autograd.grad(F.cross_entropy(step.logits, labels), made.prompt.ctx, retain_graph=True)[0]
        general = torch.autograd.grad(projection.general_loss(step), made.prompt.ctx)[0]
        yield f"{case}/grad_task/ctx", task
        yield f"{case}/grad_general/ctx", general
        yield f"{case}/cosine", F.cosine_similarity(task.flatten(), general.flatten(), dim=0)
        assert torch.equal(project(general, general, options["lambda_"]), general)
        published = {"ce": "xe", "general": "kl"}
        for name, value in trained(made, case, images, labels, names):
            head, _, last = name.rpartition("/")
            yield f"{head}/{published.get(last, last)}", value


def _visual(depth: int, ours: str = "visual") -> Names:
    deep = {f"{ours}.deep.{i - 1}": f"image_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, depth)}
    return {f"{ours}.input": "image_encoder.VPT", **deep} if depth else {}


def _text(depth: int) -> Names:
    deep = {f"context.deep.{i - 1}": f"text_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, depth)}
    return {"context.ctx": "prompt_learner.ctx", **deep}


def check_vpt(golden: Any) -> Results:
    """Compare features, logits and gradients of shallow and deep image tokens."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    template = next(iter(golden.meta["cases"].values()))["template"]
    layout = template_layout(golden.backbone.text, golden.meta["class_names"], [template])
    yield "text_features_raw", golden.backbone.text.encode(layout)[0]
    for case, options in golden.meta["cases"].items():
        names = _visual(options["depth_vision"])
        settings = {"image_tokens": options["n_ctx_vision"], "image_depth": options["depth_vision"]}
        yield from trained(
            make(golden, case, names, "vpt", template=options["template"], **settings), case, images, labels, names
        )


def _ivlp(options: Any) -> dict[str, Any]:
    return {
        "context_length": options["n_ctx_text"],
        "context_init": options["ctx_init"],
        "text_depth": options["depth_text"],
        "image_tokens": options["n_ctx_vision"],
        "image_depth": options["depth_vision"],
    }


def _deep(golden: Any, case: str, made: Any, context: Any) -> Results:
    yield from prompts(golden, case, context.placeholder)
    text = golden.backbone.text.encode(made.layout, context.ctx, context.layers())[0]
    yield f"{case}/text_features_raw", text


def check_ivlp(golden: Any) -> Results:
    """Compare deep prompts of both towers."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    for case, options in golden.meta["cases"].items():
        names = _text(options["depth_text"]) | _visual(options["depth_vision"])
        made = make(golden, case, names, "ivlp", **_ivlp(options))
        if f"{case}/official_init/prompt_learner.ctx" in golden.arrays:
            fresh = vlprompt.create_method("ivlp", golden.backbone, golden.meta["class_names"], **_ivlp(options))
            yield f"{case}/official_init/prompt_learner.ctx", fresh.context.ctx.detach()
        yield from _deep(golden, case, made, made.context)
        yield from trained(made, case, images, labels, names)


#: Published initial words (muzairkhattak/PromptSRC: configs/trainers/PromptSRC/), of cases that state none.
_WORDS = "a photo of a"


def check_promptsrc(golden: Any) -> Results:
    """Compare frozen features, the four terms, gradients, and the aggregation over epochs."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    templates = golden.meta["frozen_text_templates"]
    for case, options in golden.meta["cases"].items():
        if "epochs" in options:
            weights = gaussian_weights(options["epochs"], options["mean"], options["std"])
            trained_too = "depth_text" in options
            yield f"{case}/weights_f64" if trained_too else f"{case}_f64", weights
            if trained_too:
                yield from _aggregation(golden, case, options, images)
            continue
        names = _text(options["depth_text"]) | _visual(options["depth_vision"])
        terms = {"text": options["text_loss_weight"], "image": options["image_loss_weight"], "templates": templates}
        settings = {"aggregation": None, "self_regularisation": terms, **_ivlp(options)}
        made = make(golden, case, names, "promptsrc", **settings)
        fresh = vlprompt.create_method("promptsrc", golden.backbone, golden.meta["class_names"], **settings)
        yield f"{case}/official_init/prompt_learner.ctx", fresh.context.ctx.detach()
        yield from _deep(golden, case, made, made.context)
        step, target = made.step(images, labels), made.objectives[0].target
        frozen = F.normalize(step.frozen_features(), dim=-1)
        layouts = [
            template_layout(golden.backbone.text, golden.meta["class_names"], [template]) for template in templates
        ]
        yield (
            f"{case}/frozen_text_mean_raw",
            torch.stack([golden.backbone.text.encode(layout)[0] for layout in layouts]).mean(0),
        )
        yield f"{case}/frozen_text_features", target
        yield f"{case}/frozen_image_features", frozen
        yield f"{case}/frozen_log_probs", (golden.backbone.logit_scale * frozen @ target.t()).log_softmax(-1)
        yield f"{case}/text_features", step.text_features
        yield f"{case}/image_features", step.unit_image
        yield from trained(made, case, images, labels, names)


def _aggregation(golden: Any, case: str, options: Any, images: torch.Tensor) -> Results:
    names = _text(options["depth_text"]) | _visual(options["depth_vision"])
    epochs = options["epochs"]
    settings = {"aggregation": {"mean": float(options["mean"]), "deviation": float(options["std"])}}
    # The words decide which tokens follow a context that is shorter than they are.
    settings |= _ivlp({"ctx_init": _WORDS, **options})
    made = make(golden, case, names, "promptsrc", **settings)
    for epoch in range(epochs):
        with torch.no_grad():
            for ours, parameter in made.trainable_parameters():
                parameter.copy_(golden.tensor(f"{case}/epoch{epoch + 1}/{names[ours]}"))
        made.epoch_end(epoch, epochs)
    made.train_end()
    yield from ((f"{case}/final/{names[ours]}", parameter.detach()) for ours, parameter in made.trainable_parameters())
    made.eval()
    yield f"{case}/eval_logits", made(images)


def _coupled(depth: int) -> Names:
    names = {"prompts.context.ctx": "ctx", "prompts.proj.weight": "proj.weight", "prompts.proj.bias": "proj.bias"}
    for i in range(depth - 1):
        names[f"prompts.context.deep.{i}"] = f"compound_prompts_text.{i}"
        names |= {
            f"prompts.projections.{i}.{kind}": f"compound_prompt_projections.{i}.{kind}" for kind in ("weight", "bias")
        }
    return names


def check_maple(golden: Any) -> Results:
    """Compare coupled prompts of both towers."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    for case, options in golden.meta["cases"].items():
        names = _coupled(options["prompt_depth"])
        settings = {
            "context_length": options["n_ctx"],
            "context_init": options["ctx_init"],
            "depth": options["prompt_depth"],
        }
        fresh = vlprompt.create_method("maple", golden.backbone, golden.meta["class_names"], **settings)
        yield f"{case}/official_init/ctx", fresh.prompts.context.ctx.detach()
        made = make(golden, case, names, "maple", **settings)
        yield from _deep(golden, case, made, made.prompts.context)
        yield f"{case}/vision_prompts", torch.stack(made.prompts.image_prompts())
        yield from trained(made, case, images, labels, names)


_ADAPTER = {"norm": "post_ln", "up": "FFN.0", "down": "FFN.2"}


def check_restore(golden: Any) -> Results:
    """Compare shifts, surgery, both terms, gradients, the change of the ratios, and some epochs of training."""
    images, labels = golden.tensor("images"), golden.tensor("labels")
    for case, options in golden.meta["cases"].items():
        names = _coupled(options["prompt_depth"])
        for side, published in (("text", "text_adapter"), ("image", "visual_adapter")):
            for ours, theirs in _ADAPTER.items():
                names |= {f"objectives.0.{side}.{ours}.{k}": f"{published}.{theirs}.{k}" for k in ("weight", "bias")}
        ratios = {"text_ratio": options["text_ratio"], "image_ratio": options["vision_ratio"]}
        gains = {"text_gain": options["text_gain"], "image_gain": options["vision_gain"]}
        start = options["starts_from"].rpartition("/")[0] if "starts_from" in options else case
        hidden, dim = golden.meta["cases"][start]["surgery_hidden"], golden.backbone.embed_dim
        golden.expect(hidden % dim == 0, f"surgery_hidden of {start} is {hidden}; expected: a multiple of {dim}")
        settings = {
            "context_length": options["n_ctx"],
            "context_init": options["ctx_init"],
            "depth": options["prompt_depth"],
            "shift_consistency": {"weight": options["shift_weight"]},
            "surgery": {**ratios, **gains, "expansion": hidden // dim},
        }
        made = make(golden, start, names, "restore", **settings)
        if start != case:
            yield from _restore_run(golden, case, options, made, images, labels, names)
            continue
        fresh = vlprompt.create_method("restore", golden.backbone, golden.meta["class_names"], **settings)
        yield f"{case}/official_init/ctx", fresh.prompts.context.ctx.detach()
        yield from _deep(golden, case, made, made.prompts.context)
        yield f"{case}/vision_prompts", torch.stack(made.prompts.image_prompts())
        yield from _restore_parts(golden, case, options, made, images, labels, names)


def _restore_parts(
    golden: Any, case: str, options: Any, made: Any, images: torch.Tensor, labels: torch.Tensor, names: Names
) -> Results:
    backbone = golden.backbone
    surgery, shift = made.objectives
    deep = made.prompts.context.deep
    now = [vectors.detach().clone() for vectors in deep]
    with torch.no_grad():
        for index, vectors in enumerate(deep):
            vectors.copy_(golden.tensor(f"{case}/reference/compound_prompts_text.{index}"))
    # The shift term is zero by definition, so its error is absolute.
    yield from trained(made, f"{case}/step0", images, labels, names)
    yield f"{case}/reference_norm_text", shift.text_reference
    yield f"{case}/reference_norm_vision", shift.image_reference
    yield f"{case}/step0/shift_text", shift.shifts()[0]
    yield f"{case}/step0/shift_vision", shift.shifts()[1]
    with torch.no_grad():
        for vectors, value in zip(deep, now, strict=True):
            vectors.copy_(value)
    made.train()
    text_norms, image_norms = (gram_norms(side) for side in made.deep_prompts())
    yield f"{case}/prompt_norm_text", text_norms
    yield f"{case}/prompt_norm_vision", image_norms
    yield f"{case}/shift_text", shift.shifts()[0]
    yield f"{case}/shift_vision", shift.shifts()[1]
    context = made.prompts.context
    raw = {
        "text": backbone.text.encode(made.layout, context.ctx, context.layers())[0],
        "image": made.image_features(images),
    }
    for side, adapter in (("text", surgery.text), ("image", surgery.image)):
        adapted = surgery.adapt_text(raw[side]) if side == "text" else surgery.adapt_image(raw[side])
        yield f"{case}/{side}_adapter_output", raw[side] + adapter(raw[side])
        yield f"{case}/{side}_features_surgery", adapted
    layout = template_layout(backbone.text, golden.meta["class_names"], [f"{context.placeholder} {{}}."])
    frozen_text, frozen_image = backbone.text.encode(layout)[0], backbone.encode_image(images)
    yield f"{case}/frozen_text_features_raw", frozen_text
    yield f"{case}/frozen_image_features_raw", frozen_image
    scale = backbone.logit_scale
    yield f"{case}/frozen_logits", scale * F.normalize(frozen_image, dim=-1) @ F.normalize(frozen_text, dim=-1).t()
    for name, value in trained(made, case, images, labels, names):
        yield name, value / options["shift_weight"] if name.endswith("/loss/shift") else value
    before = surgery.text_strength.clone(), surgery.image_strength.clone()
    surgery.text_strength.zero_(), surgery.image_strength.zero_()
    made._remembered.clear()
    with torch.no_grad():
        yield f"{case}/eval_logits_no_surgery", made(images)
    surgery.text_strength.copy_(before[0]), surgery.image_strength.copy_(before[1])
    surgery.epoch_end(0, 1)  # the first of one epoch is the one at which a third is over
    made._remembered.clear()
    yield f"{case}/r_text_f64", torch.stack([before[0], surgery.text_strength])
    yield f"{case}/r_vision_f64", torch.stack([before[1], surgery.image_strength])
    with torch.no_grad():
        yield f"{case}/eval_logits_updated", made(images)


def _restore_run(
    golden: Any, case: str, run: Any, made: Any, images: torch.Tensor, labels: torch.Tensor, names: Names
) -> Results:
    surgery, shift = made.objectives
    schedule = {name: run[name] for name in ("epochs", "lr", "warmup_epochs", "warmup_lr")}
    used, third = sum(run["batches"]), run["epochs"] // 3
    golden.expect(used == len(images), f"{case}: batches of {used} images in all; the archive has {len(images)}")
    golden.expect(run["update_epoch"] == third, f"{case}: update_epoch is {run['update_epoch']}; ours is {third}")
    recipe = RecipeConfig(**schedule, **golden.optimizer(run["optimizer"], "SGD", "momentum", "weight_decay"))
    optimizer = make_optimizer(made.parameter_groups(run["lr"]), recipe)
    seen: dict[str, list[Any]] = {
        "lr_f64": [],
        "r_text_f64": [],
        "r_vision_f64": [],
        "shift_text": [],
        "shift_vision": [],
    }
    losses: dict[str, list[Any]] = {"ce": [], "shift": [], "total": []}
    for epoch in range(run["epochs"]):
        rate = learning_rate(epoch, run["lr"], recipe)
        optimizer.param_groups[0]["lr"] = rate
        seen["lr_f64"].append(rate)
        seen["r_text_f64"].append(float(surgery.text_strength))
        seen["r_vision_f64"].append(float(surgery.image_strength))
        start = 0
        for size in run["batches"]:
            rows = slice(start, start + size)
            start += size
            terms = made.losses(images[rows], labels[rows])
            total = torch.stack(list(terms.values())).sum()
            for name, value in {
                "ce": terms["ce"],
                "shift": terms["shift"] / run["shift_weight"],
                "total": total,
            }.items():
                losses[name].append(value.detach())
            for side, value in zip(("shift_text", "shift_vision"), shift.shifts(), strict=True):
                seen[side].append(value.detach().clone())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        if epoch == run["update_epoch"]:
            norms = [gram_norms(side).detach() for side in made.deep_prompts()]
            yield f"{case}/update_norm_text", norms[0]
            yield f"{case}/update_norm_vision", norms[1]
        made.epoch_end(epoch, run["epochs"])
    seen["r_text_f64"].append(float(surgery.text_strength))
    seen["r_vision_f64"].append(float(surgery.image_strength))
    yield from ((f"{case}/{name}", np.array([np.asarray(v) for v in values])) for name, values in seen.items())
    yield from ((f"{case}/loss/{name}", torch.stack(values)) for name, values in losses.items())
    parameters = dict(made.trainable_parameters())
    yield from ((f"{case}/final/{theirs}", parameters[ours].detach()) for ours, theirs in names.items())
    made.eval()
    with torch.no_grad():
        yield f"{case}/eval_logits", made(images)


CHECKS: dict[str, Callable[[Any], Results]] = {
    "cocoop": check_cocoop,
    "kgcoop": check_kgcoop,
    "prograd": check_prograd,
    "vpt": check_vpt,
    "ivlp": check_ivlp,
    "promptsrc": check_promptsrc,
    "maple": check_maple,
    "restore": check_restore,
}
