"""From samples to batches on the device.

The order of the samples is a function of (seed, epoch), what augmentation does to a sample of (seed, epoch, index): the
number of workers, the batch size and where a run was resumed change neither.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import datasets
from engine.augment import BATCH_TRANSFORMS, Draws, sample_seed
from engine.config import build, did_you_mean
from engine.errors import RequestError, one_line

COMMON = ("val_fraction", "limit", "train_transforms", "eval_transforms")  # settings of every dataset, used here


def choose_device(name: str) -> torch.device:
    """The device that `device=` asks for; auto takes CUDA, else MPS, else the CPU.

    Raises:
        RequestError: it is not there.
    """
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return torch.device(found[0] if found else "cpu")
    if name != "cpu" and name not in found and not (name == "cuda" and found and found[0].startswith("cuda")):
        raise RequestError(f"device={name}: not on this machine; there is {', '.join([*found, 'cpu', 'auto'])}")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@dataclass(frozen=True)
class Split:
    """Some samples of a data set.

    Attributes:
        part: the samples, as `datasets.ImageData` has them.
        indices: int64 `[n]`, which of them; None for an iterable data set, that only it can count.
    """

    part: Any
    indices: Tensor | None

    def __len__(self) -> int:
        return -1 if self.indices is None else len(self.indices)


def load_splits(
    settings: dict[str, Any], only: str | None = None, target: Any = None
) -> tuple[dict[str, Split], list[str]]:
    """Read a data set and hold out its validation part.

    Args:
        settings: the dataset group of the configuration.
        only: leave out every split but this one.
        target: the function that `_target_` means, where that was already decided.

    Returns:
        the splits train, val (absent with `val_fraction: 0`) and test; the class names.

    Raises:
        RequestError: the data is not there, is damaged, or has labels outside its classes.
    """
    own = {key: value for key, value in settings.items() if key not in COMMON}
    data = build(own, "dataset", target=target)
    if not isinstance(data, datasets.ImageData):
        raise RequestError(f"{settings['_target_']} returned {type(data).__name__}; expected datasets.ImageData")
    classes = [str(name) for name in data.classes]
    for name, part in (("train", data.train), ("test", data.test)):
        _check_part(part, name, classes)

    everything = _count(data.train)
    splits = {}
    if everything is None:
        splits["train"] = Split(data.train, None)
    else:
        held_out = _stratified(_labels(data.train), everything, settings["val_fraction"])
        splits["train"] = Split(data.train, (~held_out).nonzero().flatten())
        if held_out.any():
            splits["val"] = Split(data.train, held_out.nonzero().flatten())
    count = _count(data.test)
    splits["test"] = Split(data.test, None if count is None else torch.arange(count))

    if settings["limit"] is not None:
        splits = {
            name: Split(split.part, split.indices if split.indices is None else split.indices[: settings["limit"]])
            for name, split in splits.items()
        }
    for name, split in splits.items():
        if len(split) == 0:
            raise RequestError(f"dataset: the {name} split is empty ({everything} training samples were found)")
    return splits if only is None else {name: split for name, split in splits.items() if name == only}, classes


def fingerprint(splits: dict[str, Split]) -> str:
    """What tells a data set from another one: the number of samples of each split, and a checksum of labels and order."""
    texts = []
    for name, split in splits.items():
        labels = _labels(split.part)
        checksum = 0
        if split.indices is not None:
            chosen = split.indices if labels is None else labels[split.indices]
            checksum = zlib.crc32(np.ascontiguousarray(chosen.numpy()).tobytes())
        texts.append(f"{name} {len(split)} {checksum:08x}")
    return ", ".join(texts)


def _check_part(part: Any, name: str, classes: list[str]) -> None:
    if not isinstance(part, tuple):
        return
    images, labels = part
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or labels.dtype != torch.int64
        or labels.shape != images.shape[:1]
    ):
        found = f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        raise RequestError(
            f"dataset: {name} images and labels are {found}; "
            "expected torch.uint8 [n, channels, height, width] and torch.int64 [n]"
        )
    if len(labels) == 0:
        raise RequestError(f"dataset: the {name} split is empty")
    outside = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise RequestError(
            f"dataset: {name} sample {row} has label {int(labels[row])}; expected 0 to {len(classes) - 1}, "
            f"as there are {len(classes)} classes"
        )


def _count(part: Any) -> int | None:
    if isinstance(part, tuple):
        return len(part[1])
    return None if isinstance(part, IterableDataset) else len(part)


def _labels(part: Any) -> Tensor | None:
    """All labels, where they can be had without reading the samples."""
    labels = part[1] if isinstance(part, tuple) else getattr(part, "targets", None)
    return None if labels is None else torch.as_tensor(labels)


def _stratified(labels: Tensor | None, count: int, fraction: float) -> Tensor:
    """A mask `[count]` that holds out the same share of every class, the same for every seed of a run."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(count, dtype=torch.bool)
    if labels is None:
        held_out[shuffled[: round(fraction * count)]] = True
    else:
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        for members in by_class.split(labels.bincount().tolist()):
            held_out[members[: round(fraction * len(members))]] = True
    return held_out


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def parse_transforms(listed: Sequence[Any], option: str) -> list[Any]:
    """The transforms of a YAML list: `[RandomHorizontalFlip, RandomCrop: {size: 28, padding: 2}]`.

    Raises:
        RequestError: an unknown name or argument.
    """
    transforms = []
    for entry in listed:
        name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
        if name not in BATCH_TRANSFORMS:
            raise RequestError(f"{option}: there is no transform {name!r}{did_you_mean(str(name), BATCH_TRANSFORMS)}")
        try:
            transforms.append(BATCH_TRANSFORMS[name](**(arguments or {})))
        except (TypeError, ValueError, KeyError) as error:
            raise RequestError(f"{option}: {name} refuses its arguments: {one_line(error)}") from None
    return transforms


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batches:
    """The batches of a split: `for images, labels in batches.epoch(3): ...`.

    Args:
        split: the samples.
        transforms: the YAML's list for this phase.
        config: the run's; batch_size, seed, num_workers and limit_batches are used.
        device: where the batches come out.
        training: shuffle and drop the last batch as the configuration says.

    Batches are floats `[batch, channels, height, width]`, 0 to 1 before `Normalize`, and labels int64 `[batch]`.
    """

    def __init__(
        self,
        split: Split,
        transforms: Sequence[Any],
        config: dict[str, Any],
        device: torch.device,
        training: bool = False,
    ) -> None:
        self.split, self.device = split, device
        self.batch_size: int = config["batch_size"]
        self.seed: int = config["seed"]
        self.shuffle = training and config["shuffle"]
        self.drop_last = training and config["drop_last"]
        self.limit: int | None = config["limit_batches"]
        self.transforms = parse_transforms(transforms, f"dataset.{'train' if training else 'eval'}_transforms")
        if self.drop_last and len(split) < self.batch_size:
            raise RequestError(
                f"drop_last=true leaves no batch: {len(split)} training samples, batch_size={self.batch_size}; lower batch_size"
            )
        self.resident = None
        if isinstance(split.part, tuple):
            self.resident = _place(split.part, device)
        else:
            workers = config["num_workers"]
            self.num_workers = (os.cpu_count() or 1) if workers is None else workers
            self._loader: DataLoader | None = None

    def __len__(self) -> int:
        whole = len(self.split) // self.batch_size
        count = whole if self.drop_last or len(self.split) % self.batch_size == 0 else whole + 1
        return count if self.limit is None else min(count, self.limit)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return min(len(self.split), len(self) * self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The sample indices of an epoch, int64 `[n]`, in the order in which they are seen."""
        assert self.split.indices is not None
        if not self.shuffle:
            return self.split.indices
        bits = int(sample_seed(self.seed, epoch))
        return self.split.indices[torch.randperm(len(self.split), generator=torch.Generator().manual_seed(bits))]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number `start` on."""
        indices = self.order(epoch).split(self.batch_size)[start : len(self)]
        source = self._in_memory(indices) if self.resident is not None else self._read(indices, epoch)
        for index, images, labels in source:
            draws = Draws(self.seed, epoch, index) if self.transforms else None
            for transform in self.transforms:
                if transform.needs_float and not images.is_floating_point():
                    images = to_float(images)
                images = transform(images, draws)
            yield to_float(images), labels

    __iter__ = epoch

    def _in_memory(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        images, labels = self.resident  # type: ignore[misc]
        for index in indices:
            here = index.to(images.device, non_blocking=True)
            yield index, images.index_select(0, here).to(self.device), labels.index_select(0, here).to(self.device)

    def _read(self, indices: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        raise NotImplementedError

    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as the model gets it."""
        images, _ = next(islice(self.epoch(1), 1))
        return tuple(images.shape[1:])  # type: ignore[return-value]


def to_float(images: Tensor) -> Tensor:
    """uint8 0 to 255 as float32 0 to 1, bit by bit what torchvision's `ToTensor` does; floats as they are."""
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)


def _place(part: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Samples on the device where they fit into half of its free memory, else in host memory, pinned."""
    if device.type == "cpu":
        return part
    images, labels = part
    if device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(device)[0] // 2:
        return images, labels
    return images.to(device), labels.to(device)
