"""What every method learns and needs, read off the methods themselves: ``vlprompt list methods``."""

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
    """One method, with its default settings.

    Attributes:
        name: Its registered name.
        about: The first sentence of its file.
        text: Whether it learns on the text side.
        learns_from: What its learning looks at: labelled or unlabelled images, or test images.
        image: Whether it learns on the image side; training then needs gradients through the image tower.
        cached: Whether image features can be computed once and kept.
        towers: Which image towers it works with.
        parameters: Numbers it learns on OpenAI's ViT-B/16.
        checked: What its numbers are held to: official code, equations, or a reconstruction.
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
    """Return the capabilities of methods, found by making each on a ViT-B/16 that has shapes only."""
    backbone = shapes_only(ARCHITECTURE)
    found = []
    for name in names:
        method = create_method(name, backbone, ["cat", "dog"])
        about = (sys.modules[get_method_class(name).__module__].__doc__ or "").splitlines()[0]
        about = about.removesuffix(".").partition(" (")[0]
        parameters = sum(parameter.numel() for _, parameter in method.trainable_parameters())
        towers = "vision transformers" if method.needs.images and method.needs.towers == "transformers" else "any"
        text, image = method.has_text_prompts(), method.needs.images
        source = _learns_from(method)
        found.append(Capability(name, about, source, text, image, not image, towers, parameters, method.checked))
    return found


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
    """Return a method's row."""

    def said(value: bool) -> str:
        return "yes" if value else "-"

    what = said(one.text), said(one.image), said(one.cached)
    return one.name, one.learns_from, *what, one.towers, f"{one.parameters:,}", one.checked


def markdown(found: Sequence[Capability]) -> str:
    """Return the README's table: the same, with what each method is."""
    rows = [("method", "what it is", *HEADINGS[1:]), ("---",) * (len(HEADINGS) + 1)]
    for one in found:
        name, *rest = cells(one)
        rows.append((f"`{name}`", one.about.partition(": ")[2] or one.about, *rest))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
