"""train.py from its flags to its checkpoints, on generated images and once on real ones."""

import argparse
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from fastprune.cli.train import UNSUPPORTED, main, parser, request_of
from fastprune.errors import InputError
from fastprune.loaders import Crop, find_or_prepare, open_data
from fastprune.loaders.preparation import prepare
from fastprune.loaders.synthetic import SyntheticData
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.masks import Mask, layout
from fastprune.specs import ScheduleSpec
from fastprune.training import classification as classify
from fastprune.training import models as train_model
from fastprune.training.checkpoint import replace_file
from fastprune.training.classification import MEAN, STD, Epochs, TrainLog, mixing, sparsity_at
from fastprune.training.request import PruneSchedule
from fastprune.training.step import EpochMetrics, Evaluation
from tests.fakes import made_up_options

ROOT = Path(__file__).resolve().parents[2]
MODEL = "shufflenet_v2_x0_5"
CLASSES, WEIGHTS = 3, 333_840


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder of varying sizes, easy to learn: each class has its colour."""
    root, g = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, each in (("train", 12), ("val", 5)):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(each):
                pixels = g.integers(0, 120, (*g.integers(30, 50, 2), 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{number}.png")
    return root


def flags(folder: Path, out: Path | str, *more: str) -> list[str]:
    sizes = ["--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32"]
    basic = ["--data-path", str(folder), "--model", MODEL, "-b", "12", "--epochs", "2", "--lr", "0.05", "-j", "0"]
    return [*basic, *sizes, "--loader", "torchvision", "--device", "cpu", "--output-dir", str(out), *more]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def plain(content: dict, name: str = MODEL) -> nn.Module:
    model = torchvision.models.get_model(name, num_classes=CLASSES)
    model.load_state_dict(content["model"])
    return model.eval()


def equal(a: dict, b: dict) -> None:
    """Weights, momentum, mask and epoch are the same to the bit."""
    assert a["epoch"] == b["epoch"]
    assert a["scaler"] == b["scaler"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for i, kept in a["optimizer"]["state"].items():
        assert kept.keys() == b["optimizer"]["state"][i].keys()
        for key, value in kept.items():
            assert torch.equal(value, b["optimizer"]["state"][i][key]), (i, key)
    assert ("model_ema" in a) == ("model_ema" in b)
    for name, value in a.get("model_ema", {}).items():
        assert torch.equal(value, b["model_ema"][name]), name
    assert (a["mask"] is None) == (b["mask"] is None)
    for name, value in (a["mask"] or {}).items():
        assert torch.equal(value, b["mask"][name]), name


@pytest.fixture(scope="module")
def dense(folder, tmp_path_factory) -> Path:
    """A dense run's checkpoint of two epochs. Not to be changed."""
    out = tmp_path_factory.mktemp("dense")
    assert main(flags(folder, out)) == 0
    return out / "checkpoint.pth"


