"""hazelnut report: of a real run, and of runs that lack or hold this and that; and the page's own soundness."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hazelnut import app
from models.errors import DataError, TrainingError
from training import charts
from training.demo import write_demo
from training.report import DIAGNOSTICS, LOSSES, write_run_report

SMALL = ["--recipe=tiny", *(f"--set={change}" for change in ("image_size=32", "width=8", "batch_size=4", "steps=20"))]
# Names of formats, which nothing is fetched from.
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps, trained and evaluated by the command line; its data is gone."""
    root = tmp_path_factory.mktemp("report")
    write_demo(root / "gears", seed=0, training=24, good=5, per_kind=2)
    run = root / "run"
    for call in (
        ["train", root / "gears", *SMALL, "--set=alpha=0.2", f"--out={run}"],
        ["evaluate", run / "checkpoint", root / "gears"],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in call])
        assert result.exit_code == 0, result.output
    shutil.rmtree(root / "gears")
    return run


@pytest.fixture(scope="module")
def page(evaluated: Path) -> str:
    """Its report, with pictures."""
    add_pictures(evaluated)
    result = CliRunner().invoke(app, ["report", str(evaluated)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"written to {evaluated / 'report.html'}\n"
    return (evaluated / "report.html").read_text()


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, without the log: its curves take the time."""
    copy = Path(shutil.copytree(evaluated, tmp_path / "run"))
    for left_out in ("log.jsonl", "findings.jsonl", "report.html"):
        (copy / left_out).unlink(missing_ok=True)
    return copy


@pytest.fixture
def bare(run: Path) -> Path:
    """One that was not evaluated either."""
    (run / "evaluation.json").unlink()
    return run


def report(run: Path) -> str:
    return write_run_report(run).read_text()


def text(page: str) -> str:
    """What a reader sees, on one line."""
    page = re.sub(r"<(style|title)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_evaluation(run: Path, **changes: Any) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | changes))


def add_pictures(run: Path) -> None:
    (run / "pictures").mkdir(exist_ok=True)
    for name in ("step-000005", "step-000010", "step-000020", "interpolations"):
        Image.new("RGB", (30, 20), (200, 10, 10)).save(run / "pictures" / f"{name}.png")


def test_the_report_of_a_run_tells_what_it_was_and_what_came_of_it(evaluated, page):
    shown = text(page)
    evaluation = json.loads((evaluated / "evaluation.json").read_text())
    assert "gears: tiny with " in shown
    assert "image_size=32" in shown
    assert "Finished: step 20 of 20" in shown
    assert f"image AUROC {evaluation['image']['auroc']['value']:.3f}" in shown
    assert f"pixel AUPRO@0.3 {evaluation['pixel']['aupro_0.3']['value']:.3f}" in shown
    assert f"PSNR, dB {evaluation['reconstruction']['psnr_db']:.3g} -" in shown
    assert f"{evaluation['reconstruction']['frechet_floor']:.3g} from each other" in shown
    assert "Of 5 good and 8 anomalous test images of gears." in shown
    for heading in ("Scores by kind", "ROC", "Per-region overlap", "Energy by octave", "Image adversary"):
        assert heading in shown
    for kind in evaluation["defects"]:
        assert f"{kind} (2)" in shown  # above its histogram


def test_the_report_asks_for_nothing_from_outside(page):
    assert set(re.findall(r"[a-z]+://[^\s\"'<>)]*", page)) <= NAMESPACES
    assert "<script" not in page
    assert "@import" not in page
    sources = re.findall(r'(?:src|href|xlink:href|srcset|action)="([^"]*)"', page)
    assert {source.partition(",")[0] if source[0] != "#" else "#" for source in sources} == {
        "data:image/png;base64",
        "#",
    }
    assert {target[0] for target in re.findall(r"url\(([^)]*)\)", page)} <= {"#"}


def test_every_id_of_the_page_is_there_once_and_every_reference_leads_to_one(page):
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 20
    references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)
    assert references
    assert {first or second for first, second in references} <= set(ids)


def test_charts_take_the_pages_colours_and_none_of_their_own(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    (light, dark) = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--([a-z0-9-]+):", scheme))


def test_the_same_run_gives_the_same_report(evaluated, page):
    assert report(evaluated) == page


def test_findings_stand_at_the_top_with_step_and_advice(bare):
    write_lines(
        bare / "findings.jsonl",
        {"step": 10, "name": "constant_loss", "figure": 0.6931, "message": "no change since step 5: try <gan> & co."},
    )
    write_lines(bare / "log.jsonl", {"step": 10, "images_per_second": 5.0, "reconstruction": 0.5})
    page = report(bare)
    shown = text(page)
    assert "step 10: constant loss no change since step 5: try &lt;gan&gt; &amp; co." in shown
    assert page.index("constant loss") < page.index("<h2>Detection")
    assert "the steps of the findings" in shown


def test_a_run_that_was_not_watched_is_not_called_sound(bare):
    write_lines(bare / "log.jsonl", {"step": 10, "images_per_second": 5.0, "reconstruction": 0.5})
    assert "This run was not watched" in text(report(bare))
    write_lines(bare / "log.jsonl", {"step": 10, "images_per_second": 5.0, "reconstruction": 0.5, "code/std": 1.0})
    assert "None: no loss that went constant" in text(report(bare))


def test_every_diagnostic_is_on_one_chart_and_an_unknown_one_on_its_own(bare):
    networks = ("encoder", "decoder", "head", "latent_discriminator", "image_discriminator")
    judged = ("margin", "spread", "accuracy_real", "accuracy_fake")
    names = [
        *(f"gradient_norm/{network}" for network in networks),
        *(f"{adversary}/{name}" for adversary in ("latent", "image") for name in judged),
        *(f"code/{name}" for name in ("mean", "std", "effective_dimensions", "dimensions")),
        *(f"sharpness/{name}" for name in ("reconstructions", "samples")),
        "variety/samples",
        "novel/thing",
    ]
    losses = [name for wanted, _ in LOSSES.values() for name in wanted]
    write_lines(
        bare / "log.jsonl",
        *({"step": step, "images_per_second": 5.0, **dict.fromkeys(names + losses, 0.1 * step)} for step in (10, 20)),
    )
    page = report(bare)
    titles = re.findall(r"<h3>([^<]*)</h3>\s*<svg", page.partition("<h2>Losses")[2])
    assert titles == [*LOSSES, *DIAGNOSTICS, "novel/thing"]
    margins = page.partition("<h3>Margins")[2].partition("</figure>")[0]
    assert "latent/margin" in margins
    assert "accuracy" not in margins


def test_the_accuracy_of_a_wasserstein_discriminator_is_said_to_say_nothing(bare):
    record = json.loads((bare / "run.json").read_text())
    record["recipe"] |= {"image_loss": "wgan-gp", "image_discriminator_norm": "group", "latent_loss": "bce"}
    (bare / "run.json").write_text(json.dumps(record))
    judged = {f"{adversary}/accuracy_{kind}": 0.9 for adversary in ("latent", "image") for kind in ("real", "fake")}
    write_lines(bare / "log.jsonl", {"step": 10, "images_per_second": 5.0, "reconstruction": 0.5, **judged})
    page = report(bare)
    for adversary, sentence in (("latent", "near 1 the discriminator wins"), ("image", "which say nothing here")):
        shown = page.partition(f"<h3>Accuracy of the {adversary} discriminator")[2].partition("</figure>")[0]
        assert sentence in shown


def test_a_run_that_just_began_says_what_it_lacks(bare):
    for left_out in ("checkpoint", "evaluation", "tensorboard", "pictures"):
        shutil.rmtree(bare / left_out, ignore_errors=True)
    shown = text(report(bare))
    for sentence in (
        "Nothing was logged yet.",
        "Not evaluated yet: hazelnut evaluate",
        "No pictures yet.",
        "No diagnostics were logged.",
    ):
        assert sentence in shown


def test_a_run_that_goes_on_is_not_called_finished(bare):
    shutil.rmtree(bare / "checkpoint")
    whole = json.dumps({"step": 10, "images_per_second": 5.0, "reconstruction": 0.5})
    (bare / "log.jsonl").write_text(f"{whole}\n{whole[:-5]}")  # its last line is torn
    assert "Not finished: step 10 of 20" in text(report(bare))


def test_an_evaluation_without_details_keeps_its_figures(run):
    """As it was written before there were any."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    for added in ("details", "generation"):
        del evaluation[added]
    evaluation["reconstruction"] = {"psnr_db": 20.0, "ssim": 0.5, "sharpness_ratio": 0.4}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    shown = text(report(run))
    assert "This evaluation holds figures alone" in shown
    assert "PSNR, dB 20" in shown
    assert "ROC" not in shown.replace("AUROC", "")


def test_an_evaluation_of_good_images_alone_has_a_report(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    details = evaluation["details"]
    good = [row for row in details["images"] if row["kind"] == "good"]
    details |= {"images": good, "roc": None, "overlap": None, "cases": {"defects": [], "good": []}}
    change_evaluation(run, image=None, pixel=None, defects={}, details=details)
    shown = text(report(run))
    assert "No pictures of anomalous test images." in shown
    assert "good (5)" in shown
    assert "false alarms at alpha 0.2" in shown


def test_an_evaluation_without_good_images_has_a_report(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    details = evaluation["details"]
    bad = [row for row in details["images"] if row["kind"] != "good"]
    details |= {"images": bad, "roc": None, "cases": {"defects": [], "good": []}}
    defects = {kind: row | {"auroc": None} for kind, row in evaluation["defects"].items()}
    change_evaluation(
        run, image=None, false_alarms=None, reconstruction=None, generation=None, defects=defects, details=details
    )
    shown = text(report(run))
    assert "The evaluation had no good images to measure this on." in shown
    assert "No pictures of good test images." in shown


def test_cases_are_called_what_their_p_values_make_them(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    details = evaluation["details"]
    for name, p_values in (("defects", (0.2, 0.21)), ("good", (0.19, 0.5))):
        for case, p_value in zip(details["cases"][name], p_values, strict=False):
            details["images"][case["image"]]["p_value"] = p_value
    change_evaluation(run, details=details)
    page = report(run)
    misses = page.partition("<h2>Worst misses")[2].partition("<h2>")[0]
    assert re.findall(r"<figcaption>(\w+): score", misses)[:2] == ["found", "missed"]
    alarms = page.partition("<h2>Worst false alarms")[2].partition("<h2>")[0]
    assert re.findall(r"<figcaption>([\w ]+): score", alarms)[:2] == ["false alarm", "passed"]
    assert misses.count("data:image/png;base64,") == 6


def test_the_last_picture_and_the_interpolations_are_shown_and_earlier_ones_folded_away(bare):
    shutil.rmtree(bare / "pictures", ignore_errors=True)
    add_pictures(bare)
    page = report(bare)
    shown, _, folded = page.partition("<h2>Pictures")[2].partition("<h2>")[0].partition("<details>")
    assert re.findall(r"<h3>([^<]*)", shown) == ["Step 20", "Interpolations"]
    assert re.findall(r"<h3>([^<]*)", folded) == ["Step 5", "Step 10"]


def test_names_are_shown_as_they_are_whatever_they_hold(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    odd = "<script>$x^2$&"
    for row in evaluation["details"]["images"]:
        row["kind"] = odd if row["kind"] == "chip" else row["kind"]
    defects = {odd if kind == "chip" else kind: row for kind, row in evaluation["defects"].items()}
    change_evaluation(run, data=odd, defects=defects, details=evaluation["details"])
    page = report(run)
    assert "<script" not in page
    charted = re.sub(r"<!--.*?-->", "", page.partition("<h3>Scores by kind")[2].partition("</figure>")[0])
    assert "&lt;script&gt;$x^2$&amp; (2)" in charted


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "other files"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path, what):
    folder = tmp_path / "folder"
    if what != "nothing":
        folder.mkdir()
    if what == "other files":
        (folder / "notes.txt").write_text("")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 1
    expected = "is not a run" if what == "other files" else f"there is no run in {folder}."
    assert expected in result.stderr
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_evaluation_that_is_none_is_refused_by_name(run, content):
    (run / "evaluation.json").write_text(content)
    with pytest.raises(TrainingError, match=r"evaluation\.json"):
        report(run)


def test_a_picture_that_is_gone_is_named(run):
    (run / "evaluation/good-1.png").unlink()
    with pytest.raises(DataError, match=r"cannot read the picture .*good-1\.png"):
        report(run)


def test_a_report_that_cannot_be_written_is_one_sentence(bare):
    (bare / "report.html").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        report(bare)


def test_a_long_curve_is_thinned_to_means_within_its_extremes():
    values = np.sin(np.arange(10000) / 7)
    x, middle, low, high = charts.thinned(np.arange(10000.0), values)
    assert len(x) == charts.CURVE_BINS
    assert middle.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert (low.min(), high.max()) == (values.min(), values.max())


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.06, 0.9], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"]),  # logarithmic, and room for each
        ([0.55, 0.95], ["0.6", "0.7", "0.8", "0.9"]),  # spans too little for a logarithm
        ([0.001, 900.0], ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]),
    ],
)
def test_a_logarithmic_axis_has_labels_that_do_not_lie_over_one_another(values, labels):
    with charts.style():
        svg = charts.lines("curve", "a title", {"one": ([800.0, 900.0], values)}, logarithmic=True)
    across = ("800", "820", "840", "860", "880", "900")
    shown = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if text not in (*across, "step")]
    assert set(shown) <= set(labels)
    assert len(shown) >= 3


def test_a_short_curve_is_kept_as_it_is():
    x, middle, low, high = charts.thinned(np.array([1.0, 2.0, 5.0]), np.array([3.0, 1.0, 2.0]))
    assert x.tolist() == [1, 2, 5]
    assert middle.tolist() == low.tolist() == high.tolist() == [3, 1, 2]
