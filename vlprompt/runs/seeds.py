"""What the seed of a run draws. A run that draws nothing has the same results for every seed."""

from __future__ import annotations

from vlprompt.config.run import DataConfig, RunConfig
from vlprompt.errors import bulleted
from vlprompt.methods import PromptMethod
from vlprompt.methods.fitted import FittedMethod

ORDER = "the order of the test images"
CROPS = "the crops of the test images"
TRAINING = ("initial values", "batches and random transforms")


def drawn_by_seed(method: PromptMethod, config: RunConfig) -> list[str]:
    """Return what the seed of a run of ``config`` draws, in words; empty if the seed changes nothing."""
    needs, data = method.needs, config.data
    trains, fits = _trains(method, config), isinstance(method, FittedMethod)
    shots = data.shots != -1 and data.shots_file is None
    found = ["the training images"] if shots and uses_training_images(method, config) else []
    if trains:
        found += TRAINING
    elif fits and (needs.fit_views if needs.fit_labelled else needs.unlabelled_views):
        found.append("random views")
    if not trains and not method.initialised:
        found += method.own_draws
    if shots and needs.select_on == "val":
        found.append("the validation images")
    if needs.test_views is not None and needs.test_views.crops:
        found.append(CROPS)
    return [*found, ORDER] if needs.online and data.order == "shuffled" else found


def uses_training_images(method: PromptMethod, config: RunConfig) -> bool:
    """Return whether a run of ``config`` learns from the training images, with or without their labels."""
    needs = method.needs
    fits = isinstance(method, FittedMethod) and (needs.fit_labelled or needs.unlabelled == "train")
    return fits or _trains(method, config)


def _trains(method: PromptMethod, config: RunConfig) -> bool:
    return bool(method.parameter_groups(config.recipe.lr))


def unused_draw(method: PromptMethod, config: RunConfig) -> str:
    """Return a note on a seed and a choice of training images that change nothing in a run; empty without any.

    They stay in the record of the run: they also choose its validation images, which searches use.
    """
    lines = []
    if config.seed != RunConfig().seed and not drawn_by_seed(method, config):
        lines.append(f"seed {config.seed}: {method.name} with these settings draws nothing at random")
    if not uses_training_images(method, config) and method.needs.select_on != "val":
        for name in ("shots", "sampler", "shots_file"):
            if (value := getattr(config.data, name)) != getattr(DataConfig(), name):
                lines.append(f"data.{name} {value}: {method.name} with these settings learns from no training images")
    return f"the results do not depend on {len(lines)} of the values:\n{bulleted(lines)}" if lines else ""
