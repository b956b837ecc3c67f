"""Scoring files from the command line: rows, order, bad files, overlays."""

import csv
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.calibration import SCORE_NAMES, Calibration
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.errors import CalibrationError, DataError
from models.images import decode_image, image_tensor
from models.maps import MapFusion
from models.networks import ScoringNetworks, Standardisation
from models.overlay import BOX_COLOUR
from models.scoring import Scorer, regions
from tests.conftest import png
from training.inference import (
    BATCH,
    CSV_HEADER,
    FailedImage,
    ScoredImage,
    find_images,
    score_images,
    write_overlay,
    write_rows,
)


@pytest.fixture
def scorer(checkpoint: Checkpoint) -> Scorer:
    return checkpoint.scorer(torch.device("cpu"))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_images(folder: Path, count: int) -> list[Path]:
    return [write(folder / f"{index:03}.png", png(seed=index)) for index in range(count)]


def bad_files(folder: Path) -> list[Path]:
    return [
        write(folder / "empty.png", b""),
        write(folder / "text.png", b"not an image"),
        write(folder / "short.png", png()[:-20]),
        folder / "absent.png",
    ]


def rows_of(
    scorer: Scorer, paths: list[Path], *, alpha: float = 0.05, as_csv: bool = True, overlays: Path | None = None
) -> tuple[int, list[str]]:
    """How many files failed, and the lines written."""
    output = io.StringIO()
    failed = write_rows(scorer, paths, output, alpha=alpha, as_csv=as_csv, overlays=overlays, advance=lambda: None)
    return failed, output.getvalue().splitlines()


def size_of(picture: Path) -> tuple[int, int]:
    return decode_image(picture.read_bytes()).size


# Finding images


def test_files_are_taken_as_they_are_and_folders_by_their_images_in_order(tmp_path):
    paths = [write(tmp_path / name, b"") for name in ("b/2.png", "b/deep/1.PNG", "z.png", "a/odd.txt")]
    write(tmp_path / "b/notes.txt", b"")
    write(tmp_path / "b/.hidden.png", b"")
    # A file that is named is tried, whatever it is called.
    assert find_images([paths[3], tmp_path / "b", paths[2], tmp_path / "absent.png"]) == [
        paths[3],
        paths[0],
        paths[1],
        paths[2],
        tmp_path / "absent.png",
    ]


def test_a_folder_without_images_is_refused_by_name(tmp_path):
    write(tmp_path / "empty/notes.txt", b"")
    with pytest.raises(DataError, match=r"no images in .*empty"):
        find_images([*write_images(tmp_path / "full", 1), tmp_path / "empty"])


# Scoring


def test_scores_equal_those_of_the_scorer_on_each_image_alone(tmp_path, scorer):
    paths = write_images(tmp_path, BATCH + 3)
    results = list(score_images(scorer, paths))
    assert [result.path for result in results] == paths
    for result in results:
        assert isinstance(result, ScoredImage)
        pixels = image_tensor(decode_image(result.path.read_bytes()), channels=3, size=32)
        expected = scorer.score(pixels[None])
        assert result.scores == pytest.approx(expected.named(0), abs=1e-4)
        assert result.anomaly_score == pytest.approx(expected.anomaly_score[0], abs=1e-4)
        assert result.p_value == expected.p_value[0]
        assert result.anomaly_map == pytest.approx(expected.maps[0], abs=1e-4)
        assert torch.equal(result.pixels, pixels)
        assert result.reconstruction is not None
        assert torch.allclose(result.reconstruction, scorer.compute(pixels[None])[2][0], atol=1e-4)


def test_an_image_is_kept_at_its_own_resolution_and_so_is_its_map(tmp_path, scorer):
    paths = [write(tmp_path / "wide.png", png(size=(70, 20))), write(tmp_path / "high.png", png(size=(15, 90)))]
    wide, high = score_images(scorer, paths)
    assert isinstance(wide, ScoredImage)
    assert isinstance(high, ScoredImage)
    assert (wide.image.size, wide.full_map().shape) == ((70, 20), (20, 70))
    assert (high.image.size, high.full_map().shape) == ((15, 90), (90, 15))
    assert wide.anomaly_map.shape == (32, 32)
    assert wide.full_map().max() <= wide.anomaly_map.max()


