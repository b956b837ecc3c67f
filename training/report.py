"""hazelnut report: one page that tells what a run was, what went wrong in it, and what came of it."""

from pathlib import Path
from typing import Any

from models.calibration import SCORE_NAMES
from training import charts
from training.evaluation import FIDELITY, FIGURES
from training.pages import chart, interval, picture, significant, value, write_page
from training.run_folder import RunFolder, read_run_folder

Item = dict[str, Any]

# Of the losses and the diagnostics: which are on one chart, and what is to be seen there.
LOSSES = {
    "Reconstruction and head": (("reconstruction", "segmentation"), "On training images."),
    "Latent adversary": (("latent_discriminator", "latent_adversarial"), "The discriminator's loss and the encoder's."),
    "Image adversary": (("image_discriminator", "image_adversarial"), "The discriminator's loss and the decoder's."),
    "Gradient penalties": (("latent_penalty", "image_penalty"), "0 where the gradient's norm is 1."),
}
ACCURACIES = "Shares on the right side of 0: near 1 the discriminator wins, near 0.5 it cannot tell."
NO_ACCURACIES = "Shares on the right side of 0, which say nothing here: the zero of wgan-gp is anywhere."
DIAGNOSTICS = {
    "Gradient norms": (("gradient_norm/",), "Of each network."),
    "Margins": (("latent/margin", "image/margin"), "The discriminators' mean logit on real minus that on fake ones."),
    "Spread of the logits": (
        ("latent/spread", "image/spread"),
        "Their standard deviation: near 0 the discriminator answers the same to everything.",
    ),
    "Accuracy of the latent discriminator": (("latent/accuracy_real", "latent/accuracy_fake"), ACCURACIES),
    "Accuracy of the image discriminator": (("image/accuracy_real", "image/accuracy_fake"), ACCURACIES),
    "Code": (("code/mean", "code/std"), "Of the encoder's codes; the prior has 0 and 1."),
    "Effective dimensions of the code": (
        ("code/effective_dimensions", "code/dimensions"),
        "The prior's are as many as there are.",
    ),
    "Sharpness": (("sharpness/",), "Energy of fine detail against the images: 1 is as sharp."),
    "Variety": (("variety/",), "How much samples differ, against how much images do: near 0 the generator collapsed."),
}
LOGARITHMIC = {"Gradient norms", "Gradient penalties", "Sharpness"}


def write_run_report(folder: Path) -> Path:
    """Write report.html into a run's folder, from nothing but what is in there. Raises TrainingError, DataError."""
    found = read_run_folder(folder)
    with charts.style():
        content = _content(found)
    path = folder / "report.html"
    write_page(path, "report.html.j2", content)
    return path


def _content(found: RunFolder) -> dict[str, Any]:
    name, changes = found.recipe
    changed = ", ".join(f"{key}={shown}" for key, shown in changes.items())
    recipe = f"{name} with {changed}" if 0 < len(changes) <= 6 else f"like {name}" if changes else name
    grids = [picture(path, f"Step {step}") for step, path in found.grids]
    last = grids[-1:] + ([picture(found.interpolations, "Interpolations")] if found.interpolations else [])
    return {
        "title": f"{found.run.name}: {recipe}",
        "folder": str(found.folder),
        "run": found.run,
        "recipe": recipe,
        "state": _state(found),
        "finished": found.record is not None,
        "watched": found.watched,
        "findings": found.findings,
        "evaluation": found.evaluation and {"details": None, **found.evaluation},
        **_detection(found),
        **_fidelity(found.evaluation or {}),
        "pictures": last,
        "earlier_pictures": grids[:-1],
        **_curves(found),
        "facts": _facts(found, changed),
        "recipe_rows": [(key, str(shown)) for key, shown in found.run.recipe.items()],
    }


def _state(found: RunFolder) -> str:
    steps = f"step {found.step} of {found.run.recipe['steps']}"
    taken = f", {found.minutes:.1f} minutes of training" if found.minutes else ""
    if found.record is not None:
        return f"Finished: {steps}{taken}."
    return (
        f"Not finished: {steps}{taken}. hazelnut train --resume goes on with it."
        if found.log
        else "Nothing was logged yet."
    )


