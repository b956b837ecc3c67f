"""evaluate on a small MVTec-layout folder: every figure, and what is left out where the folder cannot tell it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from models.calibration import Calibration
from models.checkpoint import Checkpoint
from models.errors import CalibrationError, DataError
from models.maps import MapFusion
from models.networks import ScoringNetworks, Standardisation
from models.scoring import Scorer, windows
from tests.conftest import largest_file, png
from training import fidelity, metrics
from training.data import read_dataset
from training.details import CASES, GAP, OUTLINE, PICTURE_SIDE, case_picture, score_level, write_cases
from training.evaluation import (
    evaluate_folder,
    generation_quality,
    pictures_folder,
    pixel_statistics,
    print_report,
    reconstruction_quality,
    without_details,
    write_report,
)
from training.inference import ScoredImage, score_images
from training.measuring import measure

QUIET = Console(quiet=True)


@pytest.fixture
def scorer(checkpoint: Checkpoint) -> Scorer:
    return checkpoint.scorer(torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six good images, four with a crack and three with a hole, of two sizes; masks for both kinds."""
    root = tmp_path / "nuts"
    for index in range(6):
        _write(root / f"test/good/{index}.png", png(seed=index))
    for kind, count in (("crack", 4), ("hole", 3)):
        for index in range(count):
            size = (40, 30) if index % 2 else (25, 50)
            _write(root / f"test/{kind}/{index}.png", png(seed=10 + index, size=size))
            mask = np.zeros((size[1], size[0]), dtype=np.uint8)
            mask[5:10, 8:14] = 255
            file = io.BytesIO()
            Image.fromarray(mask).save(file, "PNG")
            _write(root / f"ground_truth/{kind}/{index}_mask.png", file.getvalue())
    return root


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def evaluated(scorer: Scorer, data: Path, alpha: float | None = None) -> dict[str, Any]:
    return evaluate_folder(scorer, data, alpha=alpha, command="hazelnut evaluate", console=QUIET)


def test_evaluation_tells_every_figure(scorer, data):
    report = evaluated(scorer, data)
    assert report["data"] == "nuts"
    assert report["images"] == {"good": 6, "anomalous": 7}
    for figure in (report["image"]["auroc"], report["image"]["ap"], report["pixel"]["aupro_0.3"]):
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert 0 <= report["pixel"]["aupro_0.05"]["value"] <= 1
    assert set(report["image"]["auroc_of_each_score"]) == {"reconstruction", "latent", "anomaly_map"}
    assert report["reconstruction"]["psnr_db"] > 0
    assert report["reconstruction"]["ssim"] < 1
    assert report["reconstruction"]["sharpness_ratio"] < 1  # an untrained decoder is smooth, noise is not
    assert {kind: found["images"] for kind, found in report["defects"].items()} == {"crack": 4, "hole": 3}
    assert report["images_per_second"] > 0
    assert report["peak_memory_bytes"] > 2**20


def test_evaluation_agrees_with_the_scores_of_the_images(scorer, data):
    measured = measure(scorer, read_dataset(data), QUIET)
    report = evaluated(scorer, data)
    labels = measured.defects != "good"
    assert report["image"]["auroc"]["value"] == roc_auc_score(labels, measured.anomaly_scores)
    holes = (measured.defects == "hole") | ~labels
    assert report["defects"]["hole"]["auroc"]["value"] == roc_auc_score(labels[holes], measured.anomaly_scores[holes])


def test_pixel_figures_are_at_each_images_own_resolution_and_maps_are_kept_at_the_models(scorer, data):
    dataset = read_dataset(data)
    measured = measure(scorer, dataset, QUIET)
    assert {anomaly_map.shape for anomaly_map in measured.maps} == {(32, 32)}
    masks = [mask for mask in measured.masks if mask is not None]
    assert {mask.shape for mask in masks} == {(50, 25), (30, 40)}
    results = score_images(scorer, [image.path for image in dataset.test])
    expected = metrics.pixel_statistics([result.full_map() for result in results], masks)  # type: ignore[union-attr]
    found = pixel_statistics(measured)
    assert found is not None
    for figure in ("values", "above", "at_or_above", "starts", "region_images"):
        assert np.array_equal(getattr(found, figure), getattr(expected, figure)), figure


