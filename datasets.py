"""The datasets: one function each, named by `_target_` in a YAML of configs/dataset/.

A function takes the settings of its YAML, where their meaning stands, and returns an `ImageData`. What all have in
common (holding out a validation part, `limit`, transforms, batches) is done elsewhere: adding one is a function here
and a YAML there.

`python datasets.py dataset=...` shows one: a picture of training samples, counts per class, mean and deviation.
"""

from __future__ import annotations

if __name__ == "__main__":
    from engine.command.cli import launch

    launch("datasets")  # answers help, completion and typos, and only then imports torch and calls main() below

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.annotations import Annotations, class_names, labels_of, read_annotations
from engine.data.download import download
from engine.data.folders import list_images, some
from engine.data.formats import read_cifar, read_cifar_names, read_idx
from engine.data.images import ImageData, ImageFiles, shown
from engine.data.splits import hold_out
from engine.errors import RequestError, counted, printable


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
    files = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    folder = Path(root) / name / "raw"

    def find(folder: Path) -> list[Path]:
        either = [(folder / file, folder / f"{file}.gz") for file in files]
        return [path for plain, packed in either if (path := plain if plain.is_file() else packed).is_file()]

    paths = next((found for place in (folder, also) if place and len(found := find(place)) == len(files)), [])
    if not paths:
        download(name, root, f"{folder}/ with {', '.join(files)} (also as .gz)")
        paths = find(folder)
    parts: list[tuple[Tensor, Tensor]] = []
    for images_file, labels_file in (paths[:2], paths[2:]):
        images, labels = read_idx(images_file), read_idx(labels_file)
        if len(images) != len(labels):
            raise RequestError(f"{images_file}: {len(images)} images, but {len(labels)} labels beside it")
        parts.append((images.unsqueeze(1), labels.long()))
    return ImageData(parts[0], parts[1], classes)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR


def cifar10(root: str) -> ImageData:
    """Photographs of 10 kinds of things, 32x32 (A. Krizhevsky, 2009)."""
    folder, train = Path(root) / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar("CIFAR10", root, folder, [*train, "test_batch", "batches.meta"], "labels", "label_names")


def cifar100(root: str) -> ImageData:
    """Photographs of 100 kinds of things, 32x32 (A. Krizhevsky, 2009)."""
    folder = Path(root) / "cifar-100-python"
    return _cifar("CIFAR100", root, folder, ["train", "test", "meta"], "fine_labels", "fine_label_names")


def _cifar(name: str, root: str, folder: Path, files: list[str], labels_key: str, names_key: str) -> ImageData:
    """Read batches for training, the one for the test, and the class names, downloading them where they are missing."""
    paths = [folder / file for file in files]
    if not all(path.is_file() for path in paths):
        download(name, root, f"{folder}/ with {', '.join(files)}")
    *batches, test = [read_cifar(path, labels_key) for path in paths[:-1]]
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return ImageData((images, labels), test, read_cifar_names(paths[-1], names_key))


# ---------------------------------------------------------------------------------------------------------------------
# Your own images


def image_folder(root: str, test_fraction: float, channels: int, max_pixels: int) -> ImageData:
    """Your own images, one folder a class: below `root`, or below `root`/train, `root`/test and `root`/val."""
    top = Path(root)
    if not top.is_dir():
        raise RequestError(
            f"dataset.root={shown(root)}: no such folder; expected one folder a class in it, or train/ and test/"
        )
    classes, listed, no_files = list_images(top)
    parts = {name: ImageFiles(*files, channels, max_pixels, no_files=no_files) for name, files in listed.items()}
    train, test = parts["train"], parts.get("test")
    if test is None:
        train, test = _split_off_test(train, test_fraction, shown(root))
        if "val" in parts:
            told = _share_is_test(test_fraction, test, "train/", "val/")
            print(f"{shown(top)} has no test/: {told}, rename it to test/", flush=True)
        elif (top / "train").is_dir():
            print(f"{shown(top)} has no test/: dataset.test_fraction={test_fraction} of train/ is the test", flush=True)
    return ImageData(train, test, classes, val=parts.get("val"))


def _share_is_test(fraction: float, test: ImageFiles, train_name: str, val_name: str) -> str:
    """Which part plays the test where there is one for training and one for validation only."""
    return (
        f"dataset.test_fraction={fraction} of {train_name} is the test ({counted(len(test), 'image')}, not trained on) "
        f"and {val_name} stays the validation part; to have that as the test"
    )


def _split_off_test(files: ImageFiles, fraction: float, where: str) -> tuple[ImageFiles, ImageFiles]:
    """(train, test): a share of every class is for the test, the same samples whatever the seed of a run."""
    test = hold_out(files.targets, len(files), fraction, seed=1)
    if not test.any() or test.all():
        raise RequestError(
            f"{where}: dataset.test_fraction={fraction} of {len(files)} image{'s' * (len(files) != 1)} leaves "
            f"{int(test.sum())} for the test and {int((~test).sum())} for training; change it, or add images"
        )
    return files.subset(~test, "train"), files.subset(test, "test")


def csv_images(
    annotations_file: str,
    img_dir: str,
    test_annotations_file: str | None,
    test_fraction: float,
    classes: list[str] | None,
    channels: int,
    max_pixels: int,
    val_annotations_file: str | None = None,
) -> ImageData:
    """Your own images, listed in CSV files: file name and label in the first two columns, with or without a header."""
    if val_annotations_file is not None:
        for part, file in (("", annotations_file), ("test_", test_annotations_file)):
            if file is not None and os.path.realpath(file) == os.path.realpath(val_annotations_file):
                raise RequestError(
                    f"dataset.val_annotations_file={shown(val_annotations_file)}: the same file as "
                    f"dataset.{part}annotations_file; validation needs images of its own"
                )
    listed = read_annotations(annotations_file, img_dir)
    names, numbers = class_names(listed, classes)

    def files(listed: Annotations, name: str = "") -> ImageFiles:
        return ImageFiles(listed.paths, labels_of(listed, names, numbers), channels, max_pixels, name)

    train, val = files(listed), None
    present = set(train.targets.unique().tolist())
    if empty := [printable(name) for label, name in enumerate(names) if label not in present]:
        what = "1 class" if len(empty) == 1 else f"{len(empty):,} classes"
        print(f"{shown(annotations_file)} has no image of {what} ({some(empty)})", flush=True)
    if val_annotations_file is not None:
        val = files(read_annotations(val_annotations_file, img_dir), "val")
        print(f"{shown(val_annotations_file)} is the validation part, and dataset.val_fraction is not used", flush=True)
    if test_annotations_file is not None:
        test = files(read_annotations(test_annotations_file, img_dir), "test")
        return ImageData(train, test, names, val=val)
    train, test = _split_off_test(train, test_fraction, annotations_file)
    if val_annotations_file is not None:
        told = _share_is_test(test_fraction, test, shown(annotations_file), shown(val_annotations_file))
        print(f"no dataset.test_annotations_file: {told}, name it so", flush=True)
    return ImageData(train, test, names, val=val)
