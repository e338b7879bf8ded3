"""The datasets: one function each, named by `_target_` in a YAML of configs/dataset/.

A function takes the settings of its YAML and returns an `ImageData`. What every dataset has in common (holding out a
validation part, `limit`, transforms, batches) is done elsewhere: adding one is a function here and a YAML there.

`python datasets.py dataset=...` shows one: a picture of training samples, counts per class, mean and deviation.
"""

from __future__ import annotations

if __name__ == "__main__":
    from engine.command.cli import launch

    launch("datasets")  # answers help, completion and typos, and only then imports torch and calls main() below

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.annotations import check_labels, count_classes, is_number, labels_of, read_annotations
from engine.data.download import download
from engine.data.folders import Walk, class_folders, compare_classes, one_class, part_folders, some
from engine.data.formats import PickledBytes, read_idx, read_pickle
from engine.data.images import ImageData, ImageFiles, shown
from engine.data.splits import hold_out
from engine.errors import RequestError, printable


def main(config: dict[str, Any]) -> None:
    """Show a data set: `python datasets.py dataset=fashion_mnist`."""
    from engine.pictures.samples import show  # what only a picture needs

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
        download(name, root, layout)
        source = folder
    by_name = {path.name.removesuffix(".gz"): path for path in reversed(find(source))}
    train_images, train_labels, test_images, test_labels = (read_idx(by_name[file]) for file in files)
    for images, labels, file in ((train_images, train_labels, files[0]), (test_images, test_labels, files[2])):
        if len(images) != len(labels):
            raise RequestError(f"{by_name[file]}: {len(images)} images, but {len(labels)} labels beside it")
    return ImageData(
        (train_images.unsqueeze(1), train_labels.long()), (test_images.unsqueeze(1), test_labels.long()), classes
    )


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
        download(name, root, f"{directory}/ with {', '.join([*train, test, meta])}")

    def read(file: str) -> tuple[Tensor, Tensor]:
        batch = read_pickle(directory / file)
        images: Any = batch.get("data")
        labels: Any = batch.get(key)
        if not isinstance(images, PickledBytes) or len(images.content) % 3072 or not _is_list_of(int, labels):
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
    names: Any = read_pickle(directory / meta).get("label_names" if name == "CIFAR10" else "fine_label_names")
    if not _is_list_of(str, names):
        raise RequestError(f"{shown(directory / meta)}: names no classes; delete it and run again")
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ImageData((images, labels), read(test), names)


def _is_list_of(kind: type, found: Any) -> bool:
    return isinstance(found, list) and all(type(entry) is kind for entry in found)


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
