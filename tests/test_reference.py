"""Training, evaluating and predicting against plain PyTorch loops written here, from the same data and seed."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from PIL import Image
from splitmix import order_of
from torch import Tensor, nn

import datasets
from engine.data.batches import Batches
from engine.data.splits import load_splits
from models.cnn import CNN
from models.mlp import MLP

CPU = torch.device("cpu")
SPLITS = {"val_fraction": 0.1, "limit": None, "target_transform": None, "steps_per_epoch": None}
DIGITS = {**SPLITS, "train_transforms": [], "eval_transforms": [], "_target_": "datasets.digits"}


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images as floats 0 to 1 and labels of the three splits; test_data_splits.py says which samples those are."""
    splits, _ = load_splits(DIGITS)
    return {name: (s.part[0][s.indices].float() / 255, s.part[1][s.indices]) for name, s in splits.items()}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Recipe:
    """What is asked of train.py, and the same for the plain loop."""

    arguments: list[str] = field(default_factory=list)
    batch_size: int = 64
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    limit_batches: int | None = None
    clip: float | None = None
    smoothing: float = 0.0
    optimizer: type = torch.optim.SGD
    settings: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9})
    warmup: float = 0.0
    cosine: bool = True
    model: type = MLP
    model_settings: dict[str, Any] = field(default_factory=lambda: {"hidden": [8]})


RECIPES = {
    "as it comes": Recipe(),
    "another seed": Recipe(["seed=7"], seed=7),
    "clipping": Recipe(["clip_grad_norm=0.3"], clip=0.3),
    "decay": Recipe(
        ["optimizer.lr=0.1", "optimizer.momentum=0.5", "optimizer.weight_decay=0.02", "scheduler=constant"],
        settings={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.02},
        cosine=False,
    ),
    "smoothing, in order": Recipe(["criterion.label_smoothing=0.2", "shuffle=false"], smoothing=0.2, shuffle=False),
    "whole batches": Recipe(["drop_last=true", "batch_size=100"], batch_size=100, drop_last=True),
    "few batches, Adam, warm-up": Recipe(
        ["limit_batches=4", "optimizer=adam", "optimizer.lr=0.01", "scheduler.warmup_epochs=1"],
        limit_batches=4,
        optimizer=torch.optim.Adam,
        settings={"lr": 0.01},
        warmup=1,
    ),
    "dropout": Recipe(["model.dropout=0.4"], model_settings={"hidden": [8], "dropout": 0.4}),
    "batch normalisation": Recipe(
        ["model=cnn", "model.width=2", "batch_size=200"],
        batch_size=200,
        model=CNN,
        model_settings={"width": 2, "dropout": 0.1},
    ),
}
EPOCHS = 2


@dataclass
class Outcome:
    """What came of a plain loop; a list has an entry an epoch."""

    model: nn.Module
    train: list[tuple[float, float]] = field(default_factory=list)  # loss and accuracy
    val: list[tuple[float, float]] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: int = 0


