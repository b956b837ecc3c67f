"""Recipes: what ships loads, what is wrong is refused by key, value and what is allowed instead."""

import re
import tomllib
from dataclasses import FrozenInstanceError, asdict, fields
from typing import get_args, get_origin

import pytest

from models.errors import ConfigError
from training.config import RECIPES, Recipe, load_recipe, recipe_from_dict, recipe_names

KEYS = {field.name: field.type for field in fields(Recipe)}

# key, text of the value, what the refusal says is allowed
REFUSED = [
    ("image_size", "16", "multiples of 16 from 32 to 512"),
    ("image_size", "528", "multiples of 16 from 32 to 512"),
    ("image_size", "72", "multiples of 16 from 32 to 512"),
    ("image_size", "64.0", "a whole number"),
    ("tile", "16", "0 (the image in one piece) and multiples of 16 from 32 to 512"),
    ("tile", "80", "to image_size, 64"),
    ("tile", "-16", "0 (the image in one piece)"),
    ("channels", "2", "1 (gray) and 3 (colour)"),
    ("width", "0", "multiples of 8 from 8 to 256"),
    ("width", "264", "multiples of 8 from 8 to 256"),
    ("width", "12", "multiples of 8 from 8 to 256"),
    ("latent", "sphere", "vector, grid"),
    ("latent", "", "vector, grid"),
    ("latent", "grid=grid", "vector, grid"),
    ("latent_dim", "0", "1 to 1024"),
    ("latent_dim", "1025", "1 to 1024"),
    ("batch_norm", "none", "before, after"),
    ("head_width", "12", "0 (no head) and multiples of 8 to 256"),
    ("head_width", "264", "0 (no head) and multiples of 8 to 256"),
    ("features", "mobilenet_v9", "none, mobilenet_v2, resnet18, wide_resnet50_2, efficientnet_b0"),
    ("features", "", "none, mobilenet_v2"),
    ("feature_layers", "layer2", "of features none there are no layers"),
    ("feature_channels", "0", "multiples of 8 from 8 to 1024"),
    ("feature_channels", "12", "multiples of 8 from 8 to 1024"),
    ("feature_padding", "same", "torchvision, tensorflow"),
    ("feature_corruption", "0.5", "0 and, over features, up to 1"),
    ("crop", "16", "0 (no crop) and, for a grid of codes, multiples of 16 from 32 on"),
    ("crop", "40", "multiples of 16 from 32 on"),
    ("jitter", "-0.1", "0 to 0.5"),
    ("jitter", "0.6", "0 to 0.5"),
    ("corruption", "-0.1", "0 to 1"),
    ("corruption", "1.1", "0 to 1"),
    ("corruption", "half", "a number"),
    ("l2_weight", "-1", "0 or more"),
    ("ssim_weight", "-1", "0 or more"),
    ("gradient_weight", "-1", "0 or more"),
    ("head_weight", "-1", "0 or more"),
    ("latent_loss", "wgan", "bce, wgan-gp"),
    ("latent_loss", "BCE", "bce, wgan-gp"),
    ("latent_weight", "-0.001", "0 or more"),
    ("latent_n_critic", "0", "1 or more"),
    ("latent_discriminator_norm", "group", "none, batch"),
    ("image_loss", "hinge", "bce, wgan-gp"),
    ("image_weight", "-0.001", "0 or more"),
    ("image_n_critic", "-1", "1 or more"),
    ("image_n_critic", "1.5", "a whole number"),
    ("image_discriminator_norm", "none", "group, batch"),
    ("gradient_penalty_weight", "0", "more than 0"),
    ("adversary_every", "0", "1 or more"),
    ("discriminator_every", "0", "1 or more"),
    ("discriminator_every", "0.2", "a whole number"),
    ("steps", "0", "1 or more"),
    ("steps", "1e3", "a whole number"),
    ("steps", "", "a whole number"),
    ("batch_size", "1", "2 or more"),
    ("learning_rate", "0", "more than 0, up to 1"),
    ("learning_rate", "1.5", "more than 0, up to 1"),
    ("discriminator_learning_rate", "-1e-4", "more than 0, up to 1"),
    ("schedule", "linear", "constant, cosine"),
    ("ema", "1", "0 up to, but not including, 1"),
    ("ema", "-0.5", "0 up to, but not including, 1"),
    ("mixed_precision", "True", "true, false"),
    ("mixed_precision", "1", "true, false"),
    ("train_flag", "0", "true, false"),
    ("seed", "-1", "0 to 2147483647"),
    ("seed", "2147483648", "0 to 2147483647"),
    ("calibration_fraction", "0", "more than 0, up to 0.5"),
    ("calibration_fraction", "0.6", "more than 0, up to 0.5"),
    ("alpha", "0", "more than 0, less than 1"),
    ("alpha", "1", "more than 0, less than 1"),
    ("save_every", "0", "1 or more"),
]
# As TOML or a run's JSON may hold them: the right text is not enough, the type decides.
WRONG_TYPES = [
    ("image_size", 64.0),
    ("steps", True),
    ("seed", "0"),
    ("latent", 3),
    ("latent", None),
    ("corruption", "0.5"),
    ("corruption", True),
    ("alpha", None),
    ("schedule", ["cosine"]),
    ("features", None),
    ("feature_layers", ["layer2"]),
    ("mixed_precision", 1),
    ("mixed_precision", "true"),
]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_with_every_value_of_their_file(name):
    values = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    assert asdict(load_recipe(name, [])) == values


