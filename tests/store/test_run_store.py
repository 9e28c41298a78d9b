"""The store: complete or not at all, first published wins, bad stores are named."""

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from fastprune.errors import InputError
from fastprune.figures.paper import A2
from fastprune.files import read_sums, write_sums
from fastprune.specs import DataSpec, Init, ModelSpec, Prune, StateRef
from fastprune.store import RequestedOutputs, RunStore, write_csv
from fastprune.store.run_store import gain, in_words
from fastprune.study.chains import Chains
from fastprune.study.graph import Graph
from fastprune.study.settings import preset
from tests.fakes import find_runs, masks

DATA = DataSpec("tiny-imagenet", "f" * 64, 200, None, None, 100_000, 10_000)
CHAINS = Chains(preset(A2.protocol, "paper").override(rounds=2), DATA, 0)
TRAIN, PRUNE = find_runs(CHAINS, 0.2)[0], masks(CHAINS, 0.2)[0]


RESULT = {"epochs": 110, "diverged": False, "accuracy": 0.5}
MASK = {"round": 1, "total": 10, "kept": 8, "density": 0.8, "layerwise_ratios": {}}


def publish(store: RunStore, node=TRAIN, text: str = "one", states: tuple[int, ...] = ()) -> None:
    files = {f"state-{e}.safetensors": lambda p: p.write_text(text) for e in states}
    result = RESULT if node is TRAIN else MASK
    store.publish(node, result, {"by": text}, {"metrics.csv": lambda p: p.write_text(text), **files})


def leftovers(store: RunStore) -> list[Path]:
    return [*(store.root / "tmp").iterdir(), *(store.root / "partial").iterdir()]


def test_a_node_is_published_complete_and_never_changed(tmp_path):
    store = RunStore(tmp_path)
    assert not store.has(TRAIN)
    publish(store)
    publish(store, text="two")
    assert store.node(TRAIN)["provenance"] == {"by": "one"}
    assert (store.path(TRAIN) / "metrics.csv").read_text() == "one"
    assert store.node(TRAIN)["spec"]["schedule"]["lr"] == 0.2
    assert leftovers(store) == []


def test_a_write_that_fails_publishes_nothing(tmp_path):
    store = RunStore(tmp_path)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        store.publish(TRAIN, {}, {}, {"metrics.csv": fail})
    with pytest.raises(OSError, match="space"):
        store.save_partial(TRAIN, "checkpoint", fail)
    assert not store.has(TRAIN)
    assert leftovers(store) == []


def test_a_published_node_gains_states_that_are_asked_for_later(tmp_path):
    store = RunStore(tmp_path)
    publish(store)
    assert not store.state(TRAIN.final)
    assert TRAIN in Graph.of([PRUNE]).todo(store)
    publish(store, text="later", states=(110,))
    assert store.state(TRAIN.final).read_text() == "later"
    assert (store.path(TRAIN) / "metrics.csv").read_text() == "one"
    assert Graph.of([PRUNE]).todo(store) == [PRUNE]


def test_a_run_that_diverged_stands_with_its_last_state(tmp_path):
    store = RunStore(tmp_path)
    store.publish(TRAIN, RESULT | {"epochs": 3}, {}, {"state-3.safetensors": lambda p: p.write_text("x")})
    assert store.state(TRAIN.final)
    assert not store.state(StateRef(TRAIN, 2))


def test_a_trained_parent_is_not_trained_again_for_a_finished_prune(tmp_path):
    store = RunStore(tmp_path)
    publish(store)  # without the state that the prune step once read
    publish(store, PRUNE)
    assert Graph.of([PRUNE]).todo(store) == []


def test_a_folder_without_its_node_json_is_made_again(tmp_path):
    store = RunStore(tmp_path)
    publish(store)
    (store.path(TRAIN) / "node.json").unlink()
    assert not store.has(TRAIN)
    publish(store, text="again")
    assert (store.path(TRAIN) / "metrics.csv").read_text() == "again"
    assert leftovers(store) == []


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff", b""])
def test_corrupt_node_is_named(tmp_path, content):
    store = RunStore(tmp_path)
    publish(store)
    (store.path(TRAIN) / "node.json").write_bytes(content)
    with pytest.raises(InputError, match=TRAIN.key) as error:
        store.node(TRAIN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"format": 99}', "format 99"), ("{}", "not a store"), ("junk", "not a store"), ("[]", "not a")],
)
def test_a_store_of_another_version_is_refused_and_left_alone(tmp_path, content, message):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(InputError, match=message):
        RunStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunStore(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        RunStore(Path("/proc/fastprune"))


def test_reading_creates_nothing(tmp_path):
    assert not RunStore(tmp_path / "none", read_only=True).has(TRAIN)
    assert list(tmp_path.iterdir()) == []


def test_a_takeover_removes_what_was_half_written(tmp_path):
    store = RunStore(tmp_path)
    store.aside(TRAIN.key)
    (tmp_path / "partial" / f".{TRAIN.key}.checkpoint.safetensors.123").write_text("half")
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_text("complete"))
    publish(store, PRUNE)
    (store.path(PRUNE) / ".state-3.safetensors.123").write_text("half")
    other = store.aside(PRUNE.key)
    store.tidy(TRAIN)
    assert leftovers(store) == [other, store.partial_path(TRAIN, "checkpoint")]
    store.tidy(PRUNE)
    assert leftovers(store) == [store.partial_path(TRAIN, "checkpoint")]
    assert sorted(p.name for p in store.path(PRUNE).iterdir()) == ["SHA256SUMS", "metrics.csv", "node.json"]


