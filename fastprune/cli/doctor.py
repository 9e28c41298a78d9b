"""`scripts/doctor.py`: what is here, what is missing for which use, and the command that mends it."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fastprune.cli.command import DONE, FAILED, Parser, expanded, run_command, to_path
from fastprune.console import bf16_advice, printable, version_of
from fastprune.errors import InputError

OK, MISSING, BROKEN = "ok", "missing", "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked at. state: OK, MISSING (some use does without), BROKEN. mend: a command, "" where none helps."""

    what: str
    state: str
    says: str
    mend: str = ""


def findings(store: Path, data: str | None) -> Iterator[Finding]:
    """One of each thing that some use needs. store: a folder of runs, which need not exist. data: as of --data."""
    yield cpu()
    yield gpu()
    yield ffcv()
    yield ray()
    yield disk(store)
    yield images(data, store)


def cpu() -> Finding:
    from llvmlite import binding

    from fastprune.sparse.conv import has_avx512

    cores = len(os.sched_getaffinity(0))
    vectors = "AVX-512" if has_avx512() else "AVX2" if binding.get_host_cpu_features().get("avx2") else "no AVX2"
    pays = "no speed is known here" if vectors == "no AVX2" else "in fp32 a pruned round costs less than the last"
    slow = ", bf16 is slower than fp32" if bf16_advice("-") else ""
    return Finding("CPU", OK, f"{cores} core{'s' * (cores > 1)}, {vectors}: {pays}{slow}")


def gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("GPU", OK, f"{count} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    without = "--preset cpu fits (hours a seed); quick and paper would take days or weeks"
    if torch.version.cuda is None:
        says = f"torch is a build for CPUs; where there is no GPU, {without}"
        return Finding("GPU", MISSING, says, "uv pip install --torch-backend auto -U torch")
    return Finding("GPU", MISSING, f"torch sees none: {without}")


def ffcv() -> Finding:
    if find_spec("ffcv") is None:
        return Finding("FFCV", MISSING, "images are read by torchvision, more slowly", "scripts/setup.sh in a checkout")
    # In a process of its own: a library that does not fit may crash rather than raise.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import ffcv"], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit code {done.returncode}"
        return Finding("FFCV", BROKEN, f"it is installed, but cannot be imported: {why}", "scripts/setup.sh")
    return Finding("FFCV", OK, version_of("ffcv") or "of unknown version")


def ray() -> Finding:
    if find_spec("ray") is None:
        return Finding("Ray", MISSING, "only --executor ray needs it", "uv pip install 'fastprune[ray]'")
    return Finding("Ray", OK, version_of("ray") or "of unknown version")


def disk(store: Path) -> Finding:
    # The store itself may be made later.
    there = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    needs = "--plan says what a figure needs"
    return Finding("disk", OK if free > 1 else MISSING, f"{free:,.1f} GB free for {store}: {needs}")


def images(data: str | None, store: Path) -> Finding:
    from fastprune.loaders.catalog import peek
    from fastprune.loaders.layout import scan

    if data is None:
        return Finding("data", MISSING, "none is named: --data DIR looks at a folder; --data synthetic needs none")
    try:
        manifest = peek(data, store)
        if manifest is not None:
            name, how, train, val = manifest.name, "prepared", manifest.train_count, manifest.val_count
        else:
            layout = scan(data)
            name, how = layout.name, "not prepared yet, which the first run does"
            train, val = (sum(layout.per_class(split)) for split in ("train", "val"))
    except (InputError, OSError) as error:
        return Finding("data", BROKEN, printable(error))
    return Finding("data", OK, f"{name}, {train:,} images to train and {val:,} to validate, {how}")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="doctor.py",
        description="Say what is here, what is missing for which use, and the command that mends it.",
        epilog="Exit codes: 0 all that is here works, 1 something is broken, 2 bad usage.",
    )
    p.add_argument("--store", type=to_path, default=Path("runs"), metavar="DIR", help="where runs go (default runs)")
    p.add_argument("--data", type=expanded, metavar="DIR", help="a data set to look at")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        args = parser().parse_args(argv)
        from fastprune.cli.__main__ import about

        print(about())
        broken = False
        for found in findings(args.store, args.data):
            print(f"  {found.state:<8} {found.what:<5} {found.says}", flush=True)
            if found.mend:
                print(f"  {'':<14} mend it: {found.mend}")
            broken |= found.state == BROKEN
        return FAILED if broken else DONE

    return run_command("doctor.py", work)


if __name__ == "__main__":
    sys.exit(main())