DIARY = ["diary-2021-03-31", "diary-2021-04-06", "diary-2021-04-09", "diary-next"]


def test_the_recipes_of_the_diary_differ_in_what_the_diary_says():
    first, second, third, following = (asdict(load_recipe(name, [])) for name in DIARY)
    assert {key: second[key] for key in first if first[key] != second[key]} == {
        "train_flag": True,
        "discriminator_every": 5,
    }
    assert {key: third[key] for key in second if second[key] != third[key]} == {
        "discriminator_every": 1,
        "image_loss": "wgan-gp",
        "image_n_critic": 5,
        "image_discriminator_norm": "group",
    }
    assert {key: following[key] for key in third if third[key] != following[key]} == {
        "latent_loss": "wgan-gp",
        "latent_n_critic": 5,
        "latent_discriminator_norm": "none",
    }


@pytest.mark.parametrize("name", DIARY)
@pytest.mark.parametrize("change", ["image_size=96", "image_size=128", "batch_norm=after"])
def test_a_recipe_of_the_diary_is_plain_and_takes_the_changes_of_the_study(name, change):
    recipe = load_recipe(name, [change])
    assert (recipe.latent, recipe.head_width, recipe.crop, recipe.schedule) == ("vector", 0, 0, "constant")
    assert recipe.ssim_weight == recipe.gradient_weight == recipe.corruption == recipe.jitter == 0
    assert recipe.adversary_every == 1


def test_wrong_flags_are_those_of_the_diarys_first_entry_alone():
    assert [name for name in recipe_names() if not load_recipe(name, []).train_flag] == ["diary-2021-03-31"]


@pytest.mark.parametrize(("adversary", "norm"), [("latent", "none"), ("image", "group")])
def test_batch_norm_in_a_discriminator_with_a_gradient_penalty_is_refused_with_the_reason(adversary, norm):
    changes = [f"{adversary}_loss=wgan-gp", f"{adversary}_discriminator_norm=batch"]
    with pytest.raises(ConfigError) as refusal:
        load_recipe("tiny", changes)
    assert str(refusal.value) == (
        f"{adversary}_discriminator_norm is 'batch': with {adversary}_loss wgan-gp allowed is {norm}, because the "
        f"penalty is on the gradient of each sample, and batch norm mixes those of a batch."
    )
    # The other adversary may have it.
    load_recipe("tiny", [changes[0], f"{'image' if adversary == 'latent' else 'latent'}_discriminator_norm=batch"])


@pytest.mark.parametrize(
    ("change", "window"), [("image_size=256", 192), ("image_size=128", 128), ("tile=128", 128), ("crop=0", 256)]
)
def test_no_window_is_larger_than_the_image_or_its_tile(change, window):
    assert load_recipe("default", [change]).window == window


