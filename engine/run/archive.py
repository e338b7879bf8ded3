"""What torch.save wrote, read as data: there is no way here to call anything that a file names.

torch.load(weights_only=True) calls few things, but it calls them with whatever arguments a file gives, as often as it
says, and does not check the archive's checksums. Here the pickle is read by an interpreter of the few operations that
torch.save writes. It makes dictionaries, lists, tuples, numbers, text and dense tensors; the file's own size bounds
what is allocated.
"""

from __future__ import annotations

import copy
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import MOST_DIRECTORY, open_archive, open_regular

MOST_PICKLE = 16 << 20  # bytes of the pickle, everything but the tensors' data; characters of all texts
MOST_VALUES, MOST_NESTED = 1_000_000, 32  # operations of the pickle, and values that it makes; levels of them
MOST_TENSORS = 30_000
LONGEST_NAME = 1000  # characters of the name of a tensor or a setting, and of what a pickle names
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def load(path: Path) -> Any:
    """The object that torch.save wrote to a file, its tensors on the CPU.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: it is damaged, asks for anything to be called, or holds what is no plain data.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        try:
            with open_archive(file) as archive:
                found = _Reader(archive).read()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError) as error:
            raise ValueError(f"it is no archive of torch.save, or damaged: {error}") from None
        except RuntimeError as error:  # an encrypted record
            raise ValueError(str(error)) from None
    check_data(found, size)
    return found


def check_data(value: Any, size: int) -> None:
    """Refuse what no training run writes: it could be crafted to break, or to keep busy, what uses it.

    What is referred to from many places counts as often as a walk through the whole would meet it. The file has `size`
    bytes.
    """
    waiting, count, letters, numbers = [(value, 0)], 0, 0, 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > MOST_NESTED or count > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, or {MOST_NESTED} levels of them")
        if isinstance(item, dict):
            if not all(isinstance(key, int) or len(key) <= LONGEST_NAME for key in item):
                raise ValueError(f"it has names of more than {LONGEST_NAME:,} characters")
            waiting += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            letters += len(item)
        elif isinstance(item, Tensor):
            numbers += item.numel() * item.element_size()
        elif item is not None and not isinstance(item, (int, float)):
            raise ValueError(f"it holds {type(item).__name__}; expected tensors, numbers and text")
    if letters > MOST_PICKLE or numbers > 2 * size:
        raise ValueError(f"it stands for {letters:,} characters and {numbers:,} bytes of numbers, more than it holds")


class _Name:
    """A class or function that the pickle names; it is never looked up."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Reader:
    """Interprets the pickle of an archive.

    Args:
        archive: the records data.pkl and data/KEY, below one folder.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.records = {record.filename: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in self.records.values()):
            raise ValueError("it is compressed, which torch.save never does")
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, so torch.save did not write it")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.contents: dict[str, Tensor] = {}
        self.tensors = 0

    def read(self) -> Any:
        """The object."""
        if f"{self.folder}byteorder" in self.records and self._bytes("byteorder") != b"little":
            raise ValueError("it was written on a machine of the other byte order")
        try:
            found = self._interpret(self._bytes("data.pkl"))
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
        for name in self.records:  # what the pickle does not name is checked, too
            self._content(name)
        return found

    def _bytes(self, name: str) -> bytes:
        size = self.records[self.folder + name].file_size
        if size > MOST_PICKLE:
            raise ValueError(f"its {name} takes {size:,} bytes; that of a checkpoint is smaller")
        return self._content(self.folder + name).numpy().tobytes()

    def _content(self, name: str) -> Tensor:
        """The bytes of a record, uint8; reading it to the end checks its checksum."""
        if name not in self.contents:
            data = torch.empty(self.records[name].file_size, dtype=torch.uint8)  # begins where torch's own would
            with self.archive.open(name) as file:
                into, place = memoryview(data.numpy()), 0  # type: ignore[arg-type]
                while count := file.readinto(into[place : place + MOST_DIRECTORY]):  # type: ignore[attr-defined]
                    place += count
                if place != len(into) or file.read(1):
                    raise ValueError(f"its record {name} is cut off")
            self.contents[name] = data
        return self.contents[name]

    def _interpret(self, pickled: bytes) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def taken(operation: str) -> list[Any]:
            """What an operation takes from the stack: so many values, or those since the mark."""
            place = len(stack) - _TAKES[operation] if operation in _TAKES else marks.pop()
            if place < 0:
                raise IndexError
            items = stack[place:]
            del stack[place:]
            return items

        operations: Any = pickletools.genops(pickled)  # operation, argument and place
        for number, (operation, argument, _) in enumerate(operations):
            if number > MOST_VALUES:
                raise ValueError(f"its pickle has more than {MOST_VALUES:,} operations")
            name = operation.name
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(copy.copy(_CONSTANTS[name]))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple(taken(name)))
            elif name in ("APPEND", "APPENDS"):
                items = taken(name)  # before what is then on top
                _of(list, stack[-1]).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = taken(name)
                if not all(isinstance(key, (str, int)) for key in items[::2]):
                    raise ValueError("it has keys that are neither text nor integers")
                _of(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            elif name == "GLOBAL":
                stack.append(_Name(argument[:LONGEST_NAME].replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                stack.append(_Name(".".join(_of(str, text)[:LONGEST_NAME] for text in taken(name))))
            elif name == "REDUCE":
                function, arguments = taken(name)
                stack.append(self._made(_of(_Name, function).name, _of(tuple, arguments)))
            elif name == "BUILD":
                (state,) = taken(name)  # attributes of a state_dict, such as its _metadata, which nothing here needs
                if type(stack[-1]) is not dict:
                    raise ValueError(f"it sets attributes ({type(state).__name__}) of {type(stack[-1]).__name__}")
            elif name == "BINPERSID":
                stack.append(self._storage(*_of(tuple, taken(name)[0])))
            elif name == "STOP":
                if len(stack) != 1 or marks:
                    raise ValueError(f"its pickle leaves {len(stack)} objects; expected one")
                return stack[0]
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"it asks to run code, by {name}")
        raise ValueError("its pickle is cut off")

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What the pickle wants to be made by calling `name`; these three and nothing else."""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise ValueError(f"it asks to run code, {name[:80]}")

    def _storage(self, kind: str, storage: _Name, key: str, location: str, size: int) -> tuple[torch.dtype, str]:
        package, _, name = _of(_Name, storage).name.rpartition(".")
        if kind != "storage" or package != "torch" or name not in STORAGES:
            raise ValueError(f"it holds {storage.name[:80]}; expected tensors of {', '.join(STORAGES)}")
        return STORAGES[name], f"{self.folder}data/{_of(str, key)}"

    def _tensor(self, storage: tuple[torch.dtype, str], offset: int, size: Any, stride: Any) -> Tensor:
        dtype, record = storage
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise ValueError(f"it holds more than {MOST_TENSORS:,} tensors")
        places = [_of(int, number) for number in (offset, *_of(tuple, size), *_of(tuple, stride))]
        data = self._content(record).view(dtype)
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if 0 not in size else offset
        if min(places) < 0 or len(size) > 16 or reach > len(data) or math.prod(size) > len(data):
            raise ValueError(f"it holds a tensor of shape {list(size)[:16]} without the data for it")
        return data.as_strided(size, stride, offset)


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_DICT": {},
    "EMPTY_LIST": [],
    "EMPTY_TUPLE": (),
}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2}
_TAKES |= {"BUILD": 1, "BINPERSID": 1}


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"it holds {type(value).__name__} where {kind.__name__} is expected")
    return value
