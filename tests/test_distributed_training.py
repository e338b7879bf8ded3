"""Training in several processes against one: the same losses, weights and counts, whatever their number.

In float64, so that only a true difference is larger than rounding. What is expected comes from one process, which the
other tests hold against plain loops.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import train
from engine import distributed, terminal
from engine.data import batches as batches_module
from engine.data.batches import Batches
from engine.data.images import ImageData, ImageFiles
from engine.data.mixing import Mixing
from engine.data.splits import divide
from engine.run.saver import Saver
from engine.run.state import EveryRandomStates, Progress
from engine.training.losses import WeightedCrossEntropy
from engine.training.metrics import Tally, evaluate
from engine.training.parallel import synchronise_batchnorm
from engine.training.step import Step
from engine.training.transfer import Frozen

CPU = torch.device("cpu")
FLIP = ["RandomHorizontalFlip", {"RandomCrop": {"size": 4, "padding": 1}}]


def network(norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*(layers[:1] + [nn.BatchNorm2d(4)] * norm + layers[1:]))


class Samples(Dataset):
    """Of the user's; read one at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


class Stream(IterableDataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.samples = list(zip(images, labels.tolist(), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def as_files(images: Tensor, labels: Tensor) -> ImageFiles:
    """PNG files, of which a third cannot be read, all of the first process of three in some batches."""

    def written() -> list[str]:
        folder = Path(tempfile.mkdtemp())
        paths = [folder / f"{number:03}.png" for number in range(len(images))]
        for number, (path, image) in enumerate(zip(paths, images, strict=True)):
            if number % 3 != 1:
                Image.fromarray(image[0].numpy()).save(path)
            else:
                path.write_bytes(b"no picture")
        return [str(path) for path in paths]

    return ImageFiles(distributed.from_first(written), labels, channels=1)


# What differs from plain training on 101 samples, 8 a step.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"batch_size": 4, "accumulate": 3},
    "averages and clipping": {"ema_decay": 0.9, "clip_grad_norm": 0.1},
    "mixup and cutmix": {"mixing": Mixing(0.4, 1.0, 0)},
    "class weights": {"criterion": WeightedCrossEntropy(torch.tensor([1.0, 7.0, 0.2], dtype=torch.float64), 0.1)},
    "class weights, accumulate": {
        "criterion": WeightedCrossEntropy(torch.tensor([1.0, 7.0, 0.2], dtype=torch.float64)),
        "accumulate": 2,
    },
    "a sum": {"criterion": nn.CrossEntropyLoss(reduction="sum"), "accumulate": 2, "lr": 0.01},
    "balanced": {"balance": True},
    "batch norm": {"norm": True},
    "batch norm, accumulate": {"norm": True, "accumulate": 2, "ema_decay": 0.5},
    "batch norm of its own": {"norm": True, "ema_decay": 0.5, "synchronised": False},
    "unfrozen": {"norm": True, "freeze": "[01]", "unfreeze_epoch": 2},
    "a sampler": {"sampler": lambda indices: range(49, -1, -1)},
    "a sampler that hangs on the process": {"sampler": lambda indices: torch.arange(50).roll(distributed.rank())},
    "a data set, workers": {"part": Samples, "num_workers": 1},
    "unreadable files": {"part": as_files, "skip_unreadable": True},
    "unreadable files, workers, mixup": {
        "part": as_files,
        "skip_unreadable": True,
        "num_workers": 1,
        "mixing": Mixing(0.4, None, 0),
    },
    "a stream": {"part": Stream, "steps_per_epoch": 5, "val_fraction": 0.0},
    "two samples": {"samples": 2, "val_fraction": 0.0},
    "a last step of one": {"samples": 17, "val_fraction": 0.0, "norm": True},
}


def trained(name: str) -> dict[str, Any]:
    """Two epochs of a case in the processes that there are."""
    case = dict(CASES[name])
    count = case.pop("samples", 101)
    batch_size, accumulate = case.pop("batch_size", 8), case.pop("accumulate", 1)
    drawn = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=drawn)
    labels = (torch.arange(count) % 7).clamp(max=2)  # of unequal classes
    part = case.pop("part", lambda *both: both)
    data = ImageData(part(images, labels), (images, labels), ["a", "b", "c"], sampler=case.pop("sampler", None))
    how = {key: case.pop(key) for key in ("balance", "steps_per_epoch", "skip_unreadable") if key in case}
    splits, _ = divide(data, val_fraction=case.pop("val_fraction", 0.0 if data.sampler else 0.1), **how)
    me = {"rank": distributed.rank(), "world_size": distributed.world_size(), "batch_size": batch_size}
    workers, mixing = case.pop("num_workers", 0), case.pop("mixing", None)
    batches = Batches(
        splits["train"], FLIP, CPU, **me, training=True, accumulate=accumulate, mixing=mixing, num_workers=workers
    )
    torch.manual_seed(0)
    model = network(case.pop("norm", False))
    if case.pop("synchronised", True) and distributed.world_size() > 1:
        synchronise_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.pop("lr", 0.1), momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    frozen = Frozen(model, case.pop("freeze", None), case.pop("unfreeze_epoch", None))
    criterion = case.pop("criterion", nn.CrossEntropyLoss())
    step = Step(model, optimizer, schedule, CPU, batch_size=batch_size, frozen=frozen, **case)
    progress, tally = Progress(), Tally(CPU, accumulate)
    parts = {"model": step.evaluated, "optimizer": optimizer, "scheduler": schedule, "step": step}
    parts |= {"tally": tally, "progress": progress, "random": EveryRandomStates()}
    rows, state = [], {}
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage().partition(" be read")[0])  # type: ignore
    terminal.log.addHandler(listener)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), {"config": {"batch_size": batch_size}}, parts, None, None)
        for epoch in (1, 2):
            train.train_epoch(batches, criterion, step, saver, 2)
            step.end_epoch()
            state = copy.deepcopy(tally.state_dict())
            rows.append(tally.read())
            tally.reset()
            progress.epoch, progress.batch = epoch + 1, 0
    terminal.log.removeHandler(listener)
    tally.load_state_dict(state)  # as a run that is resumed
    rows.append(tally.read())
    common = me | {"batch_size": 8}
    loss, confusion = evaluate(step.evaluated, Batches(splits["test"], [], CPU, **common), 3)
    weights = {name: tensor.detach().clone() for name, tensor in step.evaluated.state_dict().items()}
    return {
        "rows": rows,
        "weights": weights,
        "loss": loss,
        "confusion": confusion,
        "tally": state,
        "count": count,
        "told": told,
    }


