"""Pictures: curves.png of a run, confusion.png and mistakes.png of an evaluation, sweep.png of many runs.

They are drawn with matplotlib's objects on the Agg canvas, so no display and no global state is involved, and
matplotlib is imported when the first one is drawn. A picture never makes a run fail: what goes wrong is one line of the
log. Sizes are in pixels and chosen so that every text can be read without zooming.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import one_line, printable
from engine.run import compare
from engine.terminal import log

if TYPE_CHECKING:  # a sweep draws without torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

DPI = 100
BLUE, ORANGE, GREY, BLACK = "#1f6fb4", "#d95f02", "#6b6b6b", "#222222"  # told apart with every common colour blindness
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a class name with dollar signs is no formula
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
OTHER_SCRIPTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "Yu Gothic",
    "Microsoft YaHei",
    "Arial Unicode MS",
)


# ---------------------------------------------------------------------------------------------------------------------
# What every picture has in common


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in our style whatever the user's matplotlibrc says, and leave matplotlib's settings as they were."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name may have characters that no font here has
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.family": families})  # type: ignore[arg-type]
        yield


def _draw(path: Path, make: Callable[..., Figure], *arguments: Any) -> bool:
    """Write the figure that `make(*arguments)` returns; says what went wrong, and returns whether all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with house_style():
            make(*arguments).savefig(temporary, format="png")
        os.replace(temporary, path)
    except Exception as error:  # whatever it is: the numbers are worth more than their picture
        _say(f"{path} was not drawn: {one_line(error)}")
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _say(text: str) -> None:
    """To the log of the run, or, where none is open as in an evaluation, to standard error."""
    text = printable(text)
    if log.handlers:
        log.warning(text)
    else:
        print(text, file=sys.stderr)


# The file of an evaluation, without its ending, by the split; the test's has the plain name.
EVALUATION = {"test": "evaluation", "val": "evaluation_val", "train": "evaluation_train"}


def beside(output: Path, what: str, ending: str = ".png") -> Path:
    """Where a picture or list of an evaluation goes: next to its file, and named after it.

    `confusion.png` beside evaluation.json, `confusion_val.png` beside evaluation_val.json, `other_confusion.png` beside
    other.json.
    """
    name = output.stem.replace("evaluation", what) if output.stem in EVALUATION.values() else f"{output.stem}_{what}"
    return output.with_name(name + ending)


def _new_figure(width: float, height: float, **settings: Any) -> Figure:
    """An empty figure of `width` x `height` pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), **settings)
    FigureCanvasAgg(figure)
    return figure


def _pixel_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place of the figure given in pixels from its lower left corner."""
    across, up = figure.get_size_inches() * DPI
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


@lru_cache(maxsize=1)
def _renderer() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)


