"""The legend: which entries stand together, and in which lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.figures.axes import Drawing, DrawnPanel
from fastprune.figures.drawing import _width, arranged, legend


class Entry:
    """What arranging needs of a legend's entry."""

    def __init__(self, label: str) -> None:
        self.label = label

    def get_label(self) -> str:
        return self.label


blocks_of_entries = st.lists(
    st.lists(st.text("abc", max_size=40).map(Entry), min_size=1, max_size=8), min_size=1, max_size=4
)


@given(blocks_of_entries, st.floats(0.5, 12))
def test_every_entry_stands_once_in_order_and_blocks_do_not_share_lines(blocks, width):
    lines = arranged(blocks, width)
    entries = [entry for block in blocks for entry in block]
    assert [entry for line in lines for entry in line] == entries
    assert all(lines)
    if len(lines) > 1:
        assert all(any(set(line) <= set(block) for block in blocks) for line in lines)
    assert _width(lines) <= width or all(len(line) == 1 for line in lines)


def test_lines_of_a_block_are_about_equally_long():
    four = [Entry("LR = 0.05") for _ in range(4)]
    assert [len(line) for line in arranged([four], 4.0)] == [2, 2]
    assert arranged([], 4.0) == []


SERIES = {"1": "LR_find = 1", "2": "LR_find = 2", "e1": "LR_eval = 1", "e2": "LR_eval = 2"}


@pytest.mark.parametrize(
    ("panels", "expected"),
    [
        ([("1", "2"), ("1", "2"), ("e1", "e2")], [["find", "find"], ["eval", "eval"]]),
        ([("1", "e1"), ("2", "e1"), ("e2", "2")], [["find", "find", "eval", "eval"]]),
        ([("1",), ("2", "e1", "e2"), ()], [["find"], ["find", "eval", "eval"]]),
    ],
    ids=["apart", "linked", "one-alone"],
)
def test_series_that_share_a_panel_stand_merge_graphs(panels, expected):
    drawing = Drawing("t", {"a": DrawnPanel("")}, SERIES)
    blocks = legend(list(SERIES), panels, drawing, diverged=True, dead=True)
    *series, marks = [[entry.get_label() for entry in block] for block in blocks]
    assert marks == ["diverged", "a layer is pruned whole"]
    assert [["find" if "find" in label else "eval" for label in block] for block in series] == expected
