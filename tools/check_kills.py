"""Kill commands at random times and run them again: the outcome must have the bits of a run that nothing stops.

Run: python tools/check_kills.py --folder /tmp/kills [--kills 30] [--first 0] [--seed 1] [--kinds train,bank]

A training, base-to-new, a meta-training, a bank of generated images and a fitted cache (feature store) on a few images
of the demo take turns. Each runs once as a whole. Then it is started, sent SIGKILL, SIGTERM or SIGINT after a random
part of that time, and started again. Kill N draws from ``--seed`` and N alone, so ``--first 10 --kills 10`` goes on
where ``--kills 10`` ended; inputs and whole runs in ``--folder`` are used again.

Heads, regulators, stored features, metrics and generated images are compared byte by byte, but for the order of the
metadata of safetensors files; JSON records without times, memory, counts of encoded images and the place of the folder.
A kill is wrong if something differs, a temporary file is left, a traceback is printed, or the status is not that of the
signal (130 or 143). The exit status is 1 if a kill is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  (the clone must be on the path first)

import vlprompt  # noqa: E402
import vlprompt.cli.bank  # noqa: E402, F401
import vlprompt.cli.meta  # noqa: E402, F401
import vlprompt.cli.protocols  # noqa: E402, F401
import vlprompt.cli.run  # noqa: E402, F401
import vlprompt.generation.making  # noqa: E402, F401
import vlprompt.generation.pipeline  # noqa: E402, F401
import vlprompt.protocols.base_to_new  # noqa: E402, F401
import vlprompt.runs.meta_run  # noqa: E402, F401
from vlprompt.cli.main import main as command_line  # noqa: E402

FAST = ["--trainer.progress", "false", "--trainer.accelerator", "cpu"]
IMAGES = ["--data.name", "folder", "--data.root", "{inputs}/images"]
SHORT = [
    *IMAGES,
    "--backbone.name",
    "demo",
    "--backbone.pretrained",
    "null",
    "--data.shots",
    "4",
    "--recipe.batch_size",
    "16",
    *FAST,
    "--output",
    "{place}/runs",
]
KINDS = {
    "train": ["train", "--config", "mocoop/demo", "--recipe.epochs", "8", *SHORT],
    "base-to-new": ["base-to-new", "--config", "coop/demo", "--seeds", "1,2", "--recipe.epochs", "10", *SHORT],
    "meta-train": [
        *("meta-train", "--config", "gram/coop-demo", "--pairs.source", "{inputs}/pairs", *FAST),
        *("--tasks.topics", "4", "--tasks.domains", "2", "--tasks.least", "6", "--tasks.support", "4"),
        *("--tasks.query", "4", "--meta.steps", "10", "--meta.save_every", "2", "--meta.tasks_per_step", "2"),
        *("--output", "{place}/runs"),
    ],
    "bank": [
        *("bank", "--bank", "{place}/bank", *IMAGES, "--pipeline", "tiny", "--steps", "2", "--device", "cpu"),
        *("--split", "val", "--count", "2", "--batch-size", "4"),
    ],
    "store": ["train", "--config", "tip_adapter_f/demo", *SHORT],
}
# A process that has not set its handlers yet ends by the signal itself, which a shell shows as 128 and its number.
SIGNALS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGINT: (130, -signal.SIGINT),
}
BYTES = ("metrics.jsonl", "*.png", "*.yaml", "*.md")
JSON = (
    "results.json",
    "validation.json",
    "selection.json",
    "split.json",
    "config.json",
    "pictures.json",
    "recipe.json",
    "base_to_new-*.json",
)
PASSING = ("seconds", "peak_mb", "encoded")


def write_inputs(folder: Path) -> None:
    """Write the images of eight classes and 160 captioned images, unless they are there."""
    if folder.is_dir():
        return
    demo, draft = vlprompt.load_dataset("demo", shots=4), folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    for split, samples, most in (("train", demo.train, 4), ("val", demo.val, 2), ("test", demo.test, 6)):
        for label, name in enumerate(demo.class_names[:8]):
            (draft / "images" / split / name).mkdir(parents=True)
            for number, sample in enumerate([sample for sample in samples if sample.label == label][:most]):
                sample.source.open().save(draft / "images" / split / name / f"{number}.png")
    (draft / "pairs").mkdir()
    for number, pair in enumerate(vlprompt.load_pairs("demo-pairs")[:160]):
        pair.source.open().save(draft / "pairs" / f"{number}.png")
        (draft / "pairs" / f"{number}.txt").write_text(pair.caption)
    draft.rename(folder)


def lasting(value: Any) -> Any:
    """Return a JSON value without what differs between equal runs."""
    if isinstance(value, dict):
        return {name: lasting(part) for name, part in value.items() if name not in PASSING}
    return [lasting(part) for part in value] if isinstance(value, list) else value


def outcome(place: Path) -> dict[str, str]:
    """Return the SHA-256 of every compared file in ``place`` by its path, and a mark for every temporary file."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file() or path.name.startswith(".")):
        if path.name.startswith(".writing-") or path.name.startswith(".head."):
            content = b"left over"
        elif any(path.match(pattern) for pattern in JSON):
            content = json.dumps(lasting(json.loads(path.read_bytes()))).encode()
        elif path.suffix == ".safetensors":  # the library writes the metadata in random order
            data = path.read_bytes()
            start_of_data = 8 + int.from_bytes(data[:8], "little")
            header = json.dumps(json.loads(data[8:start_of_data]), sort_keys=True)
            content = header.encode() + data[start_of_data:]
        elif any(path.match(pattern) for pattern in BYTES):
            content = path.read_bytes()
        else:
            continue
        content = content.replace(str(place).encode(), b"PLACE")
        found[str(path.relative_to(place))] = hashlib.sha256(content).hexdigest()
    return found


