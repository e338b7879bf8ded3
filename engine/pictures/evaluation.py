"""confusion.png and mistakes.png of an evaluation, and how they are called beside its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from engine.pictures.style import BLACK, BLUE, GREY, ORANGE, Page, count_axis, fitted, name_ticks, text_width, viewable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The file of an evaluation, without its ending, by the split; the test's has the plain name.
EVALUATION = {"test": "evaluation", "val": "evaluation_val", "train": "evaluation_train"}


def beside(output: Path, what: str, ending: str = ".png") -> Path:
    """Where a picture or list of an evaluation goes: next to its file, and named after it.

    `confusion.png` beside evaluation.json, `confusion_val.png` beside evaluation_val.json, `other_confusion.png` beside
    other.json.
    """
    name = output.stem.replace("evaluation", what) if output.stem in EVALUATION.values() else f"{output.stem}_{what}"
    return output.with_name(name + ending)


def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """A confusion matrix.

    Up to 20 classes every cell says its count and rate. Above, cells are colours and classes have numbers on the axes;
    lists beside and below them give names, counts and rates: the most frequent confusions, the classes recognised
    least, and up to 100 classes the recall of each.

    Args:
        counts: of samples `[num_classes, num_classes]`, rows the true class, columns the predicted.
        classes: their names.
    """
    rates = counts / np.maximum(1, counts.sum(1, keepdims=True))  # a class without samples has 0 throughout
    return (_small_matrix if len(classes) <= 20 else _large_matrix)(counts, rates, classes)


def _small_matrix(counts: np.ndarray, rates: np.ndarray, classes: Sequence[str]) -> Figure:
    number = len(classes)
    cell = max(50, min(140, 80 - 3 * (number - 10)))  # pixels; wide enough for two lines of text in any case
    names = [fitted(name, 10, 230) for name in classes]
    widest = max(text_width(name, 10) for name in names)
    slanted = widest > cell - 8
    left, below, side = widest + 50, (0.72 * widest + 16 if slanted else 16) + 50, cell * number
    page = Page(left + max(side, 500) + 30, 70 + side + below)
    axes = _matrix(page, counts, rates, left, side)
    name_ticks(axes, names, 10, 45 if slanted else 0)
    axes.set_yticks(range(number), names)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if rates[row, column] > 0.45 else BLACK
        size = 11 if cell > 60 else 10
        count, rate = _count(counts[row, column]), _percent(rates[row, column])
        axes.text(column, row - 0.04, count, va="bottom", ha="center", color=color, fontsize=size)
        axes.text(column, row + 0.06, rate, va="top", ha="center", color=color, fontsize=8)
    return page.figure


def _large_matrix(counts: np.ndarray, rates: np.ndarray, classes: Sequence[str]) -> Figure:
    number, left = len(classes), 70
    side = number * (520 // number) if number <= 260 else 520  # whole pixels a cell, as long as there are some
    lines = -(-number // 4) if number <= 100 else 0  # of the recalls, in four columns
    page = Page(1340, 650 + (46 + 17 * lines if lines else 0))
    axes = _matrix(page, counts, rates, left, side)
    count_axis(axes.xaxis, 10)
    count_axis(axes.yaxis, 10)
    _write_worst(page, counts, rates, classes, left + side + 45)
    if lines:
        _write_recalls(page, counts, rates, classes, lines)
    return page.figure


def _matrix(page: Page, counts: np.ndarray, rates: np.ndarray, left: float, side: float) -> Axes:
    """The coloured cells, with title and axis labels: blue what is right, orange what is wrong."""
    from matplotlib.colors import to_rgb

    number, total, hits = len(counts), int(counts.sum()), int(counts.diagonal().sum())
    page.write(left, 26, f"Confusion matrix: {hits:,} of {total:,} right ({hits / max(1, total):.2%})", 12, bold=True)
    page.write(left, 50, "Blue is right, orange wrong; the darker, the larger the share of the true class", color=GREY)
    axes = page.axes(left, 70, side, side)
    shade = np.sqrt(rates)[:, :, None]  # the square root lets rare errors be seen
    full = np.where(np.eye(number, dtype=bool)[:, :, None], to_rgb(BLUE), to_rgb(ORANGE))
    axes.imshow(1 - shade * (1 - full), interpolation="nearest" if number <= 260 else "antialiased")
    axes.set_xlabel("predicted class", labelpad=8)
    axes.set_ylabel("true class", labelpad=8)
    axes.spines[:].set_visible(True)
    axes.grid(False)
    if side / number >= 20:
        axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
        axes.grid(True, which="minor", color="#ececec", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    return axes


def _write_worst(page: Page, counts: np.ndarray, rates: np.ndarray, classes: Sequence[str], left: float) -> None:
    """The most frequent confusions and the classes with the lowest recall, one above the other."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    most = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:12], counts.shape)
    pairs = [pair for pair in zip(*most, strict=True) if wrong[pair]]
    here = np.flatnonzero(counts.sum(1))
    lowest = here[np.argsort(rates.diagonal()[here], kind="stable")[:9]]
    room = page.width - left - 20

    page.write(left, 78, "Most frequent confusions: true → predicted", 10, bold=True)
    y = 102
    for pair in pairs:
        page.write(left + 40, y, _count(counts[pair]), ha="right")
        page.write(left + 93, y, _percent(rates[pair]), ha="right", color=GREY)
        page.write(left + 105, y, " → ".join(fitted(classes[i], 9, (room - 105) / 2 - 12) for i in pair))
        y += 20
    if not pairs:
        page.write(left, y, "none")
        y += 20
    page.write(left, y + 16, "Lowest recall", 10, bold=True)
    for place, label in enumerate(lowest):
        line = y + 39 + 20 * place
        told = f"{counts[label, label]:,} of {counts[label].sum():,}"
        page.write(left + 40, line, _percent(rates[label, label]), ha="right")
        page.write(left + 52, line, f"{fitted(classes[label], 9, room - 190)}   {told}")


