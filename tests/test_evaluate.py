"""evaluate.py: a checkpoint's accuracy is what training printed, wherever the file went, and a wrong file is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from torch import nn


@pytest.fixture(scope="module")
def original() -> dict[str, bytes]:
    """Filled by the first test that needs a trained run: what training printed, and the files it made."""
    return {}


@pytest.fixture
def trained(call: Call, tmp_path: Path, original: dict[str, bytes]) -> Path:
    """A small run of the digits, the newest in `tmp_path`, with what training printed in printed.txt."""
    run = tmp_path / "checkpoints" / "run"
    if not original:
        answer = call("train", "epochs=2", "model.hidden=[16]", "name=run")
        assert answer.code == 0, answer.err
        (tmp_path / "printed.txt").write_text(answer.out)
        files = [tmp_path / "printed.txt", *(run / name for name in ("best.pt", "summary.json", "metrics.csv"))]
        original.update({file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in files})
        shutil.rmtree(tmp_path / "checkpoints")
    for name, content in original.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoints" / "latest").symlink_to("run")
    return run


def figures(text: str) -> list[str]:
    return re.findall(r"accuracy ([\d.]+%), loss ([\d.]+)", text)


def test_what_training_printed(call: Call, trained: Path, tmp_path: Path) -> None:
    printed = (tmp_path / "printed.txt").read_text()
    answer = call("evaluate")  # the newest run
    assert answer.code == 0, answer.err
    assert len(figures(answer.out)) == 1 and figures(answer.out) == figures(printed)

    summary = json.loads((trained / "summary.json").read_text())
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["accuracy"] == summary["test_accuracy"] and result["loss"] == pytest.approx(summary["test_loss"])
    command = printed.strip().splitlines()[-1].partition("python evaluate.py ")[2]
    assert figures(call("evaluate", *command.split()).out) == figures(printed)

    # Per class and averaged; the numbers fit together.
    assert list(result["per_class"]) == [str(digit) for digit in range(10)]
    right = sum(row["recall"] * row["samples"] for row in result["per_class"].values())
    assert right / result["samples"] == pytest.approx(result["accuracy"])
    for name, row in result["per_class"].items():
        mean = row["precision"] * row["recall"] and 2 / (1 / row["precision"] + 1 / row["recall"])
        assert row["f1"] == pytest.approx(mean)
        assert f"{row['precision']:.4f}" in next(
            line for line in answer.out.splitlines() if line.startswith(f"{name} ")
        )
    assert re.search(r"^average +0\.\d+ +0\.\d+ +0\.\d+ +355$", answer.out, re.MULTILINE)


def test_a_file_that_was_moved(call: Call, trained: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "far" / "away.pt"
    elsewhere.parent.mkdir()
    shutil.move(trained / "best.pt", elsewhere)
    shutil.rmtree(tmp_path / "checkpoints")
    answer = call("evaluate", "checkpoint=far/away.pt")
    assert figures(answer.out) == figures((tmp_path / "printed.txt").read_text())
    assert {p.name for p in elsewhere.parent.iterdir()} == {"away.pt", "evaluation.json"}
    assert not (tmp_path / "checkpoints").exists()


def test_overrides(call: Call, trained: Path, tmp_path: Path) -> None:
    answer = call("evaluate", "split=val", "batch_size=7", "device=cpu", "output=val.json")
    assert answer.code == 0, answer.err
    best = json.loads((trained / "summary.json").read_text())
    assert json.loads((tmp_path / "val.json").read_text())["accuracy"] == best["val_accuracy"]
    assert not (trained / "evaluation.json").exists()
    assert " 30 samples" in call("evaluate", "dataset.limit=30").out
    assert " 20 samples" in call("evaluate", "dataset=digits", "dataset.limit=20").out
    assert " 1,299 samples" in call("evaluate", "split=train").out


def test_a_models_own_settings_come_from_the_file(call: Call, tmp_path: Path) -> None:
    assert call("train", "debug=fast", "model=cnn", "model.width=4", "name=narrow").code == 0
    assert call("evaluate", "checkpoint=checkpoints/narrow/best.pt").code == 0


# ---------------------------------------------------------------------------------------------------------------------
# A bare state_dict


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_bare_state_dict(call: Call, trained: Path, tmp_path: Path, prefix: str, key: str | None) -> None:
    state = torch.load(trained / "best.pt", weights_only=True)["model"]
    bare = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(bare if key is None else {key: bare, "epoch": 3}, tmp_path / "model.pth")
    answer = call("evaluate", "checkpoint=model.pth", "model=mlp", "model.hidden=[16]", "dataset=digits")
    assert figures(answer.out) == figures((tmp_path / "printed.txt").read_text()), answer.err


def test_prefixes_inside_a_name(call: Call, trained: Path, tmp_path: Path) -> None:
    """torch.compile of a part puts its prefix there."""
    state = torch.load(trained / "best.pt", weights_only=True)["model"]
    inner = {name.replace("stack.", "stack._orig_mod."): tensor for name, tensor in state.items()}
    torch.save(inner, tmp_path / "model.pth")
    assert call("evaluate", "checkpoint=model.pth", "model=mlp", "model.hidden=[16]", "dataset=digits").code == 0


def test_a_bare_state_dict_needs_a_model_and_a_dataset(call: Call, tmp_path: Path) -> None:
    torch.save(nn.Linear(64, 10).state_dict(), tmp_path / "model.pth")
    for given in ([], ["model=mlp"], ["dataset=digits"]):
        said = call("evaluate", "checkpoint=model.pth", *given).error
        assert said.startswith("model.pth: ") and "model=" in said and "dataset=" in said
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


# ---------------------------------------------------------------------------------------------------------------------
# The data it names


def write_idx(file: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header + values.contiguous().numpy().tobytes())


def write_mnist(folder: Path, seed: int) -> None:
    """Four small files of MNIST's format; a different seed gives different pictures."""
    generator = torch.Generator().manual_seed(seed)
    for part, count in (("train", 100), ("t10k", 40)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        images[torch.arange(count), labels.long()] = 255  # a bright row tells the class
        write_idx(folder / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)


def test_data_that_moved(call: Call, tmp_path: Path) -> None:
    write_mnist(tmp_path / "here", seed=0)
    answer = call("train", "dataset=mnist", "dataset.root=here", "epochs=2", "model.hidden=[16]", "name=run")
    assert answer.code == 0, answer.err
    (tmp_path / "here").rename(tmp_path / "there")
    assert figures(call("evaluate", "dataset.root=there").out) == figures(answer.out)
    write_mnist(tmp_path / "other", seed=1)
    assert figures(call("evaluate", "dataset.root=other").out) != figures(answer.out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dataset.limt=3"], "'dataset.limt' (did you mean dataset.limit?)"),
        (["dataset.limit=abc"], "dataset.limit=abc: expected an integer >= 1 or null"),
        (["dataset.val_fraction=2"], "dataset.val_fraction=2: expected a number in [0, 1)"),
        (["dataset.root=x"], "'dataset.root'"),
        (["dataset.val_fraction=0", "split=val"], "split=val"),
        (["model=mlp"], "leave model= out"),
        (["output=/not/there/x.json"], "/not/there/x.json: cannot be written"),
        (["output=."], "cannot be written"),
        (["device=cuda:77"], "device=cuda:77: not on this machine"),
    ],
)
def test_requests_that_do_not_fit_the_checkpoint(call: Call, trained: Path, arguments: list[str], said: str) -> None:
    before = sorted(p.name for p in trained.iterdir())
    assert said in call("evaluate", *arguments).error
    assert sorted(p.name for p in trained.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Missing, foreign, mismatching


def test_no_run_yet(call: Call, tmp_path: Path) -> None:
    assert "no run" in call("evaluate").error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere/best.pt", "."])
def test_a_missing_checkpoint(call: Call, tmp_path: Path, name: str) -> None:
    said = call("evaluate", f"checkpoint={name}").error
    assert said.startswith(f"{name}: ") and ("no such checkpoint" in said or "folder" in said)
    assert list(tmp_path.iterdir()) == []


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "text": lambda file: file.write_text("not a checkpoint"),
    "nothing": lambda file: file.write_bytes(b""),
    "a list": lambda file: torch.save([1, 2], file),
    "an empty dictionary": lambda file: torch.save({}, file),
    "numbers": lambda file: torch.save({"a": 1}, file),
    "a pickled module": lambda file: torch.save(nn.Linear(3, 3), file),
    "a checkpoint without its configuration": lambda file: torch.save(
        {"format": 1, "model": {"a": torch.ones(1)}}, file
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file(call: Call, tmp_path: Path, kind: str) -> None:
    FOREIGN[kind](tmp_path / "foreign.pt")
    assert call("evaluate", "checkpoint=foreign.pt").error.startswith("foreign.pt: ")
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.pt"]


@pytest.fixture
def whole(trained: Path) -> Iterator[bytes]:
    yield (trained / "best.pt").read_bytes()


def test_a_damaged_checkpoint(call: Call, trained: Path, whole: bytes) -> None:
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        (trained / "best.pt").write_bytes(damaged)
        said = call("evaluate").error
        assert said.startswith("checkpoints/run/best.pt: ") and "damaged" in said


def test_a_mismatching_checkpoint_names_at_most_five_keys(call: Call, tmp_path: Path) -> None:
    other = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    torch.save(other.state_dict(), tmp_path / "model.pth")
    said = call("evaluate", "checkpoint=model.pth", "model=mlp", "dataset=digits").error
    assert "does not fit MLP" in said
    keys = [
        key
        for key in [*other.state_dict(), *(f"linear_relu_stack.{i}.{w}" for i in (0, 2, 4) for w in ("weight", "bias"))]
    ]
    named = [key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)} is", said)]
    assert len(named) == 5 and "19 more" in said
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_a_mismatching_shape_is_shown_on_both_sides(call: Call, trained: Path, tmp_path: Path) -> None:
    torch.save(torch.load(trained / "best.pt", weights_only=True)["model"], tmp_path / "model.pth")
    said = call("evaluate", "checkpoint=model.pth", "model=mlp", "model.hidden=[17]", "dataset=digits").error
    assert "linear_relu_stack.0.weight is [16, 64] in the file, [17, 64] in the model" in said


def test_data_of_another_shape_or_with_other_classes(call: Call, trained: Path, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", seed=0)
    said = call("evaluate", "dataset=mnist").error
    assert "[1, 8, 8]" in said and "[1, 28, 28]" in said