def plain_evaluation(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Cross-entropy and accuracy of all samples at once, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    loss = -logits.double().log_softmax(1)[torch.arange(len(labels)), labels].mean()
    return float(loss), float((logits.argmax(1) == labels).double().mean())


def plain_training(recipe: Recipe) -> Outcome:
    """The recipe as anybody would write it down."""
    data = digits()
    images, labels = data["train"]
    torch.manual_seed(recipe.seed)
    model = recipe.model((1, 8, 8), 10, **recipe.model_settings)
    optimizer = recipe.optimizer(model.parameters(), **recipe.settings)
    outcome = Outcome(model)
    count = len(labels) // recipe.batch_size if recipe.drop_last else math.ceil(len(labels) / recipe.batch_size)
    count = min(count, recipe.limit_batches or count)
    step, total, warmup = 0, EPOCHS * count, recipe.warmup * count
    for epoch in range(1, EPOCHS + 1):
        model.train()
        order = order_of(recipe.seed, epoch, len(labels)) if recipe.shuffle else list(range(len(labels)))
        loss_sum, right, seen = 0.0, 0, 0
        for number in range(count):
            if step < warmup:
                share = (step + 1) / (warmup + 1)
            else:
                share = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2 if recipe.cosine else 1.0
            for group in optimizer.param_groups:
                group["lr"] = recipe.settings["lr"] * share
            if number == 0:
                outcome.lr.append(recipe.settings["lr"] * share)
            chosen = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
            logits = model(images[chosen])
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip is not None:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
                if norm > recipe.clip:
                    outcome.clipped += 1
                    for gradient in gradients:
                        gradient.mul_(recipe.clip / norm)
            optimizer.step()
            step += 1
            loss_sum, seen = loss_sum + float(loss.detach()) * len(chosen), seen + len(chosen)
            right += int((logits.argmax(1) == labels[chosen]).sum())
        outcome.train.append((loss_sum / seen, right / seen))
        val_images, val_labels = (tensor[: recipe.batch_size * (recipe.limit_batches or 999)] for tensor in data["val"])
        outcome.val.append(plain_evaluation(model, val_images, val_labels))
        outcome.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return outcome


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal but for the rounding of single operations."""
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name].double(), expected[name].double(), rtol=1e-4, atol=1e-5) for name in expected
    )


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_the_plain_loop(call: Call, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    small = [] if "model=cnn" in recipe.arguments else ["model.hidden=[8]"]
    answer = call("train", f"epochs={EPOCHS}", "name=run", "device=cpu", *small, *recipe.arguments)
    assert answer.code == 0, answer.err
    expected = plain_training(recipe)
    run = tmp_path / "checkpoints" / "run"
    assert close(load(run / "last.pt")["model"], expected.states[-1])

    rows = rows_of(run)
    for epoch, row in enumerate(rows):
        assert (float(row["train_loss"]), float(row["train_accuracy"])) == pytest.approx(
            expected.train[epoch], abs=2e-5
        )
        assert (float(row["val_loss"]), float(row["val_accuracy"])) == pytest.approx(expected.val[epoch], abs=2e-5)
        assert float(row["lr"]) == pytest.approx(expected.lr[epoch], abs=1e-6)
    best = max(range(EPOCHS), key=lambda epoch: (expected.val[epoch][1], -expected.val[epoch][0]))
    assert load(run / "best.pt")["epoch"] == best + 1
    assert close(load(run / "best.pt")["model"], expected.states[best])

    expected.model.load_state_dict(expected.states[best])
    images, labels = (tensor[: recipe.batch_size * (recipe.limit_batches or 999)] for tensor in digits()["test"])
    summary = json.loads((run / "summary.json").read_text())
    found = summary["test_loss"], summary["test_accuracy"]
    assert found == pytest.approx(plain_evaluation(expected.model, images, labels), abs=2e-5)


def test_the_recipes_differ_in_what_they_are_there_for() -> None:
    """Else the test above would pass with any of the settings ignored."""
    results = {name: plain_training(recipe) for name, recipe in RECIPES.items()}
    for name, result in results.items():
        if name != "as it comes":
            assert not close(result.states[-1], results["as it comes"].states[-1]), name
    assert results["clipping"].clipped > 10
    smoothed = RECIPES["smoothing, in order"]
    shuffled = plain_training(Recipe(smoothing=smoothed.smoothing))
    assert not close(shuffled.states[-1], results["smoothing, in order"].states[-1])
    plain = plain_training(Recipe(shuffle=False))
    assert not close(plain.states[-1], results["smoothing, in order"].states[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples, and which of them are seen


def batches_of(**changes: Any) -> Batches:
    run = {"batch_size": 100, "seed": 0, "shuffle": True, "drop_last": False, "limit_batches": None, "num_workers": 0}
    return Batches(load_splits(DIGITS)[0]["train"], [], CPU, training=True, **{**run, **changes})


def test_the_order_is_a_permutation_that_differs_by_seed_and_epoch() -> None:
    indices = load_splits(DIGITS)[0]["train"].indices
    assert indices is not None
    orders = {}
    for seed in (0, 1, 4_000_000_000):
        batches = batches_of(seed=seed)
        for epoch in (1, 2, 3):
            order = batches.order(epoch)
            assert order.tolist() == batches.order(epoch).tolist()
            assert order.tolist() == indices[order_of(seed, epoch, 1299)].tolist()
            assert order.tolist() != indices.tolist() and sorted(order.tolist()) == indices.tolist()
            orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == 9


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [100] * 12 + [99]),
        ({"drop_last": True}, [100] * 12),
        ({"limit_batches": 3}, [100] * 3),
        ({"limit_batches": 99}, [100] * 12 + [99]),
        ({"batch_size": 433, "drop_last": True}, [433] * 3),  # 3 * 433 = 1299: there is no rest
        ({"batch_size": 433}, [433] * 3),
        ({"batch_size": 1298}, [1298, 1]),
        ({"batch_size": 1299, "drop_last": True}, [1299]),
        ({"batch_size": 2000}, [1299]),
    ],
)
def test_how_many_samples_are_in_each_batch(changes: dict[str, Any], sizes: list[int]) -> None:
    batches = batches_of(**changes)
    found = [len(labels) for _, labels in batches.epoch(1)]
    assert found == sizes and len(batches) == len(sizes) and batches.num_samples == sum(sizes)
    assert [len(labels) for _, labels in batches.epoch(1, start=len(sizes) - 1)] == sizes[-1:]
    assert list(batches.epoch(1, start=len(sizes))) == []


def test_only_training_is_shuffled_and_loses_its_last_batch() -> None:
    splits, _ = load_splits(DIGITS)
    run = {"batch_size": 100, "seed": 0, "shuffle": True, "drop_last": True, "limit_batches": None, "num_workers": 0}
    batches = Batches(splits["test"], [], CPU, **run)
    labels = torch.cat([labels for _, labels in batches.epoch(5)])
    assert labels.tolist() == digits()["test"][1].tolist() and len(batches) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What each phase sees


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Tensor]]:
    """Of every call of an MLP: whether it was in training mode, and the images it was given."""
    noted: list[tuple[bool, Tensor]] = []
    forward = MLP.forward

    def watching(self: MLP, images: Tensor) -> Tensor:
        noted.append((self.training, images.detach().clone()))
        return forward(self, images)

    monkeypatch.setattr(MLP, "forward", watching)
    return noted


def sorted_rows(images: Tensor) -> Tensor:
    """Images as rows in an order of their own, to compare sets of them."""
    rows = images.flatten(1).double()
    key = (rows * torch.linspace(1, 2, rows.shape[1], dtype=torch.float64).sin()).sum(1)
    return rows[key.argsort()]


def test_training_samples_get_the_training_transforms_and_no_others_do(
    call: Call, seen: list[tuple[bool, Tensor]]
) -> None:
    train_transforms = "dataset.train_transforms=[{Normalize:{mean:[0.5],std:[0.1]}}]"
    eval_transforms = "dataset.eval_transforms=[{Normalize:{mean:[-1.0],std:[2.0]}}]"
    answer = call("train", "epochs=2", "name=run", "model.hidden=[4]", train_transforms, eval_transforms)
    assert answer.code == 0, answer.err
    data = digits()
    trained = torch.cat([images for training, images in seen if training])[-2 * 1299 :]  # not what was tried before
    for epoch in torch.split(trained, 1299):
        assert torch.allclose(sorted_rows(epoch), sorted_rows((data["train"][0] - 0.5) / 0.1), atol=1e-4)
    evaluated = torch.cat([images for training, images in seen if not training])[-(2 * 143 + 355) :]
    expected = torch.cat([data["val"][0], data["val"][0], data["test"][0]])
    assert torch.allclose(evaluated, (expected + 1) / 2, atol=1e-5)

    seen.clear()
    assert call("evaluate").code == 0
    assert not any(training for training, _ in seen)
    evaluated = torch.cat([images for _, images in seen])
    assert torch.allclose(evaluated, (data["test"][0] + 1) / 2, atol=1e-5)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP answers the opposite once it has seen 50 training batches; how many it saw is part of its weights."""
    begin, forward = MLP.__init__, MLP.forward

    @functools.wraps(begin)
    def begin_counting(self: MLP, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        self.register_buffer("batches", torch.zeros(()))

    def count(self: MLP, images: Tensor) -> Tensor:
        logits = forward(self, images)
        if self.training:
            self.batches += 1
            return logits
        return torch.where(self.batches > 50, -logits, logits)

    monkeypatch.setattr(MLP, "__init__", begin_counting)
    monkeypatch.setattr(MLP, "forward", count)


@pytest.mark.usefixtures("spoiled")
def test_the_test_is_with_the_best_weights_not_the_last(call: Call, tmp_path: Path) -> None:
    """An epoch has 21 batches: the weights of epochs 1 and 2 are good, those of epochs 3 and 4 spoiled."""
    answer = call("train", "epochs=4", "name=run", "model.hidden=[32]")
    assert answer.code == 0, answer.err
    run = tmp_path / "checkpoints" / "run"
    best, last = load(run / "best.pt"), load(run / "last.pt")
    assert (best["epoch"], float(best["model"]["batches"]), float(last["model"]["batches"])) == (2, 42, 84)
    accuracies = []
    for state in (best["model"], last["model"]):
        model = MLP((1, 8, 8), 10, hidden=[32])
        model.load_state_dict(state)
        accuracies.append(plain_evaluation(model, *digits()["test"])[1])
    assert accuracies[0] > 0.5 and accuracies[1] < 0.3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(accuracies[0]) and summary["best_epoch"] == 2
    assert [float(row["val_accuracy"]) > 0.5 for row in rows_of(run)] == [True, True, False, False]

    assert call("train", "epochs=9", "name=early", "model.hidden=[32]", "early_stopping.patience=2").code == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "checkpoints" / "early")] == ["1", "2", "3", "4"]


