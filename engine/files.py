"""Files: read only where they are regular and of a bounded size, written whole or not at all. Never imports torch.

Of several processes that do the same the first one writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from engine.distributed import is_first
from engine.errors import RunError, one_line

MOST_TEXT = 1 << 24  # bytes of a text file that a run writes: its configuration, its metrics, a sweep's list of jobs
MOST_DIRECTORY = 2 << 20  # bytes of an archive's table of contents; a checkpoint has fewer than 100 a tensor
MOST_NODES = 20_000  # of a YAML file
MOST_DIGITS = 100  # of a number in a YAML file
MOST_NESTED = 40  # levels of a YAML or JSON file


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading: a FIFO would make the program wait for ever, a device might never end.

    Raises:
        OSError: it cannot be opened, or is anything else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # asked before it is opened, which a device may feel
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


class _WithSmallTable:
    """An archive's file, from which zipfile reads the table of contents in one piece, wherever it finds how long it is.

    A large one would take much time and memory before anything of it is looked at. Records are read in smaller pieces.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._read = file.read

    def read(self, count: int = -1) -> bytes:
        if count > MOST_DIRECTORY:
            raise ValueError(f"its table of contents takes {count:,} bytes; that of a checkpoint is smaller")
        return self._read(count)


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """The ZIP archive in a file; its records are to be read in pieces of at most MOST_DIRECTORY bytes.

    Raises:
        ValueError, zipfile.BadZipFile: it is none, or its table of contents is too large or names more than there is.
    """
    archive = zipfile.ZipFile(_WithSmallTable(file))
    if sum(record.file_size for record in archive.infolist()) > file.seek(0, 2):
        raise ValueError("its records lie over each other")
    return archive


def open_own(path: str | os.PathLike[str], mode: str = "a+b") -> Any:
    """Open a file of the program's own for adding to it; one is made where there is none.

    A link would lead elsewhere, a FIFO would make the program wait: another file than a regular one is refused.

    Raises:
        OSError: it cannot be opened, or is anything else.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(descriptor, mode, buffering=0 if "b" in mode else -1)


def read_bytes(path: str | os.PathLike[str], at_most: int) -> bytes:
    """The content of a regular file of at most so many bytes; OSError if it is larger, or cannot be read."""
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"larger than the {at_most:,} bytes expected of such a file", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], at_most: int = MOST_TEXT) -> str:
    """A regular text file in UTF-8 of at most so many bytes.

    Raises:
        OSError: it cannot be read, or is larger.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, at_most).decode("utf-8-sig")


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text; anchors, by which a few lines can stand for billions, are refused.

    Raises:
        ValueError: it is no YAML, or has anchors, or too many values or levels.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = nodes = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            nodes += 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it refers to itself (a YAML anchor), which no run writes")
            plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]  # what may be read as a number
            if plain and len(event.value) > MOST_DIGITS and re.fullmatch(r"[-+.]*\d[-+\w:.]*", event.value):
                raise ValueError(f"it has a number of {len(event.value):,} digits")
            if nodes > MOST_NODES or depth > MOST_NESTED:
                raise ValueError(f"it has more than {MOST_NODES:,} values or {MOST_NESTED} levels")
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {one_line(error)}") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file's dictionary, an empty one where there is none that can be read."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: bytes | memoryview | str, *, keep: Path | None = None, sync: bool = False) -> None:
    """Write a file whole or not at all: a crash or a full disk leaves the one that was there.

    Args:
        path: the file.
        content: bytes, or text that is written as UTF-8.
        keep: a second name that the file that was there gets.
        sync: wait until it is on the disk, so that it outlasts a loss of power.

    Raises:
        RunError: it cannot be written.
    """
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a new file: a link of this name would lead elsewhere
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            _add_name(path, keep, spare=temporary.with_suffix(".keep"))
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({one_line(error)}); what was there before is unharmed") from None


def _add_name(path: Path, name: Path, spare: Path) -> None:
    """Give a file a second name, so that there is a whole file under the first at every moment."""
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without links
        shutil.copyfile(path, spare)
    os.replace(spare, name)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        RunError: it cannot be written.
        ValueError: a number in it is not finite, which JSON does not have.
    """
    write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