def test_false_alarms_are_counted_at_alpha_beside_what_alpha_promises(scorer, data):
    measured = measure(scorer, read_dataset(data), QUIET)
    good = measured.p_values[measured.defects == "good"]
    for alpha in (0.05, 0.5, 0.95):
        alarms = evaluated(scorer, data, alpha)["false_alarms"]
        assert alarms["flagged"] == (good <= alpha).sum()
        assert alarms["rate"] == alarms["flagged"] / 6
        assert 0 <= alarms["promised_low"] <= alpha <= alarms["promised_high"] <= 1


def test_pictures_of_one_part_widen_what_alpha_promises(checkpoint, data):
    random = np.random.default_rng(0)
    scores = random.normal(size=(10, 3)).repeat(4, axis=0) + 0.01 * random.normal(size=(40, 3))
    found = []
    for parts in ((), tuple(np.arange(10).repeat(4).tolist())):
        calibration = Calibration(scores, alpha=0.5, parts=parts)
        scorer = replace(checkpoint, calibration=calibration).scorer(torch.device("cpu"))
        found.append(evaluated(scorer, data)["false_alarms"])
    alone, in_parts = found
    assert alone["design_effect"] == 1
    assert in_parts["design_effect"] == pytest.approx(4, rel=0.05)
    assert in_parts["promised_low"] <= alone["promised_low"] < alone["promised_high"] < in_parts["promised_high"]


def test_aupro_over_all_regions_is_the_mean_over_the_kinds(scorer, data):
    report = evaluated(scorer, data)
    kinds = report["defects"].values()  # a region per image
    mean = sum(kind["images"] * kind["aupro_0.3"]["value"] for kind in kinds) / 7
    assert report["pixel"]["aupro_0.3"]["value"] == pytest.approx(mean)


def test_without_masks_there_are_no_pixel_figures(scorer, data):
    for mask in data.rglob("*_mask.png"):
        mask.unlink()
    report = evaluated(scorer, data)
    assert report["pixel"] is None
    assert report["image"] is not None
    assert report["defects"]["crack"]["aupro_0.3"] is None


def test_a_kind_without_masks_takes_no_part_in_the_pixel_figures(scorer, data):
    before = evaluated(scorer, data)
    for mask in (data / "ground_truth/hole").iterdir():
        mask.unlink()
    report = evaluated(scorer, data)
    assert report["defects"]["hole"]["aupro_0.3"] is None
    assert report["defects"]["crack"]["aupro_0.3"] is not None
    assert report["pixel"]["auroc"] != before["pixel"]["auroc"]


def test_without_good_test_images_there_are_no_false_alarms(scorer, data):
    for image in (data / "test/good").iterdir():
        image.unlink()
    report = evaluated(scorer, data)
    assert report["image"] is None
    assert report["false_alarms"] is None
    assert report["reconstruction"] is None
    assert report["generation"] is None
    assert report["details"]["roc"] is None
    assert report["pixel"] is not None
    assert report["defects"]["crack"]["auroc"] is None


def test_without_defects_there_is_a_false_alarm_rate_and_no_auroc(scorer, data):
    for image in [*data.glob("test/crack/*"), *data.glob("test/hole/*")]:
        image.unlink()
    report = evaluated(scorer, data)
    assert report["image"] is None
    assert report["pixel"] is None
    assert report["details"]["overlap"] is None
    assert report["defects"] == {}
    assert report["false_alarms"]["flagged"] <= 6


def test_a_folder_without_a_test_split_is_refused(scorer, tmp_path):
    _write(tmp_path / "nuts/0.png", png())
    with pytest.raises(DataError, match="no test images in"):
        evaluated(scorer, tmp_path / "nuts")


def test_every_unreadable_test_image_is_named(scorer, data):
    (data / "test/crack/1.png").write_bytes(b"")
    (data / "test/good/3.png").write_bytes(png()[:-30])
    with pytest.raises(DataError, match="2 of 13 test images cannot be read") as raised:
        evaluated(scorer, data)
    assert "crack/1.png: image_empty: the file is empty." in str(raised.value)
    assert "good/3.png: image_truncated" in str(raised.value)


