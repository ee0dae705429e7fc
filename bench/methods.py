"""One training step of every method: ours compared with the algorithm of the official code, on the same weights.

Run: python bench/methods.py [--methods coop,maple] [--classes 10,100,1000] [--device cuda] [--json]

``naive`` is the algorithm of the published code. Every prompt is padded to 77 tokens, images are encoded in every step,
and the last image block is computed for all tokens. CoCoOp's prompts are encoded for one image at a time. ProGrad's
teacher encodes the images again. CLIP-LoRA's product B A is computed, R-AMT's masks are float tensors, VP's pixels are
added to every image. The frozen text of VP and of PromptKD's teacher (here the backbone's zero-shot model) is encoded
in every step. APT has no naive algorithm.

``ours`` is vlprompt: packed text, image features from the feature store for methods without image-side parameters
(computed once per run), and the last image block only for the class token. Both sides run a forward and backward pass
of the same losses on the same inputs; ``diff`` is the largest relative difference of losses and gradients.

Methods that are fitted on features (TaskRes, the linear probe, LP++) run one fitting step (FITTED) on stored features;
``naive`` encodes the images first, as TaskRes's code does in every step. ``diff`` then compares the fitted tensors.
CLIP-Adapter's naive side also encodes the class prompts in every step.

Each side runs in a separate process. ``MB`` is its peak memory with interpreter, libraries and weights, or on a GPU
torch's peak of allocated memory; one step before the timed ones is not counted there. Times are the shortest of the
repeats (the naive side is timed once if a step takes longer than 20 s). The batch is the paper's (see BATCHES).
CoCoOp's times are per image. With ``--json`` the last line is one JSON object with ``rows``.
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
#: Images per step in the papers' configurations (4 for methods with image tokens). CoCoOp's is 1 in the paper.
BATCHES = {"coop": 32, "kgcoop": 32, "prograd": 32, "mocoop": 32, "cocoop": 4, "dept_lowrank": 32, "ept": 32}
BATCHES |= {"clip_lora": 32, "ramt": 32, "apt_approximated": 32, "clip_adapter": 32}
#: Settings with which fitting is one step on all images. The batch is 32, as for CLIP-Adapter (TaskRes's is 256).
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
        for classes in (int(number) for number in options.classes.split(",")):
            print(f"running {name}, {classes} classes ...", file=sys.stderr, flush=True)
            rows.append(_row(options, name, classes))
            print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"model": options.model, "device": options.device, "rows": rows}))
    return int(any("error" in row for row in rows))


def _parser() -> argparse.ArgumentParser:
    every = "coop,cocoop,kgcoop,prograd,mocoop,vpt,ivlp,maple,promptsrc,restore,dept_lowrank,ept,clip_lora,ramt,"
    every += "apt_approximated,visual_prompt,upt,promptkd,clip_adapter," + ",".join(FITTED)
    parser = argparse.ArgumentParser(description="A training step of every method: official algorithm and ours.")
    parser.add_argument("--methods", default=every, help="names, separated by commas (default: all trained methods)")
    parser.add_argument("--classes", default="10,100,1000", help="numbers of classes, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side; the shortest time counts")
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
    # Nothing is dropped on either side: dropout depends on the shape of its input, which differs, and R-AMT's dropped
    # entries depend on rounding. R-AMT still computes both gradients.
    without_drops = {
        "cocoop": {"images_at_once": 1 if naive else 4},
        "clip_lora": {"dropout": 0.0},
        "ramt": {"strength": 0.0},
    }
    settings = {**without_drops, **FITTED}.get(name, {})
    method = vlprompt.create_method(name, backbone, list(names), **settings).train()
    for _, parameter in method.trainable_parameters():
        if not parameter.any():  # a zero factor would make the other's gradient zero
            torch.nn.init.normal_(parameter.data, std=0.01)
    batch = 32 if name in FITTED else BATCHES.get(name, 4)
    size = backbone.preprocess.size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(options.device)
    labels = (torch.arange(batch) % classes).to(options.device)
    inputs = images
    if naive:
        _as_published(method, images)
    elif not method.needs.images:
        with torch.no_grad():
            inputs = method.image_features(images)  # in a run they come from the feature store
    from vlprompt.methods.fitted import FittedMethod

    step = _fitting_step if isinstance(method, FittedMethod) else _gradient_step
    times: list[float] = []
    while len(times) < options.repeats + on_gpu and not (naive and times and times[0] > _LONG):
        start = time.perf_counter()
        outputs = step(method, inputs, labels)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = times[on_gpu:]  # the first step on a GPU selects and compiles kernels
    outputs.pop("projector.linear1.bias", None)  # before batch norm: zero up to rounding
    np.savez(options.out, **{key: value.cpu().numpy() for key, value in outputs.items()})
    divisor = batch if name == "cocoop" else 1
    used = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = used / 2**20
    print(json.dumps({"seconds": min(times) / divisor, "peak_mb": peak, "batch": batch, "steps": len(times)}))
    return 0


def _gradient_step(method: Any, inputs: Any, labels: Any) -> dict[str, Any]:
    """Return the losses of a step and the gradients of all trainable parameters."""
    import torch

    method.zero_grad(set_to_none=True)
    terms = method.losses(inputs, labels)
    torch.stack(list(terms.values())).sum().backward()
    losses = {f"loss {key}": term.detach().reshape(1) for key, term in terms.items()}
    return losses | {key: p.grad for key, p in method.trainable_parameters() if p.grad is not None}


def _fitting_step(method: Any, inputs: Any, labels: Any) -> dict[str, Any]:
    """Return the state after one fitting step on images or their features."""
    import torch

    from vlprompt.methods.fitted import FewShotFeatures

    with torch.no_grad():
        features = method.image_features(inputs) if inputs.ndim == 4 else inputs
    method.fit(FewShotFeatures(features[None], labels, features[:0], labels[:0], features[:0], features[None, :0]))
    return method.trained_state()


def _as_published(method: Any, images: Any) -> None:
    """Switch ``method`` to the official algorithms: padded text, whole last image block, re-encoded teachers."""
    from vlprompt.backbone import image_tower

    method.backbone.text.algorithm = "padded"
    image_tower.LAST_BLOCK_FOR_CLASS_TOKEN = False
    if method.name == "clip_adapter":
        from vlprompt.prompts.zero_shot import template_features

        method.text_features = lambda: template_features(method.backbone, method.class_names, method.settings.templates)
    if method.name == "prograd":
        method._frozen_features = lambda inputs, features: method.backbone.encode_image(images)
    if method.name == "clip_lora":
        method.base_model._update = lambda module: _dense_update(method.base_model, module)
    if method.name == "ramt":
        method.masks.overrides = lambda prefix, parameters: {
            name: _float_mask(module, method.masks.threshold) * parameters[name]
            for name, module in method.masks.scores(prefix).items()
        }
    if method.name == "visual_prompt":
        method.backbone.image.folded = lambda pixels: None
    attribute = {"visual_prompt": "text_features", "promptkd": "taught_text"}.get(method.name)
    if attribute:
        from vlprompt.prompts.zero_shot import template_features

        # VP's code replaces hyphens by spaces.
        names = [name.replace("-", " ") if method.name == "visual_prompt" else name for name in method.class_names]
        setattr(method, attribute, lambda *_: template_features(method.backbone, names, [method.settings.template]))


def _dense_update(low_rank: Any, module: Any) -> Any:
    import torch.nn.functional as F

    rate = low_rank.dropout if low_rank._drops else 0.0
    return lambda x: (
        F.linear(F.dropout(x, rate, rate > 0), module.lora_B.weight @ module.lora_A.weight) * low_rank.scale
    )


def _float_mask(scores: Any, threshold: float) -> Any:
    """Return ones and zeros with the gradient of ``scores``."""
    return (scores > threshold).float() + scores - scores.detach()


if __name__ == "__main__":
    sys.exit(main())
