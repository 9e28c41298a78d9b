"""bench/rounds.py at a tiny size: what it writes adds up, and both loops prune the same weights."""

import json

import pytest
import torch

from bench import rounds
from fastprune.specs import DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec

TINY = "--rounds 2 --epochs 2 --width 8 --size 32 --batch 16 --train 64 --val 20 --classes 4 --device cpu".split()
MODEL = ModelSpec("resnet18", 4, width=8)


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(number)
    labels = torch.randint(4, (number, 16), generator=g)
    return [(torch.randn(16, 3, 32, 32, generator=g) + y.view(-1, 1, 1, 1), y) for y in labels]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_it_writes_adds_up(precision, tmp_path, capsys):
    assert rounds.main([*TINY, "--precision", precision, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "rounds.json").read_text())
    rows = result["rounds"]
    assert [(row["round"], row["who"]) for row in rows] == [
        (number, who) for number in (0, 1) for who in (rounds.OURS, rounds.THEIRS)
    ]
    for row in rows:
        assert set(row["seconds"]) == set(rounds.PARTS)
        assert all(row["seconds"][part] >= 0 for part in rounds.PARTS if part != "other")
        assert sum(row["seconds"].values()) == pytest.approx(row["wall"])
        assert row["cpu"] > 0
        assert -1e-3 < row["seconds"]["other"] < 0.5 * row["wall"]
        assert (row["images"], row["stored"] > 0) == (2 * 64, True)
        assert f"{row['kept']:,}" in said
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["kept"] == theirs["kept"]
    assert rows[2]["kept"] == rows[0]["kept"] - round(0.2 * rows[0]["kept"])
    assert result["torch"] == torch.__version__
    assert result["settings"]["batch"] == 16
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "rounds.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rounds.json", "rounds.pdf", "rounds.png"]


@pytest.mark.slow
def test_on_the_same_batches_both_prune_the_same_weights(tmp_path):
    given = batches(6)
    data = DataSpec("made up", "f" * 64, 4, None, None, 64, 32)
    work = rounds.Work(MODEL, data, OptimizerSpec(16), ScheduleSpec(0.05, 1), 3, 0.2, "fp32", "cpu")
    loops = [kind(work, lambda: (given[:4], given[4:])) for kind in (rounds.Ours, rounds.Theirs)]
    ours, theirs = loops
    for number in range(3):
        found = []
        for loop in loops:
            folder = tmp_path / f"{number}-{type(loop).__name__}"
            folder.mkdir()
            found.append(loop.round(rounds.Clock("cpu"), folder))
        assert found[0][0] == found[1][0]
        assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)
        mine, plain = ours.mask(), theirs.mask()
        assert mine.keys() == plain.keys()
        assert all(torch.equal(mine[name], plain[name]) for name in mine)


def test_compilation_is_what_the_first_time_took_beyond_the_later_ones():
    row = rounds.Row("x", 0, {"steps": 9.0, "pruning": 1.0, "loading": 2.0}, 12.0, 12.0, 0, 0, 0.0, 0.0, 0)
    rounds.tell_compilation(row, {"steps": [5.0, 4.0, 3.0, 4.0], "pruning": [1.0, 2.0], "loading": [2.0]})
    assert row.seconds == {"steps": 8.0, "pruning": 1.0, "loading": 2.0, "compilation": 1.0}


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert rounds.main([*TINY, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert rounds.main([*TINY, "--model", "vgg", "--out", str(tmp_path)]) == 2
    assert "resnet18" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rounds.main([*TINY, "--rounds", "1", "--out", str(tmp_path)])
