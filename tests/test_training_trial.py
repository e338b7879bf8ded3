"""The step that is tried before anything is made: what does not fit is one line, and what fits is left as it was."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from torch import nn

from engine.data.batches import Batches
from engine.data.splits import Split
from engine.errors import RequestError
from engine.training.metrics import Tally
from engine.training.trial import try_step

MODELS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, input_shape, num_classes, way):
        super().__init__()
        self.way = way
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, images):
        if self.way == "allocates" and self.training:
            torch.empty(len(images) * 10**14)
        if self.way == "misspelt" and self.training:
            images = imagse
        if self.way == "tuple" and self.training:
            return self.layers(images), None
        return self.layers(images)

def weighted(length):
    return nn.CrossEntropyLoss(weight=torch.ones(length))
"""
YAML = {
    "model/plain": "_target_: own_models.Plain\nway: plain  # str: what goes wrong",
    "model/vit_224": "_target_: torchvision.models.VisionTransformer\nimage_size: 224\npatch_size: 112\nnum_layers: 1\n"
    "num_heads: 1\nhidden_dim: 8\nmlp_dim: 8",
    "criterion/squared": "_target_: torch.nn.MSELoss\nreduction: mean  # str: or none",
    "criterion/poisson": "_target_: torch.nn.PoissonNLLLoss\nfull: false",
    "criterion/weighted": "_target_: own_models.weighted\nlength: 10",
    "optimizer/lbfgs": "_target_: torch.optim.LBFGS\nlr: 1.0",
    "optimizer/sparse": "_target_: torch.optim.SparseAdam\nlr: 1.0",
}
LARGER = "[{Resize:{size:[16,16]}}]"
ONE_HOT = "dataset.target_transform=torch.nn.functional.one_hot"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`--config-dir` of a user's own models, losses and optimizers."""
    folder = tmp_path / "own"
    for name, text in YAML.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text + "\n")
    (folder / "own_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(folder))
    return f"--config-dir={folder}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["criterion=squared"],
            f"criterion MSELoss does not take logits [batch, 10] and labels [batch] of torch.int64: .*{ONE_HOT}",
        ),
        (["criterion=squared", "batch_size=10"], "MSELoss does not take logits [batch, 10] and labels [batch]"),
        (["criterion=poisson", "batch_size=1"], "PoissonNLLLoss does not take logits [batch, 10] and labels [batch]"),
        (["criterion=squared", ONE_HOT, "criterion.reduction=none"], "MSELoss gives [12, 10]; expected one number"),
        (["criterion=weighted", "criterion.length=3"], "CrossEntropyLoss does not take .*weight tensor .*10 classes"),
        (
            ["dataset.target_transform=torch.nn.functional.gelu"],
            "dataset.target_transform of labels [12] raised TypeError",
        ),
        (["model=vit_224"], "VisionTransformer does not take 1 image [1, 8, 8]: AssertionError: Wrong image height!"),
        (["model=plain", "model.way=misspelt"], "Plain fails on 64 images [1, 8, 8]: NameError: .*(own_models.py:15)"),
        (["model=plain", "model.way=tuple"], "model Plain gives tuple for 64 images; expected [64, 10]"),
        (["model=plain", "model.way=allocates"], "out of memory with batch_size=64; try batch_size=32"),
        (["optimizer=lbfgs"], "optimizer torch.optim.LBFGS cannot make a step: .*'closure'"),
        (
            ["optimizer.nesterov=true", "optimizer.momentum=0"],
            "optimizer: torch.optim.SGD refuses its settings: Nesterov",
        ),
        (["optimizer=sparse"], "optimizer torch.optim.SparseAdam cannot make a step: .*dense gradients"),
        (["model=resnet18", "batch_size=59"], "the last batch of 1,299 samples holds 1: .*take drop_last=true or"),
        (
            ["early_stopping.patience=2", "dataset.val_fraction=0"],
            "early_stopping.patience=2: there is no validation part",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    call: Call, tmp_path: Path, own: str, arguments: list[str], said: str
) -> None:
    error = call("train", *arguments, own).error
    place = 0
    assert error.count("Error: ") <= 1
    for part in said.split(".*"):
        assert part in error[place:], error
        place = error.index(part, place) + len(part)
    assert len(error) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_fits_is_trained(call: Call, own: str) -> None:
    """Batch normalisation over more than one pixel takes a batch of one; a loss gets the labels it wants."""
    common = ("epochs=1", "dataset.limit=9", "dataset.val_fraction=0.1", "batch_size=4", own)
    for arguments in (
        ["model=cnn", "model.width=2", f"dataset.train_transforms={LARGER}", f"dataset.eval_transforms={LARGER}"],
        ["criterion=squared", ONE_HOT],
        ["criterion=weighted"],
        ["model=plain"],
    ):
        answer = call("train", *arguments, *common)
        assert answer.code == 0, answer.err
        assert answer.err == ""


