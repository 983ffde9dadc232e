"""Benchmarks: `python -m tests.bench NAME`. They print figures and assert nothing about time, since machines are noisy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass(frozen=True)
class Panel:
    """A panel of a picture: axis labels with units, and lines of (x, y) by name."""

    xlabel: str
    ylabel: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(name: str, panels: Sequence[Panel]) -> None:
    """Draws docs/bench-NAME.png, with dashes and markers, so it is readable in black and white."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    styles = [("o-", "black"), ("s--", "0.35"), ("^:", "0.55")]
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (title, points), (style, colour) in zip(panel.lines.items(), styles, strict=False):
            axes.plot(*zip(*points, strict=True), style, color=colour, label=title, clip_on=False)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            axes.legend(frameon=False)
    _save(name, figure)


def draw_bars(name: str, xlabel: str, values: Mapping[str, float]) -> None:
    """Draws docs/bench-NAME.png with one bar per value and its number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.6 + 0.32 * len(values)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()), color="0.6")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    _save(name, figure)


def _save(name: str, figure: Figure) -> None:
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f"bench-{name}.png", dpi=130)
    print(f"drawn: docs/bench-{name}.png")
