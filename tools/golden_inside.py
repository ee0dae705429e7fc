"""Comparison of the golden files of methods that change the inside of the towers: one function per file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import tiny_clip
import torch
import torch.nn.functional as F

import vlprompt
from vlprompt.backbone import Added
from vlprompt.config.run import RecipeConfig
from vlprompt.engine.recipe import make_optimizer
from vlprompt.objectives.gradient_dropout import drop, keep_probability
from vlprompt.prompts.inside import masked

Results = Iterator[tuple[Any, ...]]


# -- CLIP-LoRA --------------------------------------------------------------------------------------------------------
def _published(name: str) -> str:
    path, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{path.replace('out_proj', 'proj')}.w_{kind}"


def _without_input_gradient(added: Callable[[str], Added]) -> Callable[[str], Added]:
    """Return updates without gradients for their input, the effect of un-merging in place before the backward pass."""

    def cut(prefix: str) -> Added:
        additions = added(prefix)
        return dataclasses.replace(
            additions,
            projections={
                at: lambda x, update=update: update(x.detach()) for at, update in additions.projections.items()
            },
        )

    return cut


def check_clip_lora(golden: Any) -> Results:
    """Compare logits, loss, gradients, merged evaluation, and gradients of the branch without dropout."""
    images, labels, names = golden.tensor("images"), golden.tensor("labels"), golden.meta["class_names"]
    for case, options in golden.meta["cases"].items():
        settings = {"encoder": options["encoder"], "position": options["position"], "params": options["params"]}
        settings |= {"rank": options["r"], "alpha": float(options["alpha"]), "logit_scale": options["logit_scale"]}
        made = vlprompt.create_method(
            "clip_lora", golden.backbone, names, dropout=0.0, templates=options["templates"], **settings
        )
        published = sorted(_published(name) for name, _ in made.trainable_parameters())
        wrong = sorted(set(published) ^ set(options["learnables"]))
        golden.expect(not wrong, f"{case}: learnables of the archive or of vlprompt alone: {', '.join(wrong)}")
        scale = made.base_model.scale
        golden.expect(abs(scale - options["scaling"]) < 1e-9, f"{case}: scaling {options['scaling']}, ours {scale}")
        zeroshot = vlprompt.create_method("zeroshot", golden.backbone, names, templates=options["templates"])
        cosines = zeroshot(images) / golden.backbone.logit_scale
        yield f"{case}/zeroshot_logits", options["logit_scale"] * cosines
        source = _source(golden, case)
        state = {name: golden.tensor(f"{source}/param/{_published(name)}") for name, _ in made.trainable_parameters()}
        made.load_trained_state(state)
        grads = "grad" if source == case else "grad_as_run"
        if grads == "grad_as_run":
            made.base_model.added = _without_input_gradient(made.base_model.added)
        step = made.train().step(images, labels)
        yield f"{case}/train_logits", step.logits
        loss = made.step_losses(step)["ce"]
        yield f"{case}/loss/total", loss
        loss.backward()
        yield from ((f"{case}/{grads}/{_published(name)}", p.grad) for name, p in made.trainable_parameters())
        # The published evaluation uses the first template, even if training uses the ensemble of all.
        first = vlprompt.create_method(
            "clip_lora", golden.backbone, names, dropout=0.0, templates=options["templates"][:1], **settings
        )
        first.load_trained_state(state)
        yield from ((f"{case}/eval_cosines", cosines) for cosines in _both_cosines(first, images))


def _source(golden: Any, case: str) -> str:
    """Return the case whose parameters a case uses: its own, or another's, as the archive's notes say."""
    if any(name.startswith(f"{case}/param/") for name in golden.arrays):
        return case
    notes = (re.fullmatch(rf"case {re.escape(case)} uses the A and B of case (\S+)", n) for n in golden.meta["notes"])
    sources = [note[1] for note in notes if note]
    golden.expect(
        len(sources) == 1, f"case {case} has no parameters, and no note names the case that it takes them from"
    )
    return sources[0]


@torch.no_grad()
def _both_cosines(made: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines of the published evaluation, with updates merged into the weights of both towers, and ours."""
    backbone, low_rank = made.eval().backbone, made.base_model
    image = backbone.encode_image(images, overrides=made.image_overrides())
    text = made.text_features()
    if made.has_text_prompts():
        overrides = low_rank.merged("", backbone.text.parameters())
        text = F.normalize(backbone.text.encode(made.layout, overrides=overrides)[0], dim=-1)
    return F.normalize(image, dim=-1) @ text.t(), made(images) / made.settings.logit_scale


# -- R-AMT ------------------------------------------------------------------------------------------------------------
def _score_name(published: str) -> str:
    path = published.removesuffix(".mask_real")
    return f"masks.visual.{path}" + (".in_proj_weight.scores" if path.endswith("attn") else ".weight.scores")


