"""The zero-shot table of a demo network: held-out styles by tasks, computed from the packaged files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sources import HELD_OUT, SHARE_ALIKE
from torch import Tensor

from vlprompt import create_method
from vlprompt.backbone import Backbone
from vlprompt.data.features import extract
from vlprompt.data.transforms import test_transform
from vlprompt.datasets.images import ZipSource
from vlprompt.datasets.records import Sample
from vlprompt.datasets.variants import CORRUPTIONS, VariantSource

TEMPLATES = ("an emoji of a {}.", "a photo of a {}.", "a drawing of a {}.", "{}", "an icon of a {}.")
#: Styles used to choose the training seed; scores of the chosen seed on them are not results.
SELECTION = SHARE_ALIKE
WAYS, REPEATS = 100, 100


def style_scores(backbone: Backbone, data: Path, styles: tuple[str, ...] = HELD_OUT) -> list[dict[str, Any]]:
    """Return one row of accuracies (in %) per style.

    - ``seen``: among all ``seen_classes`` trained names of the style;
    - ``noise``, ``blur``: the same with corrupted images;
    - ``seen_100``, ``novel_100``: among 100 trained or novel names, mean over 100 draws of the names;
    - ``kinds``: among ``kinds_classes`` kinds of things, for all names.
    """
    names = {row["key"]: row for row in json.loads((data / "names.json").read_text(encoding="utf-8"))}
    kinds = sorted({row["kind"] for row in names.values()})
    of_kinds = _weights(backbone, kinds)
    rows = []
    for style in styles:
        archive = data / f"{style}.zip"
        with zipfile.ZipFile(archive) as file:
            keys = sorted(name.removesuffix(".webp") for name in file.namelist() if name.endswith(".webp"))
        keys = [key for key in keys if key in names]
        sources = {key: ZipSource(str(archive), f"{key}.webp") for key in keys}
        features = _features(backbone, [sources[key] for key in keys])
        classifier = _weights(backbone, [names[key]["name"] for key in keys])
        seen = torch.tensor([not names[key]["novel"] for key in keys])
        scores = features @ classifier.t()
        row: dict[str, Any] = {"style": style, "seen_classes": int(seen.sum()), "novel_classes": int((~seen).sum())}
        row["seen"] = _accuracy(scores[seen][:, seen])
        row["seen_100"] = _among(scores[seen][:, seen])
        row["novel_100"] = _among(scores[~seen][:, ~seen])
        present = sorted({names[key]["kind"] for key in keys})
        columns = torch.tensor([kinds.index(kind) for kind in present])
        wanted = torch.tensor([present.index(names[key]["kind"]) for key in keys])
        row["kinds_classes"] = len(present)
        row["kinds"] = 100 * ((features @ of_kinds[columns].t()).argmax(1) == wanted).float().mean().item()
        for corruption in CORRUPTIONS:
            changed = [VariantSource(sources[key], corruption, f"{style}/{key}.webp") for key in keys]
            row[corruption] = _accuracy(_features(backbone, changed)[seen] @ classifier[seen].t())
        rows.append(row)
    return rows


def _weights(backbone: Backbone, names: list[str]) -> Tensor:
    method = create_method("zeroshot", backbone, names, templates=list(TEMPLATES))
    with torch.no_grad():
        return method.text_features()


def _features(backbone: Backbone, sources: list[Any]) -> Tensor:
    samples = [Sample(str(index), 0, source) for index, source in enumerate(sources)]
    return F.normalize(extract(backbone.encode_image, samples, test_transform(backbone.preprocess), 256), dim=-1)


def _accuracy(scores: Tensor) -> float:
    return 100 * (scores.argmax(1) == torch.arange(len(scores))).float().mean().item()


def _among(scores: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for _ in range(REPEATS):
        chosen = torch.randperm(len(scores), generator=generator)[:WAYS]
        accuracies.append(_accuracy(scores[chosen][:, chosen]))
    return sum(accuracies) / len(accuracies)


def selection_score(rows: list[dict[str, Any]]) -> float:
    """Return the criterion of seeds: the mean of seen, novel and noisy accuracy on the selection styles."""
    chosen = [row for row in rows if row["style"] in SELECTION]
    return sum(row["seen"] + row["novel_100"] + row["noise"] for row in chosen) / (3 * len(chosen))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table with one decimal and the number of classes in brackets."""
    head = ["style", "seen names", "with noise", "blurred", "100 seen", "100 novel", "kinds"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        few = f" ({row['novel_classes']})" if row["novel_classes"] < WAYS else ""
        lines.append(
            [
                row["style"],
                f"{row['seen']:.1f} ({row['seen_classes']})",
                f"{row['noise']:.1f}",
                f"{row['blur']:.1f}",
                f"{row['seen_100']:.1f}",
                f"{row['novel_100']:.1f}{few}",
                f"{row['kinds']:.1f} ({row['kinds_classes']})",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
