"""The judge, on made-up results."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.figures.claims import Accuracy, Claim, judge, t_interval
from fastprune.figures.results import Row

CHANCE = 0.005
PRUNED = (0.3, 0.9)  # rounds 1 to 5
BETTER = Accuracy("a", "better", "0.05", "0.8", densities=PRUNED)
SIMILAR = Accuracy("a", "similar", "0.05", "0.8", densities=PRUNED)
NOT_WORSE = Accuracy("a", "not worse", "0.05", "0.8", densities=PRUNED)


def claim(*comparisons):
    return Claim("id", "text", comparisons)


def row(series, seed, number, y, panel="a"):
    return Row("A2", panel, series, seed, number, 0.8**number, y, 0.1, 0.5, y is None, 0, "node")


def gap(points, *, rounds=5, base=0.4, panel="a", left="0.05", right="0.8"):
    """Rows in which, for seed i, `left` is points[i] accuracy points above `right` in every pruned round."""
    rows = []
    for seed, difference in enumerate(points):
        for number in range(rounds + 1):
            y = base - 0.01 * number + 0.002 * seed
            above = difference / 100 if number else 0.0
            rows += [row(left, seed, number, y + above, panel), row(right, seed, number, y, panel)]
    return rows


def verdict(comparison, rows, *, decisive=True, chance=CHANCE):
    return judge(claim(comparison), rows, chance=chance, decisive=decisive)


def test_t_interval_by_hand():
    # Mean 2, standard deviation 1; the tables give t = 4.302653 for 2 degrees of freedom: 4.302653 / sqrt(3).
    assert t_interval([1.0, 2.0, 3.0]) == (pytest.approx(2 - 2.484138, abs=1e-6), pytest.approx(2 + 2.484138, abs=1e-6))
    # t = 2.776445 for 4; standard deviation sqrt(2.5).
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0])[1] == pytest.approx(3 + half, abs=1e-6)


@pytest.mark.parametrize(
    ("comparison", "points", "expected"),
    [
        (BETTER, [3.0, 4.0, 5.0], "holds"),
        (BETTER, [-3.0, -4.0, -5.0], "fails"),
        (BETTER, [1.0, 2.0, 3.0], "undecided"),
        (BETTER, [2.0, 2.0, 2.0], "holds"),
        (BETTER, [-2.0, -2.0, -2.0], "fails"),
        (BETTER, [0.0, 0.0, 0.0], "undecided"),
        (SIMILAR, [0.1, -0.1, 0.0], "holds"),
        (SIMILAR, [0.0, 0.0, 0.0], "holds"),
        (SIMILAR, [1.0, 1.0, 1.0], "holds"),
        (SIMILAR, [-1.0, -1.0, -1.0], "holds"),
        (SIMILAR, [1.0, 1.0, 0.9], "undecided"),
        (SIMILAR, [3.0, 3.1, 2.9], "fails"),
        (SIMILAR, [-3.0, -3.1, -2.9], "fails"),
        (SIMILAR, [-9.0, 0.0, 9.0], "undecided"),
        (NOT_WORSE, [1.0, 2.0, 3.0], "holds"),  # from -0.48 up
        (NOT_WORSE, [-1.0, -1.0, -1.0], "holds"),
        (NOT_WORSE, [0.0, 1.0, 2.0], "undecided"),  # from -1.48
        (NOT_WORSE, [-1.1, -1.0, -1.1], "undecided"),  # -1.21 to -0.92
        (NOT_WORSE, [-3.0, -3.1, -2.9], "fails"),
    ],
)
def test_verdicts(comparison, points, expected):
    found = verdict(comparison, gap(points))
    assert found.verdict == expected
    assert found.effect == pytest.approx(sum(points) / len(points), abs=1e-8)
    (part,) = found.parts
    assert part.seeds == (0, 1, 2)
    assert part.rounds == (1, 2, 3, 4, 5)
    assert part.interval is not None
    low, high = part.interval
    assert low <= part.effect <= high


def test_the_interval_is_that_of_the_paired_differences():
    found = verdict(BETTER, gap([1.0, 2.0, 3.0]))
    assert found.interval == (pytest.approx(2 - 2.484138, abs=1e-5), pytest.approx(2 + 2.484138, abs=1e-5))
    assert verdict(BETTER, gap([2.0, 2.0, 2.0])).interval == (2.0, 2.0)


def test_texts():
    assert [c.text for c in (BETTER, SIMILAR, NOT_WORSE)] == ["a    0.05 > 0.8", "a    0.05 ~ 0.8", "a    0.05 >= 0.8"]


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=6), st.floats(0, 0.3), st.randoms(use_true_random=False))
def test_neither_a_constant_nor_the_order_of_rows_means_anything(points, constant, random):
    rows = gap(points)
    (part,), (raised,) = (verdict(BETTER, r).parts for r in (rows, [replace(r, y=r.y + constant) for r in rows]))
    assert (raised.effect, *raised.interval) == pytest.approx((part.effect, *part.interval), abs=1e-8)
    random.shuffle(rows)
    assert verdict(BETTER, rows).parts == (part,)


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=6))
def test_turning_the_sides_turns_the_verdict(points):
    turned = Accuracy("a", "better", "0.8", "0.05", densities=PRUNED)
    forth, back = (verdict(c, gap(points)) for c in (BETTER, turned))
    assert {"holds": "fails", "fails": "holds", "undecided": "undecided"}[forth.verdict] == back.verdict
    assert forth.effect == pytest.approx(-back.effect, abs=1e-8)
    assert verdict(SIMILAR, gap(points)).verdict == verdict(replace(turned, kind="similar"), gap(points)).verdict


@pytest.mark.parametrize(("seeds", "interval"), [(1, False), (2, True)])
def test_fewer_than_three_seeds_never_decide_but_show_the_effect(seeds, interval):
    found = verdict(BETTER, gap([5.0] * seeds))
    assert (found.verdict, found.effect) == ("undecided", pytest.approx(5.0))
    assert (found.interval is not None) == interval
    assert f"needs 3 complete seeds, has {seeds}" in found.why


def test_a_preset_of_machinery_never_decides():
    found = verdict(BETTER, gap([5.0, 5.1, 5.2]), decisive=False)
    assert found.verdict == "undecided"
    assert found.interval[0] > 0
    assert "machinery" in found.why


def test_only_the_stated_range_counts():
    rows = gap([5.0, 5.0, 5.0], rounds=3) + [
        row(series, seed, number, 0.9 if series == "0.8" else 0.1)
        for series in ("0.05", "0.8")
        for seed in range(3)
        for number in range(4, 8)
    ]
    found = verdict(replace(BETTER, densities=(0.512, 0.8)), rows)
    assert (found.verdict, found.parts[0].rounds, found.effect) == ("holds", (1, 2, 3), pytest.approx(5.0))


def test_a_range_of_rounds_takes_the_dense_networks():
    rows = [
        row(series, seed, 0, y + 0.001 * seed, "find")
        for series, y in (("0.8", 0.5), ("0.05", 0.4))
        for seed in range(3)
    ]
    found = verdict(Accuracy("find", "better", "0.8", "0.05", rounds=(0, 0)), rows)
    assert (found.verdict, found.effect, found.parts[0].rounds) == ("holds", pytest.approx(10.0), (0,))


def test_rounds_at_chance_are_dropped_where_both_are():
    rows = gap([5.0, 5.1, 5.2], rounds=3)
    # Round 4: both at most one point above chance. Round 5: one of them is clearly above.
    rows += [row("0.05", seed, 4, 0.015) for seed in range(3)] + [row("0.8", seed, 4, 0.004) for seed in range(3)]
    rows += [row("0.05", seed, 5, 0.016) for seed in range(3)] + [row("0.8", seed, 5, 0.004) for seed in range(3)]
    (part,) = verdict(BETTER, rows).parts
    assert (part.rounds, part.dropped) == ((1, 2, 3, 5), (4,))
    assert part.effect == pytest.approx((3 * 5.1 + 1.2) / 4)


def test_chance_is_judged_by_the_mean_over_seeds():
    rows = gap([0.0, 0.0, 0.0], rounds=5, base=0.4)
    rows = [row(r.series, r.seed, r.round, (0.031, 0.005, 0.005)[r.seed] if r.round == 5 else r.y) for r in rows]
    assert verdict(SIMILAR, rows).parts[0].dropped == (5,)


def test_everything_at_chance_is_undecided():
    found = verdict(SIMILAR, gap([0.0, 0.0, 0.0], base=0.01))
    assert (found.verdict, found.effect) == ("undecided", None)
    assert "chance" in found.why
    assert found.parts[0].dropped == (1, 2, 3, 4, 5)


def test_a_diverged_run_counts_as_chance_and_is_told():
    rows = [r if (r.series, r.seed) != ("0.8", 1) else row("0.8", 1, r.round, None) for r in gap([10.0, 10.0, 10.0])]
    (part,) = verdict(BETTER, rows).parts
    assert part.diverged == 5
    left = [r.y for r in rows if r.series == "0.05" and r.seed == 1 and r.round]
    assert part.effect == pytest.approx((20 + 100 * (sum(left) / 5 - CHANCE)) / 3)


def test_runs_with_a_dead_layer_are_counted_in_the_range():
    rows = [replace(r, dead=2 * (r.seed == 1 and r.round in (0, 4, 5))) for r in gap([5.0] * 3)]
    assert verdict(BETTER, rows).parts[0].dead == 4


def test_everything_diverged_is_undecided_not_nan():
    rows = [row(series, seed, number, None) for series in ("0.05", "0.8") for seed in range(3) for number in range(6)]
    found = verdict(BETTER, rows)
    assert (found.verdict, found.effect, found.interval) == ("undecided", None, None)
    assert found.parts[0].diverged == 30


def test_an_incomplete_seed_is_left_out_and_told():
    rows = [r for r in gap([5.0, 5.1, 5.2, 99.0]) if (r.seed, r.round, r.series) != (3, 4, "0.8")]
    found = verdict(BETTER, rows)
    assert (found.verdict, found.parts[0].seeds) == ("holds", (0, 1, 2))
    assert "left out: seed 3" in found.why
    fewer = verdict(BETTER, [r for r in rows if r.seed])
    assert (fewer.verdict, fewer.parts[0].seeds) == ("undecided", (1, 2))


def test_rounds_of_one_series_alone_do_not_count():
    rows = [r for r in gap([5.0, 5.1, 5.2], rounds=6) if (r.round, r.series) != (3, "0.8")]
    (part,) = verdict(BETTER, rows).parts
    assert part.rounds == (1, 2, 4, 5)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "no results of 0.05 in panel a"),
        ([row("0.05", 0, 1, 0.5)], "no results of 0.8 in panel a"),
        (gap([1.0], rounds=0), "no round in the stated range"),
        ([row("0.05", 0, 1, 0.5), row("0.8", 1, 1, 0.5)], "no seed has all rounds"),
    ],
)
def test_missing_results_are_undecided(rows, why):
    found = verdict(BETTER, rows)
    assert (found.verdict, found.effect) == ("undecided", None)
    assert why in found.why


def test_a_run_that_stops_early_is_undecided():
    found = verdict(BETTER, gap([5.0, 5.1, 5.2], rounds=3))
    assert (found.verdict, found.effect) == ("undecided", pytest.approx(5.1))
    assert "stops before" in found.why
    # One step of 20 % from the end of the range is as far as rounds can come.
    near = Accuracy("a", "better", "0.05", "0.8", densities=(0.42, 0.9))
    open_ended = Accuracy("a", "better", "0.05", "0.8", densities=(0.0, 0.9))
    by_round = Accuracy("a", "better", "0.05", "0.8", rounds=(1, 4))
    for comparison, expected in ((near, "holds"), (open_ended, "holds"), (by_round, "undecided")):
        assert verdict(comparison, gap([5.0, 5.1, 5.2], rounds=3)).verdict == expected


def test_counts_rounded_to_whole_weights_stay_in_range():
    rows = [replace(r, x=round(r.x * 1000) / 1000) for r in gap([5.0] * 3)]
    assert verdict(replace(BETTER, densities=(0.8**5, 0.8)), rows).parts[0].rounds == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("in_a", "in_b", "expected"),
    [
        ([5.0, 5.1, 5.2], [2.0, 2.1, 2.2], "holds"),
        ([5.0, 5.1, 5.2], [-5.0, 0.0, 5.0], "undecided"),
        ([5.0, 5.1, 5.2], [-5.0, -5.1, -5.2], "fails"),
        ([-5.0, 0.0, 5.0], [-5.0, -5.1, -5.2], "fails"),
    ],
)
def test_conjunctions(in_a, in_b, expected):
    rows, in_both = gap(in_a) + gap(in_b, panel="b"), claim(BETTER, replace(BETTER, panel="b"))
    found = judge(in_both, rows, chance=CHANCE, decisive=True)
    assert found.verdict == expected
    # What is told of the whole is the part that decided: here the weaker one, in b.
    assert found.effect == pytest.approx(sum(in_b) / 3, abs=1e-8)
    assert [part.comparison.panel for part in found.parts] == ["a", "b"]


def test_a_missing_part_decides_a_conjunction_against_holding():
    found = judge(claim(BETTER, replace(BETTER, panel="b")), gap([5.0, 5.1, 5.2]), chance=CHANCE, decisive=True)
    assert (found.verdict, found.effect) == ("undecided", None)
    assert "panel b" in found.why


def test_repeated_and_unlike_points_are_refused():
    rows = gap([5.0, 5.1, 5.2])
    with pytest.raises(ValueError, match="two results"):
        verdict(BETTER, [*rows, rows[0]])
    with pytest.raises(ValueError, match="round 1 has densities"):
        verdict(BETTER, [*rows, replace(rows[0], seed=3, round=1, x=0.7)])


@pytest.mark.parametrize("chance", [0.0, 1.0, float("nan"), 10.0])
def test_chance_is_a_fraction(chance):
    with pytest.raises(ValueError, match="chance"):
        verdict(BETTER, gap([1.0]), chance=chance)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "worse", "densities": PRUNED}, "kind"),
        ({"kind": "better"}, "exactly one of"),
        ({"kind": "better", "densities": PRUNED, "rounds": (0, 0)}, "exactly one of"),
        ({"kind": "better", "densities": (0.9, 0.3)}, "densities"),
        ({"kind": "better", "densities": (0.1, 30.0)}, "densities"),
        ({"kind": "better", "rounds": (3, 1)}, "rounds"),
        ({"kind": "better", "rounds": (0, 0), "right": "0.05"}, "itself"),
    ],
    ids=str,
)
def test_comparisons_that_make_no_sense_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Accuracy(**{"panel": "a", "left": "0.05", "right": "0.8"} | arguments)


def test_a_claim_compares_something():
    with pytest.raises(ValueError, match="has no comparisons"):
        Claim("id", "text", ())
