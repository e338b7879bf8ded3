"""What saving costs: `python benchmarks/saving.py` prints the share of a CNN epoch that best.pt and last.pt take.

Both are written after every epoch at the default settings, flushed to the disk. On Fashion-MNIST where the Debian
package dataset-fashion-mnist has it, else on random images of that shape; epochs and savings alternate.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import datasets
from engine.data.batches import Batches
from engine.data.splits import Split
from engine.run import checkpoint
from engine.run.saver import Saver
from engine.run.state import Progress, RandomStates
from engine.training.metrics import Tally
from engine.training.schedules import cosine
from models.cnn import CNN


def main(repeats: int = 5) -> None:
    """Train `repeats` epochs, save after each, print the medians and their ratio."""
    if Path("/usr/share/datasets/fashion-mnist").is_dir():
        images, labels = datasets.fashion_mnist(root="data").train
    else:
        images = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (60_000,))
    split = Split((images, labels), torch.arange(len(labels)), 10)
    batches = Batches(split, [], torch.device("cpu"), batch_size=128, training=True)
    model = CNN((1, 28, 28), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    tally, progress = Tally(torch.device("cpu")), Progress()
    schedule = cosine(optimizer, repeats * len(batches), len(batches))
    parts = {"model": model, "optimizer": optimizer, "scheduler": schedule, "tally": tally, "progress": progress}
    about = {"format": checkpoint.FORMAT, "config": {"batch_size": 128}, "classes": [], "input_shape": [1, 28, 28]}
    training, saving = [], []
    with tempfile.TemporaryDirectory(dir="checkpoints") as folder:
        saver = Saver(Path(folder), about, {**parts, "random": RandomStates()}, None, None)
        for epoch in range(1, repeats + 1):
            began = time.perf_counter()
            for inputs, targets in batches.epoch(epoch):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained = time.perf_counter()
            progress.best = {"epoch": epoch}
            saver.check_finite()
            saver.save_epoch(best=True)
            training.append(trained - began)
            saving.append(time.perf_counter() - trained)
    epoch_time, save_time = statistics.median(training), statistics.median(saving)
    share = save_time / epoch_time
    print(f"CNN epoch {epoch_time:.2f} s, saving best.pt and last.pt {save_time * 1000:.0f} ms: {share:.2%}")


if __name__ == "__main__":
    main()
