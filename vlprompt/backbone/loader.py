"""``load_backbone``: a name and the weights it stands for, or one screen that says how to put it right."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbone.architecture import (
    ARCHIVE_FIELDS,
    Config,
    build_model,
    check_precision,
    check_text,
    config_from_shapes,
    registered_config,
    text_problem,
)
from vlprompt.backbone.backbone import Backbone, Preprocess, checked_device, clip_tokenizer
from vlprompt.backbone.demo import DEMOS, read_demo
from vlprompt.backbone.fetch import CONFIG_FILE, WEIGHT_FILES, find_or_fetch, find_or_fetch_repo, published
from vlprompt.backbone.weights import load_weights, read_weights
from vlprompt.errors import BackboneError, bulleted, did_you_mean, nearest

FROM_FILE = "from-file"

_CONSTANTS = ("mean", "std", "interpolation", "resize_mode")
_WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")


def load_backbone(
    name: str = "ViT-B-16",
    pretrained: str | os.PathLike[str] | None = "openai",
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    quick_gelu: bool | None = None,
) -> Backbone:
    """Load a frozen CLIP.

    Args:
        name: An architecture of open_clip (``ViT-B-16``; ``list_backbones()`` shows all that can be served);
            ``local-dir:FOLDER`` with ``open_clip_config.json`` and weights; ``hf-hub:ORG/REPO``; ``from-file``: an
            OpenAI-format file whose shapes tell the architecture; ``demo`` and ``demo-rn``: the small CLIPs inside
            the package, with a ViT and with a ResNet.
        pretrained: A tag (``openai``, ``laion2b_s34b_b88k``); the path of a safetensors or torch file; ``TAG=PATH``, a
            file with the weights of that tag; ``random``: weights that a fixed seed determines. Names that bring their
            own weights (``demo``, ``local-dir:``, ``hf-hub:``) leave it at its default.
        precision: ``fp32``, ``fp16`` or ``bf16``: the type of matrices and activations. Prompts and features stay
            float32.
        device: Where it runs.
        quick_gelu: The activation, for a file that does not tell it. None: what the tag, the folder's configuration,
            the name (``ViT-B-16-quickgelu``) or OpenAI's archive fields say; never the opposite of what they say.

    Returns:
        The backbone, in evaluation mode, without gradients.

    Raises:
        BackboneError: Everything that a user can put right; the text says how.
    """
    check_precision(precision)
    where = checked_device(device)
    pretrained = os.fspath(pretrained) if pretrained is not None else None
    if name in DEMOS:
        backbone = _demo(name, pretrained, precision, quick_gelu)
    elif name.startswith(("local-dir:", "hf-hub:")):
        backbone = _from_folder(name, pretrained, precision, quick_gelu)
    elif name == FROM_FILE:
        backbone = _from_shapes(pretrained, precision, quick_gelu)
    else:
        backbone = _registered(name, pretrained, precision, quick_gelu)
    return backbone.to(where)


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the packaged ``demo`` networks and the ``NAME/TAG`` pairs that can be served and match ``pattern``.

    ``*`` and ``?`` are wildcards; case makes no difference.
    """
    from open_clip.pretrained import list_pretrained

    served = set(_served_names())
    pairs = [*DEMOS, *(f"{name}/{tag}" for name, tag in list_pretrained() if name in served)]
    return [pair for pair in pairs if fnmatch.fnmatchcase(pair.lower(), pattern.lower())]


def _served_names() -> list[str]:
    import open_clip

    return [name for name in open_clip.list_models() if not text_problem(registered_config(name) or {})]


# -- open_clip's architectures ----------------------------------------------------------------------------------------
def _registered(name: str, pretrained: str | None, precision: str, quick_gelu: bool | None) -> Backbone:
    config = registered_config(name)
    if config is None:
        raise BackboneError(_unknown_name(name))
    name = name.replace("/", "-")
    check_text(config, name)
    if not pretrained:
        raise BackboneError(
            f"{name} needs weights, and pretrained is {pretrained!r}; random ones come only when asked for.\n"
            f"Accepted by --backbone.pretrained: {_tags_of(name)}, the path of a file, or random."
        )
    if pretrained == "random":
        if name.endswith("-quickgelu"):
            _agree(quick_gelu, True, f"networks called {name}")
        active = bool(config.get("quick_gelu", False)) if quick_gelu is None else quick_gelu
        return _assembled(config, None, _agreed(name, active) or {}, active, name, pretrained, precision)
    tag, path = _tag_and_path(name, pretrained)
    entry = _entry(name, tag) if tag else None
    if entry is None:
        return _registered_file(name, config, Path(pretrained).expanduser(), precision, quick_gelu)
    trained_with = bool(entry.get("quick_gelu", False))
    _agree(quick_gelu, trained_with, f"the weights {tag!r} of {name}")
    path = path or find_or_fetch(published(name, str(tag), entry))
    state = read_weights(path)
    _agree_archive(state, trained_with, path)
    return _assembled(config, state, entry, trained_with, name, str(tag), precision, source=str(path))


