"""What torch.save wrote, read as data: there is no way here to call anything that a file names.

torch.load(weights_only=True) calls few things, but it calls them with whatever arguments a file gives, as often as it
says, and does not check the archive's checksums. Here the pickle is read by an interpreter of the few operations that
torch.save writes. It makes dictionaries, lists, tuples, numbers, text and dense tensors; the file's own size bounds
what is allocated.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.files import open_regular

MOST_DIRECTORY = 2 << 20  # bytes of the archive's table of contents; fewer than 100 a tensor
MOST_PICKLE = 16 << 20  # bytes of the pickle: everything but the tensors' data
MOST_OPERATIONS = 1_000_000
MOST_TENSORS = 30_000
LONGEST_NAME = 200  # characters of what a pickle names
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
        _check_directory(file)
        try:
            with zipfile.ZipFile(file) as archive:
                return _Reader(archive).read()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError) as error:
            raise ValueError(f"it is no archive of torch.save, or damaged: {error}") from None
        except RuntimeError as error:  # an encrypted record
            raise ValueError(str(error)) from None


def _check_directory(file: BinaryIO) -> None:
    """Refuse an archive whose table of contents alone would take much time and memory to read."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 65_557))  # the end record, and a comment of the greatest length
    tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < 22:
        raise ValueError("it is no archive of torch.save, or cut off")
    directory = int.from_bytes(tail[place + 12 : place + 16], "little")
    if tail[max(0, place - 20) : place][:4] == b"PK\6\7":  # a locator: the record for large archives counts
        named = int.from_bytes(tail[place - 12 : place - 4], "little")
        before = size - len(tail) + place - 76  # where Python looks for it, whatever the locator says
        file.seek(max(0, before))
        records = [file.read(56)]
        file.seek(min(named, size))
        records.append(file.read(56))
        sizes = [int.from_bytes(record[40:48], "little") for record in records if record[:4] == b"PK\6\6"]
        directory = max([directory % 0xFFFFFFFF, *sizes])
    elif directory == 0xFFFFFFFF:
        raise ValueError("its table of contents cannot be found")
    if directory > MOST_DIRECTORY:
        raise ValueError(f"its table of contents takes {directory:,} bytes; that of a checkpoint is smaller")
    file.seek(0)


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
        if sum(record.file_size for record in archive.infolist()) > archive.fp.seek(0, 2):  # type: ignore[union-attr]
            raise ValueError("its records lie over each other")
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, so torch.save did not write it")
        self.folder = pickles[0].removesuffix("data.pkl")
        if self._record("byteorder", b"little") != b"little":
            raise ValueError("it was written on a machine of the other byte order")
        self.storages: dict[str, Tensor] = {}
        self.tensors = 0

    def read(self) -> Any:
        """The object."""
        for name, record in self.records.items():  # what the pickle does not name is checked, too
            if not name.startswith(self.folder + "data/"):
                with self.archive.open(record) as file:
                    while file.read(1 << 20):
                        pass
        try:
            found = self._interpret(self._record("data.pkl"))
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
        for name in self.records:
            if name.startswith(self.folder + "data/"):
                self._bytes(name.removeprefix(self.folder + "data/"))
        return found

    def _record(self, name: str, default: bytes = b"") -> bytes:
        record = self.records.get(self.folder + name)
        if record is None:
            return default
        if record.file_size > MOST_PICKLE:
            raise ValueError(f"its {name} takes {record.file_size:,} bytes; that of a checkpoint is smaller")
        return self.archive.read(record)

    def _bytes(self, key: str) -> Tensor:
        """The data of a storage, uint8; reading it to the end checks its checksum."""
        if key not in self.storages:
            record = self.records[f"{self.folder}data/{key}"]
            data = torch.empty(record.file_size, dtype=torch.uint8)  # begins where torch's own tensors would
            with self.archive.open(record) as file:
                into, place = memoryview(data.numpy()), 0  # type: ignore[arg-type]
                while count := file.readinto(into[place : place + (1 << 22)]):  # type: ignore[attr-defined]
                    place += count
                if place != len(into) or file.read(1):
                    raise ValueError(f"its record {record.filename} is cut off")
            self.storages[key] = data
        return self.storages[key]

    def _interpret(self, pickled: bytes) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            place = marks.pop()
            items = stack[place:]
            del stack[place:]
            return items

        def last(count: int) -> list[Any]:
            if len(stack) < count:
                raise IndexError
            items = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return items

        for number, (operation, argument, _) in enumerate(_operations(pickled)):
            if number > MOST_OPERATIONS:
                raise ValueError(f"its pickle has more than {MOST_OPERATIONS:,} operations")
            name = operation.name
            if name in _LITERALS:
                stack.append(_LITERALS[name](argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                stack.append(tuple(last(_TUPLES[name])))
            elif name in ("APPEND", "APPENDS"):
                items = last(1) if name == "APPEND" else since_mark()
                _of(list, stack[-1]).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = last(2) if name == "SETITEM" else since_mark()
                if not all(isinstance(key, (str, int)) for key in items[::2]):
                    raise ValueError("it has keys that are neither text nor integers")
                _of(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            elif name == "GLOBAL":
                stack.append(_Name(argument[:LONGEST_NAME].replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                stack.append(_Name(".".join(_of(str, text)[:LONGEST_NAME] for text in last(2))))
            elif name == "REDUCE":
                function, arguments = last(2)
                stack.append(self._made(_of(_Name, function).name, _of(tuple, arguments)))
            elif name == "BUILD":
                state = last(1)[0]  # attributes of a state_dict, such as its _metadata, which nothing here needs
                if type(stack[-1]) is not dict:
                    raise ValueError(f"it sets attributes ({type(state).__name__}) of {type(stack[-1]).__name__}")
            elif name == "BINPERSID":
                stack.append(self._storage(*_of(tuple, last(1)[0])))
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
        if kind != "storage" or package not in ("torch", "torch.storage") or name not in STORAGES:
            raise ValueError(f"it holds {storage.name[:80]}; expected tensors of {', '.join(STORAGES)}")
        dtype = STORAGES[name]
        found = self.records[f"{self.folder}data/{_of(str, key)}"].file_size
        if _of(int, size) * dtype.itemsize > found:
            raise ValueError(f"it holds a tensor of {size:,} numbers with {found:,} bytes of data")
        return dtype, key

    def _tensor(self, storage: tuple[torch.dtype, str], offset: int, size: Any, stride: Any) -> Tensor:
        dtype, key = storage
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise ValueError(f"it holds more than {MOST_TENSORS:,} tensors")
        places = [_of(int, number) for number in (offset, *_of(tuple, size), *_of(tuple, stride))]
        data = self._bytes(key)
        data = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if 0 not in size else offset
        if min(places) < 0 or len(size) > 16 or reach > len(data) or math.prod(size) > len(data):
            raise ValueError(f"it holds a tensor of shape {list(size)[:16]} without the data for it")
        return data.as_strided(size, stride, offset)


def _operations(pickled: bytes) -> Iterator[tuple[Any, Any, Any]]:
    """Operation, argument and place; `Any`, as each operation has an argument of another kind."""
    yield from pickletools.genops(pickled)


def _same(value: Any) -> Any:
    return value


_LITERALS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _same),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"it holds {type(value).__name__} where {kind.__name__} is expected")
    return value
