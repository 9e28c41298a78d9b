"""What torchvision's transforms alone do to images: the augmentations of its reference classification script."""

# torchvision is imported on use: flags are checked without it.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastprune.errors import InputError

POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Augment:
    """Augmentations of training images, in torchvision's terms.

    policy: None, or one of POLICIES: RandAugment (of `magnitude`), TrivialAugmentWide, AugMix (of `severity`), or
    AutoAugment's for a data set.  erase: the probability that a part of an image is erased, in [0, 1].  interpolation:
    one of INTERPOLATIONS, for validation images, too.  InputError for another policy or interpolation.
    """

    policy: str | None = None
    magnitude: int = 9
    severity: int = 3
    erase: float = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy not in POLICIES:
            raise InputError(f"unknown --auto-augment {self.policy}: choose one of {', '.join(POLICIES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"unknown --interpolation {self.interpolation}: choose one of {', '.join(INTERPOLATIONS)}")

    @property
    def asked(self) -> tuple[str, ...]:
        """The flags of train.py that ask for what differs from a bilinear crop and a flip; empty if none does."""
        return (
            *([f"--auto-augment {self.policy}"] if self.policy else []),
            *([f"--random-erase {self.erase:g}"] if self.erase else []),
            *([f"--interpolation {self.interpolation}"] if self.interpolation != "bilinear" else []),
        )

    def after_crop(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Any], Any]:
        """The transform of a cropped and flipped training image (PIL) to float32 [3, H, W], normalised: the policy
        before, erasing after. It draws from torch's global generator."""
        import torch
        from torchvision.transforms import v2

        how = {"interpolation": self.mode}
        policies: dict[str, Callable[[], Any]] = {
            "ra": lambda: v2.RandAugment(magnitude=self.magnitude, **how),
            "ta_wide": lambda: v2.TrivialAugmentWide(**how),
            "augmix": lambda: v2.AugMix(severity=self.severity, **how),
        }
        auto = {p: lambda p=p: v2.AutoAugment(v2.AutoAugmentPolicy(p), **how) for p in POLICIES if p not in policies}
        steps = [(policies | auto)[self.policy]()] if self.policy else []
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        steps += [v2.RandomErasing(p=self.erase)] if self.erase else []
        return v2.Compose(steps)

    @property
    def mode(self) -> Any:
        """torchvision's InterpolationMode."""
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(self.interpolation)
