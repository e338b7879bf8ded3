"""The datasets: one function each, named by `_target_` in a YAML of configs/dataset/.

A function takes the settings of its YAML and returns an `ImageData`. What every dataset has in common (holding out a
validation part, `limit`, transforms, batches) is done elsewhere: adding one is a function here and a YAML there.

`python datasets.py dataset=...` shows one: a picture of training samples, counts per class, mean and deviation.
"""

from __future__ import annotations

from engine.cli import launch

if __name__ == "__main__":
    launch("datasets")  # answers help, completion and typos, and only then imports torch and calls main() below

import gzip
import io
import math
import os
import pickle
import pickletools
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.annotations import check_labels, count_classes, is_number, labels_of, read_annotations
from engine.errors import RequestError, one_line, printable
from engine.files import open_regular, read_bytes
from engine.folders import Walk, class_folders, compare_classes, one_class, part_folders, some
from engine.images import MAX_PIXELS, read_image, shown
from engine.shares import hold_out

Part = tuple[Tensor, Tensor] | Dataset  # (images uint8 [n, channels, height, width], labels int64 [n]), or any Dataset


@dataclass(frozen=True)
class ImageData:
    """Samples for training and for the final test, and what their labels mean.

    Attributes:
        train, test: `(images, labels)` in memory, uint8 `[n, channels, height, width]` and int64 `[n]`; or a
            `torch.utils.data.Dataset` of `(image, label)`, its images uint8 `[channels, height, width]` (or float, 0 to
            1), its labels class indices or probabilities `[num_classes]`. The labels of a map-style one are in
            `.targets` where they can be had without reading the samples; validation is then held out class by class.
        classes: the class names; label `i` means `classes[i]`.
            A name stands for one class, and there are at least two of them.
        sampler: for an order of training samples other than a shuffle: called every epoch with the indices of the
            training samples (int64 `[n]`, without those held out for validation), returns a `torch` Sampler or any
            iterable with a length, of places in that list: `lambda i: WeightedRandomSampler(weights[i], 1000)`.
        val: samples for validation; None has a share of `train` held out, `dataset.val_fraction`.
    """

    train: Part
    test: Part
    classes: Sequence[str]
    sampler: Callable[[Tensor], Iterable[int]] | None = None
    val: Part | None = None


def main(config: dict[str, Any]) -> None:
    """Show a data set: `python datasets.py dataset=fashion_mnist`."""
    from engine.samples import show  # it imports the loader, which imports this module

    show(config)


# ---------------------------------------------------------------------------------------------------------------------
# Bundled


