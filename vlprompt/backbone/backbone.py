"""A frozen CLIP with its preprocessing, capabilities and identity."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vlprompt._files import sha256_tensors
from vlprompt.backbone.added import Added
from vlprompt.backbone.architecture import build_model, check_model_text, check_precision, config_from_shapes
from vlprompt.backbone.image_tower import ImageTower, VisualTokens
from vlprompt.backbone.text_tower import TextTower
from vlprompt.backbone.weights import load_weights
from vlprompt.errors import BackboneError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
ResizeMode = Literal["shortest", "squash", "longest"]
_RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
_NAMES_OF_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Preprocess:
    """Constants that turn images into the backbone's input, from the configuration of the weights.

    Args:
        size: Side of the square input in pixels.
        mean, std: Per channel (red, green, blue), for values in 0 ... 1.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        resize_mode: How a test image becomes square: ``shortest`` side to ``size`` with a centre crop; ``squash`` to
            ``size`` x ``size``; ``longest`` side to ``size`` with padding.
        fill_color: Level of the padding, 0 (black) to 255.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        problem = None
        if not isinstance(self.size, int) or self.size < 1:
            problem = f"size {self.size!r}; expected the side of a square in pixels"
        for what in ("mean", "std"):
            values = getattr(self, what)
            if not isinstance(values, tuple) or len(values) != 3 or not all(isinstance(v, float) for v in values):
                problem = f"{what} {values!r}; expected three numbers"
        if problem is None and min(self.std) <= 0:
            problem = f"std {self.std!r}; expected numbers above 0"
        if self.interpolation not in _INTERPOLATIONS:
            problem = f"interpolation {self.interpolation!r}; accepted: {', '.join(_INTERPOLATIONS)}"
        if self.resize_mode not in _RESIZE_MODES:
            problem = f"resize mode {self.resize_mode!r}; accepted: {', '.join(_RESIZE_MODES)}"
        if isinstance(self.fill_color, bool) or self.fill_color not in range(256):
            problem = f"fill color {self.fill_color!r}; accepted: 0 (black) to 255 (white)"
        if problem:
            raise BackboneError(f"preprocessing cannot be used: {problem}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: Any) -> Preprocess:
        """Read open_clip's ``preprocess_cfg`` (or a pretrained tag's entry) for a tower of ``image_size`` pixels.

        Raises:
            BackboneError: The input is not square, or a value is not usable.
        """
        sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
        if len(set(sides)) != 1:
            raise BackboneError(f"this backbone takes {sides[0]} x {sides[-1]} pixels; only square ones are supported")

        def triple(key: str, default: tuple[float, float, float]) -> Any:
            values = config.get(key, default)
            try:
                return tuple(float(value) for value in values)
            except (TypeError, ValueError):
                return values

        return cls(
            size=sides[0],
            mean=triple("mean", OPENAI_MEAN),
            std=triple("std", OPENAI_STD),
            interpolation=config.get("interpolation", "bicubic"),
            resize_mode=config.get("resize_mode", "shortest"),
            fill_color=config.get("fill_color", 0),
        )


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of a backbone.

    Args:
        causal_text: A text token attends only to earlier tokens, so the packed text algorithm is exact.
        token_prompts: Context vectors can be inserted among the text tokens.
        image_tokens: The image tower accepts extra tokens, at the input and at deeper layers.
        image_layer_norms: The image tower's blocks have layer norms that can be tuned.
    """

    causal_text: bool
    token_prompts: bool
    image_tokens: bool
    image_layer_norms: bool


class Backbone(nn.Module):
    """A frozen CLIP: its two towers, preprocessing, temperature and identity.

    It is never trained: parameters take no gradient and :meth:`train` keeps evaluation mode. Towers take float32
    prompts and return float32 features, independent of their precision. Use :func:`load_backbone`,
    :meth:`from_state_dict` or :meth:`from_open_clip` rather than this constructor.

    Args:
        model: An open_clip CLIP or CustomTextCLIP; it is frozen in place.
        tokenizer: The model's tokenizer, open_clip's SimpleTokenizer or one with the same attributes.
        name: The architecture's name, as in :func:`load_backbone`.
        pretrained: The weights: a tag, ``random``, ``demo`` or a file.
        preprocess: The preprocessing constants of its images.
        trained_tokens: Token ids whose embeddings were trained; None for all.
        config: The architecture in open_clip's form (``model_cfg``), if it is known.
        image_size: The image size for which position embeddings were interpolated on request, else None.

    Raises:
        BackboneError: The pooling of the text tower is not supported exactly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        pretrained: str,
        preprocess: Preprocess,
        trained_tokens: frozenset[int] | None = None,
        config: Mapping[str, Any] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        text = getattr(model, "text", model)
        check_model_text(text, tokenizer, name)
        self.name = name
        self.pretrained = pretrained
        self.preprocess = preprocess
        self.config = config
        self.image_size = image_size
        self.model: Any = model
        self.model.requires_grad_(False)
        self.text = TextTower(text, tokenizer)
        self.image = ImageTower(model.visual, name)
        self._trained_tokens = trained_tokens
        self._fingerprint: tuple[str, str] | None = None
        self.train(False)

    # -- construction ---------------------------------------------------------------------------------------------
    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        quick_gelu: bool = True,
        name: str = "from-file",
        pretrained: str = "state-dict",
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> Backbone:
        """Build a backbone from OpenAI-format tensors; their shapes determine the architecture.

        Args:
            state_dict: Tensors with the names and shapes of OpenAI's releases; they are copied.
            quick_gelu: OpenAI's activation (True), or GELU (False).
            name: Name of the backbone.
            pretrained: Name of its weights.
            precision: ``fp32``, ``fp16`` or ``bf16``.
            device: Device of the backbone.

        Raises:
            BackboneError: Names or shapes are not those of a CLIP.
        """
        check_precision(precision)
        config = config_from_shapes(state_dict, pretrained)
        model = build_model(config, quick_gelu=quick_gelu, precision=precision)
        load_weights(model, state_dict, name=name, source=pretrained)
        preprocess = Preprocess(config["vision_cfg"]["image_size"])
        known = {**config, "quick_gelu": quick_gelu}
        tokenizer = clip_tokenizer(config)
        backbone = cls(model, tokenizer, name=name, pretrained=pretrained, preprocess=preprocess, config=known)
        return backbone.to(checked_device(device))

    @classmethod
    def from_open_clip(
        cls,
        model: Any,
        *,
        name: str,
        pretrained: str = "own",
        preprocess: Preprocess | None = None,
        tokenizer: Any = None,
    ) -> Backbone:
        """Wrap an open_clip model that is already in memory; it is frozen in place.

        Args:
            model: A CLIP or CustomTextCLIP of open_clip, on any device, in any precision.
            name: Name of the backbone.
            pretrained: Name of its weights.
            preprocess: Image constants; default: those that open_clip attached to the model.
            tokenizer: Default: open_clip's SimpleTokenizer of the model's context length.

        Raises:
            BackboneError: Another kind of model, or the pooling of its text tower is not supported exactly.
        """
        from open_clip.model import CLIP, CustomTextCLIP, get_model_preprocess_cfg

        if not isinstance(model, CLIP | CustomTextCLIP):
            raise BackboneError(
                f"a {type(model).__name__} is not an open_clip CLIP; pass the result of open_clip.create_model(...)"
            )
        if preprocess is None:
            constants = get_model_preprocess_cfg(model)
            preprocess = Preprocess.from_config(constants, constants.get("size", model.visual.image_size))
        tokenizer = tokenizer or clip_tokenizer({"text_cfg": {"context_length": model.context_length}})
        return cls(model, tokenizer, name=name, pretrained=pretrained, preprocess=preprocess)

    # -- frozen ---------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Backbone:
        """Keep evaluation mode and ignore ``mode``, so batch statistics stay fixed and dropout stays off."""
        del mode
        super().train(False)
        return self

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def precision(self) -> str:
        """Type of the matrices: ``fp32``, ``fp16`` or ``bf16`` (or ``fp64`` after ``.double()``)."""
        return _NAMES_OF_TYPES[self.image.dtype]

    @property
    def embed_dim(self) -> int:
        """D, the width of the space that images and texts share."""
        projection = self.text.model.text_projection
        if projection is None:
            return self.text.width
        return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])

    @property
    def text_width(self) -> int:
        """W of the text tower, the width of context vectors."""
        return self.text.width

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosines: ``exp`` of the stored value, a float32 scalar without gradient."""
        scale: Tensor = self.model.logit_scale.detach().reshape(())
        return scale.to(torch.promote_types(scale.dtype, torch.float32)).exp()

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities that methods check."""
        return Capabilities(
            causal_text=self.text.causal,
            token_prompts=True,
            image_tokens=self.image.takes_tokens,
            image_layer_norms=self.image.has_layer_norms,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, types and bytes of all weights, the activation and the number of heads.

        The same tensors with another activation are another backbone. Computed on first access.
        """
        if self._fingerprint is None or self._fingerprint[0] != self.precision:
            self._fingerprint = (self.precision, _fingerprint(self.model))
        return self._fingerprint[1]

    def untrained_tokens(self, text: str) -> list[str]:
        """Return the words of ``text`` whose token embeddings were never trained; always empty except for demo weights.

        Args:
            text: A prompt, or a class name as it stands in a prompt.
        """
        trained, tokenizer = self._trained_tokens, self.text.tokenizer
        if trained is None:
            return []
        words = tokenizer.pat.findall(tokenizer.clean_fn(text))
        return list(dict.fromkeys(word for word in words if not trained.issuperset(tokenizer.encode(word))))

    # -- images ---------------------------------------------------------------------------------------------------
    def resizing(self, resize_mode: str) -> Backbone:
        """Return a backbone with the same weights, not copied, whose images become square in another way.

        Args:
            resize_mode: As in :class:`Preprocess`: ``shortest``, ``squash`` or ``longest``.

        Raises:
            BackboneError: There is no such resize mode.
        """
        if resize_mode == self.preprocess.resize_mode:
            return self
        other = copy.copy(self)
        other.preprocess = replace(self.preprocess, resize_mode=resize_mode)
        return other

    def encode_image(
        self,
        images: Tensor,
        tokens: VisualTokens | None = None,
        overrides: Mapping[str, Tensor] | None = None,
        added: Added | None = None,
    ) -> Tensor:
        """Return raw image features ``[B, D]``, float32, of normalised ``images`` ``[B, 3, H, W]``.

        See :meth:`ImageTower.encode` for ``tokens``, ``overrides`` and ``added``.
        """
        return self.image.encode(images, tokens, overrides, added)

    def extra_repr(self) -> str:
        """Return name, weights and precision, for ``repr``."""
        return f"{self.name!r}, pretrained={self.pretrained!r}, precision={self.precision!r}"


def clip_tokenizer(config: Mapping[str, Any]) -> Any:
    """Return open_clip's byte-pair tokenizer with the context length and options of a model configuration.

    Raises:
        BackboneError: An option is not accepted.
    """
    from open_clip.tokenizer import SimpleTokenizer

    text = config.get("text_cfg", {})
    chosen = text.get("tokenizer_kwargs") or {}
    try:
        return SimpleTokenizer(context_length=text.get("context_length", 77), **chosen)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise BackboneError(
            f"open_clip's tokenizer does not accept text_cfg.tokenizer_kwargs {chosen}: {error}"
        ) from None


def checked_device(device: str | torch.device) -> torch.device:
    """Return ``device``, or raise BackboneError if this machine has no such device."""
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"device {str(device)!r} cannot be used here: {reason}\nUse device cpu.") from None
    return checked


def _fingerprint(model: nn.Module) -> str:
    kinds = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "num_heads"):
            kinds.append(f"{name}: {module.num_heads} heads\n")
        if "GELU" in kind:
            kinds.append(f"{name}: {kind}\n")
    return sha256_tensors(
        model.state_dict(), lambda name, tensor: f"{name}: {tensor.dtype} {list(tensor.shape)}\n", start="".join(kinds)
    )
