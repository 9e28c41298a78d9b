"""export and merge: merging is idempotent and the same from both sides, and nothing from elsewhere is trusted."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastprune.cli.store import main
from fastprune.files import read_sums, sums_text
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.store.needs import record_figure
from tests.fake_store import EVAL, FILTERS, GRAPH, PRUNE, TRAIN, put, put_all, temporaries, tree

FOLDER = f"nodes/{TRAIN.key[:2]}/{TRAIN.key}"


@pytest.fixture
def ours(tmp_path) -> Path:
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A store, and beside it the archive of it."""
    store = put_all(tmp_path / "theirs")
    record_figure(store, "A2", "paper", GRAPH.nodes, GRAPH.histories, "reproduce.py --fig A2")
    return store.root


def export(store: Path, file: Path, *flags: str) -> int:
    return main(["export", "--store", str(store), str(file), *flags])


def take(store: Path, source: Path) -> int:
    return main(["merge", "--store", str(store), str(source)])


def verified(store: Path) -> bool:
    return main(["verify", "--store", str(store)]) == 0


def contents(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def write_tar(path: Path, files: dict[str, bytes], *odd: tarfile.TarInfo, first: bool = False) -> Path:
    """A tar of `files`, and before or after those of the nodes of members without content."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i, (name, content) in enumerate(files.items()):
            if first and i == 1:
                for info in odd:
                    tar.addfile(info)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if not first:
            for info in odd:
                tar.addfile(info)
    return path


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("store.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("through", ["a tar", "a folder"])
def test_a_store_comes_over_complete_and_only_once(theirs, ours, tmp_path, through, capsys):
    source = theirs
    if through == "a tar":
        source = tmp_path / "a.tar"
        assert export(theirs, source) == 0
        assert f"{len(GRAPH.nodes)} nodes in {source}" in capsys.readouterr().out
        assert main(["verify", str(source)]) == 0
        assert capsys.readouterr().out.startswith(f"{len(GRAPH.nodes)} nodes, ")
    assert take(ours, source) == 0
    counts = f"{len(GRAPH.nodes)} new, 0 the same, 0 gained files, 0 in conflict, 0 corrupt, 0 left out; "
    counts += "records of figures: 1\n"
    assert capsys.readouterr().out == counts
    assert tree(ours) == tree(theirs)
    assert os.listdir(ours / "figures") == os.listdir(theirs / "figures")
    assert verified(ours)
    capsys.readouterr()
    assert take(ours, source) == 0
    assert capsys.readouterr().out.startswith(f"0 new, {len(GRAPH.nodes)} the same, 0 gained")
    assert tree(ours) == tree(theirs)
    assert temporaries(ours) == []


def test_an_archive_is_the_same_to_the_byte_and_holds_nothing_else(theirs, ours, tmp_path):
    for name in ("cache/code/x.so", "tmp/x", "leases/x", "data/x", "logs/x.log", "partial/x"):
        (theirs / name).parent.mkdir(exist_ok=True, parents=True)
        (theirs / name).write_text("x")
    assert export(theirs, tmp_path / "a.tar") == 0
    assert take(ours, tmp_path / "a.tar") == 0
    assert export(ours, tmp_path / "b.tar") == 0
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert {name.split("/")[0] for name in contents(tmp_path / "a.tar")} == {"store.json", "figures", "nodes"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_only_what_a_figure_needs_and_without_states(theirs, ours, tmp_path, capsys):
    store = RunStore(theirs)
    put(store, FILTERS)
    assert export(theirs, tmp_path / "a.tar", "--figure", "A2", "--no-states") == 0
    assert take(ours, tmp_path / "a.tar") == 0
    assert not RunStore(ours).has(FILTERS)
    assert all(RunStore(ours).has(n) for n in GRAPH.nodes)
    assert not list(ours.glob("nodes/*/*/state-*"))
    assert verified(ours)
    assert (store.path(TRAIN) / "state-110.safetensors").exists()
    capsys.readouterr()
    assert take(ours, theirs) == 0  # the states come later
    read = sum(bool(GRAPH.needed(n).weights) for n in GRAPH.nodes)
    assert capsys.readouterr().out.startswith(f"1 new, {len(GRAPH.nodes) - read} the same, {read} gained files")
    assert tree(ours) == tree(theirs)
    assert export(theirs, tmp_path / "b.tar", "--figure", "A9") == 2
    assert "no figure 'A9' is recorded in this store (recorded: A2)" in one_line(capsys)
    assert not (tmp_path / "b.tar").exists()


def test_merging_from_either_side_gives_the_same_nodes(tmp_path):
    a, b = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    put(a, TRAIN, (3,))
    put(b, TRAIN, (110,), by="another device")
    put(a, PRUNE)
    put(b, FILTERS)
    shutil.copytree(a.root, tmp_path / "a before")
    assert take(a.root, b.root) == 0
    assert take(b.root, tmp_path / "a before") == 0

    def products(root: Path) -> dict[str, bytes]:
        ours = ("node.json", "times.csv", "SHA256SUMS")
        return {name: content for name, content in tree(root).items() if not name.endswith(ours)}

    assert products(a.root) == products(b.root)
    assert {p.name for p in a.path(TRAIN).iterdir()} >= {"state-3.safetensors", "state-110.safetensors"}
    assert a.node(TRAIN)["provenance"]["device"] == "cpu"
    assert b.node(TRAIN)["provenance"]["device"] == "another device"
    assert verified(a.root)
    assert verified(b.root)


def test_a_conflict_is_told_and_ours_is_kept(tmp_path, capsys):
    a, b = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    put(a, TRAIN, (3,))
    put(b, TRAIN, (3, 110), salt=0.5, by="cuda", host="there")
    put(b, PRUNE)
    before = tree(a.root)
    assert take(a.root, b.root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        f"conflict: {TRAIN.key}: metrics.csv, momentum-3.safetensors, state-3.safetensors differs "
        "(ours by here on cpu, torch 2, theirs by there on cuda, torch 2); ours is kept"
    ]
    assert lines[-1].startswith("1 new, 0 the same, 0 gained files, 1 in conflict")
    assert {name: content for name, content in tree(a.root).items() if name in before} == before
    assert not (a.path(TRAIN) / "state-110.safetensors").exists()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"compute": "sparse"}, {"compute": "dense"}, "computed sparse here, dense there"),
        ({"compute": "sparse"}, {"compute": "sparse"}, None),
        ({}, {"compute": "sparse"}, None),  # an older version did not record it
        ({"compute": ["sparse"], "parts": 3}, {"compute": "dense"}, None),  # foreign
        (
            {"compute": "plain", "gpu_options": "fused_norm=on"},
            {"compute": "plain", "gpu_options": "fused_norm=off"},
            "computed fused_norm=on here, fused_norm=off there",
        ),
        ({"compute": "plain", "gpu_options": "fused_norm=on"}, {"compute": "plain"}, None),  # on a CPU
        (
            {"compute": "sparse", "parts": [{"compute": "plain"}, {"compute": "sparse"}]},
            {"compute": "sparse"},
            "computed plain and sparse here, sparse there",
        ),
    ],
)
def test_a_conflict_names_what_rounds_differently(tmp_path, capsys, ours, theirs, said):
    a, b = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    put(a, TRAIN, **ours)
    put(b, TRAIN, salt=0.5, **theirs)
    assert take(a.root, b.root) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"conflict: {TRAIN.key}: metrics.csv differs (ours by here on cpu, torch 2, theirs by ")
    assert line.endswith(f"torch 2{f'; {said}: numbers differ by rounding' if said else ''}); ours is kept")


def test_what_a_process_computes_is_left_out(theirs, ours, capsys):
    store = RunStore(ours)
    with Leases(ours / "leases") as leases:
        assert leases.acquire(TRAIN.key)[0]
        assert take(ours, theirs) == 1
    assert f"left out: {TRAIN.key} is being computed by process {os.getpid()} on " in capsys.readouterr().out
    assert not store.has(TRAIN)
    assert take(ours, theirs) == 0
    assert store.has(TRAIN)


@pytest.mark.parametrize("damage", ["flip", "removed", "list"])
def test_a_corrupt_node_is_not_exported(theirs, tmp_path, damage, capsys):
    path = RunStore(theirs).path(TRAIN) / ("SHA256SUMS" if damage == "list" else "metrics.csv")
    path.unlink() if damage == "removed" else path.write_text(path.read_text().replace("e", "f"))
    (tmp_path / "a.tar").write_text("was here")
    assert export(theirs, tmp_path / "a.tar") == 1
    assert str(path.parent) in one_line(capsys)
    assert (tmp_path / "a.tar").read_text() == "was here"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "theirs"]


def test_a_killed_export_leaves_nothing_under_its_name(theirs, tmp_path):
    code = (
        "import os, sys; from fastprune.store import merge as t; was = t._add_node; done = []\n"
        "def add(*a):\n    was(*a); done.append(0); len(done) == 3 and os.kill(os.getpid(), 9)\n"
        "t._add_node = add; t.export(*map(t.Path, sys.argv[1:]), [])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(theirs), str(tmp_path / "a.tar")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "a.tar").exists()


def test_a_corrupt_node_is_left_out_and_the_others_come(theirs, ours, tmp_path, capsys):
    assert export(theirs, tmp_path / "a.tar") == 0
    files = contents(tmp_path / "a.tar")
    name = f"{FOLDER}/metrics.csv"
    files[name] = files[name].replace(b"1", b"2")
    archive = write_tar(tmp_path / "b.tar", files)
    assert main(["verify", str(archive)]) == 1
    assert f"{name}: its checksum is not that in SHA256SUMS" in capsys.readouterr().out
    assert take(ours, archive) == 1
    out = capsys.readouterr().out
    assert f"corrupt: {TRAIN.key}: metrics.csv: its checksum is not that in SHA256SUMS" in out
    assert not RunStore(ours).has(TRAIN)
    assert sum(RunStore(ours).has(n) for n in GRAPH.nodes) == len(GRAPH.nodes) - 1
    assert temporaries(ours) == []
    assert verified(ours)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["state-110.safetensors", "node.json", "metrics.csv", "SHA256SUMS"])
def test_a_pickle_is_never_run(theirs, ours, tmp_path, name, capsys):
    assert export(theirs, tmp_path / "a.tar") == 0
    files = contents(tmp_path / "a.tar")
    node = {n: c for n, c in files.items() if n.startswith(FOLDER) or n == "store.json"}
    node[f"{FOLDER}/{name}"] = pickle.dumps(Payload(tmp_path / "run"))
    if name != "SHA256SUMS":
        with_sums(node)
    capsys.readouterr()
    for already in (False, True):
        assert take(ours, write_tar(tmp_path / "b.tar", node)) == 1
        assert f"corrupt: {TRAIN.key}: {name}: " in capsys.readouterr().out
        assert not (tmp_path / "run").exists()
        assert RunStore(ours).has(TRAIN) == already
        put(RunStore(ours), TRAIN)


def with_sums(files: dict[str, bytes]) -> dict[str, bytes]:
    """Lists the files of TRAIN as they are now."""
    node = {n.removeprefix(f"{FOLDER}/"): c for n, c in files.items() if n.startswith(FOLDER)}
    sums = {n: hashlib.sha256(c).hexdigest() for n, c in node.items() if n != "SHA256SUMS"}
    files[f"{FOLDER}/SHA256SUMS"] = sums_text(sums).encode()
    return files


def odd(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


OUTSIDE = [
    odd("../x"),
    odd("nodes/../../x"),
    odd(FOLDER, tarfile.SYMTYPE, "/tmp"),
    odd(f"{FOLDER}/metrics.csv", tarfile.SYMTYPE, "../../../../x"),
    odd(f"{FOLDER}/metrics.csv", tarfile.LNKTYPE, "/etc/passwd"),
    odd(f"{FOLDER}/metrics.csv", tarfile.CHRTYPE),
    odd(f"{FOLDER}/metrics.csv", tarfile.FIFOTYPE),
]
"""What tarfile's data filter refuses."""

INSIDE = [
    odd(f"{FOLDER}/sub/node.json"),
    odd(f"{FOLDER}/code.py"),
    odd(f"{FOLDER}/times.csv", tarfile.SYMTYPE, "metrics.csv"),
    odd(f"{FOLDER}/state-1{'0' * 20}.safetensors"),
]
"""What no node holds."""


def name_of(member: tarfile.TarInfo) -> str:
    return f"{member.name.removeprefix(FOLDER)!r} {member.type.decode()}"


@pytest.mark.parametrize("member", [*OUTSIDE, *INSIDE], ids=name_of)
def test_what_no_store_holds_is_not_adopted(theirs, ours, tmp_path, member, capsys):
    assert export(theirs, tmp_path / "a.tar") == 0
    files = contents(tmp_path / "a.tar")
    node = {n: c for n, c in files.items() if n == "store.json" or n.startswith(FOLDER)}
    node.pop(member.name, None)
    archive = write_tar(tmp_path / "b.tar", node, member)
    outside = sorted(tmp_path.iterdir())
    capsys.readouterr()
    if member in OUTSIDE:
        assert take(ours, archive) == 2
        assert str(archive) in one_line(capsys)
        assert not ours.exists()
    else:
        assert take(ours, archive) == 1
        assert f"corrupt: {TRAIN.key}: " in capsys.readouterr().out
        assert not RunStore(ours).has(TRAIN)
        assert temporaries(ours) == []
    assert sorted({*tmp_path.iterdir()} - {ours}) == outside


def test_other_files_stay_behind(theirs, ours, tmp_path):
    assert export(theirs, tmp_path / "a.tar") == 0
    files = contents(tmp_path / "a.tar") | {"cache/0/x.so": b"code", "figures/x.py": b"", f"{FOLDER}/.hidden": b""}
    assert take(ours, write_tar(tmp_path / "b.tar", files)) == 0
    assert tree(ours) == tree(theirs)
    assert os.listdir(ours / "figures") == os.listdir(theirs / "figures")
    assert os.listdir(ours / "cache") == []


def test_truncated_anywhere(theirs, ours, tmp_path, capsys):
    assert export(theirs, tmp_path / "a.tar", "--no-states") == 0
    capsys.readouterr()
    content = (tmp_path / "a.tar").read_bytes()
    end = len(content.rstrip(b"\0"))
    for cut in [0, 100, 512, 700, *range(1024, end, 2900), -(-end // 512) * 512]:
        (tmp_path / "b.tar").write_bytes(content[:cut])
        assert take(ours, tmp_path / "b.tar") == 2
        assert str(tmp_path / "b.tar") in one_line(capsys)
    assert not ours.exists()
    assert take(ours, tmp_path / "a.tar") == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": 99}', "written in format 99, this version reads format 3"),
        (b'{"format": 1}', "written in format 1,"),
        (b'{"format": 2}', "written in format 2,"),
        (b"{}", "not a store"),
        (b"[" * 100_000, "not a store"),
        (b"\xff", "not a store"),
    ],
)
def test_a_store_of_another_format(ours, tmp_path, content, says, capsys):
    assert take(ours, write_tar(tmp_path / "a.tar", {"store.json": content})) == 2
    assert says in one_line(capsys)
    assert not ours.exists()


@pytest.mark.parametrize("depth", [900, 980, 3000, 1_000_000])
def test_json_that_is_nested_too_deeply(theirs, ours, tmp_path, depth, capsys):
    assert export(theirs, tmp_path / "a.tar") == 0
    files = contents(tmp_path / "a.tar")
    capsys.readouterr()
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    node = {n: c for n, c in files.items() if n == "store.json" or n.startswith(FOLDER)}
    about = json.loads(node[f"{FOLDER}/node.json"])
    about["spec"]["more"] = 0
    node[f"{FOLDER}/node.json"] = json.dumps(about).encode().replace(b'"more": 0', b'"more": ' + deep)
    assert take(ours, write_tar(tmp_path / "b.tar", with_sums(node))) == 1
    assert f"corrupt: {TRAIN.key}: node.json" in capsys.readouterr().out
    record = {"store.json": files["store.json"], "figures/A2.json": b'{"reads": ' + deep + b"}"}
    assert take(ours, write_tar(tmp_path / "b.tar", record)) == 1
    assert "corrupt: A2.json: not a record of a figure" in capsys.readouterr().out


def test_sources_that_are_none(theirs, ours, tmp_path, capsys):
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for source in ("junk", "empty", "nowhere"):
        assert take(ours, tmp_path / source) == 2
        assert source in one_line(capsys)
    assert not ours.exists()
    assert take(theirs, theirs) == 2
    assert "is the store itself" in one_line(capsys)
    assert export(theirs, tmp_path / "none" / "a.tar") == 2
    assert f"there is no folder {tmp_path / 'none'}" in one_line(capsys)


@pytest.mark.parametrize("what", ["link", "pipe", "link to a folder", "unknown", "unlisted"])
def test_a_folder_is_not_trusted_either(theirs, ours, tmp_path, what, capsys):
    folder = RunStore(theirs).path(TRAIN)
    path = folder / "metrics.csv"
    if what == "link to a folder":
        folder.rename(tmp_path / "away")
        folder.symlink_to(tmp_path / "away")
    elif what in ("link", "pipe"):
        path.rename(tmp_path / "away")
        path.symlink_to(tmp_path / "away") if what == "link" else os.mkfifo(path)
    else:
        (folder / ("code.py" if what == "unknown" else "state-5.safetensors")).write_text("")
    assert take(ours, theirs) == 1
    assert f"corrupt: {TRAIN.key}: " in capsys.readouterr().out
    assert not RunStore(ours).has(TRAIN)
    assert sum(RunStore(ours).has(n) for n in GRAPH.nodes) == len(GRAPH.nodes) - 1
    assert temporaries(ours) == []


def test_what_is_gained_is_listed(theirs, tmp_path):
    store = RunStore(tmp_path / "ours")
    put(store, EVAL[0])
    put(RunStore(theirs), EVAL[0], (7,))
    assert take(store.root, theirs) == 0
    assert "state-7.safetensors" in read_sums(store.path(EVAL[0]))


def describe(store: Path, node, **result) -> None:
    """Changes what a node says came out, sums included."""
    folder = RunStore(store).path(node)
    about = json.loads((folder / "node.json").read_text())
    about["result"] |= result
    (folder / "node.json").write_text(json.dumps(about))
    sums = read_sums(folder)
    (folder / "SHA256SUMS").write_text(
        sums_text(sums | {"node.json": hashlib.sha256((folder / "node.json").read_bytes()).hexdigest()})
    )


def test_another_result_is_a_conflict_though_all_files_agree(theirs, tmp_path, capsys):
    other = put_all(tmp_path / "other").root
    describe(other, TRAIN, accuracy=0.999)
    before = tree(theirs)
    assert take(theirs, other) == 1
    assert f"conflict: {TRAIN.key}: node.json differs (ours by " in capsys.readouterr().out
    assert tree(theirs) == before


def test_what_was_timed_is_no_result(tmp_path, capsys):
    """The latency of a network without some filters differs from machine to machine."""
    for name in ("here", "elsewhere"):
        put(RunStore(tmp_path / name), FILTERS, by=name)
    assert take(tmp_path / "here", tmp_path / "elsewhere") == 0
    assert "1 the same" in capsys.readouterr().out


NONSENSE = [(TRAIN, {"accuracy": "x"}), (TRAIN, {"epochs": True}), (PRUNE, {"density": None}), (PRUNE, {"kept": "8"})]


@pytest.mark.parametrize(("node", "result"), NONSENSE)
def test_a_result_that_no_figure_could_read_is_refused(theirs, ours, node, result, capsys):
    describe(theirs, node, **result)
    assert take(ours, theirs) == 1
    assert f"{node.key}: node.json: its result's {next(iter(result))} is " in capsys.readouterr().out
    assert not verified(theirs)
    assert "CORRUPT" in ls(theirs, capsys)


def ls(store: Path, capsys) -> str:
    capsys.readouterr()
    assert main(["ls", "--store", str(store)]) == 1
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n\n", "epoch\n1\n", "epoch,val_accuracy\n1,0.5\n3,0.5\n", "val_accuracy,epoch\n0.5,1\n"),
        *(f"epoch,val_accuracy\n{epoch},0.5\n" for epoch in ("inf", "9" * 400, "nan", "1.5")),
    ],
)
def test_metrics_that_no_figure_could_read_are_refused(theirs, ours, text, capsys):
    folder = RunStore(theirs).path(TRAIN)
    (folder / "metrics.csv").write_text(text)
    sums = read_sums(folder) | {"metrics.csv": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "SHA256SUMS").write_text(sums_text(sums))
    assert take(ours, theirs) == 1
    assert f"{TRAIN.key}: metrics.csv: it" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk_is_one_line_and_what_came_is_complete(theirs, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", small], check=False).returncode:
        pytest.skip("no tmpfs here")
    try:
        assert take(small / "store", theirs) == 2
        assert "No space left on device" in one_line(capsys)
        assert verified(small / "store")
        assert temporaries(small / "store") == []
    finally:
        subprocess.run(["umount", small], check=True)
