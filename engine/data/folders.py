"""The folders of a data set of image files: its parts, its classes, and the files in them."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from engine.data.images import EXTENSIONS, Paths, shown
from engine.errors import RequestError, printable
from engine.terminal import watched

# The folders of the parts of a data set; another spelling, such as Testing, is asked about and not taken for a class.
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# What file managers and archives leave in folders, beside all that begins with a dot.
LEFTOVERS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found")


Listed = tuple[Paths, Tensor]  # paths and labels, int64 `[n]`, sorted by name


def list_images(top: Path) -> tuple[list[str], dict[str, Listed], set[str]]:
    """The image files of a data set, one folder a class: below `top`, or below its train/, test/ and val/.

    Returns:
        the class names; of train, and of test and val where they are there, the files; paths that lead to no regular
        file.

    Raises:
        RequestError: the folders are not as they should be, with a guess at what was meant; a class without an image.
    """
    parts = _part_folders(top)
    walk, classes, known, listed = _Walk(parts), list[str](), set[str](), {}
    for part, folder in parts.items():
        own = _folders(folder)
        if not own:
            raise RequestError(f"{shown(folder)}: no folder in it; expected one a class, named after it")
        if part == "train":
            classes = own
            if len(classes) < 2:
                raise _one_class(folder, classes[0], is_top=folder == top)
            known = set(classes)
        if unknown := [name for name in own if name not in known]:
            raise RequestError(f"{shown(folder / unknown[0])}: a class without a folder in {shown(parts['train'])}")
        there = set(own)
        if missing := [printable(name) for name in classes if name not in there]:
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
        if nested := next((name for name in names if all((top / name / p).is_dir() for p in ("train", "test"))), None):
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
    return sorted((e for e in _listed(folder) if not is_leftover(e.name)), key=lambda entry: entry.name)


def _listed(folder: str | Path) -> list[os.DirEntry[str]]:
    """All that is in a folder, in no order."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise RequestError(f"{shown(folder)}: cannot be listed ({error.strerror})") from None


def _files_and_others(folder: str) -> tuple[list[str], list[os.DirEntry[str]]]:
    """The names of the files in a folder, and what is there besides, in no order."""
    others: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:  # a list of all entries would take half as long again
            return [entry.name for entry in entries if entry.is_file() or others.append(entry)], others  # type: ignore
    except OSError:  # a link leads round in circles, or the folder cannot be listed
        found = _listed(folder)
        return [e.name for e in found if _is(e.is_file)], [e for e in found if not _is(e.is_file)]


def _are_images(names: list[str]) -> bool:
    """Whether all names, in their order, are those of images, as is usual; by their endings, of which there are few."""
    dot = bisect_left(names, ".")  # where hidden ones would be
    if dot < len(names) and names[dot].startswith("."):
        return False
    ending = os.path.splitext(names[0])[1]
    if "\0".join([*names, ""]).count(f"{ending}\0") == len(names):  # takes a third of the time of a look at each
        return ending.lower() in EXTENSIONS
    return all(ending.lower().endswith(EXTENSIONS) for ending in set(map(itemgetter(slice(-5, None)), names)))


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
        blocks, labels, counts = list[bytes](), list[int](), list[int]()
        for label, folder, names in watched(self._found(top, classes), f"listing {shown(top)}", None):
            start = "\0" + os.path.join(folder, "")
            blocks.append((start + start.join(names)).encode("utf-8", "surrogatepass"))
            labels.append(label)
            counts.append(len(names))
        return Paths(b"".join([*blocks, b"\0"])), torch.tensor(labels).repeat_interleave(torch.tensor(counts))

    def _found(self, top: Path, classes: list[str]) -> Iterator[tuple[int, str, list[str]]]:
        """(label, folder, names of images in it) of every folder that has some."""
        for label, name in enumerate(classes):
            folder = os.path.join(top, name)
            if not os.path.isdir(folder):
                continue
            names = None
            for directory, names in self._below(folder):
                yield label, directory, names
            if names is None:
                why = f"looked for {', '.join(EXTENSIONS)}"
                if links := [link for link in self.not_followed if link == folder or link.startswith(folder + os.sep)]:
                    why = f"the folder that {shown(links[0])} leads to is a part of this data set already"
                raise RequestError(
                    f"{shown(folder)}: no image in this class folder ({why}); "
                    "add some, or remove the folder and with it the class"
                )

    def _below(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Each folder at and below one with the names of the images in it, where there are some."""
        waiting = [folder]  # no recursion: folders may be nested deeper than Python allows that
        while waiting:
            directory = waiting.pop()
            if not self._is_new(directory):
                self.not_followed.append(directory)
                continue
            files, besides = _files_and_others(directory)
            files.sort()
            if not besides and files and _are_images(files):  # one by one, a million would take seconds
                yield directory, files
                continue
            names = [name for name in files if not is_leftover(name) and name.lower().endswith(EXTENSIONS)]
            known, inner = set(names), []
            others = [os.path.join(directory, n) for n in files if n not in known and not is_leftover(n)]
            for entry in besides:
                if is_leftover(entry.name):
                    continue
                if _is(entry.is_dir):
                    inner.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    self.no_files.add(entry.path)
                    names.append(entry.name)
                else:
                    others.append(entry.path)
            if names:
                yield directory, sorted(names)
            self.others += sorted(others)
            waiting += sorted(inner, reverse=True)

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
