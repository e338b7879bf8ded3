"""Which samples are for training, for validation and for the test: the whole of a data set, divided and checked."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from engine.build import build, check_folds, locate
from engine.data.augment import Resize
from engine.data.images import ImageData, ImageFiles, shown
from engine.data.reader import cannot_be_read
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, counted, printable, shortened

# Settings of every dataset, and those of file datasets, that are used here and not by the dataset's function.
COMMON = (
    "val_fraction", "folds", "fold", "limit", "balance", "train_transforms", "eval_transforms", "target_transform",
    "steps_per_epoch", "match_model",
)  # fmt: skip
OF_FILES = ("skip_unreadable", "cache", "cache_dir")


@dataclass(frozen=True)
class Split:
    """Some samples of a data set.

    Attributes:
        part: the samples, as `ImageData` has them.
        indices: int64 `[n]`, which of them; None for an iterable-style data set, that only it can count.
        num_classes: labels are below it.
        limit: of an iterable-style data set, samples to take at most.
        steps: of an iterable-style data set, batches a training epoch has.
        sampler: as in `ImageData`, for training.
        skip_unreadable: go on without image files that cannot be read, in training.
        balance: draw the classes equally often, in training.
        target_transform: of training labels, f(labels int64 `[batch]`, num_classes).
        fold: of the training samples of a cross-validation, which part of how many validates: "0 of 5".
    """

    part: Any
    indices: Tensor | None
    num_classes: int
    limit: int | None = None
    steps: int | None = None
    sampler: Callable[[Tensor], Iterable[int]] | None = None
    skip_unreadable: bool = False
    balance: bool = False
    target_transform: Callable[[Tensor, int], Tensor] | None = None
    fold: str = ""

    def __len__(self) -> int:
        """Samples; 0 where only reading them could tell."""
        if self.indices is not None:
            return len(self.indices)
        length = len(self.part) if hasattr(self.part, "__len__") else 0
        return length if self.limit is None else min(length, self.limit)

    def labels(self) -> Tensor | None:
        """The class of every sample, int64 `[n]`, or None where only reading all of them would tell."""
        labels = _labels(self.part)
        return None if labels is None or self.indices is None else labels[self.indices]


def load_splits(settings: dict[str, Any], only: str | None = None) -> tuple[dict[str, Split], list[str]]:
    """Read the data set that a configuration names, and divide it.

    Args:
        settings: the dataset group of the configuration.
        only: leave out every split but this one.

    Returns:
        as `divide`.

    Raises:
        RequestError: the data is not there or is damaged, or as `divide`.
    """
    data = build({key: value for key, value in settings.items() if key not in COMMON + OF_FILES}, "dataset")
    if not isinstance(data, ImageData):
        raise RequestError(f"{settings['_target_']} returned {type(data).__name__}; expected ImageData")
    labels_to = settings.get("target_transform")
    skip_unreadable = bool(settings.get("skip_unreadable"))
    splits, classes = divide(
        data,
        val_fraction=settings["val_fraction"],
        folds=settings.get("folds"),
        fold=settings.get("fold"),
        limit=settings["limit"],
        steps_per_epoch=settings.get("steps_per_epoch"),
        skip_unreadable=skip_unreadable,
        balance=bool(settings.get("balance")),
        target_transform=None if labels_to is None else locate(labels_to, "dataset.target_transform"),
    )
    if only is not None:
        splits = {name: split for name, split in splits.items() if name == only}
    if settings.get("cache"):
        splits = _from_cache(splits, settings, skip_unreadable)
    return splits, classes


def divide(
    data: ImageData,
    *,
    val_fraction: float = 0.0,
    folds: int | None = None,
    fold: int | None = None,
    limit: int | None = None,
    steps_per_epoch: int | None = None,
    skip_unreadable: bool = False,
    balance: bool = False,
    target_transform: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[dict[str, Split], list[str]]:
    """The splits of a data set; a validation part is held out where it has none of its own.

    Args:
        data: all its samples.
        val_fraction: of the training samples, held out of each class, 0 to 1.
        folds, fold: into how many parts the samples for training and validation are divided, and which of them, from 0
            on, is the validation part, instead of that share; None for no cross-validation.
        limit: samples of each split at most, in the proportions of the classes; None takes all.
        steps_per_epoch: batches of an epoch, for an iterable-style data set.
        skip_unreadable: go on without image files that cannot be read, in training.
        balance: draw the classes equally often, in training.
        target_transform: of training labels, f(labels int64 `[batch]`, num_classes).

    Returns:
        the splits train, val (the data set's own, or held out; absent with neither) and test; the class names.

    Raises:
        RequestError: labels outside the classes, fewer than two of these, or what does not go together.
    """
    classes = [printable(str(name)) for name in data.classes]
    for name, part in {"train": data.train, "val": data.val, "test": data.test}.items():
        if part is not None or name != "val":
            _check_part(part, name, classes)
    _check_classes(classes, data.train)

    check_folds(folds, fold)
    data = data if folds is None else _joined(data, folds)
    count, labels = _count(data.train), _labels(data.train)
    holds_out = bool(folds or (data.val is None and val_fraction))
    if labels is None and count is not None and (limit or holds_out):
        what = "samples of dataset.limit are taken" if limit else "validation is held out"
        print(f"{type(data.train).__name__} has no .targets: {what} at random, not class by class")
    held_out = None
    if folds is not None and fold is not None and count is not None:
        held_out = _fold_of(labels, count, folds, fold, classes)
        sizes = f"{counted(int(held_out.sum()), 'sample')} of {len(held_out):,}"
        print(f"dataset.fold={fold} of {folds}: {sizes} validate, and dataset.val_fraction is not used", flush=True)
    elif holds_out and count is not None:
        held_out = hold_out(labels, count, val_fraction)
    splits = {"train": _split(data.train, None if held_out is None else ~held_out, len(classes), limit)}
    if data.val is not None:
        splits["val"] = _split(data.val, None, len(classes), limit)
    elif held_out is not None and held_out.any():
        splits["val"] = _split(data.train, held_out, len(classes), limit)
    splits["test"] = _split(data.test, None, len(classes), limit)
    for name, split in splits.items():
        _check_files(split, name, skip_unreadable)
    train = replace(splits["train"], fold="" if folds is None else f"{fold} of {folds}")
    sampler = _check_sampling(train, steps_per_epoch, data.sampler, held_out=held_out is not None)
    splits["train"] = replace(
        train,
        steps=steps_per_epoch,
        sampler=sampler,
        skip_unreadable=skip_unreadable,
        balance=balance,
        target_transform=target_transform,
    )
    if balance:
        _check_balance(splits["train"])
    return splits, classes


def _joined(data: ImageData, folds: int) -> ImageData:
    """The data with the samples for validation, where there are some, behind those for training.

    Raises:
        RequestError: they are of a kind that cannot be divided, or joined.
    """
    asked, train, val = f"dataset.folds={folds}", data.train, data.val
    if _count(train) is None:
        raise RequestError(f"{asked}: {type(train).__name__} is iterable-style, so its samples cannot be divided")
    if val is None:
        return data
    if data.sampler is not None:
        raise RequestError(f"{asked}: the sampler of the data knows no validation samples; leave out sampler= or val=")
    joined: Any = None
    if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
        joined = train.joined(val, "train+val")
    elif isinstance(train, tuple) and isinstance(val, tuple) and train[0].shape[1:] == val[0].shape[1:]:
        joined = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    if joined is None:
        kinds = " and ".join(
            f"images {list(part[0].shape[1:])}" if isinstance(part, tuple) else type(part).__name__
            for part in (train, val)
        )
        raise RequestError(
            f"{asked}: its training and validation samples ({kinds}) cannot be joined, only image files or images in "
            "memory of one shape can; leave dataset.folds and fold out"
        )
    both = f"its {_count(train):,} training and {_count(val):,} validation samples"
    print(f"{asked}: {both} are joined and divided anew", flush=True)
    return replace(data, train=joined, val=None)


def _fold_of(labels: Tensor | None, count: int, folds: int, fold: int, classes: list[str]) -> Tensor:
    """The mask of a fold.

    Raises:
        RequestError: there are fewer samples than folds, or a class would be missing in training.
    """
    if count < folds:
        raise RequestError(f"dataset.folds={folds}: there are only {counted(count, 'sample')} to divide")
    if labels is not None:
        sizes = labels.bincount(minlength=len(classes)).tolist()
        if alone := [name for name, size in zip(classes, sizes, strict=True) if size == 1]:
            raise RequestError(
                f"dataset.folds={folds}: there is a single sample of class {alone[0]}, and where it validates none is "
                "left for training; add images, or remove the class"
            )
        if small := [name for name, size in zip(classes, sizes, strict=True) if 0 < size < folds]:
            named = shortened(", ".join(small), 200)
            print(f"classes with fewer samples than folds, so that some folds validate without: {named}", flush=True)
    return fold_numbers(labels, count, folds) == fold


def _split(part: Any, chosen: Tensor | None, num_classes: int, limit: int | None) -> Split:
    """The samples of a mask, or all, and of these `limit` that are spread over the classes."""
    count, labels = _count(part), _labels(part)
    if count is None:
        return Split(part, None, num_classes, limit)
    indices = torch.arange(count) if chosen is None else chosen.nonzero().flatten()
    places = spread(None if labels is None else labels[indices], len(indices), limit)
    return Split(part, indices[places], num_classes)


def _check_classes(classes: list[str], train: Any) -> None:
    """Refuse names that stand for two classes, and a single class, which any model tells from nothing at all."""
    if twice := next((name for place, name in enumerate(classes) if name in classes[:place]), None):
        raise RequestError(f"dataset: the class name {twice!r} occurs more than once; give every class its own")
    labels = _labels(train)
    if len(classes) < 2 or (labels is not None and int(labels.min()) == int(labels.max())):
        only = classes[0 if labels is None else int(labels[0])] if classes else None
        found = "no class" if only is None else f"training samples of one class only, {only!r}"
        raise RequestError(f"dataset: {found}; a classifier needs at least two")


def _check_files(split: Split, name: str, skip_unreadable: bool) -> None:
    """Refuse what is named like an image but is no file, with the number of all."""
    files = split.part
    if not isinstance(files, ImageFiles) or not files.no_files or (name == "train" and skip_unreadable):
        return
    assert split.indices is not None
    bad = [path for path in files.paths[split.indices.numpy()].tolist() if path in files.no_files]
    if bad:
        others = f", nor {len(bad) - 1:,} other{'s' * (len(bad) > 2)} of the {name} split" if len(bad) > 1 else ""
        it = "it" if len(bad) == 1 else "them"
        way_out = f" (dataset.skip_unreadable=true leaves {it} out)" if name == "train" else ""
        raise RequestError(
            f"{shown(bad[0])}: cannot be read, as it is no regular file or a link to nothing{others}; "
            f"replace or remove {it}{way_out}"
        )


def _check_sampling(
    split: Split, steps: int | None, sampler: Any, held_out: bool
) -> Callable[[Tensor], Iterable[int]] | None:
    """The sampler of the training samples as a function of their indices, if what an epoch is goes together."""
    if split.indices is None and steps is None:
        raise RequestError(
            f"{type(split.part).__name__} is iterable-style: set dataset.steps_per_epoch, the batches an epoch has"
        )
    if split.indices is not None and steps is not None:
        raise RequestError(
            f"dataset.steps_per_epoch={steps}: for iterable-style data; limit_batches= shortens epochs of other data"
        )
    if sampler is None or callable(sampler):
        return sampler
    if held_out:
        way_out = "leave out dataset.folds and fold" if split.fold else "set dataset.val_fraction=0"
        raise RequestError(
            "dataset: its sampler draws from all training samples, and some are held out for validation; "
            f"make it a function of the indices that are left, or {way_out}"
        )
    return lambda indices: sampler


def _check_balance(split: Split) -> None:
    """Refuse to draw classes equally often where they are not known, or something else says what is drawn."""
    name = type(split.part).__name__
    if split.indices is None:
        raise RequestError(f"dataset.balance=true: {name} is iterable-style, and gives what it gives; set it to false")
    if split.sampler is not None:
        raise RequestError("dataset.balance=true: the data has a sampler, which says what is drawn; set it to false")
    if split.labels() is None:
        raise RequestError(
            f"dataset.balance=true: {name} does not tell its labels; give it .targets, a class number for each sample"
        )


def _from_cache(splits: dict[str, Split], settings: dict[str, Any], skip_unreadable: bool) -> dict[str, Split]:
    """The splits with their image files decoded once, in a file that is mapped into memory."""
    from engine.data.cache import cached_images

    parsed = {
        phase: parse_transforms(settings[f"{phase}_transforms"], f"dataset.{phase}_transforms")
        for phase in ("train", "eval")
    }
    first = [
        transforms[0] if transforms and isinstance(transforms[0], Resize) else None for transforms in parsed.values()
    ]
    if (first[0] and vars(first[0])) != (first[1] and vars(first[1])):
        raise RequestError(
            "dataset.cache=true keeps resized images: put the same Resize first in train_transforms and eval_transforms"
        )
    cached: dict[int, tuple[Tensor, dict[int, str]]] = {}
    result = {}
    for name, split in splits.items():
        files = split.part
        if not isinstance(files, ImageFiles):
            raise RequestError(
                f"dataset.cache=true: for image files, and {settings['_target_']} has none; set it to false"
            )
        if id(files) not in cached:
            cached[id(files)] = cached_images(files, first[0], Path(settings["cache_dir"]), skip_unreadable)
        images, unreadable = cached[id(files)]
        indices = split.indices
        assert indices is not None
        bad = torch.tensor([row in unreadable for row in indices.tolist()], dtype=torch.bool)
        if bad.any():
            errors = [unreadable[row] for row in indices[bad].tolist()]
            if name != "train":
                told = cannot_be_read(errors, f"the {len(indices):,} images", training=False)
                raise RequestError(f"{told} (in the {name} split, where nothing is skipped)")
            several = f"{len(errors):,} training images cannot be read and are left out; the first: "
            print((several if len(errors) > 1 else "a training image is left out: ") + printable(errors[0]), flush=True)
            indices = indices[~bad]
        result[name] = replace(split, part=(images, files.targets), indices=indices)
    return result


def fingerprint(splits: dict[str, Split]) -> str:
    """What tells a data set from another: the number of samples of each split, and a checksum of labels and order."""
    texts = []
    for name, split in splits.items():
        labels = _labels(split.part)
        checksum = 0
        if split.indices is not None:
            chosen = split.indices if labels is None else labels[split.indices]
            checksum = zlib.crc32(np.ascontiguousarray(chosen.numpy()).tobytes())
        texts.append(f"{name} {len(split)} {checksum:08x}")
    if splits["train"].fold:  # labels may be the same in all of them
        texts.append(f"fold {splits['train'].fold}")
    return ", ".join(texts)


def _check_part(part: Any, name: str, classes: list[str]) -> None:
    """Refuse samples in memory of another type or shape, and labels outside the classes, where they are known."""
    if isinstance(part, tuple):
        images, labels = part
        sizes = labels.shape == images.shape[:1]
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.dtype != torch.int64 or not sizes:
            found = f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
            raise RequestError(
                f"dataset: {name} images and labels are {found}; "
                "expected torch.uint8 [n, channels, height, width] and torch.int64 [n]"
            )
    elif not isinstance(part, IterableDataset) and not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
        raise RequestError(
            f"dataset: {name} is {type(part).__name__}; "
            "expected (images, labels) or a torch.utils.data.Dataset, with __len__ unless it is an IterableDataset"
        )
    if _count(part) == 0:
        raise RequestError(f"dataset: the {name} split is empty (0 samples); add images")
    known = _labels(part)
    if known is None:
        return
    outside = ((known < 0) | (known >= len(classes))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise RequestError(
            f"dataset: {name} sample {row} has label {int(known[row])}; expected 0 to {len(classes) - 1}, "
            f"as there are {len(classes)} classes"
        )


def _count(part: Any) -> int | None:
    if isinstance(part, tuple):
        return len(part[1])
    return None if isinstance(part, IterableDataset) else len(part)


def _labels(part: Any) -> Tensor | None:
    """All labels, int64 `[n]`, where they can be had without reading the samples."""
    labels = part[1] if isinstance(part, tuple) else getattr(part, "targets", None)
    try:
        known = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # None, or names
        return None
    return known.long() if known.ndim == 1 and not known.is_floating_point() and len(known) == _count(part) else None


def class_counts(split: Split, classes: list[str]) -> dict[str, int] | None:
    """Samples of every class, or None where only reading all of them would tell."""
    labels = split.labels()
    if labels is None:
        return None
    return dict(zip(classes, labels.bincount(minlength=len(classes)).tolist(), strict=True))


def hold_out(labels: Tensor | None, count: int, fraction: float, seed: int = 0) -> Tensor:
    """A mask `[count]` of the same share of every class, or of all samples where their labels are not known.

    Where rounding would leave small classes out, the largest of these give one sample each until the whole share, or at
    least one sample, is held out. No class gives its last one away.

    Args:
        labels: int64 `[count]`, or None.
        count: samples.
        fraction: in [0, 1).
        seed: another one, another choice.
    """
    held_out = torch.zeros(count, dtype=torch.bool)
    members = by_class(labels, count, seed)
    sizes = [len(member) for member in members]
    taken = [min(round(fraction * size), size - 1) if size else 0 for size in sizes]
    missing = max(1, round(fraction * count)) - sum(taken) if fraction else 0
    small = [label for label, size in enumerate(sizes) if size > 1 and not taken[label]]
    for label in sorted(small, key=lambda label: -sizes[label])[: max(0, missing)]:
        taken[label] = 1
    for member, number in zip(members, taken, strict=True):
        held_out[member[:number]] = True
    return held_out


def fold_numbers(labels: Tensor | None, count: int, folds: int) -> Tensor:
    """The fold of every sample, int64 `[count]`, 0 to folds - 1, for a stratified cross-validation.

    A shuffle of each class, one class after the other, is dealt out in turns: so the sizes of the folds, and what they
    have of a class, differ by one at most.

    Args:
        labels: int64 `[count]`, or None.
        count: samples.
        folds: how many.
    """
    numbers = torch.empty(count, dtype=torch.int64)
    numbers[torch.cat(by_class(labels, count, seed=3))] = torch.arange(count) % folds
    return numbers


def spread(labels: Tensor | None, count: int, limit: int | None) -> Tensor:
    """The places, int64 and rising, of `limit` of the samples, in the proportions of the classes.

    Of every class there is one, as far as `limit` reaches; without labels they are drawn from all.

    Args:
        labels: int64 `[count]`, or None.
        count: samples.
        limit: how many; None, or more than there are, takes all.
    """
    if limit is None or limit >= count:
        return torch.arange(count)
    members = by_class(labels, count, seed=2)
    turns = []
    for member in members:
        turn = (torch.arange(len(member)) + 0.5) / len(member)  # F. Webster's way to share out seats
        turn[:1] = -len(member)  # before all of these, the first of the largest class first
        turns.append(turn)
    chosen = torch.cat(turns).argsort(stable=True)[:limit]
    return torch.cat(members)[chosen].sort().values


def by_class(labels: Tensor | None, count: int, seed: int) -> list[Tensor]:
    """The places of the samples of every class, shuffled; all in one where there are no labels."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return [shuffled]
    return list(shuffled[labels[shuffled].argsort(stable=True)].split(labels.bincount().tolist()))
