"""From trained networks to verdicts: what good images are like, and what each map and score counts for."""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from models.calibration import Calibration
from models.density import FeatureDistance, GoodFeatures
from models.maps import GoodMaps, MapFusion, fusion_weights
from models.networks import ScoringNetworks, SegmentationHead, cells_of, places_of
from models.scoring import at_once, map_score, outputs, peaks, table, windows
from training import unseen
from training.config import Recipe

SCORING_BATCH = 32
WEIGHT_IMAGES = 64  # training images that weights are measured on, each with seven defects
PLACES = 64  # pixels of a map, on each side, that are looked at: maps are smooth


@torch.inference_mode()
def fit_distances(networks: ScoringNetworks, pixels: Tensor) -> None:
    """Learn what the head's features are like on good images, uint8 (N, C, S, S): those it was trained on."""
    known = [GoodFeatures(cast(FeatureDistance, distance)) for distance in networks.distances]
    config = networks.config
    for chunk in torch.split(pixels, at_once(config, SCORING_BATCH)) if known else ():
        images = networks.standardisation(chunk.to(next(networks.parameters()).device))
        places = places_of(config.image_size, images.device).unsqueeze(0)
        for window in windows(config.image_size, config.side):
            *_, features = networks(networks.see(images[..., *window]), places[..., *window])
            for good, stride, level in zip(known, SegmentationHead.strides(config), features, strict=False):
                good.add(level, *cells_of(window, stride))
    for good in known:
        good.fit()


def calibrate(
    networks: ScoringNetworks, training: Tensor, held_out: Tensor, parts: list[int], recipe: Recipe
) -> tuple[MapFusion, Calibration]:
    """Fit what turns the networks' outputs into verdicts. Images are uint8 (N, C, S, S).

    parts: which part each held-out image shows.

    By the held-out good images: the fusion of the maps, and the scores that p-values are counted from. By defects
    drawn on training images: what the maps and the three scores count for, so that the held-out images decide nothing
    that would make them look better than the parts to come.
    """
    fusion, fusions_of_the_others = good_maps(networks, held_out).fusions(parts)
    weights_of_maps, weights_of_scores = chosen_weights(networks, fusion, training[:WEIGHT_IMAGES], recipe)
    scores, highest = [], []
    for image, own in zip(torch.split(held_out, 1), fusions_of_the_others, strict=True):
        own.weights = weights_of_maps
        found = outputs(networks, image)
        maps = own.to(found.maps.device)(found.maps)
        scores.append(table(found, maps, networks.config))
        highest.append(peaks(maps).double().cpu().numpy())
    fusion.weights = weights_of_maps
    calibration = Calibration(
        np.concatenate(scores),
        alpha=recipe.alpha,
        weights=weights_of_scores,
        parts=tuple(parts),
        peaks=np.concatenate(highest),
    )
    return fusion.to(next(networks.parameters()).device), calibration


def good_maps(networks: ScoringNetworks, held_out: Tensor) -> GoodMaps:
    """What the fusion is made from, of good images uint8 (N, C, S, S)."""
    good = GoodMaps(fusion_weights(networks.config)[0], networks.config.cell)
    for chunk in torch.split(held_out, at_once(networks.config, SCORING_BATCH)):
        good.add(outputs(networks, chunk).maps)
    return good


def chosen_weights(
    networks: ScoringNetworks, fusion: MapFusion, pixels: Tensor, recipe: Recipe
) -> tuple[Tensor, tuple[float, ...]]:
    """What each view of each map counts for on this product, (2 K,), and each of the three scores: by how well defects
    of unseen kinds are found on these good images.

    Of the maps those of the weights to choose from that find most, as images and as pixels. The scores by their AUROC.
    """
    candidates = [weights.of(len(fusion.mean)) for weights in fusion_weights(networks.config)]
    device, random = next(networks.parameters()).device, torch.Generator().manual_seed(recipe.seed)
    images = networks.standardisation(pixels.to(device)).cpu()
    stride = max(networks.config.image_size // PLACES, 1)
    maps: list[list[Tensor]] = [[] for _ in candidates]
    of_maps: list[list[Tensor]] = [[] for _ in candidates]
    scores, masks = [], []
    for damaged, changed in unseen.drawn(images, networks.standardisation.limits, random):
        found = outputs(networks, networks.standardisation.pixels(damaged.to(device)))
        views = fusion.views(found.maps.cpu())
        for candidate, own, of_own in zip(candidates, maps, of_maps, strict=True):
            joined = fusion.joined(views, candidate)  # (1 + kinds, S, S)
            own.append(joined[:, ::stride, ::stride].clone())  # or all of it stays in memory
            of_own.append(map_score(joined, networks.config))
        scores.append(torch.stack([found.reconstruction, found.latent]).cpu())  # (2, 1 + kinds)
        masks.append(changed[:, ::stride, ::stride].clone())
    worth = []
    for own, of_own in zip(maps, of_maps, strict=True):
        found_kinds = unseen.figures(torch.stack(of_own), torch.stack(own), torch.stack(masks)).values()
        worth.append(sum(kind.image_auroc + kind.aupro for kind in found_kinds))
    best = worth.index(max(worth))
    of_images = [*torch.stack(scores, dim=1), torch.stack(of_maps[best])]  # (n, 1 + kinds) each, as in SCORE_NAMES
    return candidates[best], weights_of([unseen.image_auroc(one) for one in of_images])


def weights_of(aurocs: list[float]) -> tuple[float, ...]:
    """How far each AUROC is above chance, as a share of the best of them, to the eighth power: a weak score would add
    more of its noise to a strong one than it knows.

    Plus 0.001: synthetic defects are not all defects, and no score is to be without a say.
    """
    above = [max(auroc - 0.5, 0.0) for auroc in aurocs]
    best = max(*above, 1e-9)
    return tuple((share / best) ** 8 + 0.001 for share in above)
