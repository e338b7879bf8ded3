"""Image files decoded once, into a file of bytes that is mapped into memory.

Two files: NAME.json says which sources (names, sizes, times) and which Resize are in NAME-*.uint8. The bytes are
written first and under a name of their own, then the JSON is replaced in one step: no moment shows half of a cache.
Whoever makes one holds the lock on NAME.lock meanwhile.

What stands in a JSON file is data that anybody may have put there: one that is not as it was written is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import files as safe
from engine.data.augment import Resize
from engine.data.devices import cores
from engine.data.images import ImageFiles, shown
from engine.data.reader import Reader, cannot_be_read
from engine.data.workers import Workers
from engine.errors import RequestError, RunError, one_line, printable
from engine.terminal import watched

Cache = tuple[Tensor, dict[int, str]]

FORMAT = 1
BATCH = 64  # images a worker decodes before it sends them


def cached_images(files: ImageFiles, resize: Resize | None, folder: Path, skip_unreadable: bool) -> Cache:
    """The images of files, after `resize` if any, from their cache in `folder`, which is made anew if it does not fit.

    Returns:
        uint8 `[n, channels, height, width]`, mapped into memory; and row to error of those that could not be
        read, which are black: that is an error without `skip_unreadable`.

    Raises:
        RequestError: an image cannot be read, or they differ in size.
        RunError: the cache cannot be written.
    """
    try:
        sources = [_source(path) for path in files.paths.tolist()]
    except OSError as error:
        raise RequestError(f"{shown(error.filename)}: cannot be read ({one_line(error, 120)})") from error
    described = {
        "format": FORMAT,
        "resize": None if resize is None else {"size": resize.size, "interpolation": resize.interpolation},
        "antialias": resize is None or resize.antialias,
        "channels": files.channels,
        "sources": sources,
    }
    parent = os.path.commonpath([os.path.dirname(path) for path, _, _ in sources])
    key = [parent, described["resize"], described["antialias"], files.channels, files.name]
    name = f"{Path(parent).name[:40]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    sidecar = folder / f"{name}.json"
    found, reason = _open(sidecar, described, skip_unreadable)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            found, reason = _open(sidecar, described, skip_unreadable)  # another run may have made it meanwhile
            if found is None:
                print(f"caching {len(files):,} images in {printable(str(folder))}: {reason}", flush=True)
                _write(files, resize, sidecar, described, skip_unreadable)
                found, reason = _open(sidecar, described, skip_unreadable)
    except OSError as error:
        raise RunError(
            f"the image cache cannot be written in {folder} ({one_line(error, 120)}); "
            "make room, set dataset.cache_dir, or dataset.cache=false"
        ) from error
    if found is None:
        raise RunError(f"{sidecar}: {reason} just after it was written; is another program writing there?")
    return found


def _source(path: str) -> list[Any]:
    """Name, size in bytes and time of modification in nanoseconds."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file that is there only meanwhile; waits, with a line that says so, while another run has it.

    A POSIX record lock, as a run has on its directory: the kernel drops it with the process, and worker processes do
    not inherit it. (Those of the package filelock, which torch brings along, are inherited by what is forked.)
    """
    told = False
    while True:
        file = safe.open_own(path)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # both mean that somebody has it
            if not told:
                print(f"waiting for another run that is making this cache ({printable(str(path))})", flush=True)
                told = True
            fcntl.lockf(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # whoever had it took the file away
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open(sidecar: Path, described: dict[str, Any], skip_unreadable: bool) -> tuple[Cache | None, str]:
    """The cache, or None and why there is none."""
    if not os.path.lexists(sidecar):
        return None, "they were not cached yet"
    count = len(described["sources"])
    try:
        longest = (1 << 20) + sum(2 * len(path) + 400 for path, _, _ in described["sources"])  # messages included
        kept = json.loads(safe.read_text(sidecar, longest))
        if kept["sources"] != described["sources"]:
            return None, f"their cache no longer fits them ({_difference(kept['sources'], described['sources'])})"
        if any(kept[part] != value for part, value in described.items()):
            return None, "their cache was made with other settings"
        unreadable = {int(row): str(text) for row, text in kept["unreadable"].items()}
        if not all(0 <= row < count for row in unreadable):
            raise ValueError("it names rows that there are not")
        shape, name = kept["shape"], kept["data"]
        if not (isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and n > 0 for n in shape)):
            raise ValueError("its shape is none")
        size = (described["resize"] or {}).get("size", [])
        expected = [count, described["channels"], *(size if len(size) == 2 else shape[2:])]
        if shape != expected:
            raise ValueError(f"its shape is {shape}, expected {expected}")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError("its data has to be a file beside it")
        if unreadable and not skip_unreadable:
            return None, "some could not be read the last time"
        with safe.open_regular(sidecar.with_name(name)) as file:
            if os.fstat(file.fileno()).st_size != math.prod(shape):
                return None, f"{printable(name)} has not the size it was written with"
            # Never written to; "r" makes torch warn.
            pixels = np.memmap(file, dtype=np.uint8, mode="c", shape=tuple(shape))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return None, f"{printable(sidecar.name)} is damaged ({type(error).__name__}: {one_line(error, 80)})"
    return (torch.from_numpy(pixels), unreadable), ""


def _difference(kept: list[Any], now: list[Any]) -> str:
    before, after = {tuple(source) for source in kept}, {tuple(source) for source in now}
    changed = sorted({str(source[0]) for source in after ^ before})
    if not changed:
        return "their order differs"
    first = printable(changed[0])
    return f"{len(changed):,} files differ, the first is {first}" if len(changed) > 1 else f"{first} differs"


def _write(
    files: ImageFiles, resize: Resize | None, sidecar: Path, described: dict[str, Any], skip_unreadable: bool
) -> None:
    """Decode everything in worker processes and write it, then the JSON, then remove what it replaces."""
    descriptor, name = tempfile.mkstemp(".uint8", f"{sidecar.stem}-", sidecar.parent)
    data = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            shape, unreadable = _decode(files, resize, file, sidecar.parent, skip_unreadable)
            file.truncate(math.prod(shape))
            file.flush()
            os.fsync(file.fileno())
        content = {**described, "data": data.name, "shape": shape, "unreadable": unreadable}
        safe.write(sidecar, json.dumps(content), sync=True)
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    for old in sidecar.parent.glob(f"{glob.escape(sidecar.stem)}-*.uint8"):
        if old.name != data.name:  # not the paths: of the two one may be relative
            old.unlink(missing_ok=True)  # a run that has it mapped keeps it until it ends


def _decode(
    files: ImageFiles, resize: Resize | None, file: Any, folder: Path, skip_unreadable: bool
) -> tuple[list[int], dict[int, str]]:
    """Write all images, each to its place; returns the shape of them all, and row to error of the unreadable ones."""
    batches = torch.arange(len(files)).split(BATCH)
    workers = Workers(_CacheReader(files, resize), min(cores(), len(batches)) if len(batches) > 4 else 0, BATCH)
    shape: list[int] = []
    unreadable: dict[int, str] = {}
    with watched(range(len(files)), "caching", len(files)) as done:
        for images, rows, failures in workers.read(0, batches):
            unreadable |= failures
            done.update(len(rows))
            if len(failures) == len(rows) or (unreadable and not skip_unreadable):
                continue  # only to count the others
            if not shape:
                shape = [len(files), *images.shape[1:]]
                size, free = math.prod(shape), shutil.disk_usage(folder).free
                if size > free:
                    raise OSError(errno.ENOSPC, f"it needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            if list(images.shape[1:]) != shape[1:]:
                raise RequestError(
                    f"images of different sizes: {files.paths[int(rows[0])]} is {list(images.shape[1:])}, not "
                    f"{shape[1:]}; "
                    "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
                )
            for row, image in zip(rows.tolist(), images, strict=True):
                if row not in failures:
                    file.seek(row * image.numel())
                    file.write(image.numpy().data)
    if unreadable and not (skip_unreadable and shape):
        errors = [unreadable[row] for row in sorted(unreadable)]
        helps = not skip_unreadable and len(unreadable) < len(files)
        raise RequestError(cannot_be_read(errors, f"the {len(files):,} images", training=helps))
    return shape, unreadable


class _CacheReader(Reader):
    """Batches of images as bytes, their rows, and {row: message} of those that cannot be read."""

    def __init__(self, files: ImageFiles, resize: Resize | None) -> None:
        super().__init__(files, [] if resize is None else [resize], 0, 0, skip_unreadable=True)

    def read(self, epoch: int, indices: Tensor, into: Tensor | None = None, around: Any = None) -> Any:
        failures: dict[int, str] = {}
        try:
            images, _ = self._batch(self._samples(epoch, indices, failures), indices, into)
        except RunError as error:
            if len(failures) < len(indices):
                raise RequestError(str(error)) from error
            images = torch.zeros(0)
        return images, indices, {int(indices[place]): message for place, message in failures.items()}
