"""A warm worker does not grow: what bench/memory.py measures, on fewer nodes; and that the measure finds what leaks."""

import gc
import mmap
import os
import threading
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

from bench import memory
from bench.memory import GENERATED, LAST, LIMIT, MIB, WARM, Sample, judge, sample
from fastprune.loaders.choice import ffcv_is_there
from fastprune.pruning.channels import channel_groups, gamma_scores, remove, select
from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import build
from fastprune.training.trainer import Trainer
from tests.fakes import Epochs

NODES = WARM + 2 * LAST + 10


def held(resident: list[float]) -> list[Sample]:
    return [Sample(round(r * MIB), round(r * MIB / 2), 1, 9, 0) for r in resident]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loader",
    [
        "synthetic",
        pytest.param("ffcv", marks=pytest.mark.skipif(not ffcv_is_there(), reason="ffcv is not installed")),
    ],
)
def test_a_warm_worker_does_not_grow(loader, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    samples = memory.measure(loader, "synthetic", tmp_path / "data", tmp_path / "runs", NODES, False)
    result = judge(samples)
    assert result.nodes == NODES
    assert result.growth <= LIMIT, memory.row(loader, result)
    assert {s.threads for s in samples[WARM:]} == {result.first.threads}
    assert {s.files for s in samples[WARM:]} == {result.first.files}


def test_growth_is_told_from_noise_and_from_the_first_nodes():
    flat = [100.0] * WARM + [400.0, 412.0] * LAST
    assert judge(held(flat)).growth == 0.0
    assert judge(held([*flat[:-1], 500.0])).growth == 0.0
    leaking = judge(held([100.0] * WARM + [400.0 + 2.0 * i for i in range(2 * LAST)]))
    assert leaking.growth == pytest.approx(2.0 * LAST / (400.0 + LAST - 1))
    assert leaking.growth > LIMIT
    assert leaking.slope == pytest.approx(MIB)
    with pytest.raises(ValueError, match="at least"):
        judge(held([1.0] * (WARM + 2 * LAST - 1)))


def test_what_a_process_holds(tmp_path):
    """Memory that is touched, a thread and an open file are all seen."""
    before, wait = sample(), threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    with open(os.devnull):
        # Fresh pages: an allocation may find room in what the process has already.
        memory_held = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory_held.write(b"x" * len(memory_held))
        after = sample()
    wait.set()
    thread.join()
    assert after.private - before.private >= 0.9 * len(memory_held)
    assert after.resident - before.resident >= 0.9 * len(memory_held)
    assert (after.threads - before.threads, after.files - before.files) == (1, 1)


def test_nodes_are_of_all_kinds(tmp_path):
    data = memory.data_spec(GENERATED.manifest(), memory.SETTINGS)
    masks = memory.graph_of(data, 200).nodes
    assert len(masks) == 200
    assert {n.kind for n in masks[:40]} == {"train", "prune"}
    starts = {(n.start.momentum if hasattr(n.start, "momentum") else None) for n in masks[:40] if n.kind == "train"}
    assert starts == {None, True}
    assert {n.criterion for n in masks[:40] if n.kind == "prune"} == {"magnitude", "random"}
    assert len({n.seed for n in masks}) > 3
    filters = memory.graph_of(data, 60, structured=True).nodes
    assert sum(n.kind == "channels" for n in filters) > 20


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever refers to itself stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("precision", "compile"),
    [("fp32", None), ("bf16", None), pytest.param("fp32", "eager", marks=pytest.mark.slow)],
)
def test_a_trainer_goes_with_its_last_user(precision, compile, no_collector):
    """A worker makes one for each network without filters: hundreds of megabytes that the collector hardly counts."""
    model = build(ModelSpec("resnet18", 4, width=8))
    trainer = Trainer(model, precision=precision, compile=compile)
    trainer.fit(Epochs(0, 8, 2), Epochs(1, 8, 1), OptimizerSpec(8), ScheduleSpec(0.1, 1))
    left = [weakref.ref(kept) for kept in (trainer, trainer.flat, trainer.flat.weight, model, model.conv1)]
    trainer.close()
    del trainer, model
    assert [ref() for ref in left] == [None] * len(left)


def test_a_network_whose_filters_go_is_not_kept(no_collector):
    pytest.importorskip("torch_pruning")

    def convs() -> int:
        return sum(type(thing) is nn.Conv2d for thing in gc.get_objects())

    before = convs()
    model = build(ModelSpec("resnet18", 4, width=8))
    groups = channel_groups(model, 32)
    assert convs() == before + 20
    remove(model, select(groups, gamma_scores(groups, model.state_dict()), 0.5), 32)
    assert convs() == before + 20
    left = weakref.ref(model.conv1.weight)
    del model
    assert (convs(), left()) == (before, None)
