"""What is wrong with images before anything is trained: files that cannot be read, and images that are in two splits.

Of every image a digest of 16 bytes is kept: of a file's bytes, or of the pixels of samples in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.data.images import ImageFiles
from engine.data.splits import Split
from engine.errors import RequestError
from engine.files import open_regular
from engine.terminal import watched

AT_ONCE = 1024  # files that wait for the threads


class Looked(NamedTuple):
    """What looking at the images of a split told.

    Attributes:
        digests: uint64 `[n, 2]`, in the order of its indices.
        errors: why an image cannot be read, by its place among them.
    """

    digests: np.ndarray
    errors: dict[int, str]


def look_at(split: Split, title: str, threads: int) -> Looked | None:
    """Read all images of a split; None for data of a user's own class, which may draw what it gives at random."""
    if split.indices is None or not isinstance(split.part, (tuple, ImageFiles)):
        return None
    errors: dict[int, str] = {}
    digests = np.zeros((len(split), 2), dtype=np.uint64)
    rows = split.indices.tolist()
    found = _of_files(split.part, rows, threads) if isinstance(split.part, ImageFiles) else _of_pixels(split, rows)
    for place, (digest, error) in enumerate(watched(found, f"checking {title}", len(rows))):
        digests[place] = np.frombuffer(digest, dtype=np.uint64)
        if error:
            errors[place] = error
    return Looked(digests, errors)


def _of_pixels(split: Split, rows: list[int]) -> Iterator[tuple[bytes, str]]:
    images = split.part[0].numpy()
    return ((hashlib.blake2b(images[row].tobytes(), digest_size=16).digest(), "") for row in rows)


def _of_files(files: ImageFiles, rows: list[int], threads: int) -> Iterator[tuple[bytes, str]]:
    """Digests of files, and what is wrong with them. A JPEG is decoded at an eighth, which finds what is cut off.

    Threads are enough, as decoding leaves Python's lock.
    """

    def look(row: int) -> tuple[bytes, str]:
        digest = hashlib.blake2b(digest_size=16)
        try:
            files.read(row, at_least=(1, 1))
            with open_regular(str(files.paths[row])) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except RequestError as error:
            return bytes(16), str(error)
        return digest.digest(), ""

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # each thread would put back what another has set
    try:
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(rows), AT_ONCE):
                yield from pool.map(look, rows[first : first + AT_ONCE])
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def in_two_splits(looked: dict[str, Looked]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Of every two splits the images of the second that are in the first too: (place there, place in the second)."""
    return {(one, other): _in_both(looked[one], looked[other]) for one, other in combinations(looked, 2)}


def _in_both(first: Looked, second: Looked) -> list[tuple[int, int]]:
    keys = np.concatenate([first.digests, second.digests])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of the same images, those of the first split come first
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (keys[order][1:] != keys[order][:-1]).any(1)
    earliest = order[begins][begins.cumsum() - 1]  # of the images that are the same
    both = (order >= len(first.digests)) & (earliest < len(first.digests))
    pairs = zip(earliest[both].tolist(), (order[both] - len(first.digests)).tolist(), strict=True)
    return sorted(
        ((a, b) for a, b in pairs if a not in first.errors and b not in second.errors), key=lambda pair: pair[1]
    )