def all_trained() -> dict[str, dict[str, Any]]:
    torch.set_default_dtype(torch.float64)
    plain = batches_module.to_float
    batches_module.to_float = lambda images: plain(images).double()  # the images, too
    try:
        return {name: trained(name) for name in CASES}
    finally:
        batches_module.to_float = plain
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_rounding_only(count: int) -> None:
    """All cases in one test, as starting processes takes longer than training in them."""
    alone, together = all_trained(), processes.group(count, all_trained)
    for name in CASES:
        check(name, alone[name], [outcome[name] for outcome in together])


def check(name: str, one: dict[str, Any], together: list[dict[str, Any]]) -> None:
    """What each of several processes has of a case, against what one process has."""
    first = together[0]
    for found in together:
        assert (found["rows"], found["loss"]) == (first["rows"], first["loss"]), name  # each would decide as the others
        assert all(torch.equal(tensor, first["weights"][key]) for key, tensor in found["weights"].items()), name
        if not CASES[name].get("synchronised", True):
            continue  # what each normalises by are its own samples
        for (loss, accuracy), (other_loss, other_accuracy) in zip(one["rows"], found["rows"], strict=True):
            assert other_loss == pytest.approx(loss, rel=1e-9) and other_accuracy == accuracy, name
        assert list(found["weights"]) == list(one["weights"]), name
        for key, tensor in one["weights"].items():
            assert torch.allclose(found["weights"][key], tensor, rtol=1e-9, atol=1e-12), (name, key)
        assert torch.equal(found["confusion"], one["confusion"]), name
        assert int(one["confusion"].sum()) == one["count"], name
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-9), name
        assert found["tally"]["sizes"].tolist() == one["tally"]["sizes"].tolist(), name
        assert found["tally"]["losses"].tolist() == pytest.approx(one["tally"]["losses"].tolist(), rel=1e-9), name
        assert found["tally"]["correct"] == one["tally"]["correct"], name
        assert found["told"] == one["told"], name
