"""Samples read in worker processes, into memory that they share with the main process."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.reader import Reader
from engine.errors import RunError, one_line


class _Slots:
    """Memory that the main process shares with its workers; making and mapping some anew for each batch takes time.

    A file that has no name: made before the workers, who inherit it or are sent it, and given its size once the first
    image is known. It is not in /dev/shm, which is small in a container.
    """

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("batches"), "r+b")
        self.memory: Tensor | None = None

    def __getstate__(self) -> Any:
        return DupFd(self.file.fileno())  # how multiprocessing sends a file to a process that it starts

    def __setstate__(self, sent: Any) -> None:
        self.file, self.memory = os.fdopen(sent.detach(), "r+b"), None

    def mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The memory as one tensor, of the same shape and type each time; None where there is not so much."""
        if self.memory is None:
            size = math.prod(shape) * dtype.itemsize
            with suppress(OSError, ValueError, OverflowError):
                os.ftruncate(self.file.fileno(), size)
                memory = torch.frombuffer(mmap.mmap(self.file.fileno(), size), dtype=dtype)
                self.memory = memory[: math.prod(shape)].view(shape)
        return self.memory


Slot = tuple[int, tuple[int, ...], torch.dtype]  # its number, and shape and type of all of them


class _Worker(Dataset):
    """What a worker process is asked for: (epoch, indices, slot to put the images into or None), and what is around.

    It answers (images, labels, what was skipped), where a number instead of images says how many are in the slot; or
    the error with its traceback. Indices and labels travel as arrays: each tensor would take a file of shared memory.
    """

    def __init__(self, reader: Reader, slots: _Slots | None) -> None:
        self.reader, self.slots = reader, slots

    def __getitem__(self, asked: tuple[Any, ...]) -> tuple[Any, ...]:
        epoch, indices, slot, *rest = asked
        try:
            memory = self.slots.mapped(*slot[1:]) if slot and self.slots else None
            into = memory[slot[0]] if slot and memory is not None else None  # without, they are sent as they are
            around = [(torch.from_numpy(rest[0]), torch.from_numpy(rest[1]))] if rest else []
            images, labels, skipped = self.reader.read(epoch, torch.from_numpy(indices), into, *around)
            if into is not None and images.data_ptr() == into.data_ptr():
                return len(images), labels.numpy(), skipped
            try:
                images.share_memory_()  # here, where a failure can still be told
            except (RuntimeError, OSError) as error:
                raise RunError(_no_shared_memory(error)) from error
            return images, labels.numpy(), skipped
        except RunError as error:
            return error, "".join(traceback.format_exception(error))


class _InWorker(Exception):
    """The traceback of an error in a worker process, which an exception that is sent leaves behind."""


def _no_shared_memory(error: Exception) -> str:
    return (
        f"a worker process that reads samples failed ({one_line(error, 160)}); if shared memory ran out, "
        "lower num_workers or batch_size, or enlarge shared memory (/dev/shm)"
    )


def _as_it_is(sample: Any) -> Any:
    return sample


def _start_worker(number: int) -> None:
    """Ctrl-C and SIGTERM go to every process of a terminal or job; the main process decides when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        self.asked: list[tuple[Any, ...]] = []  # the loader looks here when it begins an epoch
        self.slots: _Slots | None = None  # None where there is no such memory, as on macOS: batches are sent then
        if count:
            with suppress(OSError, AttributeError):
                self.slots = _Slots()
        self.layout: tuple[tuple[int, ...], torch.dtype] | None = None  # of the slots, once an image was seen
        self.loader: DataLoader | None = None
        self.turn = object()  # that of the answers which are given

    def first(self, epoch: int, indices: Tensor) -> Tensor:
        """The first image of these samples that can be read, `[1, channels, height, width]`, for its shape.

        Raises:
            RunError: it cannot be read, or with `skip_unreadable` none can.
        """
        for index in indices.split(1):
            try:
                if self.count and not self.reader.is_builtin:
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

    def read(
        self, epoch: int, batches: Sequence[Tensor], around: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """(images, labels, what was skipped) of these indices, in their order; `around` each as `Reader.read` has it.

        Images of bytes may lie in a slot: what is done with them has to be done before the next are asked for.

        Raises:
            RunError: what a worker could not read, or its death.
        """
        if not self.count:
            for place, indices in enumerate(batches):
                yield self.reader.read(epoch, indices, around=around[place] if around else None)
            return
        if self.layout is None:
            with suppress(RunError):  # what cannot be read is told when it is asked for in its batch
                self.first(epoch, batches[0])
        slots = self.slots.mapped(*self.layout) if self.slots and self.layout else None
        # There is one slot more than batches under way, so the one in use is asked for again only when it was left.
        asked: list[tuple[Any, ...]] = [
            (epoch, indices.numpy(), None if slots is None else (place % len(slots), *self.layout))  # type: ignore
            for place, indices in enumerate(batches)
        ]
        if around:
            asked = [(*one, *(tensor.numpy() for tensor in more)) for one, more in zip(asked, around, strict=True)]
        for place, (images, labels, skipped) in enumerate(self._answers(asked)):
            if isinstance(images, int):
                images = slots[place % len(slots), :images]  # type: ignore[index, arg-type]
                images = images.clone() if images.is_floating_point() else images
            yield images, torch.from_numpy(labels), skipped

    def _answers(self, asked: list[tuple[Any, ...]]) -> Iterator[tuple[Any, np.ndarray, Any]]:
        """What the workers answer, in order, raising their errors; starts them if there are none yet."""
        self.asked[:] = asked
        self.turn = turn = object()
        for answer in self._until_death():
            if isinstance(answer[0], RunError):
                raise answer[0] from _InWorker(answer[1])
            yield answer
            if turn is not self.turn:  # the workers answer the later one
                raise RuntimeError("an epoch cannot go on after another one of the same batches was begun")

    def _until_death(self) -> Iterator[Any]:
        try:
            yield from self._asked_loader()
        except (RuntimeError, OSError) as error:
            if "Caught " in str(error):  # raised by our own code in a worker; its traceback is in the text
                raise
            raise RunError(_no_shared_memory(error)) from error

    def _asked_loader(self) -> Iterator[Any]:
        """The loader's answers to what is asked; the first time the processes are started."""
        if multiprocessing.get_start_method() == "forkserver":  # Python 3.14: import once, not in every process
            multiprocessing.set_forkserver_preload(["torch", "engine.data.workers"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: as asked
            warnings.filterwarnings("ignore", message="Got pickle error")  # told below
            if self.loader is None:
                self.loader = DataLoader(
                    _Worker(self.reader, self.slots),
                    batch_size=None,
                    sampler=self.asked,
                    num_workers=self.count,
                    prefetch_factor=self.AHEAD,
                    collate_fn=_as_it_is,
                    persistent_workers=True,
                    worker_init_fn=_start_worker,
                    generator=torch.Generator(),  # or it would draw from the run's own
                )
                # Workers heed no signal; multiprocessing would wait for them for ever: they are told before.
                Finalize(self, _dismiss, args=(self.loader,), exitpriority=100)
            try:
                return iter(self.loader)
            except (PicklingError, AttributeError, TypeError) as error:
                raise RunError(
                    f"{type(self.reader.part).__name__} cannot be sent to worker processes ({one_line(error, 160)}); "
                    "let it open files on first use, or set num_workers=0"
                ) from error


def _dismiss(loader: DataLoader) -> None:
    """End the workers of a loader, also in the middle of an epoch."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
