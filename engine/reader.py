"""Reading samples one at a time: in worker processes, or, from an iterable-style data set, as they come."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sysconfig
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from pathlib import Path
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
from engine.errors import RequestError, RunError, one_line, printable

LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), __file__)


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Tell what code of the user's raises inside in one line, with the place in it; the exception is kept as the cause.

    Args:
        what: was asked of it, for the message.

    Raises:
        RunError: it raised something.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not any(library in frame.filename for library in LIBRARIES)]
        at = (own or frames)[-1]
        raise RunError(
            f"{what} raised {type(error).__name__}: {one_line(error, 200)} ({Path(at.filename).name}:{at.lineno})"
        ) from error


def cannot_be_read(errors: Sequence[str], all_of_them: str, training: bool) -> str:
    """One line of the images that cannot be read: the first of them, how many there are, and the way out.

    Args:
        errors: what is wrong with each.
        all_of_them: among which they were found, for the message.
        training: whether `dataset.skip_unreadable` would help.
    """
    several = len(errors) > 1
    count = f"; {len(errors):,} of {all_of_them} cannot be read" if several else ""
    way_out = f"; dataset.skip_unreadable=true leaves {'them' if several else 'it'} out of training" if training else ""
    return errors[0] + count + way_out


class Reader:
    """Batches of samples read and transformed one at a time; what a worker process has.

    Args:
        part: `(images, labels)` or a map-style Dataset.
        transforms: those that run on one image at a time.
        seed: of the run.
        num_classes: labels are below it.
        skip_unreadable: another sample of the batch takes the place of an image file that cannot be read.
        training: whether the samples are for training, where that may be asked for.
    """

    TOGETHER = 8  # samples read before they are transformed: taking turns would clear the processor's caches each time

    def __init__(
        self,
        part: Any,
        transforms: Sequence[Any],
        seed: int,
        num_classes: int,
        skip_unreadable: bool,
        training: bool = False,
    ) -> None:
        self.part, self.transforms, self.seed = part, list(enumerate(transforms)), seed
        self.num_classes, self.skip_unreadable, self.training = num_classes, skip_unreadable, training
        # Ours draw nothing at random while reading and keep no file open; a user's may.
        self.is_ours = isinstance(part, (tuple, datasets.ImageFiles))
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
                    if not isinstance(self.part, datasets.ImageFiles):
                        raise RunError(str(error)) from error
                    skipped.append(str(error))
            if skipped and not self.skip_unreadable:
                continue  # only to count the others
            for place, image, label in read:
                yield place, self._transform(image, draws, place), label
        if skipped and not self.skip_unreadable:
            raise RunError(cannot_be_read(skipped, f"the {len(indices)} images of this batch", self.training))

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
        what = f"sample {index} of {type(self.part).__name__}"
        with users_code(what):
            sample = self.part[index]
        return _image_and_label(sample, what, self.num_classes)

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
        probabilities = [isinstance(label, Tensor) for label in labels]
        if any(probabilities) and not all(probabilities):
            raise RunError(
                f"{self._name(indices[probabilities.index(True)])} has probabilities for its label, "
                f"{self._name(indices[probabilities.index(False)])} a class; expected the same of all samples"
            )
        return images, torch.stack(labels) if probabilities[0] else torch.tensor(labels)

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
        if getattr(image, "mode", None) == "P":
            raise RunError(f"{what} is a Pillow image with a palette; expected its colours: image.convert('RGB')")
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
    image = image if image.dtype == torch.uint8 else image.float()
    with suppress(TypeError, ValueError, RuntimeError):  # text, for instance
        known = torch.as_tensor(label)
        if known.ndim == 1 and len(known) == num_classes and num_classes > 1:
            return image, known.float()
        if known.numel() == 1 and 0 <= int(known) < num_classes and int(known) == known:
            return image, int(known)
    shown = label.tolist() if hasattr(label, "tolist") else label
    raise RunError(
        f"{what} has label {printable(repr(shown))[:80]}; expected 0 to {num_classes - 1}, "
        f"as there are {num_classes} classes"
    )


class _Slots:
    """Memory that the main process shares with its workers; making and mapping some anew for each batch takes time.

    A file that has no name: made before the workers, who inherit it or are sent it, and given its size once the first
    image is known. It is not in /dev/shm, which is small in a container.
    """

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("batches"), "r+b", buffering=0)
        self.memory: Tensor | None = None

    def __getstate__(self) -> Any:
        return DupFd(self.file.fileno())  # how multiprocessing sends a file to a process that it starts

    def __setstate__(self, sent: Any) -> None:
        self.file, self.memory = os.fdopen(sent.detach(), "r+b", buffering=0), None

    def mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory as one tensor, of the same shape and type each time.

        Raises:
            OSError, ValueError, OverflowError: there is not so much.
        """
        if self.memory is None:
            size = max(1, math.prod(shape) * dtype.itemsize)
            os.ftruncate(self.file.fileno(), size)
            memory = torch.frombuffer(mmap.mmap(self.file.fileno(), size), dtype=dtype)
            self.memory = memory[: math.prod(shape)].view(shape)
        return self.memory


