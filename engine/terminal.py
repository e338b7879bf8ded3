"""Standard output and error: nothing printed steers a terminal, a reader gone is no crash. Bars of long work."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from engine.distributed import is_first
from engine.errors import RunError, printable

# What a progress bar draws itself with: a return before its text, and the way up to its line. Taken from the beginning
# of a write only, where tqdm sends them, so that no text that was read from somewhere can hold one.
_OF_A_BAR = re.compile(r"\r+|(?:\x1b\[A)+$")


def escaped(text: str) -> str:
    """Text of any number of lines whose control characters, but for the ends of lines and tabs, are written out."""
    return re.sub(r"[^\n\t]+", lambda found: printable(found[0]), text)


class SafeStream(io.TextIOWrapper):
    """A standard stream that writes control characters as escapes and remembers why nothing more could be written.

    Args:
        stream: the one in whose place it stands; both write into the same buffer.
        is_error: standard error: a bar may be drawn there, and that it cannot be written to is nobody's concern.
    """

    def __init__(self, stream: io.TextIOWrapper, is_error: bool) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self.is_error = is_error
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, all but a bar's own control characters escaped."""
        bar = _OF_A_BAR.match(text) if self.is_error else None
        start = bar[0] if bar else ""
        self._trying(super().write, start + escaped(text[len(start) :]))
        return len(text)

    def flush(self) -> None:
        """Send what is buffered."""
        self._trying(super().flush)

    def _trying(self, act: Callable[..., Any], *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            self.failure = error
            if not self.is_error:
                raise


_before: list[tuple[str, Any]] = []  # the streams in whose place ours stand


def guard() -> None:
    """Put streams of this kind in the place of standard output and error, if they are not there yet.

    Descriptors that were closed (`2>&-`) lead to nowhere: else the next file that is opened would get their number, and
    what a library writes to standard error would go into a checkpoint.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if not is_first():  # it has nothing to say but its errors
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, SafeStream):
            _before.append((name, stream))
            setattr(sys, name, SafeStream(stream, is_error=name == "stderr"))


def is_cut_off(error: BaseException) -> bool:
    """Whether an exception only says that standard output takes nothing more."""
    return isinstance(sys.stdout, SafeStream) and error is sys.stdout.failure


@contextlib.contextmanager
def until_cut_off() -> Iterator[None]:
    """A part of the program that quietly ends where standard output takes nothing more, which `release` tells."""
    try:
        yield
    except OSError as error:
        if not is_cut_off(error):
            raise


def release(exit_code: int) -> int:
    """Send what is left to standard output, put the streams back, and return the exit code to leave with.

    That is 141, as a shell reports it, where the reader has gone (`| head`), and 1 where the output is lost.
    """
    while _before:
        name, before = _before.pop()
        stream = getattr(sys, name)
        setattr(sys, name, before)
        if not isinstance(stream, SafeStream):
            continue  # somebody else put another there
        with contextlib.suppress(OSError):
            stream.flush()
        if stream.failure is not None:  # what is left over goes nowhere, at the end of the process too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream.failure is not None and not stream.is_error:
            if stream.failure.errno != errno.EPIPE:
                print(f"error: standard output cannot be written: {stream.failure.strerror}", file=sys.stderr)
            exit_code = exit_code or (128 + 13 if stream.failure.errno == errno.EPIPE else RunError.exit_code)
        stream.detach()  # or the buffer would be closed with it
    return exit_code


def width() -> int | None:
    """Columns of the terminal that standard output is, None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def aligned(columns: Iterable[Sequence[str]], to_the_right: Iterable[bool]) -> str:
    """Columns of text side by side, each as wide as its widest cell, and which of them are aligned to the right."""
    padded = []
    for cells, right in zip(columns, to_the_right, strict=True):
        widest = max(map(len, cells))
        padded.append([cell.rjust(widest) if right else cell.ljust(widest) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Lines and bars

log = logging.getLogger("run")  # to the terminal and to train.log
log.setLevel(logging.DEBUG)  # whatever Hydra has done to the root's

label = ""  # "job 3/12" while a job of a sweep runs in this process


def is_terminal() -> bool:
    """Whether stderr is a terminal that is this process's to draw on; it may also have been closed (`2>&-`)."""
    return sys.stderr is not None and sys.stderr.isatty() and is_first()


def watched(items: Iterable[Any], title: str, total: int | None = None) -> tqdm:
    """Items that are counted by a bar on stderr from the second second on; by none if that is no terminal.

    Args:
        items: whatever is gone through.
        title: what is being done.
        total: how many there are, where that is known.
    """
    return tqdm(
        items,
        desc=f"{label}  {printable(title)}".strip(),
        total=total or None,
        delay=1,
        leave=False,
        disable=not is_terminal(),
        dynamic_ncols=True,
        bar_format=None if not total else "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}]",
    )