def check_ramt(golden: Any) -> Results:
    """Compare masked layers, gradient dropout, and a whole step: losses, gradients before and after it, Adam's step."""
    hyper = golden.meta["hyper"]
    yield from _masked_layers(golden, hyper["thr"], hyper["sizes"])
    yield from _dropout(golden, hyper["gd_lambdas"], hyper["gd_sgd_lr"])
    images, labels = golden.tensor("images").float(), golden.tensor("labels")
    made = vlprompt.create_method(
        "ramt",
        golden.backbone,
        hyper["names"],
        candidates="all" if hyper["mask_mlp"] else "attention",
        gradient_dropout={"strength": hyper["lam"], "temperature": hyper["T"]},
        penalty=hyper["loss_weight"],
        templates=[hyper["template"]],
        threshold=hyper["thr"],
    )
    words = [name.replace("_", " ").lower() for name in hyper["names"]]
    yield "text_tokens", golden.tokens([hyper["template"].replace("{}", word) for word in words])
    yield "text_features", made.text_features()
    names = {_score_name(name): name for name in hyper["mask_names"]}
    scores = dict(made.trainable_parameters())
    wrong = sorted(set(names) ^ set(scores))
    golden.expect(not wrong, f"masks of the archive or of vlprompt alone: {', '.join(wrong)}")
    with torch.no_grad():
        yield "logits_original", made.score(made.unit_image(golden.backbone.encode_image(images)), made.text_features())
        yield "logits_all_ones", made(images)
    rule = golden.words(
        r"^tiny_clip.draw\('(.*)' \+ name, shape, seed, std=(\S+), mean=(\S+)\)$", hyper["mask_init_rule"]
    )
    spread = {"seed": hyper["seed"], "std": float(rule[2]), "mean": float(rule[3])}
    drawn = {ours: tiny_clip.draw(rule[1] + name, scores[ours].shape, **spread) for ours, name in names.items()}
    made.load_trained_state({ours: torch.from_numpy(values) for ours, values in drawn.items()})
    total = sum(p.numel() for p in scores.values())
    below = sum(int((p < hyper["thr"]).sum()) for p in scores.values())
    yield "sparsity_percent", torch.tensor(100 * below / total)
    with torch.no_grad():
        yield "logits_masked_eval", made.eval()(images)
    yield from _ramt_step(golden, made.train(), images, labels, names)


def _ramt_step(golden: Any, made: Any, images: Any, labels: Any, names: dict[str, str]) -> Results:
    hyper, scores = golden.meta["hyper"], dict(made.trainable_parameters())
    step = made.step(images, labels)
    yield "step_logits", step.logits
    yield "step_acc", 100 * (step.logits.argmax(dim=-1) == labels).double().mean()
    terms, dropout = made.terms(step), made.objectives[0]
    task = terms["ce"] + terms["penalty"]
    yield "step_loss_ce", terms["ce"].double()
    yield "step_loss_mask", terms["penalty"].double()
    yield "step_loss_total", task
    general = dropout.general_loss(step)
    yield "step_loss_kl", general.double()
    ordered = [scores[ours] for ours in names]
    both = [torch.autograd.grad(loss, ordered, retain_graph=True) for loss in (task, general)]
    drawn, kept, fractions = torch.Generator().manual_seed(0), {}, {}
    for (ours, published), a, b in zip(names.items(), *both, strict=True):
        key, stored = f"mask[{published}]", _stored(golden, published, a)
        # The archive holds the draws of its stored entries; the others are drawn here and enter only into sums.
        uniform = torch.rand(a.numel(), generator=drawn)
        uniform[stored] = golden.tensor(f"{key}_uniform")
        kept[ours] = drop(a, b, uniform.reshape(a.shape), hyper["lam"])
        fractions[ours] = (keep_probability(a, b) > uniform.reshape(a.shape)).double().mean()
        yield f"{key}_init", scores[ours].detach().flatten()[stored].clone()
        yield f"{key}_grad_task", a.flatten()[stored]
        yield f"{key}_grad_kl", b.flatten()[stored]
        yield f"{key}_grad_out", kept[ours].flatten()[stored]
        scores[ours].grad = kept[ours]
    before = {ours: (values > hyper["thr"]).double().mean() for ours, values in scores.items()}
    recipe = RecipeConfig(lr=hyper["lr"], optimizer="adam", weight_decay=0)
    make_optimizer(made.parameter_groups(hyper["lr"]), recipe).step()
    rows, slack = [], []
    for (ours, published), a, b in zip(names.items(), *both, strict=True):
        stored, after, gradient = _stored(golden, published, a), scores[ours].detach(), kept[ours]
        # Adam's first step has length lr along the sign of the gradient, which is rounding for the smallest entries.
        rounding = a.flatten()[stored].abs() <= 1e-6
        yield f"mask[{published}]_after", after.flatten()[stored], {"slack": rounding * 2.001 * hyper["lr"]}
        norms = [float(value.norm()) for value in (a, b, gradient, after)]
        rows.append([stored.step, *norms, float(before[ours]), float(fractions[ours])])
        deviations = _deviations(a, b, hyper["lam"]) if stored.step > 1 else (0.0, 0.0)
        slack.append([0.0, 0.0, 0.0, 7 * deviations[0], 0.0, 0.0, 7 * deviations[1]])
    # The columns have different scales. Two of them depend on draws of which the archive has a part: their difference
    # may be 7 deviations of one draw, which are 5 of the difference of two.
    summary = torch.tensor(rows, dtype=torch.float64)
    yield "mask_summary", summary, {"axis": 0, "slack": torch.tensor(slack, dtype=torch.float64)}


