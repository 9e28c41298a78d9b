"""Colours stay apart for readers who lack a kind of cones, by simulation, and for print in grey."""

import itertools

import numpy as np
import pytest

from fastprune.figures.style import COLOR_DISTANCE, COLORS, FIRST_LAYER, RED, layer_color

# Machado, Oliveira, Fernandes (2009), A physiologically-based model for simulation of color vision deficiency, the
# matrices of severity 1.0, for linear RGB.
READERS = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}

# sRGB (IEC 61966-2-1) to XYZ, for the white point D65.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(color, reader: str) -> np.ndarray:
    """CIELAB (1976) of a colour as `reader` sees it. color: "#rrggbb", or fractions of red, green and blue."""
    if isinstance(color, str):
        color = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    fractions = np.array(color[:3])
    linear = np.where(fractions <= 0.04045, fractions / 12.92, ((fractions + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(READERS[reader] @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(seen > 216 / 24389, np.cbrt(seen), (24389 / 27 * seen + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_lab_is_that_of_the_standard():
    # Lindbloom's calculator: sRGB red and blue, D65.
    assert lab("#ff0000", "all cones") == pytest.approx([53.2408, 80.0925, 67.2032], abs=1e-3)
    assert lab("#0000ff", "all cones") == pytest.approx([32.2970, 79.1875, -107.8602], abs=1e-3)
    for reader in READERS:  # no reader sees a hue in grey
        assert lab("#808080", reader) == pytest.approx([53.585, 0, 0], abs=0.01)


@pytest.mark.parametrize("reader", READERS)
def test_all_pairs_of_series_stay_apart(reader):
    seen = {color: lab(color, reader) for color in (*COLORS, RED)}
    apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(seen, 2)}
    nearest = min(apart, key=apart.__getitem__)
    assert apart[nearest] >= COLOR_DISTANCE, nearest


@pytest.mark.parametrize("reader", READERS)
def test_layers_get_lighter_and_the_first_stands_apart(reader):
    others = [lab(layer_color(index, 53), reader) for index in range(1, 53)]
    assert all(later[0] > earlier[0] for earlier, later in itertools.pairwise(others))
    assert min(np.linalg.norm(other - lab(FIRST_LAYER["color"], reader)) for other in others) >= COLOR_DISTANCE


def test_distance_would_find_colours_that_readers_confuse():
    # The colours of this project until 2026: 38.8 apart for most readers, and 13.9 for some.
    before = ("#0b4f8a", "#e69f00", "#009e8e", "#b35fa8", "#56b4e9", "#5a5a5a", "#d4201f")
    least = {
        reader: min(
            np.linalg.norm(lab(one, reader) - lab(other, reader)) for one, other in itertools.combinations(before, 2)
        )
        for reader in READERS
    }
    assert least["all cones"] == pytest.approx(38.8, abs=0.1)
    assert min(least.values()) == pytest.approx(13.9, abs=0.1)
