"""Mixup and CutMix: images of a step mixed with others of the same step, and their labels in the same shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.data.draws import sample_seed, send


class Mixing:
    """Mixes the samples of a step in pairs; with both methods on, each sample draws one of them.

    Who is mixed with whom, and in which shares, is a function of (seed, epoch, step, place in the step).

    Args:
        mixup: both parameters of the Beta distribution of the shares; pixels are averaged (arXiv:1710.09412). Or None.
        cutmix: the same of the area that an image keeps; the rest is a rectangle of its partner's (arXiv:1905.04899).
    """

    def __init__(self, mixup: float | None, cutmix: float | None, seed: int) -> None:
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, step: int, own: Tensor | None = None, count: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mixed images `[batch, channels, height, width]` and probabilities `[batch, num_classes]`.

        Args:
            images: floats.
            labels: probabilities `[batch, num_classes]`.
            epoch: from 1.
            step: of the epoch, from 0.
            own: where these are not all samples of the step, int64 `[n]`, the places in it of those that are mixed;
                images and labels are theirs, and behind them their partners'.
            count: samples of the step, then.
        """
        device, draw = images.device, self._draw(epoch, step)
        count = len(images) if own is None else count
        partners, places = draw.permutation(count), slice(None) if own is None else own.numpy()
        if own is None:
            here = send(torch.from_numpy(partners), device)
            other, others_labels = images.index_select(0, here), labels.index_select(0, here)
        else:
            (images, other), (labels, others_labels) = images.chunk(2), labels.chunk(2)
        cut = draw.random(count) < (0.5 if self.mixup else 1.0) if self.cutmix else np.zeros(count, bool)

        share, mixed = np.ones(count), images
        if self.mixup:
            share = np.where(cut, 1.0, draw.beta(self.mixup, self.mixup, count))
            by_pixel = send(torch.from_numpy(share[places]).float(), device)[:, None, None, None]
            mixed = images * by_pixel + other * (1 - by_pixel)
        if self.cutmix:
            height, width = images.shape[-2:]
            side = np.sqrt(1 - draw.beta(self.cutmix, self.cutmix, count))  # as a share of the image's
            rows = _spans(draw.random(count), side, height)
            columns = _spans(draw.random(count), side, width)
            inside = rows[:, :, None] & columns[:, None, :] & cut[:, None, None]
            share = np.where(cut, 1 - inside.mean((1, 2)), share)
            mixed = torch.where(send(torch.from_numpy(inside[places]), device)[:, None], other, mixed)
        kept = send(torch.from_numpy(share[places]).float(), device)[:, None]
        return mixed, kept * labels + (1 - kept) * others_labels

    def partners(self, epoch: int, step: int, count: int) -> Tensor:
        """The place of the partner of each of `count` samples of a step, int64 `[count]`, on the CPU."""
        return torch.from_numpy(self._draw(epoch, step).permutation(count))

    def _draw(self, epoch: int, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=int(sample_seed(self.seed, epoch, step)) % 2**64))


def _spans(centre: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` places lie in a span about a centre, bool `[n, size]`; both are shares of the size.

    What of it would lie outside is cut off, as in the paper's code.
    """
    half = np.round(length * size) / 2
    middle = np.floor(centre * size) + 0.5
    place = np.arange(size) + 0.5
    return (place >= (middle - half)[:, None]) & (place < (middle + half)[:, None])
