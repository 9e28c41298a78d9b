"""What the loaders import, and when."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_manifests_catalog_and_layouts_need_the_standard_library_only():
    code = (
        "import sys; import fastprune.loaders.layout;"
        "from fastprune.loaders.manifest import Manifest; from fastprune.loaders.synthetic import SyntheticData;"
        "from fastprune.loaders import peek, find_or_prepare, choose_loader;"
        "peek(SyntheticData(), '.'); choose_loader(*find_or_prepare('synthetic', '.'));"
        "print(sorted({'torch', 'numpy', 'PIL', 'tqdm', 'numba', 'torchvision', 'ffcv'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ffcv_is_imported_inside_functions_only():
    for path in (ROOT / "loaders").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "ffcv" for name in names), path


def test_every_public_name_is_real():
    import fastprune.loaders as loaders

    for name in loaders.__all__:
        assert callable(getattr(loaders, name))
        assert callable(getattr(loaders, name)), "the second time it must still be no module"
