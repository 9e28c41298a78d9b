"""Looks after a run store: `python scripts/store.py ls | show | verify | gc | export | import`. See --help, README."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install

if __name__ == "__main__":
    try:
        from fastprune.cli.store import main

        sys.exit(main())
    except KeyboardInterrupt:  # before main could say so
        sys.exit(130)
