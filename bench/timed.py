"""The timed tasks of each part, and the process that does them, one after the other, as its parent names them.

    python -m bench.timed PART --device cuda [--small] [--blocks]

A task that ends the process, or after which the device can no longer be used, costs itself: the parent goes on with the
next in a new process.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import layers, rows, share, training
from bench.child import attach, device_lost, send

PARTS = ("kernels", "steps", "more", "share")
STEPS = tuple((network, precision) for network in ("resnet18", "resnet50") for precision in ("bf16", "fp16"))

Found = tuple[dict[str, dict[str, Any]], dict[str, str]]
"""(rows by name, an error line for each that failed)."""


@dataclass(frozen=True)
class Task:
    """name: of the group that it gives. call: takes the rows to leave out. seconds: what it is expected to take with 16
    cores and nothing compiled before (predicted); a task is not begun if that is not left."""

    name: str
    call: Callable[[frozenset[str]], Found]
    seconds: float


def time_group(group: rows.Group, device: torch.device, rounds: int, without: frozenset[str]) -> Found:
    """The rows of a group, until one breaks the device."""
    inputs, found, errors = group.inputs(device), {}, {}
    for row in group.rows:
        if (row.cpu_only and device.type != "cpu") or row.what in without:
            continue
        send(row=row.what)
        try:
            found[row.what] = rows.time_row(row, inputs, device, rounds)
        except Exception as error:  # recorded: time on a GPU is scarce, and the other rows can still be timed
            errors[row.what] = training.one_line(error)
            if device_lost():
                return {}, errors
    return found, errors


Make = Callable[[str, str, torch.device, training.Size], dict[str, training.Way]]


def time_steps(
    make: Make, network: str, precision: str, device: torch.device, size: training.Size, without: frozenset[str]
) -> Found:
    # torch counts recompilations over all networks of a process, and beyond its limit runs uncompiled.
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the graphs of the task before have freed
    compared = make(network, precision, device, size)
    turns = 2 if size.width < 64 else 7
    compared = {name: way for name, way in compared.items() if name not in without}
    found, errors = training.time_turns(compared, turns, lambda name: send(row=name), device_lost)
    flop, moved = training.least_work(network, size)
    for row in found.values():
        row |= {"flop": flop * row["images"], "bytes": moved * row["images"]}
    return found, errors


def measure_memory(network: str, device: torch.device, size: training.Size, without: frozenset[str]) -> Found:
    more = training.extra_memory(network, size, device)
    return {training.MASKED: {"ours": True, "bytes_a_weight_over_plain": more}}, {}


def time_profile(
    network: str, options: str, device: torch.device, size: training.Size, without: frozenset[str]
) -> Found:
    return training.profiled(network, size, device, options), {}


def time_shared(settings: Any, workers: int, device: torch.device, window: float, without: frozenset[str]) -> Found:
    return {f"{workers} at once": share.time_shared(settings, workers, device, window)}, {}


def kernel_tasks(device: torch.device, small: bool, blocks: bool) -> list[Task]:
    """The ceilings of the device, at which floors are counted; the layers of a step; then all else."""
    groups = rows.kernel_groups(device, small, blocks)
    rounds = 3 if small else 7
    found = [(group, 10.0) for group in groups]  # inputs, some ten kernels to compile, and half a second a row
    found[2:2] = [(group, 20.0) for group in layers.layer_groups(device, small)]  # torch.compile, both directions
    return [Task(group.name, partial(time_group, group, device, rounds), seconds) for group, seconds in found]


def step_tasks(device: torch.device, small: bool, more: bool) -> list[Task]:
    """What ResNet-18 takes, what each option gains it, where its time goes, and ResNet-50; or `more`, all else."""
    size = training.Size.of(device, small)

    def step(network: str, precision: str, seconds: float, make: Make = training.ways, what: str = "") -> Task:
        name = what + training.group_name(network, precision, size)
        return Task(name, partial(time_steps, make, network, precision, device, size), seconds)

    def memory(network: str, seconds: float) -> list[Task]:
        if device.type == "cpu":  # a CPU's allocator does not tell
            return []
        return [Task(f"memory of {network}", partial(measure_memory, network, device, size), seconds)]

    def profile(network: str, options: str, seconds: float) -> Task:
        name = f"profile of {network}, gpu options: {options}"
        return Task(name, partial(time_profile, network, options, device, size), seconds)

    # Compiling forward and backward takes about 45 s for ResNet-18 and 90 s for ResNet-50, and 15 and 30 s if the
    # cache has the code: none of our options, the memory, the profile.
    if not more:
        return [
            step("resnet18", "bf16", 75),
            step("resnet18", "bf16", 150, training.option_ways, "gpu options, "),
            profile("resnet18", training.ALL, 30),
            profile("resnet18", training.NONE, 30),
            step("resnet50", "bf16", 140),
            *memory("resnet18", 30),
        ]
    return [
        step("resnet18", "fp16", 65),
        step("resnet18", "bf16", 85, training.compiled_ways, "torch.compile, "),
        step("resnet50", "fp16", 130),
        *memory("resnet50", 50),
        step("resnet50", "bf16", 280, training.option_ways, "gpu options, "),
        step("resnet50", "bf16", 160, training.compiled_ways, "torch.compile, "),
    ]


def share_tasks(device: torch.device, small: bool) -> list[Task]:
    window = 2.0 if small else 8.0
    return [
        Task(f"{name}, {n} at once", partial(time_shared, settings, n, device, window), 60.0 + window)
        for name, settings in share.networks(small).items()
        for n in share.WORKERS
    ]


def tasks(part: str, device: torch.device, small: bool, blocks: bool) -> list[Task]:
    """The tasks of a part, in the order in which they are done."""
    if part == "kernels":
        return kernel_tasks(device, small, blocks)
    return share_tasks(device, small) if part == "share" else step_tasks(device, small, part == "more")


def work(known: Sequence[Task]) -> None:
    """Does each task that standard input names, and sends what it gave."""
    by_name = {task.name: task for task in known}
    for line in sys.stdin:
        given = json.loads(line)
        name = given["task"]
        try:
            found, errors = by_name[name].call(frozenset(given["without"]))
        except Exception as error:  # recorded, and reported by the exit code
            found, errors = {}, {"": training.one_line(error)}
        lost = bool(errors) and device_lost()
        send(ended=name, rows=found, errors=errors, lost=lost)
        if lost:
            os._exit(1)  # an orderly end would wait for the device


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=PARTS)
    p.add_argument("--device", required=True)
    p.add_argument("--small", action="store_true")
    p.add_argument("--blocks", action="store_true")
    args = p.parse_args()
    attach()
    torch.set_num_threads(1)  # as a worker runs; on a GPU the host only launches
    work(tasks(args.part, torch.device(args.device), args.small, args.blocks))


if __name__ == "__main__":
    main()
