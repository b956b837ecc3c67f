"""The training loop on tiny real networks: what each step changes, and that nothing else decides the weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import TrainingDivergedError
from models.scoring import outputs
from training.config import Recipe, load_recipe
from training.corruption import corrupt
from training.loop import (
    _jittered,
    autoencoder_step,
    average_weights,
    image_discriminator_step,
    latent_discriminator_step,
    scoring_networks,
    set_learning_rates,
    to_mark,
    train,
)
from training.state import Batches, TrainingState, standardisation_of

CPU = torch.device("cpu")


@pytest.fixture
def recipe() -> Recipe:
    small = ["image_size=32", "width=8", "latent_dim=4", "batch_size=4", "steps=4"]
    both = ["latent_loss=wgan-gp", "image_loss=wgan-gp", "latent_n_critic=2"]
    return load_recipe("tiny", small + both)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights(state: TrainingState) -> dict[str, Tensor]:
    """Every tensor that training changes, by name."""
    networks = {
        "networks": state.networks,
        "latent_discriminator": state.latent_discriminator,
        "image_discriminator": state.image_discriminator,
        "averaged": state.averaged,
    }
    return {f"{name}.{key}": value.clone() for name, net in networks.items() for key, value in net.state_dict().items()}


def parameters_of(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trained(recipe: Recipe, pixels: Tensor) -> TrainingState:
    state = TrainingState(recipe, pixels, device=CPU)
    train(state, recipe, lambda _: None)
    return state


@pytest.mark.parametrize("kind", ["bce", "wgan-gp"])
def test_training_with_the_same_seed_gives_the_same_weights(recipe, pixels, kind):
    recipe = replace(recipe, latent_loss=kind, image_loss=kind)
    first, second = weights(trained(recipe, pixels)), weights(trained(recipe, pixels))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(trained(replace(recipe, seed=1), pixels))
    assert not torch.equal(first["networks.encoder.layers.0.weight"], other["networks.encoder.layers.0.weight"])


def test_training_does_not_touch_the_global_random_numbers(recipe, pixels):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(recipe, pixels)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop", [1, 3])
def test_training_resumed_from_a_saved_state_is_bit_equal(recipe, pixels, stop):
    whole = weights(trained(recipe, pixels))
    state = TrainingState(recipe, pixels, device=CPU)
    saved = {}

    def save_at_stop(_: dict[str, float]) -> None:
        if state.step == stop:
            saved.update({key: _copied(value) for key, value in state.state_dict().items()})

    train(state, recipe, save_at_stop)
    resumed = TrainingState(recipe, pixels, device=CPU)
    resumed.load_state_dict(saved)
    assert resumed.step == stop
    train(resumed, recipe, lambda _: None)
    assert all(torch.equal(whole[name], value) for name, value in weights(resumed).items())


def _copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def test_discriminators_take_their_steps_on_fresh_batches(recipe, pixels):
    recipe = replace(recipe, latent_n_critic=3, image_n_critic=2, steps=2)
    assert trained(recipe, pixels).batches.drawn == 2 * (3 + 2 + 1)


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (latent_discriminator_step, {"latent_discriminator"}),
        (image_discriminator_step, {"image_discriminator"}),
        (partial(autoencoder_step, latent=True, image=True), {"encoder", "decoder", "head"}),
    ],
)
def test_each_step_changes_only_its_own_networks(
    recipe: Recipe, pixels: Tensor, step: Callable[..., dict[str, Tensor]], changed: set[str]
):
    state = TrainingState(recipe, pixels, device=CPU)
    assert state.networks.head is not None
    networks = {
        "encoder": state.networks.encoder,
        "decoder": state.networks.decoder,
        "head": state.networks.head,
        "latent_discriminator": state.latent_discriminator,
        "image_discriminator": state.image_discriminator,
    }
    set_learning_rates(state, recipe)
    before = {name: parameters_of(network) for name, network in networks.items()}
    step(state, recipe)
    assert {name for name, network in networks.items() if not equal(before[name], parameters_of(network))} == changed
    others = [network for name, network in networks.items() if name not in changed]
    assert all(parameter.grad is None for network in others for parameter in network.parameters())


def test_adversaries_take_part_in_every_nth_step(recipe, pixels):
    recipe = replace(recipe, adversary_every=3, steps=5, latent_n_critic=1)
    state = TrainingState(recipe, pixels, device=CPU)
    losses: list[dict[str, float]] = []
    train(state, recipe, losses.append)
    assert ["image_discriminator" in step and "latent_adversarial" in step for step in losses] == [1, 0, 0, 1, 0]
    assert [len(step) for step in losses] == [8, 2, 2, 8, 2]
    assert state.batches.drawn == 5 + 2 * 2


def test_discriminators_learn_in_one_of_so_many_steps_and_teach_in_each(recipe, pixels):
    recipe = replace(recipe, discriminator_every=3, steps=5, latent_n_critic=1)
    state = TrainingState(recipe, pixels, device=CPU)
    losses: list[dict[str, float]] = []
    train(state, recipe, losses.append)
    assert ["image_discriminator" in step and "latent_discriminator" in step for step in losses] == [1, 0, 0, 1, 0]
    assert all("image_adversarial" in step and "latent_adversarial" in step for step in losses)
    assert state.batches.drawn == 5 + 2 * 2


def test_discriminators_learn_in_one_of_so_many_steps_of_those_with_adversaries(recipe, pixels):
    recipe = replace(recipe, adversary_every=2, discriminator_every=2, steps=9)
    losses: list[dict[str, float]] = []
    train(TrainingState(recipe, pixels, device=CPU), recipe, losses.append)
    assert ["image_adversarial" in step for step in losses] == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert ["image_discriminator" in step for step in losses] == [1, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("flag", [True, False])
def test_every_network_is_in_the_mode_that_the_recipe_asks_for_during_its_step(recipe, pixels, flag):
    recipe = replace(recipe, train_flag=flag)
    state = TrainingState(recipe, pixels, device=CPU)
    networks = (
        state.networks.encoder,
        state.networks.decoder,
        state.latent_discriminator,
        state.image_discriminator,
    )
    modes = []
    hook = lambda network, *_: modes.append((type(network).__name__, network.training))  # noqa: E731
    handles = [network.register_forward_hook(hook) for network in networks]
    # A step by itself, as the first one after a run is resumed, when every network is in the other mode.
    for step in (
        latent_discriminator_step,
        image_discriminator_step,
        partial(autoencoder_step, latent=True, image=True),
    ):
        for network in networks:
            network.train(not flag)
        step(state, recipe)
    for handle in handles:
        handle.remove()
    assert {name for name, _ in modes} == {"Encoder", "Decoder", "LatentDiscriminator", "ImageDiscriminator"}
    assert {training for _, training in modes} == {flag}


def norms_of(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_without_the_train_flag_statistics_stay_at_zero_and_one_and_score_so(recipe, pixels):
    recipe = replace(recipe, image_loss="bce", image_discriminator_norm="batch", train_flag=False, ema=0.0)
    state = trained(recipe, pixels)
    networks = scoring_networks(state, recipe)
    norms = [*norms_of(state.networks), *norms_of(state.image_discriminator), *norms_of(networks)]
    assert len(norms) > 20
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
    # Trained, and scored, as the same function: the networks' own answers in eval mode.
    images = state.networks.standardisation(pixels)
    with torch.no_grad():
        assert torch.equal(networks.encoder(images), state.networks.eval().encoder(images))
    assert not any(module.training for module in networks.modules())


@pytest.mark.parametrize("position", ["before", "after"])
def test_batch_norm_in_both_discriminators_is_trained_with(recipe, pixels, position):
    recipe = replace(recipe, batch_norm=position, latent_loss="bce", image_loss="bce")
    recipe = replace(recipe, latent_discriminator_norm="batch", image_discriminator_norm="batch")
    state = trained(recipe, pixels)
    for discriminator in (state.latent_discriminator, state.image_discriminator):
        norms = norms_of(discriminator)
        assert norms
        assert all(norm.running_mean is not None and norm.running_mean.any() for norm in norms)
    assert not norms_of(
        TrainingState(replace(recipe, image_discriminator_norm="group"), pixels, device=CPU).image_discriminator
    )


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("diary-2021-03-31", 7 * (1 + 1 + 1)),
        ("diary-2021-04-06", 7 + 2 * (1 + 1)),  # the discriminators learn in steps 0 and 5
        ("diary-2021-04-09", 7 * (1 + 1 + 5)),
        ("diary-next", 7 * (1 + 5 + 5)),
    ],
)
def test_a_recipe_of_the_diary_trains(name, batches, pixels):
    recipe = load_recipe(name, ["image_size=32", "width=8", "batch_size=4", "steps=7"])
    losses: list[dict[str, float]] = []
    state = TrainingState(recipe, pixels, device=CPU)
    train(state, recipe, losses.append)
    assert [("latent_penalty" in step, "image_penalty" in step) for step in losses] == [
        (recipe.latent_loss == "wgan-gp", recipe.image_loss == "wgan-gp")
    ] * 7
    assert state.batches.drawn == batches


@pytest.mark.parametrize(("size", "tile", "wide"), [(32, 0, 1), (128, 0, 5), (256, 0, 7), (512, 256, 7), (512, 0, 13)])
def test_a_hairline_is_marked_as_wide_as_the_smoothing_of_its_map_needs(size, tile, wide):
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 20, :30] = 1
    found = to_mark(masks, ModelConfig(image_size=size, tile=tile))
    expected = torch.zeros(1, 1, 64, 64)
    expected[..., 20 - wide // 2 : 20 + wide // 2 + 1, : 30 + wide // 2] = 1
    assert torch.equal(found, expected)


def test_a_cell_of_features_is_marked_by_how_much_of_it_is_a_defect():
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 0:8, 0:2] = 1  # a quarter
    masks[..., 8, 8:16] = 1  # an eighth
    masks[..., 16:24, 16:24] = 1
    config = ModelConfig(image_size=32, features="resnet18", feature_layers="layer1")
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[1, 1], expected[2, 2] = 1, 0.5, 1
    assert torch.equal(to_mark(masks, config)[0, 0], expected)


def test_the_head_learns_to_mark_what_is_close_to_a_defect_too(recipe, monkeypatch):
    recipe = replace(recipe, image_size=64)
    pixels = torch.randint(256, (10, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(4, 1, 64, 64)
    masks[..., 20, :] = 1
    learned: list[Tensor] = []

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        learned.append(wanted)
        return logits.mean()

    monkeypatch.setattr("training.loop.corrupt", lambda images, **_: (images, masks))
    monkeypatch.setattr("training.loop.segmentation_loss", loss)
    autoencoder_step(TrainingState(recipe, pixels, device=CPU), recipe, latent=False, image=False)
    (wanted,) = learned
    assert wanted.sum(dim=(1, 2, 3)).tolist() == [3 * 64] * 4
    assert wanted[:, :, 19:22].all()


def test_an_adversary_without_weight_is_not_trained(recipe, pixels):
    recipe = replace(recipe, latent_weight=0.0, image_weight=0.0)
    state = TrainingState(recipe, pixels, device=CPU)
    before = parameters_of(state.latent_discriminator) + parameters_of(state.image_discriminator)
    losses: list[dict[str, float]] = []
    train(state, recipe, losses.append)
    assert equal(before, parameters_of(state.latent_discriminator) + parameters_of(state.image_discriminator))
    assert all(set(step) == {"reconstruction", "segmentation"} for step in losses)


def test_the_latent_adversary_pulls_codes_towards_the_prior(recipe, pixels):
    """An encoder whose codes are far from N(0, I) comes closer, with nothing but the adversary to push it."""
    recipe = replace(recipe, l2_weight=1e-6, gradient_weight=0.0, latent_weight=1.0, image_weight=0.0, steps=150)
    recipe = replace(recipe, latent_loss="bce", learning_rate=2e-3, discriminator_learning_rate=2e-3)
    state = TrainingState(recipe, pixels, device=CPU)
    with torch.no_grad():
        bias = state.networks.encoder.layers[-1].bias
        assert isinstance(bias, Tensor)
        bias.fill_(4.0)
    images = state.networks.standardisation(pixels)
    before = state.networks.encoder.train()(images).mean()
    train(state, recipe, lambda _: None)
    after = state.networks.encoder(images).mean()
    assert before > 3.5
    assert after.abs() < 2.5


def test_a_loss_that_is_not_finite_stops_training_by_name(recipe, pixels):
    state = TrainingState(recipe, pixels, device=CPU)
    with torch.no_grad():
        next(state.networks.decoder.parameters()).fill_(float("nan"))
    recipe = replace(recipe, image_weight=0.0)
    with pytest.raises(TrainingDivergedError, match="reconstruction loss is nan at step 1"):
        train(state, recipe, lambda _: None)


def test_the_reconstruction_loss_falls(recipe, pixels):
    losses: list[float] = []
    recipe = replace(recipe, steps=60, corruption=0.0)
    train(TrainingState(recipe, pixels[:4], device=CPU), recipe, lambda step: losses.append(step["reconstruction"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_cosine_schedule_goes_from_the_full_rate_towards_zero(recipe, pixels):
    recipe = replace(recipe, steps=100)
    state = TrainingState(recipe, pixels, device=CPU)
    rates = []
    for state.step in (0, 24, 50, 99):
        set_learning_rates(state, recipe)
        rates.append(state.optimizer.param_groups[0]["lr"] / recipe.learning_rate)
    # In the first fifty steps it rises.
    assert rates == pytest.approx([1 / 50, 0.8645 / 2, 1 / 2, 0.000246719], rel=1e-3)
    set_learning_rates(state, replace(recipe, schedule="constant"))
    assert state.image_optimizer.param_groups[0]["lr"] == recipe.discriminator_learning_rate


def test_without_averaging_the_scoring_weights_are_the_trained_ones(recipe, pixels):
    recipe = replace(recipe, ema=0.0)
    state = trained(recipe, pixels)
    assert equal(parameters_of(scoring_networks(state, recipe)), parameters_of(state.networks))


@pytest.mark.parametrize(("step", "followed"), [(0, 0.9), (90, 0.09), (10**6, 0.001)])
def test_averaged_weights_follow_the_trained_ones_first_at_once_then_slowly(recipe, pixels, step, followed):
    recipe = replace(recipe, ema=0.999)
    state = TrainingState(recipe, pixels, device=CPU)
    for networks, value in ((state.averaged, 0.0), (state.networks, 1.0)):
        for parameter in networks.parameters():
            torch.nn.init.constant_(parameter, value)
    state.step = step
    average_weights(state, recipe)
    for parameter in state.averaged.parameters():
        assert torch.allclose(parameter, torch.full_like(parameter, followed))


def test_scoring_networks_have_statistics_of_their_own_weights(recipe, pixels):
    recipe = replace(recipe, corruption=0.0, batch_size=10)
    state = trained(recipe, pixels)
    networks = scoring_networks(state, recipe)
    assert not any(module.training for module in networks.modules())
    convolution, norm = list(networks.encoder.layers)[:2]
    seen = convolution(networks.standardisation(pixels))
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, seen.mean(dim=(0, 2, 3)), atol=1e-5)
    alone = outputs(networks, pixels[:1]).maps
    assert torch.allclose(alone, outputs(networks, pixels).maps[:1], atol=1e-5)


def test_scoring_networks_leave_training_as_it_was(recipe, pixels):
    state = trained(recipe, pixels)
    before, generator = weights(state), state.generator.get_state()
    first, second = (scoring_networks(state, recipe).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    after = weights(state)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generator, state.generator.get_state())
    assert state.batches.drawn == sum([2, 1, 1]) * state.step


def test_batches_show_every_image_once_a_pass(pixels):
    batches = Batches(pixels, batch_size=5, crop=32, seed=0)
    first_pass = torch.cat([batches.next()[0], batches.next()[0]])
    assert sorted(first_pass.flatten(1)[:, :9].sum(dim=1).tolist()) == pytest.approx(
        sorted(pixels.flatten(1)[:, :9].sum(dim=1).tolist())
    )
    second_pass = torch.cat([batches.next()[0], batches.next()[0]])
    assert not torch.equal(first_pass, second_pass)


def test_batches_of_fewer_images_than_a_batch_hold_them_all(pixels):
    assert len(Batches(pixels[:3], batch_size=16, crop=32, seed=0).next()[0]) == 3


def test_batches_resumed_go_on_where_they_stood(pixels):
    batches = Batches(pixels, batch_size=4, crop=32, seed=3)
    drawn = [batches.next()[0] for _ in range(7)]
    for start in range(7):
        resumed = Batches(pixels, batch_size=4, crop=32, seed=3)
        resumed.resume(start)
        assert all(torch.equal(resumed.next()[0], batch) for batch in drawn[start:])


def test_batches_of_windows_are_cut_anywhere_from_their_image():
    ramp = (torch.arange(48).view(48, 1) + 100 * (torch.arange(48) % 2)).byte().expand(2, 3, 48, 48)
    batches = Batches(ramp, batch_size=2, crop=32, seed=0)
    drawn = [batches.next()[:2] for _ in range(200)]
    windows, places = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert windows.shape == (400, 3, 32, 32)
    tops = windows[:, 0, :, 0].amin(dim=1) % 100  # the rows say which they were
    assert set(tops.tolist()) == set(range(17))
    rows = (places[:, 1, :, 0] + 1) / 2 * 47
    assert torch.allclose(rows, tops.view(-1, 1) + torch.arange(32.0), atol=1e-3)
    columns = (places[:, 0, 0] + 1) / 2 * 47
    assert torch.equal(columns.round() % 2 == 1, windows[:, 0, 0] >= 100)


def test_windows_show_what_is_at_the_border_as_often_as_what_is_not():
    ramp = torch.arange(96).view(96, 1).byte().expand(4, 3, 96, 96)
    batches = Batches(ramp, batch_size=4, crop=32, seed=0)
    tops = torch.cat([batches.next()[0][:, 0, 0, 0] for _ in range(500)]).long()
    shown = torch.stack([(tops <= row) & (row < tops + 32) for row in range(96)]).float().mean(dim=1)
    assert shown.min() > 0.2  # of 500 windows; a quarter is the mean of an inner row


def test_images_of_a_batch_differ_in_brightness_by_no_more_than_the_jitter(recipe):
    plain = torch.randn(1, 3, 32, 32).expand(16, 3, 32, 32)
    recipe = replace(recipe, jitter=0.2)
    images, same = _jittered([plain, plain], recipe, torch.Generator().manual_seed(0))
    assert torch.equal(images, same)
    contrast = images.flatten(1).std(dim=1) / plain.flatten(1).std(dim=1)
    assert contrast.min() > 0.8 - 1e-4
    assert contrast.max() < 1.2 + 1e-4
    assert contrast.std() > 0.05
    assert images.flatten(1).mean(dim=1).std() > 0.03
    # All channels of an image alike: colours keep their hue.
    of_channels = images.flatten(2).std(dim=2) / plain.flatten(2).std(dim=2)
    assert torch.allclose(of_channels, of_channels[:, :1].expand(-1, 3), atol=1e-5)
    assert torch.equal(_jittered([plain], replace(recipe, jitter=0.0), torch.Generator())[0], plain)


def test_the_channels_of_features_differ_each_by_itself():
    recipe = load_recipe("features", ["jitter=0.3"])
    plain = torch.randn(4, 16, 8, 8)
    (features,) = _jittered([plain], recipe, torch.Generator().manual_seed(0))
    contrast = features.flatten(2).std(dim=2) / plain.flatten(2).std(dim=2)  # (4, 16)
    assert contrast.std(dim=1).min() > 0.05
    assert contrast.min() > 0.7 - 1e-4
    assert contrast.max() < 1.3 + 1e-4


def test_the_head_learns_from_defects_in_pixels_alone():
    """Those in features have seams that no real defect has."""
    small = ["image_size=64", "width=8", "head_width=8", "feature_channels=16", "batch_size=4", "corruption=1"]
    recipe = load_recipe("features", [*small, "feature_corruption=0.75"])
    state = TrainingState(recipe, torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), device=CPU)
    rebuilt: list[Tensor] = []
    marked: list[Tensor] = []
    state.networks.encoder.register_forward_pre_hook(lambda _, inputs: rebuilt.append(inputs[0]))
    assert state.networks.head is not None
    state.networks.head.register_forward_pre_hook(lambda _, inputs: marked.append(inputs[0]))
    autoencoder_step(state, recipe, latent=False, image=False)
    assert len(rebuilt[0]) == 4
    assert torch.equal(marked[0], rebuilt[0][3:])


@pytest.mark.gpu
def test_training_on_a_gpu_with_mixed_precision_stays_close_to_the_cpu(recipe, pixels):
    recipe = replace(recipe, mixed_precision=True, corruption=0.0)  # whose random numbers differ by device
    losses: dict[str, list[dict[str, float]]] = {"cpu": [], "cuda": []}
    for device, found in losses.items():
        train(TrainingState(recipe, pixels, device=torch.device(device)), recipe, found.append)
    assert losses["cuda"][0]["reconstruction"] == pytest.approx(losses["cpu"][0]["reconstruction"], rel=0.05)


def test_the_image_discriminator_sees_reconstructions_as_the_autoencoder_makes_them(recipe, pixels):
    """In training batch norm mixes what is decoded together, so codes and draws from the prior are decoded apart."""
    recipe = replace(recipe, corruption=0.0, jitter=0.0)
    state = TrainingState(recipe, pixels, device=CPU)
    images = state.networks.standardisation(
        Batches(pixels, batch_size=recipe.batch_size, crop=32, seed=recipe.seed).next()[0]
    )
    with torch.no_grad():
        expected = state.networks.decoder.train()(state.networks.encoder.train()(images))
    seen: list[Tensor] = []
    state.image_discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    image_discriminator_step(state, recipe)
    real, fake = seen[:2]
    assert torch.equal(real, images)
    assert torch.allclose(fake[:2], expected[:2], atol=1e-5)
    assert not torch.allclose(fake[2:], expected[2:], atol=1e-2)


def test_the_image_discriminator_learns_that_defects_are_not_real(recipe):
    """Trained on its own, it tells damaged patches from whole ones that it never saw."""
    recipe = replace(recipe, image_size=64, image_loss="bce", corruption=0.5, discriminator_learning_rate=2e-3)
    recipe = replace(recipe, batch_size=16, jitter=0.0)
    noise = torch.randint(100, 140, (16, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    state = TrainingState(recipe, noise, device=CPU)
    state.step = 50  # after the warm-up
    set_learning_rates(state, replace(recipe, schedule="constant"))
    for _ in range(500):
        image_discriminator_step(state, recipe)
    images = state.networks.standardisation(noise)
    damaged, masks = corrupt(images, probability=1.0, generator=torch.Generator().manual_seed(9))
    defects = F.max_pool2d(masks, 16) > 0
    logits = state.image_discriminator(damaged)
    assert logits[defects].mean() < logits[~defects].mean() - 0.5


def test_standardisation_is_that_of_the_training_pixels(pixels):
    standardisation = standardisation_of(pixels)
    images = standardisation(pixels)
    assert images.mean() == pytest.approx(0, abs=1e-4)
    assert images.std(correction=0) == pytest.approx(0.5, abs=1e-4)
