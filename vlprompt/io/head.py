"""Trained heads: a method with its learned tensors, saved so that any CLIP project can use them.

A head's folder holds ``head.safetensors`` (every learnable as ``learnable.<name>``, and ``class_weights`` ``[C, D]``)
and ``config.json`` (method, settings, class names, backbone, preprocessing, versions, how it was trained).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlprompt._files import file_checksum
from vlprompt._random import restored_random
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.errors import BackboneError, HeadError, VlpromptError
from vlprompt.io.head_files import CONFIG_FILE, SCHEMA, TENSOR_FILE, find_head, read_config, read_tensors
from vlprompt.methods import PromptMethod, create_method

_LEARNABLE = "learnable."


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
    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier ``[C, D]``: the transpose of open_clip's zero-shot weights.

        ``exp(logit_scale) * unit image features @ text_features().T`` are the head's logits. A mixture of prompts has
        class weights per image: give it raw image ``features`` ``[B, D]`` for its exact ``[B, C, D]``; without them it
        warns and returns the mean expert.
        """
        return self.method.text_features(features)

    @torch.no_grad()
    def zero_shot_classifier(self) -> Tensor:
        """Return the classifier ``[D, C]`` in the orientation of ``open_clip.build_zero_shot_classifier``.

        ``exp(logit_scale) * unit image features @ zero_shot_classifier()`` are the logits of a head with one text
        feature per class.
        """
        return self.method.zero_shot_classifier()

    def with_classes(self, class_names: Sequence[str]) -> Head:
        """Return the head with the same learned tensors for other classes.

        Raises:
            ClassNameError: The names cannot be used, or the learned tensors belong to the old classes.
        """
        return Head(self.method.with_classes(class_names), self.training_facts)

    def attach(self, model: nn.Module) -> nn.Module:
        """Return a copy of an open_clip ``model`` whose ``encode_image`` contains the head's image-side learnables.

        Raises:
            HeadError: The model's image tower is not the one the head was trained on, the head changes features behind
                it, or what it learned on the image side is not weights of the tower (image tokens, for instance).
        """
        if self.method.adapts_features:
            raise HeadError(
                f"{self.method.name} changes image features behind the tower, which no open_clip model can contain; "
                "score with the head itself: head(images)"
            )
        overrides = self.method.image_overrides()
        if self.method.learns_image_side and not overrides:
            raise HeadError(
                f"what {self.method.name} learned on the image side is not weights of the tower, so no open_clip model "
                "can hold it; classify with the head itself: head(images)"
            )
        other: Any = copy.deepcopy(model)
        own = self.backbone.model.visual.state_dict()
        theirs = other.visual.state_dict() if isinstance(getattr(other, "visual", None), nn.Module) else {}
        fix = "give the open_clip model the head was trained on"
        if own.keys() != theirs.keys() or any(own[name].shape != theirs[name].shape for name in own):
            raise HeadError(f"the model is no {self.backbone.name}; {fix}")
        if changed := [name for name in own if not _same_weights(own[name], theirs[name])]:
            raise HeadError(
                f"the model is a {self.backbone.name} with other weights ({len(changed)} of {len(own)} tensors differ, "
                f"first {changed[0]}); {fix}"
            )
        with torch.no_grad():
            for name, value in overrides.items():
                other.visual.get_parameter(name).copy_(value)
        attached: nn.Module = other
        return attached

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the head into ``folder`` (created; an older head in it is replaced whole) and return the folder.

        Raises:
            HeadError: The folder holds something else.
        """
        # The real place: a link to a head's folder stays a link, and "." has a name.
        folder = Path(os.path.realpath(folder))
        with _writing(folder):
            inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        strange = inside - {CONFIG_FILE, TENSOR_FILE}
        if folder.is_file() or strange:
            what = "is a file" if folder.is_file() else f"holds {', '.join(sorted(strange)[:3])}"
            raise HeadError(f"{folder} {what}; a head is saved into a new folder or over another head")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            weights = self.method.text_features()
        tensors = {_LEARNABLE + name: value for name, value in self.method.head_state().items()}
        tensors["class_weights"] = weights.detach().float().cpu().contiguous()
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", dir=folder.parent))
            try:
                save_file(tensors, staging / TENSOR_FILE)
                config = self._config() | {"tensors_sha256": file_checksum(staging / TENSOR_FILE)}
                text = json.dumps(config, indent=1, ensure_ascii=False)
                (staging / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
                os.chmod(staging, 0o755)
                _put(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _config(self) -> dict[str, Any]:
        method, backbone = self.method, self.backbone
        shown = ("vlprompt", "torch", "open_clip_torch", "pytorch-lightning", "safetensors")
        return {
            "schema": SCHEMA,
            "method": method.name,
            "settings": method.settings_dict(),
            "objectives": method.objective_settings,
            "decomposition": method.decomposition_settings,
            "class_names": method.class_names,
            "all_class_names": method.all_class_names,
            "backbone": backbone_facts(backbone),
            "preprocess": preprocess_facts(backbone),
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


def preprocess_facts(backbone: Backbone) -> dict[str, Any]:
    """Return the constants that a backbone's images need, as JSON has them."""
    facts: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(backbone.preprocess)))
    return facts


