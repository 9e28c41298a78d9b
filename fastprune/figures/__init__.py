"""Figures as data: the settings, panels and claims of the paper's figures and of three more."""

# paper and ours register their figures when they are imported, so `--fig` finds them without a second list of names.
from fastprune.figures.figure import FIGURES, Figure, load, register
from fastprune.figures.ours import EXTRA
from fastprune.figures.paper import PAPER

__all__ = ["EXTRA", "FIGURES", "PAPER", "Figure", "load", "register"]
