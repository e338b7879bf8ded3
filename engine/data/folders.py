"""The folders of a data set of image files: its parts, its classes, and the files in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from engine.data.images import EXTENSIONS, shown
from engine.errors import RequestError, printable
from engine.terminal import watched

# The folders of the parts of a data set; another spelling, such as Testing, is asked about and not taken for a class.
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# What file managers and archives leave in folders, beside all that begins with a dot.
LEFTOVERS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found")


Listed = tuple[list[str], list[int]]  # paths and labels, sorted by name


def list_images(top: Path) -> tuple[list[str], dict[str, Listed], set[str]]:
    """The image files of a data set, one folder a class: below `top`, or below its train/, test/ and val/.

    Returns:
        the class names; of train, and of test and val where they are there, the files; paths that lead to no regular
        file.

    Raises:
        RequestError: the folders are not as they should be, with a guess at what was meant; a class without an image.
    """
    parts = _part_folders(top)
    walk, classes, listed = _Walk(parts), list[str](), {}
    for part, folder in parts.items():
        own = _folders(folder)
        if not own:
            raise RequestError(f"{shown(folder)}: no folder in it; expected one a class, named after it")
        if part == "train":
            classes = own
            if len(classes) < 2:
                raise _one_class(folder, classes[0], is_top=folder == top)
        if unknown := [name for name in own if name not in classes]:
            raise RequestError(f"{shown(folder / unknown[0])}: a class without a folder in {shown(parts['train'])}")
        if missing := [printable(name) for name in classes if name not in own]:
            print(f"no {part} images of {some(missing)}: {shown(folder)} has no such folder", flush=True)
        listed[part] = walk.images(folder, classes)
    _tell(
        walk.not_followed,
        "1 link to a folder of this data set is not followed: each folder is read once",
        "links to folders of this data set are not followed: each folder is read once",
    )
    left_out = f"left out of {shown(top)}"
    _tell(walk.others, f"1 file is no image and {left_out}", f"files are no images and {left_out}")
    return classes, listed, walk.no_files


def _tell(paths: list[str], one: str, several: str) -> None:
    if paths:
        what, first = (one, "") if len(paths) == 1 else (f"{len(paths):,} {several}", "the first is ")
        print(f"{what} ({first}{shown(paths[0])})", flush=True)


def _part_folders(top: Path) -> dict[str, Path]:
    """The folders of train, test and val, each with the class folders in it; without a train/, the top is train."""
    names = _folders(top)
    found = {part: [name for name in spellings if name in names] for part, spellings in PARTS.items()}
    if len(found["val"]) > 1:
        both = " and ".join(f"{name}/" for name in found["val"])
        raise RequestError(f"{shown(top)}: both {both} are there; keep one of them for validation")
    known = [name for spellings in found.values() for name in spellings]
    meant = {name: part for name in names if (part := _part_meant(name)) and (name in known or not found[part])}
    if not found["train"]:
        if meant and (len(meant) > 1 or len(names) == 1 or _folders(top / next(iter(meant)))):
            name, part = next(iter(meant.items()))
            raise RequestError(
                f"{shown(top / name)}: seems to hold the {part} images, not a class, and there is no train/; "
                f"expected {shown(top)}/train (and test, val), or one folder a class"
            )
        if nested := next((name for name in names if {"train", "test"} <= set(_folders(top / name))), None):
            raise RequestError(
                f"{shown(top)}: {printable(nested)}/ holds train/ and test/; "
                f"did you mean dataset.root={shown(top / nested)}?"
            )
        return {"train": top}
    if misnamed := [name for name in meant if name not in known]:
        part = meant[misnamed[0]]
        raise RequestError(f"{shown(top / misnamed[0])}: is it the {part} part? rename it to {part}, or take it away")
    if others := [f"{printable(name)}/" for name in names if name not in known]:
        print(f"passed over beside {shown(top)}/train: {', '.join(others[:10])}", flush=True)
    folders = {part: top / found[part][0] for part in ("train", "test", "val") if found[part]}
    for (one, first), (other, second) in combinations(folders.items(), 2):
        if first.resolve() == second.resolve():
            raise RequestError(
                f"{shown(second)}: the same folder as {shown(first)}; {one} and {other} need images of their own"
            )
    if "val" in folders:
        print(f"{shown(folders['val'])} is the validation part, and dataset.val_fraction is not used", flush=True)
    return folders


def _part_meant(name: str) -> str | None:
    """The part that a folder such as Training, test_set or Val-images stands for."""
    word = re.sub(r"[^a-z]", "", name.lower())
    part = re.fullmatch(r"(?:(train|test)(?:ing)?|(val)(?:id(?:ation)?)?)(?:set|data|images|imgs|split)?", word)
    return part and (part[1] or part[2])


def _one_class(folder: Path, name: str, is_top: bool) -> RequestError:
    """What is wrong where there is one class folder only, with a guess at what was meant."""
    inner = _folders(folder / name)
    message = f"{shown(folder)}: one class folder only, {printable(name)}/; a classifier needs at least two"
    if is_top and ("train" in inner or len(inner) > 1):
        message += f"; did you mean dataset.root={shown(folder / name)}?"
    elif len(inner) > 1:
        message += f"; if {', '.join(printable(n) for n in inner[:3])} are the classes, move them one level up"
    return RequestError(message)


def is_leftover(name: str) -> bool:
    """Whether a file or folder was put there by no person: a hidden one, or what file managers leave."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if _is(entry.is_dir)]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name, without what file managers leave."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_leftover(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise RequestError(f"{shown(folder)}: cannot be listed ({error.strerror})") from None


def _is(question: Callable[[], bool]) -> bool:
    """The answer of a directory's entry, no where a link leads round in circles."""
    try:
        return question()
    except OSError:
        return False


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} others" if len(names) > 10 else "")


