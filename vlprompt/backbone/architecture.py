"""Architectures of names and state dicts, checks that they are supported, and their construction.

Networks are built directly from open_clip's classes. Its factory only warns about a wrong activation (QuickGELU), falls
back to random weights and installs a log handler in the process.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt._random import seeded_random
from vlprompt.errors import BackboneError, bulleted

Config = dict[str, Any]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ARCHIVE_FIELDS = ("input_resolution", "context_length", "vocab_size")
"""Scalars that OpenAI's released archives hold in addition to the weights."""

#: Largest number in a configuration, and most layers of a tower: larger networks would fill the memory.
_LARGEST_SIZE, _MOST_LAYERS = 1_000_000, 1_000
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")
#: Options of open_clip's byte-pair tokenizer that name no files.
_TOKENIZER_OPTIONS = ("clean", "reduction_mask")

_OPENAI_KEYS = (
    "visual.conv1.weight",
    "text_projection",
    "positional_embedding",
    "token_embedding.weight",
    "ln_final.weight",
    "logit_scale",
)


def check_precision(precision: str) -> None:
    """Raise BackboneError unless ``precision`` is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise BackboneError(f"precision {precision!r} is not known; accepted: {', '.join(PRECISIONS)}")


def registered_config(name: str) -> Config | None:
    """Return a copy of open_clip's configuration of ``name`` (``ViT-B/16`` means ``ViT-B-16``), or None."""
    import open_clip

    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        return None
    config: Config = open_clip.get_model_config(name)
    return config


def check_config(config: Config, where: str) -> None:
    """Check a configuration that was read from a file, which is untrusted: it must not name other files or places.

    timm takes a model name such as ``hf_hub:ORG/REPO`` or ``local-dir:FOLDER`` as a place to read.

    Args:
        config: The configuration, with ``vision_cfg`` and ``text_cfg``.
        where: The file, for the message.

    Raises:
        BackboneError: A value is not accepted.
    """
    problems = []
    timm_name = config["vision_cfg"].get("timm_model_name")
    if timm_name and not (isinstance(timm_name, str) and _TIMM_NAME.fullmatch(timm_name)):
        problems.append(f"vision_cfg.timm_model_name is {str(timm_name)[:80]!r}; accepted: the name of a timm model")
    if not isinstance(config.get("quick_gelu"), bool | None):
        problems.append(f"quick_gelu is {str(config['quick_gelu'])[:80]}; accepted: true or false")
    options = config["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not all(
        name in _TOKENIZER_OPTIONS and isinstance(value, str) for name, value in options.items()
    ):
        accepted = " and ".join(_TOKENIZER_OPTIONS)
        problems.append(f"text_cfg.tokenizer_kwargs is {str(options)[:80]}; accepted: texts for {accepted}")
    for section in ("", "vision_cfg", "text_cfg"):
        for name, value in (config[section] if section else config).items():
            most = _MOST_LAYERS if name == "layers" else _LARGEST_SIZE
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not -most <= number <= most:
                    key = f"{section}.{name}".removeprefix(".")
                    problems.append(f"{key} is {str(number)[:40]}; accepted: numbers up to {most:,}")
    if problems:
        raise BackboneError(f"{where} is refused:\n{bulleted(problems)}")


def text_problem(config: Config) -> str | None:
    """Return why the text tower of ``config`` is not supported exactly, or None if it is.

    Supported towers read the feature at the end-of-text token of CLIP's byte-pair tokenizer.
    """
    text = config.get("text_cfg", {})
    if "multimodal_cfg" in config:
        return "it is a captioning model (CoCa), whose text tower appends a class token"
    if text.get("hf_model_name"):
        return f"its text tower is the Hugging Face model {text['hf_model_name']!r}, not CLIP's transformer"
    if text.get("hf_tokenizer_name"):
        return f"its tokenizer is {text['hf_tokenizer_name']!r}, not CLIP's byte pairs"
    if text.get("embed_cls"):
        return "its text tower appends a class token and reads the feature off it"
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        return f"its text tower pools {text['pool_type']!r}, not at end-of-text"
    return None


def check_text(config: Config, name: str) -> None:
    """Raise BackboneError if :func:`text_problem` returns a problem; the text names an alternative."""
    problem = text_problem(config)
    if problem:
        raise BackboneError(
            f"{name} cannot be used: {problem}, so prompts would be scored inexactly.\n"
            "`vlprompt list backbones` shows supported ones, e.g. --backbone.name ViT-B-16 --backbone.pretrained openai"
        )


def check_model_text(text: Any, tokenizer: Any, name: str) -> None:
    """Raise BackboneError unless a built text tower pools at the end-of-text token of ``tokenizer``.

    Args:
        text: The module with ``transformer``, ``token_embedding`` and ``attn_mask``: an open_clip CLIP or its ``text``.
        tokenizer: open_clip's SimpleTokenizer, or one with the same attributes.
        name: Name of the backbone, for the message.
    """
    needed = ("transformer", "token_embedding", "positional_embedding", "ln_final")
    problem = None
    if not all(hasattr(text, attribute) for attribute in needed):
        problem = f"its text tower is a {type(text).__name__}, not CLIP's transformer"
    elif getattr(text, "cls_emb", None) is not None:
        problem = "its text tower appends a class token and reads the feature off it"
    elif not all(hasattr(tokenizer, attribute) for attribute in ("encode", "clean_fn", "sot_token_id", "eot_token_id")):
        problem = f"its tokenizer is a {type(tokenizer).__name__}, not CLIP's byte pairs"
    elif tokenizer.eot_token_id >= text.token_embedding.weight.shape[0]:
        rows = text.token_embedding.weight.shape[0]
        problem = f"its {rows} token embeddings do not reach the tokenizer's end-of-text ({tokenizer.eot_token_id})"
    else:
        pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
        eos = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
        if pool == "argmax":
            # argmax finds end-of-text only while no other token has a larger id.
            if tokenizer.eot_token_id != max(tokenizer.encoder.values()):
                problem = "it pools at the largest token id, and its tokenizer has larger ids than end-of-text"
        elif pool != "eos" or eos != tokenizer.eot_token_id:
            problem = f"its text tower pools {pool!r} (token {eos}), not at end-of-text ({tokenizer.eot_token_id})"
    if problem:
        raise BackboneError(
            f"{name} cannot be used: {problem}, so prompts would be scored inexactly.\n"
            "Use a CLIP that pools at end-of-text, e.g. --backbone.name ViT-B-16 --backbone.pretrained openai"
        )


