"""Transfer: another run's weights to begin with, parts that do not learn, and learning rates of their own.

A pattern names parameters, as a shell names files (`*`, `?` and `[abc]`, where `*` takes dots too). It is held against
the name of each parameter and of each module that it is in: `conv1` means conv1.weight and conv1.bias, `layer[12]` all
of layer1 and layer2, `*.bias` every bias. `backbone` means all but the last layer, where nothing is named so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.errors import RequestError, did_you_mean, shortened
from engine.run import checkpoint

BACKBONE = "backbone"


def take_weights(model: nn.Module, path: Path, classes: Sequence[str]) -> str:
    """Put into a model what a file has of it, by name and shape; returns what is said of that in the log.

    The last layer is not taken from a run with other classes: its logits mean something else.

    Args:
        model: with its parameters in their shapes.
        path: a checkpoint of a run, or a bare state_dict; see `checkpoint.read`.
        classes: names of the classes of the data.

    Raises:
        RequestError: there is no such file, it is no checkpoint, no parameter is in it, or numbers are not finite.
    """
    found = checkpoint.read(path, also_old=True)
    there, parameters = found["model"], dict(model.named_parameters())
    here = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    last = _last_layer(model)
    of_last = {name for name in here if not last.isdisjoint(_within(name))}
    others = found.get("classes", list(classes)) != list(classes)
    taken, left = {}, {}
    for name, tensor in here.items():
        if name not in there:
            left[name] = "not in the file"
        elif there[name].shape != tensor.shape or there[name].is_floating_point() != tensor.is_floating_point():
            left[name] = f"{list(tensor.shape)}, there {list(there[name].shape)}"
        elif others and name in of_last:
            left[name] = "of other classes"
        else:
            taken[name] = there[name]
    if not parameters.keys() & taken.keys():
        theirs, own = (
            ", ".join(f"{shortened(name, 40)} {list(tensor.shape)}" for name, tensor in [*states.items()][:2])
            for states in (there, here)
        )
        raise RequestError(
            f"init_from={path}: no parameter of {type(model).__name__} is in it with its name, shape and classes; "
            f"it holds {theirs} ..., the model {own} ..."
        )
    model.load_state_dict(taken, strict=False)
    checkpoint.check_finite(model, path)
    count = sum(parameters[name].numel() for name in parameters.keys() & taken.keys())
    said = f"{count:,} of {sum(p.numel() for p in parameters.values()):,} parameters are those of {path}"
    if not left:
        return said
    listed = ", ".join(f"{name} ({why})" for name, why in [*left.items()][:3])
    return f"{said}, not {listed}{f' and {len(left) - 3} more' if len(left) > 3 else ''}"


class Frozen:
    """The parts of a model that do not learn, for good or until an epoch.

    A frozen parameter gets no gradient, so that no optimizer moves it, decays it or keeps anything of it (but Adagrad,
    which does so from the start). A module all of whose parameters are frozen is in evaluation mode while the rest
    trains: its batch norms keep their statistics, its dropout does nothing, and the part leaves an epoch with the bits
    that it entered it with.

    Args:
        model: with its parameters in their shapes.
        patterns: of what is frozen; None for nothing.
        until: the epoch, from 1, that trains everything again; None for none.

    Raises:
        RequestError: a pattern names no parameter, or nothing is left to be trained.
    """

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None, until: int | None = None) -> None:
        listed = [patterns] if isinstance(patterns, str) else patterns or []
        chosen: set[Tensor] = set()
        for pattern in listed:
            chosen |= named_by(str(pattern), model, "freeze")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in trained if parameter in chosen]
        if listed and len(self.parameters) == len(trained):
            raise RequestError(
                f"freeze={shortened(', '.join(map(str, listed)))}: every parameter of {type(model).__name__} would be "
                f"frozen and none trained; leave the last layer out, as freeze={BACKBONE} does"
            )
        self.modules = [module for module in model.modules() if _is_within(module, chosen)]
        self.until = until
        self.hold(1)

    def hold(self, epoch: int) -> None:
        """Of a model in training mode, hold what is frozen in an epoch, or let it go."""
        free = self.until is not None and epoch >= self.until
        for parameter in self.parameters:
            parameter.requires_grad_(free)
        for module in [] if free else self.modules:
            module.eval()

    def said(self, model: nn.Module, epochs: int) -> str:
        """For the log, how much is frozen and for how long; empty where nothing is."""
        if not self.parameters:
            return ""
        count, whole = (sum(p.numel() for p in parameters) for parameters in (self.parameters, model.parameters()))
        if self.until is None:
            until = ""
        elif self.until <= epochs:
            until = f", until epoch {self.until}"
        else:
            until = f"; epoch {self.until}, which would train them, is after the last"
        return f"{count:,} of {whole:,} parameters{until}"


def scale_rates(optimizer: Any, model: nn.Module, scales: Mapping[str, float] | None) -> None:
    """Give parameters a multiple of the learning rate that an optimizer has for them, in groups of their own.

    Before anything is made of the groups: a schedule multiplies the rates that it finds. The group of those that keep
    their rate stays the first, whose rate is shown.

    Args:
        optimizer: of the model's parameters.
        model: which the patterns are held against.
        scales: factor by pattern; of several that name a parameter the last counts. None changes nothing.

    Raises:
        RequestError: a pattern names no parameter.
    """
    if not scales:
        return
    factors = {tensor: factor for name, factor in scales.items() for tensor in named_by(str(name), model, "lr_scale")}
    groups = []
    for group in optimizer.param_groups:
        parts = defaultdict(list)
        for parameter in group["params"]:
            parts[factors.get(parameter, 1.0)].append(parameter)
        for factor, parameters in parts.items():
            groups.append({**group, "params": parameters, "lr": group["lr"] * factor, "lr_scale": factor})
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr_scale"] != 1)


def named_by(pattern: str, model: nn.Module, setting: str) -> set[Tensor]:
    """The parameters that a pattern names, and with them the buffers; what a pattern is stands at the top.

    Raises:
        RequestError: no parameter is named so; tells the nearest names, and `setting`.
    """
    tensors = {**dict(model.named_buffers(remove_duplicate=False))}
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    found = {tensor for name, tensor in tensors.items() if any(fnmatchcase(part, pattern) for part in _within(name))}
    if not found and pattern == BACKBONE:
        last = _last_layer(model)
        found = {tensor for name, tensor in tensors.items() if last.isdisjoint(_within(name))}
    if not any(isinstance(tensor, nn.Parameter) for tensor in found):
        names = list(dict.fromkeys(part for name, _ in model.named_parameters() for part in _within(name)))
        near = did_you_mean(pattern.strip("*."), names)
        there = "" if near else f"; there are {', '.join(names[:5])} ..., and {BACKBONE} for all but the last layer"
        raise RequestError(
            f"{setting}: no parameter of {type(model).__name__} is named {shortened(pattern)}{near}{there}"
        )
    return found


def _within(name: str) -> list[str]:
    """`a`, `a.b` and `a.b.weight` of `a.b.weight`."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _last_layer(model: nn.Module) -> set[str]:
    """The names of the modules that make the logits: the last with parameters of its own, or the model's `last_layers`.

    That is a tuple of names, which a model may have where several modules make its logits, or not the last one.
    """
    named = getattr(model, "last_layers", ())
    own = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    return (set(named) if isinstance(named, tuple) else set()) or {own[-1]}


def _is_within(module: nn.Module, chosen: set[Tensor]) -> bool:
    """Whether all parameters of a module are among those chosen; of one without, all buffers."""
    tensors: list[Tensor] = [*module.parameters()] or [*module.buffers()]
    return bool(tensors) and all(tensor in chosen for tensor in tensors)
