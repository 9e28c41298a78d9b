"""gc: leftovers are removed; what is published only when no recorded command needs it, and after a list."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastprune.cli.store import main
from fastprune.files import read_sums, write_tensors
from fastprune.specs import LprHistory, Rewind, StateRef
from fastprune.store import RunStore
from fastprune.store.gc import collect
from fastprune.store.lease import Leases
from fastprune.store.needs import read_needs, record_figure
from fastprune.study.graph import Graph
from tests.fake_store import EVAL, FILTERS, FIND, GRAPH, MASKS, PRUNE, TRAIN, put, put_all, temporaries, tree


def gc(store: RunStore, *flags: str) -> int:
    return main(["gc", "--store", str(store.root), *flags])


def record(store: RunStore, graph: Graph = GRAPH, figure: str = "A2") -> Path:
    return record_figure(store, figure, "paper", graph.nodes, graph.histories, f"reproduce.py --fig {figure}")


def old(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    os.utime(path, (time.time() - 1000,) * 2)
    return path


def die_with_lease(store: RunStore, key: str) -> None:
    """Another process takes the lease of a node, writes halves, and is killed."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fastprune.store.lease import Leases; from fastprune.store import RunStore\n"
        "root, key = Path(sys.argv[1]), sys.argv[2]; leases = Leases(root / 'leases'); assert leases.acquire(key)[0]\n"
        "(RunStore(root).aside(key) / 'metrics.csv').write_text('half')\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.root), key], check=False)
    assert done.returncode == -9


@pytest.fixture
def littered(tmp_path) -> RunStore:
    """A complete store after many accidents."""
    store = put_all(tmp_path / "runs")
    die_with_lease(store, FILTERS.key)
    die_with_lease(store, TRAIN.key)
    store.aside(f"{PRUNE.key}-removed")
    old(store.root / "tmp" / "junk")
    old(store.root / "figures" / ".A2-paper-1234.json.abcd")
    old(store.root / ".store.json.abcd")
    (store.root / "partial" / f".{FILTERS.key}.checkpoint.safetensors.abcd").write_text("half")
    (store.path(PRUNE) / ".mask.safetensors.abcd").write_text("half")
    (store.path(TRAIN) / "state-7.safetensors").write_text("never listed")
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_text("of a published run"))
    old(store.log(TRAIN, "out of memory"))
    old(store.root / "leases" / f".{PRUNE.key}.abcd")
    (store.root / "cache" / "0123456789abcdef").mkdir()
    (store.root / "cache" / "0123456789abcdef" / "x.so").write_text("code")
    store.cache().mkdir()
    (store.cache() / "own").write_text("")
    return store


def test_after_it_no_temporary_file_is_left(littered, tmp_path, capsys):
    complete = put_all(tmp_path / "complete")
    assert gc(littered) == 0
    out = capsys.readouterr().out
    assert f"removed {littered.root / 'cache' / '0123456789abcdef'} (4 B)\n" in out
    assert out.splitlines()[-1].startswith("13 leftovers removed, ")
    assert temporaries(littered.root) == []
    assert list((littered.root / "partial").iterdir()) == list((littered.root / "logs").iterdir()) == []
    assert [p.name for p in (littered.root / "cache").iterdir()] == [littered.cache().name]
    assert {n: c for n, c in tree(littered.root).items() if "times" not in n} == {
        n: c for n, c in tree(complete.root).items() if "times" not in n
    }
    assert main(["verify", "--store", str(littered.root)]) == 0
    capsys.readouterr()
    assert gc(littered) == 0
    assert capsys.readouterr().out == "0 leftovers removed, 0 bytes\n"


def test_what_is_still_of_use_stays(tmp_path):
    store = RunStore(tmp_path)
    put(store, TRAIN)
    store.save_partial(FIND[1], "checkpoint", lambda p: p.write_text("of an unfinished run"))
    old(store.root / "logs" / f"{FIND[1].key}.log")
    (store.root / "figures" / ".just now").write_text("")
    record(store)  # PRUNE, which is not there, reads a state of TRAIN, which lacks it: so that is trained once more
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_text("of its second training"))
    before = sorted(store.root.rglob("*"))
    assert gc(store) == 0
    assert sorted(store.root.rglob("*")) == before


def test_what_a_process_computes_is_left_alone(littered, capsys):
    with Leases(littered.root / "leases") as leases:
        assert leases.acquire(PRUNE.key)[0]
        assert gc(littered) == 0
        out = capsys.readouterr().out
        assert f"left alone: {PRUNE.key} is being computed by process {os.getpid()} on " in out
        assert "cache" not in out
        assert (littered.path(PRUNE) / ".mask.safetensors.abcd").exists()
        assert any(p.name.startswith(PRUNE.key) for p in (littered.root / "tmp").iterdir())
        assert not any(p.name.startswith(TRAIN.key) for p in (littered.root / "tmp").iterdir())
        record(littered, Graph.of([TRAIN]))
        assert gc(littered, "--unneeded", "--yes") == 0
        assert littered.has(PRUNE)
        assert not littered.has(EVAL[1])


def test_a_holder_on_another_machine_is_watched_before_it_is_dead(tmp_path):
    store = RunStore(tmp_path)
    put(store, TRAIN)
    store.aside(TRAIN.key)
    lease = old(store.root / "leases" / TRAIN.key)
    lease.write_text('{"host": "elsewhere", "machine": "b", "pid": 1, "since": 1.0, "token": "t"}')
    os.utime(lease, (time.time() - 1000,) * 2)
    removed = collect(store, seconds=0.5)
    assert removed.left == []
    assert temporaries(store.root) == []


