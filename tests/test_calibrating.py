"""What each map and each score counts for on a product: by defects that are drawn on its good images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import training.calibrating
from models.config import ModelConfig
from models.maps import OF_PIXELS, MapFusion
from models.networks import ScoringNetworks, Standardisation
from models.scoring import outputs
from training.calibrating import chosen_weights, fit_distances, good_maps, weights_of
from training.config import load_recipe


def test_a_weak_score_counts_for_little_beside_a_strong_one():
    assert weights_of([0.8, 0.5, 0.9]) == pytest.approx([0.75**8 + 0.001, 0.001, 1.001])
    assert weights_of([0.6, 0.3, 0.6]) == pytest.approx([1.001, 0.001, 1.001])
    assert weights_of([0.5, 0.4, 0.5]) == pytest.approx([0.001, 0.001, 0.001])


def uneven(maps: Tensor) -> Tensor:
    """What maps (B, K, S, S) would be like if they were high on one side of every image."""
    return maps + torch.linspace(0, 100, maps.shape[-1])


@pytest.mark.parametrize("lies_alike", [True, False])
def test_a_product_keeps_as_much_of_the_comparison_by_place_as_finds_its_defects(checkpoint, monkeypatch, lies_alike):
    """Good maps are high on one side of all images, which the fusion knows; or of none, though the fusion says so."""

    def found(networks: ScoringNetworks, pixels: Tensor) -> Any:
        change = (pixels.float() - pixels[:1].float()).abs().mean(dim=1, keepdim=True).expand(-1, 2, -1, -1)
        return replace(outputs(networks, pixels), maps=uneven(change) if lies_alike else change)

    monkeypatch.setattr(training.calibrating, "outputs", found)
    usual = uneven(torch.zeros(1, 2, 8, 8))[0]
    fusion = MapFusion(usual, torch.ones(2, 8, 8), torch.zeros(4), torch.ones(4))
    pixels = torch.randint(100, 156, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    of_maps, of_scores = chosen_weights(checkpoint.networks, fusion, pixels, load_recipe("tiny", []))
    assert torch.equal(of_maps, OF_PIXELS[0 if lies_alike else 1].of(2))
    assert of_scores[2] == pytest.approx(1.001)  # the map knows all, untrained networks nothing
    assert max(of_scores[:2]) < 0.5


def test_large_images_go_through_the_networks_few_at_once(monkeypatch):
    monkeypatch.setattr(training.calibrating, "SCORING_BATCH", 8)
    networks = ScoringNetworks(ModelConfig(image_size=512, width=8, latent_dim=4, head_width=8), Standardisation())
    batches: list[int] = []
    networks.eval().register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    pixels = torch.zeros(3, 3, 512, 512, dtype=torch.uint8)
    fit_distances(networks, pixels)
    good_maps(networks, pixels)
    assert batches == [2, 1, 2, 1]
