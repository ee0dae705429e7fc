#!/usr/bin/env python
"""Door onto `vlprompt train`: runs from any folder, in a clone that is not installed too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlprompt.cli.main import main  # noqa: E402  (the clone has to be on the path first)

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
