"""From a request to a figure: data, graph, runs, results. What is heavy is imported where it is needed."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.errors import InputError
from fastprune.figures import load
from fastprune.figures.claims import judge
from fastprune.figures.draw import Drawing
from fastprune.figures.plan import Point
from fastprune.figures.report import redraw as draw_again
from fastprune.figures.report import summarize, terminal_summary, write_all
from fastprune.figures.results import Row
from fastprune.graph import Cost, Graph
from fastprune.loaders.manifest import Manifest
from fastprune.request import UNKNOWN, Request, asked_for, check_rounds, data_spec, find_data, planned_data
from fastprune.settings import Settings
from fastprune.specs import DataSpec, Prune
from fastprune.store import RunStore

if TYPE_CHECKING:
    from fastprune.execute import Outcome

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def points_and_graph(request: Request, data: DataSpec) -> tuple[list[Point], Graph]:
    """The figure's points, and the graph of all runs that they need."""
    points = load(request.name).points(request.settings, data)
    labels: dict[str, str] = {}
    for point in points:
        labels.setdefault(point.node.key, point.label)
        if isinstance(mask := point.node.mask, Prune):
            series = "random" if point.lr_find is None else f"LR_find {point.series}"
            labels.setdefault(mask.key, f"prune · {series} · seed {point.seed} · round {mask.round}")
    return points, Graph.of((p.node for p in points), labels)


def plan(request: Request) -> int:
    """Prints what would run and what it would cost; writes nothing and reads no image."""
    data = planned_data(request)
    points, graph = points_and_graph(request, data)
    store = RunStore(request.store, read_only=True)
    cost, left = Cost.of(graph.nodes), Cost.of(graph.todo(store))
    per_seed = sorted(set(cost.per_seed.values()))
    print(f"Figure {request.name}, preset {request.preset}: {_describe(request.settings, data)}")
    print(f"  trainings    {cost.trainings:>15,}   {' or '.join(map(str, per_seed))} a seed")
    seen: set[str] = set()
    for panel in dict.fromkeys(p.panel for p in points):
        fresh = {p.node.key for p in points if p.panel == panel} - seen
        seen |= fresh
        title = "to find masks" if panel == "find" else f"for panel {panel}, not shared with the above"
        print(f"               {len(fresh):>15,}   {title}")
    print(f"  prune steps  {len(graph.nodes) - cost.trainings:>15,}")
    print(f"  epochs       {cost.epochs:>15,}")
    print(f"  images       {cost.images:>15,}")
    print(f"  in the store {cost.trainings - left.trainings:>15,}   trainings; {left.trainings:,} to do")
    rate = _measured_rate(graph, store)
    if data.fingerprint == UNKNOWN:
        print("  The images are not prepared yet, so nothing counts as being in the store.")
    if rate:
        print(
            f"  time left    {_duration(left.images / rate):>15}   on one worker, at {rate:,.0f} images/s measured here"
        )
    else:
        print("  time left            unknown   no run of this figure has been measured in this store")
    return DONE


