"""Every kind of picture, from made-up rows: layers, epochs, filters, sizes; and what may stand on an axis."""

import json
import random
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from fastprune.errors import InputError
from fastprune.figures import FIGURES, load
from fastprune.figures import drawing as draw
from fastprune.figures.axes import Drawing, DrawnPanel, check_rows, shown_x
from fastprune.figures.report import draw_again, panel_table, summarize, terminal_summary, write_all
from fastprune.figures.results import Row
from fastprune.figures.style import GREY

ROW = Row("A2", "a", "0.05", 0, 1, 0.8, 0.47, 0.05, 0.5, False, 0, "abc")
STAGES = ((1, 3), (2, 4), (3, 6), (4, 3))
LAYERS = ["conv1"] + [
    f"layer{stage}.{block}.{name}"
    for stage, blocks in STAGES
    for block in range(blocks)
    for name in ("conv1", "conv2", "conv3", *(["downsample.0"] if block == 0 else []))
]
SPANS = {"filters": (0.0, 0.9), "parameters": (25.5e6, 0.4e6), "flops": (0.66e9, 0.02e9), "latency": (1.0, 0.2)}


def drawing_of(name: str) -> Drawing:
    figure = load(name)
    panels = {panel.id: DrawnPanel.of(panel) for panel in figure.panels_of(figure.protocol)}
    accuracy = any(panel.y == "accuracy" for panel in panels.values())
    return Drawing(
        "ResNet-50 on made-up data",
        panels,
        figure.labels(figure.protocol),
        chance=0.005 if accuracy else None,
        layers=figure.layers,
    )


def fake_rows(name: str, seeds: int = 3, rounds: int = 30) -> list[Row]:
    """Rows for each panel of a figure, as a run would leave them."""
    drawing, noise, rows = drawing_of(name), random.Random(name), []
    for letter, panel in drawing.panels.items():
        for order, series in enumerate(LAYERS if drawing.layers else drawing.series):
            if letter != "d" and series.startswith("LR_eval"):
                continue
            for seed in range(seeds):
                for number in range((110 if panel.x == "epoch" else rounds) + 1):
                    x, y = float(number), 0.5 - 0.01 * number - 0.01 * order + 0.01 * noise.random()
                    if panel.x == "density":
                        x = 0.8**number
                    elif panel.x != "epoch":
                        first, last = SPANS[panel.x]
                        x = first + (last - first) * number / rounds
                    if panel.y == "ratio":
                        y = min(1.0, order / 60 + 0.001 * number)
                    elif panel.y == "distance":
                        y = 0.05 * (order + 1) * (1 - number / 110)
                    y = max(0.0, y)
                    rows.append(Row(name, letter, series, seed, number, x, y, 0.1, None, False, 0, f"{seed}{number}"))
    return rows


@pytest.fixture
def seen(monkeypatch):
    """The figure as matplotlib holds it, of the last drawing; nothing is rendered."""
    figures = []
    build = draw._figure
    monkeypatch.setattr(draw, "_render", lambda figure, kind, **options: b"")
    monkeypatch.setattr(draw, "_figure", lambda *arguments: figures.append(build(*arguments)) or figures[-1])
    return figures


@pytest.mark.parametrize("rounds", [2, 30])
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_clipped_or_overlaps_in_any_figure(name, rounds, tmp_path, seen):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = fake_rows(name, 2, rounds)
    rows = [replace(r, dead=1) if r.round == rounds else r for r in rows]
    rows = [replace(r, y=None, diverged=True) if r.round == 1 and r.seed == 0 else r for r in rows]
    drawing = drawing_of(name)
    draw.draw(rows, drawing, tmp_path)
    figure = seen[-1]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    for box in (*boxes, figure.legends[0].get_window_extent(renderer)):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])
    if drawing.layers:
        *_, bar = figure.axes
        assert not figure.legends[0].get_window_extent(renderer).overlaps(bar.get_tightbbox(renderer))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "diverged" in labels
    assert "a layer is pruned whole" in labels


