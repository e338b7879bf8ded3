"""From samples to batches on the device.

The order of the samples is a function of (seed, epoch), what augmentation does to a sample of (seed, epoch, index): the
number of workers, the batch size and where a run was resumed change neither.

Three ways lead to a batch: samples in memory are gathered by an index tensor; those of a `Dataset`, and those that a
transform has to see one at a time, are read in worker processes; an iterable-style `Dataset` is read as it comes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import datasets
from engine.augment import (
    BATCH_TRANSFORMS,
    Draws,
    PerImage,
    Resize,
    apply,
    check_arguments,
    name_and_arguments,
    own_randomness,
    per_image,
    sample_seed,
    seed_everything,
    to_float,
)
from engine.config import build, did_you_mean, locate
from engine.errors import RequestError, RunError, one_line, out_of_memory, printable
from engine.images import open_image, shown
from engine.reader import Reader, Stream, Workers, cannot_be_read, cores, users_code
from engine.runs import log
from engine.shares import hold_out, spread
from engine.terminal import watched

# Settings of every dataset, and those of file datasets, that are used here and not by the dataset's function.
COMMON = ("val_fraction", "limit", "train_transforms", "eval_transforms", "target_transform", "steps_per_epoch")
OF_FILES = ("skip_unreadable", "cache", "cache_dir")

MOST_OF_STREAM = 1 << 24  # samples of a batch; of other data sets there are only so many
AHEAD = 8192  # samples whose random numbers are drawn at once
GATHER = 1 << 21  # bytes of float images that are made at once: small batches cost less together


def choose_device(name: str) -> torch.device:
    """The device that `device=` asks for; auto takes CUDA, else MPS, else the CPU.

    Raises:
        RequestError: it is not there.
    """
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return torch.device(found[0] if found else "cpu")
    if name != "cpu" and name not in found and not (name == "cuda" and found and found[0].startswith("cuda")):
        raise RequestError(f"device={name}: not on this machine; there is {', '.join([*found, 'cpu', 'auto'])}")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@dataclass(frozen=True)
class Split:
    """Some samples of a data set.

    Attributes:
        part: the samples, as `datasets.ImageData` has them.
        indices: int64 `[n]`, which of them; None for an iterable-style data set, that only it can count.
        num_classes: labels are below it.
        limit: of an iterable-style data set, samples to take at most.
        steps: of an iterable-style data set, batches a training epoch has.
        sampler: as in `datasets.ImageData`, for training.
        skip_unreadable: go on without image files that cannot be read, in training.
        target_transform: of training labels, f(labels int64 `[batch]`, num_classes).
    """

    part: Any
    indices: Tensor | None
    num_classes: int
    limit: int | None = None
    steps: int | None = None
    sampler: Callable[[Tensor], Iterable[int]] | None = None
    skip_unreadable: bool = False
    target_transform: Callable[[Tensor, int], Tensor] | None = None

    def __len__(self) -> int:
        """Samples; 0 where only reading them could tell."""
        if self.indices is not None:
            return len(self.indices)
        length = len(self.part) if hasattr(self.part, "__len__") else 0
        return length if self.limit is None else min(length, self.limit)


def load_splits(settings: dict[str, Any], only: str | None = None) -> tuple[dict[str, Split], list[str]]:
    """Read a data set, and hold out a validation part where it has none of its own.

    Args:
        settings: the dataset group of the configuration.
        only: leave out every split but this one.

    Returns:
        the splits train, val (the data set's own, or held out; absent with neither) and test; the class names.

    Raises:
        RequestError: the data is not there, is damaged, or has labels outside its classes.
    """
    own = {key: value for key, value in settings.items() if key not in COMMON + OF_FILES}
    data = build(own, "dataset")
    if not isinstance(data, datasets.ImageData):
        raise RequestError(f"{settings['_target_']} returned {type(data).__name__}; expected datasets.ImageData")
    classes = [printable(str(name)) for name in data.classes]
    parts = {"train": data.train, "val": data.val, "test": data.test}
    for name, part in parts.items():
        if part is not None or name != "val":
            _check_part(part, name, classes)
    _check_classes(classes, data.train)

    count, labels = _count(data.train), _labels(data.train)
    held_out = None
    if labels is None and count is not None and (settings["limit"] or (data.val is None and settings["val_fraction"])):
        what = "samples of dataset.limit are taken" if settings["limit"] else "validation is held out"
        print(f"{type(data.train).__name__} has no .targets: {what} at random, not class by class")
    if data.val is None and count is not None and settings["val_fraction"]:
        held_out = hold_out(labels, count, settings["val_fraction"])
    limit, splits = settings["limit"], {}
    splits["train"] = _split(data.train, None if held_out is None else ~held_out, len(classes), limit)
    if data.val is not None:
        splits["val"] = _split(data.val, None, len(classes), limit)
    elif held_out is not None and held_out.any():
        splits["val"] = _split(data.train, held_out, len(classes), limit)
    splits["test"] = _split(data.test, None, len(classes), limit)
    for name, split in splits.items():
        _check_files(split, name, bool(settings.get("skip_unreadable")))
    splits["train"] = _for_training(splits["train"], settings, data.sampler, held_out=held_out is not None)
    if only is not None:
        splits = {name: split for name, split in splits.items() if name == only}
    if settings.get("cache"):
        splits = _from_cache(splits, settings)
    return splits, classes


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
    if not isinstance(files, datasets.ImageFiles) or not files.no_files or (name == "train" and skip_unreadable):
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


def _for_training(split: Split, settings: dict[str, Any], sampler: Any, held_out: bool) -> Split:
    """The training split with what is done to training samples only."""
    steps = settings.get("steps_per_epoch")
    if split.indices is None and steps is None:
        raise RequestError(
            f"{type(split.part).__name__} is iterable-style: set dataset.steps_per_epoch, the batches an epoch has"
        )
    if split.indices is not None and steps is not None:
        raise RequestError(
            f"dataset.steps_per_epoch={steps}: for iterable-style data; limit_batches= shortens epochs of other data"
        )
    if sampler is not None and not callable(sampler):
        if held_out:
            raise RequestError(
                "dataset: its sampler draws from all training samples, and some are held out for validation; "
                "make it a function of the indices that are left, or set dataset.val_fraction=0"
            )
        sampler = _always(sampler)
    name = settings.get("target_transform")
    return replace(
        split,
        steps=steps,
        sampler=sampler,
        skip_unreadable=bool(settings.get("skip_unreadable")),
        target_transform=None if name is None else locate(name, "dataset.target_transform"),
    )


def _always(sampler: Iterable[int]) -> Callable[[Tensor], Iterable[int]]:
    return lambda indices: sampler


def _from_cache(splits: dict[str, Split], settings: dict[str, Any]) -> dict[str, Split]:
    """The splits with their image files decoded once, in a file that is mapped into memory."""
    from engine.cache import cached_images

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
        if not isinstance(files, datasets.ImageFiles):
            raise RequestError(
                f"dataset.cache=true: for image files, and {settings['_target_']} has none; set it to false"
            )
        if id(files) not in cached:
            cached[id(files)] = cached_images(
                files, first[0], Path(settings["cache_dir"]), bool(settings.get("skip_unreadable"))
            )
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
    elif not hasattr(part, "__getitem__") and not isinstance(part, IterableDataset):
        found = type(part).__name__
        raise RequestError(f"dataset: {name} is {found}; expected (images, labels) or a torch.utils.data.Dataset")
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
    if labels is None or isinstance(part, IterableDataset):
        return None
    known = torch.as_tensor(labels)
    return known.long() if known.ndim == 1 and not known.is_floating_point() and len(known) == _count(part) else None


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def parse_transforms(listed: Sequence[Any], option: str) -> list[Any]:
    """The transforms of a YAML list: `[RandomHorizontalFlip, RandomCrop: {size: 28, padding: 2}]`.

    What has no version for batches here comes from `torchvision.transforms.v2` and works on one image at a time.

    Raises:
        RequestError: an unknown name or argument.
    """
    try:
        check_arguments(listed)
    except ValueError as error:
        raise RequestError(f"{option}: {one_line(error)}") from error
    transforms = []
    for entry in listed:
        name = entry
        try:
            name, arguments = name_and_arguments(entry)
            try:
                transform = (
                    BATCH_TRANSFORMS[name](**arguments) if name in BATCH_TRANSFORMS else per_image(name, arguments)
                )
            except NotImplementedError:  # an argument that only torchvision's own has
                transform = per_image(name, arguments)
        except Exception as error:  # of torchvision's classes each raises its own
            raise RequestError(f"{option}: {name} refuses its arguments: {one_line(error)}") from error
        if transform is None:
            from torchvision.transforms import v2

            known = [*BATCH_TRANSFORMS, *(other for other in vars(v2) if other[0].isupper())]
            raise RequestError(f"{option}: there is no transform {name!r}{did_you_mean(name, known)}")
        transforms.append(transform)
    return transforms


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batches:
    """The batches of a split: `for images, labels in batches.epoch(3): ...`.

    Args:
        split: the samples.
        transforms: the YAML's list for this phase.
        config: the run's; batch_size, seed, num_workers and limit_batches are used.
        device: where the batches come out.
        training: shuffle and drop the last batch as the configuration says.

    Batches are floats `[batch, channels, height, width]`, 0 to 1 before `Normalize`, and labels int64 `[batch]`, or
    float `[batch, num_classes]` where the data set or `target_transform` gives probabilities.

    Raises:
        RequestError: the transforms or the number of samples do not fit.
    """

    def __init__(
        self,
        split: Split,
        transforms: Sequence[Any],
        config: dict[str, Any],
        device: torch.device,
        training: bool = False,
    ) -> None:
        self.split, self.device, self.training = split, device, training
        self.batch_size: int = config["batch_size"]
        self.seed: int = config["seed"]
        self.shuffle = training and config["shuffle"]
        self.drop_last = training and config["drop_last"]
        self.limit: int | None = config["limit_batches"]
        option = f"dataset.{'train' if training else 'eval'}_transforms"
        parsed = parse_transforms(transforms, option)
        self.size = self._count_samples()
        if self.drop_last and split.indices is not None and self.size < self.batch_size:
            raise RequestError(
                f"drop_last=true leaves no batch: {self.size} training samples, batch_size={self.batch_size}; "
                "lower batch_size"
            )
        in_memory = isinstance(split.part, tuple)
        alone = _run_alone(parsed, in_memory)
        self.later = list(enumerate(parsed))[alone:]  # these run on batches, on the device
        self.draws = any(transform.random for _, transform in self.later)
        self.resident: tuple[Tensor, Tensor] | None = None
        self.together = self.batch_size  # samples that are gathered and transformed at once: whole batches
        self.workers: Workers | None = None
        self._stream: Stream | None = None
        self._shape: tuple[int, int, int] | None = None
        skip = training and split.skip_unreadable
        reader = Reader(split.part, parsed[:alone], self.seed, split.num_classes, skip, training)
        self.reader = reader
        if split.indices is None:
            if self.batch_size > MOST_OF_STREAM:
                raise RequestError(
                    f"batch_size={self.batch_size}: of {type(split.part).__name__}, which is iterable-style, "
                    f"at most {MOST_OF_STREAM:,} samples are read for a batch"
                )
            self._stream = Stream(reader)
        elif in_memory and alone == 0:
            self.resident = _place(split.part, device)
            size = self.batch_size * 4 * math.prod(self.sample_shape())  # of a batch, as floats
            if size % 64 == 0:  # so every batch lies as it would alone: arithmetic may depend on where memory begins
                self.together *= max(1, GATHER // size)
        else:
            count = cores() if config["num_workers"] is None else config["num_workers"]
            # More workers than batches would have nothing to do.
            self.workers = Workers(reader, min(count, len(self)), min(self.batch_size, self.size))
            if isinstance(split.part, datasets.ImageFiles) and alone == 0:
                _check_sizes(split, option)

    def _count_samples(self) -> int:
        """Samples of an epoch, before the last batch is dropped or `limit_batches` cuts."""
        if self.training and self.split.sampler is not None:
            with own_randomness():
                with users_code("dataset: its sampler"):
                    sampler = self.split.sampler(self.split.indices)  # type: ignore[arg-type]
                if not hasattr(sampler, "__len__"):
                    raise RequestError(f"dataset: its sampler {type(sampler).__name__} has no length; give it one")
                count = len(sampler)  # type: ignore[arg-type]
                if count == 0:
                    raise RequestError(f"dataset: its sampler {type(sampler).__name__} gives no sample")
                return count
        if self.training and self.split.indices is None:
            return (self.split.steps or 0) * self.batch_size
        return len(self.split)

    def __len__(self) -> int:
        whole, rest = divmod(self.size, self.batch_size)
        count = whole + 1 if rest and not self.drop_last else whole
        return count if self.limit is None else min(count, self.limit)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return min(self.size, len(self) * self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The sample indices of an epoch, int64 `[n]`, in the order in which they are seen."""
        indices = self.split.indices
        assert indices is not None
        if self.training and self.split.sampler is not None:
            with own_randomness():
                seed_everything(int(sample_seed(self.seed, epoch)))
                with users_code("dataset: its sampler"):
                    places = torch.tensor([int(place) for place in self.split.sampler(indices)], dtype=torch.int64)
            if len(places) != self.size or not ((places >= 0) & (places < len(indices))).all():
                found = f" from {int(places.min())} to {int(places.max())}" if len(places) else ""
                raise RunError(
                    f"dataset: its sampler gave {len(places)} places{found}; "
                    f"expected {self.size}, from 0 to {len(indices) - 1}"
                )
            return indices[places]
        if not self.shuffle:
            return indices
        bits = int(sample_seed(self.seed, epoch))
        return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(bits))]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number `start` on.

        Raises:
            RunError: samples that cannot be read, or do not fit together or into memory.
        """
        if start and start >= len(self):
            return  # resumed where the last batch was done
        with self._memory_told(self.batch_size):
            yield from self._epoch(epoch, start)

    @contextmanager
    def _memory_told(self, samples: int) -> Iterator[None]:
        """Tell in one line that there is not memory enough for a batch of so many."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            said = out_of_memory(error, samples)
            if said is None:
                raise
            what = "a batch" if samples > 1 else "one image"
            raise RunError(f"{said} ({what} for {self.device}: {one_line(error, 160)})") from error

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        target_transform = self.split.target_transform if self.training else None
        first = start * self.batch_size
        order = None if self._stream is not None else self.order(epoch)[first : len(self) * self.batch_size]
        if order is None:
            source = self._from_stream(epoch, start)
            source = source if self.device.type == "cpu" else _on_device(source, self.device)
        elif self.resident is not None:
            source = self._gather(order)
        else:
            source = self._read(epoch, order)
        done, group = 0, self.together * max(1, AHEAD // self.together)
        for images, labels in source:
            if self.draws:
                if done % group == 0:
                    if order is None:  # a stream's samples are only numbered
                        index = torch.arange(first + done, first + done + group)
                    else:
                        index = order[done : done + group]
                    ahead = Draws(self.seed, epoch, index)
                images = apply(self.later, images, ahead.window(done % group, len(images)))
                done += len(images)
            elif self.later:
                images = apply(self.later, images, None)
            images = to_float(images)
            for x, y in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True):
                yield x, y if target_transform is None else self._targets(target_transform, y)

    __iter__ = epoch

    def _gather(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples that are in memory, `together` samples at once."""
        images, labels = self.resident  # type: ignore[misc]
        order = order.to(images.device)
        indices, labels = order.split(self.together), labels.index_select(0, order)
        batches = ((images.index_select(0, i), y) for i, y in zip(indices, labels.split(self.together), strict=True))
        return batches if images.device.type == self.device.type else _on_device(batches, self.device)

    def _read(self, epoch: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples that are read one at a time."""
        assert self.workers is not None
        skipped: list[str] = []
        batches = self._noting(self.workers.read(epoch, order.split(self.batch_size)), skipped)
        yield from batches if self.device.type == "cpu" else _on_device(batches, self.device)
        if skipped:
            images = "1 image" if len(skipped) == 1 else f"{len(skipped):,} images"
            log.warning(f"epoch {epoch}: {images} could not be read and skipped; the first: {skipped[0]}")

    def _noting(self, batches: Iterable[Any], skipped: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unread in batches:
            skipped.extend(unread)
            yield images, labels

    def _from_stream(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an iterable-style data set: training goes on where the last epoch ended, a test starts anew."""
        assert self._stream is not None
        if self.training:
            first = ((max(epoch, 1) - 1) * len(self) + start) * self.batch_size
            samples = self._stream.forever(first, self.split.limit)
        else:
            samples = self._stream.once(self.split.limit)
        last = len(self) if self.training else self.limit
        number = start
        while (last is None or number < last) and (found := list(islice(samples, self.batch_size))):
            index = torch.arange(len(found)) + number * self.batch_size
            yield self.reader.prepare(epoch, index, found)
            number += 1

    def _targets(self, transform: Callable[[Tensor, int], Tensor], labels: Tensor) -> Tensor:
        with users_code(f"dataset.target_transform of labels {list(labels.shape)}"):
            made = transform(labels, self.split.num_classes)
        if not isinstance(made, Tensor):
            raise RunError(f"dataset.target_transform gave {type(made).__name__}; expected a tensor")
        return made.float() if made.ndim == 2 else made

    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as the model gets it.

        Raises:
            RequestError: no image can be read, or the transforms do not fit it.
        """
        if self._shape is None:
            try:
                with own_randomness(), self._memory_told(1):
                    images = apply(self.later, self._first(), Draws(self.seed, 1, torch.zeros(1, dtype=torch.int64)))
            except RunError as error:
                raise RequestError(str(error)) from error
            self._shape = tuple(images.shape[1:])  # type: ignore[assignment]
        return self._shape  # type: ignore[return-value]

    def _first(self) -> Tensor:
        """The first image that can be read, `[1, channels, height, width]`, on the device."""
        if self._stream is not None:
            found = next(self._stream.once(None), None)
            if found is None:
                raise RunError(f"{type(self.split.part).__name__} gives no sample")
            return self.reader.prepare(1, torch.zeros(1, dtype=torch.int64), [found])[0].to(self.device)
        indices = self.split.indices
        assert indices is not None
        if self.resident is not None:
            images = self.resident[0]
            return images[indices[:1].to(images.device)].to(self.device)
        assert self.workers is not None
        return self.workers.first(1, indices).to(self.device)


def _run_alone(transforms: Sequence[Any], in_memory: bool) -> int:
    """How many of the transforms, from the first on, have to see one image at a time.

    All up to the last one that only torchvision has, and the first Resize of what is read from files, as their images
    differ in size before it.
    """
    last = [place + 1 for place, transform in enumerate(transforms) if isinstance(transform, PerImage)][-1:]
    resize = (
        []
        if in_memory
        else [place + 1 for place, transform in enumerate(transforms) if isinstance(transform, Resize)][:1]
    )
    return max(last + resize, default=0)


def _check_sizes(split: Split, option: str) -> None:
    """Without a Resize, images of files must have one size; their headers tell before any is decoded."""
    files, first = split.part, None
    for index in watched(split.indices.tolist(), "looking at the images' sizes"):  # type: ignore[union-attr]
        path = str(files.paths[index])
        try:
            with open_image(path) as image:
                turned = image.size[0] != image.size[1] and image.getexif().get(274, 1) >= 5
                size = image.size[::-1] if turned else image.size
        except Exception:  # the reader says what is wrong with it
            continue
        if first is not None and size != first[0]:
            raise RequestError(
                f"images of different sizes: {first[1]} is {first[0][0]}x{first[0][1]}, {path} is {size[0]}x{size[1]}; "
                f"put Resize: {{size: [height, width]}} first in {option}"
            )
        first = first or (size, path)


_placed: WeakValueDictionary[tuple[int, torch.device], Tensor] = WeakValueDictionary()  # in use on a device


def _place(part: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Samples on the device where they fit into half of its free memory, else where they are.

    Training and validation samples are of one part, which is placed once.
    """
    if device.type == "cpu":
        return part
    size, known = part[0].numel(), (id(part[0]), device) in _placed
    if device.type == "cuda" and not known and size > torch.cuda.mem_get_info(device)[0] // 2:
        return part
    copies = []
    for tensor in part:
        key = id(tensor), device  # whoever uses the copy holds the tensor too, so this stays its name
        copy = _placed.get(key)
        copies.append(tensor.to(device) if copy is None else copy)
        _placed[key] = copies[-1]
    return copies[0], copies[1]


def _on_device(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of host memory on a device; to CUDA each is copied while the one before is used.

    Only there: on MPS a copy that does not wait may read memory that is no longer what it was.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    for moved, arrived in _one_ahead(_started_copies(batches, device)):
        user = torch.cuda.current_stream(device)
        user.wait_event(arrived)
        for tensor in moved:
            tensor.record_stream(user)  # its memory is not used again before the user's work is done
        yield moved[0], moved[1]


def _started_copies(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[Any]:
    """(images and labels, the event of their arrival), copied on a stream of their own beside the arithmetic."""
    stream = _copying(device)
    for batch in batches:
        pinned = [tensor.pin_memory() for tensor in batch]  # only copies from such memory do not wait
        with torch.cuda.stream(stream):
            moved = [tensor.to(device, non_blocking=True) for tensor in pinned]
            arrived = stream.record_event()
        yield moved, arrived


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to a device; one for all, as the memory that one has used serves no other."""
    return torch.cuda.Stream(device)


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each of them asked for before the one before it is given."""
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) == 2:
            yield held.pop(0)
    yield from held
