"""safetensors files: the same bytes for the same content, a checksum within, and errors that a person can act on."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastprune.errors import InputError
from fastprune.files import SEAL, UNSET, check_sealed


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Writes contiguous CPU tensors, and in the file's metadata, as JSON, `facts` and the SHA-256 of the file with 64
    zeros in that place.

    Python writes the bytes, so that a full disk is an OSError; one metadata entry, because safetensors orders several
    at random.
    """
    content = save(dict(tensors), {SEAL: json.dumps({"sha256": UNSET, "facts": facts})})
    at = content.index(UNSET.encode())
    path.write_bytes(content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(UNSET) :])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors, facts) of what write_tensors wrote. InputError for anything else, and where a bit has changed."""
    try:
        content = path.read_bytes()
        facts = check_sealed(io.BytesIO(content))
        return load(content), facts
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: a safetensors file, but none of fastprune's") from None
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: missing, damaged or foreign ({error})") from error
