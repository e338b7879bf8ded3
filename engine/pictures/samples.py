"""What training sees of a data set: a picture of samples, counts per class, mean and deviation per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.data.batches import Batches
from engine.data.images import UNREADABLE, ImageFiles
from engine.data.splits import Split, class_counts, load_splits
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, RunError, counted, one_line, printable
from engine.pictures.style import Page, fitted, house_style, viewable
from engine.terminal import watched
from engine.training.metrics import class_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 256  # samples read at once for the statistics


def show(config: dict[str, Any]) -> None:
    """Write the picture and print the statistics.

    Args:
        config: dataset, images, epoch, seed, num_workers and output, as in configs/datasets.yaml.

    Raises:
        RequestError: the data set cannot be read; where it is images, with the number of those that cannot.
        RunError: the picture cannot be written.
    """
    splits, classes = load_splits(config["dataset"])
    try:
        _show(config, splits, classes)
    except RunError as error:
        if UNREADABLE not in str(error):
            raise
        raise _all_unreadable(splits, error) from None


def _show(config: dict[str, Any], splits: dict[str, Split], classes: list[str]) -> None:
    settings = config["dataset"]
    how: dict[str, Any] = {"device": torch.device("cpu"), "training": True}
    how |= {key: config[key] for key in ("seed", "num_workers")}
    shown = Batches(splits["train"], settings["train_transforms"], batch_size=config["images"], **how)
    shape = shown.sample_shape()
    images, labels = next(iter(shown.epoch(config["epoch"])))
    pixels = viewable(images, parse_transforms(settings["train_transforms"], "dataset.train_transforms"))
    try:
        with house_style():
            samples_figure(pixels, [classes[i] for i in class_of(labels).tolist()]).savefig(config["output"])
    except (OSError, ValueError) as error:
        raise RunError(f"output={config['output']}: cannot be written ({one_line(error, 120)})") from None

    plain = [entry for entry in settings["eval_transforms"] if not (isinstance(entry, dict) and "Normalize" in entry)]
    read = Batches(splits["train"], plain, batch_size=BATCH, shuffle=False, **how)
    counts, mean, std = statistics(read, len(classes))
    what = f"{counted(len(images), 'training sample')}, {'x'.join(map(str, shape))}"
    print(f"{what}, augmented as in epoch {config['epoch']}: {config['output']}\n")
    print(table(classes, counts, {name: split for name, split in splits.items() if name != "train"}))
    print("\nmean and standard deviation of the training images, for train_transforms and eval_transforms:")
    mean_listed, std_listed = (", ".join(f"{value:.4f}" for value in values.tolist()) for values in (mean, std))
    print(f"  - Normalize: {{mean: [{mean_listed}], std: [{std_listed}]}}")


def _all_unreadable(splits: dict[str, Split], error: RunError) -> RunError:
    """The error of the first image that cannot be read, with the number of all: every file is tried."""
    counts = {}
    for name, split in splits.items():
        if isinstance(split.part, ImageFiles) and split.indices is not None:
            counts[name] = 0
            for row in watched(split.indices.tolist(), f"checking {name}", len(split)):
                try:
                    split.part.read(row)
                except RequestError:
                    counts[name] += 1
    number = sum(counts.values())
    if number < 2:
        return error
    parts = ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count)
    return type(error)(f"{number:,} images cannot be read ({parts}); the first: {error}")


def statistics(batches: Batches, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of each class `[num_classes]`, and mean and standard deviation `[channels]` over all pixels, 0 to 1."""
    counts = torch.zeros(num_classes, dtype=torch.int64)
    total = squares = torch.zeros((), dtype=torch.float64)
    pixels = 0
    for images, labels in watched(batches.epoch(1), "reading", len(batches)):
        counts += class_of(labels).bincount(minlength=num_classes)
        values = images.double()
        total = total + values.sum((0, 2, 3))
        squares = squares + values.square().sum((0, 2, 3))
        pixels += images.shape[0] * images.shape[2] * images.shape[3]
    mean = total / pixels
    return counts, mean, (squares / pixels - mean.square()).clamp(min=0).sqrt()


def table(classes: list[str], train: Tensor, others: dict[str, Split]) -> str:
    """Samples of every class in every split; a dash where only reading all samples would tell."""
    known: dict[str, dict[str, int] | None] = {"train": dict(zip(classes, train.tolist(), strict=True))}
    known |= {name: class_counts(split, classes) for name, split in others.items()}
    columns = [["class", *(printable(name) for name in classes), "all"]]
    for name, of_class in known.items():
        counts = list(of_class.values()) if of_class else []
        cells = [f"{count:,}" for count in (*counts, sum(counts))] if of_class else ["-"] * (len(classes) + 1)
        columns.append([name, *cells])
    width = max(len(cell) for cell in columns[0])
    lines = zip(*columns, strict=True)
    return "\n".join(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in lines)


def samples_figure(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Images as `style.viewable` gives them, as a grid, each with its title."""
    columns, width, height = math.ceil(math.sqrt(len(images))), 130, 150
    page = Page(width * columns, height * math.ceil(len(images) / columns))
    for place, (pixels, title) in enumerate(zip(images, titles, strict=True)):
        left, top = place % columns * width, place // columns * height
        page.write(left + width / 2, top + 14, fitted(title, 8, width - 8), 8, "center")
        page.show(pixels, left + 4, top + 26, width - 8)
    return page.figure
