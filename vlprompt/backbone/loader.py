"""``load_backbone``: loading a frozen CLIP by name and weights."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt._files import home_path, parse_json, read_text
from vlprompt.backbone.architecture import (
    ARCHIVE_FIELDS,
    Config,
    build_model,
    check_config,
    check_precision,
    check_text,
    config_from_shapes,
    registered_config,
    text_problem,
)
from vlprompt.backbone.backbone import Backbone, Preprocess, checked_device, clip_tokenizer
from vlprompt.backbone.demo import DEMOS, read_demo
from vlprompt.backbone.fetch import CONFIG_FILE, WEIGHT_FILES, find_or_fetch, find_or_fetch_repo, published
from vlprompt.backbone.image_size import check_image_size, config_of_size, interpolated, set_input_size
from vlprompt.backbone.weights import load_weights, prefix_advice, read_weights, split_part
from vlprompt.errors import BackboneError, bulleted, did_you_mean, nearest

FROM_FILE = "from-file"

_CONSTANTS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")


def load_backbone(
    name: str = "ViT-B-16",
    pretrained: str | os.PathLike[str] | None = "openai",
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    quick_gelu: bool | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Load a frozen CLIP.

    Args:
        name: An open_clip architecture (``ViT-B-16``; ``list_backbones()`` returns all supported ones);
            ``local-dir:FOLDER`` with ``open_clip_config.json`` and weights; ``hf-hub:ORG/REPO``; ``from-file``: an
            OpenAI-format file whose shapes determine the architecture; ``demo`` and ``demo-rn``: the small CLIPs inside
            the package, with a ViT and with a ResNet.
        pretrained: A tag (``openai``, ``laion2b_s34b_b88k``); the path of a safetensors or torch file; ``TAG=PATH``, a
            file with the weights of that tag; ``random``: weights determined by a fixed seed. Names that include their
            weights (``demo``, ``local-dir:``, ``hf-hub:``) keep the default.
        precision: ``fp32``, ``fp16`` or ``bf16``: the type of matrices and activations. Prompts and features stay
            float32.
        device: Device of the backbone.
        quick_gelu: The activation of a file that does not state it. None: taken from the tag, the folder's
            configuration, the name (``ViT-B-16-quickgelu``) or OpenAI's archive fields. A contradiction is an error.
        image_size: Side of the images in pixels. None: that of the weights. For another size, the position embeddings
            of a vision transformer are interpolated, as with ``force_image_size`` in open_clip (bicubic, antialiased).

    Returns:
        The backbone, in evaluation mode, without gradients.

    Raises:
        BackboneError: The backbone cannot be loaded; the text states the fix.
    """
    check_precision(precision)
    check_image_size(image_size)
    target = checked_device(device)
    pretrained = os.fspath(pretrained) if pretrained is not None else None
    if name in DEMOS:
        backbone = _demo(name, pretrained, precision, quick_gelu, image_size)
    elif name.startswith(("local-dir:", "hf-hub:")):
        backbone = _from_folder(name, pretrained, precision, quick_gelu, image_size)
    elif name == FROM_FILE:
        backbone = _from_shapes(pretrained, precision, quick_gelu, image_size)
    else:
        backbone = _registered(name, pretrained, precision, quick_gelu, image_size)
    return backbone.to(target)


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the packaged ``demo`` networks and the supported ``NAME/TAG`` pairs that match ``pattern``.

    ``*`` and ``?`` are wildcards; case is ignored.
    """
    from open_clip.pretrained import list_pretrained

    served = set(_served_names())
    pairs = [*DEMOS, *(f"{name}/{tag}" for name, tag in list_pretrained() if name in served)]
    return [pair for pair in pairs if fnmatch.fnmatchcase(pair.lower(), pattern.lower())]


def _served_names() -> list[str]:
    import open_clip

    return [name for name in open_clip.list_models() if not text_problem(registered_config(name) or {})]


# -- open_clip's architectures ----------------------------------------------------------------------------------------
def _registered(
    name: str, pretrained: str | None, precision: str, quick_gelu: bool | None, image_size: int | None
) -> Backbone:
    config = registered_config(name)
    if config is None:
        raise BackboneError(_unknown_name(name))
    name = name.replace("/", "-")
    check_text(config, name)
    if not pretrained:
        raise BackboneError(
            f"{name} needs weights, but pretrained is {pretrained!r}; random weights must be requested.\n"
            f"Accepted by --backbone.pretrained: {_tags_of(name)}, the path of a file, or random."
        )
    if pretrained == "random":
        if name.endswith("-quickgelu"):
            _check_activation(quick_gelu, True, f"networks called {name}")
        active = bool(config.get("quick_gelu", False)) if quick_gelu is None else quick_gelu
        constants = _published_constants(name, active) or {}
        return _assemble(config, None, constants, active, name, pretrained, precision, image_size)
    tag, path = _tag_and_path(name, pretrained)
    entry = _entry(name, tag) if tag else None
    if entry is None:
        return _registered_file(name, config, home_path(pretrained), precision, quick_gelu, image_size)
    trained_with = bool(entry.get("quick_gelu", False))
    _check_activation(quick_gelu, trained_with, f"the weights {tag!r} of {name}")
    path = path or find_or_fetch(published(name, str(tag), entry))
    state = read_weights(path)
    _check_archive_activation(state, trained_with, path)
    return _assemble(config, state, entry, trained_with, name, str(tag), precision, image_size, source=str(path))


def _registered_file(
    name: str, config: Config, path: Path, precision: str, quick_gelu: bool | None, image_size: int | None
) -> Backbone:
    """Load a bare file; its activation and constants come from arguments, the file's folder or published weights."""
    state = read_weights(path)
    settings = _folder_config(path.parent) if (path.parent / CONFIG_FILE).is_file() else None
    claims = {
        "the argument quick_gelu": quick_gelu,
        f"{CONFIG_FILE} in the folder of the file": settings["model_cfg"].get("quick_gelu") if settings else None,
        "the name": True if name.endswith("-quickgelu") else None,
        "the fields of the file (OpenAI's archive)": True if _is_archive(state) else None,
    }
    stated = {source: bool(value) for source, value in claims.items() if value is not None}
    if len(set(stated.values())) > 1:
        lines = [f"{source}: {'QuickGELU' if value else 'GELU'}" for source, value in stated.items()]
        raise BackboneError(f"the activation of {path} is contradictory:\n{bulleted(lines)}\nRemove one of them.")
    active = next(iter(stated.values()), None)
    constants = settings.get("preprocess_cfg", {}) if settings else _published_constants(name, active)
    if active is None or constants is None:
        what = "whether they were trained with QuickGELU or GELU"
        if active is not None:
            what = "their image constants, which differ between its published weights"
        raise BackboneError(
            f"{path} holds weights of {name}, but does not state {what}; a wrong choice silently lowers accuracy.\n"
            f"For published weights name their tag: --backbone.pretrained openai={path} ({_tags_of(name)}).\n"
            f"For your own weights put their {CONFIG_FILE} into the folder of the file"
            + (", or set quick_gelu (True: OpenAI's activation)." if active is None else ".")
        )
    place = os.path.abspath(path)
    return _assemble(config, state, constants, active, name, place, precision, image_size, source=str(path))


