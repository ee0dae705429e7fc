"""Trained heads: a method with its learned tensors, saved so that any CLIP project can use them.

A head's folder holds ``head.safetensors`` (every learnable as ``learnable.<name>``, and ``class_weights`` ``[C, D]``)
and ``config.json`` (method, settings, class names, backbone, preprocessing, versions, how it was trained).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlprompt.backbone import Backbone, load_backbone
from vlprompt.errors import HeadError, VlpromptError
from vlprompt.methods import PromptMethod, create_method

SCHEMA = 1
CONFIG_FILE, TENSOR_FILE = "config.json", "head.safetensors"
_LEARNABLE = "learnable."
_KEYS = {
    "schema": int,
    "method": str,
    "settings": dict,
    "class_names": list,
    "all_class_names": list,
    "backbone": dict,
    "preprocess": dict,
    "training": dict,
    "versions": dict,
    "tensors_sha256": str,
}
_MAX_CONFIG_BYTES = 16 << 20


class Head(nn.Module):
    """A trained method, ready to classify: ``head(images)`` gives logits ``[B, C]``.

    Args:
        method: The method with its learned tensors.
        training: How it was trained, in plain values (kept in ``config.json``).
    """

    def __init__(self, method: PromptMethod, training: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.method = method.eval()
        self.training_facts = dict(training or {})

    @property
    def class_names(self) -> list[str]:
        """The C classes, in the order of the logits."""
        return self.method.class_names

    @property
    def backbone(self) -> Backbone:
        """The frozen CLIP underneath."""
        return self.method.backbone

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of normalised images ``[B, 3, H, W]``, or of raw image features ``[B, D]``."""
        logits: Tensor = self.method(images)
        return logits

    @torch.no_grad()
    def class_weights(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier ``[C, D]``: the transpose of open_clip's zero-shot weights.

        ``exp(logit_scale) * unit image features @ class_weights().T`` are the head's logits. A mixture of prompts has
        class weights per image: give it raw image ``features`` ``[B, D]`` for its exact ``[B, C, D]``; without them it
        warns and returns the mean expert.
        """
        return self.method.class_weights(features)

    def with_classes(self, class_names: Sequence[str]) -> Head:
        """Return the head with the same learned tensors for other classes.

        Raises:
            ClassNameError: The names cannot be used, or the learned tensors belong to the old classes.
        """
        return Head(self.method.with_classes(class_names), self.training_facts)

    def attach(self, model: nn.Module) -> nn.Module:
        """Return a copy of an open_clip ``model`` whose ``encode_image`` contains the head's image-side learnables.

        Raises:
            HeadError: The model's image tower is not the one the head was trained on.
        """
        other: Any = copy.deepcopy(model)
        own = self.backbone.model.visual.state_dict()
        theirs = other.visual.state_dict()
        if own.keys() != theirs.keys() or any(own[name].shape != theirs[name].shape for name in own):
            raise HeadError(f"the model is no {self.backbone.name}; give the open_clip model the head was trained on")
        with torch.no_grad():
            for name, value in self.method.image_overrides().items():
                other.visual.get_parameter(name).copy_(value)
        attached: nn.Module = other
        return attached

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the head into ``folder`` (created; an older head in it is replaced whole) and return the folder.

        Raises:
            HeadError: The folder holds something else.
        """
        folder = Path(folder)
        inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        strange = inside - {CONFIG_FILE, TENSOR_FILE}
        if folder.is_file() or strange:
            what = "is a file" if folder.is_file() else f"holds {', '.join(sorted(strange)[:3])}"
            raise HeadError(f"{folder} {what}; a head is saved into a new folder or over another head")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            weights = self.method.class_weights()
        tensors = {_LEARNABLE + name: value for name, value in self.method.learnable_state().items()}
        tensors["class_weights"] = weights.detach().float().cpu().contiguous()
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(tensors, staging / TENSOR_FILE)
            config = self._config() | {"tensors_sha256": _sha256(staging / TENSOR_FILE)}
            text = json.dumps(config, indent=1, ensure_ascii=False)
            (staging / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            os.chmod(staging, 0o755)
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _config(self) -> dict[str, Any]:
        method, backbone = self.method, self.backbone
        shown = ("vlprompt", "torch", "open_clip_torch", "pytorch-lightning", "safetensors")
        preprocess = {name: getattr(backbone.preprocess, name) for name in ("size", "mean", "std", "interpolation")}
        return {
            "schema": SCHEMA,
            "method": method.name,
            "settings": method.settings_dict(),
            "class_names": method.class_names,
            "all_class_names": method.all_class_names,
            "backbone": backbone_facts(backbone),
            "preprocess": preprocess,
            "training": self.training_facts,
            "versions": {name: _version(name) for name in shown},
        }


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """Return what identifies a backbone: name, weights, precision, sizes and the checksum of its weights."""
    return {
        "name": backbone.name,
        "pretrained": backbone.pretrained,
        "precision": backbone.precision,
        "embed_dim": backbone.embed_dim,
        "fingerprint": backbone.fingerprint,
    }


def load_head(folder: str | Path, backbone: Backbone | None = None, *, device: str = "cpu") -> Head:
    """Load a head that :meth:`Head.save_pretrained` wrote.

    Args:
        folder: The head's folder, or a run folder that holds ``head/``.
        backbone: The backbone it was trained on, if it is at hand; otherwise it is loaded by the name in the head.
        device: Where a backbone loaded here goes.

    Raises:
        HeadError: No head there, damaged or foreign files, tensors that do not fit, or another backbone.
        BackboneError: The backbone cannot be loaded.
    """
    folder = find_head(folder)
    config = read_config(folder)
    tensors = _read_tensors(folder, config)
    facts = config["backbone"]
    if backbone is None:
        backbone = load_backbone(facts["name"], facts["pretrained"], precision=facts["precision"], device=device)
    own = backbone_facts(backbone)
    differing = [f"{key}: {facts[key]!r} in the head, {own[key]!r} given" for key in own if own[key] != facts.get(key)]
    if own["fingerprint"] != facts["fingerprint"] or own["precision"] != facts["precision"]:
        lines = "\n  ".join(differing)
        raise HeadError(
            f"{folder} was trained on another backbone:\n  {lines}\n"
            f"Load it with load_backbone({facts['name']!r}, {facts['pretrained']!r}, precision={facts['precision']!r})."
        )
    try:
        names, everything = config["class_names"], config["all_class_names"]
        with torch.random.fork_rng(devices=[]):
            method = create_method(config["method"], backbone, names, all_class_names=everything, **config["settings"])
        learned = {name.removeprefix(_LEARNABLE): t for name, t in tensors.items() if name.startswith(_LEARNABLE)}
        method.load_learnable_state(learned)
    except (VlpromptError, TypeError) as error:
        raise HeadError(f"the head in {folder} cannot be rebuilt: {error}") from error
    return Head(method.to(backbone.device), config["training"])


def find_head(folder: str | Path) -> Path:
    """Return the folder that holds ``config.json`` and ``head.safetensors``: ``folder`` or its ``head/``.

    Raises:
        HeadError: Neither holds a head.
    """
    folder = Path(folder)
    for place in (folder, folder / "head"):
        if (place / CONFIG_FILE).is_file() and (place / TENSOR_FILE).is_file():
            return place
    if not folder.exists():
        raise HeadError(f"there is no folder {folder}. Train a head first: vlprompt train --config mocoop/demo.yaml")
    raise HeadError(
        f"{folder} holds no head: looked for {CONFIG_FILE} and {TENSOR_FILE} in it and in {folder / 'head'}. "
        "An unfinished run has none yet; run its train command again to finish it."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked ``config.json`` of a head.

    Raises:
        HeadError: Not JSON, keys missing or unknown, values of another type, or a newer schema.
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise HeadError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MB; this is not a head's configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise HeadError(f"{path} holds a {type(config).__name__}; expected an object")
    schema = config.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise HeadError(f"{path} has schema {schema}; this vlprompt reads up to {SCHEMA}. Run: pip install -U vlprompt")
    wrong = [f"{key} is missing" for key in _KEYS if key not in config]
    wrong += [f"{key} is unknown" for key in config if key not in _KEYS]
    for key, kind in _KEYS.items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            wrong.append(f"{key} is {str(config[key])[:40]!r}; expected {kind.__name__}")
    facts = config.get("backbone")
    expected = {"name": str, "pretrained": str, "precision": str, "embed_dim": int, "fingerprint": str}
    if isinstance(facts, dict):
        missing = [(key, kind) for key, kind in expected.items() if not isinstance(facts.get(key), kind)]
        wrong += [f"backbone.{key} is missing or no {kind.__name__}" for key, kind in missing]
    if wrong:
        raise HeadError(f"{path} is not a head's configuration:\n  " + "\n  ".join(wrong[:20]))
    return config


def _read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    if (found := _sha256(path)) != config["tensors_sha256"]:
        raise HeadError(
            f"{path} is damaged or belongs to another head: its SHA-256 is {found[:12]}..., "
            f"{CONFIG_FILE} says {config['tensors_sha256'][:12]}... Save or copy the whole folder again."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise HeadError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["Head", "backbone_facts", "find_head", "load_head", "read_config"]
