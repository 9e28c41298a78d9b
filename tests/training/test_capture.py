"""Steps as CUDA graphs, on a made-up device: what they keep and count, and what happens when one cannot be captured."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training import trainer as trainer_module
from fastprune.training.models import build
from fastprune.training.step import GraphedStep, capturing
from fastprune.training.trainer import Trainer
from tests.fakes import Epochs


class Graph:
    def reset(self) -> None: ...


class MadeUp:
    """Stands for torch.cuda: a current stream, and a capture that leaves as torch 2.11's does after an error. Its
    allocator knows pools: which a capture allocates from, and by how many captures each is held."""

    def __init__(self, monkeypatch) -> None:
        self.stream = "before"
        self.collecting: list[bool] = []
        self.underway: set[str] = set()
        self.held: dict[str, int] = {}
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new pool")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release)

    def end_allocate(self, device: int, pool: str) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: str) -> None:
        self.held[pool] -= 1
        assert self.held[pool] >= 0

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert not self.underway, "the cache cannot be emptied"
        before, self.stream = self.stream, "of the capture"
        self.collecting.append(gc.isenabled())
        self.underway.add(pool)
        self.held[pool] = self.held.get(pool, 0) + 1
        try:
            yield
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.underway.remove(pool)
        self.stream = before


@pytest.fixture
def made_up(monkeypatch) -> MadeUp:
    return MadeUp(monkeypatch)


def test_a_capture_collects_garbage_before_and_none_during(made_up):
    class Cycle:
        gone = False

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Cycle.gone = True

    gc.disable()
    try:
        Cycle()
        assert not Cycle.gone
        with capturing(Graph()):
            assert Cycle.gone
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
    with capturing(Graph()):
        pass
    assert gc.isenabled()
    assert made_up.collecting == [False, False]
    assert made_up.stream == "before"


@pytest.mark.parametrize("error", [ValueError("the first"), torch.OutOfMemoryError("the first"), KeyboardInterrupt()])
def test_the_first_error_is_raised_and_the_stream_is_that_of_before(made_up, error):
    with pytest.raises(type(error)) as caught, capturing(Graph(), mend="run without"):
        raise error
    assert caught.value is error
    assert caught.value.__notes__ == ["run without"]
    assert made_up.stream == "before"
    assert gc.isenabled()
    with capturing(Graph()):  # later captures go on
        pass
    assert made_up.held == {"new pool": 1}


def test_an_error_within_a_capture_that_could_be_ended_releases_no_pool(made_up, monkeypatch):
    """A second release would free the memory of the graphs that share it."""

    @contextmanager
    def graph(graph, pool, *_, **__):
        made_up.held[pool] = 2
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ValueError, match="the first"), capturing(Graph(), "shared"):
        raise ValueError("the first")
    assert made_up.held == {"shared": 2}


def test_an_error_at_the_end_of_a_capture_is_raised_itself(made_up, monkeypatch):
    @contextmanager
    def graph(*_, **__):
        made_up.stream = "of the capture"
        yield
        raise RuntimeError("cannot end")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="cannot end"), capturing(Graph()):
        pass
    assert made_up.stream == "before"


def test_a_trainers_step_names_the_way_without_graphs(made_up, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def step(images, labels):
        raise RuntimeError("not permitted when stream is capturing")

    graphed = GraphedStep("pool", "stream")
    graphed._calls = 3
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        graphed(step, torch.zeros(1), torch.zeros(1))
    assert caught.value.__notes__ == ["Trainer(graph=False) runs without CUDA graphs"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_searches_in_the_first_batches_unless_the_user_wants_the_same_each_time(
    made_up, monkeypatch, deterministic
):
    class Stream:
        def wait_stream(self, other) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    made_up.stream = Stream()
    seen, graphed = [], GraphedStep("pool", Stream())

    def step(images, labels):
        seen.append(torch.backends.cudnn.benchmark)

    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(3):
            graphed(step, torch.zeros(1), torch.zeros(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [not deterministic] * 3
    assert torch.backends.cudnn.benchmark is False


class Replays(GraphedStep):
    """Computes where a graph would be replayed."""

    def __call__(self, step, images, labels):
        self._calls += 1
        step(images, labels)


def graphed_trainer(monkeypatch, **how):
    """A Trainer on a CPU that keeps steps as one on a GPU does."""
    monkeypatch.setattr(trainer_module, "GraphedStep", Replays)
    trainer = Trainer(build(ModelSpec("resnet18", 4, width=8)), compute="plain", **how)
    trainer._pool, trainer._pads = ("pool", "stream"), True
    return trainer


def test_a_trainer_with_graphs_goes_with_its_last_user_without_close(monkeypatch):
    trainer = graphed_trainer(monkeypatch)
    trainer.fit(Epochs(0, 8, 2), Epochs(1, 8, 1), OptimizerSpec(8), ScheduleSpec(0.1, 1))
    assert len(trainer._graphed) == 2
    left = [weakref.ref(kept) for kept in (trainer, trainer.flat, trainer.model)]
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert [ref() for ref in left] == [None] * 3
    finally:
        gc.enable()


def test_a_smaller_last_batch_of_validation_is_padded_and_only_real_images_count(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(11, 3, 32, 32, generator=generator), torch.randint(4, (11,), generator=generator)
    batches = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    trainer = graphed_trainer(monkeypatch)
    found = trainer.evaluate(batches)
    assert len(trainer._graphed) == 1
    assert [step._calls for step in trainer._graphed.values()] == [2]
    plain = Trainer(trainer.model, compute="plain").evaluate(batches)
    assert found[1:] == plain[1:]
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    # A loss of the user's may count what cross-entropy leaves out.
    own = graphed_trainer(monkeypatch, loss=torch.nn.functional.cross_entropy)
    own._pads = own._loss is None
    own.evaluate(batches)
    assert len(own._graphed) == 2


def test_batches_are_counted_once_an_epoch(monkeypatch):
    counted = []
    add = torch.Tensor.add_

    def counting(self, other, **how):
        if self.dtype == torch.int64 and self.dim() == 0:
            counted.append(other)
        return add(self, other, **how)

    model = build(ModelSpec("resnet18", 4, width=8))
    model.bn1.momentum = None  # averages over all batches: it needs its counter
    trainer, seen = Trainer(model, compute="plain"), []
    monkeypatch.setattr(torch.Tensor, "add_", counting)

    def look(images):
        seen.append({int(m.num_batches_tracked) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)})

    trainer.fit(Epochs(0, 8, 3), Epochs(1, 8, 1), OptimizerSpec(8), ScheduleSpec(0.1, 2), on_batch=look)
    assert seen == [{n} for n in range(1, 7)]
    counted.clear()
    trainer.fit(Epochs(0, 8, 3), Epochs(1, 8, 1), OptimizerSpec(8), ScheduleSpec(0.1, 2))
    assert set(trainer.state_dict()) == set(model.state_dict())
    assert {int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")} == {12}
    assert counted == [1, 1, 1, *[3] * 19] * 2  # bn1 in each step, the others at the end of each epoch


def test_batches_are_counted_where_an_epoch_is_interrupted():
    trainer, steps = Trainer(build(ModelSpec("resnet18", 4, width=8)), compute="plain"), []

    def stop(images: int) -> None:
        steps.append(images)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Epochs(0, 8, 3), Epochs(1, 8, 1), OptimizerSpec(8), ScheduleSpec(0.1, 2), report=stop)
    assert {int(v) for k, v in trainer.state_dict().items() if k.endswith("num_batches_tracked")} == {2}
