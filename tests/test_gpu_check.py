"""benchmarks/gpu.py, as far as a CPU can tell: it sees the mistake that it is there for, and says what it cannot do."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

GPU = [sys.executable, ROOT / "benchmarks" / "gpu.py"]


@pytest.mark.slow
def test_a_rehearsal_of_the_batches(tmp_path) -> None:
    command = [*GPU, "--device", "cpu", "in_memory", "from_workers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [row[:2] for row in rows if "pass" in row[1:2]] == [
        ["in_memory", "pass"],
        ["from_workers", "pass"],
    ], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = subprocess.run(GPU, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no CUDA device on this machine; --device cpu tries the checks themselves\n"
