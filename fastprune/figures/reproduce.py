"""From a request to finished figures: find the data, build the graph, run it, report."""

# Functions import what needs torch, so that `--plan` starts at once.

import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.console import bf16_advice
from fastprune.errors import InputError
from fastprune.figures import load
from fastprune.figures.axes import Drawing, DrawnPanel
from fastprune.figures.claims import judge
from fastprune.figures.collect import collect, remark
from fastprune.figures.figure import AnyPoint, Figure, build_graph
from fastprune.figures.report import draw_again, summarize, terminal_summary, write_all
from fastprune.figures.results import Row
from fastprune.specs import DataSpec, check_gpu_options
from fastprune.store import RunStore
from fastprune.store.listing import computed, existing_store
from fastprune.store.needs import Needs, named, read_needs, record_figure
from fastprune.study.data import TITLES, DataRequest, data_flag, data_spec
from fastprune.study.graph import Cost, Graph, merge_graphs
from fastprune.study.logs import log_folder, log_training
from fastprune.study.plan import Planned, check_rounds, describe, print_plan
from fastprune.study.settings import Settings
from fastprune.training.scalars import check_logs

if TYPE_CHECKING:
    from fastprune.study.compute import Images
    from fastprune.study.progress import Live, Watch
    from fastprune.study.run import Outcome


@dataclass(frozen=True)
class FigureRequest:
    """A requested figure with its settings resolved.

    data: a folder, "synthetic", or None where none was given, which is enough to plan. out: the figure's own folder.
    """

    figure: Figure
    preset: str
    settings: Settings
    data: str | None
    out: Path

    @property
    def name(self) -> str:
        return self.figure.name

    @property
    def images(self) -> DataRequest:
        return DataRequest(self.settings, self.data, f"figure {self.name} at preset {self.preset}")


@dataclass(frozen=True)
class Request:
    """One call of reproduce.py.

    compute: one of COMPUTES. gpu_options: those that are forced on or off, by name. device: "cpu", "cuda" or "cuda:N";
    None: every GPU, else the CPU. workers: how many runs compute at once; None: by the device. images_per_second: to
    plan with; None: those measured. planned_gpus: numbers of GPUs to plan for. ray: run on the Ray cluster at
    ray_address. gpus_per_run: on Ray; None: one if there are GPUs. modules: the user's modules to import. log: some of
    training.scalars.LOGS. command: the command line, to be recorded. open: whether to show the page.
    """

    figures: tuple[FigureRequest, ...]
    store: Path
    loader: str = "auto"
    compute: str = "auto"
    gpu_options: Mapping[str, bool] = field(default_factory=dict)
    device: str | None = None
    workers: int | None = None
    checkpoint_seconds: float = 60.0
    checkpoint_epochs: int | None = None
    images_per_second: float | None = None
    planned_gpus: tuple[int, ...] = ()
    ray: bool = False
    ray_address: str | None = None
    gpus_per_run: float | None = None
    modules: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    command: str = ""
    open: bool = False


def plan(request: Request) -> None:
    """Prints what `run` would compute and what it would cost. Writes nothing and reads no image.

    InputError as of `run`, but for what only torch, the images or a cluster know.
    """
    _check_compute(request, request.device)
    planned = []
    for figure in request.figures:
        data = figure.images.planned(request.store)
        points, graph = _checked_graph(figure, data)
        panels: dict[str, set[str]] = {}
        for point in points:
            panels.setdefault(point.panel, set()).add(point.node.key)
        about = f"Figure {figure.name}, preset {figure.preset}: {describe(figure.settings, data)}"
        planned.append(Planned(figure.name, about, graph, panels))
    store = RunStore(request.store, read_only=True)  # a plan must not create a store
    print_plan(
        planned,
        store,
        images_per_second=request.images_per_second,
        workers=request.workers or 1,
        gpus=request.planned_gpus,
    )
    # A search for GPUs would import torch. Where there may be one, or the plan is for others, nothing is advised.
    if request.device == "cpu" or not (request.device or request.planned_gpus or any(map(os.path.exists, _DRIVERS))):
        _advise(request)