def refused(capsys, argv: list[str]) -> str:
    """The one line that a bad call gets, with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0].removeprefix("train.py: ")


# ---------------------------------------------------------------- flags


def test_every_unsupported_flag_is_accepted_at_its_default_and_named_otherwise(capsys):
    at_default, other = [], []
    for flag, (default, kind, _) in UNSUPPORTED.items():
        if kind is bool:
            other.append([flag])
        else:
            at_default += [] if default is None else [flag, str(default)]
            other.append([flag, {int: "7", float: "0.25", str: "x"}[kind]])
    request_of(parser().parse_args(["--data-path", "x", *at_default]))
    for given in other:
        assert refused(capsys, ["--data-path", "x", *given]).startswith(f"{given[0]} is not supported: ")
    line = refused(capsys, ["--data-path", "x", "--opt", "lion", *(word for given in other for word in given)])
    for flag in [*UNSUPPORTED, "--opt lion"]:
        assert f"{flag} is not supported: " in line


def test_all_flags_of_the_reference_are_known():
    reference = """--data-path --model --device -b --batch-size --epochs -j --workers --opt --lr --momentum --wd
    --weight-decay --norm-weight-decay --bias-weight-decay --transformer-embedding-decay --label-smoothing --mixup-alpha
    --cutmix-alpha --lr-scheduler --lr-warmup-epochs --lr-warmup-method --lr-warmup-decay --lr-step-size --lr-gamma
    --lr-min --print-freq --output-dir --resume --start-epoch --cache-dataset --sync-bn --test-only --auto-augment
    --ra-magnitude --augmix-severity --random-erase --amp --world-size --dist-url --model-ema --model-ema-steps
    --model-ema-decay --use-deterministic-algorithms --interpolation --val-resize-size --val-crop-size --train-crop-size
    --clip-grad-norm --ra-sampler --ra-reps --weights --backend --use-v2"""
    assert set(reference.split()) <= set(parser()._option_string_actions)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lr-scheduler", "plateau"], "unknown --lr-scheduler plateau: choose one of steplr, "),
        (["--lr-warmup-method", "sine"], "unknown --lr-warmup-method sine: choose linear or constant"),
        (["--amp-dtype", "fp16"], "--amp-dtype requires --amp"),
        (["--opt", "sgd_nesterov", "--momentum", "0"], "--opt sgd_nesterov requires --momentum above 0"),
        (["--sparsity", "1"], "argument --sparsity: 1 is not a fraction"),
        (["--sparsity", "0.5", "--mask", "x"], "argument --mask: not allowed with argument --sparsity"),
        (["--compute", "fast"], "argument --compute: invalid choice: 'fast'"),
        (["--epochs", "0"], "argument --epochs: 0 is not a whole number of 1 or more"),
        (["--lr", "nan"], "argument --lr: nan is not a number above 0"),
        (["--device", "abacus"], "unknown --device abacus"),
        (["--device", "meta"], "--device meta is not supported"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate (see --help)"),
    ],
)
def test_bad_usage(capsys, given, expected):
    assert refused(capsys, ["--data-path", "x", *given]).startswith(expected)


def test_a_home_folder_is_found_where_no_shell_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    given = ["--data-path=~/images", "--output-dir=~/out", "--resume=~/c.pth", "--store=~/runs", "--mask=~/m"]
    request = request_of(parser().parse_args(given))
    home = Path("/home/user")
    assert request.data == "/home/user/images"
    assert [request.output, request.resume, request.store, request.mask] == [
        home / name for name in ("out", "c.pth", "runs", "m")
    ]


@pytest.mark.parametrize("decay", ["steplr", "cosineannealinglr", "exponentiallr"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("method", ["constant", "linear"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:The epoch parameter")
def test_the_rate_at_each_epochs_start_is_the_references(decay, warmup, method):
    given = ["--data-path", "x", "--epochs", "14", "--lr", "0.4", "--lr-scheduler", decay, "--lr-step-size", "4"]
    given += ["--lr-gamma", "0.7", "--lr-min", "0.01", "--lr-warmup-epochs", str(warmup), "--lr-warmup-method", method]
    schedule = request_of(parser().parse_args([*given, "--lr-warmup-decay", "0.2"])).schedule
    s = torch.optim.lr_scheduler
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    rates = {
        "steplr": lambda: s.StepLR(sgd, 4, 0.7),
        "cosineannealinglr": lambda: s.CosineAnnealingLR(sgd, 14 - warmup, 0.01),
        "exponentiallr": lambda: s.ExponentialLR(sgd, 0.7),
    }[decay]()
    if warmup:
        rise = s.ConstantLR(sgd, 0.2, 3) if method == "constant" else s.LinearLR(sgd, 0.2, total_iters=3)
        rates = s.SequentialLR(sgd, [rise, rates], [3])
    for epoch in range(14):
        assert schedule.lr_at(epoch) == pytest.approx(rates.get_last_lr()[0], rel=1e-9), epoch
        rates.step()


def test_reading_the_flags_imports_nothing_heavy():
    code = (
        "import sys; from fastprune.cli.train import *; request_of(parser().parse_args(['--data-path', 'x']));"
        "print(sorted({'torch', 'numpy', 'numba', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- a run


def test_lines_and_a_checkpoint_that_plain_torchvision_reads(folder, tmp_path, capsys):
    given = flags(folder, tmp_path, "--print-freq", "2", "--label-smoothing", "0.1", "--opt", "sgd_nesterov")
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    epoch = (
        r"Epoch: \[{}\]  \[{}/3\]  eta: 0:00:\d\d  lr: 0.05  img/s: [\d.]+  loss: {what}  acc1: {what}  acc5: {what}$"
    )
    running = r"[\d.]+ \([\d.]+\)"
    expected = ["Data ", f"Model {MODEL}, fp32 on cpu ", f"Dense: {WEIGHTS} conv weights", "Start training"]
    for e in range(2):
        expected += [epoch.format(e, i, what=running) for i in (0, 2)]
        expected += [epoch.format(e, 3, what=r"[\d.]+")]
        expected += [rf"Epoch: \[{e}\] Total time: 0:00:", r"Test:  Acc@1 [\d.]+ Acc@5 100.000 loss [\d.]+$"]
    expected += ["Training time 0:00:"]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), (line, pattern)

    content = load(tmp_path / "checkpoint.pth")
    assert content["epoch"] == 1
    assert content["mask"] is None
    assert content["args"]["label_smoothing"] == 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth"]
    model = plain(content)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    sgd.load_state_dict(content["optimizer"])
    assert sgd.param_groups[0]["momentum"] == 0.9
    assert sgd.param_groups[0]["nesterov"]
    place = find_or_prepare(folder, tmp_path, loader="torchvision", any_size=True)
    source = open_data(*place, crop=Crop(32, 36, 32, MEAN, STD))
    hits = 0
    with torch.no_grad():
        for images, labels in source.val(batch_size=4):
            hits += int((model(images).argmax(1) == labels).sum())
    assert lines[-2].startswith(f"Test:  Acc@1 {100 * hits / source.manifest.val_count:.3f} ")

    assert main([*given, "--test-only", "--resume", str(tmp_path / "checkpoint.pth")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-2]


class Later:
    """A Snapshot that a device makes some steps after it was asked for. done: its steps."""

    def __init__(self, step: int, device: list[int]) -> None:
        self.step, self.device = step, device

    def is_ready(self) -> bool:
        return self.device[0] >= self.step

    def result(self) -> tuple[Evaluation, int]:
        assert self.is_ready(), "the host waits"
        return Evaluation(2.0 / self.step, 0.25 * self.step, 1.0), 8 * self.step


def test_lines_within_an_epoch_do_not_wait_for_a_gpu(capsys):
    """A device that falls behind: a line is printed when its sums have come, only the latest of several."""
    device, host = [0], 0
    log = TrainLog(4, 8, ScheduleSpec(0.1, 2), every=1, so_far=lambda: Later(host, device), epoch=1, world_size=2)
    shown = []
    for host, device[0] in ((1, 0), (2, 0), (3, 2), (4, 2)):  # noqa: B007, read in so_far
        log.batch(8)
        shown.append(capsys.readouterr().out)
    assert [bool(text) for text in shown] == [False, False, True, False]
    assert re.fullmatch(
        r"Epoch: \[1\]  \[1/4\]  eta: 0:00:00  lr: 0.1  img/s: [\d.]+  loss: 1.0000 \(1.0000\)  acc1: 50.000 "
        r"\(50.000\)  acc5: 100.000 \(100.000\)\n",
        shown[2],
    )
    metrics = EpochMetrics(2, 0.1, 1.25, 0.5, 1.5, 0.25, 32.0, 9.0, 1.0, 0.75, 1.25, 0.375, 0.875)
    log.epoch(metrics)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch: [1]  [4/4]  eta: 0:00:00  lr: 0.1  img/s: 32.0  loss: 1.2500  acc1: 50.000  acc5: 100.000",
        "Epoch: [1] Total time: 0:00:02",
        "Test:  Acc@1 25.000 Acc@5 75.000 loss 1.5000",
        "Test: EMA Acc@1 37.500 Acc@5 87.500 loss 1.2500",
    ]


def test_same_seed_same_run_other_seed_another(folder, tmp_path, dense):
    for name, seed in (("same", "0"), ("other", "1")):
        assert main(flags(folder, tmp_path / name, "--seed", seed)) == 0
    equal(load(tmp_path / "same" / "checkpoint.pth"), load(dense))
    other = load(tmp_path / "other" / "checkpoint.pth")["model"]
    assert not torch.equal(other["conv1.0.weight"], load(dense)["model"]["conv1.0.weight"])


@pytest.mark.parametrize("given", [["--amp"], ["--amp", "--amp-dtype", "fp16"]], ids=["bf16", "fp16"])
def test_mixed_precision_resumes_to_the_bit(folder, tmp_path, given):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(flags(folder, whole, *given)) == 0
    assert main(flags(folder, part, *given, "--epochs", "1")) == 0
    assert main(flags(folder, part, *given, "--resume", str(part / "checkpoint.pth"))) == 0
    equal(load(part / "checkpoint.pth"), load(whole / "checkpoint.pth"))
    assert bool(load(whole / "checkpoint.pth")["scaler"]) == ("fp16" in given)


def test_no_output_folder_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags(folder, "", "--epochs", "1", "--sparsity", "0.5")) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(folder, tmp_path):
    """Under a mask, with dropout, whose draws must not depend on where the run was resumed."""
    more = ["--model", "mobilenet_v3_small", "--epochs", "3", "--print-freq", "1", "--sparsity", "0.3"]
    more += ["--lr-warmup-epochs", "1", "--lr-warmup-method", "linear", "--lr-scheduler", "cosineannealinglr"]
    assert main(flags(folder, tmp_path / "whole", *more)) == 0
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts/train.py"), *flags(folder, out, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Epoch: [1]  [1/3]"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert load(out / "checkpoint.pth")["epoch"] == 0
    assert main(flags(folder, out, *more, "--resume", str(out / "checkpoint.pth"))) == 0
    equal(load(out / "checkpoint.pth"), load(tmp_path / "whole" / "checkpoint.pth"))


@pytest.mark.slow
def test_two_ranks_train_and_resume(folder, tmp_path):
    """Each rank's batch of 6; a run of two epochs is one of one epoch, resumed."""

    def torchrun(out: Path, *more: str) -> list[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        every = ["-b", "6", "--sparsity", "0.5", "--prune-schedule", "geometric", "--prune-end-epoch", "0"]
        every += [
            "--model-ema",
            "--model-ema-steps",
            "3",
            "--model-ema-decay",
            "0",
            "--clip-grad-norm",
            "1",
            "--mixup-alpha",
            "0.2",
        ]
        command = [*launch, str(ROOT / "scripts/train.py"), *flags(folder, out, *every, *more)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    lines = torchrun(tmp_path / "whole")
    assert sum(line.startswith("Test:  Acc@1") for line in lines) == 2  # one rank prints
    assert f"Model {MODEL}, fp32 on cpu (1 thread), batches of 6 on each of 2 ranks" in lines
    assert any(line.startswith("Epoch: [1]  [3/3]") for line in lines)
    torchrun(tmp_path / "part", "--epochs", "1")
    torchrun(tmp_path / "part", "--resume", str(tmp_path / "part" / "checkpoint.pth"))
    equal(load(tmp_path / "part" / "checkpoint.pth"), load(tmp_path / "whole" / "checkpoint.pth"))


# ---------------------------------------------------------------- recipes of today

EVERYTHING = [
    *("--opt", "adamw", "--lr", "0.002", "--weight-decay", "0.05", "--norm-weight-decay", "0", "--clip-grad-norm", "1"),
    *("--bias-weight-decay", "0.01", "--mixup-alpha", "0.2", "--cutmix-alpha", "1", "--label-smoothing", "0.1"),
    *("--auto-augment", "ra", "--random-erase", "0.5", "--interpolation", "bicubic"),
    *("--model-ema", "--model-ema-steps", "2", "--model-ema-decay", "0.9"),
    *("--sparsity", "0.9", "--prune-schedule", "cubic", "--prune-end-epoch", "1", "--log", "csv"),
]


def test_everything_at_once_resumes_to_the_bit_and_says_what_it_does(folder, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    every = [*EVERYTHING, "--epochs", "3", "--loader", "auto"]
    assert main(flags(folder, whole, *every)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Note: torchvision's transforms read the images, for --auto-augment ra, --random-erase 0.5, " in "\n".join(
        lines
    )
    # Epoch 0 begins with 0.9 (1 - (1 - 1/2)^3), epoch 1 with all of it.
    kept = [f"Sparsity {s}: {WEIGHTS - round(float(s) * WEIGHTS)} " for s in ("0.7875", "0.9000")]
    for text in kept:
        assert any(line.startswith(text) for line in lines), text
    assert sum(line.startswith("Test: EMA Acc@1 ") for line in lines) == 3

    saved = classify.save_checkpoint

    def save_and_stop(*args):
        saved(*args)
        if args[2] == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "save_checkpoint", save_and_stop)
        assert main(flags(folder, part, *every)) == 130
    capsys.readouterr()
    assert main(flags(folder, part, *every, "--resume", str(part / "checkpoint.pth"))) == 0
    assert f"Resumed {part}/checkpoint.pth, 1 epochs done\nSparsity 0.7875" in capsys.readouterr().out
    a, b = load(whole / "checkpoint.pth"), load(part / "checkpoint.pth")
    equal(a, b)
    assert a["args"]["auto_augment"] == "ra"
    rows = [(out / "metrics.csv").read_text().splitlines() for out in (whole, part)]
    assert [len(text) for text in rows] == [4, 4]
    timed = {"images_per_second", "seconds"}
    columns = [i for i, name in enumerate(rows[0][0].split(",")) if name not in timed]
    same = [[[line.split(",")[i] for i in columns] for line in text] for text in rows]
    assert same[0] == same[1]
    assert rows[0][0].startswith("epoch,lr,train_loss,")
    assert rows[0][0].endswith(",ema_loss,ema_accuracy,ema_accuracy5,density")

    assert main(flags(folder, tmp_path, "--test-only", "--model-ema", "--resume", str(whole / "checkpoint.pth"))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-2]
    # As torch's own tools read it.
    average = AveragedModel(plain(a), use_buffers=True)
    average.load_state_dict(a["model_ema"])
    groups = a["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.01]
    adamw = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1)) for _ in g["params"]]} for g in groups])
    adamw.load_state_dict(a["optimizer"])


