"""What figures A3 to A6, `transplant` and `variants` share: ResNet-50 on Tiny ImageNet."""

from typing import Any

from fastprune.study.settings import Settings

PROTOCOL = Settings(
    model="resnet50",
    stem="imagenet",
    width=64,
    epochs=110,
    milestones=(70, 85, 100),
    gamma=0.2,
    protocol_epochs=110,
    lr_find=(),
    lr_eval=(),
)

PRESETS: dict[str, dict[str, Any]] = {
    # Half the side, half the batch and fewer images than ResNet-18 gets: as long a training, and it learns as much.
    "smoke": {"image_size": 32, "train_per_class": 128, "val_per_class": 30, "batch_size": 64},
}
