"""Pages that are one file each: styles, charts and pictures are in them, and they ask for nothing from outside."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models.errors import DataError
from models.files import replace_file


def write_page(path: Path, template: str, content: dict[str, Any]) -> None:
    """Fill a template of this folder. Raises DataError if the file cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page.encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}.") from error


def chart(title: str, svg: str, caption: str = "") -> dict[str, Any]:
    """For the macro of that name. The SVG is ours, and matplotlib has escaped the names in it."""
    return {"title": title, "svg": svg, "caption": caption}


def picture(path: Path, title: str, caption: str = "") -> dict[str, Any]:
    """For the macro of that name: a PNG. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the picture {path}: {error}.") from error
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"title": title, "source": source, "caption": caption}


def value(figure: Any, digits: int = 3) -> str:
    """A number, or one with an interval, or a dash."""
    if isinstance(figure, dict):
        figure = figure["value"]
    return "-" if figure is None else f"{figure:.{digits}f}"


def interval(figure: Any) -> str:
    return f"{figure['low']:.2f} to {figure['high']:.2f}" if isinstance(figure, dict) else ""


def significant(figure: float | None) -> str:
    """Three digits, for what may be of any size."""
    return "-" if figure is None else f"{figure:.3g}"