def run(request: Request) -> int:
    """Trains what the store lacks, then draws, judges and reports. Returns the exit code."""
    began = time.monotonic()
    asked_for(request)  # before anything is created
    with _writable(request.out):
        store = RunStore(request.store)
        _keep_caches_in(request.store / "cache")
        devices = _devices(request.device)
        workers = request.workers or (len(devices) if devices[0] != "cpu" else min(8, len(os.sched_getaffinity(0))))
        manifest, folder, choice = find_data(request, devices[0], -(-workers // len(devices)))
        data = data_spec(manifest, request.settings)
        check_rounds(request.settings, data)
        points, graph = points_and_graph(request, data)
        print(f"Figure {request.name}, preset {request.preset}: {_describe(request.settings, data)}")
        where = ", ".join(dict.fromkeys(devices))
        print(f"  loader {choice.name} ({choice.why}), on {where}, up to {workers} runs at once", flush=True)
        outcome, cached = _execute(request, store, graph, manifest, folder, choice.name, devices, workers)
        rows = collect(request.name, points, store)
        summary = _summary(request, data, rows, choice.name, outcome, cached, time.monotonic() - began)
        write_all(request.out, rows, drawing(request, data), summary)
    print()
    print(terminal_summary(summary, request.out))
    others = f", {outcome.found} steps were another process's" if outcome.found else ""
    print(f"\n{outcome.trained} trainings run, {cached.trainings} were in the store{others}", flush=True)
    if outcome.failed:
        for key, reason in outcome.failed.items():
            print(f"failed: {graph.label(graph.by_key[key])}: {reason}", file=sys.stderr)
        print(f"{len(outcome.failed)} failed, {outcome.not_reached} rest on them; the same command tries again")
        return FAILED
    return DONE


def drawing(request: Request, data: DataSpec) -> Drawing:
    """How the figure is shown: panels and series of its module, and a note on what was trained."""
    figure, s = load(request.name), request.settings
    note = f"Preset {request.preset}: {data.classes} classes, width {s.width}, {s.epochs} epochs."
    if request.preset == "smoke":
        note += " It shows the machinery, not the paper's result."
    names = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50"}
    images = {"synthetic": "generated images", "tiny-imagenet-200": "Tiny ImageNet"}
    title = f"{names[s.model]} on {images.get(data.name, data.name)}"
    return Drawing(title, figure.panels(s), figure.series(s), chance=1 / data.classes, note=note)


def _summary(
    request: Request, data: DataSpec, rows: list[Row], loader: str, outcome: "Outcome", cached: Cost, seconds: float
) -> dict[str, Any]:
    from fastprune.work import environment

    smoke = request.preset == "smoke"
    claims = load(request.name).claims(request.settings)
    return summarize(
        rows,
        drawing(request, data),
        [judge(claim, rows, chance=1 / data.classes, decisive=not smoke) for claim in claims],
        figure=request.name,
        preset=request.preset,
        settings=asdict(request.settings),
        data=asdict(data),
        cost={
            "nodes": len(outcome.done) + outcome.found + cached.nodes,
            "cached": outcome.found + cached.nodes,
            "trained": outcome.trained,
            "failed": len(outcome.failed),
            "epochs": outcome.epochs,
            "images": outcome.images,
            "images_per_s": outcome.images / outcome.seconds if outcome.images else None,
            "wall_s": seconds,
        },
        environment=environment(loader, outcome.devices),
        real_command=f"python scripts/reproduce.py --fig {request.name} --preset paper --data DIR" if smoke else None,
    )


def collect(figure: str, points: list[Point], store: RunStore) -> list[Row]:
    """The rows of results.csv: every point whose run is published."""
    rows = []
    for p in points:
        if not store.has(p.node):
            continue
        result = store.node(p.node)["result"]
        density = 1.0 if p.node.mask is None else store.node(p.node.mask)["result"]["density"]
        accuracy, diverged = result["accuracy"], result["diverged"]
        rows.append(
            Row(
                figure,
                p.panel,
                p.series,
                p.seed,
                p.round,
                density,
                accuracy,
                p.lr_find,
                p.lr_eval,
                diverged,
                p.node.key,
            )
        )
    return rows


def _devices(asked: str | None) -> list[str]:
    import torch

    if asked is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    kind, _, number = asked.partition(":")
    if asked == "cpu":
        return ["cpu"]
    if kind != "cuda" or (":" in asked and not (number.isascii() and number.isdecimal())):
        raise InputError(f"unknown device {asked!r}: choose cpu, cuda or cuda:N")
    if int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices here")
    return [asked] if number else [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _execute(
    request: Request,
    store: RunStore,
    graph: Graph,
    manifest: Manifest,
    folder: Path | None,
    loader: str,
    devices: list[str],
    workers: int,
) -> "tuple[Outcome, Cost]":
    from fastprune.execute import execute
    from fastprune.progress import Bars
    from fastprune.work import WorkConfig

    todo = graph.todo(store)
    cached = Cost.of(set(graph.nodes) - set(todo))
    config = WorkConfig(
        store=request.store.resolve(),
        manifest=manifest,
        folder=folder,
        loader=loader,
        device=devices[0],
        checkpoint_seconds=request.checkpoint_seconds,
    )
    with Bars(graph, todo, min(workers, len(todo))) as bars:
        return execute(graph, config, bars, workers=workers, devices=devices), cached


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Finds out before the work that the output folder can take the results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as f:
            f.write(bytes(1 << 16))
            f.flush()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    yield


def _keep_caches_in(folder: Path) -> None:
    """Compilers and matplotlib keep what they cache in the store, not in the home folder."""
    for variable, name in {
        "MPLCONFIGDIR": "matplotlib",
        "NUMBA_CACHE_DIR": "numba",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }.items():
        os.environ.setdefault(variable, str((folder / name).resolve()))
    # One thread a process; it sleeps when it has nothing to do, beside as many others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _describe(s: Settings, data: DataSpec) -> str:
    rates = (
        f"LR_find {' '.join(f'{r:g}' for r in s.lr_find)} and random, LR_eval {' '.join(f'{r:g}' for r in s.lr_eval)}"
    )
    return (
        f"{s.model} (stem {s.stem}, width {s.width}) on {data.name} "
        f"({data.classes} classes, {data.train_count:,} images), {rates}; seeds {s.seeds}, "
        f"rounds {s.rounds} of {100 * s.fraction:.3g} %, epochs {s.epochs}, batch {s.batch_size}, {s.precision}"
    )


def _measured_rate(graph: Graph, store: RunStore) -> float | None:
    """Mean images/s of this figure's runs in the store."""
    rates = [store.node(n)["provenance"]["images_per_second"] for n in graph.trainings if store.has(n)]
    return sum(rates) / len(rates) if rates else None


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def redraw(request: Request) -> int:
    """Draws again from results.csv; titles and notes are those of summary.json, where that is still there."""
    if not request.out.is_dir():
        raise InputError(f"no results.csv in {request.out}: run the figure first, or give its folder's parent as --out")
    with _writable(request.out), tempfile.TemporaryDirectory(dir=request.out) as caches:
        _keep_caches_in(Path(caches))
        for path in draw_again(request.out):
            print(path)
    return DONE
