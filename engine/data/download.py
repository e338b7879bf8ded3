"""Fetching what is not there: a data set, with torchvision."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import RequestError, one_line

_may_download = True


@contextmanager
def no_downloads() -> Iterator[None]:
    """Within it data that is not there is an error: evaluating and predicting fetch nothing."""
    global _may_download
    before, _may_download = _may_download, False
    try:
        yield
    finally:
        _may_download = before


def download(name: str, root: str, layout: str) -> None:
    """Fetch a data set with torchvision, which shows a progress bar and checks what arrives.

    It arrives in a folder of its own and is moved to `root` once it is whole: a download that fails leaves nothing.
    """
    if not _may_download:
        option = "fashion_mnist" if name == "FashionMNIST" else name.lower()
        raise RequestError(
            f"{name} is not in {root!r}, expected {layout}; set dataset.root, "
            f"or fetch it: python datasets.py dataset={option} dataset.root={root}"
        )
    from torchvision import datasets as torchvision_datasets  # takes a second to import, and is rarely needed

    fetch: Callable[..., Any] = getattr(torchvision_datasets, name)
    tried = ", ".join(getattr(fetch, "mirrors", None) or [getattr(fetch, "url", "its host")])
    print(f"{name} is not in {root!r}: downloading it from {tried}", flush=True)
    try:
        with arrives_in(Path(root)), tempfile.TemporaryDirectory(dir=root, prefix=".download-") as arriving:
            fetch(arriving, download=True)
            shutil.copytree(arriving, root, dirs_exist_ok=True, copy_function=os.replace)
    except (OSError, RuntimeError) as error:
        cause = one_line(error, 2000).rpartition("got: ")[2]
        raise RequestError(
            f"{name} is not there and cannot be downloaded (tried {tried}: {cause}); "
            f"put the files into {layout}, set dataset.root, or take dataset=digits, which needs nothing"
        ) from None


@contextmanager
def arrives_in(folder: Path) -> Iterator[None]:
    """Within it there is a folder for what is fetched, and no answer is waited for longer than half a minute.

    Folders that were made for it are removed where nothing came.
    """
    made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; the default is to wait for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        socket.setdefaulttimeout(patience)
        for one in made:
            with suppress(OSError):  # not empty: what was fetched is there
                one.rmdir()
