"""Trained heads: a method with its learned tensors, saved in a form that any CLIP project can read.

A head's folder holds ``head.safetensors`` (every learned tensor as ``learnable.<name>``, and the classifier
``class_weights`` ``[C, D]``) and ``config.json`` (method, settings, class names, backbone, preprocessing, versions,
training).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlprompt._files import file_checksum, parse_json, replacing, write_json
from vlprompt._finite import check_finite
from vlprompt._random import restored_random
from vlprompt._shapes import check_shape
from vlprompt.backbone import Backbone, load_backbone
from vlprompt.backbone.backbone import ResizeMode
from vlprompt.config.keys import as_plain
from vlprompt.config.types import make
from vlprompt.errors import BackboneError, HeadError, VlpromptError
from vlprompt.io.head_files import CONFIG_FILE, SCHEMA, TENSOR_FILE, HeadConfig, find_head, read_config, read_tensors
from vlprompt.methods import PromptMethod, create_method

_LEARNABLE = "learnable."
_SAME_MODEL = "pass the open_clip model that the head was trained on"
_SAME_COSINE = 0.999
"""Least cosine of a class weight with that of the learned tensors on another device; precisions are equal."""


class Head(nn.Module):
    """A trained method that classifies: ``head(images)`` returns logits ``[B, C]``.

    Args:
        method: The method with its learned tensors.
        training: Facts about the training, in plain values; saved in ``config.json``.
    """

    def __init__(self, method: PromptMethod, training: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.method = method.eval()
        self.training_facts = dict(training or {})

    @property
    def class_names(self) -> list[str]:
        """The C class names, in the order of the logits."""
        return self.method.class_names

    @property
    def backbone(self) -> Backbone:
        """The frozen CLIP of the method."""
        return self.method.backbone

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of normalised images ``[B, 3, H, W]``, or of raw image features ``[B, D]``.

        Raises:
            DataError: Inputs of another shape, or that are no floats.
        """
        logits: Tensor = self.method(images)
        return logits

    @torch.no_grad()
    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Return the classifier ``[C, D]``: the transpose of open_clip's zero-shot weights.

        ``exp(logit_scale) * unit image features @ text_features().T`` are the head's logits. A mixture of prompts has
        one classifier per image: raw image ``features`` ``[B, D]`` give ``[B, C, D]``; without them it warns and
        returns the mean expert.

        Raises:
            DataError: Features of another shape, or that are no floats.
        """
        if features is not None:
            check_shape(features, "image features", ("B", self.backbone.embed_dim))
        return self.method.text_features(features)

    def class_weights(self, features: Tensor | None = None) -> Tensor:
        """Return :meth:`text_features`, under its former name; deprecated."""
        warnings.warn("class_weights() is called text_features() now", DeprecationWarning, stacklevel=2)
        return self.text_features(features)

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
            ClassNameError: The names are not usable, or the learned tensors are specific to the old classes.
        """
        return Head(self.method.with_classes(class_names), self.training_facts)

    def attach(self, model: nn.Module) -> nn.Module:
        """Return a copy of an open_clip ``model`` with the head's tuned weights in both towers.

        Prompts and caches are no weights of a tower. If the head has learned any besides the image tower, a warning
        says so, and the copy is scored with :meth:`zero_shot_classifier` or :meth:`text_features`.

        Raises:
            HeadError: A tower of the model differs from the head's, the head changes image features after the tower,
                or its learned tensors on the image side are not weights of the tower (e.g. image tokens).
        """
        method = self.method
        if method.adapts_features:
            raise HeadError(
                f"{method.name} changes image features after the tower, which an open_clip model cannot hold; "
                "use the head itself: head(images)"
            )
        image, text = method.image_overrides(), method.text_overrides()
        if method.needs.images and not image and not text:
            raise HeadError(
                f"the image-side parameters of {method.name} are not weights of the tower, so an open_clip "
                "model cannot hold them; use the head itself: head(images)"
            )
        other: Any = copy.deepcopy(model)
        visual = getattr(other, "visual", None)
        if not isinstance(visual, nn.Module):
            raise HeadError(f"the model is not {self.backbone.name}; {_SAME_MODEL}")
        towers = [(self.backbone.model.visual, visual, image)]
        if text:
            towers.append((self.backbone.text.model, getattr(other, "text", other), text))
        for ours, theirs, _ in towers:
            self._check_same(ours.state_dict(), theirs.state_dict())
        with torch.no_grad():
            for _, theirs, overrides in towers:
                for name, value in overrides.items():
                    theirs.get_parameter(name).copy_(value)
        if not method.in_towers:
            warnings.warn(
                f"an open_clip model holds no prompts or caches: what {method.name} learned besides weights of the "
                "image tower is not in it, and its own encode_text is that of the frozen model. Classify with "
                "head.zero_shot_classifier() or head(images)",
                stacklevel=2,
            )
        attached: nn.Module = other
        return attached

    def _check_same(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Raise HeadError unless two towers have the same weights."""
        name = self.backbone.name
        if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
            raise HeadError(f"the model is not {name}; {_SAME_MODEL}")
        if changed := [key for key in ours if not _same_weights(ours[key], theirs[key])]:
            raise HeadError(
                f"the model is {name} with other weights ({len(changed)} of {len(ours)} tensors differ, first "
                f"{changed[0]}); {_SAME_MODEL}"
            )

    def save_open_clip(self, folder: str | Path) -> Path:
        """Write a whole CLIP with the head's weights merged into a new ``folder``, and return the folder.

        It holds ``open_clip_config.json`` and ``open_clip_model.safetensors``, so that open_clip and vlprompt load it
        as ``local-dir:FOLDER``. Its cosines with the head's template are those of the head.

        Raises:
            HeadError: What the head learned is not all in the weights of the towers, the architecture of the backbone
                is not known, or the folder exists or cannot be written.
        """
        method, backbone, folder = self.method, self.backbone, Path(os.path.realpath(folder))
        if not method.in_towers:
            raise HeadError(
                f"{method.name} learns prompts or caches, which an open_clip model cannot hold; accepted: heads whose "
                "towers were changed, such as clip_lora, ramt and visual_prompt. Save the head itself: "
                "head.save_pretrained(FOLDER)"
            )
        if backbone.config is None:
            raise HeadError(
                f"{backbone.name} was made from a model in memory, whose architecture is not recorded; load it by "
                "name: load_head(RUN), or load_backbone(NAME)"
            )
        if folder.exists():
            raise HeadError(f"{folder} exists; choose a new folder")
        model = self.attach(backbone.model)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        constants = {name: value for name, value in preprocess_facts(backbone).items() if name != "size"}
        config = {"model_cfg": backbone.config, "preprocess_cfg": constants}
        with _writing(folder):
            folder.mkdir(parents=True)
            with replacing(folder / "open_clip_model.safetensors") as temporary:
                save_file(tensors, temporary)
            write_json(folder / "open_clip_config.json", config)
        return folder

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the head into ``folder``, replacing an older head atomically, and return the folder.

        Raises:
            HeadError: The folder holds other files, or cannot be written.
            NotFiniteError: A learned tensor is not finite; what was there is unchanged.
        """
        # Resolved, so that a link to a head's folder remains a link and "." has a name.
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
        # RAMT's head holds the signs of its learned scores, so the scores are checked, too.
        learned = tensors | {_LEARNABLE + name: value for name, value in self.method.trained_state().items()}
        check_finite(learned, f"training {self.method.name}", f"No head was saved in {folder}.")
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = folder.parent / f".{folder.name[:100]}.{secrets.token_hex(8)}"
            staging.mkdir()  # its permissions follow the umask, unlike those of tempfile
            try:
                with replacing(staging / TENSOR_FILE) as temporary:
                    save_file(tensors, temporary)
                config = as_plain(self._config(file_checksum(staging / TENSOR_FILE)))
                text = json.dumps(config, indent=1, ensure_ascii=False)
                (staging / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
                _replace_folder(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _config(self, tensors_sha256: str) -> HeadConfig:
        method, backbone = self.method, self.backbone
        shown = ("vlprompt", "torch", "open_clip_torch", "pytorch-lightning", "safetensors")
        values = {
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
            "tensors_sha256": tensors_sha256,
        }
        return make(HeadConfig, values)


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """Return the identity of a backbone: name, weights, precision, embedding size and checksum of its weights.

    A requested image size is part of it.
    """
    return {
        "name": backbone.name,
        "pretrained": backbone.pretrained,
        "precision": backbone.precision,
        "embed_dim": backbone.embed_dim,
        "fingerprint": backbone.fingerprint,
        **({} if backbone.image_size is None else {"image_size": backbone.image_size}),
    }


def preprocess_facts(backbone: Backbone) -> dict[str, Any]:
    """Return the preprocessing constants of a backbone as JSON values."""
    facts: dict[str, Any] = parse_json(json.dumps(dataclasses.asdict(backbone.preprocess)))
    if not facts["fill_color"]:  # older heads do not have it
        del facts["fill_color"]
    return facts


def load_head(folder: str | Path, backbone: Backbone | None = None, *, device: str = "cpu") -> Head:
    """Load a head written by :meth:`Head.save_pretrained`.

    Args:
        folder: The head's folder, or a run folder that holds ``head/``.
        backbone: The backbone the head was trained on; None: it is loaded by its recorded name.
        device: Device of a backbone loaded here.

    Raises:
        HeadError: There is no head, its files are damaged or foreign, its tensors do not match, or its backbone cannot
            be loaded or is another one.
    """
    folder = find_head(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    facts = config.backbone
    if backbone is None:
        try:
            backbone = load_backbone(
                facts.name,
                facts.pretrained,
                precision=facts.precision,
                device=device,
                image_size=facts.image_size,
            )
        except BackboneError as error:
            raise HeadError(
                f"the backbone of {folder} cannot be loaded by its name: {error}\n"
                "If its weights are in another place, give it: --backbone.name, --backbone.pretrained. If you have it "
                "in memory, pass it: load_head(folder, backbone)."
            ) from error
    backbone = _with_transform(backbone, config)
    _check_backbone(backbone, config, folder)
    try:
        with restored_random():
            method = create_method(
                config.method,
                backbone,
                config.class_names,
                all_class_names=config.all_class_names,
                objectives=config.objectives,
                decomposition=config.decomposition,
                **config.settings,
            )
        learned = {name.removeprefix(_LEARNABLE): t for name, t in tensors.items() if name.startswith(_LEARNABLE)}
        method.load_head_state(learned)
        method = method.to(backbone.device).eval()
        _check_weights(tensors, method)
    except (VlpromptError, TypeError) as error:  # TypeError: a setting with the name of an argument
        raise HeadError(f"the head in {folder} cannot be rebuilt: {error}") from error
    return Head(method, config.training)


def learned_tensors(folder: str | Path, backbone: Backbone) -> tuple[dict[str, Tensor], HeadConfig]:
    """Return the learned tensors of a saved head by name, and its configuration, to initialise another method.

    Raises:
        HeadError: There is no head, its files are damaged or foreign, or it has another backbone.
    """
    folder = find_head(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    _check_backbone(backbone, config, folder)
    return {name.removeprefix(_LEARNABLE): t for name, t in tensors.items() if name.startswith(_LEARNABLE)}, config


def _with_transform(backbone: Backbone, config: HeadConfig) -> Backbone:
    """Return ``backbone`` with images that become square as at the training of the head (``pad``, ``squash``)."""
    mode: Any = config.preprocess.get("resize_mode")
    return backbone.resizing(mode) if mode in get_args(ResizeMode) else backbone


def _check_backbone(backbone: Backbone, config: HeadConfig, folder: Path) -> None:
    """Raise HeadError unless ``backbone`` has the weights, precision and image constants that ``config`` records."""
    facts, actual = as_plain(config.backbone), {"image_size": None, **backbone_facts(backbone)}
    decisive = ("precision", "embed_dim", "fingerprint")
    names = actual if any(actual[key] != facts[key] for key in decisive) else ()
    differing = [
        f"{key}: {facts[key]!r} in the head, {actual[key]!r} given" for key in names if actual[key] != facts[key]
    ]
    constants, recorded = preprocess_facts(backbone), config.preprocess
    for key in dict.fromkeys([*constants, *recorded]):
        if constants.get(key) != recorded.get(key):
            text = f"{str(recorded.get(key))[:60]} in the head, {constants.get(key)} given"
            differing.append(f"preprocess.{str(key)[:60]}: {text}")
    if differing:
        lines = "\n  ".join(differing[:12])
        if not names and differing[0].startswith("preprocess.resize_mode") and len(differing) == 1:
            raise HeadError(
                f"{folder} was trained on images that become square in another way:\n  {lines}\n"
                "Choose the same --data.transform: pad, squash, or one that leaves it to the weights (random, center)."
            )
        size = "" if facts["image_size"] is None else f", image_size={facts['image_size']}"
        raise HeadError(
            f"{folder} was trained on another backbone:\n  {lines}\nPass the one it was trained on: "
            f"load_backbone({facts['name']!r}, {facts['pretrained']!r}, precision={facts['precision']!r}{size})."
        )


def _check_weights(tensors: dict[str, Tensor], method: PromptMethod) -> None:
    """Raise HeadError unless ``tensors`` are exactly the state of ``method``, and the class weights that it gives.

    Tensors are float32, except those that a method packs. Class weights may be computed on another device here.
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
    if not wrong:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            given = F.normalize(method.text_features().float().cpu(), dim=-1)
        cosines = (F.normalize(tensors["class_weights"], dim=-1) * given).sum(dim=-1)
        if others := int((cosines < _SAME_COSINE).sum()):
            wrong.append(f"class_weights: {others} of {len(given)} rows are not those of the learned tensors")
    if wrong:
        raise HeadError(f"{TENSOR_FILE} does not match the head:\n  " + "\n  ".join(wrong[:12]))


def _same_weights(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors hold the same weights, possibly in different precisions."""
    return torch.allclose(first.float().cpu(), second.float().cpu(), rtol=2**-7, atol=1e-4)  # bfloat16 keeps 8 bits


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a HeadError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HeadError(f"the head cannot be saved in {folder}: {reason}; what was there is unchanged") from error


def _replace_folder(staging: Path, folder: Path) -> None:
    """Move ``staging`` to ``folder``; an older head remains complete until the last step."""
    if not (folder / CONFIG_FILE).is_file():
        # There is no older head. The folder may be a working directory, so it is filled rather than replaced.
        folder.mkdir(exist_ok=True)
        for name in (TENSOR_FILE, CONFIG_FILE):  # the configuration last: without it there is no head
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
            os.rmdir(older)  # empty, unless the older head could not be moved back
        raise
    shutil.rmtree(older, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["Head", "backbone_facts", "find_head", "learned_tensors", "load_head", "preprocess_facts", "read_config"]
