"""safetensors files: the same bytes for the same content, a checksum within, and errors that a person can act on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastprune.errors import InputError

_KEY = "fastprune"
_UNSET = "0" * 64


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Writes contiguous CPU tensors, and in the file's metadata, as JSON, `facts` and the SHA-256 of the file with 64
    zeros in that place.

    Python writes the bytes, so that a full disk is an OSError; one metadata entry, because safetensors orders several
    at random.
    """
    content = save(dict(tensors), {_KEY: json.dumps({"sha256": _UNSET, "facts": facts})})
    at = content.index(_UNSET.encode())
    path.write_bytes(content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(_UNSET) :])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors, facts) of what write_tensors wrote. InputError for anything else, and where a bit has changed."""
    try:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8:end])["__metadata__"][_KEY])
        expected = about["sha256"].encode()
        at = content.index(expected, 8, end)
        unset = content[:at] + _UNSET.encode() + content[at + len(expected) :]
        if hashlib.sha256(unset).hexdigest() != about["sha256"]:
            raise InputError(f"{path}: damaged (its content does not have the checksum that it names)")
        return load(content), about["facts"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: a safetensors file, but none of fastprune's") from None
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: missing, damaged or foreign ({error})") from error
