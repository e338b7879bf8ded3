"""experiment=tutorial: the weights are, bit by bit, those of the PyTorch quickstart tutorial's own way of training."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist


class TutorialNetwork(nn.Module):
    """The tutorial's model: two hidden layers of 512."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(28 * 28, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_relu_stack(self.flatten(x))


def tutorial_epochs(data: Dataset, epochs: int) -> nn.Module:
    """The tutorial: ToTensor for each sample, a DataLoader in order, cross-entropy, plain SGD at 1e-3, 64 a batch."""
    loader = DataLoader(data, batch_size=64)
    torch.manual_seed(0)
    model = TutorialNetwork()
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            loss_function(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same_bits(file: Path, model: nn.Module) -> None:
    ours, theirs = torch.load(file, weights_only=True)["model"], model.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)), name


def write_fashion_mnist(raw: Path) -> None:
    """A small data set in the true files' format: random pictures, 1,000 of them, so that the last batch is short."""
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 1000), ("t10k", 100)):
        for kind, values in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", random.integers(0, 10, count, dtype=np.uint8)),
        ):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())


def test_small_data_gives_the_tutorials_bits(call: Call, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    arguments = ("epochs=2", "seed=0", "device=cpu", "name=run", "dataset.root=data")
    answer = call("train", "experiment=tutorial", *arguments)
    assert answer.code == 0, answer.err
    assert "1,000 train, 100 test" in answer.out
    data = FashionMNIST("data", train=True, transform=ToTensor())
    assert_same_bits(tmp_path / "checkpoints/run/last.pt", tutorial_epochs(data, epochs=2))


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the 60,000 images: apt-get install dataset-fashion-mnist")
def test_an_epoch_of_the_real_data_gives_the_tutorials_bits(call: Call, tmp_path: Path) -> None:
    answer = call("train", "experiment=tutorial", "epochs=1", "seed=0", "device=cpu", "name=run")
    assert answer.code == 0, answer.err
    assert "60,000 train, 10,000 test" in answer.out
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in DEBIAN.glob("*.gz"):
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    data = FashionMNIST("data", train=True, transform=ToTensor())
    assert_same_bits(tmp_path / "checkpoints/run/last.pt", tutorial_epochs(data, epochs=1))
