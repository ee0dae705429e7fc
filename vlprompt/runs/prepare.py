"""From a configuration to what a run needs: the task, the backbone and the method; what is missing is said at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from vlprompt._dist import local_rank
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.config.run import GRAM, BackboneConfig, DataConfig, RunConfig, TrainerConfig
from vlprompt.datasets import FewShotTask, load_dataset
from vlprompt.errors import ConfigError, DataError, VlpromptError
from vlprompt.io.head import learned_tensors
from vlprompt.io.regulators import load_regulator
from vlprompt.meta import Regulator
from vlprompt.methods import PromptMethod, create_method, get_method_class


def load_both(config: RunConfig) -> tuple[FewShotTask, Backbone]:
    """Load data and backbone; when both are missing, one error says so."""
    missing: list[VlpromptError] = []
    task: FewShotTask | None = None
    backbone: Backbone | None = None
    try:
        task = load_task(config.data, config.seed)
    except VlpromptError as error:
        missing.append(error)
    try:
        backbone = configured_backbone(config.backbone, config.trainer)
    except VlpromptError as error:
        missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if task is None or backbone is None:
        raise ConfigError("two things are missing.\n\n1. " + str(missing[0]) + "\n\n2. " + str(missing[1]))
    return task, backbone


def configured_backbone(config: BackboneConfig, trainer: TrainerConfig) -> Backbone:
    """Return the frozen CLIP that ``config`` names, on the device of this process.

    Raises:
        BackboneError: It cannot be loaded.
    """
    return load_backbone(config.name, config.pretrained, precision=config.precision, device=device_of(trainer))


def device_of(config: TrainerConfig) -> str:
    """Return the device of this process: its own GPU where GPUs are used, else the CPU."""
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return "cpu"


def load_task(data: DataConfig, seed: int, classes: str | None = None) -> FewShotTask:
    """Return the task that ``data`` names, or its counterpart with other ``classes``."""
    return load_dataset(
        data.name,
        root=data.root,
        shots=data.shots,
        seed=seed,
        classes=classes or data.classes,
        template=data.template,
        source=data.source,
        target=data.target,
        split=data.split,
        sampler=data.sampler,
        shots_file=data.shots_file,
    )


def build_method(config: RunConfig, backbone: Backbone, task: FewShotTask) -> PromptMethod:
    """Return the configured method for the task's classes; templates left open are the data set's own.

    Raises:
        VlpromptError: Settings or class names that cannot be used, or a ``start`` that does not fit.
    """
    method = make_method(config, backbone, task.class_names, task.all_class_names, task.template)
    if start := config.start or (config.init or "").removeprefix(GRAM):
        tensors, _ = learned_tensors(start, backbone)
        method.start_from(tensors)
    return method


def make_method(
    config: RunConfig, backbone: Backbone, names: Sequence[str], everything: Sequence[str], template: str
) -> PromptMethod:
    """Return the configured method for classes ``names`` of ``everything``, without a ``start`` of its own."""
    settings = with_own_template(get_method_class(config.method), config.settings, template)
    known = set(names)
    return create_method(
        config.method,
        backbone,
        names,
        all_class_names=[*names, *(name for name in everything if name not in known)],
        objectives=config.objectives,
        decomposition=config.decomposition,
        **settings,
    ).to(backbone.device)


def regulator_of(config: RunConfig, method: PromptMethod) -> Regulator | None:
    """Return the meta-learned regulator of the gradients of ``method``, if ``init`` names one.

    Raises:
        VlpromptError: It cannot be read, is for other prompts, or the method takes no gradient steps.
    """
    if config.init is None:
        return None
    if not method.parameter_groups(config.recipe.lr):
        raise ConfigError(
            f"init is {config.init!r}, and {method.name} takes no gradient steps over images; leave init away"
        )
    return load_regulator(config.init.removeprefix(GRAM), method)


def complete(config: RunConfig) -> RunConfig:
    """Return ``config`` with the method's defaults for settings that are left out, as the command line has it.

    Equal runs so have equal folders. Only a template that is the data set's own is left open.
    """
    kind = get_method_class(config.method)
    defaults = {}
    for entry in dataclasses.fields(kind.Settings):
        if entry.name == kind.template_setting:
            continue
        if entry.default is not dataclasses.MISSING:
            defaults[entry.name] = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            defaults[entry.name] = entry.default_factory()
    return dataclasses.replace(config, settings={**defaults, **config.settings})


def with_own_template(kind: type[PromptMethod], settings: dict[str, Any], template: str) -> dict[str, Any]:
    """Return ``settings`` with the data set's ``template`` where the method takes one and none is given."""
    name = kind.template_setting
    if name is None or settings.get(name):
        return dict(settings)
    return {**settings, name: [template]}


def zeroshot_method(backbone: Backbone, task: FewShotTask) -> PromptMethod:
    """Return zero-shot CLIP with the task's template, ready to be tested."""
    zeroshot = create_method("zeroshot", backbone, task.class_names, templates=[task.template])
    return zeroshot.to(backbone.device).eval()


def moved_to(config: RunConfig, method: PromptMethod, task: FewShotTask) -> PromptMethod:
    """Return ``method`` with its learnables for the classes of another data set, the prompts built anew.

    A template that the settings leave open is the other data set's own.

    Raises:
        VlpromptError: The learnables belong to the method's own classes.
    """
    same = method.class_names == task.class_names
    if with_own_template(type(method), config.settings, "") == config.settings or method.fits and not same:
        return method.with_classes(task.class_names)
    moved = build_method(config, method.backbone, task)
    moved.load_trained_state(method.trained_state())
    return moved.train(method.training)


def load_all(wanted: Sequence[DataConfig], seed: int) -> list[FewShotTask]:
    """Return the task of each of ``wanted``.

    Raises:
        DataError: Data sets that are missing or cannot be used; all of them are named.
        ConfigError: Values that are not accepted.
    """
    tasks, missing = [], []
    for data in wanted:
        try:
            tasks.append(load_task(data, seed))
        except DataError as error:
            missing.append(f"{data.name}: {error}")
    if len(missing) == 1:
        raise DataError(f"nothing was run, because a data set cannot be used.\n{missing[0]}")
    if missing:
        # Of many, what is wrong and where it was looked for; how to get one is said when it is asked for alone.
        short = [" ".join(" ".join(text.splitlines()[:2]).split()) for text in missing]
        names = ", ".join(text.partition(":")[0] for text in missing)
        raise DataError(
            f"nothing was run, because {len(missing)} of {len(wanted)} data sets cannot be used ({names}):\n"
            + "\n".join(f"  {number}. {text}" for number, text in enumerate(short, 1))
            + "\n`vlprompt data check NAME` tells what to fetch and where to put it. Others: --datasets, --targets."
        )
    return tasks
