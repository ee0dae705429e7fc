"""``python -m vlprompt``: the command line."""

import sys

from vlprompt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
