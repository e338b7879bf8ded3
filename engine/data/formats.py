"""The file formats of the data sets that people download: IDX (MNIST and its family) and CIFAR's pickles."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.images import shown
from engine.errors import RequestError, one_line
from engine.files import open_regular, read_bytes

MOST_BYTES = 1 << 29  # of images in an IDX file; the largest of these data sets has 47 million
MOST_PICKLED = 1 << 28  # bytes of a pickle; CIFAR-100's training images are 155 MB
MOST_STEPS = 1_000_000  # of a pickle, each of which may make an object; CIFAR-100 takes 200,000
DAMAGED = "delete it and run again"


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, plain or gzipped, as a uint8 tensor of the shape in its header.

    Format: the end of http://yann.lecun.com/exdb/mnist/ (magic 0 0 8 ndim, then ndim big-endian sizes, then the data).
    Not more is read, or decompressed, than the header says.

    Raises:
        RequestError: the file is damaged or of another format.
    """
    remedy = DAMAGED if path.is_relative_to(Path.cwd()) or not path.is_absolute() else "replace it"
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


class PickledBytes:
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
            return PickledBytes
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return PickledBytes
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")


def read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, MOST_PICKLED)
        for step, (code, argument, _) in enumerate(pickletools.genops(content)):
            # The memo is made as long as the highest number asked for.
            if step > MOST_STEPS or (code.name.endswith("PUT") and int(argument or 0) > MOST_STEPS):
                raise ValueError(f"more than {MOST_STEPS:,} steps")
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RequestError(f"{shown(path)}: cannot be read ({one_line(error)}); {DAMAGED}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{shown(path)}: not a CIFAR file; {DAMAGED}")
    return found


def read_cifar(path: Path, labels_key: str) -> tuple[Tensor, Tensor]:
    """The images, uint8 `[n, 3, 32, 32]`, and labels, int64 `[n]`, of a CIFAR batch; else a RequestError."""
    batch = read_pickle(path)
    data: Any = batch.get("data")
    labels: Any = batch.get(labels_key)
    if not isinstance(data, PickledBytes) or len(data.content) % 3072 or not _is_list_of(int, labels):
        raise RequestError(
            f"{shown(path)}: not a CIFAR batch; expected data, bytes [n, 3072], and {labels_key}, a list of numbers; "
            f"{DAMAGED}"
        )
    count = len(data.content) // 3072
    if count != len(labels) or not all(0 <= label < 256 for label in labels):
        raise RequestError(f"{shown(path)}: {count} images, but {len(labels)} labels, or some beyond 255; {DAMAGED}")
    pixels = torch.frombuffer(bytearray(data.content), dtype=torch.uint8) if count else torch.zeros(0).byte()
    return pixels.view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


def read_cifar_names(path: Path, key: str) -> list[str]:
    """The class names of CIFAR's file of them; else a RequestError."""
    names: Any = read_pickle(path).get(key)
    if not _is_list_of(str, names):
        raise RequestError(f"{shown(path)}: names no classes; {DAMAGED}")
    return names


def _is_list_of(kind: type, found: Any) -> bool:
    return isinstance(found, list) and all(type(entry) is kind for entry in found)
