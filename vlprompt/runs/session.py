"""Session of a run: task, backbone, method and data modules, each created once, on first use."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt._dist import local_rank
from vlprompt._files import home_path, sha256_json, sha256_lines, sha256_tensors
from vlprompt._random import restored_random
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.config.keys import as_plain
from vlprompt.config.run import BackboneConfig, DataConfig, RecipeConfig, RunConfig, TestOrder, TrainerConfig
from vlprompt.config.texts import DataTexts, depends_on_data, described, has_references, unknown_classes, weighted
from vlprompt.config.types import expanded, make, over_defaults
from vlprompt.data import FewShotData
from vlprompt.data.transforms import FIXED_KINDS, WHOLE_KINDS
from vlprompt.datasets import FewShotTask, load_dataset
from vlprompt.datasets.kept_images import Contents, contents_by_id
from vlprompt.engine.fit import check_devices, check_precision
from vlprompt.errors import ClassNameError, ConfigError, VlpromptError, bulleted
from vlprompt.generation import open_bank
from vlprompt.io.head import Head, learned_tensors, load_head, preprocess_facts
from vlprompt.io.regulators import load_regulator
from vlprompt.io.statistics import read_statistics
from vlprompt.meta import Regulator
from vlprompt.methods import PromptMethod, create_method, get_method_class
from vlprompt.methods.episodic import ViewsMethod
from vlprompt.methods.fitted import FewShotFeatures, FittedMethod, check_known
from vlprompt.methods.registry import check_start, given_texts, merge_parts, resolved_templates, text_lists
from vlprompt.methods.teacher import is_head
from vlprompt.objectives import get_objective_class
from vlprompt.prompts.decomposed import get_decomposition_class
from vlprompt.runs.effect import note, without_idle
from vlprompt.runs.folder import config_sha256, run_folder
from vlprompt.runs.selection import judge


class Named(Protocol):
    """The part of a task that methods use."""

    @property
    def class_names(self) -> list[str]:
        """Names of the task's classes, by label."""

    @property
    def all_class_names(self) -> list[str]:
        """Names of all classes of the data set."""

    @property
    def texts(self) -> DataTexts:
        """The data set's templates, with ``{}`` for the class name."""


