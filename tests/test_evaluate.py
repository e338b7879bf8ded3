"""evaluate.py: a checkpoint's accuracy is what training printed, wherever the file went, and a wrong file is named."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from conftest import Call
from PIL import Image
from test_tutorial import tutorial_epochs, write_fashion_mnist
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

import datasets
from engine.data.images import ImageFiles
from engine.data.splits import Split, load_splits
from engine.errors import RunError
from engine.pictures import style
from engine.run import checkpoint, trust
from engine.training.metrics import Ranking
from evaluate import by_name, check_truths, has_same_samples
from models.mlp import MLP

RUN_FILES = ("best.pt", "summary.json", "metrics.csv", ".hydra/config.yaml")


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
        files = [tmp_path / "printed.txt", *(run / name for name in RUN_FILES)]
        original.update({file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in files})
        shutil.rmtree(tmp_path / "checkpoints")
    for name, content in original.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoints" / "latest").symlink_to("run")
    return run


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are files without content here, which saves half of the time; what they show is tested elsewhere."""

    def draw(path: Path, *_: Any) -> bool:
        path.touch()
        return True

    monkeypatch.setattr(style, "draw", draw)


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


def test_flip_takes_the_mean_of_an_image_and_its_mirror_image(call: Call, trained: Path) -> None:
    """Against a plain forward pass of both, here."""
    plain = call("evaluate")
    flipped = call("evaluate", "tta=flip")
    assert flipped.code == 0, flipped.err
    assert "355 samples, each image and its mirror image" in flipped.out and "mirror" not in plain.out
    result = json.loads((trained / "evaluation.json").read_text())
    best = torch.load(trained / "best.pt", weights_only=True)
    model = MLP((1, 8, 8), 10, best["config"]["model"]["hidden"], best["config"]["model"]["dropout"]).eval()
    model.load_state_dict(best["model"])
    splits, _ = load_splits(best["config"]["dataset"], only="test")
    images, labels = splits["test"].part[0][splits["test"].indices].float() / 255, splits["test"].part[1]
    labels = labels[splits["test"].indices]
    with torch.no_grad():
        mean = (model(images).softmax(1) + model(torch.flip(images, [3])).softmax(1)) / 2
    assert result["accuracy"] == pytest.approx(float((mean.argmax(1) == labels).double().mean()))
    assert result["loss"] == pytest.approx(float(-mean.log()[torch.arange(355), labels].mean()), rel=1e-4)
    assert result["tta"] == "flip" and figures(flipped.out) != figures(plain.out)
    assert "tta=mirror: expected" in call("evaluate", "tta=mirror").error


