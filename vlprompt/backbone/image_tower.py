"""CLIP's image tower, with extra tokens and replaced parameters if it is a vision transformer.

Methods place their tokens differently. MaPLe, IVLP, VPT and RESTORE append them after the patches, before ``ln_pre``.
MVLPT and PVP insert them after the class token and after ``ln_pre``. The results differ, so :class:`VisualTokens`
states the position.
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
"""Whether a tower that runs step by step computes only the class token in the last block."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Extra tokens for a vision transformer: V tokens of width W.

    Args:
        input: ``[V, W]`` for all images or ``[B, V, W]`` for each image, inserted once at the input without position
            embedding. None or V = 0: no tokens.
        deep: Maps a layer (1 ... L - 1, counted from 0) to ``[V, W]`` or ``[B, V, W]``, which replace the V tokens at
            the input of that layer. Layers without an entry keep the tokens that the previous layer returned.
        position: ``end``: after the last patch; ``after_class``: between class token and patches.
        before_ln_pre: Whether the input tokens pass through the tower's first layer norm. Deep tokens never do.
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
    """Frozen image tower of an open_clip model.

    It is not an ``nn.Module``: the weights belong to the backbone's ``model`` and must not be listed twice.

    Args:
        visual: ``model.visual`` of an open_clip model.
        name: Name of the backbone, for messages.
    """

    def __init__(self, visual: Any, name: str = "this backbone") -> None:
        self.visual = visual
        self.name = name
        self._runner = _Runner(visual)

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tower's computation and matrices (layer norms may be wider)."""
        weights = [p for p in self.visual.parameters() if p.is_floating_point()]
        kernels = [p for p in weights if p.ndim == 4]
        dtype: torch.dtype = (kernels or weights)[0].dtype
        return dtype

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the frozen parameters by their names inside the tower, which are the keys of ``overrides``."""
        return dict(self.visual.named_parameters())

    @property
    def width(self) -> int:
        """W, the width of visual tokens; requires a vision transformer."""
        self._require("layer_norms", "the token width")
        return int(self.visual.transformer.width)

    @property
    def layers(self) -> int:
        """L, the number of transformer layers; requires a vision transformer."""
        self._require("layer_norms", "the number of transformer layers")
        return len(self.visual.transformer.resblocks)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; requires a vision transformer."""
        self._require("layer_norms", "patches")
        return int(self.visual.conv1.kernel_size[0])

    @property
    def takes_tokens(self) -> bool:
        """Whether :class:`VisualTokens` are accepted: the tower is a vision transformer that pools its class token."""
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
        """Whether the blocks have ``ln_1`` and ``ln_2``, as in any of open_clip's vision transformers."""
        from open_clip.transformer import VisionTransformer

        return isinstance(self.visual, VisionTransformer)

    def require_tokens(self) -> None:
        """Raise BackboneError if this tower accepts no extra tokens; the text names backbones that do."""
        self._require("tokens", "extra image tokens")

    def layer_norm_parameters(self, names: Sequence[str] = ("ln_1", "ln_2")) -> dict[str, nn.Parameter]:
        """Return the affine parameters of the named layer norms of every block, by their names inside the tower.

        A key has the form ``transformer.resblocks.0.ln_1.weight``, as in ``overrides`` of :meth:`encode`. The
        parameters are frozen; copy them before training.

        Raises:
            BackboneError: The tower is not a vision transformer, or has no layer norm of that name.
        """
        self._require("layer_norms", "layer norms to tune")
        parameters: dict[str, nn.Parameter] = {}
        for index, block in enumerate(self.visual.transformer.resblocks):
            for name in names:
                norm = getattr(block, name, None)
                if not isinstance(norm, nn.LayerNorm):
                    raise BackboneError(
                        f"block {index} of the image tower has no layer norm {name!r}; accepted: 'ln_1', 'ln_2'"
                    )
                for kind, parameter in norm.named_parameters():
                    parameters[f"transformer.resblocks.{index}.{name}.{kind}"] = parameter
        return parameters

    def folded(self, pixels: Tensor) -> dict[str, Tensor] | None:
        """Return ``overrides`` that encode every image as if ``pixels`` ``[3, H, W]`` had been added to it.

        The patch embedding is linear, so pixels that all images share become a bias of the patch tokens. The bias is
        added to the position embedding. Exact up to rounding. None if the tower is not a vision transformer with a
        separate embedding for every position.
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
            tokens: Extra tokens. With None or V = 0 the result is bit-identical to open_clip's.
            overrides: Maps a parameter name inside the tower to the tensor used instead, e.g. tuned layer norms.
            added: Additions inside the blocks. An empty object runs the tower step by step and the last block for the
                class token only: equal to open_clip's result up to rounding, and faster in training.

        Raises:
            BackboneError: Wrong image size, tokens for a tower or layer that accepts none, wrong token shape, unknown
                parameter names or wrong shapes, or additions to blocks that are not CLIP's.
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
    def _require(self, what: Literal["tokens", "layer_norms"], feature: str) -> None:
        if self.takes_tokens if what == "tokens" else self.has_layer_norms:
            return
        kind = type(self.visual).__name__
        if what == "tokens" and self.has_layer_norms:
            kind += ", which does not pool the class token"
        raise BackboneError(
            f"{self.name} has no {feature}: its image tower is a {kind}.\n"
            f"Use a vision transformer with a class token, e.g. --backbone.name {_ABLE}."
        )

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise BackboneError(
                f"images are {list(images.shape)} of {images.dtype}; expected normalised floats [B, 3, H, W]"
            )
        if (size := getattr(self.visual, "image_size", None)) is not None:
            height, width = size if isinstance(size, tuple | list) else (size, size)
            if tuple(images.shape[2:]) != (height, width):
                raise BackboneError(
                    f"images are {images.shape[2]} x {images.shape[3]} pixels; {self.name} takes {height} x {width}.\n"
                    "Build the transform from backbone.preprocess. Another size is possible by interpolated position "
                    "embeddings: load_backbone(..., image_size=N) or --backbone.image_size N."
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
                "deep visual tokens replace input tokens, but VisualTokens.input is None; set it to [V, W]"
            )
        given = {"input": tokens.input} if tokens.input is not None else {}
        given |= {f"layer {layer}": value for layer, value in tokens.deep.items()}
        for place, value in given.items():
            shape, shared = list(value.shape), [tokens.count, self.width]
            if shape not in (shared, [batch, *shared]):
                raise BackboneError(
                    f"visual tokens ({place}) have shape {shape}; expected {shared}, or {[batch, *shared]} per image"
                )


class _Runner(nn.Module):
    """Wrapper of the tower with which ``torch.func.functional_call`` replaces parameters on both paths."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor, tokens: VisualTokens | None, added: Added | None) -> Tensor:
        if added is not None or (tokens is not None and tokens.count):
            return _step_by_step(self.visual, images, tokens or VisualTokens(), added)
        features = self.visual(images)
        return features[0] if isinstance(features, tuple) else features  # type: ignore[no-any-return]