def start(words: list[str], place: Path) -> int:
    """Run a command in a forked process with its output and its cache in ``place``; return the process.

    Everything is imported already, so that signals hit the work and not the start. Messages go to ``place``.log.
    """
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["VLPROMPT_CACHE"] = str(place / "cache")
        status = 1
        try:
            status = command_line([word.format(place=place, inputs=place.parent / "inputs") for word in words])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(log)
    return process


def ended(process: int) -> int:
    """Wait for a process and return its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def emptied(place: Path) -> Path:
    """Return ``place``, an empty folder without a log."""
    shutil.rmtree(place, ignore_errors=True)
    place.with_suffix(".log").unlink(missing_ok=True)
    place.mkdir(parents=True)
    return place


def whole(name: str, folder: Path) -> tuple[float, dict[str, str]]:
    """Return the seconds and the outcome of a run that nothing stops; it is made once."""
    place = folder / f"whole-{name}"
    record = place / "seconds"
    if not record.is_file():
        began = time.monotonic()
        if status := ended(start(KINDS[name], emptied(place))):
            raise SystemExit(f"{name} ends with {status}: {place.with_suffix('.log').read_text()[-2000:]}")
        record.write_text(str(time.monotonic() - began))
    return float(record.read_text()), outcome(place)


def kill(number: int, name: str, seed: int, folder: Path) -> bool:
    """Kill the command called ``name`` once and run it again; print a line and return whether all is well."""
    seconds, expected = whole(name, folder)
    draw = random.Random(f"{seed} {number}")
    how, after = draw.choice(list(SIGNALS)), draw.uniform(0.05, 1.0) * seconds
    place = emptied(folder / f"kill-{number}")
    process = start(KINDS[name], place)
    time.sleep(after)
    hit = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    os.kill(process, how)
    status, found = ended(process), len(outcome(place))
    again = ended(start(KINDS[name], place))
    after_all = outcome(place)
    wrong = sorted(path for path in expected.keys() | after_all.keys() if expected.get(path) != after_all.get(path))
    problems = [f"{path} differs" for path in wrong[:3]]
    problems += ["a traceback"] if "Traceback" in place.with_suffix(".log").read_text(errors="replace") else []
    problems += [f"status {status}"] if hit and status not in (*SIGNALS[how], 0) else []
    problems += [f"status {again} when run again"] if again else []
    struck = f"{found} of {len(expected)} files" if hit else "after its end"
    verdict = "; ".join(problems) or f"equal ({len(expected)} files)"
    print(
        f"{number:3}  {name:12} {how.name:8} {after:5.1f} s  {struck:15} rc {status:4}, {again}  {verdict}", flush=True
    )
    return not problems


def main() -> int:
    """Run all kills and return 1 if one of them changed the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the commands write")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # A shell starts background commands with SIGINT ignored, which the commands would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = given.kinds.split(",")
    if unknown := [name for name in kinds if name not in KINDS]:
        parser.error(f"unknown kinds: {', '.join(unknown)}; accepted: {', '.join(KINDS)}")
    numbers = range(given.first, given.first + given.kills)
    vlprompt.load_backbone("demo")  # imports what commands import when they need it
    given.folder.mkdir(parents=True, exist_ok=True)
    write_inputs(given.folder / "inputs")
    well = [kill(number, kinds[number % len(kinds)], given.seed, given.folder.absolute()) for number in numbers]
    print(f"{len(well)} kills, {well.count(False)} wrong")
    return int(not all(well))


if __name__ == "__main__":
    raise SystemExit(main())
