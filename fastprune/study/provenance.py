"""Provenance: on which machine and by which code a result was computed."""

# Recorded beside results and never part of a key: a result must not be computed again because a library was updated.

import hashlib
import os
import platform
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastprune
from fastprune.console import version_of
from fastprune.training.about import hardware

_LIBRARIES = ("torch", "torchvision", "triton", "numpy", "numba", "safetensors", "torch-pruning", "ffcv")


def environment(loader: str | None, devices: list[str]) -> dict[str, Any]:
    """Versions, devices, threads, loader and host of this process. devices: as torch names them."""

    return {
        "device": ", ".join(dict.fromkeys(map(hardware, devices))),
        "devices": len(devices),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "loader": loader,
        "code": code_digest(),
        "versions": versions(),
    }


@cache
def versions() -> dict[str, str]:
    """Name -> version, of fastprune, Python, CUDA if torch was built for it, and the libraries that compute."""
    found = {"fastprune": fastprune.__version__, "python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for library in _LIBRARIES:
        # torch.__version__ names the build, such as +cu128; the package's metadata may not.
        known = torch.__version__ if library == "torch" else version_of(library)
        if known is not None:
            found[library] = known
    return found


@cache
def code_digest() -> str:
    """First 16 hex digits of the SHA-256 of all source files of the package."""
    # Not the commit: it would miss uncommitted changes, and an installed wheel has none.
    root = Path(fastprune.__file__).parent
    digest = hashlib.sha256()
    # kernels and loaders are symbolic links, which glob("*/*.py") follows and "**" does not.
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")], key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
