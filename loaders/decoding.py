"""What the processes do that fill the resident loader from image files. Without torch, which imports for seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastprune.loaders.child import Send
from fastprune.loaders.inspection import CHUNK
from fastprune.loaders.samples import Samples


@dataclass(frozen=True)
class Decoded:
    """One chunk of one split, from `start` on. pixels: uint8 [n, H, W, 3].  trouble: why it is not to be used."""

    split: str
    start: int
    pixels: np.ndarray
    trouble: str = ""


def decode_share(data: Mapping[str, Samples], height: int, width: int, rank: int, workers: int, send: Send) -> None:
    """What a child does: every workers-th chunk of each split, beginning with `rank`."""
    chunks = [(split, start) for split, samples in data.items() for start in range(0, len(samples), CHUNK)]
    for split, start in chunks[rank::workers]:
        samples = data[split]
        pixels = np.empty((min(CHUNK, len(samples) - start), height, width, 3), np.uint8)
        for i in range(len(pixels)):
            try:
                image = samples.image(start + i)
            except Exception as error:  # decoders of broken files raise nearly anything
                reason = " ".join(str(error).split())
                send(Decoded(split, start, pixels[:0], f"cannot read {samples.name(start + i)} ({reason})"))
                return
            if image.shape != pixels.shape[1:]:
                send(Decoded(split, start, pixels[:0], f"{samples.name(start + i)} has another size than before"))
                return
            pixels[i] = image
        send(Decoded(split, start, pixels))