def test_without_validation_the_last_epoch_is_the_best(call: Call, tmp_path: Path) -> None:
    assert call("train", "epochs=3", "name=run", "model.hidden=[4]", "dataset.val_fraction=0").code == 0
    run = tmp_path / "checkpoints" / "run"
    best, last = load(run / "best.pt"), load(run / "last.pt")
    assert best["epoch"] == 3 and all(torch.equal(best["model"][name], last["model"][name]) for name in last["model"])
    assert [(row["val_loss"], row["val_accuracy"]) for row in rows_of(run)] == [("", "")] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Files: names of classes, predictions, and a run whose data was exchanged

NAMES = ["ant", "bee", "cow"]  # sorted; the folders are made in another order
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]
OF_PHOTOS = [
    "dataset=image_folder",
    "dataset.root=photos",
    "dataset.test_fraction=0.2",
    f"dataset.train_transforms=[RandomHorizontalFlip,{{Normalize:{{mean:{MEAN},std:{STD}}}}}]".replace(" ", ""),
    f"dataset.eval_transforms=[{{Normalize:{{mean:{MEAN},std:{STD}}}}}]".replace(" ", ""),
    "num_workers=0",
    "batch_size=8",
]


def make_photos(top: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cow", "ant", "bee"):
        (top / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 120, (8, 8, 3)) + 120 * np.eye(3, dtype=np.int64)[NAMES.index(name)]
            Image.fromarray(pixels.astype(np.uint8)).save(top / name / f"{number:02}.png")


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """Where the first test that needs a run of the photographs kept it."""
    return {}


@pytest.fixture
def run_of_photos(call: Call, tmp_path: Path, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of a model with dropout and batch normalisation, in a folder of its own."""
    if not kept:
        make_photos(tmp_path / "photos")
        answer = call("train", *OF_PHOTOS, "model=cnn", "model.width=4", "model.dropout=0.5", "epochs=2", "name=run")
        assert answer.code == 0, answer.err
        kept["folder"] = tmp_path_factory.mktemp("kept") / "folder"
        shutil.copytree(tmp_path, kept["folder"], symlinks=True)
    else:
        shutil.copytree(kept["folder"], tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path / "checkpoints" / "run"


def plain_probabilities(run: Path, files: list[Path]) -> Tensor:
    """Of the run's best weights in evaluation mode, all images in one batch, `[n, 3]`."""
    model = CNN((3, 8, 8), 3, width=4, dropout=0.5)
    model.load_state_dict(load(run / "best.pt")["model"])
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])).double() / 255
    images = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    model.eval()
    with torch.no_grad():
        return model(images.permute(0, 3, 1, 2).float()).double().softmax(1)


