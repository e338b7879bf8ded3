"""Two runs at once on one machine beside one alone: `python benchmarks/two_runs.py` prints steps a second.

Each run is a process that trains the CNN on Fashion-MNIST (from the Debian package) with the program's own batches and
step, at batch 64. Speeds of shared machines change within minutes, so both train for some seconds, then one of them is
stopped while the other goes on, then both again, and so on; each ratio is of two such neighbours. For comparison the
same with threads that wait awake all the time and take no turns.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTLES = 3.5  # seconds; longer than a run waits for the turn of one that was stopped


def train(counter: Path, place: int) -> None:
    """Train until killed, and note the number of steps at this place of a file."""
    from engine import process

    process.spin()
    process.keep_memory()
    import torch
    from torch import nn

    import datasets
    from engine.data.batches import Batches
    from engine.data.splits import Split
    from engine.training.step import Step
    from models.cnn import CNN

    process.share_cores(torch.get_num_threads())
    cpu = torch.device("cpu")
    with contextlib.redirect_stdout(sys.stderr):
        part = datasets.fashion_mnist(str(ROOT / "data")).train
    split = Split(part, torch.arange(len(part[0])), 10)
    batches = Batches(split, [], cpu, batch_size=64, seed=0, num_workers=0, training=True)
    model = CNN((1, 28, 28), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = Step(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), cpu, batch_size=64)
    criterion, done = nn.CrossEntropyLoss(), 0
    with counter.open("r+b") as file, mmap.mmap(file.fileno(), 16) as counts:
        for epoch in range(1, 1_000_000):
            for batch in batches.epoch(epoch):
                for images, labels, share in step.micro_batches(*batch, criterion):
                    step.backward(criterion(step.forward(images), labels), share)
                step.update()
                done += 1
                struct.pack_into("q", counts, 8 * place, done)


def ratios(spins: str | None, apart: float, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """(steps a second of two runs together as a multiple of one alone, those of one alone), for each round."""
    folder = Path(tempfile.mkdtemp())
    counter = folder / "counter"
    counter.write_bytes(bytes(16))
    kept = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    kept |= {"TMPDIR": str(folder)} | ({"GOMP_SPINCOUNT": spins} if spins else {})

    def rate() -> float:
        before, start = struct.unpack("qq", counter.read_bytes()), time.monotonic()
        time.sleep(seconds)
        after = struct.unpack("qq", counter.read_bytes())
        return (sum(after) - sum(before)) / (time.monotonic() - start)

    processes = []
    together, alone = [], []
    try:
        for place in (0, 1):
            command = [sys.executable, str(Path(__file__).resolve()), "--train", str(counter), str(place)]
            processes.append(subprocess.Popen(command, env=kept))
            time.sleep(apart * (place == 0))
        while not all(struct.unpack("qq", counter.read_bytes())):
            if any(process.poll() is not None for process in processes):
                raise SystemExit("a run has ended before it trained")
            time.sleep(0.1)
        for number in range(rounds):
            time.sleep(SETTLES)
            both = rate()
            processes[number % 2].send_signal(signal.SIGSTOP)
            time.sleep(SETTLES)
            alone.append(rate())
            together.append(both / alone[-1])
            processes[number % 2].send_signal(signal.SIGCONT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder)
    return together, alone


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each way (10)")
    parser.add_argument("--seconds", type=float, default=4, help="of a measurement (4)")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.train:
        return train(Path(asked.train[0]), int(asked.train[1]))
    ways = {"same second": (None, 0), "5 s apart": (None, 5), "both awake, no turns": ("10000", 0)}
    print(f"{'two runs, started':<21} of one alone (median of {asked.rounds}; from, to)  one alone, steps/s")
    for name, (spins, apart) in ways.items():
        found, alone = ratios(spins, apart, asked.rounds, asked.seconds)
        spread = f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"
        print(f"{name:<21} {spread:<43} {statistics.median(alone):,.0f}", flush=True)


if __name__ == "__main__":
    main()
