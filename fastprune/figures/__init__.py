"""The paper's figures and ours, as data: each says which settings it takes, what it draws and what it claims."""

from fastprune.figures.figure import FIGURES, Figure, load, register
from fastprune.figures.ours import EXTRA
from fastprune.figures.paper import PAPER

__all__ = ["EXTRA", "FIGURES", "PAPER", "Figure", "load", "register"]
