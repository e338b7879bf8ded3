"""A step of training: what its batch is cut into, in which precision it is computed, and what follows its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.distributed import as_first, own_slice, rank, total, world_size
from engine.errors import RequestError, counted
from engine.terminal import log
from engine.training.losses import WeightedCrossEntropy
from engine.training.metrics import Share
from engine.training.parallel import Parallel
from engine.training.transfer import Frozen


class Step:
    """What belongs to a step: optimizer, precision and its gradient scaler, schedule, averaged weights.

    With several processes each computes the gradients of its own samples, and `backward` adds them up: the weights
    are the same in all.

    Args:
        model: on the device.
        optimizer: of its parameters.
        schedule: sets the optimizer's learning rate, has `step()`.
        device: of both.
        batch_size: samples that go through the model at once, in all processes together; a step collects several of
            these micro-batches.
        precision: "fp32", "bf16" or "fp16", as `choose_precision` gives it.
        clip_grad_norm: the gradient is scaled down to this norm where it is larger; None leaves it.
        ema_decay: share of the averaged weights that a step keeps; None averages nothing.
        frozen: what of the model does not learn; None is nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Any,
        device: torch.device,
        *,
        batch_size: int,
        precision: str = "fp32",
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.device = model, optimizer, schedule, device
        self.batch_size, self.precision, self.clip = batch_size, precision, clip_grad_norm
        self.frozen = frozen or Frozen(model, None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skipped = 0  # steps of the epoch whose gradients were no finite numbers, which only fp16 passes over
        self.moved = True  # whether the optimizer made the last step; to ask the scale would wait for the device
        if self.scaler.is_enabled():
            optimizer.register_step_post_hook(lambda *_: setattr(self, "moved", True))
        # Averages of the weights (Polyak and Juditsky, 1992), batch norm's statistics as they are.
        self.average = None if ema_decay is None else get_ema_multi_avg_fn(ema_decay)
        self.averaged = 0  # steps in the averages
        #: What is evaluated and kept in checkpoints: the averaged weights, or the model itself.
        self.evaluated: nn.Module = deepcopy(model) if self.average else model
        self.world_size = world_size()
        self._parallel: Parallel | None = None  # how several processes call the model
        self._learning: list[bool] = []  # which parameters learn there
        self._is_last = True  # of the micro-batches of a step

    def compile(self) -> None:
        """Compile the forward pass of training and of evaluation in place, so that parameters keep their names.

        A batch of another size, such as the last of an epoch, goes the way it would without: to compile for it takes
        longer than it does.
        """
        for module in {self.model, self.evaluated}:
            plain = module.forward
            fast = torch.compile(plain, dynamic=False)
            module.forward = partial(_by_size, fast, plain, self._own_size(self.batch_size))

    def train(self, epoch: int) -> None:
        """Put the model into training mode for an epoch, from 1, but for what is frozen in it."""
        self.model.train()
        self.frozen.hold(epoch)
        learning = [parameter.requires_grad for parameter in self.model.parameters()]
        if learning != self._learning:
            self._parallel, self._learning = None, learning

    def micro_batches(
        self, images: Tensor, labels: Tensor, criterion: nn.Module, samples: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Share]]:
        """The batch of a step in parts that go through the model at once, each with its share of the step's loss.

        The shares make the sum of the parts' losses the loss of the whole, whatever their sizes; of one part it is 1.
        `samples` are those of the whole batch, where this process has but some of them.
        """
        if self.world_size > 1:
            yield from self._own_parts(images, labels, criterion, len(labels) if samples is None else samples)
        elif len(labels) <= self.batch_size:
            yield images, labels, Share(1.0, 1.0, len(labels))
        else:
            whole = weight_of(criterion, labels)
            for x, y in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True):
                yield x, y, Share(weight_of(criterion, y) / whole if mean_of(criterion) else 1.0, 1.0, len(y))

    def _own_parts(
        self, images: Tensor, labels: Tensor, criterion: nn.Module, samples: int
    ) -> Iterator[tuple[Tensor, Tensor, Share]]:
        """The same of a process that has a slice of every micro-batch, of which there are `samples` in all."""
        sizes = [min(self.batch_size, samples - first) for first in range(0, samples, self.batch_size)]
        own = [self._own_size(size) for size in sizes]
        parts = list(zip(images.split(own), labels.split(own), strict=True))
        weights: list[Any] = [1.0 for _ in parts]  # of a sum each part counts as it is
        wholes, in_all = weights, 1.0
        if mean_of(criterion):
            weights = [weight_of(criterion, y) for _, y in parts]
            is_counted = isinstance(weights[0], int)  # else labels decide, some of which are in other processes
            wholes = sizes if is_counted else list(total(torch.stack(weights)).unbind())
            in_all = sum(wholes)
        for place, (x, y) in enumerate(parts):
            self._is_last = place == len(parts) - 1
            gradient = weights[place] / in_all * self.world_size  # as DDP takes the mean over the processes
            yield x, y, Share(gradient, weights[place] / wholes[place], sizes[place])

    def _own_size(self, count: int) -> int:
        """Samples of this process of a micro-batch of so many."""
        own = own_slice(count, rank(), self.world_size)
        return own.stop - own.start

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in the chosen precision, as float32 for the loss."""
        if self.precision == "fp32":
            return self._call(images)
        with autocast(self.device, self.precision):
            return self._call(images).float()

    def _call(self, images: Tensor) -> Tensor:
        if self.world_size == 1:
            return self.model(images)
        if self._parallel is None:
            self._parallel = Parallel(self.model, images.shape[1:])
        return self._parallel(images, self._is_last)

    def backward(self, loss: Tensor, share: Share | None = None) -> None:
        """Add the gradients of a part's loss, times its share of the step; without one it is all of it."""
        factor = 1.0 if share is None else share.gradient
        if isinstance(factor, Tensor) or factor != 1.0:  # comparing a tensor would wait for the device
            loss = loss * factor
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """What follows the gradients: unscale, clip, step, zero; then the schedule's next rate, and the averages.

        Where fp16 overflowed nothing but the scale changes.
        """
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.moved = not self.scaler.is_enabled()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not self.moved:
            self.skipped += 1
            return
        self.schedule.step()
        if self.average:
            self._average(self.average)

    @torch.no_grad()
    def _average(self, average: Callable[..., None]) -> None:
        """What torch's AveragedModel does, but that copies its count to the device each time, and waits for it."""
        averages: list[Tensor] = [*self.evaluated.parameters()]
        parameters: list[Tensor] = [*self.model.parameters()]
        if self.averaged:
            average(averages, parameters, None)
        else:
            torch._foreach_copy_(averages, parameters)
        for kept, buffer in zip(self.evaluated.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)
        self.averaged += 1

    def end_epoch(self) -> None:
        """Evaluate the same in every process; say how many steps of the epoch were passed over, and count anew."""
        as_first(self.evaluated.buffers())  # batch norm's statistics
        if self.skipped:
            steps = counted(self.skipped, "step")
            log.info(f"fp16     {steps} skipped, with gradients that are no finite numbers; the scale is lower now")
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer, the schedule and the evaluated weights, which are parts of their own, leave out."""
        state: dict[str, Any] = {"skipped": self.skipped, "scaler": self.scaler.state_dict()}
        if self.average:
            state |= {"weights": self.model.state_dict(), "averaged": self.averaged}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, after the evaluated weights were loaded; of a run without averages they begin."""
        self.skipped = state.get("skipped", 0)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if "weights" in state or self.average:
            self.model.load_state_dict(state.get("weights") or self.evaluated.state_dict())
        self.averaged = state.get("averaged", 0)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """What is computed inside is computed in this precision, where PyTorch thinks that safe."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, half) if half else nullcontext()


def mean_of(criterion: nn.Module) -> bool:
    """Whether a loss is a mean over samples, as most are, and not their sum."""
    return getattr(criterion, "reduction", "mean") == "mean"


def weight_of(criterion: nn.Module, labels: Tensor) -> Any:
    """What samples weigh in the mean that a loss is: their number, or their classes' weights in all."""
    if isinstance(criterion, WeightedCrossEntropy):
        return criterion.weight_of(labels)
    weight = getattr(criterion, "weight", None)  # torch's own losses weigh class indices, not probabilities
    return len(labels) if weight is None or labels.ndim == 2 else weight[labels].sum()


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 of what was asked for; auto takes bf16 where the hardware computes in it.

    Raises:
        RequestError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise RequestError("precision=fp16: not on a CPU, where it is slower than fp32; precision=bf16, or auto")
    has = has_bf16(device)
    if name == "auto":
        return "bf16" if has else "fp32"
    if name == "bf16" and not has:
        log.info(f"bf16     {device} has no arithmetic of its own for it: it may be slower than fp32")
    return name


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16: GPUs from compute capability 8 on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # from torch 2.11 on
    return any(value for name, value in capabilities.items() if str(name).endswith("bf16"))


def _by_size(fast: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], size: int, images: Tensor) -> Tensor:
    return fast(images) if len(images) == size else plain(images)
