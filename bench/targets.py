"""What is expected of a GPU: for each target the limit that must be met and the prediction made before any measurement.

Predictions come from bytes, launches and machine code (bench/NOTES.md says how) for an H200 with 132 multiprocessors
and 4.2 TB/s; those that are multiples of a floor or of another time hold for other GPUs, too. A measurement does not
change them: a prediction that was wrong is worth as much as one that was right.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import layers, rows, training

UNITS = {
    "over_floor": "x floor",
    "over_ours": "x ours",
    "images_per_s": "images/s",
    "bytes_a_weight_over_plain": "bytes",
}


@dataclass(frozen=True)
class Target:
    """A figure of a row. limit: at most, or with `at_least` at least. predicted: (low, high)."""

    group: str
    row: str
    figure: str
    limit: float
    predicted: tuple[float, float]
    at_least: bool = False

    @property
    def unit(self) -> str:
        return UNITS[self.figure]


def _targets() -> Iterator[Target]:
    for network in rows.NETWORKS:
        yield Target(f"cast, {network}", "masked_cast to bf16", "over_floor", 1.3, (1.05, 1.15))
        yield Target(f"SGD step, {network}", "masked_sgd_ with a bf16 copy", "over_floor", 1.3, (1.05, 1.12))
        yield Target(f"{rows.SCATTERED}, {network}", rows.OF_LAYERS, "over_floor", 1.3, (1.04, 1.15))
        # 29 bytes a weight against 21, and a launch more.
        yield Target(f"{rows.SCATTERED}, {network}", rows.COPIED, "over_ours", 1.0, (1.2, 1.45), at_least=True)
        # One block of torch's kernel reads all weights four times or more, at some 0.1 TB/s.
        yield Target(f"threshold, {network}", "w.abs().kthvalue(k)", "over_ours", 20.0, (40, 200), at_least=True)
    for side in rows.SIDES:
        yield Target(f"crop to {side}x{side}, bfloat16", rows.CROP, "over_floor", 2.0, (2.0, 2.6))
    yield from _layer_targets()
    yield from _step_targets()
    for network in rows.NETWORKS:
        # Of a weight: its low-precision copy 2 bytes, its mask 1, a gradient in the copy's type beside the flat one.
        yield Target(f"memory of {network}", training.MASKED, "bytes_a_weight_over_plain", 7.0, (3.0, 6.0))


def _layer_targets() -> Iterator[Target]:
    # Bytes that the generated code of torch.compile moves over those of ours, and its launches: 6 to 8, ours 4.
    compiled = ((1.6, 2.5), (1.0, 1.3), (1.0, 1.3), (1.2, 1.8))
    for shape, predicted in zip(layers.SHAPES, compiled, strict=True):
        group = f"batch norm, {shape.name}, {layers.BOTH}"
        yield Target(group, layers.COMPILED, "over_ours", 1.0, predicted, at_least=True)
    # One launch, whose three memory latencies follow one another, against 28.
    yield Target(layers.LOSS, layers.EAGER, "over_ours", 4.0, (5, 15), at_least=True)
    # Two passes each way move 1.6 times the bytes of one; at 16x16 the four launches count, too.
    for shape, limit, predicted in ((layers.SHAPES[0], 2.2, (1.6, 2.1)), (layers.SHAPES[1], 2.5, (1.7, 2.4))):
        yield Target(f"batch norm, {shape.name}, {layers.BOTH}", layers.OURS, "over_floor", limit, predicted)


def _step_targets() -> Iterator[Target]:
    resnet18, resnet50 = (f"step of {name}, 512 x 64 px, bf16" for name in ("ResNet-18", "ResNet-50"))
    yield Target(resnet18, training.MASKED, "images_per_s", 150_000, (205_000, 270_000), at_least=True)
    # From ResNet-18's by activations: 4.4 times its bytes, 2.3 times its operations, 2.8 times its launches.
    yield Target(resnet50, training.MASKED, "images_per_s", 50_000, (62_000, 105_000), at_least=True)
    for step in (resnet18, resnet50):
        # The dense step's time over the masked one's: masked over dense is at most 1.02.
        yield Target(step, training.DENSE, "over_ours", 1 / 1.02, (0.99, 1.01), at_least=True)
    options = f"gpu options, {resnet18}"
    yield Target(options, training.ALL, "images_per_s", 260_000, (230_000, 320_000), at_least=True)
    # Of a step of 2.15 ms: 0.15 to 0.34 ms less of traffic and launches; 0.02 of a copy; 0.03 to 0.055 of launches.
    gains = {"fused_norm": (0.84, 0.93), "gradient_table": (0.985, 0.995), "fused_loss": (0.97, 0.99)}
    for option, predicted in gains.items():
        yield Target(options, option, "over_ours", 1.0, predicted)


TARGETS: tuple[Target, ...] = tuple(_targets())


def lines() -> Iterator[str]:
    """A table in Markdown, as it stands in bench/NOTES.md."""
    yield "| group | row | figure | target | predicted |"
    yield "| --- | --- | --- | --- | --- |"
    for t in TARGETS:
        low, high = (f"{p:,.4g}" if p < 1000 else f"{p:,.0f}" for p in t.predicted)
        limit = f"{t.limit:,.3g}" if t.limit < 1000 else f"{t.limit:,.0f}"
        yield f"| {t.group} | `{t.row}` | {t.unit} | {'>=' if t.at_least else '<='} {limit} | {low} to {high} |"
