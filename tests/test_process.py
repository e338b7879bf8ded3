"""Threads wait awake while a run is alone on its machine; of another one it is told, and then they wait asleep.

And memory that was freed stays with the process.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Call

BEGIN = """
import os, sys, threading
from engine import process
process.spin()
import torch
process.share_cores()
print(os.environ["GOMP_SPINCOUNT"], flush=True)
for _ in sys.stdin:
    print(*sorted(thread.name for thread in threading.enumerate()), flush=True)
"""


class Run:
    """A process that has begun as a run does, and answers a line of input with the names of its threads."""

    def __init__(self, folder: Path, **environment: str) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN],
            cwd=ROOT,
            env=kept | {"TMPDIR": str(folder), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def threads(self, until: str) -> bool:
        """Whether its threads become these within a minute; it looks every second."""
        assert self.process.stdin is not None
        for _ in range(600):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            if self.line() == until:
                return True
            time.sleep(0.1)
        return False

    def said(self) -> str:
        return self.process.communicate("")[1]


def test_threads_wait_asleep_while_another_run_is_there(tmp_path: Path) -> None:
    one = Run(tmp_path)
    assert one.line() == "10000"  # awake, so long
    assert one.threads("MainThread watch")
    other = Run(tmp_path)
    assert other.line() == "10000"
    for run in (one, other):
        assert run.threads("MainThread crowd watch")  # more threads than cores: OpenMP lets none wait awake
    one.process.kill()  # the kernel unlocks its file
    assert one.said() == ""
    assert other.threads("MainThread watch")
    assert other.said() == "note: another run uses this machine; meanwhile the threads of both wait asleep\n"


def test_what_the_user_set_is_kept_and_no_folder_is_needed(tmp_path: Path) -> None:
    own = Run(tmp_path, GOMP_SPINCOUNT="7")
    assert own.line() == "7" and own.threads("MainThread") and own.said() == "" and not list(tmp_path.iterdir())
    (tmp_path / f"training-runs-{os.getuid()}.lock").symlink_to(tmp_path / "elsewhere")  # laid there by somebody
    laid = Run(tmp_path)
    assert laid.line() == "10000" and laid.threads("MainThread") and laid.said() == ""
    assert not (tmp_path / "elsewhere").exists()


def test_a_command_is_told_of_another_run(process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with (tmp_path / f"training-runs-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        answer = process("train", "debug=fast", TMPDIR=str(tmp_path))
    assert answer.code == 0
    assert answer.err == "note: another run uses this machine; meanwhile the threads of both wait asleep\n"


FAULTS = """
import resource, torch
from engine.process import keep_memory
keep_memory()
def step():
    return torch.ones(5_000_000)  # 20 MB, 4,883 pages
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    def faults(**environment: str) -> int:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults() < 25 * 4_800  # the heap may grow some times more
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 100 * 4_800  # the user's own word: anew each time
