"""Additions inside the blocks of a tower, and a block that runs step by step to apply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.errors import BackboneError, bulleted, did_you_mean

Update = Callable[[Tensor], Tensor]
AfterAttention = Callable[[Tensor, Tensor], Tensor]
PARTS = ("q", "k", "v", "o")
"""The four projections of an attention: query, key, value and output."""


@dataclass(frozen=True, eq=False)
class Added:
    """Additions inside one tower. All are optional; an empty object leaves the frozen tower unchanged.

    The callables must be repeatable: if a tower encodes in chunks, the backward pass calls them again.

    Args:
        projections: Maps (layer, element of :data:`PARTS`) to a function whose result is added to that projection. It
            takes the projection's input ``[..., W]`` and returns ``[..., W]``.
        after_attention: Maps a layer to a function applied before the attention's result joins the residual stream.
            It takes the output of the block's first layer norm and the result of the output projection, ``[..., W]``
            each, and returns ``[..., W]``. In the last layer both hold only the tokens that are read.
        rows: Maps a layer to ``[n, W]``, additional rows that every token attends to. They have the form of the first
            layer norm's output; the block's projections turn them into keys and values.
    """

    projections: Mapping[tuple[int, str], Update] = field(default_factory=dict)
    after_attention: Mapping[int, AfterAttention] = field(default_factory=dict)
    rows: Mapping[int, Tensor] = field(default_factory=dict)

    def project(self, attention: Any, layer: int, parts: str, x: Tensor) -> Tensor:
        """Return the projections ``parts`` (adjacent in "qkv") of ``x`` ``[..., W]``, concatenated: ``[..., n W]``.

        Args:
            attention: The block's ``nn.MultiheadAttention``.
            layer: Index of the block.
            parts: For example "qkv", "q" or "kv".
            x: The attention's input.
        """
        width = x.shape[-1]
        rows = slice("qkv".index(parts[0]) * width, ("qkv".index(parts[-1]) + 1) * width)
        out: Tensor = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        updates = [self.projections.get((layer, name)) for name in parts]
        if not any(updates):
            return out
        added = [torch.zeros_like(x) if update is None else update(x).to(x.dtype) for update in updates]
        return out + torch.cat(added, dim=-1)

    def keys_and_values(self, attention: Any, layer: int) -> Tensor | None:
        """Return keys and values ``[n, 2, H, d]`` of the layer's :attr:`rows`, or None if it has none."""
        rows = self.rows.get(layer)
        if rows is None or not len(rows):
            return None
        x = rows.to(attention.in_proj_weight.dtype)
        both: Tensor = self.project(attention, layer, "kv", x).unflatten(-1, (2, attention.num_heads, -1))
        return both

    def finish(self, attention: Any, layer: int, normed: Tensor, attended: Tensor) -> Tensor:
        """Return the attention's result ``[..., W]`` from the concatenated heads ``attended`` ``[..., W]``."""
        out: Tensor = attention.out_proj(attended)
        update, after = self.projections.get((layer, "o")), self.after_attention.get(layer)
        if update is not None:
            out = out + update(attended).to(out.dtype)
        return out if after is None else after(normed, out).to(out.dtype)


NOTHING = Added()


def is_plain(block: Any) -> bool:
    """Return whether ``block`` is open_clip's plain residual block, whose steps :func:`run_block` repeats."""
    from open_clip.transformer import ResidualAttentionBlock

    return type(block) is ResidualAttentionBlock and block.attn._qkv_same_embed_dim and not hasattr(block, "ln_1_kv")


def require_plain(blocks: Any, tower: str) -> None:
    """Raise BackboneError unless all blocks of ``tower`` are plain, so additions inside them are possible."""
    strange = [block for block in blocks if not is_plain(block)]
    if strange:
        raise BackboneError(
            f"additions inside the blocks of this {tower} are not supported: its blocks are "
            f"{type(strange[0]).__name__}, not CLIP's; use 'ViT-B-32', 'ViT-B-16', 'ViT-L-14' or 'demo'"
        )


def checked_overrides(
    parameters: Mapping[str, Tensor], overrides: Mapping[str, Tensor], tower: str
) -> dict[str, Tensor]:
    """Return ``overrides`` in the dtypes of the tower's ``parameters``.

    Raises:
        BackboneError: Unknown names or wrong shapes.
    """
    wrong, fitted = [], {}
    for name, value in overrides.items():
        if name not in parameters:
            wrong.append(f"{name}: no such parameter.{did_you_mean(name, parameters)}")
        elif parameters[name].shape != value.shape:
            wrong.append(f"{name}: shape {list(value.shape)}, expected {list(parameters[name].shape)}")
        else:
            fitted[name] = value.to(parameters[name].dtype)
    if wrong:
        raise BackboneError(f"these overrides do not fit the {tower}:\n" + bulleted(wrong, limit=10))
    return fitted


def run_block(
    block: Any, x: Tensor, layer: int, added: Added = NOTHING, mask: Tensor | None = None, first_alone: bool = False
) -> Tensor:
    """Return the output of a plain block for ``x`` ``[B, N, W]``, with ``added`` applied inside.

    Args:
        block: A block for which :func:`is_plain` holds.
        x: The block's input, batch first.
        layer: Index of the block.
        added: The additions.
        mask: Added to the attention scores, ``[N, N]``.
        first_alone: Compute only the first token, ``[B, 1, W]``. All tokens provide keys and values; only the first
            one provides a query and passes through the MLP. Exact up to rounding.
    """
    attention, heads = block.attn, block.attn.num_heads
    normed = block.ln_1(x)
    if first_alone:
        x, queried = x[:, :1], normed[:, :1]
        q = added.project(attention, layer, "q", queried).unflatten(-1, (heads, -1))
        k, v = added.project(attention, layer, "kv", normed).unflatten(-1, (2, heads, -1)).unbind(2)
        mask = None if mask is None else mask[:1]
    else:
        queried = normed
        q, k, v = added.project(attention, layer, "qkv", normed).unflatten(-1, (3, heads, -1)).unbind(2)
    extra = added.keys_and_values(attention, layer)
    if extra is not None:
        extra_k, extra_v = (rows.expand(len(k), -1, -1, -1) for rows in extra.unbind(1))
        k, v = torch.cat([extra_k, k], dim=1), torch.cat([extra_v, v], dim=1)
        mask = None if mask is None else F.pad(mask, (len(extra), 0))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, d]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
    x = x + block.ls_1(added.finish(attention, layer, queried, attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]
