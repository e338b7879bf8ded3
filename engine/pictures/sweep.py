"""sweep.png of many runs: the best configurations, and beside them what each setting did to the accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import counted
from engine.pictures.style import BLUE, GREY, Page, finite, fitted, name_ticks, number_axis, text_width
from engine.run import compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sweep_figure(rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], column: str, name: str) -> Figure:
    """The best configurations of a sweep, each run a dot, and the accuracy of every run over each setting.

    Args:
        rows: the finished runs, as compare.read_runs gives them.
        shown: the rows of the table, best first; with the standard deviation where they are of several seeds or folds.
        column: the accuracy on the axis.
        name: of the sweep.
    """
    differing = compare.differing(rows)
    settings = [setting for setting in differing if setting not in compare.REPEATED]
    values = {setting: [row[setting] for row in rows if setting in row] for setting in settings}
    panels = [  # of numbers, or of few enough other values to be told apart on an axis
        setting for setting in settings if _are_numbers(values[setting]) or len(set(map(str, values[setting]))) <= 6
    ][:6]
    best = shown[:25]
    labels = [fitted(_described(row, settings), 9, 400) for row in best]
    plot, across, up, below = 300, 300, 170, 110  # pixels
    left, top, gap = 40 + max(text_width(label, 9) for label in labels), 104, 100
    list_height, grid_rows = 24 * len(best) + 8, -(-len(panels) // 2)
    width = max(660, left + plot + min(2, len(panels)) * (gap + across) + 30)
    page = Page(width, top + max(list_height + 62, grid_rows * (up + below)))
    runs = counted(len(rows), "run") + (f", the best {len(best)}" if len(best) < len(shown) else "")
    page.write(16, 26, f"{fitted(name, 12, width - 250)}: {runs}", 12, bold=True)
    over = " and ".join(f"{name.rpartition('.')[2]}s" for name in compare.REPEATED if name in differing)
    means = f"; a ring is the mean over {over}, its bar their standard deviation" if "runs" in best[0] else ""
    page.write(16, 50, fitted(f"A dot is a run, the best on top{means}", 9, width - 32), color=GREY)

    axes = page.axes(left, top, plot, list_height)
    for place, row in enumerate(best):
        wanted = [row.get(name) for name in settings]
        dots = finite(run[column] for run in rows if [run.get(name) for name in settings] == wanted)
        axes.plot(dots, [place] * len(dots), "o", color=BLUE, markersize=4, zorder=3)
        if "runs" in row:
            mean, spread = finite([row[column], row.get(f"{column}_std") or 0.0])
            axes.errorbar(mean, place, xerr=spread, fmt="o", mfc="none", color=GREY, capsize=3, markersize=9, zorder=2)
    axes.set_yticks(range(len(best)), labels, fontsize=9)
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.margins(x=0.08)
    number_axis(axes.xaxis, 5, percent=True)
    axes.set_xlabel(column.replace("val_", "validation ").replace("_", " "))
    for place, setting in enumerate(panels):
        x, y = left + plot + gap + place % 2 * (across + gap), top + place // 2 * (up + below)
        axes = page.axes(x, y, across, up)
        known = [row for row in rows if setting in row and row[column] is not None]
        _draw_setting(axes, [row[setting] for row in known], finite(row[column] for row in known), across)
        axes.set_title(fitted(setting, 11, across - 20))
        number_axis(axes.yaxis, 6, percent=True)
    return page.figure


def _described(row: dict[str, Any], settings: Sequence[str]) -> str:
    """What tells a configuration from the others."""
    words = []
    for name in settings:
        if name in row:
            value = row[name]
            text = f"{value:.4g}" if isinstance(value, float) else compare.cell(value)
            words.append(fitted(f"{name.rpartition('.')[2]}={text}", 9, 150))
    return "  ".join(words) or str(row.get("run", "all runs"))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _draw_setting(axes: Axes, values: Sequence[Any], accuracies: np.ndarray, across: int) -> None:
    """The accuracy of every run over one setting; over a learning rate or the like on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = _are_numbers(values)
    texts = [compare.cell(value) for value in values]
    known = sorted(set(texts))
    places = values if numbers else [known.index(text) for text in texts]
    axes.plot(places, accuracies, "o", color=BLUE, markersize=4, alpha=0.6)
    if numbers:
        axes.margins(x=0.08)
        decades = math.log10(max(values) / min(values)) if min(values) > 0 else 0
        if decades >= 1:
            axes.set_xscale("log")
        number_axis(axes.xaxis, 6, min_n_ticks=1)
        if decades >= 1:
            axes.xaxis.set_major_locator(LogLocator(subs=[1.0] if decades > 2 else [1.0, 2.0, 5.0], numticks=6))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        slanted = max(text_width(text, 9) for text in known) > across / len(known) - 8
        labels = [fitted(text, 9, 100 if slanted else across) for text in known]
        name_ticks(axes, labels, 9, 30 if slanted else 0)
        axes.set_xlim(-0.5, len(known) - 0.5)
