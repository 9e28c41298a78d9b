"""`python -m fastprune COMMAND`: see fastprune/cli/__main__.py."""

import sys

from fastprune.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
