"""Test-time and cache methods: ours compared with the algorithm of the official code, on the same inputs.

Run: python bench/testtime.py [--method tpt,tda,tip_adapter] [--classes 1000] [--json]

``tpt``: text encoding for one test image. ``naive`` is the published loop: every class padded to 77 tokens, a forward
and a backward pass, AdamW, and another forward pass. It runs for one image, in chunks of classes so that the graph fits
into memory; the preparation of these chunks is not timed. ``ours`` adapts ``--images`` images together, and its time is
divided by their number.

``tda``: a stream of images. ``naive`` keeps lists of items and rebuilds keys and one-hot values for every image.

``tip_adapter``: the search of alpha and beta; see bench/testtime_caches.py.

Dimensions are those of ``--model``; weights and features are random. ``diff`` is the largest difference of logits over
the largest logit. With ``--json`` the last line is one JSON object with ``rows``, the smallest ``ratio_seconds`` and
the largest ``max_rel_diff``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
METHODS = ("tpt", "tda", "tip_adapter")
_CHUNK = 50  # classes per chunk of the padded graph: 1.7 GB at ViT-B/16's dimensions


def main(argv: list[str] | None = None) -> int:
    """Measure the requested methods and print one line for each."""
    options = _parser().parse_args(argv)
    wanted = METHODS if options.method == "all" else options.method.split(",")
    rows = []
    for name in wanted:
        print(f"running {name}, {options.classes} classes ...", file=sys.stderr, flush=True)
        rows.append({"method": name, "classes": options.classes, **_MEASURES[name](options)})
        print(_line(rows[-1]), flush=True)
    if options.json:
        least = min(row["ratio_seconds"] for row in rows)
        largest = max(row["max_rel_diff"] for row in rows)
        print(json.dumps({"model": options.model, "ratio_seconds": least, "max_rel_diff": largest, "rows": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Test-time and cache methods: official algorithm and ours.")
    parser.add_argument(
        "--method", type=_names, default="all", help=f"all, or some of {', '.join(METHODS)}, separated by commas"
    )
    parser.add_argument("--classes", type=_count, default=1000, help="number of classes (default 1000)")
    parser.add_argument("--images", type=_count, default=4, help="images that TPT adapts together (default 4)")
    parser.add_argument("--stream", type=_count, default=1000, help="images in TDA's stream (default 1000)")
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, with random weights, or demo")
    parser.add_argument("--threads", type=_count, help="threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; accepted: 1 or more")
    return value


def _names(text: str) -> str:
    unknown = [name for name in text.split(",") if name not in (*METHODS, "all")]
    if unknown or ("all" in text.split(",") and text != "all"):
        raise argparse.ArgumentTypeError(
            f"{text!r}; accepted: all, or some of {', '.join(METHODS)}, separated by commas"
        )
    return text


def _line(row: dict[str, Any]) -> str:
    times = [f"{side} {1000 * row[side]:>10.1f} ms" for side in ("ours_seconds", "naive_seconds") if side in row]
    head = f"{row['method']:<12}{row['classes']:>6}  " + "   ".join(time.replace("_seconds", "") for time in times)
    return f"{head}   time x{row['ratio_seconds']:.1f} diff {row['max_rel_diff']:.1e}"


def _row(ours: float, naive: float, actual: Any, expected: Any, **facts: Any) -> dict[str, Any]:
    difference = float((actual - expected).abs().max() / expected.abs().max())
    row = {"ours_seconds": ours, "naive_seconds": naive, "ratio_seconds": naive / ours, "max_rel_diff": difference}
    return {**row, **facts}


def _setup(options: argparse.Namespace) -> Any:
    import torch

    import vlprompt

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return vlprompt.load_backbone(options.model, *([] if options.model == "demo" else ["random"]))


# -- TPT --------------------------------------------------------------------------------------------------------------
def _tpt(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    import vlprompt

    backbone = _setup(options)
    words = (IMAGENET_CLASSNAMES * (1 + options.classes // 1000))[: options.classes]
    names = [f"{word} {i}" if i >= 1000 else word for i, word in enumerate(words)]
    method: Any = vlprompt.create_method("tpt", backbone, names)
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(options.images, 1, backbone.embed_dim, generator=generator)
    views = F.normalize(centre + 0.5 * torch.randn(options.images, 64, backbone.embed_dim, generator=generator), dim=-1)
    start = time.perf_counter()
    actual = method.adapt(views)
    ours = (time.perf_counter() - start) / options.images
    naive, expected = _naive_tpt(method, views[0])
    return _row(ours, naive, actual[0], expected, images=options.images, tokens=list(method.layout.token_counts()))


def _naive_tpt(method: Any, views: Any) -> tuple[float, Any]:
    """Return the seconds and the logits ``[C]`` of the published loop for one image with unit views ``[V, D]``."""
    import torch
    import torch.nn.functional as F

    from vlprompt.testtime.selection import marginal_entropy

    backbone, layout = method.backbone, method.layout
    chunks = [layout.select(i, min(i + _CHUNK, layout.classes)) for i in range(0, layout.classes, _CHUNK)]

    def text(chunk: Any, context: Any) -> Any:
        return F.normalize(backbone.text.encode(chunk, context, algorithm="padded")[0], dim=-1)

    context = method.ctx.detach().clone().requires_grad_()
    # Not timed: the cotangent of the text features, with which each chunk can be processed separately.
    features = method.initial_text_features().detach().clone().requires_grad_()
    logits = backbone.logit_scale * views @ features.t()
    chosen = method.select(logits.detach()[None], views[None])[0]
    cotangent = torch.autograd.grad(marginal_entropy(logits[chosen]), features)[0].split(_CHUNK)
    optimizer = torch.optim.AdamW([context], method.settings.lr)
    start = time.perf_counter()
    for chunk, gradient in zip(chunks, cotangent, strict=True):
        text(chunk, context).backward(gradient)
    optimizer.step()
    with torch.no_grad():
        tuned = torch.cat([text(chunk, context) for chunk in chunks])
        expected = backbone.logit_scale * views[0] @ tuned.t()
    return time.perf_counter() - start, expected


# -- TDA --------------------------------------------------------------------------------------------------------------
def _tda(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from vlprompt.testtime.tda import TDAStream, summarise

    if options.threads:
        torch.set_num_threads(options.threads)
    classes, width, scale = options.classes, 512, 100.0
    generator = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(classes, width, generator=generator), dim=-1)
    labels = torch.randint(classes, (options.stream,), generator=generator)
    noise = F.normalize(torch.randn(options.stream, width, generator=generator), dim=-1)
    images = F.normalize(0.13 * text[labels] + noise, dim=-1)  # so uncertain that both caches are used
    start = time.perf_counter()
    stream = TDAStream(classes, width)
    actual = stream.score(summarise(images[:, None], text, scale)).logits
    ours = time.perf_counter() - start
    start = time.perf_counter()
    expected = _naive_tda(images, text.t().contiguous(), scale)
    naive = time.perf_counter() - start
    held = {name: int((slots.index >= 0).sum()) for name, slots in stream.slots.items()}
    return _row(ours, naive, actual, expected, images=options.stream, held=held)


def _naive_tda(images: Any, weights: Any, scale: float) -> Any:
    """Return the logits ``[T, C]``, computed per image: lists per class, keys and values rebuilt for every image."""
    import torch
    import torch.nn.functional as F

    classes, rows = weights.shape[1], []
    positive: dict[int, list[Any]] = {}
    negative: dict[int, list[Any]] = {}

    def insert(cache: dict[int, list[Any]], label: int, item: Any, capacity: int) -> None:
        items = cache.setdefault(label, [])
        if len(items) < capacity:
            items.append(item)
        elif item[1] < items[-1][1]:
            items[-1] = item
        items.sort(key=lambda entry: entry[1])

    for image in images:
        feature = image[None]
        logits = scale * feature @ weights
        p = logits.softmax(dim=1)
        entropy = float(-(p * logits.log_softmax(dim=1)).sum())
        label = int(logits.argmax())
        insert(positive, label, (feature, entropy), 3)
        if 0.2 < entropy / math.log2(classes) < 0.5:
            insert(negative, label, (feature, entropy, p), 2)
        final = logits.clone()
        if positive:
            items = [(label, item) for label in sorted(positive) for item in positive[label]]
            keys = torch.cat([item[0] for _, item in items]).t()
            values = F.one_hot(torch.tensor([label for label, _ in items]), classes).float()
            final += 2.0 * (-5.0 * (1 - feature @ keys)).exp() @ values
        if negative:
            items = [(label, item) for label in sorted(negative) for item in negative[label]]
            keys = torch.cat([item[0] for _, item in items]).t()
            stored = torch.cat([item[2] for _, item in items])
            values = ((stored > 0.03) & (stored < 1.0)).float()
            final -= 0.117 * (-1.0 * (1 - feature @ keys)).exp() @ values
        rows.append(final)
    return torch.cat(rows)


# -- Tip-Adapter ------------------------------------------------------------------------------------------------------
def _tip_adapter(options: argparse.Namespace) -> dict[str, Any]:
    from testtime_caches import tip_search_row

    row: dict[str, Any] = tip_search_row(options.classes)
    return {**row, **{f"{side}_seconds": row[side]["seconds"] for side in ("ours", "naive")}}


_MEASURES = {"tpt": _tpt, "tda": _tda, "tip_adapter": _tip_adapter}

if __name__ == "__main__":
    sys.exit(main())
