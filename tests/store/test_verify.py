"""verify: every corrupt file is found, and nothing else."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from fastprune.cli.store import main
from fastprune.files import digest, write_sums, write_tensors
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.store.verify import check_store
from tests.fake_store import FILTERS, PRUNE, TRAIN, put, seeds, tree


@pytest.fixture(scope="module", params=[10, pytest.param(40, marks=pytest.mark.slow)])
def many(request, tmp_path_factory) -> Path:
    """A store of 100 nodes, or 400: trainings, prunes and filter selections, as 5 : 4 : 1."""
    root = tmp_path_factory.mktemp("many") / "runs"
    store, tenth = RunStore(root), request.param
    for node in seeds(TRAIN, 5 * tenth):
        put(store, node, (2,))
    for node in seeds(PRUNE, 4 * tenth):
        put(store, node)
    for i in range(tenth):
        put(store, type(FILTERS)(FILTERS.source, i / 1000))
    return root


@pytest.fixture
def store(tmp_path) -> RunStore:
    store = RunStore(tmp_path / "runs")
    for node in (TRAIN, PRUNE, FILTERS):
        put(store, node, (3, 110))
    return store


def verify(root: Path, *flags: str) -> int:
    return main(["verify", "--store", str(root), *flags])


def resum(folder: Path) -> None:
    """Makes SHA256SUMS agree with what lies there."""
    write_sums(folder, {p.name: digest(p) for p in folder.iterdir() if p.name != "SHA256SUMS"})


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    path.write_bytes(content)


DAMAGES = (
    lambda path, at: path.write_bytes(path.read_bytes()[:at]),
    flip,
    lambda path, at: path.unlink(),
    lambda path, at: path.write_bytes(path.read_bytes() + b"\0"),
)


def test_a_complete_store_is_complete(many, capsys):
    assert verify(many) == 0
    nodes = len(list(many.glob("nodes/*/*")))
    files = nodes // 10 * (5 * 7 + 4 * 4 + 1 * 4)
    assert capsys.readouterr().out == f"{nodes:,} nodes, {files:,} files, 0 corrupt\n"


def test_every_corrupt_file_among_many_nodes_is_found(many, tmp_path, capsys):
    root = tmp_path / "runs"
    shutil.copytree(many, root)
    rng, expected = random.Random(7), set()
    folders = sorted(p.parent for p in root.glob("nodes/*/*/node.json"))
    each = len(folders) // 25
    by_name: dict[str, list[Path]] = {}
    for folder in folders:
        for path in folder.iterdir():
            by_name.setdefault(path.name, []).append(path)
    assert len(by_name) == 10
    for _, paths in sorted(by_name.items()):
        # As many in each kind of product; a corrupt list hides what is wrong with the files, so each node is hit once.
        chosen = [p for p in sorted(paths) if p.parent not in {e.parent for e in expected}]
        chosen = rng.sample(chosen, min(each, len(chosen)))
        assert len(chosen) == each
        for i, path in enumerate(chosen[:-2]):
            DAMAGES[i % len(DAMAGES)](path, rng.randrange(path.stat().st_size))
        one, two = chosen[-2:]
        first, second = one.read_bytes(), two.read_bytes()
        if first == second:  # products of made-up nodes may be equal: then a swap is no damage
            flip(one, 5)
            flip(two, 6)
        else:
            one.write_bytes(second)
            two.write_bytes(first)
        expected |= set(chosen)
    assert len(expected) == 10 * each
    assert verify(root) == 1
    *lines, count = capsys.readouterr().out.splitlines()
    named = {Path(line.split(": ")[0]) for line in lines}
    complete = {e.parent for e in expected if e.name == "SHA256SUMS"}
    assert {n for n in named if n.parent not in complete} == {e for e in expected if e.parent not in complete}
    # Where the list itself was cut between two lines, or is another node's, it is the files that do not agree with it.
    assert {n.parent for n in named} == {e.parent for e in expected}
    assert all(f"delete the folder {Path(x.split(': ')[0]).parent}" in x or "delete /" in x for x in lines)
    assert count.startswith(f"{len(folders):,} nodes, ")
    assert count.endswith(f"{len(named)} corrupt")
    assert verify(root, "--delete") == 1
    capsys.readouterr()
    assert verify(root) == 0
    assert capsys.readouterr().out.startswith(f"{len(folders) - 10 * each:,} nodes, ")


def of_another_node(store: RunStore) -> Path:
    path, other = store.path(TRAIN) / "node.json", store.path(PRUNE) / "node.json"
    path.write_bytes(other.read_bytes())
    return path


def of_another_spec(store: RunStore) -> Path:
    path = store.path(TRAIN) / "node.json"
    about = json.loads(path.read_text())
    about["spec"]["schedule"]["lr"] = 0.3
    path.write_text(json.dumps(about))
    return path


def content(name: str, text: str):
    def damage(store: RunStore) -> Path:
        path = next(p for n in (TRAIN, PRUNE, FILTERS) for p in store.path(n).iterdir() if p.name == name)
        path.write_text(text)
        return path

    return damage


def linked(store: RunStore) -> Path:
    path = store.path(TRAIN) / "metrics.csv"
    path.rename(store.root / "metrics.csv")
    path.symlink_to(store.root / "metrics.csv")
    return path


def without_metrics(store: RunStore) -> Path:
    (store.path(TRAIN) / "metrics.csv").unlink()
    return store.path(TRAIN) / "metrics.csv"


def cut_tensors(store: RunStore) -> Path:
    path = store.path(PRUNE) / "mask.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize(
    "damage",
    [
        of_another_node,
        of_another_spec,
        linked,
        without_metrics,
        cut_tensors,
        content("metrics.csv", "epoch,loss\n1\n"),
        content("metrics.csv", "epoch,loss\n1,low\n"),
        content("layers.csv", 'a,b\n"'),
        content("channels.json", "[]"),
        content("channels.json", "[" * 100_000),
        content("channels.json", '{"a":' * 900 + "1" + "}" * 900 + "x"),
        content("node.json", '{"kind": []}'),
        content("node.json", '{"kind": "train", "semantics": 3, "spec": ' + '{"a":' * 980 + "1" + "}" * 981),
        content("state-3.safetensors", "junk"),
        content("state-3.safetensors", "\x02" + "\0" * 7 + "{}"),
        content("state-3.safetensors", "\x02" + "\0" * 7 + "[]"),
        content("state-3.safetensors", "\x7f" * 50),
        content("mask.safetensors", ""),
    ],
)
def test_what_has_the_right_checksum_and_is_wrong_all_the_same(store, damage, capsys):
    path = damage(store)
    resum(path.parent)
    assert verify(store.root) == 1
    line, count = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: ")
    assert count.endswith("1 corrupt")


def test_places(store, capsys):
    nodes, key = store.root / "nodes", TRAIN.key
    (nodes / "zz").mkdir()
    shutil.copytree(store.path(TRAIN), nodes / ("00" if key[:2] != "00" else "01") / key)
    (nodes / "README").write_text("")
    other = store.path(TRAIN).with_name(key[:2] + "0" * 30)
    shutil.copytree(store.path(TRAIN), other)
    (store.path(PRUNE) / "state-7.safetensors").write_text("its writer died")
    before = tree(store.root)
    assert verify(store.root) == 1
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].removeprefix(f"{nodes}/").split("/")[0] for line in lines[:3]] == [
        *("00" if key[:2] != "00" else "01", "README", "zz")
    ]
    assert {line.split(": ")[0] for line in lines[3:]} == {
        str(other / "node.json"),
        str(store.path(PRUNE) / "state-7.safetensors"),
    }
    assert tree(store.root) == before
    assert verify(store.root, "--delete") == 1
    assert verify(store.root) == 0
    assert store.has(PRUNE)
    assert store.has(TRAIN)


def test_what_unfinished_runs_keep(store, capsys):
    good = {"model.w": torch.ones(100)}
    store.save_partial(TRAIN, "checkpoint", lambda p: write_tensors(p, good, {"history": []}))
    store.save_partial(TRAIN, "state-3", lambda p: write_tensors(p, good))
    assert verify(store.root) == 0
    path = store.partial_path(TRAIN, "state-3")
    flip(path, path.stat().st_size - 9)
    (store.root / "partial" / "junk").write_text("")
    capsys.readouterr()
    assert verify(store.root, "--delete") == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}: its content does not have the checksum that it names; delete {path}" in lines
    assert f"deleted {path}" in lines
    assert list((store.root / "partial").iterdir()) == [store.partial_path(TRAIN, "checkpoint")]
    assert store.has(TRAIN)


def test_every_bit_of_a_tensor_file_counts(tmp_path):
    store = RunStore(tmp_path)
    store.save_partial(TRAIN, "checkpoint", lambda p: write_tensors(p, {"w": torch.arange(3.0)}, {"a": [1.5]}))
    path = store.partial_path(TRAIN, "checkpoint")
    content = path.read_bytes()
    assert check_store(tmp_path).corrupt == {}
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        assert list(check_store(tmp_path).corrupt) == [path], at
        path.write_bytes(content[:at])
        assert list(check_store(tmp_path).corrupt) == [path], at


def test_what_a_process_computes_is_not_deleted(store, capsys):
    flip(store.path(TRAIN) / "metrics.csv", 3)
    with Leases(store.root / "leases") as leases:
        assert leases.acquire(TRAIN.key)[0]
        assert verify(store.root, "--delete") == 1
        assert f"left alone: {TRAIN.key} is being computed by process" in capsys.readouterr().out
        assert store.has(TRAIN)
    assert verify(store.root, "--delete") == 1
    assert not store.path(TRAIN).exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_a_node_that_gains_files_meanwhile_is_not_called_corrupt(tmp_path, capsys):
    """Its new file is there before it is in the list of checksums, and its temporary one comes and goes."""
    store = RunStore(tmp_path)
    put(store, TRAIN, (3,))
    extra = store.path(TRAIN) / "state-9.safetensors"
    shutil.copyfile(next(store.path(TRAIN).glob("state-*")), extra)
    (store.path(TRAIN) / ".state-9.safetensors.abcd").write_text("half")
    with Leases(store.root / "leases") as leases:
        leases.acquire(TRAIN.key)
        assert verify(store.root) == 0
        assert main(["ls", "--store", str(store.root)]) == 0
    assert verify(store.root) == 1  # no process computes it
    assert f"{extra}: not in SHA256SUMS; delete {extra}" in capsys.readouterr().out
