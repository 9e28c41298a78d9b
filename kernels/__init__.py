"""The hot operations of pruning, each with its meaning in plain torch in `reference.py`.

They work on flat buffers and know no model, data or experiment. Masks are bool: True keeps, False prunes.
"""

from fastprune.kernels.crop import crop_flip_normalize
from fastprune.kernels.ops import (
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    masked_weight,
    pack_bits,
    segment_counts,
    unpack_bits,
)
from fastprune.kernels.segments import Segment

__all__ = [
    "Segment",
    "crop_flip_normalize",
    "keep_top",
    "kth_smallest_magnitude",
    "masked_cast",
    "masked_sgd_",
    "masked_weight",
    "pack_bits",
    "segment_counts",
    "unpack_bits",
]
