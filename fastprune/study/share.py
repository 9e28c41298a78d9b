"""A trained network as a folder in the layout of the Hugging Face Hub: weights, configuration, model card.

model.safetensors is the plain state dict, config.json has the keys of timm, README.md is the model card. Written
without the network and without huggingface_hub; `huggingface-cli upload NAME FOLDER` takes the folder as it is.
"""

import csv
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import nn

from fastprune.console import duration
from fastprune.errors import InputError
from fastprune.loaders.manifest import FILE_NAME, Manifest, Subset, load_manifest
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import ModelSpec
from fastprune.store.listing import Found, Listing, keys_in
from fastprune.store.needs import read_needs
from fastprune.study.data import TITLES
from fastprune.training.about import Cost, Inputs
from fastprune.training.checkpoint import TrainedModel

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class Shared:
    """What a model card says of a network.

    network: torchvision's name, timm/NAME, or a ResNet of fastprune.training.models. inputs: its images. accuracy:
    top-1 on the validation images, a fraction. val_count: their number. cost: of this training; whole_cost: with all
    that led to it. made: the training in words. commands: that made it, and the folder. versions: name -> version, of
    what computed it. license: an identifier of the Hub.
    """

    network: str | ModelSpec
    inputs: Inputs
    accuracy: float
    val_count: int
    epoch: int
    cost: Cost
    whole_cost: Cost
    made: str
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    license: str = "other"

    @property
    def own(self) -> ModelSpec | None:
        """The ResNet of fastprune, None where torchvision's or timm's name makes the network."""
        if isinstance(self.network, str) or (self.network.stem, self.network.width) == ("imagenet", 64):
            return None
        return self.network

    @property
    def architecture(self) -> str:
        """The name in its library."""
        return self.network.removeprefix("timm/") if isinstance(self.network, str) else self.network.name

    @property
    def library(self) -> str:
        """torchvision, timm or fastprune: where the name is known."""
        if isinstance(self.network, str) and self.network.startswith("timm/"):
            return "timm"
        return "torchvision" if self.own is None else "fastprune"


