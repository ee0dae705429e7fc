"""Comparison of the golden files of pixel prompts, unified prompts and distillation: one function per file."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import tiny_clip
import torch
import torch.nn.functional as F

import vlprompt
from vlprompt.backbone import Backbone, VisualTokens
from vlprompt.config.run import RecipeConfig
from vlprompt.engine.recipe import learning_rate, make_optimizer
from vlprompt.methods.teacher import Teacher
from vlprompt.prompts.zero_shot import template_features

Results = Iterator[tuple[Any, ...]]


# -- VP ---------------------------------------------------------------------------------------------------------------
def check_visual_prompt(golden: Any) -> Results:
    """Compare prompted pixels, logits, loss, gradients and the first SGD steps, for border and patches."""
    hyper = golden.meta["hyper"]
    images, labels, size = golden.tensor("images").float(), golden.tensor("labels"), hyper["B"]
    steps = len(images) // size
    # hjbahng/visual_prompting's utils.py: the rate changes by the step, on a line to lr, then on a cosine to zero.
    schedule = {"schedule": "step", "warmup_steps": hyper["warmup"], "final_lr": 0.0, "epochs": hyper["epochs"]}
    recipe = RecipeConfig(lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["wd"], **schedule)
    for case in ("padding", "fixed_patch", "random_patch"):
        shape = "border" if case == "padding" else case
        settings = {"shape": shape, "prompt_size": hyper["prompt_size"], "template": hyper["template"]}
        made = vlprompt.create_method("visual_prompt", golden.backbone, hyper["classes"], **settings)
        yield "logits_no_prompt", made.logits(golden.backbone.encode_image(images))
        words = [name.replace("_", " ").replace("-", " ") for name in hyper["classes"]]
        yield "text_tokens", golden.tokens([hyper["template"].format(word) for word in words])
        names = {name: f"pad_{name[7:]}" if case == "padding" else "patch" for name, _ in made.trainable_parameters()}
        made.load_trained_state({ours: golden.tensor(f"{case}_init_{name}")[0] for ours, name in names.items()})
        optimizer = make_optimizer(made.parameter_groups(hyper["lr"]), recipe)
        losses, rates = [], []
        for step in range(steps):
            rows = slice(size * step, size * (step + 1))
            if case == "random_patch":  # the published positions, one per step
                made.prompt.corner = functools.partial(tuple, golden.tensor("random_patch_offsets")[step].tolist())
            if step == 0:
                yield f"{case}_output_image0", images[0] + made.prompt.pixels()
            rates.append(learning_rate(step, hyper["lr"], recipe, per_epoch=steps))
            optimizer.param_groups[0]["lr"] = rates[-1]
            result = made.step(images[rows], labels[rows])
            yield f"{case}_step{step}_logits", result.logits
            loss = torch.stack(list(made.step_losses(result).values())).sum()
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            yield from (
                (f"{case}_step{step}_grad_{names[ours]}", p.grad[None]) for ours, p in made.trainable_parameters()
            )
            optimizer.step()
            yield from (
                (f"{case}_step{step}_after_{names[ours]}", p.detach()[None]) for ours, p in made.trainable_parameters()
            )
        yield f"{case}_loss", torch.stack(losses)
        yield f"{case}_lr", rates


# -- UPT --------------------------------------------------------------------------------------------------------------
_BLOCK = [f"{layer}.{kind}" for layer in ("attn.out_proj", "ln_1", "ln_2") for kind in ("weight", "bias")]
_BLOCK += [f"mlp.{layer}.{kind}" for layer in ("c_fc", "c_proj") for kind in ("weight", "bias")]
_MAPS = {
    f"{side}_{end}": f"{old}_{end}" for side, old in (("text", "coop"), ("image", "vpt")) for end in ("pre", "post")
}
_UPT = {
    "context.ctx": "ctx",
    **{f"block.{name}": f"mvlpt_proj.resblocks.0.{name}" for name in (*_BLOCK, "attn.in_proj_weight")},
    "block.attn.in_proj_bias": "mvlpt_proj.resblocks.0.attn.in_proj_bias",
    **{f"{ours}.{kind}": f"mvlpt_proj_ctx_{old}.{kind}" for ours, old in _MAPS.items() for kind in ("weight", "bias")},
}


def check_upt(golden: Any) -> Results:
    """Compare projected prompts, features, logits, loss, gradients and an SGD step; deep image tokens separately."""
    images, labels = golden.tensor("images").float(), golden.tensor("labels")
    tasks = golden.tensor("tasks")
    for case, options in golden.meta["hyper"]["cases"].items():
        if options["method"] == "identity":
            yield from (
                (f"{case}_{name}", value) for name, value in _image_tokens(golden, case, options, images, labels)
            )
            continue
        settings = {"context_length": options["coop"], "image_tokens": options["vpt"], "width": options["dim"]}
        depth = golden.meta["dims"]["vision_layers"] if options["deep"] else 1
        settings |= {"image_depth": depth, "class_token_position": options["pos"]}
        made = vlprompt.create_method("upt", golden.backbone, options["names"], **settings)
        prompts = made.prompts
        deep = [f"{case}_param[vpt_embeddings_deep]"] if options["deep"] else []
        visual = torch.cat([golden.tensor(name).float() for name in (f"{case}_param[vpt_embeddings]", *deep)])
        names = {f"prompts.{ours}": name for ours, name in _UPT.items() if f"{case}_param[{name}]" in golden.arrays}
        given = {ours: golden.tensor(f"{case}_param[{name}]").float() for ours, name in names.items()}
        made.load_trained_state({**given, "prompts.visual": visual})
        tokens = prompts.tokens()
        yield f"{case}_text_context", prompts.vectors()
        yield f"{case}_vision_prompt", tokens.input[None]
        if options["deep"]:
            yield f"{case}_vision_prompt_deep", torch.stack(list(tokens.deep.values()))
        yield f"{case}_cross_token_effect", _effect(prompts)
        yield f"{case}_tokens", _cut(golden, f"{' '.join(['X'] * options['coop'])} {{}}.", options)
        step = made.step(images, labels)
        yield f"{case}_image_features", step.unit_image
        yield f"{case}_text_features", step.text_features
        logits, reference = step.logits, torch.from_numpy(golden.arrays[f"{case}_logits"])
        if options.get("pertask"):  # logits of other tasks are 0; the archive's zeros say which classes a task has
            own = torch.stack([(reference[tasks == task] != 0).any(dim=0) for task in tasks])
            golden.expect(not bool(own.all()), f"{case}: pertask is true, but no logits of other tasks are 0")
            logits = logits * own
        yield from ((f"{case}_{name}", value) for name, value in _stepped(golden, case, made, names, logits, labels))


def _effect(prompts: Any) -> float:
    """Return the change of other prompts if the first text prompt changes by 1, in the block's width."""
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
    tokens = golden.tokens([template.format(name.replace("_", " ")) for name in options["names"]])
    return tokens[:, : int((tokens > 0).sum(axis=1).max())] if options["cut"] else tokens


