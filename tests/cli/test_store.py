"""scripts/store.py: what ls and show say, and that everything wrong is one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastprune.cli.store import main
from fastprune.console import duration
from fastprune.specs import Init
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.store.listing import date, size
from fastprune.study.graph import Graph
from tests.fake_store import EVAL, FILTERS, FIND, GRAPH, MASKS, PRUNE, TRAIN, put, put_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path) -> RunStore:
    store = put_all(tmp_path / "runs")
    put(store, FILTERS)
    return store


def run(capsys, *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in args])
    return (code, *capsys.readouterr())


def test_ls(store, capsys):
    code, out, err = run(capsys, "ls", "--store", store.root)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["key", "kind", "what", "result", "cost", "device", "size", "date"]
    rows = {line[:8]: " ".join(line.split()) for line in lines[: len(GRAPH.nodes) + 1]}
    train = rows[TRAIN.key[:8]]
    assert train.startswith(f"{TRAIN.key[:8]} train resnet18")
    assert "tiny-imagenet (200 classes), lr 0.2, seed 0, epochs 0-110, round 0 50.00 %, density 1" in train
    assert "90 s, 45,300 images/s cpu " in train
    assert "round 1 by lr 0.2 50.00 %, density 0.8" in rows[EVAL[1].key[:8]]
    assert "prune round 1, magnitude of lr 0.2, global, fraction 0.2, seed 0 density 0.8 90 s" in rows[PRUNE.key[:8]]
    assert "channels 50% of filters 50% removed" in rows[FILTERS.key[:8]]
    trainings = len(GRAPH.trainings)
    assert lines[-1].startswith(f"{trainings} trainings, {len(MASKS)} prunes, 1 channel selections; ")
    assert lines[-1].endswith(f"kB on disk; {duration(90.0 * (len(GRAPH.nodes) + 1))} of computing time")


def test_ls_tells_what_is_going_on(store, capsys):
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_bytes(bytes(5000)))
    log = store.log(FIND[1], "lr 0.2, seed 0, round 1\nTraceback\nout of memory")
    with Leases(store.root / "leases") as leases:
        leases.acquire(TRAIN.key)
        lines = run(capsys, "ls", "--store", store.root)[1].splitlines()[-3:]
    key = TRAIN.key[:8]
    assert lines[0].startswith(f"lease {key}: process {os.getpid()} on ")
    assert lines[1].startswith(f"unfinished {key}: checkpoint of 5.0 kB, since 20")
    assert lines[2] == f"failed {FIND[1].key[:8]}: lr 0.2, seed 0, round 1: {log}, published since"


def test_ls_as_records(store, capsys):
    code, out, _ = run(capsys, "ls", "--json", "--kind", "prune", "--store", store.root)
    records = json.loads(out)
    assert code == 0
    assert sorted(r["key"] for r in records) == sorted(m.key for m in MASKS)
    first = next(r for r in records if r["key"] == PRUNE.key)
    assert first.pop("bytes") == sum(p.stat().st_size for p in store.path(PRUNE).iterdir())
    assert first == {
        **{"key": PRUNE.key, "kind": "prune", "round": 1, "criterion": "magnitude", "allocation": "global"},
        **{"fraction": 0.2, "seed": 0, "density": 0.8, "mask_of": "lr 0.2"},
        **{"seconds": 90.0, "images_per_second": 45300.0, "device": "cpu", "at": 1.7e9},
    }


def test_ls_says_which_network_it_is(tmp_path, capsys):
    store = RunStore(tmp_path)
    model = replace(TRAIN.model, name="resnet50", width=8)
    put(store, replace(TRAIN, start=Init(model, 0)))
    assert "train resnet50 width 8, tiny-imagenet (200 classes)" in " ".join(
        run(capsys, "ls", "--store", tmp_path)[1].split()
    )


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", "\0", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900),
        '{"kind": "train", "semantics": 3, "key": "KEY", "spec": {}, "result": {}, "provenance": {}}',
        '{"kind": "mystery", "semantics": 3, "key": "KEY", "spec": {}, "result": {}, "provenance": {}}',
        '{"kind": "prune", "semantics": 3, "key": "KEY", "spec": {"criterion": 1, "allocation": {"mask": []}}, '
        '"result": {"round": {}, "density": "x"}, "provenance": {}}',
        '{"kind": "prune", "semantics": 3, "key": "KEY", "spec": {"criterion": "a", "allocation": "b", '
        '"fraction": 0.2, "seed": 0}, "result": {"round": 1, "density": 0.5}, "provenance": {"at": 1'
        + "0" * 400
        + "}}",
        None,
    ],
    ids=range(12),
)
def test_a_corrupt_node_is_a_line(store, content, capsys):
    path = store.path(PRUNE) / "node.json"
    path.unlink() if content is None else path.write_text(content.replace("KEY", PRUNE.key))
    code, out, err = run(capsys, "ls", "--store", store.root)
    assert (code, err) == (1, "")
    lines = [line for line in out.splitlines() if "CORRUPT" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{PRUNE.key[:8]}  CORRUPT: ")
    assert ", 1 corrupt; " in out
    json.loads(run(capsys, "ls", "--json", "--store", store.root)[1])


def test_what_would_steer_a_terminal_is_not_printed(store, capsys):
    path = store.path(TRAIN) / "node.json"
    path.write_text(path.read_text().replace('"cpu"', r'"\u001b[2J\nx"'))
    for command in (["ls"], ["show", TRAIN.key]):
        out = run(capsys, *command, "--store", store.root)[1]
        assert "\x1b" not in out
        assert "?[2J x" in out


def test_show(store, capsys):
    code, out, err = run(capsys, "show", TRAIN.key[:12].upper(), "--store", store.root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [f"train {TRAIN.key}", str(store.path(TRAIN))]
    assert "    lr: 0.2" in lines
    assert "  accuracy: 0.5" in lines
    assert "  made on 2023-11-1" in out
    assert "  state-110.safetensors" in out
    assert f"  {PRUNE.key} prune" in lines[lines.index("needed by") :]
    assert lines[lines.index("depends on") + 1] == "  nothing"
    (store.path(PRUNE) / "layers.csv").write_text("")
    (store.path(PRUNE) / "mask.safetensors").unlink()
    (store.path(PRUNE) / "x").write_text("")
    code, out, _ = run(capsys, "show", PRUNE.key, "--store", store.root)
    lines = out.splitlines()
    assert code == 1
    assert lines[lines.index("depends on") + 1] == f"  {TRAIN.key} train"
    assert {f"  {EVAL[1].key} train", f"  {MASKS[1].key} prune"} <= {*lines[lines.index("needed by") :]}
    assert {"  layers.csv  0 B  CORRUPT", "  mask.safetensors  No such file or directory"} <= {*lines}
    assert "  x  0 B  not in SHA256SUMS" in lines


def test_show_says_how_a_training_was_computed(tmp_path, capsys):
    root = RunStore(tmp_path / "store")
    put(root, TRAIN, compute="dense", not_sparse="the sparse engine does not know aten.gelu", gpu_options="a=on")
    lines = run(capsys, "show", TRAIN.key, "--store", root.root)[1].splitlines()
    assert {"  compute: dense", "  not_sparse: the sparse engine does not know aten.gelu"} <= {*lines}
    assert "  gpu_options: a=on" in lines


def test_a_key_that_none_or_several_have(store, capsys):
    for prefix, says in (("", "nodes have a key"), ("xyz", "no node has a key"), ("../..", "no node has a key")):
        code, out, err = run(capsys, "show", prefix, "--store", store.root)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert says in err


@pytest.mark.parametrize("content", ["{", '{"a":' * 900 + "1" + "}" * 900])
def test_show_of_a_corrupt_node(store, content, capsys):
    (store.path(PRUNE) / "node.json").write_text(content)
    code, out, err = run(capsys, "show", PRUNE.key, "--store", store.root)
    assert (code, err) == (1, "")
    assert out.splitlines()[0].endswith("delete this folder to recompute the node")
    assert "  node.json  " in out


def test_show_of_what_is_not_published(tmp_path, capsys):
    store = RunStore(tmp_path)
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_bytes(bytes(5000)))
    store.log(TRAIN, "lr 0.2, seed 0\nTraceback\n\x1b[31mout of memory")
    code, out, err = run(capsys, "show", TRAIN.key[:6], "--store", store.root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{TRAIN.key}: not published"
    assert f"  {store.partial_path(TRAIN, 'checkpoint')}" in lines
    assert lines[-3:] == ["  lr 0.2, seed 0", "  Traceback", "  ?[31mout of memory"]


@pytest.mark.parametrize(
    "args",
    [[], ["junk"], ["ls", "--junk"], ["ls", "--kind", "init"], ["show"], ["export"], ["merge"], ["gc", "--for"]],
)
def test_bad_usage_is_one_line(args, capsys):
    code, out, err = run(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("store.py: ")


@pytest.mark.parametrize("command", ["ls", "show 0", "verify", "gc", "export x.tar"])
def test_no_store(tmp_path, command, capsys):
    for make in (lambda: None, lambda: (tmp_path / "store.json").write_text('{"format": 99}')):
        make()
        before = sorted(tmp_path.iterdir())
        code, out, err = run(capsys, *command.split(), "--store", tmp_path)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path) in err
        assert sorted(tmp_path.iterdir()) == before


def test_an_empty_store(tmp_path, capsys):
    RunStore(tmp_path)
    assert run(capsys, "ls", "--store", tmp_path)[0] == 0
    assert run(capsys, "verify", "--store", tmp_path)[1] == "0 nodes, 0 files, 0 corrupt\n"
    assert run(capsys, "gc", "--store", tmp_path)[0] == 0


def test_the_script_starts_without_what_is_heavy(store):
    code = (
        "import sys; from fastprune.cli.store import main; code = main(['ls', '--store', sys.argv[1]]);"
        "print(sorted({'torch', 'numpy', 'tqdm', 'matplotlib', 'safetensors'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.root], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
    done = subprocess.run([sys.executable, "scripts/store.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("ls", "show", "verify", "gc", "export", "merge"))


def test_a_reader_that_has_seen_enough(store):
    command = f"{sys.executable} scripts/store.py ls --store {store.root} | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_units():
    assert [size(n) for n in (0, 999, 1000, 99_960, 999_600, 1.5e9, 2e13)] == [
        *("0 B", "999 B", "1.0 kB", "100 kB", "1.0 MB", "1.5 GB", "20.0 TB")
    ]
    assert [duration(s) for s in (0.04, 9.96, 99.4, 120, 5969, 5970, 7260, 360_000, 9e6)] == [
        *(
            "0.0 s",
            "10 s",
            "99 s",
            "2 min",
            "99 min",
            "1 h 40 min",
            "2 h 01 min",
            "4.2 days",
            "104.2 days",
        )
    ]
    assert date(None) == ""
    assert date(1e300) == "?"


def test_graph_of_the_fake_store_is_whole(store):
    assert Graph.of(EVAL).todo(store) == []
