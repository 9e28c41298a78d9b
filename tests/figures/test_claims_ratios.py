"""Claims about layerwise ratios, on made-up results: that hold, that fail, that cannot be decided. Numbers by hand."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.figures.claims import (
    HARDLY_POINTS,
    Accuracy,
    Claim,
    FirstAgainstOthers,
    Flattens,
    Hardly,
    MoreMovement,
    SmallerStart,
    judge,
)
from fastprune.figures.results import Row

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2")


def row(panel: str, series: str, seed: int, epoch: int, y: float | None) -> Row:
    return Row("A4", panel, series, seed, epoch, float(epoch), y, 0.5, None, y is None, 0, f"{panel}{seed}")


def layers(panel: str, seed: int, movements: tuple[float, float, float], epochs: int = 5) -> list[Row]:
    """Three layers whose ratios rise from 0.1 by so many points, in equal steps."""
    return [
        row(panel, name, seed, epoch, 0.1 + movement / 100 * epoch / epochs)
        for name, movement in zip(LAYERS, movements, strict=True)
        for epoch in range(epochs + 1)
    ]


def line(series: str, seed: int, values: tuple[float, ...]) -> list[Row]:
    """A distance at epochs 0, 1, ..., in points."""
    return [row("a", series, seed, epoch, value / 100) for epoch, value in enumerate(values)]


def part(comparison, rows, *, decisive=True):
    (found,) = judge(Claim("id", "text", (comparison,)), rows, chance=0.005, decisive=decisive).parts
    return found


def test_movement_is_the_span_of_each_layer_and_the_first_layer_is_left_out():
    rows = [r for seed in range(3) for r in layers("a", seed, (50, 20, 10)) + layers("b", seed, (30, 4, 2))]
    more = part(MoreMovement("a", "b", "conv1"), rows)
    assert (more.verdict, more.effect, more.unit) == (
        "holds",
        pytest.approx((20 + 10) / 2 - (4 + 2) / 2),
        "ratio points",
    )
    assert part(MoreMovement("b", "a", "conv1"), rows).verdict == "fails"
    hardly = part(Hardly("b", "conv1"), rows)
    assert (hardly.verdict, hardly.effect) == ("holds", pytest.approx(HARDLY_POINTS - 3))
    assert (part(Hardly("a", "conv1"), rows).verdict, part(Hardly("a", "conv1"), rows).effect) == (
        "fails",
        pytest.approx(HARDLY_POINTS - 15),
    )
    first = part(FirstAgainstOthers("b", "conv1"), rows)
    assert (first.verdict, first.effect) == ("holds", pytest.approx(30 - 3))
    assert part(FirstAgainstOthers("b", "layer1.0.conv2"), rows).verdict == "fails"


def test_the_interval_by_hand():
    # Movements of 1, 2, 3 points leave 4, 3, 2 to the bound: mean 3, t = 4.302653, 4.302653 / sqrt(3) = 2.484138.
    # Ratios and distances below the accuracy of guessing are as good as any.
    rows = [r for seed in range(3) for r in layers("b", seed, (0, seed + 1, seed + 1))]
    found = part(Hardly("b", "conv1"), [replace(r, y=r.y - 0.1) for r in rows])
    assert found.interval == (pytest.approx(3 - 2.484138, abs=1e-5), pytest.approx(3 + 2.484138, abs=1e-5))
    assert (found.verdict, found.rounds, found.dropped) == ("holds", (0, 1, 2, 3, 4, 5), ())


def test_seeds_that_disagree_decide_nothing():
    rows = [r for seed, m in enumerate((2, 5, 8)) for r in layers("b", seed, (0, m, m))]
    assert part(Hardly("b", "conv1"), rows).verdict == "undecided"
    rows = [r for seed, m in enumerate((10, 4, 1)) for r in layers("b", seed, (5, m, m))]
    assert part(FirstAgainstOthers("b", "conv1"), rows).verdict == "undecided"
    rows += [r for seed in range(3) for r in layers("a", seed, (5, 6, 6))]
    assert part(MoreMovement("a", "b", "conv1"), rows).verdict == "undecided"
    rows = [r for s, m in enumerate((1, 5, 9)) for r in line("0.05", s, (m, 2, 0)) + line("0.5", s, (6, 2, 0))]
    assert part(SmallerStart("a", "0.05", "0.5"), rows).verdict == "undecided"
    assert part(Flattens("a", "0.05", 1), rows).verdict == "undecided"


def test_the_start_is_the_first_epoch():
    rows = [r for s in range(3) for r in line("0.05", s, (2 + s / 10, 1, 0)) + line("0.5", s, (9, 0.1, 0))]
    found = part(SmallerStart("a", "0.05", "0.5"), rows)
    assert (found.verdict, found.effect) == ("holds", pytest.approx(9 - 2.1))
    assert part(SmallerStart("a", "0.5", "0.05"), rows).verdict == "fails"


def test_falling_before_and_after_an_epoch():
    # Before epoch 2: (8 - 2) / 2 = 3 points an epoch; after: (2 - 0) / 4 = 0.5.
    rows = [r for seed in range(3) for r in line("0.5", seed, (8, 5, 2, 1.5, 1, 0.5, 0))]
    found = part(Flattens("a", "0.5", 2), rows)
    assert (found.verdict, found.effect, found.unit) == ("holds", pytest.approx(2.5), "ratio points an epoch")
    late = [r for seed in range(3) for r in line("0.5", seed, (8, 8, 8, 6, 4, 2, 0))]
    assert part(Flattens("a", "0.5", 2), late).verdict == "fails"
    for outside in (0, 6, 70):
        found = part(Flattens("a", "0.5", outside), rows)
        assert (found.verdict, found.effect) == ("undecided", None)
        assert "not inside" in found.why
    found = part(Flattens("a", "0.5", 2), [r for r in rows if r.round != 2])
    assert (found.verdict, found.effect, found.why) == ("undecided", None, "no results of 0.5 at epoch 2")


def test_what_keeps_a_claim_from_being_decided():
    rows = [r for seed in range(3) for r in layers("b", seed, (30, 4, 2))]
    assert part(Hardly("b", "conv1"), rows, decisive=False).verdict == "undecided"
    two = part(Hardly("b", "conv1"), [r for r in rows if r.seed < 2])
    assert (two.verdict, two.effect) == ("undecided", pytest.approx(2.0))
    assert "needs 3 complete seeds, has 2" in two.why
    nothing = part(MoreMovement("a", "b", "conv1"), rows)
    assert (nothing.verdict, nothing.effect) == ("undecided", None)
    assert "no results of conv1 in panel a" in nothing.why
    assert "conv9" in part(FirstAgainstOthers("b", "conv9"), rows).why
    assert part(Flattens("a", "0.5", 1), rows).why == "no results of 0.5 in panel a"
    alone = [r for r in rows if r.series == "conv1"]
    for comparison in (Hardly("b", "conv1"), FirstAgainstOthers("b", "conv1")):
        assert part(comparison, alone).why == "no layer but conv1 in panel b"


def test_a_diverged_seed_is_left_out_and_counted():
    rows = [r for seed in range(4) for r in layers("b", seed, (30, 4, 2))]
    rows = [replace(r, y=None, diverged=True) if r.seed == 1 and r.round > 3 else r for r in rows]
    found = part(Hardly("b", "conv1"), rows)
    assert (found.verdict, found.seeds, found.diverged) == ("holds", (0, 2, 3), 1)
    assert "left out: seed 1" in found.why
    gone = [replace(r, y=None, diverged=True) for r in rows]
    assert part(Hardly("b", "conv1"), gone).effect is None


def test_a_seed_that_lacks_an_epoch_or_a_layer_is_left_out():
    rows = [r for seed in range(4) for r in layers("b", seed, (30, 4, 2))]
    short = [r for r in rows if not (r.seed == 2 and r.round == 5)]
    assert part(Hardly("b", "conv1"), short).seeds == (0, 1, 3)
    thin = [r for r in rows if not (r.seed == 0 and r.series == LAYERS[2])]
    assert part(Hardly("b", "conv1"), thin).seeds == (1, 2, 3)


def test_another_series_that_diverged_does_no_harm():
    rows = [r for s in range(3) for r in line("0.05", s, (2, 1, 0)) + line("0.1", s, (4, 1, 0))]
    rows += [replace(r, y=None, diverged=True) for s in range(3) for r in line("0.5", s, (9, 1, 0))]
    assert part(SmallerStart("a", "0.05", "0.1"), rows).verdict == "holds"
    assert part(SmallerStart("a", "0.1", "0.5"), rows).why.startswith("no seed has all epochs")


def test_a_claim_of_several_kinds_is_told_by_its_weakest_part():
    rows = [r for seed in range(3) for r in layers("b", seed, (30, 4.5, 4.5)) + line("0.05", seed, (50.2,) * 3)]
    rows += [r for seed in range(3) for r in line("0.8", seed, (50,) * 3)]
    accurate = Accuracy("a", "not worse", "0.05", "0.8", rounds=(0, 2))
    found = judge(Claim("id", "text", (accurate, Hardly("b", "conv1"))), rows, chance=0.005, decisive=True)
    assert [p.effect for p in found.parts] == pytest.approx([0.2, 0.5])
    # 0.2 is 1.2 points from what would be worse, 0.5 half a point from what would not be hardly.
    assert (found.verdict, found.effect) == ("holds", pytest.approx(0.5))


def test_dead_layers_are_counted():
    rows = [r for seed in range(3) for r in layers("b", seed, (30, 4, 2))]
    rows = [replace(r, dead=1) if r.seed == 1 and r.round == 5 else r for r in rows]
    assert part(Hardly("b", "conv1"), rows).dead == 1


def test_two_results_at_one_place_are_no_results():
    rows = layers("b", 0, (30, 4, 2))
    with pytest.raises(ValueError, match="two results"):
        part(Hardly("b", "conv1"), [*rows, rows[0]])


def test_comparisons_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"'0[.]5' is compared with itself"):
        SmallerStart("a", "0.5", "0.5")
    with pytest.raises(ValueError, match="panel 'b' is compared with itself"):
        MoreMovement("b", "b", "conv1")


def test_parts_are_plain_json():
    rows = [r for seed in range(3) for r in layers("b", seed, (30, 4, 2))]
    told = json.loads(json.dumps(asdict(part(Hardly("b", "conv1"), rows))))
    assert (told["text"], told["unit"]) == ("b    others move < 5", "ratio points")
    expected = {"panel": "b", "first": "conv1", "bound": HARDLY_POINTS, "kind": "better", "unit": "ratio points"}
    assert told["comparison"] == expected


VALUES = st.floats(0, 100, allow_nan=False)
LINES = st.integers(3, 5).flatmap(
    lambda seeds: st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES, VALUES, VALUES), min_size=seeds, max_size=seeds)
)


@given(LINES)
def test_swapped_sides_give_the_opposite(values):
    rows = [r for s, v in enumerate(values) for r in line("0.05", s, v[:3]) + line("0.5", s, v[3:])]
    one, other = part(SmallerStart("a", "0.05", "0.5"), rows), part(SmallerStart("a", "0.5", "0.05"), rows)
    assert one.effect == pytest.approx(-other.effect, abs=1e-7)
    assert {one.verdict, other.verdict} in ({"holds", "fails"}, {"undecided"})


@given(LINES, LINES)
def test_swapped_panels_give_the_opposite(in_a, in_b):
    rows = [r for p, lines in (("a", in_a), ("b", in_b)) for s, v in enumerate(lines) for r in layers(p, s, v[:3])]
    one, other = part(MoreMovement("a", "b", "conv1"), rows), part(MoreMovement("b", "a", "conv1"), rows)
    assert one.effect == pytest.approx(-other.effect, abs=1e-7)
    assert one.seeds == other.seeds == tuple(range(min(len(in_a), len(in_b))))


@given(LINES, st.floats(0, 1))
def test_a_constant_means_nothing(values, constant):
    lines = [r for s, v in enumerate(values) for r in line("0.05", s, v[:3]) + line("0.5", s, v[3:])]
    ratios = [r for s, v in enumerate(values) for r in layers("a", s, v[:3]) + layers("b", s, v[3:])]
    for comparison, rows in (
        (SmallerStart("a", "0.05", "0.5"), lines),
        (Flattens("a", "0.5", 1), lines),
        (MoreMovement("a", "b", "conv1"), ratios),
        (Hardly("b", "conv1"), ratios),
        (FirstAgainstOthers("b", "conv1"), ratios),
    ):
        found, raised = part(comparison, rows), part(comparison, [replace(r, y=r.y + constant) for r in rows])
        assert (raised.effect, *raised.interval) == pytest.approx((found.effect, *found.interval), abs=1e-7)


@given(LINES, st.randoms(use_true_random=False))
def test_the_order_of_rows_means_nothing(values, random):
    rows = [r for s, v in enumerate(values) for r in line("0.05", s, v[:3]) + line("0.5", s, v[3:])]
    shuffled = list(rows)
    random.shuffle(shuffled)
    for comparison in (SmallerStart("a", "0.05", "0.5"), Flattens("a", "0.5", 1)):
        assert part(comparison, rows) == part(comparison, shuffled)
