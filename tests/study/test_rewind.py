"""What each way to rewind restores, and that the first step afterwards tells them apart."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.figures.paper import A2
from fastprune.loaders.manifest import Manifest
from fastprune.specs import DataSpec, Init, Prune, Rewind, StateRef, Train
from fastprune.store import RequestedOutputs, RunStore
from fastprune.study import compute
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import NodeComputer, WorkConfig, read_mask, read_state
from fastprune.study.graph import Graph
from fastprune.study.settings import preset
from fastprune.training.models import build, initial_model
from tests.fakes import Epochs, Images, Silent, run_here

LATE = 2
SETTINGS = preset(A2.protocol, "smoke").override(
    seeds=1, rounds=2, fraction=0.5, epochs=4, milestones=(1, 3), batch_size=8, rewind_epoch=LATE, lr_find=(0.05,)
)
DATA = DataSpec("fake", "f" * 64, 4, None, None, 8, 8)  # one batch an epoch: an epoch is a step
SOURCE = MaskRecipe(0.05)


def settings(rewind: str):
    return SETTINGS.override(**({"rewind": "init", "warmup_epochs": 2} if rewind == "warmup" else {"rewind": rewind}))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "open_data", lambda *args, **kwargs: Images(batches=1))
        manifest = Manifest.__new__(Manifest)  # nothing looks into it
        images = {DATA.fingerprint: compute.Images(manifest, None, "fake")}
        yield WorkConfig(tmp_path_factory.mktemp("rewind"), images, checkpoint_seconds=0.0)


def tensors(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{what}."): t for name, t in state.items() if name.startswith(f"{what}.")}


def expected_start(store: RunStore, run: Train) -> tuple[dict, dict, float, int]:
    """Weights and statistics, momentum, learning rate and epoch (of the data order) of the first step, by the words of
    the protocol; unmasked."""
    chains = Chains(settings("init"), DATA, 0)
    dense = chains.dense(0.05)
    fresh = initial_model(Init(run.model, 0)).state_dict()
    kind = next(k for k in ("init", "warmup", "late", "lr", "finetune") if run in runs(k))
    if kind in ("init", "warmup"):
        return fresh, {}, 0.0 if kind == "warmup" else 0.05, 0
    if kind == "late":
        state = read_state(store, StateRef(dense, LATE), momentum=True)
        return tensors(state, "model"), tensors(state, "momentum"), 0.05 * 0.1, LATE
    state = read_state(store, dense.final)
    return tensors(state, "model"), {}, 0.05 if kind == "lr" else 0.05 * 0.1**2, 0


def runs(kind: str) -> list[Train]:
    """The find run of round 1, to its end and stopped after its first step."""
    chains = Chains(settings(kind), DATA, 0)
    run = chains.find_state(SOURCE, 1).node
    return [run, replace(run, stop=run.begin + 1)]


def first_step(model: torch.nn.Module, momentum: dict, mask: dict, lr: float, epoch: int, spec) -> None:
    """One step of plain PyTorch on the batch that seed 0 gives in `epoch`."""
    model.train()
    images, labels = next(iter(on(epoch)))
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            keep = mask.get(name, torch.ones_like(p, dtype=torch.bool))
            grad = p.grad + spec.weight_decay * p
            buffer = momentum[name] * spec.momentum + grad if name in momentum else grad
            p.copy_(torch.where(keep, p - lr * buffer, torch.zeros(())))


def on(epoch: int) -> Epochs:
    batches = Epochs(0, 8, 1)
    batches.set_epoch(epoch)
    return batches


@pytest.mark.parametrize("kind", ["init", "warmup", "late", "lr", "finetune"])
def test_the_first_step_is_that_of_what_is_restored(config, kind):
    _, short = runs(kind)
    assert run_here(Graph.of([short]), config, Silent()).failed == {}
    store, worker = RunStore(config.store), NodeComputer(config)
    assert isinstance(short.mask, Prune)
    mask = read_mask(store, short.mask).tensors()
    weights, momentum, lr, epoch = expected_start(store, short)
    model = build(short.model)
    model.load_state_dict({k: torch.where(mask[k], v, torch.zeros(())) if k in mask else v for k, v in weights.items()})
    momentum = {k: torch.where(mask[k], v, torch.zeros(())) if k in mask else v for k, v in momentum.items()}
    first_step(model, momentum, mask, lr, epoch, short.optimizer)

    assert short.schedule.lr_at(short.begin, 0.0) == pytest.approx(lr)
    assert short.begin == epoch
    rows = store.metrics(short)
    assert list(rows) == [epoch + 1]
    worker.compute_node(short, RequestedOutputs(weights=(epoch + 1,)), lambda *_: None)  # it gains what is asked for
    after = tensors(read_state(store, StateRef(short, epoch + 1)), "model")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_what_the_first_steps_differ_in():
    starts = {kind: runs(kind)[0].start for kind in ("init", "warmup", "late", "lr", "finetune")}
    rates = {kind: (run := runs(kind)[0]).schedule.lr_at(run.begin, 0.0) for kind in starts}
    assert isinstance(starts["init"], Init)
    assert starts["warmup"] == starts["init"]
    assert [(starts[k].epoch, starts[k].momentum, starts[k].state.epoch) for k in ("late", "lr", "finetune")] == [
        (LATE, True, LATE),
        (0, False, 4),
        (0, False, 4),
    ]
    assert rates == {
        "init": 0.05,
        "warmup": 0.0,
        "late": pytest.approx(0.005),
        "lr": 0.05,
        "finetune": pytest.approx(0.0005),
    }
    # All of the schedule is replayed but for late rewinding, which ends where the dense run ends.
    assert {k: runs(k)[0].epochs for k in starts} == {"init": 4, "warmup": 4, "late": 2, "lr": 4, "finetune": 4}


def test_late_rewinding_without_a_mask_goes_on_as_the_dense_run_did(config):
    dense = Chains(settings("init"), DATA, 0).dense(0.05)
    again = replace(dense, start=Rewind(StateRef(dense, LATE), LATE, momentum=True))
    assert run_here(Graph.of([again, dense]), config, Silent()).failed == {}
    worker, store = NodeComputer(config), RunStore(config.store)
    for run in (dense, again):
        worker.compute_node(run, RequestedOutputs(weights=(4,), momentum=(4,)), lambda *_: None)
    expected, found = (read_state(store, run.final, momentum=True) for run in (dense, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert store.metrics(again)[4]["val_accuracy"] == store.metrics(dense)[4]["val_accuracy"]


@pytest.mark.parametrize("rewind", ["late", "lr", "finetune"])
def test_at_one_rate_the_eval_run_is_the_find_run(rewind):
    chains = Chains(settings(rewind), DATA, 0)
    assert chains.eval_run(SOURCE, 1, 0.05) == chains.find_state(SOURCE, 1).node
    assert chains.eval_run(SOURCE, 1, 0.5) != chains.find_state(SOURCE, 1).node
    # An eval run starts where the find run of its round does.
    assert chains.eval_run(SOURCE, 1, 0.5).start == chains.find_state(SOURCE, 1).node.start


def test_the_random_baseline_has_nothing_to_fine_tune():
    with pytest.raises(InputError, match="random"):
        Chains(settings("lr"), DATA, 0).eval_run(MaskRecipe(None), 1, 0.05)


def test_rewinding_past_the_end_is_refused():
    with pytest.raises(InputError, match="--rewind-epoch is 4"):
        SETTINGS.override(rewind="late", rewind_epoch=4)
    with pytest.raises(InputError, match="--rewind"):
        SETTINGS.override(rewind="yesterday")
