"""Reading samples one at a time: in worker processes, or, from an iterable-style data set, as they come."""

from __future__ import annotations

import math
import mmap
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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


class Reader:
    """Batches of samples read and transformed one at a time; what a worker process has.

    Args:
        part: `(images, labels)` or a map-style Dataset.
        transforms: those that run on one image at a time.
        seed: of the run.
        num_classes: labels are below it.
        skip_unreadable: another sample of the batch takes the place of an image file that cannot be read.
    """

    TOGETHER = 8  # samples read before they are transformed: taking turns would clear the processor's caches each time

    def __init__(
        self, part: Any, transforms: Sequence[Any], seed: int, num_classes: int, skip_unreadable: bool
    ) -> None:
        self.part, self.transforms, self.seed = part, list(enumerate(transforms)), seed
        self.num_classes, self.skip_unreadable = num_classes, skip_unreadable
        self.is_ours = isinstance(part, (tuple, datasets.ImageFiles))  # draws nothing at random while reading
        self.draws = any(transform.random for transform in transforms)
        self.size = resized_to(transforms)

    def read(self, epoch: int, indices: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor, list[str]]:
        """(images, labels, what was skipped) of samples in an epoch.

        Args:
            epoch: counted from 1.
            indices: int64 `[batch]`, the samples.
            into: memory for at least as many images; they lie there afterwards if they are of its shape and type.

        Raises:
            RunError: samples that cannot be read, or do not fit together.
        """
        skipped: list[str] = []
        with own_randomness() if self.draws or not self.is_ours else nullcontext():
            images, labels = self._batch(self._samples(epoch, indices, skipped), indices, into)
        return images, labels, skipped

    def _samples(self, epoch: int, indices: Tensor, skipped: list[str]) -> Iterator[tuple[int, Tensor, Any]]:
        """(place in the batch, image, label) of those that can be read."""
        draws = Draws(self.seed, epoch, indices) if self.draws else None
        seeds = None if self.is_ours else sample_seed(self.seed, epoch, indices).tolist()
        for first in range(0, len(indices), self.TOGETHER):
            read: list[tuple[int, Tensor, Any]] = []
            for place, index in enumerate(indices[first : first + self.TOGETHER].tolist(), first):
                if seeds is not None:
                    seed_everything(seeds[place])
                try:
                    read.append((place, *self._sample(index)))
                except RequestError as error:
                    if not self.skip_unreadable or not isinstance(self.part, datasets.ImageFiles):
                        raise RunError(str(error)) from None
                    skipped.append(str(error))
            for place, image, label in read:
                yield place, self._transform(image, draws, place), label

    def _transform(self, image: Tensor, draws: Draws | None, place: int) -> Tensor:
        return apply(self.transforms, image[None], draws and draws.window(place, 1))[0]

    def prepare(self, epoch: int, indices: Tensor, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        """(images, labels) of samples that were read elsewhere."""
        with own_randomness():
            draws = Draws(self.seed, epoch, indices) if self.draws else None
            transformed = (
                (place, self._transform(image, draws, place), label) for place, (image, label) in enumerate(samples)
            )
            return self._batch(transformed, indices, None)

    def _sample(self, index: int) -> tuple[Tensor, Any]:
        if isinstance(self.part, datasets.ImageFiles):
            return self.part.read(index, self.size), int(self.part.targets[index])
        if isinstance(self.part, tuple):
            return self.part[0][index], int(self.part[1][index])
        return _image_and_label(self.part[index], f"sample {index} of {type(self.part).__name__}", self.num_classes)

    def _batch(
        self, samples: Iterable[tuple[int, Tensor, Any]], indices: Tensor, into: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(images, labels) of samples put into their places as they come; the next one fills a place left out."""
        images: Tensor | None = None
        found: dict[int, Any] = {}
        for place, image, label in samples:
            if images is None:
                fits = into is not None and into.shape[1:] == image.shape and into.dtype == image.dtype
                images = into[: len(indices)] if fits else image.new_empty(len(indices), *image.shape)  # type: ignore
            elif image.shape != images.shape[1:]:
                raise RequestError(
                    f"images of different sizes: {self._name(indices[next(iter(found))])} is {_size(images[0])}, "
                    f"{self._name(indices[place])} is {_size(image)}; "
                    "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
                )
            elif image.dtype != images.dtype:
                images, image = to_float(images), to_float(image)
            images[place], found[place] = image, label
        if images is None:
            raise RunError(
                f"none of the {len(indices)} images of a batch can be read; the first is sample {int(indices[0])}"
            )
        labels = []
        for place in range(len(indices)):
            if place not in found:
                other = next((p for p in found if p > place), next(iter(found)))
                images[place] = images[other]
            labels.append(found[place if place in found else other])
        return images, torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)

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


class _Worker(Dataset):
    """What a worker process is asked for: (epoch, indices, number of the slot to put the images into).

    Slots are memory that it shares with the main process. It answers (images, labels, what was skipped), where a number
    instead of images says how many are in the slot; or the error. Indices and labels travel as arrays: each tensor
    would take a file of shared memory.
    """

    def __init__(self, reader: Reader, slots: Tensor | None) -> None:
        self.reader, self.slots = reader, slots

    def __getitem__(self, asked: tuple[int, np.ndarray, int]) -> tuple[Tensor | int, np.ndarray, list[str]] | RunError:
        epoch, indices, number = asked
        slot = None if self.slots is None else self.slots[number]
        try:
            images, labels, skipped = self.reader.read(epoch, torch.from_numpy(indices), slot)
            if slot is not None and images.data_ptr() == slot.data_ptr():
                return len(images), labels.numpy(), skipped
            return _shared(images), labels.numpy(), skipped
        except RunError as error:
            return error


def _shared(images: Tensor) -> Tensor:
    """In memory that the main process can read; done here, where a failure can still be told."""
    try:
        return images.share_memory_()
    except (RuntimeError, OSError) as error:
        raise RunError(_no_shared_memory(one_line(error, 120))) from None


def _no_shared_memory(reason: str) -> str:
    return (
        f"a worker process that reads samples failed ({reason}); if shared memory ran out, "
        "lower num_workers or batch_size, or enlarge shared memory (/dev/shm)"
    )


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

    Images come back in slots, memory that is shared once and used over and over: making and mapping some anew for each
    batch would cost as much as a tenth of decoding.

    Args:
        reader: what every worker has.
        count: of processes.
        batch_size: samples asked for at once, at most.
    """

    AHEAD = 2  # batches a worker is asked for before the first of them is taken

    def __init__(self, reader: Reader, count: int, batch_size: int) -> None:
        self.reader, self.count, self.batch_size = reader, count, batch_size
        self.asked: list[tuple[int, np.ndarray, int]] = []  # of an epoch; the loader looks here when it begins one
        self.slots: Tensor | None = None
        self.loader: DataLoader | None = None

    def _start(self, epoch: int, index: Tensor) -> None:
        """Make the slots, for images like this one, and the loader, which starts the processes."""
        with suppress(RunError, OSError):  # what cannot be read, or had, is the workers' to tell
            image = self.reader.read(epoch, index)[0][0]
            shape = (self.count * self.AHEAD + 1, self.batch_size, *image.shape)
            memory = mmap.mmap(-1, max(1, math.prod(shape) * image.element_size()))  # not in /dev/shm, which is small
            self.slots = torch.frombuffer(memory, dtype=image.dtype)[: math.prod(shape)].view(shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: as asked for
            self.loader = DataLoader(
                _Worker(self.reader, self.slots),
                batch_size=None,
                sampler=self.asked,
                num_workers=self.count,
                prefetch_factor=self.AHEAD,
                collate_fn=_as_it_is,
                persistent_workers=True,
                worker_init_fn=_start_worker,
                generator=torch.Generator().manual_seed(0),  # or it would draw from the run's own
            )
        # Workers heed no signal, so at the end multiprocessing would wait for them for ever: they are told before.
        Finalize(self, _dismiss, args=(self.loader,), exitpriority=100)

    def read(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """(images, labels, what was skipped) of these indices, in their order.

        Images of bytes may lie in a slot: what is done with them has to be done before the next are asked for.

        Raises:
            RunError: what a worker could not read, or its death.
        """
        if not self.count:
            for indices in batches:
                yield self.reader.read(epoch, indices)
            return
        if self.loader is None:
            self._start(epoch, batches[0][:1])
        # There is one slot more than batches under way, so the one in use is asked for again only when it was left.
        number = 1 if self.slots is None else len(self.slots)
        self.asked[:] = [(epoch, indices.numpy(), place % number) for place, indices in enumerate(batches)]
        for place, found in enumerate(self._until_death()):
            if isinstance(found, RunError):
                raise found
            images, labels, skipped = found
            if isinstance(images, int):
                images = self.slots[place % number, :images]  # type: ignore[index]
                images = images.clone() if images.is_floating_point() else images
            yield images, torch.from_numpy(labels), skipped

    def _until_death(self) -> Iterator[Any]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                batches = iter(self.loader)  # type: ignore[arg-type]
            yield from batches
        except (RuntimeError, OSError) as error:
            if "Caught " in str(error):  # raised by the user's own Dataset; its traceback is in the text
                raise
            raise RunError(_no_shared_memory(one_line(error, 160))) from None


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
