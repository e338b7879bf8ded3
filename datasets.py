"""The datasets: one function each, named by `_target_` in a YAML of configs/dataset/.

A function takes the settings of its YAML and returns an `ImageData`. What every dataset has in common (holding out a
validation part, `limit`, transforms, batches) is done elsewhere: adding one is a function here and a YAML there.

`python datasets.py dataset=...` shows one: a picture of training samples, counts per class, mean and deviation.
"""

from __future__ import annotations

from engine.cli import launch

if __name__ == "__main__":
    launch("datasets")  # answers help, completion and typos, and only then imports torch and calls main() below

import csv
import gzip
import math
import os
import pickle
import shutil
import socket
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import RequestError, one_line

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
        sampler: for an order of training samples other than a shuffle: called every epoch with the indices of the
            training samples (int64 `[n]`, without those held out for validation), returns a `torch` Sampler or any
            iterable with a length, of places in that list: `lambda i: WeightedRandomSampler(weights[i], 1000)`.
    """

    train: Part
    test: Part
    classes: Sequence[str]
    sampler: Callable[[Tensor], Iterable[int]] | None = None


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


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, plain or gzipped, as a uint8 tensor of the shape in its header.

    Format: the end of http://yann.lecun.com/exdb/mnist/ (magic 0 0 8 ndim, then ndim big-endian sizes, then the data).

    Raises:
        RequestError: the file is damaged or of another format.
    """
    remedy = "delete it and run again" if path.is_relative_to(Path.cwd()) or not path.is_absolute() else "replace it"
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot be read ({one_line(error)}); {remedy}") from None
    dimensions = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * dimensions
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise RequestError(f"{path}: not an IDX file of bytes; {remedy}")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        expected = f"expected {math.prod(shape)} bytes of data for shape {shape}, found {len(content) - start}"
        raise RequestError(f"{path}: damaged: {expected}; {remedy}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


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
        try:
            images = torch.from_numpy(np.ascontiguousarray(batch["data"], dtype=np.uint8)).view(-1, 3, 32, 32)
            labels = torch.tensor(batch[key], dtype=torch.int64)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(
                f"{directory / file}: not a CIFAR batch ({one_line(error)}); delete it and run again"
            ) from None
        if len(images) != len(labels):
            raise RequestError(
                f"{directory / file}: {len(images)} images, but {len(labels)} labels; delete it and run again"
            )
        return images, labels

    parts = [read(file) for file in train]
    names = _read_pickle(directory / meta).get("label_names" if name == "CIFAR10" else "fine_label_names", [])
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ImageData((images, labels), read(test), [str(n) for n in names])


class _ArrayUnpickler(pickle.Unpickler):
    """CIFAR comes as pickles, and a pickle can name anything; this one builds NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RequestError(f"{path}: cannot be read ({one_line(error)}); delete it and run again") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path}: not a CIFAR file; delete it and run again")
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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held; 1 is upright
# Of odd metadata, and of bytes that count as read-only. Once for all: for each image it would take a part of its time.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
MAX_PIXELS = 64_000_000  # more in one file is taken for a decompression bomb; 8000x8000


def read_image(
    path: str | os.PathLike[str],
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
) -> Tensor:
    """An image file as it is meant to be seen, uint8 `[channels, height, width]`.

    EXIF rotation is applied, palettes are looked up, transparency is laid on white, 16 bits are scaled to 8, of an
    animation the first picture counts.

    Args:
        path: JPEG, PNG, WebP, BMP, GIF, TIFF, or whatever else Pillow reads.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
        at_least: (height, width) that it will be resized to: a JPEG of at least four times these pixels a side may be
            decoded at a half, a quarter or an eighth of its size, which saves most of the work (the decoder averages
            within its 8x8 blocks; Pillow's `thumbnail` does the same with the same margin).

    Raises:
        RequestError: it cannot be read, or is larger than `max_pixels`.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours names the size and the file
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RequestError(
                    f"{path}: {width}x{height} pixels are more than the {max_pixels:,} allowed; "
                    "make it smaller or remove it (for training, dataset.max_pixels is the limit)"
                )
            if at_least is not None and image.format == "JPEG":
                side = 2 * max(at_least)  # square, as EXIF may still turn it
                image.draft("L" if channels == 1 and image.mode == "L" else "RGB", (side, side))
            said = image.format != "JPEG" or "exif" in image.info or "xmp" in image.info  # looking takes time
            if said and image.getexif().get(ORIENTATION, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            pixels = torch.from_numpy(_eight_bits(image, channels))
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(f"{path}: no such image file") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = one_line(error, 120).replace(f"'{path}'", "it")
        raise RequestError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _eight_bits(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels of a Pillow image of any mode, uint8 `[height, width]` for one channel, else `[height, width, 3]`."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its pixels are 32 bits wide and of no known range; save it with 8 or 16 bits")
        grey = ((deep.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))  # bytes that nobody else has


class ImageFiles(Dataset):
    """Image files and their labels.

    Args:
        paths: one a sample.
        labels: class indices, as many.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
        name: tells parts of the same folder apart, for their caches.

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
    ) -> None:
        self.paths = np.array(paths, dtype=np.str_)  # one block: workers that touch no Python object copy no memory
        self.targets = torch.tensor(labels, dtype=torch.int64)
        self.channels, self.max_pixels, self.name = channels, max_pixels, name

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
        return ImageFiles(paths, labels, self.channels, self.max_pixels, name)


def image_folder(root: str, test_fraction: float, channels: int, max_pixels: int) -> ImageData:
    """Your own images, one folder a class: below `root`, or below `root`/train and `root`/test.

    Args:
        root: the folder.
        test_fraction: share of every class kept for the test where there is no `root`/test.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
    """
    top = Path(root)
    if not top.is_dir():
        raise RequestError(
            f"dataset.root={root}: no such folder; expected one folder a class in it, or train/ and test/"
        )
    train_folder = top / "train" if (top / "train").is_dir() else top
    classes = _class_folders(train_folder)
    train = _read_class_folders(train_folder, classes, channels, max_pixels)
    if train_folder != top and (top / "test").is_dir():
        test_classes = _class_folders(top / "test")
        unknown = [name for name in test_classes if name not in classes]
        if unknown:
            raise RequestError(f"{top / 'test' / unknown[0]}: a class without a folder in {train_folder}")
        missing = [name for name in classes if name not in test_classes]
        if missing:
            print(f"no test images of {', '.join(missing)}: {top / 'test'} has no such folder", flush=True)
        return ImageData(train, _read_class_folders(top / "test", classes, channels, max_pixels), classes)
    return _split_off_test(train, test_fraction, classes, root)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise RequestError(f"{folder}: no folder in it; expected one a class, named after it")
    return names


def _read_class_folders(folder: Path, classes: list[str], channels: int, max_pixels: int) -> ImageFiles:
    """The image files of every class folder, those in folders below included, sorted by name."""
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        count = len(paths)
        for directory, below, files in os.walk(folder / name, followlinks=True):
            below.sort()
            for file in sorted(file for file in files if not file.startswith(".")):
                (paths if file.lower().endswith(EXTENSIONS) else others).append(os.path.join(directory, file))
        if len(paths) == count:
            raise RequestError(
                f"{folder / name}: no image in this class folder (looked for {', '.join(EXTENSIONS)}); "
                "add some, or remove the folder and with it the class"
            )
        labels += [label] * (len(paths) - count)
    if others:
        print(f"{len(others):,} files in {folder} are no images and left out (the first is {others[0]})", flush=True)
    return ImageFiles(paths, labels, channels, max_pixels)


def _split_off_test(files: ImageFiles, fraction: float, classes: list[str], where: str) -> ImageData:
    """Keep a share of every class for the test, the same samples whatever the seed of a run."""
    shuffled = torch.randperm(len(files), generator=torch.Generator().manual_seed(1))
    test = torch.zeros(len(files), dtype=torch.bool)
    for label in range(len(classes)):
        members = shuffled[files.targets[shuffled] == label]
        test[members[: round(fraction * len(members))]] = True
    if not test.any() or test.all():
        raise RequestError(
            f"{where}: dataset.test_fraction={fraction} of {len(files)} images leaves {int(test.sum())} for the test "
            f"and {int((~test).sum())} for training; change it, or add images"
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
    rows = _read_annotations(annotations_file, img_dir)
    numbers = all(_is_number(label) for _, _, label in rows) and not (classes and rows[0][2] in map(str, classes))
    if classes:
        names = [str(name) for name in classes]
    elif numbers:
        names = [str(n) for n in range(1 + min(10**6, max(int(label) for _, _, label in rows)))]
    else:
        names = sorted({label for _, _, label in rows})
    present = set(_labels_of(rows, names, numbers, annotations_file))
    if len(names) > 10 * len(present) + 10:
        row, _, text = max(rows, key=lambda row: int(row[2]))
        raise RequestError(
            f"{annotations_file}, row {row}: label {text} would make {len(names):,} classes, but only "
            f"{len(present)} labels occur; number the classes from 0, or write names"
        )
    if empty := [name for label, name in enumerate(names) if label not in present]:
        print(f"{annotations_file} has no image of {len(empty)} classes ({', '.join(empty[:10])})", flush=True)
    train = _listed(rows, names, numbers, annotations_file, channels, max_pixels)
    if test_annotations_file is None:
        return _split_off_test(train, test_fraction, names, annotations_file)
    test_rows = _read_annotations(test_annotations_file, img_dir)
    return ImageData(train, _listed(test_rows, names, numbers, test_annotations_file, channels, max_pixels), names)


def _read_annotations(file: str, img_dir: str) -> list[tuple[int, str, str]]:
    """Line number, path and label of every row; the first row is a header if no file has its name, but the next has."""
    if not Path(img_dir).is_dir():
        raise RequestError(f"dataset.img_dir={img_dir}: no such folder")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as a CSV file in UTF-8 ({one_line(error, 120)})") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    rows: list[tuple[int, str, str]] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) < 2 or not row[0].strip() or not row[1].strip():
                raise RequestError(f"{file}, row {reader.line_num}: {row}; expected a file name and a label")
            rows.append((reader.line_num, os.path.join(img_dir, row[0].strip()), row[1].strip()))
    except csv.Error as error:
        raise RequestError(f"{file}, row {reader.line_num}: {one_line(error)}") from None
    there = [os.path.isfile(path) for _, path, _ in rows[:2]]
    if there == [False, True] or (there == [False] and not Path(rows[0][1]).suffix):
        del rows[0]
    if not rows:
        raise RequestError(f"{file}: lists no image; expected rows of file name and label")
    for number, path, _ in rows:
        if not os.path.isfile(path):
            raise RequestError(
                f"{file}, row {number}: {path} is not there; correct the name, the row or dataset.img_dir"
            )
    return rows


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _labels_of(rows: list[tuple[int, str, str]], names: list[str], numbers: bool, file: str) -> list[int]:
    place = {name: label for label, name in enumerate(names)}
    labels = []
    for number, _, text in rows:
        label = (int(text) if _is_number(text) else -1) if numbers else place.get(text, -1)
        if not 0 <= label < len(names):
            some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            expected = f"0 to {len(names) - 1}" if numbers else f"one of {some}"
            raise RequestError(
                f"{file}, row {number}: label {text!r}; expected {expected}, as there are {len(names)} classes"
            )
        labels.append(label)
    return labels


def _listed(
    rows: list[tuple[int, str, str]], names: list[str], numbers: bool, file: str, channels: int, max_pixels: int
) -> ImageFiles:
    return ImageFiles([path for _, path, _ in rows], _labels_of(rows, names, numbers, file), channels, max_pixels)
