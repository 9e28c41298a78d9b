"""compile.py: a training of a store as a file that other programs run."""

import pytest
import torch

from fastprune import sparse
from fastprune.cli.compile import main
from fastprune.files import read_tensors
from fastprune.store.listing import Found, node_folders, read_node
from fastprune.study.deploy import network


@pytest.fixture(scope="module")
def store(small_figure):
    return small_figure / "store"


def kind(folder) -> str:
    node = read_node(folder)
    assert isinstance(node, Found)
    return node.kind


def trainings(store, stored: bool) -> list[str]:
    """Keys of trainings with, or without, stored weights."""
    found = [folder for folder in node_folders(store) if kind(folder) == "train"]
    return sorted(f.name for f in found if bool(list(f.glob("state-*.safetensors"))) == stored)


def test_each_format_holds_the_trained_network(store, tmp_path, capsys):
    key = trainings(store, True)[0]
    [file] = list((store / "nodes" / key[:2] / key).glob("state-*.safetensors"))
    stored = {n.removeprefix("model."): t for n, t in read_tensors(file)[0].items()}
    for name in ("net.fastprune", "half.fastprune", "net.pth"):
        half = ["--half"] if name.startswith("half") else []
        assert main([key[:12], "--store", str(store), "--out", str(tmp_path / name), "--size", "32", *half]) == 0
        said = capsys.readouterr().out
        assert said.startswith(str(tmp_path / name))
        assert f"{(tmp_path / name).stat().st_size:,} bytes" in said
    plain = torch.load(tmp_path / "net.pth", weights_only=True)
    assert plain.keys() == stored.keys()
    assert all(torch.equal(plain[n], t) for n, t in stored.items())
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(store, key)[0](images)
    for name, bound in (("net.fastprune", 1e-5), ("half.fastprune", 1e-2)):
        found = sparse.load(tmp_path / name)(images)
        assert (found - expected).abs().max() <= bound * expected.abs().max()
    assert (tmp_path / "half.fastprune").stat().st_size < (tmp_path / "net.fastprune").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.fastprune", "net.fastprune", "net.pth"]


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(store, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    key = trainings(store, True)[0]
    assert main([key, "--store", str(store), "--out", str(tmp_path / "net.onnx"), "--size", "32"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = network(store, key)[0](images)
        [found] = session.run(None, {"images": images.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_written_is_one_line(store, tmp_path, capsys):
    key, bare = trainings(store, True)[0], trainings(store, False)[0]
    prune = next(f.name for f in node_folders(store) if kind(f) == "prune")
    out = str(tmp_path / "net.pth")
    for arguments, reason in (
        ([bare, "--out", out], "has stored no weights"),
        ([prune, "--out", out], "is a prune step"),
        (["zz", "--out", out], "no node has a key that begins with 'zz'"),
        ([key, "--out", str(tmp_path / "net.txt")], "choose one of NAME.fastprune"),
        ([key, "--out", out, "--half"], "--half is for .fastprune files"),
        ([key, "--out", str(tmp_path / "no" / "net.pth")], "there is no folder"),
    ):
        assert main([arguments[0], "--store", str(store), *arguments[1:]]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert reason in said.err
        assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert main([key, "--store", str(tmp_path / "nowhere"), "--out", out]) == 2
    assert "no store at" in capsys.readouterr().err
