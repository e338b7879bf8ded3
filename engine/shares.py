"""Which samples of a data set: a share held out, or a few of them. Pure functions, the same for every seed of a run."""

from __future__ import annotations

import torch
from torch import Tensor


def hold_out(labels: Tensor | None, count: int, fraction: float, seed: int = 0) -> Tensor:
    """A mask `[count]` of the same share of every class, or of all samples where their labels are not known.

    Where rounding would leave small classes out, the largest of these give one sample each until the whole share, or at
    least one sample, is held out. No class gives its last one away.

    Args:
        labels: int64 `[count]`, or None.
        count: samples.
        fraction: in [0, 1).
        seed: another one, another choice.
    """
    held_out = torch.zeros(count, dtype=torch.bool)
    members = _by_class(labels, count, seed)
    sizes = [len(member) for member in members]
    taken = [min(round(fraction * size), size - 1) if size else 0 for size in sizes]
    missing = max(1, round(fraction * count)) - sum(taken) if fraction else 0
    small = [label for label, size in enumerate(sizes) if size > 1 and not taken[label]]
    for label in sorted(small, key=lambda label: -sizes[label])[: max(0, missing)]:
        taken[label] = 1
    for member, number in zip(members, taken, strict=True):
        held_out[member[:number]] = True
    return held_out


def spread(labels: Tensor | None, count: int, limit: int | None) -> Tensor:
    """The places, int64 and rising, of `limit` of the samples, in the proportions of the classes.

    Of every class there is one, as far as `limit` reaches; without labels they are drawn from all.

    Args:
        labels: int64 `[count]`, or None.
        count: samples.
        limit: how many; None, or more than there are, takes all.
    """
    if limit is None or limit >= count:
        return torch.arange(count)
    members = _by_class(labels, count, seed=2)
    turns = []
    for member in members:
        turn = (torch.arange(len(member)) + 0.5) / max(1, len(member))  # F. Webster's way to share out seats
        turn[:1] = -len(member)  # before all of these, the first of the largest class first
        turns.append(turn)
    chosen = torch.cat(turns).argsort(stable=True)[:limit]
    return torch.cat(members)[chosen].sort().values


def _by_class(labels: Tensor | None, count: int, seed: int) -> list[Tensor]:
    """The places of the samples of every class, shuffled; all in one where there are no labels."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return [shuffled]
    return list(shuffled[labels[shuffled].argsort(stable=True)].split(labels.bincount().tolist()))