class _Walk:
    """The image files below the class folders of a data set, each folder read once, whatever links lead to it.

    A link is followed to a folder elsewhere. It is not where it leads into a part of the data set, or above one: the
    images there are read as what they are, or belong to another part.
    """

    def __init__(self, parts: dict[str, Path]) -> None:
        self.real = [os.path.realpath(folder) for folder in parts.values()]
        self.seen: set[tuple[int, int]] = set()  # folders, by device and number
        self.no_files: set[str] = set()
        self.others: list[str] = []
        self.not_followed: list[str] = []

    def images(self, top: Path, classes: list[str]) -> Listed:
        """Those below the class folders in `top`; a RequestError where there is none, or a folder cannot be listed."""
        paths: list[str] = []
        labels: list[int] = []
        for path, label in watched(self._found(top, classes), f"listing {shown(top)}", None):
            paths.append(path)
            labels.append(label)
        return paths, labels

    def _found(self, top: Path, classes: list[str]) -> Iterator[tuple[str, int]]:
        for label, name in enumerate(classes):
            folder = os.path.join(top, name)
            if not os.path.isdir(folder):
                continue
            path = None
            for path in self._below(folder):
                yield path, label
            if path is None:
                why = f"looked for {', '.join(EXTENSIONS)}"
                if links := [link for link in self.not_followed if link == folder or link.startswith(folder + os.sep)]:
                    why = f"the folder that {shown(links[0])} leads to is a part of this data set already"
                raise RequestError(
                    f"{shown(folder)}: no image in this class folder ({why}); "
                    "add some, or remove the folder and with it the class"
                )

    def _below(self, folder: str) -> Iterator[str]:
        waiting = [folder]  # no recursion: folders may be nested deeper than Python allows that
        while waiting:
            directory = waiting.pop()
            if not self._is_new(directory):
                self.not_followed.append(directory)
                continue
            inner = []
            for entry in _entries(directory):
                if _is(entry.is_dir):
                    inner.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    if not _is(entry.is_file):
                        self.no_files.add(entry.path)
                    yield entry.path
                else:
                    self.others.append(entry.path)
            waiting += reversed(inner)

    def _is_new(self, directory: str) -> bool:
        if os.path.islink(directory):
            leads_to = os.path.realpath(directory)
            if any(_is_within(leads_to, part) or _is_within(part, leads_to) for part in self.real):
                return False
        status = os.stat(directory)
        count = len(self.seen)
        self.seen.add((status.st_dev, status.st_ino))
        return len(self.seen) > count


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
