"""Charts for the reports: matplotlib's SVG, in the colours of the page that it stands in, light or dark."""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

WIDTH = 4.4  # inches, so that text stays readable where a narrow page shrinks the chart
BINS = 40
CURVE_BINS = 150
# Drawn in colours that nothing else has, which then become variables of the page's style.
TEXT, QUIET, LINE, BAD = "#000001", "#000002", "#000003", "#000004"
SERIES = [f"#0000a{number}" for number in range(8)]
VARIABLES = {TEXT: "text", QUIET: "quiet", LINE: "line", BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES)
}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}


@contextmanager
def style() -> Iterator[None]:
    """Charts have to be made in it."""
    with rc_context(STYLE):
        yield


class Chart:
    """Axes to draw on, and the SVG of what was drawn. name: unlike that of any other chart of the page."""

    def __init__(self, name: str, title: str, *, height: float = 2.6, rows: int = 1) -> None:
        self.name = name
        self.title = title
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.rows: list[Axes] = list(np.atleast_1d(self.figure.subplots(rows, 1, sharex=True)))

    @property
    def axes(self) -> Axes:
        return self.rows[0]

    def svg(self) -> str:
        """To be put into HTML as it is."""
        file = io.StringIO()
        with rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = file.getvalue()
        # Neither a width nor a height of its own: the page decides.
        drawn = f'<svg role="img" aria-label="{html.escape(self.title)}" {drawn[drawn.index("viewBox") :]}'
        for colour, variable in VARIABLES.items():
            drawn = drawn.replace(colour, f"var(--{variable})")
        # Other charts of the page have the same ids.
        drawn = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{self.name}-", drawn)
        return re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)


def lines(
    name: str,
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    logarithmic: bool = False,
    shares: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Curves by name, over steps. shares: they are from 0 to 1. marks: steps at which something was found.

    logarithmic: where the values span enough for it.
    """
    chart = Chart(name, title)
    axes = chart.axes
    for colour, (key, (across, values)) in zip(_cycled(SERIES), series.items(), strict=False):
        x, middle, low, high = thinned(np.asarray(across, dtype=float), np.asarray(values, dtype=float))
        if len(x) < len(across):
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=colour, label=key, marker="o" if len(x) == 1 else None)
    for mark in marks:
        axes.axvline(mark, color=BAD, linewidth=1, linestyle=":")
    lowest, highest = axes.get_ylim()
    if logarithmic and highest > 3 * max(lowest, 0):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # more labels would lie over one another
        lowest, highest = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if highest < 100 * lowest else NullFormatter())
    if shares:
        axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    _legend(axes)
    return chart.svg()


def thinned(x: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Where a curve has more points than a chart shows: mean, lowest and highest of as many neighbours as it takes."""
    parts = max(min(len(x), CURVE_BINS), 1)
    where = [part for part in np.array_split(np.arange(len(x)), parts) if len(part)]
    found = [(x[part].mean(), values[part].mean(), values[part].min(), values[part].max()) for part in where]
    means, middle, low, high = (np.array(column) for column in zip(*found, strict=True))
    return means, middle, low, high


def histogram(name: str, title: str, groups: Mapping[str, Sequence[float]], *, level: float, label: str) -> str:
    """How many images have which score, a row for each group on one axis, and the level above which one is flagged.

    Scores far above all good ones are many, and tell little: the axis is linear about the level, then logarithmic.
    """
    chart = Chart(name, title, rows=len(groups), height=0.7 + 0.55 * len(groups))
    spread = np.arcsinh(np.concatenate([np.asarray(values, dtype=float) for values in groups.values()]))
    edges = np.sinh(np.linspace(spread.min() - 0.05, spread.max() + 0.05, BINS + 1))
    for colour, axes, (key, values) in zip(_cycled(SERIES), chart.rows, groups.items(), strict=False):
        axes.hist(values, bins=edges.tolist(), color=colour)
        axes.axvline(level, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_title(f"{key} ({len(values)})", color=QUIET, fontsize=8.5, pad=2)
        axes.set_xscale("asinh", linear_width=1.0)
        axes.grid(visible=False)
        axes.locator_params(axis="y", nbins=2, integer=True)
    ticks = [tick for tick in (-100, -10, -3, -1, 0, 1, 3, 10, 30, 100, 1000, 10000) if edges[0] <= tick <= edges[-1]]
    chart.rows[-1].set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    chart.rows[-1].minorticks_off()
    chart.rows[-1].set_xlabel(label)
    return chart.svg()


def area(name: str, title: str, across: Sequence[float], up: Sequence[float], *, labels: tuple[str, str]) -> str:
    """A curve of rates, and the area below it."""
    chart = Chart(name, title)
    chart.axes.fill_between(across, up, color=SERIES[0], alpha=0.15, linewidth=0)
    chart.axes.plot(across, up, color=SERIES[0])
    chart.axes.set_xlim(0, max(across))
    chart.axes.set_ylim(0, 1.02)
    chart.axes.set_xlabel(labels[0])
    chart.axes.set_ylabel(labels[1])
    return chart.svg()


def bars(name: str, title: str, groups: dict[str, dict[str, float]], *, label: str) -> str:
    """Shares by category, side by side for each group; 1 is marked."""
    chart = Chart(name, title)
    width = 0.8 / len(groups)
    for number, (key, shares) in enumerate(groups.items()):
        places = np.arange(len(shares)) + (number - (len(groups) - 1) / 2) * width
        chart.axes.bar(places, list(shares.values()), width=0.9 * width, color=SERIES[number % 8], label=key)
        chart.axes.set_xticks(np.arange(len(shares)), labels=list(shares))
    chart.axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    chart.axes.set_xlabel(label)
    chart.axes.grid(visible=False, axis="x")
    _legend(chart.axes)
    return chart.svg()


def dots(name: str, title: str, groups: Mapping[str, Sequence[float]], *, label: str) -> str:
    """A row per group: a dot per run, and a line at their mean."""
    names = [key.replace(", ", ",\n") if len(key) > 20 else key for key in groups]
    chart = Chart(name, title, height=0.8 + sum(0.17 + 0.13 * (1 + key.count("\n")) for key in names))
    for row, (key, values) in enumerate(groups.items()):
        colour = SERIES[row % 8]
        chart.axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.7, markersize=5, label=key)
        if len(values):
            chart.axes.plot([float(np.mean(values))] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
    chart.axes.set_yticks(range(len(groups)), labels=names)
    chart.axes.set_ylim(len(groups) - 0.5, -0.5)
    chart.axes.set_xlabel(label)
    return chart.svg()


def _cycled(colours: list[str]) -> Iterator[str]:
    while True:
        yield from colours


def _legend(axes: Axes) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.figure.legend(loc="outside lower center", ncols=2)
