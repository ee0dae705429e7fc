"""Capabilities of methods, derived from the methods themselves: ``vlprompt list methods``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vlprompt.backbone import shapes_only
from vlprompt.methods import PromptMethod, create_method, get_method_class
from vlprompt.methods.fitted import FittedMethod

ARCHITECTURE = "ViT-B-16"


@dataclass(frozen=True)
class Capability:
    """Capabilities of one method with default settings.

    Attributes:
        name: Its registered name.
        about: The first line of its module docstring.
        text: Whether it learns on the text side.
        learns_from: The images it learns from: labelled, unlabelled or test images.
        image: Whether it learns on the image side; training then needs gradients through the image tower.
        cached: Whether image features can be cached.
        towers: Supported image towers.
        parameters: Number of trainable parameters on OpenAI's ViT-B/16.
        checked: Reference of its results: official code, equations, or a reconstruction.
    """

    name: str
    about: str
    learns_from: str
    text: bool
    image: bool
    cached: bool
    towers: str
    parameters: int
    checked: str


def capabilities(names: Sequence[str]) -> list[Capability]:
    """Return the capabilities of methods, each created on a ViT-B/16 without weights."""
    backbone = shapes_only(ARCHITECTURE)
    results = []
    for name in names:
        method = create_method(name, backbone, ["cat", "dog"])
        about = (sys.modules[get_method_class(name).__module__].__doc__ or "").splitlines()[0]
        about = about.removesuffix(".").partition(" (")[0]
        parameters = sum(parameter.numel() for _, parameter in method.trainable_parameters())
        towers = "vision transformers" if method.needs.images and method.needs.towers == "transformers" else "any"
        text, image = method.has_text_prompts(), method.needs.images
        source = _learns_from(method)
        results.append(Capability(name, about, source, text, image, not image, towers, parameters, method.checked))
    return results


def _learns_from(method: PromptMethod) -> str:
    needs = method.needs
    if needs.online:
        return "test images so far"
    if needs.test_views is not None:
        return "each test image"
    if needs.unlabelled != "none":
        return "unlabelled images"
    return "labelled images" if isinstance(method, FittedMethod) or method.trainable_parameters() else "-"


HEADINGS = ("method", "learns from", "text", "image", "features kept", "image towers", "parameters", "checked against")


def cells(one: Capability) -> tuple[str, ...]:
    """Return the table row of a method."""

    def said(value: bool) -> str:
        return "yes" if value else "-"

    what = said(one.text), said(one.image), said(one.cached)
    return one.name, one.learns_from, *what, one.towers, f"{one.parameters:,}", one.checked


def markdown(found: Sequence[Capability]) -> str:
    """Return the table of the README, which adds a description of each method."""
    rows = [("method", "what it is", *HEADINGS[1:]), ("---",) * (len(HEADINGS) + 1)]
    for one in found:
        name, *rest = cells(one)
        rows.append((f"`{name}`", one.about.partition(": ")[2] or one.about, *rest))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
