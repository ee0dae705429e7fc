"""Comparison of the golden files of test-time methods: one function per file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import vlprompt
from vlprompt.testtime import mta, tda
from vlprompt.testtime.selection import (
    Filtered,
    entropy,
    filter_views,
    gather_views,
    marginal_entropy,
    similarity_to_first,
)

Results = Iterator[tuple[Any, ...]]


# -- TPT and DiffTPT --------------------------------------------------------------------------------------------------
def check_tpt(golden: Any) -> Results:
    """Compare selection, loss, gradient and context of every step, and final logits; all images of a case at once."""
    for case, options in golden.meta["hyper"]["cases"].items():
        settings = {"steps": options["tta_steps"], "confidence": options["selection_p"], "lr": options["lr"]}
        yield from _tuned(golden, case, "tpt", settings)


def check_difftpt(golden: Any) -> Results:
    """Compare the same with both filters and several steps."""
    for case, options in golden.meta["hyper"]["cases"].items():
        settings = {"steps": options["tta_steps"], "lr": options["lr"]}
        settings |= {"similarity": options["selection_cosine"], "confidence": options["selection_selfentro"]}
        for name, value, *allowed in _tuned(golden, case, "difftpt", settings):
            if isinstance(value, Filtered):
                yield f"{case}_kept_cosine", value.similar
                yield f"{case}_kept_entropy", value.confident
            else:
                yield name, value, *allowed


def _tuned(golden: Any, case: str, method: str, settings: dict[str, Any]) -> Results:
    hyper, arrays = golden.meta["hyper"], golden.arrays
    match = re.search(r"ctx_init '([^']*)'", hyper["contexts"][case])
    words = match.group(1).replace("_", " ") if match else ""
    start = golden.tensor(f"{case}_ctx_init")
    settings = settings | {"context_init": words, "context_length": len(start), "images_at_once": 2}
    made: Any = vlprompt.create_method(method, golden.backbone, hyper["classnames"], **settings)
    if words:  # the words determine the initial context
        yield f"{case}_ctx_init", made.ctx
    made.load_trained_state({"ctx": start})
    placeholder = words.replace("[CLS] ", "") or " ".join(["X"] * len(start))
    names = [name.replace("_", " ") for name in hyper["classnames"]]
    yield f"{case}_tokens", golden.tokens([f"{placeholder} {name}." for name in names]).astype("int32")
    images = golden.tensor("views").float()[: len(arrays[f"{case}_loss"])]
    with torch.no_grad():
        views = made.unit_views(images)
        logits = golden.backbone.logit_scale * views @ made.initial_text_features().t()
    yield f"{case}_image_features", views
    yield f"{case}_text_features_init", made.initial_text_features().detach()
    yield f"{case}_view_logits", logits
    yield f"{case}_zs_logits", logits[:, 0]
    if method == "difftpt":
        yield "", made.filtered(logits, views)
        yield f"{case}_cosine", similarity_to_first(logits)
    tuned = made.tuned(images)
    yield f"{case}_selected", tuned.selected
    yield f"{case}_loss", tuned.losses
    yield f"{case}_grad", tuned.gradients
    # AdamW's first step has length lr along the sign of the gradient, so an entry whose gradient is only rounding may
    # have the other sign. Such entries may differ by twice lr per step.
    rounding = tuned.gradients.abs().cummin(dim=1).values <= 1e-5
    steps = torch.arange(1, settings["steps"] + 1)[:, None, None]
    yield f"{case}_ctx_after", tuned.contexts, {"slack": rounding * 2.001 * settings["lr"] * steps}
    yield f"{case}_final_logits", tuned.logits


# -- selection --------------------------------------------------------------------------------------------------------
def check_difftpt_selection(golden: Any) -> Results:
    """Compare both filters, the loss and its gradient with respect to the logits."""
    for number, options in enumerate(golden.meta["hyper"]["cases"]):
        case = f"c{number}"
        views, text = golden.tensor(f"{case}_views")[None], golden.tensor(f"{case}_text")
        sizes = [1 + options["n_aug"] + options["n_diff"], options["D"], options["C"]]
        found = [*views.shape[1:], len(text)]
        golden.expect(found == sizes, f"{case}: views, dimensions and classes are {found}; stated: {sizes}")
        logits = (golden.meta["hyper"]["logit_scale"] * views @ text.t()).requires_grad_()
        filters = {"similarity": options["cos"], "confidence": options["ent"], "generated": options["n_diff"]}
        filtered = filter_views(logits.detach(), views, **filters)
        yield f"{case}_logits", logits[0]
        yield f"{case}_cosine", similarity_to_first(logits)[0]
        yield f"{case}_entropy", entropy(logits)[0]
        yield f"{case}_kept_cosine", filtered.similar[0]
        yield f"{case}_kept_entropy", filtered.confident[0]
        yield f"{case}_selected", filtered.selected[0]
        yield f"{case}_selected_logits", gather_views(logits, filtered.selected)[0]
        # A loss far below 1 is made of the last digits of the logits, so those of the archive enter it.
        logits = golden.tensor(f"{case}_logits")[None].requires_grad_()
        chosen = gather_views(logits, filtered.selected)
        loss = marginal_entropy(chosen)[0]
        yield f"{case}_loss", loss
        loss.backward()
        yield f"{case}_grad_logits", logits.grad[0]


# -- TDA --------------------------------------------------------------------------------------------------------------
def check_tda(golden: Any) -> Results:
    """Compare both caches after every step, their contributions and the scores, with one view and with many."""
    hyper, text = golden.meta["hyper"], golden.tensor("clip_weights").t()
    kept = float(golden.words(r"^int\((\S+)\*views\)$", hyper["mv_kept"])[1])
    given = hyper["negative"]
    bounds = {
        name: tuple(given[f"{name}_threshold"][side] for side in ("lower", "upper")) for name in ("entropy", "mask")
    }
    positive = tda.PositiveCache(**{key: hyper["positive"][name] for key, name in _POSITIVE.items()})
    negative = tda.NegativeCache(**{key: given[name] for key, name in _POSITIVE.items()}, **bounds)
    caches = positive if hyper["positive"]["enabled"] else None, negative if given["enabled"] else None
    for prefix, raw in (("", golden.tensor("raw")[:, None]), ("mv_", golden.tensor("mv_raw"))):
        labels = golden.tensor(f"{prefix}labels")
        summary = tda.summarise(F.normalize(raw, dim=-1), text, hyper["logit_scale"], kept)
        yield f"{prefix}features", summary.features
        yield f"{prefix}clip_logits", summary.logits
        yield f"{prefix}entropy", summary.entropies
        yield f"{prefix}prob_map", summary.probabilities
        yield f"{prefix}pred", summary.predictions
        yield f"{prefix}prop_entropy", summary.entropies / torch.tensor(float(hyper["C"])).log2()
        whole = tda.TDAStream(hyper["C"], hyper["D"], *caches).score(summary)
        yield f"{prefix}final_logits", whole.logits
        yield f"{prefix}pos_logits", whole.positive
        yield f"{prefix}neg_logits", whole.negative
        yield f"{prefix}correct", 100.0 * (whole.logits.argmax(dim=-1) == labels).double()
        yield from _slots(prefix, summary, tda.TDAStream(hyper["C"], hyper["D"], *caches))
        if not prefix:
            for name, pair in (("posonly", (positive, None)), ("negonly", (None, negative))):
                yield f"{name}_final_logits", tda.TDAStream(hyper["C"], hyper["D"], *pair).score(summary).logits


_POSITIVE = {"capacity": "shot_capacity", "alpha": "alpha", "beta": "beta"}


def _slots(prefix: str, summary: tda.Summary, stream: tda.TDAStream) -> Results:
    """Yield the contents of the slots after every image of a stream."""
    seen: dict[str, list[torch.Tensor]] = {}
    fields = (summary.features, summary.logits, summary.probabilities, summary.entropies, summary.predictions)
    for t in range(len(summary.features)):
        stream.score(tda.Summary(*(field[t : t + 1] for field in fields)))
        for name, slots in stream.slots.items():
            short = name[:3]
            seen.setdefault(f"{prefix}{short}_index", []).append(slots.index.clone())
            seen.setdefault(f"{prefix}{short}_entropy", []).append(slots.entropies.masked_fill(slots.index < 0, 0))
    yield from ((name, torch.stack(steps)) for name, steps in seen.items())
    for name, slots in stream.slots.items():
        yield f"{prefix}{name[:3]}_keys_final", slots.keys[slots.index >= 0]


# -- MTA --------------------------------------------------------------------------------------------------------------
def check_mta(golden: Any) -> Results:
    """Compare bandwidths, affinity, scores, mode, logits and every iteration."""
    hyper = golden.meta["hyper"]
    limits = {"neighbours": hyper["knn_fraction"], "rounds": hyper["max_iter"], "tolerance": hyper["threshold"]}
    for number, options in enumerate(hyper["cases"]):
        case = f"c{number}"
        golden.inputs.add(f"{case}_outlier_index")  # rows drawn from other classes; not a result
        views, text = golden.tensor(f"{case}_views")[None], golden.tensor(f"{case}_text")
        logits = options["scale"] * views @ text.t()
        lambdas: dict[str, Any] = {"lambda_q": float(options["lam_q"]), "lambda_y": float(options["lam_y"])}
        result = mta.mean_shift(views, logits, **lambdas, **limits)
        yield f"{case}_bandwidth", result.bandwidth[0]
        yield f"{case}_affinity", result.affinity[0]
        yield f"{case}_inlierness", result.inlierness[0]
        yield f"{case}_mode", result.mode[0]
        yield f"{case}_logits", options["scale"] * result.mode @ text.t()
        yield f"{case}_first_density", mta.density(views, views[:, 0], result.bandwidth)[0]
        traces = _traced(views, result, lambdas, hyper["max_iter"], hyper["threshold"])
        for name, trace in zip(("inlierness", "mode"), traces, strict=True):
            if (reference := golden.arrays.get(f"{case}_{name}_trace")) is not None:
                yield f"{case}_{name}_trace", _nearest(trace, reference)


def _traced(
    views: torch.Tensor, result: mta.MeanShift, lambdas: dict[str, Any], rounds: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the iterations one by one; return all scores and the modes at every evaluation of the kernel."""
    mode, scores = views[:, 0], views.new_full(views.shape[:2], 1 / views.shape[1])
    seen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for _ in range(rounds):
        kernel = mta.density(views, mode, result.bandwidth)
        seen[1].append(mode)
        for _ in range(rounds):
            before, scores = scores, mta.inlierness_step(kernel, result.affinity, scores, **lambdas)
            seen[0].append(scores)
            if (scores - before).norm() < tolerance:
                break
        for _ in range(rounds):
            seen[1].append(mode)
            before, mode = mode, mta.mode_step(views, mode, mta.density(views, mode, result.bandwidth), scores)
            if (mode - before).norm() < tolerance:
                break
    return torch.cat(seen[0]), torch.cat(seen[1])


def _nearest(trace: torch.Tensor, reference: Any) -> torch.Tensor:
    """Return the rows of ``trace`` nearest to the rows of ``reference`` if their lengths differ.

    The last round of an inner loop depends on rounding, so a last row may be missing.
    """
    if trace.shape == reference.shape:
        return trace
    difference = torch.from_numpy(reference)[:, None] - trace
    return trace[difference.abs().amax(dim=-1).argmin(dim=1)]


CHECKS = {
    "TPT": check_tpt,
    "DiffTPT prompt tuning": check_difftpt,
    "DiffTPT selection": check_difftpt_selection,
    "TDA": check_tda,
    "MTA": check_mta,
}
