"""From the published nodes of a store to the rows of results.csv."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from fastprune.figures.figure import AnyPoint, LprPoint, Point
from fastprune.figures.results import Row
from fastprune.specs import Prune
from fastprune.store import RequestedOutputs, RunStore


def collect(figure: str, points: Iterable[AnyPoint], store: RunStore) -> list[Row]:
    """The rows of all points whose nodes are published."""
    # A point without its nodes is left out, not an error: a figure is drawn also where some runs failed.
    rows: list[Row] = []
    for point in points:
        if isinstance(point, LprPoint):
            if store.holds(point.node, RequestedOutputs(histories=(point.history.fraction,))):
                rows += _history_rows(figure, point, store)
        elif all(store.has(node) for node in point.wanted):
            rows.append(_row(figure, point, store))
    return rows


def remark(points: Iterable[AnyPoint], store: RunStore) -> str:
    """The note of a structured figure: the latency of the dense network, how steadily it was measured, and in how many
    groups one filter was kept although the ranking would have removed all; empty for other figures."""
    nodes = {p.selection for p in points if isinstance(p, Point) and p.selection is not None}
    found = [(node.fraction, store.node(node)) for node in nodes if store.has(node)]
    if not found:
        return ""
    counts: dict[float, list[int]] = defaultdict(list)
    for fraction, selection in found:
        counts[fraction].append(len(selection["result"]["spared"]))
    # Every selection timed the dense network again; the median is robust to a busy machine.
    measured = [selection["provenance"] for _, selection in found]
    whole, batch = median(m["latency_whole_ms"] for m in measured), measured[0]["latency_batch"]
    text = f"The dense network takes {whole:.3g} ms for a batch of {batch}."
    # Nodes of earlier versions have no quartiles.
    if all("latency_quartiles" in m for m in measured):
        low_high = [(*m["latency_quartiles"], m["latency_relative"]) for m in measured]
        spread = 100 * median((high - low) / 2 / middle for low, high, middle in low_high)
        text += (
            f" A latency is the median of {measured[0]['latency_rounds']} ratios to it, timed in turn; half of "
            f"them lie within {spread:.2g} %."
        )
    parts = [f"in {_span(n)} at {100 * fraction:g} %" for fraction, n in sorted(counts.items()) if any(n)]
    if parts:
        groups = found[0][1]["result"]["groups"]
        text += f" Each of {groups} groups of filters keeps at least one; by rank none would stay {', '.join(parts)}."
    return text


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _row(figure: str, p: Point, store: RunStore) -> Row:
    result = store.node(p.node)["result"]
    accuracy = result["accuracy"]
    if p.epoch is not None and p.epoch != p.node.stop:
        # An early epoch of a longer run. A run that diverged stops early and has no later epochs.
        accuracy = store.metrics(p.node)[p.epoch]["val_accuracy"] if p.epoch <= result["epochs"] else None
        if result["diverged"] and p.epoch == result["epochs"]:
            accuracy = None
    x, dead = 1.0, 0
    if p.selection is not None:
        x = _size(store.node(p.selection), p.x)
    elif isinstance(p.node.mask, Prune):
        mask = store.node(p.node.mask)["result"]
        x = mask["density"]
        dead = sum(ratio == 1.0 for ratio in mask["layerwise_ratios"].values())
    gone = accuracy is None
    return Row(figure, p.panel, p.series, p.seed, p.round, x, accuracy, p.lr_find, p.lr_eval, gone, dead, p.node.key)


def _size(selection: dict[str, Any], axis: str) -> float:
    """The value of a filter selection on an axis. Latency is relative to the dense network."""
    # Both networks were timed in turn on one machine, so that its load and speed cancel.
    if axis == "latency":
        made = selection["provenance"]
        # Nodes of earlier versions have the medians only.
        return float(made.get("latency_relative", made["latency_ms"] / made["latency_whole_ms"]))
    return float(selection["result"]["removed_fraction" if axis == "filters" else axis])


def _history_rows(figure: str, p: LprPoint, store: RunStore) -> list[Row]:
    """One row per epoch and layer (A4), or per epoch (A5). A row has no value where the run has diverged."""
    history = store.lpr_history(p.history)
    diverged = store.node(p.node)["result"]["diverged"]
    layers = list(history[0])
    rows = []
    for epoch in range(p.node.stop + 1):
        ratios = history.get(epoch)
        values: dict[str, float | None]
        if p.series is None:
            values = dict.fromkeys(layers) if ratios is None else dict(ratios)
        elif ratios is None or diverged:  # a diverged run has no LPR at the end to measure the distance from
            values = {p.series: None}
        else:
            end = history[p.node.stop]
            values = {p.series: fmean(abs(ratios[layer] - end[layer]) for layer in layers)}
        for series, y in values.items():
            about = [series] if p.series is None else layers
            dead = 0 if ratios is None else sum(ratios[layer] == 1.0 for layer in about)
            where = (figure, p.panel, series.removesuffix(".weight"), p.seed, epoch, float(epoch))
            rows.append(Row(*where, y, p.lr_find, None, y is None, dead, p.node.key))
    return rows
