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


MOST_PICKLED = 1 << 28  # bytes of a pickle; CIFAR-100's training images are 155 MB
MOST_STEPS = 1_000_000  # of a pickle, each of which may make an object; CIFAR-100 takes 200,000


def read_pickle(path: Path) -> dict[str, Any]:
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
