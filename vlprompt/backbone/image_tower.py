"""CLIP's image tower, with extra tokens and replaced parameters where it is a vision transformer.

Methods differ in where their tokens stand: MaPLe, IVLP, VPT and RESTORE append them behind the patches before
``ln_pre`` (specs/prompt_learners.md 3.5, 3.6); MVLPT and PVP insert them behind the class token after ``ln_pre``
(specs/seed_methods.md 12.1). Both orders give different numbers, so :class:`VisualTokens` says which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbone.added import Added, checked_overrides, is_plain, require_plain, run_block
from vlprompt.errors import BackboneError

_ABLE = "'ViT-B-32', 'ViT-B-16', 'ViT-L-14' or 'demo'"
LAST_BLOCK_FOR_CLASS_TOKEN = True
"""Whether the last block runs for the class token alone where tokens or additions take the tower step by step."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Extra tokens for a vision transformer; V tokens of width W.

    Args:
        input: ``[V, W]`` for all images or ``[B, V, W]`` for each image, inserted once at the input. They get no
            position embedding. None or V = 0: no tokens.
        deep: Layer (1 ... L - 1, counted from 0) to ``[V, W]`` or ``[B, V, W]``, which replace the same V tokens at the
            input of that layer. Layers without an entry pass on what the layer before made of them.
        position: ``end`` behind the last patch, or ``after_class`` between class token and patches.
        before_ln_pre: Whether the input tokens go through the tower's first layer norm. Deep tokens never do.
    """

    input: Tensor | None = None
    deep: Mapping[int, Tensor] = field(default_factory=dict)
    position: Literal["end", "after_class"] = "end"
    before_ln_pre: bool = True

    @property
    def count(self) -> int:
        """V, the number of input tokens."""
        return 0 if self.input is None else int(self.input.shape[-2])


class ImageTower:
    """Runs a frozen image tower of an open_clip model; knows nothing about methods.

    Not an ``nn.Module``: the weights belong to the backbone's ``model``, and must not be listed a second time.

    Args:
        visual: ``model.visual`` of an open_clip model.
        name: The backbone's name, for messages.
    """

    def __init__(self, visual: Any, name: str = "this backbone") -> None:
        self.visual = visual
        self.name = name
        self._runner = _Runner(visual)

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> torch.dtype:
        """The type the tower computes in: that of its matrices (layer norms may be wider)."""
        weights = [p for p in self.visual.parameters() if p.is_floating_point()]
        kernels = [p for p in weights if p.ndim == 4]
        dtype: torch.dtype = (kernels or weights)[0].dtype
        return dtype

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the frozen parameters by their names inside the tower: the keys of ``overrides``."""
        return dict(self.visual.named_parameters())

    @property
    def width(self) -> int:
        """W, the width of visual tokens; needs a vision transformer."""
        self._require("layer_norms", "the token width")
        return int(self.visual.transformer.width)

    @property
    def layers(self) -> int:
        """L, the number of transformer layers; needs a vision transformer."""
        self._require("layer_norms", "the number of transformer layers")
        return len(self.visual.transformer.resblocks)

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels; needs a vision transformer."""
        self._require("layer_norms", "patches")
        return int(self.visual.conv1.kernel_size[0])

    @property
    def takes_tokens(self) -> bool:
        """Whether :class:`VisualTokens` may be given: a vision transformer that reads its feature off a class token."""
        from open_clip.transformer import VisionTransformer

        visual = self.visual
        return (
            isinstance(visual, VisionTransformer)
            and visual.attn_pool is None
            and visual.pool_type == "tok"
            and visual.transformer.batch_first
        )

    @property
    def has_layer_norms(self) -> bool:
        """Whether the blocks have ``ln_1`` and ``ln_2``: any vision transformer of open_clip itself."""
        from open_clip.transformer import VisionTransformer

        return isinstance(self.visual, VisionTransformer)

    def require_tokens(self) -> None:
        """Raise BackboneError, naming backbones that can, where this tower takes no extra tokens."""
        self._require("tokens", "extra image tokens")

    def layer_norm_parameters(self, names: Sequence[str] = ("ln_1", "ln_2")) -> dict[str, nn.Parameter]:
        """Return the affine parameters of the named layer norms of every block, by their name inside the tower.

        Keys read ``transformer.resblocks.0.ln_1.weight``; they are the keys of ``overrides`` in :meth:`encode`. The
        parameters are the frozen ones: copy them before learning.

        Raises:
            BackboneError: The tower is no vision transformer, or has no layer norm of that name.
        """
        self._require("layer_norms", "layer norms to tune")
        found: dict[str, nn.Parameter] = {}
        for index, block in enumerate(self.visual.transformer.resblocks):
            for name in names:
                norm = getattr(block, name, None)
                if not isinstance(norm, nn.LayerNorm):
                    raise BackboneError(
                        f"block {index} of the image tower has no layer norm {name!r}; accepted: 'ln_1', 'ln_2'"
                    )
                for kind, parameter in norm.named_parameters():
                    found[f"transformer.resblocks.{index}.{name}.{kind}"] = parameter
        return found

    def folded(self, pixels: Tensor) -> dict[str, Tensor] | None:
        """Return ``overrides`` with which every image is encoded as if ``pixels`` ``[3, H, W]`` had been added to it.

        Patches are cut by one linear map, so what all images share is a bias of the patch tokens; it goes into the
        position embedding (test_time_and_cache 9.3). Exact but for rounding. None where the tower cannot: no vision
        transformer, or one without an embedding of its own for every position.
        """
        visual, kernel = self.visual, getattr(self.visual, "conv1", None)
        if not self.has_layer_norms or not isinstance(getattr(visual, "positional_embedding", None), nn.Parameter):
            return None
        assert isinstance(kernel, nn.Conv2d)
        bias = F.conv2d(pixels.float()[None], kernel.weight.float(), stride=kernel.stride)
        tokens = F.pad(bias[0].flatten(1).t(), (0, 0, 1, 0))  # none for the class token
        return {"positional_embedding": visual.positional_embedding.float() + tokens}

    # -- encoding -------------------------------------------------------------------------------------------------
    def encode(
        self,
        images: Tensor,
        tokens: VisualTokens | None = None,
        overrides: Mapping[str, Tensor] | None = None,
        added: Added | None = None,
    ) -> Tensor:
        """Return raw image features ``[B, D]``, float32 (float64 for a float64 backbone), not normalised.

        Args:
            images: ``[B, 3, H, W]``, normalised with the backbone's preprocessing constants; any float type.
            tokens: Extra tokens. Without any (None, or V = 0) the result is bit-identical to open_clip's.
            overrides: Parameter name inside the tower to the tensor used instead, e.g. learned layer norms.
            added: What is added inside the blocks. With an empty one the tower runs step by step, the last block for
                the class token alone: equal to open_clip's but for rounding, and quicker in training.

        Raises:
            BackboneError: Images of another size, tokens for a tower or layer that takes none, tokens of another shape,
                unknown parameter names or shapes, something added to blocks that are not CLIP's.
        """
        self._check_images(images)
        if tokens is not None:
            self._check_tokens(tokens, len(images))
        if added is not None:
            self._require("tokens", "blocks to add to")
            require_plain(self.visual.transformer.resblocks, "image tower")
        images = images.to(self.dtype)
        features: Tensor
        if overrides:
            fitted = checked_overrides(self.parameters(), overrides, "image tower")
            replaced = {f"visual.{name}": value for name, value in fitted.items()}
            features = torch.func.functional_call(self._runner, replaced, (images, tokens, added))
        else:
            features = self._runner(images, tokens, added)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    # -- refusals -------------------------------------------------------------------------------------------------
    def _require(self, what: Literal["tokens", "layer_norms"], said: str) -> None:
        if self.takes_tokens if what == "tokens" else self.has_layer_norms:
            return
        kind = type(self.visual).__name__
        if what == "tokens" and self.has_layer_norms:
            kind += ", which does not read its feature off the class token"
        raise BackboneError(
            f"{self.name} has no {said}: its image tower is a {kind}.\n"
            f"Vision transformers with a class token can, e.g. --backbone.name {_ABLE}."
        )

    def _check_images(self, images: Tensor) -> None:
        from open_clip.transformer import VisionTransformer

        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise BackboneError(
                f"images are {list(images.shape)} of {images.dtype}; expected normalised floats [B, 3, H, W]"
            )
        if isinstance(self.visual, VisionTransformer):
            height, width = self.visual.image_size
            if tuple(images.shape[2:]) != (height, width):
                raise BackboneError(
                    f"images are {images.shape[2]} x {images.shape[3]} pixels; {self.name} takes {height} x {width}.\n"
                    "Build the view from backbone.preprocess."
                )

    def _check_tokens(self, tokens: VisualTokens, batch: int) -> None:
        self.require_tokens()
        if tokens.position not in ("end", "after_class"):
            raise BackboneError(f"token position {tokens.position!r}; accepted: 'end', 'after_class'")
        wrong = sorted(layer for layer in tokens.deep if not 1 <= layer < self.layers)
        if wrong:
            raise BackboneError(f"deep visual tokens at layer {wrong[0]}; accepted: 1 to {self.layers - 1}")
        if tokens.deep and tokens.input is None:
            raise BackboneError(
                "deep visual tokens replace input tokens, and there are none: give VisualTokens.input [V, W] as well"
            )
        given = {"input": tokens.input} if tokens.input is not None else {}
        given |= {f"layer {layer}": value for layer, value in tokens.deep.items()}
        for where, value in given.items():
            shape, shared = list(value.shape), [tokens.count, self.width]
            if shape not in (shared, [batch, *shared]):
                raise BackboneError(
                    f"visual tokens ({where}) have shape {shape}; expected {shared}, or {[batch, *shared]} per image"
                )


class _Runner(nn.Module):
    """One callable around the tower, so that ``torch.func.functional_call`` can replace parameters on either path."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor, tokens: VisualTokens | None, added: Added | None) -> Tensor:
        if added is not None or (tokens is not None and tokens.count):
            return _step_by_step(self.visual, images, tokens or VisualTokens(), added)
        features = self.visual(images)
        return features[0] if isinstance(features, tuple) else features  # type: ignore[no-any-return]


