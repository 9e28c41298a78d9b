"""Mistakes that users make: each is one line on stderr that names the mend, and exit code 2; nothing is left behind."""

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastprune.cli.__main__ import main
from fastprune.cli.command import BAD_INPUT
from fastprune.files import write_tensors
from fastprune.pruning.masks import Mask


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data sets and files, some of them spoilt."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    (root / "notastore").mkdir()
    (root / "notastore" / "notes.txt").touch()
    (root / "runs").mkdir()  # shared, so that the photos are prepared once
    for name in ("bad.pth", "bad.safetensors"):
        (root / name).write_bytes(b"nothing of the kind")
    Image.new("RGB", (32, 32)).save(root / "photo.png")
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, root / "saved.pth")
    Mask.from_tensors({"conv1.weight": torch.ones(2, dtype=torch.bool)}).save(root / "mask.safetensors")
    write_tensors(root / "net.fastprune", {}, {"format": 1, "ops": []})
    (root / "imports.py").write_text("import nothing_there\n")
    (root / "syntax.py").write_text("def (\n")
    (root / "figures" / "A2").mkdir(parents=True)
    (root / "figures" / "A2" / "summary.json").write_text("{}")
    for split in ("train", "val"):
        for label in "ab":
            for folder in ("photos", "spoilt"):
                (root / folder / split / label).mkdir(parents=True)
            for i in range(4):
                image = Image.fromarray(np.full((32, 32, 3), 9 * i, np.uint8))
                image.save(root / "photos" / split / label / f"{i}.png")
            (root / "spoilt" / split / label / "0.jpg").write_bytes(b"not an image")
    for label in "ab":
        (root / "noval" / "train" / label).mkdir(parents=True)
    return root


