"""Settings of image generation, and the recipe that identifies a bank."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vlprompt._files import canonical_json, parse_json, sha256_text
from vlprompt._random import hashed_number
from vlprompt.config.types import Count, Fraction, Ge, Gt, Holds, Le, Name, Positive, Words, validated
from vlprompt.errors import ConfigError, DataError

SCHEMA = "vlprompt diffusion bank 1"
TOOL = "vlprompt bank"
#: DiffTPT's pipeline and the revision in its code.
OFFICIAL = ("lambdalabs/sd-image-variations-diffusers", "v2.0")
#: Generated images per source image in DiffTPT (its code generates 65 and uses 63).
COUNT = 63
Format = Literal["png", "webp", "jpeg"]


@validated("")
class GenerationSettings:
    """Settings of image generation; defaults are those of DiffTPT's code (``image_generator_R.py``), if any.

    Attributes:
        pipeline: A folder written by diffusers' ``save_pretrained``, a name on the Hugging Face hub, or ``tiny`` and
            ``tiny-img2img``, which have random weights and generate noise.
        revision: Branch, tag or commit on the hub; None for DiffTPT's revision of its pipeline, else the newest.
        scheduler: Class of diffusers that replaces the pipeline's scheduler.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 or less for none.
        eta: Noise of DDIM steps; unused by other schedulers.
        strength: For img2img: the fraction of the image to replace, in 0..1; ``int(steps * strength)`` steps are done.
        prompt: For img2img: the prompt; it cannot name the class, which is unknown at test time.
        size: Side of the square images in pixels; None for the pipeline's default, 512 for Stable Diffusion 1.
        precision: Type of the weights; ``auto`` is fp16 on a GPU and fp32 on the CPU.
        safety_checker: ``off`` loads the pipeline without its checker. With ``on``, images that the checker flags (and
            blackens) are generated again.
        format: ``png`` and ``webp`` are lossless; ``jpeg`` has quality 75, as in DiffTPT.
        seed: Seed of all images.
    """

    pipeline: Annotated[Name, Words("a folder, or a name on the Hugging Face hub")] = OFFICIAL[0]
    revision: str | None = None
    scheduler: str | None = None
    steps: Positive = 50
    guidance: Annotated[float, Ge(0), Le(100)] = 3.0
    eta: Fraction = 0.0
    strength: Annotated[float, Gt(0), Le(1)] = 0.8
    prompt: str = "a photo"
    size: Annotated[int, Ge(8), Holds(lambda size: size % 8 == 0, "multiples of 8 pixels")] | None = None
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    safety_checker: Literal["on", "off"] = "on"
    format: Format = "png"
    seed: Count = 0

    def __post_init__(self) -> None:
        if int(self.steps * self.strength) < 1:
            raise ConfigError(
                f"strength is {self.strength}, which leaves none of {self.steps} steps; accepted: "
                f"{1 / self.steps:g} or more, or more steps"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that a generated image depends on besides its source image and its number.

    Attributes:
        facts: JSON values; their canonical text is hashed.
        about: Information that does not change images: options, versions. Not hashed.
    """

    facts: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """SHA-256 of the facts."""
        return sha256_text(canonical_json(self.facts))

    @property
    def format(self) -> Format:
        """File format of the generated images."""
        kind: Format = self.facts["format"]
        return kind

    def seed_of(self, image: str, number: int, attempt: int = 0) -> int:
        """Return the 63-bit seed of a generated image.

        Args:
            image: SHA-256 of the source image.
            number: Number of the generated image, from 0.
            attempt: Number of earlier attempts that the safety checker flagged.
        """
        text = f"{image}|{number}|{self.id}" + (f"|{attempt}" if attempt else "")
        return hashed_number(text) >> 1

    def text(self) -> str:
        """Return the text of the recipe's file."""
        return json.dumps({"schema": SCHEMA, "id": self.id, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_recipe(text: str, name: str) -> Recipe:
    """Return the recipe of a recipe file with this text.

    Raises:
        DataError: If the text is not a recipe, or was edited, so that it does not describe the images.
    """
    try:
        content = parse_json(text)
        recipe = Recipe(content["facts"], content["about"])
        if content["schema"] != SCHEMA:
            raise DataError(f"{name} has schema {content['schema']!r}; this version of vlprompt reads {SCHEMA!r}.")
        if not isinstance(recipe.about, dict) or not isinstance(recipe.about.get("options", ""), str):
            raise ValueError("about.options is not a text")
        shlex.split(recipe.about.get("options", ""))  # ValueError if quotation marks do not match
        if recipe.id != content["id"] or recipe.format not in ("png", "webp", "jpeg"):
            raise DataError(f"{name} was changed after images were generated. Make a new bank: {TOOL} --bank FOLDER")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not the recipe of a bank ({type(error).__name__}: {error}).") from error
    return recipe
