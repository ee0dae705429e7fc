"""``python -m vlprompt``: the command line."""

import sys

from vlprompt.cli import main

if __name__ == "__main__":
    sys.exit(main())