def _stepped(golden: Any, case: str, made: Any, names: Any, logits: Any, labels: Any) -> Results:
    """Yield logits, loss, and strided gradients and values after one SGD step; image tokens split as published."""
    options, strides = golden.meta["hyper"]["cases"][case], golden.meta["hyper"]["stored_stride"][case]
    loss = F.cross_entropy(logits, labels)
    yield "logits", logits
    yield "loss", loss
    optimizer = _sgd(golden, made.parameter_groups(options["lr"]), options["lr"])
    loss.backward()
    optimizer.step()
    for name, parameter in made.trainable_parameters():
        for kind, value in (("grad", parameter.grad), ("after", parameter.detach())):
            tensors = {names.get(name): value}
            if name == "prompts.visual":
                tensors = {"vpt_embeddings": value[:1], "vpt_embeddings_deep": value[1:]}
            yield from ((f"{kind}[{key}]", tensor.flatten()[:: strides.get(key, 1)]) for key, tensor in tensors.items())


def _sgd(golden: Any, groups: Any, lr: float) -> torch.optim.Optimizer:
    stated = golden.optimizer(golden.meta["hyper"]["optimizer"], "SGD", "momentum", "weight_decay")
    return make_optimizer(groups, RecipeConfig(lr=lr, **stated))


