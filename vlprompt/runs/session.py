"""What a run needs, each thing made once and when it is first asked for: task, backbone, method and data modules."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._dist import local_rank
from vlprompt._files import sha256_lines
from vlprompt._random import restored_random
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.config.keys import as_plain
from vlprompt.config.run import BackboneConfig, DataConfig, RunConfig, TrainerConfig
from vlprompt.config.types import make
from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask, load_dataset
from vlprompt.engine.fit import check_devices
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.generation import open_bank
from vlprompt.io.head import Head, learned_tensors
from vlprompt.io.regulators import load_regulator
from vlprompt.meta import Regulator
from vlprompt.methods import PromptMethod, create_method, get_method_class
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod
from vlprompt.methods.registry import merge_parts, open_templates
from vlprompt.runs.folder import run_folder
from vlprompt.runs.selection import judge


class Named(Protocol):
    """What a method needs to know of a task."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in play, by label."""

    @property
    def all_class_names(self) -> list[str]:
        """Names of all classes of the data set."""

    @property
    def template(self) -> str:
        """The data set's prompt with ``{}`` for the class name."""


class Session:
    """Everything that belongs to one run.

    Args:
        config: The run's configuration. Settings that it leaves out get the method's defaults.
        scored: The images that stand in the task's test list: ``test``, or ``val`` for a choice of hyperparameters,
            which must not open test images.
        after: An earlier session. Its data set and its backbone are used again where they are the same.

    Attributes:
        config: The configuration with all settings, but for templates that the data set fills.
    """

    def __init__(
        self, config: RunConfig, *, scored: Literal["test", "val"] = "test", after: Session | None = None
    ) -> None:
        self.config = complete(config)
        self.scored = scored
        self._modules: list[tuple[tuple[Any, ...], FewShotData]] = []
        if after is not None:
            self._take_over(after)

    @classmethod
    def given(
        cls,
        method: PromptMethod,
        task: FewShotTask,
        *,
        recipe: Mapping[str, Any] | None = None,
        data: DataConfig | None = None,
        **values: Any,
    ) -> Session:
        """Return the session of a method and a task that were made in Python.

        Args:
            method: The method.
            task: The task.
            recipe: Fields of the recipe.
            data: The data section, if the task was loaded by one.
            **values: Other fields of the configuration, and ``transform``, a field of its data section.

        Raises:
            ConfigError: Values that are not accepted.
        """
        backbone, transform = method.backbone, values.pop("transform", "random")
        sections = {
            "method": method.name,
            "settings": method.settings_dict(),
            "objectives": method.objective_settings,
            "decomposition": method.decomposition_settings,
            "backbone": {"name": backbone.name, "pretrained": backbone.pretrained, "precision": backbone.precision},
            "data": {**_data_section(task), "transform": transform} if data is None else data,
            "recipe": {**dataclasses.asdict(method.recipe), **(recipe or {})},
        }
        session = cls(make(RunConfig, {**sections, **values}))
        session.drawn, session.backbone, session.method = task, backbone, method
        return session

    @classmethod
    def of_head(cls, head: Head, data: DataConfig, *, seed: int, trainer: TrainerConfig) -> Session:
        """Return the session of a saved head on the test images of ``data``.

        Raises:
            VlpromptError: The data cannot be used, or the head belongs to other classes.
        """
        task = load_task(data, seed)
        method = head.method if task.class_names == head.class_names else head.method.with_classes(task.class_names)
        return cls.given(method.eval(), task, data=data, seed=seed, trainer=trainer)

    def load(self) -> None:
        """Load the data set and the backbone.

        Raises:
            VlpromptError: One of them cannot be used; where both cannot, one error says so. Or devices are missing.
        """
        check_devices(self.config.trainer)
        load_parts(self, "drawn", "backbone")

    # -- what is loaded ---------------------------------------------------------------------------------------------
    @cached_property
    def folder(self) -> Path:
        """The run's folder."""
        return run_folder(self.config)

    @cached_property
    def device(self) -> str:
        """The device of this process."""
        return device_of(self.config.trainer)

    @cached_property
    def drawn(self) -> FewShotTask:
        """The task as it was drawn.

        Raises:
            VlpromptError: The data set cannot be used.
        """
        return load_task(self.config.data, self.config.seed)

    @cached_property
    def counterpart(self) -> FewShotTask:
        """The task of the other half of the classes, from the same draw.

        Raises:
            ConfigError: The task has all classes.
        """
        return self.drawn.counterpart()

    @cached_property
    def task(self) -> FewShotTask:
        """The task with the images that are scored, and the training images that the method takes gradient steps on.

        Without labels, images of the other half of the classes can be learned from as well.

        Raises:
            ConfigError: There are no validation images to score.
        """
        task, method = self.drawn, self.method
        if self.scored == "val":
            if not task.val:
                raise ConfigError(f"{task.name} has no validation images to score on")
            task = dataclasses.replace(task, test=task.val)
        if method.needs.unlabelled != "all-classes" or task.classes == "all":
            return task
        train = [*task.train, *self.counterpart.train]
        return dataclasses.replace(task, train=train, shots_sha256=sha256_lines(sample.id for sample in train))

    @cached_property
    def domains(self) -> dict[str, FewShotTask]:
        """The task with the test images of one domain alone, by domain; empty for a data set without domains."""
        return self.task.by_domain()

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen CLIP, on the device of this process.

        Raises:
            BackboneError: It cannot be loaded.
        """
        return configured_backbone(self.config.backbone, self.config.trainer)

    # -- methods ----------------------------------------------------------------------------------------------------
    @cached_property
    def method(self) -> PromptMethod:
        """The configured method for the task's classes; the seed is set before it is made.

        Raises:
            VlpromptError: Settings or class names that cannot be used, or a ``init_from`` that does not fit.
        """
        self.load()
        pl.seed_everything(self.config.seed, verbose=False)
        return self._started(self.make_method(self.drawn, self.backbone))

    @cached_property
    def zero_shot(self) -> PromptMethod:
        """Zero-shot CLIP with the task's template, ready to be tested."""
        return self.zero_shot_on(self.task)

    @cached_property
    def regulator(self) -> Regulator | None:
        """The meta-learned regulator of the method's gradients, if ``init_from`` names one.

        Raises:
            VlpromptError: It cannot be read, is for other prompts, or the method takes no gradient steps.
        """
        if self.config.meta_training is None:
            return None
        if not self.trains:
            raise ConfigError(
                f"init_from is {self.config.init_from!r}, and {self.method.name} takes no gradient steps over images; "
                "omit init_from"
            )
        return load_regulator(self.config.meta_training, self.method)

    @property
    def trains(self) -> bool:
        """Whether the method takes gradient steps over images."""
        return bool(self.method.parameter_groups(self.config.recipe.lr))

    def make_method(self, task: Named, backbone: Backbone) -> PromptMethod:
        """Return the configured method for the classes of ``task``, without ``init_from``.

        Templates that the configuration leaves open are the task's.

        Raises:
            VlpromptError: Settings or class names that cannot be used.
        """
        names, known = task.class_names, set(task.class_names)
        return create_method(
            self.config.method,
            backbone,
            names,
            all_class_names=[*names, *(name for name in task.all_class_names if name not in known)],
            objectives=self.config.objectives,
            decomposition=self.config.decomposition,
            data_template=task.template,
            **self.config.settings,
        ).to(backbone.device)

    def _started(self, method: PromptMethod) -> PromptMethod:
        if folder := self.config.initial_head:
            tensors, _ = learned_tensors(folder, method.backbone)
            method.start_from(tensors)
        return method

    def zero_shot_on(self, task: FewShotTask) -> PromptMethod:
        """Return zero-shot CLIP with the template of ``task``, ready to be tested."""
        zero_shot = create_method("zeroshot", self.backbone, task.class_names, templates=[task.template])
        return zero_shot.to(self.backbone.device).eval()

    def moved(self, method: PromptMethod, task: FewShotTask) -> PromptMethod:
        """Return ``method`` with its learnables for the classes of another data set, prompts made for them.

        Templates that the configuration leaves open are the other data set's own.

        Raises:
            VlpromptError: The learnables belong to the method's own classes.
        """
        same = method.class_names == task.class_names
        config = self.config
        open_ones = open_templates(config.method, config.settings, config.objectives, task.template)
        if not open_ones or isinstance(method, FittedMethod) and not same:
            return method.with_classes(task.class_names)
        moved = self._started(self.make_method(task, method.backbone))
        moved.load_trained_state(method.trained_state())
        return moved.train(method.training)

    def check_moves(self, source: FewShotTask, target: FewShotTask) -> None:
        """Raise ConfigError where the method's learnables belong to the source's classes; nothing is trained yet."""
        first, second = (
            dataclasses.replace(task, class_names=task.class_names[:2], all_class_names=task.class_names[:2])
            for task in (source, target)
        )  # two names show it
        with restored_random():
            method = self._started(self.make_method(first, self.backbone))
            try:
                self.moved(method, second)
            except VlpromptError as error:
                raise ConfigError(f"{self.config.method} cannot be moved to other data sets: {error}") from error

    # -- what methods are fed ---------------------------------------------------------------------------------------
    def data(self, method: PromptMethod, task: FewShotTask) -> FewShotData:
        """Return the data module that serves ``method`` on ``task``; methods that are served alike share it.

        It gives features where the method's image side is frozen, else images.

        Raises:
            ConfigError: Values that the method cannot have.
        """
        config, views = self.config, method.needs.test_views
        served = (id(task), method.needs.images, views)  # modules hold their task, which keeps its id
        for known, module in self._modules:
            if known == served:
                return module
        more: dict[str, Any] = {}
        if views is not None:
            more = {"test_views": views, "views_as_images": method.needs.images}
            if views.generated:
                more["generated"] = self._bank(method)
        module = FewShotData(
            task,
            self.backbone.preprocess,
            batch_size=config.recipe.batch_size,
            test_batch_size=config.recipe.test_batch_size,
            transform=config.data.transform,
            seed=config.seed,
            workers=config.data.workers,
            on_bad_image=config.data.on_bad_image,
            cached_views=self._cached_views(method, task),
            encode=None if method.needs.images else self._encode,
            fingerprint=self.backbone.fingerprint,
            device=self.device,
            **more,
        )
        self._modules.append((served, module))
        return module

    def shots(self) -> FewShotFeatures:
        """Return the frozen features that ``method.fit`` learns from, out of the feature store.

        Validation images that are test images too are left out: nothing is chosen on test images unless the method's
        settings say so.
        """
        method, task = self.method, self.task
        data, device = self.data(method, task), method.backbone.device

        def features(split: str, count: int, kind: str) -> Tensor:
            return data.view_features(split, count, kind)[:, readable(split)].to(device)

        def labels(split: str) -> Tensor:
            every = torch.tensor([sample.label for sample in getattr(task, split)], dtype=torch.int64)
            return every[readable(split)].to(device)

        def readable(split: str) -> list[int]:
            skipped = set(data.unreadable(split))
            return [row for row in range(len(getattr(task, split))) if row not in skipped]

        needs = method.needs
        where: Literal["train", "test"] | None = None
        if needs.unlabelled != "none":
            where = "test" if needs.unlabelled == "test" else "train"
        nothing = torch.empty(0, method.backbone.embed_dim, device=device)
        split = self._selection_split()
        views = needs.unlabelled_views
        return FewShotFeatures(
            train=features("train", needs.fit_views, needs.fit_view),
            labels=labels("train"),
            val=nothing if split is None else features(split, 0, "center")[0],
            val_labels=torch.empty(0, dtype=torch.int64, device=device) if split is None else labels(split),
            unlabelled=nothing if where is None else features(where, 0, "center")[0],
            unlabelled_views=features(where, views, "random") if where and views else nothing[None][:0],
            seed=self.config.seed,
        )

    def training_images(self) -> Iterator[Tensor]:
        """Yield the training images once, in batches ``[B, 3, H, W]``, as the configuration looks at them."""
        data = self.data(self.method, self.task)
        data.setup("fit")
        for batch in data.train_dataloader():
            yield batch["images"]

    def task_feature(self) -> Tensor:
        """Return the mean unit image feature ``[D]`` of the training images in the test view."""
        data = self.data(self.zero_shot, self.task)
        unit = F.normalize(data.features("train").float(), dim=-1)  # skipped images are zeros and stay so
        return unit.sum(dim=0) / (len(unit) - len(data.unreadable("train")))

    def check_processes(self) -> None:
        """Raise ConfigError when several processes would share a stream whose order counts."""
        if self.method.needs.online and self.config.trainer.devices > 1:
            raise ConfigError(
                f"trainer.devices is {self.config.trainer.devices}, but {self.method.name} sees its test images one "
                "after the other; accepted: 1"
            )

    def _encode(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images.to(self.backbone.device))  # which a Trainer moves

    def _selection_split(self) -> str | None:
        """Return the split that hyperparameters are chosen on; None where there are no images for it."""
        method, task = self.method, self.task
        ids = [{sample.id for sample in samples} for samples in (task.val, task.test)]
        if method.needs.select_on == "test":
            judge(task.name, "test", *ids, oracle=True)
            return "test"
        if method.needs.select_on is None:
            return None
        if not ids[0] or ids[0] & ids[1]:
            why = "no validation images" if not ids[0] else "no validation images apart from its test images"
            warnings.warn(f"{task.name} has {why}: {method.name} keeps the values of its settings", stacklevel=2)
            return None
        return "val"

    def _bank(self, method: PromptMethod) -> Any:
        if self.config.data.bank is None:
            views = method.needs.test_views
            raise ConfigError(
                f"{method.name} looks at {views.generated if views else 0} generated pictures of "
                "each test image, and data.bank does not say where they are. Make them with `vlprompt bank` "
                "and give --data.bank FOLDER, or do without: --settings.generated 0"
            )
        return open_bank(Path(self.config.data.bank).expanduser())

    def _cached_views(self, method: PromptMethod, task: FewShotTask) -> int:
        """Return the random views per training image whose features are kept: as asked for, or one per epoch.

        One per epoch where that changes nothing but rounding (one process, full precision) and takes at most 1 GiB.
        """
        config, asked = self.config, self.config.data.cached_views
        if asked and method.needs.images:
            raise ConfigError(
                f"data.cached_views is {asked}, but {method.name} with these settings learns on the image side, so "
                "that features cannot be kept; accepted: 0 or null"
            )
        if asked is not None or method.needs.images or config.data.transform == "center":
            return asked or 0
        size = len(task.train) * config.recipe.epochs * method.backbone.embed_dim * 4
        exact = config.trainer.devices == 1 and config.trainer.precision == "32-true"
        return config.recipe.epochs if exact and size <= 2**30 else 0

    def _take_over(self, other: Session) -> None:
        """Use what ``other`` has loaded, as far as it is what this session would load."""
        known, config = vars(other), self.config
        if "backbone" in known and (other.config.backbone, other.device) == (config.backbone, self.device):
            self.backbone = other.backbone.to(self.device)
        request = _request(config.data, config.seed)
        if "drawn" in known and _request(other.config.data, other.config.seed) == request:
            self.drawn = other.drawn