_NO_MEMORY = (OSError, ValueError, OverflowError)  # what mapping too much raises

Slot = tuple[int, tuple[int, ...], torch.dtype]  # its number, and shape and type of all of them


class _Worker(Dataset):
    """What a worker process is asked for: (epoch, indices, slot to put the images into or None).

    It answers (images, labels, what was skipped), where a number instead of images says how many are in the slot; or
    the error with its traceback. Indices and labels travel as arrays: each tensor would take a file of shared memory.
    """

    def __init__(self, reader: Reader, slots: _Slots | None) -> None:
        self.reader, self.slots = reader, slots

    def __getitem__(self, asked: tuple[int, np.ndarray, Slot | None]) -> tuple[Any, ...]:
        epoch, indices, slot = asked
        try:
            into = None
            if slot is not None and self.slots is not None:
                with suppress(*_NO_MEMORY):  # then they are sent as they are
                    into = self.slots.mapped(*slot[1:])[slot[0]]
            images, labels, skipped = self.reader.read(epoch, torch.from_numpy(indices), into)
            if into is not None and images.data_ptr() == into.data_ptr():
                return len(images), labels.numpy(), skipped
            return _shared(images), labels.numpy(), skipped
        except RunError as error:
            return error, "".join(traceback.format_exception(error))


class _InWorker(Exception):
    """The traceback of an error in a worker process, which an exception that is sent leaves behind."""