def test_a_file_that_was_moved(call: Call, trained: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "far" / "away.pt"
    elsewhere.parent.mkdir()
    shutil.move(trained / "best.pt", elsewhere)
    shutil.rmtree(tmp_path / "checkpoints")
    answer = call("evaluate", "checkpoint=far/away.pt")
    assert figures(answer.out) == figures((tmp_path / "printed.txt").read_text())
    made = {"evaluation.json", "confusion.png", "mistakes.png", "mistakes.csv"}
    assert {p.name for p in elsewhere.parent.iterdir()} == {"away.pt", *made}
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


# ---------------------------------------------------------------------------------------------------------------------
# Classes are compared by name


COLOURS = ["red", "green", "blue"]


def write_colours(folder: Path, names: list[str], channels: list[int]) -> None:
    """train/ and test/ with five pictures a class, of the colour of its channel; the second class's last one is red."""
    for part in ("train", "test"):
        for name, channel in zip(names, channels, strict=True):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(5):
                pixels = np.full((6, 6, 3), 20, dtype=np.uint8)
                pixels[:, :, 0 if number == 4 and name == names[1] else channel] = 150 + 20 * number
                Image.fromarray(pixels).save(place / f"{number}.png")


def write_colour_model(
    file: Path, root: str, classes: list[str] = COLOURS, scale: float = 4.0, transforms: Sequence[Any] = (), **run: Any
) -> None:
    """A checkpoint of an MLP that tells red, green and blue apart: its logits are the channels' means times `scale`."""
    model = MLP((3, 6, 6), 3, hidden=[3])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model.linear_relu_stack[0].weight[channel, 36 * channel : 36 * (channel + 1)] = 1 / 36
            model.linear_relu_stack[2].weight[channel, channel] = scale
    dataset = {"_target_": "datasets.image_folder", "root": root, "test_fraction": 0.5, "channels": 3}
    dataset |= {"max_pixels": 10_000, "skip_unreadable": False, "cache": False, "cache_dir": "data/cache"}
    dataset |= {"val_fraction": 0.0, "limit": None, "target_transform": None, "steps_per_epoch": None}
    dataset |= {"train_transforms": [], "eval_transforms": list(transforms)}
    config: dict[str, Any] = {"model": {"_target_": "models.mlp.MLP", "hidden": [3], "dropout": 0.0}}
    config |= {"dataset": dataset, "choices": {"model": "mlp", "dataset": "image_folder"}, "seed": 0}
    config |= {"batch_size": 4, "limit_batches": None, **run}
    about = {"format": 1, "classes": classes, "input_shape": [3, 6, 6], "config": config}
    about["signature"] = trust.signature(config)  # made here, so its root counts
    checkpoint.write(file, {**about, "model": model.state_dict()})


def colour_losses(names: list[str], scale: float = 4.0) -> list[float]:
    """The cross-entropy of each of write_colours' pictures of a split, class by class, by hand."""
    losses = []
    for name in names:
        for number in range(5):
            logits = dict.fromkeys(COLOURS, scale * 20 / 255)
            logits["red" if number == 4 and name == names[1] else name] = scale * (150 + 20 * number) / 255
            losses.append(math.log(sum(math.exp(value) for value in logits.values())) - logits[name])
    return losses


def test_classes_in_another_order_are_compared_by_name(call: Call, tmp_path: Path) -> None:
    names = ["blue", "green", "red"]  # as folders are sorted, which is not the model's order
    write_colours(tmp_path / "photos", names, channels=[2, 1, 0])
    write_colour_model(tmp_path / "best.pt", "photos")
    answer = call("evaluate", "checkpoint=best.pt")
    assert answer.code == 0, answer.err
    losses = colour_losses(names)
    assert figures(answer.out) == [("93.33%", f"{sum(losses) / 15:.4f}")]  # 15 samples, 4 a batch
    assert "by name" in answer.out

    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["per_class"]) == COLOURS and result["dataset"] == "image_folder"
    assert result["confusion"] == [[5, 0, 0], [1, 4, 0], [0, 0, 5]]  # rows are the true classes
    assert result["per_class"]["red"] == {"precision": 5 / 6, "recall": 1, "f1": pytest.approx(10 / 11), "samples": 5}
    assert result["per_class"]["green"] == {"precision": 1, "recall": 0.8, "f1": pytest.approx(8 / 9), "samples": 5}
    lines = (tmp_path / "mistakes.csv").read_text().splitlines()
    sure = 1 / (1 + 2 * math.exp(-4 * (230 - 20) / 255))
    assert lines == ["file,true,predicted,probability", f"photos/test/green/4.png,green,red,{sure:.6f}"]


def test_the_data_that_was_asked_for_is_named(call: Call, tmp_path: Path) -> None:
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos")
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    (tmp_path / "list.csv").write_text("".join(f"{path},{path.parent.name}\n" for path in paths))
    typed = ("dataset.annotations_file=list.csv", "dataset.img_dir=photos", "dataset.eval_transforms=[]")
    assert call("evaluate", "checkpoint=best.pt", "dataset=csv_images", *typed).code == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["dataset"] == "csv_images"


@pytest.mark.parametrize("present", [["green", "red"], ["blue", "red"]])
def test_some_of_the_models_classes_are_compared_by_name(call: Call, tmp_path: Path, present: list[str]) -> None:
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos")
    for name in set(COLOURS) - set(present):
        for part in ("train", "test"):
            shutil.rmtree(tmp_path / "photos" / part / name)
    answer = call("evaluate", "checkpoint=best.pt")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "evaluation.json").read_text())
    whole = {"red": [5, 0, 0], "green": [1, 4, 0], "blue": [0, 0, 5]}
    assert result["confusion"] == [whole[name] if name in present else [0, 0, 0] for name in COLOURS]
    assert f"the data has {len(present)} of the model's 3 classes" in answer.out
    average = next(line for line in answer.out.splitlines() if line.startswith("average")).split()
    recalls = {"red": 1.0, "green": 0.8, "blue": 1.0}  # the average is of the classes that there are
    assert average[2] == f"{sum(recalls[name] for name in present) / len(present):.4f}"