def _facts(found: RunFolder, changed: str) -> list[tuple[str, str]]:
    origin = (found.record or {}).get("origin", {})
    versions = (found.record or {}).get("versions", {})
    facts = [
        ("data", found.run.name),
        ("training images", str(origin.get("training_images", "-"))),
        ("their sha256", found.run.training_images_sha256[:16]),
        ("held-out images", str(len((found.record or {}).get("calibration", {}).get("scores", [])) or "-")),
        ("nearest recipe", found.recipe[0]),
        ("changed in it", changed or "nothing"),
        ("seed", str(found.run.recipe["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"),
    ]
    if found.evaluation:
        facts.append(("evaluated with", found.evaluation["command"]))
    return facts


def _detection(found: RunFolder) -> dict[str, Any]:
    report = found.evaluation
    if report is None:
        return {}
    figures = [
        (f"{level} {FIGURES[name]}", value(report[level][name]), interval(report[level][name]))
        for level, names in (
            ("image", ("auroc", "ap", "f1_max")),
            ("pixel", ("auroc", "ap", "aupro_0.3", "aupro_0.05")),
        )
        for name in (names if report[level] else ())
    ]
    tiles = [row for row in figures if row[0] in ("image AUROC", "pixel AUROC", "pixel AUPRO@0.3")]
    if report["image"]:
        alone = report["image"]["auroc_of_each_score"]
        figures += [(f"image AUROC of {name.replace('_', ' ')} alone", value(alone[name]), "") for name in SCORE_NAMES]
    alarms = report["false_alarms"]
    if alarms:
        promised = f"{alarms['promised_low']:.2f} to {alarms['promised_high']:.2f} promised"
        row = (f"false alarms at alpha {alarms['alpha']:g}", value(alarms["rate"]), promised)
        figures.append(row)
        tiles.append(row)
    kinds = []
    for kind, row in report["defects"].items():
        shares = [show(row[name]) for name in ("auroc", "aupro_0.3") for show in (value, interval)]
        kinds.append((kind, row["images"], value(row["found_at_alpha"], 2), *shares))
    return {"tiles": tiles, "figures": figures, "kinds": kinds, **_details(found, report.get("details"))}


def _details(found: RunFolder, details: Item | None) -> dict[str, Any]:
    if details is None:
        return {"detection_charts": [], "missed_cases": [], "alarm_cases": []}
    rows, alpha = details["images"], details["alpha"]
    by_kind: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["kind"] != "good", row["kind"])):
        by_kind.setdefault(row["kind"], []).append(row["anomaly_score"])
    level, label = details["score_level"], "anomaly score, in standard deviations of good images"
    drawn = []
    if len(by_kind) > 1:
        good = by_kind.get("good", [])
        both = {"anomalous": [score for kind, scores in by_kind.items() if kind != "good" for score in scores]}
        both = {"good": good, **both} if good else both
        caption = f"Right of the broken line, {level:.2f}, an image is flagged at alpha {alpha:g}."
        title = "Scores of good and anomalous images"
        drawn.append(chart(title, charts.histogram("both", title, both, level=level, label=label), caption))
    if by_kind:
        title = "Scores by kind"
        drawn.append(chart(title, charts.histogram("kinds", title, by_kind, level=level, label=label)))
    for name, title, labels, caption in (
        ("roc", "ROC", ("good images flagged", "anomalous images found"), "Of the anomaly score."),
        (
            "overlap",
            "Per-region overlap",
            ("good pixels above", "regions covered"),
            "Of the maps. AUPRO@0.3 is the share that is filled.",
        ),
    ):
        if details[name]:
            across, up = details[name]["false_positive_rate"], details[name]["found"]
            drawn.append(chart(title, charts.area(name, title, across, up, labels=labels), caption))
    anomalous = [row for row in rows if row["kind"] != "good"]
    good_rows = [row for row in rows if row["kind"] == "good"]
    missed = sum(row["p_value"] > alpha for row in anomalous)
    alarms = sum(row["p_value"] <= alpha for row in good_rows)
    return {
        "detection_charts": drawn,
        "missed_cases": _cases(found, details, "defects", ("found", "missed")),
        "alarm_cases": _cases(found, details, "good", ("false alarm", "passed")),
        "missed_sentence": f"{missed} of {len(anomalous)} anomalous images are missed at alpha {alpha:g}; these have "
        "the lowest scores.",
        "alarm_sentence": f"{alarms} of {len(good_rows)} good images are flagged at alpha {alpha:g}; these have the "
        "highest scores.",
    }


