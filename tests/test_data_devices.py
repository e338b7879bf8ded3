"""Which device is taken, what is placed on it, and how batches get there; CUDA and MPS as they say they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data import devices
from engine.data.devices import choose_device, on_device, one_ahead, place
from engine.errors import RequestError


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "taken"),
    [
        (0, False, "auto", "cpu"),
        (0, False, "cpu", "cpu"),
        (0, False, "cuda", None),
        (0, False, "cuda:0", None),
        (0, False, "mps", None),
        (0, False, "all", None),  # before auto, cpu and cuda in the alphabet
        (0, False, "tpu", None),  # after them
        (1, False, "auto", "cuda:0"),
        (1, False, "cuda", "cuda"),
        (1, False, "cuda:0", "cuda:0"),
        (1, False, "cuda:1", None),
        (1, False, "cpu", "cpu"),
        (1, False, "tpu", None),
        (3, False, "auto", "cuda:0"),
        (3, False, "cuda", "cuda"),
        (3, False, "cuda:2", "cuda:2"),
        (3, False, "cuda:3", None),
        (0, True, "auto", "mps"),
        (0, True, "mps", "mps"),
        (0, True, "cpu", "cpu"),
        (0, True, "cuda", None),
        (2, True, "auto", "cuda:0"),
        (2, True, "cuda", "cuda"),
    ],
)
def test_the_device_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, name: str, taken: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if taken is not None:
        assert choose_device(name) == torch.device(taken)
        return
    there = ["cuda:0", "cuda:1", "cuda:2"][:cuda] + ["mps"][: int(mps)] + ["cpu", "auto"]
    with pytest.raises(RequestError) as refused:
        choose_device(name)
    assert str(refused.value) == f"device={name}: not on this machine; there is {', '.join(there)}"


# ---------------------------------------------------------------------------------------------------------------------
# Placed there

CUDA = torch.device("cuda:0")


class Samples:
    """So many bytes, on the host or on a device; says what is done with it."""

    def __init__(self, size: int, log: list[Any] | None = None, device: torch.device | None = None) -> None:
        self.size, self.log, self.device = size, [] if log is None else log, device

    def numel(self) -> int:
        return self.size

    def pin_memory(self) -> Samples:
        self.log.append(("pin", self.size))
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Samples:
        self.log.append(("copy", self.size, "beside" if non_blocking else "waiting"))
        return Samples(self.size, self.log, device)

    def record_stream(self, stream: Any) -> None:
        self.log.append(("in use", self.size, stream))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are free on the CUDA device, of a thousand."""
    known = [100]

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        assert device.type == "cuda"
        return known[0], 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    return known


def placed(part: Any, device: torch.device) -> Any:
    return place(part, device)


@pytest.mark.parametrize(("size", "fits"), [(1, True), (50, True), (51, False), (99, False), (600, False)])
def test_samples_are_placed_where_they_fit_into_half_of_what_is_free(free: list[int], size: int, fits: bool) -> None:
    part = Samples(size), Samples(7)
    found = placed(part, CUDA)
    assert (found is part) != fits
    if fits:
        assert [(copy.size, copy.device) for copy in found] == [(size, CUDA), (7, CUDA)]


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("name", ["mps", "xpu"])  # before and after cuda in the alphabet: where nothing is asked
def test_other_devices_get_all_of_them(name: str) -> None:
    found = placed((Samples(600), Samples(7)), torch.device(name))
    assert [(copy.size, copy.device.type) for copy in found] == [(600, name), (7, name)]


def test_on_the_cpu_nothing_is_copied() -> None:
    part = Samples(600), Samples(7)
    assert placed(part, torch.device("cpu")) is part and not part[0].log


def test_a_part_is_placed_once_and_kept_no_longer_than_it_is_used(free: list[int]) -> None:
    part = Samples(50), Samples(7)
    first = placed(part, CUDA)
    free[0] = 10  # as the first took the rest
    assert all(one is two for one, two in zip(first, placed(part, CUDA), strict=True))
    other = Samples(40), part[1]  # other images with the same labels: these do not fit any more
    assert placed(other, CUDA) is other
    elsewhere = placed(part, torch.device("mps"))
    assert elsewhere[0] is not first[0] and elsewhere[0].device.type == "mps"
    del first, elsewhere
    assert placed(part, CUDA) is part