def test_a_checkpoint_holds_the_names_of_its_classes(run_of_photos: Path) -> None:
    for file in ("best.pt", "last.pt"):
        saved = load(run_of_photos / file)
        assert saved["classes"] == NAMES and saved["input_shape"] == [3, 8, 8]


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_predictions_are_a_plain_forward_pass_in_evaluation_mode(
    call: Call, run_of_photos: Path, tmp_path: Path, batch_size: int
) -> None:
    answer = call("predict", "images=photos", "output=out.json", f"batch_size={batch_size}", "num_workers=0", "top_k=3")
    assert answer.code == 0, answer.err
    files = sorted((tmp_path / "photos").rglob("*.png"))
    probabilities = plain_probabilities(run_of_photos, files)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["image"] for row in found] == [str(file.relative_to(tmp_path)) for file in files]
    for file, row, expected in zip(files, found, probabilities.tolist(), strict=True):
        assert row["true"] == file.parent.name and row["error"] is None
        ranked = sorted(zip(expected, NAMES, strict=True), reverse=True)
        assert [entry["class"] for entry in row["top"]] == [name for _, name in ranked]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx([p for p, _ in ranked], abs=1e-5)
        assert (row["predicted"], row["probability"]) == (row["top"][0]["class"], row["top"][0]["probability"])
    assert len({row["predicted"] for row in found}) > 1
    right = sum(row["predicted"] == row["true"] for row in found) / 60
    assert f"accuracy {right:.2%} of 60 images" in answer.err


