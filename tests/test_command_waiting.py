"""Of several runs on a machine one lets its threads wait actively, and the others say that theirs do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

CODE = "import os; from engine.command.cli import choose_waiting; choose_waiting(); print(os.environ['GOMP_SPINCOUNT'])"
STAYS = "; import sys; sys.stdout.flush(); sys.stdin.read()"


def begin(folder: Path, code: str = CODE + STAYS, **environment: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    kept |= {"TMPDIR": str(folder), **environment}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=kept, text=True, **pipes)  # type: ignore[call-overload]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_of_two_spins_and_the_next_once_it_is_gone(tmp_path: Path) -> None:
    one, other = begin(tmp_path), begin(tmp_path)  # in the same moment
    found = {first_line(one): one, first_line(other): other}
    assert found.keys() == {"10000", "0"}
    _, said = found["0"].communicate("")
    assert said == "note: another run uses this machine; the threads of this one wait without spinning\n"
    third = begin(tmp_path, CODE)
    assert third.communicate("")[0] == "0\n"
    found["10000"].kill()  # the kernel drops its lock
    found["10000"].communicate()
    fourth = begin(tmp_path, CODE)
    assert fourth.communicate("") == ("10000\n", "")


def test_what_the_user_set_is_kept_and_no_folder_is_needed(tmp_path: Path) -> None:
    own = begin(tmp_path, CODE, GOMP_SPINCOUNT="7")
    assert own.communicate("") == ("7\n", "") and not list(tmp_path.iterdir())
    (tmp_path / f"active-threads-{os.getuid()}.lock").symlink_to(tmp_path / "elsewhere")  # laid there by somebody
    laid = begin(tmp_path, CODE)
    assert laid.communicate("") == ("10000\n", "") and not (tmp_path / "elsewhere").exists()