def test_a_bad_file_is_a_result_in_its_place_and_its_neighbours_are_scored_as_without_it(tmp_path, scorer):
    good, bad = write_images(tmp_path, 5), bad_files(tmp_path)
    mixed = [bad[0], good[0], bad[1], good[1], good[2], bad[2], bad[3], good[3], good[4]]
    results = list(score_images(scorer, mixed))
    assert [result.path for result in results] == mixed
    errors = {result.path: result.error for result in results if isinstance(result, FailedImage)}
    assert list(errors) == bad
    for path, reason in zip(bad, ["image_empty: ", "image_format: ", "image_truncated: ", "file: "], strict=True):
        assert errors[path].startswith(reason)
    scored = [result for result in results if isinstance(result, ScoredImage)]
    for result, alone in zip(scored, score_images(scorer, good), strict=True):
        assert isinstance(alone, ScoredImage)
        assert result.scores == pytest.approx(alone.scores, abs=1e-4)


def test_a_whole_batch_of_bad_files_is_passed_over(tmp_path, scorer):
    paths = [write(tmp_path / f"{index:03}.png", b"not an image") for index in range(BATCH)]
    results = list(score_images(scorer, [*paths, *write_images(tmp_path / "good", 2)]))
    assert [type(result) for result in results] == [FailedImage] * BATCH + [ScoredImage] * 2


def test_large_images_are_scored_few_at_once(tmp_path, monkeypatch, checkpoint):
    """As many as have the pixels of a batch of 256 x 256."""
    monkeypatch.setattr("training.inference.BATCH", 8)
    config = ModelConfig(image_size=512, width=8, latent_dim=4)
    networks = ScoringNetworks(config, Standardisation())
    fusion = MapFusion(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.zeros(2), torch.ones(2))
    scorer = replace(checkpoint, networks=networks, fusion=fusion).scorer(torch.device("cpu"))
    batches: list[int] = []
    networks.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    assert len(list(score_images(scorer, write_images(tmp_path, 3)))) == 3
    assert batches == [2, 1]


def test_files_are_read_no_further_than_a_batch_ahead(tmp_path, scorer):
    paths = write_images(tmp_path, BATCH + 1)
    results = score_images(scorer, paths)
    next(results)
    paths[-1].unlink()
    assert isinstance(list(results)[-1], FailedImage)


# Rows


def test_csv_rows_hold_the_scores_under_the_stated_header(tmp_path, scorer):
    paths = write_images(tmp_path, 3)
    failed, lines = rows_of(scorer, paths)
    assert failed == 0
    assert lines[0] == "file,reconstruction,latent,anomaly_map,anomaly_score,p_value,is_anomalous,error"
    rows = list(csv.DictReader(lines))
    for row, path, result in zip(rows, paths, score_images(scorer, paths), strict=True):
        assert isinstance(result, ScoredImage)
        assert row["file"] == str(path)
        assert {name: float(row[name]) for name in SCORE_NAMES} == result.scores
        assert float(row["anomaly_score"]) == result.anomaly_score
        assert float(row["p_value"]) == result.p_value
        assert row["is_anomalous"] == ("true" if result.p_value <= 0.05 else "false")
        assert row["error"] == ""


def test_csv_rows_of_bad_files_have_their_error_and_no_scores(tmp_path, scorer):
    bad = bad_files(tmp_path)
    failed, lines = rows_of(scorer, [*bad[:2], *write_images(tmp_path, 1), *bad[2:]])
    rows = list(csv.DictReader(lines))
    assert failed == 4
    assert [bool(row["error"]) for row in rows] == [True, True, False, True, True]
    assert rows[1] == dict.fromkeys(CSV_HEADER, "") | {
        "file": str(bad[1]),
        "error": "image_format: the file is not a PNG, JPEG, WebP, BMP or TIFF image.",
    }
    assert rows[4]["error"] == "file: No such file or directory"


@pytest.mark.parametrize("name", ["a,b.png", 'a "b".png', "a\nb.png", "größe.png", " .png"])
def test_csv_rows_survive_any_name_of_a_file(tmp_path, scorer, name):
    path = write(tmp_path / name, png())
    output = io.StringIO()
    write_rows(scorer, [path], output, alpha=0.05, as_csv=True, overlays=None, advance=lambda: None)
    output.seek(0)
    header, row = csv.reader(output)
    assert header == CSV_HEADER
    assert row[0] == str(path)
    assert len(row) == len(header)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize("as_csv", [True, False])
