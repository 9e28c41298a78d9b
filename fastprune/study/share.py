"""A published training's network as a folder in the layout of the Hugging Face Hub: weights, configuration, model card.

model.safetensors is the plain state dict, config.json has the keys of timm, README.md is the model card. Written
without the network and without huggingface_hub; `huggingface-cli upload NAME FOLDER` takes the folder as it is.
"""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fastprune.errors import InputError
from fastprune.loaders.manifest import FILE_NAME, Manifest, Subset, load_manifest
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import ModelSpec
from fastprune.store.listing import Found, Listing, keys_in
from fastprune.store.needs import read_needs
from fastprune.study.data import TITLES

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class Cost:
    """trainings, images that they saw, seconds that they took together, devices."""

    trainings: int
    images: int
    seconds: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """What a model card says of a network.

    data: on which it was trained. accuracy: top-1 on the validation images, a fraction. val_count: their number. cost:
    of this training; whole_cost: with all that led to it. made: the training in words. commands: that made it, and the
    folder. versions: name -> version, of what computed it. license: an identifier of the Hub.
    """

    spec: ModelSpec
    data: Manifest
    accuracy: float
    val_count: int
    epoch: int
    cost: Cost
    whole_cost: Cost
    made: str
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    license: str = "other"


def write_folder(folder: Path, model: nn.Module, about: Shared) -> None:
    """Writes a folder, which must not exist or be empty, all of it or nothing. InputError if it has files."""
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: the folder has files already: name another one, or delete it")
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        # "format" is what readers of the Hub's safetensors files ask for.
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, aside / WEIGHTS, {"format": "pt"})
        layers = _layers(model)
        (aside / CONFIG).write_text(json.dumps(_config(model, about, layers), indent=2, ensure_ascii=False) + "\n")
        (aside / CARD).write_text(_card(about, layers))
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class _Layer:
    """name: of the module. pruned: whether it is a conv, which a figure's masks cover."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    pruned: bool

    @property
    def density(self) -> float:
        return self.kept / self.total


def _layers(model: nn.Module) -> list[_Layer]:
    """The conv and linear layers of a network in its order."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            kept = int(weight.count_nonzero())
            found.append(_Layer(name, tuple(weight.shape), kept, weight.numel(), isinstance(module, nn.Conv2d)))
    return found


def _density(layers: list[_Layer]) -> float:
    convs = [layer for layer in layers if layer.pruned]
    return sum(layer.kept for layer in convs) / sum(layer.total for layer in convs)


def _config(model: nn.Module, about: Shared, layers: list[_Layer]) -> dict[str, Any]:
    spec, data = about.spec, about.data
    classifier = layers[-1]
    return {
        "architecture": spec.name,
        "num_classes": spec.classes,
        "num_features": classifier.shape[1],
        "label_names": list(data.classes[: spec.classes]),
        "pretrained_cfg": {
            "input_size": [3, data.height, data.width],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": spec.classes,
            "first_conv": layers[0].name,
            "classifier": classifier.name,
        },
        "density": _density(layers),
        "density_by_layer": {layer.name: layer.density for layer in layers if layer.pruned},
        "stem": spec.stem,
        "width": spec.width,
    }


def _of_torchvision(spec: ModelSpec) -> bool:
    return (spec.stem, spec.width) == ("imagenet", 64)


def _loading(spec: ModelSpec) -> str:
    """The code that makes the network from the folder."""
    if _of_torchvision(spec):
        first, made = "import torchvision", f"torchvision.models.{spec.name}(num_classes={spec.classes})"
    else:
        first = "from fastprune.specs import ModelSpec\nfrom fastprune.training.models import build"
        made = f'build(ModelSpec("{spec.name}", classes={spec.classes}, stem="{spec.stem}", width={spec.width}))'
    return (
        f"{first}\nfrom safetensors.torch import load_file\n\nmodel = {made}\n"
        f'model.load_state_dict(load_file("{WEIGHTS}"))\nmodel.eval()'
    )


def _transform(data: Manifest) -> str:
    return (
        "import torch\nfrom torchvision.transforms import v2\n\ntransform = v2.Compose([\n    v2.ToImage(),\n"
        f"    v2.Resize(({data.height}, {data.width})),\n    v2.ToDtype(torch.float32, scale=True),\n"
        f"    v2.Normalize({list(data.mean)}, {list(data.std)}),\n    v2.ToPureTensor(),\n])"
    )


def _front_matter(about: Shared, name: str, title: str) -> Iterator[str]:
    """YAML; texts as JSON strings, which YAML reads, whatever is in them."""
    data, spec = json.dumps(about.data.name), about.spec
    yield f"library_name: {'torchvision' if _of_torchvision(spec) else 'fastprune'}"
    yield f"license: {json.dumps(about.license)}"
    yield "pipeline_tag: image-classification"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("image-classification", "pytorch", "pruning", "sparsity", spec.name))
    yield f"datasets:\n- {data}"
    yield "metrics:\n- accuracy"
    yield f"model-index:\n- name: {json.dumps(name)}\n  results:"
    yield "  - task:\n      type: image-classification"
    yield f"    dataset:\n      name: {json.dumps(title)}\n      type: {data}\n      split: validation"
    yield f"    metrics:\n    - type: accuracy\n      name: Top-1 accuracy\n      value: {about.accuracy:.6g}"


def _card(about: Shared, layers: list[_Layer]) -> str:
    spec, data = about.spec, about.data
    title = TITLES.get(data.name, data.name)
    density, convs = _density(layers), [layer for layer in layers if layer.pruned]
    name = f"{spec.name} with {density:.2%} of its conv weights"
    front = "\n".join(_front_matter(about, name, title))
    stem = "a 7x7 conv and a max-pool" if spec.stem == "imagenet" else "a 3x3 conv"
    small = "" if _of_torchvision(spec) else f" Its first stage has {spec.width} channels (not 64), its stem is {stem}."
    kept, total = sum(layer.kept for layer in convs), sum(layer.total for layer in convs)
    facts = {
        "top-1 accuracy": f"{about.accuracy:.2%} on {about.val_count:,} validation images, after epoch {about.epoch}",
        "density": f"{density:.4f}: {kept:,} of {total:,} conv weights are kept, the others are 0",
        "data": title,
        "classes": f"{spec.classes:,}",
        "images": f"{data.height} x {data.width} pixels, normalised by mean and standard deviation of training images",
    }
    table = "\n".join(f"| {what} | {fact} |" for what, fact in facts.items())
    rows = "\n".join(
        f"| {layer.name} | {' x '.join(map(str, layer.shape))} | {layer.total:,} | {layer.kept:,} | "
        f"{1 - layer.density:.2%} |"
        for layer in layers
    )
    costs = "\n".join(
        f"| {what} | {cost.trainings:,} | {cost.images:,} | {_time(cost.seconds)} | {', '.join(cost.devices)} |"
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
{_loading(spec)}
```
```python
{_transform(data)}
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


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


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
        data,
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
