"""Pipelines with a hundred thousand random weights, for tests and for trying the tool.

Their images, 16 x 16 pixels, are noise.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

from vlprompt._random import seeded_random
from vlprompt.generation.libraries import import_diffusers, quiet

#: Names accepted for these pipelines.
TINY = ("tiny", "tiny-img2img")


def save_tiny(folder: Path, name: str = "tiny", seed: int = 0) -> Path:
    """Write a pipeline with diffusers' ``save_pretrained`` and return ``folder``.

    Args:
        folder: Target folder; it is created.
        name: ``tiny``, a ``StableDiffusionImageVariationPipeline``, or ``tiny-img2img``, a ``StableDiffusionPipeline``.
        seed: Seed of the weights.
    """
    diffusers, transformers = import_diffusers()
    with seeded_random(seed):
        modules = _common_modules(diffusers)
        small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
        small |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        if name == "tiny":
            config = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **small)
            encoder = transformers.CLIPVisionModelWithProjection(config)
            processor = transformers.CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            )
            kind = diffusers.StableDiffusionImageVariationPipeline
            modules |= {"image_encoder": encoder, "feature_extractor": processor}
        else:
            tokenizer = _tokenizer(transformers)
            ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 16}
            text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, **ids))
            kind = diffusers.StableDiffusionPipeline
            modules |= {"text_encoder": text, "tokenizer": tokenizer, "feature_extractor": None}
    with quiet():
        kind(**modules, safety_checker=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def _common_modules(diffusers: Any) -> dict[str, Any]:
    """Return the modules of both pipelines."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=16,
    )
    scheduler = diffusers.PNDMScheduler(
        skip_prk_steps=True, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    return {"unet": unet, "vae": vae, "scheduler": scheduler}


def _tokenizer(transformers: Any) -> Any:
    """Return a CLIP tokenizer whose vocabulary is the letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    words += [f"{letter}</w>" for letter in string.ascii_lowercase]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "vocab.json": json.dumps({word: number for number, word in enumerate(words)}),
            "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": json.dumps({"model_max_length": 16, "tokenizer_class": "CLIPTokenizer"}),
        }
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        return transformers.CLIPTokenizer.from_pretrained(folder)
