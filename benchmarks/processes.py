"""Several processes of one run beside one: `python benchmarks/processes.py` prints images a second of `train.py`.

On the CPU two processes of one thread each and one process of one thread, on GPUs as many processes as there are and
one. Both train the CNN on Fashion-MNIST with the same batch size, the whole program as it is started from a shell. They
take turns; each round's ratio is of two neighbours, as speeds of shared machines change within minutes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def images_per_second(processes: int, settings: Sequence[str], folder: Path, name: str) -> float:
    """The median over a run's epochs but the first one, with all its processes together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, str(ROOT / "train.py"), f"name={name}", *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    with (folder / "checkpoints" / name / "metrics.csv").open() as file:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the speeds and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of one run each (5)")
    parser.add_argument("--epochs", type=int, default=4, help="of a run; the first does not count (4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda if there is more than one GPU")
    parser.add_argument(
        "settings", nargs="*", help="of train.py, in place of those above (batch_size=128 limit_batches=160)"
    )
    asked = parser.parse_args(arguments)
    import torch

    gpus = torch.cuda.device_count()
    device = asked.device or ("cuda" if gpus > 1 else "cpu")
    processes = gpus if device == "cuda" else 2
    settings = ["model=cnn", "dataset=fashion_mnist", f"dataset.root={ROOT / 'data'}", f"device={device}"]
    settings += [f"epochs={asked.epochs}", "batch_size=512", "limit_batches=40"]
    settings += ["num_threads=1"] * (device == "cpu")
    kept = [own for own in settings if own.partition("=")[0] not in {a.partition("=")[0] for a in asked.settings}]
    each = "one thread" if device == "cpu" else "one GPU"
    print(f"{'round':<8}{f'1 process of {each}':>28}{f'{processes} processes':>20}{'ratio':>9}   (images/s)")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, asked.rounds + 1):
            one, several = (
                images_per_second(count, [*kept, *asked.settings], Path(folder), f"run{number}-{count}")
                for count in (1, processes)
            )
            ratios.append(several / one)
            print(f"{number:<8}{one:>28,.0f}{several:>20,.0f}{ratios[-1]:>9.2f}", flush=True)
    print(f"median  {statistics.median(ratios):>56.2f}   (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
