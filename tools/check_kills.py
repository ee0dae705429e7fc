"""Kill commands at random times and run them again: the outcome must have the bits of a run that nothing stops.

    python tools/check_kills.py --kills 30 --seed 1 --folder /tmp/kills [--also "meta-train" "meta-train --config ..."]

Each kind of command runs once as a whole. It is then started, sent SIGKILL, SIGTERM or SIGINT after a random part of
that time, and started again until it ends with 0. Tensors, metrics and stored features are compared byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FAST = ["--trainer.progress", "false", "--trainer.accelerator", "cpu", "--data.shots", "1", "--recipe.epochs", "6"]
KINDS = {
    "train": ["train", "--config", "mocoop/demo", *FAST],
    "base-to-new": ["base-to-new", "--config", "coop/demo", "--seeds", "1,2", *FAST],
    "feature store": ["train", "--config", "tip_adapter_f/demo", *FAST[:6]],
}
SIGNALS = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {143}, signal.SIGINT: {130}}
COMPARED = ("*.safetensors", "metrics.jsonl", "*.png")


def outcome(place: Path) -> dict[str, str]:
    """Return the SHA-256 of every compared file by its path, and a mark for every temporary file."""
    files = {path for pattern in COMPARED for path in place.rglob(pattern)}
    digests = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    left = {str(path.relative_to(place)): "left over" for path in place.rglob(".writing-*")}
    return digests | left


def start(words: list[str], place: Path) -> subprocess.Popen[bytes]:
    """Start a command with its output and its cache in ``place``."""
    environment = {**os.environ, "VLPROMPT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlprompt", *words, "--output", str(place / "runs")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main() -> int:
    """Run all kills, print a line for each, and return 1 if one of them changed the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--also", nargs=2, action="append", default=[], metavar=("NAME", "WORDS"))
    given = parser.parse_args()
    kinds = KINDS | {name: words.split() for name, words in given.also}
    draw, wrong = random.Random(given.seed), 0
    whole: dict[str, tuple[float, dict[str, str]]] = {}
    for number in range(given.kills):
        name = list(kinds)[number % len(kinds)]
        if name not in whole:
            place = given.folder / f"whole-{name.replace(' ', '-')}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            began = time.monotonic()
            process = start(kinds[name], place)
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(f"{name} ends with {process.returncode}: {errors.decode()[-2000:]}")
            whole[name] = time.monotonic() - began, outcome(place)
        seconds, expected = whole[name]
        place = given.folder / f"kill-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        how, after = draw.choice(list(SIGNALS)), draw.uniform(0.05, 1.0) * seconds
        process = start(kinds[name], place)
        time.sleep(after)
        hit = process.poll() is None
        process.send_signal(how)
        _, errors = process.communicate()
        proper = not hit or process.returncode in SIGNALS[how] | {0}
        again = start(kinds[name], place)
        _, later = again.communicate()
        same = again.returncode == 0 and outcome(place) == expected and b"Traceback" not in errors + later
        wrong += not (same and proper)
        verdict = "equal" if same else "DIFFERENT"
        print(
            f"{number:3} {name:14} {how.name:8} {after:6.1f} s  rc {process.returncode}, {again.returncode}  {verdict}"
        )
    print(f"{given.kills} kills, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
