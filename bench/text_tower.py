"""Time and memory of text encoding: packed compared with padded to 77 tokens and with cut to the longest prompt.

Run: python bench/text_tower.py --classes 1000 --context 4 [--json]

One run compares the algorithms on the same weights, names, context and cotangent: a forward pass and a backward pass to
the context vectors, as in one step of CoOp. Each algorithm runs in a separate process, to measure its peak memory:
``peak`` is that of the whole process (with interpreter, libraries and weights), ``above`` is the increase after the
model is loaded. ``diff`` is the largest relative difference from the padded algorithm, in features and in the gradient
of the context. Times are the shortest of the repeats (``--repeats``; the padded algorithm has ``--padded-repeats``,
default 1). ``CPU s`` is the sum over all threads, which other work on the machine affects less. The ratios, padded over
packed, come last. With ``--json`` the last line is one JSON object. The exit status is 1 if an algorithm does not fit
into memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# Only the child processes import torch: a process inherits the peak memory of its parent at its start, so the parent
# must be small.
ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("packed", "cut", "padded")
_KEPT_FLOATS = 11  # float32 numbers per token, layer and unit of width at the peak; measured


def main(argv: list[str] | None = None) -> int:
    """Run all algorithms in child processes and print the table."""
    options = _parser().parse_args(argv)
    if options.child:
        return _child(options)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in ALGORITHMS:
            print(f"running {algorithm} ...", file=sys.stderr, flush=True)
            results[algorithm] = _measure(options, algorithm, Path(folder))
            if "error" in results[algorithm]:
                print(f"{algorithm}: {results[algorithm]['error']}")
                return 1
        worst = max(_compare(results, Path(folder)).values())
    packed, padded = results["packed"], results["padded"]
    summary = {
        "model": options.model,
        "classes": options.classes,
        "context": options.context,
        "threads": packed["threads"],
        "algorithms": results,
        "max_rel_diff": worst,
        "ratio_tokens": padded["tokens"] / packed["tokens"],
        "ratio_seconds": padded["seconds"] / packed["seconds"],
        "ratio_cpu_seconds": padded["cpu_seconds"] / packed["cpu_seconds"],
        "ratio_memory": padded["peak_mb"] / packed["peak_mb"],
        "ratio_memory_above": padded["above_mb"] / max(packed["above_mb"], 1e-3),
    }
    _print_table(summary)
    if options.json:
        print(json.dumps(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text}; accepted: 1 or more")
        return value

    parser = argparse.ArgumentParser(description="Packed, cut and padded text encoding compared.")
    parser.add_argument(
        "--classes", type=positive, default=100, help="number of ImageNet's class names, repeated if necessary"
    )
    parser.add_argument("--context", type=positive, default=4, help="context vectors (default 4)")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of packed and cut; the shortest time counts")
    parser.add_argument("--padded-repeats", type=positive, default=1, help="runs of padded (default 1)")
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, with random weights, or demo")
    parser.add_argument("--threads", type=positive, help="threads of each process (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--child", choices=ALGORITHMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


# -- the parent ---------------------------------------------------------------------------------------------------
def _measure(options: argparse.Namespace, algorithm: str, folder: Path) -> dict[str, Any]:
    """Run one algorithm in a child process; return its results, or ``{"error": reason}``."""
    repeats = options.padded_repeats if algorithm == "padded" else options.repeats
    command = [sys.executable, str(Path(__file__).resolve()), "--child", algorithm, "--out", str(folder / algorithm)]
    command += ["--classes", str(options.classes), "--context", str(options.context)]
    command += ["--repeats", str(repeats), "--model", options.model]
    command += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}; it probably did not fit into memory"}
    return {"error": "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])}


def _compare(results: dict[str, dict[str, Any]], folder: Path) -> dict[str, float]:
    """Add the largest relative differences from padded to each result; return those of packed."""
    outputs = {}
    for algorithm in ALGORITHMS:
        with np.load(folder / f"{algorithm}.npz") as archive:
            outputs[algorithm] = {name: archive[name] for name in archive.files}
    for algorithm, arrays in outputs.items():
        results[algorithm]["rel_diff"] = {
            name: float(np.abs(array - outputs["padded"][name]).max() / np.abs(outputs["padded"][name]).max())
            for name, array in arrays.items()
        }
    return dict(results["packed"]["rel_diff"])


def _print_table(summary: dict[str, Any]) -> None:
    print(
        f"{summary['model']} text tower, {summary['classes']} classes, {summary['context']} context vectors, "
        f"forward and backward, {summary['threads']} threads"
    )
    columns = ("seconds", "CPU s", "peak MB", "above MB", "tokens", "diff feat.", "diff grad.")
    print(" " * 10 + "".join(f"{column:>11}" for column in columns))
    for algorithm, row in summary["algorithms"].items():
        diff = row["rel_diff"]
        numbers = f"{row['seconds']:>11.3f}{row['cpu_seconds']:>11.3f}{row['peak_mb']:>11.0f}{row['above_mb']:>11.0f}"
        print(f"{algorithm:10}{numbers}{row['tokens']:>11}{diff['features']:>11.1e}{diff['gradient']:>11.1e}")
    print(
        f"padded / packed: seconds {summary['ratio_seconds']:.1f} (CPU {summary['ratio_cpu_seconds']:.1f}), "
        f"memory {summary['ratio_memory']:.1f} (above the loaded model {summary['ratio_memory_above']:.1f}), "
        f"tokens {summary['ratio_tokens']:.1f}"
    )


# -- a child ------------------------------------------------------------------------------------------------------
def _child(options: argparse.Namespace) -> int:
    """Measure one algorithm in this process; write its outputs and print its results as JSON."""
    sys.path.insert(0, str(ROOT))
    import torch
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    import vlprompt
    from vlprompt.prompts import context_layout

    if options.threads:
        torch.set_num_threads(options.threads)
    backbone = vlprompt.load_backbone(options.model, *([] if options.model == "demo" else ["random"]))
    text = backbone.text
    rounds = range(-(-options.classes // len(IMAGENET_CLASSNAMES)))
    names = [f"{name} {r + 1}" if r else name for r in rounds for name in IMAGENET_CLASSNAMES][: options.classes]
    layout = context_layout(text, names, " ".join(["X"] * options.context), options.context, "end")
    draw = torch.Generator().manual_seed(0)
    context = (0.02 * torch.randn(1, options.context, text.width, generator=draw)).requires_grad_()
    cotangent = torch.randn(1, options.classes, backbone.embed_dim, generator=draw)
    tokens = {
        "packed": layout.token_counts()[0],
        "cut": layout.token_counts()[1],
        "padded": options.classes * text.context_length,
    }[options.child]
    _refuse_if_too_large(tokens * text.layers * text.width * 4 * _KEPT_FLOATS, options.child)

    def step(classes: int) -> Any:
        context.grad = None
        selected = layout if classes == options.classes else layout.select(0, classes)
        features = text.encode(selected, context, algorithm=options.child)
        (features * cotangent[:, :classes]).sum().backward()
        return features.detach()

    step(1)  # includes the work of the first call
    before = _memory_mb("VmRSS")
    seconds, cpu_seconds = [], []
    for _ in range(options.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        features = step(options.classes)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = _memory_mb("VmHWM")
    assert context.grad is not None
    np.savez(options.out, features=features.numpy(), gradient=context.grad.numpy())
    result = {
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "peak_mb": peak,
        "above_mb": peak - before,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))
    return 0


def _memory_mb(field: str) -> float:
    """Return a memory field of this process in MB: VmRSS, the resident memory, or VmHWM, its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return float(lines[field].split()[0]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _refuse_if_too_large(need: int, algorithm: str) -> None:
    """Exit if ``need`` bytes of activations exceed the free memory, before the system ends the process."""
    adjust, meminfo = Path("/proc/self/oom_score_adj"), Path("/proc/meminfo")
    if not meminfo.exists():
        return
    if adjust.exists() and os.access(adjust, os.W_OK):
        adjust.write_text("1000")  # if memory still runs out, only this process is ended
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if need > free:
        raise SystemExit(
            f"{algorithm} needs about {need / 2**30:.1f} GiB for activations, but {free / 2**30:.1f} GiB are free; "
            "use fewer --classes"
        )


if __name__ == "__main__":
    sys.exit(main())
