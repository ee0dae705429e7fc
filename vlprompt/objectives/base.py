"""Base class of objectives: loss terms, regularisers and feature adapters that work with several methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.config.hints import bare
from vlprompt.config.texts import DataTexts
from vlprompt.config.types import field_hints, fill_templates
from vlprompt.errors import ConfigError
from vlprompt.needs import Needs
from vlprompt.registry import Registry

Terms = dict[str, Tensor]


@dataclass
class Step:
    """Results of a training step.

    Attributes:
        labels: ``[B]``.
        features: Raw image features ``[B, D]``, before adaptation by objectives.
        unit_image: Unit image features ``[B, D]`` that are scored.
        text_features: Unit text features: ``[C, D]``, ``[G, C, D]`` for G experts, or ``[B, C, D]`` for each image.
        logits: ``[B, C]``.
        frozen_features: Computes raw features ``[B, D]`` of the same images with the frozen model, without gradient.
    """

    labels: Tensor
    features: Tensor
    unit_image: Tensor
    text_features: Tensor
    logits: Tensor
    frozen_features: Callable[[], Tensor]


class Host(Protocol):
    """Interface of the method that an objective is attached to."""

    name: ClassVar[str]
    no_objectives: ClassVar[str | None]
    backbone: Any
    class_names: list[str]
    text_features_per: ClassVar[Literal["class", "expert", "image"]]
    moved: bool
    """Whether the method has trained tensors of other classes, and is for evaluation."""

    @property
    def needs(self) -> Needs:
        """What the method needs from a run; ``needs.images``: image features depend on parameters."""

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the named trainable parameters."""

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the deep prompts ``[M, W]`` of the text and of the image tower, layer by layer."""

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]``."""

    def unit_image(self, features: Tensor) -> Tensor:
        """Return the unit image features that are scored."""

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier."""

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""

    def has_text_prompts(self) -> bool:
        """Whether text features depend on trainable parameters."""


Part = Literal["text", "image", "deep"]
"""Requirements of objectives: text or image features that depend on parameters, or deep prompts in both towers."""
LACKING: Mapping[Part, str] = {
    "text": "it learns nothing on the text side",
    "image": "it learns nothing on the image side",
    "deep": "it has no deep prompts in both towers",
}


class Objective(nn.Module):
    """A loss term, regulariser or adapter that works with every method that meets its requirements.

    A subclass sets :attr:`Settings` and overrides the functions it needs; the defaults do nothing. Tensors that are
    computed once (frozen targets) are buffers that are not saved. Parameters are trained like those of the method.

    Args:
        host: The method that the objective is attached to.
        settings: An instance of :attr:`Settings`.

    Raises:
        ConfigError: The method does not meet the objective's requirements, which the message lists.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    kept: ClassVar[tuple[str, ...]] = ()
    """Buffers that scoring depends on; they are saved with a head, in addition to the parameters."""

    def __init__(self, host: Host, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self._host = [host]  # in a list: the method is not a submodule of its objective
        self.lacking: ConfigError | None = None  # what training needs and a moved method lacks: sentences of classes
        for part, advice in self.needs(settings).items():
            if not _has(host, part):
                self.refuse(f"{LACKING[part]}; {advice}" if advice else LACKING[part])
        try:
            self.build(host)
        except ConfigError as error:
            if not host.moved:
                raise
            self.lacking = ConfigError(str(error))

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Return the requirements with these settings, and the advice for a method that does not meet them."""
        return {}

    @property
    def host(self) -> Host:
        """The method that the objective is attached to."""
        return self._host[0]

    def build(self, host: Host) -> None:
        """Create trainable parameters and buffers."""

    def prepare(self) -> None:
        """Hook that is called after the method and all its objectives are created."""

    def adapt_image(self, features: Tensor) -> Tensor:
        """Return adapted raw image features ``[B, D]``."""
        return features

    def adapt_text(self, features: Tensor) -> Tensor:
        """Return adapted raw text features ``[..., D]``."""
        return features

    def add(self, step: Step, terms: Terms) -> Terms:
        """Return ``terms`` with the weighted loss terms of this objective."""
        return terms

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Hook for the end of training epoch ``epoch`` (from 0) of ``epochs``, after its last step."""

    def train_end(self) -> None:
        """Hook for the end of the training, after the last :meth:`epoch_end`; a second call changes nothing."""

    def refuse(self, why: str) -> None:
        """Raise ConfigError: the objective does not support the method, with the reason ``why``."""
        raise ConfigError(f"objective {self.name!r} cannot go with method {self.host.name!r}: {why}")


_OBJECTIVES: Registry[Objective] = Registry("objective")
O = TypeVar("O", bound=type[Objective])  # noqa: E741


def register_objective(name: str) -> Callable[[O], O]:
    """Register an :class:`Objective` under ``name``: usable from YAML with every method that meets its requirements.

    Raises:
        ValueError: Another class has the name.
    """
    return _OBJECTIVES.enrol(name)


def list_objectives() -> list[str]:
    """Return the names of all objectives, sorted."""
    return _OBJECTIVES.names()


def get_objective_class(name: str) -> type[Objective]:
    """Return the class registered as ``name``; raises ConfigError with the nearest names."""
    return _OBJECTIVES.get(name)


def objective_settings(
    host: Host, given: Mapping[str, Mapping[str, Any]], texts: DataTexts
) -> dict[str, dict[str, Any]]:
    """Return the settings of the objectives ``given`` by name, with defaults.

    Args:
        host: The method of the objectives.
        given: Names of objectives, each with fields of its ``Settings``.
        texts: The templates of the data set.

    Raises:
        ConfigError: Unknown objectives or settings, values that are not accepted, or a method without support for
            objectives.
    """
    settings = {}
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"objectives.{name} is {values!r}; accepted: its settings, {{}} for the defaults")
        if host.no_objectives:
            raise ConfigError(
                f"objective {name!r} cannot go with method {host.name!r}: {host.no_objectives}, and no objective takes "
                "part in that; leave objectives empty"
            )
        settings[name] = dataclasses.asdict(fill_templates(_OBJECTIVES.settings(name, values), texts, host.class_names))
    return settings


def objectives_in(settings: type) -> list[str]:
    """Return the objectives that a method's ``Settings`` declares: fields with an objective's name and settings."""
    known = _OBJECTIVES.names()
    return [name for name, hint in field_hints(settings).items() if name in known and bare(hint) is _kind(name)]


def _has(host: Host, part: Part) -> bool:
    if part == "text":
        return host.has_text_prompts()
    return host.needs.images if part == "image" else host.deep_layers() > 0


def _kind(name: str) -> type:
    return get_objective_class(name).Settings


def create_objective(name: str, host: Host, values: Any = None) -> Objective:
    """Return objective ``name`` for the method ``host``; ``values`` are its ``Settings`` or fields of it.

    Raises:
        ConfigError: Unknown objective or setting, or a method that does not meet the requirements.
    """
    kind = get_objective_class(name)
    return kind(host, values if isinstance(values, kind.Settings) else _OBJECTIVES.settings(name, values or {}))


def unit(features: Tensor) -> Tensor:
    """Return ``features`` normalised to length 1."""
    return F.normalize(features, dim=-1)
