"""What a method adds inside the blocks of a tower: one block, run step by step so that there is room for it."""

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
    """What is added inside one tower; everything is optional, and an empty one is the frozen tower.

    Calls must be repeatable: where a tower encodes in pieces, the backward pass makes them again.

    Args:
        projections: (layer, part of :data:`PARTS`) to what is added to that projection: ``[..., W]``, the projection's
            input, to ``[..., W]``.
        after_attention: Layer to what the attention's result becomes before it joins the residual stream: the block's
            first layer norm's output and the output projection's result, ``[..., W]`` each, to ``[..., W]``. Both have
            the same tokens: in the last layer only those that are read.
        rows: Layer to ``[n, W]`` that every token attends to beside the sequence: rows as they come out of the block's
            first layer norm, which become keys and values through the block's own projections.
    """

    projections: Mapping[tuple[int, str], Update] = field(default_factory=dict)
    after_attention: Mapping[int, AfterAttention] = field(default_factory=dict)
    rows: Mapping[int, Tensor] = field(default_factory=dict)

    def project(self, attention: Any, layer: int, parts: str, x: Tensor) -> Tensor:
        """Return the projections ``parts`` (neighbours in "qkv") of ``x`` ``[..., W]``, side by side in ``[..., n W]``.

        Args:
            attention: The block's ``nn.MultiheadAttention``.
            layer: Which block.
            parts: Such as "qkv", "q" or "kv".
            x: The attention's input.
        """
        width = x.shape[-1]
        rows = slice("qkv".index(parts[0]) * width, ("qkv".index(parts[-1]) + 1) * width)
        out: Tensor = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        updates = [self.projections.get((layer, part)) for part in parts]
        if not any(updates):
            return out
        added = [torch.zeros_like(x) if update is None else update(x).to(x.dtype) for update in updates]
        return out + torch.cat(added, dim=-1)

    def keys_and_values(self, attention: Any, layer: int) -> Tensor | None:
        """Return keys and values ``[n, 2, H, d]`` of the layer's :attr:`rows`; None where there are none."""
        own = self.rows.get(layer)
        if own is None or not len(own):
            return None
        x = own.to(attention.in_proj_weight.dtype)
        both: Tensor = self.project(attention, layer, "kv", x).unflatten(-1, (2, attention.num_heads, -1))
        return both

    def finish(self, attention: Any, layer: int, normed: Tensor, seen: Tensor) -> Tensor:
        """Return what joins the residual stream ``[..., W]``: of ``seen`` ``[..., W]``, all heads side by side."""
        out: Tensor = attention.out_proj(seen)
        update, after = self.projections.get((layer, "o")), self.after_attention.get(layer)
        if update is not None:
            out = out + update(seen).to(out.dtype)
        return out if after is None else after(normed, out).to(out.dtype)


NOTHING = Added()


def is_plain(block: Any) -> bool:
    """Return whether ``block`` is open_clip's plain residual block, whose steps are known here."""
    from open_clip.transformer import ResidualAttentionBlock

    return type(block) is ResidualAttentionBlock and block.attn._qkv_same_embed_dim and not hasattr(block, "ln_1_kv")


def require_plain(blocks: Any, tower: str) -> None:
    """Raise BackboneError where nothing can be added inside the blocks of ``tower``."""
    strange = [block for block in blocks if not is_plain(block)]
    if strange:
        raise BackboneError(
            f"nothing can be added inside the blocks of this {tower}: they are {type(strange[0]).__name__}, and only "
            "CLIP's own are known; use 'ViT-B-32', 'ViT-B-16', 'ViT-L-14' or 'demo'"
        )


def checked_overrides(own: Mapping[str, Tensor], overrides: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Return ``overrides`` in the types of the tower's ``own`` parameters.

    Raises:
        BackboneError: Unknown names or other shapes.
    """
    wrong, fitted = [], {}
    for name, value in overrides.items():
        if name not in own:
            wrong.append(f"{name}: no such parameter.{did_you_mean(name, own)}")
        elif own[name].shape != value.shape:
            wrong.append(f"{name}: shape {list(value.shape)}, expected {list(own[name].shape)}")
        else:
            fitted[name] = value.to(own[name].dtype)
    if wrong:
        raise BackboneError(f"these overrides do not fit the {tower}:\n" + bulleted(wrong, limit=10))
    return fitted


def run_block(
    block: Any, x: Tensor, layer: int, added: Added = NOTHING, mask: Tensor | None = None, first_alone: bool = False
) -> Tensor:
    """Return what a plain block makes of ``x`` ``[B, N, W]`` with ``added`` inside.

    Args:
        block: A block for which :func:`is_plain` holds.
        x: Its input, batch first.
        layer: Which block.
        added: What is added.
        mask: Added to the scores, ``[N, N]``.
        first_alone: Return the first token alone, ``[B, 1, W]``: every token answers, only the first one asks and goes
            through the MLP. Exact but for rounding.
    """
    attention, heads = block.attn, block.attn.num_heads
    normed = block.ln_1(x)
    if first_alone:
        x, asking = x[:, :1], normed[:, :1]
        q = added.project(attention, layer, "q", asking).unflatten(-1, (heads, -1))
        k, v = added.project(attention, layer, "kv", normed).unflatten(-1, (2, heads, -1)).unbind(2)
        mask = None if mask is None else mask[:1]
    else:
        asking = normed
        q, k, v = added.project(attention, layer, "qkv", normed).unflatten(-1, (3, heads, -1)).unbind(2)
    more = added.keys_and_values(attention, layer)
    if more is not None:
        own_k, own_v = (part.expand(len(k), -1, -1, -1) for part in more.unbind(1))
        k, v = torch.cat([own_k, k], dim=1), torch.cat([own_v, v], dim=1)
        mask = None if mask is None else F.pad(mask, (len(more), 0))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, N, d]
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
    x = x + block.ls_1(added.finish(attention, layer, asking, seen.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]
