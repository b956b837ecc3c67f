"""hazelnut compare: who is grouped with whom, means and intervals over seeds, the table and the page."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from hazelnut import app
from models.errors import TrainingError
from training.compare import FIGURES, grouped, mean_interval, print_comparison
from training.config import load_recipe
from training.run_folder import RunFolder, read_run_folder


def write_run(root: Path, name: str, *changes: str, data: str = "nuts", recipe: str = "tiny", **figures: float) -> Path:
    """An evaluated run in the format of one; figures: image AUROC and what else of the evaluation, by its key."""
    folder = root / name
    (folder).mkdir(parents=True)
    values = load_recipe(recipe, list(changes))
    record = {"recipe": vars(values), "name": data, "training_images_sha256": "0" * 64, "command": f"hazelnut {name}"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text(json.dumps({"step": 800, "images_per_second": 40.0, "reconstruction": 0.1}))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(data, **figures)))
    return folder


def evaluation(data: str, *, auroc: float = 0.8, **figures: float) -> dict[str, Any]:
    interval = {"value": auroc, "low": auroc - 0.1, "high": auroc + 0.1}
    made = {
        "psnr_db": 25.0,
        "ssim": 0.8,
        "ms_ssim": None,
        "sharpness_ratio": 0.5,
        "variety_ratio": 0.9,
        "frechet_random_features": 2.0,
        "frechet_floor": 0.125,
    }
    return {
        "data": data,
        "images": {"good": 10, "anomalous": 20},
        "image": {"auroc": interval, "ap": interval},
        "pixel": {"auroc": 0.9, "aupro_0.3": interval, "aupro_0.05": interval},
        "reconstruction": made | figures,
        "generation": made | figures,
        "false_alarms": {"rate": 0.1},
        "details": {"images": [{"file": "good/0.png"}]},
    }


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


def read(folders: list[Path]) -> list[RunFolder]:
    return [read_run_folder(folder) for folder in folders]


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    folders = [
        write_run(tmp_path, "a1", "seed=1", auroc=0.7),
        write_run(tmp_path, "b0", "batch_norm=after", auroc=0.5),
        write_run(tmp_path, "a0", auroc=0.9),
        write_run(tmp_path, "other data", "seed=2", data="bolts"),
    ]
    groups = grouped(read(folders))
    assert [(group.label, group.data, [run.folder.name for run in group.runs]) for group in groups] == [
        ("tiny", "nuts", ["a0", "a1"]),
        ("tiny, batch_norm=after", "nuts", ["b0"]),
        ("tiny", "bolts", ["other data"]),
    ]
    assert groups[0].values("image AUROC") == [0.9, 0.7]


def test_other_test_images_of_the_same_name_are_other_data(tmp_path):
    folders = [write_run(tmp_path, "a"), write_run(tmp_path, "b", "seed=1")]
    changed = json.loads((folders[1] / "evaluation.json").read_text())
    changed["details"]["images"][0]["file"] = "good/1.png"
    (folders[1] / "evaluation.json").write_text(json.dumps(changed))
    assert [len(group.runs) for group in grouped(read(folders))] == [1, 1]


def test_a_label_leaves_out_what_was_changed_in_all(tmp_path):
    folders = [
        write_run(tmp_path, "a", "steps=100"),
        write_run(tmp_path, "b", "steps=100", "latent_loss=wgan-gp", "batch_norm=after"),
        write_run(tmp_path, "c", "steps=100", recipe="default"),
    ]
    labels = [group.label for group in grouped(read(folders))]
    assert labels == ["tiny", "tiny, batch_norm=after, latent_loss=wgan-gp", "default"]


def test_the_nearest_recipe_is_named_with_what_was_changed_in_it(tmp_path):
    (run,) = read([write_run(tmp_path, "a", "steps=100", "batch_norm=after", "seed=7")])
    assert run.recipe == ("tiny", {"steps": 100, "batch_norm": "after"})


def test_a_run_of_the_same_seed_twice_is_refused(tmp_path):
    folders = [write_run(tmp_path, "a", auroc=0.7), write_run(tmp_path, "b", auroc=0.9)]
    with pytest.raises(TrainingError, match=r"a and .*b have the same recipe, data and seed, 0"):
        grouped(read(folders))


def test_an_interval_over_seeds_is_students_t():
    # Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.3027 standard errors with two degrees of freedom.
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean_interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_table_has_means_with_intervals_and_one_run_alone_has_none(tmp_path):
    folders = [write_run(tmp_path, f"a{seed}", f"seed={seed}", auroc=0.7 + 0.1 * seed) for seed in range(3)]
    folders.append(write_run(tmp_path, "b", "batch_norm=after", auroc=0.612))
    console = Console(width=80, file=io.StringIO(), record=True)
    print_comparison(grouped(read(folders)), console)
    shown = console.export_text()
    row, alone = re.split(r"batch_norm=after", shown)
    assert "0.800" in row
    assert "± 0.248" in row  # 4.3027 * 0.1 / sqrt(3)
    assert "(3 seeds)" in row
    assert "0.612" in alone
    assert "±" not in alone.partition("Mean over")[0]
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_compare_writes_a_page_with_every_figure_and_what_differs(tmp_path):
    folders = [
        write_run(tmp_path, "a0", auroc=0.7),
        write_run(tmp_path, "a1", "seed=1", auroc=0.8, sharpness_ratio=0.25),
        write_run(tmp_path, "b", "batch_norm=after", "steps=100"),
        write_run(tmp_path, "c", data="<bolts>"),
    ]
    result = compare(*folders, f"--out={tmp_path / 'deep/page.html'}")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"written to {tmp_path / 'deep/page.html'}\n")
    page = (tmp_path / "deep/page.html").read_text()
    assert "4 runs on nuts, &lt;bolts&gt;" in page
    assert "<bolts>" not in page
    assert "Two halves of the good ones are at a Fréchet distance of 0.125 from each other." in page
    for figure in FIGURES:
        missing = figure == "MS-SSIM"  # of small images there is none
        assert (f'<th scope="col">{figure.replace(chr(39), "&#39;")}</th>' in page) != missing
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["tiny", "2", "0.750 ± 0.635"] in [row[:3] for row in rows]
    assert ["tiny, batch_norm=after, steps=100", "1", "0.800"] in [row[:3] for row in rows]
    differences = rows[rows.index(["recipe", "tiny", "tiny, batch_norm=after, steps=100"]) :][1:3]
    assert differences == [["batch_norm", "before", "after"], ["steps", "800", "100"]]
    assert [str(tmp_path / "a1"), "1", "800", "5.3", "0", "0.800", "0.70 to 0.90"] in rows
    assert set(re.findall(r"[a-z]+://[^\s\"'<>)]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 20


def test_runs_that_differ_in_nothing_but_seeds_say_so(tmp_path):
    folders = [write_run(tmp_path, f"a{seed}", f"seed={seed}") for seed in range(2)]
    assert compare(*folders, f"--out={tmp_path / 'page.html'}").exit_code == 0
    assert "Nowhere, the seed aside." in (tmp_path / "page.html").read_text()


def test_figures_that_an_evaluation_lacks_are_dashes(tmp_path):
    folders = [write_run(tmp_path, "a"), write_run(tmp_path, "b", "steps=100")]
    lacking = json.loads((folders[0] / "evaluation.json").read_text())
    lacking |= {"image": None, "pixel": None, "reconstruction": None, "generation": None, "false_alarms": None}
    (folders[0] / "evaluation.json").write_text(json.dumps(lacking))
    result = compare(*folders, f"--out={tmp_path / 'page.html'}")
    assert result.exit_code == 0, result.output
    assert "-" in result.stdout.partition("tiny")[2].splitlines()[0]


def test_a_run_without_an_evaluation_is_refused_with_what_to_do(tmp_path):
    folders = [write_run(tmp_path, "a"), write_run(tmp_path, "b", "seed=1")]
    (folders[1] / "evaluation.json").unlink()
    result = compare(*folders, f"--out={tmp_path / 'page.html'}")
    assert result.exit_code == 1
    assert (
        result.stderr == f"hazelnut: {folders[1]} has no evaluation.json: "
        f"hazelnut evaluate {folders[1]}/checkpoint DATA writes it.\n"
    )
    assert not (tmp_path / "page.html").exists()


def test_an_evaluation_with_another_definition_of_sharpness_is_refused(tmp_path):
    folder = write_run(tmp_path, "a")
    older = json.loads((folder / "evaluation.json").read_text())
    del older["generation"]
    (folder / "evaluation.json").write_text(json.dumps(older))
    assert "was written by an older Hazelnut" in compare(folder).stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    result = compare(write_run(tmp_path, "a"), tmp_path / "nowhere")
    assert result.exit_code == 1
    assert result.stderr == f"hazelnut: there is no run in {tmp_path / 'nowhere'}.\n"