def _registered_file(name: str, config: Config, path: Path, precision: str, quick_gelu: bool | None) -> Backbone:
    """A bare file: what its tensors cannot tell comes from beside it, or has to be said."""
    state = read_weights(path)
    beside = _folder_config(path.parent) if (path.parent / CONFIG_FILE).is_file() else None
    claims = {
        "the argument quick_gelu": quick_gelu,
        f"{CONFIG_FILE} beside the file": beside["model_cfg"].get("quick_gelu") if beside else None,
        "the name": True if name.endswith("-quickgelu") else None,
        "the file's own fields (OpenAI's archive)": True if _is_archive(state) else None,
    }
    said = {who: bool(value) for who, value in claims.items() if value is not None}
    if len(set(said.values())) > 1:
        lines = [f"{who}: {'QuickGELU' if value else 'GELU'}" for who, value in said.items()]
        raise BackboneError(f"the activation of {path} is said in two ways:\n{bulleted(lines)}\nLeave one of them out.")
    active = next(iter(said.values()), None)
    constants = beside.get("preprocess_cfg", {}) if beside else _agreed(name, active)
    if active is None or constants is None:
        what = "whether they were trained with QuickGELU or GELU"
        if active is not None:
            what = "which image constants they need (its published weights differ in them)"
        raise BackboneError(
            f"{path} holds weights of {name}, but not {what}, and the wrong choice would lower accuracy silently.\n"
            f"Say which published weights they are: --backbone.pretrained openai={path} ({_tags_of(name)}).\n"
            f"For weights of your own, put their {CONFIG_FILE} beside the file"
            + (", or say quick_gelu (True: OpenAI's activation)." if active is None else ".")
        )
    return _assembled(config, state, constants, active, name, str(path), precision, source=str(path))


def _tag_and_path(name: str, pretrained: str) -> tuple[str | None, Path | None]:
    """Split ``pretrained`` into a tag and a file; ``(None, None)`` where it is a bare path.

    Raises:
        BackboneError: Neither a tag of ``name`` nor anything that looks like a path.
    """
    pair = re.fullmatch(r"([\w.-]+)=(.+)", pretrained)
    if pair and _entry(name, pair[1]):
        return _clean(pair[1]), Path(pair[2]).expanduser()
    tag = pair[1] if pair and not Path(pretrained).exists() else pretrained
    if _entry(name, pretrained):
        return _clean(pretrained), None
    path = Path(pretrained).expanduser()
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
        "given as pretrained) are names too."
    )


def _entry(name: str, tag: str) -> dict[str, Any] | None:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(name, tag) or None


def _clean(tag: str) -> str:
    return tag.lower().replace("-", "_")  # open_clip's own spelling of tags


def _tags_of(name: str) -> str:
    from open_clip.pretrained import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    return f"tags of {name}: " + ", ".join(tags) if tags else f"{name} has no published tags"


def _agreed(name: str, quick_gelu: bool | None) -> dict[str, Any] | None:
    """The image constants on which all published weights of ``name`` with that activation agree; None: they differ.

    Without any published weights they are OpenAI's, as in open_clip.
    """
    from open_clip.pretrained import list_pretrained_tags_by_model

    entries = [_entry(name, tag) or {} for tag in list_pretrained_tags_by_model(name)]
    same = [entry for entry in entries if bool(entry.get("quick_gelu", False)) == quick_gelu] or entries
    found = [{key: entry[key] for key in _CONSTANTS if key in entry} for entry in same]
    if any(constants != found[0] for constants in found):
        return None
    return found[0] if found else {}


# -- names that bring their own weights -------------------------------------------------------------------------------
def _from_folder(name: str, pretrained: str | None, precision: str, quick_gelu: bool | None) -> Backbone:
    kind, _, place = name.partition(":")
    if kind == "hf-hub":
        config_path, weights = find_or_fetch_repo(place)
        folder = config_path.parent
    else:
        folder = Path(place).expanduser()
        if not place or not folder.is_dir():
            raise BackboneError(f"{name}: there is no folder {str(folder)!r}; give one with {CONFIG_FILE} and weights")
        weights = _weights_in(folder) if pretrained != "random" else folder
    if pretrained != weights.name:  # the file's name is how the backbone calls its weights, in saved heads too
        _own_weights(name, pretrained, "random")
    settings = _folder_config(folder)
    config = settings["model_cfg"]
    check_text(config, name)
    stated = config.get("quick_gelu")
    if stated is not None:
        _agree(quick_gelu, bool(stated), f"the weights of {folder / CONFIG_FILE}")
    active = bool(stated if stated is not None else quick_gelu)
    if pretrained == "random":
        return _assembled(config, None, settings["preprocess_cfg"], active, name, pretrained, precision)
    state = read_weights(weights)
    if stated is None and quick_gelu is None and _is_archive(state):
        active = True
    _agree_archive(state, active, weights)
    constants, source = settings["preprocess_cfg"], str(weights)
    return _assembled(config, state, constants, active, name, weights.name, precision, source=source)


