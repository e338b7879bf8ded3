"""The random numbers of samples: a pure function of (seed, epoch, sample index).

In whatever batch, process or device a sample is, it draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer


def _mix(bits: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16) on int64, which wraps in torch."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


def sample_seed(seed: int, epoch: int, index: int | Tensor = 0) -> Tensor:
    """64 random bits (int64, the shape of `index`) for each sample of an epoch."""
    start = (seed * _GOLDEN + 1 + (1 << 63)) % (1 << 64) - (1 << 63)  # a seed of any size, wrapped as int64 does
    key = _mix(torch.tensor(start)) + epoch
    return _mix(_mix(key * _GOLDEN) + (torch.as_tensor(index) + 1) * _GOLDEN)


COPY = 1 << 40  # more than a data set has samples


def with_copies(order: Tensor) -> Tensor:
    """Sample indices, int64 `[n]`, of which the second of the same sample is raised by COPY, the third by twice that.

    So a sample that comes again in an epoch draws other numbers than before; `index % COPY` is the sample.
    """
    places = order.argsort(stable=True)
    rising, number = order[places], torch.arange(len(order))
    begins = torch.ones(len(order), dtype=torch.bool)
    begins[1:] = rising[1:] != rising[:-1]
    result = torch.empty_like(order)
    result[places] = rising + (number - number[begins][begins.cumsum(0) - 1]) * COPY
    return result


class Draws:
    """The random numbers of samples: every call of `uniform` gives new ones, the same for a sample in any batch.

    They are computed for many batches at once, which costs little more than for one, and shown a window at a time.

    Args:
        seed: of the run.
        epoch: counted from 1.
        index: int64 `[n]`, the samples' places in the data set.
    """

    MOST_AHEAD = 64  # numbers a sample that are computed ahead; more would take memory

    def __init__(self, seed: int, epoch: int, index: Tensor) -> None:
        self.bits = sample_seed(seed, epoch, index)
        self.begin, self.end = 0, len(index)
        self.drawn = 0
        self.known: dict[tuple[int, int, str | None], Tensor] = {}

    def window(self, begin: int, count: int) -> Draws:
        """Itself, for the batch of the samples from `begin` on."""
        self.begin, self.end = begin, begin + count
        return self

    def at(self, place: int) -> Draws:
        """Itself, for the transform at `place` of the list: what others draw before it changes nothing."""
        self.drawn = place << 40
        return self

    def integers(self, count: int) -> Tensor:
        """64 random bits, int64 `[batch, count]`, on the CPU."""
        return self._next(self.bits[self.begin : self.end], count)

    def _next(self, bits: Tensor, count: int) -> Tensor:
        slot = torch.arange(self.drawn + 1, self.drawn + count + 1, dtype=torch.int64)
        self.drawn += count
        return _mix(bits[:, None] + slot * _GOLDEN)

    def uniform(self, count: int, device: torch.device | None = None) -> Tensor:
        """Uniform numbers in [0, 1), float32 `[batch, count]`, on the CPU or `device`; nothing waits for the device."""
        if count > self.MOST_AHEAD:
            return send(_to_uniform(self.integers(count)), device)
        key = (self.drawn, count, device.type if device else None)
        if key in self.known:
            self.drawn += count
        else:
            self.known[key] = send(_to_uniform(self._next(self.bits, count)), device)
        return self.known[key][self.begin : self.end]


def _to_uniform(bits: Tensor) -> Tensor:
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def send(numbers: Tensor, device: torch.device | None) -> Tensor:
    """On the device, without waiting for it."""
    if device is None or device.type == "cpu":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def random_states() -> tuple[Any, ...]:
    """Of the generators of torch (CPU), NumPy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states: tuple[Any, ...]) -> None:
    """Go on from `random_states()`."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextmanager
def own_randomness() -> Iterator[None]:
    """What is drawn or seeded inside leaves those generators as they were outside."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def seed_everything(bits: int) -> None:
    """Seed the generators of torch (CPU only), NumPy and Python with 64 bits."""
    torch.default_generator.manual_seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    random.seed(bits)
