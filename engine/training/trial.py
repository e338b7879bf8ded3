"""A step tried before anything is made on disk: what does not fit together is told at the start, in one line.

The trial leaves no trace: buffers, attributes, gradients and random generators are put back, so that a run ends with
the bits of one that was not tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from engine.data.batches import Batches
from engine.data.images import ImageFiles
from engine.distributed import own_slice
from engine.errors import RequestError, RunError, cause, counted, one_line, out_of_memory
from engine.run.saver import state_names
from engine.run.state import RandomStates
from engine.training.metrics import Tally
from engine.training.step import autocast

# What torch and models raise at images, labels or sizes that do not fit. Anything else is a bug in a model or a loss.
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, Warning)


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """A model or a loss on the device, or RequestError where that has not the memory for it, or it is no module."""
    with _told(f"{type(module).__name__} cannot be moved to {device}", 1):
        return module.to(device)


def try_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: dict[str, Any],
    batches: Batches,
    input_shape: tuple[int, int, int],
    num_classes: int,
    precision: str = "fp32",
) -> None:
    """Try an evaluation of one empty image, then training steps of the sizes that an epoch's batches have.

    Args:
        model: on the device of the batches; lazy layers get their sizes here.
        criterion: on the same device.
        optimizer: its settings; a small one of its kind makes a step of its own.
        batches: of training; no sample of them is read.
        input_shape: (channels, height, width) of an image.
        num_classes: logits that the model has to give.
        precision: of the training steps, as `choose_precision` gives it.

    Raises:
        RequestError: naming what does not fit: model, loss, optimizer, the size of a batch, or memory.
    """
    model.eval()
    with torch.no_grad():
        _forward(model, torch.zeros(1, *input_shape, device=batches.device), num_classes)
    size = batches.micro_batch_size
    wholes = min(size, batches.num_samples), batches.num_samples % size or min(size, batches.num_samples)
    largest, last = (_own_part(count, batches) for count in wholes)
    with _no_trace(model, criterion):
        with _told(f"optimizer {optimizer['_target_']} cannot make a step", largest):
            state_names(optimizer)
        make_labels = _label_maker(criterion, batches, num_classes)
        images = torch.zeros(largest, *input_shape, device=batches.device)
        model.train()
        _step(model, criterion, images, make_labels, num_classes, precision)
        try:
            if wholes[0] != wholes[1]:
                _step(model, criterion, images[:last], make_labels, num_classes, precision)
        except RequestError as error:
            of, way_out = "", "drop_last=true"
            if batches.world_size > 1:
                of, way_out = " in one of the processes", "sync_batchnorm=true where it is batch norm, drop_last=true"
            raise RequestError(
                f"batch_size={size}: the last batch of {batches.num_samples:,} samples holds {last}{of}: "
                f"{error}; take {way_out} or another batch_size"
            ) from error


def _own_part(count: int, batches: Batches) -> int:
    """This process's part of a micro-batch; where it has none, one image stands for it."""
    own = own_slice(count, batches.rank, batches.world_size)
    return max(1, own.stop - own.start)


def _forward(model: nn.Module, images: Tensor, num_classes: int, precision: str = "fp32") -> Tensor:
    """Logits `[batch, num_classes]` of empty images."""
    count, *shape = images.shape
    name, of_images = type(model).__name__, counted(count, "image")
    with _told(f"model {name} {{}} {of_images} {shape}", count), autocast(images.device, precision):
        logits = model(images)
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [count, num_classes]:
        raise RequestError(
            f"model {name} gives {found} for {of_images}; expected [{count}, {num_classes}], a logit a class"
        )
    return logits


def _step(
    model: nn.Module,
    criterion: nn.Module,
    images: Tensor,
    make_labels: Callable[[int], Tensor],
    num_classes: int,
    precision: str,
) -> None:
    """Forward, loss, backward and the counting of a batch of empty images."""
    count, device = len(images), images.device
    logits = _forward(model, images, num_classes, precision).float()
    labels = make_labels(count)
    loss = _loss(criterion, logits, labels)
    with _told(f"the backward pass of {type(model).__name__} and {type(criterion).__name__} fails", count):
        loss.backward()
        tally = Tally(device)
        tally.add(loss, logits, labels)
        tally.read_own()


def _label_maker(criterion: nn.Module, batches: Batches, num_classes: int) -> Callable[[int], Tensor]:
    """What makes labels of the first class for so many images, as training would hand them to the loss."""
    transform = batches.split.target_transform

    def as_training_does(count: int) -> Tensor:
        indices = torch.zeros(count, dtype=torch.int64, device=batches.device)
        try:
            return batches.targets(indices)
        except RunError as error:
            raise RequestError(str(error)) from error

    def probabilities(count: int) -> Tensor:
        return nn.functional.one_hot(torch.zeros(count, dtype=torch.int64, device=batches.device), num_classes).float()

    count = num_classes + 2  # with one sample, or as many as classes, labels of a wrong shape may broadcast
    logits = torch.zeros(count, num_classes, device=batches.device)
    try:
        _loss(criterion, logits, as_training_does(count))
    except RequestError as error:
        try:
            _loss(criterion, logits, probabilities(count))
        except RequestError:
            raise error from error.__cause__
        if transform is not None or isinstance(batches.split.part, (tuple, ImageFiles)):
            raise RequestError(
                f"{error}; dataset.target_transform=torch.nn.functional.one_hot would make labels that fit"
            ) from error
        return probabilities  # of a Dataset of the user's, only its samples tell which of the two its labels are
    return as_training_does


def _loss(criterion: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    name = type(criterion).__name__
    shapes = " and labels ".join(str(["batch", *x.shape[1:]]).replace("'", "") for x in (logits, labels))
    with _told(f"criterion {name} {{}} logits {shapes} of {labels.dtype}", len(logits)), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")  # shapes that broadcast, into a wrong loss
        loss = criterion(logits, labels)
    if not isinstance(loss, Tensor) or loss.ndim:
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise RequestError(f"criterion {name} gives {found}; expected one number, such as reduction: mean makes")
    return loss


@contextmanager
def _no_trace(*modules: nn.Module) -> Iterator[None]:
    """Put back what a step in training mode changes."""
    parts = [part for module in modules for part in module.modules()]
    attributes = [dict(vars(part)) for part in parts]
    buffers = [
        (part, name, tensor, tensor.clone())
        for part in parts
        for name, tensor in part._buffers.items()
        if tensor is not None and not is_lazy(tensor)
    ]
    generators = RandomStates()
    states = generators.state_dict()
    try:
        yield
    finally:
        generators.load_state_dict(states)
        for part, attributes_before in zip(parts, attributes, strict=True):
            vars(part).update(attributes_before)
        for module in modules:
            module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for part, name, tensor, before in buffers:
                part._buffers[name] = tensor
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


@contextmanager
def _told(what: str, batch_size: int) -> Iterator[None]:
    """Tell what is raised inside as a wrong request; `{}` in `what` becomes "does not take" or "fails on"."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if said := out_of_memory(error, batch_size):
            raise RequestError(f"{what.format('fails on')}: {said}") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise RequestError(f"compile=true: the model cannot be compiled here: {one_line(error, 200)}") from error
        verb = "does not take" if isinstance(error, MISFITS) else "fails on"
        raise RequestError(f"{what.format(verb)}: {cause(error)}") from error
