"""The processes that torchrun starts for one command: who each of them is, and what they tell each other.

torchrun numbers its processes, a rank each, and gives them the address of a store that all of them reach and that
outlasts their restarts. Each does the same work on its own share of every batch. With one process every function here
gives back what it was given. Never imports torch, unless there are several processes or torchrun has started this one.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, zip_longest
from typing import Any, TypeVar

from engine.errors import RequestError, RunError, one_line, shortened

LONGEST_WAIT = timedelta(hours=1)  # for the others: one of them may download the data
STARTING = 300  # seconds from the first process to the last
PATIENCE = 20.0  # seconds from a signal to agreement; torchrun kills what has not ended after 30

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Who this process is


def rank() -> int:
    """The number of this process, from 0, which of one process it is whatever another launcher has left as RANK."""
    return _number("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are, on all machines."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of the processes are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if world_size() > 1 else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def is_launched() -> bool:
    """Whether a launcher has started this process, be it the only one."""
    return world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> int:
    """How often torchrun has started the processes anew (`--max-restarts`)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # `start` refuses others


def own_slice(count: int, rank: int, world_size: int) -> slice:
    """Which of `count` things in a row are those of a process; the shares of all make up the whole.

    They differ by one at most, and are empty for some where there are fewer things than processes.
    """
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def every_own() -> slice:
    """Which of things in a row are this process's where each takes every so many-th."""
    return slice(rank(), None, world_size())


# ---------------------------------------------------------------------------------------------------------------------
# The group


def start(device: Any, config: dict[str, Any]) -> None:
    """Meet the other processes; all of them call this once, and then the functions below in the same order.

    Args:
        device: of this process.
        config: what this process was asked for; it has to be what the others were.

    Raises:
        RequestError: they cannot meet, or were asked for different things.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (text := os.environ.get(name, "0")).isdecimal():
            raise RequestError(f"the environment has {name}={shortened(text)}; expected a number, as torchrun sets it")
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what is said between steps never waits for the GPU
    try:
        store = dist.PrefixStore(_met(), _store())
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=LONGEST_WAIT)
    except (dist.DistError, RuntimeError) as error:
        raise RequestError(f"the processes cannot meet at {_address()}: {one_line(error, 200)}") from None
    configs = gathered(config)
    for number, other in enumerate(configs):
        if other != configs[0]:
            raise RequestError(
                f"the processes were started with different settings: {_difference(configs[0], other, number)}; "
                "start them all with the same command line"
            )


def _met() -> str:
    """A name that all processes have and that those before a restart had not, once all are there.

    How often torchrun has started them does not serve: where a machine was replaced its torchrun counts from 0.
    """
    store, own = _store(), uuid.uuid4().hex
    if is_first():
        _name.append(own)
        waiting, until = set(range(1, world_size())), time.monotonic() + STARTING
        while waiting:
            for other in [other for other in waiting if store.check([f"hello{other}"])]:
                known = store.get(f"hello{other}").decode()  # perhaps of one that is gone, until another comes
                store.set(f"welcome/{known}", own)
                if store.check([f"here/{own}/{known}"]):
                    waiting.discard(other)
            if time.monotonic() > until:
                raise RuntimeError(f"rank {min(waiting)} has not come")
            time.sleep(0.01)
    else:
        store.set(f"hello{rank()}", own)
        _name.append(store.get(f"welcome/{own}").decode())
        store.set(f"here/{_name[-1]}/{own}", "")
    return _name[-1]


def _difference(first: dict[str, Any], other: dict[str, Any], number: int, path: str = "") -> str:
    """The first setting that differs."""
    name = next(name for name in [*first, *other] if first.get(name) != other.get(name))
    one, two = first.get(name), other.get(name)
    if isinstance(one, dict) and isinstance(two, dict):
        return _difference(one, two, number, f"{path}{name}.")
    return f"{path}{name} is {shortened(str(one))} in rank 0, {shortened(str(two))} in rank {number}"


def finish() -> None:
    """Part from the others, once all of them have come to their end."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        meet()
        gc.collect()  # DDP's models hold the group, whose threads must end before Python does
        dist.destroy_process_group()


def leave(exit_code: int) -> None:
    """End this process at once if it has not parted from the others: what they hold in common may wait for them."""
    if world_size() == 1 or "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        for worker in multiprocessing.active_children():  # that reads samples
            worker.kill()
        os._exit(exit_code)


def total(tensor: Any) -> Any:
    """A tensor added up over the processes, in place and returned; it may be on the processes' devices."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def as_first(tensors: Iterable[Any]) -> None:
    """Give tensors the values that they have in the first process."""
    if world_size() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def lowest(number: int) -> int:
    """The lowest of the numbers that the processes give."""
    return min(gathered(number)) if world_size() > 1 else number


def meet() -> None:
    """Wait until every process has come here."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """What each process gives, by rank, for all of them."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def in_turn(items: list[T]) -> list[T]:
    """What each process has made of every so many-th thing, from the one of its rank on, in the order of the things."""
    missing = object()
    rows = zip_longest(*gathered(items), fillvalue=missing)
    return [item for row in rows for item in row if item is not missing]  # type: ignore[misc]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all of them; the others do not call `make`."""
    if world_size() == 1:
        return make()
    import torch
    import torch.distributed as dist

    made = [make() if is_first() else None]
    dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
    return made[0]  # type: ignore[return-value]