def test_a_name_that_is_not_utf8_does_not_fail_its_neighbours(tmp_path, scorer, as_csv):
    odd = write(tmp_path / os.fsdecode(b"gr\xf6\xdfe.png"), png())
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    paths = [odd, *write_images(tmp_path, 1)]
    write_rows(scorer, paths, stdout, alpha=0.05, as_csv=as_csv, overlays=None, advance=lambda: None)
    stdout.seek(0)
    assert str(paths[1]) in stdout.read()


def test_text_rows_hold_verdict_p_value_scores_and_file(tmp_path, scorer):
    paths = [*write_images(tmp_path, 2), *bad_files(tmp_path)[:1]]
    failed, lines = rows_of(scorer, paths, as_csv=False)
    assert failed == 1
    assert len(lines) == 3
    for line, path, result in zip(lines, paths[:2], score_images(scorer, paths[:2]), strict=False):
        assert isinstance(result, ScoredImage)
        assert line.split()[0] == ("anomalous" if result.p_value <= 0.05 else "normal")
        assert f"p {result.p_value:.3f}" in line
        assert f"score {result.anomaly_score:7.2f}" in line
        assert all(f"{name} {value:.4f}" in line for name, value in result.scores.items())
        assert line.endswith(str(path))
    assert lines[2].split()[0] == "error"
    assert str(paths[2]) in lines[2]
    assert "image_empty" in lines[2]


def test_the_verdict_is_of_the_alpha_that_was_asked_for(tmp_path, checkpoint):
    """A p-value of 2 / 20 is normal at 0.05 and anomalous at 0.1, where it is just reached."""
    path = write(tmp_path / "nut.png", png())
    (result,) = score_images(checkpoint.scorer(torch.device("cpu")), [path])
    assert isinstance(result, ScoredImage)
    # Calibration images that are a little less anomalous than this one, and one that is far more.
    scores = np.array([list(result.scores.values())] * 19) - np.linspace(0.1, 0.2, 19)[:, None]
    scores[0] += 10
    calibrated = replace(checkpoint, calibration=Calibration(scores=scores, alpha=0.05))
    scorer = calibrated.scorer(torch.device("cpu"))
    (result,) = score_images(scorer, [path])
    assert isinstance(result, ScoredImage)
    assert result.p_value == 2 / 20
    verdicts = []
    for alpha in (0.05, 0.0999, 0.1, 0.5):
        _, lines = rows_of(scorer, [path], alpha=alpha)
        verdicts.append(next(csv.DictReader(lines))["is_anomalous"])
    assert verdicts == ["false", "false", "true", "true"]


def test_an_alpha_that_the_calibration_cannot_resolve_is_refused_before_any_row(tmp_path, scorer):
    output = io.StringIO()
    with pytest.raises(CalibrationError, match=r"alpha is 0\.01"):
        write_rows(
            scorer,
            write_images(tmp_path, 1),
            output,
            alpha=0.01,
            as_csv=True,
            overlays=None,
            advance=lambda: None,
        )
    assert output.getvalue() == ""


def test_progress_is_told_once_per_file_good_or_bad(tmp_path, scorer):
    calls = []
    paths = [*write_images(tmp_path, 2), *bad_files(tmp_path)]
    write_rows(scorer, paths, io.StringIO(), alpha=0.05, as_csv=True, overlays=None, advance=lambda: calls.append(1))
    assert len(calls) == len(paths)


# Overlays


def test_overlays_are_written_at_the_size_of_their_images_and_none_for_bad_files(tmp_path, scorer):
    wide = write(tmp_path / "wide.png", png(size=(70, 20)))
    gray = tmp_path / "gray.bmp"
    Image.new("L", (15, 90), 128).save(gray)
    overlays = tmp_path / "out/overlays"
    rows_of(scorer, [wide, *bad_files(tmp_path), gray], overlays=overlays)
    assert sorted(path.name for path in overlays.iterdir()) == ["gray.bmp.overlay.png", "wide.png.overlay.png"]
    assert size_of(overlays / "wide.png.overlay.png") == (70, 20)
    assert size_of(overlays / "gray.bmp.overlay.png") == (15, 90)


