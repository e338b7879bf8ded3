"""How fast image files are read, what their cache gains, how much memory a large data set takes, how long it is listed.

    python benchmarks/images.py
    python benchmarks/images.py small photographs large --rounds 9
    python benchmarks/images.py memory
    python benchmarks/images.py listing

Loops that are compared take turns, and a ratio is the median of those of the turns. The sections:

- small, photographs, large: made JPEGs, 4,000 of 256x256 resized to 64x64, 2,000 of 500x375 to 224x224, and 40 of
  4000x3000 to 224x224, into a model that costs next to nothing: the first epoch, workers started included, evaluation,
  which decodes whole images, and an epoch from `dataset.cache=true`, beside plain loops that do nothing but decode and
  resize with as many processes. simplejpeg, and PyTurboJPEG with its library, take part where they are installed;
- memory: an epoch over samples that lie on disk as bytes, 3 GB, and the program's own (anonymous) memory meanwhile;
- listing: a folder of 1,280,000 images (hard links) in 1,000 classes, beside `os.walk` alone, and a CSV file of them in
  an order drawn at random, beside `os.walk` and `csv.reader` that nothing is done with, and beside the shortest program
  that finds out whether each is there; how many bytes are kept of each image.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.process import keep_memory, spin  # noqa: E402

spin()  # as the program does, before torch is imported; here, and so is memory, to the good of all
keep_memory()

import numpy as np  # noqa: E402  (the project is found first)
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.io import decode_jpeg, read_file  # noqa: E402
from torchvision.transforms.v2.functional import resize  # noqa: E402

import datasets  # noqa: E402
from engine.data.batches import Batches  # noqa: E402
from engine.data.devices import cores  # noqa: E402
from engine.data.images import MAX_PIXELS  # noqa: E402
from engine.data.splits import fingerprint, load_splits  # noqa: E402

CLASSES, BATCH = 10, 64
RUN = {"batch_size": BATCH, "seed": 0, "shuffle": True, "drop_last": False, "limit_batches": None, "num_workers": None}
SETTINGS = {"val_fraction": 0.0, "limit": None, "target_transform": None, "steps_per_epoch": None}


@dataclass(frozen=True)
class Pictures:
    """What the JPEGs of a section are: how many of which size, and how large they become."""

    count: int
    width: int
    height: int
    target: int


SECTIONS = {
    "small": Pictures(4000, 256, 256, 64),
    "photographs": Pictures(2000, 500, 375, 224),
    "large": Pictures(40, 4000, 3000, 224),
}


def made(pictures: Pictures, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Pictures that compress about as photographs do, without an end.

    Each is a window of one large picture whose amplitudes fall with the frequency, as those of photographs do (Field,
    J. Opt. Soc. Am. A 4 (1987)), with the colours less strong than the light; some have things with edges in them, and
    all the noise of a sensor.
    """
    height, width = pictures.height, pictures.width
    rows, columns = height + 400, width + 400
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None] * rows, np.fft.rfftfreq(columns) * columns)
    frequency[0, 0] = np.inf
    waves = [np.fft.rfft2(rng.normal(size=(rows, columns))) / frequency for _ in range(3)]
    light, blue, red = (np.fft.irfft2(wave, (rows, columns)).astype(np.float32) for wave in waves)
    light, blue, red = (part / part.std() for part in (light, blue, red))
    large = 120 + 50 * light[:, :, None] + 12 * np.stack([red, -0.3 * red - 0.2 * blue, blue], axis=2)
    noise = rng.normal(0, 2, (rows, columns, 1)).astype(np.float32)
    while True:
        (y, x), (y2, x2) = rng.integers(0, 401, (2, 2))
        pixels = large[y : y + height, x : x + width] + noise[y2 : y2 + height, x2 : x2 + width]
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        for _ in range(int(rng.integers(0, 4))):
            left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
            box = (left, top, left + int(rng.integers(9, width)), top + int(rng.integers(9, height)))
            ImageDraw.Draw(image).ellipse(box, outline=tuple(rng.integers(0, 256, 3).tolist()), width=3)
        yield image


