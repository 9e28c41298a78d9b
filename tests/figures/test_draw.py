"""The pictures: what they show, and that the same rows give the same bytes."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.figures import drawing as draw
from fastprune.figures.axes import Drawing, DrawnPanel
from fastprune.figures.results import Row
from fastprune.figures.style import style_of

DRAWING = Drawing(
    title="A small network on made-up data",
    panels={"a": DrawnPanel("LR_eval = 0.5"), "b": DrawnPanel("LR_eval = 0.8")},
    series={"0.05": "0.05", "0.2": "0.2", "0.8": "0.8", "random": "random masks"},
    legend_title="LR_find",
    chance=0.1,
    note="Made up.",
)


def rows_of(seeds=2, rounds=3, step=0.8, panels="ab", series=("0.05", "0.2", "0.8", "random"), diverged=()):
    noise = random.Random(0)
    return [
        Row("A2", panel, name, seed, number, step**number, y, 0.1, 0.5, y is None, 0, "")
        for panel in panels
        for name in series
        for seed in range(seeds)
        for number in range(rounds + 1)
        for y in [None if (name, number) in diverged else 0.6 - 0.02 * number + 0.01 * noise.random()]
    ]


@pytest.fixture
def seen(monkeypatch):
    """The figure as matplotlib holds it, of the last drawing; nothing is rendered."""
    figures = []
    build = draw._figure
    monkeypatch.setattr(draw, "_render", lambda figure, kind, **options: b"")
    monkeypatch.setattr(draw, "_figure", lambda *arguments: figures.append(build(*arguments)) or figures[-1])
    return figures


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(3, 30),
        rows_of(1, 3),
        rows_of(1, 0),
        rows_of(2, 3, diverged={("0.8", n) for n in range(4)}),
        rows_of(2, 3, series=("0.05",)),
        rows_of(2, 3, panels="a"),
        [],
    ],
    ids=["paper", "one-seed", "dense-only", "diverged", "one-series", "one-panel-empty", "nothing"],
)
def test_both_pictures_are_there_and_come_out_the_same_twice(tmp_path, rows):
    contents = []
    for _ in range(2):
        png, pdf = draw.draw(rows, DRAWING, tmp_path)
        contents.append((png.read_bytes(), pdf.read_bytes()))
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")
    assert contents[0][1].startswith(b"%PDF")
    assert b"CreationDate" not in contents[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.pdf", "figure.png"]


def test_the_picture_does_not_depend_on_the_order_of_rows_or_on_settings(tmp_path):
    import matplotlib

    rows = rows_of()
    first = [path.read_bytes() for path in draw.draw(rows, DRAWING, tmp_path)]
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        again = [path.read_bytes() for path in draw.draw(rows[::-1], DRAWING, tmp_path)]
        assert dict(matplotlib.rcParams) == before
    assert first == again


def test_axes_and_words(tmp_path, seen):
    draw.draw(rows_of(2, 30), DRAWING, tmp_path)
    left, right = seen[-1].axes
    assert left.get_xscale() == "log"
    high, low = left.get_xlim()
    assert high > 1 > low > 0
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "0.3", "0.1", "0.03", "0.01", "0.003", "0.001"]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylabel() == "Top-1 accuracy (%)"
    assert [ax.get_title(loc="left") for ax in (left, right)] == ["a", "b"]
    assert left.get_title() == r"$\mathrm{LR}_{\mathrm{eval}}$ = 0.5"
    (legend,) = seen[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["0.05", "0.2", "0.8", "random masks"]
    assert any(
        "Mean of 2 seeds; shaded: one standard deviation to either side. Made" in t.get_text() for t in seen[-1].texts
    )
    assert [[text.get_text() for text in ax.texts] for ax in (left, right)] == [[], ["chance"]]


def test_chance_is_named_where_no_curve_can_be(tmp_path, seen):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    panels = {letter: DrawnPanel("") for letter in "abcde"}
    draw.draw(rows_of(2, 3, panels="abcde"), replace(DRAWING, panels=panels), tmp_path)
    renderer = FigureCanvasAgg(seen[-1]).get_renderer()
    named = {ax.get_title(loc="left"): text for ax in seen[-1].axes for text in ax.texts}
    assert sorted(named) == ["c", "e"]
    for ax in seen[-1].axes:
        for text in named.values():
            box = text.get_window_extent(renderer)
            assert not box.overlaps(ax.get_window_extent(renderer))
            assert box.x1 <= seen[-1].bbox.x1


def test_a_deviation_is_named_as_shading_where_it_is_wider_than_a_line(tmp_path, seen):
    for spread, said in (
        (0.002, "is less than the width of a line"),
        (0.02, "shaded: one standard deviation to either"),
    ):
        rows = [replace(row, y=0.5 + spread * row.seed) for row in rows_of(2, 3)]
        draw.draw(rows, DRAWING, tmp_path)
        assert said in seen[-1].texts[-1].get_text()


def test_few_rounds_are_the_ticks(tmp_path, seen):
    draw.draw(rows_of(2, 3), DRAWING, tmp_path)
    assert [text.get_text() for text in seen[-1].axes[0].get_xticklabels()] == ["1", "0.8", "0.64", "0.51"]


def test_mean_and_deviation_by_hand(tmp_path, seen):
    rows = [
        Row("A2", "a", "0.05", seed, number, 0.8**number, y, 0.1, 0.5, False, 0, "")
        for number, values in enumerate([(0.5, 0.7), (0.4, 0.4)])
        for seed, y in enumerate(values)
    ]
    draw.draw(rows, DRAWING, tmp_path)
    ax = seen[-1].axes[0]
    line = next(line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-")
    assert list(line.get_xdata()) == [1.0, 0.8]
    assert list(line.get_ydata()) == [pytest.approx(60.0), pytest.approx(40.0)]
    corners = {round(float(y), 4) for _, y in ax.collections[0].get_paths()[0].vertices}
    deviation = 100 * 0.02**0.5
    assert corners == {round(60 - deviation, 4), round(60 + deviation, 4), 40.0}


def test_one_seed_has_no_band(tmp_path, seen):
    draw.draw(rows_of(1, 3), DRAWING, tmp_path)
    assert all(len(band.get_paths()) == 0 for band in seen[-1].axes[0].collections)


def _one_strip_below(ax, marks):
    """No mark has a place on the y axis: all stand on one strip, between the axis and its numbers."""
    (strip,) = (patch for patch in ax.patches if patch.get_width() == 1)
    low, high = strip.get_y(), strip.get_y() + strip.get_height()
    assert high < 0
    for mark in marks:
        assert mark.get_transform() != ax.transData
        assert low < mark.get_ydata()[0] < high
    numbers = [label.get_window_extent().y1 for label in ax.get_xticklabels() if label.get_text()]
    assert max(numbers) <= ax.transAxes.transform((0, low))[1] + 1
    assert ax.get_ylim()[0] == pytest.approx(-0.03 * ax.get_ylim()[1] / 1.05)


def test_without_such_runs_there_is_no_strip(tmp_path, seen):
    draw.draw(rows_of(2, 3), DRAWING, tmp_path)
    assert all(not ax.patches for ax in seen[-1].axes)


def test_diverged_runs_show_below_the_axis(tmp_path, seen):
    draw.draw(rows_of(2, 3, diverged={("0.8", 2), ("0.2", 2)}), DRAWING, tmp_path)
    ax = seen[-1].axes[0]
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[pytest.approx(0.64)], [pytest.approx(0.64)]]
    levels = [line.get_ydata()[0] for line in crosses]
    assert len(set(levels)) == 2
    _one_strip_below(ax, crosses)
    assert seen[-1].legends[0].get_texts()[-1].get_text() == "diverged"
    assert any("counts as chance" in text.get_text() for text in seen[-1].texts)


def test_random_is_red_and_series_keep_their_looks():
    names = ["0.05", "0.2", "0.8", "random", "1", "2", "3"]
    styles = [style_of(name, names) for name in names]
    red = style_of("random", names)["color"]
    assert int(red[1:3], 16) > 2 * max(int(red[3:5], 16), int(red[5:7], 16))
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == len(names)
    assert style_of("0.8", names) == style_of("0.8", [name for name in names if name != "random"])


def test_a_missing_series_leaves_the_others_as_they_were(tmp_path, seen):
    draw.draw(rows_of(2, 3, series=("0.05", "0.8")), DRAWING, tmp_path)
    expected = [style_of(name, list(DRAWING.series))["color"] for name in ("0.05", "0.8")]
    colors = [line.get_color() for line in seen[-1].axes[0].lines if len(line.get_xdata()) == 4]
    assert colors == expected


LABELS = {
    "short": {},
    "equations": {"0.05": "LR_find = 0.05", "0.2": "LR_find = 0.2", "0.8": "LR_find = 0.8", "random": "random pruning"},
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("legend_title", ["", "LR_find (in d: LR_eval)"], ids=["bare", "titled"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_nothing_is_clipped_or_overlaps(tmp_path, seen, count, labels, legend_title):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    panels = {letter: DrawnPanel(f"LR_eval = {letter}") for letter in "abcde"[:count]}
    title = "A title that is long enough to need two lines in a narrow figure with one panel"
    note = "And a note that says so much that it needs more than one line in a figure that has only one panel."
    drawing = Drawing(title, panels, LABELS[labels], legend_title, chance=0.1, note=note)
    draw.draw(rows_of(2, 30, panels="abcde", diverged={("0.2", 3)}), drawing, tmp_path)
    figure = seen[-1]
    assert len(figure.axes) == count
    renderer = FigureCanvasAgg(figure).get_renderer()
    whole = figure.bbox
    axes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    legend = figure.legends[0].get_window_extent(renderer)
    # The title, then the legend, then the panels, then the note: none reaches into the next.
    heading, footer = (text.get_window_extent(renderer) for text in (figure._suptitle, figure.texts[-1]))
    for box in (*axes, legend, heading, footer):
        assert box.x0 >= whole.x0
        assert box.x1 <= whole.x1
    assert whole.y1 >= heading.y1
    assert heading.y0 >= legend.get_points()[1, 1] - 0.06 * figure.dpi  # the padding of a legend without frame
    assert legend.y0 >= max(box.y1 for box in axes) - 0.06 * figure.dpi
    assert min(box.y0 for box in axes) >= footer.y1
    assert footer.y0 >= whole.y0
    for one, other in itertools.combinations(axes, 2):
        assert not one.overlaps(other)


def test_a_dollar_sign_is_a_dollar_sign(tmp_path):
    drawing = Drawing("costs $5 or $x_{", {"a": DrawnPanel("100 % of $")}, legend_title="$", note="$HOME/_x {$")
    draw.draw(rows_of(panels="a"), drawing, tmp_path)


def test_percent_in_the_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="out of bounds for density and accuracy"):
        draw.draw([Row("A2", "a", "0.05", 0, 0, 1.0, 57.0, 0.1, 0.5, False, 0, "")], DRAWING, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "out" / "figure.png"))) as caught:
        draw.draw(rows_of(), DRAWING, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "says"), [({"panels": {}}, "panels"), ({"chance": 10.0}, "chance")])
def test_a_drawing_that_makes_no_sense_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Drawing(**{"title": "t", "panels": {"a": DrawnPanel("a")}} | change)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_marks_of_different_series_do_not_touch(tmp_path, seen, count):
    rows = rows_of(2, 30, series=[str(n) for n in range(count)])
    rows = [replace(row, dead=1) if row.round > 20 else row for row in rows]
    draw.draw(rows, DRAWING, tmp_path)
    ax = seen[-1].axes[0]
    rings = [line for line in ax.lines if line.get_fillstyle() == "none" and len(line.get_xdata())]
    heights = sorted(72 * ax.transAxes.transform((0, ring.get_ydata()[0]))[1] / seen[-1].dpi for ring in rings)
    assert len(heights) == count
    for below, above in itertools.pairwise(heights):
        assert above - below > rings[0].get_markersize()
    _one_strip_below(ax, rings)


def test_bands_end_where_no_value_can_be(tmp_path, seen):
    values = ((0, 0, 0.01), (0, 1, 0.02), (1, 0, 0.3), (1, 1, 0.0), (2, 0, 1.0), (2, 1, 0.6))
    rows = [Row("A2", "a", "0.05", s, n, 0.8**n, y, 0.1, 0.5, False, 0, "") for n, s, y in values]
    draw.draw(rows, DRAWING, tmp_path)
    heights = [y for _, y in seen[-1].axes[0].collections[0].get_paths()[0].vertices]
    assert min(heights) == 0.0
    assert max(heights) == 100.0
    assert seen[-1].axes[0].get_ylim()[1] == pytest.approx(105.0)


def test_panels_over_different_things_have_axes_of_their_own(tmp_path, seen):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    panels = {"a": DrawnPanel("A"), "b": DrawnPanel("B"), "c": DrawnPanel("C", "epoch", "ratio")}
    rows = rows_of(2, 3, panels="ab")
    rows += [replace(row, panel="c", x=float(row.round), y=0.1) for row in rows if row.panel == "a"]
    draw.draw(rows, replace(DRAWING, panels=panels), tmp_path)
    first, second, third = seen[-1].axes
    assert first.get_ylim() == second.get_ylim() != third.get_ylim()
    assert [ax.get_ylabel() for ax in (first, second, third)] == [
        "Top-1 accuracy (%)",
        "",
        "Layerwise pruning ratio (%)",
    ]
    renderer = FigureCanvasAgg(seen[-1]).get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in (first, second, third)]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_title_of_the_legend_stands_above_its_entries(tmp_path, seen):
    draw.draw(rows_of(), DRAWING, tmp_path)
    (legend,) = seen[-1].legends
    assert legend.get_title().get_text() == r"$\mathrm{LR}_{\mathrm{find}}$"