class Remembers(nn.Module):
    """A model with everything that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3)
        )
        self.steps = 0
        self.register_buffer("replaced", torch.zeros(3), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            self.replaced = self.replaced + 1
            np.random.rand()
            random.random()
        return self.layers(images)


def test_the_trial_leaves_no_trace() -> None:
    labels = torch.arange(10) % 3
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)
    config: dict[str, Any] = {"batch_size": 4, "seed": 0, "num_workers": 0, "limit_batches": None}
    config |= {"shuffle": True, "drop_last": False}
    batches = Batches(Split((images, labels), torch.arange(10), 3), [], torch.device("cpu"), training=True, **config)
    model = Remembers()

    def state() -> dict[str, Any]:
        tensors = {name: tensor.clone() for name, tensor in [*model.state_dict().items(), ("own", model.replaced)]}
        generators = torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(int)), random.getstate()
        gradients = [parameter.grad for parameter in model.parameters()]
        return {**tensors, "numbers": [*generators, np.random.get_state()[2], model.steps, gradients]}

    before = state()
    settings = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    try_step(model, nn.CrossEntropyLoss(), settings, batches, (1, 8, 8), 3)
    after = state()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
    for one, other in zip(before["numbers"], after["numbers"], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_no_sample_of_a_dataset_of_the_users_is_read() -> None:
    class Opened(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

    config: dict[str, Any] = {"batch_size": 4, "seed": 0, "num_workers": 0, "limit_batches": None}
    config |= {"shuffle": True, "drop_last": False}
    batches = Batches(Split(Opened(), torch.arange(6), 3), [], torch.device("cpu"), training=True, **config)
    model, settings = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), {"_target_": "torch.optim.SGD", "lr": 0.1}
    for criterion in (nn.CrossEntropyLoss(), nn.MSELoss()):  # its labels may be either
        try_step(model, criterion, settings, batches, (1, 2, 2), 3)


def test_a_last_batch_is_tried_where_there_is_one() -> None:
    """Batch normalisation takes no single sample while training, which is what five are after four."""
    split = Split((torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5) % 3), torch.arange(5), 3)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    settings, cpu = {"_target_": "torch.optim.SGD", "lr": 0.1}, torch.device("cpu")
    for how in ({"drop_last": True}, {"limit_batches": 1}):
        batches = Batches(split, [], cpu, training=True, batch_size=4, **how)  # type: ignore[arg-type]
        try_step(model, nn.CrossEntropyLoss(), settings, batches, (1, 2, 2), 3)
    with pytest.raises(RequestError, match=r"^batch_size=4: the last batch of 5 samples holds 1: "):
        try_step(
            model, nn.CrossEntropyLoss(), settings, Batches(split, [], cpu, training=True, batch_size=4), (1, 2, 2), 3
        )


SHORT = ("dataset.limit=64", "model.hidden=[4]", "name=run")


def fail_in(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Raise an error in a step of the run, counted from 1, after the two that are tried."""
    add, calls = Tally.add, []

    def failing(self: Tally, *arguments: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) - 1 == step:
            raise error
        add(self, *arguments)

    monkeypatch.setattr(Tally, "add", failing)


def test_memory_that_runs_out_while_training_is_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB"))
    answer = call("train", *SHORT, "batch_size=32", "epochs=2")
    assert answer.code == 1
    assert answer.err == (
        "error: epoch 2, step 1: out of memory with batch_size=32; try batch_size=16; "
        "the last good checkpoint is checkpoints/run/last.pt\n"
    )
    assert "Tried to allocate" in (tmp_path / "checkpoints/run/train.log").read_text()  # the cause is kept
    assert gc.get_freeze_count() == 0


def test_the_log_has_the_traceback_of_what_was_not_expected(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, 2, KeyError("colour"))
    answer = call("train", *SHORT, "batch_size=32", "epochs=2")
    assert answer.code == 1 and "KeyError: 'colour'" in answer.err
    log = (tmp_path / "checkpoints/run/train.log").read_text()
    assert "Traceback (most recent call last)" in log and "in train_epoch" in log and "KeyError: 'colour'" in log


def test_a_result_that_is_no_number_is_no_result(call: Call, tmp_path: Path) -> None:
    """One step makes weights that are finite and logits that are not; only the test finds that out."""
    answer = call("train", *SHORT, "epochs=1", "limit_batches=1", "dataset.val_fraction=0", "optimizer.lr=1e37")
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert "the test loss is not a finite number, with the weights of epoch 1 in checkpoints/run/best.pt" in answer.err
    assert not (tmp_path / "checkpoints/run/summary.json").exists()


def test_a_learning_rate_that_is_no_number(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "scheduler").mkdir(parents=True)
    text = "_target_: own_rates.lost\n"
    (tmp_path / "own/scheduler/lost.yaml").write_text(text)
    (tmp_path / "own/own_rates.py").write_text(
        "from torch.optim.lr_scheduler import LambdaLR\n\n"
        "def lost(optimizer):\n    return LambdaLR(optimizer, lambda epoch: float('nan') if epoch == 1 else 1.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    answer = call("train", *SHORT, "epochs=3", "scheduler=lost", "--config-dir=own")
    assert answer.code == 1 and "the learning rate is not a finite number any more, first in epoch 1" in answer.err


def test_nothing_stays_frozen_for_the_end_of_the_process(call: Call) -> None:
    """Libraries that count their objects (nanobind's) would complain of those that are kept to the end."""
    assert call("train", *SHORT, "epochs=1").code == 0
    assert gc.get_freeze_count() == 0