def _deviations(a: torch.Tensor, b: torch.Tensor, strength: float) -> tuple[float, float]:
    """Return the standard deviations, over draws, of the norm of what is left of ``a`` and of the fraction kept."""
    a, keep = a.double(), keep_probability(a.double(), b.double())
    chance = keep * (1 - keep)
    squares = (a**2 * (keep + (1 - keep) * (1 - strength) ** 2)).sum()
    deviation = (a**4 * (1 - (1 - strength) ** 2) ** 2 * chance).sum().sqrt()
    return float(deviation / (2 * squares.sqrt())), float(chance.sum().sqrt() / chance.numel())


def _stored(golden: Any, published: str, scores: torch.Tensor) -> slice:
    """Return the slice of stored entries of a flattened tensor: all of one tensor, about 300 of the others."""
    whole = golden.arrays[f"mask[{published}]_init"].size == scores.numel()
    return slice(None, None, 1 if whole else scores.numel() // 300)


def _masked_layers(golden: Any, threshold: float, sizes: dict[str, int]) -> Results:
    tensor = golden.tensor
    scores, x = tensor("lin_mask").requires_grad_(), tensor("lin_x").requires_grad_()
    found, stated = [*tensor("lin_weight").shape], [sizes["o"], sizes["i"]]
    golden.expect(found == stated, f"lin_weight has shape {found}; stated: {stated}")
    weight = masked(tensor("lin_weight"), scores, threshold)
    y = F.linear(x, weight, tensor("lin_bias"))
    y.backward(tensor("lin_gout"))
    yield "lin_y_train", y
    yield "lin_grad_mask", scores.grad
    yield "lin_grad_x", x.grad
    yield "lin_binary", masked(torch.ones_like(weight), scores, threshold)
    yield "lin_y_eval", F.linear(x, masked(tensor("lin_weight"), scores.detach(), threshold), tensor("lin_bias"))
    scores = tensor("conv_mask").requires_grad_()
    y = F.conv2d(tensor("conv_x"), masked(tensor("conv_weight"), scores, threshold), stride=scores.shape[-1])
    y.backward(tensor("conv_gout"))
    yield "conv_y", y
    yield "conv_grad_mask", scores.grad
    attention = torch.nn.MultiheadAttention(sizes["e"], sizes["h"])
    both = tensor("att_in_mask").requires_grad_(), tensor("att_out_mask").requires_grad_()
    weights = {"in_proj_bias": tensor("att_in_bias"), "out_proj.bias": tensor("att_out_bias")}
    weights["in_proj_weight"] = masked(tensor("att_in_weight"), both[0], threshold)
    weights["out_proj.weight"] = masked(tensor("att_out_weight"), both[1], threshold)
    y = torch.func.functional_call(attention, weights, (tensor("att_x"),) * 3, {"need_weights": False})[0]
    y.backward(tensor("att_gout"))
    yield "att_y", y
    yield "att_y_eval", y
    yield "att_grad_in_mask", both[0].grad
    yield "att_grad_out_mask", both[1].grad


def _dropout(golden: Any, strengths: list[float], lr: float) -> Results:
    for case, strength in enumerate(strengths):
        for number in (0, 1):
            a, b, uniform = (golden.tensor(f"gd{case}_{what}{number}") for what in ("grad_a", "grad_b", "uniform"))
            kept = drop(a, b, uniform, strength)
            yield f"gd{case}_grad_out{number}", kept
            yield f"gd{case}_p_after{number}", golden.tensor(f"gd{case}_p{number}") - lr * kept


CHECKS = {"clip_lora": check_clip_lora, "R-AMT (regularised mask tuning)": check_ramt}
