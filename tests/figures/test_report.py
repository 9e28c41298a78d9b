"""What a finished figure leaves, and the lines on the terminal."""

import json
import math
import random
from pathlib import Path

import pytest

from fastprune.errors import InputError
from fastprune.figures.axes import Drawing, DrawnPanel
from fastprune.figures.claims import Accuracy, Claim, judge
from fastprune.figures.report import draw_again, summarize, terminal_summary, write_all
from fastprune.figures.results import Row, read_csv

DRAWING = Drawing(
    title="A small network on made-up data",
    panels={"a": DrawnPanel("LR_eval = 0.5"), "b": DrawnPanel("LR_eval = 0.8")},
    series={"0.05": "0.05", "0.8": "0.8", "random": "random masks"},
    legend_title="LR_find",
    chance=0.005,
    note="Made up.",
)
CLAIMS = [
    Claim(
        "better",
        "0.05 is clearly better than 0.8",
        tuple(Accuracy(panel, "better", "0.05", "0.8", densities=(0.001, 0.9)) for panel in "ab"),
    ),
    Claim("dense", "0.8 trains the best dense network", (Accuracy("find", "better", "0.8", "0.05", rounds=(0, 0)),)),
    Claim("absent", "0.3 is similar to 0.05", (Accuracy("a", "similar", "0.3", "0.05", rounds=(1, 9)),)),
]


def fake_rows(seeds=3, rounds=30, diverged=()):
    """Dense: 50, 51, 52 % for seeds 0, 1, 2 in every series."""
    noise = random.Random(0)
    rows = []
    for panel in ("a", "b", "find"):
        for name, offset in (("0.05", 0.02), ("0.8", -0.02), ("random", 0.0)):
            for seed in range(seeds):
                for number in range(rounds + 1):
                    y = 0.5 + 0.01 * seed - 0.005 * number + (number > 0) * (offset + 0.002 * noise.random())
                    gone = (panel, name, seed, number) in diverged
                    node = f"{panel}{name}{seed}{number}"
                    rows.append(
                        Row("A2", panel, name, seed, number, 0.8**number, None if gone else y, None, 0.5, gone, 0, node)
                    )
    return rows


def summary_of(rows, preset="paper", **changes):
    verdicts = [judge(claim, rows, chance=0.005, decisive=preset != "smoke") for claim in CLAIMS]
    arguments = {
        "figure": "A2",
        "preset": preset,
        "settings": {"lr_find": (0.05, 0.8), "epochs": 110},
        "data": {"name": "made-up", "fingerprint": "f" * 64},
        "cost": {
            **{"nodes": 604, "cached": 12, "epochs": 166100},
            "command": {"figures": ["A2"], "images_per_s": 12345.6, "wall_s": 8000.0},
        },
        "environment": {"device": "cpu", "threads": 1, "versions": {"torch": "2.11.0"}},
    }
    return summarize(rows, DRAWING, verdicts, **arguments | changes)