@pytest.mark.parametrize(
    ("names", "strange"), [(["ant", "bee", "cow"], "ant, bee, cow"), (["blue", "cow", "red"], "cow")]
)
def test_other_classes_are_refused(call: Call, tmp_path: Path, names: list[str], strange: str) -> None:
    write_colours(tmp_path / "photos", names, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos")
    for more in ([], ["dataset=image_folder", "dataset.root=photos", "dataset.eval_transforms=[]"]):
        said = call("evaluate", "checkpoint=best.pt", *more).error
        assert "red, green, blue" in said and f"has {strange}," in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "photos"]


def test_a_hundred_classes_are_named_shortly(call: Call, tmp_path: Path) -> None:
    write_colours(tmp_path / "photos", [f"{n:02} {'x' * 200}" for n in range(40)], channels=[0] * 40)
    write_colour_model(tmp_path / "best.pt", "photos")
    said = call("evaluate", "checkpoint=best.pt").error
    assert "35 more" in said and len(said) < 500


def test_labels_that_are_probabilities_are_spread_by_name() -> None:
    labels = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    [(_, spread)] = by_name([(torch.zeros(2, 1, 1, 1), labels)], torch.tensor([2, 0]), num_classes=3)
    assert spread.tolist() == [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]]


def test_names_that_would_steer_a_terminal(call: Call, tmp_path: Path) -> None:
    odd = ["re\x1b[31md", "gr\x9been", "bl\u202eue"]
    write_colours(tmp_path / "photos", odd, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos", classes=odd)
    answer = call("evaluate", "checkpoint=best.pt")
    assert answer.code == 0, answer.err
    for text in (answer.out, (tmp_path / "mistakes.csv").read_text(), (tmp_path / "evaluation.json").read_text()):
        assert all(character.isprintable() or character == "\n" for character in text)
    assert "re\\x1b[31md  " in answer.out
    names = list(json.loads((tmp_path / "evaluation.json").read_text())["per_class"])
    assert names == ["re\\x1b[31md", "gr\\x9been", "bl\\u202eue"]
    os.rename(
        tmp_path / "photos" / "test" / odd[1] / "4.png", os.fsencode(tmp_path / "photos/test" / odd[1]) + b"/\xff.png"
    )
    assert call("evaluate", "checkpoint=best.pt").code == 0
    assert "\\udcff.png" in (tmp_path / "mistakes.csv").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What an accuracy leaves open


def test_further_figures_are_those_of_scikit_learn(call: Call, trained: Path) -> None:
    reference = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn: pip install '.[test]'")
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn: pip install '.[test]'")
    answer = call("evaluate")
    result = json.loads((trained / "evaluation.json").read_text())
    images, labels = cast(tuple[torch.Tensor, torch.Tensor], datasets.digits().test)
    model = MLP((1, 8, 8), 10, hidden=[16])
    model.load_state_dict(torch.load(trained / "best.pt", weights_only=True)["model"])
    with torch.no_grad():
        logits = model(images / 255).double()
    probabilities, predicted = logits.softmax(1), logits.argmax(1)
    interval = stats.binomtest(int((predicted == labels).sum()), 355).proportion_ci(method="wilson")
    top5 = reference.top_k_accuracy_score(labels, logits, k=5)
    balanced = reference.balanced_accuracy_score(labels, predicted)
    auc = reference.roc_auc_score(labels, probabilities, average="macro", multi_class="ovr")
    assert result["accuracy_interval"] == pytest.approx([interval.low, interval.high])
    assert result["top5_accuracy"] == pytest.approx(top5) and result["balanced_accuracy"] == pytest.approx(balanced)
    assert result["auc"] == pytest.approx(auc, abs=1e-6)
    assert list(result["auc_per_class"]) == list(result["per_class"])
    line = f"95% interval {interval.low:.2%} to {interval.high:.2%}, top-5 {top5:.2%}, balanced {balanced:.2%}, "
    assert answer.out.splitlines()[2] == line + f"AUC {auc:.4f}"


@pytest.mark.parametrize(
    ("limit", "said", "classes"),
    [
        ("dataset.limit=7", " over the 7 classes that have samples", 7),
        ("dataset.limit=1", ", no AUC: all samples are of one class", 0),
        ("dataset.limit=8", ", no AUC: 8 samples times 10 classes are too many scores to keep", None),
    ],
)
def test_classes_that_have_no_area(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch, limit: str, said: str, classes: int | None
) -> None:
    monkeypatch.setattr(Ranking, "MOST", 79)
    answer = call("evaluate", limit)
    assert answer.code == 0 and answer.out.splitlines()[2].endswith(said)
    result = json.loads((trained / "evaluation.json").read_text())
    areas = result["auc_per_class"]
    assert (areas if classes is None else len(areas)) == classes
    assert result["auc"] == (pytest.approx(sum(areas.values()) / classes) if classes else None)


def test_there_is_a_top_5_from_six_classes_on(call: Call, tmp_path: Path) -> None:
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos")
    answer = call("evaluate", "checkpoint=best.pt")
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert "top-5" not in answer.out and result["top5_accuracy"] is None
    assert result["auc_per_class"]["blue"] == 1  # all blue pictures are bluer than all others
    assert result["accuracy_interval"] == pytest.approx([0.7018, 0.9881], abs=1e-4)  # of 14 of 15


# ---------------------------------------------------------------------------------------------------------------------
# Two on the same samples


def test_two_are_compared(call: Call, tmp_path: Path) -> None:
    """The second takes red for green and green for red, and so has only the green picture right that is red.

    It numbers its classes otherwise, and halves its weights for images that its transforms double.
    """
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "a.pt", "photos")
    doubled = [{"Normalize": {"mean": [0.0, 0.0, 0.0], "std": [0.5, 0.5, 0.5]}}]
    (tmp_path / "other").mkdir()
    write_colour_model(tmp_path / "other" / "b.pt", "photos", ["green", "red", "blue"], scale=2, transforms=doubled)
    answer = call("evaluate", "a.pt", "other/b.pt", "num_workers=0")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "comparison.json").read_text())
    first, second = result["checkpoints"]
    assert (first["accuracy"], second["accuracy"]) == (14 / 15, 6 / 15)
    assert first["loss"] == pytest.approx(sum(colour_losses(COLOURS)) / 15, rel=1e-5)
    counts = [result[key] for key in ("only_first_right", "only_second_right", "both_right", "neither_right")]
    assert counts == [9, 1, 5, 0] and result["samples"] == 15
    assert result["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    lines = answer.out.splitlines()
    assert lines[0] == "test split of image_folder, 15 samples"
    assert "only the first is right on 9, only the second on 1, both on 5, neither on 0" in lines
    verdict = next(line for line in lines if line.startswith("McNemar"))
    assert "p = 0.0215: a.pt is better; " in verdict and "2.15%" in verdict
    assert lines[1].startswith("a.pt: the data numbers") and lines[2].startswith("other/b.pt: the data numbers")
    assert not any("eval_transforms" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "comparison.json", "other", "photos"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["b.pt"]

    # A bare state_dict is told what it is; the other keeps its transforms.
    torch.save(torch.load("a.pt", weights_only=True)["model"], "bare.pth")
    model = ["model=mlp", "model.hidden=[3]"]
    data = [
        "dataset=image_folder",
        "dataset.root=photos",
        "dataset.channels=3",
        "dataset.eval_transforms=[]",
        "num_workers=0",
    ]
    answer = call("evaluate", "checkpoint=[bare.pth,other/b.pt]", *model, *data, "output=bare.json")
    assert answer.code == 0, answer.err
    own = json.loads((tmp_path / "bare.json").read_text())["checkpoints"][1]
    assert own["loss"] == second["loss"] and "other/b.pt: dataset.eval_transforms" not in answer.out
    assert "bare.pth: dataset.eval_transforms=[]" in answer.out

    # With data that was named, both see it as was typed, which is said.
    answer = call("evaluate", "checkpoint=[a.pt,other/b.pt]", *data)
    assert answer.code == 0, answer.err
    assert "other/b.pt: dataset.eval_transforms=[]; its training had [{Normalize: {" in answer.out
    assert json.loads((tmp_path / "comparison.json").read_text())["checkpoints"][1]["loss"] != second["loss"]
    assert "leave model= out" in call("evaluate", "checkpoint=[a.pt,other/b.pt]", *model).error


def test_a_comparison_of_another_split_with_mirror_images(call: Call, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.pt", tmp_path / "copy.pt")
    how = ("split=val", "tta=flip", "dataset.limit=50")
    alone = call("evaluate", *how)
    answer = call("evaluate", "checkpoint=[copy.pt,checkpoints/run/best.pt]", *how)
    assert answer.code == 0, answer.err
    assert "val split of digits, 50 samples (dataset.limit=50), each image and its mirror image" in answer.out
    assert "p = 1: no sample tells them apart" in answer.out
    result = json.loads((tmp_path / "comparison_val.json").read_text())
    assert result["tta"] == "flip" and result["split"] == "val"
    assert result["both_right"] + result["neither_right"] == 50
    assert figures(alone.out)[0][0] == f"{result['both_right'] / 50:.2%}"


def test_two_that_saw_other_samples_are_not_compared(call: Call, tmp_path: Path) -> None:
    for folder in ("photos", "copies"):
        write_colours(tmp_path / folder, COLOURS, channels=[0, 1, 2])
    (tmp_path / "link").symlink_to("photos")
    for name, root in (("a", "photos"), ("b", "copies"), ("c", "link")):
        write_colour_model(tmp_path / f"{name}.pt", root)
    said = call("evaluate", "checkpoint=[a.pt,b.pt]").error
    assert said.startswith("a.pt and b.pt can only be compared on the same samples") and "image_folder, 15" in said
    assert not (tmp_path / "comparison.json").exists()
    assert call("evaluate", "checkpoint=[a.pt,b.pt]", "dataset.root=copies", "num_workers=0").code == 0
    assert call("evaluate", "checkpoint=[a.pt,c.pt]", "num_workers=0").code == 0  # another way to the same files


def test_when_samples_are_known_to_be_the_same() -> None:
    def known(one: tuple[Any, list[int] | None, dict[str, Any]], two: tuple[Any, list[int] | None, Any]) -> bool:
        subjects = [
            SimpleNamespace(
                split=Split(part, None if places is None else torch.tensor(places), 2), config={"dataset": settings}
            )
            for part, places, settings in (one, two)
        ]
        return has_same_samples(*cast(Any, subjects))

    images = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    here, there = {"root": "here", "val_fraction": 0.1}, {"root": "there", "val_fraction": 0.1}
    more = {"root": "here", "val_fraction": 0.2}
    part, same, shuffled = (images, labels), (images.clone(), labels.clone()), (images.flip(0), labels.flip(0))
    assert known((part, [1, 2], here), (same, [1, 2], more)) and not known((part, [1, 2], here), (same, [1, 3], more))
    assert known((part, [1, 2], here), (same, [1, 2], there))
    assert not known((part, [1, 2], here), (shuffled, [1, 2], there))
    assert known((part, [0, 1], here), (shuffled, [5, 4], there))
    assert not known((part, [0, 1], here), ((images, labels.flip(0)), [0, 1], there))
    files = ImageFiles(["a.png", "b.png"], [0, 1])
    assert known((files, [0, 1], here), (ImageFiles([f"{Path.cwd()}/a.png", "b.png"], [0, 1]), [0, 1], there))
    assert not known((files, [0, 1], here), (files, [1, 0], there))
    assert not known((files, [0, 1], here), (part, [0, 1], there))
    nothing_tells = object()
    assert not known((nothing_tells, [0], here), (nothing_tells, [0], there))
    assert not known((nothing_tells, None, here), (nothing_tells, None, here))


def test_samples_that_change_are_not_compared() -> None:
    """Their true classes differ, by name."""

    def found(labels: list[int], classes: list[str]) -> Any:
        ranking = Ranking()
        ranking.add(torch.zeros(len(labels), 3), torch.tensor(labels))
        return SimpleNamespace(ranking=ranking, classes=classes)

    subjects = cast(Any, [SimpleNamespace(path=name, config={"choices": {"dataset": "x"}}) for name in "ab"])
    check_truths(subjects, found([0, 1, 2], COLOURS), found([2, 1, 0], COLOURS[::-1]))
    for labels in ([0, 1, 2], [2, 1]):
        with pytest.raises(RunError, match=r"^dataset=x: the samples that b was given are of other classes than"):
            check_truths(subjects, found([0, 1, 2], COLOURS), found(labels, COLOURS[::-1]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint=[best.pt,run/best.pt]"], "the same file twice"),
        (["checkpoint=[best.pt]"], "checkpoint=[best.pt]: expected text or a list of 2 texts"),
        (["checkpoint=[best.pt,b.pt,c.pt]"], "expected text or a list of 2 texts"),
        (["checkpoint=[best.pt,nowhere.pt]"], "nowhere.pt: no such checkpoint"),
        (["checkpoint=[best.pt,run]"], "run: a folder; expected a checkpoint file such as run/best.pt"),
        (["best.pt", "copy.pt", "output=copy.pt"], "copy.pt: is the checkpoint"),
        (["best.pt", "copy.pt", "dataset.val_fraction=0", "split=val"], "split=val: there is none"),
        (["best.pt", "copy.pt", "run"], "two are compared at a time, there are 3: -m checkpoint=A.pt,B.pt"),
        (["checkpoint=best.pt,copy.pt"], "need -m: python evaluate.py -m ...; a list is typed checkpoint=[best.pt,"),
    ],
)
def test_comparisons_that_are_refused(
    call: Call, trained: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    shutil.copy(trained / "best.pt", tmp_path / "best.pt")
    shutil.copy(trained / "best.pt", tmp_path / "copy.pt")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "best.pt", tmp_path / "run" / "best.pt")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert said in call("evaluate", *arguments).error
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_several_are_evaluated_one_after_the_other(call: Call, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.pt", tmp_path / "copy.pt")
    answer = call("evaluate", "-m", "checkpoint=copy.pt,checkpoints/run/best.pt", "dataset.limit=20")
    assert answer.code == 0, answer.err
    assert len(figures(answer.out)) == 2
    assert (tmp_path / "evaluation.json").exists() and (trained / "evaluation.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The whole split, under its own name; numbers that are none


def test_the_whole_split_whatever_the_run_was_limited_to(call: Call, tmp_path: Path) -> None:
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos", limit_batches=2)
    assert " 15 samples" in call("evaluate", "checkpoint=best.pt", "batch_size=1").out
    assert " 1 sample (dataset.limit=1)" in call("evaluate", "checkpoint=best.pt", "dataset.limit=1").out


def test_each_split_has_files_of_its_own(call: Call, trained: Path) -> None:
    assert call("evaluate").code == 0
    before = {file: file.read_bytes() for file in trained.iterdir() if file.is_file()}
    assert call("evaluate", "split=val").code == 0 and call("evaluate", "split=train").code == 0
    assert before == {file: file.read_bytes() for file in before}
    made = {name for what in ("val", "train") for name in (f"evaluation_{what}.json", f"mistakes_{what}.csv")}
    made |= {".hydra"} | {f"{picture}_{what}.png" for what in ("val", "train") for picture in ("confusion", "mistakes")}
    assert {file.name for file in trained.iterdir()} - {file.name for file in before} == made


def test_every_mistake_is_listed_by_its_place_in_the_data(call: Call, trained: Path) -> None:
    answer = call("evaluate")
    _, (images, labels), *_ = vars(datasets.digits()).values()
    model = MLP((1, 8, 8), 10, hidden=[16])
    model.load_state_dict(torch.load(trained / "best.pt", weights_only=True)["model"])
    with torch.no_grad():
        sure, found = model(images / 255).softmax(1).max(1)
    with (trained / "mistakes.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {int(row["sample"]) for row in rows} == set((found != labels).nonzero().flatten().tolist())
    assert f"accuracy {1 - len(rows) / len(labels):.2%}" in answer.out
    for row in rows:
        at = int(row["sample"])
        assert (row["true"], row["predicted"]) == (str(int(labels[at])), str(int(found[at])))
        assert float(row["probability"]) == pytest.approx(float(sure[at]), abs=2e-6)
    assert [row["probability"] for row in rows] == sorted((row["probability"] for row in rows), reverse=True)
    assert call("evaluate", "split=val").code == 0  # of which a sample's number is that in the data it is a part of
    images, labels = vars(datasets.digits())["train"]
    with (trained / "mistakes_val.csv").open(newline="") as lines, torch.no_grad():
        for row in csv.DictReader(lines):
            at = int(row["sample"])
            assert row["true"] == str(int(labels[at])) != row["predicted"]
            assert row["predicted"] == str(int(model(images[at : at + 1] / 255).argmax()))


def test_the_picture_of_mistakes_gets_the_first_rows_of_their_list(
    call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Sequence[Any]] = {}
    monkeypatch.setattr(style, "draw", lambda path, figure, *rest: given.update({figure.__name__: rest}) or True)
    call("evaluate")
    with (trained / "mistakes.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))[:24]
    images, truths, predictions, probabilities, classes, _, names = given["mistakes_figure"]
    assert names == [f"sample {row['sample']}" for row in rows] and len(names) == 24
    assert [classes[label] for label in truths] == [row["true"] for row in rows]
    assert [classes[label] for label in predictions] == [row["predicted"] for row in rows]
    assert probabilities == pytest.approx([float(row["probability"]) for row in rows], abs=2e-6)
    whole = datasets.digits().test
    assert isinstance(whole, tuple)
    torch.testing.assert_close(images, whole[0][[int(row["sample"]) for row in rows]] / 255)


def test_weights_that_are_not_finite_are_refused(call: Call, trained: Path) -> None:
    saved = torch.load(trained / "best.pt", weights_only=True)
    for value in (math.nan, math.inf):
        saved["model"]["linear_relu_stack.2.weight"][0, 1] = value
        torch.save(saved, trained / "best.pt")
        before = sorted(file.name for file in trained.iterdir())
        said = call("evaluate").error
        assert "linear_relu_stack.2.weight" in said and "not finite" in said
        assert "linear_relu_stack.2.weight" in call("predict", f"images={trained}").error
        assert sorted(file.name for file in trained.iterdir()) == before


def test_a_result_that_is_not_finite_is_a_failure(call: Call, tmp_path: Path) -> None:
    write_colours(tmp_path / "photos", COLOURS, channels=[0, 1, 2])
    write_colour_model(tmp_path / "best.pt", "photos", scale=3.4e38)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    saved["model"]["linear_relu_stack.0.bias"] += 2  # 6.8e38 is more than a float holds
    torch.save(saved, tmp_path / "best.pt")
    answer = call("evaluate", "checkpoint=best.pt")
    [line] = answer.err.splitlines()
    assert answer.code == 1 and line.startswith("error: best.pt: the loss on the test split is ") and answer.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "photos"]
    answer = call("predict", "checkpoint=best.pt", "images=photos/test", "output=result.json")
    assert answer.code == 2 and answer.err.count("no finite numbers") == 15


def test_a_test_loss_that_is_not_finite_ends_a_run_with_one_line(call: Call) -> None:
    wild = ("optimizer.lr=1e30", "optimizer.momentum=0", "limit_batches=1", "epochs=1", "dataset.val_fraction=0")
    answer = call("train", *wild, "model.hidden=[4]", "name=run")
    assert answer.code == 1 and "the test loss is " in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert not Path("checkpoints/run/summary.json").exists()


def test_the_checkpoint_is_not_overwritten_by_the_output(call: Call, trained: Path) -> None:
    assert "is the checkpoint" in call("evaluate", f"output={trained / 'best.pt'}").error


# ---------------------------------------------------------------------------------------------------------------------
# A bare state_dict and an experiment


def test_the_tutorials_model_gives_the_tutorials_figures(call: Call, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    training = FashionMNIST("data", train=True, transform=ToTensor())
    test_data = FashionMNIST("data", train=False, transform=ToTensor())
    model = tutorial_epochs(training, epochs=1)
    torch.save(model.state_dict(), "model.pth")

    # The tutorial's own test loop.
    dataloader, loss_fn = DataLoader(test_data, batch_size=64), nn.CrossEntropyLoss()
    model.eval()
    test_loss, correct = 0.0, 0.0
    with torch.no_grad():
        for images, labels in dataloader:
            prediction = model(images)
            test_loss += loss_fn(prediction, labels).item()
            correct += (prediction.argmax(1) == labels).type(torch.float).sum().item()
        everything = torch.stack([image for image, _ in test_data])
        true = torch.tensor([label for _, label in test_data])
        by_sample = float(nn.functional.cross_entropy(model(everything), true))
        probabilities = model(everything[:1]).softmax(1)[0]
    test_loss /= len(dataloader)
    correct /= len(test_data)

    answer = call("evaluate", "checkpoint=model.pth", "experiment=tutorial")
    assert answer.code == 0, answer.err
    assert f"accuracy {correct:.2%}, loss {by_sample:.4f}" in answer.out
    assert f"loss {test_loss:.6f} as the average of batches" in answer.out
    result = json.loads(Path("evaluation.json").read_text())
    assert result["accuracy"] == correct and result["loss"] == pytest.approx(by_sample, rel=1e-6)
    assert "dataset.eval_transforms=[], of experiment=tutorial" in answer.out
    answer = call("evaluate", "checkpoint=model.pth", "model=mlp", "dataset=fashion_mnist")
    assert "eval_transforms=[{Normalize: {mean: [0.286], std: [0.353]}}], of dataset=fashion_mnist" in answer.out

    Image.fromarray((everything[0, 0] * 255).round().byte().numpy()).save("boot.png")
    answer = call(
        "predict", "checkpoint=model.pth", "experiment=tutorial", "images=boot.png", "output=boot.json", "top_k=10"
    )
    assert answer.code == 0, answer.err
    [row] = json.loads(Path("boot.json").read_text())
    names = list(result["per_class"])
    assert {entry["class"]: entry["probability"] for entry in row["top"]} == pytest.approx(
        dict(zip(names, probabilities.tolist(), strict=True)), abs=1e-6
    )
    assert "eval_transforms=[]" in answer.err and len(answer.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=tutoral"], "no such experiment (did you mean tutorial?)"),
        (["experiment=tutorial", "model.hiden=[3]"], "there is no setting 'model.hiden' (did you mean model.hidden?"),
        (["experiment=tutorial", "optimizer.lr=3"], "there is no setting 'optimizer.lr'"),
        (["experiment=null"], "experiment=tutorial"),
        (["experiment=tutorial", "model=cnn"], "does not fit CNN"),
    ],
)
def test_an_experiment_that_does_not_fit(call: Call, tmp_path: Path, words: list[str], said: str) -> None:
    if "model=cnn" in words:
        write_fashion_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    torch.save(MLP((1, 28, 28), 10, hidden=[4]).state_dict(), "model.pth")
    for entry in (["evaluate"], ["predict", "images=model.pth"]):
        assert said in call(*entry, "checkpoint=model.pth", *words).error


def test_an_experiment_is_refused_for_a_run(call: Call, trained: Path) -> None:
    said = call("evaluate", "experiment=tutorial").error
    assert "leave experiment= out" in said
    assert "leave experiment= out" in call("predict", f"images={trained}", "experiment=tutorial").error
    assert "leave model= out" in call("predict", f"images={trained}", "model=mlp").error


def test_nothing_is_downloaded(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(MLP((1, 28, 28), 10, hidden=[4]).state_dict(), "model.pth")
    for option, name in (("mnist", "MNIST"), ("cifar10", "CIFAR10")):
        monkeypatch.setattr(torchvision.datasets, name, lambda *_, **__: os._exit(7))
        for entry in (["evaluate"], ["predict", "images=model.pth"]):
            said = call(*entry, "checkpoint=model.pth", "model=mlp", f"dataset={option}", "dataset.root=here").error
            assert "here/" in said and f"python datasets.py dataset={option} dataset.root=here" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
