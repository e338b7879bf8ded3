"""How fast image files are read, what their cache gains, and how much memory a large data set takes.

    python benchmarks/images.py
    python benchmarks/images.py --count 400 --rounds 1 --gigabytes 0.2

- 4,000 made 256x256 JPEGs, resized to 64x64, into a model that costs next to nothing: the first epoch, workers started
  included, beside plain loops that do nothing but decode and resize with as many processes;
- the same from `dataset.cache=true`;
- an epoch over samples that lie on disk as bytes, at least 3 GB, and the program's own (anonymous) memory meanwhile;
- a folder of 200,000 images (hard links) in 1,000 classes: how long it takes to list, beside `os.walk` alone, and how
  many bytes are kept of each image.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.process import keep_memory, spin  # noqa: E402

spin()  # as the program does, before torch is imported; here, and so is memory, to the good of all
keep_memory()

import numpy as np  # noqa: E402  (the project is found first)
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.io import decode_jpeg, read_file  # noqa: E402
from torchvision.transforms.v2.functional import resize  # noqa: E402

import datasets  # noqa: E402
from engine.data.batches import Batches  # noqa: E402
from engine.data.devices import cores  # noqa: E402
from engine.data.images import MAX_PIXELS  # noqa: E402
from engine.data.splits import load_splits  # noqa: E402

SIDE, TARGET, CLASSES, BATCH = 256, 64, 10, 64
RUN = {"batch_size": BATCH, "seed": 0, "shuffle": True, "drop_last": False, "limit_batches": None, "num_workers": None}
SETTINGS = {"val_fraction": 0.0, "limit": None, "target_transform": None, "steps_per_epoch": None}
RESIZE = [{"Resize": {"size": [TARGET, TARGET]}}]


def make_images(folder: Path, count: int) -> None:
    """JPEGs with about as much in them as photographs of this size, in `train/` with a folder a class, and a test/."""
    rng = np.random.default_rng(0)
    for number in range(count + CLASSES):
        part = "train" if number < count else "test"
        directory = folder / part / f"class{number % CLASSES}"
        directory.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 8, (SIDE, SIDE, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(directory / f"{number}.jpg", quality=90)


# ---------------------------------------------------------------------------------------------------------------------
# Plain loops: decode and resize, nothing else


def with_pillow(path: str) -> None:
    """Whole decode."""
    with Image.open(path) as image:
        np.asarray(image.convert("RGB").resize((TARGET, TARGET), Image.Resampling.BILINEAR))


def with_pillow_draft(path: str) -> None:
    """Decoded at a half, where that leaves twice the target, as `read_image` does."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * TARGET, 2 * TARGET))
        np.asarray(image.convert("RGB").resize((TARGET, TARGET), Image.Resampling.BILINEAR))


def with_torchvision(path: str) -> None:
    """torchvision's decoder and resize."""
    resize(decode_jpeg(read_file(path)), [TARGET, TARGET])