def test_a_vector_of_codes_takes_no_crop():
    load_recipe("tiny", ["latent=vector"])
    with pytest.raises(ConfigError, match="crop is 32: allowed are 0"):
        load_recipe("tiny", ["latent=vector", "crop=32"])


def test_a_large_image_needs_tiles():
    with pytest.raises(ConfigError, match=r"image_size is 1024: .* from 32 to 512, with a tile to 8192"):
        load_recipe("default", ["image_size=1024"])
    config = load_recipe("default", ["tile=256", "image_size=1024"]).model_config()
    assert (config.image_size, config.side) == (1024, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gradient_weight=0.5", "ssim_weight and gradient_weight are of images: over features allowed is 0"),
        ("ssim_weight=0.5", "ssim_weight and gradient_weight are of images: over features allowed is 0"),
        ("crop=144", "crop is 144: allowed are over features multiples of 32"),
        ("feature_corruption=1.5", "feature_corruption is 1.5: allowed are 0 and, over features, up to 1"),
        ("feature_corruption=1", "feature_corruption is 1.0: allowed are .* with a head less than 1"),
        ("latent=vector", "latent is 'vector': over features allowed is grid"),
    ],
)
def test_what_does_not_go_over_features_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("features", [change])


def test_features_are_computed_once_where_training_shows_whole_images():
    assert load_recipe("features", []).caches_features
    assert load_recipe("features", ["jitter=0"]).caches_features
    for change in ("crop=128", "tile=128"):
        assert not load_recipe("features", [change]).caches_features
    assert not load_recipe("default", ["jitter=0", "crop=0"]).caches_features


def test_the_recipes_that_the_command_line_relies_on_are_shipped():
    assert {"default", "features", "tiny"} <= set(recipe_names())


def test_every_key_has_a_refused_value_here():
    assert {key for key, _, _ in REFUSED} == set(KEYS)


@pytest.mark.parametrize(("key", "text", "allowed"), REFUSED)
def test_a_wrong_value_is_refused_by_key_value_and_what_is_allowed(key, text, allowed):
    with pytest.raises(ConfigError) as refusal:
        load_recipe("tiny", [f"{key}={text}"])
    sentence = re.fullmatch(r"(\w+) is (.+?): (.+)\.", str(refusal.value))
    assert sentence is not None
    named, value, rest = sentence.groups()
    assert named == key
    assert value in (text, repr(text), str(float(text)) if _is_number(text) else "")
    assert allowed in rest


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused_by_key_and_value(key, value):
    values = asdict(load_recipe("tiny", [])) | {key: value}
    with pytest.raises(ConfigError, match=rf"^{key} is ") as refusal:
        recipe_from_dict(values)
    assert str(value) in str(refusal.value)
    assert "allowed" in str(refusal.value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind is float])
def test_a_float_that_is_not_finite_is_refused(key, text):
    with pytest.raises(ConfigError, match=rf"^{key} is -?(nan|inf): allowed"):
        load_recipe("tiny", [f"{key}={text}"])


def test_a_reconstruction_loss_without_any_term_is_refused():
    with pytest.raises(ConfigError, match="l2_weight, ssim_weight and gradient_weight are all 0"):
        load_recipe("tiny", ["l2_weight=0", "ssim_weight=0", "gradient_weight=0"])


