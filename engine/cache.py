"""Image files decoded once, into a file of bytes that is mapped into memory.

Two files: NAME.json says which sources (names, sizes, times) and which Resize are in NAME-*.uint8. The bytes are
written first and under a name of their own, then the JSON is replaced in one step: no moment shows half of a cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.augment import Resize, to_float
from engine.errors import RequestError, RunError, one_line
from engine.reader import Reader, Workers, cores

FORMAT = 1
BATCH = 64  # images a worker decodes before it sends them


def cached_images(
    files: Any, resize: Resize | None, folder: Path, skip_unreadable: bool
) -> tuple[Tensor, dict[int, str]]:
    """The images of `datasets.ImageFiles` from their cache, which is made or made again where it does not fit them.

    Args:
        files: the sources.
        resize: done before they are kept; None keeps them as they are.
        folder: where caches lie.
        skip_unreadable: keep black images in place of those that cannot be read.

    Returns:
        uint8 `[n, channels, height, width]`, mapped into memory; and row to error, of those that could not be read.

    Raises:
        RequestError: an image cannot be read, or they differ in size.
        RunError: the cache cannot be written.
    """
    described = {
        "format": FORMAT,
        "resize": None if resize is None else {"size": resize.size, "interpolation": resize.interpolation},
        "antialias": resize is None or resize.antialias,
        "channels": files.channels,
        "sources": [_source(str(path)) for path in files.paths],
    }
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(str(path))) for path in files.paths])
    key = [parent, described["resize"], described["antialias"], files.channels, files.name]
    name = f"{Path(parent).name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    sidecar = folder / f"{name}.json"
    found, reason = _open(sidecar, described, skip_unreadable)
    if found is not None:
        return found
    print(f"caching {len(files):,} images in {folder}: {reason}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(files, resize, sidecar, described, skip_unreadable)
    except OSError as error:
        raise RunError(
            f"the image cache cannot be written in {folder} ({one_line(error, 120)}); "
            "make room, set dataset.cache_dir, or dataset.cache=false"
        ) from None
    found, reason = _open(sidecar, described, skip_unreadable)
    if found is None:
        raise RunError(f"{sidecar}: {reason} just after it was written; is another run writing it with other settings?")
    return found


def _source(path: str) -> list[Any]:
    """Name, size in bytes and time of modification in nanoseconds of a source."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({one_line(error, 120)})") from None
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _open(
    sidecar: Path, described: dict[str, Any], skip_unreadable: bool
) -> tuple[tuple[Tensor, dict[int, str]] | None, str]:
    """The cache, or None and why there is none."""
    if not sidecar.is_file():
        return None, "they were not cached yet"
    try:
        kept = json.loads(sidecar.read_text(encoding="utf-8"))
        data = sidecar.with_name(kept["data"])
        shape, unreadable = kept["shape"], {int(row): text for row, text in kept["unreadable"].items()}
        if kept["sources"] != described["sources"]:
            return None, f"their cache no longer fits them ({_difference(kept['sources'], described['sources'])})"
        if any(kept[part] != value for part, value in described.items()):
            return None, "their cache was made with other settings"
        if data.stat().st_size != math.prod(shape):
            return None, f"{data.name} has not the size it was written with"
        if unreadable and not skip_unreadable:
            return None, "some could not be read the last time"
        pixels = np.memmap(data, dtype=np.uint8, mode="c", shape=tuple(shape))  # never written to; "r" makes torch warn
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{sidecar.name} is damaged ({one_line(error, 80)})"
    return (torch.from_numpy(pixels), unreadable), ""


def _difference(kept: list[Any], now: list[Any]) -> str:
    before, after = {tuple(source) for source in kept}, {tuple(source) for source in now}
    changed = sorted(after ^ before)
    if not changed:
        return "their order differs"
    return f"{len({source[0] for source in changed}):,} files differ, the first is {changed[0][0]}"


def _write(files: Any, resize: Resize | None, sidecar: Path, described: dict[str, Any], skip_unreadable: bool) -> None:
    """Decode everything in worker processes and write it, then the JSON, then remove what it replaces."""
    reader = _CacheReader(files, resize)
    workers = Workers(reader, cores() if len(files) > 4 * BATCH else 0, BATCH)
    shape: list[int] | None = None
    unreadable: dict[int, str] = {}
    with tempfile.NamedTemporaryFile(
        dir=sidecar.parent, prefix=f"{sidecar.stem}-", suffix=".uint8", delete=False
    ) as file:
        data = Path(file.name)
        try:
            for images, rows, failures in workers.read(0, torch.arange(len(files)).split(BATCH)):
                if failures and not skip_unreadable:
                    message = next(iter(failures.values()))
                    raise RequestError(f"{message} (dataset.skip_unreadable=true leaves it out of training)")
                unreadable |= failures
                if len(failures) == len(rows):
                    continue
                if shape is None:
                    shape = [len(files), *images.shape[1:]]
                    _check_room(sidecar.parent, math.prod(shape))
                if list(images.shape[1:]) != shape[1:]:
                    raise RequestError(
                        f"images of different sizes: {files.paths[int(rows[0])]} is {list(images.shape[1:])}, not "
                        f"{shape[1:]}; "
                        "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
                    )
                for row, image in zip(rows.tolist(), images, strict=True):
                    if row in failures:
                        continue
                    file.seek(row * image.numel())
                    file.write(image.numpy().data)
            if shape is None:
                raise RequestError(f"none of the {len(files)} images can be read; the first: {unreadable[0]}")
            file.truncate(math.prod(shape))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            data.unlink(missing_ok=True)
            raise
    content = {**described, "data": data.name, "shape": shape, "unreadable": unreadable}
    temporary = sidecar.with_name(f".{sidecar.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, sidecar)
    for old in sidecar.parent.glob(f"{sidecar.stem}-*.uint8"):
        if old != data:
            old.unlink(missing_ok=True)  # a run that has it mapped keeps it until it ends


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RunError(
            f"the image cache needs {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; "
            "make room, set dataset.cache_dir, or dataset.cache=false"
        )


class _CacheReader(Reader):
    """Batches of images as bytes, their rows, and {row: message} of those that cannot be read."""

    def __init__(self, files: Any, resize: Resize | None) -> None:
        super().__init__(files, [] if resize is None else [resize], 0, 0, False)

    def read(self, epoch: int, indices: Tensor, into: Tensor | None = None) -> Any:
        failures: dict[int, str] = {}
        try:
            images, _ = self._batch(self._readable(indices, failures), indices, into)
        except RunError:
            if len(failures) < len(indices):
                raise
            images = torch.zeros(0)
        return images, indices, failures

    def _readable(self, indices: Tensor, failures: dict[int, str]) -> Iterator[tuple[int, Tensor, int]]:
        for place, row in enumerate(indices.tolist()):
            try:
                image = self._transform(self.part.read(row, self.size), None, 0)
            except RunError as error:
                failures[row] = str(error)
                continue
            yield place, image if image.dtype == torch.uint8 else to_float(image).mul(255).round().to(torch.uint8), row
