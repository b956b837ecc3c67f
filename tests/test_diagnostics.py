"""A look inside a run: every problem that is recognised is provoked in a tiny network; a healthy run raises none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from training.config import Recipe, load_recipe
from training.diagnostics import (
    Finding,
    Watch,
    code_statistics,
    fixed_draws,
    fixed_images,
    gradient_norms,
    judgement,
    measure,
)
from training.loop import train
from training.state import TrainingState

CPU = torch.device("cpu")
SMALL = ["image_size=32", "latent_dim=4", "batch_size=8", "steps=60"]
EVERY = 5  # lines between measurements

ALWAYS = {
    "gradient_norm/encoder",
    "gradient_norm/decoder",
    "code/mean",
    "code/std",
    "code/effective_dimensions",
    "code/dimensions",
    "sharpness/reconstructions",
    "sharpness/samples",
    "variety/samples",
}


def adversary_keys(name: str) -> set[str]:
    figures = {f"{name}/{figure}" for figure in ("margin", "accuracy_real", "accuracy_fake", "spread")}
    return figures | {f"gradient_norm/{name}_discriminator"}


@pytest.fixture
def discs() -> Tensor:
    """Images that can be learned: a disc of some colour somewhere."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(32.0)
    centres = 8 + 16 * torch.rand((12, 2, 1, 1), generator=generator)
    colours = 80 + 150 * torch.rand((12, 3, 1, 1), generator=generator)
    distance = (axis.view(1, 32, 1) - centres[:, 0]) ** 2 + (axis - centres[:, 1]) ** 2  # (12, 32, 32)
    return torch.where(distance.unsqueeze(1) < 36, colours, 40.0).byte()


@pytest.fixture
def healthy() -> Recipe:
    """The diary's second entry, whose discriminators learn in every step."""
    return load_recipe("diary-2021-04-06", [*SMALL, "discriminator_every=1"])


def watched(recipe: Recipe, pixels: Tensor, *, line_every: int = 1) -> list[Finding]:
    """What is found with a line so often, not every ten steps: problems show sooner."""
    state, watch = TrainingState(recipe, pixels, device=CPU), Watch(recipe)
    images, _ = fixed_images(state, recipe, 8)
    findings: list[Finding] = []

    def after_step(losses: dict[str, float]) -> None:
        assert all(math.isfinite(loss) for loss in losses.values())
        if state.step % line_every == 0:
            found = measure(state, recipe, images) if state.step % (EVERY * line_every) == 0 else {}
            findings.extend(watch.see({"step": state.step, **losses, **found}))

    train(state, recipe, after_step)
    return findings


# What goes wrong


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_norm": "after", "latent_discriminator_norm": "none", "image_discriminator_norm": "group"},
        {
            "latent_loss": "wgan-gp",
            "image_loss": "wgan-gp",
            "latent_discriminator_norm": "none",
            "image_discriminator_norm": "group",
        },
        {"latent_weight": 0.0, "image_weight": 0.0},
    ],
)
def test_a_healthy_run_raises_nothing(healthy, discs, changes):
    assert watched(replace(healthy, **changes, steps=66), discs, line_every=3) == []


def test_the_wrong_flags_of_the_diary_are_recognised_and_the_right_ones_raise_nothing(discs):
    wrong = replace(load_recipe("diary-2021-03-31", SMALL), steps=25)
    findings = {finding.name: finding for finding in watched(wrong, discs)}
    assert {
        "constant/image_adversarial",
        "constant/latent_adversarial",
        "dead_discriminator/image",
        "collapsed_code",
        "collapsed_generator",
    } <= set(findings)
    assert findings["constant/image_adversarial"].figure < 0.003
    assert "try train_flag = true" in findings["constant/image_adversarial"].message
    assert findings["dead_discriminator/image"].figure < 0.02
    assert findings["collapsed_code"].figure < 0.1
    assert findings["collapsed_generator"].figure < 0.05
    for name in ("dead_discriminator/image", "collapsed_code", "collapsed_generator"):
        assert "set train_flag = true first, then try " in findings[name].message
    assert watched(replace(wrong, train_flag=True), discs) == []


