"""CLIP's text tower with inserted context vectors: a packed algorithm and a padded reference.

CLIP's text transformer is causal, so (1) tokens after end-of-text cannot change the feature, and (2) tokens before the
class name are encoded once per group instead of once per class. The packed algorithm runs only the tokens that matter,
concatenated in one ``[P + T, W]`` tensor: layer norms, projections and MLPs process no padding, and the last layer runs
only for pooled tokens. The padded algorithm is the published one: every row is padded to 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlprompt._memory import total_memory
from vlprompt.backbone.added import NOTHING, Added, checked_overrides, is_plain, require_plain, run_block
from vlprompt.backbone.layout import TokenLayout, WordUpdate
from vlprompt.backbone.packed import packed_block
from vlprompt.errors import BackboneError

Algorithm = Literal["packed", "padded", "cut"]

# Activations kept for the backward pass per packed token, in widths per layer: layer-norm inputs, q, k, v, attention
# output, and the MLP's hidden state before and after the activation.
KEPT_WIDTHS = 18


class TextTower:
    """Frozen CLIP text transformer that encodes token layouts.

    Args:
        model: An open_clip model with ``transformer``, ``token_embedding``, ``positional_embedding``, ``ln_final`` and
            ``text_projection``, which pools the last slot of each row.
        tokenizer: open_clip's tokenizer of the model; ``encode`` returns byte-pair ids without special tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._runner = _Runner(model)
        self.algorithm: Algorithm = "packed" if self._can_pack() else "padded"
        self.classes_per_chunk: int | None = None
        """Classes per chunk; chunks recompute activations in the backward pass. None: chosen by memory."""

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """W, the width of context vectors."""
        return int(self.model.token_embedding.weight.shape[1])

    @property
    def layers(self) -> int:
        """Number of transformer layers; deep context is accepted for layers 1 to ``layers - 1``."""
        return len(self.model.transformer.resblocks)

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt, with start- and end-of-text (77 in CLIP)."""
        return int(self.model.positional_embedding.shape[0])

    @property
    def causal(self) -> bool:
        """Whether a token attends only to earlier tokens."""
        return self.model.attn_mask is not None

    def _can_pack(self) -> bool:
        # The packed path repeats the steps of open_clip's plain block; other blocks use the padded path.
        return self.causal and all(is_plain(block) for block in self.model.transformer.resblocks)

    # -- words ----------------------------------------------------------------------------------------------------
    def tokens(self, text: str) -> list[int]:
        """Return the byte-pair ids of ``text`` with start- and end-of-text, without truncation."""
        cleaned = self.tokenizer.clean_fn(text)
        return [self.tokenizer.sot_token_id, *self.tokenizer.encode(cleaned), self.tokenizer.eot_token_id]

    def embed(self, tokens: list[int]) -> Tensor:
        """Return float32 copies of the token embeddings, ``[len(tokens), W]``, without position embeddings."""
        weight = self.model.token_embedding.weight
        ids = torch.tensor(tokens, dtype=torch.int64, device=weight.device)
        vectors: Tensor = weight[ids].detach().float().clone()
        return vectors

    # -- encoding -------------------------------------------------------------------------------------------------
    def encode(
        self,
        layout: TokenLayout,
        context: Tensor | None = None,
        deep: Mapping[int, Tensor] | None = None,
        words: WordUpdate | None = None,
        *,
        algorithm: Algorithm | None = None,
        overrides: Mapping[str, Tensor] | None = None,
        added: Added | None = None,
    ) -> Tensor:
        """Return raw text features ``[G, C, D]`` in float32 (float64 for a float64 backbone).

        Args:
            layout: Slots of C classes in G groups.
            context: ``[G, M, W]``, or ``[G, C, M, W]`` for a class-specific layout (``G`` may be omitted if it is 1).
                With a one-group layout, G contexts (one per image) repeat the layout.
            deep: Maps a layer (1 ... layers - 1) to vectors of the same form that overwrite the context slots at the
                input of that layer, without position embedding; fewer than M vectors overwrite the first slots.
            words: Update added to the embeddings of class tokens, before position embeddings.
            algorithm: ``packed``, ``padded`` (to 77), or ``cut`` (padded to the longest row); default: packed if the
                tower supports it.
            overrides: Maps a parameter name inside the tower (:meth:`parameters`) to the tensor used instead.
            added: Additions inside the blocks.

        Raises:
            BackboneError: The packed algorithm was requested of a tower that is not causal; context or words do not
                match the layout; unknown parameter names or wrong shapes; or additions to blocks that are not CLIP's.
        """
        algorithm = algorithm or self.algorithm
        if algorithm != "padded" and not self._can_pack():
            raise BackboneError(
                f"the text algorithm {algorithm!r} needs CLIP's causal text tower, which this one is not; use 'padded'"
            )
        context, deep = self._checked(layout, context, dict(deep or {}))
        if words is not None:
            self._check_words(layout, words)
        given = [x for x in (context, *deep.values()) if x is not None]
        if given and len(given[0]) > layout.groups:  # one group with one context per image
            layout = layout.repeat_groups(len(given[0]))
        if added is not None:
            require_plain(self.model.transformer.resblocks, "text tower")
        overrides = checked_overrides(self.parameters(), overrides or {}, "text tower")
        run = partial(self._runner.run, self._packed if algorithm == "packed" else self._padded, overrides, added)
        size = layout.classes
        if algorithm == "packed":
            size = min(size, self.classes_per_chunk or self._fitting_classes(layout))
        if size >= layout.classes:
            return run(layout, context, deep, words, algorithm)
        features = []
        for start in range(0, layout.classes, size):
            stop = min(start + size, layout.classes)
            chunk = layout.select(start, stop)
            chunk_context = context[:, start:stop] if context is not None and layout.class_specific else context
            chunk_deep = {k: v[:, start:stop] if layout.class_specific else v for k, v in deep.items()}
            if torch.is_grad_enabled():
                features.append(
                    checkpoint(run, chunk, chunk_context, chunk_deep, words, algorithm, use_reentrant=False)
                )
            else:
                features.append(run(chunk, chunk_context, chunk_deep, words, algorithm))
        return torch.cat(features, dim=1)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the frozen parameters by their names inside the tower, without those of the image tower."""
        return {name: value for name, value in self.model.named_parameters() if not name.startswith("visual.")}

    def _checked(
        self, layout: TokenLayout, context: Tensor | None, deep: dict[int, Tensor]
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        kind = "[G, C, M, W]" if layout.class_specific else "[G, M, W]"
        rank = 4 if layout.class_specific else 3
        longest, slots = layout.slots.shape[2], layout.context_length
        if longest > self.context_length:
            raise BackboneError(f"a row has {longest} slots; this text tower takes {self.context_length} or fewer")
        if slots and context is None:
            raise BackboneError(f"the layout has {slots} context slots but no context was given")
        if not slots and context is not None and context.numel():
            raise BackboneError(f"context of shape {list(context.shape)} was given, but the layout has no slots for it")
        wrong = [layer for layer in deep if not 1 <= layer < self.layers]
        if wrong:
            raise BackboneError(f"deep context at layer {wrong[0]}; accepted: 1 to {self.layers - 1}")
        if deep and not slots:
            raise BackboneError("deep context was given, but the layout has no context slots to overwrite")
        contexts = {"context": context} if context is not None and slots else {}
        contexts |= {f"deep context of layer {layer}": x for layer, x in sorted(deep.items())}
        given_groups = [0, *(len(x) for x in contexts.values() if x.ndim == rank)]
        groups = max(1, *given_groups) if layout.groups == 1 else layout.groups

        def shaped(what: str, x: Tensor) -> Tensor:
            fits = x.ndim in (rank - 1, rank) and x.shape[-1] == self.width
            fits = fits and (what != "context" or x.shape[-2] >= slots)
            fits = fits and (not layout.class_specific or x.shape[-3] == layout.classes)
            if fits and x.ndim == rank - 1:
                x = x.unsqueeze(0)
            if not fits or len(x) not in {groups, layout.groups}:
                raise BackboneError(
                    f"{what} has shape {list(x.shape)}; expected {kind} with G={groups}, C={layout.classes}, "
                    f"M={slots}, W={self.width}"
                )
            return x.expand(groups, *x.shape[1:])

        checked = {what: shaped(what, x) for what, x in contexts.items()}
        at_input = checked.pop("context", None)
        return at_input, dict(zip(sorted(deep), checked.values(), strict=True))

    def _check_words(self, layout: TokenLayout, words: WordUpdate) -> None:
        furthest, shape = int(layout.word_index(words.reach).max()), list(words.vectors.shape)
        if len(shape) != 2 or shape[1] != self.width or shape[0] <= furthest:
            raise BackboneError(
                f"the word update has shape {shape}; expected [K, {self.width}] with K of {furthest + 1} or more"
            )

    def _fitting_classes(self, layout: TokenLayout) -> int:
        total = total_memory(self.model.positional_embedding.device)
        tokens = max(1, layout.token_counts()[0] // layout.classes)  # per class, in all groups
        kept = self.layers * KEPT_WIDTHS if torch.is_grad_enabled() else 2 * KEPT_WIDTHS
        return max(1, int(total / 4 / (tokens * self.width * 4 * kept)))

    def _finish(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return features ``[G, C, D]``, float32 or wider, of pooled tokens ``[G * C, W]`` (layer norm, projection)."""
        x = self.model.ln_final(x)
        projection = self.model.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection
        features: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
        return features.reshape(layout.groups, layout.classes, -1)

    # -- padded: the reference ------------------------------------------------------------------------------------
    def _padded(
        self,
        added: Added | None,
        layout: TokenLayout,
        context: Tensor | None,
        deep: dict[int, Tensor],
        words: WordUpdate | None,
        algorithm: Algorithm,
    ) -> Tensor:
        model, dtype = self.model, self.model.transformer.get_cast_dtype()
        device = model.positional_embedding.device
        length = self.context_length if algorithm == "padded" else layout.slots.shape[2]
        slots = F.pad(layout.slots, (0, length - layout.slots.shape[2])).flatten(0, 1).to(device)  # [G * C, length]
        rows, places = (slots < 0).nonzero(as_tuple=True)
        vectors = -1 - slots[rows, places]
        owners = rows if layout.class_specific else rows // layout.classes

        def insert(x: Tensor, vectors_in: Tensor, positions: Tensor | None) -> Tensor:
            flat = vectors_in.flatten(0, -3).to(dtype)  # [owners, M, W]
            chosen = vectors < flat.shape[1]
            new = flat[owners[chosen], vectors[chosen]]
            if positions is not None:
                new = new + positions[places[chosen]]
            return x.index_put((rows[chosen], places[chosen]), new)

        positions = model.positional_embedding[:length].to(dtype)
        x = model.token_embedding(slots.clamp(min=0)).to(dtype) + positions
        if words is not None:
            index = layout.word_index(words.reach).flatten(0, 1).to(device)
            reached = (index >= 0).nonzero(as_tuple=True)
            x = x.index_put(reached, words.vectors.to(dtype)[index[reached]], accumulate=True)
        if context is not None:
            x = insert(x, context, positions)
        mask = model.attn_mask[:length, :length] if self.causal else None
        batch_first = getattr(model.transformer, "batch_first", True)
        for layer, block in enumerate(model.transformer.resblocks):
            if layer in deep:
                x = insert(x, deep[layer], None)
            if added is not None:
                x = run_block(block, x, layer, added, mask)
            elif batch_first:
                x = block(x, attn_mask=mask)
            else:
                x = block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)
        pooled = x[torch.arange(len(x), device=device), layout.lengths.reshape(-1).to(device) - 1]
        return self._finish(pooled, layout)

    # -- packed ---------------------------------------------------------------------------------------------------
    def _packed(
        self,
        added: Added | None,
        layout: TokenLayout,
        context: Tensor | None,
        deep: dict[int, Tensor],
        words: WordUpdate | None,
        algorithm: Algorithm,
    ) -> Tensor:
        model, dtype = self.model, self.model.transformer.get_cast_dtype()
        plan = layout.plan(model.positional_embedding.device, words.reach if words else None)

        def insert(x: Tensor, vectors: Tensor, positions: Tensor | None) -> Tensor:
            flat = vectors.flatten(0, -3).to(dtype)
            at, owner, vector = plan.context_at, plan.context_owner, plan.context_vector
            if flat.shape[1] <= int(vector.max()):
                chosen = vector < flat.shape[1]
                at, owner, vector = at[chosen], owner[chosen], vector[chosen]
            new = flat.flatten(0, 1).index_select(0, owner * flat.shape[1] + vector)
            if positions is not None:
                new = new + positions.index_select(0, plan.position[at])
            return x.index_copy(0, at, new.to(x.dtype))

        positions = model.positional_embedding.to(dtype)
        x = model.token_embedding(plan.token_ids).to(dtype) + positions[plan.position]
        if words is not None:
            x = x.index_add(0, plan.word_at, words.vectors.to(dtype).index_select(0, plan.word_index))
        if context is not None:
            x = insert(x, context, positions)
        for layer, block in enumerate(model.transformer.resblocks):
            if layer in deep:
                x = insert(x, deep[layer], None)
            x = packed_block(block, x, plan, layer, added or NOTHING, last=layer == self.layers - 1)
        return self._finish(x.index_select(0, plan.restore), layout)


class _Runner(nn.Module):
    """Wrapper of the tower with which ``torch.func.functional_call`` replaces parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, algorithm: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return algorithm(*inputs)

    def run(self, algorithm: Callable[..., Tensor], overrides: Mapping[str, Tensor], *inputs: Any) -> Tensor:
        """Return ``algorithm(*inputs)`` with ``overrides`` in place of the model's parameters."""
        if not overrides:
            return algorithm(*inputs)
        named = {f"model.{name}": value for name, value in overrides.items()}
        features: Tensor = torch.func.functional_call(self, named, (algorithm, *inputs))
        return features
