"""Dry runs: shapes, trainable parameters, tokens, memory and steps of a run, even without images or weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial

import torch

from vlprompt.backbone import Backbone, load_backbone
from vlprompt.backbone.text_tower import KEPT_WIDTHS
from vlprompt.config.run import BackboneConfig, DataConfig, RecipeConfig, RunConfig
from vlprompt.config.texts import DataTexts
from vlprompt.datasets.catalogue import card_class_names, find_card
from vlprompt.datasets.records import counted
from vlprompt.engine.fit import check_devices, check_precision
from vlprompt.engine.module import check_warmup
from vlprompt.errors import BackboneError, ConfigError, DataError, HeadError
from vlprompt.io.head_files import find_head
from vlprompt.methods import PromptMethod
from vlprompt.methods.registry import check_start
from vlprompt.runs.seeds import unused_draw
from vlprompt.runs.session import Session


@dataclass(frozen=True)
class Facts:
    """Facts of a task that do not need its images: class names, templates and numbers of images."""

    class_names: list[str]
    all_class_names: list[str]
    texts: DataTexts
    train: int
    test: int | None


def dry_run(config: RunConfig) -> str:
    """Return a description of the run of ``config``.

    Nothing is trained or written. Missing images are replaced by the data set's card, and missing weights by random
    weights of the same architecture; the text notes both, and a missing head of ``init_from``, devices and loggers.

    Raises:
        VlpromptError: Values are not accepted, or the card of the data set has neither class names nor their number.
    """
    check_start(config.method, config.init_from)
    session, notes = Session(config), list[str]()
    config = session.config
    for check in (partial(check_devices, config.trainer), partial(check_precision, config.backbone, config.trainer)):
        try:
            check()
        except ConfigError as error:  # the run may be planned for another machine
            notes.append(str(error))
    facts = _facts(session, notes)
    train_images = facts.train
    stand_in, session.backbone = _backbone(config.backbone, notes)
    backbone = session.backbone
    with torch.no_grad():
        session.method = method = session.make_method(facts, backbone)
    if _lacks_start(config, notes) or stand_in:
        session.set_statistics(method)
    else:
        session.started(method)
        _ = session.regulator
    if "drawn" in vars(session):
        train_images = len(session.task.train)
    trainable = method.trainable_parameters()
    count = sum(parameter.numel() for _, parameter in trainable)
    recipe, accumulate = config.recipe, config.trainer.accumulate
    session.check_order()
    if text := unused_draw(method, config):
        warnings.warn(text, stacklevel=2)
    if "drawn" in vars(session):
        session.check_selection()
    if trainable and train_images:
        check_warmup(recipe, recipe.steps_per_epoch(train_images, accumulate))
    lines = [
        f"method      {config.method}",
        f"backbone    {backbone.name}, {backbone.preprocess.size} px, features of {backbone.embed_dim}",
        f"data        {config.data.name}, {len(facts.class_names)} classes ({config.data.classes}), "
        f"{train_images} training and "
        f"{'an unknown number of' if facts.test is None else facts.test} test images",
        f"folder      {session.folder}",
        "",
        f"parameters  {count:,} numbers in {len(trainable)} tensors" if trainable else "parameters  none",
        *_shapes(trainable),
    ]
    if trainable:
        lines += [
            "",
            f"logits      [{min(recipe.batch_size, max(train_images, 1))}, {len(facts.class_names)}] per step",
            *_text_cost(method),
            f"memory      about {_memory(method, recipe.batch_size) / 2**30:.1f} GiB at a step's peak, with weights",
            _steps(recipe, train_images, accumulate),
        ]
    return "\n".join([*lines, *(["", *(f"note: {note}" for note in notes)] if notes else [])])


def _steps(recipe: RecipeConfig, images: int, accumulate: int) -> str:
    """Return the line about the steps; also says if the validation images choose the epoch."""
    batches, (epochs, updates) = recipe.batches(images), recipe.length(images, accumulate)
    text = f"steps       {batches} per epoch x {counted(epochs, 'epoch')} = {updates} updates"
    if recipe.steps is not None:
        text = f"steps       {updates} updates, {batches} per epoch, in {counted(epochs, 'epoch')}"
    if recipe.validate_every is not None:
        text += f", validation images scored every {counted(recipe.validate_every, 'epoch')}"
    return text + (", the best on the validation images is kept" if recipe.select == "best_val" else "")


def _facts(session: Session, notes: list[str]) -> Facts:
    """Return the facts of the task, or those of the data set's card if images are missing."""
    try:
        task = session.drawn
    except DataError as error:
        notes.append(f"no images: {str(error).splitlines()[0]}")
        return _facts_of_card(session.config.data, notes, error)
    return Facts(task.class_names, task.all_class_names, task.texts, len(task.train), len(task.test))


