"""A published training's network for use elsewhere: kept weights alone, a state dict, ONNX, or a folder to share."""

import io
import logging
import shlex
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import sparse
from fastprune.errors import InputError
from fastprune.files import read_tensors, write_atomically
from fastprune.specs import ModelSpec
from fastprune.store.listing import Corrupt, Found, find_node
from fastprune.study.share import about_node, write_folder
from fastprune.training.models import NETWORKS, build

SUFFIXES = {".fastprune": "kept weights, for fastprune.sparse.load", ".pth": "state dict", ".onnx": "ONNX"}


def deploy(root: Path, prefix: str, out: Path, side: int, half: bool = False) -> str:
    """Writes the network of a node to `out`, in the format of its suffix (SUFFIXES); returns a line about it.

    prefix: the beginning of the node's key. side: of images, in pixels; a state dict has none. half: kept weights in
    float16. InputError for a node without weights, for a network that is not one of `build`, and for what the format
    cannot express.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: choose one of {', '.join(f'NAME{s} ({w})' for s, w in SUFFIXES.items())}")
    if half and out.suffix != ".fastprune":
        raise InputError(f"--half is for .fastprune files, not for {out.suffix}")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    stored = network(root, prefix)
    model = stored.model
    writers: dict[str, Callable[[Path], Any]] = {
        ".fastprune": lambda path: sparse.compile(model, torch.zeros(1, 3, side, side)).save(
            path, dtype=torch.float16 if half else torch.float32
        ),
        ".pth": lambda path: torch.save(model.state_dict(), path),
        ".onnx": lambda path: _write_onnx(model, torch.zeros(2, 3, side, side), path),
    }
    write_atomically(out, writers[out.suffix], out.with_name(f".{out.name}.part"))
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    size = out.stat().st_size
    return f"{out}: {SUFFIXES[out.suffix]}, {stored}; {size:,} bytes, {size / dense:.1%} of the dense state dict"


def share(root: Path, prefix: str, out: Path, license: str) -> str:
    """Writes the network of a node as a folder in the Hugging Face layout (share.py); returns a line about it.

    prefix, InputError: as for `deploy`. license: an identifier of the Hub, for the model card.
    """
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    stored = network(root, prefix)
    words = ["compile.py", stored.node.key, "--format", "huggingface", "--license", license, "--out", out.name]
    about = about_node(root, stored.node, stored.spec, stored.epoch, shlex.join(words), license)
    write_folder(out, stored.model, about)
    upload = f"huggingface-cli upload YOUR-NAME/{out.resolve().name} {shlex.quote(str(out))}"
    return f"{out}/: {stored}; read {out}/README.md, then share it: {upload}"


@dataclass(frozen=True)
class StoredNetwork:
    """The network of a published training, in evaluation mode. epoch: of its weights, the last that are stored."""

    node: Found
    spec: ModelSpec
    model: nn.Module
    epoch: int

    def __str__(self) -> str:
        convs = [m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        kept, total = sum(int(w.count_nonzero()) for w in convs), sum(w.numel() for w in convs)
        return f"weights after epoch {self.epoch}, {kept / total:.2%} of {total:,} conv weights kept"


def network(root: Path, prefix: str) -> StoredNetwork:
    """The network of the training whose key begins with `prefix`. InputError if there is none, or it has no weights."""
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
    return StoredNetwork(node, spec, model.eval(), epochs[-1])


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