MISTAKES = {
    # names
    "nothing": "choose one of reproduce,",
    "reproduce": "--fig",
    "reproduce --fig": "--fig: expected at least one argument",
    "reproduce --fig A7": "choose one of A1, A2",
    "reproduce --fig A2 --preset big": "choose one of smoke, quick, cpu, paper",
    "reproduce --fig A2 --model resnet101": "choose from 'resnet18'",
    "reproduce --fig A2 --criterion nothing": "--figure-module",
    "reproduce --fig A2 --loader fast": "choose from 'auto'",
    "reproduce --fig A2 --compute fast": "choose from 'auto'",
    "reproduce --fig A2 --gpu-options fast": "unknown GPU option 'fast': choose from fused_norm",
    "reproduce --fig A2 --gpu-options fused_norm=1": "give each option once, as fused_norm=on or fused_norm=off",
    "reproduce --fig A2 --device cpu --gpu-options on": "fused_loss=on requires a GPU",
    "reproduce --fig A2 --plan --device cpu --gpu-options fused_norm=on": "--gpu-options fused_norm=on requires a GPU",
    "reproduce --fig A2 --precision fp8": "choose from 'fp32'",
    "reproduce --fig A2 --figure-module missing_module": "No module named 'missing_module'",
    "train --data-path photos --model resnet19": "resnet18",
    "train --data-path photos --lr-scheduler poly": "choose one of steplr",
    "train --data-path photos --prune nothing.*": "conv1",
    "store nothing": "choose from 'ls'",
    # flags
    "reproduce --fig A2 --lr_find 0.1": "unrecognized arguments: --lr_find",
    "reproduce --fig A2 --epochs 0": "expected 1 to",
    "reproduce --fig A2 --lr-find -1": "must be above 0",
    "reproduce --fig A2 --rounds 2.5": "invalid int value",
    "reproduce --fig A2 --fraction 1.5": "--fraction is 1.5",
    "reproduce --fig A2 --sparsities 0.5": "remove it",
    "reproduce --fig A2 --gpus 8": "use --device and --workers",
    "reproduce --fig A2 --ray-address auto": "requires --executor ray",
    "reproduce --fig A2 --workers 0": "a whole number of 1 or more",
    "train --data-path photos --sparsity 95": "a fraction",
    "train --data-path photos --amp-dtype fp16": "requires --amp",
    "train --data-path photos --epochs zero": "a whole number of 1 or more",
    "train --data-path photos --batchsize 4": "unrecognized arguments: --batchsize",
    "train --data-path photos --batch-size 100": "--batch-size",
    "compile": "required: NETWORK, --out",
    "compile bad.pth --out network.onnx": "bad.pth is no checkpoint",
    "compile no/checkpoint.pth --out network.onnx": "no such checkpoint: no/checkpoint.pth",
    "compile 0123 --out network.pt": "NAME.pth",
    # slips
    "reproduce --figure A2": "unrecognized arguments: --figure: did you mean --fig?",
    "reproduce --fig=A2 --presets=cpu": "unrecognized arguments: --presets: did you mean --preset?",
    "train --data photos": "unrecognized arguments: --data: did you mean --data-path?",
    "train --data-path photos --batchsize=4": "did you mean --batch-size?",
    "train --data-path photos --sparsty 0.9": "did you mean --sparsity?",
    "train --data-path photos --pretrained": "unrecognized arguments: --pretrained (see --help)",
    "train --data-path photos --opt adam": "choose one of sgd, sgd_nesterov, adamw, rmsprop: did you mean adamw?",
    "train --data-path photos --opt lion": "--opt lion is not supported: choose one of sgd,",
    "store ls --stor runs": "unrecognized arguments: --stor: did you mean --store?",
    "trian --data-path photos": "store, doctor: did you mean train?",
    "train --data-path photos/train": "photos/train is a part of a data set: give the whole, photos",
    "train --data-path photos/val/a": "photos/val/a is a part of a data set: give the whole, photos",
    "reproduce --fig A2 --data photos/train/": "photos/train is a part of a data set",
    "prepare --source photos/val --out x": "photos/val is a part of a data set",
    "report --store figures": "figures holds results, which --out names, and no store: give the folder of their runs",
    "store ls --store figures": "figures holds results, which --out names, and no store",
    # paths and data
    "reproduce --fig A2 --preset quick": "--data DIR",
    "reproduce --fig A2 --preset quick --data nowhere": "no such data folder: nowhere",
    "reproduce --fig A2 --preset quick --data empty": "empty is empty",
    "reproduce --fig A2 --preset quick --data file": "file is not a folder",
    "reproduce --fig A2 --preset quick --data spoilt --batch-size 2": "0.jpg",
    "reproduce --fig A2 --data photos --classes 300": "--classes",
    "reproduce --fig A2 --out file": "choose another folder with --out",
    "reproduce --fig A2 --store file": "choose another --store",
    "reproduce --fig A2 --redraw --out empty": "run the figure first",
    "reproduce --fig A2 --figure-module nowhere.py": "nowhere.py: no such file",
    "reproduce --fig A2 --figure-module imports.py": "No module named 'nothing_there'",
    "reproduce --fig A2 --figure-module syntax.py": "SyntaxError",
    "train --data-path nowhere": "no such data folder: nowhere",
    "train --data-path noval": "expected train/<class>/ and val/<class>/",
    "train --data-path photos --mask nowhere.safetensors": "nowhere.safetensors",
    "train --data-path photos --mask bad.safetensors": "bad.safetensors",
    "train --data-path photos --resume nowhere.pth": "nowhere.pth",
    "train --data-path photos --resume bad.pth": "bad.pth",
    "train --data-path photos --batch-size 4 --output-dir file": "file is a file: name a folder",
    "train --data-path photos --batch-size 4 --output-dir file/in/it": "file is a file: name a folder",
    # a plan checks what the run checks
    "reproduce --fig A2 --data photos --classes 300 --plan": "300 classes requested, photos has 2: lower --classes",
    "reproduce --fig A2 --preset cpu --data photos --plan": "100 classes requested, photos has 2",
    "reproduce --fig A2 --preset quick --data photos --plan": "a batch of 512 is more than the 8 training images",
    "reproduce --fig A2 --data photos --classes 2 --batch-size 9 --plan": "a batch of 9 is more than the 8 training",
    "reproduce --fig A2 --preset paper --classes 300 --plan": "300 classes requested, tiny-imagenet-200 has 200",
    "reproduce --fig A2 --preset paper --batch-size 200000 --plan": "is more than the 100000 training images",
    "reproduce --fig A2 --fraction 0.99 --rounds 9 --plan": "would prune all of",
    "reproduce --fig A2 --data nowhere --plan": "no such data folder: nowhere",
    "reproduce --fig A2 --preset quick --data noval --plan": "has no folder val",
    # files of another kind
    "train --data-path photos --resume mask.safetensors": "is a mask of fastprune: give it as --mask",
    "train --data-path photos --resume photo.png": "photo.png is a PNG image, expected a checkpoint (checkpoint.pth)",
    "train --data-path photos --resume net.fastprune": "is a compiled network of fastprune, expected a checkpoint",
    "train --data-path photos --resume photos": "photos is a folder: name the file in it",
    "train --data-path photos --mask saved.pth": "is a file of torch.save: give a checkpoint as --resume",
    "train --data-path photos --mask photo.png": "photo.png is a PNG image, expected a mask (mask.safetensors)",
    "train --data-path photos --mask net.fastprune": "is a compiled network of fastprune, expected a mask",
    "compile photo.png --out network.onnx": "photo.png is a PNG image, expected a checkpoint (checkpoint.pth)",
    "compile mask.safetensors --out network.onnx": "mask.safetensors is a mask of fastprune, expected a checkpoint",
    "compile net.fastprune --out network.onnx": "is a compiled network of fastprune, expected a checkpoint",
    "prepare --out x": "--source is missing",
    "prepare --source nowhere --out x": "no such data folder: nowhere",
    "prepare --source photos --out file": "choose another folder",
    "prepare --source spoilt --out x": "0.jpg",
    "store ls --store nowhere": "--store DIR",
    "store merge nowhere": "name a store's folder or a tar",
    "report --store nowhere": "--store DIR",
    # devices
    "reproduce --fig A2 --device gpu": "choose cpu, cuda or cuda:N",
    "reproduce --fig A2 --device cuda:99": "this machine has",
    "train --data-path photos --device cuda:99": "--device cpu trains without one",
    "train --data-path photos --compute sparse --device cuda:99": "cuda:99",
    "train --data-path photos --gpu-options fused_norm=on,fused_nose=off": "unknown GPU option 'fused_nose'",
    "train --data-path photos --device cpu --gpu-options fused_loss=on": "fused_loss=on requires a GPU",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_mend(command, place, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        if path.name != "runs" or "photos" in command:
            (tmp_path / path.name).symlink_to(path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(shlex.split(command)) == BAD_INPUT
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert MISTAKES[command] in lines[0]
    # Where images are found to be spoilt as they are read, at most the folders for what it would have made.
    late = {"results", "runs", "x"} if "spoilt" in command or "--store file" in command else set()
    assert {path.name for path in tmp_path.iterdir()} - before <= late
    assert not list(tmp_path.rglob("results/*/*"))
