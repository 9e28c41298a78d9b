"""The hot operations of pruning, one file each: reference, CPU path and Triton kernel.

They work on flat buffers and depend on no model, data or experiment. Masks are bool: True keeps, False prunes. In each
file `<operation>_reference` is the specification in plain torch, on any device and in any floating dtype, written for
clarity and not for speed. Tests compare with it, and a change that makes a kernel faster must not touch it.
"""

from fastprune.kernels.batch_norm import batch_norm
from fastprune.kernels.batch_norm_pool import batch_norm_pool
from fastprune.kernels.crop import crop_flip_normalize
from fastprune.kernels.cross_entropy import cross_entropy_
from fastprune.kernels.keep_top import keep_top, keep_top_each, kth_smallest_magnitude
from fastprune.kernels.masked_cast import masked_cast, masked_weight
from fastprune.kernels.masked_sgd import masked_sgd_, masked_sgd_scattered_
from fastprune.kernels.pack_bits import pack_bits, unpack_bits
from fastprune.kernels.segment_counts import segment_counts
from fastprune.kernels.segments import Segment

__all__ = [
    "Segment",
    "batch_norm",
    "batch_norm_pool",
    "crop_flip_normalize",
    "cross_entropy_",
    "keep_top",
    "keep_top_each",
    "kth_smallest_magnitude",
    "masked_cast",
    "masked_sgd_",
    "masked_sgd_scattered_",
    "masked_weight",
    "pack_bits",
    "segment_counts",
    "unpack_bits",
]
