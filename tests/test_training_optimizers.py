"""Optimizers: Muon against torch's own, and which parameters get which settings."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from engine.config import CONFIGS, group_options
from engine.errors import RequestError
from engine.run.saver import state_names
from engine.training import optimizers
from engine.training.optimizers import Muon, build_optimizer, orthogonalised, parameter_groups, precision, shares
from engine.training.schedules import linear
from models.cnn import CNN
from models.mlp import MLP

CPU = torch.device("cpu")


def settings_of(name: str, **other: Any) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "optimizer" / f"{name}.yaml"))
    return settings | other


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(parameter: nn.Parameter, optimizer: Any, steps: int = 6) -> Tensor:
    """The parameter after steps along gradients that are the same for every optimizer."""
    for step in range(steps):
        parameter.grad = drawn(*parameter.shape, seed=step + 1)
        optimizer.step()
    return parameter.detach()


class Net(nn.Module):
    """A parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6, 6))
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.narrow = nn.Conv2d(4, 2, 1, bias=False)
        self.plane_norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(72, 5)
        self.slope = nn.PReLU()
        self.classifier = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.plane_norm(self.narrow(self.norm(self.conv(images + self.position))))
        return self.classifier(self.slope(self.hidden(maps.flatten(1))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(drawn(8, 2, 6, 6, seed=step)), torch.arange(8) % 3).backward()
        optimizer.step()


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same bits."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------------------------------
# Muon's matrices


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (1, 12)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_moves_as_with_torchs_muon(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], nesterov: bool
) -> None:
    """torch has it for matrices only, always in bfloat16."""
    torchs = getattr(torch.optim, "Muon", None)
    if torchs is None or "adjust_lr_fn" not in inspect.signature(torchs).parameters:
        pytest.skip("this torch has no Muon that scales its steps to AdamW's")
    monkeypatch.setattr(optimizers, "precision", lambda device: torch.bfloat16)
    ours, other = nn.Parameter(drawn(*shape)), nn.Parameter(drawn(*shape))
    same_settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8, "nesterov": nesterov}
    moved = stepped(ours, Muon([ours], **same_settings))
    expected = stepped(other, torchs([other], adjust_lr_fn="match_rms_adamw", **same_settings))
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    assert (moved - drawn(*shape)).abs().max() > 0.02


