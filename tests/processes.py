"""Real processes of the entry points, forked from one that has torch imported, so that a test does not pay for that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_MATPLOTLIB = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
# torch._dynamo: every optimizer imports it, which takes as long as torch itself
_context.set_forkserver_preload(["train", "evaluate", "predict", "torchvision", "torch._dynamo", *_MATPLOTLIB])


@dataclass
class Command:
    """A started `python train.py ...`, the leader of a process group of its own."""

    process: BaseProcess
    directory: Path
    began: float

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.directory / ".out").read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.directory / ".err").read_text()

    def signal(self, number: int) -> None:
        """Send a signal to the process and its workers, as a terminal's Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit code; negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        return self.process.exitcode


def start(
    entry: str, *arguments: str, cwd: Path, before: Callable[[str], None] | None = None, argument: str = ""
) -> Command:
    """Start an entry point in a directory; the process first calls `before(argument)`."""
    cwd.mkdir(parents=True, exist_ok=True)
    process = _context.Process(target=_main, args=(entry, arguments, str(cwd), before, argument))
    process.start()
    while not (cwd / ".ready").exists() and process.is_alive():  # until it leads its own group
        time.sleep(0.005)
    (cwd / ".ready").unlink(missing_ok=True)
    return Command(process, cwd, time.monotonic())


def run(entry: str, *arguments: str, cwd: Path) -> Command:
    """Start an entry point and wait for its end."""
    command = start(entry, *arguments, cwd=cwd)
    command.wait()
    return command


def _main(
    entry: str, arguments: tuple[str, ...], cwd: str, before: Callable[[str], None] | None, argument: str
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a program started from a shell
    os.setsid()
    os.chdir(cwd)
    for number, name in ((1, ".out"), (2, ".err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(ROOT / f"{entry}.py"), *arguments]
    Path(".ready").touch()
    from engine.command.cli import launch

    if before:
        before(argument)
    launch(entry)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes that work together


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def group(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of so many processes, which are told of each other as torchrun does.

    `work` is found by its name in the module of a test, and what it returns is pickled.
    """
    port, results = free_port(), _context.SimpleQueue()
    members = [
        _context.Process(target=_member, args=(rank, count, port, results, work, arguments)) for rank in range(count)
    ]
    for member in members:
        member.start()
    found: dict[int, Any] = {}
    while len(found) < count:
        rank, pickled = results.get()
        result = pickle.loads(pickled)
        if isinstance(result, BaseException):
            for member in members:
                member.kill()
            raise result
        found[rank] = result
    for member in members:
        member.join(30)
    return [found[rank] for rank in range(count)]


def _member(rank: int, count: int, port: int, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= environment(rank, count, port)
    import torch

    from engine import distributed

    try:
        distributed.start(torch.device("cpu"), {})
        result = work(*arguments)
        distributed.finish()
    except BaseException as error:
        result = error
    results.put((rank, pickle.dumps(result)))  # as it is: tensors would be sent as memory that ends with the process


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells one of its processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
