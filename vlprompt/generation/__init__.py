"""Banks of generated images: variations of test images by a diffusion model, generated once and stored (DiffTPT).

Reading a bank needs Pillow only. Filling a bank needs ``diffusers``, which is imported on use.
"""

from vlprompt.generation.bank import DiffusionBank, content_sha256, open_bank
from vlprompt.generation.recipe import GenerationSettings, Recipe

__all__ = ["DiffusionBank", "GenerationSettings", "Recipe", "content_sha256", "open_bank"]
