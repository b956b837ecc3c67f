"""Synthetic defects, drawn on the device, a whole batch at once, without outside images.

The autoencoder is trained to undo them and the segmentation head to find them: structured corruptions, not noise, are
what makes a reconstruction score work (Zavrtanik et al., DRAEM, arXiv 2108.07610; Schlüter et al., Natural Synthetic
Anomalies, arXiv 2109.15222). A defect is a shape and a filling, chosen apart from each other: a crack may be painted,
or be a sliver of another part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DEFECTS = 2  # at most, per image
# Blocks whose root mean square changes by less look as before, and a label there would teach the head to guess: noise
# that is replaced by other noise is no defect. Of standardised images, whose deviation is 0.5.
VISIBLE = 0.1
BLOCK = 4  # pixels on each side


class Draws:
    """Random numbers for each of `count` images, from one generator and on its device."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator, self.device = count, generator, generator.device

    def uniform(self, low: float, high: float) -> Tensor:
        """(B, 1, 1, 1)."""
        share = torch.rand((self.count, 1, 1, 1), generator=self.generator, device=self.device)
        return low + (high - low) * share

    def octaves(self, low: float, high: float) -> Tensor:
        """(B, 1, 1, 1), each doubling from low to high as likely as the next."""
        share = torch.rand((self.count, 1, 1, 1), generator=self.generator, device=self.device)
        return low * (high / low) ** share

    def chance(self, probability: float) -> Tensor:
        """(B, 1, 1, 1), True with that probability."""
        return self.uniform(0, 1) < probability

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


