"""Base class of all methods: trainable prompts around a frozen CLIP, from class names to logits."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._random import restored_random
from vlprompt._shapes import Shape, check_shape
from vlprompt.backbone import Backbone, TokenLayout
from vlprompt.config.run import WHOLE_TRANSFORMS, RecipeConfig, RunConfig
from vlprompt.config.texts import TEMPLATE, DataTexts, as_data_texts, depends_on_data
from vlprompt.config.types import field_hints, fill_templates
from vlprompt.errors import ClassNameError, ConfigError, HeadError, bulleted
from vlprompt.needs import Needs
from vlprompt.objectives.base import Objective, Step, create_objective, objective_settings, objectives_in
from vlprompt.prompts.decomposed import Decomposition, check_decomposition, create_decomposition, decompositions_in
from vlprompt.prompts.words import check_class_names, check_distinct, words_of


class PromptMethod(nn.Module):
    """Base class: a frozen backbone, the trainable parameters of a method, and the classes that it scores.

    A subclass sets :attr:`Settings`, creates its trainable parameters in :meth:`build`, and defines how it scores
    (:meth:`text_features` or :meth:`logits`) and how it is trained (:meth:`losses`). Training, saving and evaluation
    use only the methods of this class.

    Args:
        backbone: The frozen CLIP.
        class_names: Names of the C classes, in label order; underscores become spaces in prompts.
        settings: An instance of :attr:`Settings`.
        objectives: Names of further objectives with their settings, in the form of the configuration; see
            :mod:`vlprompt.objectives`.
        all_class_names: Every class of the data set, those of ``class_names`` first; methods with virtual classes
            (MoCoOp's text loss) use the rest during training. Default: ``class_names``.
        decomposition: The name of a low-rank update of the class tokens, with its settings, in the form of the
            configuration; see :mod:`vlprompt.prompts.decomposed`. Default: that of the method's settings, if any.
        data_template: The template of the data set, with ``{}`` for the class name, or all its templates
            (``task.texts``). They are used for templates that the settings do not define, and for references such as
            ``ensemble:clip`` (:mod:`vlprompt.config.texts`).
        moved: Whether trained tensors of other classes follow, for evaluation (:meth:`with_classes`). Objectives may
            then lack sentences of the classes.

    Raises:
        ClassNameError: No classes, or names that are empty or exceed the text tower's 77 tokens.
        ConfigError: Settings that contradict each other or the backbone; an objective or a decomposition that does not
            support the method.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    recipe: ClassVar[RecipeConfig] = RecipeConfig()
    """Defaults of gradient training, from the paper or the official code."""
    checked: ClassVar[Literal["official code", "equations", "reconstruction"]] = "official code"
    """Reference of the tests: tensors made by the official code; the paper's equations, implemented separately in the
    tests; or the equations of a reconstruction, if the paper uses other models or gives no equations."""
    text_features_per: ClassVar[Literal["class", "expert", "image"]] = "class"
    """Form of :meth:`training_text_features`: ``[C, D]``, ``[G, C, D]`` or ``[B, C, D]``."""
    no_objectives: ClassVar[str | None] = None
    """Reason why no further objective is supported; None if objectives are supported."""
    starts_from: ClassVar[str | None] = None
    """Method whose trained head has to initialise this one; None if there are other initial values."""
    per_target: ClassVar[bool] = False
    """Whether nothing is learned from labelled images, so that there is no source to transfer from: protocols with
    several data sets run the method on each of them, with the values for that data set."""
    by_recipe: ClassVar[bool] = True
    """Whether gradient steps over the training images, by the recipe, train the method itself."""
    fitted: tuple[str, ...] = ()
    """Buffers (dotted names) that belong to the head like trainable parameters; shapes may depend on the shots."""
    own_draws: tuple[str, ...] = ()
    """What fitting or initial values that are not trained draw from the seed, in words (:mod:`vlprompt.runs.seeds`)."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        settings: Any,
        all_class_names: Sequence[str] | None = None,
        objectives: Mapping[str, Mapping[str, Any]] | None = None,
        decomposition: Mapping[str, Mapping[str, Any]] | None = None,
        data_template: str | DataTexts = TEMPLATE,
        moved: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.moved = backbone, moved
        self.class_names = check_class_names(class_names)
        self.all_class_names = check_class_names(all_class_names) if all_class_names else self.class_names
        if self.all_class_names[: len(self.class_names)] != self.class_names:
            raise ClassNameError(
                "all_class_names must begin with class_names in the same order, because labels count from there; "
                f"got {self.all_class_names[:3]}... against {self.class_names[:3]}..."
            )
        texts = as_data_texts(data_template)
        self.settings = fill_templates(settings, texts, self.class_names)
        self.initialised = False  # whether trained tensors were loaded
        self._remembered: dict[str, tuple[tuple[object, ...], Tensor]] = {}
        self._warn_of_untrained_words()
        check_distinct(self.class_names, backbone.text.tokens)
        self.objective_settings = objective_settings(self, objectives or {}, texts)
        self.decomposition_settings = check_decomposition(decomposition or {})
        self.objectives = nn.ModuleList()
        self.decomposition: Decomposition | None = None
        self.build()
        declared = {name: getattr(self.settings, name) for name in objectives_in(type(self.settings))}
        chosen = {name: values for name, values in declared.items() if values is not None} | self.objective_settings
        self.objectives.extend(create_objective(name, self, values) for name, values in chosen.items())
        # Created last: other random draws do not depend on it.
        declared = {name: getattr(self.settings, name) for name in decompositions_in(type(self.settings))}
        self.decomposition = create_decomposition(self, self.decomposition_settings or declared)
        for objective in self.active:
            objective.prepare()

    @property
    def needs(self) -> Needs:
        """What the method needs from a run; by default, features of its training images."""
        return Needs()

    @property
    def active(self) -> list[Objective]:
        """The objectives: those of the method's settings, then those of the configuration."""
        return [objective for objective in self.objectives if isinstance(objective, Objective)]

    @classmethod
    def trained_by_recipe(cls, config: RunConfig) -> bool:
        """Return whether a run of ``config`` takes gradient steps over the training images."""
        return cls.by_recipe or bool(config.objectives and cls.no_objectives is None)

    @classmethod
    def idle(cls, config: RunConfig) -> dict[str, str]:
        """Return keys of the sections ``recipe``, ``trainer`` and ``data`` without effect on the method, with reasons.

        Args:
            config: The configuration of a run of the method, with all settings.
        """
        off: dict[str, str] = {}
        if not cls.trained_by_recipe(config):
            reason = f"{cls.name} takes no gradient steps over the training images"
            kept = ("test_batch_size", "select", "validate_every")  # the last two are refused
            off |= {f"recipe.{name}": reason for name in field_hints(RecipeConfig) if name not in kept}
            off |= dict.fromkeys(("trainer.accumulate", "data.cached_views"), reason)
            if config.data.transform not in WHOLE_TRANSFORMS:
                off["data.transform"] = reason
        if not config.settings.get("generated"):
            off["data.bank"] = f"{cls.name} with these settings uses no generated images"
        return off

    @classmethod
    def texts_setting(cls, settings: Any) -> str | None:
        """Return the setting with the texts of :meth:`zero_shot_settings`; None if they are those of the data set.

        Args:
            settings: An instance of :attr:`Settings`, before templates are filled in.
        """
        if cls.zero_shot_settings is PromptMethod.zero_shot_settings:
            return None
        name = "templates" if "templates" in field_hints(cls.Settings) else "template"
        texts = getattr(settings, name)
        return name if isinstance(texts, str) or not depends_on_data(texts) else None

    def build(self) -> None:
        """Create the trainable parameters (float32 ``nn.Parameter``) and the token layouts of the classes."""
        raise NotImplementedError

    def _warn_of_untrained_words(self) -> None:
        words = {name: self.backbone.untrained_tokens(words_of(name)) for name in self.class_names}
        lines = [f"{name!r}: {', '.join(unknown)}" for name, unknown in words.items() if unknown]
        if lines:
            warnings.warn(
                f"the backbone {self.backbone.name!r} never saw words of {len(lines)} of {len(words)} class names; "
                "expect little of these classes:\n" + bulleted(lines, limit=5),
                stacklevel=3,
            )

    # -- scoring ------------------------------------------------------------------------------------------------
    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` of normalised ``images`` ``[B, 3, H, W]``."""
        return self.backbone.encode_image(images)

    def image_overrides(self) -> dict[str, Tensor]:
        """Return trained values of parameters of the image tower, by their open_clip names; usually none."""
        return {}

    def text_overrides(self) -> dict[str, Tensor]:
        """Return trained values of parameters of the text tower, by their names in it; usually none."""
        return {}

    @property
    def in_towers(self) -> bool:
        """Whether all that the method learned is weights of the towers, so that a CLIP model can hold it."""
        return False

    def encode_text(self, layout: TokenLayout, context: Tensor, deep: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return raw text features ``[G, C, D]`` of learned prompts, with the decomposition applied, if any.

        Methods encode learned prompts with this function and frozen prompts with
        :meth:`vlprompt.backbone.TextTower.encode`, which takes the same arguments.
        """
        decomposition, text = self.decomposition, self.backbone.text
        if decomposition is None:
            return text.encode(layout, context, deep)
        return decomposition.encode(text, layout, context, deep, self.once("word update", decomposition.update))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier: unit rows ``[C, D]``, the transpose of ``open_clip``'s zero-shot classifier."""
        raise NotImplementedError

    def class_weights(self, features: Tensor | None = None) -> Tensor:
        """Return :meth:`text_features`; deprecated former name."""
        warnings.warn("class_weights() is called text_features() now", DeprecationWarning, stacklevel=2)
        return self.text_features(features)

    def zero_shot_classifier(self) -> Tensor:
        """Return the classifier ``[D, C]`` in the orientation of ``open_clip``: unit columns."""
        return self.text_features().t()

    def zero_shot_settings(self) -> dict[str, Any]:
        """Return the settings of ``zeroshot`` for the classifier that the method starts from.

        The zero-shot row of the method's results uses it. Empty: the template of the data set.
        """
        return {}

    @property
    def cosine_scale(self) -> float | None:
        """The factor of the cosines of image and class in the logits; None if logits are more than scaled cosines."""
        return float(self.backbone.logit_scale)

    def unit_image(self, features: Tensor) -> Tensor:
        """Return unit image features ``[B, D]`` of raw ``features`` ``[B, D]``, adapted by the objectives."""
        for objective in self.active:
            features = objective.adapt_image(features)
        return F.normalize(features, dim=-1)

    def unit_text(self, features: Tensor) -> Tensor:
        """Return unit text features ``[..., D]`` of raw ``features`` ``[..., D]``, adapted by the objectives."""
        for objective in self.active:
            features = objective.adapt_text(features)
        return F.normalize(features, dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return ``[B, C]``: exp(logit scale) times the cosine of raw image ``features`` ``[B, D]`` and each class."""
        return self.score(self.unit_image(features), self.text_features())

    def score(self, unit_image: Tensor, text_features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of unit features ``[B, D]`` and a classifier ``[C, D]``."""
        return self.backbone.logit_scale * unit_image @ text_features.t()

    def input_shapes(self) -> list[Shape]:
        """Return the shapes of accepted inputs: images, and raw image features."""
        size = self.backbone.preprocess.size
        return [("B", 3, size, size), ("B", self.backbone.embed_dim)]

    def check_inputs(self, inputs: Tensor) -> None:
        """Raise DataError unless ``inputs`` have one of :meth:`input_shapes`."""
        one = "One image is a batch of one: image[None]" if getattr(inputs, "ndim", 0) == 3 else ""
        check_shape(inputs, f"the inputs of {self.name}", *self.input_shapes(), hint=one)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]`` or of raw image features ``[B, D]``.

        Raises:
            DataError: Inputs of another shape, or that are no floats.
        """
        self.check_inputs(inputs)
        return self.logits(self.image_features(inputs) if inputs.ndim == 4 else inputs)

    # -- training -----------------------------------------------------------------------------------------------
    def losses(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted, named loss terms of a batch; the loss is their sum.

        Args:
            inputs: Images ``[B, 3, H, W]``; or raw image features ``[B, D]``, if the image side is not trained or no
                objective compares with the frozen images.
            labels: ``[B]``.
        """
        return self.step_losses(self.step(inputs, labels))

    def step_losses(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted, named loss terms of ``step``: those of the method and of its objectives.

        Raises:
            ConfigError: The method is moved, and an objective lacks sentences of its classes.
        """
        terms = self.terms(step)
        for objective in self.active:
            if objective.lacking is not None:
                raise objective.lacking
            terms = objective.add(step, terms)
        return terms

    def step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return the features and logits of a training step.

        Raises:
            DataError: Inputs of another shape, or that are no floats.
        """
        self.check_inputs(inputs)
        features = self.image_features(inputs) if inputs.ndim == 4 else inputs
        unit_image = self.unit_image(features)
        weights = self.training_text_features(unit_image, features)
        logits = self.training_logits(unit_image, weights)
        return Step(labels, features, unit_image, weights, logits, lambda: self._frozen_features(inputs, features))

    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the unit text features for the objectives: ``[C, D]``, ``[G, C, D]`` or ``[B, C, D]``."""
        return self.text_features()

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of :meth:`training_text_features`."""
        return self.score(unit_image, weights)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms of the method without objectives: cross-entropy."""
        return {"ce": F.cross_entropy(step.logits, step.labels)}

    def _frozen_features(self, inputs: Tensor, features: Tensor) -> Tensor:
        if not self.needs.images:
            return features.detach()
        if inputs.ndim != 4:
            raise ConfigError(
                f"{self.name} compares with frozen image features and needs the images, not their features"
            )
        with torch.no_grad():
            return self.backbone.encode_image(inputs)

    @property
    def class_dim(self) -> int:
        """Width of the space in which images and classes are compared: D, unless features are projected."""
        return self.backbone.embed_dim

    @property
    def adapts_features(self) -> bool:
        """Whether the method or an objective changes image features after the tower."""
        overridden = type(self).unit_image is not PromptMethod.unit_image
        return overridden or any(type(objective).adapt_image is not Objective.adapt_image for objective in self.active)

    @property
    def sees_images(self) -> bool:
        """Whether scores depend on more than an image's frozen feature and a fixed classifier."""
        return self.needs.images or self.adapts_features or self.text_features_per != "class"

    def has_text_prompts(self) -> bool:
        """Whether text features depend on trainable parameters, that is, a training step encodes text."""
        return bool(self.training_layouts())

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the deep prompts ``[M, W]`` of the text and of the image tower, layer by layer; usually none."""
        return [], []

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""
        return 0

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Run the objectives' actions at the end of training epoch ``epoch`` (from 0) of ``epochs``."""
        for objective in self.active:
            objective.epoch_end(epoch, epochs)

    def train_end(self) -> None:
        """Run the objectives' actions at the end of the training; a second call changes nothing."""
        for objective in self.active:
            objective.train_end()

    def rate_factors(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return parameters with a separate learning rate, and its factor on the common rate: the decomposition's."""
        decomposition = self.decomposition
        return [] if decomposition is None else [(list(decomposition.parameters()), decomposition.settings.lr_ratio)]

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layouts that one training step encodes."""
        return []

    def once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``; without gradients, the cached result unless a trainable parameter has changed.

        Evaluation thus encodes its classes once, not once per batch.
        """
        if torch.is_grad_enabled():
            return compute()
        device = self.backbone.device
        autocast = torch.is_autocast_enabled(device.type)
        state = (device, autocast, *((id(p), p._version) for _, p in self.trainable_parameters()))
        if key not in self._remembered or self._remembered[key][0] != state:
            self._remembered[key] = (state, compute())
        return self._remembered[key][1]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the named trainable parameters, without the backbone."""
        return [(name, parameter) for name, parameter in self.named_parameters() if not name.startswith("backbone.")]

    def prompt_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters that are prompts: vectors ``[..., M, W]``.

        Weights of networks and parameters of objectives and of a decomposition are excluded.
        Meta-training (:mod:`vlprompt.meta`) acts on the gradients of the prompts.
        """
        prompts = []
        for name, parameter in self.trainable_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            layer = type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, nn.ParameterList)
            layer = layer or name.startswith(("objectives.", "decomposition."))
            if parameter.ndim > 1 and parameter.numel() and not layer:
                prompts.append((name, parameter))
        return prompts

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups; the list is empty if there is nothing to train."""
        separate = [(parameters, factor) for parameters, factor in self.rate_factors() if parameters]
        separate_ids = {id(parameter) for parameters, _ in separate for parameter in parameters}
        others = [parameter for _, parameter in self.trainable_parameters() if id(parameter) not in separate_ids]
        groups = [{"params": others, "lr": lr}] if others else []
        return groups + [{"params": parameters, "lr": lr * factor} for parameters, factor in separate]

    # -- keeping ------------------------------------------------------------------------------------------------
    def _kept(self) -> dict[str, Tensor]:
        """Return the tensors for scoring besides the backbone: parameters, fitted buffers, objectives' buffers."""
        kept = dict(self.trainable_parameters()) | {name: self.get_buffer(name) for name in self.fitted}
        for index, objective in enumerate(self.active):
            kept |= {f"objectives.{index}.{name}": getattr(objective, name) for name in objective.kept}
        return kept

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors by name, float32 on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._kept().items()}

    def head_state(self) -> dict[str, Tensor]:
        """Return the tensors of a head file; a method may pack them."""
        return self.trained_state()

    def load_head_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained tensors from :meth:`head_state` of the same method.

        Raises:
            HeadError: As :meth:`load_trained_state`.
        """
        self.load_trained_state(state)

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained tensors from ``state``.

        Raises:
            HeadError: A name is missing or unknown, or a shape differs. No tensor is changed.
        """
        kept = self._kept()
        wrong = [f"{name}: missing" for name in kept if name not in state]
        wrong += [f"{name}: not a learnable of {self.name}" for name in state if name not in kept]
        wrong += [
            f"{name}: shape {list(state[name].shape)}, expected {list(kept[name].shape)}"
            for name in kept
            if name in state and not self._takes(name, kept[name], state[name])
        ]
        if wrong:
            raise HeadError(f"these tensors do not fit the method {self.name!r}:\n  " + "\n  ".join(wrong))
        for name in self.fitted:
            if state[name].shape != kept[name].shape:
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, kept[name].new_zeros(state[name].shape))
        with torch.no_grad():
            for name, parameter in self._kept().items():
                parameter.copy_(state[name])
        self.initialised = True

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Initialise from the trained tensors of another head.

        Raises:
            HeadError: The tensors are not those of this method.
        """
        self.load_head_state(state)

    def _takes(self, name: str, own: Tensor, given: Tensor) -> bool:
        # The number of rows of a fitted buffer depends on the shots.
        return given.ndim == own.ndim if name in self.fitted else given.shape == own.shape

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the method with the same trained tensors for other classes (evaluation of new classes).

        Raises:
            ClassNameError: The trained tensors belong to the old classes (class-specific context).
        """
        with restored_random():  # the initial parameters are replaced below
            other = type(self)(
                self.backbone,
                class_names,
                self.settings,
                objectives=self.objective_settings,
                decomposition=self.decomposition_settings,
                moved=True,
            )
        other.load_trained_state(self.trained_state())
        return other.to(self.backbone.device).train(self.training)

    def settings_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for configuration and head files."""
        return dataclasses.asdict(self.settings)