@pytest.mark.parametrize(
    "name", [name if name == "A1" else pytest.param(name, marks=pytest.mark.slow) for name in FIGURES]
)
def test_a_figure_is_drawn_again_from_its_files(name, tmp_path):
    rows, drawing = fake_rows(name, 2, 3), drawing_of(name)
    summary = summarize(rows, drawing, [], figure=name, preset="p", settings={}, data={}, cost={}, environment={})
    write_all(tmp_path, rows, drawing, summary)
    before = [(tmp_path / f"figure.{kind}").read_bytes() for kind in ("png", "pdf")]
    draw_again(tmp_path)
    assert [(tmp_path / f"figure.{kind}").read_bytes() for kind in ("png", "pdf")] == before
    assert DrawnPanel(**json.loads(json.dumps(asdict(next(iter(drawing.panels.values())))))) in drawing.panels.values()
    text = terminal_summary(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    (tmp_path / "summary.json").unlink()
    draw_again(tmp_path)  # with the axes of its figure, without its words
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_layers_are_coloured_from_dark_to_light_and_the_first_stands_out(tmp_path, seen):
    draw.draw(fake_rows("A4", 2), drawing_of("A4"), tmp_path)
    panel = seen[-1].axes[0]
    lines = [line for line in panel.lines if len(line.get_xdata()) == 111]
    assert len(lines) == len(LAYERS) == 53
    assert lines[0].get_linewidth() > 2 * lines[1].get_linewidth()
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in (line.get_color() for line in lines[1:])]
    assert grey == sorted(grey)
    assert [t.get_text() for t in seen[-1].legends[0].get_texts()] == ["first layer (conv1)"]
    assert any("than the width of a line" in text.get_text() for text in seen[-1].texts)
    rows = [replace(r, y=min(1.0, r.y + 0.1 * r.seed)) for r in fake_rows("A4", 2)]
    draw.draw(rows, drawing_of("A4"), tmp_path)
    assert any("shaded: one standard deviation of the first layer" in text.get_text() for text in seen[-1].texts)


def test_a_ratio_of_one_is_within_the_axis(tmp_path, seen):
    rows = [replace(r, y=1.0, dead=1) if r.series == "conv1" and r.round == 110 else r for r in fake_rows("A4", 1)]
    draw.draw(rows, drawing_of("A4"), tmp_path)
    panel = seen[-1].axes[0]
    assert panel.get_ylim()[1] > 100
    rings = [line for line in panel.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in rings] == [[110.0]]


def test_marks_of_layers_and_over_epochs_stand_apart(tmp_path, seen):
    rows = fake_rows("A4", 2)
    rows = [replace(r, y=1.0, dead=1) if r.series == "layer4.0.conv2" and r.round > 80 else r for r in rows]
    rows = [replace(r, y=None, diverged=True, dead=0) if r.seed == 0 and r.round > 50 else r for r in rows]
    draw.draw(rows, drawing_of("A4"), tmp_path)
    lines = seen[-1].axes[0].lines
    crosses, rings = ([n for n in lines if n.get_marker() == m and len(n.get_xdata())] for m in "xo")
    assert len(rings) == 1
    assert {cross.get_color() for cross in crosses} == {GREY}
    assert rings[0].get_ydata()[0] < crosses[0].get_ydata()[0] < 0
    # A 40th of the axis of 1 + log10(110) apart.
    for line, places in ((crosses[0], [51, 61, 73, 87, 104]), (rings[0], [81, 97])):
        assert list(line.get_xdata()) == places


def test_the_first_epochs_of_ratios_get_most_of_the_axis(tmp_path, seen):
    draw.draw(fake_rows("A4", 2), drawing_of("A4"), tmp_path)
    for panel in seen[-1].axes[:2]:
        assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "1", "2", "5", "10", "20", "50", "100"]
        left, right = panel.transAxes.transform([(0, 0), (1, 0)])[:, 0]
        tenth = panel.transData.transform((10, 50))[0]
        assert tenth - left > 0.6 * (right - left)
    draw.draw(fake_rows("A5", 2), drawing_of("A5"), tmp_path)
    assert seen[-1].axes[0].get_xscale() == "linear"


def test_latency_has_bars_to_all_four_sides(tmp_path, seen):
    rows = [
        Row("structured", panel, "0.1", seed, n, x + shift, 0.5 - 0.1 * n + shift, 0.1, 0.1, False, 0, "")
        for panel, places in (("a", (0.0, 0.5)), ("d", (1.0, 0.5)))
        for n, x in enumerate(places)
        for seed, shift in enumerate((0.0, 0.02))
    ]
    draw.draw(rows, drawing_of("structured"), tmp_path)
    up, across = (bars.get_segments() for bars in seen[-1].axes[3].collections)
    half = 100 * 0.02 / 2**0.5
    assert up[1].tolist() == pytest.approx(np.array([[51, 41 - half], [51, 41 + half]]))
    assert across[1].tolist() == pytest.approx(np.array([[51 - half, 41], [51 + half, 41]]))
    assert any("over latency, bars show those of accuracy and of latency" in t.get_text() for t in seen[-1].texts)


