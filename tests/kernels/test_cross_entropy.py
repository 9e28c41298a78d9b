"""cross_entropy_ against its reference in float64, and that against torch's loss and the sums of an epoch."""

import pytest
import torch
import torch.nn.functional as F

from fastprune.kernels import cross_entropy_
from fastprune.kernels.cross_entropy import IGNORED, MOST_CLASSES, cross_entropy_reference
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.training.step import EpochSums
from tests.kernels.inputs import FLOATS, INF, NAN, assert_same_bits, captured

# A machine with a GPU may lack it.
hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

SHAPES = [(1, 1), (3, 1), (5, 2), (37, 10), (2, 1000), (1, 1501)]
shapes = pytest.mark.parametrize(("rows", "classes"), SHAPES)
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def drawn(rows, classes, dtype=torch.float32, ignored=0.3, seed=0):
    """(logits, labels) with rows that do not count, but not all of them."""
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(rows, classes, generator=g) * 4, torch.randint(classes, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = IGNORED
    labels[-1] = classes - 1
    return logits.to(dtype), labels


def run(logits, labels, device, smoothing=0.0, gradient=True, scale=None, before=0.0):
    """(sums, gradient) as the operation leaves them, on the CPU."""
    sums = torch.full((4,), before, dtype=torch.float64, device=device)
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    there = torch.full_like(logits, NAN, device=device) if gradient else None
    factor = None if scale is None else torch.tensor(scale, device=device)
    cross_entropy_(
        sums, arrived, logits.to(device), labels.to(device), smoothing=smoothing, gradient=there, scale=factor
    )
    assert int(arrived) == 0
    return sums.cpu(), None if there is None else there.cpu()


def assert_as_reference(logits, labels, sums, gradient, smoothing=0.0, scale=1.0):
    """Counts equal; loss and gradient as near to float64 as float32's are, and one ulp of the gradient's dtype."""
    exact, exact_gradient = cross_entropy_reference(logits.double(), labels, smoothing)
    plain, plain_gradient = cross_entropy_reference(logits.float(), labels, smoothing)
    assert torch.equal(sums[1:], exact[1:])
    assert torch.equal(sums[:1].isfinite(), exact[:1].isfinite())
    eps = torch.finfo(torch.float32).eps
    if exact[0].isfinite():
        # A row's loss is a difference of logits: their roundings, not the loss's own, are the measure.
        largest = logits.float().nan_to_num(0, 0, 0).abs().max() + 1
        assert (sums[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + 2 * eps * largest * len(labels)
    else:
        assert_same_bits(sums[:1].float(), exact[:1].float())
    finite = exact_gradient.isfinite()
    assert torch.equal(gradient.isfinite(), finite)
    if finite.any():
        error = (gradient.double() - exact_gradient * scale)[finite].abs().max()
        allowed = (plain_gradient.double() - exact_gradient)[finite].abs().max() * scale
        largest = (exact_gradient[finite].abs().max() * scale).float()
        # Half an ulp of rounding; the interpreter truncates to bf16, which is a whole one.
        assert error <= 2 * allowed + (torch.finfo(gradient.dtype).eps + 4 * eps) * largest
    assert not gradient[labels == IGNORED].any()


@shapes
@smoothings
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_and_gradient(rows, classes, smoothing, dtype, device):
    logits, labels = drawn(rows, classes, dtype)
    sums, gradient = run(logits, labels, device, smoothing)
    assert_as_reference(logits, labels, sums, gradient, smoothing)
    added, scaled = run(logits, labels, device, smoothing, scale=1024.0, before=3.0)
    assert torch.equal(added, 3 + sums)
    assert_as_reference(logits, labels, sums, scaled, smoothing, 1024.0)
    only, none = run(logits, labels, device, smoothing, gradient=False)
    assert none is None
    assert torch.equal(only, sums)


@shapes
@smoothings
def test_the_reference_is_torchs_loss_and_the_sums_of_an_epoch(rows, classes, smoothing):
    logits, labels = drawn(rows, classes, torch.float64)
    logits[0, :2] = logits[-1, -1]  # ties
    leaf, epoch = logits.requires_grad_(), EpochSums(torch.device("cpu"))
    loss = F.cross_entropy(leaf, labels, label_smoothing=smoothing)
    epoch.add(loss, leaf, labels, padded=True)
    sums, gradient = cross_entropy_reference(logits.detach(), labels, smoothing)
    assert torch.equal(sums[1:], epoch.sums[1:])
    torch.testing.assert_close(sums, epoch.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-12, atol=1e-14)


@smoothings
def test_where_all_rows_are_ignored_nothing_is_added_and_the_gradient_is_torchs(smoothing, device):
    logits, labels = drawn(5, 3)[0], torch.full((5,), IGNORED)
    leaf = logits.clone().requires_grad_()
    (torchs,) = torch.autograd.grad(F.cross_entropy(leaf, labels, label_smoothing=smoothing), leaf)
    sums, gradient = run(logits, labels, device, smoothing, before=2.0)
    assert torch.equal(gradient, torchs)
    assert sums.tolist() == [2.0] * 4


def test_no_rows(device):
    sums, gradient = run(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), device)
    assert not sums.any()
    assert gradient.shape == (0, 3)


ROWS = {
    "first of ties": ([1.0, 1.0, 0.0], 0, 1, 1),
    "second of ties": ([1.0, 1.0, 0.0], 1, 0, 1),
    "sixth of ties": ([1.0] * 7, 5, 0, 0),
    "fifth of ties": ([1.0] * 7, 4, 0, 1),
    "zeros of two signs": ([0.0, -0.0], 1, 0, 1),
    "NaN before numbers": ([2.0, NAN, 0.0], 0, 0, 1),
    "the first NaN is predicted": ([2.0, NAN, NAN, 0.0, 0.0, 0.0], 1, 1, 0),
    "the second is not": ([2.0, NAN, NAN, 0.0, 0.0, 0.0], 2, 0, 0),
    "infinity": ([INF, 1.0], 0, 1, 1),
    "no infinity": ([1.0, -INF, 2.0], 1, 0, 1),
    "other classes impossible": ([1.0, -INF, -INF], 0, 1, 1),
    "none possible": ([-INF, -INF], 0, 1, 1),
    "one class": ([3.0], 0, 1, 1),
    "one class, NaN": ([NAN], 0, 1, 1),
}


@smoothings
@pytest.mark.parametrize("what", ROWS)
def test_ties_and_what_is_not_finite(what, smoothing, device):
    values, label, top1, top5 = ROWS[what]
    logits, labels = torch.tensor([values]), torch.tensor([label])
    sums, gradient = run(logits, labels, device, smoothing)
    assert sums[1:].tolist() == [top1, 1, top5]
    assert_as_reference(logits, labels, sums, gradient, smoothing)
    leaf, epoch = logits.clone().requires_grad_(), EpochSums(torch.device("cpu"))
    loss = F.cross_entropy(leaf, labels, label_smoothing=smoothing)
    epoch.add(loss, leaf, labels)
    torch.testing.assert_close(sums, epoch.sums, equal_nan=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0], equal_nan=True)


@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_a_label_that_is_no_class_shows(label, device):
    """check_labels sees the first batch alone on a GPU; torch would fail in the device's code."""
    logits, labels = torch.ones(2, 3), torch.tensor([1, label])
    sums, gradient = run(logits, labels, device)
    assert sums.isnan().tolist() == [True, False, False, False]
    assert sums[1:].tolist() == [0, 2, 1]
    assert gradient.isnan().tolist() == [[False] * 3, [True] * 3]


def examples(number):
    return hypothesis.settings(max_examples=number // 4 if INTERPRETED else number, deadline=None)


@st.composite
def batches(draw):
    rows, classes = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    logits, labels = drawn(
        rows, classes, draw(st.sampled_from(FLOATS)), draw(st.floats(0, 1)), draw(st.integers(0, 99))
    )
    special = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.0, 80.0, -200.0, INF, -INF, NAN]), max_size=6))
    for value in special:
        logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, classes - 1))] = value
    return logits, labels, draw(st.sampled_from([0.0, 0.1, 1.0]))


