"""The command line. Each verb imports what it needs when it is called: `hazelnut --help` waits for no torch."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models.errors import HazelnutError
from models.memory import keep_freed_memory

app = typer.Typer(
    help="Find defects in images of parts. Learns from good images alone, serves its scores over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")]
CheckpointFolder = Annotated[Path, typer.Argument(help="A folder that train wrote.", show_default=False)]
Alpha = Annotated[
    float | None, typer.Option(help="Share of good parts that may be flagged.", show_default="of the checkpoint")
]

SERVICE_KEEPS = 2**23  # bytes that its own process has freed


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(help="Folder in MVTec layout, or a plain one of good images.", show_default=False)
    ],
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe.", show_default="default")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, changes the recipe; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/<name of DATA>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    backbone_weights: Annotated[
        Path | None, typer.Option(help="File of the backbone's weights.", show_default="torchvision's, from a network")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")] = False,
    device: Device = "auto",
) -> None:
    """Train on good images."""
    from models.scoring import choose_device
    from training.config import load_recipe, recipe_from_dict
    from training.dry_run import dry_run
    from training.run import read_run, train_folder

    out = out or Path("runs") / data.resolve().name
    with _errors():
        before = read_run(out) if resume else None
        if before and recipe is None and not changes:
            chosen = recipe_from_dict(before.recipe)
        else:
            chosen = load_recipe(recipe or "default", changes or [])
        if dry:
            dry_run(data, recipe=chosen, device=choose_device(device), console=Console(), progress=_progress_console())
            return
        checkpoint = train_folder(
            data,
            out,
            recipe=chosen,
            resume=resume,
            device=choose_device(device),
            command=_command(),
            console=_progress_console(),
            backbone_weights=backbone_weights,
        )
    typer.echo(f"checkpoint: {checkpoint}")


@app.command()
def evaluate(
    checkpoint: CheckpointFolder,
    data: Annotated[Path, typer.Argument(help="Folder in MVTec layout with a test split.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="JSON file.", show_default="evaluation.json beside the checkpoint")
    ] = None,
    alpha: Alpha = None,
    device: Device = "auto",
) -> None:
    """Measure a checkpoint on the test images of a folder."""
    from models.checkpoint import load_checkpoint
    from models.scoring import choose_device
    from training.evaluation import evaluate_folder, pictures_folder, print_report, write_report

    # normpath, because "." has itself for a parent.
    out = out or Path(os.path.normpath(checkpoint / "..")) / "evaluation.json"
    with _errors():
        scorer = load_checkpoint(checkpoint).scorer(choose_device(device))
        report = evaluate_folder(
            scorer,
            data,
            alpha=alpha,
            command=_command(),
            console=_progress_console(),
            pictures=pictures_folder(out),
        )
        write_report(report, out)
        print_report(report, Console())
    typer.echo(f"written to {out}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]) -> None:
    """Write a run's report.html: findings, figures, curves, pictures, in one file that needs no network."""
    from training.report import write_run_report

    with _errors():
        path = write_run_report(run)
    typer.echo(f"written to {path}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file.")] = Path("comparison.html"),
) -> None:
    """Set evaluated runs side by side, with intervals over seeds: a table, and a page of it."""
    from training.compare import compare_runs

    with _errors():
        compare_runs(runs, out, Console())
    typer.echo(f"written to {out}")


@app.command()
def score(
    checkpoint: CheckpointFolder,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    as_csv: Annotated[bool, typer.Option("--csv", help="Rows as CSV with a header.")] = False,
    overlays: Annotated[Path | None, typer.Option(help="Folder for a picture per image.")] = None,
    alpha: Alpha = None,
    device: Device = "auto",
) -> None:
    """Score images: a row each on stdout. The exit code is 1 if a file could not be read."""
    from models.checkpoint import load_checkpoint
    from models.scoring import choose_device
    from training.inference import find_images, write_rows
    from training.progress import progress_bar

    with _errors():
        scorer = load_checkpoint(checkpoint).scorer(choose_device(device))
        alpha = scorer.calibration.chosen_alpha(alpha)
        paths = find_images(images)
        with progress_bar(_progress_console()) as bar:
            task = bar.add_task("scoring", total=len(paths), detail="")
            failed = write_rows(
                scorer,
                paths,
                sys.stdout,
                alpha=alpha,
                as_csv=as_csv,
                overlays=overlays,
                advance=lambda: bar.advance(task),
            )
    if failed:
        typer.echo(f"{failed} of {len(paths)} files could not be scored.", err=True)
        raise typer.Exit(1)


@app.command()
def serve(
    checkpoint: Annotated[Path | None, typer.Option(envvar="HAZELNUT_CHECKPOINT", show_default="the demo's")] = None,
    host: Annotated[str | None, typer.Option(envvar="HAZELNUT_HOST", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(envvar="HAZELNUT_PORT", show_default="8000")] = None,
    device: Annotated[
        str | None, typer.Option(envvar="HAZELNUT_DEVICE", help="auto, cpu or cuda.", show_default="auto")
    ] = None,
) -> None:
    """Serve a checkpoint's scores over HTTP. All settings: docs/service.md."""
    from service.forking import begin_forking

    begin_forking()
    # Networks run in a process of their own. Here it is requests and maps that are freed, and those of a few large
    # images would stay for good.
    keep_freed_memory(SERVICE_KEEPS)
    from service.app import serve as serve_app
    from service.settings import load_settings

    with _errors():
        serve_app(load_settings(checkpoint=checkpoint, host=host, port=port, device=device))


@app.command()
def publish(
    checkpoint: CheckpointFolder,
    models: Annotated[Path, typer.Argument(help="The folder that a service serves.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of the product.", show_default="of the checkpoint")] = None,
) -> None:
    """Put a checkpoint among those that a service serves, as the next version of its product."""
    from service.publishing import publish as publish_checkpoint

    with _errors():
        folder = publish_checkpoint(checkpoint, models, name=name)
    typer.echo(f"published: {folder}")


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose key it is; the log shows it.", show_default=False)]) -> None:
    """Make an API key: its line for the file of keys on stdout, the key itself on stderr."""
    from service.security import new_key

    with _errors():
        made, line = new_key(name)
    typer.echo(line)
    typer.echo(f"key: {made}\nThis is the only time it is shown: the file of keys has its hash alone.", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the parts, the run and the overlays.")] = Path("hazelnut-demo"),
    serve_after: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the model at the end.")] = True,
    port: Annotated[int | None, typer.Option(envvar="HAZELNUT_PORT", show_default="8000")] = None,
    device: Device = "auto",
) -> None:
    """Draw parts and defects, train on the good ones for a minute, evaluate, write overlays, serve."""
    from models.scoring import choose_device
    from training.demo_run import run_demo

    with _errors():
        checkpoint = run_demo(
            out, device=choose_device(device), command=_command(), progress=_progress_console(), console=Console()
        )
    if serve_after:
        serve(checkpoint=checkpoint, host="127.0.0.1", port=port, device=device)


@contextmanager
def _errors() -> Iterator[None]:
    """An error that is the user's to act on is one sentence, not a traceback."""
    try:
        yield
    except HazelnutError as error:
        typer.echo(f"hazelnut: {error}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        typer.echo(
            "hazelnut: the GPU has too little memory: train with a smaller batch_size or image_size, or take "
            "--device cpu.",
            err=True,
        )
        raise typer.Exit(1) from None


def _progress_console() -> Console:
    return Console(stderr=True)


def _command() -> str:
    return shlex.join(["hazelnut", *sys.argv[1:]])


def main() -> None:
    keep_freed_memory()
    app()


if __name__ == "__main__":
    main()