def _image_tokens(golden: Any, case: str, options: Any, images: Any, labels: Any) -> Results:
    """Compare deep image tokens at MVLPT's position, without projection and with frozen text."""
    golden.expect(not options["coop"], f"{case}: {options['coop']} text vectors without a projection; expected: 0")
    suffixes = ("", "_deep") if options["deep"] else ("",)
    first, *deep = (golden.tensor(f"{case}_param[vpt_embeddings{suffix}]").float() for suffix in suffixes)
    trained = {"vpt_embeddings": first, **dict(zip(["vpt_embeddings_deep"], deep, strict=False))}
    layers = {layer: value for tokens in deep for layer, value in enumerate(tokens.requires_grad_(), 1)}
    tokens = VisualTokens(first.requires_grad_()[0], layers, position="after_class", before_ln_pre=False)
    yield "vision_prompt", first
    yield from (("vision_prompt_deep", value) for value in deep)
    yield "tokens", _cut(golden, "a photo of a {}.", options)
    text = template_features(golden.backbone, options["names"], ["a photo of a {}."])
    unit = F.normalize(golden.backbone.encode_image(images, tokens), dim=-1)
    yield "image_features", unit
    yield "text_features", text
    loss = F.cross_entropy(golden.backbone.logit_scale * unit @ text.t(), labels)
    yield "logits", golden.backbone.logit_scale * unit @ text.t()
    yield "loss", loss
    loss.backward()
    optimizer = _sgd(golden, [{"params": [first, *deep]}], options["lr"])
    optimizer.step()
    strides = golden.meta["hyper"]["stored_stride"][case]
    for name, value in trained.items():
        yield f"grad[{name}]", value.grad.flatten()[:: strides[name]]
        yield f"after[{name}]", value.detach().flatten()[:: strides[name]]


# -- PromptKD ---------------------------------------------------------------------------------------------------------
_PROJECTOR = {"linear1.weight": "0.weight", "linear1.bias": "0.bias", "weight": "1.weight", "bias": "1.bias"}
_PROJECTOR |= {"linear2.weight": "3.weight", "linear2.bias": "3.bias"}
_TRANS = "VPT_image_trans.conv1."


def _tokens(side: str, depth: int, ours: str) -> dict[str, str]:
    deep = {f"{ours}.deep.{i - 1}": f"{side}.transformer.resblocks.{i}.VPT_shallow" for i in range(1, depth)}
    return {f"{ours}.input": f"{side}.VPT", **deep}


def _depth(golden: Any, prefix: str) -> int:
    """Return the number of layers with prompts of their own: the input's, and one for each array of a deeper layer."""
    found = [re.fullmatch(rf"{re.escape(prefix)}.transformer.resblocks.(\d+).VPT_shallow", n) for n in golden.arrays]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _teacher(golden: Any) -> Any:
    """Return the teacher, which has deep prompts in both towers of the larger network."""
    facts = golden.meta["teacher"]
    state = tiny_clip.build_state_dict(tiny_clip.TinyClipDims(**facts["dims"]), facts["weights_seed"])
    if tiny_clip.checksum(state) != facts["weights_sha256"]:
        raise SystemExit(f"{golden.path}: the weight rule gives another teacher than that of the archive")
    backbone = Backbone.from_state_dict(state, name="golden-teacher")
    image_depth, text_depth = (_depth(golden, f"teacher/param/{side}_encoder") for side in ("image", "text"))
    golden.expect(
        facts["prompt"].endswith(" NAME."), f"the teacher's prompt is {facts['prompt']!r}; expected: ... NAME."
    )
    settings = {"context_length": facts["n_ctx_text"], "context_init": facts["prompt"].removesuffix(" NAME.")}
    settings |= {"text_depth": text_depth, "image_tokens": facts["n_ctx_vision"], "image_depth": image_depth}
    made = vlprompt.create_method("ivlp", backbone, golden.meta["class_names"], **settings)
    names = _tokens("image_encoder", image_depth, "visual") | _tokens("text_encoder", text_depth, "context")
    del names["context.input"]
    names["context.ctx"] = "prompt_learner.ctx"
    made.load_trained_state({ours: golden.tensor(f"teacher/param/{name}") for ours, name in names.items()})
    return made