@pytest.mark.slow
def test_an_ema_that_the_file_lacks(folder, tmp_path, dense, capsys):
    line = refused(capsys, flags(folder, tmp_path, "--test-only", "--model-ema", "--resume", str(dense)))
    assert line == "--test-only --model-ema tests an average that --resume must bring: the file has none"
    torch.save(load(dense) | {"epoch": 0}, tmp_path / "one.pth")
    assert main(flags(folder, tmp_path, "--model-ema", "--resume", str(tmp_path / "one.pth"))) == 0
    assert f"note: {tmp_path}/one.pth has no moving average: it begins here" in capsys.readouterr().out
    bad = load(tmp_path / "checkpoint.pth")
    del bad["model_ema"]["module.fc.bias"]
    torch.save(bad, tmp_path / "bad.pth")
    line = refused(capsys, flags(folder, tmp_path, "--resume", str(tmp_path / "bad.pth")))
    assert line.endswith("is damaged or foreign (ValueError: model_ema is of another network)")


@pytest.mark.slow
def test_another_optimisers_state_is_no_momentum(folder, tmp_path, dense):
    """A checkpoint of SGD goes on with RMSprop as plain weights do, which have none."""
    content = load(dense) | {"epoch": 0}
    for name, kept in (("sgd", content), ("none", {k: v for k, v in content.items() if k != "optimizer"})):
        torch.save(kept, tmp_path / f"{name}.pth")
        given = ["--opt", "rmsprop", "--lr", "0.001", "--resume", str(tmp_path / f"{name}.pth")]
        assert main(flags(folder, tmp_path / name, *given)) == 0
    equal(*(load(tmp_path / name / "checkpoint.pth") for name in ("sgd", "none")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--auto-augment", "cubist"], "unknown --auto-augment cubist: choose one of ra, ta_wide, augmix, imagenet"),
        (["--interpolation", "cubic"], "unknown --interpolation cubic: choose one of nearest, "),
        (
            ["--loader", "ffcv", "--random-erase", "0.1"],
            "--loader ffcv cannot do --random-erase 0.1, which",
        ),
        (["--loader", "resident", "--auto-augment", "ra"], "--loader resident cannot do --auto-augment ra, "),
        (["--opt", "adamw", "--compute", "sparse"], "--compute sparse is not possible here: the sparse engine has no"),
        (["--prune-schedule", "cubic"], "--prune-schedule cubic requires --sparsity, at which it ends"),
        (["--prune-end-epoch", "3"], "--prune-end-epoch requires --prune-schedule geometric or cubic"),
        (
            ["--prune-schedule", "cubic", "--sparsity", "0.5", "--prune-end-epoch", "9", "--epochs", "9"],
            "--prune-schedule runs from epoch 0 to 9: expected two epochs from 0 to 8, in order",
        ),
        (["--log", "csv", "--output-dir", ""], "--log requires --output-dir"),
        (["--log", "paper"], "argument --log: invalid choice: 'paper'"),
        (["--mixup-alpha", "-1"], "argument --mixup-alpha: -1 is not a number of 0 or more"),
        (["--model", "timm/resnet1"], "timm has no model resnet1: did you mean timm/resnet"),
        (
            ["--model", "timm/resnet18", "--weights", "x"],
            "timm/resnet18 has no weights x: choose one of DEFAULT, a1",
        ),
        (
            ["--model", "timm/resnet18", "--weights", "a1_in1k"],
            "--weights a1_in1k are for 1000 classes, but the da",
        ),
    ],
)
def test_bad_recipes(tmp_path, capsys, given, expected):
    data = ["--data-path", "synthetic", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert refused(capsys, [*data, *given]).startswith(expected)


def test_timm_is_asked_for_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    data = ["--data-path", "synthetic", "--device", "cpu", "--output-dir", str(tmp_path)]
    line = refused(capsys, [*data, "--model", "timm/resnet18"])
    assert line == "--model timm/resnet18 needs timm, which is not installed: run pip install timm"


@pytest.mark.slow
def test_a_model_of_timm(folder, tmp_path, capsys):
    pytest.importorskip("timm")
    for name, weights, expected in (
        ("resnet1", [], "timm has no model resnet1: did you mean timm/resnet"),
        ("resnet18", ["--weights", "x"], "timm/resnet18 has no weights x: choose one of DEFAULT, a1_in1k, "),
        ("resnet18", ["--weights", "a1_in1k"], "--weights a1_in1k are for 1000 classes, but the data has 3"),
    ):
        assert refused(capsys, flags(folder, tmp_path, "--model", f"timm/{name}", *weights)).startswith(expected)
    given = ["--model", "timm/mobilenetv3_small_050", "--sparsity", "0.5", "--epochs", "1", "--prune", "all"]
    assert main(flags(folder, tmp_path, *given)) == 0
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)
    model.load_state_dict(load(tmp_path / "checkpoint.pth")["model"])


