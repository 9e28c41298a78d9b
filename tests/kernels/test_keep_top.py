"""keep_top and kth_smallest_magnitude: masks by hand, then exactly their reference, on whatever computes them."""

import sys

import numpy as np
import pytest
import torch

from fastprune.kernels import Segment, keep_top, keep_top_each, kth_smallest_magnitude, segment_counts
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.keep_top import keep_top_reference, kth_smallest_magnitude_reference
from tests.kernels.inputs import (
    EDGE,
    FAR,
    FINITE,
    FLOATS,
    INF,
    KEPT,
    NAN,
    VALUES,
    WHOLE,
    assert_same_bits,
    chunks,
    far_segments,
    far_zeros,
    kept,
    mask_of,
    mask_over,
    odd_layout,
    random_mask,
    require_gpu_memory,
    require_memory,
    resnet18,
    values,
)

# float64 is the CPU path's alone, interpreted or not.
DTYPES = FLOATS if INTERPRETED else [torch.float64, *FLOATS]


def check(score, mask, n_prune, segments, device, **options):
    """The mask that the device under test chooses: that of the reference, nested, with so many fewer."""
    new = keep_top(score.to(device), mask.to(device), n_prune, segments, **options).cpu()
    assert torch.equal(new, keep_top_reference(score, mask, n_prune, segments))
    assert int(new.sum()) == int(mask.sum()) - (n_prune if isinstance(n_prune, int) else sum(n_prune))
    assert not (new & ~mask).any()
    return new


def test_ties_by_hand(device):
    score = torch.tensor([3.0, 1.0, 1.0, 0.5, 1.0, 9.0], device=device)
    every = torch.ones(6, dtype=torch.bool, device=device)
    assert keep_top(score, every, 2).tolist() == [True, False, True, False, True, True]
    assert keep_top(score, every, 3).tolist() == [True, False, False, False, True, True]
    assert keep_top(score, every, 0).tolist() == [True] * 6
    assert keep_top(score, every, 6).tolist() == [False] * 6
    prior = torch.tensor([True, False, True, True, True, True], device=device)
    assert keep_top(score, prior, 2).tolist() == [True, False, False, False, True, True]


def test_ties_go_by_logical_position(device):
    # One conv of shape (1, 2, 1, 2): logical order (i, w) = 00 01 10 11, stored as (w, i) = 00 10 01 11.
    segment = Segment("conv", (1, 2, 1, 2), 0, 0)
    kept = keep_top(torch.ones(4, device=device), torch.ones(4, dtype=torch.bool, device=device), 2, [segment])
    assert segment.view(kept).flatten().tolist() == [False, False, True, True]
    assert kept.tolist() == [False, True, False, True]


def test_nan_and_inf_rank_highest(device):
    score = torch.tensor([NAN, 2.0, INF, 1.0], device=device)
    assert keep_top(score, torch.ones(4, dtype=torch.bool, device=device), 2).tolist() == [True, False, True, False]


def test_local_pruning_takes_so_many_from_each_segment(device):
    segments = [Segment("a", (1, 3, 1, 1), 0, 0), Segment("b", (2, 2), 64, 3)]
    score = torch.full((68,), NAN, device=device)
    mask = torch.zeros(68, dtype=torch.bool, device=device)
    for s, scores in zip(segments, ([5.0, 4.0, 6.0], [1.0, 1.0, 2.0, 3.0]), strict=True):
        score[s.span], mask[s.span] = torch.tensor(scores, device=device), True
    kept = keep_top(score, mask, [1, 2], segments)
    assert kept[:3].tolist() == [True, False, True]
    assert kept[64:].tolist() == [False, False, True, True]
    assert segment_counts(kept, segments).tolist() == [2, 2]


