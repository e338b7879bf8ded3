"""How fast predict.py is, beside the plain decoding of the same files: `python benchmarks/predict_rate.py`.

Writes 10,000 small PNG files into a temporary folder, then takes turns: decoding alone (the same reading in the same
number of processes, nothing done with the images), and predicting with the default model on the CPU, lines of text
included; a larger model takes its own time on top. What is printed is the best of the turns of each, in images a
second, and their ratio. Settings: images=10000 size=28 turns=3 workers=2.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import predict
from engine.data.images import MAX_PIXELS, read_image
from models.mlp import MLP

CLASSES = [f"class {number}" for number in range(10)]
BATCH = 256


class Decoded(Dataset):
    """The images, read and nothing else."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_image(self.paths[index], 1)


def decode(paths: list[Path], workers: int) -> None:
    """Read every image in worker processes."""
    for _ in DataLoader(Decoded(paths), BATCH, num_workers=workers, collate_fn=torch.stack):
        pass


def decode_here(paths: list[Path]) -> None:
    """Read every image in this process."""
    for path in paths:
        read_image(path, 1)


def predict_all(model: torch.nn.Module, paths: list[Path], size: int, workers: int) -> None:
    """What predict.py does, its lines written to nowhere."""
    images = predict.Images(paths, (1, size, size), [{"Normalize": {"mean": [0.3], "std": [0.3]}}], MAX_PIXELS)
    layout = predict.Layout(map(str, paths), CLASSES, with_truth=False)
    truths = [predict.true_class(path, CLASSES) for path in paths]
    classifier = predict.Classifier(model, images, CLASSES, 3, torch.device("cpu"))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for batch in predict.predicted(classifier, truths, BATCH, workers):
            nowhere.write("\n".join(layout.line(prediction) for prediction in batch))


def seconds(work: Callable[..., None], *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    given = dict(argument.split("=") for argument in sys.argv[1:])
    count, size, turns = (int(given.get(name, n)) for name, n in (("images", 10_000), ("size", 28), ("turns", 3)))
    workers = int(given.get("workers", os.cpu_count() or 1))
    torch.manual_seed(0)
    model = MLP((1, size, size), 10, hidden=[512, 512]).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(count)]
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        best: dict[str, float] = {}
        for _ in range(turns):  # in turns, so that what else the machine does hits all alike
            times = {"decoding here": seconds(decode_here, paths)}
            times["decoding in workers"] = seconds(decode, paths, workers)
            times["predicting"] = seconds(predict_all, model, paths, size, workers)
            best = {name: min(taken, best.get(name, taken)) for name, taken in times.items()}
    print(f"{count:,} images of {size}x{size}, {workers} workers, best of {turns}")
    for name, taken in best.items():
        print(f"{name:<20} {count / taken:9,.0f} images/s  {best['decoding in workers'] / taken:5.2f} of decoding")


if __name__ == "__main__":
    main()
