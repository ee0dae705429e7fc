"""Build the packaged demo from package registries alone: drawings, benchmarks, two small CLIPs.

    python tools/build_demo.py --build FOLDER          everything: fetch, render, pack, train, choose, ship
    python tools/build_demo.py --build FOLDER --until pack     only the benchmarks' files (minutes, the same bytes)
    python tools/build_demo.py --check                 compare the shipped files with their record
    python tools/build_demo.py --record                make that record anew, after a card's text was edited
    python tools/build_demo.py --table                 the zero-shot table of the shipped networks

Stages keep their results in FOLDER and go on where they were stopped. Needs npm, and pip install 'vlprompt[demo]'. The
images come out byte for byte the same with the versions in tools/demo/. Training takes about an hour per seed, and one
more for the ViT, on one core; with --device cuda it is minutes. MODEL_CARD.md says how near a second build came to the
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
    """Compare every shipped file with its record, and the archives' licences with the list in LICENCES.md."""
    import packing

    path = ASSETS / "demo" / packing.MANIFEST
    known = json.loads(path.read_text(encoding="utf-8"))["files"]
    found = packing.manifest(ASSETS)["files"]
    problems = [f"{name}: not in {path.name}" for name in found if name not in known]
    for name, row in known.items():
        if found.get(name) != row:
            problems.append(f"{name}: {found[name]}, recorded {row}" if name in found else f"{name}: missing")
    said = (ASSETS / "demo" / "LICENCES.md").read_text(encoding="utf-8").splitlines()
    for name, row in known.items():
        style = Path(name).stem
        if name.endswith(".zip") and not any(f"`{style}`" in line and line.endswith(row["licence"]) for line in said):
            problems.append(f"{name}: LICENCES.md does not name {style} with {row['licence']}")
    heavy = sum(row["bytes"] for name, row in known.items() if name.endswith((".zip", ".safetensors")))
    if heavy > LARGEST:
        problems.append(f"images and weights have {heavy:,} bytes; at most {LARGEST:,} are shipped")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(known)} files, images and weights {heavy:,} bytes, {len(problems)} problems")
    return 1 if problems else 0


def record() -> int:
    """Write size, hash and licence of every shipped file to the manifest."""
    import packing

    text = json.dumps(packing.manifest(ASSETS), indent=1) + "\n"
    packing.write(ASSETS / "demo", {packing.MANIFEST: text.encode()})
    return 0


def show_table() -> int:
    """Print the zero-shot table of both networks, as the README and the model card show it."""
    import scores

    from vlprompt import load_backbone

    for name in ("demo", "demo-rn"):
        rows = scores.style_scores(load_backbone(name), ASSETS / "demo")
        reported = [row for row in rows if row["style"] not in scores.SELECTION]
        print(
            f"{name}: zero-shot accuracy in %, styles never trained on (number of classes)\n\n{scores.table(reported)}"
        )
        others = [row for row in rows if row["style"] in scores.SELECTION]
        print(f"\nstyles that the training seed was chosen on, no result:\n\n{scores.table(others)}\n", flush=True)
    return 0


class Build:
    """The stages, in order; each finds what the earlier ones left in the folder."""

    def __init__(self, folder: Path, seeds: list[int], device: str) -> None:
        self.folder, self.seeds, self.device = folder, seeds, device

    def fetch(self) -> None:
        """Fetch the packages and join drawings and names."""
        import sources

        self.modules = sources.fetch(self.folder)
        self.emoji = sources.read_emoji(self.modules)
        self.icons = sources.read_icons(self.modules, self.emoji)
        print(f"fetch: {len(self.emoji)} emoji, {sum(one.novel for one in self.emoji)} novel; {len(self.icons)} icons")

    def render(self) -> None:
        """Draw everything once."""
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
        """Train the ResNet and the texts with every seed, and the ViT from the one that the selection styles prefer."""
        import captions
        import scores
        import torch
        import training

        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("error: torch finds no GPU on this machine; train on the CPU: --device cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)  # sums in one order, whatever the machine
        torch.set_flush_denormal(True)
        vocabulary = captions.Vocabulary(self.emoji, [icon.words for icon in self.icons])
        vectors = vocabulary.word_vectors(self.modules)
        corpus = training.Corpus(self.folder / "drawings", self.emoji, self.icons)
        weights, found = self.folder / "weights", {}
        for seed in self.seeds:
            with Progress(seed) as tell:
                texts = training.train_contrast(weights, corpus, vocabulary, vectors, seed, tell, device)
            rows = scores.style_scores(resnet_of(texts, vocabulary.ids), self.folder / "data", scores.SELECTION)
            found[seed] = scores.selection_score(rows), texts
            print(f"train: seed {seed} has {found[seed][0]:.2f} on the selection styles", flush=True)
        best = max(found, key=lambda seed: found[seed][0])
        print(f"train: seed {best} is taken")
        texts = found[best][1]
        with Progress(best) as tell:
            self.networks = texts, training.train_distil(weights, corpus, texts, best, tell, device), vocabulary.ids

    def ship(self) -> None:
        """Put weights and benchmarks into the package, record them, and print the table."""
        import packing

        packing.write(ASSETS / "demo_clip", packing.weight_files(*self.networks))
        packing.write(ASSETS / "demo", {file.name: file.read_bytes() for file in (self.folder / "data").iterdir()})
        record()
        show_table()


class Progress:
    """One bar per training stage, with the time left; plain lines where there is no terminal."""

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
        """Show that ``step`` of ``steps`` is done, ``left`` seconds before the stage's end."""
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

    whole = models.build("demo-rn", models.TEXT["vocab_size"])
    table = torch.zeros_like(whole.token_embedding.weight)
    table[token_ids] = texts.merged()
    whole.load_state_dict({**texts.network.state_dict(), "token_embedding.weight": table})
    return Backbone.from_open_clip(whole, name="demo-rn", preprocess=Preprocess(64))


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="folder for everything that is fetched and made (about 2 GB)")
    parser.add_argument("--until", choices=STAGES, default="ship", help="the last stage to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="training seeds (1 2 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where networks are trained (cpu)")
    parser.add_argument("--check", action="store_true", help="compare the shipped files with their record")
    parser.add_argument("--table", action="store_true", help="print the zero-shot table of the shipped networks")
    parser.add_argument("--record", action="store_true", help="write the record of the shipped files anew")
    options = parser.parse_args()
    wanted = [
        job for job, name in ((record, "record"), (check, "check"), (show_table, "table")) if getattr(options, name)
    ]
    if wanted:
        return max(job() for job in wanted)
    if options.build is None:
        parser.error("give --build FOLDER, --check, --record or --table")
    build = Build(options.build.resolve(), options.seeds, options.device)
    for stage in STAGES[: STAGES.index(options.until) + 1]:
        getattr(build, stage)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