def _shared(images: Tensor) -> Tensor:
    """In memory that the main process can read; done here, where a failure can still be told."""
    try:
        return images.share_memory_()
    except (RuntimeError, OSError) as error:
        raise RunError(_no_shared_memory(one_line(error, 120))) from error


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
    """Worker processes around a Reader; they live from the first question on.

    A user's Dataset is read by them only: a file that it opened in this process would be one file for all of them, and
    each would move the others' place in it.

    Images come back in slots, memory that is used over and over.

    Args:
        reader: what every worker has.
        count: of processes; with none, this one reads.
        batch_size: samples asked for at once, at most.
    """

    AHEAD = 2  # batches a worker is asked for before the first of them is taken

    def __init__(self, reader: Reader, count: int, batch_size: int) -> None:
        self.reader, self.count, self.batch_size = reader, count, batch_size
        self.asked: list[tuple[int, np.ndarray, Slot | None]] = []  # the loader looks here when it begins an epoch
        self.slots: _Slots | None = None  # None where there is no such memory, as on macOS: batches are sent then
        if count:
            with suppress(OSError, AttributeError):
                self.slots = _Slots()
        self.layout: tuple[tuple[int, ...], torch.dtype] | None = None  # of the slots, once an image was seen
        self.loader: DataLoader | None = None
        self.turn = 0

    def first(self, epoch: int, indices: Tensor) -> Tensor:
        """The first image of these samples that can be read, `[1, channels, height, width]`, for its shape.

        Raises:
            RunError: it cannot be read, or with `skip_unreadable` none can.
        """
        for index in indices.split(1):
            try:
                if self.count and not self.reader.is_ours:
                    images = next(self._answers([(epoch, index.numpy(), None)]))[0]
                else:
                    images = self.reader.read(epoch, index)[0]
            except RunError:
                if not self.reader.skip_unreadable:
                    raise
                continue
            if len(images):
                self.layout = (self.count * self.AHEAD + 1, self.batch_size, *images.shape[1:]), images.dtype
                return images
        raise RunError(f"none of the {len(indices):,} images can be read")

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
        if self.layout is None:
            with suppress(RunError):  # what cannot be read is told when it is asked for in its batch
                self.first(epoch, batches[0])
        slots = self._slots()
        # There is one slot more than batches under way, so the one in use is asked for again only when it was left.
        places = range(len(batches))
        chosen = [None if slots is None else (place % len(slots), *self.layout) for place in places]  # type: ignore
        asked = [(epoch, indices.numpy(), slot) for indices, slot in zip(batches, chosen, strict=True)]
        for place, (images, labels, skipped) in enumerate(self._answers(asked)):
            if isinstance(images, int):
                images = slots[place % len(slots), :images]  # type: ignore[index, arg-type]
                images = images.clone() if images.is_floating_point() else images
            yield images, torch.from_numpy(labels), skipped

    def _slots(self) -> Tensor | None:
        """The slots, where an image has told their shape and there is memory for them."""
        if self.slots is None or self.layout is None:
            return None
        with suppress(*_NO_MEMORY):
            return self.slots.mapped(*self.layout)
        return None

    def _answers(self, asked: list[tuple[int, np.ndarray, Slot | None]]) -> Iterator[tuple[Any, np.ndarray, Any]]:
        """What the workers answer, in order, raising their errors; starts them if there are none yet."""
        self.asked[:] = asked
        self.turn += 1
        turn = self.turn
        for answer in self._until_death():
            if isinstance(answer[0], RunError):
                raise answer[0] from _InWorker(answer[1])
            yield answer
            if turn != self.turn:  # the workers answer the later one
                raise RuntimeError("an epoch cannot go on after another one of the same batches was begun")

    def _until_death(self) -> Iterator[Any]:
        part = type(self.reader.part).__name__
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: as asked
                warnings.filterwarnings("ignore", message="Got pickle error")  # told below
                if self.loader is None:
                    self.loader = self._start()
                batches = iter(self.loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RunError(
                f"{part} cannot be sent to worker processes ({one_line(error, 160)}); "
                "let it open files on first use, or set num_workers=0"
            ) from error
        except (RuntimeError, OSError) as error:
            raise RunError(_no_shared_memory(one_line(error, 160))) from error
        try:
            yield from batches
        except (RuntimeError, OSError) as error:
            if "Caught " in str(error):  # raised by our own code in a worker; its traceback is in the text
                raise
            raise RunError(_no_shared_memory(one_line(error, 160))) from error

    def _start(self) -> DataLoader:
        """The loader, which starts the processes when it is first asked."""
        if multiprocessing.get_start_method() == "forkserver":  # Python 3.14: import once, not in every process
            multiprocessing.set_forkserver_preload(["torch", "engine.reader"])
        loader = DataLoader(
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
        Finalize(self, _dismiss, args=(loader,), exitpriority=100)
        return loader


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
        name = type(part).__name__
        if hasattr(part, "set_epoch"):
            with users_code(f"set_epoch of {name}"):
                part.set_epoch(number)
        iterator, count, end = None, 0, object()
        while limit is None or count < limit:
            with own_randomness():
                if states is None:
                    seed_everything(int(sample_seed(self.reader.seed, number)))
                else:
                    set_random_states(states)
                with users_code(f"sample {count} of {name}"):
                    iterator = iterator or iter(part)
                    sample = next(iterator, end)
                states = random_states()
            if sample is end:
                return
            yield _image_and_label(sample, f"sample {count} of {name}", self.reader.num_classes)
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
