"""compile.py: a trained network of a checkpoint or a store as a file that other programs run."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from fastprune import Pruner, sparse
from fastprune.cli import train
from fastprune.cli.compile import main
from fastprune.files import read_tensors
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import ModelSpec
from fastprune.store.listing import Found, node_folder, node_folders, read_node
from fastprune.study.deploy import of_checkpoint, of_node
from fastprune.study.share import Shared, write_folder
from fastprune.training import classification as train_run
from fastprune.training.about import Cost, Inputs
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
        expected = of_node(store, key).model(images)
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
            expected = of_node(store, key).model(images)
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
    spec, data = ModelSpec("resnet18", 3), SyntheticData(3, 24, 8, size=40).manifest()
    inputs = Inputs(data.name, data.classes, data.height, data.width, data.mean, data.std)
    model = build(spec).eval()
    Pruner(model).prune(0.9)
    cost = Cost(2, 1_000_000, 5000.0, ("a GPU",))
    versions = {"torch": "2"}
    write_folder(folder, model, Shared(spec, inputs, 0.5, 24, 7, cost, cost, "trained", ("x",), versions))
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
    models = {ours: of_node(store, key).model, theirs: share_torchvisions(theirs)}
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
    # The vectors decide how sums round.
    assert node.provenance["device"].endswith(f", {torch.backends.cpu.get_cpu_capability()})")
    assert node.provenance["device"] in card
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


# ---------------------------------------------------------------- checkpoints of train.py

NAME, CLASSES = "shufflenet_v2_x0_5", ('a "quoted" class', "b", "c")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of images that differ in size."""
    root, g = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, each in (("train", 8), ("val", 3)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = g.integers(0, 256, (*g.integers(40, 60, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def arguments(photos: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--train-crop-size", "32", "--val-resize-size", "40", "--val-crop-size", "36"]
    basic = ["--data-path", str(photos), "--model", NAME, "-b", "8", "--lr", "0.05", "-j", "0", "--device", "cpu"]
    return [*basic, *sizes, "--loader", "torchvision", "--output-dir", str(out), *more]


@pytest.fixture(scope="module")
def dense(photos, tmp_path_factory) -> Path:
    """An epoch of three batches. Not to be changed, as those below."""
    out = tmp_path_factory.mktemp("dense")
    assert train.main(arguments(photos, out, "--epochs", "1")) == 0
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def sparse_args(photos, dense, tmp_path_factory) -> list[str]:
    """A pruned training with a moving average that begins with the weights of the dense one, killed after one of two
    epochs: its command."""
    out = tmp_path_factory.mktemp("sparse")
    more = ["--epochs", "2", "--model-ema", "--model-ema-steps", "1", "--resume", str(dense), "--sparsity", "0.5"]
    given = arguments(photos, out, *more)
    with pytest.MonkeyPatch.context() as patch:
        save = train_run.save_checkpoint

        def save_and_stop(*args):
            save(*args)
            raise KeyboardInterrupt

        patch.setattr(train_run, "save_checkpoint", save_and_stop)
        assert train.main(given) == 130
    return given


@pytest.fixture(scope="module")
def pruned(sparse_args) -> Path:
    """The checkpoint of that training, finished by a resumed run."""
    path = Path(sparse_args[sparse_args.index("--output-dir") + 1]) / "checkpoint.pth"
    assert train.main([*sparse_args, "--resume", str(path)]) == 0
    return path


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def expected(path: Path, averaged: bool = False, name: str = NAME) -> nn.Module:
    """The network of a checkpoint, as a user of plain torchvision makes it."""
    content, model = content_of(path), torchvision.models.get_model(name, num_classes=len(CLASSES)).eval()
    state = content["model"]
    if averaged:
        state = {n.removeprefix("module."): t for n, t in content["model_ema"].items() if n != "n_averaged"}
    model.load_state_dict(state)
    return model


def logits(model, side: int = 36):
    images = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "ema"])
def test_a_state_dict_holds_the_network_of_a_checkpoint(averaged, pruned, tmp_path, capsys):
    """Torchvision's network with it gives the logits of that with the checkpoint's weights, to the bit."""
    ema, model = ["--ema"] * averaged, expected(pruned, averaged)
    assert main([str(pruned), "--out", str(tmp_path / "net.pth"), *ema]) == 0
    assert "weights after epoch 2, 50.00% of 333,840 conv weights kept; " in capsys.readouterr().out
    plain = torchvision.models.get_model(NAME, num_classes=len(CLASSES)).eval()
    plain.load_state_dict(content_of(tmp_path / "net.pth"))
    assert torch.equal(logits(plain), logits(model))
    assert not torch.equal(logits(model), logits(expected(pruned, not averaged)))


@pytest.mark.slow
def test_a_compiled_file_holds_the_network_of_a_checkpoint(tmp_path, capsys):
    """It computes to the bit what sparse.compile makes of that network, which is the network but for rounding."""
    network = torchvision.models.resnet18(num_classes=len(CLASSES))
    Pruner(network, kinds="conv").prune(to=0.95)
    content = {"model": network.state_dict(), "epoch": 0, "args": {"model": "resnet18", "val_crop_size": 32}}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert main([str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "net.fastprune")]) == 0
    assert " 5.00% of 11,166,912 conv weights kept, images of 32 x 32; " in capsys.readouterr().out
    model = expected(tmp_path / "checkpoint.pth", name="resnet18")
    found, wanted = logits(sparse.load(tmp_path / "net.fastprune"), 32), logits(model, 32)
    assert torch.equal(found, logits(sparse.compile(model, torch.zeros(1, 3, 32, 32)), 32))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_compiled_file_says_what_torch_computes(pruned, tmp_path, capsys):
    assert main([str(pruned), "--out", str(tmp_path / "net.fastprune")]) == 0
    said, size = capsys.readouterr().out, (tmp_path / "net.fastprune").stat().st_size
    assert re.search(r"; torch computes .*aten\.conv2d \(in groups\)", said)
    dense = sum(t.numel() * t.element_size() for t in content_of(pruned)["model"].values())
    assert f"{size:,} bytes, {size / dense:.1%} of the dense state dict; " in said
    # Half of the conv weights are kept, at five bytes instead of four.
    assert size < 0.75 * dense
    found, wanted = logits(sparse.load(tmp_path / "net.fastprune")), logits(expected(pruned))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_onnx_runtime_computes_the_network_of_a_checkpoint(pruned, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main([str(pruned), "--out", str(tmp_path / "net.onnx"), "--size", "48"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found = logits(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), 48)
    wanted = logits(expected(pruned), 48)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_a_checkpoint_of_a_model_of_timm(photos, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    name = "mobilenetv3_small_050"
    given = ["--model", f"timm/{name}", "--epochs", "1", "--sparsity", "0.5", "--prune", "all"]
    assert train.main(arguments(photos, tmp_path, *given)) == 0
    path, out = tmp_path / "checkpoint.pth", tmp_path / "shared"
    assert main([str(path), "--out", str(out), "--format", "huggingface"]) == 0
    model = timm.create_model(name, num_classes=len(CLASSES)).eval()
    model.load_state_dict(content_of(path)["model"])
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert (config["architecture"], config["density"]) == (name, pytest.approx(0.5, abs=1e-6))
    # Masks cover linear layers, too.
    assert "classifier" in config["density_by_layer"]
    assert "50.00% of its weights" in card
    monkeypatch.chdir(out)
    names: dict = {}
    exec(code_of(card), names)
    assert torch.equal(logits(names["model"]), logits(model))


def shared(path: Path, out: Path, *more: str) -> tuple[str, dict]:
    """(card, configuration) of the folder that is written."""
    assert main([str(path), "--out", str(out), "--format", "huggingface", *more]) == 0
    return (out / "README.md").read_text(), json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "ema"])
def test_a_checkpoints_card_runs_and_says_what_it_cost(
    averaged, photos, dense, sparse_args, pruned, tmp_path, monkeypatch
):
    yaml, ema = pytest.importorskip("yaml"), ["--ema"] * averaged
    out, about = tmp_path / "net", content_of(pruned)["about"]
    card, config = shared(pruned, out, "--license", "mit", *ema)

    names: dict = {}
    monkeypatch.chdir(out)
    assert "fastprune" not in code_of(card)
    exec(code_of(card), names)
    assert torch.equal(logits(names["model"]), logits(expected(pruned, averaged)))
    # The images, prepared as the card says, give the accuracy that the run has measured and the card states.
    files = sorted((photos / "val").glob("*/*.png"))
    batch = torch.stack([names["transform"](Image.open(file)) for file in files])
    assert batch.shape == (9, 3, 36, 36)
    with torch.no_grad():
        labels = names["model"](batch).argmax(1)
    accuracy = sum(CLASSES[label] == file.parent.name for label, file in zip(labels, files, strict=True)) / 9
    assert accuracy == about["ema_accuracy" if averaged else "accuracy"]
    told = yaml.safe_load(card.split("---\n")[1])
    assert told["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(accuracy, rel=1e-5)
    assert (told["library_name"], told["license"], told["datasets"]) == ("torchvision", "mit", ["photos"])

    assert f"{accuracy:.2%} on 9 validation images, after epoch 2" in card
    assert config["label_names"] == list(CLASSES)
    assert config["pretrained_cfg"]["input_size"] == [3, 36, 36]
    assert config["pretrained_cfg"]["crop_pct"] == 0.9
    assert config["density"] == 0.5
    # An epoch is 24 images: two epochs of this training, which was resumed, after one of the dense training.
    assert re.search(r"^\| this one \| 1 \| 48 \| [\d.]+ s \| cpu \(\w+, \w+\) \|$", card, re.MULTILINE)
    assert re.search(r"^\| with all that led to it \| 2 \| 72 \| [\d.]+ s \| cpu \(\w+, \w+\) \|$", card, re.MULTILINE)
    begun = [*arguments(photos, dense.parent, "--epochs", "1")], sparse_args, [*sparse_args, "--resume", str(pruned)]
    export = ["compile.py", str(pruned), *ema, "--format", "huggingface", "--license", "mit", "--out", "net"]
    commands = [*(["train.py", *given] for given in begun), export]
    assert card.endswith("```\n" + "\n".join(map(shlex.join, commands)) + "\n```\n")
    assert f"torch {torch.__version__}" in card


def test_a_card_says_where_its_cost_is_not_all(photos, dense, tmp_path):
    content = content_of(dense)
    del content["about"]
    torch.save(content, tmp_path / "old.pth")
    torch.save(content["model"], tmp_path / "weights.pth")
    for file, more, rows in (
        ("old.pth", ["--epochs", "2"], ("| this one, as far as recorded | 1 | 24 |",)),
        ("weights.pth", ["--epochs", "1"], ("| this one | 1 | 24 |",)),
    ):
        out = tmp_path / file.removesuffix(".pth")
        assert train.main(arguments(photos, out, *more, "--resume", str(tmp_path / file))) == 0
        card, _ = shared(out / "checkpoint.pth", out / "net")
        for row in (*rows, "| with all that led to it, as far as recorded | 1 | 24 |"):
            assert row in card


def test_a_file_is_not_taken_for_a_key(store, dense, tmp_path, monkeypatch, capsys):
    """A name that a file has, or that ends in .pth, is a file."""
    key = trainings(store, True)[0]
    monkeypatch.chdir(tmp_path)
    Path(key[:12]).write_bytes(dense.read_bytes())
    assert main([key[:12], "--out", "of_file.pth"]) == 0
    assert content_of(Path("of_file.pth")).keys() == content_of(dense)["model"].keys()
    capsys.readouterr()
    assert main([key[:12] + ".pth", "--out", "net.pth"]) == 2
    assert f"no such checkpoint: {key[:12]}.pth" in capsys.readouterr().err
    assert main([key[:13], "--store", str(store), "--out", "of_node.pth"]) == 0
    assert content_of(Path("of_node.pth")).keys() == of_node(store, key).model.state_dict().keys()


def test_checkpoints_without_a_record(dense, tmp_path, capsys):
    """Of an earlier fastprune, and of torchvision's reference script."""
    content = content_of(dense)
    del content["about"]
    theirs = {"model": content["model"], "epoch": 0, "args": argparse.Namespace(model=NAME, val_crop_size=36)}
    for name, kept in (("old.pth", content), ("theirs.pth", theirs)):
        torch.save(kept, tmp_path / name)
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out.pth")]) == 0
        assert "100.00% of 333,840 conv weights kept" in capsys.readouterr().out
        written = content_of(tmp_path / "out.pth")
        assert all(torch.equal(written[n], t) for n, t in content["model"].items())
        assert of_checkpoint(tmp_path / name).size == (36, 36)


def test_what_a_checkpoint_lacks_is_one_line_and_leaves_nothing(store, dense, tmp_path, capsys):
    content = content_of(dense)
    args = {name: value for name, value in content["args"].items() if name not in ("model", "val_crop_size")}
    old = {name: value for name, value in content.items() if name != "about"}
    files = {
        "old": old,
        "sizeless": old | {"args": args | {"model": NAME}},
        "nameless": content | {"args": args},
        "weights": content["model"],
        "resnet": content | {"args": args | {"model": "resnet18"}},
        "unknown": content | {"args": args | {"model": "resnet19"}},
        "spoilt": content | {"about": {"inputs": {}}},
        "empty": content | {"model": {}},
    }
    for name, kept in files.items():
        torch.save(kept, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    key, before = trainings(store, True)[0], sorted(tmp_path.iterdir())
    net, pth = ["--out", str(tmp_path / "out.fastprune")], ["--out", str(tmp_path / "out.pth")]
    folder = ["--out", str(tmp_path / "out"), "--format", "huggingface"]
    for name, more, reason in (
        ("old", folder, "has no entry 'about', which a model card needs"),
        ("sizeless", net, "does not say how large its images are: give --size PIXELS"),
        ("nameless", pth, "does not say of which model it is ('args' has no 'model')"),
        ("weights", pth, "is no checkpoint of train.py"),
        ("resnet", pth, "is of another architecture than resnet18"),
        ("unknown", pth, "torchvision has no model resnet19"),
        ("spoilt", pth, "is damaged or foreign"),
        ("empty", pth, "is damaged or foreign"),
        ("text", pth, "is no checkpoint that loads"),
        ("missing", pth, "no such checkpoint"),
        ("old", [*pth, "--ema"], "has no moving average: leave --ema out"),
        ("old", [*folder, "--ema"], "has no moving average: leave --ema out"),
        ("old", [*pth, "--store", str(store)], "--store is for the key of a training"),
        ("old", ["--out", str(tmp_path / "old.pth")], "is the checkpoint itself"),
    ):
        assert main([str(tmp_path / f"{name}.pth"), *more]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert reason in said.err
        assert said.err.count("\n") == 1
    assert main([key, "--store", str(store), *pth, "--ema"]) == 2
    assert "--ema is for a checkpoint of train.py" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert content_of(tmp_path / "old.pth").keys() == old.keys()
