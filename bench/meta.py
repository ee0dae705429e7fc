"""One outer step of meta-training, first and second order, compared with a plain training step of the method.

Run: python bench/meta.py [--methods coop,ivlp] [--pairs 16] [--tasks 4] [--inner 1] [--json]

``own`` is the method's forward and backward pass over one batch of query pairs, with captions as classes. An outer step
runs, for each of its tasks, inner steps on the support pairs and a forward and backward pass over the query pairs, with
a regulator in between. All use the same backbone with random weights; inputs are images for methods that learn on the
image side and features for others. Each is measured in a separate process: the shortest time of the repeats, and the
peak memory with interpreter, libraries and weights. ``x`` is an outer step's time per task over that of ``own``. With
``--json`` the last line is one JSON object with ``rows``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("own", "first", "second")
WORDS = "red old big cat dog bird tree house blue car small river king apple stone cloud".split()


def main(argv: list[str] | None = None) -> int:
    """Measure every method and print the table."""
    options = _parser().parse_args(argv)
    if options.child:
        print(json.dumps(_measured(options)))
        return 0
    rows = []
    for name in options.methods.split(","):
        row: dict[str, Any] = {"method": name, "tasks": options.tasks, "pairs": options.pairs, "inner": options.inner}
        for kind in KINDS:
            forwarded = [f"--{key}={getattr(options, key)}" for key in ("pairs", "tasks", "inner", "repeats", "model")]
            command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--methods", name, *forwarded]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}, {kind}: {(done.stderr.strip().splitlines() or ['no memory?'])[-1]}", file=sys.stderr)
                return 1
            row[kind] = json.loads(done.stdout.splitlines()[-1])
        for kind in KINDS[1:]:
            row[f"ratio_{kind}"] = row[kind]["seconds"] / options.tasks / row["own"]["seconds"]
        rows.append(row)
        plain = f"{name:<8} own step {row['own']['seconds'] * 1000:7.0f} ms {row['own']['megabytes']:6.0f} MB"
        outer = (
            f"{kind} order {row[kind]['seconds'] * 1000:7.0f} ms {row[kind]['megabytes']:6.0f} MB "
            f"x{row[f'ratio_{kind}']:.1f} a task"
            for kind in KINDS[1:]
        )
        print("   ".join([plain, *outer]), flush=True)
    if options.json:
        print(json.dumps({"model": options.model, "rows": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="An outer step of meta-training compared with a training step.")
    parser.add_argument("--methods", default="coop,ivlp", help="methods, separated by commas")
    parser.add_argument("--pairs", type=int, default=16, help="number of support pairs and of query pairs")
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--inner", type=int, default=1, help="inner steps")
    parser.add_argument("--repeats", type=int, default=3, help="repeats; the shortest time counts")
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, with random weights, or demo")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    return parser


def _measured(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from vlprompt import create_method, load_backbone
    from vlprompt.config.meta import MetaConfig
    from vlprompt.engine.meta_module import MetaModule
    from vlprompt.meta import Regulator, RegulatorSettings

    torch.manual_seed(0)
    # Weights are random, except for the demo.
    backbone = load_backbone("demo") if options.model == "demo" else load_backbone(options.model, "random")
    names = [
        f"{WORDS[i % 16]} {WORDS[(i // 16 + 3 * i + 1) % 16]} {WORDS[i * 7 % 16]}" for i in range(2 * options.pairs)
    ]
    support, query = names[: options.pairs], names[options.pairs :]
    method = create_method(options.methods, backbone, query)
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    regulator = Regulator(shapes, backbone.embed_dim, RegulatorSettings())
    size = (3, backbone.preprocess.size, backbone.preprocess.size)
    shape = size if method.needs.images else (backbone.embed_dim,)
    labels = torch.arange(options.pairs)
    tasks = [
        {
            "support": torch.randn(options.pairs, *shape),
            "query": torch.randn(options.pairs, *shape),
            "support_classes": support,
            "query_classes": query,
            "support_labels": labels,
            "query_labels": labels,
            "feature": torch.randn(backbone.embed_dim),
        }
        for _ in range(options.tasks)
    ]

    def plain_step() -> None:
        torch.stack(list(method.losses(tasks[0]["query"], labels).values())).sum().backward()

    def outer_step() -> None:
        from vlprompt.meta import differentiable

        module = MetaModule(method, regulator, MetaConfig(order=options.child, inner_steps=options.inner))
        with differentiable(options.child):
            for task in tasks:
                (module.losses(task)[1] / options.tasks).backward()

    step = plain_step if options.child == "own" else outer_step
    seconds = []
    for _ in range(1 + options.repeats):  # the first warms up
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"seconds": min(seconds[1:]), "megabytes": peak}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
