"""What importing costs. Who may import whom is a contract of import-linter in pyproject.toml, held by `make lint`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_planning_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from fastprune.cli.reproduce import main;"
        "code = main(['--fig', 'all', '--plan', '--preset', 'paper', '--store', 'nowhere']);"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'scipy', 'triton', 'numba'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_importing_fastprune_imports_no_torch_and_its_names_are_real():
    code = (
        "import sys, fastprune; assert 'torch' not in sys.modules;"
        "print([getattr(fastprune, n) for n in fastprune.__all__])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