def config_from_shapes(state: Mapping[str, Tensor], source: str) -> Config:
    """Return the architecture of an OpenAI-format state dict from its shapes (heads are 64 wide, as in all releases).

    Raises:
        BackboneError: Names or shapes are not those of a CLIP; the text names ``source``.
    """
    missing = [key for key in _OPENAI_KEYS if key not in state]
    if missing:
        raise BackboneError(
            f"{source} is not an OpenAI-format CLIP state dict: no {missing[0]!r} among its {len(state)} tensors.\n"
            "For another layout name the architecture, e.g. --backbone.name ViT-B-16, or use local-dir:FOLDER with an "
            "open_clip_config.json."
        )
    try:
        vision = _vision_from_shapes(state)
        width = state["ln_final.weight"].shape[0]
        text = {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": width,
            "heads": width // 64,
            "layers": _count(state, "transformer.resblocks."),
        }
        embed_dim = state["text_projection"].shape[1]
    except (IndexError, KeyError, ValueError) as error:
        raise BackboneError(f"{source} has the names of a CLIP but not its shapes: {error}") from None
    if width % 64 or vision["width"] % 64 or not all((*text.values(), *vision.values(), embed_dim)):
        raise BackboneError(
            f"{source} has the names of a CLIP but not its shapes: text width {width}, {text['layers']} layers; image "
            f"width {vision['width']}, {vision['layers']} layers; widths must be multiples of 64"
        )
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}


def _vision_from_shapes(state: Mapping[str, Tensor]) -> Config:
    conv = state["visual.conv1.weight"]
    if "visual.attnpool.positional_embedding" in state:
        side = _side(state["visual.attnpool.positional_embedding"])
        layers = [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
        return {"layers": layers, "width": state["visual.layer1.0.conv1.weight"].shape[0], "image_size": 32 * side}
    side = _side(state["visual.positional_embedding"])
    patch = conv.shape[3]
    return {
        "layers": _count(state, "visual.transformer.resblocks."),
        "width": conv.shape[0],
        "patch_size": patch,
        "image_size": patch * side,
    }


def _side(positions: Tensor) -> int:
    side = math.isqrt(max(positions.shape[0] - 1, 0))
    if side * side + 1 != positions.shape[0]:
        raise ValueError(f"{positions.shape[0]} image positions are not a class token and a square grid")
    return side


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return one more than the largest index after ``prefix``, so that a missing block in between is noticed."""
    indices = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
    return 1 + max((int(index) for index in indices), default=-1)


def same_shapes_as(state: Mapping[str, Tensor], source: str) -> str | None:
    """Return the registered name with the same sizes as an OpenAI-format ``state``, or None."""
    import open_clip

    try:
        wanted = config_from_shapes(state, source)
    except BackboneError:
        return None
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        same = config["embed_dim"] == wanted["embed_dim"] and not text_problem(config)
        for section in ("vision_cfg", "text_cfg"):
            same = same and all(config[section].get(key, value) == value for key, value in wanted[section].items())
        if same and not name.endswith("-quickgelu") and "timm_model_name" not in config["vision_cfg"]:
            return str(name)
    return None


def build_model(config: Config, *, quick_gelu: bool, precision: str, seed: int = 0) -> nn.Module:
    """Build an open_clip network on the CPU, with initial weights determined by ``seed``.

    The global random state is not changed. ``fp16`` and ``bf16`` follow OpenAI's mixed precision: matrices and
    convolutions are narrow, layer norms and embeddings stay float32.

    Raises:
        BackboneError: open_clip cannot build the configuration.
    """
    from open_clip.model import CLIP, CustomTextCLIP, convert_weights_to_lp

    config = deepcopy(config)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    config["quick_gelu"] = quick_gelu
    narrow = PRECISIONS[precision] if precision != "fp32" else None
    timm = bool(config["vision_cfg"].get("timm_model_name"))
    if timm:
        config["vision_cfg"]["timm_model_pretrained"] = False
    try:
        with seeded_random(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = kind(**config, cast_dtype=narrow)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"open_clip cannot build this architecture: {reason}\nIts configuration: {config}"
        ) from None
    if narrow is not None and timm:
        _narrow_all(model, narrow)
    elif narrow is not None:
        convert_weights_to_lp(model, dtype=narrow)
    return model


def _narrow_all(model: nn.Module, dtype: torch.dtype) -> None:
    # timm towers have no mixed precision: everything is narrow except layer norms that compute in float32.
    from open_clip.transformer import LayerNormFp32

    model.to(dtype=dtype)
    for module in model.modules():
        if isinstance(module, LayerNormFp32):
            module.float()