def test_evaluation_of_files_is_a_plain_forward_pass(call: Call, run_of_photos: Path, tmp_path: Path) -> None:
    assert call("evaluate", "num_workers=0", "output=found.json").code == 0
    test = datasets.image_folder("photos", test_fraction=0.2, channels=3, max_pixels=100).test
    assert isinstance(test, datasets.ImageFiles)
    labels = test.targets.tolist()
    probabilities = plain_probabilities(run_of_photos, [Path(str(path)) for path in test.paths])
    confusion = [[0] * 3 for _ in range(3)]
    for label, row in zip(labels, probabilities.tolist(), strict=True):
        confusion[label][row.index(max(row))] += 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["confusion"] == confusion and sum(map(sum, confusion)) == 12
    assert found["loss"] == pytest.approx(float(-probabilities[range(12), labels].log().mean()), rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(confusion[c][c] for c in range(3)) / 12)


def test_a_run_does_not_go_on_with_other_data(call: Call, run_of_photos: Path, tmp_path: Path) -> None:
    before = (run_of_photos / "last.pt").read_bytes()
    photos = tmp_path / "photos"
    (photos / "ant" / "00.png").rename(photos / "bee" / "99.png")  # as many as before, one with another label
    refused = call("train", "resume=latest", "epochs=3", "dataset.root=photos").error
    assert "data" in refused and "resume_changed=true" in refused
    assert (run_of_photos / "last.pt").read_bytes() == before

    (photos / "bee" / "99.png").rename(photos / "ant" / "00.png")
    answer = call("train", "resume=latest", "epochs=3", "dataset.root=photos")
    assert answer.code == 0, answer.err
    assert [row["epoch"] for row in rows_of(run_of_photos)] == ["1", "2", "3"]


def test_a_run_goes_on_with_other_data_where_that_was_accepted(call: Call, run_of_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "ant" / "00.png").rename(tmp_path / "photos" / "bee" / "99.png")
    answer = call("train", "resume=latest", "epochs=3", "dataset.root=photos", "resume_changed=true")
    assert answer.code == 0, answer.err
    assert len(rows_of(run_of_photos)) == 3