# ---------------------------------------------------------------------------------------------------------------------
# Sent there


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is done on a CUDA device, in order."""
    done: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            done.append(("a stream", device))

        def record_event(self) -> str:
            done.append("event")
            return "arrived"

    class User:
        def wait_event(self, event: str) -> None:
            done.append(("wait", event))

    user = User()

    @contextmanager
    def within(stream: Any) -> Iterator[None]:
        done.append("[")
        yield
        done.append("]")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: user)
    devices._copying.cache_clear()
    yield done
    devices._copying.cache_clear()


def test_a_batch_is_copied_to_cuda_beside_the_work_on_the_one_before(log: list[Any]) -> None:
    user = torch.cuda.current_stream(CUDA)
    batches: Any = [(Samples(10 * n, log), Samples(10 * n + 1, log)) for n in (1, 2, 3)]
    sent: Any = on_device(iter(batches), CUDA)

    def copied(n: int) -> list[Any]:
        pins = [("pin", 10 * n), ("pin", 10 * n + 1)]
        return [*pins, "[", ("copy", 10 * n, "beside"), ("copy", 10 * n + 1, "beside"), "event", "]"]

    def used(n: int) -> list[Any]:
        return [("wait", "arrived"), ("in use", 10 * n, user), ("in use", 10 * n + 1, user)]

    for n, expected in (
        (1, [("a stream", CUDA), *copied(1), *copied(2), *used(1)]),
        (2, [*copied(3), *used(2)]),
        (3, used(3)),
    ):
        images, labels = next(sent)
        assert (images.size, labels.size, images.device) == (10 * n, 10 * n + 1, CUDA)
        assert log == expected
        log.clear()
    assert list(sent) == [] and log == []
    assert len(list(on_device(iter(batches), CUDA))) == 3
    assert ("a stream", CUDA) not in log  # the memory that one has used serves no other


@pytest.mark.parametrize("name", ["mps", "xpu", "cpu"])
def test_other_devices_wait_for_each_batch(log: list[Any], name: str) -> None:
    batches: Any = [(Samples(10 * n, log), Samples(10 * n + 1, log)) for n in (1, 2)]
    sent: Any = on_device(iter(batches), torch.device(name))
    images, labels = next(sent)
    assert log == [("copy", 10, "waiting"), ("copy", 11, "waiting")]
    assert (images.size, labels.size, images.device.type) == (10, 11, name)
    assert [(images.size, labels.size) for images, labels in sent] == [(20, 21)]


def test_items_are_asked_for_one_ahead() -> None:
    for count in (0, 1, 2, 5):
        asked: list[int] = []
        source = (asked.append(number) or number for number in range(count))  # type: ignore[func-returns-value]
        found = []
        for number in one_ahead(source):
            found.append(number)
            assert asked == list(range(min(number + 2, count)))
        assert found == list(range(count))


def test_tensors_arrive_as_they_were() -> None:
    pairs = [(torch.rand(2, 1, 3, 3), torch.arange(2)), (torch.rand(1, 1, 3, 3), torch.arange(1))]
    found: list[tuple[Tensor, Tensor]] = list(on_device(pairs, torch.device("cpu")))
    assert all(
        torch.equal(one, two)
        for pair, sent in zip(pairs, found, strict=True)
        for one, two in zip(pair, sent, strict=True)
    )


def test_batches_for_cuda_are_asked_for_one_ahead() -> None:
    asked: list[int] = []

    def source() -> Iterator[int]:
        for number in range(4):
            asked.append(number)
            yield number

    for number in one_ahead(source()):
        assert asked == list(range(min(number + 2, 4)))
    assert number == 3 and list(one_ahead(iter(()))) == []


def test_only_cuda_is_sent_batches_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # on MPS they would arrive damaged
    waits: list[bool] = []
    copy = torch.Tensor.to

    def to(tensor: Tensor, *arguments: Any, **given: Any) -> Tensor:
        waits.append(not given.get("non_blocking") and len(arguments) < 3)
        return copy(tensor, *arguments, **given)

    monkeypatch.setattr(torch.Tensor, "to", to)
    pairs = [(torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64))] * 3
    assert [images.device.type for images, _ in on_device(pairs, torch.device("meta"))] == ["meta"] * 3
    assert len(waits) == 6 and all(waits)


def test_threads_of_arithmetic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three cores of eight may be used, and PyTorch has chosen two threads."""
    told: list[int] = []
    now = [2]
    monkeypatch.setattr(devices, "_OWN_THREADS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (told.append(number), now.__setitem__(0, number)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0: {1, 4, 7}}[pid], raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for number in (None, 2, 1, 3, 3, None):
        devices.use_threads(number)
    assert told == [1, 3, 2]  # only what is another number than before, and null goes back
    assert capsys.readouterr().err == ""
    devices.use_threads(4)
    assert now == [4] and capsys.readouterr().err == "note: num_threads=4: more than the 3 cores to be had\n"
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    for count, said in ((8, ""), (3, "3 cores"), (None, "1 core ")):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        devices.use_threads(4)
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)
    monkeypatch.setattr(devices, "_OWN_THREADS", 6)  # OMP_NUM_THREADS=6 on fewer cores: the user knows
    devices.use_threads(None)
    assert now == [6] and capsys.readouterr().err == ""


def test_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: {1, 4, 5}}[process], raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert devices.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert devices.cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert devices.cores() == 1