def make_images(folder: Path, pictures: Pictures) -> int:
    """Write JPEGs of quality 90 into `train/`, with a folder a class, and a test/; the mean size of a file."""
    sizes = []
    for number, image in enumerate(islice(made(pictures, np.random.default_rng(0)), pictures.count + CLASSES)):
        directory = folder / ("train" if number < pictures.count else "test") / f"class{number % CLASSES}"
        directory.mkdir(parents=True, exist_ok=True)
        image.save(directory / f"{number}.jpg", quality=90)
        sizes.append((directory / f"{number}.jpg").stat().st_size)
    return round(statistics.mean(sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Plain loops: decode and resize, nothing else

Decode = Callable[[str, int], object]


def with_pillow(path: str, target: int) -> object:
    """Whole decode."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((target, target), Image.Resampling.BILINEAR))


def with_pillow_draft(path: str, target: int) -> object:
    """Decoded at reduced size, where that leaves twice the target, as Pillow's `thumbnail` does."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * target, 2 * target))
        return np.asarray(image.convert("RGB").resize((target, target), Image.Resampling.BILINEAR))


def with_torchvision(path: str, target: int) -> object:
    """torchvision's decoder and resize."""
    return resize(decode_jpeg(read_file(path)), [target, target])


def resized(pixels: np.ndarray, target: int) -> object:
    """torchvision's resize of pixels `[height, width, 3]`."""
    return resize(torch.from_numpy(pixels).permute(2, 0, 1), [target, target])


def with_simplejpeg(path: str, target: int) -> object:
    """simplejpeg's decoder, torchvision's resize."""
    return resized(simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB"), target)


def with_turbojpeg(path: str, target: int) -> object:
    """PyTurboJPEG's decoder, torchvision's resize."""
    return resized(turbo.decode(Path(path).read_bytes(), pixel_format=turbojpeg.TJPF_RGB), target)


PLAIN: dict[str, Decode] = {
    "Pillow": with_pillow,
    "Pillow with draft": with_pillow_draft,
    "torchvision": with_torchvision,
}
if importlib.util.find_spec("simplejpeg"):
    import simplejpeg

    PLAIN["simplejpeg"] = with_simplejpeg
if importlib.util.find_spec("turbojpeg"):
    import turbojpeg

    with suppress(RuntimeError):  # its library is not installed
        turbo = turbojpeg.TurboJPEG()
        PLAIN["PyTurboJPEG"] = with_turbojpeg


def plain_loop(decode: Decode, target: int, paths: list[str]) -> None:
    """Decode everything in as many processes as there are cores."""
    work = partial(_nothing_else, decode, target)
    with multiprocessing.get_context("fork").Pool(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.imap_unordered(work, paths, chunksize=min(BATCH, -(-len(paths) // cores() // 4))):
            pass


def _nothing_else(decode: Decode, target: int, path: str) -> None:
    decode(path, target)  # and nothing is sent back


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


def evaluate_on(batches: Batches) -> None:
    """What evaluation does, which decodes JPEGs whole."""
    model = NextToNothing()
    with torch.inference_mode():
        for images, _ in batches.epoch():
            model(images)


def folder_batches(root: Path, pictures: Pictures, cache: bool, training: bool = True) -> Batches:
    """Batches of `dataset=image_folder`, several for each process that reads."""
    target, batch_size = pictures.target, min(BATCH, pictures.count // 8)
    scaled = [{"Resize": {"size": [target, target]}}]
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
        "train_transforms": scaled,
        "eval_transforms": scaled,
    }
    splits, _ = load_splits(settings, only="train")
    return Batches(splits["train"], scaled, torch.device("cpu"), training=training, **{**RUN, "batch_size": batch_size})


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turns(loops: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each loop in each round; every other round goes through them from the last to the first."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops) if number % 2 == 0 else list(loops)[::-1]:
            times[name].append(seconds(loops[name]))
    return times


def ratio(some: list[float], others: list[float]) -> float:
    """The median over the rounds of one loop's seconds by another's."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def measure_files(pictures: Pictures, rounds: int) -> None:
    """Time the plain loops, the first epoch from files, and epochs from the cache, in turns; print the table."""
    target = pictures.target
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_images(root, pictures)
        paths = [str(path) for path in sorted((root / "train").glob("*/*.jpg"))]
        of_size = f"{pictures.width}x{pictures.height}, {size / 1024:.0f} KB each"
        print(f"\n{pictures.count:,} JPEGs of {of_size}, to {target}x{target}, batch {min(BATCH, pictures.count // 8)}")
        print(f"{cores()} processes, {rounds} rounds")
        building = seconds(lambda: folder_batches(root, pictures, cache=True))
        loops: dict[str, Callable[[], Any]] = {
            f"plain loop, {name}": partial(plain_loop, decode, target, paths) for name, decode in PLAIN.items()
        }
        loops["this project, first epoch"] = lambda: train_on(folder_batches(root, pictures, cache=False), 1)
        loops["this project, evaluation"] = lambda: evaluate_on(folder_batches(root, pictures, False, training=False))
        loops["this project, from the cache"] = lambda: train_on(folder_batches(root, pictures, cache=True), 1)
        gc.freeze()  # as train.py does, here to the good of all
        times = in_turns(loops, rounds)
    fastest = min((name for name in times if name.startswith("plain")), key=lambda name: statistics.median(times[name]))
    print(f"{'':<32} seconds (fastest to slowest)    images/s   speed, fastest plain loop = 1")
    for name, values in times.items():
        median, spread = statistics.median(values), f"({min(values):.2f} to {max(values):.2f})"
        speed = ratio(times[fastest], values)
        print(f"{name:<32} {median:7.2f} {spread:<20} {pictures.count / median:11,.0f} {speed:10.2f}")
    gain = ratio(times["this project, first epoch"], times["this project, from the cache"])
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

OF_FILES = {"test_fraction": 0.2, "channels": 3, "max_pixels": MAX_PIXELS}
OF_LIST = {**OF_FILES, "test_annotations_file": None, "classes": None}


def make_folder(top: Path, count: int) -> None:
    """So many files, names of a few that hold nothing, in 1,000 class folders of train/ and of test/."""
    for part, of_class in (("train", count // 1000 - 50), ("test", 50)):
        for label in range(1000):
            directory = top / part / f"n{label:08}"
            directory.mkdir(parents=True)
            (directory / "0.JPEG").touch()  # a file can only have so many links
            for number in range(1, of_class):
                os.link(directory / "0.JPEG", directory / f"{directory.name}_{number}.JPEG")


def write_list(file: Path, top: Path) -> None:
    """A CSV file of the images of train/, each with its folder's name, in an order drawn at random."""
    names = [f"{folder.name}/{name}" for folder in os.scandir(top) for name in os.listdir(folder)]
    random.Random(0).shuffle(names)
    file.write_text("file,label\n" + "".join(f"{name},{name.partition('/')[0]}\n" for name in names))


def walk(top: Path) -> None:
    """os.walk and nothing else."""
    for _ in os.walk(top):
        pass


def walk_and_read(top: Path, file: Path) -> None:
    """os.walk and csv.reader, and nothing is done with what they give."""
    walk(top)
    with file.open(newline="") as opened:
        for _ in csv.reader(opened):
            pass


def compare_by_hand(top: Path, file: Path) -> list[tuple[str, str]]:
    """What a short program does: the rows as a list, and whether each file is there, by a set of all that are."""
    there = {f"{folder}/{name}" for folder, _, names in os.walk(top) for name in names}
    with file.open(newline="") as opened:
        rows = [(f"{top}/{row[0]}", row[1]) for row in csv.reader(opened)]
    return [row for row in rows[1:] if row[0] in there]


def start(settings: dict[str, Any]) -> None:
    """What a training run does with a data set before its first batch."""
    common = {**SETTINGS, "val_fraction": 0.1, "train_transforms": [], "eval_transforms": []}
    splits, _ = load_splits({**common, **settings})
    fingerprint(splits)
    shuffled = [{"Resize": {"size": [224, 224]}}]
    Batches(splits["train"], shuffled, torch.device("cpu"), training=True, **RUN).order(1)


def kept(make: Callable[[], datasets.ImageData]) -> tuple[float, float]:
    """Bytes an image that a data set takes, and what making it took at most."""
    gc.collect()
    tracemalloc.start()
    data = make()
    after, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    images = len(data.train) + len(data.test)
    labels = data.train.targets.nbytes + data.test.targets.nbytes  # torch's memory is not traced
    return (after + labels) / images, (most + labels) / images


def measure_listing(count: int, rounds: int) -> None:
    """Time `image_folder` and `csv_images` beside what they cannot do without, in turns, and print what they keep."""
    with tempfile.TemporaryDirectory() as folder:
        top, file = Path(folder) / "images", Path(folder) / "labels.csv"
        make_folder(top, count)
        write_list(file, top / "train")
        folders = lambda: datasets.image_folder(str(top), **OF_FILES)  # noqa: E731
        listed = lambda: datasets.csv_images(str(file), str(top / "train"), **OF_LIST)  # noqa: E731
        loops: dict[str, Callable[[], Any]] = {
            "os.walk": partial(walk, top),
            "folder": folders,
            "start": lambda: start({"_target_": "datasets.image_folder", "root": str(top), **OF_FILES}),
            "os.walk and csv.reader": partial(walk_and_read, top / "train", file),
            "csv": listed,
            "by hand": partial(compare_by_hand, top / "train", file),
        }
        print(f"\n{count:,} files in 1,000 classes, {rounds} rounds")
        times = in_turns(loops, rounds)
        for what, name, beside, make in (
            ("a folder", "folder", "os.walk", folders),
            ("a CSV file", "csv", "os.walk and csv.reader", listed),
        ):
            seconds_of = [statistics.median(times[one]) for one in (beside, name)]
            print(f"{what}: {beside} alone {seconds_of[0]:.2f} s, listed in {seconds_of[1]:.2f} s, ", end="")
            print(f"{ratio(times[name], times[beside]):.2f} times; ", end="")
            after, most = kept(make)
            print(f"{after:.0f} bytes kept an image, {most:.0f} at most meanwhile")
        print(f"all that a run does with the folder before its first batch: {statistics.median(times['start']):.2f} s")
        by_hand, times_that = statistics.median(times["by hand"]), ratio(times["csv"], times["by hand"])
        print(f"a short program that looks each row up in a set of files: {by_hand:.2f} s; here {times_that:.2f} times")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SECTIONS, "memory", "listing"]
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(known)} (all)")
    parser.add_argument("--count", type=int, help="image files of the JPEG sections (as above)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each loop is measured (5)")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the data set on disk (3)")
    parser.add_argument("--files", type=int, default=1_280_000, help="files that are listed (1,280,000)")
    parser.add_argument("--epoch-over", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epoch_over:
        epoch_over(arguments.epoch_over, arguments.count)
        return
    if unknown := set(arguments.sections) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(known)}")
    for section in arguments.sections or known:
        if section == "memory":
            measure_memory(arguments.gigabytes)
        elif section == "listing":
            measure_listing(arguments.files, arguments.rounds)
        else:
            pictures = SECTIONS[section]
            measure_files(replace(pictures, count=arguments.count or pictures.count), arguments.rounds)


if __name__ == "__main__":
    main()