def digits() -> ImageData:
    """1,797 real handwritten digits, 8x8 (UCI, E. Alpaydin and C. Kaynak, 1998; CC BY 4.0), bundled in data/digits/.

    Every fifth sample of each class is for testing.
    """
    folder = Path(__file__).parent / "data" / "digits"
    grey = read_idx(folder / "digits-images-idx3-ubyte.gz")  # 0 to 16
    images = (grey.float() * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = read_idx(folder / "digits-labels-idx1-ubyte.gz").long()
    place = torch.stack([(labels == c).cumsum(0) for c in range(10)])[labels, torch.arange(len(labels))]  # within class
    test = place % 5 == 0
    return ImageData((images[~test], labels[~test]), (images[test], labels[test]), [str(c) for c in range(10)])


# ---------------------------------------------------------------------------------------------------------------------
# The MNIST family


def mnist(root: str) -> ImageData:
    """Handwritten digits (Y. LeCun, C. Cortes, C. J. C. Burges)."""
    return _mnist_family("MNIST", root, [str(c) for c in range(10)])


def fashion_mnist(root: str) -> ImageData:
    """Pictures of clothes (Xiao, Rasul, Vollgraf, arXiv:1708.07747), also from the Debian package of that name."""
    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return _mnist_family("FashionMNIST", root, classes, Path("/usr/share/datasets/fashion-mnist"))


def kmnist(root: str) -> ImageData:
    """Cursive Japanese characters (Clanuwat et al., arXiv:1812.01718)."""
    return _mnist_family("KMNIST", root, ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"])


def _mnist_family(name: str, root: str, classes: list[str], also: Path | None = None) -> ImageData:
    """Read the four IDX files of a data set of this family, downloading them with torchvision where missing."""
    folder = Path(root) / name / "raw"
    files = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]

    def find(directory: Path) -> list[Path]:
        found = [path for file in files for path in (directory / file, directory / f"{file}.gz") if path.is_file()]
        return sorted(found, key=lambda path: files.index(path.name.removesuffix(".gz")))

    def complete(directory: Path) -> bool:
        return len({path.name.removesuffix(".gz") for path in find(directory)}) == len(files)

    source = next((d for d in (folder, also) if d is not None and complete(d)), None)
    if source is None:
        layout = f"{folder}/ with {', '.join(files)} (also as .gz)"
        _download(name, root, layout)
        source = folder
    by_name = {path.name.removesuffix(".gz"): path for path in reversed(find(source))}
    train_images, train_labels, test_images, test_labels = (read_idx(by_name[file]) for file in files)
    for images, labels, file in ((train_images, train_labels, files[0]), (test_images, test_labels, files[2])):
        if len(images) != len(labels):
            raise RequestError(f"{by_name[file]}: {len(images)} images, but {len(labels)} labels beside it")
    return ImageData(
        (train_images.unsqueeze(1), train_labels.long()), (test_images.unsqueeze(1), test_labels.long()), classes
    )


MOST_BYTES = 1 << 29  # of images in an IDX file; the largest of these data sets has 47 million


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, plain or gzipped, as a uint8 tensor of the shape in its header.

    Format: the end of http://yann.lecun.com/exdb/mnist/ (magic 0 0 8 ndim, then ndim big-endian sizes, then the data).
    Not more is read, or decompressed, than the header says.

    Raises:
        RequestError: the file is damaged or of another format.
    """
    remedy = "delete it and run again" if path.is_relative_to(Path.cwd()) or not path.is_absolute() else "replace it"
    try:
        with open_regular(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            magic = file.read(4)
            dimensions = magic[3] if len(magic) == 4 else 0
            sizes = file.read(4 * dimensions)
            if magic[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
                raise RequestError(f"{shown(path)}: not an IDX file of bytes; {remedy}")
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            count = math.prod(shape)
            if count > MOST_BYTES:
                raise RequestError(f"{shown(path)}: its header says shape {shape}, {count:,} bytes; {remedy}")
            data = bytearray(file.read(count))
            more = file.read(1)  # also makes gzip compare its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{shown(path)}: cannot be read ({one_line(error)}); {remedy}") from None
    if len(data) != count or more:
        found = f"found {'more' if more else len(data)}"
        raise RequestError(
            f"{shown(path)}: damaged: expected {count} bytes of data for shape {shape}, {found}; {remedy}"
        )
    return torch.frombuffer(data, dtype=torch.uint8).view(shape) if data else torch.zeros(shape, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR


def cifar10(root: str) -> ImageData:
    """Photographs of 10 kinds of things, 32x32 (A. Krizhevsky, 2009)."""
    return _cifar(
        "CIFAR10", root, "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"
    )


def cifar100(root: str) -> ImageData:
    """Photographs of 100 kinds of things, 32x32 (A. Krizhevsky, 2009)."""
    return _cifar("CIFAR100", root, "cifar-100-python", ["train"], "test", "fine_labels")


def _cifar(name: str, root: str, folder: str, train: list[str], test: str, key: str) -> ImageData:
    directory = Path(root) / folder
    meta = "batches.meta" if name == "CIFAR10" else "meta"
    if not all((directory / file).is_file() for file in [*train, test, meta]):
        _download(name, root, f"{directory}/ with {', '.join([*train, test, meta])}")

    def read(file: str) -> tuple[Tensor, Tensor]:
        batch = _read_pickle(directory / file)
        images: Any = batch.get("data")
        labels: Any = batch.get(key)
        if not isinstance(images, _Bytes) or len(images.content) % 3072 or not _is_list_of(int, labels):
            raise RequestError(
                f"{shown(directory / file)}: not a CIFAR batch; expected data, bytes [n, 3072], and {key}, a list of "
                "numbers; delete it and run again"
            )
        count = len(images.content) // 3072
        if count != len(labels) or not all(0 <= label < 256 for label in labels):
            raise RequestError(
                f"{shown(directory / file)}: {count} images, but {len(labels)} labels, or some beyond 255; "
                "delete it and run again"
            )
        pixels = torch.frombuffer(bytearray(images.content), dtype=torch.uint8) if count else torch.zeros(0).byte()
        return pixels.view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)

    parts = [read(file) for file in train]
    names: Any = _read_pickle(directory / meta).get("label_names" if name == "CIFAR10" else "fine_label_names")
    if not _is_list_of(str, names):
        raise RequestError(f"{shown(directory / meta)}: names no classes; delete it and run again")
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ImageData((images, labels), read(test), names)


def _is_list_of(kind: type, found: Any) -> bool:
    return isinstance(found, list) and all(type(entry) is kind for entry in found)


class _Bytes:
    """Stands for an array of NumPy, and for its type, while a pickle is read: the bytes, and nothing made of them."""

    content = b""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """(version, shape, type, whether in Fortran's order, bytes) of an array; of a type something else."""
        if isinstance(state, tuple) and len(state) == 5:
            content = state[4].encode("latin1") if isinstance(state[4], str) else state[4]
            if isinstance(content, bytes) and state[3] is not True:
                self.content = content


class _ArrayUnpickler(pickle.Unpickler):
    """CIFAR comes as pickles, and a pickle can name anything; this one knows bytes that were an array, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return _Bytes
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return _Bytes
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")


MOST_PICKLED = 1 << 28  # bytes of a pickle; CIFAR-100's training images are 155 MB
MOST_STEPS = 1_000_000  # of a pickle, each of which may make an object; CIFAR-100 takes 200,000


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, MOST_PICKLED)
        for step, (code, argument, _) in enumerate(pickletools.genops(content)):
            # The memo is made as long as the highest number asked for.
            if step > MOST_STEPS or (code.name.endswith("PUT") and int(argument or 0) > MOST_STEPS):
                raise ValueError(f"more than {MOST_STEPS:,} steps")
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RequestError(f"{shown(path)}: cannot be read ({one_line(error)}); delete it and run again") from None
    if not isinstance(found, dict):
        raise RequestError(f"{shown(path)}: not a CIFAR file; delete it and run again")
    return found


_may_download = True


@contextmanager
def no_downloads() -> Iterator[None]:
    """Within it data that is not there is an error: evaluating and predicting fetch nothing."""
    global _may_download
    before, _may_download = _may_download, False
    try:
        yield
    finally:
        _may_download = before


def _download(name: str, root: str, layout: str) -> None:
    """Fetch a data set with torchvision, which shows a progress bar and checks what arrives.

    It arrives in a folder of its own and is moved to `root` once it is whole: a download that fails leaves nothing.
    """
    if not _may_download:
        option = "fashion_mnist" if name == "FashionMNIST" else name.lower()
        raise RequestError(
            f"{name} is not in {root!r}, expected {layout}; set dataset.root, "
            f"or fetch it: python datasets.py dataset={option} dataset.root={root}"
        )
    from torchvision import datasets as torchvision_datasets  # takes a second to import, and is rarely needed

    fetch: Callable[..., Any] = getattr(torchvision_datasets, name)
    tried = ", ".join(getattr(fetch, "mirrors", None) or [getattr(fetch, "url", "its host")])
    print(f"{name} is not in {root!r}: downloading it from {tried}", flush=True)
    made = [folder for folder in (Path(root), *Path(root).parents) if not folder.exists()]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; the default is to wait for ever
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as arriving:
            fetch(arriving, download=True)
            shutil.copytree(arriving, root, dirs_exist_ok=True, copy_function=os.replace)
    except (OSError, RuntimeError) as error:
        cause = one_line(error, 2000).rpartition("got: ")[2]
        raise RequestError(
            f"{name} is not there and cannot be downloaded (tried {tried}: {cause}); "
            f"put the files into {layout}, set dataset.root, or take dataset=digits, which needs nothing"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
        for folder in made:
            with suppress(OSError):  # not empty: the data is there
                folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# Image files


class ImageFiles(Dataset):
    """Image files and their labels.

    Args:
        paths: one a sample.
        labels: class indices, as many.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
        name: tells parts of the same folder apart, for their caches.
        no_files: those of the paths that are known to lead to no regular file.

    Attributes:
        targets: int64 `[n]`, the labels.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        name: str = "",
        no_files: Collection[str] = (),
    ) -> None:
        self.paths = np.array(paths, dtype=np.str_)  # one block: workers that touch no Python object copy no memory
        self.targets = torch.tensor(labels, dtype=torch.int64)
        self.channels, self.max_pixels, self.name, self.no_files = channels, max_pixels, name, no_files

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.targets[index])

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> Tensor:
        """The image alone; `at_least` as in `read_image`."""
        return read_image(str(self.paths[index]), self.channels, self.max_pixels, at_least)

    def part(self, chosen: Tensor, name: str) -> ImageFiles:
        """The samples of a mask, in their order."""
        rows = chosen.nonzero().flatten()
        paths, labels = self.paths[rows.numpy()].tolist(), self.targets[rows].tolist()
        return ImageFiles(paths, labels, self.channels, self.max_pixels, name, self.no_files)