def write_folder(folder: Path, model: nn.Module, about: Shared, covered: Collection[str] | None = None) -> None:
    """Writes a folder, which must not exist or be empty, all of it or nothing. covered: names of the weights that masks
    cover, None for the convs, or all without convs. InputError if it has files."""
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: the folder has files already: name another one, or delete it")
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        # "format" is what readers of the Hub's safetensors files ask for.
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, aside / WEIGHTS, {"format": "pt"})
        layers = layers_of(model, covered)
        (aside / CONFIG).write_text(json.dumps(_config(model, about, layers), indent=2, ensure_ascii=False) + "\n")
        (aside / CARD).write_text(_card(about, layers))
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Layer:
    """The weights of a layer. name: of the module. covered: whether masks cover it."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    conv: bool
    covered: bool

    @property
    def density(self) -> float:
        return self.kept / self.total


def layers_of(model: nn.Module, covered: Collection[str] | None) -> list[Layer]:
    """The conv and linear layers of a network, and others that masks cover, in its order. covered: see write_folder."""
    owner = {f"{name}.weight" if name else "weight": module for name, module in model.named_modules()}
    convs = {name for name, module in owner.items() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    weights = convs | {name for name, module in owner.items() if isinstance(module, nn.Linear)}
    if covered is None:
        covered = convs or weights
    return [
        Layer(
            name.removesuffix(".weight"),
            tuple(weight.shape),
            int(weight.count_nonzero()),
            weight.numel(),
            name in convs,
            name in covered,
        )
        for name, weight in model.named_parameters()
        if name in weights or name in covered
    ]


class Kept(NamedTuple):
    """How many of the weights that masks cover are kept. kind: what to call them."""

    kept: int
    total: int
    kind: str

    @classmethod
    def of(cls, layers: list[Layer]) -> "Kept":
        held = [layer for layer in layers if layer.covered]
        kind = "conv weights" if all(layer.conv for layer in held) else "weights"
        return cls(sum(layer.kept for layer in held), sum(layer.total for layer in held), kind)

    @property
    def density(self) -> float:
        return self.kept / self.total


def _config(model: nn.Module, about: Shared, layers: list[Layer]) -> dict[str, Any]:
    inputs, count = about.inputs, len(about.inputs.classes)
    classifier = layers[-1]
    return {
        "architecture": about.architecture,
        "num_classes": count,
        "num_features": classifier.shape[1],
        "label_names": list(inputs.classes),
        "pretrained_cfg": {
            "input_size": [3, inputs.height, inputs.width],
            "fixed_input_size": False,
            "interpolation": inputs.interpolation,
            "crop_pct": 1.0 if inputs.resize is None else inputs.height / inputs.resize,
            "mean": list(inputs.mean),
            "std": list(inputs.std),
            "num_classes": count,
            "first_conv": next((layer.name for layer in layers if layer.conv), None),
            "classifier": classifier.name,
        },
        "density": Kept.of(layers).density,
        "density_by_layer": {layer.name: layer.density for layer in layers if layer.covered},
        **({} if isinstance(about.network, str) else {"stem": about.network.stem, "width": about.network.width}),
    }


def _loading(about: Shared) -> str:
    """The code that makes the network from the folder."""
    own, count = about.own, len(about.inputs.classes)
    if about.library == "timm":
        first, made = "import timm", f'timm.create_model("{about.architecture}", num_classes={count})'
    elif own is None:
        first, made = "import torchvision", f"torchvision.models.{about.architecture}(num_classes={count})"
    else:
        first = "from fastprune.specs import ModelSpec\nfrom fastprune.training.models import build"
        made = f'build(ModelSpec("{own.name}", classes={count}, stem="{own.stem}", width={own.width}))'
    return (
        f"{first}\nfrom safetensors.torch import load_file\n\nmodel = {made}\n"
        f'model.load_state_dict(load_file("{WEIGHTS}"))\nmodel.eval()'
    )


def _transform(inputs: Inputs) -> str:
    size = f"({inputs.height}, {inputs.width})"
    how = "" if inputs.interpolation == "bilinear" else f", v2.InterpolationMode.{inputs.interpolation.upper()}"
    crop = "" if inputs.resize is None else f"    v2.CenterCrop({size}),\n"
    return (
        "import torch\nfrom torchvision.transforms import v2\n\ntransform = v2.Compose([\n    v2.ToImage(),\n"
        f"    v2.Resize({size if inputs.resize is None else inputs.resize}{how}),\n{crop}"
        "    v2.ToDtype(torch.float32, scale=True),\n"
        f"    v2.Normalize({list(inputs.mean)}, {list(inputs.std)}),\n    v2.ToPureTensor(),\n])"
    )


def _front_matter(about: Shared, name: str, title: str) -> Iterator[str]:
    """YAML; texts as JSON strings, which YAML reads, whatever is in them."""
    data = json.dumps(about.inputs.data)
    yield f"library_name: {about.library}"
    yield f"license: {json.dumps(about.license)}"
    yield "pipeline_tag: image-classification"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("image-classification", "pytorch", "pruning", "sparsity", about.architecture))
    yield f"datasets:\n- {data}"
    yield "metrics:\n- accuracy"
    yield f"model-index:\n- name: {json.dumps(name)}\n  results:"
    yield "  - task:\n      type: image-classification"
    yield f"    dataset:\n      name: {json.dumps(title)}\n      type: {data}\n      split: validation"
    yield f"    metrics:\n    - type: accuracy\n      name: Top-1 accuracy\n      value: {about.accuracy:.6g}"


def _card(about: Shared, layers: list[Layer]) -> str:
    inputs, own, kept = about.inputs, about.own, Kept.of(layers)
    title = TITLES.get(inputs.data, inputs.data)
    name = f"{about.architecture} with {kept.density:.2%} of its {kept.kind}"
    front = "\n".join(_front_matter(about, name, title))
    small = ""
    if own is not None:
        stem = "a 7x7 conv and a max-pool" if own.stem == "imagenet" else "a 3x3 conv"
        small = f" Its first stage has {own.width} channels (not 64), its stem is {stem}."
    cropped = f"resized to {inputs.resize}, cropped to " if inputs.resize else ""
    facts = {
        "top-1 accuracy": f"{about.accuracy:.2%} on {about.val_count:,} validation images, after epoch {about.epoch}",
        "density": f"{kept.density:.4f}: {kept.kept:,} of {kept.total:,} {kept.kind} are kept, the others are 0",
        "data": title,
        "classes": f"{len(inputs.classes):,}",
        "images": f"{cropped}{inputs.height} x {inputs.width} pixels, normalised by mean {_three(inputs.mean)} and "
        f"standard deviation {_three(inputs.std)}",
    }
    table = "\n".join(f"| {what} | {fact} |" for what, fact in facts.items())
    rows = "\n".join(
        f"| {layer.name} | {' x '.join(map(str, layer.shape))} | {layer.total:,} | {layer.kept:,} | "
        f"{1 - layer.density:.2%} |"
        for layer in layers
    )
    costs = "\n".join(
        f"| {what}{'' if cost.complete else ', as far as recorded'} | {cost.trainings:,} | {cost.images:,} | "
        f"{duration(cost.seconds)} | {', '.join(cost.devices)} |"
        for what, cost in (("this one", about.cost), ("with all that led to it", about.whole_cost))
    )
    commands = "\n".join(about.commands)
    versions = ", ".join(f"{library} {version}" for library, version in sorted(about.versions.items()))
    return f"""---
{front}
---
# {name}

