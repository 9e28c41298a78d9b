"""The names that fastprune gives: found by dir(), imported on first use, and typed."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fastprune

ROOT = Path(__file__).resolve().parents[1]


def test_dir_lists_the_api_and_nothing_else():
    assert dir(fastprune) == sorted(
        "InputError Mask MaskedConv2d MaskedLinear MaskedSGD Pruner RunStore Trainer __version__ criteria mask_layers "
        "remove_channels schedules sparse to_torch_prune".split()
    )
    assert sorted(fastprune.__all__) == dir(fastprune)


def test_every_name_is_there_with_a_docstring():
    for name in set(fastprune.__all__) - {"__version__"}:
        assert getattr(fastprune, name).__doc__, name
    assert fastprune.Pruner is import_module("fastprune.pruning.pruner").Pruner
    assert fastprune.criteria is import_module("fastprune.pruning.criteria")
    assert fastprune.schedules is import_module("fastprune.pruning.schedules")
    assert fastprune.sparse is import_module("fastprune.sparse")


@pytest.mark.parametrize("name", ["Prunner", "attach", "keep_pruned", "Coverage", "torch", "_private"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'fastprune' has no attribute '{name}'"):
        getattr(fastprune, name)


def test_a_star_import_gives_the_same_names():
    names: dict[str, object] = {}
    exec("from fastprune import *", names)
    assert sorted(names.keys() - {"__builtins__"}) == sorted(fastprune.__all__)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_importing_fastprune_imports_no_torch():
    code = "import sys, fastprune; dir(fastprune); fastprune.InputError; print('torch' in sys.modules, end=' ')"
    assert run(code + "; fastprune.Mask; print('torch' in sys.modules)") == "False True\n"


TYPED = """
import torch
from typing import assert_type
import fastprune
from fastprune import Pruner, criteria, schedules

model = torch.nn.Linear(2, 2)
pruner = fastprune.Pruner(model)
reveal_type(pruner.prune)
assert_type(pruner, Pruner)
assert_type(pruner.prune(0.5, criterion=criteria.random(0)), int)
assert_type(pruner.finalize(), torch.nn.Module)
assert_type(fastprune.MaskedSGD(model.parameters(), pruner), fastprune.MaskedSGD)
assert_type(fastprune.Mask.load("mask"), fastprune.Mask)
assert_type(schedules.RigL(pruner, end=3).step(), bool)
reveal_type(fastprune.Trainer)
reveal_type(fastprune.mask_layers)
reveal_type(fastprune.to_torch_prune)
"""

WRONG = {
    "fastprune.Prunner(model)": 'Module has no attribute "Prunner"',
    "fastprune.attach(model)": 'Module has no attribute "attach"',
    "pruner.prun(0.5)": '"Pruner" has no attribute "prun"',
    'pruner.prune("half")': 'incompatible type "str"',
    "pruner.prune(0.5, critereon='random')": 'Unexpected keyword argument "critereon"',
    "Pruner(model, 'conv')": "Too many positional arguments",
    "criteria.taylr": 'Module has no attribute "taylr"',
}


@pytest.mark.slow
def test_mypy_sees_real_types_and_wrong_names(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED + "".join(f"{line}\n" for line in WRONG))
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    command += ["--follow-imports=silent", str(tmp_path / "typed.py")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in found.stdout.splitlines() if line.startswith(str(tmp_path))]
    first = len(TYPED.splitlines()) + 1
    errors = {int(line.split(":")[1]): line for line in lines if ": error:" in line}
    assert sorted(errors) == list(range(first, first + len(WRONG))), found.stdout
    for number, said in enumerate(WRONG.values(), first):
        assert said in errors[number]
    revealed = [line for line in lines if "Revealed type is" in line]
    assert len(revealed) == 4
    assert "def (fraction: float | None =" in revealed[0]
    for line in revealed:
        assert 'is "Any"' not in line
    assert "fastprune.training.trainer.Trainer" in revealed[1]
