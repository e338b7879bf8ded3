"""The process on its machine: how the threads of PyTorch's arithmetic wait, and what memory it keeps.

After a parallel operation GNU OpenMP's threads keep their cores busy, waiting for the next: by default some 10 ms,
which is time taken from workers that read images. A thirtieth of it bridges the gaps within a training step; asleep a
step takes a third longer. But two runs whose threads wait awake for cores that the other one has get two thirds of the
work of one done. So threads wait awake while a run is alone on its machine, else asleep. How they wait changes no
result, and neither does where memory comes from.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
import tempfile
import threading
import time

SPINS = "10000"  # GOMP_SPINCOUNT

_ours = False  # whether GOMP_SPINCOUNT is from here; how threads wait that the user has set is left alone
_watched = False


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


def share_cores() -> None:
    """From now on look every second whether another run is on this machine: while one is, threads wait asleep.

    Runs find each other by a file that each has locked, and the kernel unlocks it when a process ends.
    """
    global _watched
    if not _ours or _watched:
        return
    path = os.path.join(tempfile.gettempdir(), f"training-runs-{os.getuid()}.lock")
    with contextlib.suppress(OSError):  # where no file can be made or locked it is as if alone
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not alone(lock):
            print("note: another run uses this machine; meanwhile the threads of both wait asleep", file=sys.stderr)
        _watched = True
        threading.Thread(target=_watch, args=(lock,), name="watch", daemon=True).start()


def alone(lock: int) -> bool:
    """Whether no other process has this file locked; ours stays locked.

    Ours is unlocked for a moment, and who looks then may think itself alone until it looks again.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        fcntl.flock(lock, fcntl.LOCK_SH)
    return True


def _watch(lock: int) -> None:
    over: threading.Event | None = None  # while another run is there
    while True:
        if alone(lock):
            if over:
                over.set()
            over = None
        elif not over:
            over = threading.Event()
            threading.Thread(target=_crowd, args=(over,), name="crowd", daemon=True).start()
        time.sleep(1)


def _crowd(over: threading.Event) -> None:
    """Be a second set of OpenMP's threads: while a process has more of them than cores it lets none wait awake."""
    import torch

    torch.zeros(1 << 18).add_(1)  # large enough to be shared out among threads
    over.wait()
