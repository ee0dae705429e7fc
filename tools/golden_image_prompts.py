"""How the golden files of pixel prompts, unified prompts and distillation are compared: one function per file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import vlprompt
from vlprompt.backbone import VisualTokens
from vlprompt.objectives.targets import template_features

Results = Iterator[tuple[str, Any]]


# -- VP ---------------------------------------------------------------------------------------------------------------
def check_visual_prompt(golden: Any) -> Results:
    """Border and patches: prompted pixels, logits, loss, gradients, and two SGD steps at the warm-up's rates."""
    hyper = golden.meta["hyper"]
    images, labels, size = golden.tensor("images").float(), golden.tensor("labels"), hyper["B"]
    for case in ("padding", "fixed_patch", "random_patch"):
        shape = "border" if case == "padding" else case
        own = {"shape": shape, "prompt_size": hyper["prompt_size"], "template": hyper["template"]}
        made = vlprompt.create_method("visual_prompt", golden.backbone, hyper["classes"], **own)
        yield "logits_no_prompt", made.logits(golden.backbone.encode_image(images))
        words = [name.replace("_", " ").replace("-", " ") for name in hyper["classes"]]
        yield "text_tokens", golden.tokens([hyper["template"].format(word) for word in words])
        names = {name: f"pad_{name[7:]}" if case == "padding" else "patch" for name, _ in made.learnables()}
        made.load_learnable_state({own: golden.tensor(f"{case}_init_{name}")[0] for own, name in names.items()})
        optimizer = torch.optim.SGD(made.parameter_groups(hyper["lr"]), lr=hyper["lr"], momentum=hyper["momentum"])
        losses, rates = [], []
        for step in range(2):
            part = slice(size * step, size * (step + 1))
            if case == "random_patch":  # the published places, one a step
                made.prompt.corner = functools.partial(tuple, golden.tensor("random_patch_offsets")[step].tolist())
            if step == 0:
                yield f"{case}_output_image0", images[0] + made.prompt.pixels()
            rates.append(hyper["lr"] * (step + 1) / hyper["warmup"])
            optimizer.param_groups[0]["lr"] = rates[-1]
            found = made.step(images[part], labels[part])
            yield f"{case}_step{step}_logits", found.logits
            loss = torch.stack(list(made.step_losses(found).values())).sum()
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            yield from ((f"{case}_step{step}_grad_{names[own]}", p.grad[None]) for own, p in made.learnables())
            optimizer.step()
            yield from ((f"{case}_step{step}_after_{names[own]}", p.detach()[None]) for own, p in made.learnables())
        yield f"{case}_loss", torch.stack(losses)
        yield f"{case}_lr", rates


# -- UPT --------------------------------------------------------------------------------------------------------------
_BLOCK = [f"{part}.{kind}" for part in ("attn.out_proj", "ln_1", "ln_2") for kind in ("weight", "bias")]
_BLOCK += [f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]
_MAPS = {
    f"{side}_{end}": f"{old}_{end}" for side, old in (("text", "coop"), ("image", "vpt")) for end in ("pre", "post")
}
_UPT = {
    "context.ctx": "ctx",
    **{f"block.{name}": f"mvlpt_proj.resblocks.0.{name}" for name in (*_BLOCK, "attn.in_proj_weight")},
    "block.attn.in_proj_bias": "mvlpt_proj.resblocks.0.attn.in_proj_bias",
    **{f"{own}.{kind}": f"mvlpt_proj_ctx_{old}.{kind}" for own, old in _MAPS.items() for kind in ("weight", "bias")},
}


