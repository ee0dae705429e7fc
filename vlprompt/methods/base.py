"""What every method is: learnable prompts around a frozen CLIP, class names in, logits out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt._random import restored_random
from vlprompt.backbone import Backbone, TokenLayout
from vlprompt.config.run import RecipeConfig
from vlprompt.config.types import fill_templates
from vlprompt.errors import ClassNameError, ConfigError, bulleted
from vlprompt.methods.fitting import FewShotFeatures
from vlprompt.methods.learned import Learned
from vlprompt.objectives.base import Objective, Step, create_objective, objective_settings
from vlprompt.prompts.decomposed import Decomposition, check_decomposition, create_decomposition
from vlprompt.prompts.words import check_class_names
from vlprompt.views import TestViews

TEMPLATE = "a photo of a {}."
"""CLIP's own prompt: what templates become that neither the settings nor a data set names."""


class PromptMethod(Learned):
    """A frozen backbone, the learnables of one method, and the classes they are applied to.

    A subclass names its :attr:`Settings`, creates its learnables in :meth:`build`, and says how it scores
    (:meth:`text_features` or :meth:`logits`) and how it is trained (:meth:`losses`). Everything that trains, saves or
    evaluates talks to the methods of this class only.

    Args:
        backbone: The frozen CLIP.
        class_names: The C classes to tell apart, in label order; underscores become spaces in prompts.
        settings: An instance of :attr:`Settings`.
        objectives: Names of further objectives with their settings, as the configuration has them; see
            :mod:`vlprompt.objectives`.
        all_class_names: Every class of the data set, those of ``class_names`` first; methods with virtual classes
            (MoCoOp's text loss) use the rest during training. Default: ``class_names``.
        decomposition: The name of a low-rank update of the class tokens, with its settings, as the configuration has
            it; see :mod:`vlprompt.prompts.decomposed`. Default: the method's own, if any.
        data_template: The data set's own prompt, with ``{}`` for the class name. Templates that the settings leave
            open become it.

    Raises:
        ClassNameError: No classes, names that are empty or do not fit the text tower's 77 tokens.
        ConfigError: Settings that contradict each other or the backbone; an objective or a decomposition that cannot
            go with the method.
    """

    Settings: ClassVar[type]
    recipe: ClassVar[RecipeConfig] = RecipeConfig()
    """How the method is trained by gradient steps over images, as its paper or official code has it."""
    checked: ClassVar[Literal["official code", "equations", "reconstruction"]] = "official code"
    """What the numbers are held to: tensors that the official code made; the equations, written out once more in the
    tests; or those of a reconstruction, where the paper has other models or no equations."""
    template_setting: ClassVar[str | None] = None
    """Name of the setting that the data set's own template fills when it is left open; None: the method takes none."""
    text_features_per: ClassVar[Literal["class", "expert", "image"]] = "class"
    """What :meth:`training_text_features` has text features for: ``[C, D]``, ``[G, C, D]`` or ``[B, C, D]``."""
    learns_image_side: bool = False
    """True when image features depend on learnables, so that features cannot be computed once and kept."""
    any_tower: ClassVar[bool] = False
    """True when the image side is learned in whatever tower there is, not in vision transformers alone."""
    fits: ClassVar[bool] = False
    """True when :meth:`fit` does the learning, on frozen features, instead of gradient steps over images."""
    fit_view: ClassVar[Literal["random", "random-half"]] = "random"
    """Kind of the random views of training images that :meth:`fit` gets (:mod:`vlprompt.data.transforms`)."""
    test_views: TestViews | None = None
    """Views of every evaluated image that :meth:`forward` gets, ``[B, V, D]`` or ``[B, V, 3, H, W]``; None: one."""
    needs_gradient: bool = False
    """True when scoring differentiates, as test-time tuning does."""
    no_objectives: ClassVar[str | None] = None
    """Why no further objective can take part; None: objectives say themselves what they need."""
    own_decomposition: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The decomposition that belongs to the method, with its settings; one of the configuration takes its place."""
    transductive: bool = False
    """True when what a run is tested on, new classes or test images, is learned from without labels; results say so."""
    online: ClassVar[bool] = False
    """True when scores depend on the images seen before; :meth:`reset` forgets them."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        settings: Any,
        all_class_names: Sequence[str] | None = None,
        objectives: Mapping[str, Mapping[str, Any]] | None = None,
        decomposition: Mapping[str, Mapping[str, Any]] | None = None,
        data_template: str = TEMPLATE,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_names = check_class_names(class_names)
        self.all_class_names = check_class_names(all_class_names) if all_class_names else self.class_names
        if self.all_class_names[: len(self.class_names)] != self.class_names:
            raise ClassNameError(
                "all_class_names must begin with class_names in the same order, because labels count from there; "
                f"got {self.all_class_names[:3]}... against {self.class_names[:3]}..."
            )
        self.settings = fill_templates(settings, [data_template])
        self._remembered: dict[str, tuple[tuple[object, ...], Tensor]] = {}
        self._warn_of_untrained_words()
        self.objective_settings = objective_settings(self, objectives or {}, [data_template])
        self.decomposition_settings = check_decomposition(decomposition or {})
        self.objectives = nn.ModuleList()
        self.decomposition: Decomposition | None = None
        self.build()
        wanted = {**objective_settings(self, self.own_objectives(), [data_template]), **self.objective_settings}
        self.objectives.extend(create_objective(name, self, own) for name, own in wanted.items())
        # After all else, so that what others draw at random stays the same.
        self.decomposition = create_decomposition(self, self.decomposition_settings or self.own_decomposition)
        for objective in self.active:
            objective.prepare()

    @property
    def active(self) -> list[Objective]:
        """The objectives: the method's own, then the configuration's."""
        return [objective for objective in self.objectives if isinstance(objective, Objective)]

    def own_objectives(self) -> dict[str, dict[str, Any]]:
        """Return the objectives that belong to the method, with their settings; the configuration may change them."""
        return {}

    def build(self) -> None:
        """Create learnables (float32 ``nn.Parameter``) and the token layouts of the classes."""
        raise NotImplementedError

    def _warn_of_untrained_words(self) -> None:
        words = {name: self.backbone.untrained_tokens(name) for name in self.class_names}
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
        """Return learned values of the image tower's own parameters, by their open_clip names; usually none."""
        return {}

    def encode_text(self, layout: TokenLayout, context: Tensor, deep: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return raw text features ``[G, C, D]`` of learned prompts: the tower's, and the decomposition's part in them.

        Methods encode what they learn by this, and what is frozen by :meth:`vlprompt.backbone.TextTower.encode`, which
        takes the same arguments.
        """
        own, text = self.decomposition, self.backbone.text
        if own is None:
            return text.encode(layout, context, deep)
        return own.encode(text, layout, context, deep, self.once("word update", own.update))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier: unit rows ``[C, D]``, the ``open_clip`` zero-shot weights (transposed)."""
        raise NotImplementedError

    def zero_shot_classifier(self) -> Tensor:
        """Return the classifier ``[D, C]`` in the orientation of ``open_clip``: unit columns."""
        return self.text_features().t()

    def unit_image(self, features: Tensor) -> Tensor:
        """Return raw image ``features`` ``[B, D]`` as they are scored: adapted by objectives, of length 1."""
        for objective in self.active:
            features = objective.adapt_image(features)
        return F.normalize(features, dim=-1)

    def unit_text(self, features: Tensor) -> Tensor:
        """Return raw text ``features`` ``[..., D]`` adapted by objectives that do so, of length 1."""
        for objective in self.active:
            features = objective.adapt_text(features)
        return F.normalize(features, dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return ``[B, C]``: exp(logit scale) times the cosine of raw image ``features`` ``[B, D]`` and each class."""
        return self.score(self.unit_image(features), self.text_features())

    def score(self, unit_image: Tensor, text_features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of unit features ``[B, D]`` and class weights ``[C, D]``."""
        return self.backbone.logit_scale * unit_image @ text_features.t()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]`` or of raw image features ``[B, D]``."""
        return self.logits(self.image_features(inputs) if inputs.ndim == 4 else inputs)

    # -- training -----------------------------------------------------------------------------------------------
    def losses(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted, named loss terms of a batch; they add up.

        Args:
            inputs: Images ``[B, 3, H, W]``, or raw image features ``[B, D]`` where the image side learns nothing or no
                objective compares with the frozen images.
            labels: ``[B]``.
        """
        return self.step_losses(self.step(inputs, labels))

    def step_losses(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted, named loss terms of ``step``: the method's own and its objectives'."""
        terms = self.terms(step)
        for objective in self.active:
            terms = objective.add(step, terms)
        return terms

    def step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return what a training step computes before any loss."""
        features = self.image_features(inputs) if inputs.ndim == 4 else inputs
        unit_image = self.unit_image(features)
        weights = self.training_text_features(unit_image, features)
        logits = self.training_logits(unit_image, weights)
        return Step(labels, features, unit_image, weights, logits, lambda: self._frozen_features(inputs, features))

    def training_text_features(self, unit_image: Tensor, features: Tensor) -> Tensor:
        """Return the unit text features that objectives see: ``[C, D]``, ``[G, C, D]`` or ``[B, C, D]``."""
        return self.text_features()

    def training_logits(self, unit_image: Tensor, weights: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of :meth:`training_text_features`."""
        return self.score(unit_image, weights)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the method's own terms: cross-entropy."""
        return {"ce": F.cross_entropy(step.logits, step.labels)}

    def _frozen_features(self, inputs: Tensor, features: Tensor) -> Tensor:
        if not self.learns_image_side:
            return features.detach()
        if inputs.ndim != 4:
            raise ConfigError(
                f"{self.name} compares with frozen image features and needs the images, not their features"
            )
        with torch.no_grad():
            return self.backbone.encode_image(inputs)

    @property
    def class_dim(self) -> int:
        """The width of the space in which images and classes are compared: D, unless features are projected."""
        return self.backbone.embed_dim

    @property
    def adapts_features(self) -> bool:
        """Whether image features are changed after the tower, by the method itself or by an objective."""
        own = type(self).unit_image is not PromptMethod.unit_image
        return own or any(type(objective).adapt_image is not Objective.adapt_image for objective in self.active)

    @property
    def sees_images(self) -> bool:
        """Whether scores depend on more of an image than its frozen feature and fixed class weights."""
        return self.learns_image_side or self.adapts_features or self.text_features_per != "class"

    def has_text_prompts(self) -> bool:
        """Whether text features depend on learnables: whether a training step encodes text."""
        return bool(self.training_layouts())

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the deep prompts ``[M, W]`` of the text and of the image tower, layer by layer; usually none."""
        return [], []

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""
        return 0

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Act at the end of training epoch ``epoch`` (from 0) of ``epochs``: objectives do."""
        for objective in self.active:
            objective.epoch_end(epoch, epochs)

    # -- fitting on features ------------------------------------------------------------------------------------
    def fit(self, shots: FewShotFeatures) -> None:
        """Learn from frozen features; methods with :attr:`fits` do."""
        raise NotImplementedError

    def fit_views(self) -> int:
        """Return how many random views of each training image :meth:`fit` wants; 0 for the test view."""
        return 0

    def unlabelled(self) -> Literal["none", "train", "test"]:
        """Return which images are learned from without labels; with "test" a run is transductive and says so.

        Gradient steps over unlabelled training images get those of the other half of the classes as well.
        """
        return "none"

    def unlabelled_view_count(self) -> int:
        """Return how many random views of the unlabelled images :meth:`fit` wants."""
        return 0

    def selects_on(self) -> Literal["val", "test"]:
        """Return where hyperparameters are chosen; "test" is the published leak, and the run is marked as oracle."""
        return "val"

    @property
    def wants_source(self) -> bool:
        """Whether statistics of the training images are missing that :meth:`measure_source` computes."""
        return False

    def measure_source(self, batches: Iterable[Tensor]) -> None:
        """Compute statistics of the training images, batches of normalised images ``[B, 3, H, W]``."""
        raise NotImplementedError

    def reset(self) -> None:  # noqa: B027  # a hook that most methods have no use for
        """Forget the images that were seen at test time; methods with :attr:`online` do."""

    def rate_factors(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return learnables with a rate of their own, and the factor that it is of the others': a decomposition's."""
        own = self.decomposition
        return [] if own is None else [(list(own.parameters()), own.settings.lr_ratio)]

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layouts that one training step encodes: what its text costs."""
        return []

    def once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``; without gradients, what it gave last time if no learnable has changed since.

        Evaluation so encodes its classes once, not once per batch.
        """
        if torch.is_grad_enabled():
            return compute()
        device = self.backbone.device
        autocast = torch.is_autocast_enabled(device.type)
        state = (device, autocast, *((id(p), p._version) for _, p in self.trainable_parameters()))
        if key not in self._remembered or self._remembered[key][0] != state:
            self._remembered[key] = (state, compute())
        return self._remembered[key][1]

    # -- keeping ------------------------------------------------------------------------------------------------
    def _kept(self) -> dict[str, Tensor]:
        """Return what scoring depends on beside the backbone, with the buffers that objectives keep."""
        kept = super()._kept()
        for index, objective in enumerate(self.active):
            kept |= {f"objectives.{index}.{name}": getattr(objective, name) for name in objective.kept}
        return kept

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the same method with the same learnables for other classes (evaluation of new classes).

        Raises:
            ClassNameError: The learnables belong to the old classes (class-specific context).
        """
        with restored_random():  # its fresh learnables are replaced at once
            other = type(self)(
                self.backbone,
                class_names,
                self.settings,
                objectives=self.objective_settings,
                decomposition=self.decomposition_settings,
            )
        other.load_trained_state(self.trained_state())
        return other.to(self.backbone.device).train(self.training)

    def settings_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for configuration and head files."""
        return dataclasses.asdict(self.settings)