def test_sparsity_by_epoch():
    geometric, cubic = (PruneSchedule(name, 0.9, 2, 5) for name in ("geometric", "cubic"))
    assert sparsity_at(geometric, 1) is None
    # Each of four rounds keeps a fraction of 0.1 ** (1 / 4) of what was left.
    for epoch, kept in ((2, 0.1**0.25), (3, 0.1**0.5), (4, 0.1**0.75), (5, 0.1), (9, 0.1)):
        assert sparsity_at(geometric, epoch) == pytest.approx(1 - kept)
    for epoch, left in ((2, 27 / 64), (3, 8 / 64), (4, 1 / 64), (5, 0.0), (9, 0.0)):
        assert sparsity_at(cubic, epoch) == pytest.approx(0.9 * (1 - left))
    assert sparsity_at(geometric, 5) == sparsity_at(cubic, 5) == 0.9


def test_the_decay_of_the_average_is_adjusted_as_in_the_reference():
    given = ["--data-path", "x", "-b", "128", "--epochs", "600", "--model-ema", "--model-ema-steps", "32"]
    ema = request_of(parser().parse_args(given)).adjusted_ema(8)
    assert ema is not None
    # 1 - 8 x 128 x 32 / 600 x (1 - 0.99998)
    assert ema.decay == pytest.approx(1 - 54.613333 * 0.00002)
    assert ema.steps == 32
    few = request_of(parser().parse_args([*given, "--epochs", "1", "--model-ema-decay", "0.5"])).adjusted_ema(1)
    assert few is not None
    assert few.decay == 0.0


def test_mixup_and_cutmix_are_torchvisions(folder):
    """Drawn from torch's generator, which each epoch seeds."""
    given = ["--data-path", "x", "--mixup-alpha", "0.3", "--cutmix-alpha", "1"]
    mix = mixing(request_of(parser().parse_args(given)), 5)
    assert mix is not None
    choice = v2.RandomChoice([v2.MixUp(alpha=0.3, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)])
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(6)]

    class Given(list):
        def set_epoch(self, epoch: int) -> None: ...

    epochs = Epochs(Given(batches), 3, 0, mix)
    runs = []
    for _ in range(2):
        epochs.set_epoch(1)
        seed = torch.initial_seed()
        runs.append(list(epochs))
    torch.manual_seed(seed)
    for (images, labels), (found, classes), again in zip(batches, *runs, strict=True):
        expected = choice(images, labels)
        for a, b, c in zip(expected, (found, classes), again, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c)
        assert classes.shape == (4, 5)
        assert not torch.equal(found, images)
    assert mixing(request_of(parser().parse_args(["--data-path", "x"])), 5) is None


