"""Banks of generated pictures: variations of test images by a diffusion model, made once and kept (DiffTPT).

Reading a bank needs nothing but Pillow; making one needs ``diffusers``, which is loaded then.
"""

from vlprompt.generation.bank import DiffusionBank, content_sha256, open_bank
from vlprompt.generation.recipe import GenerationSettings, Recipe

__all__ = ["DiffusionBank", "GenerationSettings", "Recipe", "content_sha256", "open_bank"]
