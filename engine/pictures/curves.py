"""curves.png of a run: loss, accuracy and learning rate over the epochs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.distributed import is_first
from engine.pictures import style
from engine.pictures.style import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {"train": (BLUE, "training"), "val": (ORANGE, "validation"), "lr": (GREY, "learning rate")}


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

    def __init__(self, path: Path, trained_with: str | None = None, share: float = 0.01) -> None:
        self.path, self.trained_with, self.share = path, trained_with, share
        self.cost = 0.5  # seconds that drawing takes, at first a guess that includes importing matplotlib
        self.trained = 0.0  # seconds of epochs since the last drawing
        self.waiting: Sequence[dict[str, Any]] = ()  # rows that are not drawn yet, with all before them
        self.failed = False

    def update(self, history: Sequence[dict[str, Any]]) -> None:
        """Take in the rows of metrics.csv, and draw them if it is time."""
        self.waiting = history
        self.trained += history[-1]["seconds"]
        if self.trained * self.share >= self.cost:
            self._draw()

    def _draw(self) -> None:
        if self.waiting and not self.failed and is_first():  # said once, not after every epoch
            began = time.perf_counter()
            name = self.path.parent.name
            self.failed = not style.draw(self.path, curves_figure, self.waiting, name, self.trained_with)
            self.cost, self.trained, self.waiting = time.perf_counter() - began, 0.0, ()

    def __enter__(self) -> LiveCurves:
        return self

    def __exit__(self, *exception: object) -> None:
        self._draw()


def curves_figure(history: Sequence[dict[str, Any]], name: str, trained_with: str | None = None) -> Figure:
    """Loss, accuracy and learning rate over the epochs. Losses that measure different things have an axis each.

    Args:
        history: the rows of metrics.csv, at least one; `val_loss` and `val_accuracy` are None without a validation
            part.
        name: of the run.
        trained_with: what `train_loss` measures, where that is not cross-entropy, as `val_loss` is.
    """
    epochs = [row["epoch"] for row in history]
    measured = {column for row in history for column, value in row.items() if value is not None}
    plain = "cross-entropy in nats"
    panels = [("Loss", plain, ["train_loss", "val_loss"])]
    if trained_with is not None:
        panels = [("Training loss", trained_with, ["train_loss"]), ("Validation loss", plain, ["val_loss"])]
    panels += [("Accuracy", "", ["train_accuracy", "val_accuracy"]), ("Learning rate", "", ["lr"])]
    panels = [panel for panel in panels if measured.intersection(panel[2])]

    page = style.Page(1350, 450)
    page.write(16, 24, style.fitted(name, 11, 500) + _best_so_far(history), 11)
    pitch = 1330 // len(panels)
    for place, (title, quantity, columns) in enumerate(panels):
        axes = page.axes(96 + pitch * place, 80, pitch - 99, 312)
        marker = "o" if len(epochs) <= 30 else None
        for column in columns:
            if column in measured:
                color, label = LINES[column.partition("_")[0]]
                values = style.finite(row[column] for row in history)
                axes.plot(epochs, values, color=color, label=label, linewidth=1.8, marker=marker, markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_ylabel(style.fitted(quantity, 10, 300))
        style.count_axis(axes.xaxis, pitch // 55)
        style.number_axis(axes.yaxis, 7, percent=title == "Accuracy")
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if title == "Accuracy":
            axes.set_ylim(top=min(1.01, axes.get_ylim()[1]))
            known = axes.get_legend_handles_labels()
            at = (1 - 12 / page.width, 1 - 24 / page.height)
            page.figure.legend(*known, loc="center right", bbox_to_anchor=at, ncols=2, frameon=False)
        elif title == "Learning rate":
            axes.set_ylim(bottom=0)
    return page.figure


def _best_so_far(history: Sequence[dict[str, Any]]) -> str:
    validated = [row for row in history if row["val_accuracy"] is not None]
    if not validated:
        return f": training accuracy {history[-1]['train_accuracy']:.2%}, no validation part"
    best = max(validated, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    return f": best validation accuracy {best['val_accuracy']:.2%}, in epoch {best['epoch']} of {history[-1]['epoch']}"