# ---------------------------------------------------------------- masks


def test_sparsity_prunes_the_smallest_weights_and_holds(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path, "--sparsity", "0.9", "--epochs", "1")) == 0
    assert f"Sparsity 0.9000: {WEIGHTS // 10} of {WEIGHTS} conv weights are left" in capsys.readouterr().out
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = torchvision.models.get_model(MODEL, num_classes=CLASSES)
    named = conv_weights(initial)
    bar = torch.cat([w.detach().abs().flatten() for _, w in named]).sort().values[WEIGHTS - WEIGHTS // 10]
    mask = Mask.load(tmp_path / "mask.safetensors").tensors()
    content = load(tmp_path / "checkpoint.pth")
    model = plain(content)
    names = [name for name, _ in model.named_parameters()]
    weights = dict(model.named_parameters())
    for name, weight in named:
        assert torch.equal(mask[name], weight.abs() >= bar), name
        assert torch.equal(content["mask"][name], mask[name])
        momentum = content["optimizer"]["state"][names.index(name)]["momentum_buffer"]
        for value in (weights[name], momentum):
            gone = value[~mask[name]]
            assert torch.equal(gone, torch.zeros_like(gone))
            assert not torch.signbit(gone).any()


def test_a_mask_from_a_file(folder, tmp_path):
    g = torch.Generator().manual_seed(0)
    named = conv_weights(torchvision.models.get_model(MODEL, num_classes=CLASSES))
    mask = Mask.from_tensors({name: torch.rand(w.shape, generator=g) < 0.3 for name, w in named})
    mask.save(tmp_path / "given.safetensors")
    out = tmp_path / "out"
    assert main(flags(folder, out, "--mask", str(tmp_path / "given.safetensors"), "--epochs", "1")) == 0
    assert (out / "mask.safetensors").read_bytes() == (tmp_path / "given.safetensors").read_bytes()
    weights = plain(load(out / "checkpoint.pth")).state_dict()
    for name, keep in mask.tensors().items():
        assert not weights[name][~keep].any()
        assert weights[name][keep].all()


def test_another_mask_begins_a_new_run_and_the_same_mask_goes_on(folder, tmp_path, dense, capsys):
    out, at = tmp_path / "out", ["--sparsity", "0.5"]
    assert main(flags(folder, out, *at, "--resume", str(dense))) == 0
    assert f"A new run from the weights in {dense}" in capsys.readouterr().out
    whole = load(out / "checkpoint.pth")
    assert whole["epoch"] == 1
    part = tmp_path / "part"
    assert main(flags(folder, part, *at, "--resume", str(dense), "--epochs", "1")) == 0
    kept = part / "checkpoint.pth"
    capsys.readouterr()
    assert main(flags(folder, part, *at, "--resume", str(kept))) == 0
    lines = capsys.readouterr().out
    assert f"Resumed {kept}, 1 epochs done\nnote: --epochs was 1 before\nSparsity 0.5000" in lines
    equal(load(kept), whole)
    assert main(flags(folder, part, "--resume", str(kept), "--test-only")) == 0  # the mask comes along
    assert "Sparsity 0.5000" in capsys.readouterr().out

    assert main(flags(folder, tmp_path / "more", "--sparsity", "0.75", "--resume", str(kept), "--epochs", "1")) == 0
    more = load(tmp_path / "more" / "checkpoint.pth")["mask"]
    assert sum(int(m.sum()) for m in more.values()) == WEIGHTS // 4
    assert not any((m & ~whole["mask"][name]).any() for name, m in more.items())
    less = refused(capsys, flags(folder, tmp_path / "less", "--sparsity", "0.2", "--resume", str(kept)))
    assert less == "--sparsity 0.2 is less than the 0.5000 pruned already"


def test_masks_of_other_networks(folder, tmp_path, capsys):
    for name, expected in (
        ("resnet18", "conv1.0.weight is missing"),
        ("shufflenet_v2_x1_0", "is [58, 24, 1, 1] there and [24, 24, 1, 1] here"),
    ):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        Mask.dense(layout(conv_weights(model))).save(tmp_path / f"{name}.safetensors")
        line = refused(capsys, flags(folder, tmp_path, "--mask", str(tmp_path / f"{name}.safetensors")))
        assert line.startswith(f"{tmp_path}/{name}.safetensors is a mask for another network: ")
        assert expected in line
    (tmp_path / "junk").write_bytes(b"junk")
    assert str(tmp_path / "junk") in refused(capsys, flags(folder, tmp_path, "--mask", str(tmp_path / "junk")))


# ---------------------------------------------------------------- checkpoints


def test_the_references_own_checkpoint_goes_on(folder, tmp_path, dense, capsys):
    content = load(dense)
    theirs = {name: content[name] for name in ("model", "optimizer", "epoch")} | {
        "args": argparse.Namespace(lr=0.05),
        "lr_scheduler": {"last_epoch": 2},
    }
    torch.save(theirs, tmp_path / "theirs.pth")
    for name, given in (("ours", dense), ("theirs", tmp_path / "theirs.pth")):
        assert main(flags(folder, tmp_path / name, "--epochs", "3", "--resume", str(given))) == 0
    equal(load(tmp_path / "theirs/checkpoint.pth"), load(tmp_path / "ours/checkpoint.pth"))


def test_plain_weights_begin_a_run(folder, tmp_path, dense, capsys):
    torch.save(load(dense)["model"], tmp_path / "weights.pth")
    assert main(flags(folder, tmp_path, "--resume", str(tmp_path / "weights.pth"), "--start-epoch", "1")) == 0
    out = capsys.readouterr().out
    assert f"A new run from the weights in {tmp_path / 'weights.pth'}" in out
    assert "Epoch: [1]" in out
    assert "Epoch: [0]" not in out


def test_weights_that_are_pruned_stay_so_whatever_file_they_come_in(folder, tmp_path, dense, capsys):
    """Plain weights with zeros, those of DDP, and those under torch.nn.utils.prune: not trained as dense."""
    model = plain(load(dense)).train()
    convs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    torch_prune.global_unstructured(convs, torch_prune.L1Unstructured, amount=0.75)
    hooked = model.state_dict()
    for module, name in convs:
        torch_prune.remove(module, name)
    files = {
        "zeros": model.state_dict(),
        "ddp": {f"module.{name}": value for name, value in model.state_dict().items()},
        "hooks": hooked,
        "ddp with hooks": {"model": {f"module.{name}": value for name, value in hooked.items()}},
    }
    expected = {name: w != 0 for name, w in conv_weights(model)}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        out = tmp_path / name
        capsys.readouterr()
        assert main(flags(folder, out, "--resume", str(tmp_path / f"{name}.pth"), "--epochs", "1")) == 0
        said = capsys.readouterr().out
        gone = WEIGHTS - WEIGHTS // 4
        assert f"note: {gone} weights of the file are zero: they stay pruned\nSparsity 0.7500" in said
        found = load(out / "checkpoint.pth")
        for layer, keep in expected.items():
            assert torch.equal(found["mask"][layer], keep)
            assert not found["model"][layer][~keep].any()


def test_prune_says_which_layers_and_is_asked_for_where_convs_are_few(folder, tmp_path, capsys):
    few = ["--model", "alexnet", "--epochs", "1", "-b", "36", "--train-crop-size", "64", "--val-resize-size", "64"]
    few += ["--val-crop-size", "64"]
    line = refused(capsys, flags(folder, tmp_path, *few, "--sparsity", "0.9"))
    assert line.startswith("--sparsity 0.9 would prune convs only, 2,468,544 of the 57,016,131 parameters of alexnet: ")
    assert "--prune all" in line
    assert refused(capsys, flags(folder, tmp_path, "--prune", "nothing*")).startswith(
        "--prune nothing*: include nothing* selects none of the weights"
    )
    assert main(flags(folder, tmp_path, "--prune", "stage4.*", "--sparsity", "0.5", "--epochs", "1")) == 0
    kept = load(tmp_path / "checkpoint.pth")["mask"]
    assert kept
    assert all(name.startswith("stage4.") for name in kept)
    assert sum(int(m.sum()) for m in kept.values()) == sum(m.numel() for m in kept.values()) // 2
    assert main(flags(folder, tmp_path, "--prune", "all", "--sparsity", "0.5", "--epochs", "1")) == 0
    assert "fc.weight" in load(tmp_path / "checkpoint.pth")["mask"]


def test_another_number_of_ranks_is_said(folder, tmp_path, dense, capsys):
    content = load(dense)
    assert content["args"]["ranks"] == 1
    content["args"]["ranks"] = 4
    content["epoch"] = 0
    torch.save(content, tmp_path / "four.pth")
    capsys.readouterr()
    assert main(flags(folder, tmp_path, "--resume", str(tmp_path / "four.pth"))) == 0
    assert "note: 4 ranks before, 1 now: a step sees 12 images, not 48" in capsys.readouterr().out


def test_a_checkpoint_goes_on_as_it_was_computed(folder, tmp_path, capsys):
    """On a CPU in fp32, where dense is not plain."""
    masked = ["--sparsity", "0.5", "--compute"]
    assert main(flags(folder, tmp_path / "whole", *masked, "plain")) == 0
    assert "computes" not in capsys.readouterr().out  # as asked
    assert main(flags(folder, tmp_path, *masked, "plain", "--epochs", "1")) == 0
    content = load(tmp_path / "checkpoint.pth")
    assert content["compute"] == "plain"
    old = {k: v for k, v in content.items() if k != "compute"}
    torch.save(old, tmp_path / "old.pth")  # of an older version
    torch.save(content | {"compute": "abacus"}, tmp_path / "odd.pth")

    again = flags(folder, tmp_path, "--resume", str(tmp_path / "checkpoint.pth"), *masked, "dense")
    capsys.readouterr()
    assert main(again) == 0
    assert capsys.readouterr().err == "train.py: goes on plain, as until its checkpoint, not dense\n"
    equal(load(tmp_path / "checkpoint.pth"), load(tmp_path / "whole" / "checkpoint.pth"))
    assert load(tmp_path / "checkpoint.pth")["compute"] == "plain"

    assert main(flags(folder, tmp_path / "old", "--resume", str(tmp_path / "old.pth"))) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    said = lines[lines.index("Start training") + 1]
    assert said == "computes densely: a training of 6 steps is too short"
    assert load(tmp_path / "old" / "checkpoint.pth")["compute"] == "dense"
    line = refused(capsys, flags(folder, tmp_path, "--resume", str(tmp_path / "odd.pth")))
    assert line.endswith("is damaged or foreign (ValueError: computed by 'abacus')")


def test_a_checkpoint_goes_on_with_its_gpu_options(folder, tmp_path, capsys, monkeypatch):
    """As on a GPU. Pruned between the epochs: a run has the same options under all its masks."""
    options, used = made_up_options(monkeypatch), "fused_norm=on,gradient_table=off,fused_loss=on"
    rest = ["--sparsity", "0.5", "--prune-schedule", "cubic", "--prune-end-epoch", "1", "--compute", "plain"]
    contents: list[dict] = []
    save = classify.save_checkpoint

    def save_and_keep(path, *args):
        save(path, *args)
        contents.append(load(path))

    monkeypatch.setattr(classify, "save_checkpoint", save_and_keep)
    assert main(flags(folder, tmp_path, *rest, "--store", str(tmp_path / "a"))) == 0
    assert capsys.readouterr().err.count("GPU options for batches of 12 x 3 x 32 x 32: fused_norm on (1.800 ms") == 1
    first, whole = contents
    assert (first["epoch"], first["gpu_options"], whole["gpu_options"]) == (0, used, used)
    assert whole["args"]["gpu_options"] == "auto"
    assert len(list((tmp_path / "a" / "choices").iterdir())) == 1

    torch.save(first, tmp_path / "first.pth")
    options.ms["fused_norm"] = 1.0  # slower on another machine, which has another store
    again = flags(folder, tmp_path, *rest, "--store", str(tmp_path / "b"), "--resume", str(tmp_path / "first.pth"))
    assert main(again) == 0
    assert capsys.readouterr().err == ""
    equal(load(tmp_path / "checkpoint.pth"), whole)
    assert load(tmp_path / "checkpoint.pth")["gpu_options"] == used

    assert main([*again, "--gpu-options", "fused_norm=off"]) == 0
    now = used.replace("norm=on", "norm=off")
    line = f"train.py: used GPU options {used} until its checkpoint, {now} from here\n"
    assert capsys.readouterr().err == line
    torch.save(first | {"gpu_options": "fused_nose=on"}, tmp_path / "first.pth")
    assert "is damaged or foreign (ValueError: unknown GPU option 'fused_nose'" in refused(capsys, again)


def test_what_cannot_be_computed_sparsely(folder, tmp_path, dense, capsys):
    more = ["--amp", "--sparsity", "0.5"]
    line = refused(capsys, flags(folder, tmp_path, *more, "--compute", "sparse"))
    assert line == "--compute sparse is not possible here: precision bf16"
    # A checkpoint from elsewhere is no demand: it goes on as this run can.
    torch.save(load(dense) | {"epoch": 0, "compute": "sparse"}, tmp_path / "sparse.pth")
    capsys.readouterr()
    assert main(flags(folder, tmp_path, "--amp", "--resume", str(tmp_path / "sparse.pth"))) == 0
    said = "train.py: computed sparse until its checkpoint, plain from here (precision bf16)\n"
    assert capsys.readouterr().err == said


def test_bf16_is_advised_against_where_it_is_slow(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classify, "bf16_advice", lambda instead: f"slow: {instead}")
    given = flags(folder, tmp_path, "--test-only")
    for more, expected in ((["--amp"], True), ([], False), (["--amp", "--amp-dtype", "fp16"], False)):
        assert main([*given, *more]) == 0
        assert ("slow: leave out --amp" in capsys.readouterr().out.splitlines()) == expected


def test_checkpoints_that_do_not_fit(folder, tmp_path, dense, capsys):
    path = tmp_path / "x.pth"

    def line(content: object, *more: str) -> str:
        torch.save(content, path)
        return refused(capsys, flags(folder, tmp_path, "--resume", str(path), *more)).replace(str(path), "X")

    content = load(dense)
    assert line(content, "--model", "resnet18").startswith(
        "X is of another architecture than resnet18: conv1.weight is missing, and "
    )
    classes = torchvision.models.get_model(MODEL, num_classes=10).state_dict()
    assert line(classes) == f"X is of a {MODEL} for 10 classes, but the data has 3 (fc.weight differs)"
    assert line({"epoch": 3}).startswith("X holds no weights")
    assert line([1, 2]).startswith("X holds no weights")
    assert line({"model": content["model"], "epoch": "late"}).startswith("X is damaged or foreign")
    wrong = {name: keep[:1] for name, keep in load(dense)["model"].items() if name == "conv1.0.weight"}
    assert line(content | {"mask": wrong}).startswith("X is a mask for another network")
    assert line({"model": Path("x")}).startswith("X is no checkpoint that loads with weights_only=True")
    path.write_bytes(dense.read_bytes()[:5000])
    assert "X is no checkpoint" in refused(capsys, flags(folder, tmp_path, "--resume", str(path))).replace(
        str(path), "X"
    )
    path.unlink()
    assert refused(capsys, flags(folder, tmp_path, "--resume", str(path))) == f"no such checkpoint: {path}"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- bad input, and what goes wrong


def test_bad_data(folder, tmp_path, capsys):
    for data, expected in (
        (tmp_path / "none", f"no such data folder: {tmp_path}/none"),
        (tmp_path / "none.beton", f"no such file: {tmp_path}/none.beton"),
        (tmp_path, f"the data folder {tmp_path} is empty"),
        ("", "--data-path is empty"),
    ):
        assert refused(capsys, [*flags(folder, tmp_path), "--data-path", str(data)]).startswith(expected)
    (tmp_path / "x.beton").touch()
    assert "needs one train*.beton beside x.beton, it holds none" in refused(
        capsys, [*flags(folder, tmp_path), "--data-path", str(tmp_path / "x.beton")]
    )
    assert "larger than the 36 training images" in refused(capsys, flags(folder, tmp_path, "-b", "37"))
    assert "--val-crop-size 40 is larger" in refused(capsys, flags(folder, tmp_path, "--val-crop-size", "40"))
    resized = refused(capsys, ["--data-path", "synthetic", "--device", "cpu", "--train-crop-size", "224"])
    assert resized.startswith(
        "--train-crop-size 224 does not fit synthetic, whose images are used at their own 32 x 32"
    )


def test_labels_outside_the_classes(folder, tmp_path, capsys, monkeypatch):
    opened = classify.open_images

    def fewer(*args, **kwargs):
        images = opened(*args, **kwargs)
        return replace(images, inputs=replace(images.inputs, classes=images.inputs.classes[: CLASSES - 1]))

    monkeypatch.setattr(classify, "open_images", fewer)
    line = refused(capsys, flags(folder, tmp_path))
    assert re.fullmatch(r"labels reach from \d to 2, but the network has 2 classes", line)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_models_that_cannot_be_trained(folder, tmp_path, capsys, monkeypatch):
    def line(name: str, *more: str) -> str:
        return refused(capsys, flags(folder, tmp_path, "--model", name, *more))

    assert line("resnet19").startswith("torchvision has no model resnet19: did you mean resnet")
    assert "auxiliary classifiers" in line("inception_v3")
    assert line("alexnet", "--train-crop-size", "31").startswith("alexnet takes no images of 31 x 31 pixels: ")
    assert line("vit_b_32").startswith("vit_b_32 takes no images of 32 x 32 pixels: Wrong image height")
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda *a, **k: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES))
    )
    no_convs = line(MODEL)
    assert no_convs.startswith("--prune conv: Sequential has nothing to prune")
    assert no_convs.endswith("; --prune all covers other layers, too")


