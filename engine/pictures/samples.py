"""What training sees of a data set: a picture of samples, counts per class, mean and deviation per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.augment import Normalize
from engine.data.batches import Batches
from engine.data.images import UNREADABLE, ImageFiles
from engine.data.splits import Split, load_splits
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, RunError, one_line, printable
from engine.terminal import watched
from engine.training.metrics import class_of

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
    images = without_normalization(images, parse_transforms(settings["train_transforms"], "dataset.train_transforms"))
    draw(images, [classes[i] for i in class_of(labels).tolist()], Path(config["output"]))

    plain = [entry for entry in settings["eval_transforms"] if not (isinstance(entry, dict) and "Normalize" in entry)]
    read = Batches(splits["train"], plain, batch_size=BATCH, shuffle=False, **how)
    counts, mean, std = statistics(read, len(classes))
    size = "x".join(map(str, shape))
    what = f"{len(images)} training sample{'s' * (len(images) != 1)}, {size}"
    print(f"{what}, augmented as in epoch {config['epoch']}: {config['output']}\n")
    print(table(classes, counts, {name: split for name, split in splits.items() if name != "train"}))
    print("\nmean and standard deviation of the training images, for train_transforms and eval_transforms:")
    print(f"  - Normalize: {{mean: [{listed(mean)}], std: [{listed(std)}]}}")


def _all_unreadable(splits: dict[str, Split], error: RunError) -> RunError:
    """The error of the first image that cannot be read, with the number of all: every file is tried."""
    counts = {}
    for name, split in splits.items():
        if isinstance(split.part, ImageFiles) and split.indices is not None:
            rows = watched(split.indices.tolist(), f"checking {name}", len(split))
            counts[name] = sum(not _can_be_read(split.part, row) for row in rows)
    number = sum(counts.values())
    if number < 2:
        return error
    parts = ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count)
    return type(error)(f"{number:,} images cannot be read ({parts}); the first: {error}")


def _can_be_read(files: ImageFiles, row: int) -> bool:
    try:
        files.read(row)
    except RequestError:
        return False
    return True


def without_normalization(images: Tensor, transforms: Sequence[Any]) -> Tensor:
    """Images as they were before Normalize, clipped to 0 to 1, for looking at."""
    for transform in transforms:
        if isinstance(transform, Normalize):
            images = images * transform.std + transform.mean
    return images.clamp(0, 1)


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


def table(classes: Sequence[str], train: Tensor, others: dict[str, Split]) -> str:
    """Samples of every class in every split; a dash where only reading all samples would tell."""
    columns = {"train": train.tolist(), **{name: _counts(split, len(classes)) for name, split in others.items()}}
    names = [printable(name) for name in classes]
    width = max(5, *(len(name) for name in names))
    lines = [f"{'class':<{width}}" + "".join(f"{name:>9}" for name in columns)]
    for label, name in enumerate(names):
        cells = ["-" if counts is None else f"{counts[label]:,}" for counts in columns.values()]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    sums = ["-" if counts is None else f"{sum(counts):,}" for counts in columns.values()]
    return "\n".join([*lines, f"{'all':<{width}}" + "".join(f"{cell:>9}" for cell in sums)])


def _counts(split: Split, num_classes: int) -> list[int] | None:
    labels = split.part[1] if isinstance(split.part, tuple) else getattr(split.part, "targets", None)
    if labels is None or split.indices is None:
        return None
    return torch.as_tensor(labels)[split.indices].bincount(minlength=num_classes).tolist()


def listed(values: Tensor) -> str:
    """Four decimals each, as in a YAML list."""
    return ", ".join(f"{value:.4f}" for value in values.tolist())


def draw(images: Tensor, titles: Sequence[str], path: Path) -> None:
    """Write images `[n, channels, height, width]`, 0 to 1, as a grid, each with its title.

    Raises:
        RunError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import, and only needed here

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.3 * columns, 1.5 * rows), dpi=100, layout="constrained")
    for axes, number in zip(figure.subplots(rows, columns, squeeze=False).flat, range(rows * columns), strict=True):
        axes.axis("off")
        if number >= len(images):
            continue
        image = images[number].permute(1, 2, 0)
        grey = image.shape[2] != 3
        axes.imshow(image[:, :, 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        title = titles[number]
        axes.set_title(
            title if len(title) <= 16 else title[:15] + "\N{HORIZONTAL ELLIPSIS}", fontsize=8, parse_math=False
        )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RunError(f"output={path}: cannot be written ({one_line(error, 120)})") from None