def check_promptkd(golden: Any) -> Results:
    """Compare the teacher's outputs, projected features, distillation, gradients, statistics and both evaluations."""
    images, classes = golden.tensor("images"), golden.meta["class_names"]
    golden.inputs.add("labels")  # no result depends on them
    for case, options in golden.meta["cases"].items():
        base = classes[: options["base_classes"]] if options["modal"] == "base2novel" else classes
        settings = {"image_tokens": options["n_ctx_vision"], "image_depth": options["depth_vision"]}
        settings |= {"weight": options["kd_weight"], "temperature": options["temperature"]}
        dim = golden.meta["teacher"]["dims"]["embed_dim"]
        made = vlprompt.create_method(
            "promptkd", golden.backbone, base, all_class_names=classes, teacher_dim=dim, **settings
        )
        made.teach(Teacher(_teacher(golden), golden.backbone))
        yield "teacher/text_features", made.teacher_text
        features = made.teacher.image_features(images)
        yield "teacher/image_features", F.normalize(features, dim=-1)
        yield "teacher/logits", made.teacher.logits(features, made.teacher_text)
        prompt = golden.meta["teacher"]["prompt"]
        yield "teacher/tokens", golden.tokens([prompt.replace("NAME", name.replace("_", " ")) for name in classes])
        names = _tokens("image_encoder", options["depth_vision"], "visual")
        names |= {f"projector.{ours}": _TRANS + name for ours, name in _PROJECTOR.items()}
        statistics = {f"projector.running_{name}": f"{_TRANS}1.running_{name}" for name in ("mean", "var")}
        shapes = {name: value.shape for name, value in made.trained_state().items()}
        given = {ours: golden.tensor(f"{case}/param/{name}").reshape(shapes[ours]) for ours, name in names.items()}
        given |= {ours: golden.tensor(f"{case}/buffer/{name}") for ours, name in statistics.items()}
        made.load_trained_state({**given, "teacher_text": made.teacher_text})
        made.eval()  # before the step, because it changes the statistics
        with torch.no_grad():
            yield f"{case}/eval_image_features", made.unit_image(made.image_features(images))
            yield f"{case}/eval_logits_val", made(images)
            new = [name for name in classes if name not in base] or classes
            yield f"{case}/eval_logits_test", made.with_classes(new)(images)
        step = made.train().step(images, golden.tensor("labels"))
        yield f"{case}/train_logits", step.logits
        yield f"{case}/train_image_features", step.unit_image
        yield from ((f"{case}/buffer_after/{name}", made.get_buffer(ours)) for ours, name in statistics.items())
        (loss,) = made.step_losses(step).values()
        yield f"{case}/loss/total", loss
        yield f"{case}/loss/kd", loss / options["kd_weight"]
        loss.backward()
        largest = max(float(p.grad.abs().max()) for _, p in made.trainable_parameters())
        for ours, parameter in made.trainable_parameters():
            key = f"{case}/grad/{names[ours]}"
            # A bias before batch norm has no gradient, so its error is relative to a tenth of the largest gradient.
            size = largest / 10 if ours == "projector.linear1.bias" else 0.0
            yield key, parameter.grad.reshape(golden.arrays[key].shape), {"size": size}


CHECKS = {
    "Visual prompting (padding / fixed patch / random patch)": check_visual_prompt,
    "MVLPT: unified prompt tuning (UPT) and deep visual prompts": check_upt,
    "promptkd": check_promptkd,
}