class Session:
    """The objects of one run.

    Args:
        config: The run's configuration. Omitted settings get the method's defaults.
        scored: The split in the task's test list: ``test``, or ``val`` for the selection of hyperparameters, which must
            not open test images.
        after: An earlier session; its data set and backbone are reused if they are the same.

    Attributes:
        config: The configuration with all settings, except templates that the data set fills.
    """

    def __init__(
        self, config: RunConfig, *, scored: Literal["test", "val"] = "test", after: Session | None = None
    ) -> None:
        self.scored = scored
        self._modules: list[tuple[tuple[Any, ...], FewShotData]] = []
        if after is not None:
            self._take_over(after, config)
        self.config, idle = without_idle(completed(config))
        if idle:
            warnings.warn(note(idle), stacklevel=2)

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
        """Return the session of a method and a task created in Python.

        Args:
            method: The method.
            task: The task.
            recipe: Fields of the recipe.
            data: The data section, if the task was loaded from one.
            **values: Other fields of the configuration, and ``transform`` of its data section.

        Raises:
            ConfigError: Values are not accepted.
        """
        transform = values.pop("transform", "random") if data is None else data.transform
        if transform in WHOLE_KINDS:
            method.backbone = method.backbone.resizing(WHOLE_KINDS[transform])
        backbone = method.backbone
        sections = {
            "method": method.name,
            "settings": method.settings_dict(),
            "objectives": method.objective_settings,
            "decomposition": method.decomposition_settings,
            "backbone": {name: getattr(backbone, name) for name in ("name", "pretrained", "precision", "image_size")},
            "data": {**_data_section(task), "transform": transform} if data is None else data,
            "recipe": over_defaults(RecipeConfig, recipe or {}, method.recipe),
        }
        session = cls(make(RunConfig, {**sections, **values}))
        session.drawn, session.backbone, session.method = task, backbone, method
        return session

    @classmethod
    def of_head(cls, head: Head, data: DataConfig, *, seed: int, trainer: TrainerConfig) -> Session:
        """Return the session of a saved head on the test images of ``data``.

        Raises:
            VlpromptError: The data cannot be used, the head belongs to other classes, or was trained on images that
                become square in another way.
        """
        mode, own = WHOLE_KINDS.get(data.transform), head.backbone.preprocess.resize_mode
        if mode not in (None, own):
            raise ConfigError(
                f"data.transform is {data.transform!r} (resize mode {mode}), and the head was trained on images of "
                f"resize mode {own}; omit data.transform: test images are transformed as at the training"
            )
        task = load_task(data, seed)
        method = head.method if task.class_names == head.class_names else head.method.with_classes(task.class_names)
        return cls.given(method.eval(), task, data=data, seed=seed, trainer=trainer)

    def load(self) -> None:
        """Load the data set and the backbone.

        Raises:
            VlpromptError: One or both of them cannot be used (one error reports both), devices are missing, or types of
                numbers contradict each other.
        """
        check_devices(self.config.trainer)
        check_precision(self.config.backbone, self.config.trainer)
        load_parts(self, "drawn", "backbone")

    # -- loaded objects ---------------------------------------------------------------------------------------------
    @cached_property
    def plain(self) -> dict[str, Any]:
        """The configuration in plain values."""
        return as_plain(self.config)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of everything in the configuration that can change a result."""
        return config_sha256(self.config)

    @cached_property
    def folder(self) -> Path:
        """The run's folder."""
        return run_folder(self.config)

    def inputs(self) -> dict[str, str]:
        """Return the checksums of the inputs of the run."""
        config, images = self.config, self.images_sha256
        state = {"initial prompts": self.method.trained_state()}
        if self.regulator is not None:
            state["gradient regulator"] = self.regulator.state_dict()
        named = (config.method, config.settings, config.objectives)
        refers = any(map(has_references, given_texts(*named).values()))  # to a card or list, which may change
        return {
            **({"templates": sha256_json(resolved_templates(*named, self.drawn.texts))} if refers else {}),
            "split": self.task.split_sha256,
            "choice of shots": self.task.shots_sha256,
            "backbone": self.backbone.fingerprint,
            "class names": sha256_lines(self.task.class_names),
            "preprocessing": sha256_json(preprocess_facts(self.backbone)),
            **({} if images is None else {"content of the images": images}),
            **({} if self.bank_id is None else {"bank": self.bank_id}),
            **{name: sha256_tensors(tensors, lambda name, tensor: name) for name, tensors in state.items()},
        }

    @cached_property
    def contents(self) -> Contents:
        """The SHA-256 of every image of the user's data set by id; empty for other data sets, and for large ones."""
        lists = self.drawn.lists
        if lists is None or not self.drawn.card.own:
            return {}
        return contents_by_id([*lists.train, *lists.val, *lists.test])

    @cached_property
    def images_sha256(self) -> str | None:
        """The SHA-256 of the images of the user, or of their sizes if they are many; None for other data sets."""
        lists = self.drawn.lists
        if lists is None or not self.drawn.card.own:
            return None
        if self.contents:
            return sha256_json(sorted(self.contents.items()))
        samples = [*lists.train, *lists.val, *lists.test]
        return sha256_json(sorted([sample.id, sample.source.stored_bytes()] for sample in samples))

    @cached_property
    def bank_id(self) -> str | None:
        """The id of the recipe of ``data.bank``; None if the method uses no generated images."""
        return self._bank(self.method).recipe_id if self.config.data.bank and self._generates() else None

    @property
    def heads(self) -> list[tuple[str, str]]:
        """The settings that name heads which the method starts from, or learns from, and their folders."""
        named = [("init_from", self.config.initial_head), ("settings.teacher", self.config.settings.get("teacher"))]
        return [(key, folder) for key, folder in named if folder and is_head(folder)]

    def data_facts(self) -> dict[str, Any]:
        """Return facts about the data for the records of results and heads, besides those of the task."""
        return {
            **({} if self.images_sha256 is None else {"images_sha256": self.images_sha256}),
            **({} if self.bank_id is None else {"bank": self.bank_id}),
        }

    def inputs_sha256(self) -> str:
        """Return the SHA-256 of configuration and inputs, which binds checkpoints, heads and results to the run."""
        return sha256_json([self.sha256, self.inputs()])

    @cached_property
    def device(self) -> str:
        """The device of this process."""
        return device_of(self.config.trainer)

    @cached_property
    def drawn(self) -> FewShotTask:
        """The task as drawn from the data set.

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
        """The task with the images to score, and the training images for gradient steps.

        Methods that train without labels may also use images of the other half of the classes.

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
        """The task restricted to the test images of each domain, by domain; empty for a data set without domains."""
        return self.task.by_domain()

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen CLIP, on the device of this process.

        Raises:
            BackboneError: It cannot be loaded.
        """
        return self._resizing(configured_backbone(self.config.backbone, self.config.trainer))

    def _resizing(self, backbone: Backbone) -> Backbone:
        """Return ``backbone`` with test images that become square as ``data.transform`` says."""
        mode = WHOLE_KINDS.get(self.config.data.transform)
        return backbone if mode is None else backbone.resizing(mode)

    # -- methods ----------------------------------------------------------------------------------------------------
    @cached_property
    def method(self) -> PromptMethod:
        """The configured method for the task's classes; the seed is set before it is created.

        Raises:
            VlpromptError: Settings or class names cannot be used, or ``init_from`` does not fit.
        """
        check_start(self.config.method, self.config.init_from)
        self.load()
        pl.seed_everything(self.config.seed, verbose=False)
        method = self.started(self.make_method(self.drawn, self.backbone))
        _report_unknown_classes(method, self.drawn)
        return method

    @cached_property
    def zero_shot(self) -> PromptMethod:
        """The zero-shot classifier of the method, in evaluation mode."""
        return self.zero_shot_on(self.task, self.method)

    @cached_property
    def regulator(self) -> Regulator | None:
        """The meta-learned regulator of the method's gradients, if ``init_from`` names one.

        Raises:
            VlpromptError: It cannot be read or is for other prompts, or the method takes no gradient steps.
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

    def check_training_images(self) -> None:
        """Raise ConfigError if the method learns from training images and the task has none; call before training."""
        task, needs = self.task, self.method.needs
        fits = isinstance(self.method, FittedMethod) and (needs.fit_labelled or needs.unlabelled == "train")
        if task.train or not (fits or self.trains):
            return
        if not task.card.same_images:
            raise ConfigError(f"{task.name} has no training images; {self.config.method} can be tested on it only")
        raise ConfigError(
            f"{task.name} has no training images apart from its test images: {self.config.method} needs data.source, "
            f"the domains to train on. Domains: {', '.join(task.card.domains)}"
        )

    def make_method(self, task: Named, backbone: Backbone) -> PromptMethod:
        """Return the configured method for the classes of ``task``, without ``init_from``.

        Templates that the configuration does not set are those of the task.

        Raises:
            VlpromptError: Settings or class names cannot be used.
        """
        names, known = task.class_names, set(task.class_names)
        return create_method(
            self.config.method,
            backbone,
            names,
            all_class_names=[*names, *(name for name in task.all_class_names if name not in known)],
            objectives=self.config.objectives,
            decomposition=self.config.decomposition,
            data_template=task.texts,
            **self.config.settings,
        ).to(backbone.device)

    def started(self, method: PromptMethod) -> PromptMethod:
        """Initialise ``method`` from ``init_from`` and ``data.statistics`` and return it.

        Raises:
            VlpromptError: One of them cannot be read or does not fit.
        """
        if folder := self.config.initial_head:
            method.start_from(self._initial_tensors(folder, method))
        self.set_statistics(method)
        return method

    def _initial_tensors(self, folder: str, method: PromptMethod) -> dict[str, Tensor]:
        """Return the learned tensors of ``init_from``, in the order of the classes of ``method``."""
        tensors, head = learned_tensors(folder, method.backbone)
        names = list(head.class_names)
        if head.method != method.name or names == method.class_names or len(names) != len(method.class_names):
            return tensors  # tensors of classes have another shape if their number differs
        try:
            return load_head(folder, method.backbone).method.with_classes(method.class_names).head_state()
        except ClassNameError as error:
            raise ConfigError(
                f"init_from is {folder!r}, a head of other classes or in another order: {error}"
            ) from error

    def set_statistics(self, method: PromptMethod) -> None:
        """Set the source statistics of ``data.statistics``.

        Raises:
            ConfigError: The method aligns with no source.
            DataError: A file cannot be read, or has statistics of another shape.
        """
        if files := self.config.data.statistics:
            if not isinstance(method, ViewsMethod) or not method.aligns:
                raise ConfigError(
                    f"data.statistics is {list(files)}, but {method.name} with these settings aligns with no source; "
                    "omit data.statistics"
                )
            method.set_source(*read_statistics(files, method.source_shape()))

    def zero_shot_on(self, task: FewShotTask, method: PromptMethod) -> PromptMethod:
        """Return zero-shot CLIP on ``task`` with the classifier of ``method``, in evaluation mode.

        Methods without hand-written prompts have the template of ``task``.
        """
        settings = method.zero_shot_settings()
        zero_shot = create_method("zeroshot", self.backbone, task.class_names, data_template=task.texts, **settings)
        return zero_shot.to(self.backbone.device).eval()

    def classifier_facts(self, zero_shot: PromptMethod, task: FewShotTask, method: PromptMethod) -> dict[str, Any]:
        """Return the name and the texts of a zero-shot classifier, for results.

        Args:
            zero_shot: The classifier from :meth:`zero_shot_on`.
            task: Its task.
            method: The method that it belongs to.

        Returns:
            ``name``: its template, its ensembles and files, or the number of its templates; ``templates``; their
            ``average``; ``sha256`` of the texts; ``published``: whether it is the one template of the data set's card.
            Sentences of classes are given by their number.
        """
        settings, config = zero_shot.settings, self.config
        entries = settings.templates
        own: Any = expanded(make(get_method_class(config.method).Settings, config.settings))
        whole = getattr(method.settings, "templates", None) == entries
        return {
            "name": described((getattr(own, "templates", ()) if whole else ()) or entries),
            "templates": [body if isinstance(body, str) else described([body]) for body, _ in map(weighted, entries)],
            "average": settings.average,
            "sha256": sha256_json(entries),
            "published": list(entries) == [task.card.template],
        }

    def moved(self, method: PromptMethod, task: FewShotTask) -> PromptMethod:
        """Return ``method`` with its trained parameters and new prompts for the classes of another data set.

        Templates that the configuration does not set are those of the other data set.

        Raises:
            VlpromptError: The trained parameters are specific to the method's classes.
        """
        same = method.class_names == task.class_names
        config = self.config
        given = given_texts(config.method, config.settings, config.objectives)
        of_data = any(depends_on_data(entries) for entries in given.values())
        if not of_data or isinstance(method, FittedMethod) and not same:
            return method.with_classes(task.class_names)
        moved = self.started(self.make_method(task, method.backbone))
        moved.load_trained_state(method.trained_state())
        return moved.train(method.training)

    def check_moves(self, source: FewShotTask, targets: Sequence[FewShotTask]) -> None:
        """Raise ConfigError if trained parameters would be specific to the source's classes; call before training."""
        if issubclass(get_method_class(self.config.method), FittedMethod):
            for target in targets:
                check_known(self.config.method, (source.name, source.class_names), (target.name, target.class_names))
        first, second = (
            dataclasses.replace(task, class_names=task.class_names[:2], all_class_names=task.class_names[:2])
            for task in (source, targets[0])
        )  # two class names are enough for the check
        with restored_random():
            method = self.started(self.make_method(first, self.backbone))
            try:
                self.moved(method, second)
            except VlpromptError as error:
                raise ConfigError(f"{self.config.method} cannot be moved to other data sets: {error}") from error

    # -- data of methods --------------------------------------------------------------------------------------------
    def data(self, method: PromptMethod, task: FewShotTask) -> FewShotData:
        """Return the data module of ``method`` on ``task``; methods with the same needs share it.

        Its batches are features if the image side of the method is frozen, else images.

        Raises:
            ConfigError: Values do not fit the method.
        """
        config, views = self.config, method.needs.test_views
        order: TestOrder = config.data.order if method.needs.online else "file"
        key = (id(task), method.needs.images, views, order)  # modules keep their task alive, so its id stays unique
        for module_key, module in self._modules:
            if module_key == key:
                return module
        view_options: dict[str, Any] = {}
        if views is not None:
            view_options = {"test_views": views, "views_as_images": method.needs.images}
            if views.generated:
                view_options["generated"] = self._bank(method)
        module = FewShotData(
            task,
            self.backbone.preprocess,
            batch_size=config.recipe.batch_size,
            drop_last=config.recipe.drop_last,
            test_batch_size=config.recipe.test_batch_size,
            transform=config.data.transform,
            seed=config.seed,
            workers=config.data.workers,
            on_bad_image=config.data.on_bad_image,
            cached_views=self._cached_views(method, task),
            encode=None if method.needs.images else self._encode,
            fingerprint=self.backbone.fingerprint,
            device=self.device,
            test_order=order,
            **view_options,
        )
        self._modules.append((key, module))
        return module

    def shots(self) -> FewShotFeatures:
        """Return the frozen features for ``method.fit``, from the feature store.

        Validation images are omitted if any of them is a test image: nothing is chosen on test images unless the
        method's settings request it.
        """
        method, task = self.method, self.task
        data, device = self.data(method, task), method.backbone.device

        def features(split: str, count: int, kind: str) -> Tensor:
            return data.view_features(split, count, kind)[:, readable(split)].to(device)

        def labels(split: str) -> Tensor:
            all_labels = torch.tensor([sample.label for sample in getattr(task, split)], dtype=torch.int64)
            return all_labels[readable(split)].to(device)

        def readable(split: str) -> list[int]:
            skipped = set(data.unreadable(split))
            return [row for row in range(len(getattr(task, split))) if row not in skipped]

        needs = method.needs
        where: Literal["train", "test"] | None = None
        if needs.unlabelled != "none":
            where = "test" if needs.unlabelled == "test" else "train"
        no_features = torch.empty(0, method.backbone.embed_dim, device=device)
        no_labels = torch.empty(0, dtype=torch.int64, device=device)
        split = self._selection_split()
        views = needs.unlabelled_views
        return FewShotFeatures(
            train=features("train", needs.fit_views, needs.fit_view) if needs.fit_labelled else no_features[None],
            labels=labels("train") if needs.fit_labelled else no_labels,
            val=no_features if split is None else features(split, 0, "center")[0],
            val_labels=no_labels if split is None else labels(split),
            unlabelled=no_features if where is None else features(where, 0, "center")[0],
            unlabelled_views=features(where, views, "random") if where and views else no_features[None][:0],
            seed=self.config.seed,
        )

    def task_feature(self) -> Tensor:
        """Return the mean unit image feature ``[D]`` of the training images with the test transform."""
        data = self.data(self.zero_shot, self.task)
        unit = F.normalize(
            data.features("train").float(), dim=-1
        )  # features of skipped images are zeros and stay zeros
        return unit.sum(dim=0) / (len(unit) - len(data.unreadable("train")))

    def check_order(self) -> None:
        """Raise ConfigError if several processes would share a stream, or an order is given without a stream."""
        config, name = self.config, self.method.name
        if self.method.needs.online and config.trainer.devices > 1:
            raise ConfigError(
                f"trainer.devices is {config.trainer.devices}, but {name} sees its test images one after the other; "
                "accepted: 1"
            )
        if not self.method.needs.online and config.data.order != DataConfig().order:
            raise ConfigError(
                f"data.order is {config.data.order!r}, but the scores of {name} do not depend on the order of the test "
                "images; omit data.order"
            )

    def order_record(self) -> dict[str, Any]:
        """Return the order of the test images for the data record, ``{"order": {...}}``; empty without a stream."""
        if not self.method.needs.online:
            return {}
        order = self.config.data.order
        return {"order": {"kind": order, **({"seed": self.config.seed} if order == "shuffled" else {})}}

    def check_selection(self) -> None:
        """Raise ConfigError if the recipe needs validation images, apart from the test images, and lacks them.

        A method that takes no gradient steps has no epochs to select from or to score.
        """
        recipe = self.config.recipe
        key, accepted = ("select", "last") if recipe.select != "last" else ("validate_every", "null")
        if (value := getattr(recipe, key)) is None:
            return
        task, why = self.drawn, ""
        if not self.trains:
            why = f"{self.method.name} takes no gradient steps over images, so there are no epochs to choose from"
        elif not task.val:
            why = f"{task.name} has no validation images"
        elif common := len({sample.id for sample in task.val} & {sample.id for sample in task.test}):
            why = f"{common} of {task.name}'s {len(task.val)} validation images are test images, too"
        if why:
            raise ConfigError(f"recipe.{key} is {value!r}, but {why}; accepted: {accepted}")

    def _encode(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images.to(self.backbone.device))  # the Trainer moves the backbone

    def _selection_split(self) -> str | None:
        """Return the split for the selection of hyperparameters; None if it has no images."""
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

    def _generates(self) -> bool:
        """Return whether the method looks at generated images."""
        views = self.method.needs.test_views
        return views is not None and bool(views.generated)

    def _bank(self, method: PromptMethod) -> Any:
        if self.config.data.bank is None:
            views = method.needs.test_views
            raise ConfigError(
                f"{method.name} looks at {views.generated if views else 0} generated pictures of "
                "each test image, and data.bank does not say where they are. Make them with `vlprompt bank` "
                "and give --data.bank FOLDER, or do without: --settings.generated 0"
            )
        return open_bank(home_path(self.config.data.bank))

    def _cached_views(self, method: PromptMethod, task: FewShotTask) -> int:
        """Return the number of random transforms per training image with cached features, by default one per epoch.

        The default is used if it changes only rounding (one process, full precision) and takes at most 1 GiB, else 0.
        """
        config, views = self.config, self.config.data.cached_views
        if views and method.needs.images:
            raise ConfigError(
                f"data.cached_views is {views}, but {method.name} with these settings learns on the image side, so "
                "that features cannot be kept; accepted: 0 or null"
            )
        if views is not None or method.needs.images or config.data.transform in FIXED_KINDS:
            return views or 0
        epochs, _ = config.recipe.length(len(task.train), config.trainer.accumulate)
        size = len(task.train) * epochs * method.backbone.embed_dim * 4
        exact = config.trainer.devices == 1 and config.trainer.precision == "32-true"
        return epochs if exact and size <= 2**30 else 0

    def _take_over(self, other: Session, config: RunConfig) -> None:
        """Reuse the objects of ``other`` that ``config`` would load identically."""
        known, theirs, device = vars(other), other.config, device_of(config.trainer)
        modes = [WHOLE_KINDS.get(data.transform) for data in (theirs.data, config.data)]
        if "backbone" in known and (theirs.backbone, other.device, modes[0]) == (config.backbone, device, modes[1]):
            self.backbone = other.backbone.to(device)
        if "drawn" in known and _request(theirs.data, theirs.seed) == _request(config.data, config.seed):
            self.drawn = other.drawn
            if "contents" in known:
                self.contents = other.contents