@examples(80)
@hypothesis.given(batch=batches())
def test_any_batch(batch, device):
    logits, labels, smoothing = batch
    assert_as_reference(logits, labels, *run(logits, labels, device, smoothing), smoothing)


def test_rows_apart_in_memory(device):
    """Rows that are parts of longer ones, and equal to the bit in each run."""
    wide, labels = drawn(101, 20)
    logits = wide[:, :10]
    labels = labels.where(labels < 10, IGNORED)
    first, again = [run(part, labels, device, 0.1, before=0.1) for part in (logits, logits.contiguous())]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert_as_reference(logits, labels, run(logits, labels, device, 0.1)[0], first[1], 0.1)


def test_a_graph_adds_each_batch(device):
    logits, labels = (t.to(device) for t in drawn(33, 10))
    sums, arrived = torch.zeros(4, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    gradient = torch.empty_like(logits)
    replay = captured(lambda: cross_entropy_(sums, arrived, logits, labels, gradient=gradient), device)
    sums.zero_()
    expected = torch.zeros(4, dtype=torch.float64)
    for seed in (1, 2):
        for place, values in zip((logits, labels), drawn(33, 10, seed=seed), strict=True):
            place.copy_(values)
        replay()
        one, by_logits = run(logits.cpu(), labels.cpu(), device)
        expected += one
        assert torch.equal(gradient.cpu(), by_logits)
    assert torch.equal(sums.cpu(), expected)


BAD = {
    "logits of three dimensions": lambda a: a | {"logits": torch.zeros(2, 3, 4)},
    "logits of float64": lambda a: a | {"logits": torch.zeros(2, 3, dtype=torch.float64)},
    "too many classes": lambda a: a | {"logits": torch.zeros(2, MOST_CLASSES + 1)},
    "columns apart": lambda a: a | {"logits": torch.zeros(3, 2).t()},
    "labels of another length": lambda a: a | {"labels": torch.zeros(3, dtype=torch.int64)},
    "labels of int32": lambda a: a | {"labels": torch.zeros(2, dtype=torch.int32)},
    "sums of float32": lambda a: a | {"sums": torch.zeros(4)},
    "gradient of another dtype": lambda a: a | {"gradient": torch.zeros(2, 3).half()},
    "gradient with gaps": lambda a: a | {"gradient": torch.zeros(2, 6)[:, ::2]},
    "scale of two": lambda a: a | {"scale": torch.ones(2)},
    "smoothing beyond 1": lambda a: a | {"smoothing": 1.5},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    good = {
        "sums": torch.zeros(4, dtype=torch.float64),
        "arrived": torch.zeros(1, dtype=torch.int32),
        "logits": torch.zeros(2, 3),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    cross_entropy_(**good)
    with pytest.raises(ValueError, match=r"\S"):
        cross_entropy_(**BAD[what](good))
