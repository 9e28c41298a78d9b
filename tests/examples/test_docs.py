"""The snippets of all pages: Python runs as it stands, a page's snippets one after the other; commands are parsed.

A page needs no entry here. HERE gives a page what its text presumes, and CHECKS looks at what its snippets have left.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import fastprune
from fastprune.cli import compile as compile_network
from fastprune.cli import train
from fastprune.cli.__main__ import COMMANDS
from fastprune.figures import FIGURES
from fastprune.loaders import Crop, find_or_prepare, open_data
from fastprune.pruning import criteria
from fastprune.training.about import About, History, Inputs
from fastprune.training.classification import MEAN, STD

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md"))
)
SLOW = {  # they compile, export or train
    "docs/deploy.md",
    "docs/own-model.md",
    "docs/sparse.md",
    "docs/train.md",
    "docs/tutorial.md",
}
# Programs of others, whose arguments are not ours to check.
OTHERS = {"cd", "exec", "git", "huggingface-cli", "pip", "ray", "source"}


class Fence(NamedTuple):
    language: str
    code: str
    line: int


def fences(page: str) -> list[Fence]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Fence(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_says_what_it_is(page):
    known = {"python", "sh", "text", "{eval-rst}", "{toctree}"}
    assert {f"{page}:{f.line}: {f.language}" for f in fences(page) if f.language not in known} == set()


# ---- commands -------------------------------------------------------------------------------------------------------


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell snippet, as lists of arguments, without comments and without NAME=VALUE before them."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"[A-Z_]+=", command[0]):
                del command[0]
            yield command


def parse(command: list[str]) -> None:
    """Raises InputError or AssertionError unless the command is one of ours with arguments that it takes."""
    program, *rest = command
    if program in OTHERS:
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
        return
    if program == "torchrun":
        rest = rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :]
    elif program == "fastprune":
        rest = [f"scripts/{rest[0]}.py", *rest[1:]]
    else:
        assert program in ("python", ".venv/bin/python"), f"what is {program}?"
    script, *arguments = rest
    assert (ROOT / script).is_file()
    if not script.startswith("scripts/"):
        return
    name = Path(script).stem
    assert name in COMMANDS
    module = import_module(f"fastprune.cli.{name}")
    args = module.parser().parse_args(arguments)
    if name == "train":  # flags that contradict each other, or are not supported
        module.request_of(args)


@pytest.mark.parametrize("page", [page for page in PAGES if any(f.language == "sh" for f in fences(page))])
def test_commands_take_their_arguments(page):
    for fence in fences(page):
        if fence.language == "sh":
            for command in commands(fence.code):
                try:
                    parse(command)
                except Exception as error:
                    pytest.fail(f"{page}:{fence.line}: {shlex.join(command)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "python scripts/train.py --data-path photos --sparsty 0.9",
        "torchrun --nproc_per_node 8 scripts/train.py --data-path photos --amp-dtype fp16",
        "FIG=A2 fastprune reproduce --fig",
        "cd fastprune && make everything",
        "python scripts/nothing.py",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, fastprune.InputError)):
        any(map(parse, commands(line)))


# ---- Python ---------------------------------------------------------------------------------------------------------


def mask_of_a_store(folder: Path) -> None:
    pruner = fastprune.Pruner(torch.nn.Linear(5, 3), verbose=False)
    pruner.prune(n=4)
    where = folder / "runs/nodes/..."  # as the page writes it
    where.mkdir(parents=True)
    pruner.mask.save(where / "mask.safetensors")
    torch.save(pruner.masks["weight"], folder / "expected.pt")


def run_commands(code: str) -> None:
    """Runs those commands of a shell snippet that train or test, for one epoch, or compile; figures have tests of their
    own."""
    for command in commands(code):
        if command[1:2] == ["scripts/train.py"]:
            # The portable loader compiles nothing.
            assert train.main([*command[2:], "--epochs", "1", "--loader", "torchvision", "--workers", "0"]) == 0
        elif command[1:2] == ["scripts/compile.py"]:
            assert compile_network.main(command[2:]) == 0


INPUTS = Inputs("photos", tuple("abcdefghij"), 64, 64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resize=72)


def a_checkpoint_and_a_photo(folder: Path) -> None:
    (folder / "sparse").mkdir()
    about = About(INPUTS, History(), 10, 0.5, None, {})
    torch.save({"model": {}, "about": about.plain()}, folder / "sparse/checkpoint.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")


HERE: dict[str, Callable[[Path], None]] = {
    "docs/clusters.md": mask_of_a_store,
    "docs/deploy.md": a_checkpoint_and_a_photo,
}


def after_readme(names: dict[str, Any], folder: Path, out: str) -> None:
    pruner = names["pruner"]
    assert pruner.kept == pruner.total - round(0.2 * pruner.total)


def after_pruning(names: dict[str, Any], folder: Path, out: str) -> None:
    assert re.search(r"total +11,172,032 +[\d,]+ +0\.5120", out)
    assert (folder / "mask.safetensors").exists()
    assert ((names["sparse"][0].weight.view(-1, 4) != 0).sum(1) == 2).all()


def after_clusters(names: dict[str, Any], folder: Path, out: str) -> None:
    assert names["mask"].keys() == {"weight"}
    assert (names["mask"]["weight"] == torch.load(folder / "expected.pt").numpy()).all()


def after_own_criterion(names: dict[str, Any], folder: Path, out: str) -> None:
    # 500 of 900 weights, then a tenth of the other 450.
    assert names["pruner"].total == 900
    assert names["pruner"].kept == 405
    assert criteria.CRITERIA["normalised"].version == 1


def after_own_figure(names: dict[str, Any], folder: Path, out: str) -> None:
    figure = FIGURES["mine"]
    assert [s.name for s in figure.panels_of(figure.protocol)[0].series] == ["0.05", "0.8"]
    assert [claim.text for claim in figure.claims_of(figure.protocol)] == ["0.05 is better"]


def after_own_model(names: dict[str, Any], folder: Path, out: str) -> None:
    assert names["pruner"].names == ("body.weight",)
    assert names["trainer"].pruner.sparsity == 0.5
    assert out.splitlines()[-1] == "[]"


def after_train(names: dict[str, Any], folder: Path, out: str) -> None:
    assert names["trainer"].pruner.density == pytest.approx(0.8**3, abs=1e-6)
    names["torchvision"].models.resnet18(num_classes=4).load_state_dict(torch.load(folder / "model.pt"))


def after_sparse(names: dict[str, Any], folder: Path, out: str) -> None:
    agree(names["model"], names["fast"], names["again"])
    dense = sum(t.numel() * 4 for t in names["model"].state_dict().values())
    assert (folder / "net.fastprune").stat().st_size < 0.08 * dense


def after_deploy(names: dict[str, Any], folder: Path, out: str) -> None:
    agree(names["model"], names["fast"])
    dense = (folder / "net.pth").stat().st_size
    assert (folder / "net.fastprune").stat().st_size < 0.045 * dense
    agree(names["model"], onnx_network(folder / "net.onnx"))
    assert not (folder / "net.onnx.data").exists()
    assert names["name"] in INPUTS.classes
    with Image.open(folder / "photo.jpg") as photo:
        resized = np.asarray(photo.resize((86, 72), Image.Resampling.BILINEAR))  # 72 x 96 / 80 = 86.4
    expected = (resized[4:68, 11:75] / 255 - np.array(INPUTS.mean)) / np.array(INPUTS.std)
    prepared = names["prepare"](Image.open(folder / "photo.jpg"))
    assert (prepared - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() <= 1e-5


def after_tutorial(names: dict[str, Any], folder: Path, out: str) -> None:
    weights = torch.load(folder / "photos.pth", weights_only=True)
    kept = sum(int(t.count_nonzero()) for t in weights.values() if t.dim() == 4)
    total = sum(t.numel() for t in weights.values() if t.dim() == 4)
    assert kept == total - round(0.9 * total)
    model = import_module("torchvision").models.resnet18(num_classes=3).eval()
    model.load_state_dict(weights)
    agree(model, names["fast"], onnx_network(folder / "photos.onnx"))
    assert names["classes"] == ["blue", "green", "red"]
    # As the loader prepares it: val/red/0.jpg is the first image of the last class.
    manifest, place = find_or_prepare(folder / "photos", folder / "runs", loader="torchvision", any_size=True)
    source = open_data(manifest, place, loader="torchvision", crop=Crop(64, 72, 64, MEAN, STD), workers=0)
    images, labels = next(iter(source.val(batch_size=manifest.val_count)))
    first = labels.tolist().index(2)
    image = Image.open(folder / "photos/val/red/0.jpg").convert("RGB")
    # The loader scales by 1 / std where torchvision divides: a rounding or two in float32.
    assert (names["prepare"](image) - images[first]).abs().max() <= 1e-5
    assert torch.equal(names["logits"], names["fast"](names["prepare"](image)[None]))
    assert (folder / "photos-net/README.md").is_file()


def agree(model: torch.nn.Module, *others: Callable[[torch.Tensor], torch.Tensor]) -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    for other in others:
        assert (other(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def onnx_network(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


CHECKS: dict[str, Callable[[dict[str, Any], Path, str], None]] = {
    "README.md": after_readme,
    "docs/clusters.md": after_clusters,
    "docs/deploy.md": after_deploy,
    "docs/own-criterion.md": after_own_criterion,
    "docs/own-figure.md": after_own_figure,
    "docs/own-model.md": after_own_model,
    "docs/pruning.md": after_pruning,
    "docs/sparse.md": after_sparse,
    "docs/train.md": after_train,
    "docs/tutorial.md": after_tutorial,
}

WITH_PYTHON = [page for page in PAGES if any(f.language == "python" for f in fences(page))]


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in WITH_PYTHON])
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures, known = dict(FIGURES), dict(criteria.CRITERIA)
    HERE.get(page, lambda folder: None)(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for fence in fences(page):
            if fence.language == "python":
                exec(compile("\n" * fence.line + fence.code, page, "exec"), names)
            elif page == "docs/tutorial.md" and fence.language == "sh":
                run_commands(fence.code)
        CHECKS[page](names, tmp_path, capsys.readouterr().out)
    finally:  # a page may register figures and criteria
        for registry, before in ((FIGURES, figures), (criteria.CRITERIA, known)):
            registry.clear()
            registry.update(before)


# ---- the notebook ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples/prune_your_model.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    # Only the Pruner's line goes to stderr: no warning.
    assert [o["text"].startswith("fastprune: covers") for o in outputs if o.get("name") == "stderr"] == [True]
    assert re.search(r"total +11,157,504 +1,115,750 +0\.1000", said)
    assert float(re.search(r"sparsity 0\.9: accuracy [\d.]+, trained ([\d.]+)", said)[1]) > 0.5  # chance is 0.1
    assert float(re.search(r"largest logit: (\S+)", said)[1]) <= 1e-5
    assert fastprune.sparse.load(tmp_path / "pruned.fastprune")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_notebook_is_stored_as_it_ran():
    cells = json.loads((ROOT / "examples/prune_your_model.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for cell in code for output in cell["outputs"]} == {"stream"}
