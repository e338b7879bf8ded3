"""Real processes of the entry points, forked from one that has torch imported, so that a test does not pay for that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

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