def test_an_overlay_marks_what_is_above_the_level_and_nothing_below_half_of_it(tmp_path, scorer):
    path = write(tmp_path / "nut.png", png())
    (result,) = score_images(scorer, [path])
    assert isinstance(result, ScoredImage)
    original = np.asarray(result.image)
    write_overlay(result, tmp_path / "calm.png", level=2.1 * float(result.anomaly_map.max()))
    write_overlay(result, tmp_path / "marked.png", level=0.5 * float(result.anomaly_map.max()))
    calm, marked = (decode_image((tmp_path / name).read_bytes()) for name in ("calm.png", "marked.png"))
    assert np.array_equal(np.asarray(calm), original)
    assert not np.array_equal(np.asarray(marked), original)


def test_an_overlay_has_a_box_around_each_region_in_the_images_own_pixels(tmp_path, scorer):
    (result,) = score_images(scorer, [write(tmp_path / "nut.png", png(size=(70, 50)))])
    assert isinstance(result, ScoredImage)
    level = 0.99 * float(result.anomaly_map.max())
    write_overlay(result, tmp_path / "overlay.png", level=level)
    picture = decode_image((tmp_path / "overlay.png").read_bytes())
    found = regions(result.anomaly_map, level=level, width=70, height=50)
    assert found
    for region in found:
        for across in (region.left, region.left + region.width - 1):
            for down in (region.top, region.top + region.height - 1):
                assert picture.getpixel((across, down)) == BOX_COLOUR


def test_images_of_one_name_in_different_folders_have_overlays_of_their_own(tmp_path, scorer):
    paths = [
        write(tmp_path / "monday/nut.png", png(size=(20, 20))),
        write(tmp_path / "tuesday/nut.png", png(size=(30, 30))),
        write(tmp_path / "tuesday/nut.webp", png(size=(40, 40))),
    ]
    rows_of(scorer, paths, overlays=tmp_path / "overlays")
    found = {path.relative_to(tmp_path / "overlays") for path in (tmp_path / "overlays").rglob("*.png")}
    assert found == {
        Path("monday/nut.png.overlay.png"),
        Path("tuesday/nut.png.overlay.png"),
        Path("tuesday/nut.webp.overlay.png"),
    }
    sizes = [size_of(tmp_path / "overlays" / path) for path in sorted(found)]
    assert sizes == [(20, 20), (30, 30), (40, 40)]


def test_images_given_by_paths_with_dots_have_their_overlays_within_the_folder(tmp_path, scorer, monkeypatch):
    write(tmp_path / "work/nut.png", png())
    write(tmp_path / "nut.png", png())
    monkeypatch.chdir(tmp_path / "work")
    rows_of(scorer, [Path("../nut.png"), Path("nut.png"), Path("./../work/nut.png")], overlays=Path("overlays"))
    inside = set((tmp_path / "work/overlays").rglob("*.overlay.png"))
    assert set(tmp_path.rglob("*.overlay.png")) == inside
    assert len(inside) == 2


def test_overlays_of_images_given_by_relative_paths_do_not_repeat_the_way_to_them(tmp_path, scorer, monkeypatch):
    write(tmp_path / "deep/below/nut.png", png())
    monkeypatch.chdir(tmp_path)
    rows_of(scorer, [Path("deep/below/nut.png")], overlays=Path("overlays"))
    assert (tmp_path / "overlays/nut.png.overlay.png").is_file()


def test_an_overlay_of_an_earlier_call_is_replaced(tmp_path, scorer):
    path = write(tmp_path / "nut.png", png())
    overlay = write(tmp_path / "overlays/nut.png.overlay.png", b"old")
    rows_of(scorer, [path], overlays=tmp_path / "overlays")
    assert overlay.read_bytes().startswith(b"\x89PNG")


def test_an_overlay_folder_that_cannot_be_written_is_refused_by_name(tmp_path, scorer):
    path = write(tmp_path / "nut.png", png())
    file = write(tmp_path / "overlays", b"a file, not a folder")
    with pytest.raises(DataError, match=r"cannot write the overlay .*overlays/nut\.png\.overlay\.png"):
        rows_of(scorer, [path], overlays=file)
