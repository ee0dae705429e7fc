"""What every method is: learnable prompts around a frozen CLIP, class names in, logits out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbone import Backbone, TokenLayout
from vlprompt.errors import ClassNameError, HeadError, bulleted
from vlprompt.prompts.words import check_class_names


class PromptMethod(nn.Module):
    """A frozen backbone, the learnables of one method, and the classes they are applied to.

    A subclass names its :attr:`Settings`, creates its learnables in :meth:`build`, and says how it scores
    (:meth:`class_weights` or :meth:`logits`) and how it is trained (:meth:`losses`). Everything that trains, saves or
    evaluates talks to the methods of this class only.

    Args:
        backbone: The frozen CLIP.
        class_names: The C classes to tell apart, in label order; underscores become spaces in prompts.
        settings: An instance of :attr:`Settings`.
        all_class_names: Every class of the data set, those of ``class_names`` first; methods with virtual classes
            (MoCoOp's text loss) use the rest during training. Default: ``class_names``.

    Raises:
        ClassNameError: No classes, names that are empty or do not fit the text tower's 77 tokens.
        ConfigError: Settings that contradict each other or the backbone.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    template_setting: ClassVar[str | None] = None
    """Name of the setting that the data set's own template fills when it is left open; None: the method takes none."""
    learns_image_side: bool = False
    """True when image features depend on learnables, so that features cannot be computed once and kept."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        settings: Any,
        all_class_names: Sequence[str] | None = None,
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
        self.settings = settings
        self._remembered: dict[str, tuple[tuple[object, ...], Tensor]] = {}
        self._warn_of_untrained_words()
        self.build()

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

    def class_weights(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier: unit rows ``[C, D]``, the ``open_clip`` zero-shot weights (transposed)."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Return ``[B, C]``: exp(logit scale) times the cosine of raw image ``features`` ``[B, D]`` and each class."""
        return self.backbone.logit_scale * F.normalize(features, dim=-1) @ self.class_weights().t()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]`` or of raw image features ``[B, D]``."""
        return self.logits(self.image_features(inputs) if inputs.ndim == 4 else inputs)

    # -- training -----------------------------------------------------------------------------------------------
    def losses(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted, named loss terms of raw ``features`` ``[B, D]`` and ``labels`` ``[B]``; they add up."""
        return {"ce": F.cross_entropy(self.logits(features), labels)}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups; an empty list says that there is nothing to train."""
        learnables = [parameter for _, parameter in self.learnables()]
        return [{"params": learnables, "lr": lr}] if learnables else []

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layouts that one training step encodes: what its text costs."""
        return []

    def learnables(self) -> list[tuple[str, nn.Parameter]]:
        """Return the named learnable parameters; the backbone's are never among them."""
        return [(name, parameter) for name, parameter in self.named_parameters() if not name.startswith("backbone.")]

    def once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``; without gradients, what it gave last time if no learnable has changed since.

        Evaluation so encodes its classes once, not once per batch.
        """
        if torch.is_grad_enabled():
            return compute()
        device = self.backbone.device
        autocast = torch.is_autocast_enabled(device.type)
        state = (device, autocast, *((id(p), p._version) for _, p in self.learnables()))
        if key not in self._remembered or self._remembered[key][0] != state:
            self._remembered[key] = (state, compute())
        return self._remembered[key][1]

    # -- keeping ------------------------------------------------------------------------------------------------
    def learnable_state(self) -> dict[str, Tensor]:
        """Return copies of the learnables by name, float32 on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.learnables()}

    def load_learnable_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the learnables from ``state``.

        Raises:
            HeadError: A name is missing or unknown, or a shape differs; nothing has been changed then.
        """
        own = dict(self.learnables())
        wrong = [f"{name}: missing" for name in own if name not in state]
        wrong += [f"{name}: not a learnable of {self.name}" for name in state if name not in own]
        wrong += [
            f"{name}: shape {list(state[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ]
        if wrong:
            raise HeadError(f"these tensors do not fit the method {self.name!r}:\n  " + "\n  ".join(wrong))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def with_classes(self, class_names: Sequence[str]) -> PromptMethod:
        """Return the same method with the same learnables for other classes (evaluation of new classes).

        Raises:
            ClassNameError: The learnables belong to the old classes (class-specific context).
        """
        with torch.random.fork_rng(devices=[]):  # its fresh learnables are replaced at once
            other = type(self)(self.backbone, class_names, self.settings)
        other.load_learnable_state(self.learnable_state())
        return other.to(self.backbone.device).train(self.training)

    def settings_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for configuration and head files."""
        return dataclasses.asdict(self.settings)
