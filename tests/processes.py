"""Real processes of the entry points, forked from one that has torch imported, so that a test does not pay for that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_MATPLOTLIB = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
# torch._dynamo: every optimizer imports it, which takes as long as torch itself
_context.set_forkserver_preload(
    ["train", "evaluate", "predict", "torchvision", "torch._dynamo", *_MATPLOTLIB, "quick", "warm"]
)


@dataclass
class Command:
    """A started `python train.py ...`, the leader of a process group of its own."""

    process: BaseProcess
    directory: Path
    began: float
    name: str = ""  # of several in one directory

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.directory / f".out{self.name}").read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.directory / f".err{self.name}").read_text()

    def signal(self, number: int) -> None:
        """Send a signal to the process and its workers, as a terminal's Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit code; negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        return self.process.exitcode


def start(
    entry: str,
    *arguments: str,
    cwd: Path,
    before: Callable[[str], None] | None = None,
    argument: str = "",
    variables: dict[str, str] | None = None,
    pictures: bool = False,
) -> Command:
    """Start an entry point in a directory, with variables in its environment; it first calls `before(argument)`.

    Its pictures are one white pixel, unless `pictures` asks for them.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    name, variables = (variables or {}).get("RANK", ""), variables or {}
    process = _context.Process(
        target=_main, args=(entry, arguments, str(cwd), before, argument, name, variables, pictures)
    )
    process.start()
    while not (cwd / f".ready{name}").exists() and process.is_alive():  # until it leads its own group
        time.sleep(0.005)
    (cwd / f".ready{name}").unlink(missing_ok=True)
    return Command(process, cwd, time.monotonic(), name)


def run(entry: str, *arguments: str, cwd: Path, **how: Any) -> Command:
    """Start an entry point and wait for its end."""
    command = start(entry, *arguments, cwd=cwd, **how)
    command.wait()
    return command


def _main(
    entry: str,
    arguments: tuple[str, ...],
    cwd: str,
    before: Callable[[str], None] | None,
    argument: str,
    name: str,
    variables: dict[str, str],
    pictures: bool,
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a program started from a shell
    os.setsid()
    os.chdir(cwd)
    os.environ |= variables
    for number, kind in ((1, ".out"), (2, ".err")):
        file = os.open(kind + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(ROOT / f"{entry}.py"), *arguments]
    Path(f".ready{name}").touch()
    import quick

    from engine.command.cli import launch
    from engine.pictures import style

    quick.compose_quickly(setattr)
    if not pictures:
        style.draw = quick.draw_quickly
    if before:
        before(argument)
    launch(entry)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes that work together


def free_port() -> int:
    """A port that nobody uses at the moment, below those that the system gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)  # other workers of the suite have the same seed
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def launcher() -> Iterator[dict[str, str]]:
    """The store of a torchrun, and what it tells its processes of that."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    yield {**agent, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}


def start_several(
    count: int, *arguments: str, cwd: Path, launch: dict[str, str], apart: float = 0, **how: Any
) -> list[Command]:
    """Start the processes of one `train.py`, some seconds after each other, the last one first."""
    commands: list[Command] = []
    for rank in reversed(range(count)):
        commands.insert(0, start("train", *arguments, cwd=cwd, variables=launch | numbers(rank, count), **how))
        time.sleep(apart if rank else 0)
    return commands


def group(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of so many processes, which are told of each other as torchrun does.

    `work` is found by its name in the module of a test, and what it returns is pickled.
    """
    with launcher() as launch:
        return _group(count, launch, work, arguments)


def _group(count: int, launch: dict[str, str], work: Callable[..., Any], arguments: Any) -> list[Any]:
    results = _context.SimpleQueue()
    members = [
        _context.Process(target=_member, args=(launch | numbers(rank, count), results, work, arguments))
        for rank in range(count)
    ]
    for member in members:
        member.start()
    found: dict[int, Any] = {}
    while len(found) < count:
        fallen = [member.exitcode for member in members if member.exitcode]  # before the look at what they left
        if not results.empty():
            rank, pickled = results.get()
            result = pickle.loads(pickled)
        elif fallen:
            result = RuntimeError(f"a process ended with {fallen[0]} and left no result")
        else:
            time.sleep(0.01)
            continue
        if isinstance(result, BaseException):
            for member in members:
                member.kill()
            raise result
        found[rank] = result
    for member in members:
        member.join(120)
    return [found[rank] for rank in range(count)]


def _member(variables: dict[str, str], results: Any, work: Callable[..., Any], arguments: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= variables
    import torch

    from engine import distributed

    try:
        distributed.start(torch.device("cpu"), {})
        result = work(*arguments)
        distributed.finish()
    except BaseException as error:
        result = error
    pickled = pickle.dumps(result)  # as it is: tensors would be sent as memory that ends with the process
    results.put((int(variables["RANK"]), pickled))


def numbers(rank: int, count: int) -> dict[str, str]:
    """What torchrun tells one of its processes of itself."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: str(number) for name, number in found.items()}