An image classifier, pruned by fastprune: {about.made}.{small}

| | |
| --- | --- |
{table}

## Use
```python
{_loading(about)}
```
```python
{_transform(inputs)}
```
`{WEIGHTS}` holds zeros like other weights, and the network runs as fast as a dense one; `fastprune.sparse.compile`
makes it smaller and faster on a CPU. `fastprune.Pruner(model)` keeps its zeros in further training.

## Sparsity by layer
| layer | shape | weights | kept | sparsity |
| --- | --- | --- | --- | --- |
{rows}

## Cost
| trainings | number | images | time | where |
| --- | --- | --- | --- | --- |
{costs}

Computed with {versions}.

## How it was made
```
{commands}
```
"""


def _three(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{v:.4g}' for v in values)})"


def manifest_of(root: Path, data: Mapping[str, Any]) -> Manifest:
    """The description of a training's images. data: of its spec. InputError if the store has none."""
    for path in sorted((root / "data").glob(f"*/{FILE_NAME}")):
        manifest = load_manifest(path.parent)
        if manifest.fingerprint == data["fingerprint"]:
            return manifest
    # Generated images have no file: their fingerprint is a hash of few numbers, of which the size is not in the spec.
    for size in range(1, 1025):
        made = SyntheticData(data["classes"], data["train_per_class"] or 500, data["val_per_class"] or 50, size)
        if made.fingerprint == data["fingerprint"]:
            return made.manifest()
    raise InputError(
        f"{root / 'data'} does not describe the images of this training (size, mean, classes): prepare them with "
        "scripts/prepare.py"
    )