def test_everything_is_left_and_drawn_again_the_same(tmp_path):
    rows = fake_rows(diverged={("a", "0.8", 0, 30)})
    summary = summary_of(rows)
    paths = write_all(tmp_path, rows, DRAWING, summary)
    assert sorted(path.name for path in paths) == ["figure.pdf", "figure.png", "results.csv", "summary.json"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert read_csv(tmp_path / "results.csv") == sorted(
        rows, key=lambda row: (row.panel, row.series, row.seed, row.round)
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        if path.name.startswith("figure"):
            path.unlink()
    assert draw_again(tmp_path) == [tmp_path / "figure.png", tmp_path / "figure.pdf"]
    assert {path: path.read_bytes() for path in paths} == before


def test_summary_is_plain_and_says_what_was_found(tmp_path):
    rows = fake_rows()
    write_all(tmp_path, rows, DRAWING, summary_of(rows))
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text)
    assert text == json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    better, dense, absent = summary["claims"]
    assert better["verdict"] == "holds"
    assert better["effect"] == pytest.approx(4.0, abs=0.1)
    assert better["interval"][0] < better["effect"] < better["interval"][1]
    assert [part["comparison"]["panel"] for part in better["parts"]] == ["a", "b"]
    assert list(dense["parts"][0]["differences"]) == ["0", "1", "2"]
    assert (absent["verdict"], absent["effect"]) == ("undecided", None)
    first = summary["panels"]["a"][0]
    assert (first["round"], first["x"], first["series"]["0.05"]["runs"]) == (0, 1.0, 3)
    assert first["series"]["0.05"]["mean"] == pytest.approx(0.51)
    assert summary["settings"] == {"lr_find": [0.05, 0.8], "epochs": 110}
    assert summary["diverged"] == 0


def test_numbers_that_are_not_finite_become_null_and_odd_things_are_refused():
    summary = summary_of(fake_rows(), cost={"command": {"images_per_s": math.inf, "wall_s": math.nan}})
    assert summary["cost"] == {"command": {"images_per_s": None, "wall_s": None}}
    assert not {"Cost", "Command"} & {line.split(" ")[0] for line in terminal_summary(summary).splitlines()}
    with pytest.raises(TypeError, match="cannot hold"):
        summary_of(fake_rows(), data={"folder": object()})


def test_the_terminal_shows_all_that_matters():
    text = terminal_summary(summary_of(fake_rows(diverged={("a", "0.8", 0, 30)})), Path("results/A2"))
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert text.isascii()
    assert "a  LR_eval = 0.5: top-1 accuracy in % by LR_find" in text
    assert "weights left            0.05           0.8  random masks" in text
    assert "  1 (dense)       51.0 +- 1.0   51.0 +- 1.0   51.0 +- 1.0" in text
    assert "! marks diverged runs (1 in all); a diverged run counts as chance" in text
    assert "  holds      0.05 is clearly better than 0.8" in text
    assert "  undecided  0.3 is similar to 0.05" in text
    assert "no results of 0.3 in panel a" in text
    assert "\nCost    604 nodes (12 cached), 166,100 epochs\nCommand 12,346 images/s, 2 h 13 min\n" in text
    assert "cpu, 1 thread a process, torch 2.11.0" in text
    assert "results/A2/: figure.png, figure.pdf, results.csv, summary.json" in text
    assert "machinery" not in text


def test_several_ways_to_compute_are_counted():
    environment = {"device": "cpu", "threads": 1, "compute": {"dense": 1200, "sparse": 31}}
    for ways, said in ((environment["compute"], ", trainings: 1,200 dense, 31 sparse"), ({"plain": 7}, "")):
        text = terminal_summary(summary_of(fake_rows(), environment=environment | {"compute": ways}))
        assert f"\nOn      cpu, 1 thread a process{said}\n" in f"{text}\n"


def test_what_is_of_the_whole_command_is_said_to_be():
    command = {"figures": ["A2", "A6", "variants"], "images_per_s": None, "wall_s": 61.25}
    text = terminal_summary(summary_of(fake_rows(), cost={"nodes": 3, "epochs": 9, "command": command}))
    assert "\nCost    3 nodes, 9 epochs\nCommand 61 s for A2, A6, variants\n" in text


def test_smoke_says_plainly_what_it_is():
    command = "python scripts/reproduce.py --fig A2 --preset paper --data DIR"
    text = terminal_summary(summary_of(fake_rows(2, 3), preset="smoke", real_command=command))
    assert "not the paper's result" in text
    assert text.endswith(command)
    assert "holds" not in text
    [line] = [line for line in text.splitlines() if "laim" in line]
    assert line == "Claims  3, undecided: preset smoke only shows the machinery; differences: summary.json"


@pytest.mark.parametrize("rows", [[], fake_rows(1, 0), fake_rows(1, 3)], ids=["nothing", "dense-only", "one-seed"])
def test_little_is_enough(tmp_path, rows):
    summary = summary_of(rows)
    assert max(map(len, terminal_summary(summary).splitlines())) <= 100
    write_all(tmp_path, rows, DRAWING, summary)
    draw_again(tmp_path)


def test_many_series_stay_within_the_terminal(tmp_path):
    names = [f"{0.1 * number:.1f}" for number in range(1, 12)]
    rows = [
        Row("A2", "a", name, seed, number, 0.8**number, 0.5, None, 0.5, False, 0, "")
        for name in names
        for seed in range(2)
        for number in range(3)
    ]
    drawing = Drawing("Many", {"a": DrawnPanel("")}, chance=0.1)
    summary = summarize(rows, drawing, [], figure="A2", preset="x", settings={}, data={}, cost={}, environment={})
    text = terminal_summary(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f" {name}" in text for name in names)


def test_results_alone_are_enough_to_draw(tmp_path):
    rows = fake_rows()
    write_all(tmp_path, rows, DRAWING, summary_of(rows))
    before = (tmp_path / "figure.pdf").read_bytes()
    (tmp_path / "summary.json").unlink()
    draw_again(tmp_path)
    assert (tmp_path / "figure.pdf").read_bytes() != before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"drawing": {}}', b"\xff", b'{"drawing": {"title": 1, "panels": {}}}']
)
def test_a_damaged_summary_is_one_line(tmp_path, content):
    rows = fake_rows(1, 1)
    write_all(tmp_path, rows, DRAWING, summary_of(rows))
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(InputError, match=r"summary\.json is damaged or foreign") as caught:
        draw_again(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_to_draw_again_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"results\.csv"):
        draw_again(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "out").write_text("in the way")
    rows = fake_rows(1, 1)
    with pytest.raises(InputError, match="cannot write") as caught:
        write_all(tmp_path / "out", rows, DRAWING, summary_of(rows))
    assert "\n" not in str(caught.value)