def told_by_first(make: Callable[[], T]) -> T:
    """The same of what JSON can hold, also before the processes have met."""
    if world_size() == 1:
        return make()
    name = f"told{next(_told)}"
    if not is_first():
        return json.loads(_store().get(name))
    made = make()
    _store().set(name, json.dumps(made))
    return made


_told = count()


@contextmanager
def one_before_others() -> Iterator[None]:
    """What is inside is done by one process of each machine, which may write files, and then by the others."""
    if local_rank() > 0:
        meet()
    yield
    if local_rank() == 0:
        meet()


class Agreement:
    """A number that every process says between two steps; the highest is known between the next two, without waiting.

    So decisions that hang on a clock or a signal are the same in all processes, at the same step.
    """

    def __init__(self) -> None:
        self._said: tuple[Any, Any] | None = None  # the number's tensor, and the work of bringing it to the others

    def heard(self) -> int:
        """The highest number that was said the last time, 0 if none was."""
        if self._said is None:
            return 0
        (number, work), self._said = self._said, None
        work.wait()
        return int(number)

    def say(self, number: int) -> None:
        """Let the others know a number."""
        import torch
        import torch.distributed as dist

        told = torch.tensor(number)
        self._said = told, dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ends


_name: list[str] = []  # of this start of the processes, once they have met


def _start() -> str:
    return _name[-1] if _name else str(restarts())


def is_ours_to_tell(message: str, for_good: int | None = None) -> bool:
    """Whether an error is this process's to print: the error of the first one that fails is, the others follow from it.

    Args:
        message: the error, on one line.
        for_good: the exit code, where starting the processes anew would come to nothing else.
    """
    if not is_launched():
        return True
    try:
        store = _store(patience=10)
        if for_good is not None:
            store.set("ended", str(for_good))
        is_first_to_fail = store.add(f"failures/{_start()}", 1) == 1
        if is_first_to_fail:
            store.set(f"failure/{_start()}", message)
        until = time.monotonic() + 3
        while _keeps_store() and store.add(f"failures/{_start()}", 0) < world_size() and time.monotonic() < until:
            time.sleep(0.02)  # the others ask here, too
    except Exception:  # rather twice than never
        return True
    return is_first_to_fail


def ended() -> int | None:
    """The exit code with which the processes ended for good before torchrun started them anew, or None."""
    if not restarts():
        return None
    try:
        found = recalled("ended")
    except Exception:  # told when the processes are to meet
        return None
    return None if found is None else int(found)


def as_ours(error: BaseException) -> BaseException:
    """An error, or where it only says that another process is gone, what that process has told (RunError)."""
    if world_size() == 1 or isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return error
    import torch.distributed as dist

    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return error
    try:
        told = recalled(f"failure/{_start()}")
    except Exception:
        told = None
    return RunError(told or f"rank {rank()} has lost another process, which said nothing: it was killed, or crashed")


def remember(name: str, value: str) -> None:
    """Keep a text for the processes that torchrun starts in place of these."""
    if is_launched():
        _store().set(name, value)


def recalled(name: str) -> str | None:
    """The text that was kept under this name, or None."""
    store = _store() if is_launched() else None
    return store.get(name).decode() if store is not None and store.check([name]) else None


class Rescue:
    """Ends a process that waits for others that are gone, some time after a signal told it to end.

    What waits within a collective operation comes to no Python code, so no signal's handler there either.
    """

    def __init__(self) -> None:
        self._came_through = threading.Event()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # the signals' numbers are written there
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def _watch(self, read: int) -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(read, 1)[0]
        if not self._came_through.wait(PATIENCE):
            os._exit(128 + number)

    def stop(self) -> None:
        """All have agreed what to do, or are done."""
        self._came_through.set()
        signal.set_wakeup_fd(self._before)


def _check_environment() -> None:
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise RequestError(
            f"the environment has WORLD_SIZE={world_size()} and no {', '.join(missing)}; "
            "start several processes with torchrun, or unset WORLD_SIZE"
        )
    if rank() >= world_size():
        raise RequestError(f"the environment has RANK={rank()} and WORLD_SIZE={world_size()}; expected a smaller rank")


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _keeps_store() -> bool:
    """Whether this process has the store, for want of a launcher that has it."""
    return is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


_reached: list[Any] = []  # the store, once it was asked for; None where it was not to be had


def _store(patience: float = STARTING) -> Any:
    """The store of this launch, which torchrun has, or else the first process; asked for so many seconds.

    Raises:
        RequestError: no launcher has made this environment, its port is taken, or nobody is there.
    """
    from torch.distributed import DistNetworkError, TCPStore

    if not _reached:
        _check_environment()
        host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
        own, wait = _keeps_store(), timedelta(seconds=patience)
        _reached.append(None)
        try:
            _reached[0] = TCPStore(host, port, is_master=own, timeout=wait, wait_for_workers=False)
        except DistNetworkError as error:
            if own:
                raise RequestError(f"MASTER_PORT={port}: another program uses it; choose another port") from None
            raise RequestError(
                f"the first process is not to be reached at {_address()}: {one_line(error, 200)}"
            ) from None
    if _reached[0] is None:
        raise RequestError(f"there is nobody at {_address()}")
    return _reached[0]
