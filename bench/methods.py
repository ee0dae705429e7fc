"""One training step of every method: ours against the algorithm of the official code, on the same weights.

Run: python bench/methods.py [--methods coop,maple] [--classes 10,100,1000] [--device cuda] [--json]

``naive`` does what the published code does: every prompt padded to 77 tokens, images encoded in every step, CoCoOp's
prompts encoded one image after the other, ProGrad's teacher encoding the images once more, the whole last image block,
CLIP-LoRA's B A made and multiplied with, R-AMT's masks as float tensors, the frozen text of VP and of PromptKD's
teacher (here the backbone's own zero-shot model) encoded in every step, VP's pixels added to every image; APT's code
has no such algorithm of its own.
``ours`` is what vlprompt runs: packed text, image features from the store for methods that learn nothing on the image
side (they are computed once per run), the last image block for the class token alone. Both have forward and backward of
the same losses on the same numbers; ``diff`` is the largest relative difference in losses and gradients.

Methods that are fitted on features (TaskRes, the linear probe, LP++) take one step of theirs (FITTED), here on kept
features, ``naive`` after encoding the images as in every step of TaskRes's code; ``diff`` is then that of what was
fitted. CLIP-Adapter's code encodes the class prompts in every step as well.

Each side runs in a process of its own; ``MB`` is its peak with interpreter, libraries and weights; on a GPU the peak of
what torch has allocated there, after one step that is not timed. Seconds are the
least of the repeats (the naive side is timed once where a step takes longer than 20 s). The batch is the paper's: see
BATCHES. CoCoOp's seconds are per image. With ``--json`` the last line is one JSON object with ``rows``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
#: Images per step in the papers' configurations (image tokens: 4); CoCoOp's is 1, for us any number.
BATCHES = {"coop": 32, "kgcoop": 32, "prograd": 32, "mocoop": 32, "cocoop": 4, "dept": 32, "ept": 32}
BATCHES |= {"clip_lora": 32, "ramt": 32, "apt": 32, "clip_adapter": 32}
#: Settings with which fitting is one step on all images. The batch is 32, as of the adapter (TaskRes's is 256).
FITTED: dict[str, dict[str, Any]] = {
    "taskres": {"views": 0, "epochs": 1, "warmup_epochs": 0},
    "linear_probe": {"search": False, "iterations": 1},
    "lp_plus_plus": {"search": False, "iterations": 1, "views": 0},
}
_LONG = 20.0


def main(argv: list[str] | None = None) -> int:
    """Measure every method at every number of classes and print the table."""
    options = _parser().parse_args(argv)
    if options.child:
        return _child(options)
    rows = []
    for name in options.methods.split(","):
        for classes in (int(part) for part in options.classes.split(",")):
            print(f"running {name}, {classes} classes ...", file=sys.stderr, flush=True)
            rows.append(_row(options, name, classes))
            print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"model": options.model, "device": options.device, "rows": rows}))
    return int(any("error" in row for row in rows))


def _parser() -> argparse.ArgumentParser:
    every = "coop,cocoop,kgcoop,prograd,mocoop,vpt,ivlp,maple,promptsrc,restore,dept,ept,clip_lora,ramt,apt,"
    every += "visual_prompt,upt,promptkd,clip_adapter," + ",".join(FITTED)
    parser = argparse.ArgumentParser(description="A training step of every method, official algorithm and ours.")
    parser.add_argument("--methods", default=every, help="names with commas (default: all that learn)")
    parser.add_argument("--classes", default="10,100,1000", help="numbers of classes with commas")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side; the least time counts")
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, with random weights, or demo")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--child", choices=("ours", "naive"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def _row(options: argparse.Namespace, name: str, classes: int) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "classes": classes}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("ours", "naive"):
            command = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--out", f"{folder}/{side}"]
            command += ["--methods", name, "--classes", str(classes), "--repeats", str(options.repeats)]
            command += ["--model", options.model, "--device", options.device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                lines = (done.stderr or done.stdout).strip().splitlines()
                row["error"] = f"{side}: " + (lines[-1] if lines else f"signal {-done.returncode} (memory?)")
                return row
            row[side] = json.loads(done.stdout.splitlines()[-1])
        arrays = [np.load(f"{folder}/{side}.npz") for side in ("ours", "naive")]
        row["max_rel_diff"] = max(
            float(np.abs(arrays[0][key] - arrays[1][key]).max() / max(np.abs(arrays[1][key]).max(), 1e-12))
            for key in arrays[1].files
            if arrays[1][key].size
        )
    ours, naive = row["ours"], row["naive"]
    row["ratio_seconds"] = naive["seconds"] / ours["seconds"]
    row["ratio_memory"] = naive["peak_mb"] / ours["peak_mb"]
    return row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['method']:<10}{row['classes']:>6}"
    if "error" in row:
        return f"{head}  {row['error']}"
    ours, naive = row["ours"], row["naive"]
    return (
        f"{head}  ours {1000 * ours['seconds']:>8.0f} ms {ours['peak_mb']:>6.0f} MB   "
        f"naive {1000 * naive['seconds']:>8.0f} ms {naive['peak_mb']:>6.0f} MB   "
        f"time x{row['ratio_seconds']:.1f} memory x{row['ratio_memory']:.1f} diff {row['max_rel_diff']:.1e}"
    )


# -- a child ------------------------------------------------------------------------------------------------------
def _child(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(ROOT))
    import torch
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    import vlprompt

    name, classes, naive = options.methods, int(options.classes), options.child == "naive"
    source = [] if options.model == "demo" else ["random"]
    backbone, on_gpu = vlprompt.load_backbone(options.model, *source, device=options.device), options.device != "cpu"
    names = [f"{word} {i}" if i >= 1000 else word for i, word in enumerate((IMAGENET_CLASSNAMES * 2)[:classes])]
    torch.manual_seed(0)
    # Dropout draws by the shape of what it is given, which differs, and rounding decides which entries R-AMT drops: on
    # neither side is anything dropped; R-AMT computes both gradients all the same.
    own = {"cocoop": {"images_at_once": 1 if naive else 4}, "clip_lora": {"dropout": 0.0}, "ramt": {"strength": 0.0}}
    settings = {**own, **FITTED}.get(name, {})
    method = vlprompt.create_method(name, backbone, list(names), **settings).train()
    for _, parameter in method.trainable_parameters():
        if not parameter.any():  # a factor that starts at zero hides the other's gradient
            torch.nn.init.normal_(parameter.data, std=0.01)
    batch = 32 if name in FITTED else BATCHES.get(name, 4)
    size = backbone.preprocess.size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(options.device)
    labels = (torch.arange(batch) % classes).to(options.device)
    inputs = images
    if naive:
        _as_published(method, images)
    elif not method.learns_image_side:
        with torch.no_grad():
            inputs = method.image_features(images)  # from the store in a run, once
    step = _fitting_step if method.fits else _gradient_step
    times: list[float] = []
    while len(times) < options.repeats + on_gpu and not (naive and times and times[0] > _LONG):
        start = time.perf_counter()
        found = step(method, inputs, labels)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = times[on_gpu:]  # a GPU's first step chooses and compiles kernels
    found.pop("projector.linear1.bias", None)  # in front of batch norm: zero but for rounding
    np.savez(options.out, **{key: value.cpu().numpy() for key, value in found.items()})
    per = batch if name == "cocoop" else 1
    used = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = used / 2**20
    print(json.dumps({"seconds": min(times) / per, "peak_mb": peak, "batch": batch, "steps": len(times)}))
    return 0


def _gradient_step(method: Any, inputs: Any, labels: Any) -> dict[str, Any]:
    """Return the losses of a step and the gradients of all learnables."""
    import torch

    method.zero_grad(set_to_none=True)
    terms = method.losses(inputs, labels)
    torch.stack(list(terms.values())).sum().backward()
    found = {f"loss {key}": term.detach().reshape(1) for key, term in terms.items()}
    return found | {key: p.grad for key, p in method.trainable_parameters() if p.grad is not None}


def _fitting_step(method: Any, inputs: Any, labels: Any) -> dict[str, Any]:
    """Return what one step of fitting on images, or on their features, makes."""
    import torch

    from vlprompt.methods.fitting import FewShotFeatures

    with torch.no_grad():
        features = method.image_features(inputs) if inputs.ndim == 4 else inputs
    method.fit(FewShotFeatures(features[None], labels, features[:0], labels[:0], features[:0], features[None, :0]))
    return method.trained_state()


def _as_published(method: Any, images: Any) -> None:
    """Make the towers work as the official code does: padded text, the whole last image block, teachers re-encoded."""
    from vlprompt.backbone import image_tower

    method.backbone.text.algorithm = "padded"
    image_tower.LAST_BLOCK_FOR_CLASS_TOKEN = False
    if method.name == "clip_adapter":
        from vlprompt.prompts.zero_shot import template_features

        method.text_features = lambda: template_features(method.backbone, method.class_names, method.settings.templates)
    if method.name == "prograd":
        method._frozen_features = lambda inputs, features: method.backbone.encode_image(images)
    if method.name == "clip_lora":
        method.base_model._update = lambda own: _dense_update(method.base_model, own)
    if method.name == "ramt":
        method.masks.overrides = lambda prefix, parameters: {
            name: _float_mask(own, method.masks.threshold) * parameters[name]
            for name, own in method.masks.scores(prefix).items()
        }
    if method.name == "visual_prompt":
        method.backbone.image.folded = lambda pixels: None
    kept = {"visual_prompt": "text_features", "promptkd": "taught_text"}.get(method.name)
    if kept:
        from vlprompt.prompts.zero_shot import template_features

        # VP's code has spaces for hyphens.
        names = [name.replace("-", " ") if method.name == "visual_prompt" else name for name in method.class_names]
        setattr(method, kept, lambda *_: template_features(method.backbone, names, [method.settings.template]))


def _dense_update(low_rank: Any, own: Any) -> Any:
    import torch.nn.functional as F

    rate = low_rank.dropout if low_rank._drops else 0.0
    return lambda x: F.linear(F.dropout(x, rate, rate > 0), own.lora_B.weight @ own.lora_A.weight) * low_rank.scale


def _float_mask(scores: Any, threshold: float) -> Any:
    """Ones and zeros whose gradient is the scores'."""
    return (scores > threshold).float() + scores - scores.detach()


if __name__ == "__main__":
    sys.exit(main())
