"""The demo's networks in open_clip, and the training of their text side on few token rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from captions import Vocabulary
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

WIDTH = 192
TEXT = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 3, "layers": 4}
#: The vision_cfg of each network, as in its config.json.
VISION = {
    "demo": {"layers": 6, "width": WIDTH, "head_width": 64, "patch_size": 8, "image_size": 64},
    "demo-rn": {"layers": [1, 1, 2, 1], "width": 32, "head_width": 64, "image_size": 64},
}


def build(name: str, rows: int) -> CLIP:
    """Return an untrained network with a token table of ``rows`` rows."""
    vision = {key: tuple(value) if isinstance(value, list) else value for key, value in VISION[name].items()}
    return CLIP(WIDTH, CLIPVisionCfg(**vision), CLIPTextCfg(**{**TEXT, "vocab_size": rows}))


class Texts(nn.Module):
    """The text tower in training: a token's embedding is a linear map of its GloVe vector plus a learned difference.

    The map changes all words together, so untrained words of novel names keep their position relative to the others.
    :meth:`merged` returns the plain table of the shipped network.
    """

    def __init__(self, network: CLIP, vocabulary: Vocabulary, vectors: Tensor) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.network = network
        self.register_buffer("vectors", vectors, persistent=False)
        basis = torch.linalg.qr(torch.randn(WIDTH, vectors.shape[1]))[0].T
        self.map = nn.Parameter(basis * 0.03 * WIDTH**0.5)
        self.difference = nn.Parameter(torch.randn(len(vectors), WIDTH) * 0.01)

    def merged(self) -> Tensor:
        """Return the table of embeddings ``[V, 192]``."""
        return self.vectors @ self.map + self.difference

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return unit features ``[B, 192]``; texts of similar length share a pass, which limits padding."""
        network, table = self.network, self.merged()
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        features = []
        for start in range(0, len(order), 64):
            chosen = [texts[index] for index in order[start : start + 64]]
            rows, ends = (indices.to(table.device) for indices in self._vocabulary(chosen))
            length = rows.shape[1]
            hidden = F.embedding(rows, table) + network.positional_embedding[:length]
            hidden = network.transformer(hidden, attn_mask=network.attn_mask[:length, :length])
            hidden = network.ln_final(hidden)[torch.arange(len(rows), device=table.device), ends]
            features.append(hidden @ network.text_projection)
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        return F.normalize(torch.cat(features)[place.to(table.device)].float(), dim=-1)


def optimisers(module: nn.Module, rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the transformers' matrices and AdamW for all others; biases and norms have no weight decay."""
    learned = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in learned if parameter.ndim == 2 and "resblocks" in name]
    chosen = {id(parameter) for parameter in matrices}
    rest = [(name, parameter) for name, parameter in learned if id(parameter) not in chosen]
    decayed = [p for name, p in rest if p.ndim >= 2 and "embedding" not in name]
    plain = [p for name, p in rest if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, foreach=True)
    muon = torch.optim.Muon(
        matrices, lr=matrix_rate, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    return [adam, muon]
