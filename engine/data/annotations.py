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

Row = tuple[int, str, str]  # line number, path, label
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


def read_annotations(file: str, img_dir: str) -> list[Row]:
    """Every row but a header.

    The first row is one if no file has its name, which is not that of an image, and no other row has its label.

    Raises:
        RequestError: the list cannot be read, is empty, or names files that are not there.
    """
    if not Path(img_dir).is_dir():
        raise RequestError(f"dataset.img_dir={shown(img_dir)}: no such folder")
    rows: list[Row] = []
    for number, cells in watched(_table(file), f"reading {shown(file)}", None):
        if len(cells) < 2 or not cells[0] or not cells[1]:
            raise RequestError(f"{shown(file)}, row {number}: {_cut(str(cells))}; expected a file name and a label")
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


def class_names(rows: list[Row], given: list[str] | None, file: str) -> tuple[list[str], bool]:
    """The names of the classes, and whether labels are numbers of classes, not names.

    They are the `given` ones in the order of their numbers, or else all that labels of the training images name.

    Raises:
        RequestError: the second column cannot be the labels; a number is below 0, or would leave most classes empty.
    """
    labels = {label for _, _, label in rows}
    numbers = all(map(_is_number, labels))
    if given:
        names = [str(name) for name in given]
        return names, numbers and rows[0][2] not in names
    _check_column(rows, labels, file)
    if not numbers:
        return sorted(labels), False
    occur = {_number(label) for label in labels}
    for row, _, text in rows:
        label = _number(text)
        if not 0 <= label < 10 * len(occur) + 10:
            would = (
                f"would make {label + 1:,} classes, but only {len(occur)} labels occur" if label > 0 else "is below 0"
            )
            raise RequestError(
                f"{shown(file)}, row {row}: label {_cut(text)} {would}; number the classes from 0, or write names"
            )
    return [str(label) for label in range(max(occur) + 1)], True


def _check_column(rows: list[Row], labels: set[str], file: str) -> None:
    """Refuse a second column that cannot be the labels, as all of it, or nearly nothing, is the same."""
    if 1 < len(labels) <= max(2, 0.8 * len(rows)):
        return
    found = f"has {len(labels):,} values in {len(rows):,} rows"
    if len(labels) == 1:
        found = f"is {_cut(rows[0][2])!r} in every row"
    way_out = "expected two or more classes of several images"
    table = [cells for _, cells in _table(file)]
    head = table.pop(0) if rows[0][0] > 1 else []
    for place in range(2, min(map(len, table))):
        if 1 < len({cells[place] for cells in table}) <= 0.5 * len(table):
            name = f" ({_cut(head[place])})" if place < len(head) else ""
            way_out = f"is column {place + 1}{name} the label? then make it the second"
            break
    raise RequestError(f"{shown(file)}: its second column, the label, {found}; {way_out}")


def _cut(text: str) -> str:
    """A cell as messages have it."""
    text = printable(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _number(text: str) -> int:
    """The integer; of one that is too large in any case another such."""
    return int(text[:18])


def labels_of(rows: list[Row], names: list[str], numbers: bool, file: str) -> list[int]:
    """The class indices of all rows, which are from `file`; `names` and `numbers` as `class_names` has them.

    Raises:
        RequestError: a label that means no class.
    """
    place = {name: label for label, name in enumerate(names)}
    labels = []
    for row, _, text in rows:
        label = (_number(text) if _is_number(text) else -1) if numbers else place.get(text, -1)
        if not 0 <= label < len(names):
            expected = f"0 to {len(names) - 1}" if numbers else f"one of {some([_cut(name) for name in names])}"
            raise RequestError(
                f"{shown(file)}, row {row}: label {_cut(text)!r}; "
                f"expected {expected}, as there are {len(names)} classes"
            )
        labels.append(label)
    return labels
