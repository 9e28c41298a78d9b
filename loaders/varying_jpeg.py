"""JPEG bytes to pixels with the libturbojpeg that FFCV is linked to, from Python and from compiled code.

FFCV's own `imdecode` takes the fast inverse transform, several grey levels away from what Pillow and torchvision
decode; asked for the accurate one, the same library gives Pillow's pixels.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastprune.errors import InputError

RGB = 0  # TJPF_RGB
ACCURATE = 4096  # TJFLAG_ACCURATEDCT
_NAMES = ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy")


class TurboJpeg(NamedTuple):
    """The library's functions. Handles and addresses are int64, as compiled code wants them."""

    init: Callable[[], int]
    header: Callable[..., int]
    decompress: Callable[..., int]
    destroy: Callable[[int], int]


@cache
def turbojpeg() -> TurboJpeg:
    """The library, found through FFCV's binary without importing FFCV. InputError where it is not in there."""
    spec = find_spec("ffcv")
    assert spec is not None, "the caller has looked for ffcv"
    folders = spec.submodule_search_locations or []
    found = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    try:
        library: Any = ctypes.CDLL(str(found[0]))
        init, header, decompress, destroy = (getattr(library, name) for name in _NAMES)
    except (IndexError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"ffcv is installed without its libturbojpeg ({reason}): install it again, or use the loader torchvision"
        ) from None
    number, address = ctypes.c_int32, ctypes.c_int64
    init.argtypes, init.restype = [], address
    header.argtypes, header.restype = [address, address, ctypes.c_uint64, *[address] * 4], number
    decompress.restype = number
    decompress.argtypes = [address, address, ctypes.c_uint64, address, *[number] * 5]
    destroy.argtypes, destroy.restype = [address], number
    return TurboJpeg(init, header, decompress, destroy)


def decode_jpeg(content: np.ndarray) -> np.ndarray | None:
    """Pixels uint8 [H, W, 3] of a file's bytes, uint8 [n]; None where they are no JPEG that decodes without a complaint
    (CMYK is none: the library does not convert it).
    """
    if content[:2].tobytes() != b"\xff\xd8":
        return None
    library = turbojpeg()
    handle = library.init()
    try:
        size = np.zeros(4, np.int32)  # width, height, subsampling, colours
        places = [size.ctypes.data + 4 * i for i in range(4)]
        if library.header(handle, content.ctypes.data, content.size, *places):
            return None
        width, height = int(size[0]), int(size[1])
        pixels = np.empty((height, width, 3), np.uint8)
        failed = library.decompress(
            handle, content.ctypes.data, content.size, pixels.ctypes.data, width, 0, height, RGB, ACCURATE
        )
        return None if failed else pixels
    finally:
        library.destroy(handle)