def plain_loop(decode: Callable[[str], None], paths: list[str]) -> None:
    """Decode everything in as many processes as there are cores."""
    with multiprocessing.get_context("fork").Pool(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.imap_unordered(decode, paths, chunksize=BATCH):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# This project


class NextToNothing(nn.Module):
    """One linear layer on 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, 3 * 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[2] // 4
        few = images[:, :, ::side, ::side].flatten(1)
        return (few[:, None] * self.weight).sum(2)  # too small to be done in parallel


def train_on(batches: Batches, epoch: int, watch: Callable[[], None] = lambda: None) -> None:
    """An epoch of the plain loop."""
    model = NextToNothing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for images, labels in batches.epoch(epoch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        watch()


def folder_batches(root: Path, cache: bool) -> Batches:
    """Batches of `dataset=image_folder`."""
    settings = {
        **SETTINGS,
        "_target_": "datasets.image_folder",
        "root": str(root),
        "test_fraction": 0.2,
        "channels": 3,
        "max_pixels": MAX_PIXELS,
        "skip_unreadable": False,
        "cache": cache,
        "cache_dir": str(root / "cache"),
        "train_transforms": RESIZE,
        "eval_transforms": RESIZE,
    }
    splits, _ = load_splits(settings, only="train")
    return Batches(splits["train"], RESIZE, torch.device("cpu"), training=True, **RUN)


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_files(count: int, rounds: int) -> None:
    """Time the plain loops, the first epoch from files, and epochs from the cache, in turns; print the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root, count)
        paths = [str(path) for path in sorted((root / "train").glob("*/*.jpg"))]
        size = statistics.mean(os.path.getsize(path) for path in paths) / 1024
        print(f"{count:,} JPEGs of {SIDE}x{SIDE}, {size:.0f} KB each, to {TARGET}x{TARGET}, batch {BATCH}")
        print(f"{cores()} processes, {rounds} rounds")
        building = seconds(lambda: folder_batches(root, cache=True))
        loops: dict[str, Callable[[], Any]] = {
            "plain loop, Pillow": lambda: plain_loop(with_pillow, paths),
            "plain loop, Pillow with draft": lambda: plain_loop(with_pillow_draft, paths),
            "plain loop, torchvision": lambda: plain_loop(with_torchvision, paths),
            "this project, first epoch": lambda: train_on(folder_batches(root, cache=False), 1),
            "this project, from the cache": lambda: train_on(folder_batches(root, cache=True), 1),
        }
        gc.freeze()  # as train.py does, here to the good of all
        times: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(rounds):
            for name in list(loops) if number % 2 == 0 else list(loops)[::-1]:
                times[name].append(seconds(loops[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(median for name, median in medians.items() if name.startswith("plain"))
    first = medians["this project, first epoch"]
    print(f"{'':<32} seconds (fastest to slowest)    images/s   speed, fastest plain loop = 1")
    for name, median in medians.items():
        spread = f"({min(times[name]):.2f} to {max(times[name]):.2f})"
        print(f"{name:<32} {median:7.2f} {spread:<20} {count / median:11,.0f} {fastest / median:10.2f}")
    gain = first / medians["this project, from the cache"]
    print(f"from the cache {gain:.1f} times the speed of the first epoch; making it took {building:.2f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def mapped(path: str, count: int) -> datasets.ImageData:
    """Samples in a file of bytes, mapped into memory: what a function for a data set larger than memory looks like."""
    pixels = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=(count, 3, 96, 96)))
    labels = torch.arange(count) % CLASSES
    return datasets.ImageData((pixels, labels), (pixels[:10], labels[:10]), [str(c) for c in range(CLASSES)])


def anonymous_memory() -> float:
    """This process's resident memory that is backed by no file, in GB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def measure_memory(gigabytes: float) -> None:
    """Make the file and train an epoch over it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.uint8"
        rng = np.random.default_rng(0)
        count = int(gigabytes * 1e9 / (3 * 96 * 96)) + 1
        block = rng.integers(0, 256, (1000, 3, 96, 96), dtype=np.uint8)
        with path.open("wb") as file:
            for start in range(0, count, 1000):
                file.write(block[: min(1000, count - start)].tobytes())
        print(f"\n{count:,} samples of 3x96x96, {path.stat().st_size / 1e9:.2f} GB on disk")
        subprocess.run([sys.executable, __file__, "--epoch-over", str(path), "--count", str(count)], check=True)


def epoch_over(path: str, count: int) -> None:
    """One epoch over the mapped file, watching the memory; print how it went."""
    settings = {**SETTINGS, "_target_": f"{__name__}.mapped", "path": path, "count": count}
    augment = ["RandomHorizontalFlip", {"Normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}]
    splits, _ = load_splits({**settings, "train_transforms": augment, "eval_transforms": []})
    batches = Batches(splits["train"], augment, torch.device("cpu"), training=True, **RUN)
    watched: list[float] = []
    steps = 0

    def watch() -> None:
        nonlocal steps
        steps += 1
        if steps % max(1, len(batches) // 50) == 0:
            watched.append(anonymous_memory())

    took = seconds(lambda: train_on(batches, 1, watch))
    print(f"one epoch in {took:.1f} s, {count / took:,.0f} images/s")
    middle = len(watched) // 2
    print(
        f"anonymous memory: {watched[0]:.3f} GB after the first fiftieth, {watched[middle]:.3f} GB in the middle, "
        f"{watched[-1]:.3f} GB at the end, {max(watched):.3f} GB at most"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def measure_listing(count: int, rounds: int) -> None:
    """Time `image_folder` beside `os.walk`, in turns, and print that and what it keeps."""
    options = {"test_fraction": 0.2, "channels": 3, "max_pixels": MAX_PIXELS}
    with tempfile.TemporaryDirectory() as folder:
        for part, of_class in (("train", count // 1000), ("test", 1)):
            for label in range(1000):
                directory = Path(folder) / part / f"n{label:08}"
                directory.mkdir(parents=True)
                (directory / "0.JPEG").touch()  # a file can only have so many links
                for number in range(1, of_class):
                    os.link(directory / "0.JPEG", directory / f"{directory.name}_{number}.JPEG")

        def walk() -> None:
            for _ in os.walk(folder):
                pass

        times: dict[str, list[float]] = {"os.walk alone": [], "this project": []}
        for _ in range(rounds):
            times["os.walk alone"].append(seconds(walk))
            times["this project"].append(seconds(lambda: datasets.image_folder(folder, **options)))
        tracemalloc.start()
        data = datasets.image_folder(folder, **options)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        kept += data.train.targets.nbytes + data.test.targets.nbytes  # torch's memory is not traced
        alone, ours = (statistics.median(values) for values in times.values())
        images = len(data.train) + len(data.test)
        print(
            f"\n{images:,} files in 1,000 classes, {rounds} rounds: os.walk alone {alone:.3f} s, listed in {ours:.3f} s"
        )
        print(f"{ours / alone:.2f} times os.walk; {kept / images:.0f} bytes kept an image")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="image files (4,000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each loop is measured (5)")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the data set on disk (3)")
    parser.add_argument("--files", type=int, default=200_000, help="files that are listed (200,000)")
    parser.add_argument("--epoch-over", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epoch_over:
        epoch_over(arguments.epoch_over, arguments.count)
        return
    measure_files(arguments.count, arguments.rounds)
    measure_memory(arguments.gigabytes)
    measure_listing(arguments.files, arguments.rounds)


if __name__ == "__main__":
    main()
