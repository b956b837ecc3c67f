"""Synthetic defects, drawn on the device, a whole batch at once, without outside images.

The autoencoder is trained to undo them and the segmentation head to find them: structured corruptions, not noise, are
what makes a reconstruction score work (Zavrtanik et al., DRAEM, arXiv 2108.07610; Schlüter et al., Natural Synthetic
Anomalies, arXiv 2109.15222). A defect is a shape and a filling, chosen apart from each other: a crack may be painted,
or be a sliver of another part.
"""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

DEFECTS = 2  # at most, per image of SMALL pixels on each side, or piece of a larger one
SMALL = 128
# Blocks whose root mean square changes by less look as before, and a label there would teach the head to guess: noise
# that is replaced by other noise is no defect. Of standardised images, whose deviation is 0.5.
VISIBLE = 0.1
BLOCK = 4  # pixels on each side

Radii = tuple[float, float]  # of the smallest and the largest defect, in pixels


class Draws:
    """Random numbers for each of `count` images, from one generator and on its device."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator, self.device = count, generator, generator.device

    def uniform(self, low: float, high: float) -> Tensor:
        """(B, 1, 1, 1)."""
        drawn = torch.empty((self.count, 1, 1, 1), device=self.device)
        return drawn.uniform_(low, high, generator=self.generator)

    def octaves(self, low: float, high: float) -> Tensor:
        """(B, 1, 1, 1), each doubling from low to high as likely as the next."""
        return self.uniform(math.log(low), math.log(high)).exp_()

    def chance(self, probability: float) -> Tensor:
        """(B, 1, 1, 1), True with that probability."""
        return self.uniform(0, 1) < probability

    def parts(self, *shares: float) -> list["Draws"]:
        """Draws for the first images, for the next ones, and so on: as many as chance gives to parts of such shares.

        Which images come first is for the caller to shuffle. A part is a slice then, and nothing has to be gathered.
        """
        numbers = self.uniform(0, 1).flatten().tolist()
        bounds = [0.0, *accumulate(shares[:-1]), 1.0]
        counts = [sum(low <= number < high for number in numbers) for low, high in pairwise(bounds)]
        return [Draws(count, self.generator) for count in counts]

    def order(self) -> Tensor:
        """(B,): a random one."""
        return torch.randperm(self.count, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((self.count, *shape), generator=self.generator, device=self.device)

    def noise(self, channels: int, size: int, *, roughness: float) -> Tensor:
        """Fractal noise (B, channels, S, S): each octave is twice as fine as the last, and weaker by `roughness`."""
        cells, weight = 4, 1.0
        field = self.normal(channels, cells, cells)
        while cells < size:
            cells, weight = min(2 * cells, size), weight * roughness
            field = F.interpolate(field, size=(cells, cells), mode="bilinear")
            if cells <= size // 2:
                field = field + weight * self.normal(channels, cells, cells)
        return field


def corrupt(
    images: Tensor, *, probability: float, generator: torch.Generator, over_features: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw defects on each image, each with some probability. Returns the images and the defects' masks.

    Up to DEFECTS, of all sizes. A larger image than SMALL has more places for small ones: up to DEFECTS are drawn on
    each piece that is no larger than SMALL, of the sizes that they have there, and a larger one on the whole of it.
    Over features, whose images are not windows of a part but all of it, up to DEFECTS of all sizes are drawn on the
    whole, and on half of the images one on each piece.

    images: standardised, (B, C, S, S). Masks: (B, 1, S, S), 1 where a defect can be seen and 0 elsewhere.
    """
    images = images.contiguous()
    size = images.shape[-1]
    of_small, of_all = radii_on(SMALL), radii_on(size)
    on_whole, of_radii = (DEFECTS, of_all) if size <= SMALL or over_features else (1, (of_small[1] / 2, of_all[1]))
    none = torch.zeros_like(images[:, :1])
    damaged, covered = _drawn_on(images, none, on_whole, probability, generator, of_radii=of_radii)
    if size > SMALL:
        few = Draws(len(images), generator).parts(0.5, 0.5)[0].count if over_features else 0
        # The pieces' borders, where shapes are cut off, are anywhere.
        offset = torch.randint(size // BLOCK, (2,), generator=generator, device=images.device) * BLOCK
        down, across = offset.tolist()
        per_side = 2 ** math.ceil(math.log2(size / SMALL))
        pieces, opacity = (_cut(maps[few:].roll((down, across), dims=(2, 3)), per_side) for maps in (damaged, covered))
        on_piece = 1 if over_features else DEFECTS
        drawn = _drawn_on(pieces, opacity, on_piece, probability, generator, of_radii=of_small)
        damaged[few:], covered[few:] = (_joined(maps, per_side).roll((-down, -across), dims=(2, 3)) for maps in drawn)
    # By blocks, because a pasted texture crosses what was there before.
    change = F.mse_loss(damaged, images, reduction="none").mean(dim=1, keepdim=True)
    changed = F.interpolate((F.avg_pool2d(change, BLOCK) > VISIBLE**2).float(), scale_factor=BLOCK)
    return damaged, covered.gt_(0.02).mul_(changed)


def radii_on(size: int) -> Radii:
    """Of the defects of an image of so many pixels on each side."""
    return 0.012 * size, 0.25 * size


def _drawn_on(
    images: Tensor, covered: Tensor, defects: int, probability: float, generator: torch.Generator, *, of_radii: Radii
) -> tuple[Tensor, Tensor]:
    """Images with more defects, and how opaque these are, or those `covered` before, at each place: (B, 1, S, S)."""
    places, everyone = torch.arange(len(images), device=images.device), Draws(len(images), generator)
    for _ in range(defects):
        order = everyone.order()  # the first images get a defect, and the kinds come one after the other
        places, images, covered = (tensor.index_select(0, order) for tensor in (places, images, covered))
        draws, _ = everyone.parts(probability, 1 - probability)
        opacity = draws.uniform(0.3, 1) * shapes(draws, images.shape[-1], of_radii)
        for part, filling in fillings(images[: draws.count], draws):
            images[part].lerp_(filling, opacity[part])
        covered[: draws.count].clamp_(min=opacity)
    back = places.argsort()
    return images.index_select(0, back), covered.index_select(0, back)


def _cut(maps: Tensor, per_side: int) -> Tensor:
    """(B, K, S, S) -> (B n n, K, S/n, S/n)."""
    batch, channels, size, _ = maps.shape
    side = size // per_side
    pieces = maps.view(batch, channels, per_side, side, per_side, side)
    return pieces.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _joined(pieces: Tensor, per_side: int) -> Tensor:
    """The way back."""
    count, channels, side, _ = pieces.shape
    maps = pieces.view(count // per_side**2, per_side, per_side, channels, side, side)
    return maps.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def corrupt_features(features: Tensor, *, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same in a backbone's features, (B, F, h, w), which need not be computed again: the features of another place,
    of the same image or of another one, or a shift of all features by chance. Masks: (B, 1, h, w).
    """
    features = features.clone()
    visible = torch.zeros_like(features[:, :1])
    size = features.shape[-1]
    for _ in range(DEFECTS):
        chosen = Draws(len(features), generator).chance(probability).flatten().nonzero().squeeze(1)
        if len(chosen):
            draws = Draws(len(chosen), generator)
            opacity = draws.uniform(0.3, 1) * shapes(draws, size, radii_on(size))
            whole = features[chosen]
            others = torch.where(draws.chance(0.5), whole, features[chosen - 1])
            down, across = torch.randint(size, (2,), generator=generator, device=generator.device).tolist()
            moved = others.roll((down, across), dims=(2, 3))
            shifted = whole + draws.octaves(0.5, 3) * draws.normal(features.shape[1], 1, 1)
            damaged = torch.lerp(whole, torch.where(draws.chance(0.7), moved, shifted), opacity)
            changed = (damaged - whole).square().mean(dim=1, keepdim=True) > VISIBLE
            visible[chosen] = torch.maximum(visible[chosen], changed.float())
            features[chosen] = damaged
    return features, visible


# Shapes


def shapes(draws: Draws, size: int, of_radii: Radii) -> Tensor:
    """Where the defects are: (B, 1, S, S), 0 outside to 1 inside, with borders from sharp to soft.

    Each at a random place and turn and of random size, small ones as likely per octave. Lines are up to three times as
    long as the largest radius.
    """
    blob, speck, line, box = parts = draws.parts(0.45, 0.1, 0.35, 0.1)
    noise = torch.split(draws.noise(1, size, roughness=0.6), [part.count for part in parts])
    drawn = [
        blobs(blob, noise[0], of_radii),
        specks(speck, noise[1], of_radii),
        lines(line, noise[2], of_radii),
        boxes(box, size, of_radii),
    ]
    return torch.cat(drawn).index_select(0, draws.order())


def blobs(draws: Draws, noise: Tensor, of_radii: Radii) -> Tensor:
    """With rough borders."""
    first, second, radius = in_radii(draws, noise.shape[-1], of_radii)
    return inside(torch.hypot(first, second) + draws.uniform(0, 0.5) * noise, radius, draws)


def specks(draws: Draws, noise: Tensor, of_radii: Radii) -> Tensor:
    """The peaks of the noise within a blob, the highest of them at least."""
    within = blobs(draws, noise, of_radii)
    highest = torch.where(within < 1, -4.0, noise).amax(dim=(2, 3), keepdim=True)
    return within * (4 * (noise - highest + draws.uniform(0.2, 1))).clamp_(0, 1)


def lines(draws: Draws, noise: Tensor, of_radii: Radii) -> Tensor:
    """From straight scratches to jagged cracks: where a straight line, bent by noise, passes within half its width."""
    along, beside = axes(draws, noise.shape[-1])
    longest = 1.4 * of_radii[1]
    bent = beside - draws.octaves(0.3, longest / 4.4) * noise
    line = (draws.octaves(0.4, 2.5) + 0.5 - bent.abs_()).clamp_(0, 1)
    return line * (draws.octaves(longest / 9, longest) + 0.5 - along.abs_()).clamp_(0, 1)


def boxes(draws: Draws, size: int, of_radii: Radii) -> Tensor:
    first, second, radius = in_radii(draws, size, of_radii)
    return inside(torch.maximum(first.abs_(), second.abs_()), radius, draws)


def axes(draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    """How far each pixel is from a random place, along a random direction and beside it; in pixels."""
    axis = torch.arange(size, device=draws.device, dtype=torch.float32)
    across = axis.view(1, 1, 1, size) - draws.uniform(0, size)
    down = axis.view(1, 1, size, 1) - draws.uniform(0, size)
    return turned(across, down, draws.uniform(0, torch.pi))


def in_radii(draws: Draws, size: int, of_radii: Radii) -> tuple[Tensor, Tensor, Tensor]:
    """The same in units of a random radius, stretched, and that radius in pixels."""
    along, beside = axes(draws, size)
    radius, stretch = draws.octaves(*of_radii), draws.octaves(0.5, 2)
    return along / (radius * stretch), beside / (radius / stretch), radius


def inside(distance: Tensor, radius: Tensor, draws: Draws) -> Tensor:
    """Where the distance from the centre, in units of the radius, is below one."""
    return ((1 - distance) * (radius / draws.octaves(0.5, 6)) + 0.5).clamp_(0, 1)


def turned(across: Tensor, down: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    return across * turn.cos() + down * turn.sin(), down * turn.cos() - across * turn.sin()


# Fillings


def fillings(images: Tensor, draws: Draws) -> Iterator[tuple[slice, Tensor]]:
    """What a defect of each image shows: which of the images, and (n, C, S, S)."""
    end = 0
    for own, filler in zip(draws.parts(0.25, 0.4, 0.2, 0.15), (painted, pasted, altered, roughened), strict=True):
        part = slice(end, end := end + own.count)
        yield part, filler(images[part], own)


def painted(images: Tensor, draws: Draws) -> Tensor:
    """A colour, flat or with a texture: any colour, a gray, or one that the part has elsewhere (missing material)."""
    count, channels, size, _ = images.shape
    colour = 2 * draws.normal(channels, 1, 1)
    gray = channels**0.5 * colour.mean(dim=1, keepdim=True)
    colour = torch.where(draws.chance(0.5), gray, colour)
    place = torch.randint(size * size, (count, 1, 1), generator=draws.generator, device=draws.device)
    own = images.flatten(2).gather(2, place.expand(count, channels, 1)).view(count, channels, 1, 1)
    colour = torch.where(draws.chance(0.3), own, colour)
    return colour + draws.octaves(0.02, 1) * draws.noise(1, size, roughness=0.8)


def pasted(images: Tensor, draws: Draws) -> Tensor:
    return relit(moved(images, images.roll(1, dims=0), draws), images, draws)


def moved(images: Tensor, others: Tensor, draws: Draws) -> Tensor:
    """Cut and paste from elsewhere on the same part or on another one, turned and scaled; or the same place, warped."""
    same, other, warp = (part.count for part in draws.parts(0.35, 0.35, 0.3))
    jumping, warping = Draws(same + other, draws.generator), Draws(warp, draws.generator)
    sources = torch.cat([images[:same], others[same : same + other]])
    return torch.cat([jumped(sources, jumping), warped(images[same + other :], warping)])


def jumped(images: Tensor, draws: Draws) -> Tensor:
    scale, turn = draws.octaves(0.7, 1.4), draws.chance(0.5) * draws.uniform(-0.5, 0.5)
    across, down = sides(images)
    across, down = turned(scale * across, scale * down, turn)
    return sampled(images, across + draws.uniform(-1, 1), down + draws.uniform(-1, 1))


def warped(images: Tensor, draws: Draws) -> Tensor:
    size = images.shape[-1]
    warp = draws.octaves(1, 8) * 2 / size * draws.noise(2, size, roughness=0.4)
    across, down = sides(images)
    return sampled(images, across + warp[:, :1], down + warp[:, 1:])


def sides(images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the columns are (1, 1, 1, S), and the rows (1, 1, S, 1). The images' corners are at -1 and 1."""
    size = images.shape[-1]
    side = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1
    return side.view(1, 1, 1, size), side.view(1, 1, size, 1)


def sampled(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """What the images show at those places (B, 1, S, S), mirrored at their borders."""
    grid = torch.cat([across, down], dim=1).permute(0, 2, 3, 1)  # (B, S, S, 2)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def relit(pasted: Tensor, images: Tensor, draws: Draws) -> Tensor:
    """Half of what is pasted takes on the light of the place that it comes to, and differs in texture alone: what
    Poisson blending does for Natural Synthetic Anomalies, by two averages."""
    return pasted.addcmul_(draws.chance(0.5).float(), shading(images - pasted, 16))


def altered(images: Tensor, draws: Draws) -> Tensor:
    """The same place, darker or brighter, with more or less contrast, perhaps grainy: stains, wear, uneven light."""
    size = images.shape[-1]
    sign = torch.where(draws.chance(0.5), 1.0, -1.0)
    found = torch.addcmul(sign * draws.octaves(0.1, 1), images, draws.uniform(0.6, 1.4))
    of_pixels, of_patches, _ = draws.parts(0.25, 0.25, 0.5)
    begin, end = of_pixels.count, of_pixels.count + of_patches.count
    found[:begin] += of_pixels.octaves(0.05, 0.5) * of_pixels.normal(1, size, size)
    found[begin:end] += of_patches.octaves(0.05, 0.5) * of_patches.noise(1, size, roughness=0.9)
    return found


def roughened(images: Tensor, draws: Draws) -> Tensor:
    """The same place, its texture worn away or deepened."""
    texture = torch.where(draws.chance(0.6), draws.uniform(0, 0.5), draws.uniform(1.7, 3))
    return torch.lerp(shading(images, 8), images, texture)


def shading(images: Tensor, cell: int) -> Tensor:
    """Images without what is finer than cells of so many pixels."""
    averages = F.adaptive_avg_pool2d(images, max(images.shape[-1] // cell, 1))
    # Bilinear interpolation as a product of matrices: on a CPU several times faster than F.interpolate.
    identity = torch.eye(averages.shape[-1], device=images.device).unsqueeze(0)
    columns = F.interpolate(identity, size=images.shape[-1], mode="linear")[0]
    return columns.T @ averages @ columns
