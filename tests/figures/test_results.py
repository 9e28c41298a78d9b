"""results.csv: exact, ordered, and careful about what it reads."""

import errno
import os
import random
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.errors import InputError
from fastprune.figures.results import (
    COLUMNS,
    Row,
    curve,
    depth_key,
    natural_key,
    read_csv,
    series_of,
    write_csv,
    write_output,
)

ROOT = Path(__file__).parents[2]
ROW = Row("A2", "a", "0.05", 0, 1, 0.8, 0.47, 0.05, 0.5, False, 0, "abc")

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=8).filter(str.isprintable)
rows_of_any_kind = st.builds(
    lambda y, **others: Row(y=y, diverged=y is None, **others),
    y=st.none() | finite,
    figure=names,
    panel=names,
    series=names | st.floats(0, 1).map(str),
    seed=st.integers(0, 10**6),
    round=st.integers(0, 100),
    x=finite,
    lr_find=st.none() | finite,
    lr_eval=st.none() | finite,
    dead=st.integers(0, 53),
    node=st.just("") | names,
)


def point_of(row):
    return (row.figure, row.panel, row.series, row.seed, row.round, row.x)


@given(rows=st.lists(rows_of_any_kind, max_size=12, unique_by=point_of), seed=st.integers(0, 99))
def test_round_trip_is_exact_and_blind_to_order(tmp_path_factory, rows, seed):
    path = tmp_path_factory.mktemp("csv") / "results.csv"
    write_csv(path, rows)
    first = path.read_bytes()
    back = read_csv(path)
    assert sorted(map(repr, back)) == sorted(map(repr, (floats(row) for row in rows)))
    random.Random(seed).shuffle(back)
    write_csv(path, back)
    assert path.read_bytes() == first


def floats(row):
    return replace(row, x=float(row.x))


def test_the_file_is_plain_to_read(tmp_path):
    random_row = Row("A2", "a", "random", 0, 2, 0.64, None, None, 0.5, True, 2, "d,e")
    write_csv(tmp_path / "results.csv", [random_row, replace(ROW, series="10"), replace(ROW, series="9"), ROW])
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "figure,panel,series,seed,round,x,y,lr_find,lr_eval,diverged,dead,node",
        "A2,a,0.05,0,1,0.8,0.47,0.05,0.5,0,0,abc",
        "A2,a,9,0,1,0.8,0.47,0.05,0.5,0,0,abc",
        "A2,a,10,0,1,0.8,0.47,0.05,0.5,0,0,abc",
        'A2,a,random,0,2,0.64,,,0.5,1,2,"d,e"',
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"y": float("nan")},
        {"y": float("inf")},
        {"y": None},
        {"diverged": True},
        {"x": float("nan")},
        {"x": None},
        {"lr_find": float("inf")},
        {"seed": -1},
        {"seed": True},
        {"round": 1.0},
        {"dead": -1},
        {"dead": 0.5},
        {"series": ""},
        {"panel": "a\nb"},
        {"y": "0.5"},
    ],
    ids=str,
)
def test_a_row_that_no_run_can_have_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(ROW, **change)


def test_two_results_for_one_point_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same point"):
        write_csv(tmp_path / "results.csv", [ROW, replace(ROW, y=0.5)])
    assert not list(tmp_path.iterdir())


HEADER = ",".join(COLUMNS)
LINE = "A2,a,0.05,0,1,0.8,0.47,0.05,0.5,0,0,abc"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a results.csv"),
        (b"epoch,loss\n1,2\n", "not a results.csv"),
        (b"\xff\xfe\x00", "not text"),
        (f"{HEADER}\n{LINE}".encode(), "its last line is incomplete"),
        (f"{HEADER}\n{LINE[:20]}\n".encode(), "line 2: 7 columns instead of 12"),
        (f"{HEADER}\n\n".encode(), "line 2"),
        (f"{HEADER}\n{LINE}\n{LINE}\n".encode(), "line 3 repeats"),
        (f"{HEADER}\n{LINE.replace('0.47', 'nan')}\n".encode(), "line 2: y nan"),
        (f"{HEADER}\n{LINE.replace('0.47', '')}\n".encode(), "line 2: y None"),
        (f"{HEADER}\n{LINE.replace(',0,0,abc', ',no,0,abc')}\n".encode(), "neither 0 nor 1"),
        (f"{HEADER}\n{LINE.replace('0.8', 'x')}\n".encode(), "line 2: could not convert"),
        (f'{HEADER}\n{LINE}"\n"\n'.encode(), "line 3"),
    ],
)
def test_damaged_and_foreign_files_are_one_line(tmp_path, content, says):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_missing_file_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="cannot read"):
        read_csv(tmp_path / name)


def test_turned_line_ends_are_read(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(f"{HEADER}\r\n{LINE}\r\n".encode())
    assert read_csv(path) == [ROW]


def test_writing_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_output(path, b"one")
    write_output(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_write_keeps_the_old_file_and_is_one_line(tmp_path, monkeypatch, code):
    path = tmp_path / "file"
    write_output(path, b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=os.strerror(code)) as caught:
        write_output(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        write_csv(tmp_path / "out" / "results.csv", [ROW])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            write_csv(tmp_path / "results.csv", [ROW])
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_curve_by_hand():
    rows = [
        replace(ROW, seed=0, y=0.5),
        replace(ROW, seed=1, y=0.7),
        replace(ROW, seed=2, y=None, diverged=True),
        replace(ROW, seed=0, round=2, x=0.64, y=None, diverged=True),
        replace(ROW, seed=0, round=0, x=1.0, y=0.25),
        replace(ROW, panel="b", y=0.9),
    ]
    dense, pruned, gone = curve(rows, "a", "0.05", chance=0.3)
    assert (dense.round, dense.x, dense.mean, dense.std, dense.runs, dense.diverged) == (0, 1.0, 0.25, None, 1, 0)
    assert (pruned.mean, pruned.std) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (pruned.runs, pruned.diverged) == (3, 1)
    assert (gone.mean, gone.diverged) == (0.3, 1)
    _, pruned, gone = curve(rows, "a", "0.05", chance=None)
    assert (pruned.mean, pruned.std) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert gone.mean is None


def test_numbers_are_ordered_by_value_and_stand_before_words():
    assert sorted(["random", "110", "0.5", "20", "inf", "0.05"], key=natural_key) == [
        "0.05",
        "0.5",
        "20",
        "110",
        "inf",
        "random",
    ]
    assert series_of([replace(ROW, series="random"), ROW, replace(ROW, panel="b", series="1")], ["a"]) == [
        "0.05",
        "random",
    ]


def test_layers_are_in_the_order_of_the_network():
    layers = [
        "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0", "layer1.1.conv1",
        "layer1.2.conv1", "layer1.10.conv1", "layer2.0.conv1",
    ]  # fmt: skip
    shuffled = list(layers)
    random.Random(3).shuffle(shuffled)
    assert sorted(shuffled, key=depth_key) == layers


def test_dead_layers_are_counted_by_run():
    rows = [replace(ROW, seed=seed, dead=dead) for seed, dead in enumerate((0, 2, 1))]
    (point,) = curve(rows, "a", "0.05", chance=None)
    assert point.dead == 2


def test_only_the_standard_library_is_imported():
    code = (
        "import sys, fastprune.figures.results, fastprune.figures.claims, fastprune.figures.drawing, "
        "fastprune.figures.report; print(sorted(sys.modules.keys() & {'numpy', 'scipy', 'matplotlib', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