@pytest.mark.parametrize("weight", ["l2_weight", "ssim_weight", "gradient_weight"])
def test_one_term_of_the_reconstruction_loss_is_enough(weight):
    zeros = ["l2_weight=0", "ssim_weight=0", "gradient_weight=0"]
    assert getattr(load_recipe("tiny", [*zeros, f"{weight}=0.5"]), weight) == 0.5


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("image_size", "512", 512),
        ("image_size", "32", 32),
        ("channels", "1", 1),
        ("width", "8", 8),
        ("latent", "vector", "vector"),
        ("latent_dim", "1024", 1024),
        ("batch_norm", "after", "after"),
        ("corruption", "0", 0.0),
        ("corruption", "1", 1.0),
        ("latent_weight", "0", 0.0),
        ("latent_loss", "wgan-gp", "wgan-gp"),
        ("image_n_critic", "5", 5),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "1", 1.0),
        ("schedule", "constant", "constant"),
        ("ema", "0", 0.0),
        ("mixed_precision", "true", True),
        ("mixed_precision", "false", False),
        ("train_flag", "false", False),
        ("discriminator_every", "5", 5),
        ("latent_discriminator_norm", "batch", "batch"),
        ("seed", "2147483647", 2**31 - 1),
        ("calibration_fraction", "0.5", 0.5),
        ("alpha", "0.01", 0.01),
        ("batch_size", "2", 2),
    ],
)
def test_an_override_is_parsed_to_the_type_of_its_key(key, text, value):
    parsed = getattr(load_recipe("tiny", [f"{key}={text}"]), key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in KEYS.items() if get_origin(kind)])
def test_every_choice_that_a_type_names_is_allowed(key, kind):
    for choice in get_args(kind):
        assert getattr(load_recipe("tiny", [f"{key}={choice}"]), key) == choice


def test_an_override_changes_its_own_key_alone():
    before, after = load_recipe("default", []), load_recipe("default", ["steps=7", "ema=0.5"])
    assert asdict(after) == asdict(before) | {"steps": 7, "ema": 0.5}


def test_the_later_override_of_a_key_wins():
    assert load_recipe("tiny", ["seed=1", "steps=9", "seed=2"]).seed == 2


def test_an_earlier_override_need_not_be_allowed_if_a_later_one_is():
    assert load_recipe("tiny", ["steps=0", "steps=9"]).steps == 9


@pytest.mark.parametrize("key", ["stepps", "", "Steps", "model_config", "__class__"])
def test_an_unknown_key_is_refused_with_the_allowed_ones(key):
    with pytest.raises(ConfigError) as refusal:
        load_recipe("tiny", [f"{key}=1"])
    assert f"key {key!r} does not exist" in str(refusal.value)
    assert all(known in str(refusal.value) for known in KEYS)


@pytest.mark.parametrize("name", ["unknown", "", "tiny.toml", "../recipes/tiny", "Tiny"])
def test_an_unknown_recipe_is_refused_with_the_allowed_ones(name):
    with pytest.raises(ConfigError) as refusal:
        load_recipe(name, [])
    assert f"recipe {name!r} does not exist" in str(refusal.value)
    assert all(known in str(refusal.value) for known in recipe_names())


@pytest.mark.parametrize("override", ["steps", "steps 5", "steps:5", ""])
def test_an_override_that_is_not_key_equals_value_is_refused(override):
    with pytest.raises(ConfigError) as refusal:
        load_recipe("tiny", [override])
    assert f"--set {override!r} is not of the form key=value" in str(refusal.value)


def test_a_recipe_with_a_missing_key_is_refused_by_name():
    values = asdict(load_recipe("tiny", []))
    del values["ema"]
    with pytest.raises(ConfigError, match=r"missing or unknown keys: ema\."):
        recipe_from_dict(values)


def test_a_recipe_with_an_unknown_key_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"missing or unknown keys: momentum\."):
        recipe_from_dict(asdict(load_recipe("tiny", [])) | {"momentum": 0.9})


def test_a_recipe_read_back_from_its_dictionary_is_equal():
    recipe = load_recipe("default", ["seed=3", "mixed_precision=false"])
    assert recipe_from_dict(asdict(recipe)) == recipe


def test_a_recipe_cannot_be_changed():
    recipe = load_recipe("tiny", [])
    with pytest.raises(FrozenInstanceError):
        recipe.steps = 1  # type: ignore[misc]


def test_the_model_config_holds_the_recipes_own_values():
    recipe = load_recipe("tiny", ["image_size=96", "channels=1", "width=24", "latent=vector", "latent_dim=5"])
    config = asdict(recipe.model_config())
    assert config == {key: getattr(recipe, key) for key in config if key != "highest"} | {"highest": 16}
    assert (config["image_size"], config["channels"], config["latent"]) == (96, 1, "vector")
    assert load_recipe("features", []).model_config().highest == 1