def check_upt(golden: Any) -> Results:
    """Projected prompts, features, logits, loss, gradients and a first SGD step; deep image tokens by themselves."""
    images, labels = golden.tensor("images").float(), golden.tensor("labels")
    tasks = golden.tensor("tasks")
    for case, options in golden.meta["hyper"]["cases"].items():
        if options["method"] == "identity":
            yield from (
                (f"{case}_{name}", value) for name, value in _image_tokens(golden, case, options, images, labels)
            )
            continue
        own = {"context_length": options["coop"], "image_tokens": options["vpt"], "width": options["dim"]}
        own |= {"image_depth": 12 if options["deep"] else 1, "class_token_position": options["pos"]}
        made = vlprompt.create_method("upt", golden.backbone, options["names"], **own)
        prompts = made.prompts
        deep = [f"{case}_param[vpt_embeddings_deep]"] if options["deep"] else []
        visual = torch.cat([golden.tensor(name).float() for name in (f"{case}_param[vpt_embeddings]", *deep)])
        names = {f"prompts.{ours}": name for ours, name in _UPT.items() if f"{case}_param[{name}]" in golden.arrays}
        given = {ours: golden.tensor(f"{case}_param[{name}]").float() for ours, name in names.items()}
        made.load_learnable_state({**given, "prompts.visual": visual})
        tokens = prompts.tokens()
        yield f"{case}_text_context", prompts.vectors()
        yield f"{case}_vision_prompt", tokens.input[None]
        if options["deep"]:
            yield f"{case}_vision_prompt_deep", torch.stack(list(tokens.deep.values()))
        yield f"{case}_cross_token_effect", _effect(prompts)
        yield f"{case}_tokens", _cut(golden, f"{' '.join(['X'] * options['coop'])} {{}}.", options)
        step = made.step(images, labels)
        yield f"{case}_image_features", step.unit_image
        yield f"{case}_text_features", step.class_weights
        logits = step.logits
        if options.get("pertask"):  # the first half of the classes is task 0; foreign logits count as 0
            of = torch.arange(len(options["names"])) * 2 // len(options["names"])
            logits = logits * (of[None] == tasks[:, None])
        yield from ((f"{case}_{name}", value) for name, value in _stepped(golden, case, made, names, logits, labels))


def _effect(prompts: Any) -> float:
    """Return how far other prompts move when the first text prompt does, in the block's own width."""
    before = prompts.vectors()[1:].detach(), prompts.tokens().input.detach()
    moved = torch.zeros_like(prompts.context.ctx)
    moved[0] = 1
    with torch.no_grad():
        prompts.context.ctx += moved
        after = prompts.vectors()[1:], prompts.tokens().input
        effect = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        prompts.context.ctx -= moved
    return effect


def _cut(golden: Any, template: str, options: Any) -> Any:
    found = golden.tokens([template.format(name.replace("_", " ")) for name in options["names"]])
    return found[:, : int((found > 0).sum(axis=1).max())] if options["cut"] else found


def _stepped(golden: Any, case: str, made: Any, names: Any, logits: Any, labels: Any) -> Results:
    """Yield logits, loss, and strided gradients and values after one SGD step; image tokens in the published parts."""
    options, strides = golden.meta["hyper"]["cases"][case], golden.meta["hyper"]["stored_stride"][case]
    loss = F.cross_entropy(logits, labels)
    yield "logits", logits
    yield "loss", loss
    optimizer = torch.optim.SGD(made.parameter_groups(options["lr"]), momentum=0.9, weight_decay=5e-4)
    loss.backward()
    optimizer.step()
    for name, parameter in made.learnables():
        for kind, value in (("grad", parameter.grad), ("after", parameter.detach())):
            parts = {names.get(name): value}
            if name == "prompts.visual":
                parts = {"vpt_embeddings": value[:1], "vpt_embeddings_deep": value[1:]}
            yield from ((f"{kind}[{key}]", part.flatten()[:: strides.get(key, 1)]) for key, part in parts.items())


def _image_tokens(golden: Any, case: str, options: Any, images: Any, labels: Any) -> Results:
    """Deep image tokens at MVLPT's place, without projection and beside frozen text."""
    first, deep = (golden.tensor(f"{case}_param[vpt_embeddings{part}]").float() for part in ("", "_deep"))
    first, deep = first.requires_grad_(), deep.requires_grad_()
    tokens = VisualTokens(first[0], dict(enumerate(deep, 1)), position="after_class", before_ln_pre=False)
    yield "vision_prompt", first
    yield "vision_prompt_deep", deep
    yield "tokens", _cut(golden, "a photo of a {}.", options)
    text = template_features(golden.backbone, options["names"], ["a photo of a {}."])
    unit = F.normalize(golden.backbone.encode_image(images, tokens), dim=-1)
    yield "image_features", unit
    yield "text_features", text
    loss = F.cross_entropy(golden.backbone.logit_scale * unit @ text.t(), labels)
    yield "logits", golden.backbone.logit_scale * unit @ text.t()
    yield "loss", loss
    loss.backward()
    optimizer = torch.optim.SGD([first, deep], lr=options["lr"], momentum=0.9, weight_decay=5e-4)
    optimizer.step()
    for name, value in (("vpt_embeddings", first), ("vpt_embeddings_deep", deep)):
        yield f"grad[{name}]", value.grad.flatten()
        yield f"after[{name}]", value.detach().flatten()


CHECKS = {
    "Visual prompting (padding / fixed patch / random patch)": check_visual_prompt,
    "MVLPT: unified prompt tuning (UPT) and deep visual prompts": check_upt,
}