def _checked_graph(figure: FigureRequest, data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """As of build_graph. InputError, too, where a round would prune nothing, or all."""
    points, graph = build_graph(figure.figure, figure.settings, data)
    if any(n.kind == "prune" for n in graph.nodes):
        check_rounds(figure.settings, data)
    return points, graph


_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files that exist where a GPU's driver is loaded: NVIDIA's, WSL's, AMD's."""


def _advise(request: Request) -> None:
    """Prints a line if the figures' precision slows down this machine's CPU."""
    # Nothing is known of the machines of a cluster.
    asked = not request.ray and any(figure.settings.precision == "bf16" for figure in request.figures)
    if asked and (advice := bf16_advice("add --precision fp32 (its runs are other nodes)")):
        print(f"  {advice}", flush=True)


def _check_compute(request: Request, device: str | None) -> None:
    """InputError for --compute sparse, and for --gpu-options that are on, where they are known not to be possible.
    device: None if it is not known."""
    if not request.ray:  # each worker knows its device
        check_gpu_options(request.gpu_options, device)
    if request.compute != "sparse":
        return
    if device not in (None, "cpu"):
        raise InputError(f"--compute sparse computes on a CPU, not on {device}: add --device cpu")
    for figure in request.figures:
        if figure.settings.precision != "fp32":
            raise InputError(
                f"--compute sparse computes in fp32, not {figure.settings.precision}: add --precision fp32"
            )


@dataclass(frozen=True)
class _Figure:
    """A requested figure with its data, loader, points and graph."""

    request: FigureRequest
    data: DataSpec
    loader: str | None
    points: list[AnyPoint]
    graph: Graph

    @property
    def smoke(self) -> bool:
        return self.request.preset == "smoke"

    def drawing(self, store: RunStore) -> Drawing:
        """The drawing of the figure, with a note on what was trained."""
        figure, s = self.request.figure, self.request.settings
        note = f"Preset {self.request.preset}: {self.data.classes} classes, width {s.width}, {s.epochs} epochs."
        if self.smoke:
            note += " It shows the machinery, not the paper's result."
        note = f"{note} {remark(self.points, store)}".strip()
        model = s.model.replace("resnet", "ResNet-")
        panels = {panel.id: DrawnPanel.of(panel) for panel in figure.panels_of(s)}
        return Drawing(
            f"{model} on {TITLES.get(self.data.name, self.data.name)}",
            panels,
            figure.labels(s),
            chance=1 / self.data.classes if any(p.y == "accuracy" for p in panels.values()) else None,
            note=note,
            layers=figure.layers,
        )


def run(request: Request) -> bool:
    """Computes the nodes that the store lacks, then draws, judges and reports. Returns False if a node failed."""
    began = time.monotonic()
    check_logs(request.log)
    for figure in request.figures:  # before a folder is created
        figure.images.source()
    for figure in request.figures:
        _checked_graph(figure, figure.images.planned(request.store))
    # On a cluster this process only coordinates, so it leaves a GPU of its own machine to Ray.
    devices = ["cpu"] if request.ray else _devices(request.device)
    _check_compute(request, devices[0])
    for figure in request.figures:
        _check_writable(figure.out)
    store = RunStore(request.store)
    _keep_caches_in(store.cache())
    # Without --workers: one per GPU, which a single training can fill; on a CPU one per usable core, up to 8, since
    # each needs memory of about 1 GB (bench/NOTES.md).
    workers = request.workers or (len(devices) if devices[0] != "cpu" else min(8, len(os.sched_getaffinity(0))))
    figures, images = _prepare(request, devices, workers)
    if not request.ray:
        print(f"  on {', '.join(dict.fromkeys(devices))}, runs at once: up to {workers}", flush=True)
        if devices[0] == "cpu":
            _advise(request)
    # Recorded before it runs, so that `store.py gc` spares the nodes of a figure that is not finished.
    for each in figures:
        record_figure(
            store,
            each.request.name,
            each.request.preset,
            each.graph.nodes,
            each.graph.histories,
            request.command,
            asdict(each.request.settings),
            asdict(each.data),
        )
    graph = merge_graphs(f.graph for f in figures)
    for kind in request.log:
        print(f"  metrics of each training: {log_folder(store, kind)}", flush=True)
    for node in graph.trainings if request.log else ():
        if store.has(node):
            log_training(store, graph, request.log, node)
    # Before anything runs, so that the report can tell cached nodes from computed ones.
    todo = {n.key for n in graph.todo(store)}
    page = _LivePage(figures, store, todo, devices, request.command)
    if request.open:
        open_page(page.write())
    outcome = page.follow(lambda watch: _execute(request, store, graph, images, devices, workers, watch))
    # Nodes of several figures run at once, so their time and rate cannot be divided between figures.
    command = {
        "figures": [f.name for f in request.figures],
        "line": request.command,
        "images_per_s": outcome.images / outcome.seconds if outcome.images else None,
        "wall_s": time.monotonic() - began,
    }
    for each in figures:
        _report(each, store, todo, outcome, devices, command)
    try:
        print(f"\nPage    {page.write(finished=True)}")
    except InputError as error:  # such as another figure's damaged files in the same folder: this run's are written
        print(f"no page: {error}", file=sys.stderr)
    cached = Cost.of(n for n in graph.nodes if n.key not in todo)
    found = Cost.of(graph.by_key[key] for key in outcome.found).trainings
    others = f", {found} by other processes" if outcome.found else ""
    print(f"\n{len(outcome.epochs)} trainings run, {cached.trainings} were in the store{others}", flush=True)
    if outcome.failed:
        for key, reason in outcome.failed.items():
            print(f"failed: {graph.label(graph.by_key[key])}: {reason}", file=sys.stderr)
        print(f"{len(outcome.failed)} failed, {outcome.blocked} blocked; rerun the command to retry")
        return False
    return True


def _prepare(request: Request, devices: list[str], workers: int) -> "tuple[list[_Figure], dict[str, Images]]":
    """Finds or prepares the data of each figure and builds its graph; prints the settings and the loader."""
    from fastprune.study.compute import Images

    figures, images = [], {}
    for figure in request.figures:
        # Rounded up: the device with the most workers decides whether the images fit into its memory.
        copies = -(-workers // len(devices))
        manifest, folder, choice = figure.images.find(request.store, request.loader, devices[0], copies)
        data = data_spec(manifest, figure.settings)
        points, graph = _checked_graph(figure, data)
        # On a cluster each worker chooses the loader by its own device, which this process does not see.
        images[manifest.fingerprint] = Images(manifest, folder, request.loader if request.ray else choice.name)
        figures.append(_Figure(figure, data, choice.name, points, graph))
        print(f"Figure {figure.name}, preset {figure.preset}: {describe(figure.settings, data)}")
        print(
            f"  loader {choice.name} ({choice.why})" if not request.ray else "  loader: each worker's choice",
            flush=True,
        )
    return figures, images


def _report(
    figure: _Figure,
    store: RunStore,
    todo: set[str],
    outcome: "Outcome",
    devices: list[str],
    command: dict[str, Any],
) -> None:
    """Writes the figure's files and prints its summary."""
    request = figure.request
    rows = collect(request.name, figure.points, store)
    drawing = figure.drawing(store)
    cost = _cost(figure.graph, todo, outcome) | {"command": command}
    summary = _summary(figure, rows, drawing, cost, devices, store)
    write_all(request.out, rows, drawing, summary)
    print()
    print(terminal_summary(summary, request.out))


class _LivePage:
    """The page of a run: written while it goes on, so rarely that it takes a fiftieth of the time, and at its end."""

    def __init__(
        self, figures: "list[_Figure]", store: RunStore, todo: set[str], devices: list[str], command: str
    ) -> None:
        self.figures, self.store, self.todo, self.devices = figures, store, todo, devices
        self.command = {"line": command}
        self.out = figures[0].request.out.parent
        self.due = time.monotonic() + _FIRST_PAGE_SECONDS
        self.live: Live | None = None

    def follow(self, run: "Callable[[Watch], Outcome]") -> "Outcome":
        """Calls `run` with a function that keeps the page up to date; after an error the page says that it ended."""
        try:
            return run(self._watch)
        except BaseException:
            if self.live is not None:  # else no page of this run was written
                self._try(replace(self.live, going=False))
            raise

    def _watch(self, state: "Callable[[], Live]") -> None:
        if (began := time.monotonic()) >= self.due:
            self._try(state())
            now = time.monotonic()
            self.due = now + max(_PAGE_SECONDS, 50 * (now - began))

    def _try(self, live: "Live") -> None:
        # A page that cannot be written while runs go on ends none of them: at the end it is an error.
        with suppress(InputError):
            self.write(live)
            self.live = live

    def write(self, live: "Live | None" = None, *, finished: bool = False) -> Path:
        """Writes the page, with the figures of earlier commands in the same folder; returns its path."""
        from fastprune.figures.page import Results, results_in, write_page

        there = results_in(self.out)
        if not finished:
            for each in self.figures:
                rows, drawing = collect(each.request.name, each.points, self.store), each.drawing(self.store)
                cost = {"command": self.command}
                summary = _summary(each, rows, drawing, cost, self.devices, self.store)
                there[each.request.name] = Results(rows, summary)
        return write_page(self.out, there.values(), self.store.root, live)


_FIRST_PAGE_SECONDS, _PAGE_SECONDS = 15.0, 10.0
"""When the first page of a run is written, and the least time between two."""


def open_page(path: Path) -> None:
    """Shows a page in the user's browser; a line says where it is if there is no browser."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        print(f"no browser found: open {path}", file=sys.stderr)


def _cost(graph: Graph, todo: set[str], outcome: "Outcome") -> dict[str, Any]:
    """The cost of the figure's nodes in this call. A node that several figures share counts in each."""
    here = {n.key: outcome.epochs[n.key] for n in graph.trainings if n.key in outcome.epochs}
    # The last partial batch of an epoch is dropped.
    per_epoch = {n.key: n.data.train_count // n.optimizer.batch_size * n.optimizer.batch_size for n in graph.trainings}
    cached = sum(n.key not in todo or n.key in outcome.found for n in graph.nodes)
    return {
        "nodes": cached + sum(n.key in outcome.done for n in graph.nodes),
        "cached": cached,
        "trained": len(here),
        "failed": sum(n.key in outcome.failed for n in graph.nodes),
        "epochs": sum(here.values()),
        "images": sum(epochs * per_epoch[key] for key, epochs in here.items()),
    }


def _summary(
    figure: _Figure, rows: list[Row], drawing: Drawing, cost: dict[str, Any], devices: list[str], store: RunStore
) -> dict[str, Any]:
    from fastprune.study.provenance import environment

    request, chance = figure.request, 1 / figure.data.classes
    claims = request.figure.claims_of(request.settings)
    command = f"python scripts/reproduce.py --fig {request.name} --preset paper {data_flag(request.settings)} DIR"
    return summarize(
        rows,
        drawing,
        [judge(claim, rows, chance=chance, decisive=not figure.smoke) for claim in claims],
        figure=request.name,
        preset=request.preset,
        settings=asdict(request.settings),
        data=asdict(figure.data),
        cost=cost,
        environment=environment(figure.loader, devices) | _computed_on(figure, store),
        real_command=command if figure.smoke else None,
    )


def _computed_on(figure: _Figure, store: RunStore) -> dict[str, Any]:
    """The devices that trained the figure's networks, in this call or an earlier one, their number of threads if it was
    the same for all, and how many trainings computed in which way and with which GPU options; empty where none is
    recorded."""
    there = [store.node(n)["provenance"] for n in figure.graph.trainings if store.has(n)]
    names = sorted({str(made["device"]) for made in there if "device" in made})
    found: dict[str, Any] = {"device": ", ".join(names)} if names else {}
    # That of this process, which only draws, says nothing of them.
    if threads := {made["threads"] for made in there if "threads" in made}:
        found["threads"] = threads.pop() if len(threads) == 1 else None
    for what in ("compute", "gpu_options"):
        if ways := Counter(filter(None, (computed(made, what) for made in there))):
            found[what] = dict(sorted(ways.items()))
    return found


def _devices(asked: str | None) -> list[str]:
    """The devices that --device means: "cpu", or one "cuda:N" per GPU. InputError for a device that is not there."""
    import torch

    if asked is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    kind, _, number = asked.partition(":")
    if asked == "cpu":
        return ["cpu"]
    if kind != "cuda" or (":" in asked and not (number.isascii() and number.isdecimal())):
        raise InputError(f"unknown device {asked!r}: choose cpu, cuda or cuda:N")
    if int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked} does not exist: this machine has {torch.cuda.device_count()} CUDA devices")
    return [asked] if number else [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _execute(
    request: Request,
    store: RunStore,
    graph: Graph,
    images: "dict[str, Images]",
    devices: list[str],
    workers: int,
    watch: "Watch",
) -> "Outcome":
    from fastprune.study.compute import WorkConfig
    from fastprune.study.progress import Bars
    from fastprune.study.run import Outcome
    from fastprune.study.run import run as run_graph
    from fastprune.study.workers import Worker, local_workers

    todo = graph.todo(store)
    if not todo:
        return Outcome()
    config = WorkConfig(
        store=request.store.resolve(),
        images=images,
        device=devices[0],
        checkpoint_seconds=request.checkpoint_seconds,
        checkpoint_epochs=request.checkpoint_epochs,
        modules=request.modules,
        compute=request.compute,
        gpu_options=request.gpu_options,
    )

    def by(workers: "list[Worker]") -> "Outcome":
        logged = partial(log_training, store, graph, request.log)
        with Bars(graph, todo, len(workers), watch, logged) as bars:
            return run_graph(graph, RunStore(config.store), workers, bars)

    if not request.ray:
        with local_workers(graph, config, devices, min(workers, len(todo))) as local:
            return by(local)
    if find_spec("ray") is None:
        raise InputError("--executor ray needs Ray, which is not installed: run pip install 'fastprune[ray]'")
    from fastprune.study.ray_workers import ray_workers

    with ray_workers(
        graph, config, address=request.ray_address, count=request.workers, gpus=request.gpus_per_run, most=len(todo)
    ) as cluster:
        print(f"  on {cluster.about}", flush=True)
        return by(cluster.workers)


def _check_writable(out: Path) -> None:
    """InputError where `out` cannot be created or written, or its disk is full."""
    # Found before hours of training rather than after them. 64 KiB, since a full disk may still take a few bytes.
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as f:
            f.write(bytes(1 << 16))
            f.flush()
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}): choose another folder with --out") from error