def _facts_of_card(data: DataConfig, notes: list[str], error: DataError) -> Facts:
    card = find_card(data.name)
    all_names = card_class_names(card)
    if all_names is None:
        if not card.classes.count:
            raise error
        notes.append("the card knows how many classes there are but not their names; made-up names stand in")
        all_names = [f"class number {i}" for i in range(card.classes.count)]
    base = math.ceil(len(all_names) / 2)
    names = all_names[{"all": slice(None), "base": slice(base), "new": slice(base, None)}[data.classes]]
    sizes = card.sizes or {}
    train = len(names) * data.shots
    if data.shots == -1:
        train = sizes.get("train", 0) * len(names) // len(all_names)
    test = sizes.get("test") if data.classes == "all" else None
    return Facts(names, all_names, card.texts(data.template), train, test)


def _backbone(config: BackboneConfig, notes: list[str]) -> tuple[bool, Backbone]:
    """Return whether random weights are used, and the backbone."""
    try:
        backbone = load_backbone(
            config.name, config.pretrained, precision=config.precision, image_size=config.image_size
        )
        return False, backbone
    except BackboneError as error:
        random_backbone = load_backbone(config.name, "random", precision=config.precision, image_size=config.image_size)
        notes.append(f"no weights, random ones stand in: {str(error).splitlines()[0]}")
        return True, random_backbone


def _lacks_start(config: RunConfig, notes: list[str]) -> bool:
    """Return whether ``init_from`` names a head that does not exist; a note says so."""
    if config.initial_head is None:
        return False
    try:
        find_head(config.initial_head)
    except HeadError as error:
        notes.append(f"no head for init_from: {str(error).splitlines()[0]}")
        return True
    return False


def _shapes(trainable: list[tuple[str, torch.nn.Parameter]], limit: int = 12) -> list[str]:
    lines = [f"            {name} {list(parameter.shape)}" for name, parameter in trainable if parameter.numel()]
    more = len(lines) - limit
    return [*lines[:limit], *([f"            ... and {more} more"] if more > 0 else [])]


def _text_cost(method: PromptMethod) -> list[str]:
    layouts = method.training_layouts()
    packed = sum(layout.token_counts()[0] for layout in layouts)
    padded = sum(layout.lengths.numel() for layout in layouts) * method.backbone.text.context_length
    return [f"text        {packed:,} tokens a step (packed), {padded:,} if every prompt were padded"]


def _memory(method: PromptMethod, batch: int) -> float:
    """Return the bytes of weights, text activations of a step, and image activations if the image side is trained.

    Text that needs more than a quarter of the machine's memory is encoded in chunks and recomputed in the backward
    pass.
    """
    text, visual = method.backbone.text, method.backbone.model.visual
    total = float(sum(p.numel() * p.element_size() for p in method.parameters()))
    tokens = sum(layout.token_counts()[0] for layout in method.training_layouts())
    total += tokens * text.width * text.layers * KEPT_WIDTHS * 4
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is not None:
        patches, width = visual.positional_embedding.shape
        layers = len(blocks) if method.needs.images else 1
        total += batch * patches * width * layers * KEPT_WIDTHS * 4
    return total
