"""CSV files that list images: file name and label in the first two columns."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.folders import some
from engine.data.images import EXTENSIONS, Paths, shown
from engine.errors import RequestError, one_line, printable
from engine.files import read_text
from engine.terminal import watched

MOST_TEXT = 1 << 28  # bytes of a CSV file
FIRST = 1000  # rows, or all, of which one has to be there before the others are read
LISTED = 10  # entries of a folder that are looked at for each name that is wanted of it


class Annotations(NamedTuple):
    """What a CSV file lists: an image in every row but a header.

    Attributes:
        file: its path.
        header: rows before the first image, 0 or 1.
        paths: of the images.
        texts: the labels that occur, in the order in which they first do.
        places: of each image the place of its label among them, int64 `[n]`.
    """

    file: str
    header: int
    paths: Paths
    texts: list[str]
    places: np.ndarray

    def first(self, text: str) -> str:
        """The file and its first row with this label, for a message."""
        return _row(self.file, self.header + int((self.places == self.texts.index(text)).argmax()))


def _reader(file: str) -> Any:
    """A csv.reader of a file whose content was read."""
    try:
        text = read_text(file, MOST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 120)
        raise RequestError(f"{shown(file)}: cannot be read as a CSV file in UTF-8 ({reason})") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _table(file: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells, without blanks at their ends, of every row that is not empty."""
    reader = _reader(file)
    for row in reader:
        if any(cells := [cell.strip() for cell in row]):
            yield reader.line_num, cells


def _row(file: str, place: int) -> str:
    """The file and one of its rows that are not empty, by its line. Counted when it is asked for, which is rare."""
    line, _ = next(islice(_table(file), place, None))
    return f"{shown(file)}, row {line}"


def read_annotations(file: str, img_dir: str) -> Annotations:
    """What a CSV file lists.

    The first row is a header if no file has its name, which is not that of an image, and no other row has its label.

    Raises:
        RequestError: the list cannot be read, is empty, or names files that are not there.
    """
    if not Path(img_dir).is_dir():
        raise RequestError(f"dataset.img_dir={shown(img_dir)}: no such folder")
    reader, top = _reader(file), os.path.join(img_dir, "")
    paths, of_folder = list[str](), defaultdict[str, list[str]](list)
    labels, numbers = list[int](), defaultdict[str, int](count().__next__)
    try:
        for rows in (islice(reader, FIRST), reader):
            for row in rows:
                if len(row) < 2 or not (name := row[0].strip()) or not (label := row[1].strip()):
                    if any(cells := [cell.strip() for cell in row]):
                        found = f"{_cut(str(cells))}; expected a file name and a label"
                        raise RequestError(f"{shown(file)}, row {reader.line_num}: {found}")
                    continue
                path = name if name.startswith("/") else top + name
                paths.append(path)
                of_folder[path[: path.rfind("/") + 1]].append(path)
                labels.append(numbers[label])
            if not any(map(os.path.isfile, paths)):
                break  # the names or the folder are wrong, and the rest would tell nothing new
    except csv.Error as error:
        raise RequestError(f"{shown(file)}, row {reader.line_num}: {one_line(error)}") from None
    gone = _gone(of_folder)
    missing = [place for place, path in enumerate(paths) if path in gone] if gone else []
    header = int(missing[:1] == [0] and not paths[0].lower().endswith(EXTENSIONS) and labels.count(0) == 1)
    if len(paths) == header:
        raise RequestError(f"{shown(file)}: lists no image; expected rows of file name and label")
    if missing := missing[header:]:
        path = paths[missing[0]]
        others = f", nor are those of {len(missing) - 1:,} other row{'s' * (len(missing) > 2)}" if missing[1:] else ""
        ending = next((ending for ending in EXTENSIONS if os.path.isfile(path + ending)), None)
        way_out = f"write names with their ending ({ending})" if ending else "correct the name, or dataset.img_dir"
        raise RequestError(f"{_row(file, missing[0])}: {shown(path)} is not there{others}; {way_out}")
    return Annotations(file, header, Paths.of(paths[header:]), [*numbers][header:], np.array(labels[header:]) - header)


