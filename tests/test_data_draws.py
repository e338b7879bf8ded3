"""Random numbers: kept ahead, at the ends of what is kept, and generators of others that stay as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from splitmix import numbers, seed_of, signed

from engine.data.draws import (
    Draws,
    own_randomness,
    random_states,
    sample_seed,
    seed_everything,
    send,
    set_random_states,
)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 2**64 + 5, -(2**70) - 3])
def test_a_seed_of_any_size_wraps_as_64_bits_do(seed: int) -> None:
    assert sample_seed(seed, 1, torch.tensor([0, 7])).tolist() == [signed(seed_of(seed, 1, i)) for i in (0, 7)]


def test_draws_begin_at_the_first_place() -> None:
    assert Draws(5, 2, torch.tensor([4])).uniform(3).tolist() == [numbers(5, 2, 4, 0, 3)]


@pytest.mark.parametrize("ahead", [2, 3, 64])
def test_calls_one_after_another_go_on_where_the_last_ended(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the numbers were computed ahead, are taken from what is kept, or are too many to keep."""
    monkeypatch.setattr(Draws, "MOST_AHEAD", ahead)
    draws = Draws(5, 2, torch.tensor([4, 9, 9, 30]))
    for begin, count in ((0, 2), (2, 2), (0, 4)):
        draws.window(begin, count).at(3)
        drawn = [draws.uniform(2), draws.uniform(3), draws.uniform(2), draws.integers(1), draws.uniform(1)]
        drawn[3] = ((drawn[3] >> 40) & 0xFFFFFF) / 2**24
        expected = [numbers(5, 2, index, 3, 9) for index in [4, 9, 9, 30][begin : begin + count]]
        assert torch.cat(drawn, 1).tolist() == expected


@pytest.mark.parametrize(("count", "is_kept"), [(1, True), (1000, False)])
def test_numbers_of_every_sample_are_computed_once_if_they_are_few(count: int, is_kept: bool) -> None:
    draws = Draws(0, 1, torch.arange(3))
    first, second = draws.window(0, 1).at(0).uniform(count), draws.window(2, 1).at(0).uniform(count)
    assert first.shape == second.shape == (1, count) and not torch.equal(first, second)
    assert (first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()) == is_kept


def test_numbers_lie_on_the_device_that_asked() -> None:
    draws, meta = Draws(0, 1, torch.arange(3)), torch.device("meta")
    for count in (2, 70):
        assert draws.at(0).uniform(count).device.type == "cpu"
        assert draws.at(0).uniform(count, meta).device.type == "meta"
        assert draws.at(0).uniform(count, torch.device("cpu")).tolist() == draws.at(0).uniform(count).tolist()
    sent = torch.arange(3)
    assert send(sent, None) is sent and send(sent, torch.device("cpu")) is sent and send(sent, meta).is_meta


def drawn() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_inside_is_not_missed_outside(fails: bool) -> None:
    before = random_states()
    expected = drawn()
    set_random_states(before)
    try:
        with own_randomness():
            inside = drawn()
            seed_everything(3)
            drawn()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert inside == expected  # it goes on from outside's
    assert drawn() == expected


@pytest.mark.parametrize("bits", [0, 1, 2**31, 2**32 - 1, 2**32 + 1, 2**63 - 1, -1, -(2**63)])
def test_the_generators_are_seeded_as_their_libraries_do(bits: int) -> None:
    """NumPy's old generator takes 32 bits."""
    with own_randomness():
        seed_everything(bits)
        found = drawn()
    generator = torch.Generator().manual_seed(bits)
    assert found[0] == torch.rand(3, generator=generator).tolist()
    assert found[1] == np.random.RandomState(bits % 2**32).rand(3).tolist()
    assert found[2] == random.Random(bits).random()