def _tag_and_path(name: str, pretrained: str) -> tuple[str | None, Path | None]:
    """Split ``pretrained`` into a tag and a file; return ``(None, None)`` for a bare path.

    Raises:
        BackboneError: Neither a tag of ``name`` nor a path.
    """
    pair = re.fullmatch(r"([\w.-]+)=(.+)", pretrained)
    if pair and _entry(name, pair[1]):
        return _tag_spelling(pair[1]), home_path(pair[2])
    tag = pair[1] if pair and not Path(pretrained).exists() else pretrained
    if _entry(name, pretrained):
        return _tag_spelling(pretrained), None
    path, _ = split_part(home_path(pretrained))
    if tag == pretrained and (path.exists() or os.sep in pretrained or path.suffix in _WEIGHT_ENDINGS):
        return None, None
    from open_clip.pretrained import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    hint = did_you_mean(tag, tags) if nearest(tag, tags) else ""
    raise BackboneError(
        f"{name} has no weights {tag!r}.{hint}\n"
        f"Accepted by --backbone.pretrained: {_tags_of(name)}, the path of a file, or random."
    )


def _unknown_name(name: str) -> str:
    return (
        f"there is no backbone {name!r}.{did_you_mean(name, [*DEMOS, FROM_FILE, *_served_names()])}\n"
        "`vlprompt list backbones` shows all; local-dir:FOLDER, hf-hub:ORG/REPO and from-file (an OpenAI-format file "
        "given as pretrained) are also accepted."
    )


