"""Decompositions: low-rank updates of the class tokens, for any method that learns text prompts.

DePT (Decomposed Prompt Tuning, Shi and Lipani, ICLR 2024; arXiv 2309.05173) replaces a long prompt by a short one and a
low-rank pair ``A B`` that is added to the input's embeddings. EPT (Lan et al., AAAI 2025; arXiv 2405.11464) also lets
the short prompt absorb what the pair has learned, and re-weights it in several subspaces. Both were published for
language models. The classes here are reconstructions on CLIP's text tower, and the EPT paper gives no equations: no
published numbers are reproduced.

A decomposition is independent of methods: a method calls ``encode_text`` instead of the tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlprompt.backbone.layout import Reach, TokenLayout, WordUpdate
from vlprompt.backbone.text_tower import TextTower
from vlprompt.config.hints import bare
from vlprompt.config.types import NonNegative, Positive, field_hints, validated
from vlprompt.errors import ConfigError
from vlprompt.registry import Registry


@validated("decomposition.dept_lowrank")
class DePTDecompositionSettings:
    """Settings of DePT's decomposition.

    With M short vectors in place of l, ``rank = floor((l - M) W / (L + W))`` gives the same number of parameters. For
    l = 16 and M = 4 on ViT-B/16 (L = 77 positions, W = 512) the rank is 10: 5,890 numbers in addition to the context's
    2,048.

    Attributes:
        rank: Columns r of A and rows of B.
        alpha: The update is ``alpha / sqrt(rank) A B``, as in the official code.
        reach: Tokens that are updated: those of the class name ("name"), also the fixed tokens after it ("suffix"), or
            also end-of-text ("end-of-text"). Context, start-of-text and words before the name are never updated.
        lr_ratio: Learning rate of the pair relative to the method's: the paper finds two rates essential.
    """

    rank: Positive = 10
    alpha: NonNegative = 8.0
    reach: Reach = "name"
    lr_ratio: NonNegative = 0.1


class Decomposition(nn.Module):
    """A low-rank update of class tokens; a subclass may change the context as well.

    ``A`` ``[L, r]`` is initialised uniformly (Kaiming, a = sqrt 5), ``B`` ``[r, W]`` with zero: step 0 is the method
    without decomposition. Both are float32. L is the length of the tower's rows (77); names use the first few.

    Args:
        tower: The text tower.
        settings: An instance of :attr:`Settings`.
    """

    name: ClassVar[str]
    Settings: ClassVar[type] = DePTDecompositionSettings

    def __init__(self, tower: TextTower, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.A = _uniform(tower.context_length, settings.rank)
        self.B = nn.Parameter(torch.zeros(settings.rank, tower.width))
        self.build(tower.width)

    def build(self, width: int) -> None:
        """Create further parameters of a subclass."""

    def update(self) -> Tensor:
        """Return the scaled update ``[L, W]``: row j belongs to the j-th token from the start of the class name."""
        scaled: Tensor = self.settings.alpha / self.settings.rank**0.5 * (self.A @ self.B)
        return scaled

    def context(self, context: Tensor, update: Tensor, used: Tensor) -> Tensor:
        """Return the context ``[..., M, W]`` that replaces ``context``.

        Args:
            context: The method's vectors.
            update: The result of :meth:`update`.
            used: Booleans ``[..., M]`` (or 1 for leading sizes): vectors that prompts refer to; others are padding.
        """
        return context

    def encode(
        self,
        tower: TextTower,
        layout: TokenLayout,
        context: Tensor,
        deep: Mapping[int, Tensor] | None,
        update: Tensor,
    ) -> Tensor:
        """Return raw text features ``[G, C, D]`` of ``layout``, with the update and the changed context."""
        used = torch.zeros(layout.groups, context.shape[-2], dtype=torch.bool)
        used[:, : layout.context_length] = layout.context_used
        if layout.class_specific:
            used = used.unsqueeze(1)
        changed = self.context(context, update, used.to(context.device))
        return tower.encode(layout, changed, deep, WordUpdate(update, self.settings.reach))


# -- the registry -----------------------------------------------------------------------------------------------------
_DECOMPOSITIONS: Registry[Decomposition] = Registry("decomposition", {"dept": "dept_lowrank"})
D = TypeVar("D", bound=type[Decomposition])


def register_decomposition(name: str) -> Callable[[D], D]:
    """Register a :class:`Decomposition` under ``name``: usable from YAML with every method that learns text prompts.

    Raises:
        ValueError: Another class has the name.
    """
    return _DECOMPOSITIONS.enrol(name)


def list_decompositions() -> list[str]:
    """Return the names of all decompositions, sorted."""
    return _DECOMPOSITIONS.names()


def get_decomposition_class(name: str) -> type[Decomposition]:
    """Return the class registered as ``name``; raises ConfigError with the nearest names."""
    return _DECOMPOSITIONS.get(name)


def check_decomposition(wanted: object) -> dict[str, dict[str, Any]]:
    """Check a decomposition's form and types and return ``{name: settings}``, with at most one entry.

    Raises:
        ConfigError: More than one, an unknown name or setting, or a value that is not accepted.
    """
    if not isinstance(wanted, Mapping):
        raise ConfigError(f"decomposition is {wanted!r}; accepted: a name with its settings, such as {{ept: {{}}}}")
    if len(wanted) > 1:
        raise ConfigError(f"decomposition names {', '.join(map(repr, wanted))}; accepted: one of them, or none")
    for name, given in wanted.items():
        get_decomposition_class(name)
        if not isinstance(given, Mapping):
            raise ConfigError(f"decomposition.{name} is {given!r}; accepted: its settings, {{}} for the defaults")
        _DECOMPOSITIONS.settings(name, given)
    return {name: dict(given) for name, given in wanted.items()}


class Host(Protocol):
    """Interface of the method that a decomposition is created for."""

    name: ClassVar[str]
    backbone: Any
    no_objectives: ClassVar[str | None]

    def training_layouts(self) -> list[TokenLayout]:
        """Return the layouts that a training step encodes; empty if no text prompts are learned."""


def decompositions_in(settings: type) -> list[str]:
    """Return the decompositions that a method's ``Settings`` declares: fields with a decomposition's settings."""
    known = _DECOMPOSITIONS.names()
    hints = field_hints(settings).items()
    return [name for name, hint in hints if name in known and bare(hint) is get_decomposition_class(name).Settings]


def create_decomposition(host: Host, wanted: Mapping[str, Any]) -> Decomposition | None:
    """Return the decomposition in ``wanted`` (checked), for the method ``host``; None if ``wanted`` is empty.

    Raises:
        ConfigError: A value that is not accepted, or a method that learns no text prompts in training.
    """
    for name, given in wanted.items():
        kind = get_decomposition_class(name)
        settings = given if isinstance(given, kind.Settings) else _DECOMPOSITIONS.settings(name, given)
        layouts = host.training_layouts()
        if not layouts or any(layout.names is None for layout in layouts):
            why = host.no_objectives or "it learns no text prompts in training"
            why = "its prompts are hand-written, and it learns elsewhere in the text tower" if layouts else why
            raise ConfigError(
                f"decomposition {name!r} cannot go with method {host.name!r}: {why}; leave decomposition empty, or "
                "take a method that learns text prompts, such as coop or maple"
            )
        return kind(host.backbone.text, settings)
    return None


# -- the decompositions -----------------------------------------------------------------------------------------------
@register_decomposition("dept_lowrank")
class DePTDecomposition(Decomposition):
    """DePT: a short context and a low-rank update of the class tokens (reconstruction on CLIP)."""

    settings: DePTDecompositionSettings


@validated("decomposition.ept")
class EPTDecompositionSettings(DePTDecompositionSettings):
    """Settings of EPT's decomposition: those of DePT, of the fusion and of the subspaces.

    Attributes:
        rank: Columns r of A and rows of B.
        alpha: The update is ``alpha / sqrt(rank) A B``.
        reach: Tokens that are updated, as in DePT.
        lr_ratio: Learning rate of all parameters of the decomposition, relative to the method's.
        fusion_rank: Rank of the maps to queries, keys and values.
        spaces: J subspaces that the context is projected into.
        bottleneck: Width of each subspace.
    """

    fusion_rank: Positive = 8
    spaces: Positive = 3
    bottleneck: Positive = 32


@register_decomposition("ept")
class EPTDecomposition(Decomposition):
    """EPT: DePT with a context that absorbs the update and is re-weighted in subspaces (reconstruction).

    With short context P ``[M, W]`` and update K ``[L, W]``:
    ``F = P + softmax(P Wq (K Wk)^T / sqrt W) K Wv`` (fusion), and ``F + sum_j g_j U_j relu(V_j F)`` with gates
    ``g = softmax(G mean_rows(F))`` (multi-space projection). Wv and all U_j start at zero: step 0 equals
    DePT. K starts at zero too, so the first gradients of the fusion are products of small numbers: with SGD at the
    update's small rate the fusion changes little, and EPT stays close to DePT.
    """

    Settings = EPTDecompositionSettings
    settings: EPTDecompositionSettings

    def build(self, width: int) -> None:
        """Create the factors of Wq, Wk and Wv, the subspaces ``V`` ``[J, H, W]``, ``U`` ``[J, W, H]``, and the gate."""
        settings, rank = self.settings, self.settings.fusion_rank
        self.query_in, self.query_out = _uniform(width, rank, fan_in=width), _uniform(rank, width, fan_in=rank)
        self.key_in, self.key_out = _uniform(width, rank, fan_in=width), _uniform(rank, width, fan_in=rank)
        self.value_in, self.value_out = _uniform(width, rank, fan_in=width), nn.Parameter(torch.zeros(rank, width))
        self.V = _uniform(settings.spaces, settings.bottleneck, width)
        self.U = nn.Parameter(torch.zeros(settings.spaces, width, settings.bottleneck))
        self.gate = _uniform(settings.spaces, width)

    def fused(self, context: Tensor, update: Tensor) -> Tensor:
        """Return the context ``[..., M, W]`` after cross-attention to the update ``[L, W]``."""
        query, key = context @ self.query_in @ self.query_out, update @ self.key_in @ self.key_out
        weights = (query @ key.t() / math.sqrt(context.shape[-1])).softmax(dim=-1)  # [..., M, L]
        taken: Tensor = weights @ (update @ self.value_in @ self.value_out)
        return context + taken

    def gates(self, fused: Tensor, used: Tensor) -> Tensor:
        """Return the weights of the subspaces ``[..., J]``, with sum 1, from the mean of the used vectors."""
        share = used / used.sum(dim=-1, keepdim=True).clamp(min=1)  # [..., M]
        mean = (share.unsqueeze(-1) * fused).sum(dim=-2)
        return (mean @ self.gate.t()).softmax(dim=-1)

    def context(self, context: Tensor, update: Tensor, used: Tensor) -> Tensor:
        """Return the fused and projected context ``[..., M, W]``."""
        fused = self.fused(context, update)
        hidden = torch.einsum("...mw,jhw->...mjh", fused, self.V).relu()
        weighted = hidden * self.gates(fused, used)[..., None, :, None]
        return fused + torch.einsum("...mjh,jwh->...mw", weighted, self.U)


def _uniform(*shape: int, fan_in: int | None = None) -> nn.Parameter:
    """Return a uniform parameter in +-1/sqrt(fan_in) (Kaiming, a = sqrt 5); fan_in defaults to the last size."""
    bound = (fan_in or shape[-1]) ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
