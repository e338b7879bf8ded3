"""Samples read in worker processes: mostly by workers that answer in this one, as far ahead as real ones do."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from engine.data import workers as module
from engine.data.images import ImageFiles
from engine.data.reader import Reader
from engine.data.workers import Workers, _dismiss, _Slots, _Worker
from engine.errors import RunError


class Samples(Dataset):
    """Images of two pixels, i and i + 1, labelled i; exceptions in place of some of them. Notes what was read."""

    def __init__(self, count: int, kind: torch.dtype = torch.uint8, **raised: Exception) -> None:
        self.count, self.kind, self.raised = count, kind, raised
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        if error := self.raised.get(f"number_{index}"):
            raise error
        return torch.tensor([[[index, index + 1]]], dtype=self.kind), index


def reader_of(part: Any, skip: bool = False) -> Reader:
    return Reader(part, [], 0, 1000, skip)


def in_memory(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count)
    return torch.stack([labels, labels + 1], 1).to(torch.uint8).view(count, 1, 1, 2), labels


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory


class Sent:
    """A file on its way to another process."""

    def __init__(self, slots: _Slots) -> None:
        self.number = os.dup(slots.file.fileno())

    def detach(self) -> int:
        return self.number


def test_who_is_sent_the_memory_sees_what_the_other_writes() -> None:
    one, two = _Slots(), _Slots.__new__(_Slots)
    two.__setstate__(Sent(one))
    shape = (3, 2, 5)
    mine, other = one.mapped(shape, torch.float32), two.mapped(shape, torch.float32)
    assert mine is not None and other is not None
    assert mine.shape == other.shape == shape and mine.dtype == torch.float32
    assert os.fstat(one.file.fileno()).st_size == 3 * 2 * 5 * 4
    other.copy_(torch.arange(30).view(shape))
    assert mine.flatten().tolist() == list(range(30))
    assert one.mapped(shape, torch.float32) is mine  # mapped once


def test_where_there_is_not_so_much_memory_there_is_none() -> None:
    for shape in ((1 << 62, 4), (1 << 70,), (0, 3)):
        assert _Slots().mapped(shape, torch.float32) is None


@pytest.mark.parametrize("number", [0, 2])
def test_a_worker_puts_images_into_the_slot_that_it_is_told(number: int) -> None:
    slots = _Slots()
    worker = _Worker(reader_of(in_memory(9)), slots)
    layout = (3, 4, 1, 1, 2), torch.uint8
    memory = slots.mapped(*layout)
    assert memory is not None
    memory.fill_(99)
    count, labels, skipped = worker[1, np.array([5, 0, 7]), (number, *layout)]
    assert (count, labels.tolist(), skipped) == (3, [5, 0, 7], []) and isinstance(labels, np.ndarray)
    assert memory[number].flatten(1).tolist() == [[5, 6], [0, 1], [7, 8], [99, 99]]
    assert all((memory[other] == 99).all() for other in range(3) if other != number)


@pytest.mark.parametrize(
    ("slots", "slot"),
    [
        (True, None),
        (False, None),
        (False, (1, (3, 4, 1, 1, 2), torch.uint8)),  # where there is no such memory
        (True, (1, (1 << 62, 4, 1, 1, 2), torch.uint8)),  # or not so much of it
        (True, (1, (3, 4, 1, 1, 2), torch.float32)),  # images of another type
        (True, (1, (3, 4, 1, 2, 2), torch.uint8)),  # of another size
    ],
)
def test_without_a_slot_that_fits_images_are_sent(slots: bool, slot: Any) -> None:
    worker = _Worker(reader_of(in_memory(9)), _Slots() if slots else None)
    images, labels, skipped = worker[1, np.array([5, 0]), slot]
    assert images.flatten(1).tolist() == [[5, 6], [0, 1]] and images.is_shared()
    assert labels.tolist() == [5, 0] and skipped == []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_images_that_lie_elsewhere_are_sent(place: int) -> None:
    """Before the slot in memory or behind it."""
    memory = torch.zeros(3, 4, 1, 1, 2, dtype=torch.uint8)
    reader: Any = SimpleNamespace(read=lambda epoch, indices, into: (memory[place], indices, []))
    worker = _Worker(reader, SimpleNamespace(mapped=lambda *layout: memory))  # type: ignore[arg-type]
    images, _, _ = worker[1, np.arange(4), (1, (3, 4, 1, 1, 2), torch.uint8)]
    assert images == 4 if place == 1 else images.data_ptr() == memory[place].data_ptr()


@pytest.mark.parametrize("error", [RuntimeError("no\nspace"), OSError("no\nspace")])
def test_shared_memory_that_runs_out_is_told(error: Exception) -> None:
    def share_memory_() -> None:
        raise error

    images = SimpleNamespace(share_memory_=share_memory_)
    reader: Any = SimpleNamespace(read=lambda epoch, indices, into: (images, indices, []))
    told, where = _Worker(reader, None)[1, np.arange(2), None]
    assert type(told) is RunError and "share_memory_" in where
    assert str(told) == (
        "a worker process that reads samples failed (no space); if shared memory ran out, "
        "lower num_workers or batch_size, or enlarge shared memory (/dev/shm)"
    )


def test_an_error_of_a_worker_comes_with_its_traceback() -> None:
    told, where = _Worker(reader_of(Samples(9, number_3=KeyError("caption"))), None)[1, np.array([3]), None]
    assert type(told) is RunError and str(told).startswith("sample 3 of Samples raised KeyError: 'caption'")
    assert "Traceback" in where and "raise error" in where


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of them


class Loader:
    """Answers as a DataLoader does, in this process: AHEAD batches of every worker are read before one is given."""

    made: list[Loader]
    failing: Exception | None = None  # when its processes start
    _iterator = None

    def __init__(self, dataset: Any, *, sampler: list[Any], num_workers: int, prefetch_factor: int, **_: Any) -> None:
        self.dataset, self.sampler, self.ahead = dataset, sampler, num_workers * prefetch_factor
        self.made.append(self)

    def __iter__(self) -> Iterator[Any]:
        if self.failing:
            raise self.failing
        return self.answers(list(self.sampler))

    def answers(self, asked: list[Any]) -> Iterator[Any]:
        done: list[Any] = []
        for place in range(len(asked)):
            done += [self.dataset[one] for one in asked[len(done) : place + 1 + self.ahead]]
            yield done[place]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Loader]:
    """The loaders that were made."""
    Loader.made = []
    monkeypatch.setattr(Loader, "failing", None)
    monkeypatch.setattr(module, "DataLoader", Loader)
    return Loader.made


def asked_of(workers: Workers, batches: list[list[int]], epoch: int = 1) -> list[tuple[list[list[int]], list[int]]]:
    """(images, labels) of batches, each looked at before the next is asked for."""
    given = workers.read(epoch, [torch.tensor(batch) for batch in batches])
    return [(images.flatten(1).tolist(), labels.tolist()) for images, labels, _ in given]


def expected(batches: list[list[int]]) -> list[tuple[list[list[int]], list[int]]]:
    return [([[i, i + 1] for i in batch], batch) for batch in batches]


BATCHES = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(20)] + [[60, 61]]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "part", [in_memory(62), Samples(62), Samples(62, torch.float32)], ids=["memory", "own", "float"]
)
def test_batches_come_in_their_order_from_memory_that_is_used_over_and_over(
    made: list[Loader], count: int, part: Any
) -> None:
    workers = Workers(reader_of(part), count, 3)
    for epoch in (1, 2):
        assert asked_of(workers, BATCHES, epoch) == expected(BATCHES)
    (loader,) = made
    assert loader.ahead == 2 * count and workers.slots is not None and workers.slots.memory is not None
    assert workers.slots.memory.shape == (2 * count + 1, 3, 1, 1, 2)  # those under way, and the one in use
    answers = [loader.dataset[asked][0] for asked in workers.asked]
    assert answers == [3] * 20 + [2]  # each in a slot
    assert [asked[2][0] for asked in workers.asked] == [place % (2 * count + 1) for place in range(21)]


def test_floats_stay_what_they_are_when_their_slot_is_used_again(made: list[Loader]) -> None:
    workers = Workers(reader_of(Samples(62, torch.float32)), 1, 3)
    held = list(workers.read(1, [torch.tensor(batch) for batch in BATCHES]))
    assert [(images.flatten(1).tolist(), labels.tolist()) for images, labels, _ in held] == expected(BATCHES)
    slots, one = workers.slots, Workers(reader_of(Samples(62)), 1, 3)
    assert slots is not None and slots.memory is not None
    (images, _, _), *_ = one.read(1, [torch.tensor([1, 2])])
    assert one.slots is not None and one.slots.memory is not None
    assert images.data_ptr() == one.slots.memory.data_ptr()  # bytes are made floats of anyway: no copy


def test_where_there_is_no_such_memory_batches_are_sent(made: list[Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise OSError

    monkeypatch.setattr(module, "_Slots", none)
    workers = Workers(reader_of(Samples(62)), 2, 3)
    assert workers.slots is None and asked_of(workers, BATCHES) == expected(BATCHES)


def test_without_workers_this_process_reads(made: list[Loader]) -> None:
    part = Samples(62)
    workers = Workers(reader_of(part), 0, 3)
    assert asked_of(workers, BATCHES) == expected(BATCHES) and part.read == list(range(62))
    assert workers.first(1, torch.tensor([4, 5])).flatten().tolist() == [4, 5] and made == []
    assert workers.slots is None


def test_a_users_dataset_is_read_by_workers_only_and_ours_here(made: list[Loader]) -> None:
    first = Workers(reader_of(in_memory(9)), 2, 3).first(1, torch.tensor([4, 5]))
    assert first.shape == (1, 1, 1, 2) and first.flatten().tolist() == [4, 5] and made == []
    first = Workers(reader_of(Samples(9)), 2, 3).first(1, torch.tensor([4, 5]))
    assert first.shape == (1, 1, 1, 2) and first.flatten().tolist() == [4, 5] and len(made) == 1


def files_of(folder: Path, count: int, *bad: int) -> ImageFiles:
    for number in range(count):
        Image.new("L", (2, 1), number).save(folder / f"{number}.png")
    for number in bad:
        (folder / f"{number}.png").write_bytes(b"none")
    return ImageFiles([str(folder / f"{number}.png") for number in range(count)], list(range(count)), channels=1)


@pytest.mark.parametrize("count", [0, 2])
def test_the_first_image_that_can_be_read(made: list[Loader], tmp_path: Path, count: int) -> None:
    files = files_of(tmp_path, 5, 0, 1, 3)
    first = Workers(reader_of(files, skip=True), count, 3).first(1, torch.arange(5))
    assert first.shape == (1, 1, 1, 2) and first.unique().tolist() == [2]
    with pytest.raises(RunError, match=r"0\.png: cannot be read as an image"):
        Workers(reader_of(files), count, 3).first(1, torch.arange(5))
    with pytest.raises(RunError, match=r"^none of the 3 images can be read$"):
        Workers(reader_of(files, skip=True), count, 3).first(1, torch.tensor([0, 1, 3]))


def test_a_reader_may_give_no_image_for_one_that_cannot_be_read() -> None:
    def read(epoch: int, indices: Tensor, into: Any = None) -> tuple[Tensor, Tensor, Any]:
        return (torch.zeros(0) if indices[0] < 2 else torch.full((1, 3, 4, 5), 7.0)), indices, {}

    reader: Any = SimpleNamespace(read=read, is_builtin=True, skip_unreadable=True)
    workers = Workers(reader, 2, 6)
    assert workers.first(1, torch.arange(4)).shape == (1, 3, 4, 5)
    assert workers.layout == ((5, 6, 3, 4, 5), torch.float32)


def test_what_cannot_be_read_is_told_in_its_batch(made: list[Loader], tmp_path: Path) -> None:
    files = files_of(tmp_path, 6, 0, 4)
    batches = [torch.tensor(batch) for batch in ([2, 3], [5, 4], [0, 1])]
    given = Workers(reader_of(files, skip=True), 2, 2).read(1, batches)
    found = [(images[:, 0, 0, 0].tolist(), labels.tolist(), len(skipped)) for images, labels, skipped in given]
    assert found == [([2, 3], [2, 3], 0), ([5, 5], [5, 5], 1), ([1, 1], [1, 1], 1)]
    for first in (0, 1, 2):
        given = Workers(reader_of(files), 2, 2).read(1, batches[first:] + batches[:1])
        if first == 0:
            assert next(given)[1].tolist() == [2, 3]
        with pytest.raises(RunError, match=rf"{[4, 4, 0][first]}\.png: cannot be read as an image") as raised:
            next(given)
        assert "Traceback" in str(raised.value.__cause__)  # of the worker


def test_an_epoch_that_was_left_does_not_go_on(made: list[Loader]) -> None:
    workers = Workers(reader_of(Samples(62)), 2, 3)
    batches = [torch.tensor(batch) for batch in BATCHES]
    first = workers.read(1, batches)
    next(first)
    assert next(workers.read(2, batches[5:]))[1].tolist() == BATCHES[5]
    with pytest.raises(RuntimeError, match="an epoch cannot go on after another one of the same batches was begun"):
        next(first)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error"), RunError),
        (OSError("Too many open files"), RunError),
        (RuntimeError("Caught KeyError in DataLoader worker process 0."), RuntimeError),
    ],
)
def test_the_death_of_a_worker_is_told_and_an_error_of_our_own_is_shown(
    made: list[Loader], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    monkeypatch.setattr(Loader, "failing", error)
    with pytest.raises(kind) as raised:
        asked_of(Workers(reader_of(in_memory(9)), 1, 3), [[0, 1, 2]])
    assert (raised.value is error) == (kind is RuntimeError)
    if kind is RunError:
        assert str(raised.value).startswith(f"a worker process that reads samples failed ({error}); if shared memory")


@pytest.mark.parametrize("kind", [PicklingError, AttributeError, TypeError])
def test_what_cannot_be_sent_to_a_worker_is_told(
    made: list[Loader], monkeypatch: pytest.MonkeyPatch, kind: Callable[[str], Exception]
) -> None:
    monkeypatch.setattr(Loader, "failing", kind("cannot pickle it"))
    with pytest.raises(RunError) as raised:
        asked_of(Workers(reader_of(Samples(9)), 1, 3), [[0, 1, 2]])
    assert str(raised.value) == (
        "Samples cannot be sent to worker processes (cannot pickle it); "
        "let it open files on first use, or set num_workers=0"
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_only_a_server_of_processes_imports_before_them(
    made: list[Loader], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    imported: list[str] = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", imported.extend)
    assert asked_of(Workers(reader_of(in_memory(9)), 1, 3), [[0, 1, 2]]) == expected([[0, 1, 2]])
    assert ("torch" in imported) == (method == "forkserver")


def test_workers_are_told_to_end_if_there_are_any() -> None:
    ended = []
    iterator = SimpleNamespace(_shutdown_workers=lambda: ended.append(1))
    for one in (None, iterator):
        _dismiss(SimpleNamespace(_iterator=one))  # type: ignore[arg-type]
    assert ended == [1]


class Processes(Dataset):
    """Labelled with the process that reads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 1, 2), index, dtype=torch.uint8), os.getpid()


def test_a_worker_is_a_process_that_serves_all_epochs() -> None:
    workers = Workers(Reader(Processes(), [], 0, 1 << 30, False), 1, 2)
    seen = []
    for epoch in (1, 2):
        for images, labels, _ in workers.read(epoch, [torch.tensor([2, 0]), torch.tensor([3])]):
            seen += zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
    assert [value for value, _ in seen] == [2, 0, 3] * 2
    assert len({process for _, process in seen}) == 1 and seen[0][1] != os.getpid()
    assert workers.loader is not None
    _dismiss(workers.loader)