def about_node(root: Path, node: Found, spec: ModelSpec, epoch: int, command: str, license: str) -> Shared:
    """What the store knows of a training. epoch: of the weights. command: that exports it."""
    data = manifest_of(root, node.spec["data"])
    listing = Listing(root)
    record = listing.record(node)
    if "corrupt" in record:
        raise InputError(f"{node.folder}: {record['corrupt']}")
    try:
        with (node.folder / "metrics.csv").open(newline="") as file:
            rows = {int(row["epoch"]): row for row in csv.DictReader(file, strict=True)}
        accuracy = float(rows[epoch]["val_accuracy"])
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(
            f"{node.folder}: metrics.csv has no epoch {epoch} ({type(error).__name__}); "
            "delete this folder to recompute the node"
        ) from None
    subset = Subset(*(node.spec["data"][name] for name in ("classes", "train_per_class", "val_per_class")))
    used = sorted((n for n in read_needs(root) if node.key in n.nodes), key=lambda n: float(n.made["at"] or 0.0))
    before = [str(n.made["command"]) for n in used[:1] if n.made["command"]]
    density, lr, round = record["density"], record["lr"], record["round"]
    found = record["mask_of"]
    mask = "dense" if density == 1.0 else f"under a mask of density {density:.4g}" if density is not None else "pruned"
    if round:
        mask += f" of round {round}" + (f", found at {found}" if found and found.startswith("lr ") else "")
    return Shared(
        spec,
        Inputs(data.name, data.classes[: spec.classes], data.height, data.width, data.mean, data.std),
        accuracy,
        subset.count(data, "val"),
        epoch,
        _cost(root, listing, [node]),
        _cost(root, listing, _trainings(listing, node)),
        f"trained with learning rate {lr:g} for {epoch} epochs, {mask}, seed {record['seed']}",
        (*before, command),
        dict(node.provenance.get("versions") or {}),
        license,
    )


def about_checkpoint(
    trained: TrainedModel, layers: list[Layer], averaged: bool, path: Path, command: str, license: str
) -> Shared:
    """What a checkpoint says of its training. averaged: of the moving average. path: of it, for messages. command: that
    exports it. InputError if it has no such record."""
    about, flags = trained.about, trained.flags
    if about is None:
        raise InputError(
            f"{path} has no entry 'about', which a model card needs: it was written by an earlier fastprune or another "
            "program; train an epoch more with scripts/train.py, or write a file"
        )
    accuracy = about.ema_accuracy if averaged else about.accuracy
    if accuracy is None:
        raise InputError(f"{path} does not say how accurate its moving average is: leave --ema out")
    kept = Kept.of(layers)
    mask = "dense" if kept.kept == kept.total else f"pruned to density {kept.density:.4g}"
    average = ", the moving average of its weights" if averaged else ""
    made = f"trained with learning rate {flags['lr']:g} for {trained.epochs} epochs, {mask}, seed {flags['seed']}"
    return Shared(
        trained.name,
        about.inputs,
        accuracy,
        about.val_count,
        trained.epochs,
        about.history.cost,
        about.history.whole_cost,
        made + average,
        (*about.history.commands, command),
        about.versions,
        license,
    )


def _trainings(listing: Listing, node: Found) -> list[Found]:
    """The training, and all published ones that its start and its mask depend on."""
    found, left = {node.key: node}, [node]
    while left:
        for key in keys_in(left.pop().spec):
            if key in listing.by_key and key not in found:
                found[key] = listing.by_key[key]
                left.append(found[key])
    return [n for n in found.values() if n.kind == "train"]


def _cost(root: Path, listing: Listing, nodes: list[Found]) -> Cost:
    images = 0
    for node in nodes:
        data, batch = node.spec["data"], node.spec["optimizer"]["batch_size"]
        subset = Subset(*(data[name] for name in ("classes", "train_per_class", "val_per_class")))
        record = listing.record(node)
        # The last partial batch of an epoch is dropped.
        count = subset.count(manifest_of(root, data), "train") // batch * batch
        images += count * (record["epochs"] - record["begin"])
    seconds = sum(float(node.provenance.get("wall_seconds") or 0.0) for node in nodes)
    devices = {str(node.provenance["device"]) for node in nodes if "device" in node.provenance}
    return Cost(len(nodes), images, seconds, tuple(sorted(devices)))
