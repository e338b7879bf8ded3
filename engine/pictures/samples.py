"""What training sees of a data set: a picture of samples, counts per class, mean and deviation per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.data.audit import Looked, in_two_splits, look_at
from engine.data.batches import Batches
from engine.data.devices import cores
from engine.data.images import ImageFiles
from engine.data.images import shown as shown_path
from engine.data.splits import Split, class_counts, load_splits
from engine.data.transforms import parse_transforms
from engine.errors import RunError, counted, one_line, printable, shortened
from engine.pictures.style import Page, fitted, house_style, viewable
from engine.terminal import watched
from engine.training.metrics import class_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 256  # samples read at once for the statistics
SOME = 3  # images that are named
UNEVEN = 1.5  # times the smallest class: from there on it is said what can be done


def show(config: dict[str, Any]) -> None:
    """Write the picture and print the statistics, and what is wrong with the images.

    Args:
        config: dataset, images, epoch, seed, num_workers and output, as in configs/datasets.yaml.

    Raises:
        RequestError: the data set cannot be read.
        RunError: the picture cannot be written; or, after the rest, images that cannot be read, with their number.
    """
    splits, classes = load_splits(config["dataset"])
    threads = config["num_workers"] or cores()
    found = {name: look_at(split, name, threads) for name, split in splits.items()}
    looked = {name: one for name, one in found.items() if one is not None}
    errors = {name: one.errors for name, one in looked.items() if one.errors}
    train, bad = splits["train"], errors.get("train", {})
    if bad and train.indices is not None:
        if len(bad) == len(train):
            raise _unreadable(errors)
        readable = torch.tensor([place not in bad for place in range(len(train))])
        train = replace(train, indices=train.indices[readable])
    _show(config, {**splits, "train": train}, classes)
    print()
    for name, of_split in errors.items():
        split = splits[name]
        print(f"cannot be read: {len(of_split):,} of {len(split):,} {name} images: {_some(split, of_split)}")
    print("\n".join(_same(splits, looked)))
    if train.skip_unreadable:
        errors.pop("train", None)
    if errors:
        raise _unreadable(errors)


def _unreadable(errors: dict[str, dict[int, str]]) -> RunError:
    """That images cannot be read, with the first error and the number of all."""
    number = sum(map(len, errors.values()))
    first = next(iter(next(iter(errors.values())).values()))
    if number == 1:
        return RunError(first)
    parts = ", ".join(f"{len(of_split):,} of {name}" for name, of_split in errors.items())
    return RunError(f"{number:,} images cannot be read ({parts}); the first: {first}")


def _same(splits: dict[str, Split], looked: dict[str, Looked]) -> list[str]:
    """Which images are in two splits, a line for each two of these."""
    if len(looked) < len(splits):
        kinds = sorted({type(split.part).__name__ for name, split in splits.items() if name not in looked})
        return [f"images that are in two splits are not looked for in {' and '.join(kinds)}, only in files and memory"]
    by = "byte for byte" if isinstance(splits["train"].part, ImageFiles) else "pixel for pixel"
    lines = []
    for (one, other), pairs in in_two_splits(looked).items():
        if pairs:
            named = [f"{_name(splits[other], b)} = {_name(splits[one], a)}" for a, b in pairs[:SOME]]
            rest = f" and {len(pairs) - SOME:,} more" if len(pairs) > SOME else ""
            of = f"{len(pairs):,} of {len(splits[other]):,} {other} images"
            lines.append(f"the same, {by}: {of} are in {one} too: {', '.join(named)}{rest}")
    if lines:
        return [*lines, "what was seen in training says little about new images: take it out of one of the two"]
    return [f"no image is in two of {', '.join(splits)} ({by})"]


def _some(split: Split, places: Sequence[int] | dict[int, str]) -> str:
    named = [_name(split, place) for place in list(places)[:SOME]]
    return ", ".join(named) + (f" and {len(places) - SOME:,} more" if len(places) > SOME else "")


def _name(split: Split, place: int) -> str:
    """The file of an image, or its number in the data."""
    row = int(split.indices[place])  # type: ignore[index]
    return shown_path(split.part.paths[row]) if isinstance(split.part, ImageFiles) else f"sample {row}"


def uneven(counts: dict[str, int]) -> str:
    """How far the largest class is from the smallest, and what can be done about it."""
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    most, least = counts[largest], counts[smallest]
    if most == least:
        return f"every class has {counted(most, 'training image')}"
    told = f"largest class {shortened(largest, 40)} {most:,}, smallest {shortened(smallest, 40)} {least:,}"
    if not least:
        return f"{told}: no model learns a class without images"
    told += f", {most / least:.2f} to 1"
    if most < UNEVEN * least:
        return told
    return f"{told}: dataset.balance=true draws all equally often, criterion.weight=balanced weighs them in the loss"


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
    read = Batches(replace(splits["train"], balance=False), plain, batch_size=BATCH, shuffle=False, **how)
    counts, mean, std = statistics(read, len(classes))
    what = f"{counted(len(images), 'training sample')}, {'x'.join(map(str, shape))}"
    print(f"{what}, augmented as in epoch {config['epoch']}: {config['output']}\n")
    print(table(classes, counts, {name: split for name, split in splits.items() if name != "train"}))
    print(f"\n{uneven(dict(zip(classes, counts.tolist(), strict=True)))}")
    print("\nmean and standard deviation of the training images, for train_transforms and eval_transforms:")
    mean_listed, std_listed = (", ".join(f"{value:.4f}" for value in values.tolist()) for values in (mean, std))
    print(f"  - Normalize: {{mean: [{mean_listed}], std: [{std_listed}]}}")


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
