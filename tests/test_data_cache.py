"""A cache of decoded images notices that a file was written anew, though its name and size are the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.data.batches import Batches
from engine.data.splits import load_splits

LATER = 1_700_000_000 * 10**9  # a time of modification in nanoseconds


def write(path: Path, value: int, time: int) -> None:
    """An image of one value; a BMP of a size always has as many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    os.utime(path, ns=(time, time))


def values(top: Path, cache: Path) -> list[int]:
    """The value of every training and test image, in the order of their names."""
    own: dict[str, Any] = {"val_fraction": 0.0, "limit": None, "target_transform": None, "steps_per_epoch": None}
    own |= {"train_transforms": [], "eval_transforms": [], "skip_unreadable": False, "test_fraction": 0.25}
    own |= {"_target_": "datasets.image_folder", "root": str(top), "channels": 1, "max_pixels": 100}
    splits, _ = load_splits({**own, "cache": True, "cache_dir": str(cache)})
    run = {"batch_size": 8, "seed": 0, "shuffle": False, "drop_last": False, "limit_batches": None, "num_workers": 0}
    found = []
    for name in ("train", "test"):
        for images, _ in Batches(splits[name], [], torch.device("cpu"), **run).epoch():
            found += (images[:, 0, 0, 0] * 255).round().int().tolist()
    return sorted(found)


@pytest.mark.parametrize("later", [1, 1000, 10**9, -(10**9)])  # nanoseconds
def test_a_file_that_was_written_anew_is_decoded_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], later: int
) -> None:
    top, cache = tmp_path / "images", tmp_path / "cache"
    for number in range(8):
        write(top / "ab"[number // 4] / f"{number}.bmp", 10 * number, LATER)
    assert values(top, cache) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert "caching" in capsys.readouterr().out
    assert values(top, cache) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert "caching" not in capsys.readouterr().out  # as nothing has changed

    for number in (1, 6):
        size = (top / "ab"[number // 4] / f"{number}.bmp").stat().st_size
        write(top / "ab"[number // 4] / f"{number}.bmp", 200 + number, LATER + later)
        assert (top / "ab"[number // 4] / f"{number}.bmp").stat().st_size == size
    assert values(top, cache) == [0, 20, 30, 40, 50, 70, 201, 206]
    assert "caching" in capsys.readouterr().out
