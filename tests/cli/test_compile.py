"""compile.py: a training of a store as a file that other programs run."""

import json
import re
import subprocess
import sys

import pytest
import torch

from fastprune import Pruner, sparse
from fastprune.cli.compile import main
from fastprune.files import read_tensors
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import ModelSpec
from fastprune.store.listing import Found, node_folder, node_folders, read_node
from fastprune.study.deploy import network
from fastprune.study.share import Cost, Shared, write_folder
from fastprune.training.models import build
from tests.small_figure import ROOT


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
        expected = network(store, key).model(images)
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
            expected = network(store, key).model(images)
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


SHOW = """
import numpy as np
torch.set_num_threads(1)
shown = transform(np.arange(3 * side * side, dtype=np.uint8).reshape(side, side, 3))
with torch.no_grad():
    torch.save((model(torch.load(images)), shown), out)
"""


def code_of(card: str) -> str:
    """The Python that a model card shows."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE))


def share_torchvisions(folder):
    """A folder with a pruned ResNet-18 of torchvision's size; returns the network."""
    spec, data = ModelSpec("resnet18", 3), SyntheticData(3, 24, 8, size=40)
    model = build(spec).eval()
    Pruner(model).prune(0.9)
    cost = Cost(2, 1_000_000, 5000.0, ("a GPU",))
    versions = {"torch": "2"}
    write_folder(folder, model, Shared(spec, data.manifest(), 0.5, 24, 7, cost, cost, "trained", ("x",), versions))
    return model


def here(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def in_a_new_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


@pytest.mark.parametrize("run", [here, pytest.param(in_a_new_process, marks=pytest.mark.slow)])
def test_a_shared_folder_is_loaded_by_what_its_card_says(run, store, tmp_path, capsys, monkeypatch):
    """To the bit, as a reader of the card would."""
    key = trainings(store, True)[0]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    arguments = [key[:12], "--store", str(store), "--format", "huggingface", "--license", "mit", "--out", str(ours)]
    assert main(arguments) == 0
    assert f"huggingface-cli upload YOUR-NAME/ours {ours}" in capsys.readouterr().out
    models = {ours: network(store, key).model, theirs: share_torchvisions(theirs)}
    batch, before = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    torch.save(batch, tmp_path / "images.pt")
    # fastprune itself is not installed where a folder lies: the second network is torchvision's, and needs none.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder, model in models.items():
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        side = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][1]
        code = code_of((folder / "README.md").read_text())
        assert ("fastprune" in code) == (folder == ours)
        monkeypatch.chdir(folder)
        try:
            run(f"side, images, out = {side}, '../images.pt', '../out.pt'\n{code}\n{SHOW}")
            logits, shown = torch.load(tmp_path / "out.pt")
            torch.set_num_threads(1)
            with torch.no_grad():
                assert torch.equal(logits, model(batch))
        finally:
            torch.set_num_threads(before)
        pixels = torch.arange(side * side * 3, dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)
        # Generated images: mean 0.5, standard deviation 0.25.
        assert torch.allclose(shown, (pixels / 255 - 0.5) / 0.25, atol=1e-6)


def test_the_card_says_what_the_store_knows(store, tmp_path):
    yaml = pytest.importorskip("yaml")
    key = next(k for k in trainings(store, True) if read_node(node_folder(store, k)).spec["mask"])
    node = read_node(node_folder(store, key))
    mask = read_node(node_folder(store, node.spec["mask"]))
    out = tmp_path / "net"
    out.mkdir()  # an empty folder will do
    assert main([key, "--store", str(store), "--format", "huggingface", "--out", str(out)]) == 0
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "other"
    assert told["datasets"] == ["synthetic"]
    assert told["metrics"] == ["accuracy"]
    assert told["pipeline_tag"] in told["tags"]
    [result] = told["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(node.result["accuracy"], rel=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["density"] == mask.result["density"]
    ratios = mask.result["layerwise_ratios"]
    assert config["density_by_layer"] == {n.removesuffix(".weight"): pytest.approx(1 - r) for n, r in ratios.items()}
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert (config["architecture"], config["num_classes"], len(config["label_names"])) == ("resnet18", 3, 3)
    rows = dict(re.findall(r"^\| ([\w.]+) \|.* \| ([\d.]+)% \|$", card, re.MULTILINE))
    assert {n: float(r) for n, r in rows.items() if n != "fc"} == {
        n.removesuffix(".weight"): pytest.approx(100 * r, abs=0.006) for n, r in ratios.items()
    }
    assert rows["fc"] == "0.00"
    # 3 classes of 24 images in 2 epochs; and the dense run before, of which the mask was made.
    assert "| this one | 1 | 144 |" in card
    assert "| with all that led to it | 2 | 288 |" in card
    assert f"compile.py {key} --format huggingface" in card
    assert node.provenance["host"] not in card.replace(node.provenance["device"], "")


def test_what_cannot_be_shared_is_one_line_and_leaves_nothing(store, tmp_path, capsys):
    key, full = trainings(store, True)[0], tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    hugging = ["--format", "huggingface", "--out", str(tmp_path / "new")]
    for arguments, reason in (
        (["--format", "huggingface", "--out", str(full)], "has files already"),
        ([*hugging, "--half"], "are for files"),
        ([*hugging, "--size", "32"], "are for files"),
        (["--out", str(tmp_path / "net.pth"), "--license", "mit"], "--license is for"),
        (["--format", "huggingface", "--out", str(tmp_path / "no" / "new")], "there is no folder"),
    ):
        assert main([key, "--store", str(store), *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert reason in said.err
        assert said.err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]
