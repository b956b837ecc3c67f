"""Defects of seven kinds that training never draws, on good images.

What the segmentation head was trained on it finds too easily for such defects to say what its logits are worth beside
the other maps, and test images must choose nothing. These choose: how the maps are fused (training/calibrating.py, and
for all products benchmarks/unseen_defects.py).

Images are standardised, (C, S, S). Sizes are those of an image of 256 pixels, and grow with the image.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import metrics

SIDE = 256
TRIES = 50


class Figures(NamedTuple):
    image_auroc: float
    pixel_auroc: float
    aupro: float


def figures(scores: Tensor, maps: Tensor, masks: Tensor) -> dict[str, Figures]:
    """How well each kind is found that can be seen: some parts look the same the wrong way round.

    Of n images, good and with a defect of each kind: scores (n, 1 + kinds), maps (n, 1 + kinds, H, W). masks: of
    the latter, (n, kinds, H, W).
    """
    found = {}
    for index, kind in enumerate(KINDS):
        if masks[:, index].any():
            pixels = metrics.pixel_statistics(list(maps[:, 1 + index].numpy()), list(masks[:, index].numpy()))
            auroc = image_auroc(scores[:, [0, 1 + index]])
            found[kind] = Figures(auroc, metrics.pixel_auroc(pixels), metrics.aupro(pixels))
    return found


def image_auroc(scores: Tensor) -> float:
    """Of the scores of n images, good and with defects, (n, 1 + kinds): of all kinds together."""
    scores = scores.double().T  # (1 + kinds, n)
    return metrics.image_auroc(np.arange(scores.numel()) >= scores.shape[1], scores.flatten().numpy())


def drawn(images: Tensor, limits: tuple[float, float], random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each of the good images (n, C, S, S): itself and with a defect of each kind, (1 + kinds, C, S, S), most of it
    on the part; and where each can be seen, (kinds, S, S).

    limits: the darkest and the brightest that there is. A bright scratch where an image is white already is not seen.
    """
    part = part_of(images)
    for image in images:
        damaged = torch.stack([image, *(_drawn_on(part, image, draw, limits, random) for draw in KINDS.values())])
        yield damaged, changes(damaged[1:], image)


