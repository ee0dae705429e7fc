"""Comparison of the golden files of caches and their text classifiers: one function per file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vlprompt.caches.search import grid
from vlprompt.caches.tfup import TFUP, candidate_divergence, kl_matrix
from vlprompt.caches.tfup_trained import Adaptation, TFUPTrained
from vlprompt.caches.tip_adapter import TipAdapter, TipAdapterF
from vlprompt.caches.training import CacheRecipe
from vlprompt.prompts.zero_shot import filled_in, mean_features, raw_features, template_features

Results = Iterator[tuple[Any, ...]]
_ADAPTERS = {"text_residual": "text_res", "image_down": "image_fc0", "image_up": "image_fc2"}


# -- Tip-Adapter ------------------------------------------------------------------------------------------------------
def check_tip_adapter(golden: Any) -> Results:
    """Compare keys, values, logits of the whole grid and the search, then the trained keys."""
    hyper = golden.meta["hyper"]
    text, labels = golden.tensor("clip_weights").t(), golden.tensor("train_labels")
    raw = {name: golden.tensor(f"{name}_raw") for name in ("val", "test")}
    truth = {name: golden.tensor(f"{name}_labels") for name in raw}
    options = {"alpha": hyper["init_alpha"], "beta": hyper["init_beta"]}
    cache = TipAdapter(text, hyper["logit_scale"], **options).fit(golden.tensor("train_raw"), labels)
    # Our keys are sorted by class, the published ones by image.
    back = labels.argsort(stable=True).argsort()
    yield "cache_keys", cache.get_buffer("keys")[back].t()
    yield "cache_values", F.one_hot(cache.key_labels[back], hyper["C"]).float()
    for name, features in raw.items():
        unit = cache.unit(features)
        yield f"{name}_features", unit
        yield f"zs_{name}_logits", cache.zeroshot(unit)
        right = cache.zeroshot(unit).argmax(dim=-1) == truth[name]
        yield f"acc_zs_{name}", 100 * right.double().mean()
    yield "tip_val_logits_init", cache.logits(raw["val"])
    yield "acc_tip_val_init", 100 * cache.score(raw["val"], truth["val"])
    betas, alphas = (grid(top, n) for top, n in zip(hyper["search_scale"], hyper["search_step"], strict=True))
    yield "grid_beta", betas
    yield "grid_alpha", alphas
    search = cache.search(raw["val"], truth["val"], betas, alphas)
    yield "grid_val_acc", 100 * search.accuracy
    yield "best_beta_alpha", list(search.values.values())
    yield "tip_test_logits_best", cache.logits(raw["test"])
    yield "acc_tip_test_best", 100 * cache.score(raw["test"], truth["test"])
    unit = cache.unit(raw["val"])
    zeroshot, affinity = cache.zeroshot(unit), cache.affinity(unit)
    steps = hyper["grid_logit_subsample_beta_alpha"]
    evidence = [cache.evidence(affinity, beta).t() for beta in betas[:: steps[0]]]
    yield (
        "grid_val_logits",
        torch.stack([torch.stack([zeroshot + alpha * term for alpha in alphas[:: steps[1]]]) for term in evidence]),
    )
    yield from _tip_adapter_f(golden, text, options, raw, truth, (betas, alphas))


def _tip_adapter_f(golden: Any, text: Any, options: Any, raw: Any, truth: Any, axes: Any) -> Results:
    hyper, labels, order = golden.meta["hyper"], golden.tensor("train_labels"), golden.tensor("F_order")
    golden.expect(len(order) == hyper["epochs"], f"F_order has {len(order)} rows; stated: {hyper['epochs']} epochs")
    decay = golden.optimizer(hyper["optimizer"], "AdamW", "eps", "weight_decay")
    recipe = CacheRecipe(hyper["epochs"], hyper["bsF"], hyper["lr"], **decay)
    cache = TipAdapterF(text, hyper["logit_scale"], **options, training=recipe)
    TipAdapter.fit(cache, golden.tensor("train_raw"), labels)
    back = labels.argsort(stable=True).argsort()
    untrained = cache.get_buffer("keys")
    yield "F_step0_weight_before", untrained[back]
    losses, rates, tests, scores, kept = [], [], [], [], []
    for number, step in enumerate(cache.training_steps(golden.tensor("F_train_raw"), labels, list(order))):
        losses.append(step.loss)
        rates.append(step.lr)
        yield f"F_step{number}_logits", step.logits
        yield f"F_step{number}_target", step.targets
        yield f"F_step{number}_grad", step.gradients["keys"][back]
        yield f"F_step{number}_weight_after", cache.get_buffer("keys")[back]
        if step.ends_epoch:
            tests.append(cache.logits(raw["test"]))
            scores.append(100 * cache.score(raw["test"], truth["test"]))
            kept.append(cache.get_buffer("keys"))
    yield "F_losses", losses
    yield "F_lr_per_step", rates
    yield "F_weight_last_step", cache.get_buffer("keys")[back]
    yield "F_cache_keys_mutated", int(not torch.equal(cache.get_buffer("keys"), untrained))
    yield "F_epoch_test_logits", torch.stack(tests)
    yield "F_epoch_test_acc", scores
    # The published code chooses the epoch on the test images.
    epoch = scores.index(max(scores))
    yield "F_best_epoch", epoch
    cache.get_buffer("keys").copy_(kept[epoch])
    search = cache.search(raw["val"], truth["val"], *axes)
    yield "F_best_beta_alpha", list(search.values.values())
    final = 100 * cache.score(raw["test"], truth["test"])
    yield "F_final_test_logits", cache.logits(raw["test"])
    yield "F_final_test_acc", final
    yield "F_reported_acc", max(final, *scores)


# -- TFUP -------------------------------------------------------------------------------------------------------------
def check_tfup(golden: Any) -> Results:
    """Compare selection, similarity and logits, then every step of both stages of training."""
    hyper = golden.meta["hyper"]
    text, images, truth = (golden.tensor(name) for name in ("text_raw", "image_raw", "labels"))
    decay = golden.optimizer(hyper["optimizer"], "AdamW", "eps", "weight_decay")
    recipe = CacheRecipe(hyper["max_epoch"], hyper["bs"], hyper["lr"], **decay)
    smoothing = hyper.get("smooth_alpha", 0)
    golden.expect(not smoothing, f"smooth_alpha is {smoothing}; expected: 0, as TFUP-T's labels are not smoothed here")
    temperature = float(golden.words(r"^softmax\((\S+) \* cosine\)$", hyper["selection_temperature"])[1])
    adaptation = Adaptation(
        text_ratio=hyper["ratio_beta"],
        image_ratio=hyper["ratio_alpha"],
        warmup_epochs=hyper["warmup"],
        confidence=hyper["confidence_threshold"],
        marginal_weight=hyper["marginal_weight"],
    )
    options = {"alpha": hyper["alpha"], "beta": hyper["beta"], "cache_shots": hyper["cache_shots"]}
    options["temperature"] = temperature
    cache = TFUPTrained(text, 100.0, **options, training=recipe, adaptation=adaptation)
    super(TFUPTrained, cache).fit(images)
    chosen = cache.select(images, hyper["cache_shots"]).flatten()
    yield "cache_indices", chosen
    yield "cache_keys_raw", images[chosen]
    yield "cache_labels", cache.key_labels
    yield "cache_pseudo_labels", cache.key_labels
    unit = cache.unit(images)
    log, key_log = cache.probabilities(unit), cache.probabilities(cache.get_buffer("keys"))
    yield "selection_probs", log.exp()
    likely = log[:, -1].topk(2 * hyper["cache_shots"]).indices
    yield "last_class_candidates", likely
    yield "last_class_candidate_kl", candidate_divergence(log[likely])
    yield "kl", kl_matrix(log, key_log)
    yield "sim", cache.similarity(log, key_log).t()
    zeroshot, logits = cache.zeroshot(unit), cache.combine(cache.zeroshot(unit), cache.affinity(unit))
    yield "zs_logits", zeroshot
    yield "tfup_logits", logits
    yield "acc_zs", 100 * (zeroshot.argmax(dim=-1) == truth).double().mean()
    yield "acc_tfup", 100 * (logits.argmax(dim=-1) == truth).double().mean()
    yield from _tfup_t(golden, cache, options, images, truth)


def _tfup_t(
    golden: Any, cache: TFUPTrained, options: dict[str, Any], images: torch.Tensor, truth: torch.Tensor
) -> Results:
    hyper = golden.meta["hyper"]
    rows = cache.select(images, hyper["training_shots"]).flatten()
    # The official code labels these images with a weight and a sharpness of its own.
    own = dict(zip(("alpha", "beta"), hyper["pseudo_label_alpha_beta"], strict=True))
    labelling = TFUP(golden.tensor("text_raw"), 100.0, **{**options, **own}).fit(images)
    targets = labelling.logits(images[rows]).argmax(dim=-1)
    yield "train_indices", rows
    yield "train_pseudo_labels", targets
    for ours, theirs in _ADAPTERS.items():
        setattr(cache, ours, golden.tensor(f"init_{theirs}"))
    warm, main = golden.tensor("warm_images_raw")[None], golden.tensor("strong_images_raw")[None]
    # One order for all epochs of a stage: the archive's loaders are lists.
    warm_order = [golden.tensor("warm_order")] * hyper["warmup"]
    main_order = [golden.tensor("main_order")] * (hyper["max_epoch"] - hyper["warmup"])
    stages = {"warm0": None, "main0": None}
    before = {name: cache.get_buffer(name) for name in _ADAPTERS}
    weak = None
    rates, losses, marginals = [], [], []
    for step in cache.training_steps(images, warm, targets, main, warm_order, main_order):
        stage = "main0" if step.terms.get("marginal") is not None else "warm0"
        rates.append(step.lr)
        if stage == "warm0":
            losses.append(step.loss)
        else:
            marginals.append(step.terms["marginal"])
        if stages[stage] is None:
            stages[stage] = step
            if stage == "main0":
                weak = cache.adapter_logits(images[step.rows], before, cache=True)
            for ours, theirs in _ADAPTERS.items():
                yield f"{stage}_before_{theirs}", before[ours]
                yield f"{stage}_grad_{theirs}", step.gradients[ours]
                yield f"{stage}_after_{theirs}", cache.get_buffer(ours)
            yield f"{stage}_lr", step.lr
            yield f"{stage}_loss", step.loss
        before = {name: cache.get_buffer(name) for name in _ADAPTERS}
    first, second = stages["warm0"], stages["main0"]
    yield "warm0_logits", first.logits
    yield "warm0_target", first.targets
    yield "main0_strong_logits", second.logits
    yield "main0_weak_logits", weak
    confident = second.targets >= 0
    yield "main0_confident", confident
    yield "main0_pseudo", second.targets[confident]
    yield "main0_ce", second.terms["ce"]
    yield "main0_marginal", second.terms["marginal"]
    yield "all_warm_losses", losses
    yield "all_main_marginal", marginals
    yield "lr_per_step", rates
    for ours, theirs in _ADAPTERS.items():
        yield f"final_{theirs}", cache.get_buffer(ours)
    plain, cached = cache.adapter_logits(images), cache.adapter_logits(images, cache=True)
    yield "eval_last_logits", plain
    yield "eval_last_logits_cache", cached
    yield "eval_last_acc", [100 * float((logits.argmax(dim=-1) == truth).double().mean()) for logits in (plain, cached)]


# -- text classifiers -------------------------------------------------------------------------------------------------
def check_text_classifiers(golden: Any) -> Results:
    """Compare the normalised ensemble of templates and the raw mean of the prompts of each class."""
    hyper, backbone = golden.meta["hyper"], golden.backbone
    names, templates = hyper["names"], hyper["templates"]
    prompts = filled_in(names, templates)
    flat = [prompt for class_prompts in prompts for prompt in class_prompts]
    shape = len(names), len(templates), -1
    yield "tokens", golden.tokens(flat).reshape(shape).astype("int32")
    yield "raw_text_features", raw_features(backbone, flat).reshape(shape)
    yield "ensemble_weights", template_features(backbone, names, templates).t()
    yield "description_weights", mean_features(backbone, [hyper["descriptions"][name] for name in names])


CHECKS = {
    "Tip-Adapter and Tip-Adapter-F": check_tip_adapter,
    "TFUP and TFUP-T": check_tfup,
    "text classifiers from several prompts": check_text_classifiers,
}
