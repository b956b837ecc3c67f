"""Synthetic defects, drawn on the device, a whole batch at once.

The autoencoder is trained to undo them, so that at test time it rebuilds the part without its defect: structured
corruptions, not noise, are what makes a reconstruction score work (Zavrtanik et al., DRAEM, arXiv 2108.07610).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def corrupt(images: Tensor, *, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give each image a synthetic defect with some probability. Returns the images and the defects' masks.

    images: (B, C, S, S) in [-1, 1]. Masks: (B, 1, S, S), the defect's opacity in [0, 1]. The defect is a blob of
    random size and place, filled with one of: a flat colour, noise, another part, another place of the same part.
    """
    count, device = len(images), images.device
    blob = _blobs(images, generator)
    opacity = 0.3 + 0.7 * torch.rand((count, 1, 1, 1), generator=generator, device=device)
    chosen = torch.rand((count, 1, 1, 1), generator=generator, device=device) < probability
    mask = blob * opacity * chosen  # (B, 1, S, S)
    kind = torch.randint(4, (count, 1, 1, 1), generator=generator, device=device)
    filling = _filling(images, kind, generator)
    return torch.lerp(images, filling, mask), mask


def _blobs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blobs 1 inside and 0 outside, with soft borders: smooth noise around a random centre. (B, 1, S, S)."""
    count, size, device = len(images), images.shape[-1], images.device
    uniform = torch.rand((3, count, 1, 1), generator=generator, device=device)
    # Sides from 3 to 40 % of the image, small ones as likely per octave; up to five times longer than wide.
    scale = 0.03 * (0.4 / 0.03) ** uniform[0]
    stretch = 5 ** (uniform[1] - 0.5)
    turn = torch.pi * uniform[2]
    axis = torch.linspace(-1, 1, size, device=device)
    centre = 1.8 * torch.rand((2, count, 1, 1), generator=generator, device=device) - 0.9
    across, down = axis.view(1, 1, size) - centre[0], axis.view(1, size, 1) - centre[1]  # (B, S, S)
    along = (across * turn.cos() + down * turn.sin()) / (scale * stretch)
    beside = (down * turn.cos() - across * turn.sin()) / (scale / stretch)
    distance = (along.square() + beside.square()).sqrt()
    cells = size // 4
    noise = torch.randn((count, 1, cells, cells), generator=generator, device=device)
    noise = F.interpolate(F.avg_pool2d(noise, 3, 1, 1), size=(size, size), mode="bicubic", align_corners=False)
    blob = torch.sigmoid(12 * (1 + noise.squeeze(1) - distance)).unsqueeze(1)
    # The smallest may fall between the pixels of a small image, and would fade.
    return blob / blob.amax(dim=(2, 3), keepdim=True)


def _filling(images: Tensor, kind: Tensor, generator: torch.Generator) -> Tensor:
    count, channels, size, _ = images.shape
    device = images.device
    colour = 2 * torch.rand((count, channels, 1, 1), generator=generator, device=device) - 1
    noise = torch.randn((count, channels, size // 4, size // 4), generator=generator, device=device)
    smooth = F.interpolate(noise, size=(size, size), mode="bilinear")
    texture = (colour + 0.5 * smooth).clamp(-1, 1)
    # Shifts of at least an eighth, or the same part would be pasted onto itself.
    down, across = torch.randint(size // 8, size - size // 8, (2,), generator=generator, device=device).tolist()
    moved = images.roll((down, across), dims=(2, 3))
    other = moved.roll(1, dims=0)
    filling = torch.where(kind == 0, colour.expand_as(images), texture)
    filling = torch.where(kind == 2, other, filling)
    return torch.where(kind == 3, moved, filling)
