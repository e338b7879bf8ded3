"""The random numbers of samples a second time, in Python's integers without a bound.

What a sample draws, and the order of an epoch, are promised: a function of (seed, epoch, sample), the same on every
machine and with any number of workers. The tests hold the program against what is written here.
"""

from __future__ import annotations

import torch

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(bits: int) -> int:
    """SplitMix64's finaliser."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def seed_of(seed: int, epoch: int, index: int = 0) -> int:
    """64 random bits of a sample in an epoch."""
    key = mix((seed * GOLDEN + 1) & MASK) + epoch
    return mix((mix((key * GOLDEN) & MASK) + (index + 1) * GOLDEN) & MASK)


def numbers(seed: int, epoch: int, index: int, place: int, count: int) -> list[float]:
    """The first uniform numbers that the transform at a place of the list draws for a sample: 24 bits each."""
    bits = seed_of(seed, epoch, index)
    drawn = (mix((bits + ((place << 40) + slot) * GOLDEN) & MASK) for slot in range(1, count + 1))
    return [(bits >> 40) / 2**24 for bits in drawn]


def signed(bits: int) -> int:
    return bits - 2**64 if bits >> 63 else bits


def order_of(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` samples in an epoch: torch's shuffle, seeded with what (seed, epoch) draws for sample 0."""
    generator = torch.Generator().manual_seed(signed(seed_of(seed, epoch)))
    return torch.randperm(count, generator=generator).tolist()
