"""Samples read and transformed one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.augment import to_float
from engine.data.draws import (
    COPY,
    Draws,
    own_randomness,
    random_states,
    sample_seed,
    seed_everything,
    set_random_states,
)
from engine.data.images import ImageFiles
from engine.data.transforms import apply, resized_to
from engine.errors import RequestError, RunError, cause, printable


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Raise what code of the user's raises, when asked for `what`, as a RunError of one line with the place in it."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{what} raised {cause(error, named=True)}") from error


def cannot_be_read(errors: Sequence[str], all_of_them: str, training: bool) -> str:
    """One line of what is wrong with images: the first of the errors, how many there are of all, and the way out.

    That is `dataset.skip_unreadable`, which helps in training.
    """
    several = len(errors) > 1
    count = f"; {len(errors):,} of {all_of_them} cannot be read" if several else ""
    way_out = f"; dataset.skip_unreadable=true leaves {'them' if several else 'it'} out of training" if training else ""
    return errors[0] + count + way_out


class Reader:
    """Batches of samples read and transformed one at a time; what a worker process has.

    Args:
        part: `(images, labels)` or a map-style Dataset.
        transforms: those that run on one image at a time.
        seed: of the run.
        num_classes: labels are below it.
        skip_unreadable: another sample of the batch takes the place of an image file that cannot be read.
        training: whether to name skip_unreadable as the way out where one cannot be read.
    """

    READ_AT_ONCE = 8  # samples, before they are transformed: taking turns would clear the processor's caches each time

    def __init__(
        self,
        part: Any,
        transforms: Sequence[Any],
        seed: int,
        num_classes: int,
        skip_unreadable: bool,
        training: bool = False,
    ) -> None:
        self.part, self.transforms, self.seed = part, list(enumerate(transforms)), seed
        self.num_classes, self.skip_unreadable, self.training = num_classes, skip_unreadable, training
        # Ours draw nothing at random while reading and keep no file open; a user's may.
        self.is_builtin = isinstance(part, (tuple, ImageFiles))
        self.is_random = any(transform.random for transform in transforms)
        self.resized_to = resized_to(transforms)

    def read(
        self, epoch: int, indices: Tensor, into: Tensor | None = None, around: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """(images, labels, what was skipped) of the samples `indices`, int64 `[batch]`, in an epoch from 1.

        Args:
            into: memory for at least as many images; they lie there afterwards if they are of its shape and type.
            around: where these are some samples of a batch, its samples, and their places in it; what takes the place
                of one that cannot be read comes from there.

        Raises:
            RunError: samples that cannot be read, or do not fit together.
        """
        skipped: dict[int, str] = {}
        with own_randomness() if self.is_random or not self.is_builtin else nullcontext():
            images, labels = self._batch(self._samples(epoch, indices, skipped, around), indices, into)
        return images, labels, list(skipped.values())

    def _samples(
        self, epoch: int, indices: Tensor, skipped: dict[int, str], around: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor, Any]]:
        """(place in the batch, image, label) of those that can be read; of the others place to error in `skipped`."""
        draws = Draws(self.seed, epoch, indices) if self.is_random else None
        seeds = None if self.is_builtin else sample_seed(self.seed, epoch, indices).tolist()
        for first in range(0, len(indices), self.READ_AT_ONCE):
            read: list[tuple[int, Tensor, Any]] = []
            for place, index in enumerate(indices[first : first + self.READ_AT_ONCE].tolist(), first):
                if seeds is not None:
                    seed_everything(seeds[place])
                try:
                    read.append((place, *self._sample(index % COPY)))
                except RequestError as error:
                    if not isinstance(self.part, ImageFiles):
                        raise RunError(str(error)) from error
                    skipped[place] = str(error)
            if skipped and not self.skip_unreadable:
                continue  # only to count the others
            for place, image, label in read:
                yield place, self._transform(image, draws, place), label
        if skipped and not self.skip_unreadable:
            raise RunError(
                cannot_be_read(list(skipped.values()), f"the {len(indices)} images of this batch", self.training)
            )
        for place in list(skipped) if around else []:
            batch, places = around  # type: ignore[misc]
            others = batch.roll(-1 - int(places[place]))[:-1]  # from the next one on, and after the last the first
            stand_ins = (sample for index in others.split(1) for sample in self._samples(epoch, index, {}))
            for _, image, label in islice(stand_ins, 1):
                yield place, image, label

    def _transform(self, image: Tensor, draws: Draws | None, place: int) -> Tensor:
        return apply(self.transforms, image[None], draws and draws.window(place, 1))[0]

    def prepare(self, epoch: int, indices: Tensor, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        """(images, labels) of samples that were read elsewhere."""
        with own_randomness():
            draws = Draws(self.seed, epoch, indices) if self.is_random else None
            done = ((place, self._transform(image, draws, place), y) for place, (image, y) in enumerate(samples))
            return self._batch(done, indices, None)

    def _sample(self, index: int) -> tuple[Tensor, Any]:
        if isinstance(self.part, ImageFiles):
            return self.part.read(index, self.resized_to), int(self.part.targets[index])
        if isinstance(self.part, tuple):
            return self.part[0][index], int(self.part[1][index])
        what = f"sample {index} of {type(self.part).__name__}"
        with users_code(what):
            sample = self.part[index]
        return _image_and_label(sample, what, self.num_classes)

    def _batch(
        self, samples: Iterable[tuple[int, Tensor, Any]], indices: Tensor, into: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(images, labels) of samples put into their places as they come; the next one fills a place left out."""
        images: Tensor | None = None
        found: dict[int, Any] = {}
        for place, image, label in samples:
            if images is None:
                fits = into is not None and into.shape[1:] == image.shape and into.dtype == image.dtype
                images = into[: len(indices)] if fits else image.new_empty(len(indices), *image.shape)  # type: ignore
            elif image.shape != images.shape[1:]:
                raise RequestError(
                    f"images of different sizes: {self._name(indices[next(iter(found))])} is {_size(images[0])}, "
                    f"{self._name(indices[place])} is {_size(image)}; "
                    "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
                )
            elif image.dtype != images.dtype:
                images, image = to_float(images), to_float(image)
            images[place], found[place] = image, label
        if images is None:
            raise RunError(
                f"none of the {len(indices)} images of a batch can be read; the first is sample {int(indices[0])}"
            )
        read = list(found)
        for place in range(len(indices)):
            if place not in found:
                other = next((p for p in read if p > place), read[0])
                images[place], found[place] = images[other], found[other]
        labels = [found[place] for place in range(len(indices))]
        probabilities = [isinstance(label, Tensor) for label in labels]
        if any(probabilities) and not all(probabilities):
            raise RunError(
                f"{self._name(indices[probabilities.index(True)])} has probabilities for its label, "
                f"{self._name(indices[probabilities.index(False)])} a class; expected the same of all samples"
            )
        return images, torch.stack(labels) if probabilities[0] else torch.tensor(labels)

    def _name(self, index: Tensor) -> str:
        row = int(index) % COPY
        return str(self.part.paths[row]) if isinstance(self.part, ImageFiles) else f"sample {row}"