def test_a_matrix_moves_as_the_formulas_say() -> None:
    """The same in plain loops in float64, from the papers: in single precision nothing else comes out."""
    lr, kept, decay = 0.02, 0.9, 0.5
    parameter = nn.Parameter(drawn(7, 4))
    moved = stepped(parameter, Muon([parameter], lr=lr, momentum=kept, weight_decay=decay), steps=4)
    weight, velocity = drawn(7, 4).double(), torch.zeros(7, 4, dtype=torch.float64)
    for step in range(4):
        gradient = drawn(7, 4, seed=step + 1).double()
        velocity = kept * velocity + gradient
        x = gradient + kept * velocity
        x = x / (x**2).sum().sqrt()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        weight = weight - lr * (0.2 * 7**0.5 * x + decay * weight)
    torch.testing.assert_close(moved.double(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (4, 16, 1, 1), (6, 2, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_filter_moves_as_its_matrix(shape: tuple[int, ...], channels_last: bool) -> None:
    filters, matrix = nn.Parameter(drawn(*shape)), nn.Parameter(drawn(*shape).flatten(1))
    if channels_last and len(shape) == 4:
        filters.data = filters.data.to(memory_format=torch.channels_last)
    optimizer, flat = Muon([filters]), Muon([matrix])
    for step in range(5):
        gradient = drawn(*shape, seed=step + 1)
        matrix.grad = gradient.flatten(1)
        filters.grad = gradient.clone(memory_format=torch.preserve_format)
        if channels_last and len(shape) == 4:
            filters.grad = filters.grad.to(memory_format=torch.channels_last)
        optimizer.step()
        flat.step()
    torch.testing.assert_close(filters.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (16, 200), (200, 16), (1, 30)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_singular_values_of_a_step_are_near_one(shape: tuple[int, int], size: float, dtype: torch.dtype) -> None:
    """Between 0.68 and 1.21 as the five polynomials have it, which bfloat16 widens; the directions stay."""
    u, _, v = torch.linalg.svd(drawn(*shape), full_matrices=False)
    values = torch.logspace(0, -1, min(shape))  # of which the largest is ten times the smallest
    alone = size * (u * values) @ v
    result, zero = orthogonalised(torch.stack([alone, torch.zeros(shape)]), dtype)
    assert result.shape == shape and result.dtype == dtype and not zero.any()
    found = torch.linalg.svdvals(result.float())
    assert found.min() > 0.6 and found.max() < 1.3
    inside = u.T @ result.float() @ v.T  # a diagonal where the directions are the same
    assert (inside - inside.diag().diag()).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("shape", [(12, 12), (9, 60), (60, 9)])
def test_small_singular_values_are_raised_as_the_iteration_has_it(shape: tuple[int, int]) -> None:
    """The five polynomials, one after the other on each singular value in float64: from 1 down to a ten-thousandth."""
    u, _, v = torch.linalg.svd(drawn(*shape).double(), full_matrices=False)
    values = torch.logspace(0, -4, min(shape), dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = orthogonalised(((u * values) @ v).float()[None], torch.float32)[0]
    torch.testing.assert_close(found.double(), (u * expected) @ v, rtol=0, atol=1e-3)
    assert expected.min() < 0.1 and found.abs().max() > 0.1  # neither all alike nor nothing


def test_without_a_gradient_nothing_moves() -> None:
    parameter = nn.Parameter(drawn(3, 5))
    optimizer = Muon([parameter], weight_decay=0.0)
    optimizer.step()  # there is none
    assert not optimizer.state
    parameter.grad = torch.zeros(3, 5)
    optimizer.step()  # it is zero
    assert torch.equal(parameter.detach(), drawn(3, 5))


def test_matrices_of_one_shape_do_not_mix() -> None:
    """They are computed at once; each moves as it does alone, one without a gradient not at all."""
    several = [
        nn.Parameter(drawn(*shape, seed=n)) for n, shape in enumerate([(4, 6), (4, 6), (6, 4), (4, 2, 3), (4, 6)])
    ]
    for n, parameter in enumerate(several[:-1]):
        parameter.grad = drawn(*parameter.shape, seed=10 + n)
    alone = [copy.deepcopy(parameter) for parameter in several]
    Muon(several).step()
    for parameter, other, number in zip(several, alone, range(5), strict=True):
        other.grad = parameter.grad
        Muon([other]).step()
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)
        assert torch.equal(parameter.detach(), drawn(*parameter.shape, seed=number)) == (number == 4)


def test_a_step_is_as_large_as_adamws() -> None:
    """A fifth of the learning rate in the root mean square, whatever the shape and the gradient's size."""
    for shape in ((40, 40), (10, 90), (16, 4, 3, 3)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = 1e3 * drawn(*shape)
        Muon([parameter], lr=0.5).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.2), shape


def test_a_cpu_computes_in_single_precision() -> None:
    assert precision(CPU) == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Muon's two parts


def orthogonal_names(model: nn.Module, optimizer: Muon) -> set[str]:
    parts = {p for group in optimizer.param_groups if group["orthogonalised"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if parameter in parts}


def test_hidden_matrices_and_filters_are_orthogonalised() -> None:
    model = net()
    hidden = {"conv.weight", "narrow.weight", "hidden.weight"}
    assert orthogonal_names(model, Muon(model.named_parameters())) == hidden
    assert orthogonal_names(model, build_optimizer(settings_of("muon"), model)) == hidden
    assert orthogonal_names(model, build_optimizer(settings_of("muon"), model, decay_norms=False)) == hidden


@pytest.mark.parametrize("decay_norms", [True, False])
def test_of_torchvisions_models_the_last_layer_and_the_tokens_are_adamws(decay_norms: bool) -> None:
    from torchvision import models

    for make, rest in (
        (models.resnet18, {"fc.weight"}),
        (models.vit_b_16, {"class_token", "encoder.pos_embedding", "heads.head.weight"}),
    ):
        with torch.device("meta"):
            model = make()
        many = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        assert orthogonal_names(model, build_optimizer(settings_of("muon"), model, decay_norms)) == many - rest


def test_the_rest_moves_as_with_adamw() -> None:
    model, other = net(), net()
    muon = build_optimizer(settings_of("muon", lr=0.0, adamw_lr=0.03, weight_decay=0.2), model)
    rest = {"conv.weight", "narrow.weight", "hidden.weight"}
    adamw = AdamW((p for n, p in other.named_parameters() if n not in rest), 0.03, (0.9, 0.95), weight_decay=0.2)
    train(model, muon, 5)
    train(other, adamw, 5)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(model.classifier.weight, net().classifier.weight)


def test_each_part_follows_the_schedule_from_its_own_rate() -> None:
    muon = build_optimizer(settings_of("muon", lr=0.4, adamw_lr=0.008), net())
    schedule = linear(muon, 4, 2)
    assert [group["lr"] for group in muon.param_groups] == [0.4, 0.008]
    schedule.step()
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.3, 0.006])


@pytest.mark.parametrize("name", group_options()["optimizer"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_a_run_goes_on_with_the_same_bits(name: str, decay_norms: bool) -> None:
    model = net()
    optimizer = build_optimizer(settings_of(name), model, decay_norms)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, first=3)

    again = net()
    second = build_optimizer(settings_of(name), again, decay_norms)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert same(second.state_dict(), saved[1])
    train(again, second, 3, first=3)
    assert same(again.state_dict(), model.state_dict()) and same(second.state_dict(), optimizer.state_dict())


def test_muon_learns() -> None:
    model = net()
    optimizer = build_optimizer(settings_of("muon", lr=0.02, adamw_lr=0.02), model)
    images, labels = drawn(9, 2, 6, 6), torch.arange(9) % 3
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert torch.equal(model(images).argmax(1), labels)


def test_a_closure_is_called_once_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([parameter])

    def closure() -> float:
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4 and parameter.max() < 1 and torch.equal(parameter.grad, 2 * torch.ones(2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters get which settings


@pytest.mark.parametrize("name", [name for name in group_options()["optimizer"] if name != "muon"])
def test_unless_asked_otherwise_an_optimizer_gets_all_parameters_as_one_group(name: str) -> None:
    """Of the same bits as with `model.parameters()`, in the steps and in the file."""
    settings = settings_of(name)
    model, other = net(), net()
    ours = build_optimizer(settings, model)
    own = {key: value for key, value in settings.items() if key != "_target_"}
    plain = getattr(torch.optim, settings["_target_"].rpartition(".")[2])(other.parameters(), **own)
    train(model, ours, 3)
    train(other, plain, 3)
    assert same(model.state_dict(), other.state_dict()) and same(ours.state_dict(), plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert same(ours.state_dict(), plain.state_dict()) and type(ours) is type(plain)


def test_norms_and_biases_are_left_alone_by_weight_decay() -> None:
    model = net()
    decayed, spared = parameter_groups(model, decay_norms=False)
    assert [name for name, _ in decayed["params"]] == [
        *("position", "conv.weight", "narrow.weight", "hidden.weight", "classifier.weight")
    ]
    assert [name for name, _ in spared["params"]] == [
        *("conv.bias", "norm.weight", "norm.bias", "plane_norm.weight", "plane_norm.bias", "hidden.bias"),
        *("slope.weight", "classifier.bias"),
    ]
    assert spared["weight_decay"] == 0 and "weight_decay" not in decayed
    [group] = parameter_groups(model, decay_norms=True)
    assert [name for name, _ in group["params"]] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((4, 4)),
        nn.RMSNorm((4, 4)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_of_any_kind_is_left_alone(norm: nn.Module) -> None:
    [group] = parameter_groups(norm, decay_norms=False)
    assert len(group["params"]) == len(list(norm.parameters())) > 0 and group["weight_decay"] == 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_what_is_left_alone_stays_where_its_gradient_is_zero(name: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(settings_of(name, weight_decay=0.5, lr=0.1), model, decay_norms=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rate = {"classifier.weight": 1e-3} if name == "muon" else {}
    for key in ("conv.weight", "hidden.weight", "classifier.weight"):
        torch.testing.assert_close(
            getattr(model, key.split(".")[0]).weight, before[key] * (1 - rate.get(key, 0.1) * 0.5)
        )
    for key in ("conv.bias", "norm.weight", "plane_norm.weight", "slope.weight", "classifier.bias"):
        assert torch.equal(model.get_parameter(key), before[key]), key


def test_a_model_of_nothing_but_norms_does_not_decay() -> None:
    [group] = build_optimizer(settings_of("sgd", weight_decay=0.5), nn.BatchNorm2d(4), decay_norms=False).param_groups
    assert group["weight_decay"] == 0


def test_weight_decay_of_nothing_is_no_error() -> None:
    """So that a sweep over it may have zero among its values."""
    optimizer = build_optimizer(settings_of("sgd", weight_decay=0.0), net(), decay_norms=False)
    assert len(optimizer.param_groups) == 2 and shares(optimizer) == ""


def test_an_optimizer_without_weight_decay_cannot_leave_norms_out() -> None:
    settings = {"_target_": "torch.optim.SparseAdam", "lr": 0.1}
    assert len(build_optimizer(settings, net()).param_groups) == 1
    with pytest.raises(RequestError, match=r"SparseAdam has no weight_decay .*; expected .*decay_norms=true"):
        build_optimizer(settings, net(), decay_norms=False)


def test_frozen_parameters_are_left_out() -> None:
    model = net()
    model.conv.requires_grad_(False)
    optimizer = build_optimizer(settings_of("sgd", momentum=0.9), model)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) - 2
    train(model, optimizer, 2)
    numbers = [number for number, (_, p) in enumerate(model.named_parameters()) if p.requires_grad]
    state = optimizer.state_dict()
    assert state["param_groups"][0]["params"] == numbers == sorted(state["state"])
    model.requires_grad_(False)
    with pytest.raises(RequestError, match="model Net has no parameter to train: requires_grad is false"):
        build_optimizer(settings_of("sgd"), model)


def test_settings_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(RequestError, match=r"^optimizer: engine.training.optimizers.Muon does not fit .*betas"):
        build_optimizer(settings_of("muon", betas=[0.9, 0.9]), net())
    with pytest.raises(RequestError, match=r"has no 'Moun' .*did you mean Muon"):
        build_optimizer({"_target_": "engine.training.optimizers.Moun"}, net())
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])


def test_a_file_of_settings_has_the_defaults_of_muon() -> None:
    settings = settings_of("muon", _target_=None, adamw_betas=tuple(settings_of("muon")["adamw_betas"]))
    defaults = {p.name: p.default for p in inspect.signature(Muon).parameters.values() if p.name != "params"}
    assert {key: value for key, value in settings.items() if key != "_target_"} == defaults


# ---------------------------------------------------------------------------------------------------------------------
# What is saved


@pytest.mark.parametrize("name", ["sgd", "adam", "nadam", "muon"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_a_state_numbers_parameters_as_the_model_does(name: str, decay_norms: bool) -> None:
    model = net()
    optimizer = build_optimizer(settings_of(name), model, decay_norms)
    train(model, optimizer, 1)
    shapes = [parameter.shape for parameter in model.parameters()]
    state = optimizer.state_dict()["state"]
    assert sorted(state) == list(range(len(shapes)))
    for number, kept in state.items():
        assert all(t.shape == shapes[number] for t in kept.values() if isinstance(t, Tensor) and t.numel() > 1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("before", [True, False])
def test_averages_belong_to_their_parameter_whatever_the_groups(name: str, before: bool) -> None:
    model = net()
    first = build_optimizer(settings_of(name, lr=0.3), model, decay_norms=before)
    train(model, first, 2)
    second = build_optimizer(settings_of(name, lr=0.2), model, decay_norms=not before)
    groups = len(second.param_groups)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(second.param_groups) == groups and second.param_groups[0]["lr"] == 0.2
    for parameter in model.parameters():
        assert same(second.state[parameter], first.state[parameter])


def test_a_state_from_before_some_parameters_were_frozen_is_taken() -> None:
    model = net()
    first = SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, first, 2)
    model.conv.requires_grad_(False)
    second = build_optimizer(settings_of("sgd"), model)
    second.load_state_dict(first.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert set(second.state) == set(trained) and all(same(second.state[p], first.state[p]) for p in trained)


def test_a_state_of_other_parameters_is_refused() -> None:
    model, small = net(), nn.Linear(2, 2)
    saved = SGD(small.parameters(), 0.1).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        build_optimizer(settings_of("sgd"), model).load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        build_optimizer(settings_of("sgd"), model, decay_norms=False).load_state_dict(saved)


def test_a_state_is_data_without_names(tmp_path: Any) -> None:
    model = net()
    optimizer = build_optimizer(settings_of("muon"), model, decay_norms=False)
    train(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(saved, optimizer.state_dict()) and "param_names" not in saved["param_groups"][0]


def test_what_muon_keeps_is_no_other_optimizers() -> None:
    """By the names in a state a resumed run knows whether its optimizer can use it."""
    model = net()
    optimizer = build_optimizer(settings_of("muon"), model)
    train(model, optimizer, 1)
    kept = {name for state in optimizer.state_dict()["state"].values() for name in state}
    assert state_names(settings_of("muon")) == {"momentum"} <= kept
    for name in set(group_options()["optimizer"]) - {"muon"}:
        needed = state_names(settings_of(name))
        assert not needed <= kept and "momentum" not in needed, name


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def test_the_shares_of_the_parts_are_said() -> None:
    """Of an MLP 8-10-10-3, 180 weights are hidden, 30 the classifier's, and 23 are biases: 77.3 %, both 90.1 %."""
    model = MLP((1, 2, 4), 3, [10, 10])
    assert shares(build_optimizer(settings_of("muon"), model)) == "Muon 77.3 % of the parameters, AdamW the rest"
    assert shares(build_optimizer(settings_of("muon"), model, decay_norms=False)) == (
        "Muon 77.3 % of the parameters, AdamW the rest; weight decay on 90.1 %"
    )
    adamw = build_optimizer(settings_of("adamw"), model, decay_norms=False)
    assert shares(adamw) == "weight decay on 90.1 % of the parameters"
    assert shares(build_optimizer(settings_of("adamw"), model)) == ""
    assert shares(build_optimizer(settings_of("muon"), nn.Linear(4, 3))) == (
        "Muon 0 % of the parameters, AdamW the rest"
    )
    nearly = shares(build_optimizer(settings_of("muon"), MLP((1, 2, 4), 2, [999, 999])))
    assert nearly.startswith("Muon 99.6 %")
    assert re.fullmatch(r"Muon 9\d\.\d % of .*", shares(build_optimizer(settings_of("muon"), CNN((3, 8, 8), 10))))
