"""From samples to batches on the device.

The order of the samples is a function of (seed, epoch), what augmentation does to a sample of (seed, epoch, index): the
number of workers, the batch size and where a run was resumed change neither. Nor does the number of processes that
train together: each reads its own samples of every batch.

Three ways lead to a batch: samples in memory are gathered by an index tensor; those of a `Dataset`, and those that a
transform has to see one at a time, are read in worker processes; an iterable-style `Dataset` is read as it comes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.augment import Resize, to_float
from engine.data.devices import cores, on_device, place
from engine.data.draws import COPY, Draws, own_randomness, sample_seed, seed_everything, with_copies
from engine.data.images import ImageFiles, open_image
from engine.data.mixing import Mixing
from engine.data.reader import Reader, SampleStream, users_code
from engine.data.splits import Split, by_class
from engine.data.transforms import PerImage, apply, parse_transforms
from engine.data.workers import Workers
from engine.distributed import from_first, gathered, own_slice
from engine.errors import RequestError, RunError, counted, one_line, out_of_memory
from engine.process import in_turns
from engine.terminal import log, watched

MOST_OF_STREAM = 1 << 24  # samples of a batch; of other data sets there are only so many
AHEAD = 8192  # samples whose random numbers are drawn at once
GATHER = 1 << 21  # bytes of float images that are made at once: small batches cost less together


class Batches:
    """The batches of a split: `for images, labels in batches.epoch(3): ...`.

    Args:
        split: the samples.
        transforms: the YAML's list for this phase.
        device: where the batches come out.
        batch_size: samples in each but the last.
        seed: of order and augmentation.
        num_workers: processes that read samples which are not in memory; None: as many as there are cores.
        limit_batches: of an epoch at most; None takes all.
        training: the samples are for training; only these come in another order each epoch (`shuffle`), and leave out
            a shorter last batch (`drop_last`).
        accumulate: times `batch_size` samples in a batch, which is what a step takes.
        mixing: mixes the samples of a batch.
        rank, world_size: this process and how many there are; each gets as many batches, in them its own slice of every
            `batch_size` samples, which is empty where the last ones are fewer than the processes.

    Batches are floats `[batch, channels, height, width]`, 0 to 1 before `Normalize`, and labels int64 `[batch]`, or
    float `[batch, num_classes]` where the data set or `target_transform` gives probabilities.

    Raises:
        RequestError: the transforms or the number of samples do not fit.
    """

    def __init__(
        self,
        split: Split,
        transforms: Sequence[Any],
        device: torch.device,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int | None = 0,
        limit_batches: int | None = None,
        training: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        accumulate: int = 1,
        mixing: Mixing | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split, self.device, self.training = split, device, training
        self.batch_size, self.seed, self.limit = batch_size * accumulate, seed, limit_batches
        self.micro_batch_size, self.mixing = batch_size, mixing
        self.rank, self.world_size = rank, world_size
        self._own: dict[int, Tensor] = {}
        if batch_size < world_size:
            raise RequestError(
                f"batch_size={batch_size}: fewer samples than the {world_size} processes that share them; "
                f"take batch_size={world_size} or more, or fewer processes"
            )
        self.shuffle, self.drop_last = training and shuffle, training and drop_last
        option = f"dataset.{'train' if training else 'eval'}_transforms"
        parsed = parse_transforms(transforms, option)
        self.samples = self._count_samples()
        self.classes: list[Tensor] = []  # places of the samples of each class, where these are drawn equally often
        if training and split.balance:
            members = by_class(split.labels(), len(split), int(sample_seed(seed, 0)))
            self.classes = [member for member in members if len(member)]
        sizes = f"batch_size={batch_size}" + (f" accumulate={accumulate}" if accumulate > 1 else "")
        if accumulate > 1 and (least := batch_size * (accumulate - 1)) >= self.samples:
            raise RequestError(
                f"accumulate={accumulate}: an epoch has {self.samples:,} samples, a step would take over {least:,}; "
                f"at most {math.ceil(self.samples / batch_size)} goes with batch_size={batch_size}"
            )
        if self.drop_last and split.indices is not None and self.samples < self.batch_size:
            raise RequestError(
                f"drop_last=true leaves no batch: {self.samples} training samples, {sizes}; lower batch_size"
            )
        is_in_memory = isinstance(split.part, tuple)
        for_images = _count_image_transforms(parsed, is_in_memory)
        self.batch_transforms = list(enumerate(parsed))[for_images:]  # these run on batches, on the device
        self.is_random = any(transform.random for _, transform in self.batch_transforms)
        self.in_memory: tuple[Tensor, Tensor] | None = None
        self.at_once = 1  # batches that are gathered and transformed together
        self.workers: Workers | None = None
        self._stream: SampleStream | None = None
        self._shape: tuple[int, int, int] | None = None
        skip = training and split.skip_unreadable
        reader = Reader(split.part, parsed[:for_images], self.seed, split.num_classes, skip, training)
        self.reader = reader
        if split.indices is None:
            if self.batch_size > MOST_OF_STREAM:
                raise RequestError(
                    f"{sizes}: of {type(split.part).__name__}, which is iterable-style, "
                    f"at most {MOST_OF_STREAM:,} samples are read for a batch"
                )
            self._stream = SampleStream(reader)
        elif is_in_memory and for_images == 0:
            self.in_memory = place(split.part, device)
            size = self._read_for(self.batch_size) * 4 * math.prod(self.sample_shape())  # of a batch, as floats
            if size % 64 == 0:  # so every batch lies as it would alone: arithmetic may depend on where memory begins
                self.at_once = max(1, GATHER // max(1, size))
        else:
            count = cores() if num_workers is None else num_workers
            # More workers than batches would have nothing to do.
            most = max(self._read_for(min(self.batch_size, self.samples)), self._read_for(self._last()))
            self.workers = Workers(reader, min(count, len(self)), most)
            if isinstance(split.part, ImageFiles) and for_images == 0:
                _check_sizes(split, option)

    def _count_samples(self) -> int:
        """Samples of an epoch, before the last batch is dropped or `limit_batches` cuts."""
        if self.training and self.split.sampler is not None:
            with own_randomness():
                with users_code("dataset: its sampler"):
                    sampler = self.split.sampler(self.split.indices)  # type: ignore[arg-type]
                if not hasattr(sampler, "__len__"):
                    raise RequestError(f"dataset: its sampler {type(sampler).__name__} has no length; give it one")
                count = len(sampler)  # type: ignore[arg-type]
                if count == 0:
                    raise RequestError(f"dataset: its sampler {type(sampler).__name__} gives no sample")
                return count
        if self.training and self.split.indices is None:
            return self.split.steps * self.batch_size  # type: ignore[operator]
        return len(self.split)

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        count = whole + 1 if rest and not self.drop_last else whole
        return count if self.limit is None else min(count, self.limit)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return min(self.samples, len(self) * self.batch_size)

    def samples_in(self, step: int) -> int:
        """Samples of a step of training, from 0, in all processes together."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def _last(self) -> int:
        """Samples of the last step."""
        return self.samples_in(len(self) - 1) if len(self) else 0

    def own(self, count: int) -> Tensor:
        """Which of the `count` samples of a batch are this process's, int64 `[n]`: a slice of every micro-batch."""
        if count not in self._own:  # there are two counts in all, of the last batch and of the others
            micro_batches = torch.arange(count).split(self.micro_batch_size)
            own = [part[own_slice(len(part), self.rank, self.world_size)] for part in micro_batches]
            self._own[count] = torch.cat(own)
        return self._own[count]

    def _read_for(self, count: int) -> int:
        """How many samples this process reads of a batch of `count`."""
        if self.world_size == 1:
            return count
        own = len(self.own(min(count, self.samples)))
        return 2 * own if self.mixing else own

    def _needed(self, epoch: int, step: int, count: int) -> Tensor:
        """Which samples of a step this process reads, int64 `[n]`: its own, behind them those that are mixed in."""
        own = self.own(count)
        if not self.mixing or self.world_size == 1:
            return own
        return torch.cat([own, self.mixing.partners(epoch, step, count)[own]])

    def _of_this_process(
        self, order: Tensor, epoch: int, start: int
    ) -> tuple[Tensor, list[int], list[tuple[Tensor, Tensor]]]:
        """What this process reads of an epoch's samples from a batch on, in order, and how many in each batch.

        With several processes also each batch's samples, and the places in it of those.
        """
        if self.world_size == 1:
            whole, rest = divmod(len(order), self.batch_size)
            return order, [self.batch_size] * whole + [rest] * bool(rest), []
        batches = enumerate(order.split(self.batch_size), start)
        around = [(batch, self._needed(epoch, step, len(batch))) for step, batch in batches]
        parts = [batch[needed] for batch, needed in around]
        return torch.cat([order[:0], *parts]), [len(part) for part in parts], around

    def order(self, epoch: int) -> Tensor:
        """The sample indices of an epoch, int64 `[n]`, in the order in which they are seen, by all processes."""
        indices = self.split.indices
        assert indices is not None
        if self.training and self.split.sampler is not None:
            with own_randomness():
                seed_everything(int(sample_seed(self.seed, epoch)))
                with users_code("dataset: its sampler"):
                    places = torch.tensor([int(place) for place in self.split.sampler(indices)], dtype=torch.int64)
            if self.world_size > 1:  # nobody knows what it hangs on
                places = from_first(lambda: places)
            if len(places) != self.samples or not ((places >= 0) & (places < len(indices))).all():
                found = f" from {int(places.min())} to {int(places.max())}" if len(places) else ""
                raise RunError(
                    f"dataset: its sampler gave {len(places)} places{found}; "
                    f"expected {self.samples}, from 0 to {len(indices) - 1}"
                )
            return indices[places]
        if self.classes:
            indices = indices[self._balanced(epoch)]
        if not self.shuffle:
            return indices
        bits = int(sample_seed(self.seed, epoch))
        return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(bits))]

    def _balanced(self, epoch: int) -> Tensor:
        """The places of an epoch's samples, int64 `[n]` and rising, of each class as many, up to one.

        Each class is gone round in an order of its own, and an epoch begins where the last one ended: a small class
        comes as a whole again and again, of a large one every sample has had its turn before any comes again. The
        samples left over by the division go round the classes too.
        """
        share, left_over = divmod(self.samples, len(self.classes))
        before = left_over * (max(epoch, 1) - 1)  # of those left over, until now
        chosen = []
        for number, member in enumerate(self.classes):
            first, last = (
                share * (max(epoch, 1) - 1 + i) + _turns(before + left_over * i, number, len(self.classes))
                for i in (0, 1)
            )
            chosen.append(member[torch.arange(first, last) % len(member)])
        return torch.cat(chosen).sort().values

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number `start` on.

        Raises:
            RunError: samples that cannot be read, or do not fit together or into memory.
        """
        if start and start >= len(self):
            return  # resumed where the last batch was done
        with self._memory_told(self.micro_batch_size):
            batches = self._epoch(epoch, start)
            yield from in_turns(batches) if self.device.type == "cpu" else batches

    @contextmanager
    def _memory_told(self, samples: int) -> Iterator[None]:
        """Tell in one line that there is not memory enough for a batch of so many."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            said = out_of_memory(error, samples)
            if said is None:
                raise
            what = "a batch" if samples > 1 else "one image"
            raise RunError(f"{said} ({what} for {self.device}: {one_line(error, 160)})") from error

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, sizes, has_nothing = None, list[int](), False
        skipped: list[str] = []
        numbers: deque[Tensor] = deque()  # of a stream's samples, which are only numbered
        if self._stream is not None:
            source = self._from_stream(epoch, start, numbers)
            source = source if self.device.type == "cpu" else on_device(source, self.device)
        else:
            order = self.order(epoch)
            order = with_copies(order) if self.classes else order
            order = order[start * self.batch_size : len(self) * self.batch_size]
            order, sizes, around = self._of_this_process(order, epoch, start)
            has_nothing = sizes[-1:] == [0]  # in the last batch; of all others each process has some samples
            sizes = sizes[: len(sizes) - has_nothing]
            if self.in_memory is not None:
                source = self._gather(order, sizes)
            else:
                around = around[: len(sizes)] if self.reader.skip_unreadable else []
                source = self._read(epoch, order, sizes, around, skipped)
        step, done, left = start, 0, iter(sizes)
        begin = end = 0  # of the samples whose random numbers are drawn
        for images, labels in source:
            if not len(images):  # of a stream
                yield self._nothing()
                continue
            taken = list(islice(left, self.at_once)) if order is not None else [len(images)]
            if self.is_random:
                if order is None:
                    ahead = Draws(self.seed, epoch, numbers.popleft())
                    begin = done
                elif done + len(images) > end:
                    begin, end = done, done + max(len(images), AHEAD // len(images) * len(images))
                    ahead = Draws(self.seed, epoch, order[begin:end])
                images = apply(self.batch_transforms, images, ahead.window(done - begin, len(images)))
                done += len(images)
            elif self.batch_transforms:
                images = apply(self.batch_transforms, images, None)
            images = to_float(images)
            for x, y in zip(images.split(taken), labels.split(taken), strict=True):
                if self.training:
                    y = self.targets(y)
                if self.mixing:
                    x, y = self._mixed(x, y, epoch, step)
                yield x, y
                step += 1
        if has_nothing:
            yield self._nothing()
        self._tell_skipped(epoch, skipped)

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        assert self.mixing is not None
        if self.world_size == 1:
            return self.mixing(images, labels, epoch, step)
        count = self.samples_in(step)
        return self.mixing(images, labels, epoch, step, self.own(count), count)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """The batch of a process that has no sample in it."""
        labels = torch.zeros(0, dtype=torch.int64, device=self.device)
        images = torch.zeros(0, *self.sample_shape(), device=self.device)
        return images, self.targets(labels) if self.training else labels

    __iter__ = epoch

    def _gather(self, order: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples that are in memory, `at_once` together, each of its size."""
        images, labels = self.in_memory  # type: ignore[misc]
        order = (order % COPY).to(images.device)
        together = [sum(sizes[i : i + self.at_once]) for i in range(0, len(sizes), self.at_once)]
        indices, labels = order.split(together), labels.index_select(0, order)
        batches = ((images.index_select(0, i), y) for i, y in zip(indices, labels.split(together), strict=True))
        return batches if images.device.type == self.device.type else on_device(batches, self.device)

    def _read(
        self, epoch: int, order: Tensor, sizes: list[int], around: list[tuple[Tensor, Tensor]], skipped: list[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples that are read one at a time; what is wrong with those that are not goes to `skipped`."""
        assert self.workers is not None
        batches = self._noting(self.workers.read(epoch, order.split(sizes), around), skipped)
        return batches if self.device.type == "cpu" else on_device(batches, self.device)

    def _tell_skipped(self, epoch: int, skipped: list[str]) -> None:
        """Say at the end of an epoch what was skipped in it, by all processes."""
        if self.reader.skip_unreadable and self.world_size > 1:
            skipped = list(dict.fromkeys(told for own in gathered(skipped) for told in own))
        if skipped:
            images = counted(len(skipped), "image")
            log.warning(f"epoch {epoch}: {images} could not be read and skipped; the first: {skipped[0]}")

    def _noting(self, batches: Iterable[Any], skipped: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unread in batches:
            skipped.extend(unread)
            yield images, labels

    def _from_stream(self, epoch: int, start: int, numbers: deque[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an iterable-style data set: training goes on where the last epoch ended, a test starts anew.

        Every process reads the whole stream, and keeps what is its own. `numbers` gets those of a batch's samples.
        """
        assert self._stream is not None
        if self.training:
            first = ((max(epoch, 1) - 1) * len(self) + start) * self.batch_size
            samples = self._stream.forever(first, self.split.limit)
        else:
            samples = self._stream.once(self.split.limit)
        last = len(self) if self.training else self.limit
        number = start
        while (last is None or number < last) and (found := list(islice(samples, self.batch_size))):
            own = self._needed(epoch, number, len(found))
            if len(own):
                numbers.append(own + number * self.batch_size)
                yield self.reader.prepare(epoch, numbers[-1], [found[place] for place in own.tolist()])
            else:
                yield torch.zeros(0, 1, 1, 1), torch.zeros(0)
            number += 1

    def targets(self, labels: Tensor) -> Tensor:
        """Labels as the loss gets them: by `target_transform`, and as probabilities where they are mixed."""
        if transform := self.split.target_transform:
            with users_code(f"dataset.target_transform of labels {list(labels.shape)}"):
                labels = transform(labels, self.split.num_classes)
            if not isinstance(labels, Tensor):
                raise RunError(f"dataset.target_transform gave {type(labels).__name__}; expected a tensor")
        if self.mixing and labels.ndim == 1:
            labels = nn.functional.one_hot(labels, self.split.num_classes)
        return labels.float() if labels.ndim == 2 else labels

    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as the model gets it.

        Raises:
            RequestError: no image can be read, or the transforms do not fit it.
        """
        if self._shape is None:
            try:
                with own_randomness(), self._memory_told(1):
                    images = apply(
                        self.batch_transforms, self._first(), Draws(self.seed, 1, torch.zeros(1, dtype=torch.int64))
                    )
            except RunError as error:
                raise RequestError(str(error)) from error
            self._shape = tuple(images.shape[1:])  # type: ignore[assignment]
        return self._shape  # type: ignore[return-value]

    def _first(self) -> Tensor:
        """The first image that can be read, `[1, channels, height, width]`, on the device."""
        if self._stream is not None:
            found = next(self._stream.once(None), None)
            if found is None:
                raise RunError(f"{type(self.split.part).__name__} gives no sample")
            return self.reader.prepare(1, torch.zeros(1, dtype=torch.int64), [found])[0].to(self.device)
        indices = self.split.indices
        assert indices is not None
        if self.in_memory is not None:
            images = self.in_memory[0]
            return images[indices[:1].to(images.device)].to(self.device)
        assert self.workers is not None
        return self.workers.first(1, indices).to(self.device)


def _turns(count: int, place: int, of: int) -> int:
    """How many of the first `count` turns, which go round `of` places, are those of `place`."""
    return (count + of - 1 - place) // of


def _count_image_transforms(transforms: Sequence[Any], in_memory: bool) -> int:
    """How many of the transforms, from the first on, have to see one image at a time.

    All up to the last one that only torchvision has, and the first Resize of what is read from files, as their images
    differ in size before it.
    """
    last = [place + 1 for place, transform in enumerate(transforms) if isinstance(transform, PerImage)]
    resize = (
        []
        if in_memory
        else [place + 1 for place, transform in enumerate(transforms) if isinstance(transform, Resize)][:1]
    )
    return max(last + resize, default=0)


def _check_sizes(split: Split, option: str) -> None:
    """Without a Resize, images of files must have one size; their headers tell before any is decoded."""
    files, first = split.part, None
    for index in watched(split.indices.tolist(), "looking at the images' sizes"):  # type: ignore[union-attr]
        path = str(files.paths[index])
        try:
            with open_image(path) as image:
                turned = image.size[0] != image.size[1] and image.getexif().get(274, 1) >= 5
                size = image.size[::-1] if turned else image.size
        except Exception:  # the reader says what is wrong with it
            continue
        if first is not None and size != first[0]:
            raise RequestError(
                f"images of different sizes: {first[1]} is {first[0][0]}x{first[0][1]}, {path} is {size[0]}x{size[1]}; "
                f"put Resize: {{size: [height, width]}} first in {option}"
            )
        first = first or (size, path)
