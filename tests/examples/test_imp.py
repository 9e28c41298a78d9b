"""examples/imp.py: the method in one file, run as its docstring says, but shorter."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "imp.py"


def test_the_example_prunes_and_trains_what_is_left():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--rounds", "2", "--epochs", "1", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=None,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"round (\d): density ([\d.]+), accuracy ([\d.]+)", done.stdout)
    assert [(int(r), float(d)) for r, d, _ in found] == [(0, 1.0), (1, 0.8), (2, 0.64)]
    assert float(found[-1][2]) > 0.2  # chance is 0.1


def test_it_stays_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 80
