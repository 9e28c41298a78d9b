"""Figures and criteria of a user's own: registered by a module, run by workers, with a version in the keys."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastprune.cli.reproduce import main
from fastprune.figures import FIGURES, load, register
from fastprune.figures.figure import Rates, Roles
from fastprune.figures.paper import A2
from fastprune.files import read_tensors
from fastprune.pruning import Mask, criteria
from fastprune.store import RunStore
from fastprune.study.settings import preset

MODULE = """
from dataclasses import replace

from fastprune.figures import register
from fastprune.figures.figure import Figure, evaluated, find_rates
from fastprune.figures.paper import RESNET18
from fastprune.pruning.criteria import register_criterion


@register_criterion("inverse", version={version})
def inverse(weights, mask):
    return {{name: 1.0 / (1e-3 + weight.abs()) for name, weight in weights.items()}}


register(
    Figure(
        "mine",
        replace(RESNET18, lr_find=(0.1,), lr_eval=(0.1,), criterion="inverse"),
        evaluated(find_rates),
        lambda roles: [],
    )
)
"""
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *"--seeds 1 --rounds 1 --epochs 1 --classes 3 --train-per-class 8 --val-per-class 4".split(),
    *"--batch-size 12 --width 4 --image-size 32 --device cpu".split(),
]


@pytest.fixture
def clean(monkeypatch):
    """No trace of a user's module in this process afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    figures, known = dict(FIGURES), dict(criteria.CRITERIA)
    yield
    for registry, before in ((FIGURES, figures), (criteria.CRITERIA, known)):
        registry.clear()
        registry.update(before)
    sys.modules.pop("fastprune_user_mine", None)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_users_figure_and_criterion_run_in_each_worker(workers, clean, tmp_path, capsys):
    module = tmp_path / "mine.py"
    module.write_text(MODULE.format(version=3))
    folders = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    command = [
        "--fig",
        "mine",
        "--figure-module",
        str(module),
        *TINY,
        "--image-size",
        "32",
        "--device",
        "cpu",
        *folders,
    ]
    assert main([*command, "--workers", str(workers)]) == 0
    assert "Figure mine, preset smoke: ResNet-18" in capsys.readouterr().out
    nodes = [json.loads(p.read_text()) for p in tmp_path.glob("store/nodes/*/*/node.json")]
    (prune,) = [n for n in nodes if n["kind"] == "prune"]
    assert prune["spec"]["criterion"] == {"name": "inverse", "version": 3}
    assert prune["result"]["kept"] == prune["result"]["total"] - round(0.8 * prune["result"]["total"])
    # The inverse magnitude prunes the largest weights.
    store = RunStore(tmp_path / "store", read_only=True)
    source, key = prune["spec"]["source"]["node"], prune["key"]
    weights, _ = read_tensors(store.root / "nodes" / source[:2] / source / "state-1.safetensors")
    keep = Mask.load(store.root / "nodes" / key[:2] / key / "mask.safetensors").tensors()
    kept, pruned = ([weights[f"model.{name}"][k == flag] for name, k in keep.items()] for flag in (True, False))
    assert max(w.abs().max() for w in kept if w.numel()) <= min(w.abs().min() for w in pruned if w.numel())


def test_another_version_is_another_mask(clean):
    criteria.register_criterion("twice", 1)(lambda weights, mask: weights)
    from fastprune.specs import DataSpec
    from fastprune.study.chains import Chains, MaskRecipe

    settings = preset(A2.protocol, "smoke").override(criterion="twice")
    data = DataSpec("x", "f", 10, None, None, 1000, 100)
    first = Chains(settings, data, 0).masks(MaskRecipe(0.2))[0]
    criteria.CRITERIA["twice"] = replace(criteria.CRITERIA["twice"], version=2)
    second = Chains(settings, data, 0).masks(MaskRecipe(0.2))[0]
    plain = Chains(preset(A2.protocol, "smoke"), data, 0).masks(MaskRecipe(0.2))[0]
    assert len({first.key, second.key, plain.key}) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--figure-module", "no_such_module"], "--figure-module no_such_module cannot be imported"),
        (["--figure-module", "nowhere.py"], "--figure-module nowhere.py: no such file"),
        (["--criterion", "nonsense"], "unknown criterion 'nonsense': choose one of magnitude"),
    ],
)
def test_bad_modules_and_criteria_are_one_line(arguments, expected, clean, tmp_path, capsys):
    folders = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    assert main(["--fig", "A2", *arguments, *folders]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert len(said.splitlines()) == 1


def test_names_are_taken_once(clean):
    with pytest.raises(ValueError, match="already"):
        register(A2)
    with pytest.raises(ValueError, match="already"):
        criteria.register_criterion("magnitude", 1)


def test_claims_keep_their_roles_under_other_rates():
    def claims(*rates: float):
        settings = preset(A2.protocol, "quick").override(lr_find=rates)
        return A2.claims_of(settings)

    assert [c.text for c in claims(0.3, 0.01, 0.1)][1] == "LR_find 0.01 and 0.1 are better than 0.3"
    assert claims(0.3, 0.01, 0.1)[3].comparisons[0].right == "0.3"
    # Of two rates none is the middle one: what needs it finds no results, and stays undecided.
    assert claims(0.3, 0.01)[0].comparisons[0].right == "middle"
    assert claims(0.05, 0.2, 0.5, 0.8)[0].text == "LR_find 0.05 and 0.2 are very similar"
    assert Rates.of((0.7,)) == ("lowest", "middle", "highest")
    for name in FIGURES:
        figure = load(name)
        if "lr_find" not in figure.exactly:
            one = preset(figure.protocol, "quick").override(lr_find=(0.1,))
            assert figure.claims(Roles(one, figure.panels_of(one)))


def test_the_module_of_the_documentation_works(clean, tmp_path, capsys):
    text = (ROOT / "docs" / "own-figure.md").read_text()
    module = tmp_path / "mine.py"
    module.write_text(text.split("```python\n", 1)[1].split("```", 1)[0])
    assert main(["--fig", "mine", "--figure-module", str(module), "--plan", "--store", str(tmp_path / "store")]) == 0
    assert "Figure mine, preset smoke" in capsys.readouterr().out
    settings = preset(load("mine").protocol, "smoke")
    assert load("mine").claims_of(settings)[0].comparisons[0].left == "0.05"
