"""The short form of benchmarks/hostile.py, in a process of its own: an audit hook cannot be taken away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_hostile_files_and_command_lines_do_no_harm(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "hostile.py", "--cases", "10", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 cases, 0 wrong" in done.stdout
