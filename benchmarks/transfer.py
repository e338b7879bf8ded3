"""What trained weights are worth where images are few: `python benchmarks/transfer.py` prints a table, a row a way.

A ResNet-18 (with the stem for large images, a sixteenth of the work of the other, so that two cores take minutes) is
trained on images of Fashion-MNIST's first five classes. Then the other five are learned from 20 images each: from
random weights; from its best.pt with all but the last layer frozen (`freeze=backbone`); from its best.pt at the rates
of the random one (`init_from=` alone); and from it by the recipe (`experiment=finetune`), the last layer first. All see
the same images, as often, with the same optimizer and shifts and flips. Every seed draws other images and other
weights; the test is the same for all. Every way is a `python train.py -m seed=0,1,2,3,4 ...` that a user could type.
Two more are the recipe again, from the same weights in a file laid where torchvision's and timm's are looked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import ImageData, fashion_mnist  # noqa: E402

FEW = 20  # images of each class to learn from
COMMON = [
    *("dataset=fashion_mnist", "precision=fp32", "optimizer=adamw", "optimizer.weight_decay=0.01"),
    "dataset.val_fraction=0.0",
    "dataset.train_transforms=[RandomCrop: {size: 28, padding: 2}, RandomHorizontalFlip, "
    "Normalize: {mean: [0.2860], std: [0.3530]}]",
]
OURS = ["model=resnet18", "model.small_images=false"]
BY_TIMM = "the recipe, timm's loading"
BEGUN = "init_from=checkpoints/first/best.pt"
RATE = "optimizer.lr=1e-3"  # where everything learns alike
WAYS = {
    "from scratch": [*OURS, RATE],
    "frozen features": [*OURS, BEGUN, "freeze=backbone", "optimizer.lr=1e-2"],  # few steps for one layer
    "fine-tuning, init_from alone": [*OURS, BEGUN, RATE],
    "fine-tuning, the recipe": ["experiment=finetune", *OURS, BEGUN],
    "the recipe, torchvision's loading": [
        *("experiment=finetune", "model=torchvision", "model.name=resnet18", "model.weights=DEFAULT"),
    ],
}
if importlib.util.find_spec("timm"):
    WAYS[BY_TIMM] = [
        *("experiment=finetune", "model=timm", "model.name=resnet18.a1_in1k", "model.pretrained=true"),
    ]


def some(classes: range, train: int, test: int, seed: int) -> ImageData:
    """So many images of each of these classes of Fashion-MNIST: drawn for training, the first ones of the test set."""
    whole = fashion_mnist(str(ROOT / "data"))
    assert isinstance(whole.train, tuple) and isinstance(whole.test, tuple)
    generator, parts = torch.Generator().manual_seed(seed), []
    for (images, labels), count, drawn in ((whole.train, train, True), (whole.test, test, False)):
        chosen = []
        for number in classes:
            places = (labels == number).nonzero().flatten()
            chosen.append(places[torch.randperm(len(places), generator=generator)[:count]] if drawn else places[:count])
        places = torch.cat(chosen)
        parts.append((images[places], labels[places] - classes.start))
    return ImageData(*parts, classes=[whole.classes[number] for number in classes])


def first_five(root: str, train: int, test: int) -> ImageData:
    """T-shirt/top, Trouser, Pullover, Dress, Coat."""
    return some(range(5), train, test, seed=0)


def other_five(root: str, draw: int, test: int) -> ImageData:
    """Sandal, Shirt, Sneaker, Bag, Ankle boot."""
    return some(range(5, 10), FEW, test, seed=draw)


def run(folder: Path, name: str, *words: str) -> list[float]:
    """Test accuracies of a run, or of those of a sweep, in a folder."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_CACHE": "hub", "TORCH_HOME": "torch"}
    command = [sys.executable, str(ROOT / "train.py"), f"name={name}", *COMMON, *words]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    summaries = (folder / "checkpoints" / name).glob("**/summary.json")
    return [json.loads(file.read_text())["test_accuracy"] for file in summaries]


def lay(folder: Path) -> None:
    """Put the weights of the first run where the caches of torch and of the hub have theirs, as of colour images."""
    best = torch.load(folder / "checkpoints/first/best.pt", weights_only=True)["model"]
    state = {name.removeprefix("resnet."): tensor for name, tensor in best.items()}
    state["conv1.weight"] = (state["conv1.weight"] / 3).repeat(1, 3, 1, 1)
    cache = folder / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(state, cache / "resnet18-f37072fd.pth")
    if BY_TIMM in WAYS:
        from safetensors.torch import save_file

        cache = folder / "hub/models--timm--resnet18.a1_in1k/snapshots/main"
        cache.mkdir(parents=True)
        save_file(state, cache / "model.safetensors")


def main() -> None:
    """Print mean and standard deviation of the test accuracy of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each way (5)")
    parser.add_argument("--images", type=int, default=6000, help="of each of the first classes, at most 6000 (6000)")
    parser.add_argument("--first-epochs", type=int, default=5, help="over those (5)")
    parser.add_argument("--epochs", type=int, nargs="+", default=[8, 20], help="over the few images (8 and 20)")
    parser.add_argument("--test", type=int, default=1000, help="test images of each class, at most 1000 (1000)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = run(
            *(folder, "first", *OURS, "dataset._target_=transfer.first_five", f"+dataset.train={asked.images}"),
            *(f"+dataset.test={asked.test}", f"epochs={asked.first_epochs}", "batch_size=256"),
            *("optimizer.lr=2e-3", "scheduler=one_cycle"),
        )
        lay(folder)
        seeds = ",".join(map(str, range(asked.seeds)))
        few = ["dataset._target_=transfer.other_five", "+dataset.draw=${seed}", f"+dataset.test={asked.test}"]
        found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for epochs in asked.epochs:
            for way, words in WAYS.items():
                later = [f"unfreeze_epoch={max(2, epochs // 5)}"] if "experiment=finetune" in words else []
                name = f"{epochs}_" + "".join(letter if letter.isalpha() else "_" for letter in way)
                length = ["batch_size=20", f"epochs={epochs}"]
                found[way].append(run(folder, name, "-m", f"seed={seeds}", *few, *length, *words, *later))
    print(f"\nfirst five classes: {asked.images} images each, {asked.first_epochs} epochs: {first[0]:.2%}")
    print(f"other five classes: {FEW} images each, {asked.test} in the test; mean and standard deviation of {seeds=}\n")
    print("| way |" + "".join(f" {epochs} epochs |" for epochs in asked.epochs))
    print("| --- |" + " --- |" * len(asked.epochs))
    for way, columns in found.items():
        spread = [f"± {statistics.stdev(reached):.2%}" if len(reached) > 1 else "" for reached in columns]
        cells = [f" {statistics.mean(reached):.2%} {of} |" for reached, of in zip(columns, spread, strict=True)]
        print(f"| {way} |" + "".join(cells))


if __name__ == "__main__":
    main()