def _entry(name: str, tag: str) -> dict[str, Any] | None:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(name, tag) or None


def _tag_spelling(tag: str) -> str:
    return tag.lower().replace("-", "_")  # open_clip's spelling of tags


def _tags_of(name: str) -> str:
    from open_clip.pretrained import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    return f"tags of {name}: " + ", ".join(tags) if tags else f"{name} has no published tags"


def _published_constants(name: str, quick_gelu: bool | None) -> dict[str, Any] | None:
    """Return the image constants shared by all published weights of ``name`` with that activation; None if they differ.

    Without published weights the result is empty, which means OpenAI's constants, as in open_clip.
    """
    from open_clip.pretrained import list_pretrained_tags_by_model

    entries = [_entry(name, tag) or {} for tag in list_pretrained_tags_by_model(name)]
    same = [entry for entry in entries if bool(entry.get("quick_gelu", False)) == quick_gelu] or entries
    candidates = [{key: entry[key] for key in _CONSTANTS if key in entry} for entry in same]
    if any(constants != candidates[0] for constants in candidates):
        return None
    return candidates[0] if candidates else {}


# -- names that include their weights ---------------------------------------------------------------------------------
def _from_folder(
    name: str, pretrained: str | None, precision: str, quick_gelu: bool | None, image_size: int | None
) -> Backbone:
    kind, _, place = name.partition(":")
    if kind == "hf-hub":
        config_path, weights = find_or_fetch_repo(place)
        folder = config_path.parent
    else:
        folder = home_path(place)
        if not place or not folder.is_dir():
            raise BackboneError(f"{name}: there is no folder {str(folder)!r}; use one with {CONFIG_FILE} and weights")
        name = f"{kind}:{os.path.abspath(folder)}"  # heads record it, and are used in other directories
        weights = _weights_in(folder) if pretrained != "random" else folder
    if pretrained != weights.name:  # saved heads record the file's name as pretrained
        _check_included_weights(name, pretrained, "random")
    settings = _folder_config(folder)
    config = settings["model_cfg"]
    check_text(config, name)
    stated = config.get("quick_gelu")
    if stated is not None:
        _check_activation(quick_gelu, bool(stated), f"the weights of {folder / CONFIG_FILE}")
    active = bool(stated if stated is not None else quick_gelu)
    if pretrained == "random":
        return _assemble(config, None, settings["preprocess_cfg"], active, name, pretrained, precision, image_size)
    state = read_weights(weights)
    if stated is None and quick_gelu is None and _is_archive(state):
        active = True
    _check_archive_activation(state, active, weights)
    constants, source = settings["preprocess_cfg"], str(weights)
    return _assemble(config, state, constants, active, name, weights.name, precision, image_size, source=source)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    candidates = [path for path in files if path.suffix == ".safetensors"] or files
    if len(candidates) != 1:
        contents = (
            "holds several weight files: " + ", ".join(path.name for path in candidates[:5])
            if candidates
            else "holds no weights"
        )
        raise BackboneError(f"local-dir:{folder} {contents}; expected one, best named {WEIGHT_FILES[0]}")
    return candidates[0]


_LARGEST_CONFIG = 2**20


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = parse_json(read_text(path, _LARGEST_CONFIG))
    except FileNotFoundError:
        raise BackboneError(f"{folder} has no {CONFIG_FILE}, which describes the architecture (model_cfg)") from None
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read as JSON: {error}") from None
    return _checked_settings(settings, path)


def _checked_settings(settings: Any, path: Path) -> dict[str, Any]:
    model = settings.get("model_cfg") if isinstance(settings, dict) else None
    sections = ("vision_cfg", "text_cfg")
    if (
        not isinstance(model, dict)
        or "embed_dim" not in model
        or any(not isinstance(model.get(p), dict) for p in sections)
    ):
        raise BackboneError(f"{path} lacks model_cfg with embed_dim, vision_cfg and text_cfg, as open_clip writes it")
    constants = settings.get("preprocess_cfg") or {}
    if not isinstance(constants, dict):
        raise BackboneError(f"{path}: preprocess_cfg is a {type(constants).__name__}, not a table of constants")
    check_config(model, str(path))
    return {"model_cfg": model, "preprocess_cfg": constants}