def test_pretrained_weights(folder, tmp_path, capsys, monkeypatch):
    def line(weights: str) -> str:
        return refused(capsys, flags(folder, tmp_path, "--weights", weights))

    assert line("IMAGENET1K_V9").startswith(f"{MODEL} has no weights IMAGENET1K_V9: choose one of IMAGENET1K_V1")
    expected = "--weights IMAGENET1K_V1 are for 1000 classes, but the data has 3"
    assert line("IMAGENET1K_V1") == expected

    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"cannot fetch ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1 .*no route.*--resume"):
        train_model.build_model(MODEL, "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", 1000, (64, 64), 0)


def test_a_diverged_run_keeps_the_last_good_checkpoint(folder, tmp_path, capsys):
    given = flags(folder, tmp_path, "--lr", "1e30", "--lr-warmup-epochs", "1", "--lr-warmup-decay", "1e-32")
    assert main([*given, "--epochs", "4"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"train.py: diverged in epoch 1 \(loss (nan|inf)\): the last good state is in {tmp_path}/checkpoint.pth\n",
        error,
    )
    content = load(tmp_path / "checkpoint.pth")
    assert content["epoch"] == 0
    assert all(value.isfinite().all() for value in content["model"].values())
    assert main([*flags(folder, tmp_path / "first", "--lr", "1e30")]) == 1
    assert capsys.readouterr().err.endswith(": no epoch before it was kept\n")
    assert not (tmp_path / "first" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(folder, tmp_path, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(classify.Trainer, "fit", fail)
    assert main(flags(folder, tmp_path)) == 1
    assert capsys.readouterr().err == (
        "train.py: out of memory on cpu: lower --batch-size (now 12) or --train-crop-size (now 32), or add --amp\n"
    )


def test_interrupted(folder, tmp_path, dense, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(classify.Trainer, "fit", stop)
    assert main(flags(folder, tmp_path)) == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"
    assert main(flags(folder, tmp_path, "--resume", str(dense))) == 130
    assert capsys.readouterr().err == f"train.py: interrupted: --resume {dense} continues\n"


# ---------------------------------------------------------------- data of one size


def fixed(data: Path | str, out: Path, *more: str) -> list[str]:
    basic = ["--data-path", str(data), "--model", MODEL, "-b", "20", "--epochs", "1", "-j", "0", "--device", "cpu"]
    return [*basic, "--output-dir", str(out), "--store", str(out / "store"), *more]


def test_tiny_imagenets_layout_prepared_and_raw_give_the_same_run(tmp_path, capsys):
    data = SyntheticData(classes=3, train_per_class=20, val_per_class=6, size=32)
    data.write_folder(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "listed", workers=1, beton=False, show=False)
    for name in ("raw", "listed"):
        assert main(fixed(tmp_path / name, tmp_path / f"out-{name}", "--loader", "torchvision")) == 0
        assert "32 x 32, normalised by their own mean (0." in capsys.readouterr().out
    equal(*(load(tmp_path / f"out-{name}" / "checkpoint.pth") for name in ("raw", "listed")))


@pytest.mark.slow
def test_a_beton_file(tmp_path, capsys):
    pytest.importorskip("ffcv")
    SyntheticData(classes=3, train_per_class=20, val_per_class=6, size=32).write_folder(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "prepared", workers=1, show=False)
    assert main(fixed(tmp_path / "prepared" / "train.beton", tmp_path / "beton")) == 0
    out = capsys.readouterr().out
    assert "60 training and 18 validation images in 3 classes" in out
    assert "loader ffcv" in out
    # Loaders agree to 1e-6 in each pixel, which training amplifies: compared is one network's test.
    given = ["--loader", "torchvision", "--test-only", "--resume", str(tmp_path / "beton" / "checkpoint.pth")]
    assert main(fixed(tmp_path / "raw", tmp_path / "files", *given)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_images(few_classes, tmp_path, capsys):
    given = ["--data-path", str(few_classes), "--model", MODEL, "-b", "50", "--epochs", "3", "--lr", "0.05", "-j", "0"]
    given += ["--sparsity", "0.5", "--output-dir", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main([*given, "--lr-scheduler", "cosineannealinglr", "--device", "cpu"]) == 0
    tests = re.findall(r"Test:  Acc@1 ([\d.]+)", capsys.readouterr().out)
    assert len(tests) == 3
    assert max(map(float, tests)) > 100 * 1.5 / 4  # well above chance: it has seen the images, with the right labels


def test_a_raw_miniplaces_folder_is_used_at_its_own_size(tmp_path, capsys):
    g = np.random.default_rng(0)
    names = [
        f"{split}/{letter}/{number:08d}.jpg" for split in ("train", "val") for letter in "abc" for number in range(4)
    ]
    names = [name if name.startswith("train") else name.replace("/", "_").replace("val_", "val/") for name in names]
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for i, name in enumerate(names):
        path = tmp_path / "places" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        lines[name.split("/")[0]].append(f"{name} {i // 4 % 3}\n")
    for split, text in lines.items():
        (tmp_path / "places" / f"{split}.txt").write_text("".join(text))
    (tmp_path / "places" / "categories.txt").write_text("/a 0\n/b 1\n/c 2\n")
    command = ["--data-path", str(tmp_path / "places"), "--store", str(tmp_path / "store"), "--model", MODEL, "-b", "6"]
    command += ["--epochs", "1", "--lr", "0.05", "-j", "0", "--loader", "torchvision", "--device", "cpu"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert "miniplaces: 12 training and 12 validation images in 3 classes, 32 x 32" in capsys.readouterr().out
    prepare(tmp_path / "places", tmp_path / "prepared", workers=1, beton=False, show=False)
    assert main([*command, "--data-path", str(tmp_path / "prepared"), "--output-dir", str(tmp_path / "again")]) == 0
    assert "miniplaces: 12 training and 12 validation images in 3 classes, 32 x 32" in capsys.readouterr().out
    equal(*(load(tmp_path / name / "checkpoint.pth") for name in ("out", "again")))


@pytest.mark.parametrize("loader", ["torchvision", "ffcv"])
def test_an_image_folder_is_cropped_even_where_all_images_have_one_size(loader, tmp_path, capsys):
    if loader == "ffcv":
        pytest.importorskip("ffcv")
    g = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        # FFCV's crops differ from call to call: batch norm over few images would now and then diverge.
        for i in range(16):
            Image.fromarray(g.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    given = ["--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32", "-b", "32", "--epochs", "1"]
    given += ["--model", MODEL, "-j", "0", "--loader", loader, "--device", "cpu", "--output-dir", str(tmp_path)]
    given += ["--lr", "0.001", "--store", str(tmp_path / "store")]
    assert main(["--data-path", str(tmp_path / "images"), *given]) == 0
    said = capsys.readouterr().out
    assert "cropped to 32 x 32 (validation: resized to 36, cropped to 32)" in said
    assert f"loader {loader} (asked for)" in said
    assert ("\nNote: FFCV's crops are not seeded, a resumed run differs; --loader" in said) == (loader == "ffcv")
    # Validation draws no crops.
    again = ["--test-only", "--resume", str(tmp_path / "checkpoint.pth")]
    assert main(["--data-path", str(tmp_path / "images"), *given, *again]) == 0
    said = capsys.readouterr().out
    assert "Note" not in said
    assert "random" not in said


def test_weights_that_are_random_are_said_to_be_where_they_are_tested(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path, "--test-only")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: these weights are random: give --resume CHECKPOINT, or --weights NAME" in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("batch_size", "used"), [(17, None), (19, 19)])
def test_an_epoch_says_how_many_images_it_drops_if_they_are_many(folder, tmp_path, capsys, batch_size, used):
    """Of 36: 17 at a time drop two, 19 at a time 17."""
    assert main(flags(folder, tmp_path, "--epochs", "1", "-b", str(batch_size), "--lr", "0.001")) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: an epoch trains on")]
    assert len(said) == (used is not None)
    if used:
        assert said[0].startswith(f"note: an epoch trains on {used} of the 36 images, others each time, ")
