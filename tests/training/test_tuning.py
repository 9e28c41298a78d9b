"""How GPU options are chosen: by a made-up clock, and with stand-ins for their kernels on a CPU."""

import gc
import json
import multiprocessing as mp
import threading
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.pruning.masks import Mask
from fastprune.specs import GpuOptions, OptimizerSpec, ScheduleSpec, forced_options
from fastprune.training import trainer as trainer_module
from fastprune.training.trainer import Trainer
from fastprune.training.tuning import Choice, Choices, choose
from tests.fakes import Epochs, made_up_options
from tests.training.test_capture import Replays

NAMES = list(asdict(GpuOptions()))
NORM, ALL_OFF = GpuOptions(fused_norm=True), GpuOptions()
QUESTION = {"device": "made up", "images": [8, 3, 32, 32]}


def measure_by(cost):
    """Options change a step of 2 ms by these milliseconds each, or fail."""

    def measure(without: GpuOptions, added: GpuOptions):
        (name,) = (n for n in NAMES if getattr(without, n) != getattr(added, n))
        if isinstance(cost[name], str):
            return cost[name]
        base = 2.0 + sum(cost[n] for n in NAMES if getattr(without, n))
        return base, base + cost[name]

    return measure


@pytest.mark.parametrize(
    ("cost", "used"),
    [
        ([-0.5, -0.1, -0.1], "on on on"),
        ([-0.5, 0.1, -0.1], "on off on"),
        ([0.0, 0.0, 0.0], "off off off"),
        ([-0.019, -0.02, -0.0199], "off on on"),  # 1 % of 2 ms, and of 1.98
        (["CompilationError: no", -0.5, float("nan")], "off on off"),
    ],
)
def test_an_option_is_used_if_it_saves_a_hundredth(cost, used):
    choice = choose(NAMES, {}, measure_by(dict(zip(NAMES, cost, strict=True))))
    assert choice.options == GpuOptions(*(word == "on" for word in used.split()))
    assert list(choice.timings) == NAMES


def test_each_is_timed_beside_those_that_were_faster_and_forced_ones_are_not_timed():
    asked = []

    def measure(without, added):
        asked.append((without, added))
        return 2.0, 1.0

    choice = choose(["gradient_table", "fused_loss"], {"fused_norm": True}, measure)
    assert choice.options == GpuOptions(True, True, True)
    table = replace(NORM, gradient_table=True)
    assert asked == [(NORM, table), (table, replace(table, fused_loss=True))]
    assert choose([], {"fused_norm": False}, measure).options == ALL_OFF
    assert len(asked) == 2


def test_a_choice_in_a_line():
    choice = Choice(NORM, {"fused_norm": (2.1, 1.95), "fused_loss": "RuntimeError: no such kernel"})
    assert str(choice) == (
        "fused_norm on (1.950 ms a step, 2.100 without), gradient_table off, "
        "fused_loss off (RuntimeError: no such kernel)"
    )


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        ("auto", {}),
        ("off", dict.fromkeys(NAMES, False)),
        ("on", dict.fromkeys(NAMES, True)),
        ("fused_norm=on, fused_loss=off", {"fused_norm": True, "fused_loss": False}),
        (str(NORM), asdict(NORM)),
    ],
)
def test_options_as_text(text, forced):
    assert forced_options(text) == forced
    assert GpuOptions.of(str(NORM)) == NORM


@pytest.mark.parametrize("text", ["", "fast", "fused_norm", "fused_norm=1", "fused_norm=on,fused_norm=off", "a=on"])
def test_text_that_is_none(text):
    with pytest.raises(ValueError, match=r"choose from fused_norm|give each option once"):
        forced_options(text)


def fails() -> Choice:
    raise AssertionError("it is known")


def made(milliseconds: float = 1.5) -> Choice:
    return Choice(NORM, {"fused_norm": (2.0, milliseconds), "fused_loss": "OutOfMemoryError: no"})