def load_head(folder: str | Path, backbone: Backbone | None = None, *, device: str = "cpu") -> Head:
    """Load a head that :meth:`Head.save_pretrained` wrote.

    Args:
        folder: The head's folder, or a run folder that holds ``head/``.
        backbone: The backbone it was trained on, if it is at hand; otherwise it is loaded by the name in the head.
        device: Where a backbone loaded here goes.

    Raises:
        HeadError: No head there, damaged or foreign files, tensors that do not fit, a backbone that cannot be loaded,
            or another one.
    """
    folder = find_head(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    facts = config["backbone"]
    if backbone is None:
        try:
            backbone = load_backbone(facts["name"], facts["pretrained"], precision=facts["precision"], device=device)
        except BackboneError as error:
            raise HeadError(
                f"the backbone of {folder} cannot be loaded by its name: {error}\n"
                "Where you hold it already, hand it over: load_head(folder, backbone)."
            ) from error
    _check_backbone(backbone, config, folder)
    try:
        names, everything = config["class_names"], config["all_class_names"]
        with restored_random():
            method = create_method(
                config["method"],
                backbone,
                names,
                all_class_names=everything,
                objectives=config.get("objectives", {}),
                decomposition=config.get("decomposition", {}),
                **config["settings"],
            )
        learned = {name.removeprefix(_LEARNABLE): t for name, t in tensors.items() if name.startswith(_LEARNABLE)}
        method.load_head_state(learned)
        _check_weights(tensors, method)
    except (VlpromptError, TypeError) as error:  # TypeError: a setting called like an argument
        raise HeadError(f"the head in {folder} cannot be rebuilt: {error}") from error
    return Head(method.to(backbone.device), config["training"])


def learned_tensors(folder: str | Path, backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the learned tensors of a saved head by name, and its configuration, for a method that starts from them.

    Raises:
        HeadError: No head there, damaged or foreign files, or one of another backbone.
    """
    folder = find_head(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    _check_backbone(backbone, config, folder)
    return {name.removeprefix(_LEARNABLE): t for name, t in tensors.items() if name.startswith(_LEARNABLE)}, config


def _check_backbone(backbone: Backbone, config: dict[str, Any], folder: Path) -> None:
    """Raise HeadError unless ``backbone`` has the weights, precision and image constants that ``config`` records."""
    facts, own = config["backbone"], backbone_facts(backbone)
    decisive = ("precision", "embed_dim", "fingerprint")
    names = own if any(own[key] != facts[key] for key in decisive) else ()
    differing = [f"{key}: {facts[key]!r} in the head, {own[key]!r} given" for key in names if own[key] != facts[key]]
    constants, recorded = preprocess_facts(backbone), config["preprocess"]
    for key in dict.fromkeys([*constants, *recorded]):
        if constants.get(key) != recorded.get(key):
            text = f"{str(recorded.get(key))[:60]} in the head, {constants.get(key)} given"
            differing.append(f"preprocess.{str(key)[:60]}: {text}")
    if differing:
        lines = "\n  ".join(differing[:12])
        raise HeadError(
            f"{folder} was trained on another backbone:\n  {lines}\nHand over the one it was trained on: "
            f"load_backbone({facts['name']!r}, {facts['pretrained']!r}, precision={facts['precision']!r})."
        )


def _check_weights(tensors: dict[str, Tensor], method: PromptMethod) -> None:
    """Raise HeadError unless ``tensors`` are what ``method`` keeps, finite, and nothing but that and class weights.

    Methods keep float32, but for what they pack.
    """
    expected = [len(method.class_names), method.class_dim]
    wrong = [f"{name}: unknown" for name in tensors if name != "class_weights" and not name.startswith(_LEARNABLE)]
    if "class_weights" not in tensors:
        wrong.append("class_weights: missing")
    elif list(tensors["class_weights"].shape) != expected:
        wrong.append(f"class_weights: shape {list(tensors['class_weights'].shape)}, expected {expected}")
    types = {_LEARNABLE + name: value.dtype for name, value in method.head_state().items()}
    for name, tensor in tensors.items():
        if tensor.dtype != types.get(name, torch.float32):
            wrong.append(f"{name}: {tensor.dtype}, expected {types.get(name, torch.float32)}")
        elif not bool(tensor.isfinite().all()):
            wrong.append(f"{name}: holds values that are not finite")
    if wrong:
        raise HeadError(f"{TENSOR_FILE} holds what no head has:\n  " + "\n  ".join(wrong[:12]))


def _same_weights(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same weights, in whatever precision each is kept."""
    return torch.allclose(own.float().cpu(), other.float().cpu(), rtol=2**-7, atol=1e-4)  # bfloat16 keeps 8 bits


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of what goes wrong with the disk which head was being saved."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HeadError(f"the head cannot be saved in {folder}: {reason}; what was there is unchanged") from error


def _put(staging: Path, folder: Path) -> None:
    """Make ``staging`` the content of ``folder``; until the last step the older head stays whole."""
    if not (folder / CONFIG_FILE).is_file():
        # No older head. The folder may be somebody's current one, so it is filled rather than replaced.
        folder.mkdir(exist_ok=True)
        for name in (TENSOR_FILE, CONFIG_FILE):  # the configuration last: without it nothing is taken for a head
            os.replace(staging / name, folder / name)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.older-", dir=folder.parent))
    try:
        os.rename(folder, older)
        try:
            os.replace(staging, folder)
        except BaseException:
            os.rename(older, folder)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(older)  # empty, unless the older head could not be put back: then it stays here
        raise
    shutil.rmtree(older, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["Head", "backbone_facts", "find_head", "learned_tensors", "load_head", "read_config"]
