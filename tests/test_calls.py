"""Mistakes in calls of the library: one line that says what was given and what to give; nothing is changed."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastprune
import fastprune.sparse


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def pruner() -> fastprune.Pruner:
    return fastprune.Pruner(network(), verbose=False)


IMAGES = torch.zeros(2, 3, 8, 8)
MASK = torch.ones(4, 3, 3, 3)
Pruner: Any = fastprune.Pruner  # for type checkers: what is given is wrong
Trainer: Any = fastprune.Trainer
compile: Any = fastprune.sparse.compile

CALLS = {
    # what is no module
    "a state dict": (
        lambda p: Pruner(network().state_dict()),
        TypeError,
        "a Pruner takes a module, not an OrderedDict: a state dict has no layers, load it into its model",
    ),
    "a path": (lambda p: Pruner("model.pth"), TypeError, r"\(torch\.nn\.Module\), not the str 'model\.pth'$"),
    "a class": (lambda p: Pruner(nn.ReLU), TypeError, r": give an instance of it, ReLU\(\.\.\.\)$"),
    "a function's result": (lambda p: Pruner(None), TypeError, "not None$"),
    "weights for a Trainer": (lambda p: Trainer({}), TypeError, "^a Trainer takes a module, not a dict: "),
    "a model without parameters": (lambda p: Pruner(nn.ReLU()), ValueError, r"\(it has no parameters\)"),
    # amounts
    "text": (
        lambda p: p.prune("0.2"),
        TypeError,
        r"^fraction is the str '0\.2', expected a number such as fraction=0\.2$",
    ),
    "text as a sparsity": (lambda p: p.prune(to="90%"), TypeError, "^to is the str '90%'"),
    "a list": (lambda p: p.prune([0.2]), TypeError, "^fraction is a list"),
    "a count as text": (lambda p: p.prune(n="10"), TypeError, r"^n is the str '10', expected .* n=1000$"),
    "percent": (
        lambda p: p.prune(to=90),
        ValueError,
        r"^to is 90, expected a sparsity in \[0, 1\]: did you mean 0\.9\?$",
    ),
    "percent of what is left": (lambda p: p.prune(20), ValueError, r"^fraction is 20, .*: did you mean 0\.2\?$"),
    "percent that come back": (lambda p: p.drop_and_grow(30, None), ValueError, r": did you mean 0\.3\?$"),
    "more than all": (lambda p: p.prune(to=101), ValueError, r"^to is 101, expected a sparsity in \[0, 1\]$"),
    "not a number": (lambda p: p.prune(float("nan")), ValueError, r"^fraction is nan, expected a number in \[0, 1\]$"),
    "a share as a count": (lambda p: p.prune(n=0.2), ValueError, r"are left; for a share of them, fraction=0\.2$"),
    # masks
    "no masks": (lambda p: p.set_masks({}), ValueError, r"^there are no masks: give .* each of 0\.weight, 3\.weight, "),
    "half of the masks": (
        lambda p: p.set_masks({"0.weight": MASK}),
        ValueError,
        r"^there is no mask of 3\.weight; there are 0\.weight, \.\.\.$",
    ),
    "a mask of text": (
        lambda p: p.set_masks({"0.weight": np.full((4, 3, 3, 3), "1"), "3.weight": torch.ones(2, 144)}),
        ValueError,
        r"^the mask of 0\.weight is an ndarray of <U1: give a bool tensor, or one of 0 and 1$",
    ),
    "a mask of shares": (
        lambda p: p.set_masks({"0.weight": MASK / 2, "3.weight": torch.ones(2, 144)}),
        ValueError,
        r"^the mask of 0\.weight has the value 0\.5: masks are 0 and 1$",
    ),
    # compiled networks
    "an example in a tuple": (
        lambda p: compile(network(), (IMAGES,)),
        TypeError,
        r"^compile takes an example float32 \[B, C, H, W\], a tensor, not a tuple: give the tensor in it$",
    ),
    "an example of numpy": (
        lambda p: compile(network(), IMAGES.numpy()),
        TypeError,
        r"not an ndarray: give torch\.from_numpy\(array\)\.float\(\)$",
    ),
    "an example's size": (lambda p: compile(network(), (1, 3, 8, 8)), TypeError, "not a tuple$"),
    "weights to compile": (
        lambda p: compile(OrderedDict(), IMAGES),
        TypeError,
        "^compile takes a module, not an OrderedDict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_a_mistaken_call_says_what_to_give(what):
    call, kind, says = CALLS[what]
    ours = pruner()
    ours.prune(0.3)
    before = {name: mask.clone() for name, mask in ours.masks.items()}
    with pytest.raises(kind, match=says) as caught:
        call(ours)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(mask, before[name]) for name, mask in ours.masks.items())


@pytest.mark.parametrize(
    ("images", "kind", "says"),
    [
        (IMAGES.numpy(), TypeError, r"^images must be float32 \[B, C, H, W\], a tensor, not an ndarray: give torch\."),
        ([IMAGES], TypeError, "not a list: give the tensor in it$"),
        (None, TypeError, "not None$"),
        (IMAGES[0], fastprune.InputError, r"got float32 \[3, 8, 8\] on cpu: give images\[None\]$"),
    ],
)
def test_a_compiled_network_says_what_images_it_takes(images: Any, kind, says):
    with pytest.raises(kind, match=says):
        fastprune.sparse.compile(network(), IMAGES)(images)


def test_whatever_has_the_value_of_a_number_is_an_amount():
    total = pruner().total
    for amount in (0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        assert pruner().prune(amount) == round(0.25 * total)
    assert pruner().prune(n=np.int64(7)) == 7
    assert pruner().prune(to=1) == total