def test_nodes_that_no_figure_needs(tmp_path, capsys):
    store = put_all(tmp_path / "runs")
    put(store, FILTERS)
    store.save_partial(replace(TRAIN, seed=77), "checkpoint", junk)
    before = tree(store.root)
    assert gc(store, "--unneeded") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert tree(store.root) == before
    record(store)
    part = Graph.of([FIND[1]])
    record(store, part, "A5")
    assert gc(store, "--unneeded") == 0
    out = capsys.readouterr().out
    assert f"would remove {store.path(FILTERS)} (" in out
    assert "2 more to remove with --yes, " in out.splitlines()[-1]
    assert tree(store.root) == before
    assert gc(store, "--unneeded", "--yes") == 0
    assert f"removed {store.path(FILTERS)} (" in capsys.readouterr().out
    assert not store.path(FILTERS).exists()
    assert all(store.has(n) for n in GRAPH.nodes)
    assert list((store.root / "partial").iterdir()) == []
    assert gc(store, "--forget", "A7", "--unneeded") == 2
    assert "no figure 'A7' is recorded in this store (recorded: A2, A5)" in capsys.readouterr().err
    assert gc(store, "--forget", "A2", "--unneeded") == 0
    assert all(store.has(n) for n in GRAPH.nodes)
    assert [n.figure for n in read_needs(store.root)] == ["A2", "A5"]
    assert gc(store, "--forget", "A2", "--unneeded", "--yes") == 0
    assert [n for n in GRAPH.nodes if store.has(n)] == list(part.nodes)
    assert [n.figure for n in read_needs(store.root)] == ["A5"]
    assert part.todo(store) == []
    assert temporaries(store.root) == []


def junk(path: Path) -> None:
    write_tensors(path, {})


def test_a_corrupt_record_might_need_everything(tmp_path, capsys):
    store = put_all(tmp_path)
    for content in ("{", "[]", "{}", '{"figure": "A2", "nodes": ["x"], "reads": {}}', "[" * 100_000):
        record(store).write_text(content)
        for flags in (["--unneeded"], ["--states"], ["--forget", "A2"]):
            assert gc(store, *flags) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert gc(store) == 0
    assert all(store.has(n) for n in GRAPH.nodes)


def states(store: RunStore) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(store.root.glob("nodes/*/*/*-*.safetensors")):
        found.setdefault(path.parent.name, []).append(path.name)
    return found


def test_states_that_only_finished_nodes_have_read(tmp_path, capsys):
    store = put_all(tmp_path)
    assert gc(store, "--states") == 2
    capsys.readouterr()
    record(store)
    readers = {n.source.node.key for n in MASKS}
    assert set(states(store)) == readers
    store.remove(store.path(MASKS[1]))  # it is still to come, and reads what round 1 found
    assert gc(store, "--states", "--yes") == 0
    assert states(store) == {FIND[1].key: ["state-110.safetensors"]}  # no node reads its momentum
    assert read_sums(store.path(TRAIN)).keys() == {"metrics.csv", "times.csv", "node.json", "ratios-0.2.csv"}
    assert Graph.of(EVAL).todo(store) == [MASKS[1]]
    put(store, MASKS[1])
    capsys.readouterr()
    assert gc(store, "--states") == 0
    assert "1 more to remove with --yes" in capsys.readouterr().out
    assert states(store) != {}
    assert gc(store, "--states", "--yes") == 0
    assert states(store) == {}
    assert Graph.of(EVAL).todo(store) == []
    assert main(["verify", "--store", str(tmp_path)]) == 0


def test_the_last_state_of_a_run_that_diverged_is_the_one_that_is_read(tmp_path):
    store = RunStore(tmp_path)
    store.publish(
        TRAIN,
        {"epochs": 5, "diverged": True, "accuracy": None},
        {},
        {"metrics.csv": lambda p: p.write_text("epoch\n"), "state-5.safetensors": junk},
    )
    record(store)
    assert gc(store, "--states", "--yes") == 0
    assert store.state(TRAIN.final)


def test_what_is_recorded(tmp_path):
    store = RunStore(tmp_path)
    late = replace(TRAIN, start=Rewind(StateRef(TRAIN, 10), 10, momentum=True), mask=PRUNE)
    graph = Graph.of([late, LprHistory(TRAIN, 0.2)])
    path = record_figure(
        store, "variants", "quick", graph.nodes, graph.histories, "reproduce.py --fig variants --preset quick"
    )
    assert path.parent == tmp_path / "figures"
    assert path.name.startswith("variants-quick-")
    assert len(path.stem) == len("variants-quick-") + 8
    assert record_figure(store, "variants", "quick", graph.nodes, graph.histories, "again") == path
    found = json.loads(path.read_text())
    assert found["nodes"] == sorted(n.key for n in graph.nodes)
    assert found["command"] == "again"
    assert abs(found["at"] - time.time()) < 60
    assert found["reads"] == {
        TRAIN.key: {
            "weights": {"10": [late.key], "110": [PRUNE.key]},
            "momentum": {"10": [late.key]},
            "histories": [0.2],
        }
    }
    assert record(store, GRAPH, "variants") != path
    assert sorted(p.name[0] for p in (tmp_path / "figures").iterdir()) == ["v", "v"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_it_makes_room_on_a_full_disk(tmp_path, capsys):
    """Where not even a lease can be taken."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no tmpfs here")
    try:
        store = RunStore(tmp_path / "store")
        (store.aside(TRAIN.key) / "state-1.safetensors").write_bytes(bytes(300_000))
        filler = store.root / "figures" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with Leases(store.root / "leases") as leases, pytest.raises(OSError, match="No space left"):
            leases.acquire(PRUNE.key)
        assert gc(store) == 0
        assert "(300 kB)" in capsys.readouterr().out
        assert [*(store.root / "tmp").iterdir(), *(store.root / "leases").iterdir()] == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
