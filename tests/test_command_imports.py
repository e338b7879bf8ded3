"""What is imported when: the slow packages are counted, not the seconds, which differ from machine to machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Seconds that they take to import, on some machine: torch 1.3, torchvision 1.1 more, matplotlib.pyplot 0.3 ...
SLOW = ("torch", "torchvision", "numpy", "matplotlib", "tensorboard", "mlflow", "wandb", "optuna", "pandas", "scipy")
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/" + sys.argv[2] + ".py", *sys.argv[3:]]
from pathlib import Path
from engine.command.cli import launch
try:
    launch(Path(sys.argv[0]).stem)
except SystemExit as end:
    code = end.code
Path("found.json").write_text(json.dumps([code, sorted(sys.modules)]))
"""


def imported(folder: Path, *arguments: str, code: int = 0) -> set[str]:
    """The slow packages that a command has imported when it ends, with this exit code."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *arguments]
    done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    found, modules = json.loads((folder / "found.json").read_text())
    assert (found or 0) == code, done.stderr
    return {name for name in SLOW if name in modules}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("train", "--help"), 0),
        (("predict", "images=a.png", "top_k=zero"), 2),
        (("evaluate", "--runs"), 2),  # there is none here
    ],
)
def test_an_answer_needs_none_of_the_slow_packages(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    assert imported(tmp_path, *arguments, code=code) == set()


def test_training_imports_only_what_it_uses(tmp_path: Path) -> None:
    """Not torchvision, as the digits need none of its transforms; matplotlib draws the curves at the end."""
    assert imported(tmp_path, "train", "debug=fast", "device=cpu") <= {"torch", "numpy", "matplotlib"}