def test_batch_norm_after_the_last_activation_makes_a_discriminators_loss_constant(healthy, discs):
    """The mean of its logits is the same for every batch: there is no margin to gain."""
    recipe = replace(healthy, batch_norm="after", steps=50)
    findings = watched(recipe, discs)
    found = next(finding for finding in findings if finding.name == "constant/image_discriminator")
    assert "try image_discriminator_norm = group" in found.message
    for adversary, norm in (("image", "group"), ("latent", "none")):
        (dead,) = [finding for finding in findings if finding.name == f"dead_discriminator/{adversary}"]
        assert dead.step == 3 * EVERY  # long before the loss has been constant for long enough
        assert abs(dead.figure) < 1e-5
        assert f"try {adversary}_discriminator_norm = {norm}" in dead.message
    others = {finding.name for finding in watched(replace(recipe, image_discriminator_norm="group"), discs)}
    assert "constant/image_discriminator" not in others
    assert "dead_discriminator/image" not in others


def test_a_discriminator_that_learns_too_fast_is_saturated(healthy, discs):
    recipe = replace(healthy, latent_discriminator_norm="none", image_discriminator_norm="group")
    recipe = replace(recipe, discriminator_learning_rate=1e-2, image_weight=1e-3, latent_weight=1e-3)
    (found,) = [finding for finding in watched(recipe, discs) if finding.name.startswith("saturated")]
    assert found.name == "saturated_discriminator/image"
    assert found.figure > 8
    assert f"by a margin of {found.figure:.3g}" in found.message
    assert "try a smaller discriminator_learning_rate" in found.message


def test_a_learning_rate_that_is_too_large_diverges(healthy, discs):
    """Its losses stay finite: training itself does not stop it."""
    recipe = replace(healthy, latent_discriminator_norm="none", image_discriminator_norm="group")
    findings = watched(replace(recipe, learning_rate=1.0, image_weight=100.0), discs)
    (found,) = [finding for finding in findings if finding.name == "diverging"]
    assert found.step < 40
    assert f"to {found.figure:.3g}, more than that of networks that have learned nothing" in found.message


def test_a_discriminators_learning_rate_that_is_too_large_diverges(healthy, discs):
    """Nearly without the penalty that holds it, so that it does on every machine: its last steps are chaotic."""
    recipe = replace(healthy, latent_loss="wgan-gp", latent_discriminator_norm="none")
    recipe = replace(recipe, image_loss="wgan-gp", image_discriminator_norm="group")
    recipe = replace(recipe, gradient_penalty_weight=1e-6, discriminator_learning_rate=1.0, steps=30)
    findings = watched(recipe, discs)
    (found,) = [finding for finding in findings if finding.name == "diverging/latent_discriminator"]
    assert abs(found.figure) > 1000


def test_codes_without_variety_are_collapsed(healthy, discs):
    """Of images that are all the same nothing can be told apart, whether or not there is a prior to compare with."""
    for weight in (1.0, 0.0):
        findings = watched(replace(healthy, steps=20, latent_weight=weight), discs[:1].repeat(8, 1, 1, 1))
        (found,) = [finding for finding in findings if finding.name == "collapsed_code"]
        assert found.step == 3 * EVERY
        assert found.figure == 0
        assert "in 0.0 of 4 dimensions: try a smaller latent_weight" in found.message


def test_rates_so_small_that_nothing_moves_make_constant_losses(healthy, discs):
    recipe = replace(healthy, learning_rate=1e-8, discriminator_learning_rate=1e-8, steps=25)
    names = {finding.name for finding in watched(recipe, discs[:8])}
    assert {"constant/reconstruction", "constant/latent_adversarial"} <= names


# How the watch counts


def line(step: int, **figures: float) -> dict[str, float]:
    return {"step": step, "images_per_second": 9.0, "reconstruction": 1 + 0.1 * (step % 3), **figures}


def judged(step: int, spread: float) -> dict[str, float]:
    figures = {"margin": 0.5, "accuracy_real": 0.5, "accuracy_fake": 0.5, "spread": spread}
    return line(step) | {f"latent/{name}": figure for name, figure in figures.items()}


