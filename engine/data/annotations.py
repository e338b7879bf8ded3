"""CSV files that list images: file name and label in the first two columns."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from engine.data.folders import some
from engine.data.images import EXTENSIONS, shown
from engine.errors import RequestError, one_line, printable
from engine.files import read_text
from engine.terminal import watched

MOST_TEXT = 1 << 28  # bytes of a CSV file
FIRST = 1000  # rows of which at least one has to be there before the others are read


def _table(file: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells, without blanks at their ends, of every row that is not empty."""
    try:
        text = read_text(file, MOST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 120)
        raise RequestError(f"{shown(file)}: cannot be read as a CSV file in UTF-8 ({reason})") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield reader.line_num, cells
    except csv.Error as error:
        raise RequestError(f"{shown(file)}, row {reader.line_num}: {one_line(error)}") from None


def read_annotations(file: str, img_dir: str) -> list[tuple[int, str, str]]:
    """Line number, path and label of every row but a header.

    The first row is one if no file has its name, which is not that of an image, and no other row has its label.

    Raises:
        RequestError: the list cannot be read, is empty, or names files that are not there.
    """
    if not Path(img_dir).is_dir():
        raise RequestError(f"dataset.img_dir={shown(img_dir)}: no such folder")
    rows: list[tuple[int, str, str]] = []
    for number, cells in watched(_table(file), f"reading {shown(file)}", None):
        if len(cells) < 2 or not cells[0] or not cells[1]:
            raise RequestError(f"{shown(file)}, row {number}: {cut(str(cells))}; expected a file name and a label")
        rows.append((number, os.path.join(img_dir, cells[0]), cells[1]))
        if len(rows) == FIRST and not any(os.path.isfile(path) for _, path, _ in rows):
            break  # the names or the folder are wrong, and the rest would tell nothing new
    missing = [row for row in rows if not os.path.isfile(row[1])]
    no_image = missing and missing[0] is rows[0] and not rows[0][1].lower().endswith(EXTENSIONS)
    if no_image and all(label != rows[0][2] for _, _, label in rows[1:]):
        del rows[0], missing[0]
    if not rows:
        raise RequestError(f"{shown(file)}: lists no image; expected rows of file name and label")
    if missing:
        number, path, _ = missing[0]
        others = f", nor are those of {len(missing) - 1:,} other row{'s' * (len(missing) > 2)}" if missing[1:] else ""
        ending = next((ending for ending in EXTENSIONS if os.path.isfile(path + ending)), None)
        way_out = f"write names with their ending ({ending})" if ending else "correct the name, or dataset.img_dir"
        raise RequestError(f"{shown(file)}, row {number}: {shown(path)} is not there{others}; {way_out}")
    return rows


def check_labels(rows: list[tuple[int, str, str]], file: str) -> None:
    """Refuse a second column that cannot be the labels, as all of it, or nearly nothing, is the same."""
    labels = {label for _, _, label in rows}
    if 1 < len(labels) <= max(2, 0.8 * len(rows)):
        return
    found = f"has {len(labels):,} values in {len(rows):,} rows"
    if len(labels) == 1:
        found = f"is {cut(rows[0][2])!r} in every row"
    lines = {number for number, _, _ in rows}
    first, *table = [cells for number, cells in _table(file)]
    head = None if min(lines) == 1 else first
    table = table if head else [first, *table]
    for place in range(2, min(map(len, table))):
        if 1 < len({cells[place] for cells in table}) <= 0.5 * len(table):
            name = f" ({cut(head[place])})" if head and place < len(head) else ""
            raise RequestError(
                f"{shown(file)}: its second column, the label, {found}; "
                f"is column {place + 1}{name} the label? then make it the second"
            )
    raise RequestError(
        f"{shown(file)}: its second column, the label, {found}; expected two or more classes of several images"
    )


def count_classes(rows: list[tuple[int, str, str]], file: str) -> int:
    """How many classes labels that are numbers stand for.

    Raises:
        RequestError: a number below 0, or one that would leave most classes empty.
    """
    occur = {number_of(label) for _, _, label in rows}
    for row, _, text in rows:
        label = number_of(text)
        if label < 0 or label >= 10 * len(occur) + 10:
            would = (
                f"would make {label + 1:,} classes, but only {len(occur)} labels occur" if label > 0 else "is below 0"
            )
            raise RequestError(
                f"{shown(file)}, row {row}: label {cut(text)} {would}; number the classes from 0, or write names"
            )
    return max(occur) + 1


def cut(text: str) -> str:
    """A cell as messages have it."""
    text = printable(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(text: str) -> bool:
    """Whether a label is an integer."""
    return text.removeprefix("-").isdecimal()


def number_of(text: str) -> int:
    """The integer; of one that is too large in any case another such."""
    return int(text[:18])


def labels_of(rows: list[tuple[int, str, str]], names: list[str], numbers: bool, file: str) -> list[int]:
    """The class indices of all rows.

    Args:
        rows: as `read_annotations` has them.
        names: of the classes.
        numbers: whether labels are numbers of classes, or their names.
        file: where the rows are from.

    Raises:
        RequestError: a label that means no class.
    """
    place = {name: label for label, name in enumerate(names)}
    labels = []
    for number, _, text in rows:
        label = (number_of(text) if is_number(text) else -1) if numbers else place.get(text, -1)
        if not 0 <= label < len(names):
            expected = f"0 to {len(names) - 1}" if numbers else f"one of {some([cut(name) for name in names])}"
            raise RequestError(
                f"{shown(file)}, row {number}: label {cut(text)!r}; expected {expected}, as there are "
                f"{len(names)} classes"
            )
        labels.append(label)
    return labels