def test_an_alpha_that_cannot_be_resolved_is_refused_before_anything_is_scored(scorer, data):
    (data / "test/crack/1.png").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"alpha is 0\.01"):
        evaluated(scorer, data, 0.01)


@pytest.mark.parametrize("left_out", ["", "ground_truth", "test/good", "test/crack"])
def test_the_report_is_printed_and_written_whatever_it_lacks(scorer, data, tmp_path, left_out):
    if left_out:
        (data / left_out).rename(tmp_path / "elsewhere")
    report = evaluated(scorer, data)
    write_report(report, tmp_path / "deep/evaluation.json")
    assert json.loads((tmp_path / "deep/evaluation.json").read_text()) == report
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    assert ("image AUROC" in text) == (report["image"] is not None)
    assert ("pixel AUPRO@0.3" in text) == (report["pixel"] is not None)
    assert ("false alarms at alpha 0.05" in text) == (report["false_alarms"] is not None)
    assert all(kind in text for kind in report["defects"])


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_report({}, tmp_path / "file" / "evaluation.json")


def test_a_full_disk_keeps_the_last_report(tmp_path):
    path = tmp_path / "evaluation.json"
    write_report({"data": "nuts"}, path)
    before = path.read_text()
    with largest_file(100), pytest.raises(DataError, match="File too large"):
        write_report({"data": "n" * 1000}, path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_reconstruction_and_generation_are_measured_on_as_many_images_as_there_are_good_ones(scorer, data):
    measured = measure(scorer, read_dataset(data), QUIET)
    reconstruction, generation = reconstruction_quality(measured), generation_quality(scorer, measured)
    assert reconstruction is not None
    assert generation is not None
    assert reconstruction["images"] == generation["samples"] == 6
    assert reconstruction["ms_ssim"] is None  # of 32 pixels
    images, made = torch.stack(measured.good_images), torch.stack(measured.good_reconstructions)
    assert reconstruction["sharpness_ratio"] == fidelity.sharpness_ratio(made, images)
    assert reconstruction["frechet_random_features"] == pytest.approx(
        fidelity.frechet_distance(fidelity.random_features(made), fidelity.random_features(images))
    )
    # An untrained decoder makes nothing like these images, which are noise.
    assert generation["frechet_random_features"] > reconstruction["frechet_floor"] == generation["frechet_floor"] > 0
    assert generation["sharpness_ratio"] < 1
    assert list(generation["octave_ratios"]) == list(fidelity.OCTAVES)
    assert generation_quality(scorer, measured) == generation  # the same draws from the prior


def test_samples_of_a_model_that_scores_in_tiles_are_compared_with_tiles(checkpoint, data):
    config = replace(checkpoint.config, image_size=64, tile=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = ScoringNetworks(config, Standardisation()).eval()
    fusion = MapFusion(torch.zeros(2, 16, 16), torch.ones(2, 16, 16), torch.zeros(4), torch.ones(4))
    scorer = replace(checkpoint, networks=networks, fusion=fusion).scorer(torch.device("cpu"))
    measured = measure(scorer, read_dataset(data), QUIET)
    generation = generation_quality(scorer, measured)
    assert generation is not None
    assert generation["samples"] == 6
    cuts = windows(64, 32)
    tiles = torch.stack([image[..., *cuts[index % len(cuts)]] for index, image in enumerate(measured.good_images)])
    assert tiles.shape == (6, 3, 32, 32)
    assert generation["frechet_floor"] == fidelity.frechet_floor(fidelity.random_features(tiles))


def test_one_good_image_has_no_distance_and_fewer_than_four_no_floor(scorer, data):
    for index in (1, 2, 3, 4, 5):
        (data / f"test/good/{index}.png").unlink()
    measured = measure(scorer, read_dataset(data), QUIET)
    for figures in (reconstruction_quality(measured), generation_quality(scorer, measured)):
        assert figures is not None
        assert figures["frechet_random_features"] is figures["frechet_floor"] is None


def test_details_are_of_each_image_and_agree_with_the_figures(scorer, data):
    report = evaluated(scorer, data, 0.5)
    details = report["details"]
    rows = details["images"]
    assert [row["file"] for row in rows[:2]] == ["crack/0.png", "crack/1.png"]
    assert [row["kind"] for row in rows] == ["crack"] * 4 + ["good"] * 6 + ["hole"] * 3
    assert set(rows[0]["scores"]) == {"reconstruction", "latent", "anomaly_map"}
    flagged = [row["anomaly_score"] > details["score_level"] for row in rows]
    assert flagged == [row["p_value"] <= 0.5 for row in rows]
    assert sum(flagged[4:10]) == report["false_alarms"]["flagged"]
    area = np.trapezoid(details["roc"]["found"], details["roc"]["false_positive_rate"])
    assert area == pytest.approx(report["image"]["auroc"]["value"])
    area = np.trapezoid(details["overlap"]["found"], details["overlap"]["false_positive_rate"]) / 0.3
    assert area == pytest.approx(report["pixel"]["aupro_0.3"]["value"], abs=2e-3)
    assert len(details["roc"]["found"]) <= 200 >= len(details["overlap"]["found"])


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.951])
def test_the_level_of_the_score_parts_what_is_flagged_from_what_is_not(scorer, alpha):
    calibration = scorer.calibration
    level = score_level(calibration, alpha)
    scores = np.concatenate([calibration.good_scores, calibration.good_scores + 1e-9, [-1e6, 1e6]])
    assert ((calibration.p_value(scores) <= alpha) == (scores > level)).all()