def test_a_choice_is_kept_and_said_once_a_process(tmp_path, capsys):
    here, folder = Choices(tmp_path / "choices"), tmp_path / "choices"
    assert here.get(QUESTION, made) == here.get(QUESTION, fails) == made()
    line = f"fastprune: GPU options for batches of 8 x 3 x 32 x 32: {made()}"
    assert capsys.readouterr().err == f"{line}\n"
    there = Choices(folder)
    assert there.get(dict(reversed(QUESTION.items())), fails) == there.get(QUESTION, fails) == made()
    assert capsys.readouterr().err == f"{line} (kept in {folder})\n"
    assert there.get({**QUESTION, "device": "another"}, lambda: made(1.0)) == made(1.0)
    assert len(list(folder.iterdir())) == 2
    alone = Choices()
    assert alone.get(QUESTION, lambda: made(0.5)) == alone.get(QUESTION, fails) == made(0.5)
    assert Choices().get(QUESTION, made) == made()


DAMAGE = {
    "empty": lambda content: "",
    "cut": lambda content: content[:40],
    "no object": lambda content: "[]",
    "nested": lambda content: '{"question":' * 100_000,
    "another question": lambda content: content.replace("made up", "other"),
    "unknown option": lambda content: content.replace("fused_norm", "fused_nose"),
    "no bool": lambda content: content.replace("true", '"yes"'),
    "no times": lambda content: json.dumps(json.loads(content) | {"timings": {"fused_norm": [1.0]}}),
    "no timings": lambda content: json.dumps(json.loads(content) | {"timings": 3}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_choice_is_one_line_and_made_anew(tmp_path, capsys, damage):
    Choices(tmp_path).get(QUESTION, made)
    (file,) = tmp_path.glob("*/choice.json")
    file.write_text(DAMAGE[damage](file.read_text()))
    capsys.readouterr()
    assert Choices(tmp_path).get(QUESTION, lambda: made(1.0)) == made(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{file} is damaged (" in lines[0]
    assert Choices(tmp_path).get(QUESTION, fails) == made(1.0)


def race(folder: str, number: int, barrier, said) -> None:
    def slowly() -> Choice:
        barrier.wait()  # all of them have looked, and found nothing
        return made(1.0 + number / 10)

    said.put(Choices(Path(folder)).get(QUESTION, slowly).timings["fused_norm"][1])


@pytest.mark.slow
def test_of_several_processes_the_first_wins_and_all_read_the_same(tmp_path):
    context = mp.get_context("spawn")
    barrier, said = context.Barrier(2), context.Queue()
    children = [context.Process(target=race, args=(str(tmp_path), n, barrier, said)) for n in range(2)]
    for child in children:
        child.start()
    found = {said.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1
    assert found <= {1.0, 1.1}
    assert [path.name[0] for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert Choices(tmp_path).get(QUESTION, fails).timings["fused_norm"][1] in found


def test_threads_that_race_leave_one_choice(tmp_path):
    """As processes do: each has a Choices of its own, and all have looked before the first publishes."""
    barrier, found = threading.Barrier(12), []

    def slowly(number: int) -> Choice:
        barrier.wait()
        return made(1.0 + number)

    threads = [
        threading.Thread(target=lambda n=n: found.append(Choices(tmp_path).get(QUESTION, lambda: slowly(n))))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(choice == found[0] for choice in found)


def test_a_folder_that_cannot_be_written_is_said_and_the_choice_holds_for_the_process(tmp_path, capsys):
    (tmp_path / "choices").write_text("a file")
    choices = Choices(tmp_path / "choices")
    assert choices.get(QUESTION, made) == choices.get(QUESTION, fails) == made()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f" (not kept in {tmp_path / 'choices'}: Not a directory)")


class Small(nn.Module):
    """What a step may change beside the weights: statistics, and the generator that dropout draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(self.body(x).mean((2, 3))))


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(trainer_module, "GraphedStep", Replays)
    return made_up_options(monkeypatch)


def trainer_of(options=None, *, precision="fp32", choices=None, tunes=True, model=None) -> Trainer:
    torch.manual_seed(3)
    trainer = Trainer(
        Small() if model is None else model,
        compute="plain",
        precision=precision,
        gpu_options=options,
        choices=Choices() if choices is None else choices,
    )
    trainer._pool, trainer._tunes = ("pool", "stream"), tunes  # type: ignore[assignment]
    return trainer


SGD, SCHEDULE = OptimizerSpec(8, label_smoothing=0.1), ScheduleSpec(0.1, 2, warmup_epochs=1)
USED = GpuOptions(fused_norm=True, fused_loss=True)


def fit(trainer: Trainer, optimizer: OptimizerSpec = SGD, **how):
    torch.manual_seed(4)
    history = trainer.fit(Epochs(0, 8, 3), Epochs(1, 8, 1), optimizer, SCHEDULE, **how)
    return [replace(m, images_per_second=0.0, seconds=0.0) for m in history], torch.rand(1).item()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_times_is_to_the_bit_the_run_with_what_it_chose(stand_ins, capsys, name, precision):
    optimizer = replace(SGD, name=name, clip_grad_norm=1.0 if name == "adamw" else None)
    ends = []
    for options in (None, USED, ALL_OFF):
        trainer = trainer_of(options, precision=precision)
        trainer.set_mask(Mask(torch.arange(trainer.flat.weight.numel()) % 3 > 0, trainer.flat.segments))
        found = fit(trainer, optimizer), fit(trainer, optimizer, ema=None)  # in the second one it is known
        ends.append((found, trainer.state(), trainer.gpu_options))
        assert bool(stand_ins.ran) is (options is None)
        stand_ins.ran.clear()
    tuned, forced, off = ends
    assert tuned[2] == forced[2] == USED
    assert tuned[0] == forced[0]
    assert tuned[1].keys() == forced[1].keys()
    for key, value in tuned[1].items():
        assert torch.equal(value, forced[1][key]), key
    assert any(not torch.equal(value, off[1][key]) for key, value in tuned[1].items()), "the stand-ins do nothing"
    assert capsys.readouterr().err.splitlines() == [
        "fastprune: GPU options for batches of 8 x 3 x 32 x 32: fused_norm on (1.800 ms a step, 2.000 without), "
        "gradient_table off (1.900 ms a step, 1.800 without), fused_loss on (1.700 ms a step, 1.800 without)"
    ]


def test_each_option_is_replayed_in_turn_with_the_best_before_it(stand_ins):
    fit(trainer_of())
    table, loss = replace(NORM, gradient_table=True), USED
    assert stand_ins.ran == [ALL_OFF, NORM] * 2 + [NORM, table] * 2 + [NORM, loss] * 2


def no_kernel(loss):
    raise RuntimeError("no such kernel\nand much more")


def twice(loss):
    return loss * 2


def detached(loss):
    return loss.detach() + 0 * loss


def nan(loss):
    return loss * float("nan")


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (no_kernel, "RuntimeError: no such kernel"),
        (twice, "its step differs by more than rounding"),
        (detached, "its step differs by more than rounding"),
        (nan, "its step differs by more than rounding"),
    ],
)
def test_an_option_that_fails_or_computes_something_else_is_not_used_and_ends_no_run(stand_ins, capsys, kernel, why):
    stand_ins.kernels["fused_norm"] = kernel
    trainer = trainer_of()
    history, _ = fit(trainer)
    assert len(history) == 2
    assert not any(m.diverged for m in history)
    assert trainer.gpu_options == GpuOptions(fused_loss=True)  # the others are still timed
    assert f"fused_norm off ({why}), gradient_table off (2.100 ms" in capsys.readouterr().err


def test_a_forced_option_that_fails_is_an_error(stand_ins):
    stand_ins.kernels["fused_norm"] = no_kernel
    for forced in (NORM, {"fused_norm": True}):
        with pytest.raises(RuntimeError, match="no such kernel"):
            fit(trainer_of(forced))


def test_what_fails_without_any_option_is_the_runs_own_error(stand_ins, capsys):
    trainer = trainer_of()
    trainer.model.head.forward = no_kernel
    with pytest.raises(RuntimeError, match="no such kernel"):
        fit(trainer)
    assert capsys.readouterr().err == ""


def test_a_copy_that_finds_no_memory_or_cannot_be_made_is_not_timed(stand_ins, capsys, monkeypatch):
    class Alone(Small):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    trainer = trainer_of(model=Alone())
    fit(trainer)
    assert trainer.gpu_options == ALL_OFF
    assert "fused_norm off (not timed, no copy of the model can be made: TypeError: there is one of me)" in (
        capsys.readouterr().err
    )

    def full(self):
        raise torch.OutOfMemoryError("all is taken")

    monkeypatch.setattr(trainer_module._CopiedSteps, "step", full)
    trainer = trainer_of()
    fit(trainer)
    assert trainer.gpu_options == ALL_OFF
    assert "fused_norm off (not timed: OutOfMemoryError: all is taken)" in capsys.readouterr().err


def test_with_deterministic_algorithms_and_without_graphs_nothing_is_timed(stand_ins, capsys):
    torch.use_deterministic_algorithms(True)
    try:
        trainer = trainer_of({"fused_loss": True})
        fit(trainer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.gpu_options == GpuOptions(fused_loss=True)
    trainer = trainer_of(tunes=False)
    fit(trainer)
    assert trainer.gpu_options == ALL_OFF
    assert stand_ins.ran == []
    assert capsys.readouterr().err == ""


def test_a_training_that_goes_on_takes_what_it_had_but_for_what_is_forced(stand_ins, capsys):
    trainer = trainer_of({"fused_loss": False})
    fit(trainer, gpu_options=GpuOptions(True, True, True))
    assert trainer.gpu_options == GpuOptions(True, True, False)
    assert trainer.resumed_options(trainer.gpu_options) == ""
    assert trainer.resumed_options(GpuOptions(True, True, True)) == (
        "used GPU options fused_norm=on,gradient_table=on,fused_loss=on until its checkpoint, "
        "fused_norm=on,gradient_table=on,fused_loss=off from here"
    )
    assert stand_ins.ran == []
    assert capsys.readouterr().err == ""
    fit(trainer)  # a new training of the same Trainer chooses
    assert trainer.gpu_options == NORM


def test_other_shapes_and_other_optimisers_are_other_choices(stand_ins, tmp_path):
    choices = Choices(tmp_path)
    for model in (Small(), Small(), nn.Sequential(Small(), nn.Identity())):
        fit(trainer_of(choices=choices, model=model))
    assert len(list(tmp_path.iterdir())) == 2
    fit(trainer_of(choices=choices), replace(SGD, weight_decay=0.5, momentum=0.8))
    assert len(list(tmp_path.iterdir())) == 2
    fit(trainer_of(choices=choices), replace(SGD, name="adamw"))
    fit(trainer_of(choices=choices, precision="bf16"))
    fit(trainer_of({"fused_norm": True}, choices=choices))
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.glob("*/choice.json"):
        assert {"device", "versions", "network"} <= json.loads(path.read_text())["question"].keys()


def test_a_trainer_that_has_timed_goes_with_its_last_user(stand_ins):
    trainer = trainer_of()
    fit(trainer)
    left = weakref.ref(trainer.flat)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert left() is None
    finally:
        gc.enable()


def test_on_a_cpu_nothing_is_timed_and_an_unknown_option_is_an_error(capsys):
    trainer = Trainer(Small())
    fit(trainer)
    assert (trainer.gpu_options, trainer.recorded_options) == (ALL_OFF, None)
    assert capsys.readouterr().err == ""
    with pytest.raises(TypeError, match="fused_nose"):
        Trainer(Small(), gpu_options={"fused_nose": True})


def test_several_ranks_have_no_table_of_gradients(stand_ins, monkeypatch):
    """Made up, in one process: rank 1 times nothing, and has what rank 0 found."""
    monkeypatch.setattr(trainer_module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="gradient_table needs a single rank"):
        fit(trainer_of({"gradient_table": True}))
    stand_ins.ms["gradient_table"] = -1.0
    trainer = trainer_of()
    fit(trainer)
    assert trainer.gpu_options == USED
    assert not any(options.gradient_table for options in stand_ins.ran)
    fit(trainer, gpu_options=GpuOptions(True, True, True))
    assert trainer.gpu_options == USED
    stand_ins.ran.clear()
    monkeypatch.setattr(trainer_module, "rank", lambda: 1)
    monkeypatch.setattr(trainer_module, "of_rank_0", lambda *_, device: [0.0, 0.0, 1.0])
    fit(trainer)
    assert trainer.gpu_options == GpuOptions(fused_loss=True)
    assert stand_ins.ran == []


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        stand_ins = made_up_options(patch)
        trainer = trainer_of(choices=Choices(Path(folder, str(rank))))
        trainer._pool = None
        fit(trainer)
    state = trainer.state()
    torch.save((state, str(trainer.gpu_options), len(stand_ins.ran)), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_rank_0_times_alone_and_all_have_its_choice(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first[1] == second[1] == str(USED)
    assert first[2] > 0
    assert second[2] == 0
    assert not (tmp_path / "1").exists()
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