def test_decays_are_marked(tmp_path, seen):
    draw.draw(fake_rows("A5", 2), drawing_of("A5"), tmp_path)
    panel = seen[-1].axes[0]
    vertical = [line.get_xdata()[0] for line in panel.lines if len(set(line.get_xdata())) == 1]
    assert sorted(v for v in vertical if v > 0) == [70.0, 85.0, 100.0]
    assert [text.get_text() for text in panel.texts] == ["LR decays"]
    assert "points" in panel.get_ylabel()


def test_each_panel_of_structured_names_its_axis(tmp_path, seen):
    draw.draw(fake_rows("structured", 2, 9), drawing_of("structured"), tmp_path)
    assert [ax.get_xlabel() for ax in seen[-1].axes] == [
        "Filters removed (%)",
        "Parameters (millions)",
        "MFLOPs an image",
        "Latency (% of the dense network's)",
    ]


@pytest.mark.parametrize(
    ("axis", "values", "label"),
    [
        ("parameters", [3e9], "Parameters (billions)"),
        ("parameters", [900.0], "Parameters"),
        ("flops", [4e9, 1.0], "GFLOPs an image"),
        ("flops", [5e4], "kFLOPs an image"),
        ("filters", [0.5], "Filters removed (%)"),
    ],
)
def test_units_fit_the_values(axis, values, label):
    assert shown_x(DrawnPanel("", axis), values)[1] == label


@pytest.mark.parametrize(
    ("panel", "change"),
    [
        (DrawnPanel(""), {"y": 47.0}),
        (DrawnPanel(""), {"y": -0.1}),
        (DrawnPanel(""), {"x": 0.0}),
        (DrawnPanel(""), {"x": 1.01}),
        (DrawnPanel("", "epoch", "ratio"), {"x": -1.0}),
        (DrawnPanel("", "epoch", "ratio"), {"x": 3.0, "y": 1.5}),
        (DrawnPanel("", "filters"), {"x": 10.0}),
    ],
    ids=str,
)
def test_a_value_that_cannot_stand_on_its_axis_is_one_line(panel, change):
    check_rows([ROW], {"a": DrawnPanel("")})
    with pytest.raises(InputError, match=r"panel a, series 0\.05, seed 0, round 1") as caught:
        check_rows([replace(ROW, **change)], {"a": panel})
    assert "\n" not in str(caught.value)


def test_cells_do_not_touch():
    drawing, rows = drawing_of("structured"), fake_rows("structured", 3, 9)
    summary = summarize(
        rows, drawing, [], figure="structured", preset="p", settings={}, data={}, cost={}, environment={}
    )
    for letter in drawing.panels:
        lines = panel_table(letter, summary["panels"][letter], summary["drawing"]).splitlines()[2:]
        assert all(len(re.findall(r"\S  +\S| \+- ", line)) >= 3 for line in lines)
    table = panel_table("b", summary["panels"]["b"], summary["drawing"])
    assert re.search(r"  0  +50\.\d \+- \d\.\d at 25\.5M  ", table)


def test_panels_that_make_no_sense():
    for axes in ({"x": "time"}, {"y": "loss"}):
        with pytest.raises(ValueError, match="unknown axes"):
            DrawnPanel("", **axes)


def test_the_table_of_layers_has_the_first_the_others_and_the_restless():
    drawing = drawing_of("A4")
    rows = [r for r in fake_rows("A4", 2) if r.panel == "a"]
    rows = [replace(r, y=1.0 - r.round / 110) if r.series == "layer2.1.conv2" else r for r in rows]
    summary = summarize(rows, drawing, [], figure="A4", preset="p", settings={}, data={}, cost={}, environment={})
    table = panel_table("a", summary["panels"]["a"], summary["drawing"])
    assert "conv1 (first)" in table
    assert "mean of 52 others" in table
    assert "layer2.1.conv2 (moves most)" in table
    assert "layerwise pruning ratio in %" in table