def test_the_sums_are_those_of_sha256sum(tmp_path):
    store = RunStore(tmp_path)
    publish(store)
    publish(store, states=(3, 110))  # which adds to it
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=store.path(TRAIN), capture_output=True)
    assert done.stdout.decode().split() == [
        *("metrics.csv:", "OK", "node.json:", "OK"),
        *("state-110.safetensors:", "OK", "state-3.safetensors:", "OK"),
    ]


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "longer", "removed", "unlisted", "no list", "bad list", "twice listed"]
)
def test_a_file_that_is_not_as_it_was_written_is_never_read(tmp_path, damage):
    store = RunStore(tmp_path)
    publish(store, text="epoch,loss\n1,0.5\n")
    assert store.metrics(TRAIN) == {1: {"loss": 0.5}}
    file, sums = store.path(TRAIN) / "metrics.csv", store.path(TRAIN) / "SHA256SUMS"
    content, listed = file.read_text(), sums.read_text()
    if damage == "removed":
        file.unlink()
    elif damage == "no list":
        sums.unlink()
    elif "list" in damage:
        sums.write_text({"unlisted": listed.splitlines()[1] + "\n", "bad list": "junk\n"}.get(damage, listed * 2))
    else:
        file.write_text({"flip": content.replace("5", "7"), "cut": content[:-4], "longer": content + "2,3\n"}[damage])
    with pytest.raises(InputError, match=f"delete the folder {store.path(TRAIN)} to recompute the node") as error:
        store.metrics(TRAIN)
    assert "\n" not in str(error.value)


def test_a_product_that_is_not_listed_does_not_count(tmp_path):
    """A process died between writing it and saying so."""
    store = RunStore(tmp_path)
    publish(store)
    (store.path(TRAIN) / "state-110.safetensors").write_text("perhaps half")
    assert not store.holds(TRAIN, RequestedOutputs(weights=(110,)))
    assert store.state(TRAIN.final) is None
    publish(store, states=(110,))
    assert store.state(TRAIN.final).read_text() == "one"


def test_a_node_of_another_machine_is_waited_for(tmp_path):
    store = RunStore(tmp_path)
    threading.Timer(0.3, publish, [store]).start()
    store.await_node(TRAIN, 20.0)
    assert store.has(TRAIN)
    with pytest.raises(InputError, match="the same store"):
        store.await_node(PRUNE, 0.1)


def test_caches_of_a_store_from_elsewhere_are_not_used(tmp_path):
    """Compilers load code from them."""
    store = RunStore(tmp_path / "a")
    store.cache().mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert store.cache() == RunStore(tmp_path / "a").cache()
    assert not RunStore(tmp_path / "b").cache().exists()


def test_partial_files_go_when_the_run_is_published(tmp_path):
    store = RunStore(tmp_path)
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_text("a"))
    store.save_partial(TRAIN, "checkpoint", lambda p: p.write_text("b"))
    store.save_partial(TRAIN, "state-3", lambda p: p.write_text("c"))
    assert store.partial_path(TRAIN, "checkpoint").read_text() == "b"
    store.drop_partial(TRAIN)
    assert leftovers(store) == []


def test_csv_floats_read_back_exactly(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "loss": 0.1 + 0.2}])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n1,0.30000000000000004\n"


def test_node_json_says_in_words_what_its_spec_names_by_keys(tmp_path):
    store = RunStore(tmp_path)
    for node in (TRAIN, PRUNE):
        publish(store, node)
        assert store.node(node)["about"] == {"network": "resnet18", "data": "tiny-imagenet"}
    small = ModelSpec("resnet50", 200, "cifar", 16)
    random = Prune(Init(small, 0), None, 0.2, "random", "global", 0)
    assert in_words(random) == {"network": f"resnet50 width 16 stem {small.stem}"}


def test_store_json_is_plain_and_tells_stores_apart(tmp_path):
    assert RunStore(tmp_path).id == RunStore(tmp_path).id != RunStore(tmp_path / "other").id
    assert json.loads((tmp_path / "store.json").read_text())["format"] == 3


def test_of_two_that_add_to_a_node_neither_undoes_the_other(tmp_path):
    """One was taken for dead, and goes on."""
    write_sums(tmp_path, {})
    seen = read_sums(tmp_path)
    for name in ("a", "b"):
        gain(tmp_path, seen, {name: lambda p: p.write_text("added")})
    assert set(read_sums(tmp_path)) == {"a", "b"}