def _keep_caches_in(folder: Path) -> None:
    """Makes compilers and matplotlib cache in `folder`, unless the user set their variables. Changes os.environ."""
    # The home folder may be read-only, or small and shared by all machines of a cluster.
    for variable, name in {
        "MPLCONFIGDIR": "matplotlib",
        "NUMBA_CACHE_DIR": "numba",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }.items():
        os.environ.setdefault(variable, str((folder / name).resolve()))
    # One thread per process: two processes of one thread beat one of two (bench/NOTES.md). Passive: idle threads sleep
    # rather than spin, which would take the cores of other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def report(store_path: Path, out: Path, names: Sequence[str] = (), *, show: bool = False) -> None:
    """Writes the files and the page of figures that a store records, without computing anything.

    names: of figures or of records; none: the last record of each figure. InputError for a figure that is not recorded,
    or that this version would compute otherwise.
    """
    existing_store(store_path)
    records = read_needs(store_path)
    if not records:
        raise InputError(f"{store_path} records no figure: run reproduce.py --store {store_path} first")
    chosen = {r.figure: r for r in sorted(named(records, names) if names else records, key=lambda r: r.made["at"] or 0)}
    _check_writable(out)
    store = RunStore(store_path, read_only=True)
    with tempfile.TemporaryDirectory(dir=out) as caches:
        _keep_caches_in(Path(caches))
        _report_records(chosen.values(), store, out, show)


