"""Adding is dropping in: what the README shows, put into a copy of the tree, trains without another change."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Answer

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(file: str) -> str:
    """The code block of the README that follows the name of `file`."""
    after = README.partition("\n## Add a model")[2].partition(f"`{file}`")[2]
    found = re.search(r"```\w+\n(.*?)```", after, re.DOTALL)
    assert found, f"README.md shows no {file}"
    return found[1]


SEVERAL = """
import contextlib, io, json, sys
root, *commands = json.load(sys.stdin)
sys.path.insert(0, root)
from engine.command.cli import launch
answers = []
for entry, *words in commands:
    sys.argv = [f"{root}/{entry}.py", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch(entry)
        except SystemExit as end:
            code = end.code or 0
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
COMMANDS = {
    "model and dataset": "dataset=my_pictures model=two_layers model.width=100 epochs=10 batch_size=8 name=both",
    "help": "--help model=two_layers",
    "a wrong width": "model=two_layers model.width=0",
    "a wrong name": "model=two_layer",
    "a wrong epsilon": "criterion=poly1 criterion.epsilon=-1",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the program needs, into which everything that the README shows is dropped."""
    copy = tmp_path_factory.mktemp("extended") / "tree"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    for folder in ("configs", "engine", "models", "data/digits"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    groups = ("model/two_layers", "dataset/my_pictures", "optimizer/adamax", "scheduler/exponential", "criterion/poly1")
    for name in ("models/two_layers.py", *(f"configs/{group}.yaml" for group in groups), "losses.py"):
        assert not (copy / name).exists(), "the README adds what is there already"
        (copy / name).write_text(block(name))
    with (copy / "datasets.py").open("a") as opened:
        opened.write("\n\n" + block("datasets.py"))
    (copy / "data" / "my_pictures").mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        images = random.integers(0, 99, (count, 10, 12, 3)).astype(np.uint8)
        images[np.arange(count), :, :, labels] += 100  # the class is a colour
        np.savez(copy / "data" / "my_pictures" / f"{part}.npz", images=images, labels=labels)
    return copy


@pytest.fixture(scope="module")
def answers(tree: Path) -> dict[str, Answer]:
    """What the commands come to there, all in one process, as importing torch takes seconds."""
    command = re.search(r"`python train.py (optimizer=adamax .*?)`", README)
    assert command is not None
    commands = COMMANDS | {"three parts": f"{command[1]} scheduler.gamma=0.5 epochs=4 name=run"}
    given = json.dumps([str(tree), *(["train", *words.split()] for words in commands.values())])
    program = [sys.executable, "-c", SEVERAL]
    done = subprocess.run(program, cwd=tree, input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: Answer(*answer) for name, answer in zip(commands, json.loads(done.stdout), strict=True)}


def test_a_model_and_a_dataset_are_dropped_in(answers: dict[str, Answer]) -> None:
    answer = answers["model and dataset"]
    assert answer.code == 0, answer.err
    assert f"two_layers, {360 * 100 + 100 + 100 * 3 + 3:,} parameters" in answer.out
    assert "my_pictures, 81 train, 9 val, 30 test, images 3x10x12, 3 classes" in answer.out
    assert "test     accuracy 100.00%" in answer.out

    # Help and errors know them, too.
    assert "neurons of the hidden layer (an integer >= 1)" in answers["help"].out
    assert answers["a wrong width"].error == "model.width=0: expected an integer >= 1"
    assert "did you mean two_layers?" in answers["a wrong name"].error


def test_an_optimizer_a_schedule_and_a_loss_are_dropped_in(tree: Path, answers: dict[str, Answer]) -> None:
    answer = answers["three parts"]
    assert answer.code == 0, answer.err
    with (tree / "checkpoints/run/metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([2e-3, 1e-3, 5e-4, 2.5e-4])
    assert float(re.findall(r"test +accuracy ([\d.]+)%", answer.out)[0]) > 80
    assert answers["a wrong epsilon"].error == "criterion.epsilon=-1: expected a number >= 0"


def test_the_data_path_works_without_a_configuration() -> None:
    """As the README shows it, in a process of its own that has neither Hydra nor the command line."""
    code = README.partition("\n## The parts alone")[2].partition("```python\n")[2].partition("```")[0]
    assert "    ..." in code
    code = code.replace("    ...", "    print(*images.shape, images.dtype, *labels.shape, labels.dtype)")
    refused = ("hydra", "omegaconf", "engine.command", "engine.config", "engine.run")
    before = f"import sys; sys.modules.update(dict.fromkeys({refused!r})); import models\n"
    done = subprocess.run([sys.executable, "-c", before + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "64 1 8 8 torch.float32 64 torch.int64"
    assert sum(int(line.split()[5]) for line in lines) == 1442 - 143  # of each class four of five, less a tenth