def test_segments_without_elements(device):
    segments = [Segment("a", (0,), 0, 0), Segment("b", (2, 0, 3, 3), 1, 0), Segment("c", (3,), 1, 0)]
    mask = torch.tensor([False, True, True, True], device=device)
    score = torch.tensor([NAN, 3.0, 1.0, 2.0], device=device)
    assert keep_top(score, mask, 2, segments).tolist() == [False, True, False, False]
    assert keep_top(score, mask, [0, 0, 1], segments).tolist() == [False, True, False, True]
    assert keep_top(score[:0], mask[:0], [0], segments[:1]).tolist() == []


@kept
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_buffer(n, kept, dtype, device):
    """The threshold and the mask; of many scores also with many ties, and all the same and denormal in fp16."""
    mask = mask_of(n, kept)
    left = int(mask.sum())
    special = values(n, VALUES, n, dtype)
    for k in {0, min(1, left), left // 2, left}:
        check(special.abs(), mask, k, None, device)
        if k:
            expected = kth_smallest_magnitude_reference(special, mask, k).float()
            assert_same_bits(kth_smallest_magnitude(special.to(device), mask.to(device), k), expected)
    if n < 2000:
        return
    ties = torch.rand(n, generator=torch.Generator().manual_seed(n)).mul(8).round().to(dtype)
    for score in (ties, torch.full((n,), 2e-38).to(dtype)):
        check(score, mask, left // 2, None, device)


@kept
@pytest.mark.parametrize("ties", [False, True], ids=["few ties", "many ties"])
def test_segments(n, kept, ties, device):
    """Over all and in each. Padding scores NaN and is pruned."""
    segments = odd_layout(n)
    mask = mask_over(segments, KEPT[kept])
    score = torch.full(mask.shape, NAN)
    for s in segments:
        score[s.span] = values(s.numel, [0.0, 1e-45, 1e-40, -0.0, INF, NAN], n).abs()
        if ties:
            score[s.span][1::2] = 1e-40
    counts = [int(mask[s.span].sum()) for s in segments]
    shares = (0.0, 0.3, 1.0)
    for number in {int(share * sum(counts)) for share in shares}:
        check(score, mask, number, segments, device)
    for each in {tuple(int(share * c) for c in counts) for share in shares}:
        check(score, mask, each, segments, device)


@pytest.mark.parametrize("all_the_same", [0.0, -0.0, 1.5, INF, NAN])
def test_all_tied_prunes_the_first_by_logical_position(all_the_same, device):
    segments = [Segment("a", (4, 3, 3, 3), 0, 0), Segment("b", (5, 7), 128, 108)]
    mask = mask_over(segments, 1.0).to(device)
    score = torch.full((163,), all_the_same, device=device)
    for n in (0, 1, 50, 120, 143):
        new = keep_top(score, mask, n, segments, block=64)
        logical = torch.cat([s.view(new).flatten() for s in segments])
        assert logical.tolist() == [False] * n + [True] * (143 - n)


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_layers_of_a_network(kind, device):
    segments = resnet18(4)[:6] if INTERPRETED else resnet18(64 if device.type == "cuda" else 16)
    mask = mask_over(segments, 0.5)
    score = torch.full(mask.shape, NAN)
    for i, s in enumerate(segments):
        drawn = torch.randn(s.numel, generator=torch.Generator().manual_seed(i)).abs()
        score[s.span] = drawn if kind == "normal" else drawn.mul(3).round()
    counts = [int(mask[s.span].sum()) for s in segments]
    check(score, mask, sum(counts) // 5, segments, device, **WHOLE)
    check(score, mask, [c // 5 for c in counts], segments, device, **WHOLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.001])
def test_many_weights(dtype, density, device):
    """Enough elements for the brackets, and skewed, so that a sample can mislead them."""
    where = torch.device("cpu") if dtype == torch.float64 else device
    weight = torch.randn(300_000, generator=torch.Generator().manual_seed(3)).pow(5).to(dtype)
    mask = random_mask(300_000, density)
    left = int(mask.sum())
    for k in {1, left // 5, left // 2, left}:
        got = kth_smallest_magnitude(weight.to(where), mask.to(where), k, block=1 << 16)
        assert got == kth_smallest_magnitude_reference(weight, mask, k)
    check(weight.abs(), mask, left // 5, None, where, block=1 << 16)


def test_a_sample_that_misleads_is_found_out(device):
    """Large values exactly where the CPU's sample looks, and where the GPU's does."""
    n = 1 << 18
    for stride in ((n // (4 << 14)) | 1, (n // 8192) | 1):
        weight = torch.rand(n, generator=torch.Generator().manual_seed(0))
        weight[::stride] += 100
        ordered, there = weight.sort().values, weight.to(device)
        every = torch.ones(n, dtype=torch.bool, device=device)
        for k in (1, 1000, n // 2, n - 1, n):
            assert kth_smallest_magnitude(there, every, k, block=1 << 16) == ordered[k - 1]


@pytest.mark.parametrize("block", [1, 2, 64, 4096])
def test_the_block_size_changes_nothing(block, device):
    if INTERPRETED and block < 64:
        pytest.skip("slow: a program an element")
    score, mask = torch.rand(500, generator=torch.Generator().manual_seed(1)), random_mask(500, 0.7)
    check(score, mask, 100, None, device, block=block)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("kind", ["normal", "ties", "NaN and inf", "all the same"])
def test_triton_and_numba_choose_the_same_weights(kind, device, monkeypatch):
    """In one process: the public function on this device's path and then, with the same scores, on the CPU's."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("Triton does not run here: TRITON_INTERPRET=1 or pytest --device cuda")
    segments = odd_layout(2000)
    mask = mask_over(segments, 0.7)
    n = len(mask)
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs()
    score = {
        "normal": drawn,
        "ties": drawn.mul(3).round(),
        "NaN and inf": values(n, [NAN, INF, 0.0, 1e-45], 1).abs(),
        "all the same": torch.full((n,), 0.5),
    }[kind]
    counts = [int(mask[s.span].sum()) for s in segments]
    for share in (0.0, 0.2, 1.0):
        for number in (int(share * sum(counts)), [int(share * c) for c in counts]):
            numba = keep_top(score, mask, number, segments)
            with monkeypatch.context() as patch:
                for module in ("keep_top", "segment_counts"):
                    patch.setattr(sys.modules[f"fastprune.kernels.{module}"], "uses_triton", lambda tensor: True)
                triton = keep_top(score.to(device), mask.to(device), number, segments, **WHOLE)
            assert torch.equal(numba, triton.cpu())


def test_float64_scores_keep_their_bits():
    """Whatever computes float32 scores: these differ only where float32 does not look, and stay on the CPU."""
    score = 1.0 + torch.tensor([5.0, 3.0, 4.0, 1.0, 2.0, 0.0], dtype=torch.float64) * 2.0**-40
    segment = Segment("conv", (1, 3, 1, 2), 0, 0)
    every = torch.ones(6, dtype=torch.bool)
    assert score.float().unique().tolist() == [1.0]
    for n_prune in (3, [3]):
        assert keep_top(score, every, n_prune, [segment]).tolist() == [True, True, True, False, False, False]
    # Stored as (w, i), so the first three logical positions are stored elements 0, 3 and 1.
    assert keep_top(score.fill_(1.0), every, 3, [segment]).tolist() == [False, False, True, False, True, True]


@kept
def test_float64_scores_choose_the_same_with_and_without_the_interpreter(kept):
    """Both processes that `make test` starts compare with the same reference."""
    segments = odd_layout(2000)
    mask = mask_over(segments, KEPT[kept])
    n = len(mask)
    drawn = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    close = 0.5 + drawn * 1e-12
    close[::7], close[3::11] = NAN, 0.5
    counts = [int(mask[s.span].sum()) for s in segments]
    for score in (drawn, close):
        for share in (0.0, 0.2, 1.0):
            check(score, mask, int(share * sum(counts)), segments, "cpu")
            check(score, mask, [int(share * c) for c in counts], segments, "cpu")


@pytest.mark.parametrize("operation", [keep_top, kth_smallest_magnitude])
def test_float64_scores_on_another_device_are_refused(operation, device):
    there = "meta" if device.type == "cpu" else device
    score = torch.ones(4, dtype=torch.float64, device=there)
    with pytest.raises(ValueError, match="choose on the CPU"):
        operation(score, torch.ones(4, dtype=torch.bool, device=there), 1)


def test_a_rank_beyond_what_is_kept_is_refused_on_a_cpu(device):
    if INTERPRETED or device.type != "cpu":
        pytest.skip("a GPU would have to be waited for")
    with pytest.raises(ValueError, match="keeps 0"):
        kth_smallest_magnitude(torch.ones(4), torch.zeros(4, dtype=torch.bool), 1)


BAD = {
    "prune more than is left": lambda f, m: keep_top(f, m, 5),
    "prune a negative number": lambda f, m: keep_top(f, m, -1),
    "one number per segment without segments": lambda f, m: keep_top(f, m, [1]),
    "too many numbers": lambda f, m: keep_top(f, m, [1, 1], [Segment("a", (4,), 0, 0)]),
    "mask of another dtype": lambda f, m: keep_top(f, m.float(), 1),
    "mask of another length": lambda f, m: keep_top(f, m[:3], 1),
    "two-dimensional": lambda f, m: keep_top(f.view(2, 2), m.view(2, 2), 1),
    "k of 0": lambda f, m: kth_smallest_magnitude(f, m, 0),
    "k too large": lambda f, m: kth_smallest_magnitude(f, m, 5),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    with pytest.raises(ValueError, match=r"\S"):
        BAD[what](torch.arange(4.0), torch.ones(4, dtype=torch.bool))


@pytest.mark.usefixtures("plain_memory")
def test_few_weights_beyond_2_to_31_elements(device, monkeypatch):
    """A few weights behind much that is not kept. On a CPU only the new mask is really there: 2 GiB."""
    if INTERPRETED:
        # Little is gathered: no need for as many programs to search it as so many scores would have.
        monkeypatch.setattr(sys.modules["fastprune.kernels.keep_top"], "_PROGRAMS", 2)
    require_memory(34 if device.type == "cuda" else 5, device)
    segments, start = far_segments(), EDGE - 64
    near = [Segment(s.name, s.shape, s.offset - start, s.position) for s in segments]
    score = far_zeros(EDGE + 256, dtype=torch.float32, device=device)
    mask = far_zeros(EDGE + 256, dtype=torch.bool, device=device)
    for s in segments:
        mask[s.span] = (torch.arange(s.numel) % 3 > 0).to(device)
        score[s.span] = torch.rand(s.numel, generator=torch.Generator().manual_seed(0)).mul_(9).round_().to(device)
    near_score, near_mask = score[start:].cpu(), mask[start:].cpu()
    new = keep_top(score, mask, [31, 5], segments)
    assert torch.equal(new[start:].cpu(), keep_top_reference(near_score, near_mask, [31, 5], near))
    assert segment_counts(new, segments).tolist() == [89, 37]
    assert not any(new[:start][part].any() for part in chunks(start))
    if device.type == "cuda":
        new = keep_top(score, mask, 50, segments)
        assert torch.equal(new[start:].cpu(), keep_top_reference(near_score, near_mask, 50, near))
        got = kth_smallest_magnitude(score, mask, 40)
        assert got.cpu() == kth_smallest_magnitude_reference(near_score, near_mask, 40)


@pytest.mark.usefixtures("plain_memory")
def test_all_kept_beyond_2_to_31_elements(device):
    require_gpu_memory(34, device)
    score, mask = torch.empty(FAR, device=device), torch.ones(FAR, dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for part in chunks():
        score[part].uniform_(generator=generator)
    new = keep_top(score, mask, EDGE + 5)
    assert sum(int(new[part].sum()) for part in chunks()) == FAR - EDGE - 5
    pruned = max(score[part][~new[part]].max().item() for part in chunks())
    left = min(score[part].masked_fill(~new[part], INF).min().item() for part in chunks())
    assert pruned <= left


# Weights in memory of their own


def pieces(seed: int, shapes, ties: bool):
    """(scores, masks, segments): tensors of their own memory, with the segments of one flat buffer; every third weight
    is stored in logical order."""
    g = torch.Generator().manual_seed(seed)
    segments, offset, position = [], 0, 0
    for i, shape in enumerate(shapes):
        segments.append(Segment(f"layer{i}", shape, offset, position, channels_last=i % 3 != 0))
        offset += segments[-1].numel + 5
        position += segments[-1].numel
    scores = [torch.randn(s.numel, generator=g) for s in segments]
    if ties:
        scores = [(2 * score).round() / 2 for score in scores]
    masks = [torch.rand(s.numel, generator=g) < 0.7 for s in segments]
    return scores, masks, segments


def in_one(tensors, segments):
    buffer = torch.zeros(segments[-1].offset + segments[-1].numel, dtype=tensors[0].dtype)
    for s, t in zip(segments, tensors, strict=True):
        buffer[s.span] = t
    return buffer


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "shapes", [[(3, 2, 3, 3), (4, 5, 2, 1), (7,), (5, 3)], [(6, 4, 3, 3), (1, 1, 1, 1), (0, 3), (2, 9)]]
)
def test_weights_in_their_own_memory(shapes, local, ties, signed, device):
    scores, masks, segments = pieces(len(shapes[0]), shapes, ties)
    for share in (0.0, 0.3, 0.9, 1.0):
        counts = [int(share * int(m.sum())) for m in masks]
        n_prune = counts if local else sum(counts)
        new = keep_top_each(
            [s.to(device) for s in scores], [m.to(device) for m in masks], n_prune, segments, signed=signed
        )
        joined = keep_top_reference(in_one(scores, segments), in_one(masks, segments), n_prune, segments, signed)
        for s, keep in zip(segments, new, strict=True):
            assert torch.equal(keep.cpu(), joined[s.span])


def test_many_weights_in_their_own_memory():
    """Enough for the sample that brackets the threshold."""
    scores, masks, segments = pieces(1, [(64, 32, 3, 3), (200, 300), (10,), (128, 64, 3, 3)], False)
    for signed in (False, True):
        new = keep_top_each(scores, masks, 60_000, segments, signed=signed)
        joined = keep_top_reference(in_one(scores, segments), in_one(masks, segments), 60_000, segments, signed)
        assert all(torch.equal(keep, joined[s.span]) for s, keep in zip(segments, new, strict=True))


def test_zeros_of_both_signs_tie():
    segment = [Segment("a", (4,), 0, 0)]
    score, mask = [torch.tensor([1.0, 0.0, -0.0, -2.0])], [torch.ones(4, dtype=torch.bool)]
    assert keep_top_each(score, mask, 2, segment, signed=True)[0].tolist() == [True, False, True, False]
    assert keep_top_each(score, mask, 2, segment)[0].tolist() == [True, False, False, True]


def test_pieces_that_do_not_fit(device):
    score, mask = torch.ones(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    segment = Segment("a", (4,), 0, 0)
    for scores, masks, n, segments, words in [
        ([score], [mask], 5, [segment], "cannot prune 5 of the 4"),
        ([score], [mask], [5], [segment], "cannot prune 5 of the 4"),
        ([score], [mask], [1, 1], [segment], "2 counts for 1 segments"),
        ([score], [mask, mask], 1, [segment], "2 masks"),
        ([score[:3]], [mask], 1, [segment], "a has 3 scores for 4 weights"),
        ([], [], 1, [], "cannot prune 1 of no elements"),
    ]:
        with pytest.raises(ValueError, match=words):
            keep_top_each(scores, masks, n, segments)
    with pytest.raises(ValueError, match="cannot prune 5 of the 4"):
        keep_top_each([score], [mask], 5, [segment], signed=True)
    assert keep_top_each([], [], 0, []) == []


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_each_dtype_with_infinities_and_denormals(dtype, signed, device):
    """Magnitudes with NaN, too. Neither scores nor masks are written."""
    where = torch.device("cpu") if dtype == torch.float64 else device
    shapes = [(5, 4, 3, 2), (11,), (6, 3, 1, 1), (9, 7)]
    _, masks, segments = pieces(3, shapes, False)
    special = [*FINITE, INF, -INF] if signed else VALUES
    scores = [values(s.numel, special, i, dtype) for i, s in enumerate(segments)]
    given = [[t.to(where, copy=True) for t in tensors] for tensors in (scores, masks)]
    counts = [int(0.6 * int(m.sum())) for m in masks]
    for n_prune in (sum(counts), counts, tuple(counts), np.int64(sum(counts)), [np.int64(c) for c in counts]):
        new = keep_top_each(*given, n_prune, segments, signed=signed)
        plain = sum(counts) if n_prune is not counts and not isinstance(n_prune, (list, tuple)) else counts
        joined = keep_top_reference(in_one(scores, segments), in_one(masks, segments), plain, segments, signed)
        for s, keep in zip(segments, new, strict=True):
            assert torch.equal(keep.cpu(), joined[s.span])
    for before, after in zip([*scores, *masks], [*given[0], *given[1]], strict=True):
        assert_same_bits(after, before)


@pytest.mark.usefixtures("cpu_path")
def test_pieces_whose_sample_misleads():
    """Large values exactly where the sample of each looks, and a piece that is smaller than the stride."""
    shapes = [(300, 400), (70, 1000), (5,)]
    _, masks, segments = pieces(2, shapes, False)
    masks = [torch.ones_like(mask) for mask in masks]
    stride = sum(s.numel for s in segments) // (4 << 14) | 1
    for offset in (100.0, -100.0):
        scores = [torch.rand(s.numel, generator=torch.Generator().manual_seed(s.numel)) for s in segments]
        for score in scores:
            score[::stride] += offset
        for count in (1, 1000, 90_000, 190_004, 190_005):
            for signed in (False, True):
                new = keep_top_each(scores, masks, count, segments, signed=signed)
                joined = keep_top_reference(in_one(scores, segments), in_one(masks, segments), count, segments, signed)
                assert all(torch.equal(keep, joined[s.span]) for s, keep in zip(segments, new, strict=True))


def test_ties_across_pieces_go_by_position_and_not_by_the_order_given(device):
    first, second = Segment("a", (1, 2, 1, 2), 0, 0), Segment("b", (3,), 0, 4)
    ones = {s.name: torch.ones(s.numel, device=device) for s in (first, second)}
    every = {s.name: torch.ones(s.numel, dtype=torch.bool, device=device) for s in (first, second)}
    for signed in (False, True):
        new = keep_top_each([ones["a"], ones["b"]], [every["a"], every["b"]], 3, [first, second], signed=signed)
        # Stored as (w, i): the first three logical positions are stored elements 0, 2 and 1.
        assert [m.tolist() for m in new] == [[False, False, False, True], [True, True, True]]


def test_pieces_of_several_dtypes_or_devices_are_refused():
    masks = [torch.ones(2, dtype=torch.bool)] * 2
    segments = [Segment("a", (2,), 0, 0), Segment("b", (2,), 2, 2)]
    with pytest.raises(ValueError, match=r"b has torch\.float64 on cpu, others torch\.float32 on cpu"):
        keep_top_each([torch.ones(2), torch.ones(2, dtype=torch.float64)], masks, 1, segments)
    with pytest.raises(ValueError, match=r"b has torch\.bfloat16"):
        keep_top_each([torch.ones(2), torch.ones(2, dtype=torch.bfloat16)], masks, 1, segments)
    there = [masks[0], masks[0].to("meta")]
    with pytest.raises(ValueError, match=r"b has torch\.float32 on meta"):
        keep_top_each([torch.ones(2), torch.ones(2, device="meta")], there, 1, segments)
