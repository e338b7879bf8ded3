"""Image files as uint8 tensors: six formats, opened only where they are regular files, within bounds.

What a file claims costs nothing until it is believed: pixels, bytes before the pixels, strips and scans have limits.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import RequestError, one_line, printable
from engine.files import open_regular

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# How a file of each format begins. Pillow reads many more, and starts Ghostscript for one of them.
BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
}
UNREADABLE = "cannot be read as an image"
MAX_PIXELS = 64_000_000  # more in one file is taken for a decompression bomb; 8000x8000
MOST_BEFORE = 1 << 24  # bytes of comments, profiles and the like before the pixels
MOST_READS = 50_000  # reads of a header, beside one for every 64 bytes: millions of empty chunks take seconds
MOST_WEBP = 1 << 28  # bytes of a WebP file, which Pillow reads whole, twice
MOST_STRIPS = 1 << 18  # strips or tiles of a TIFF
MOST_RUNS = 1 << 22  # bytes of a run-length encoded BMP, which Pillow decodes in Python
MOST_SCANNED = 1_000_000_000  # pixels that all scans of a progressive JPEG go over, where they are more than usual
SMALL = 1 << 20  # bytes of a file
MARGIN = 2  # times the pixels a side that are wanted: what a JPEG decoded at reduced size has at least
STRETCH = 1 / 4  # of a wanted pixel, by which its far edge may then be moved
STRIP = 1 << 22  # pixels that are brought to eight bits at once
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held; 1 is upright
# Of odd metadata, and of bytes that count as read-only. Once for all: for each image it would take a part of its time.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def shown(path: str | os.PathLike[str]) -> str:
    """A path as messages have it: safe to print, and of a very long one the beginning and the end."""
    text = printable(os.fspath(path))
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


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
        path: of one of the six formats.
        channels: 1 for grey, 3 for RGB.
        max_pixels: width times height allowed.
        at_least: for training, (height, width) that it will be resized to: a JPEG far larger than that is decoded at a
            half, a quarter or an eighth of its size, which saves most of the work and changes pixels a little.

    Raises:
        RequestError: it cannot be read, or is larger than `max_pixels`.
    """
    try:
        with open_image(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RequestError(
                    f"{shown(path)}: {width}x{height} pixels are more than the {max_pixels:,} allowed; "
                    "make it smaller or remove it (for training, dataset.max_pixels is the limit)"
                )
            tags = getattr(image, "tag_v2", {})
            tile_width, tile_height = tags.get(322, 1), tags.get(323, 1)  # of a TIFF; each is decoded whole
            if tile_width * tile_height > max_pixels:
                raise ValueError(f"tiles of {tile_width}x{tile_height} pixels")
            if at_least is not None and image.format == "JPEG":
                parts = _reduction(image.size, max(at_least))  # the larger one, as EXIF may still turn it
                image.draft(None, (width // parts, height // parts))
            said = image.format != "JPEG" or "exif" in image.info or "xmp" in image.info  # looking takes time
            if said and image.getexif().get(ORIENTATION, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            pixels = torch.from_numpy(_in_strips(image, channels))
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(f"{shown(path)}: no such image file") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 120)
        raise RequestError(f"{shown(path)}: {UNREADABLE} ({reason}); replace or remove it") from None
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A Pillow image of one of the six formats, its header read and its pixels not yet.

    Raises:
        Exception: OSError where it is no regular file, or whatever Pillow raises for a damaged one.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours names the size and the file
    try:
        with open_regular(path) as file:
            head = file.peek(16)  # type: ignore[attr-defined]
            kind = next((name for start, name in BEGINNINGS.items() if head.startswith(start)), None)
            if kind is None:
                raise ValueError("it is no JPEG, PNG, WebP, BMP, GIF or TIFF" if head else "it is empty")
            size = os.fstat(file.fileno()).st_size
            if kind == "WEBP" and size > MOST_WEBP:
                raise ValueError(f"a WebP file of {size:,} bytes")
            if kind == "TIFF":
                _check_directory(file)
            if size > SMALL:  # a smaller one has no header that takes long, and counting costs a little
                file = _Counting(file, kind)
            with Image.open(file, formats=[kind]) as image:
                if kind == "JPEG" and "progressive" in image.info:
                    _check_scans(file, image)
                if kind == "BMP" and image.info.get("compression") in (1, 2) and size > MOST_RUNS:
                    raise ValueError(f"a run-length encoded BMP of {size:,} bytes")
                if isinstance(file, _Counting):
                    file.opened = True
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reduction(size: tuple[int, int], wanted: int) -> int:
    """By which number the sides of a JPEG are divided when it is decoded: 8, 4 or 2, or 1 for all of it.

    The decoder takes the lower frequencies of each 8x8 block; Pillow's `thumbnail` leaves the same margin. A part of a
    pixel that the division leaves over becomes a whole one, and the picture is stretched by as much, where the sides
    are not multiples as those of cameras are.

    Args:
        size: (width, height).
        wanted: pixels of the longer side once it is resized.
    """
    parts = (n for n in (8, 4, 2) if min(size) >= MARGIN * n * wanted)
    return next((n for n in parts if all(-side % n * wanted <= STRETCH * side for side in size)), 1)


class _Counting(io.BufferedReader):
    """A file of which only so much may be read before its pixels."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))
        self.seek(0)
        self.kind, self.reads, self.count, self.opened = kind, 0, 0, False

    def read(self, size: int | None = -1, /) -> bytes:
        if not self.opened and self.kind not in ("TIFF", "WEBP"):  # these do not read from the beginning to the end
            self.count += size or 0
            if self.count > MOST_BEFORE:
                raise ValueError(f"more than {MOST_BEFORE:,} bytes before its pixels")
        if not self.opened or self.kind == "PNG":  # which reads on behind the pixels
            self.reads += 1
            if self.reads > MOST_READS + self.tell() // 64:
                raise ValueError(f"a header of more than {MOST_READS:,} parts")
        return super().read(size)


def _check_directory(file: BinaryIO) -> None:
    """Refuse a TIFF that lists millions of strips or tiles: Pillow makes some objects of each before anything else."""
    head = file.read(16)
    order, big = "<" if head.startswith(b"II") else ">", head[2:4] in (b"+\0", b"\0+")
    (place,) = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])
    count, entry = (struct.Struct(order + form) for form in (("Q", "HHQ8x") if big else ("H", "HHI4x")))
    file.seek(place)
    (entries,) = count.unpack(file.read(count.size))
    directory = file.read(min(entries, 1 << 16) * entry.size)
    file.seek(0)
    for tag, _, number in entry.iter_unpack(directory[: len(directory) // entry.size * entry.size]):
        if tag in (273, 324) and number > MOST_STRIPS:
            raise ValueError(f"{number:,} strips or tiles")


def _check_scans(file: BinaryIO, image: Image.Image) -> None:
    """Refuse a progressive JPEG of hundreds of scans: each goes over the whole image, and may be a few bytes."""
    size = os.fstat(file.fileno()).st_size
    blocks = (os.pread(file.fileno(), 1 << 20, place) for place in range(0, size, 1 << 20))  # moves nothing
    scans = sum(block.count(b"\xff\xda") for block in blocks)
    if scans > 20 and scans * image.width * image.height > MOST_SCANNED:
        raise ValueError(f"{scans:,} scans of {image.width}x{image.height} pixels")


def _in_strips(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels as `_eight_bits` has them; of a large image in parts, as each step on the way takes as much memory."""
    width, height = image.size
    rows = max(1, STRIP // width)
    if height <= rows:
        return _eight_bits(image, channels)
    pixels = np.empty((height, width) if channels == 1 else (height, width, 3), dtype=np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _eight_bits(image.crop((0, top, width, bottom)), channels)
    return pixels


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


Samples = (
    tuple[Tensor, Tensor] | Dataset
)  # (images uint8 [n, channels, height, width], labels int64 [n]), or any Dataset


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

    train: Samples
    test: Samples
    classes: Sequence[str]
    sampler: Callable[[Tensor], Iterable[int]] | None = None
    val: Samples | None = None


class Paths(Sequence[str]):
    """Names of files in one block of memory, of which worker processes, touching no Python object, copy nothing.

    Args:
        block: all of them in UTF-8, each with a zero byte, which no name has, before and behind it.
        places: where each begins, int64 `[n]`; None takes all that there are.
    """

    def __init__(self, block: bytes, places: np.ndarray | None = None) -> None:
        self.block = block
        if places is None:
            places = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 0)[:-1] + 1
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """One path, or the `Paths` of a slice or of an array of indices, which has the same block."""
        if not isinstance(index, (int, np.integer)):
            return Paths(self.block, self.places[index])
        place = int(self.places[index])
        return self.block[place : self.block.index(0, place)].decode("utf-8", "surrogatepass")

    def __add__(self, others: Paths) -> Paths:
        return Paths(self.block + others.block, np.concatenate([self.places, others.places + len(self.block)]))

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """Those of a list."""
        return cls("\0".join(["", *paths, ""]).encode("utf-8", "surrogatepass"))

    def tolist(self) -> list[str]:
        return list(self)


class ImageFiles(Dataset):
    """Image files and their labels, in `targets`, int64 `[n]`.

    Args:
        paths, labels: of each sample its file and class index.
        channels, max_pixels: as in `read_image`.
        name: tells parts of the same folder apart, for their caches.
        no_files: those of the paths that are known to lead to no regular file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | Tensor,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        name: str = "",
        no_files: Collection[str] = (),
    ) -> None:
        self.paths = paths if isinstance(paths, Paths) else Paths.of(paths)
        self.targets = torch.as_tensor(labels, dtype=torch.int64)
        self.channels, self.max_pixels, self.name, self.no_files = channels, max_pixels, name, no_files

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.targets[index])

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> Tensor:
        """The image alone; `at_least` as in `read_image`."""
        return read_image(str(self.paths[index]), self.channels, self.max_pixels, at_least)

    def subset(self, chosen: Tensor, name: str) -> ImageFiles:
        """The samples of a mask, in their order."""
        rows = chosen.nonzero().flatten()
        return ImageFiles(
            self.paths[rows.numpy()], self.targets[rows], self.channels, self.max_pixels, name, self.no_files
        )

    def joined(self, others: ImageFiles, name: str) -> ImageFiles:
        """These samples, and the others behind them, which are read in the same way."""
        labels, no_files = torch.cat([self.targets, others.targets]), {*self.no_files, *others.no_files}
        return ImageFiles(self.paths + others.paths, labels, self.channels, self.max_pixels, name, no_files)
