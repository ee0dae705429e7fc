"""Time from JPEG files to normalised batches: torchvision's ImageFolder and DataLoader compared with FewShotData.

Run: python bench/data.py [--images 1000] [--workers 0,2] [--json]

Photograph-like JPEGs of mixed sizes (150 to 1,000 pixels per side, seeded) are written to a temporary folder. Both
sides load all of them for two epochs, in random order, in batches of 100 float32 images, with the same number of worker
processes: the naive side with the transforms of CoOp's code and ``torchvision.datasets.ImageFolder``, ours with
``FewShotData``, which caches decoded images. ``center`` is the test transform, ``random`` the training transform. The
two sides alternate, ``--repeats`` times, with new loaders each time; the table shows the shortest time of each epoch.
``first`` is naive's first epoch over our first: 1 or more means that caching costs no time. ``second`` is the same for
the second epochs, and ``again`` is our first epoch over our second. Both sides are first checked to give the same
batches. With ``--json`` the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlprompt.data import FewShotData
from vlprompt.datasets import FewShotTask, FileSource, Sample, find_card  # noqa: E402

BATCH = 100
CLASSES = 10


class Clip:
    """CLIP's preprocessing."""

    size = 224
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    interpolation = "bicubic"
    resize_mode, fill_color = "shortest", 0


def main(argv: list[str] | None = None) -> int:
    """Write the images, time both sides and print the table."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), options.images)
        task = _task(Path(folder))
        rows = []
        for view in ("center", "random", "random-tensor"):
            _check(Path(folder), task, view)
            for workers in options.workers:
                print(f"timing {view}, {workers} workers ...", file=sys.stderr, flush=True)
                rows.append(_row(Path(folder), task, view, workers, options.repeats))
    summary = {
        "images": options.images,
        "mean_kb": size / options.images / 1000,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    _print_table(summary)
    if options.json:
        print(json.dumps(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}; accepted: 1 or more")
        return int(text)

    def counts(text: str) -> list[int]:
        numbers = [int(number) for number in text.split(",")]
        if min(numbers) < 0:
            raise argparse.ArgumentTypeError(f"{text}; accepted: 0 or more, separated by commas, such as 0,2")
        return numbers

    parser = argparse.ArgumentParser(description="Image loading: plain torchvision compared with vlprompt.")
    parser.add_argument("--images", type=positive, default=1000, help="JPEG files (default 1000)")
    parser.add_argument(
        "--workers", type=counts, default=[0, 2], help="loader processes, separated by commas (default 0,2)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each side; the shortest times count")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


# -- the images ---------------------------------------------------------------------------------------------------
def write_images(folder: Path, number: int) -> int:
    """Write ``number`` JPEGs into class folders and return their total size in bytes.

    Images are noise at several scales, weaker at higher frequencies, as in photographs. Files have about a quarter of a
    byte per pixel, like those of Caltech-101.
    """
    rng = np.random.default_rng(0)
    total = 0
    for index in range(number):
        width, height = (int(side) for side in rng.integers(150, 1001, 2))
        pixels = np.full((height, width, 3), 128, dtype=np.float32)
        for step, strength in ((96, 60), (24, 30), (6, 16), (2, 10)):
            small = rng.normal(128, 50, (height // step + 2, width // step + 2, 3)).clip(0, 255).astype(np.uint8)
            large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(large, dtype=np.float32) - 128) * (strength / 50)
        path = folder / f"class{index % CLASSES}" / f"{index:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        total += path.stat().st_size
    return total


def _task(folder: Path) -> FewShotTask:
    names = sorted(path.name for path in folder.iterdir())
    samples = [
        Sample(f"{name}/{path.name}", label, FileSource(str(path)))
        for label, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
    ]
    return FewShotTask(
        name="bench",
        class_names=names,
        all_class_names=names,
        template="a photo of a {}.",
        train=samples,
        val=[],
        test=[],
        shots=-1,
        seed=1,
        classes="all",
        split_sha256="",
        shots_sha256="",
        card=find_card("folder"),
    )


# -- the two sides ------------------------------------------------------------------------------------------------
def _transform(view: str) -> Any:
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    ends = [T.ToTensor(), T.Normalize(Clip.mean, Clip.std)]
    if view == "center":
        return T.Compose([T.Resize(Clip.size, bicubic), T.CenterCrop(Clip.size), *ends])
    return T.Compose(
        [T.RandomResizedCrop(Clip.size, (0.08, 1.0), interpolation=bicubic), T.RandomHorizontalFlip(0.5), *ends]
    )


def _naive(folder: Path, view: str, workers: int) -> Any:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder), _transform(view))
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def _ours(task: FewShotTask, view: str, workers: int) -> Any:
    data = FewShotData(task, Clip(), batch_size=min(BATCH, len(task.train)), transform=view, workers=workers)
    return data.train_dataloader()


def _epochs(build: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of the first and the second epoch of a new loader."""
    seconds = []
    start = time.perf_counter()
    loader = build()
    for epoch in range(2):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            del batch
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    del loader
    gc.collect()
    return seconds[0], seconds[1]


def _check(folder: Path, task: FewShotTask, view: str) -> None:
    """Compare batches of each epoch with torchvision: bit for bit, or within 8 of 255 levels for tensor transforms."""
    from vlprompt._random import derived_seed

    transform = _transform(view)
    loader = _ours(task, view, 0)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            for image, index in zip(batch["images"][:4], batch["index"][:4].tolist(), strict=True):
                torch.manual_seed(derived_seed(1, epoch, index))
                expected = transform(Image.open(task.train[index].source.path).convert("RGB"))
                levels = float((image - expected).abs().max()) * 255 * max(Clip.std)
                if levels > (8 if view == "random-tensor" else 0):
                    raise SystemExit(f"{view}: batch {number} of epoch {epoch} differs from torchvision's images")


def _row(folder: Path, task: FewShotTask, view: str, workers: int, repeats: int) -> dict[str, Any]:
    naive, ours = [], []
    for turn in range(repeats):
        sides = [(naive, lambda: _naive(folder, view, workers)), (ours, lambda: _ours(task, view, workers))]
        for times, build in sides if turn % 2 == 0 else sides[::-1]:
            times.append(_epochs(build))
    naive_first, naive_second = (min(times) for times in zip(*naive, strict=True))
    first, second = (min(times) for times in zip(*ours, strict=True))
    return {
        "view": view,
        "workers": workers,
        "naive_first": naive_first,
        "naive_second": naive_second,
        "first": first,
        "second": second,
        "ratio_first": naive_first / first,
        "ratio_second": naive_second / second,
        "ratio_again": first / second,
    }


def _print_table(summary: dict[str, Any]) -> None:
    print(
        f"{summary['images']} JPEGs of {summary['mean_kb']:.0f} kB on average, batches of {BATCH}, "
        f"{summary['threads']} threads; seconds"
    )
    columns = ("naive 1st", "naive 2nd", "ours 1st", "ours 2nd", "first", "second", "again")
    print(f"{'view':8}{'workers':>8}" + "".join(f"{column:>11}" for column in columns))
    for row in summary["rows"]:
        times = "".join(f"{row[key]:>11.2f}" for key in ("naive_first", "naive_second", "first", "second"))
        ratios = "".join(f"{row[key]:>11.2f}" for key in ("ratio_first", "ratio_second", "ratio_again"))
        print(f"{row['view']:8}{row['workers']:>8}{times}{ratios}")


if __name__ == "__main__":
    sys.exit(main())
