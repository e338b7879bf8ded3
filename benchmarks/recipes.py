"""What the recipes of configs/experiment/ reach: `python benchmarks/recipes.py` prints a table, a row a recipe.

Every run is the `python train.py experiment=NAME` that a user types, one a seed, and for those named in TTA below the
`python evaluate.py tta=flip` after it. The digits are few: of them five folds are trained in place of seeds, each a
fifth of every class for the test. The first row is the tutorial's own code: Fashion-MNIST a sample at a time
through ToTensor, five epochs with the test after each; `fashion_mnist_fast` has to fit into its time.

The seconds are those of the epochs; the program's start, some seconds, and the last test are not among them.

    python benchmarks/recipes.py digits_best --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import ImageData, digits, fashion_mnist  # noqa: E402
from engine.data.devices import choose_device  # noqa: E402
from engine.training.step import choose_precision  # noqa: E402

THE_TUTORIAL = "the tutorial's own code"
RECIPES = ("tutorial", "fashion_mnist_fast", "fashion_mnist_best", "digits_best")  # CIFAR-10 takes a GPU
FOLDS = 5
TTA = {"fashion_mnist_best", "cifar10_94"}


class Samples(Dataset):
    """As torchvision.datasets.FashionMNIST reads a sample."""

    transform = ToTensor()

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0].numpy())), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def the_tutorial(seed: int) -> tuple[float, float]:
    """Test accuracy and seconds of five epochs of the loop in the PyTorch quickstart, on the CPU, less its prints.

    https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html
    """
    data = fashion_mnist("data")
    assert isinstance(data.train, tuple) and isinstance(data.test, tuple)
    train_loader, test_loader = (DataLoader(Samples(*part), batch_size=64) for part in (data.train, data.test))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1e-3)
    began, right = time.perf_counter(), 0.0
    for _ in range(5):
        model.train()
        for images, labels in train_loader:
            loss = loss_fn(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        right = 0.0
        with torch.no_grad():
            for images, labels in test_loader:
                logits = model(images)
                loss_fn(logits, labels).item()
                right += (logits.argmax(1) == labels).sum().item()
    return right / len(data.test[1]), time.perf_counter() - began


def fold_of_digits(part: int) -> ImageData:
    """The digits, of each class another fifth for the test: every fifth sample, from number `part` on."""
    whole = digits()
    assert isinstance(whole.train, tuple) and isinstance(whole.test, tuple)
    images, labels = (torch.cat(parts) for parts in zip(whole.train, whole.test, strict=True))
    place = torch.zeros_like(labels)
    for number in range(len(whole.classes)):
        place[labels == number] = torch.arange(int((labels == number).sum()))
    test = place % FOLDS == part
    return ImageData((images[~test], labels[~test]), (images[test], labels[test]), whole.classes)


def train(recipe: str, seed: int, folder: Path) -> tuple[float, float]:
    """Test accuracy and seconds of the epochs, of one run in an empty folder."""
    words = [f"experiment={recipe}", f"seed={seed}", f"name={recipe}_{seed}"]
    if recipe.startswith("digits"):
        words += ["dataset._target_=recipes.fold_of_digits", f"+dataset.part={seed}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    where = {"cwd": folder, "env": environment, "check": True}
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], **where)
    run = folder / "checkpoints" / f"{recipe}_{seed}"
    summary = json.loads((run / "summary.json").read_text())
    if recipe not in TTA:
        return summary["test_accuracy"], summary["seconds"]
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), f"checkpoint={run / 'best.pt'}", "tta=flip"], **where)
    return json.loads((run / "evaluation.json").read_text())["accuracy"], summary["seconds"]


def machine() -> str:
    """The processor, its threads, what precision=auto takes on it, and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name, device = names[0] if names else platform.machine(), choose_device("auto")
    precision = choose_precision("auto", device)
    return f"{name}, {torch.get_num_threads()} threads, device {device}, {precision}, torch {torch.__version__}"


def main() -> None:
    """Print mean and standard deviation of the test accuracy, and the median of the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"{', '.join(RECIPES)} if left out")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3), five folds of the digits")
    asked = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {THE_TUTORIAL: []} | {recipe: [] for recipe in asked.recipes}
    for seed in range(max(asked.seeds, FOLDS)):  # in turns, so that what slows the machine slows them all
        for recipe, runs in found.items():
            if seed >= (FOLDS if recipe.startswith("digits") else asked.seeds):
                continue
            if recipe == THE_TUTORIAL:
                runs.append(the_tutorial(seed))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(train(recipe, seed, Path(folder)))
    print(f"\n{machine()}\n")
    print("| recipe | runs | test accuracy, mean | standard deviation | seconds of the epochs, median |")
    print("| --- | --- | --- | --- | --- |")
    for recipe, runs in found.items():
        accuracy, seconds = zip(*runs, strict=True)
        spread = f"{statistics.stdev(accuracy):.2%}" if len(runs) > 1 else "-"
        figures = f"{statistics.mean(accuracy):.2%} | {spread} | {statistics.median(seconds):.1f}"
        print(f"| {recipe} | {len(runs)} | {figures} |")


if __name__ == "__main__":
    main()
