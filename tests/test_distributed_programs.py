"""evaluate.py and predict.py in several processes print and write what one process prints and writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from engine import distributed
from engine.data.batches import Batches
from engine.data.splits import Split
from evaluate import Subject, predictions_of


def several(count: int, entry: str, *words: str, cwd: Path, **how: Any) -> list[processes.Command]:
    """A command in so many processes, as torchrun starts them; waits for their end."""
    with processes.launcher() as launch:
        variables = [launch | processes.numbers(rank, count) for rank in range(count)]
        commands = [processes.start(entry, *words, cwd=cwd, variables=own, **how) for own in variables]
        for command in commands:
            command.wait()
    return commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two runs of a small CNN, and ten images of which one cannot be read."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("one", "two"):
        words = ["model=cnn", "model.width=4", "epochs=1", "dataset.limit=300", f"name={name}", f"seed={len(name)}"]
        assert processes.run("train", *words, f"optimizer.lr={0.1 if name == 'one' else 0.02}", cwd=folder).wait() == 0
    (folder / "3").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "3" / f"{number}.png")
    (folder / "3" / "7.png").write_bytes(b"no image")
    yield folder


EVALUATIONS = {
    "one checkpoint": ["checkpoint={0}/checkpoints/one/best.pt", "batch_size=8", "dataset.limit=50"],
    "two of them": ["checkpoint=[{0}/checkpoints/one/best.pt,{0}/checkpoints/two/best.pt]", "dataset.limit=50"],
    "fewer samples than processes": ["checkpoint={0}/checkpoints/one/best.pt", "dataset.limit=2"],
    "mirrored": ["checkpoint={0}/checkpoints/one/best.pt", "batch_size=10", "tta=flip", "split=val"],
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_comes_to_the_same_to_the_last_bit(trained: Path, tmp_path: Path, name: str) -> None:
    words = [word.format(trained) for word in EVALUATIONS[name]]
    outputs = [tmp_path / part / "evaluation.json" for part in ("alone", "together")]
    for output in outputs:
        output.parent.mkdir()
    how = {"cwd": tmp_path, "pictures": name == "one checkpoint"}
    alone = processes.run("evaluate", *words, f"output={outputs[0]}", **how)
    count = 3 if name == "fewer samples than processes" else 2
    together = several(count, "evaluate", *words, f"output={outputs[1]}", **how)
    assert alone.wait() == 0 and [command.wait() for command in together] == [0] * count, together[0].err
    assert together[0].out.replace("together", "alone") == alone.out
    assert all(not command.out for command in together[1:]) and not any(command.err for command in together)
    written = sorted(path.name for path in outputs[0].parent.iterdir())
    assert written == sorted(path.name for path in outputs[1].parent.iterdir()) and "evaluation.json" in written
    for file in written:
        assert (outputs[0].parent / file).read_bytes() == (outputs[1].parent / file).read_bytes(), file


@pytest.mark.parametrize("batch_size", [2, 100])
def test_predictions_come_in_order(trained: Path, tmp_path: Path, batch_size: int) -> None:
    words = [f"checkpoint={trained}/checkpoints/one/best.pt", f"images={trained}/3", f"batch_size={batch_size}"]
    outputs = [tmp_path / f"{part}.csv" for part in ("alone", "together")]
    alone = processes.run("predict", *words, f"output={outputs[0]}", cwd=tmp_path)
    together = several(3, "predict", *words, f"output={outputs[1]}", cwd=tmp_path)
    assert alone.wait() == 1 and [command.wait() for command in together] == [1, 1, 1]  # one image cannot be read
    assert alone.out.count("\n") == 10 and together[0].out == alone.out
    said = sorted(line for command in together for line in command.err.splitlines())
    assert [line.replace("together", "alone") for line in said] == sorted(alone.err.splitlines())
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize("entry", ["evaluate", "predict"])
def test_a_wrong_request_is_told_once(trained: Path, tmp_path: Path, entry: str) -> None:
    words = [f"images={trained}/3"] if entry == "predict" else []
    commands = several(3, entry, f"checkpoint={tmp_path}/none.pt", *words, cwd=tmp_path)
    assert [command.wait() for command in commands] == [2, 2, 2]
    assert "".join(command.err for command in commands) == f"error: {tmp_path}/none.pt: no such checkpoint\n"


def told() -> list[str]:
    return [distributed.told_by_first(lambda what=what: f"{what} of {distributed.rank()}") for what in ("one", "two")]


def test_what_the_first_process_decides_all_know() -> None:
    assert processes.group(3, told) == [["one of 0", "two of 0"]] * 3
    assert told() == ["one of 0", "two of 0"]


class Stream(IterableDataset):
    """Seven samples, which only reading them counts."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        drawn = torch.Generator().manual_seed(0)
        return iter([(torch.rand(1, 2, 2, generator=drawn), place % 3) for place in range(7)])


def of_a_stream() -> tuple[float, list[int], list[float]]:
    cpu, classes = torch.device("cpu"), ["a", "b", "c"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    split = Split(Stream(), None, 3)
    batches = Batches(split, [], cpu, batch_size=2)
    config = {"split": "test", "tta": None}
    subject = Subject(Path("none.pt"), {}, config, split, classes, classes, batches, model, cpu)
    found = predictions_of(subject)
    truths, _ = found.ranking.read()
    return found.loss, truths.tolist(), [float(loss) for loss in found.batch_losses]


def test_a_stream_is_shared_out_too() -> None:
    alone = of_a_stream()
    assert alone[1] == [0, 1, 2, 0, 1, 2, 0]
    assert processes.group(3, of_a_stream) == [alone] * 3


def test_what_one_process_cannot_read_is_told_once(trained: Path, tmp_path: Path) -> None:
    """It is in the third batch, so in that of the last process."""
    for number in range(10):
        for part in ("train", "test"):
            folder = tmp_path / part / str(number)
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 25 * number, dtype=np.uint8)).save(folder / "0.png")
    broken = tmp_path / "test" / "5" / "0.png"
    broken.write_bytes(b"no image")
    words = [f"checkpoint={trained}/checkpoints/one/best.pt", "dataset=image_folder", f"dataset.root={tmp_path}"]
    words += ["dataset.channels=1", "dataset.eval_transforms=[{Resize: {size: [8, 8]}}]", "batch_size=2"]
    commands = several(3, "evaluate", *words, cwd=tmp_path)
    assert all(command.wait() == 1 for command in commands)
    said = "".join(command.err for command in commands)
    assert said.count("\n") == 1 and said.startswith(f"error: {broken}: ")
