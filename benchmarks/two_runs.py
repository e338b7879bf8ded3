"""Two runs at once on one machine beside one alone: `python benchmarks/two_runs.py` prints images a second.

Each run is a `python train.py` of its own, on Fashion-MNIST (from the Debian package) with the CNN at batch 64. Of two
runs the rate is that of epochs which both trained at the same time. The ways take turns; medians over the rounds.

    one alone            as the program starts by itself
    one that spins       GOMP_SPINCOUNT=10000, as every run did before: a run alone should lose nothing
    two, both spinning   what looking for another run is there to prevent
    two, same second     started together, as the program does by itself
    two, 5 s apart       the second after the first has begun
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ["model=cnn", "dataset=fashion_mnist", "batch_size=64", "dataset.val_fraction=0", "dataset.limit=20000"]


def start(folder: Path, name: str, epochs: int, spins: str | None) -> subprocess.Popen[bytes]:
    """Begin a run in a folder; `spins` None leaves the choice to the program."""
    kept = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment = kept | ({"GOMP_SPINCOUNT": spins} if spins else {}) | {"TMPDIR": str(folder)}
    command = [sys.executable, str(ROOT / "train.py"), *RUN, f"epochs={epochs}", f"name={name}"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def epochs_of(folder: Path, name: str) -> list[dict[str, float]]:
    """The rows of a run's metrics, as numbers."""
    with (folder / "checkpoints" / name / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def one(spins: str | None, epochs: int) -> float:
    """Images a second of a run alone, its first epoch left out."""
    folder = Path(tempfile.mkdtemp())
    start(folder, "one", epochs, spins).wait()
    rate = statistics.median(row["images_per_second"] for row in epochs_of(folder, "one")[1:])
    shutil.rmtree(folder)
    return rate


def two(spins: str | None, epochs: int, seconds: float) -> float:
    """Images a second of two runs together; the second is begun so many seconds after the first.

    Both train until they are stopped. Counted are the epochs that began after both had trained one.
    """
    folder = Path(tempfile.mkdtemp())
    names = ("first", "second")
    processes = []
    for name in names:
        processes.append(start(folder, name, 10_000, spins))
        time.sleep(seconds if name == "first" else 0)
    while any(not (folder / "checkpoints" / name / "metrics.csv").exists() for name in names):
        time.sleep(0.2)
    before = {name: len(epochs_of(folder, name)) for name in names}
    while any(len(epochs_of(folder, name)) < before[name] + epochs for name in names):
        time.sleep(0.2)
    rows = {name: epochs_of(folder, name)[before[name] : before[name] + epochs] for name in names}
    for process in processes:
        process.terminate()
        process.wait()
    shutil.rmtree(folder)
    return sum(statistics.median(row["images_per_second"] for row in rows[name]) for name in names)


def main() -> None:
    """Print the medians, and each as a multiple of one run alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all ways (3)")
    parser.add_argument("--epochs", type=int, default=3, help="counted of each run (3)")
    asked = parser.parse_args()
    ways = {
        "one alone": lambda: one(None, asked.epochs + 1),
        "one that spins": lambda: one("10000", asked.epochs + 1),
        "two, both spinning": lambda: two("10000", asked.epochs, 0),
        "two, same second": lambda: two(None, asked.epochs, 0),
        "two, 5 s apart": lambda: two(None, asked.epochs, 5),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for way, measure in ways.items():
            rates[way].append(measure())
    alone = rates["one alone"]
    print(f"{'':<20} images/s  of one alone (median of {asked.rounds} rounds)")
    for way, found in rates.items():
        share = statistics.median(rate / base for rate, base in zip(found, alone, strict=True))
        print(f"{way:<20} {statistics.median(found):>8,.0f}  {share:.2f}")


if __name__ == "__main__":
    main()