def _gone(of_folder: dict[str, list[str]]) -> set[str]:
    """Of paths by their folders those that lead to no file.

    Folders are listed, as asking for each file takes several times as long. What does not turn up among the first
    entries is asked for: a folder may hold far more than is wanted of it, or not tell capitals from small letters.
    """
    gone = set[str]()
    for folder, paths in watched(of_folder.items(), "looking for the images", len(of_folder)):
        left = set(paths)
        with suppress(OSError, ValueError), os.scandir(folder) as entries:
            few = islice(entries, LISTED * len(paths))
            left.difference_update([folder + entry.name for entry in few if entry.is_file()])
        gone.update(path for path in left if not os.path.isfile(path))
    return gone


def class_names(listed: Annotations, given: list[str] | None) -> tuple[list[str], bool]:
    """The names of the classes, and whether labels are numbers of classes, not names.

    They are the `given` ones in the order of their numbers, or else all that labels of the training images name.

    Raises:
        RequestError: the second column cannot be the labels; a number is below 0, or would leave most classes empty.
    """
    numbers = all(map(_is_number, listed.texts))
    if given:
        names = [str(name) for name in given]
        return names, numbers and listed.texts[0] not in names
    _check_column(listed)
    if not numbers:
        return sorted(listed.texts), False
    occur = {_number(text) for text in listed.texts}
    for text in listed.texts:
        label = _number(text)
        if not 0 <= label < 10 * len(occur) + 10:
            would = (
                f"would make {label + 1:,} classes, but only {len(occur)} labels occur" if label > 0 else "is below 0"
            )
            raise RequestError(
                f"{listed.first(text)}: label {_cut(text)} {would}; number the classes from 0, or write names"
            )
    return [str(label) for label in range(max(occur) + 1)], True


def _check_column(listed: Annotations) -> None:
    """Refuse a second column that cannot be the labels, as all of it, or nearly nothing, is the same."""
    images, texts = len(listed.paths), listed.texts
    if 1 < len(texts) <= max(2, 0.8 * images):
        return
    found = f"has {len(texts):,} values in {images:,} rows"
    if len(texts) == 1:
        found = f"is {_cut(texts[0])!r} in every row"
    way_out = "expected two or more classes of several images"
    table = [cells for _, cells in _table(listed.file)]
    head = table.pop(0) if listed.header else []
    for place in range(2, min(map(len, table))):
        if 1 < len({cells[place] for cells in table}) <= 0.5 * len(table):
            name = f" ({_cut(head[place])})" if place < len(head) else ""
            way_out = f"is column {place + 1}{name} the label? then make it the second"
            break
    raise RequestError(f"{shown(listed.file)}: its second column, the label, {found}; {way_out}")


def _cut(text: str) -> str:
    """A cell as messages have it."""
    text = printable(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _number(text: str) -> int:
    """The integer; of one that is too large in any case another such."""
    return int(text[:18])


def labels_of(listed: Annotations, names: list[str], numbers: bool) -> Tensor:
    """The class indices of all images, int64 `[n]`; `names` and `numbers` as `class_names` has them.

    Raises:
        RequestError: a label that means no class.
    """
    place = {name: label for label, name in enumerate(names)}
    labels = []
    for text in listed.texts:
        label = (_number(text) if _is_number(text) else -1) if numbers else place.get(text, -1)
        if not 0 <= label < len(names):
            expected = f"0 to {len(names) - 1}" if numbers else f"one of {some([_cut(name) for name in names])}"
            raise RequestError(
                f"{listed.first(text)}: label {_cut(text)!r}; expected {expected}, as there are {len(names)} classes"
            )
        labels.append(label)
    return torch.tensor(labels)[listed.places]