def image_folder(root: str, test_fraction: float, channels: int, max_pixels: int) -> ImageData:
    """Your own images, one folder a class: below `root`, or below `root`/train, `root`/test and `root`/val.

    Args:
        root: the folder.
        test_fraction: share of every class kept for the test where there is no `root`/test.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
    """
    top = Path(root)
    if not top.is_dir():
        raise RequestError(
            f"dataset.root={shown(root)}: no such folder; expected one folder a class in it, or train/ and test/"
        )
    parts = part_folders(top)
    classes = class_folders(parts["train"])
    if len(classes) < 2:
        raise one_class(parts["train"], classes[0], root if parts["train"] == top else None)
    walk = Walk(parts, classes)
    read = {}
    for name, folder in parts.items():
        if name != "train":
            compare_classes(folder, name, classes, parts["train"])
        read[name] = ImageFiles(*walk.images(name), channels, max_pixels, no_files=walk.no_files)
    walk.tell(top)
    if "test" not in parts:
        if parts["train"] != top:
            print(f"{shown(top)} has no test/: dataset.test_fraction={test_fraction} of train/ is the test", flush=True)
        return replace(_split_off_test(read["train"], test_fraction, classes, shown(root)), val=read.get("val"))
    return ImageData(read["train"], read["test"], classes, val=read.get("val"))


