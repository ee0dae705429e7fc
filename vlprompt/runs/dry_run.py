"""What a run would do, without its images or weights: shapes, learnables, tokens, memory and steps."""

from __future__ import annotations

import math

import torch

from vlprompt.backbone import Backbone, load_backbone
from vlprompt.backbone.text_tower import KEPT_WIDTHS
from vlprompt.config.run import RunConfig
from vlprompt.datasets import FewShotTask
from vlprompt.datasets.card import Card
from vlprompt.datasets.catalogue import card_class_names, find_card
from vlprompt.errors import BackboneError, ConfigError, DataError
from vlprompt.methods import PromptMethod
from vlprompt.runs.feeding import training_task
from vlprompt.runs.folder import run_folder
from vlprompt.runs.prepare import complete, load_task, make_method


def dry_run(config: RunConfig) -> str:
    """Return a description of the run that ``config`` asks for.

    Nothing is trained or written. Where images or weights are missing, the data set's card and random weights of the
    same architecture stand in, and the text says so.

    Raises:
        VlpromptError: Values that are not accepted, or a data set whose card does not know its classes.
    """
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    config = complete(config)
    notes: list[str] = []
    task, (names, everything, train_images, test_images, template) = _facts(config, notes)
    backbone = _backbone(config, notes)
    with torch.no_grad():
        method = make_method(config, backbone, names, everything, template)
    if task is not None:
        train_images = len(training_task(method, task).train)
    learnables = method.trainable_parameters()
    count = sum(parameter.numel() for _, parameter in learnables)
    recipe = config.recipe
    steps = max(1, train_images // recipe.batch_size) if train_images else 0
    updates = math.ceil(steps / config.trainer.accumulate) * recipe.epochs
    lines = [
        f"method      {config.method}",
        f"backbone    {backbone.name}, {backbone.preprocess.size} px, features of {backbone.embed_dim}",
        f"data        {config.data.name}, {len(names)} classes ({config.data.classes}), {train_images} training and "
        f"{'an unknown number of' if test_images is None else test_images} test images",
        f"folder      {run_folder(config)}",
        "",
        f"parameters  {count:,} numbers in {len(learnables)} tensors" if learnables else "parameters  none",
        *_shapes(learnables),
    ]
    if learnables:
        lines += [
            "",
            f"logits      [{min(recipe.batch_size, max(train_images, 1))}, {len(names)}] per step",
            *_text_cost(method),
            f"memory      about {_memory(method, recipe.batch_size) / 2**30:.1f} GiB at a step's peak, with weights",
            f"steps       {steps} per epoch x {recipe.epochs} epochs = {updates} updates",
        ]
    return "\n".join([*lines, *(["", *(f"note: {note}" for note in notes)] if notes else [])])


Facts = tuple[list[str], list[str], int, int | None, str]
"""Class names, all class names, training and test images, and the template."""


def _facts(config: RunConfig, notes: list[str]) -> tuple[FewShotTask | None, Facts]:
    """Return the task, if its images are here, and the facts."""
    data = config.data
    try:
        task: FewShotTask = load_task(data, config.seed)
    except DataError as error:
        card = find_card(data.name)
        notes.append(f"no images: {str(error).splitlines()[0]}")
        return None, _facts_of_card(config, card, notes, error)
    return task, (task.class_names, task.all_class_names, len(task.train), len(task.test), task.template)


def _facts_of_card(config: RunConfig, card: Card, notes: list[str], error: DataError) -> Facts:
    everything = card_class_names(card)
    if everything is None:
        if not card.classes.count:
            raise error
        notes.append("the card knows how many classes there are but not their names; made-up names stand in")
        everything = [f"class number {i}" for i in range(card.classes.count)]
    base = math.ceil(len(everything) / 2)
    part = {"all": slice(None), "base": slice(base), "new": slice(base, None)}[config.data.classes]
    names = everything[part]
    shots = config.data.shots
    sizes = card.sizes or {}
    train = len(names) * shots if shots > 0 else sizes.get("train", 0) * len(names) // len(everything)
    test = sizes.get("test") if config.data.classes == "all" else None
    return names, everything, train, test, config.data.template or card.template


def _backbone(config: RunConfig, notes: list[str]) -> Backbone:
    wanted = config.backbone
    try:
        return load_backbone(wanted.name, wanted.pretrained, precision=wanted.precision)
    except BackboneError as error:
        stand_in = load_backbone(wanted.name, "random", precision=wanted.precision)
        notes.append(f"no weights, random ones stand in: {str(error).splitlines()[0]}")
        return stand_in


def _shapes(learnables: list[tuple[str, torch.nn.Parameter]], limit: int = 12) -> list[str]:
    lines = [f"            {name} {list(parameter.shape)}" for name, parameter in learnables if parameter.numel()]
    more = len(lines) - limit
    return [*lines[:limit], *([f"            ... and {more} more"] if more > 0 else [])]


def _text_cost(method: PromptMethod) -> list[str]:
    layouts = method.training_layouts()
    packed = sum(layout.token_counts()[0] for layout in layouts)
    padded = sum(layout.lengths.numel() for layout in layouts) * method.backbone.text.context_length
    return [f"text        {packed:,} tokens a step (packed), {padded:,} if every prompt were padded"]


def _memory(method: PromptMethod, batch: int) -> float:
    """Return bytes: weights, text activations of a step, and image activations where the image side is trained.

    Text beyond a quarter of the machine's memory is encoded in chunks and computed again in the backward pass.
    """
    text, visual = method.backbone.text, method.backbone.model.visual
    total = float(sum(p.numel() * p.element_size() for p in method.parameters()))
    tokens = sum(layout.token_counts()[0] for layout in method.training_layouts())
    total += tokens * text.width * text.layers * KEPT_WIDTHS * 4
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is not None:
        patches, width = visual.positional_embedding.shape
        layers = len(blocks) if method.learns_image_side else 1
        total += batch * patches * width * layers * KEPT_WIDTHS * 4
    return total