# -- loading functions ------------------------------------------------------------------------------------------------
def load_parts(session: object, *names: str) -> None:
    """Load the attributes ``names`` of ``session``; one error reports all that cannot be loaded.

    Raises:
        VlpromptError: An attribute cannot be loaded.
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
    """Return ``data`` as arguments of :func:`~vlprompt.load_dataset`."""
    names = (
        *("name", "root", "shots", "classes", "template", "source", "target", "split", "sampler", "shots_file"),
        *("orientation", "background"),
    )
    return {**{name: getattr(data, name) for name in names}, "seed": seed}


def _data_section(task: FewShotTask) -> dict[str, Any]:
    """Return the data section of a loaded task: the inverse of :func:`load_task`."""
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
        "orientation": task.request.get("orientation"),
        "background": task.request.get("background"),
    }


def configured_backbone(config: BackboneConfig, trainer: TrainerConfig) -> Backbone:
    """Return the frozen CLIP that ``config`` names, on the device of this process.

    Raises:
        BackboneError: It cannot be loaded.
    """
    return load_backbone(
        config.name,
        config.pretrained,
        precision=config.precision,
        device=device_of(trainer),
        image_size=config.image_size,
    )


def _report_unknown_classes(method: PromptMethod, task: FewShotTask) -> None:
    """Warn of sentences for classes that the data set does not have."""
    settings = [method.settings, *(objective.settings for objective in method.active)]
    lists = [entries for section in settings for _, entries in text_lists("", section)]
    bodies = [body for entries in lists for body, _ in map(weighted, entries) if not isinstance(body, str)]
    for lines in dict.fromkeys(tuple(unknown_classes(body, task.all_class_names)) for body in bodies):
        if lines:
            warnings.warn(
                f"sentences of {len(lines)} classes are not used, because {task.name} has no such class:\n"
                f"{bulleted(lines, limit=5)}",
                stacklevel=2,
            )


def device_of(config: TrainerConfig) -> str:
    """Return the device of this process: its GPU if GPUs are used, else the CPU."""
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return "cpu"


def complete(config: RunConfig) -> RunConfig:
    """Return ``config`` with defaults for the settings that it omits, also those of objectives and decompositions.

    Settings of objectives and decompositions that the method declares move to its settings, so that equal runs have
    equal folders.
    Templates that the data set fills stay empty, and values without effect are the defaults.

    Raises:
        ConfigError: Settings are not accepted.
    """
    return without_idle(completed(config))[0]


def completed(config: RunConfig) -> RunConfig:
    """Return :func:`complete` of ``config`` with its values without effect."""
    kind = get_method_class(config.method)
    settings, objectives, decomposition = merge_parts(kind, config.settings, config.objectives, config.decomposition)
    return dataclasses.replace(
        config,
        settings=as_plain(make(kind.Settings, settings)),
        objectives={
            name: as_plain(make(get_objective_class(name).Settings, values, f"objectives.{name}"))
            for name, values in objectives.items()
        },
        decomposition={
            name: as_plain(make(get_decomposition_class(name).Settings, values, f"decomposition.{name}"))
            for name, values in decomposition.items()
        },
    )


def use_of_test_images(method: PromptMethod) -> str | None:
    """Return how a method uses test images beyond scoring them, for results and tables; None if it does not."""
    needs = method.needs
    if needs.transductive:
        return "transductive"
    if needs.online:
        return "online"
    return "test-tuned" if needs.test_views is not None and needs.gradient else None
