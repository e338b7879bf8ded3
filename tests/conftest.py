"""What the tests share: the program called as a process, or in this one to save the time that importing torch takes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import quick

from engine.command.cli import OF_EXPERIMENT, launch
from engine.pictures import style
from engine.run import runs

ROOT = Path(__file__).resolve().parent.parent
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="key-of-the-tests-")  # not into the home of who runs them
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or tests at the same time would be told of each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: models this small are slower on more threads


@dataclass(frozen=True)
class Answer:
    """What a call of the program came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of stderr of a request that was refused."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (self.code, self.err)
        return lines[0].removeprefix("error: ")


@pytest.fixture(autouse=True)
def no_open_log() -> Iterator[None]:
    """A run that fails in this process leaves its log open, and Hydra's help one of its own: no test writes there."""
    yield
    runs.stop_log()
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@pytest.fixture(scope="session", autouse=True)
def quick_composition() -> Iterator[None]:
    """Compose in half of the time, to the same configuration."""
    with pytest.MonkeyPatch.context() as patch:
        quick.compose_quickly(patch.setattr)
        yield


Call = Callable[..., Answer]


@pytest.fixture
def call(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    """`call("train", "epochs=1")` does what `python train.py epochs=1` does in `tmp_path`, within this process.

    Its pictures are one white pixel, except in tests that are marked with `pictures`.
    """
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(style, "draw", quick.draw_quickly)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # put back afterwards, as what an experiment leaves to its processes
    monkeypatch.setenv(OF_EXPERIMENT, "[]")

    def run(entry: str, *arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{entry}.py"), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            launch(entry)
        out, err = capfd.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Call:
    """`process("train", "epochs=1")` runs `python train.py epochs=1` in `tmp_path`."""

    def run(entry: str, *arguments: str, **environment: str) -> Answer:
        done = subprocess.run(
            [sys.executable, ROOT / f"{entry}.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return run
