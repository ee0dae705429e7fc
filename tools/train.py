#!/usr/bin/env python
"""Run `vlprompt train` from any folder, also in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlprompt.cli.main import main  # noqa: E402  (the clone must be on the path first)

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