def _cases(found: RunFolder, details: Item, name: str, verdicts: tuple[str, str]) -> list[Item]:
    """verdicts: of an image that is flagged, and of one that is not."""
    cases = []
    for case in details["cases"].get(name, []):
        row = details["images"][case["image"]]
        verdict = verdicts[0] if row["p_value"] <= details["alpha"] else verdicts[1]
        caption = f"{verdict}: score {row['anomaly_score']:.2f}, p {row['p_value']:.3f}"
        cases.append(picture(found.folder / case["picture"], row["file"], caption))
    return cases


def _fidelity(report: dict[str, Any]) -> dict[str, Any]:
    made = {"reconstructions": report.get("reconstruction"), "samples": report.get("generation")}
    if not any(made.values()):
        return {"fidelity": []}
    names = [name for name in FIDELITY if any((figures or {}).get(name) is not None for figures in made.values())]
    rows = [(FIDELITY[name], *(significant((figures or {}).get(name)) for figures in made.values())) for name in names]
    figures = made["reconstructions"] or {}
    caption = "Of good test images, at the model's resolution. Of a ratio, 1 is as sharp or as varied as the images."
    if figures.get("frechet_floor") is not None:
        n, floor = figures["images"], figures["frechet_floor"]
        caption += (
            f" The Fréchet distance is of random features, never trained, of {n} and {n} images; two halves of the good"
            f" images are {floor:.3g} from each other."
        )
    octaves = {key: row["octave_ratios"] for key, row in made.items() if row and "octave_ratios" in row}
    title = "Energy by octave, against the images"
    svg = charts.bars("octaves", title, octaves, label="period, pixels") if octaves else ""
    seen = "1 is as much as in the images; below 1 at the left: blurred."
    return {
        "fidelity": rows,
        "fidelity_caption": caption,
        "fidelity_charts": [chart(title, svg, seen)] if octaves else [],
    }


def _curves(found: RunFolder) -> dict[str, list[Item]]:
    logged = list(
        dict.fromkeys(name for entry in found.log for name in entry if name not in ("step", "images_per_second"))
    )
    marks = [finding["step"] for finding in found.findings]
    drawn: dict[str, list[Item]] = {"loss_charts": [], "diagnostic_charts": []}
    for kind, table, names in (
        ("loss_charts", LOSSES, [name for name in logged if "/" not in name]),
        ("diagnostic_charts", DIAGNOSTICS, [name for name in logged if "/" in name]),
    ):
        rest = names
        for title, (wanted, caption) in table.items():
            here = [
                name for name in rest if any(name == key or (key[-1] == "/" and name.startswith(key)) for key in wanted)
            ]
            rest = [name for name in rest if name not in here]
            if caption == ACCURACIES and found.run.recipe.get(f"{wanted[0].partition('/')[0]}_loss") == "wgan-gp":
                caption = NO_ACCURACIES
            if here:
                drawn[kind].append(_curve(found, title, here, caption, marks))
        drawn[kind] += [_curve(found, name, [name], "", marks) for name in rest]
    return drawn


def _curve(found: RunFolder, title: str, names: list[str], caption: str, marks: list[float]) -> Item:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        entries = [(entry["step"], entry[name]) for entry in found.log if name in entry]
        short = name.rpartition("/")[2] if len({key.partition("/")[0] for key in names}) == 1 else name
        series[short.replace("_", " ")] = ([step for step, _ in entries], [figure for _, figure in entries])
    positive = all(figure > 0 for _, figures in series.values() for figure in figures)
    svg = charts.lines(
        f"curve-{names[0].replace('/', '-')}",
        title,
        series,
        logarithmic=title in LOGARITHMIC and positive,
        shares=names[0].partition("/")[2].startswith("accuracy"),
        marks=marks,
    )
    return chart(title, svg, caption)
