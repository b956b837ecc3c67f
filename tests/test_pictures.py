"""Pictures of a run: the same images and draws each time, labelled, and drawn without a trace in the training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.config import Recipe, load_recipe
from training.loop import scoring_networks
from training.pictures import (
    COLUMNS,
    GAP,
    LABELS,
    MARGIN,
    SIDE,
    between,
    draw_interpolations,
    draw_step,
    grid,
    heat,
    is_drawn,
    recipe_line,
)
from training.state import TrainingState

CPU = torch.device("cpu")


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("tiny", ["image_size=32", "width=8", "latent_dim=4", "batch_size=4", "head_width=8"])


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(100, 156, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tile(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """One image of a grid, (SIDE, SIDE, 3)."""
    left, top = LABELS + column * (SIDE + GAP), MARGIN + row * (SIDE + GAP)
    return np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)))


def test_pictures_are_drawn_at_doubling_steps_and_the_last(recipe):
    recipe = replace(recipe, steps=1500)
    assert [step for step in range(1, 1501) if is_drawn(step, recipe)] == [50, 100, 200, 400, 800, 1500]
    assert [step for step in range(1, 13) if is_drawn(step, replace(recipe, steps=12))] == [12]


def test_the_title_says_what_the_networks_see(recipe):
    assert recipe_line(recipe) == "32 pixels, latent bce, image bce, batch norm before"
    assert recipe_line(load_recipe("features", ["image_size=96"])).startswith("96 pixels, mobilenet_v2,")


def test_a_grid_holds_its_images_where_they_belong_beside_their_labels():
    shades = torch.tensor([0.0, 0.25, 0.5, 2.0, -1.0]).view(5, 1, 1, 1)
    gray, red = shades.expand(5, 1, 64, 64), torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 256, 256)
    picture = grid("a title", [("gray", gray), ("red", red)])
    assert picture.size == (LABELS + 5 * (SIDE + GAP), MARGIN + 2 * (SIDE + GAP))
    assert [
        tile(picture, 0, column).tolist() == [[[shade] * 3] * SIDE] * SIDE
        for column, shade in enumerate([0, 64, 128, 255, 0])
    ] == [True] * 5
    assert (tile(picture, 1, 1) == [255, 0, 0]).all()
    assert (tile(picture, 1, 2) == 255).all()
    pixels = np.asarray(picture)
    for row in (0, 1):
        label = pixels[MARGIN + row * (SIDE + GAP) : MARGIN + (row + 1) * (SIDE + GAP), :LABELS]
        assert label.min() < 100
    assert pixels[:MARGIN].min() < 100


@pytest.mark.parametrize("side", [32, 48, 128, 200, 512])
def test_images_of_every_size_are_shown_at_one(side):
    image = torch.zeros(1, 3, side, side)
    image[..., : side // 2] = 1
    shown = tile(grid("", [("", image)]), 0, 0)
    assert shown.shape == (SIDE, SIDE, 3)
    assert (shown[:, : SIDE // 2 - 4] == 255).all()
    assert (shown[:, SIDE // 2 + 4 :] == 0).all()


def test_heat_grows_lighter_from_black():
    lightness = heat(torch.linspace(0, 1, 32).view(1, 1, 1, 32)).sum(dim=1)[0, 0]
    assert lightness[0] == 0
    assert (lightness.diff() > 0).all()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ([], 5),
        (["head_width=0"], 4),
        (["channels=1"], 5),
        (["latent=vector", "latent_weight=0", "image_weight=0"], 5),
        (["image_size=64", "tile=32"], 5),
        (["image_size=64", "crop=48"], 5),
    ],
)
def test_a_step_is_drawn_of_every_kind_of_network(pixels, changes, rows):
    small = ["image_size=32", "width=8", "latent_dim=4", "batch_size=4", "head_width=8"]
    recipe = load_recipe("tiny", [*small, *changes])
    scale = recipe.image_size // 32
    pixels = pixels[:, : recipe.channels].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    state = TrainingState(recipe, pixels, device=CPU)
    width = LABELS + COLUMNS * (SIDE + GAP)
    assert draw_step(state, recipe).size == (width, MARGIN + rows * (SIDE + GAP))
    networks = scoring_networks(state, recipe)
    assert draw_interpolations(networks, state, recipe).size == (width, MARGIN + 6 * (SIDE + GAP))


def test_drawing_changes_nothing_and_draws_the_same_again(recipe, pixels):
    state = TrainingState(recipe, pixels, device=CPU)
    state.networks.eval()
    before = {name: value.clone() for name, value in state.networks.state_dict().items()}
    generator, everywhere = state.generator.get_state(), torch.get_rng_state()
    networks = scoring_networks(state, recipe)
    for draw in (lambda: draw_step(state, recipe), lambda: draw_interpolations(networks, state, recipe)):
        assert draw().tobytes() == draw().tobytes()
    assert all(torch.equal(value, before[name]) for name, value in state.networks.state_dict().items())
    assert not state.networks.training
    assert torch.equal(generator, state.generator.get_state())
    assert torch.equal(everywhere, torch.get_rng_state())
    assert state.batches.drawn == 0


def test_half_of_the_images_have_defects_and_the_rest_are_as_they_are(recipe, pixels):
    """The same image throughout, so that what differs is a defect."""
    same = pixels[:1].expand_as(pixels)
    state = TrainingState(recipe, same, device=CPU)
    picture = draw_step(state, recipe)
    expected = tile(grid("", [("", same[:1].float() / 255)]), 0, 0)
    differs = [bool((np.abs(tile(picture, 0, column).astype(int) - expected) > 2).any()) for column in range(COLUMNS)]
    assert not any(differs[: COLUMNS // 2])
    assert sum(differs[COLUMNS // 2 :]) >= 2  # some are too small or too faint


def test_few_training_images_make_fewer_columns(recipe, pixels):
    state = TrainingState(recipe, pixels[:3], device=CPU)
    assert draw_step(state, recipe).width == LABELS + 3 * (SIDE + GAP)
    assert draw_interpolations(scoring_networks(state, recipe), state, recipe).width == LABELS + COLUMNS * (SIDE + GAP)


def test_interpolations_begin_and_end_with_the_images_and_pass_through_their_codes(recipe, pixels):
    state = TrainingState(recipe, pixels, device=CPU)
    networks = scoring_networks(state, recipe)
    picture = draw_interpolations(networks, state, recipe)
    shown = [tile(grid("", [("", image[None].float() / 255)]), 0, 0).astype(int) for image in pixels]
    for row in range(3):
        for column in (0, COLUMNS - 1):
            nearest = min(int(np.abs(tile(picture, row, column).astype(int) - image).max()) for image in shown)
            assert nearest <= 1


def test_the_way_between_codes_starts_and_ends_at_them_and_keeps_the_length_of_draws():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn((2, 64, 3, 3), generator=generator)
    way = between(first, second, 5)
    assert way.shape == (5, 64, 3, 3)
    assert torch.allclose(way[0], first, atol=1e-5)
    assert torch.allclose(way[-1], second, atol=1e-5)
    length = float(first.norm() + second.norm()) / 2
    assert float(way[2].norm()) == pytest.approx(length, rel=0.05)
    assert float(((first + second) / 2).norm()) < 0.75 * length  # a straight line would pass nearer to the origin


@pytest.mark.parametrize("other", [1.0, 2.0, -1.0])
def test_the_way_between_codes_of_one_line_is_finite(other):
    code = torch.randn((4, 1, 1), generator=torch.Generator().manual_seed(0))
    way = between(code, other * code, 5)
    assert way.isfinite().all()
    assert torch.allclose(way[0], code, atol=1e-2)
    assert torch.allclose(way[-1], other * code, atol=1e-2)