def test_the_worst_cases_are_pictured_the_worst_first(scorer, data, tmp_path):
    dataset = read_dataset(data)
    measured = measure(scorer, dataset, QUIET)
    cases = write_cases(scorer, dataset, measured, alpha=0.05, folder=tmp_path / "out/evaluation")
    for name, good in (("defects", False), ("good", True)):
        scores = measured.anomaly_scores[measured.anomalous != good].tolist()
        shown = [case["image"] for case in cases[name]]
        assert measured.anomaly_scores[shown].tolist() == sorted(scores, reverse=good)[:CASES]
        assert (measured.anomalous[shown] != good).all()
        for case in cases[name]:
            with Image.open(tmp_path / "out" / case["picture"]) as picture:
                assert max(picture.height, (picture.width - GAP) / 2) == PICTURE_SIDE


def test_a_case_shows_the_masks_outline_beside_the_map(scorer, data):
    """The mask is rows 5 to 9 and columns 8 to 13 of 30 x 40."""
    image = next(image for image in read_dataset(data).test if image.path.name == "1.png" and image.defect == "crack")
    (result,) = score_images(scorer, [image.path])
    assert isinstance(result, ScoredImage)
    pixels = np.asarray(case_picture(image, result, level=1e9))  # (168, 2 * 224 + 6, 3)
    assert pixels.shape == (168, 2 * PICTURE_SIDE + GAP, 3)
    rows, columns = np.nonzero((pixels == OUTLINE).all(axis=2))
    scale = PICTURE_SIDE / 40
    assert (columns.min() / scale, columns.max() / scale) == pytest.approx((8, 14), abs=0.5)
    assert (rows.min() / scale, rows.max() / scale) == pytest.approx((5, 10), abs=0.5)
    outlined = (pixels[:, :PICTURE_SIDE] == OUTLINE).all(axis=2)
    # Without a map above its level the right half is the image itself.
    assert (pixels[:, :PICTURE_SIDE][~outlined] == pixels[:, PICTURE_SIDE + GAP :][~outlined]).all()


def test_pictures_that_cannot_be_written_are_one_sentence(scorer, data, tmp_path):
    (tmp_path / "file").write_text("")
    dataset = read_dataset(data)
    measured = measure(scorer, dataset, QUIET)
    with pytest.raises(DataError, match="cannot write the pictures"):
        write_cases(scorer, dataset, measured, alpha=0.05, folder=tmp_path / "file/evaluation")


def test_pictures_have_a_folder_of_the_reports_name(tmp_path):
    assert pictures_folder(tmp_path / "evaluation.json") == tmp_path / "evaluation"
    assert pictures_folder(tmp_path / "other.json") == tmp_path / "other"
    assert pictures_folder(tmp_path / "plain") == tmp_path / "plain.pictures"


def test_what_there_is_of_each_image_is_left_out_of_a_checkpoint():
    assert without_details({"image": {"auroc": 1}, "details": {"images": [1, 2]}}) == {"image": {"auroc": 1}}
