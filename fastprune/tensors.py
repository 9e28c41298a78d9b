"""safetensors files: the same bytes for the same content, and errors that a person can act on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastprune.errors import InputError

_KEY = "fastprune"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Writes contiguous CPU tensors, and `facts` as JSON in the file's metadata.

    Python writes the bytes, so that a full disk is an OSError; one metadata entry, because safetensors orders several
    at random.
    """
    path.write_bytes(save(dict(tensors), {_KEY: json.dumps(facts)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors, facts) of what write_tensors wrote. InputError for anything else."""
    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, json.loads(header["__metadata__"][_KEY])
    except KeyError:
        raise InputError(f"{path}: a safetensors file, but none of fastprune's") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: missing, damaged or foreign ({error})") from error
