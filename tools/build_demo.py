"""Build the packaged demo from package registries: drawings, benchmarks and two small CLIPs.

    python tools/build_demo.py --build FOLDER          everything: fetch, render, pack, train, choose, ship
    python tools/build_demo.py --build FOLDER --until pack     only the benchmarks' files (minutes, reproducible)
    python tools/build_demo.py --check                 compare the shipped files with their record
    python tools/build_demo.py --record                update that record, after the text of a card was edited
    python tools/build_demo.py --table                 the zero-shot table of the shipped networks

Stages keep their results in FOLDER and resume where they were stopped. They need npm and pip install 'vlprompt[demo]'.
The images are identical byte for byte with the versions in tools/demo/. On one core, training takes about an hour per
seed and another hour for the ViT; with --device cuda it takes minutes. MODEL_CARD.md compares a second build with the
shipped weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ASSETS = TOOLS.parent / "vlprompt" / "assets"
LARGEST = 20_000_000
STAGES = ("fetch", "render", "pack", "train", "ship")
sys.path.insert(0, str(TOOLS / "demo"))


def check() -> int:
    """Compare every shipped file with its record, and the licences of archives with the list in LICENCES.md."""
    import packing

    path = ASSETS / "demo" / packing.MANIFEST
    known = json.loads(path.read_text(encoding="utf-8"))["files"]
    present = packing.manifest(ASSETS)["files"]
    problems = [f"{name}: not in {path.name}" for name in present if name not in known]
    for name, row in known.items():
        if present.get(name) != row:
            problems.append(f"{name}: {present[name]}, recorded {row}" if name in present else f"{name}: missing")
    listed = (ASSETS / "demo" / "LICENCES.md").read_text(encoding="utf-8").splitlines()
    for name, row in known.items():
        style = Path(name).stem
        if name.endswith(".zip") and not any(f"`{style}`" in line and line.endswith(row["licence"]) for line in listed):
            problems.append(f"{name}: LICENCES.md does not name {style} with {row['licence']}")
    size = sum(row["bytes"] for name, row in known.items() if name.endswith((".zip", ".safetensors")))
    if size > LARGEST:
        problems.append(f"images and weights have {size:,} bytes; at most {LARGEST:,} are shipped")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(known)} files, images and weights {size:,} bytes, {len(problems)} problems")
    return 1 if problems else 0


def record() -> int:
    """Write size, hash and licence of every shipped file to the manifest."""
    import packing

    text = json.dumps(packing.manifest(ASSETS), indent=1) + "\n"
    packing.write(ASSETS / "demo", {packing.MANIFEST: text.encode()})
    return 0


def show_table() -> int:
    """Print the zero-shot table of both networks, in the form of the README and the model card."""
    import scores

    from vlprompt import load_backbone

    for name in ("demo", "demo-rn"):
        rows = scores.style_scores(load_backbone(name), ASSETS / "demo")
        reported = [row for row in rows if row["style"] not in scores.SELECTION]
        print(
            f"{name}: zero-shot accuracy in %, styles never trained on (number of classes)\n\n{scores.table(reported)}"
        )
        others = [row for row in rows if row["style"] in scores.SELECTION]
        print(f"\nstyles used to choose the training seed, not a result:\n\n{scores.table(others)}\n", flush=True)
    return 0


class Build:
    """The stages in order; each uses the results of earlier ones in the folder."""

    def __init__(self, folder: Path, seeds: list[int], device: str) -> None:
        self.folder, self.seeds, self.device = folder, seeds, device

    def fetch(self) -> None:
        """Fetch the packages, and join drawings with names."""
        import sources

        self.modules = sources.fetch(self.folder)
        self.emoji = sources.read_emoji(self.modules)
        self.icons = sources.read_icons(self.modules, self.emoji)
        novel = sum(symbol.novel for symbol in self.emoji)
        print(f"fetch: {len(self.emoji)} emoji, {novel} novel; {len(self.icons)} icons")

    def render(self) -> None:
        """Render all drawings."""
        import drawings

        drawings.render_all(self.folder / "drawings", self.emoji, self.icons, print)

    def pack(self) -> None:
        """Write the benchmarks' files."""
        import packing

        target = self.folder / "data"
        if not (target / "names.json").is_file():
            packing.write(target, packing.data_files(self.folder / "drawings", self.modules, self.emoji, print))
        print(f"pack: {sum(file.stat().st_size for file in target.iterdir()):,} bytes in {target}")

    def train(self) -> None:
        """Train the ResNet and text tower with every seed, and the ViT from the best one on the selection styles."""
        import captions
        import scores
        import torch
        import training

        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("error: torch finds no GPU on this machine; train on the CPU: --device cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)  # sums in the same order on every machine
        torch.set_flush_denormal(True)
        vocabulary = captions.Vocabulary(self.emoji, [icon.words for icon in self.icons])
        vectors = vocabulary.word_vectors(self.modules)
        corpus = training.Corpus(self.folder / "drawings", self.emoji, self.icons)
        weights, results = self.folder / "weights", {}
        for seed in self.seeds:
            with Progress(seed) as report:
                texts = training.train_contrast(weights, corpus, vocabulary, vectors, seed, report, device)
            rows = scores.style_scores(resnet_of(texts, vocabulary.ids), self.folder / "data", scores.SELECTION)
            results[seed] = scores.selection_score(rows), texts
            print(f"train: seed {seed} has {results[seed][0]:.2f} on the selection styles", flush=True)
        best = max(results, key=lambda seed: results[seed][0])
        print(f"train: seed {best} is chosen")
        texts = results[best][1]
        with Progress(best) as report:
            self.networks = texts, training.train_distil(weights, corpus, texts, best, report, device), vocabulary.ids

    def ship(self) -> None:
        """Copy weights and benchmarks into the package, record them, and print the table."""
        import packing

        packing.write(ASSETS / "demo_clip", packing.weight_files(*self.networks))
        packing.write(ASSETS / "demo", {file.name: file.read_bytes() for file in (self.folder / "data").iterdir()})
        record()
        show_table()


class Progress:
    """One progress bar per training stage, with the remaining time; plain lines without a terminal."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> Progress:
        from rich import progress

        columns = (
            "{task.description}",
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            "loss {task.fields[loss]:.3f}",
        )
        self._bar = progress.Progress(*columns, "{task.fields[left]} left")
        self._tasks: dict[str, progress.TaskID] = {}
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, step: int, steps: int, loss: float, left: float) -> None:
        """Show that ``step`` of ``steps`` is done, with ``left`` seconds remaining in the stage."""
        shown = f"{left / 60:.0f} min"
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(f"seed {self._seed} {stage}", total=steps, loss=loss, left=shown)
        self._bar.update(self._tasks[stage], completed=step, loss=loss, left=shown)
        if not self._bar.console.is_terminal and step % 200 == 0:
            print(f"train: seed {self._seed}, {stage} {step}/{steps}, loss {loss:.3f}, {shown} left", flush=True)


def resnet_of(texts: Any, token_ids: list[int]) -> Any:
    """Return the ResNet and the text tower as a backbone."""
    import models
    import torch

    from vlprompt.backbone.backbone import Backbone, Preprocess

    network = models.build("demo-rn", models.TEXT["vocab_size"])
    table = torch.zeros_like(network.token_embedding.weight)
    table[token_ids] = texts.merged()
    network.load_state_dict({**texts.network.state_dict(), "token_embedding.weight": table})
    return Backbone.from_open_clip(network, name="demo-rn", preprocess=Preprocess(64))


def main() -> int:
    """Run the requested actions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="folder for fetched and generated files (about 2 GB)")
    parser.add_argument("--until", choices=STAGES, default="ship", help="the last stage to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="training seeds (1 2 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of training (cpu)")
    parser.add_argument("--check", action="store_true", help="compare the shipped files with their record")
    parser.add_argument("--table", action="store_true", help="print the zero-shot table of the shipped networks")
    parser.add_argument("--record", action="store_true", help="update the record of the shipped files")
    options = parser.parse_args()
    wanted = [
        job for job, name in ((record, "record"), (check, "check"), (show_table, "table")) if getattr(options, name)
    ]
    if wanted:
        return max(job() for job in wanted)
    if options.build is None:
        parser.error("use --build FOLDER, --check, --record or --table")
    build = Build(options.build.resolve(), options.seeds, options.device)
    for stage in STAGES[: STAGES.index(options.until) + 1]:
        getattr(build, stage)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