def part_of(images: Tensor) -> Tensor:
    """Where good images, (n, C, S, S), differ from one another as much as on the average: (S, S). No real defect lies
    on the background, where a comparison by place makes much of the least change."""
    differences = images.mean(dim=1, keepdim=True).std(dim=0, keepdim=True)
    around = 2 * (images.shape[-1] // 32) + 1
    differences = F.avg_pool2d(differences, around, stride=1, padding=around // 2, count_include_pad=False)[0, 0]
    return differences > differences.mean() / 2


def changes(damaged: Tensor, image: Tensor) -> Tensor:
    """Where damage (B, C, S, S) can be seen, (B, S, S)."""
    squares = (damaged - image).square().mean(dim=1, keepdim=True)
    return F.avg_pool2d(squares, 5, stride=1, padding=2)[:, 0] > 0.1**2


def _drawn_on(
    part: Tensor,
    image: Tensor,
    draw: Callable[[Tensor, torch.Generator], Tensor],
    limits: tuple[float, float],
    random: torch.Generator,
) -> Tensor:
    """The image with a defect of which most lies on the part; somewhere, if TRIES are not enough."""
    for _ in range(TRIES):
        damaged = draw(image, random).clamp(*limits)
        changed = changes(damaged.unsqueeze(0), image)[0]
        if changed.any() and part[changed].float().mean() > 0.5:
            break
    return damaged


# The kinds


def octaves(low: float, high: float, random: torch.Generator) -> float:
    return float(low * (high / low) ** torch.rand((), generator=random))


def around_a_place(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distances along and across a random direction from a random place, (S, S) each; the image's side is SIDE."""
    axis = torch.arange(size) * (SIDE / size)
    place = SIDE * (0.1 + 0.8 * torch.rand(2, generator=random))
    across, down = axis.view(1, -1) - place[0], axis.view(-1, 1) - place[1]
    turn = math.pi * float(torch.rand((), generator=random))
    return across * math.cos(turn) + down * math.sin(turn), down * math.cos(turn) - across * math.sin(turn)


def dent(image: Tensor, random: torch.Generator) -> Tensor:
    """Lit on one side, in shade on the other."""
    along, across = around_a_place(image.shape[-1], random)
    radius, depth = octaves(3, 20, random), octaves(0.5, 2, random)
    return image + depth * along / radius * torch.exp(-(along.square() + across.square()) / (2 * radius**2))


def ring(image: Tensor, random: torch.Generator) -> Tensor:
    """A dried drop: dark or bright at its rim."""
    along, across = around_a_place(image.shape[-1], random)
    distance = torch.hypot(along, octaves(1, 1.5, random) * across) - octaves(6, 40, random)
    strength = octaves(0.25, 1, random) * (1 if torch.rand((), generator=random) < 0.3 else -1)
    rim = torch.exp(-((distance / octaves(0.8, 3, random)) ** 2) / 2)
    return image + strength * (rim + 0.25 * (distance < 0))


def stripes(image: Tensor, random: torch.Generator) -> Tensor:
    """Chatter of a tool."""
    along, across = around_a_place(image.shape[-1], random)
    patch = (1 - (torch.hypot(along, across) / octaves(6, 40, random)).square()).clamp(min=0).sqrt()
    return image + octaves(0.15, 0.7, random) * patch * torch.sin(2 * math.pi * along / octaves(3, 12, random))


def turned(image: Tensor, random: torch.Generator) -> Tensor:
    """A square of the part, the wrong way round."""
    size = image.shape[-1]
    side = int(octaves(16, 64, random) * size / SIDE)
    top, left = (int(torch.randint(size - side, (), generator=random)) for _ in range(2))
    damaged = image.clone()
    square = image[:, top : top + side, left : left + side]
    damaged[:, top : top + side, left : left + side] = square.rot90(
        int(torch.randint(1, 4, (), generator=random)), (1, 2)
    )
    return damaged


def wandering_crack(image: Tensor, random: torch.Generator) -> Tensor:
    """Dark, with a lit edge; its direction changes from pixel to pixel."""
    size = image.shape[-1]
    length = int(octaves(20, 140, random) * size / SIDE)
    turns = 2 * math.pi * torch.rand((), generator=random) + 0.25 * torch.randn(length, generator=random).cumsum(0)
    start = size * (0.1 + 0.8 * torch.rand(2, 1, generator=random))
    rows, columns = (start + torch.stack([turns.sin(), turns.cos()]).cumsum(1)).long()
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    line = torch.zeros(1, size, size)
    line[0, rows[inside], columns[inside]] = 1
    wide = 3 * F.avg_pool2d(line, 3, stride=1, padding=1)
    relief = 0.5 * torch.roll(wide, (1, 1), (1, 2)) - 0.4 * wide - 0.6 * line
    return image + octaves(0.4, 1.5, random) * relief.clamp(-2, 2)


def smear(image: Tensor, random: torch.Generator) -> Tensor:
    """Texture wiped along rows or columns."""
    along, across = around_a_place(image.shape[-1], random)
    radius, reach = octaves(8, 40, random), math.ceil(7 * image.shape[-1] / SIDE)
    patch = (4 * (1 - torch.hypot(along / radius, across / (0.6 * radius)).square())).clamp(0, 1)
    by_rows = torch.rand((), generator=random) < 0.5
    across_and_down = (reach, 0) if by_rows else (0, reach)
    border = [pixels for pixels in across_and_down for _ in range(2)]
    kernel = [2 * pixels + 1 for pixels in reversed(across_and_down)]
    wiped = F.avg_pool2d(F.pad(image[None], border, mode="reflect"), kernel, stride=1)[0]
    return torch.lerp(image, wiped, patch)


def pitting(image: Tensor, random: torch.Generator) -> Tensor:
    """A field of dark dots."""
    size = image.shape[-1]
    field = torch.hypot(*around_a_place(size, random)) < octaves(5, 30, random)
    dots = (field & (torch.rand(size, size, generator=random) < 0.06)).float().unsqueeze(0)
    return image - 1.5 * octaves(0.3, 1.2, random) * F.avg_pool2d(F.max_pool2d(dots, 3, 1, 1), 3, 1, 1)


KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "dent": dent,
    "ring": ring,
    "stripes": stripes,
    "turned": turned,
    "wandering crack": wandering_crack,
    "smear": smear,
    "pitting": pitting,
}
