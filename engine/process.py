"""The process on its machine: how the threads of PyTorch's arithmetic wait, and what memory it keeps.

After a parallel operation GNU OpenMP's threads keep their cores busy, waiting for the next: by default some 10 ms,
which is time taken from workers that read images. A thirtieth of it bridges the gaps within a training step; asleep a
step takes a third longer. But two runs whose threads wait awake for cores that the other one has get half of the work
of one done. So runs that want all the same cores take turns. Neither changes a result, nor does where memory comes
from.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SPINS = "10000"  # GOMP_SPINCOUNT
TURN = 0.05  # seconds; to change over costs a hundredth of it
PATIENCE = 3.0  # seconds; whoever has the turn may have been stopped (Ctrl-Z), or wait for its images
PATIENCE_LATER = TURN / 10  # each time; so it is had again soon after whoever has it passes it on again

Item = TypeVar("Item")
_ours = False  # whether GOMP_SPINCOUNT is from here; how threads wait that the user has set is left alone
_turns: Turns | None = None


def spin() -> None:
    """Before torch is imported, and with it OpenMP: let threads wait awake for a third of a millisecond."""
    global _ours
    if "GOMP_SPINCOUNT" not in os.environ and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = SPINS
        _ours = True


def keep_memory() -> None:
    """Let glibc keep what is freed, up to 1 GB, for the next step, which needs as much again.

    By itself it gives large tensors back to the kernel, and getting them anew, page by page, was a seventh of a CNN's
    training step. What the user set counts. Other systems' allocators are left alone.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it takes: blocks up to 32 MB come from what is kept
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def share_cores(threads: int) -> None:
    """From now on take turns with other runs that want all of the same cores; so many threads are this one's.

    A run that leaves cores to others, as the jobs of a parallel sweep do, takes no turns.
    """
    global _turns
    told, _turns = _turns is not None, None
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # GNU OpenMP is Linux' alone
    if not _ours or len(cores) == 1 or threads < len(cores):
        return
    with contextlib.suppress(OSError):  # where no file can be made or locked it is as if alone
        turns = Turns(f"training-runs-{os.getuid()}-{sum(1 << core for core in cores):x}")
        if not turns.take(0) and not told:
            print("note: another run uses these cores; the two take turns", file=sys.stderr)
        turns.give()
        _turns = turns


def in_turns(batches: Iterable[Item]) -> Iterator[Item]:
    """The same batches; while other runs want the cores, it is between two of them that others get their turn."""
    turns = _turns
    if turns is None:
        yield from batches
        return
    turns.take()
    try:
        for batch in batches:
            yield batch
            if time.monotonic() - turns.since > TURN:
                turns.give()
                turns.take()
    finally:
        turns.give()


class Turns:
    """Whose turn it is: whoever has the file `turn` locked. Who is next has locked `next`, and waits.

    The second keeps who has just had its turn from taking it again before who waits. The kernel unlocks both when a
    process ends.
    """

    def __init__(self, name: str) -> None:
        path = os.path.join(tempfile.gettempdir(), name)
        self.turn, self.next = _Lock(path + ".turn"), _Lock(path + ".next")
        self.since = 0.0  # when it was last taken, or not to be had
        self.patience = PATIENCE

    def take(self, patience: float | None = None) -> bool:
        """Wait for the turn; who has waited too long goes on without it, and from then on asks for it in passing."""
        until = time.monotonic() + (self.patience if patience is None else patience)
        pause, got = 0.8 * TURN, True  # whoever has the turn has most of it before it, and asking takes time from that
        for lock in (self.next, self.turn):
            while got and not lock.take():
                left = until - time.monotonic()
                got = left > 0
                time.sleep(max(0.0, min(pause, left)))
                pause = 0.0005
        self.next.give()
        self.since = time.monotonic()
        if patience is None:
            self.patience = PATIENCE if got else PATIENCE_LATER
        return got

    def give(self) -> None:
        """Let another run have the turn."""
        self.turn.give()


class _Lock:
    """A file that one process at a time has locked."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "ab", opener=_open)  # noqa: SIM115

    def take(self) -> bool:
        """Whether it could be locked, without waiting: flock itself would wait for ever."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)  # a link may have been laid there by somebody
