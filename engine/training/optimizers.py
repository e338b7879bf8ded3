"""Optimizers: which parameters get which settings, and Muon, which torch has for matrices only."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from engine.build import build, locate
from engine.errors import RequestError

# Batch and instance norms are _NormBase; a subclass of any counts too, torchvision's LayerNorm2d for instance.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: the steepest slope at zero, so that five steps do
Named = tuple[str, nn.Parameter]


def build_optimizer(settings: dict[str, Any], model: nn.Module, decay_norms: bool = True) -> Any:
    """The optimizer that a configuration names, for the parameters of a model that are trained.

    Its `state_dict()` numbers the parameters as `model.parameters()` does, however they are grouped, and it takes the
    state of one whose groups were others: what it keeps belongs to a parameter, not to a group.

    Args:
        settings: the group `optimizer` of a configuration.
        model: with all its parameters on their device.
        decay_norms: false: `weight_decay` leaves norm layers and biases alone, see `parameter_groups`.

    Raises:
        RequestError: the optimizer does not fit its settings, nothing is to be trained, or the norms are to be left
            alone by an optimizer that has no `weight_decay`: what decays there, if anything, is not known here. With
            `weight_decay` 0 the wish is fulfilled as it is, so that a sweep may have that value among others.
    """
    target = locate(settings["_target_"], "optimizer._target_")
    groups = parameter_groups(model, decay_norms)
    if not groups:
        raise RequestError(
            f"model {type(model).__name__} has no parameter to train: requires_grad is false for every one"
        )
    if not (isinstance(target, type) and issubclass(target, Muon)):  # torch would keep names in every checkpoint
        groups = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    optimizer = build(
        settings, "optimizer", groups[0]["params"] if len(groups) == 1 and decay_norms else groups, target=target
    )
    if not decay_norms and "weight_decay" not in getattr(optimizer, "defaults", {}):
        raise RequestError(
            f"optimizer {settings['_target_']} has no weight_decay that could leave norms and biases alone; "
            "expected one that has, or decay_norms=true"
        )
    if isinstance(optimizer, Optimizer):
        _number_as_in(model, optimizer)
    return optimizer


def parameter_groups(model: nn.Module, decay_norms: bool) -> list[dict[str, Any]]:
    """The parameters that are trained as groups for an optimizer, `{"params": [(name, parameter), ...], ...}`.

    One group where norms decay as all do. Otherwise the second has `weight_decay` 0: every parameter of a norm layer,
    and of other layers those with one dimension or none, which are biases, scales and slopes (He et al.,
    arXiv:1812.01187, section 3.1). An empty group is left out.
    """
    of_norms = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    decayed: list[Named] = []
    spared: list[Named] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = not decay_norms and (parameter.ndim < 2 or parameter in of_norms)
            (spared if spare else decayed).append((name, parameter))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def shares(optimizer: Optimizer) -> str:
    """For the log, what an optimizer does to which share of the parameters; empty where it treats all alike.

    `Muon 98.7 % of the parameters, AdamW the rest; weight decay on 99.6 %` for instance.
    """
    counts = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    groups = list(zip(optimizer.param_groups, counts, strict=True))
    said = []
    if isinstance(optimizer, Muon):
        share = sum(count for group, count in groups if group["orthogonalised"]) / sum(counts)
        said.append(f"Muon {_percent(share)} of the parameters, AdamW the rest")
    if len({bool(group.get("weight_decay")) for group, _ in groups}) > 1:
        share = sum(count for group, count in groups if group["weight_decay"]) / sum(counts)
        said.append(f"weight decay on {_percent(share)}{'' if said else ' of the parameters'}")
    for factor in dict.fromkeys(group.get("lr_scale", 1) for group, _ in groups):
        if factor != 1:
            share = sum(count for group, count in groups if group["lr_scale"] == factor) / sum(counts)
            said.append(f"learning rate x {factor:g} on {_percent(share)}{'' if said else ' of the parameters'}")
    return "; ".join(said)


def _percent(share: float) -> str:
    """To a tenth, but 100 % and 0 % only where that is all or nothing."""
    return f"{share:.0%}".replace("%", " %") if share in (0, 1) else f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def _number_as_in(model: nn.Module, optimizer: Optimizer) -> None:
    """Let states have the model's numbers of parameters in place of those by group, and fit whatever the groups."""
    numbers = {parameter: number for number, parameter in enumerate(model.parameters())}

    def numbers_by_group() -> list[list[int]]:
        return [[numbers[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def saved(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = [number for group in numbers_by_group() for number in group]  # torch's number is the place in here
        return {
            "state": {own[place]: kept for place, kept in state["state"].items()},
            "param_groups": [
                {**group, "params": [own[place] for place in group["params"]]} for group in state["param_groups"]
            ],
        }

    def loaded(_: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        own, theirs = numbers_by_group(), [group["params"] for group in state["param_groups"]]
        wanted = {number for group in own for number in group}
        if own == theirs or not wanted <= {number for group in theirs for number in group}:
            return None  # as it is: torch says what does not fit
        return {
            "state": {number: kept for number, kept in state["state"].items() if number in wanted},
            "param_groups": [
                {**group, "params": group_numbers}
                for group, group_numbers in zip(optimizer.param_groups, own, strict=True)
            ],
        }

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loaded)


# ---------------------------------------------------------------------------------------------------------------------
# Muon


class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices and filters, AdamW for all else, each with its own learning rate.

    Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by the orthogonal matrix
    next to its momentum, so that all directions of it learn alike. A filter is taken as the matrix [channels out, all
    else]. The step is as large as AdamW's would be, and weights decay as AdamW's do (Liu et al., arXiv:2502.16982,
    section 2.2), so a rate that suits AdamW suits it. torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the
    same to matrices and refuses the rest.

    Orthogonalised is what has `weight` in its name and two dimensions or more, except the last one, the classifier's.
    Norms, biases, embeddings of positions, tokens, scales and the classifier are AdamW's.

    Args:
        params: (name, parameter) as `model.named_parameters()` gives, or groups `{"params": ...}` of such. Parameters
            without names have no classifier among them: AdamW's are those with less than two dimensions.
        lr: learning rate of what is orthogonalised.
        momentum: share of the averaged gradient that is kept, in [0, 1).
        nesterov: look ahead along the momentum.
        weight_decay: of all parameters, times the learning rate.
        adamw_lr: learning rate of the rest.
        adamw_betas: decay of the averages of its gradient and of its square, in [0, 1).
        adamw_eps: added to its denominator.

    Raises:
        ValueError: there are no parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        named = [[one if isinstance(one, tuple) else ("", one) for one in group["params"]] for group in groups]
        matrices = [(name, p) for pairs in named for name, p in pairs if p.ndim > 1 and (not name or "weight" in name)]
        if matrices and matrices[-1][0]:
            matrices.pop()  # the classifier's
        hidden = {parameter for _, parameter in matrices}
        parts: list[dict[str, Any]] = []
        for group, pairs in zip(groups, named, strict=True):
            own = {"orthogonalised": True, "lr": lr}, {"orthogonalised": False, "lr": adamw_lr}
            for settings in own:
                part = [p for _, p in pairs if (p in hidden) == settings["orthogonalised"]]
                parts += [{**group, **settings, "params": part}] if part else []
        defaults = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(parts, {**defaults, "betas": tuple(adamw_betas), "eps": adamw_eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient; returns what `closure`, which computes them anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if moving := [parameter for parameter in group["params"] if parameter.grad is not None]:
                (self._orthogonalise if group["orthogonalised"] else self._adamw)(moving, group)
        return loss

    # What is kept has other names than in torch's optimizers, so that none takes it for its own: the groups differ.

    def _orthogonalise(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        kept, by_shape = group["momentum"], defaultdict(list)
        for parameter in parameters:
            state, gradient = self.state[parameter], cast(Tensor, parameter.grad)
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(gradient, 1 - kept)
            ahead = gradient.lerp(average, kept) if group["nesterov"] else average
            matrix = ahead.flatten(1)
            by_shape[matrix.shape].append((parameter, matrix))
        for shape, alike in by_shape.items():  # at once, as a GPU is quick at many small matrices
            directions = orthogonalised(torch.stack([matrix for _, matrix in alike]), precision(alike[0][0].device))
            # Root mean squares: of an orthogonal [a, b] 1 / sqrt(max(a, b)), of AdamW's steps about 0.2.
            size = group["lr"] * 0.2 * math.sqrt(max(shape))
            for (parameter, _), direction in zip(alike, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.reshape(parameter.shape), alpha=-size)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
                self.state[parameter] = {"step": torch.zeros(()), **zeros}  # on the CPU, so that nothing waits for it
        kept = {name: [self.state[p][name] for p in parameters] for name in ("mean", "square", "step")}
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        beta, beta_square = group["betas"]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        adamw(
            *(parameters, gradients, kept["mean"], kept["square"], [], kept["step"]),
            **{**settings, "beta1": beta, "beta2": beta_square, "amsgrad": False, "maximize": False},
        )


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Close to U V^T of the singular value decomposition U S V^T of matrices [n, a, b]: singular values 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration, odd polynomials of the singular values (Jordan et al. 2024). Values below a
    thousandth of a matrix's norm come out smaller; a zero matrix stays zero.

    Args:
        matrices: any floating type.
        dtype: in which it is computed and returned.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)  # the product x x^T is the smaller one so
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)

    if dtype == torch.bfloat16:
        for _ in range(5):
            product = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(product, product, product, beta=b, alpha=c), x, beta=a)
    else:
        # The five steps as one factor of x, a polynomial of x x^T: half of the arithmetic where x is wide. bfloat16 is
        # too coarse for it, as the squares of small singular values are lost in the product.
        def factor(product: Tensor) -> Tensor:
            result = torch.baddbmm(product, product, product, beta=b, alpha=c)
            result.diagonal(dim1=1, dim2=2).add_(a)
            return result

        product = x @ x.mT
        factors = factor(product)
        for _ in range(4):
            factors = factor(factors @ product @ factors) @ factors
        x = factors @ x
    return x.mT if tall else x


@functools.cache
def precision(device: torch.device) -> torch.dtype:
    """In which type `orthogonalised` computes: bfloat16, which suffices it, where a GPU has units for it.

    On CPUs float32: many have no such units, and what a seed gives should not depend on which one it is.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