def _report_records(records: Iterable[Needs], store: RunStore, out: Path, show: bool) -> None:
    from fastprune.figures.page import results_in, write_page
    from fastprune.study.run import Outcome

    for record in records:
        figure = _recorded(record, out)
        # What it cost when it was computed, whoever did: the times of the nodes, not of this call.
        made = {n.key: store.node(n) for n in figure.graph.nodes if store.has(n)}
        epochs = {n.key: made[n.key]["result"]["epochs"] for n in figure.graph.trainings if n.key in made}
        seconds = [node["provenance"].get("wall_seconds") or 0.0 for node in made.values()]
        command = {"figures": [record.figure], "line": record.made["command"], "node_s": math.fsum(seconds)}
        _report(figure, store, set(made), Outcome(done=list(made), epochs=epochs), ["cpu"], command)
    path = write_page(out, results_in(out).values(), store.root)
    print(f"\nPage    {path}")
    if show:
        open_page(path)


def _recorded(record: Needs, out: Path) -> _Figure:
    """A figure from its record. InputError if the record lacks what is needed, or this version plans other nodes."""
    figure = load(record.figure)
    again = f"{record.path}: run figure {record.figure} again"
    try:
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.made["settings"].items()
        }
        request = FigureRequest(figure, str(record.made["preset"]), Settings(**settings), None, out / figure.name)
        data = DataSpec(**record.made["data"])
    except (TypeError, AttributeError) as error:
        raise InputError(f"{again}: an older version recorded it") from error
    points, graph = build_graph(figure, request.settings, data)
    if {n.key for n in graph.nodes} != record.nodes:
        raise InputError(f"{again}: another version recorded it, and this one would train other networks")
    return _Figure(request, data, None, points, graph)


def redraw(request: Request) -> None:
    """Draws each figure again from its results.csv, with titles and notes of summary.json if it exists."""
    for figure in request.figures:
        if not figure.out.is_dir():
            raise InputError(
                f"{figure.out} has no results.csv: run the figure first, or give the folder above it as --out"
            )
        _check_writable(figure.out)
        # In the output folder, because --redraw needs no store and must not create one.
        with tempfile.TemporaryDirectory(dir=figure.out) as caches:
            _keep_caches_in(Path(caches))
            for path in draw_again(figure.out):
                print(path)