def _step_by_step(visual: Any, images: Tensor, tokens: VisualTokens, added: Added | None) -> Tensor:
    """Run ``open_clip``'s VisionTransformer step by step; the same operations in the same order, tokens in between."""
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, W]
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding.to(x.dtype)
    if tokens.before_ln_pre:
        x = visual.ln_pre(_insert(x, tokens))
    else:
        x = _insert(visual.ln_pre(x), tokens)
    start = 1 if tokens.position == "after_class" else x.shape[1] - tokens.count
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer in tokens.deep:
            x = torch.cat([x[:, :start], _each(tokens.deep[layer], x), x[:, start + tokens.count :]], dim=1)
        last = layer == len(visual.transformer.resblocks) - 1
        if added is not None:
            x = run_block(block, x, layer, added, first_alone=last and LAST_BLOCK_FOR_CLASS_TOKEN)
        else:
            x = _class_token_alone(block, x) if last and LAST_BLOCK_FOR_CLASS_TOKEN else block(x)
    features: Tensor = visual.ln_post(x[:, 0])
    return features if visual.proj is None else features @ visual.proj


def _class_token_alone(block: Any, x: Tensor) -> Tensor:
    """Return what ``block`` makes of the class token, ``[B, 1, W]``: only it is read behind the last block.

    Every token answers, only the class token asks and goes through the MLP; exact but for rounding.
    """
    if not is_plain(block):
        whole: Tensor = block(x)
        return whole
    normed, own = block.ln_1(x), x[:, :1]
    own = own + block.ls_1(block.attention(q_x=normed[:, :1], k_x=normed, v_x=normed))
    return own + block.ls_2(block.mlp(block.ln_2(own)))  # type: ignore[no-any-return]


def _insert(x: Tensor, tokens: VisualTokens) -> Tensor:
    if tokens.input is None:
        return x
    own = _each(tokens.input, x)
    parts = [x[:, :1], own, x[:, 1:]] if tokens.position == "after_class" else [x, own]
    return torch.cat(parts, dim=1)


def _each(tokens: Tensor, x: Tensor) -> Tensor:
    """Return ``[B, V, W]`` in the type of ``x`` from ``[V, W]`` or ``[B, V, W]``."""
    return tokens.to(x.dtype).expand(len(x), -1, -1)
