"""One block of CLIP's text transformer over packed tokens: no padding, and prefixes shared by all classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbone.added import Added
from vlprompt.backbone.layout import PackPlan


def packed_block(block: Any, x: Tensor, plan: PackPlan, layer: int, added: Added, *, last: bool) -> Tensor:
    """Return the output of a plain block for packed tokens ``[P + T, W]``, with ``added`` applied inside.

    The last block returns only the pooled tokens ``[R, W]``.
    """
    attention = block.attn
    heads, sizes = attention.num_heads, [plan.prefix_tokens, len(x) - plan.prefix_tokens]
    normed, extra = block.ln_1(x), added.keys_and_values(attention, layer)
    if not last:
        qkv = added.project(attention, layer, "qkv", normed).unflatten(-1, (3, heads, -1))
        inside, suffix = qkv.split(sizes)  # [P, 3, H, d] and [T, 3, H, d]
        of_suffix = _suffix_attention(suffix[:, 0], inside, suffix, plan, extra)
        attended = torch.cat([_prefix_attention(inside, plan, extra), of_suffix])
    else:
        # Only pooled tokens are read after the last block: queries are theirs, keys and values those of all tokens.
        pooled = plan.pooled_at + plan.prefix_tokens
        keys_values = added.project(attention, layer, "kv", normed).unflatten(-1, (2, heads, -1))
        x, normed = x.index_select(0, pooled), normed.index_select(0, pooled)
        q = added.project(attention, layer, "q", normed).unflatten(-1, (heads, -1))
        inside, suffix = keys_values.split(sizes)
        attended = _suffix_attention(q, inside, suffix, plan, extra, pooled=True)
    x = x + block.ls_1(added.finish(attention, layer, normed, attended.flatten(1)))
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _prefix_attention(inside: Tensor, plan: PackPlan, extra: Tensor | None) -> Tensor:
    """Causal attention inside each group's prefix, ``[P, 3, H, d]`` to ``[P, H, d]``.

    Padding is at the end, so no real token attends to it. Every token attends to the keys and values ``extra``
    ``[n, 2, H, d]``.
    """
    q, k, v = inside[plan.prefix_grid].permute(2, 0, 3, 1, 4).unbind(0)  # [G, H, Pmax, d] each
    if extra is None:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        extra_k, extra_v = (rows.transpose(0, 1).expand(len(k), -1, -1, -1) for rows in extra.unbind(1))
        k, v = torch.cat([extra_k, k], dim=2), torch.cat([extra_v, v], dim=2)
        sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(len(extra))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    return attended.transpose(1, 2)[plan.prefix_real]


def _suffix_attention(
    q: Tensor, inside: Tensor, suffix: Tensor, plan: PackPlan, extra: Tensor | None, *, pooled: bool = False
) -> Tensor:
    """Attention of suffix queries ``[N, H, d]`` to their group's prefix and to earlier tokens of their row.

    Both kinds of scores share one softmax. Rows of equal length form a block without padding. The last two entries of
    ``inside`` ``[P, 2 or 3, H, d]`` and ``suffix`` ``[T, 2 or 3, H, d]`` are the keys and values. The keys and values
    ``extra`` ``[n, 2, H, d]`` precede every group's prefix.
    """
    by_group = plan.pooled_by_group if pooled else plan.suffix_by_group
    q = q * q.shape[-1] ** -0.5
    prefix, real = inside[:, -2:][plan.prefix_grid], plan.prefix_real
    if extra is not None:
        prefix = torch.cat([extra.expand(len(prefix), *extra.shape), prefix], dim=1)
        real = F.pad(real, (len(extra), 0), value=True)
    prefix_k, prefix_v = prefix.unbind(2)  # [G, Pmax, H, d]
    to_prefix = torch.einsum("gthd,gphd->gthp", by_group.deal(q), prefix_k)
    if len(set(plan.prefix_lengths)) > 1:
        to_prefix = to_prefix.masked_fill(~real[:, None, None], float("-inf"))
    to_prefix = by_group.collect(to_prefix)  # [N, H, Pmax]
    # One split instead of a slice per block: the gradient of a split is a single concatenation.
    queries_per_row = [(1 if pooled else length) for length, _ in plan.blocks]
    query_sizes = [rows * n for (_, rows), n in zip(plan.blocks, queries_per_row, strict=True)]
    key_sizes = [rows * length for length, rows in plan.blocks]
    pieces = zip(q.split(query_sizes), to_prefix.split(query_sizes), suffix[:, -2:].split(key_sizes), strict=True)
    shares, outs = [], []
    for (length, rows), n, (block_q, outside, keys_values) in zip(plan.blocks, queries_per_row, pieces, strict=True):
        # Keys and values of the block: [R, H, length, d].
        block_k, block_v = keys_values.unflatten(0, (rows, length)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = block_q.unflatten(0, (rows, n)).transpose(1, 2) @ block_k.transpose(2, 3)  # [R, H, n, length]
        if n > 1:
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        outside = outside.unflatten(0, (rows, n)).transpose(1, 2)  # [R, H, n, Pmax]
        weights = torch.cat([outside, scores], dim=-1).softmax(dim=-1)
        share, inner = weights.split([outside.shape[-1], length], dim=-1)
        shares.append(share.transpose(1, 2).flatten(0, 1))
        outs.append((inner.to(block_v.dtype) @ block_v).transpose(1, 2).flatten(0, 1))
    share = by_group.deal(torch.cat(shares))  # [G, Tmax, H, Pmax]
    return by_group.collect(torch.einsum("gthp,gphd->gthd", share.to(prefix_v.dtype), prefix_v)) + torch.cat(outs)
