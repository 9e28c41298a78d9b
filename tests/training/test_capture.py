"""What happens when a CUDA graph cannot be captured, on a made-up device."""

import gc
from contextlib import contextmanager

import pytest
import torch

from fastprune.training.step import GraphedStep, capturing


class MadeUp:
    """Stands for torch.cuda: a current stream, and a capture that leaves as torch 2.11's does after an error."""

    def __init__(self, monkeypatch) -> None:
        self.stream = "before"
        self.collecting: list[bool] = []
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, self.stream = self.stream, "of the capture"
        self.collecting.append(gc.isenabled())
        try:
            yield
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture") from None
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
        with capturing("graph"):
            assert Cycle.gone
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
    with capturing("graph"):
        pass
    assert gc.isenabled()
    assert made_up.collecting == [False, False]
    assert made_up.stream == "before"


@pytest.mark.parametrize("error", [ValueError("the first"), torch.OutOfMemoryError("the first"), KeyboardInterrupt()])
def test_the_first_error_is_raised_and_the_stream_is_that_of_before(made_up, error):
    with pytest.raises(type(error)) as caught, capturing("graph", mend="run without"):
        raise error
    assert caught.value is error
    assert caught.value.__notes__ == ["run without"]
    assert made_up.stream == "before"
    assert gc.isenabled()


def test_an_error_at_the_end_of_a_capture_is_raised_itself(made_up, monkeypatch):
    @contextmanager
    def graph(*_, **__):
        made_up.stream = "of the capture"
        yield
        raise RuntimeError("cannot end")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="cannot end"), capturing("graph"):
        pass
    assert made_up.stream == "before"


def test_a_trainers_step_names_the_way_without_graphs(made_up, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")

    def step(images, labels):
        raise RuntimeError("not permitted when stream is capturing")

    graphed = GraphedStep(step, "pool", "stream")
    graphed._calls = 3
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        graphed(torch.zeros(1), torch.zeros(1))
    assert caught.value.__notes__ == ["Trainer(graph=False) runs without CUDA graphs"]
