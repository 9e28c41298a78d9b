"""Who may import whom, read from the source, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune.figures import FIGURES

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)

# room -> what it may import beside the standard library and itself. "fastprune.x" is that module alone.
ALLOWED = {
    "kernels": {"torch", "triton", "numpy", "numba"},
    "loaders": {
        "torch", "torchvision", "numpy", "numba", "PIL", "tqdm", "ffcv", "fastprune.kernels", "fastprune.errors",
        "fastprune.command",
    },
    "fastprune/errors.py": set(),
    "fastprune/command.py": {"tqdm", "fastprune.errors"},
    "fastprune/specs.py": {"fastprune.errors"},
    "fastprune/settings.py": {"fastprune.errors", "fastprune.specs"},
    "fastprune/files.py": set(),
    "fastprune/store/keeper.py": {"filelock"},
    "fastprune/store/lease.py": {"fastprune.errors"},
    "fastprune/store/about.py": set(),
    "fastprune/store/run_store.py": {"fastprune.errors", "fastprune.files", "fastprune.specs", "fastprune.store.about"},
    "fastprune/graph.py": {"fastprune.specs", "fastprune.store"},
    "fastprune/schedule.py": {"fastprune.specs", "fastprune.graph"},
    "fastprune/simulation.py": {"fastprune.specs", "fastprune.graph", "fastprune.schedule"},
    "fastprune/sizes.py": {"fastprune.specs", "fastprune.graph"},
    "fastprune/figures/plan.py": {"fastprune.errors", "fastprune.specs", "fastprune.settings"},
    "fastprune/figures/results.py": {"fastprune.errors", "fastprune.files"},
    "fastprune/figures/axes.py": {"fastprune.errors", "fastprune.figures.results"},
    "fastprune/figures/claims.py": {"scipy", "fastprune.figures.results"},
    "fastprune/figures/claims_accuracy.py": {"fastprune.figures.claims", "fastprune.figures.results"},
    "fastprune/figures/claims_ratios.py": {"fastprune.figures.claims", "fastprune.figures.results"},
    "fastprune/figures/collect.py": {"fastprune.specs", "fastprune.store", "fastprune.figures"},
    **{
        f"fastprune/figures/{name.lower()}.py": {
            "fastprune.errors", "fastprune.specs", "fastprune.settings", "fastprune.figures",
        }
        for name in ("resnet50", *FIGURES)
    },
    "fastprune/models.py": {"torch", "torchvision", "fastprune.errors", "fastprune.specs"},
    "fastprune/flat.py": {"torch", "fastprune.kernels"},
    "fastprune/optim.py": {"torch", "fastprune.flat", "fastprune.kernels", "fastprune.masks"},
    "fastprune/store/check.py": {
        "fastprune.command", "fastprune.files", "fastprune.specs", "fastprune.store",
    },
    "fastprune/store/read.py": {"fastprune.errors", "fastprune.files", "fastprune.store"},
    "fastprune/store/list.py": {"fastprune.command", "fastprune.specs", "fastprune.store.read"},
    "fastprune/store/show.py": {
        "fastprune.command", "fastprune.errors", "fastprune.files", "fastprune.store.list", "fastprune.store.read",
    },
    "fastprune/store/needs.py": {
        "fastprune.errors", "fastprune.files", "fastprune.graph", "fastprune.specs", "fastprune.store",
        "fastprune.store.read",
    },
    "fastprune/store/gc.py": {
        "fastprune.errors", "fastprune.files", "fastprune.store.keeper", "fastprune.store.lease",
        "fastprune.store", "fastprune.store.needs", "fastprune.store.read",
    },
    "fastprune/store/transfer.py": {
        "tqdm", "fastprune.command", "fastprune.errors", "fastprune.files", "fastprune.store.lease", "fastprune.store",
        "fastprune.store.archive", "fastprune.store.check", "fastprune.store.needs", "fastprune.store.read",
    },
    "fastprune/store/archive.py": {"fastprune.errors", "fastprune.store.check", "fastprune.store.needs"},
    "fastprune/store/cli.py": {
        "fastprune.command", "fastprune.errors", "fastprune.files", "fastprune.store", "fastprune.store.check",
        "fastprune.store.gc", "fastprune.store.list", "fastprune.store.read", "fastprune.store.show",
        "fastprune.store.transfer",
    },
    "fastprune/tensors.py": {"torch", "safetensors", "fastprune.errors", "fastprune.files"},
    "fastprune/masks.py": {"torch", "fastprune.errors", "fastprune.flat", "fastprune.kernels", "fastprune.tensors"},
    "fastprune/pruning.py": {"torch", "numpy", "fastprune.kernels", "fastprune.masks", "fastprune.specs"},
    "fastprune/structured.py": {"torch", "torch_pruning", "fastprune.specs"},
    "fastprune/latency.py": {"torch"},
    "fastprune/train_request.py": {"fastprune.specs"},
    "fastprune/train_log.py": {"fastprune.specs", "fastprune.step"},
    "fastprune/train_cli.py": {
        "fastprune.command", "fastprune.errors", "fastprune.specs", "fastprune.train_request",
        "fastprune.loaders.choice", "fastprune.classify",
    },
    "fastprune/train_data.py": {
        "torch", "numpy", "fastprune.errors", "fastprune.loaders", "fastprune.train_request",
    },
    "fastprune/train_model.py": {"torch", "torchvision", "fastprune.errors", "fastprune.flat"},
    "fastprune/checkpoint.py": {
        "torch", "fastprune.errors", "fastprune.files", "fastprune.specs", "fastprune.masks", "fastprune.train",
    },
    "fastprune/step.py": {"torch"},
    "fastprune/ranks.py": {"torch"},
    "fastprune/train.py": {
        "torch", "fastprune.specs", "fastprune.kernels", "fastprune.flat", "fastprune.masks", "fastprune.optim",
        "fastprune.pruning", "fastprune.ranks", "fastprune.step",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def files(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    itself = f"fastprune.{room}" if "/" not in room else ""
    assert files(room)
    for path in files(room):
        for name in imports(path):
            top = name.partition(".")[0]
            allowed = any(
                name == a or name.startswith(a + ".") for a in ALLOWED[room] | ({itself} if itself else set())
            )
            assert allowed or top in STDLIB, f"{path.relative_to(ROOT)} imports {name}"


def test_nobody_imports_scripts_bench_tests_or_the_bare_rooms():
    for path in [*files("fastprune"), *files("kernels"), *files("loaders"), *files("scripts"), *files("bench")]:
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in {"scripts", "tests", "kernels", "loaders"}, f"{path} imports {name}"
            assert top != "bench" or path.is_relative_to(ROOT / "bench"), f"{path} imports {name}"


def test_planning_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from fastprune.cli import main; code = main(['--fig', 'A2', '--plan', '--preset', 'paper']);"
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
