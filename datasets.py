"""The datasets: one function each, named by `_target_` in a YAML of configs/dataset/.

A function takes the settings of its YAML and returns an `ImageData`. What every dataset has in common (holding out a
validation part, `limit`, transforms, batches) is done elsewhere, so that adding one is a function here and a YAML there.

`python datasets.py dataset=...` shows one: a picture of training samples, counts per class, mean and deviation.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import pickle
import zlib
import warnings
from collections.abc import Callable, Iterable, Sequence
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
            iterable of a length, of places in that list: `lambda indices: WeightedRandomSampler(weights[indices], 1000)`.
    """

    train: Part
    test: Part
    classes: Sequence[str]
    sampler: Callable[[Tensor], Iterable[int]] | None = None


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
    """Read the four IDX files of a data set of this family, downloading them with torchvision where they are missing."""
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


def _download(name: str, root: str, layout: str) -> None:
    """Fetch a data set with torchvision, which shows a progress bar and checks what arrives."""
    from torchvision import datasets as torchvision_datasets  # takes a second to import, and is rarely needed

    fetch: Callable[..., Any] = getattr(torchvision_datasets, name)
    tried = ", ".join(getattr(fetch, "mirrors", None) or [getattr(fetch, "url", "its host")])
    print(f"{name} is not in {root!r}: downloading it from {tried}", flush=True)
    try:
        fetch(root, download=True)
    except (OSError, RuntimeError) as error:
        raise RequestError(
            f"{name} is not there and cannot be downloaded (tried {tried}: {one_line(error, 120)}); "
            f"put the files into {layout}, set dataset.root, or take dataset=digits, which needs nothing"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Image files

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
        at_least: (height, width) that it will be resized to: a JPEG of more than four times these pixels a side may be
            decoded at a half, a quarter or an eighth of its size, which saves most of the work (the decoder averages
            within its 8x8 blocks; Pillow's `thumbnail` does the same with the same margin).

    Raises:
        RequestError: it cannot be read, or is larger than `max_pixels`.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours names the size and the file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which does not matter here
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise RequestError(
                        f"{path}: {width}x{height} pixels are more than the {max_pixels:,} allowed; "
                        "make it smaller, remove it, or raise dataset.max_pixels"
                    )
                if at_least is not None and image.format == "JPEG":
                    side = 2 * max(at_least)  # square, as EXIF may still turn it
                    image.draft("L" if channels == 1 and image.mode == "L" else "RGB", (side, side))
                pixels = _eight_bits(ImageOps.exif_transpose(image), channels)
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(f"{path}: no such image file") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = one_line(error, 120).replace(f"'{path}'", "it")
        raise RequestError(
            f"{path}: cannot be read as an image ({reason}); replace or remove it, or set dataset.skip_unreadable=true"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    tensor = torch.from_numpy(pixels)
    return tensor.unsqueeze(0) if channels == 1 else tensor.permute(2, 0, 1)


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
    return np.array(image.convert("L" if channels == 1 else "RGB"))  # a copy, as Pillow's own memory is read-only
