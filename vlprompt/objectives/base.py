"""What an objective is: something that adds to a training step's loss, or changes features or learnables around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.config.hints import bare
from vlprompt.config.types import field_hints, fill_templates
from vlprompt.errors import ConfigError
from vlprompt.needs import Needs
from vlprompt.registry import Registry

Terms = dict[str, Tensor]


@dataclass
class Step:
    """What one training step has computed.

    Attributes:
        labels: ``[B]``.
        features: Raw image features ``[B, D]``, before any objective changed them.
        unit_image: Unit image features ``[B, D]`` that were scored.
        text_features: Unit text features: ``[C, D]``, ``[G, C, D]`` for G experts, or ``[B, C, D]`` for each image.
        logits: ``[B, C]``.
        frozen_features: Computes raw features ``[B, D]`` of the same images without any learnable, without gradient.
    """

    labels: Tensor
    features: Tensor
    unit_image: Tensor
    text_features: Tensor
    logits: Tensor
    frozen_features: Callable[[], Tensor]


class Host(Protocol):
    """What an objective may ask of the method it is attached to."""

    name: ClassVar[str]
    no_objectives: ClassVar[str | None]
    backbone: Any
    class_names: list[str]
    text_features_per: ClassVar[Literal["class", "expert", "image"]]

    @property
    def needs(self) -> Needs:
        """What it needs from a run; ``needs.images`` says whether image features depend on parameters."""

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the named learnables."""

    def deep_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the prompts that replace others at deeper layers, ``[M, W]`` each: text's and image's."""

    def image_features(self, images: Tensor) -> Tensor:
        """Return raw image features ``[B, D]``."""

    def unit_image(self, features: Tensor) -> Tensor:
        """Return image features as they are scored."""

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier."""

    def deep_layers(self) -> int:
        """Return how many deeper layers have prompts in both towers."""

    def has_text_prompts(self) -> bool:
        """Whether text features depend on learnables."""


Part = Literal["text", "image", "deep"]
"""Parts that an objective may need: text or image features that depend on parameters, deep prompts in both towers."""
LACKING: Mapping[Part, str] = {
    "text": "it learns nothing on the text side",
    "image": "it learns nothing on the image side",
    "deep": "it has no deep prompts in both towers",
}


class Objective(nn.Module):
    """A loss term, regulariser or adapter that works with every method that has what it needs.

    A subclass names its :attr:`Settings` and overrides what it does; everything else does nothing. Tensors that it
    computes once (frozen targets) are buffers that are not saved; what it learns are parameters like a method's own.

    Args:
        host: The method it is attached to.
        settings: An instance of :attr:`Settings`.

    Raises:
        ConfigError: The method lacks what the objective needs; the text says what.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    kept: ClassVar[tuple[str, ...]] = ()
    """Buffers that scoring depends on: they are saved with a head, beside what is learned."""

    def __init__(self, host: Host, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self._host = [host]  # in a list, so that the method is no module of its own objective
        for part, advice in self.needs(settings).items():
            if not _has(host, part):
                self.refuse(f"{LACKING[part]}; {advice}" if advice else LACKING[part])
        self.build(host)

    @classmethod
    def needs(cls, settings: Any) -> Mapping[Part, str]:
        """Return the parts of a method that the objective needs with these settings, with advice where one lacks."""
        return {}

    @property
    def host(self) -> Host:
        """The method it is attached to."""
        return self._host[0]

    def build(self, host: Host) -> None:
        """Create learnables and buffers; refuse a method that lacks what is needed."""

    def prepare(self) -> None:
        """Called when the method and all its objectives are there."""

    def adapt_image(self, features: Tensor) -> Tensor:
        """Return raw image features ``[B, D]`` as they are to be scored."""
        return features

    def adapt_text(self, features: Tensor) -> Tensor:
        """Return raw text features ``[..., D]`` as they are to be scored."""
        return features

    def add(self, step: Step, terms: Terms) -> Terms:
        """Return the loss terms ``terms`` with those of this objective; weights are applied already."""
        return terms

    def epoch_end(self, epoch: int, epochs: int) -> None:
        """Act at the end of training epoch ``epoch`` (from 0) of ``epochs``, after its last step."""

    def refuse(self, why: str) -> None:
        """Raise ConfigError: this objective cannot go with its method."""
        raise ConfigError(f"objective {self.name!r} cannot go with method {self.host.name!r}: {why}")


_OBJECTIVES: Registry[Objective] = Registry("objective")
O = TypeVar("O", bound=type[Objective])  # noqa: E741


def register_objective(name: str) -> Callable[[O], O]:
    """Enrol an :class:`Objective` under ``name``: usable from YAML with every method that has what it needs.

    Raises:
        ValueError: Another class holds the name.
    """
    return _OBJECTIVES.enrol(name)


def list_objectives() -> list[str]:
    """Return the names of all objectives, sorted."""
    return _OBJECTIVES.names()


def get_objective_class(name: str) -> type[Objective]:
    """Return the class registered as ``name``; raises ConfigError with the nearest names."""
    return _OBJECTIVES.get(name)


def objective_settings(
    host: Host, given: Mapping[str, Mapping[str, Any]], templates: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the settings of the objectives ``given``, defaults included, by name.

    Args:
        host: The method they are for.
        given: Names with values of fields of their ``Settings``.
        templates: What templates become that are left open.

    Raises:
        ConfigError: Unknown objectives or settings, values that are not accepted, or a method in which no objective
            can take part.
    """
    found = {}
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"objectives.{name} is {values!r}; accepted: its settings, {{}} for the defaults")
        if host.no_objectives:
            raise ConfigError(
                f"objective {name!r} cannot go with method {host.name!r}: {host.no_objectives}, and no objective takes "
                "part in that; leave objectives empty"
            )
        found[name] = dataclasses.asdict(fill_templates(_OBJECTIVES.settings(name, values), templates))
    return found


def objectives_in(settings: type) -> list[str]:
    """Return the objectives that a method's ``Settings`` declares: fields with the name and the settings of one."""
    known = _OBJECTIVES.names()
    return [name for name, hint in field_hints(settings).items() if name in known and bare(hint) is _kind(name)]


def _has(host: Host, part: Part) -> bool:
    if part == "text":
        return host.has_text_prompts()
    return host.needs.images if part == "image" else host.deep_layers() > 0


def _kind(name: str) -> type:
    return get_objective_class(name).Settings


def create_objective(name: str, host: Host, values: Any = None) -> Objective:
    """Return objective ``name`` for the method ``host``; ``values`` are its ``Settings``, or fields of them.

    Raises:
        ConfigError: Unknown objective or setting, or a method that lacks what it needs.
    """
    kind = get_objective_class(name)
    return kind(host, values if isinstance(values, kind.Settings) else _OBJECTIVES.settings(name, values or {}))


def unit(features: Tensor) -> Tensor:
    """Return features of length 1."""
    return F.normalize(features, dim=-1)