def _weights_in(folder: Path) -> Path:
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    safe = [path for path in found if path.suffix == ".safetensors"] or found
    if len(safe) != 1:
        said = (
            "holds several weight files: " + ", ".join(path.name for path in safe[:5]) if safe else "holds no weights"
        )
        raise BackboneError(f"local-dir:{folder} {said}; expected one, best named {WEIGHT_FILES[0]}")
    return safe[0]


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BackboneError(f"{folder} has no {CONFIG_FILE}, which says what the weights are (model_cfg)") from None
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} is not JSON: {error}") from None
    return _checked_settings(settings, path)


def _checked_settings(settings: Any, path: Path) -> dict[str, Any]:
    model = settings.get("model_cfg") if isinstance(settings, dict) else None
    parts = ("vision_cfg", "text_cfg")
    if (
        not isinstance(model, dict)
        or "embed_dim" not in model
        or any(not isinstance(model.get(p), dict) for p in parts)
    ):
        raise BackboneError(f"{path} lacks model_cfg with embed_dim, vision_cfg and text_cfg, as open_clip writes it")
    constants = settings.get("preprocess_cfg") or {}
    if not isinstance(constants, dict):
        raise BackboneError(f"{path}: preprocess_cfg is a {type(constants).__name__}, not a table of constants")
    return {"model_cfg": model, "preprocess_cfg": constants}


def _from_shapes(pretrained: str | None, precision: str, quick_gelu: bool | None) -> Backbone:
    if not pretrained or pretrained in ("openai", "random"):
        raise BackboneError(
            f"{FROM_FILE} needs a file, and pretrained is {pretrained!r}; use --backbone.pretrained /path/to/weights.pt"
        )
    path = Path(pretrained).expanduser()
    state = read_weights(path)
    _agree_archive(state, quick_gelu is not False, path)
    config = config_from_shapes(state, str(path))
    # This layout is OpenAI's, and so is its activation unless the caller knows better.
    return _assembled(config, state, {}, quick_gelu is not False, FROM_FILE, str(path), precision, source=str(path))


def _demo(name: str, pretrained: str | None, precision: str, quick_gelu: bool | None) -> Backbone:
    _own_weights(name, pretrained, name)
    settings, state, token_ids = read_demo(name)
    settings = _checked_settings(settings, Path(f"{name}.json"))
    config = settings["model_cfg"]
    active = bool(config["quick_gelu"])
    _agree(quick_gelu, active, "the demo weights")
    constants, trained = settings["preprocess_cfg"], frozenset(token_ids.tolist())
    return _assembled(config, state, constants, active, name, name, precision, trained_tokens=trained)


def _own_weights(name: str, pretrained: str | None, other: str) -> None:
    if pretrained not in (None, "openai", other):
        raise BackboneError(
            f"{name} brings its own weights, and pretrained is {pretrained!r}; leave it out"
            + (", or say random." if other == "random" else f", or say {other}.")
        )


# -- activation, assembly ---------------------------------------------------------------------------------------------
def _agree(wanted: bool | None, trained_with: bool, what: str) -> None:
    if wanted is not None and wanted != trained_with:
        told = {True: "QuickGELU", False: "GELU"}
        raise BackboneError(
            f"quick_gelu={wanted} was asked for, but {what} use {told[trained_with]}; with {told[wanted]} accuracy "
            "would fall silently. Leave quick_gelu out."
        )


def _is_archive(state: Mapping[str, Tensor]) -> bool:
    return all(field in state for field in ARCHIVE_FIELDS)


def _agree_archive(state: Mapping[str, Tensor], quick_gelu: bool, path: Path) -> None:
    if _is_archive(state) and not quick_gelu:
        raise BackboneError(
            f"{path} is an OpenAI release (it has the fields {', '.join(ARCHIVE_FIELDS)}), trained with QuickGELU, and "
            "GELU was asked for; accuracy would fall silently. Leave quick_gelu out, or name the tag openai."
        )


def _assembled(
    config: Config,
    state: Mapping[str, Tensor] | None,
    constants: Mapping[str, Any],
    quick_gelu: bool,
    name: str,
    pretrained: str,
    precision: str,
    *,
    source: str = "",
    trained_tokens: frozenset[int] | None = None,
) -> Backbone:
    """Build the network, fill it (or leave the seeded weights), and put the backbone around it."""
    model: Any = build_model(config, quick_gelu=quick_gelu, precision=precision)
    if state is not None:
        load_weights(model, state, name=name, source=source or name)
    preprocess = Preprocess.from_config(constants, model.visual.image_size)
    tokenizer = clip_tokenizer(config)
    return Backbone(
        model, tokenizer, name=name, pretrained=pretrained, preprocess=preprocess, trained_tokens=trained_tokens
    )


def shapes_only(name: str) -> Backbone:
    """Return a backbone of open_clip's architecture ``name`` that has shapes and no numbers: to count learnables with.

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
