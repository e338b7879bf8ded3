"""A model that several processes train together: by DDP, with batch norm over the samples of all of them if asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import rank, total, world_size


class Parallel:
    """Calls a model so that its gradients become the mean of those of all processes.

    Made anew where other parameters learn than before.

    Args:
        model: on the device.
        shape: of an image, `[channels, height, width]`.
    """

    def __init__(self, model: nn.Module, shape: torch.Size) -> None:
        device = next(model.parameters()).device
        nothing = torch.zeros(1, *shape, device=device)
        with _evaluating(model):
            (model(nothing).sum() * 0).backward()
        unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        model.zero_grad()
        on = [device] if device.type == "cuda" else None
        self.model = DistributedDataParallel(_OwnPart(model), device_ids=on, find_unused_parameters=unused)
        # After its first step DDP lays gradients together anew, and how they lie decides in which order three or more
        # numbers are added. After one that comes to nothing they lie as in all later steps, and in those of a run that
        # goes on.
        with _evaluating(model):
            (self.model(nothing).sum() * 0).backward()
        model.zero_grad()

    def __call__(self, images: Tensor, is_last: bool) -> Tensor:
        """Logits; the backward pass of the last images of a step exchanges the gradients of all of them."""
        self.model.require_backward_grad_sync = is_last
        return self.model(images)


class _OwnPart(nn.Module):
    """A model that takes part without a sample, too: it evaluates an empty image, and gives no logits.

    All gradients are zero then, and batch norm's statistics what they were.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if len(images):
            return self.model(images)
        with _evaluating(self.model, but_for_synchronised=True):
            return self.model(images.new_zeros(1, *images.shape[1:]))[:0]


@contextmanager
def _evaluating(model: nn.Module, but_for_synchronised: bool = False) -> Iterator[None]:
    """Evaluation mode; synchronised batch norms may still take part in the exchange, with no sample of their own."""
    training: list[Any] = [module for module in model.modules() if module.training]
    exchanging = [module for module in training if but_for_synchronised and hasattr(module, "has_samples")]
    model.eval()
    for module in exchanging:
        module.training, module.has_samples = True, False
    try:
        yield
    finally:
        for module in exchanging:
            module.has_samples = True
        for module in training:
            module.training = True


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a model has batch norm, which lets an image's logits hang on the others that a process has."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def synchronise_batchnorm(model: nn.Module) -> None:
    """Let batch norms take mean and variance of the samples of all processes, in training.

    It is what torch's SyncBatchNorm does, which is for GPUs only. The modules and their states stay what they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.has_samples = True  # type: ignore[assignment]
            module.forward = MethodType(_synchronised, module)  # type: ignore[method-assign]


def _synchronised(norm: Any, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    normed, mean, variance, count = _Normed.apply(x, norm.eps, norm.has_samples)
    if norm.running_mean is not None:
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
    if norm.weight is not None:
        normed = normed * _by_channel(norm.weight, x)
    if norm.bias is not None:
        normed = normed + _by_channel(norm.bias, x)
    return normed.to(x.dtype)


class _Normed(torch.autograd.Function):
    """Images of mean 0 and variance 1 a channel (Ioffe and Szegedy, arXiv:1502.03167), over those of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, has_samples: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normed images, mean and biased variance `[channels]`, and how many numbers of a channel there were."""
        wide = x if x.dtype == torch.float64 else x.float()
        ctx.dims, ctx.has_samples, channels = [0, *range(2, x.ndim)], has_samples, x.shape[1]
        count = wide.new_full((1,), wide.numel() // channels if has_samples else 0)
        mean = wide.mean(ctx.dims)
        squares = (wide - _by_channel(mean, x)).square().sum(ctx.dims)
        rows = wide.new_zeros(world_size(), 1 + 2 * channels)
        rows[rank()] = torch.cat([count, mean, squares])
        counts, means, squares = total(rows).split([1, channels, channels], 1)
        # Put together as Chan, Golub and LeVeque (1979) do, since a mean of squares less a squared mean loses digits.
        whole = counts.sum()
        mean = (counts * means).sum(0) / whole
        about = squares * (counts > 0) + counts * (means - mean).square()
        variance = about.sum(0) / whole
        scale = (variance + eps).rsqrt()
        normed = (wide - _by_channel(mean, x)) * _by_channel(scale, x)
        ctx.save_for_backward(normed, scale, whole)
        ctx.mark_non_differentiable(mean, variance, whole)
        return normed, mean, variance, whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        """The gradient of the images; what each does to mean and variance is felt by those of all processes."""
        normed, scale, whole = ctx.saved_tensors
        sums = torch.stack([gradient.sum(ctx.dims), (gradient * normed).sum(ctx.dims)])
        by_mean, by_variance = total(sums) / whole
        if not ctx.has_samples:  # mean and variance are none of the empty image's
            return torch.zeros_like(normed), None, None
        own = gradient - _by_channel(by_mean, normed) - normed * _by_channel(by_variance, normed)
        return own * _by_channel(scale, normed), None, None


def _by_channel(numbers: Tensor, x: Tensor) -> Tensor:
    """`[channels]` shaped to go with `[batch, channels, ...]`."""
    return numbers.view(1, -1, *[1] * (x.ndim - 2))
