"""A trained network for use elsewhere: kept weights alone, a state dict, ONNX, or a folder to share."""

import io
import logging
import shlex
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import sparse
from fastprune.errors import InputError
from fastprune.files import read_tensors, write_atomically
from fastprune.specs import ModelSpec
from fastprune.store.listing import Corrupt, find_node
from fastprune.study.share import Kept, Shared, about_checkpoint, about_node, layers_of, write_folder
from fastprune.training.checkpoint import load_model
from fastprune.training.models import NETWORKS, build, try_size

SUFFIXES = {".fastprune": "kept weights, for fastprune.sparse.load", ".pth": "state dict", ".onnx": "ONNX"}


@dataclass(frozen=True)
class Network:
    """A trained network in evaluation mode.

    arguments: of compile.py, which name it. epoch: of its weights, from 1. size: (height, width) of images where none
    is given, None if that is not known. covered: names of the weights that masks cover, None for the convs. about:
    gives what a model card says, from the command that exports it and a license.
    """

    model: nn.Module
    arguments: tuple[str, ...]
    epoch: int
    size: tuple[int, int] | None
    covered: tuple[str, ...] | None
    about: Callable[[str, str], Shared]

    def __str__(self) -> str:
        kept = Kept.of(layers_of(self.model, self.covered))
        return f"weights after epoch {self.epoch}, {kept.density:.2%} of {kept.total:,} {kept.kind} kept"


def of_checkpoint(path: Path, averaged: bool = False) -> Network:
    """The network of a checkpoint of train.py. averaged: with the weights of its moving average. InputError if the file
    is missing or damaged, does not say of which model it is, or has no average."""
    trained = load_model(path, averaged=averaged)

    def about(command: str, license: str) -> Shared:
        layers = layers_of(trained.model, trained.covered)
        return about_checkpoint(trained, layers, averaged, path, command, license)

    arguments = (str(path), *(["--ema"] if averaged else []))
    return Network(trained.model, arguments, trained.epochs, trained.size, trained.covered, about)


def of_node(root: Path, prefix: str) -> Network:
    """The network of the training whose key begins with `prefix`. InputError if there is none, if it has no weights, or
    if they are not of a network of `build`."""
    node = find_node(root, prefix)
    if isinstance(node, Corrupt):
        raise InputError(f"{node.folder}: {node.why}; delete this folder to recompute the node")
    if node.kind != "train":
        raise InputError(f"node {node.key} is a {node.kind} step, which has no weights: name a training (see store ls)")
    epochs = sorted(int(path.stem.partition("-")[2]) for path in node.folder.glob("state-*.safetensors"))
    if not epochs:
        raise InputError(
            f"training {node.key} has stored no weights: a run stores those that another run starts from; take its "
            "find run (see store ls)"
        )
    path = node.folder / f"state-{epochs[-1]}.safetensors"
    tensors = {n.removeprefix("model."): t for n, t in read_tensors(path)[0].items()}
    spec, model = _fitting(tensors, path)
    return Network(
        model.eval(), (node.key,), epochs[-1], (64, 64), None, partial(about_node, root, node, spec, epochs[-1])
    )


def check_file(out: Path, half: bool = False) -> None:
    """InputError unless `deploy` can write such a file, and there."""
    if out.suffix not in SUFFIXES:
        choices = ", ".join(f"NAME{s} ({w})" for s, w in SUFFIXES.items())
        raise InputError(f"--out {out}: choose one of {choices}, or add --format huggingface for a folder to share")
    if half and out.suffix != ".fastprune":
        raise InputError(f"--half is for .fastprune files, not for {out.suffix}")
    check_place(out)


def check_place(out: Path) -> None:
    """InputError unless there is a folder for `out`."""
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")


def deploy(network: Network, out: Path, side: int | None = None, half: bool = False) -> str:
    """Writes a network to `out`, a name that check_file takes, in the format of its suffix; returns a line about it.

    side: of images, in pixels, if they are not the network's own; a state dict has none. half: kept weights in float16.
    InputError for what the format cannot express, and for images that the network does not take.
    """
    source = Path(network.arguments[0])
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"--out {out} is the checkpoint itself: name another file")
    model, dtype = network.model, torch.float16 if half else torch.float32
    size = network.size if side is None else (side, side)
    if out.suffix != ".pth":
        if size is None:
            raise InputError(f"{network.arguments[0]} does not say how large its images are: give --size PIXELS")
        try_size(model, network.arguments[0], size)

    def images(count: int) -> Tensor:
        assert size is not None
        return torch.zeros(count, 3, *size)

    in_torch: list[str] = []

    def write_compiled(path: Path) -> None:
        fast = sparse.compile(model, images(1))
        fast.save(path, dtype=dtype)
        in_torch.extend(fast.in_torch)

    writers: dict[str, Callable[[Path], Any]] = {
        ".fastprune": write_compiled,
        ".pth": lambda path: torch.save(model.state_dict(), path),
        ".onnx": lambda path: _write_onnx(model, images(2), path),
    }
    write_atomically(out, writers[out.suffix], out.with_name(f".{out.name}.part"))
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    written = out.stat().st_size
    seen = "" if size is None or out.suffix == ".pth" else f", images of {size[0]} x {size[1]}"
    weighs = f"{written:,} bytes, {written / dense:.1%} of the dense state dict"
    dense_there = f"; torch computes {', '.join(in_torch)}" if in_torch else ""
    return f"{out}: {SUFFIXES[out.suffix]}, {network}{seen}; {weighs}{dense_there}"


def share(network: Network, out: Path, license: str) -> str:
    """Writes a network as a folder in the Hugging Face layout (share.py); returns a line about it.

    license: an identifier of the Hub, for the model card. InputError if nothing is known that a card needs.
    """
    words = ["compile.py", *network.arguments, "--format", "huggingface", "--license", license, "--out", out.name]
    about = network.about(shlex.join(words), license)
    write_folder(out, network.model, about, network.covered)
    upload = f"huggingface-cli upload YOUR-NAME/{out.resolve().name} {shlex.quote(str(out))}"
    return f"{out}/: {network}; read {out}/README.md, then share it: {upload}"


def _fitting(tensors: Mapping[str, Tensor], path: Path) -> tuple[ModelSpec, nn.Module]:
    """The network of models.build whose weights have these names and shapes."""
    shapes = {name: t.shape for name, t in tensors.items()}
    if "conv1.weight" in tensors and "fc.bias" in tensors:
        for name, stem in product(NETWORKS, ("imagenet", "cifar")):
            spec = ModelSpec(name, len(tensors["fc.bias"]), stem, len(tensors["conv1.weight"]))
            with torch.device("meta"):
                model = build(spec)
            if {n: t.shape for n, t in model.state_dict().items()} == shapes:
                model = model.to_empty(device="cpu")
                model.load_state_dict(dict(tensors))
                return spec, model
    raise InputError(
        f"{path} holds no ResNet as fastprune builds them: a network without some channels cannot be exported"
    )


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX files require the package {error.name}: pip install onnx onnxscript") from None
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # torch's exporter reports its progress on stdout.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        logging.disable(level)
