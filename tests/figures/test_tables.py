"""Tables for the terminal: how columns and marks are laid out."""

from hypothesis import given
from hypothesis import strategies as st

from fastprune.figures.axes import DrawnPanel
from fastprune.figures.report import COLUMNS, _blocks, panel_table


@given(st.lists(st.integers(14, 120), max_size=30))
def test_parts_of_a_table_hold_every_column_once_and_fit(widths):
    columns = {str(number): width for number, width in enumerate(widths)}
    blocks = _blocks(columns)
    assert [name for block in blocks for name in block] == list(columns)
    assert all(len(block) == 1 or sum(columns[name] for name in block) <= COLUMNS - 16 for block in blocks)


def test_two_marks_leave_the_numbers_in_line():
    def cell(mean, diverged=0, dead=0):
        return {"x": 0.8, "mean": mean, "std": 0.01, "runs": 2, "diverged": diverged, "dead": dead}

    rounds = [
        {"round": 0, "x": 1.0, "series": {"0.1": cell(0.5), "0.2": cell(0.5)}},
        {"round": 1, "x": 0.8, "series": {"0.1": cell(0.4, 1, 1), "0.2": cell(0.4, 0, 1)}},
    ]
    drawing = {"panels": {"a": vars(DrawnPanel(""))}, "series": {}, "legend_title": "", "layers": False}
    assert panel_table("a", rounds, drawing).splitlines()[1:] == [
        "  weights left              0.1            0.2",
        "  1 (dense)       50.0 +- 1.0    50.0 +- 1.0",
        "  0.8             40.0 +- 1.0!*  40.0 +- 1.0*",
    ]
