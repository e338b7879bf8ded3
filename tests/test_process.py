"""Runs that want the same cores take turns at them; and memory that was freed stays with the process."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Call

BEGIN = """
import os, sys, time
from engine import process
process.spin()
process.share_cores({threads})
print(os.environ["GOMP_SPINCOUNT"], flush=True)
sys.stdin.readline()
for batch in process.in_turns(range(1_000_000)):
    start = time.monotonic()
    time.sleep(0.02)
    print(start, time.monotonic(), flush=True)
"""


class Run:
    """A process that has begun as a run does, says so, and after a line of input notes when it had its batches."""

    def __init__(self, folder: Path, threads: int | None = None, **environment: str) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self.notes = folder / f"notes{len(list(folder.iterdir()))}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN.format(threads=threads)],
            cwd=ROOT,
            env=kept | {"TMPDIR": str(folder), **environment},
            stdin=subprocess.PIPE,
            stdout=self.notes.open("w"),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wait_for(1)

    def wait_for(self, lines: int) -> None:
        """Until so many more lines were written."""
        wanted = len(self.lines()) + lines
        until = time.monotonic() + 180
        while len(self.lines()) < wanted:
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.01)

    def lines(self) -> list[str]:
        return self.notes.read_text().split("\n")[:-1]

    def spans(self) -> list[list[float]]:
        """When each batch began and ended, on the machine's clock."""
        return [[float(number) for number in line.split()] for line in self.lines()[1:]]

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ended(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]


needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="runs share nothing on one core")


@needs_cores
def test_runs_take_turns_and_one_that_ends_or_stops_keeps_none_waiting(tmp_path: Path) -> None:
    one, other = Run(tmp_path), Run(tmp_path)
    one.begin()
    one.wait_for(5)
    third = Run(tmp_path)
    other.begin()
    other.wait_for(60)
    one.wait_for(20)  # both come to their turn
    spans = sorted(one.spans() + other.spans())
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))  # one at a time
    one.process.send_signal(signal.SIGSTOP)  # Ctrl-Z, which may be in its turn
    other.wait_for(20)
    one.process.send_signal(signal.SIGCONT)
    one.wait_for(20)
    other.wait_for(20)
    other.process.kill()
    one.wait_for(20)
    third.begin()
    third.wait_for(20)
    assert one.ended() == "" and other.ended() == ""
    assert third.ended() == "note: another run uses these cores; the two take turns\n"


@needs_cores
def test_runs_with_threads_of_their_own_take_no_turns(tmp_path: Path) -> None:
    alone = Run(tmp_path, threads=1)
    own = Run(tmp_path, GOMP_SPINCOUNT="7")  # the user's own word on how threads wait
    assert own.lines() == ["7"]
    assert {path.name for path in tmp_path.iterdir()} == {"notes0", "notes1"}  # no lock
    alone.begin()
    own.begin()
    alone.wait_for(40)
    own.wait_for(40)
    assert alone.ended() == "" and own.ended() == ""


@needs_cores
def test_a_lock_that_cannot_be_made_is_as_if_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lock = next(path for path in tmp_path.iterdir() if path.suffix == ".turn")
    assert lock.name.startswith(f"training-runs-{os.getuid()}-")
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")  # laid there by somebody
    laid = Run(tmp_path)
    laid.begin()
    laid.wait_for(5)
    assert laid.ended() == "" and run.ended() == "" and not (tmp_path / "elsewhere").exists()


@needs_cores
def test_a_command_is_told_of_another_run(process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = sum(1 << core for core in os.sched_getaffinity(0))
    with (tmp_path / f"training-runs-{os.getuid()}-{cores:x}.turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # and never let go: it waits for its first batch, not for the others
        answer = process("train", "debug=fast", TMPDIR=str(tmp_path))
    assert answer.code == 0
    assert answer.err == "note: another run uses these cores; the two take turns\n"


FAULTS = """
import resource, numpy
from engine.process import keep_memory
keep_memory()
def step():
    return numpy.ones(5_000_000, numpy.float32)  # 20 MB, 4,883 pages; from malloc, as torch's, and sooner imported
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    def faults(**environment: str) -> int:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        kept["NUMPY_MADVISE_HUGEPAGE"] = "0"  # pages that can be counted
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults() < 12 * 4_800  # the heap may grow some times more
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 50 * 4_800  # the user's own word: anew each time