def _from_shapes(pretrained: str | None, precision: str, quick_gelu: bool | None, image_size: int | None) -> Backbone:
    if not pretrained or pretrained in ("openai", "random"):
        raise BackboneError(
            f"{FROM_FILE} needs a file, but pretrained is {pretrained!r}; use --backbone.pretrained /path/to/weights.pt"
        )
    path = home_path(pretrained)
    state = read_weights(path)
    if advice := prefix_advice(state, str(path)):
        raise BackboneError(f"{path} is not an OpenAI-format CLIP state dict: {advice}")
    _check_archive_activation(state, quick_gelu is not False, path)
    config = config_from_shapes(state, str(path))
    # The layout is OpenAI's; so is the activation unless the caller overrides it.
    active, place = quick_gelu is not False, os.path.abspath(path)
    return _assemble(config, state, {}, active, FROM_FILE, place, precision, image_size, source=str(path))


def _demo(
    name: str, pretrained: str | None, precision: str, quick_gelu: bool | None, image_size: int | None
) -> Backbone:
    _check_included_weights(name, pretrained, name)
    settings, state, token_ids = read_demo(name)
    settings = _checked_settings(settings, Path(f"{name}.json"))
    config = settings["model_cfg"]
    active = bool(config["quick_gelu"])
    _check_activation(quick_gelu, active, "the demo weights")
    constants, trained = settings["preprocess_cfg"], frozenset(token_ids.tolist())
    return _assemble(config, state, constants, active, name, name, precision, image_size, trained_tokens=trained)


def _check_included_weights(name: str, pretrained: str | None, other: str) -> None:
    if pretrained not in (None, "openai", other):
        raise BackboneError(
            f"{name} includes its weights, but pretrained is {pretrained!r}; omit it"
            + (", or use random." if other == "random" else f", or use {other}.")
        )


# -- activation, assembly ---------------------------------------------------------------------------------------------
def _check_activation(wanted: bool | None, trained_with: bool, what: str) -> None:
    if wanted is not None and wanted != trained_with:
        names = {True: "QuickGELU", False: "GELU"}
        raise BackboneError(
            f"quick_gelu={wanted} was given, but {what} use {names[trained_with]}; {names[wanted]} would silently "
            "lower accuracy. Omit quick_gelu."
        )


def _is_archive(state: Mapping[str, Tensor]) -> bool:
    return all(field in state for field in ARCHIVE_FIELDS)


def _check_archive_activation(state: Mapping[str, Tensor], quick_gelu: bool, path: Path) -> None:
    if _is_archive(state) and not quick_gelu:
        raise BackboneError(
            f"{path} is an OpenAI release (it has the fields {', '.join(ARCHIVE_FIELDS)}), trained with QuickGELU, but "
            "GELU was requested, which would silently lower accuracy. Omit quick_gelu, or use the tag openai."
        )


def _assemble(
    config: Config,
    state: Mapping[str, Tensor] | None,
    constants: Mapping[str, Any],
    quick_gelu: bool,
    name: str,
    pretrained: str,
    precision: str,
    image_size: int | None,
    *,
    source: str = "",
    trained_tokens: frozenset[int] | None = None,
) -> Backbone:
    """Build the network, load ``state`` (None: keep the seeded weights) and wrap it in a backbone."""
    config = config_of_size(config, image_size, name)
    model: Any = build_model(config, quick_gelu=quick_gelu, precision=precision)
    if state is not None:
        state = state if image_size is None else interpolated(model, state)
        load_weights(model, state, name=name, source=source or name)
    if image_size is not None and "timm_model_name" in config["vision_cfg"]:
        set_input_size(model, image_size, name)
    preprocess = Preprocess.from_config(constants, model.visual.image_size)
    tokenizer = clip_tokenizer(config)
    return Backbone(
        model,
        tokenizer,
        name=name,
        pretrained=pretrained,
        preprocess=preprocess,
        trained_tokens=trained_tokens,
        config={**config, "quick_gelu": quick_gelu},
        image_size=image_size,
    )


def shapes_only(name: str) -> Backbone:
    """Return a backbone of open_clip's architecture ``name`` with shapes but no values, to count parameters.

    Raises:
        BackboneError: open_clip has no such architecture.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise BackboneError(f"open_clip has no architecture {name!r}. See `vlprompt list backbones`.")
    with torch.device("meta"):
        model = build_model(config, quick_gelu=False, precision="fp32")
    return Backbone.from_open_clip(model, name=name)
