"""README.md: its table of settings is the program's own, its commands work, and its files are there."""

from __future__ import annotations

import os
import re
import shlex

import pytest
from conftest import ROOT, Call

from engine.command.help import setting_rows
from engine.config import group_options

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?: {4})?((?:python|torchrun .*) (?:train|evaluate)\.py.*?)(?: +#.*)?$", README, re.MULTILINE)


def settings_table(entry: str) -> str:
    """A table of every setting of an entry point, in Markdown."""
    rows = [("setting", "default", "meaning"), ("---", "---", "---")]
    rows += [(f"`{name}`", f"`{default}`", meaning) for name, default, meaning in setting_rows(entry)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.mark.parametrize("entry", ["train", "evaluate"])
def test_the_table_of_settings_is_the_programs_own(entry: str) -> None:
    found = re.search(rf"<!-- settings of {entry} -->\n+(.*?)\n*<!-- end -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == settings_table(entry), "PYTHONPATH=. python tests/test_docs.py writes the tables anew"


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 12
    assert all(shlex.split(command) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_composes(call: Call, command: str) -> None:
    """Composing finds a typo in an option or setting; `--cfg job` stops there."""
    _, program, *arguments = shlex.split(re.sub(r"^torchrun .* (?=train|evaluate)", "torchrun ", command))
    if "--runs" in arguments or "resume=latest" in arguments:  # of a run that is there
        assert call("train", "epochs=1", "model.hidden=[4]", "name=rates").code == 0
    if "--runs" in arguments:
        assert call("evaluate", *arguments).code == 0
        return
    if "-m" in arguments:  # the first job of a sweep
        arguments = [re.sub(r"=([\w.]+),[\w,.]+$", r"=\1", a) for a in arguments if a != "-m"]
    if program == "evaluate.py":  # its dataset's settings are those of a checkpoint
        arguments = [a for a in arguments if not a.startswith("dataset.")]
    answer = call(program.removesuffix(".py"), *arguments, "--cfg", "job")
    assert answer.code == 0, answer.err


def test_the_set_up_commands() -> None:
    """What .ci/run runs as printed: each is all that a fresh machine needs."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    for command, install, end in zip(
        commands, (".", "'.[test]'"), ("python train.py", "python -m pytest"), strict=True
    ):
        assert command == (
            "python3 -m venv .venv && . .venv/bin/activate && "
            f"python -m pip install -c constraints.txt {install} && {end}"
        )
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep '^python3 -m venv ' README.md" in script and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".venv/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_versions_of_python_are_stated_once_and_the_same() -> None:
    required = re.search(
        r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert required is not None
    assert f"Python 3.{required[1]} to 3.{int(required[2]) - 1} on Linux or macOS" in README


def test_files_that_are_named_exist() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert linked
    for name in linked:
        assert (ROOT / name).exists(), name


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|engine|benchmarks|configs|models)/[\w/.]*)`", text)
    assert len(named) > 15 and [file for file in named if not (ROOT / file).exists()] == []


def test_every_dataset_is_named() -> None:
    for name in group_options()["dataset"]:
        assert f"`{name}`" in README, name


def test_constraints_pin_every_dependency_without_an_address() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {re.split("==", line)[0].lower() for line in text.splitlines() if line and not line.startswith("#")}
    project = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    test = re.search(r"^test = \[(.*)\]", project, re.MULTILINE)
    assert core and test
    needed = {name.lower() for name in re.findall(r'"([\w-]+)', core[1] + test[1])}
    assert needed <= pinned
    assert "torch==2.14.1" in text and "torchvision==0.29.1" in text
    assert "://" not in text and "--" not in text


if __name__ == "__main__":  # write the tables of settings anew
    for program in ("train", "evaluate"):
        table = f"<!-- settings of {program} -->\n\n{settings_table(program)}\n\n<!-- end -->"
        README = re.sub(
            rf"<!-- settings of {program} -->.*?<!-- end -->", lambda _, new=table: new, README, flags=re.DOTALL
        )
    (ROOT / "README.md").write_text(README, encoding="utf-8")
