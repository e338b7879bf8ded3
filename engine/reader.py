"""Reading samples one at a time: in worker processes, or, from an iterable-style data set, as they come."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

import datasets
from engine.augment import (
    Draws,
    apply,
    own_randomness,
    random_states,
    resized_to,
    sample_seed,
    seed_everything,
    set_random_states,
    to_float,
)
from engine.errors import RequestError, RunError, one_line


@dataclass(frozen=True)
class Failure:
    """What a worker sends in place of a batch: the line for the user."""

    message: str


class Reader(Dataset):
    """Batches of samples read and transformed one at a time; what a worker process has.

    Args:
        part: `(images, labels)` or a map-style Dataset.
        transforms: those that run on one image at a time.
        seed: of the run.
        num_classes: labels are below it.
        skip_unreadable: another sample of the batch takes the place of an image file that cannot be read.
    """

    def __init__(
        self, part: Any, transforms: Sequence[Any], seed: int, num_classes: int, skip_unreadable: bool
    ) -> None:
        self.part, self.transforms, self.seed = part, list(enumerate(transforms)), seed
        self.num_classes, self.skip_unreadable = num_classes, skip_unreadable
        self.is_ours = isinstance(part, (tuple, datasets.ImageFiles))  # draws nothing at random while reading
        self.draws = any(transform.random for transform in transforms)
        self.size = resized_to(transforms)
        self.finishes = False
        self.later: Sequence[tuple[int, Any]] = ()

    def finish_with(self, later: Sequence[tuple[int, Any]]) -> None:
        """Apply these transforms to each batch too, and give floats; they come with their places in the YAML's list."""
        self.finishes, self.later = True, later

    def __getitem__(self, asked: tuple[int, Tensor]) -> tuple[Tensor, Tensor, list[str]] | Failure:
        """(images, labels, what was skipped) of the samples of (epoch, indices)."""
        try:
            if self.draws or not self.is_ours:
                with own_randomness():
                    images, labels, skipped = self._read(*asked)
            else:
                images, labels, skipped = self._read(*asked)
            if self.finishes:
                images = to_float(apply(self.later, images, Draws(self.seed, *asked)))
            if get_worker_info() is not None:
                _share(images)
            return images, labels, skipped
        except RunError as error:
            return Failure(str(error))

    def _read(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        images: list[Tensor | None] = []
        labels: list[Any] = []
        skipped = []
        draws = Draws(self.seed, epoch, indices) if self.draws else None
        seeds = None if self.is_ours else sample_seed(self.seed, epoch, indices).tolist()
        for place, index in enumerate(indices.tolist()):
            if seeds is not None:
                seed_everything(seeds[place])
            try:
                image, label = self._sample(index)
            except RequestError as error:
                if not self.skip_unreadable or not isinstance(self.part, datasets.ImageFiles):
                    raise
                skipped.append(str(error))
                images.append(None)
                labels.append(None)
                continue
            images.append(self._transform(image, draws, place))
            labels.append(label)
        return *self._stack(images, labels, indices), skipped

    def _transform(self, image: Tensor, draws: Draws | None, place: int) -> Tensor:
        return apply(self.transforms, image[None], draws and draws.window(place, 1))[0]

    def prepare(self, epoch: int, indices: Tensor, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        """(images, labels) of samples that were read elsewhere."""
        with own_randomness():
            draws = Draws(self.seed, epoch, indices) if self.draws else None
            images = [self._transform(image, draws, place) for place, (image, _) in enumerate(samples)]
        return self._stack(images, [label for _, label in samples], indices)

    def _sample(self, index: int) -> tuple[Tensor, Any]:
        if isinstance(self.part, datasets.ImageFiles):
            return self.part.read(index, self.size), int(self.part.targets[index])
        if isinstance(self.part, tuple):
            return self.part[0][index], int(self.part[1][index])
        return _image_and_label(self.part[index], f"sample {index} of {type(self.part).__name__}", self.num_classes)

    def _stack(self, images: Sequence[Tensor | None], labels: list[Any], indices: Tensor) -> tuple[Tensor, Tensor]:
        there = [place for place, image in enumerate(images) if image is not None]
        if not there:
            raise RunError(
                f"none of the {len(images)} images of a batch can be read; the first is sample {int(indices[0])}"
            )
        whole: list[Tensor] = []
        for place in range(len(images)):  # the next that could be read takes the place of one that could not
            other = next((p for p in there if p >= place), there[0])
            whole.append(images[other])  # type: ignore[arg-type]
            labels[place] = labels[other]
        for place, image in enumerate(whole):
            if image.shape != whole[0].shape:
                raise RunError(
                    f"images of different sizes: {self._name(indices[0])} is {_size(whole[0])}, "
                    f"{self._name(indices[place])} is {_size(image)}; "
                    "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
                )
            if image.dtype != whole[0].dtype:
                whole[place] = to_float(image)
        if isinstance(labels[0], Tensor):
            return torch.stack(whole), torch.stack(labels)
        return torch.stack(whole), torch.tensor(labels, dtype=torch.int64)

    def _name(self, index: Tensor) -> str:
        return (
            str(self.part.paths[int(index)]) if isinstance(self.part, datasets.ImageFiles) else f"sample {int(index)}"
        )


def _size(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _image_and_label(sample: Any, what: str, num_classes: int) -> tuple[Tensor, Any]:
    """A user's sample as (uint8 or float image `[channels, height, width]`, int or float `[num_classes]`)."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise RunError(f"{what} is {type(sample).__name__}; expected (image, label)")
    image, label = sample
    if not isinstance(image, Tensor):  # a Pillow image, or an array [height, width, channels]
        pixels = np.asarray(image)
        if pixels.dtype not in (np.uint8, np.float32, np.float64):
            raise RunError(
                f"{what} has an image of {type(image).__name__}; expected a tensor, an array or a Pillow image"
            )
        image = torch.from_numpy(pixels.copy())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    image = image.unsqueeze(0) if image.ndim == 2 else image
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise RunError(
            f"{what} has an image {image.dtype} {list(image.shape)}; expected uint8 or float [channels, height, width]"
        )
    label = torch.as_tensor(label)
    if label.ndim == 1 and len(label) == num_classes and num_classes > 1:
        return (image if image.dtype == torch.uint8 else image.float()), label.float()
    if label.numel() != 1 or not 0 <= int(label) < num_classes:
        raise RunError(
            f"{what} has label {label.tolist()}; expected 0 to {num_classes - 1}, as there are {num_classes} classes"
        )
    return (image if image.dtype == torch.uint8 else image.float()), int(label)


def _share(images: Tensor) -> None:
    """Put a batch where the main process can read it, here, where a failure can still be told."""
    try:
        images.share_memory_()
    except (RuntimeError, OSError) as error:
        raise RunError(_shared_memory(one_line(error, 120))) from None


def _shared_memory(reason: str) -> str:
    return (
        f"a worker process that reads samples failed ({reason}); if shared memory ran out, "
        "lower num_workers or batch_size, or enlarge shared memory (/dev/shm)"
    )


class Order:
    """What the workers are asked for: (epoch, indices) of the batches of an epoch, set before it begins."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return ((self.epoch, indices) for indices in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _as_it_is(sample: Any) -> Any:
    return sample


def _start_worker(number: int) -> None:
    """Ctrl-C and SIGTERM go to every process of a terminal or job; the main process decides when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Worker processes around a Reader; they live from the first epoch on. None of them reads in this process.

    Args:
        reader: what every worker has.
        count: of processes.
        pin: put batches into pinned memory, for copies to CUDA.
    """

    def __init__(self, reader: Reader, count: int, pin: bool) -> None:
        self.reader, self.count, self.order = reader, count, Order()
        self.loader: DataLoader | None = None
        if count:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="This DataLoader will create"
                )  # more than cores: as asked for
                self.loader = DataLoader(
                    reader,
                    batch_size=None,
                    sampler=self.order,
                    num_workers=count,
                    collate_fn=_as_it_is,
                    persistent_workers=True,
                    pin_memory=pin,
                    worker_init_fn=_start_worker,
                    generator=torch.Generator().manual_seed(0),  # or it would draw from the run's own
                )
            # Workers heed no signal, so at the end multiprocessing would wait for them for ever: they are told before.
            Finalize(self, _dismiss, args=(self.loader,), exitpriority=100)

    def read(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """The batches of these indices, in their order.

        Raises:
            RunError: what a worker could not read, or its death.
        """
        self.order.epoch, self.order.batches = epoch, batches
        if self.loader is None:
            source: Iterator[Any] = (self.reader[asked] for asked in self.order)
        else:
            source = self._until_death()
        for found in source:
            if isinstance(found, Failure):
                raise RunError(found.message)
            yield found

    def _until_death(self) -> Iterator[Any]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                batches = iter(self.loader)  # type: ignore[arg-type]
            yield from batches
        except (RuntimeError, OSError) as error:
            if "Caught " in str(error):  # raised by the user's own Dataset; its traceback is in the text
                raise
            raise RunError(_shared_memory(one_line(error, 160))) from None


def _dismiss(loader: DataLoader) -> None:
    """End the workers of a loader, also in the middle of an epoch."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


class Stream:
    """The samples of an iterable-style Dataset, read in this process, with generators of their own.

    What it draws at random (torch on the CPU, NumPy, Python) comes from the run's seed and the number of the pass, and
    leaves the run's own generators alone.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.position: int | None = None  # of `forever`, in samples
        self.samples: Iterator[tuple[Tensor, Any]] = iter(())

    def once(self, limit: int | None, number: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """One pass over the samples; `number` is the pass."""
        part, states = self.reader.part, None
        if hasattr(part, "set_epoch"):
            part.set_epoch(number)
        iterator, count = None, 0
        while limit is None or count < limit:
            with own_randomness():
                if states is None:
                    seed_everything(int(sample_seed(self.reader.seed, number)))
                else:
                    set_random_states(states)
                try:
                    iterator = iterator or iter(part)
                    sample = next(iterator)
                except StopIteration:
                    return
                states = random_states()
            yield _image_and_label(sample, f"sample {count} of {type(part).__name__}", self.reader.num_classes)
            count += 1

    def forever(self, position: int, limit: int | None) -> Iterator[tuple[Tensor, Any]]:
        """Passes without end, from a sample on; goes on from the last call where that ended there."""
        if self.position != position:
            self.position, self.samples = 0, self._passes(limit)
            while self.position < position:  # a resumed run reads what it had seen
                next(self.samples)
                self.position += 1
        while True:
            sample = next(self.samples)
            self.position += 1
            yield sample

    def _passes(self, limit: int | None) -> Iterator[tuple[Tensor, Any]]:
        number = 0
        while True:
            number += 1
            empty = True
            for sample in self.once(limit, number):
                empty = False
                yield sample
            if empty:
                raise RunError(f"{type(self.reader.part).__name__} gives no sample in pass {number}")