def _split_off_test(files: ImageFiles, fraction: float, classes: list[str], where: str) -> ImageData:
    """Keep a share of every class for the test, the same samples whatever the seed of a run."""
    test = hold_out(files.targets, len(files), fraction, seed=1)
    if not test.any() or test.all():
        raise RequestError(
            f"{where}: dataset.test_fraction={fraction} of {len(files)} image{'s' * (len(files) != 1)} leaves "
            f"{int(test.sum())} for the test and {int((~test).sum())} for training; change it, or add images"
        )
    return ImageData(files.part(~test, "train"), files.part(test, "test"), classes)


def csv_images(
    annotations_file: str,
    img_dir: str,
    test_annotations_file: str | None,
    test_fraction: float,
    classes: list[str] | None,
    channels: int,
    max_pixels: int,
) -> ImageData:
    """Your own images, listed in a CSV file: file name and label in the first two columns, with or without a header.

    Args:
        annotations_file: the CSV file; fields separated by comma, semicolon or tab.
        img_dir: the folder that file names are relative to.
        test_annotations_file: of the test images; None keeps a share of the training images instead.
        test_fraction: that share, of every class.
        classes: class names in the order of their numbers; None takes the names that occur, sorted, or where all labels
            are numbers 0 to the largest.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
    """
    rows = read_annotations(annotations_file, img_dir)
    numbers = all(is_number(label) for _, _, label in rows) and not (classes and rows[0][2] in map(str, classes))
    if classes:
        names = [str(name) for name in classes]
    else:
        check_labels(rows, annotations_file)
        names = sorted({label for _, _, label in rows})
        if numbers:
            names = [str(n) for n in range(count_classes(rows, annotations_file))]
    present = set(labels_of(rows, names, numbers, annotations_file))
    if empty := [printable(name) for label, name in enumerate(names) if label not in present]:
        what = "1 class" if len(empty) == 1 else f"{len(empty):,} classes"
        print(f"{shown(annotations_file)} has no image of {what} ({some(empty)})", flush=True)
    train = _listed(rows, names, numbers, annotations_file, channels, max_pixels)
    if test_annotations_file is None:
        return _split_off_test(train, test_fraction, names, annotations_file)
    test_rows = read_annotations(test_annotations_file, img_dir)
    return ImageData(train, _listed(test_rows, names, numbers, test_annotations_file, channels, max_pixels), names)


def _listed(
    rows: list[tuple[int, str, str]], names: list[str], numbers: bool, file: str, channels: int, max_pixels: int
) -> ImageFiles:
    return ImageFiles([path for _, path, _ in rows], labels_of(rows, names, numbers, file), channels, max_pixels)