def test_a_problem_is_found_once_and_again_only_after_it_was_over(healthy):
    watch = Watch(healthy)
    #        too short   a problem  still       not yet over   over       again
    seen = [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    findings = [watch.see(judged(step, float(spread))) for step, spread in enumerate(seen)]
    assert [step for step, found in enumerate(findings) if found] == [6, 20]
    assert {finding.name for found in findings for finding in found} == {"dead_discriminator/latent"}


def test_a_loss_that_hardly_moves_is_constant_and_one_that_moves_is_not(healthy):
    watch = Watch(healthy)
    findings = []
    for step in range(40):
        wobble = (-1) ** step
        findings += watch.see(
            line(step, image_adversarial=0.693 + 0.001 * wobble, latent_adversarial=0.7 + 0.005 * wobble)
        )
    assert [(found.step, found.name) for found in findings] == [(19, "constant/image_adversarial")]
    assert "has been 0.693 for 200 steps, give or take 0.14%" in findings[0].message


def test_losses_of_rare_steps_are_not_constant_because_they_are_repeated(healthy):
    """In one step of hundred the adversaries take part: ten lines hold the same figure."""
    watch = Watch(replace(healthy, adversary_every=100))
    assert [watch.see(line(step, image_adversarial=1 + (step // 10) / 10)) for step in range(0, 300)] == [[]] * 300
    stuck = Watch(replace(healthy, adversary_every=100))
    found = [finding for step in range(300) for finding in stuck.see(line(step, image_adversarial=1.0))]
    assert [(finding.step, finding.name) for finding in found] == [(199, "constant/image_adversarial")]


def test_the_accuracy_of_a_wasserstein_discriminator_says_nothing(healthy):
    """Its zero is anywhere, and its margin is a distance."""
    sure = {"image/margin": 20.0, "image/accuracy_real": 1.0, "image/accuracy_fake": 1.0, "image/spread": 10.0}
    wasserstein = replace(healthy, image_loss="wgan-gp", image_discriminator_norm="group")
    for recipe, names in ((healthy, {"saturated_discriminator/image"}), (wasserstein, set())):
        watch = Watch(recipe)
        assert {finding.name for step in range(5) for finding in watch.see(line(step) | sure)} == names


def test_an_adversary_that_is_left_out_asks_nothing_of_codes_and_samples(healthy):
    """Without the latent adversary a code may be small; without the image adversary samples are nobody's aim."""
    figures = {"code/std": 0.01, "code/effective_dimensions": 3.0, "code/dimensions": 4.0, "variety/samples": 0.001}
    for changes, names in (
        ({}, {"collapsed_code", "collapsed_generator"}),
        ({"latent_weight": 0.0, "image_weight": 0.0}, set()),
    ):
        watch = Watch(replace(healthy, **changes))
        assert {finding.name for step in range(5) for finding in watch.see(line(step) | figures)} == names


# What is measured


def started(recipe: Recipe, pixels: Tensor, *, steps: int = 2) -> TrainingState:
    state = TrainingState(recipe, pixels, device=CPU)
    train(state, replace(recipe, steps=steps), lambda _: None)
    return state


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ([], set()),
        (["latent=grid", "head_width=8"], set()),
        (["latent=grid", "image_size=64", "tile=32"], set()),
        (["latent=grid", "image_size=64", "crop=48", "channels=1"], set()),
        (["latent_weight=0"], adversary_keys("latent")),
        (["image_weight=0"], adversary_keys("image")),
    ],
)
def test_every_figure_is_there_unless_its_adversary_is_left_out(discs, changes, missing):
    recipe = load_recipe("diary-2021-04-06", [*SMALL, *changes])
    pixels = discs.repeat_interleave(recipe.image_size // 32, 2).repeat_interleave(recipe.image_size // 32, 3)
    state = started(recipe, pixels[:, : recipe.channels])
    images, places = fixed_images(state, recipe, 8)
    assert images.shape == (8, recipe.channels, recipe.window, recipe.window)
    assert places.shape == (8, 2, recipe.window, recipe.window)
    found = measure(state, recipe, images)
    head = {"gradient_norm/head"} if recipe.head_width else set()
    assert set(found) == (ALWAYS | head | adversary_keys("latent") | adversary_keys("image")) - missing
    assert all(math.isfinite(figure) for figure in found.values())


@pytest.mark.parametrize("flag", [True, False])
def test_looking_changes_nothing_and_sees_the_same_again(healthy, discs, flag):
    recipe = replace(healthy, train_flag=flag)
    state = started(recipe, discs)
    parts = (state.networks, state.latent_discriminator, state.image_discriminator, state.averaged)
    for index, part in enumerate(parts):
        part.train(index % 2 == 0)  # whichever mode they are in
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    modes = [module.training for part in parts for module in part.modules()]
    generator, drawn, everywhere = state.generator.get_state(), state.batches.drawn, torch.get_rng_state()
    images, _ = fixed_images(state, recipe, 8)
    found = measure(state, recipe, images)
    assert torch.equal(fixed_images(state, recipe, 8)[0], images)
    assert measure(state, recipe, images) == found
    for part, values in zip(parts, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in part.state_dict().items())
    assert [module.training for part in parts for module in part.modules()] == modes
    assert torch.equal(generator, state.generator.get_state())
    assert torch.equal(everywhere, torch.get_rng_state())
    assert state.batches.drawn == drawn


def test_networks_are_measured_as_they_are_trained(healthy, discs):
    """With the wrong flags batch norm does not see the batch, in training or here."""
    state = started(healthy, discs)
    images, _ = fixed_images(state, healthy, 8)
    right, wrong = (measure(state, replace(healthy, train_flag=flag), images) for flag in (True, False))
    with torch.no_grad():
        for found, mode in ((wrong, False), (right, True)):
            codes = state.networks.encoder.train(mode)(images)
            assert found["code/std"] == pytest.approx(code_statistics(codes)["code/std"], rel=1e-4)
    assert right["code/std"] != pytest.approx(wrong["code/std"], rel=0.01)


def test_gradient_norms_are_those_of_the_last_step(healthy, discs):
    state = TrainingState(healthy, discs, device=CPU)
    assert gradient_norms(state) == {}
    train(state, replace(healthy, steps=1), lambda _: None)
    found = gradient_norms(state)
    gradients = [parameter.grad for parameter in state.networks.decoder.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    assert found["gradient_norm/decoder"] == pytest.approx(float(flat.norm()), rel=1e-5)
    assert "gradient_norm/head" not in found


def test_a_discriminators_figures_by_hand(healthy, discs):
    state = TrainingState(healthy, discs, device=CPU)
    real, fake = torch.tensor([3.0, 1.0, -1.0, 1.0]), torch.tensor([-2.0, -2.0, 1.0, -1.0])
    found = judgement("latent", nn.Identity(), real, fake, state)
    assert found == {
        "latent/margin": 2.0,
        "latent/accuracy_real": 0.75,
        "latent/accuracy_fake": 0.75,
        "latent/spread": pytest.approx(math.sqrt(22 / 8)),  # the mean is 0
    }


@pytest.mark.parametrize(("count", "dimensions", "side"), [(32, 64, 1), (32, 4, 1), (8, 16, 8), (500, 16, 1)])
def test_draws_of_the_prior_have_its_mean_deviation_and_all_its_dimensions(count, dimensions, side):
    """Even where there are fewer samples than dimensions: the plain participation ratio would be 21 of 64."""
    found = [
        code_statistics(torch.randn((count, dimensions, side, side), generator=torch.Generator().manual_seed(seed)))
        for seed in range(8)
    ]
    means = {name: sum(statistics[name] for statistics in found) / 8 for name in found[0]}
    assert means["code/dimensions"] == dimensions
    assert means["code/mean"] < 1.3 / math.sqrt(count * side**2)
    assert means["code/std"] == pytest.approx(1, rel=0.05)
    assert means["code/effective_dimensions"] == pytest.approx(dimensions, rel=0.12)


def test_codes_along_one_line_have_one_effective_dimension():
    along = torch.randn((40, 1), generator=torch.Generator().manual_seed(0))
    codes = 2 + along * torch.tensor([3.0, 4.0, 0.0, 0.0])
    found = code_statistics(codes.view(40, 4, 1, 1))
    assert found["code/effective_dimensions"] == pytest.approx(1, rel=0.08)
    assert found["code/std"] == pytest.approx(5 / 2 * float(along.std()), rel=1e-4)
    assert found["code/mean"] == pytest.approx(2, rel=0.3)


def test_codes_that_are_all_the_same_have_no_dimension():
    found = code_statistics(torch.full((8, 4, 1, 1), 1.5))
    assert found == {"code/mean": 1.5, "code/std": 0.0, "code/effective_dimensions": 0.0, "code/dimensions": 4.0}


def test_two_codes_are_enough_to_measure():
    found = code_statistics(torch.randn((2, 4, 1, 1), generator=torch.Generator().manual_seed(0)))
    assert all(math.isfinite(figure) for figure in found.values())


def test_fixed_draws_are_those_of_the_seed(healthy, discs):
    state = TrainingState(healthy, discs, device=CPU)
    draws = fixed_draws(torch.Size([6, 4, 1, 1]), state, healthy)
    assert torch.equal(fixed_draws(torch.Size([6, 4, 1, 1]), state, healthy), draws)
    assert not torch.equal(fixed_draws(torch.Size([6, 4, 1, 1]), state, replace(healthy, seed=1)), draws)


@pytest.mark.gpu
def test_measuring_on_a_gpu_is_close_to_the_cpu(healthy, discs):
    found = {}
    for name in ("cpu", "cuda"):
        state = TrainingState(healthy, discs, device=torch.device(name))
        images, _ = fixed_images(state, healthy, 8)
        found[name] = measure(state, healthy, images)
    assert found["cuda"].keys() == found["cpu"].keys()
    for figure in ("code/std", "sharpness/reconstructions"):
        assert found["cuda"][figure] == pytest.approx(found["cpu"][figure], rel=0.05)
