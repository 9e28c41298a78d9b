"""bench/plain.py: the yardstick does what it is compared for."""

import torch

from bench.plain import DeviceBatches


def test_augmented_batches_of_plain_pytorch_are_pieces_of_the_images():
    """A crop of a constant image is that image; one of a ramp stays within it and keeps its direction or mirrors it."""
    images = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = 255
    images[:, 1] = (16 * torch.arange(16)).to(torch.uint8)
    images[:, 2] = (16 * torch.arange(16)[:, None]).to(torch.uint8)
    batches = DeviceBatches(images, torch.arange(32), 16, ((0.0,) * 3, (1.0,) * 3))
    seen = list(batches)
    assert len(seen) == len(batches) == 2
    assert torch.equal(torch.cat([labels for _, labels in seen]).sort().values, torch.arange(32))
    mirrored = 0
    for crops, _ in seen:
        torch.testing.assert_close(crops[:, 0], torch.ones(16, 16, 16))
        assert (crops[:, 1:] <= 240 / 255 + 1e-6).all()
        assert (crops[:, 2].diff(dim=1) >= -1e-6).all()
        steps = crops[:, 1].diff(dim=2).sum((1, 2))
        mirrored += int((steps < 0).sum())
    assert 0 < mirrored < 32
