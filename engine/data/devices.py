"""Which device, and how data gets there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from engine import distributed
from engine.errors import RequestError, counted


def choose_device(name: str) -> torch.device:
    """The device that `device=` asks for; auto takes CUDA, else MPS, else the CPU. Of several processes each has one.

    Raises:
        RequestError: it is not there, or there are more processes than devices.
    """
    if distributed.world_size() > 1:
        return _own_device(name)
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return torch.device(found[0] if found else "cpu")
    if name != "cpu" and name not in found and not (name == "cuda" and found and found[0].startswith("cuda")):
        raise RequestError(f"device={name}: not on this machine; there is {', '.join([*found, 'cpu', 'auto'])}")
    return torch.device(name)


def _own_device(name: str) -> torch.device:
    """Of several processes: the GPU of this one, or the CPU."""
    gpus, here = torch.cuda.device_count(), distributed.local_world_size()
    if name == "cpu" or (name == "auto" and not gpus and not torch.backends.mps.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise RequestError(
            f"device={name}: {distributed.world_size()} processes cannot share it; device=cuda gives each a GPU of its "
            "own, device=cpu some of the cores"
        )
    if here > gpus:
        raise RequestError(
            f"device={name}: {here} processes here and {counted(gpus, 'GPU')}; --nproc-per-node={max(1, gpus)}, "
            "or device=cpu"
        )
    return torch.device("cuda", distributed.local_rank())


def cores() -> int:
    """Processor cores that this process may use; of several processes its share."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // distributed.local_world_size())


_OWN_THREADS = torch.get_num_threads()  # PyTorch's choice, before a job of a sweep may have set another


def use_threads(number: int | None) -> None:
    """Let PyTorch's arithmetic on the CPU use so many threads; None is its own choice. More than cores is told.

    Of several processes each uses its share of the cores: what PyTorch would choose counts on being alone, and the one
    thread that torchrun sets leaves cores unused.
    """
    if number is None:
        told = os.environ.get("OMP_NUM_THREADS", "1") != "1"
        number = _OWN_THREADS if told or distributed.local_world_size() == 1 else cores()
    if number > max(cores(), _OWN_THREADS) and distributed.local_rank() == 0:
        print(f"note: num_threads={number}: more than the {counted(cores(), 'core')} to be had", file=sys.stderr)
    if number != torch.get_num_threads():
        torch.set_num_threads(number)


_placed: WeakValueDictionary[tuple[int, torch.device], Tensor] = WeakValueDictionary()  # in use on a device


def place(part: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
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


def on_device(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of host memory on a device; to CUDA each is copied while the one before is used.

    Only there: on MPS a copy that does not wait may read memory that is no longer what it was.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    for moved, arrived in one_ahead(_started_copies(batches, device)):
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


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each of them asked for before the one before it is given."""
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) == 2:
            yield held.pop(0)
    yield from held