def _width(text: str, size: float) -> float:
    """Pixels that a line of text takes, at a font size in points."""
    from matplotlib.font_manager import FontProperties

    return float(_renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def _fitted(text: str, size: float, limit: float) -> str:
    """Text on one line of at most `limit` pixels; of a longer one the beginning and the end, which tell names apart."""
    text = "".join(c if c.isprintable() else " " for c in text)
    width = _width(text, size)
    if width <= limit:
        return text
    kept = min(len(text) - 1, int(len(text) * limit / width) + 3)
    while True:
        short = text[: (kept + 1) // 2].rstrip() + "…" + text[len(text) - kept // 2 :].lstrip()
        if kept <= 2 or _width(short, size) <= limit:
            return short
        kept -= 1


# ---------------------------------------------------------------------------------------------------------------------
# curves.png


def curves(history: Sequence[dict[str, Any]], path: Path, trained_with: str | None = None) -> bool:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        history: the rows of metrics.csv; `val_loss` and `val_accuracy` are None without a validation part.
        path: of the PNG.
        trained_with: what `train_loss` measures, where that is not cross-entropy, as `val_loss` is.

    Returns:
        whether it was drawn; if not, the reason was said.
    """
    return _draw(path, curves_figure, history, path.parent.name, trained_with)


class LiveCurves:
    """curves.png, kept current during training for at most a hundredth of the epochs' time.

    with LiveCurves(directory / "curves.png") as live:
        for ...:
            live.update(history)  # after an epoch; draws when enough time has passed to pay for it

    What is not drawn yet is drawn at the end, also when the run was stopped or failed.

    Args:
        path: of the PNG.
        trained_with: what the training loss measures, where that is not cross-entropy.
        share: of the epochs' time that drawing may take, above 0.
    """

    FIRST_SECONDS = 0.5  # what the first drawing is expected to take, with the import of matplotlib

    def __init__(self, path: Path, trained_with: str | None = None, share: float = 0.01) -> None:
        self.path, self.trained_with, self.share = path, trained_with, share
        self.cost, self.trained = self.FIRST_SECONDS, 0.0  # seconds a drawing takes, and of epochs since the last
        self.history: Sequence[dict[str, Any]] = ()
        self.waiting = False
        self.failed = False

    def update(self, history: Sequence[dict[str, Any]]) -> None:
        """Take in the rows of metrics.csv, and draw them if it is time."""
        self.history, self.waiting = history, True
        self.trained += history[-1]["seconds"]
        if self.trained * self.share >= self.cost and not self.failed:
            self._draw()

    def _draw(self) -> None:
        began = time.perf_counter()
        self.failed = not curves(self.history, self.path, self.trained_with)  # said once, not after every epoch
        self.cost, self.trained, self.waiting = time.perf_counter() - began, 0.0, False

    def __enter__(self) -> LiveCurves:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.waiting and not self.failed:
            self._draw()


def curves_figure(history: Sequence[dict[str, Any]], name: str, trained_with: str | None = None) -> Figure:
    """The figure of `curves`, headed by the run's `name`. Losses that measure different things have an axis each.

    Raises:
        ValueError: there is no epoch to draw.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if not history:
        raise ValueError("no epoch has ended yet")
    epochs = [row["epoch"] for row in history]
    training, validation = ("train_loss", BLUE, "training"), ("val_loss", ORANGE, "validation")
    plain = "cross-entropy in nats"
    losses = [("Loss", plain, [training, validation])]
    if trained_with is not None:
        losses = [("Training loss", trained_with, [training]), ("Validation loss", plain, [validation])]
    panels = [
        *losses,
        ("Accuracy", "", [("train_accuracy", BLUE, "training"), ("val_accuracy", ORANGE, "validation")]),
        ("Learning rate", "", [("lr", GREY, "learning rate")]),
    ]
    values = {column: [_finite(row[column]) for row in history] for *_, lines in panels for column, *_ in lines}
    drawn = {column for column, numbers in values.items() if not np.isnan(numbers).all()}
    panels = [panel for panel in panels if panel[0] != "Validation loss" or "val_loss" in drawn]
    pitch = 1330 // len(panels)
    figure = _new_figure(1350, 450)
    handles: dict[str, Any] = {}
    for place, (title, quantity, lines) in enumerate(panels):
        axes = _pixel_axes(figure, 96 + pitch * place, 58, pitch - 99, 312)
        for column, color, label in lines:
            if column in drawn:
                [handles[label]] = axes.plot(
                    epochs,
                    values[column],
                    color=color,
                    label=label,
                    linewidth=1.8,
                    marker="o" if len(epochs) <= 30 else None,
                    markersize=4,
                )
        axes.set_title(title)
        axes.set_xlabel("epoch")
        if quantity:
            axes.set_ylabel(_fitted(quantity, 10, 300))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=pitch // 55, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if title == "Accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
            axes.set_ylim(top=min(1.01, axes.get_ylim()[1]))
        elif title == "Learning rate":
            axes.set_ylim(bottom=0)
    headline = _fitted(name, 11, 500) + _best_so_far(history)
    figure.text(16 / 1350, 1 - 24 / 450, headline, fontsize=11, va="center")
    known = [label for label in ("training", "validation") if label in handles]
    at = (1 - 12 / 1350, 1 - 24 / 450)
    figure.legend(
        [handles[label] for label in known], known, loc="center right", bbox_to_anchor=at, ncols=2, frameon=False
    )
    return figure


def _best_so_far(history: Sequence[dict[str, Any]]) -> str:
    validated = [row for row in history if row["val_accuracy"] is not None]
    if not validated:
        return f": training accuracy {history[-1]['train_accuracy']:.2%}, no validation part"
    best = max(validated, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    return f": best validation accuracy {best['val_accuracy']:.2%}, in epoch {best['epoch']} of {history[-1]['epoch']}"


def _finite(value: float | None) -> float:
    """A gap in the line for what cannot be drawn."""
    return float("nan") if value is None or not np.isfinite(value) else float(value)


# ---------------------------------------------------------------------------------------------------------------------
# confusion.png


def confusion(matrix: Tensor, classes: Sequence[str], path: Path) -> bool:
    """Draw a confusion matrix.

    Up to 20 classes every cell says its count and rate. Above, cells are colours and classes have numbers on the axes;
    lists beside and below them give names, counts and rates: the most frequent confusions, the classes recognised
    least, and up to 100 classes the recall of each.

    Args:
        matrix: counts `[num_classes, num_classes]`, rows the true class, columns the predicted.
        classes: their names.
        path: of the PNG.

    Returns:
        whether it was drawn; if not, the reason was said.
    """
    return _draw(path, confusion_figure, matrix.cpu().numpy(), classes)


def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """The figure of `confusion`."""
    return _small_matrix(counts, classes) if len(classes) <= 20 else _large_matrix(counts, classes)


def _rates(counts: np.ndarray) -> np.ndarray:
    """Each count as a share of its row, 0 to 1; a class without samples has 0 throughout."""
    return counts / np.maximum(1, counts.sum(1, keepdims=True))


def _small_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    number, cell, size = len(classes), _cell(len(classes)), 10
    names = [_fitted(name, size, 230) for name in classes]
    widest = max(_width(name, size) for name in names)
    slanted = widest > cell - 8
    left, bottom = widest + 50, (0.72 * widest + 16 if slanted else 16) + 50
    side = cell * number
    figure = _new_figure(left + max(side, 500) + 30, bottom + side + 70)
    axes = _matrix_axes(figure, counts, left, bottom, side)
    axes.set_xticks(range(number), names)
    axes.set_yticks(range(number), names)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    rates = _rates(counts)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if rates[row, column] > 0.45 else "#222222"
        count, rate = _count(counts[row, column]), _percent(rates[row, column])
        axes.text(column, row - 0.04, count, va="bottom", ha="center", color=color, fontsize=11 if cell > 60 else 10)
        axes.text(column, row + 0.06, rate, va="top", ha="center", color=color, fontsize=8)
    return figure


def _cell(number: int) -> int:
    """Width of a cell in pixels: large for few classes, and wide enough for two lines of text in any case."""
    return max(50, min(140, 80 - 3 * (number - 10)))


def _large_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    number, width, left, top = len(classes), 1340, 70, 70
    side = number * (520 // number) if number <= 260 else 520  # whole pixels a cell, as long as there are some
    table = 0 if number > 100 else 46 + 17 * -(-number // 4)
    height = top + 570 + table + 10
    figure = _new_figure(width, height)
    axes = _matrix_axes(figure, counts, left, height - top - side, side)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    page = _Page(figure)
    _write_lists(page, counts, classes, left + side + 45, top)
    if table:
        _write_recalls(page, counts, classes, left - 50, height - table)
    return figure


def _matrix_axes(figure: Figure, counts: np.ndarray, left: float, bottom: float, side: float) -> Axes:
    """The coloured cells, with title and axis labels: blue what is right, orange what is wrong."""
    axes = _pixel_axes(figure, left, bottom, side, side)
    number = len(counts)
    shade = np.sqrt(_rates(counts))[:, :, None]  # the square root lets rare errors be seen
    full = np.where(np.eye(number, dtype=bool)[:, :, None], _rgb(BLUE), _rgb(ORANGE))
    axes.imshow(1 - shade * (1 - full), interpolation="nearest" if number <= 260 else "antialiased", aspect="equal")
    axes.set_xlabel("predicted class", labelpad=8)
    axes.set_ylabel("true class", labelpad=8)
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.grid(False)
    if side / number >= 20:
        axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
        axes.grid(True, which="minor", color="#ececec", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    total, hits = int(counts.sum()), int(counts.diagonal().sum())
    page = _Page(figure)
    page.write(left, 26, f"Confusion matrix: {hits:,} of {total:,} right ({hits / max(1, total):.2%})", 12, bold=True)
    page.write(left, 50, "Blue is right, orange wrong; the darker, the larger the share of the true class", color=GREY)
    return axes


class _Page:
    """Text at places of a figure given in pixels from its upper left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches() * DPI

    def write(
        self, x: float, y: float, text: str, size: float = 9, ha: str = "left", color: str = BLACK, bold: bool = False
    ) -> None:
        """One line of text, its middle at the height `y`."""
        place = x / self.width, 1 - y / self.height
        weight = "bold" if bold else "normal"
        self.figure.text(*place, text, fontsize=size, ha=ha, va="center", color=color, fontweight=weight)


def _write_lists(page: _Page, counts: np.ndarray, classes: Sequence[str], left: float, top: float) -> None:
    """The most frequent confusions and the classes with the lowest recall, one above the other."""
    rates = _rates(counts)
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    pairs = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:12]]
    pairs = [pair for pair in pairs if wrong[pair]]
    here = np.flatnonzero(counts.sum(1))
    lowest = here[np.argsort(rates.diagonal()[here], kind="stable")[:9]]
    room = page.width - left - 20

    page.write(left, top + 8, "Most frequent confusions: true → predicted", 10, bold=True)
    y = top + 32
    for true, predicted in pairs:
        names = " → ".join(_fitted(classes[i], 9, (room - 105) / 2 - 12) for i in (true, predicted))
        page.write(left + 40, y, _count(counts[true, predicted]), ha="right")
        page.write(left + 93, y, _percent(rates[true, predicted]), ha="right", color=GREY)
        page.write(left + 105, y, names)
        y += 20
    if not pairs:
        page.write(left, y, "none")
        y += 20
    page.write(left, y + 16, "Lowest recall", 10, bold=True)
    y += 39
    for place in lowest:
        told = f"{counts[place, place]:,} of {counts[place].sum():,}"
        page.write(left + 40, y, _percent(rates[place, place]), ha="right")
        page.write(left + 52, y, f"{_fitted(classes[place], 9, room - 190)}   {told}")
        y += 20


def _write_recalls(page: _Page, counts: np.ndarray, classes: Sequence[str], left: float, top: float) -> None:
    """Number, name, recall and counts of every class, in four columns."""
    rates, totals = _rates(counts).diagonal(), counts.sum(1)
    told = [f"{_count(right)}/{_count(total)}" for right, total in zip(counts.diagonal(), totals, strict=True)]
    lines = -(-len(classes) // 4)
    column = (page.width - left - 20) / 4
    at_counts = column - 16
    at_rate = at_counts - max(_width(text, 9) for text in told) - 12
    page.write(left, top + 10, "Recall of each class", 10, bold=True)
    for place, name in enumerate(classes):
        x, y = left + place // lines * column, top + 36 + 17 * (place % lines)
        page.write(x + 22, y, str(place), ha="right", color=GREY)
        page.write(x + 30, y, _fitted(name, 9, at_rate - 50 - 30))
        page.write(x + at_rate, y, _percent(rates[place]) if totals[place] else "", ha="right")
        page.write(x + at_counts, y, told[place], ha="right", color=GREY)


def _rgb(color: str) -> np.ndarray:
    """Red, green and blue of a #rrggbb, 0 to 1."""
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _count(value: int) -> str:
    return f"{value:,}" if value < 100_000 else f"{value / 1000:,.0f}k"


def _percent(rate: float) -> str:
    """A share of 0 to 1 in percent; what is not none or all does not read as 0 or 100."""
    if rate in (0, 1):
        return f"{100 * rate:.0f}%"
    return f"{min(99.9, max(0.1, 100 * rate)):.1f}%"


# ---------------------------------------------------------------------------------------------------------------------
# mistakes.png


def mistakes(
    images: Tensor,
    truths: Tensor,
    predictions: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    path: Path,
    transforms: Sequence[Any] = (),
    names: Sequence[str] = (),
) -> bool:
    """Draw the most confident errors, in the order given: each image, what it is and what it was taken for.

    Args:
        images: `[n, channels, height, width]`, uint8, or floats that are 0 to 1 once `Normalize` is undone; at most the
            first 24 are drawn.
        truths, predictions: class indices `[n]`.
        probabilities: of the predictions, `[n]`, 0 to 1.
        classes: the names.
        path: of the PNG.
        transforms: what was done to the images; of this, `Normalize` is undone.
        names: of the images, to be written below them.

    Returns:
        whether it was drawn; if not, the reason was said.
    """
    told = truths.tolist(), predictions.tolist(), probabilities.tolist()
    return _draw(path, mistakes_figure, images, *told, classes, transforms, names)


def mistakes_figure(
    images: Tensor,
    truths: Sequence[int],
    predictions: Sequence[int],
    probabilities: Sequence[float],
    classes: Sequence[str],
    transforms: Sequence[Any] = (),
    names: Sequence[str] = (),
) -> Figure:
    """The figure of `mistakes`."""
    from engine.data.augment import Normalize

    for transform in reversed(transforms):
        if isinstance(transform, Normalize):
            images = images * transform.std.cpu() + transform.mean.cpu()
    number, tile, picture, size = min(24, len(truths)), 210, 150, 9
    columns = max(3, min(6, number))
    rows, row_height = -(-number // columns), picture + (93 if names else 76)
    width, height = columns * tile + 20, max(1, rows) * row_height + 66 if number else 80
    figure = _new_figure(width, height)
    page = _Page(figure)
    page.write(20, 26, "Most confident mistakes" if number else "No mistakes", 12, bold=True)
    note = "Above: how sure the model was. ✗ what it took the image for, ✓ what it is"
    page.write(20, 50, note if number else "Every sample was classified right", color=GREY)
    for place in range(number):
        left, top = 10 + place % columns * tile, 74 + place // columns * row_height
        axes = _pixel_axes(figure, left + (tile - picture) / 2, height - top - 18 - picture, picture, picture)
        axes.imshow(*_viewable(images[place]), vmin=0, vmax=1)
        axes.set_axis_off()
        middle, below = left + tile / 2, top + 18 + picture
        limit = tile - 12 - _width("✗ ", size)
        page.write(middle, top + 7, _percent(probabilities[place]), size, "center", GREY)
        page.write(middle, below + 12, f"✗ {_fitted(classes[predictions[place]], size, limit)}", size, "center", ORANGE)
        page.write(middle, below + 29, f"✓ {_fitted(classes[truths[place]], size, limit)}", size, "center")
        if names:
            page.write(middle, below + 46, _fitted(names[place], size, tile - 12), size, "center", GREY)
    return figure


def _viewable(image: Tensor) -> tuple[np.ndarray, str]:
    """An image `[channels, height, width]` as matplotlib shows it, 0 to 1, and the colour map for grey ones."""
    pixels = image.detach().cpu().float().numpy()
    if not image.is_floating_point():
        pixels = pixels / 255
    pixels = pixels.clip(0, 1)
    return (pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels.mean(0)), "gray"


# ---------------------------------------------------------------------------------------------------------------------
# sweep.png


def sweep(rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], column: str, path: Path) -> bool:
    """Draw a sweep: the best configurations, each run a dot, and beside them what each setting did to the accuracy.

    Args:
        rows: the finished runs, as compare.read_runs gives them.
        shown: the rows of the table, best first; where they stand for several seeds, with the standard deviation.
        column: the accuracy on the axis.
        path: of the PNG.

    Returns:
        whether it was drawn; if not, the reason was said.
    """
    return _draw(path, sweep_figure, rows, shown, column, path.parent.name)


def sweep_figure(rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], column: str, name: str) -> Figure:
    """The figure of `sweep`, headed by the sweep's `name`."""
    settings = [setting for setting in compare.differing(list(rows)) if setting != "seed"]
    panels = [setting for setting in settings if _can_be_drawn(rows, setting)][:6]
    best = list(shown[:25])
    labels = [_fitted(_described(row, settings), 9, 400) for row in best]
    line, plot, across, up, below = 24, 300, 300, 170, 110  # pixels
    left, top, gap = 40 + max(_width(label, 9) for label in labels), 104, 100
    list_height, grid_rows = line * len(best) + 8, -(-len(panels) // 2)
    height = top + max(list_height + 62, grid_rows * (up + below))
    width = max(660, left + plot + min(2, len(panels)) * (gap + across) + 30)
    figure = _new_figure(width, height)
    page = _Page(figure)
    runs = f"{len(rows)} run" + "s" * (len(rows) != 1)
    runs += f", the best {len(best)}" if len(best) < len(shown) else ""
    page.write(16, 26, f"{_fitted(name, 12, width - 250)}: {runs}", 12, bold=True)
    means = "; a ring is the mean over seeds, its bar their standard deviation" if "runs" in best[0] else ""
    page.write(16, 50, _fitted(f"A dot is a run, the best on top{means}", 9, width - 32), color=GREY)

    axes = _pixel_axes(figure, left, height - top - list_height, plot, list_height)
    for place, row in enumerate(best):
        of = [run[column] for run in rows if _values(run, settings) == _values(row, settings)]
        axes.plot([_finite(value) for value in of], [place] * len(of), "o", color=BLUE, markersize=4, zorder=3)
        if "runs" in row:
            mean, spread = _finite(row[column]), row.get(f"{column}_std") or 0.0
            axes.errorbar(mean, place, xerr=spread, fmt="o", mfc="none", color=GREY, capsize=3, markersize=9, zorder=2)
    axes.set_yticks(range(len(best)), labels, fontsize=9)
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.margins(x=0.08)
    _percent_axis(axes.xaxis, 5)
    axes.set_xlabel(column.replace("val_", "validation ").replace("_", " "))
    for place, setting in enumerate(panels):
        x, y = left + plot + gap + place % 2 * (across + gap), top + place // 2 * (up + below)
        axes = _pixel_axes(figure, x, height - y - up, across, up)
        _draw_setting(
            axes, [row for row in rows if setting in row and row[column] is not None], setting, column, across
        )
        axes.set_title(_fitted(setting, 11, across - 20))
        _percent_axis(axes.yaxis, 6)
    return figure


def _values(row: dict[str, Any], settings: Sequence[str]) -> list[str | None]:
    return [compare.cell(row[name]) if name in row else None for name in settings]


def _described(row: dict[str, Any], settings: Sequence[str]) -> str:
    """What tells a configuration from the others."""
    words = [_fitted(f"{name.rpartition('.')[2]}={_brief(row[name])}", 9, 150) for name in settings if name in row]
    return "  ".join(words) or str(row.get("run", "all runs"))


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else compare.cell(value)


def _can_be_drawn(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a setting has numbers, or few enough other values to be told apart on an axis."""
    values = {compare.cell(row[name]) for row in rows if name in row}
    return len(values) <= 6 or all(compare.as_number(value) is not None for value in values)


def _percent_axis(axis: Any, most: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def _draw_setting(axes: Axes, rows: Sequence[dict[str, Any]], name: str, column: str, across: int) -> None:
    """The accuracy of every run over one setting; over a learning rate or the like on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values, accuracies = [row[name] for row in rows], [_finite(row[column]) for row in rows]
    dots = {"color": BLUE, "markersize": 4, "alpha": 0.6}
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        axes.plot(values, accuracies, "o", **dots)  # type: ignore[arg-type]
        decades = math.log10(max(values) / min(values)) if min(values) > 0 else 0
        if decades >= 1:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=[1.0] if decades > 2 else [1.0, 2.0, 5.0], numticks=6))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.margins(x=0.08)
        return
    texts = [compare.cell(value) for value in values]
    known = sorted(set(texts))
    axes.plot([known.index(text) for text in texts], accuracies, "o", **dots)  # type: ignore[arg-type]
    slanted = max(_width(text, 9) for text in known) > across / len(known) - 8
    axes.set_xticks(range(len(known)), [_fitted(text, 9, 100 if slanted else across) for text in known], fontsize=9)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(known) - 0.5)
