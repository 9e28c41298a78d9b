"""Figure A2: ResNet-18 on Tiny ImageNet, masks found with three learning rates and at random, evaluated with two."""

from fastprune.figures.plan import Chains, Point, evaluation_panel, find_panel
from fastprune.settings import Settings
from fastprune.specs import DataSpec

TITLE = "ResNet-18 on Tiny ImageNet: masks found with different learning rates"

PROTOCOL = Settings(
    model="resnet18",
    stem="imagenet",
    width=64,
    dataset="tiny-imagenet",
    epochs=110,
    milestones=(80, 100),
    gamma=0.1,
    protocol_epochs=110,
    lr_find=(0.05, 0.2, 0.8),
    lr_eval=(0.5, 0.8),
)


def panels(settings: Settings) -> dict[str, str]:
    """Panel letter -> title, one for each LR_eval."""
    return {chr(ord("a") + i): f"LR_eval = {lr:g}" for i, lr in enumerate(settings.lr_eval)}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    found = []
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        found += find_panel(chains, settings.lr_find)
        for panel, lr_eval in zip(panels(settings), settings.lr_eval, strict=True):
            found += evaluation_panel(panel, chains, (*settings.lr_find, None), lr_eval)
    return found