def _size(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _image_and_label(sample: Any, what: str, num_classes: int) -> tuple[Tensor, Any]:
    """A user's sample as (uint8 or float image `[channels, height, width]`, int or float `[num_classes]`)."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise RunError(f"{what} is {type(sample).__name__}; expected (image, label)")
    image, label = sample
    if not isinstance(image, Tensor):  # a Pillow image, or an array [height, width, channels]
        if getattr(image, "mode", None) == "P":
            raise RunError(f"{what} is a Pillow image with a palette; expected its colours: image.convert('RGB')")
        pixels, kind = np.asarray(image), type(image).__name__
        if pixels.dtype not in (np.uint8, np.float32, np.float64):
            raise RunError(f"{what} has an image of {kind}; expected a tensor, an array or a Pillow image")
        image = torch.from_numpy(pixels.copy())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    image = image.unsqueeze(0) if image.ndim == 2 else image
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise RunError(
            f"{what} has an image {image.dtype} {list(image.shape)}; expected uint8 or float [channels, height, width]"
        )
    image = image if image.dtype == torch.uint8 else image.float()
    with suppress(TypeError, ValueError, RuntimeError):  # text, for instance
        known = torch.as_tensor(label)
        if known.ndim == 1 and len(known) == num_classes and num_classes > 1:
            return image, known.float()
        if known.numel() == 1 and 0 <= int(known) < num_classes and int(known) == known:
            return image, int(known)
    shown = label.tolist() if hasattr(label, "tolist") else label
    raise RunError(
        f"{what} has label {printable(repr(shown))[:80]}; expected 0 to {num_classes - 1}, "
        f"as there are {num_classes} classes"
    )


class SampleStream:
    """The samples of an iterable-style Dataset, read in this process, with generators of their own.

    What it draws at random (torch on the CPU, NumPy, Python) comes from the run's seed and the number of the pass, and
    leaves the run's own generators alone.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.position: int | None = None  # of `forever`, in samples
        self.samples: Iterator[tuple[Tensor, Any]] = iter(())

    def once(self, limit: int | None, number: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """One pass over the samples; `number` is the pass."""
        part, iterator, states = self.reader.part, None, None
        name, end = type(part).__name__, object()
        if hasattr(part, "set_epoch"):
            with users_code(f"set_epoch of {name}"):
                part.set_epoch(number)
        for place in islice(count(), limit):
            what = f"sample {place} of {name}"
            with own_randomness():
                if states is None:
                    seed_everything(int(sample_seed(self.reader.seed, number)))
                else:
                    set_random_states(states)
                with users_code(what):
                    iterator = iterator or iter(part)
                    sample = next(iterator, end)
                states = random_states()
            if sample is end:
                return
            yield _image_and_label(sample, what, self.reader.num_classes)

    def forever(self, position: int, limit: int | None) -> Iterator[tuple[Tensor, Any]]:
        """Passes without end, from a sample on; goes on from the last call where that ended there."""
        if self.position != position:  # a resumed run reads what it had seen
            self.position, self.samples = position, islice(self._passes(limit), position, None)
        for sample in self.samples:
            self.position += 1
            yield sample

    def _passes(self, limit: int | None) -> Iterator[tuple[Tensor, Any]]:
        for number in count(1):
            sample = None
            for sample in self.once(limit, number):
                yield sample
            if sample is None:
                raise RunError(f"{type(self.reader.part).__name__} gives no sample in pass {number}")