def _write_recalls(page: Page, counts: np.ndarray, rates: np.ndarray, classes: Sequence[str], lines: int) -> None:
    """Number, name, recall and counts of every class, in four columns at the foot of the page."""
    totals = counts.sum(1)
    told = [f"{_count(right)}/{_count(total)}" for right, total in zip(counts.diagonal(), totals, strict=True)]
    left, top, column = 20, page.height - 46 - 17 * lines, (page.width - 40) / 4
    at_counts = column - 16
    at_rate = at_counts - max(text_width(text, 9) for text in told) - 12
    page.write(left, top + 10, "Recall of each class", 10, bold=True)
    for place, name in enumerate(classes):
        x, y = left + place // lines * column, top + 36 + 17 * (place % lines)
        page.write(x + 22, y, str(place), ha="right", color=GREY)
        page.write(x + 30, y, fitted(name, 9, at_rate - 50 - 30))
        page.write(x + at_rate, y, _percent(rates[place, place]) if totals[place] else "", ha="right")
        page.write(x + at_counts, y, told[place], ha="right", color=GREY)


def _count(value: int) -> str:
    return f"{value:,}" if value < 100_000 else f"{value / 1000:,.0f}k"


def _percent(rate: float) -> str:
    """A share of 0 to 1 in percent; what is not none or all does not read as 0 or 100."""
    if rate in (0, 1):
        return f"{100 * rate:.0f}%"
    return f"{min(99.9, max(0.1, 100 * rate)):.1f}%"


def mistakes_figure(
    images: Tensor,
    truths: Sequence[int],
    predictions: Sequence[int],
    probabilities: Sequence[float],
    classes: Sequence[str],
    transforms: Sequence[Any] = (),
    names: Sequence[str] = (),
) -> Figure:
    """The most confident errors, in the order given: each image, what it is and what it was taken for.

    Args:
        images: `[n, channels, height, width]`, uint8, or floats that are 0 to 1 once `Normalize` is undone; at most the
            first 24 are drawn.
        truths, predictions: class indices.
        probabilities: of the predictions, 0 to 1.
        classes: the names.
        transforms: what was done to the images; of this, `Normalize` is undone.
        names: of the images, to be written below them.
    """
    number, tile, side = min(24, len(truths)), 210, 150
    columns, tile_height = max(3, min(6, number)), side + (93 if names else 76)
    page = Page(columns * tile + 20, -(-number // columns) * tile_height + 66 if number else 80)
    title, note = "Most confident mistakes", "Above: how sure the model was. ✗ what it took the image for, ✓ what it is"
    if not number:
        title, note = "No mistakes", "Every sample was classified right"
    page.write(20, 26, title, 12, bold=True)
    page.write(20, 50, note, color=GREY)
    limit = tile - 12 - text_width("✗ ", 9)
    for place, pixels in enumerate(viewable(images[:number], transforms)):
        left, top = 10 + place % columns * tile, 92 + place // columns * tile_height
        middle, below = left + tile / 2, top + side
        page.show(pixels, middle - side / 2, top, side)
        page.write(middle, top - 11, _percent(probabilities[place]), ha="center", color=GREY)
        page.write(middle, below + 12, f"✗ {fitted(classes[predictions[place]], 9, limit)}", ha="center", color=ORANGE)
        page.write(middle, below + 29, f"✓ {fitted(classes[truths[place]], 9, limit)}", ha="center")
        if names:
            page.write(middle, below + 46, fitted(names[place], 9, tile - 12), ha="center", color=GREY)
    return page.figure