def _step_by_step(visual: Any, images: Tensor, tokens: VisualTokens, added: Added | None) -> Tensor:
    """Run open_clip's VisionTransformer step by step: the same operations in the same order, with tokens inserted."""
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
    """Return the class token after ``block``, ``[B, 1, W]``; only this token is read after the last block.

    All tokens provide keys and values. Only the class token provides a query and passes through the MLP. Exact up to
    rounding.
    """
    if not is_plain(block):
        whole: Tensor = block(x)
        return whole
    normed, token = block.ln_1(x), x[:, :1]
    token = token + block.ls_1(block.attention(q_x=normed[:, :1], k_x=normed, v_x=normed))
    return token + block.ls_2(block.mlp(block.ln_2(token)))  # type: ignore[no-any-return]


def _insert(x: Tensor, tokens: VisualTokens) -> Tensor:
    if tokens.input is None:
        return x
    inserted = _each(tokens.input, x)
    parts = [x[:, :1], inserted, x[:, 1:]] if tokens.position == "after_class" else [x, inserted]
    return torch.cat(parts, dim=1)


def _each(tokens: Tensor, x: Tensor) -> Tensor:
    """Return ``[B, V, W]`` in the type of ``x`` from ``[V, W]`` or ``[B, V, W]``."""
    return tokens.to(x.dtype).expand(len(x), -1, -1)