def corrupt(images: Tensor, *, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw up to DEFECTS defects on each image, each with some probability. Returns the images and the defects' masks.

    images: standardised, (B, C, S, S). Masks: (B, 1, S, S), 1 where a defect can be seen and 0 elsewhere.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    visible = torch.zeros_like(images[:, :1])
    for _ in range(DEFECTS):
        chosen = Draws(len(images), generator).chance(probability).flatten().nonzero().squeeze(1)
        if len(chosen):
            draws = Draws(len(chosen), generator)
            opacity = draws.uniform(0.3, 1) * shapes(draws, images.shape[-1])
            whole = images[chosen]
            damaged = torch.lerp(whole, fillings(images, chosen, draws), opacity)
            # By blocks, because a pasted texture crosses what was there before.
            change = F.avg_pool2d((damaged - whole).square_().mean(dim=1, keepdim=True), BLOCK)
            changed = F.interpolate((change > VISIBLE**2).float(), scale_factor=BLOCK)
            visible[chosen] = torch.maximum(visible[chosen], (opacity > 0.02) * changed)
            images[chosen] = damaged
    return images, visible


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
            opacity = draws.uniform(0.3, 1) * shapes(draws, size)
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


def shapes(draws: Draws, size: int) -> Tensor:
    """Where the defects are: (B, 1, S, S), 0 outside to 1 inside, with borders from sharp to soft.

    Blobs with rough borders, boxes, specks and lines, from straight scratches to jagged cracks, each at a random
    place and turn and of random size, small ones as likely per octave.
    """
    axis = torch.arange(size, device=draws.device, dtype=torch.float32)
    across = axis.view(1, 1, 1, size) - draws.uniform(0, size)  # in pixels, from the defect's centre
    down = axis.view(1, 1, size, 1) - draws.uniform(0, size)
    turn = draws.uniform(0, torch.pi)
    along = across * turn.cos() + down * turn.sin()
    beside = down * turn.cos() - across * turn.sin()
    noise = draws.noise(1, size, roughness=0.6)

    kind = draws.uniform(0, 1)
    radius, stretch, softness = draws.octaves(0.012 * size, 0.25 * size), draws.octaves(0.5, 2), draws.octaves(0.5, 6)
    roughness, speck_height = draws.uniform(0, 0.5), draws.uniform(0.2, 1)
    half_length, half_width = draws.octaves(0.04 * size, 0.35 * size), draws.octaves(0.4, 2.5)
    bend = draws.octaves(0.3, 0.08 * size)

    # Each shape is computed where it is used only.
    drawn = torch.empty_like(noise)
    is_line = (kind > 0.65).flatten()
    chosen = is_line.nonzero().squeeze(1)
    # A line is where a straight one, bent by noise, passes within half its width.
    bent = beside[chosen] - bend[chosen] * noise[chosen]
    line = (half_width[chosen] + 0.5 - bent.abs()).clamp(0, 1)
    drawn[chosen] = line * (half_length[chosen] + 0.5 - along[chosen].abs()).clamp(0, 1)

    chosen = (~is_line).nonzero().squeeze(1)
    # A blob or a box is where the distance from its centre, in units of its radius, is below one.
    kind, radius, stretch, noise = kind[chosen], radius[chosen], stretch[chosen], noise[chosen]
    is_box = (kind > 0.45) & (kind < 0.55)
    first, second = (along[chosen] / (radius * stretch)).abs(), (beside[chosen] / (radius / stretch)).abs()
    distance = torch.where(is_box, torch.maximum(first, second), torch.hypot(first, second))
    distance = distance + torch.where(is_box, 0.0, roughness[chosen]) * noise
    blob = ((1 - distance) * radius / softness[chosen] + 0.5).clamp(0, 1)
    # Specks are the peaks of the noise within a blob, the highest of them at least.
    specks = (kind > 0.55).flatten().nonzero().squeeze(1)
    within, peaks = blob[specks], noise[specks]
    highest = torch.where(within < 1, -4.0, peaks).amax(dim=(2, 3), keepdim=True)
    blob[specks] = within * (4 * (peaks - highest + speck_height[chosen[specks]])).clamp(0, 1)
    drawn[chosen] = blob
    return drawn


def fillings(images: Tensor, chosen: Tensor, draws: Draws) -> Tensor:
    """What the defects of the chosen images (n,) show: (n, C, S, S). Each filling is computed where it is used only."""
    filled = torch.empty_like(images[: len(chosen)])
    kind = torch.bucketize(draws.uniform(0, 1).flatten(), images.new_tensor([0.25, 0.65, 0.85]))
    for number in range(4):
        places = (kind == number).nonzero().squeeze(1)
        if not len(places):
            continue
        own, own_draws = images[chosen[places]], Draws(len(places), draws.generator)
        if number == 0:
            filled[places] = painted(own, own_draws)
        elif number == 1:
            filled[places] = relit(moved(own, images[chosen[places] - 1], own_draws), own, own_draws)
        elif number == 2:
            filled[places] = altered(own, own_draws)
        else:
            filled[places] = roughened(own, own_draws)
    return filled


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


def moved(images: Tensor, others: Tensor, draws: Draws) -> Tensor:
    """Cut and paste from elsewhere on the same part or on another one, turned and scaled; or the same place, warped."""
    size = images.shape[-1]
    jump = draws.chance(0.7)
    source = torch.where(jump & draws.chance(0.5), others, images)
    scale = torch.where(jump, draws.octaves(0.7, 1.4), 1.0)
    turn = torch.where(jump & draws.chance(0.5), draws.uniform(-0.5, 0.5), 0.0)
    axis = (torch.arange(size, device=draws.device) + 0.5) * 2 / size - 1  # the corners are at -1 and 1
    across, down = axis.view(1, 1, 1, size), axis.view(1, 1, size, 1)
    warp = torch.where(jump, 0.0, draws.octaves(1, 8) * 2 / size) * draws.noise(2, size, roughness=0.4)
    shift = torch.cat([draws.uniform(-1, 1), draws.uniform(-1, 1)], dim=1) * jump  # (B, 2, 1, 1)
    turned = torch.cat([across * turn.cos() + down * turn.sin(), down * turn.cos() - across * turn.sin()], dim=1)
    grid = (scale * turned + shift + warp).permute(0, 2, 3, 1)  # (B, S, S, 2)
    return F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)


def relit(pasted: Tensor, images: Tensor, draws: Draws) -> Tensor:
    """Half of what is pasted takes on the light of the place that it comes to, and differs in texture alone: what
    Poisson blending does for Natural Synthetic Anomalies, by two averages."""
    lit = draws.chance(0.5).flatten().nonzero().squeeze(1)
    if len(lit):
        pasted[lit] += shading(images[lit] - pasted[lit], 16)
    return pasted


def altered(images: Tensor, draws: Draws) -> Tensor:
    """The same place, darker or brighter, with more or less contrast, perhaps grainy: stains, wear, uneven light."""
    size = images.shape[-1]
    sign = torch.where(draws.chance(0.5), 1.0, -1.0)
    grain = torch.where(draws.chance(0.5), draws.normal(1, size, size), draws.noise(1, size, roughness=0.9))
    grain = draws.chance(0.5) * draws.octaves(0.05, 0.5) * grain
    return images * draws.uniform(0.6, 1.4) + sign * draws.octaves(0.1, 1) + grain


def roughened(images: Tensor, draws: Draws) -> Tensor:
    """The same place, its texture worn away or deepened."""
    light = shading(images, 8)
    return light + torch.where(draws.chance(0.6), draws.uniform(0, 0.5), draws.uniform(1.7, 3)) * (images - light)


def shading(images: Tensor, cell: int) -> Tensor:
    """Images without what is finer than cells of so many pixels."""
    return F.interpolate(F.avg_pool2d(images, cell), size=images.shape[-2:], mode="bilinear")
