"""A `.safetensors` file read as data, within bounds: the length of a table, the table in JSON, the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.files import open_regular
from engine.run.archive import LONGEST_NAME, MOST_PICKLE, MOST_TENSORS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its metadata.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: as `read`.
    """
    with open_regular(path) as file:
        return read(file)


def read(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of an open file.

    Raises:
        ValueError: it is damaged, or no file of this format.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < start <= min(size, MOST_PICKLE):
        raise ValueError(f"it is no file of safetensors: its table would take {start - 8:,} of {size:,} bytes")
    try:
        table = json.loads(file.read(start - 8))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"its table is no JSON ({type(error).__name__})") from None
    if not isinstance(table, dict) or len(table) > MOST_TENSORS:
        raise ValueError(f"its table is no dictionary of at most {MOST_TENSORS:,} tensors")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no dictionary of texts")
    found, end = {}, 0
    entries = [(name, *_entry(name, entry)) for name, entry in table.items()]
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if first != end or last > size - start:  # there are no gaps, nor two tensors of the same bytes
            raise ValueError(f"the data of its {name[:80]} is not where it should be")
        data = torch.empty(last - first, dtype=torch.uint8)
        file.seek(start + first)
        if file.readinto(memoryview(data.numpy())) != len(data):  # type: ignore[attr-defined, arg-type]
            raise ValueError("it is cut off")
        found[name], end = data.view(dtype).view(shape), last
    if end != size - start:
        raise ValueError(f"it has {size - start - end:,} bytes that belong to no tensor")
    return {name: found[name] for name in table}, metadata


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """What the table says of a tensor: dtype, shape, and where its bytes begin and end."""
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        whole = all(type(number) is int and 0 <= number < 1 << 60 for number in numbers)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or len(shape) > 16 or len(name) > LONGEST_NAME or math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"its {name[:80]} has no dtype, shape and data_offsets that go together")
    return dtype, shape, first, last