# -- single parts -----------------------------------------------------------------------------------------------------
def load_parts(session: object, *names: str) -> None:
    """Ask ``session`` for the parts ``names``; where several cannot be loaded, one error says so.

    Raises:
        VlpromptError: A part cannot be loaded.
    """
    missing: list[VlpromptError] = []
    for name in names:
        try:
            getattr(session, name)
        except VlpromptError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        raise ConfigError(f"two things are missing.\n\n1. {missing[0]}\n\n2. {missing[1]}")


def load_task(data: DataConfig, seed: int) -> FewShotTask:
    """Return the task that ``data`` names."""
    return load_dataset(**_request(data, seed))


def _request(data: DataConfig, seed: int) -> dict[str, Any]:
    """Return the arguments of :func:`~vlprompt.load_dataset` that ``data`` stands for."""
    names = ("name", "root", "shots", "classes", "template", "source", "target", "split", "sampler", "shots_file")
    return {**{name: getattr(data, name) for name in names}, "seed": seed}


def _data_section(task: FewShotTask) -> dict[str, Any]:
    """Return the data section that a task was loaded by: the inverse of :func:`load_task`."""
    file = task.request.get("shots_file")
    return {
        "name": task.name,
        "root": task.root,
        "shots": task.shots,
        "classes": task.classes,
        "template": task.template,
        "source": list(task.source),
        "target": list(task.target),
        "split": task.request.get("split"),
        "sampler": task.request.get("sampler"),
        "shots_file": None if file is None else str(file),
    }


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


def complete(config: RunConfig) -> RunConfig:
    """Return ``config`` with the method's defaults for settings that are left out, as the command line has it.

    Settings of the method's own objectives and decomposition move to its settings. Equal runs thus have equal folders.
    Templates that the data set fills stay empty.

    Raises:
        ConfigError: Settings that are not accepted.
    """
    kind = get_method_class(config.method)
    settings, objectives, decomposition = merge_parts(kind, config.settings, config.objectives, config.decomposition)
    complete = as_plain(make(kind.Settings, settings))
    return dataclasses.replace(config, settings=complete, objectives=objectives, decomposition=decomposition)


def use_of_test_images(method: PromptMethod) -> str | None:
    """Return how a method uses test images beyond scoring each one: for results and tables; None for not at all."""
    needs = method.needs
    if needs.transductive:
        return "transductive"
    if needs.online:
        return "online"
    return "test-tuned" if needs.test_views is not None and needs.gradient else None
