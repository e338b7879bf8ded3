"""Transfer: weights to begin with, what does not learn, and rates of their own, against plain loops."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from test_run_checkpoint import small
from test_run_resume import result, same
from torch import Tensor, nn

from engine.config import known_settings
from engine.errors import RequestError
from engine.run import checkpoint, trust
from engine.training.optimizers import build_optimizer, shares
from engine.training.schedules import build_schedule, linear
from engine.training.step import Step
from engine.training.transfer import Frozen, named_by, scale_rates, take_weights
from models.cnn import CNN
from models.fastnet import FastNet
from models.mlp import MLP
from models.resnet import ResNet18
from models.vit import ViT

CPU = torch.device("cpu")
SMALL = ["model=cnn", "model.width=2", "dataset.limit=60", "batch_size=16", "checkpoint.every_minutes=null"]


def made(number: int = 0) -> CNN:
    torch.manual_seed(number)
    return CNN((1, 8, 8), 3, width=2)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def train(step: Step, epoch: int, batches: int = 3) -> None:
    step.train(epoch)
    torch.manual_seed(epoch)  # of dropout
    for number in range(batches):
        images, labels = drawn(8, 100 * epoch + number)
        step.backward(nn.functional.cross_entropy(step.forward(images), labels))
        step.update()


def step_of(model: nn.Module, optimizer: Any, **other: Any) -> Step:
    return Step(model, optimizer, linear(optimizer, 100, 3), CPU, batch_size=8, **other)


def adamw(**other: Any) -> dict[str, Any]:
    return {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.3, **other}


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


class Named(nn.Module):
    """conv1, conv10, features.0 (a linear layer), features.1 (a batch norm), features.10 and head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv10 = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, bias=False)
        layers = {"0": nn.Linear(2, 2), "1": nn.BatchNorm1d(2), "10": nn.Linear(2, 2, bias=False)}
        self.features, self.head = nn.ModuleDict(layers), nn.Linear(2, 3)


FEATURES = ["features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias", "features.10.weight"]
CONVOLUTIONS = ["conv1.weight", "conv1.bias", "conv10.weight"]
HEAD = ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("conv1", CONVOLUTIONS[:2]),
        ("conv1.*", CONVOLUTIONS[:2]),
        ("conv1*", CONVOLUTIONS),
        ("conv?", CONVOLUTIONS[:2]),
        ("conv1.weight", CONVOLUTIONS[:1]),
        ("features", FEATURES),
        ("features.*", FEATURES),
        ("features.1", FEATURES[2:4]),
        ("features.[01]", FEATURES[:4]),
        ("*.bias", ["conv1.bias", "features.0.bias", "features.1.bias", "head.bias"]),
        ("*", CONVOLUTIONS + FEATURES + HEAD),
        ("backbone", CONVOLUTIONS + FEATURES),
        ("head", HEAD),
    ],
)
def test_what_a_pattern_names(pattern: str, names: list[str]) -> None:
    model = Named()
    found = named_by(pattern, model, "freeze")
    assert [name for name, parameter in model.named_parameters() if parameter in found] == names
    with_norm = pattern in ("features", "features.*", "features.1", "features.[01]", "*", "backbone")
    assert all((buffer in found) == with_norm for buffer in model.buffers())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("fetures.*", "did you mean features"),
        ("conv2", "did you mean conv1"),
        ("weight", "did you mean conv1.weight"),
        ("CONV1", "did you mean conv1?"),
        (
            "zzz",
            "there are conv1, conv1.weight, conv1.bias, conv10, conv10.weight ..., and backbone for all but the last",
        ),
        ("features.1.running_mean", "features.1"),
        ("", "no parameter of Named is named"),
    ],
)
def test_a_pattern_that_names_nothing_is_told_with_near_names(pattern: str, said: str) -> None:
    with pytest.raises(RequestError, match="freeze: no parameter of Named is named") as refused:
        named_by(pattern, Named(), "freeze")
    assert said in str(refused.value)


def test_a_part_that_is_named_backbone_is_meant_by_it() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1), "neck": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    assert named_by("backbone", model, "freeze") == set(model["backbone"].parameters())


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (made(), ["classifier.3.weight", "classifier.3.bias"]),
        (MLP((1, 4, 4), 3, [4, 4], dropout=0.1), ["linear_relu_stack.6.weight", "linear_relu_stack.6.bias"]),
        (FastNet((1, 8, 8), 3, [4], 0.1, 0.4), ["head.weight"]),
        (ViT((1, 8, 8), 3, None, 8, 1, 2, 2.0, 0.0), ["head.weight", "head.bias"]),
        (ResNet18((1, 8, 8), 3), ["resnet.fc.weight", "resnet.fc.bias"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_backbone_of_every_model_is_all_but_its_logits(model: nn.Module, head: list[str]) -> None:
    backbone = named_by("backbone", model, "freeze")
    assert [name for name, parameter in model.named_parameters() if parameter not in backbone] == head


# ---------------------------------------------------------------------------------------------------------------------
# Weights to begin with


def saved(tmp_path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def test_what_fits_is_taken_and_the_rest_is_named(tmp_path: Path) -> None:
    model, other = made(0), made(1)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in other.state_dict().items()}
    state["module._orig_mod.classifier.3.weight"] = torch.zeros(9, 8)
    state["module._orig_mod.more"] = torch.full((2,), torch.nan)  # not for this model
    del state["module._orig_mod.features.0.weight"]
    before = copy.deepcopy(model.state_dict())
    said = take_weights(model, saved(tmp_path, state), ["a", "b", "c"])
    for name, tensor in model.state_dict().items():
        kept = name in ("classifier.3.weight", "features.0.weight")
        assert torch.equal(tensor, (before if kept else other.state_dict())[name]), name
    whole = sum(p.numel() for p in model.parameters())  # 18 of the first filters and 24 of the classifier are not taken
    assert said == (
        f"{whole - 42} of {whole} parameters are those of {tmp_path / 'file.pt'}, not features.0.weight (not in the "
        "file), classifier.3.weight ([3, 8], there [9, 8])"
    )


def test_all_that_fits_is_said_to_be_all(tmp_path: Path) -> None:
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in made(1).state_dict().items()
    }
    model = made(0)
    whole = sum(p.numel() for p in model.parameters())
    assert take_weights(model, saved(tmp_path, half), []).startswith(f"{whole} of {whole} parameters are those of ")
    assert same(dict(model.state_dict()), {n: t.to(model.state_dict()[n].dtype) for n, t in half.items()})


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such checkpoint"):
        take_weights(made(), tmp_path / "gone.pt", [])
    other = {"conv.weight": torch.zeros(2, 1, 3, 3), "fc.weight": torch.zeros(3, 4), "features.0.weight": torch.ones(2)}
    with pytest.raises(RequestError, match="no parameter of CNN is in it") as refused:
        take_weights(made(), saved(tmp_path, other), [])
    assert "holds conv.weight [2, 1, 3, 3], fc.weight [3, 4] ..., the model features.0.weight [2, 1, 3, 3]" in str(
        refused.value
    )
    with pytest.raises(RequestError, match="no parameter of CNN is in it"):  # statistics alone are none
        take_weights(made(), saved(tmp_path, {"features.1.running_mean": torch.zeros(2)}), [])
    bad = made(1).state_dict()
    bad["features.3.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(RequestError, match=r"1 of the 72 numbers of features.3.weight are not finite"):
        take_weights(made(), saved(tmp_path, bad), [])


def test_the_last_layer_of_other_classes_is_not_taken(tmp_path: Path) -> None:
    """Though it has the shape: its logits mean something else. A bare state_dict does not tell its classes."""
    model = made(0)
    before = copy.deepcopy(model.state_dict())
    file = saved(tmp_path, {**small(), "model": made(1).state_dict(), "classes": ["a", "b", "d"]})
    said = take_weights(model, file, ["a", "b", "c"])
    assert said.endswith(", not classifier.3.weight (of other classes), classifier.3.bias (of other classes)")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if "classifier" in name else made(1).state_dict())[name]), name
    assert " of other classes" not in take_weights(model, file, ["a", "b", "d"])


# ---------------------------------------------------------------------------------------------------------------------
# What does not learn


@pytest.mark.parametrize("optimizer", [adamw(), {"_target_": "engine.training.optimizers.Muon"}])
def test_what_is_frozen_leaves_an_epoch_with_the_same_bits(optimizer: dict[str, Any]) -> None:
    model = made()
    own = build_optimizer(optimizer, model, decay_norms=False)
    step = step_of(model, own, ema_decay=0.9, frozen=Frozen(model, "backbone"))
    before = copy.deepcopy(model.state_dict())
    train(step, epoch=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("features."), name
        assert not name.startswith("features.") or torch.equal(step.evaluated.state_dict()[name], before[name]), name
    assert all(p.grad is None and p not in own.state for p in model.features.parameters())
    assert len(own.state_dict()["state"]) == 2  # the last layer's weight and bias


def test_the_rest_learns_as_in_a_plain_loop_over_fixed_features() -> None:
    """The features as evaluation has them: with the statistics that are kept, and without dropout."""
    model, plain = made(), made()
    step = step_of(model, build_optimizer(adamw(), model), frozen=Frozen(model, ["features.*"]))
    model.classifier[2].p = plain.classifier[2].p = 0.0
    train(step, epoch=1)
    other = torch.optim.AdamW(plain.classifier.parameters(), lr=0.01, weight_decay=0.3)
    plain.eval()
    for number in range(3):
        other.param_groups[0]["lr"] = 0.01 * (1 - number / 100)
        images, labels = drawn(8, 100 + number)
        with torch.no_grad():
            features = plain.features(images)
        nn.functional.cross_entropy(plain.classifier(features), labels).backward()
        other.step()
        other.zero_grad()
    for name, parameter in model.classifier.named_parameters():
        torch.testing.assert_close(parameter, plain.classifier.get_parameter(name), rtol=1e-6, atol=1e-7)


def test_which_modules_are_held() -> None:
    """Those of which everything is frozen, what is inside them too; a batch norm of which a bias learns is not."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout()),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4),
        nn.Dropout(),
        nn.Linear(4, 2),
    )
    frozen = Frozen(model, ["0", "1.*", "2.weight"], until=3)
    model.train()
    frozen.hold(2)
    modes = {name: module.training for name, module in model.named_modules() if name}
    assert [name for name, training in modes.items() if not training] == ["0", "0.0", "0.1", "0.2", "1"]
    model.train()
    frozen.hold(3)
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_what_a_model_keeps_from_learning_itself_stays_so() -> None:
    model = made()
    model.features[0].weight.requires_grad_(False)
    Frozen(model, "backbone", until=2).hold(2)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["features.0.weight"]


def test_to_freeze_everything_is_refused() -> None:
    for patterns in ("*", ["features", "classifier"]):
        with pytest.raises(RequestError, match="every parameter of CNN would be frozen and none trained"):
            Frozen(made(), patterns, until=2)


def test_how_much_is_frozen_is_said() -> None:
    model = made()
    head = 8 * 3 + 3
    whole = sum(p.numel() for p in model.parameters())
    for until, epochs, end in (
        (None, 5, ""),
        (5, 5, ", until epoch 5"),
        (6, 5, "; epoch 6, which would train them, is after the last"),
    ):
        assert Frozen(made(), "backbone", until).said(model, epochs) == f"{whole - head} of {whole} parameters{end}"
    assert Frozen(model, None).said(model, 5) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Rates of their own


def test_rates_by_pattern_are_those_of_groups_in_torch() -> None:
    """The last pattern that fits counts; weight decay, and what is spared from it, stays as it was."""
    model, plain = made(), made()
    own = build_optimizer(adamw(), model, decay_norms=False)
    scale_rates(own, model, {"features": 0.1, "features.0": 0.5, "*.9.*": 3})
    train(step_of(model, own), epoch=1)

    factors = {"features.0.weight": 0.5, "classifier.3.weight": 1, "classifier.3.bias": 1, "features.9.weight": 3}
    groups = [
        {
            "params": [parameter],
            "lr": 0.01 * factors.get(name, 0.1),
            "weight_decay": 0.3 if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in plain.named_parameters()
    ]
    train(step_of(plain, torch.optim.AdamW(groups)), epoch=1)
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    assert not same(dict(model.state_dict()), dict(made().state_dict()))
    assert own.param_groups[0]["lr"] == pytest.approx(0.01 * 0.97)  # of what keeps its rate, which is shown


def test_muon_keeps_its_parts_whatever_the_rates() -> None:
    """The classifier stays AdamW's though its group comes first; each part is multiplied from its own rate."""
    model = made()
    own = build_optimizer({"_target_": "engine.training.optimizers.Muon", "lr": 0.2, "adamw_lr": 0.04}, model)
    hidden = {p for group in own.param_groups if group["orthogonalised"] for p in group["params"]}
    scale_rates(own, model, {"backbone": 0.1})
    rates = {
        (group["orthogonalised"], p in set(model.features.parameters())): group["lr"]
        for group in own.param_groups
        for p in group["params"]
    }
    assert rates == {(True, True): pytest.approx(0.02), (False, True): pytest.approx(0.004), (False, False): 0.04}
    assert {p for group in own.param_groups if group["orthogonalised"] for p in group["params"]} == hidden
    whole, head = sum(p.numel() for p in model.parameters()), 8 * 3 + 3
    assert shares(own).endswith(f"; learning rate x 0.1 on {100 * (1 - head / whole):.1f} %")


def test_a_scheduler_that_forgets_the_rates_is_refused() -> None:
    """Of torch's, OneCycleLR sets one rate for all; others multiply, and are taken."""
    for target, other, fits in (
        ("OneCycleLR", {"max_lr": 0.1}, False),
        ("ExponentialLR", {"gamma": 0.5}, True),
        ("CosineAnnealingLR", {"T_max": 4}, True),
    ):
        model = made()
        own = build_optimizer(adamw(), model)
        scale_rates(own, model, {"features": 0.1})
        settings = {"_target_": f"torch.optim.lr_scheduler.{target}", **other}
        if not fits:
            with pytest.raises(RequestError, match="OneCycleLR sets every learning rate to values of its own"):
                build_schedule(settings, own, 4, 3)
            continue
        schedule = build_schedule(settings, own, 4, 3)
        for _ in range(6):
            own.step()
            schedule.step()
        one, tenth = (group["lr"] for group in own.param_groups)
        assert 0 < one < 0.01 and tenth == pytest.approx(one / 10)


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A file of weights that runs begin with."""
    torch.manual_seed(7)
    model = CNN((1, 8, 8), 10, width=2)
    model(torch.rand(64, 1, 8, 8))  # the statistics of its batch norms are not those of a new one
    return saved(tmp_path, dict(model.state_dict()))


def test_a_run_ends_the_same_wherever_it_was_stopped(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Path
) -> None:
    """Before anything was saved, and before, at and after the epoch from which on everything learns."""
    run, kept, write = tmp_path / "checkpoints" / "run", tmp_path / "kept", checkpoint.write

    def write_and_copy(path: Path, state: dict[str, Any], **options: Any) -> None:
        progress = state.get("progress", {})
        place = f"{progress.get('epoch')}, {progress.get('batch')}"
        if place == "1, 1":
            shutil.copytree(run, kept / "nothing saved")
        write(path, state, **options)
        if place in ("1, 2", "2, 0", "2, 1"):
            shutil.copytree(run, kept / place)

    monkeypatch.setattr(checkpoint, "write", write_and_copy)
    words = [*SMALL, "experiment=finetune", "init_from=file.pt", "epochs=2", "unfreeze_epoch=2", "name=run"]
    words += ["optimizer=muon", "optimizer.lr=0.01", "scheduler=one_cycle", "ema.decay=0.9", "decay_norms=false"]
    told = call("train", *words, "checkpoint.every_steps=1")
    assert told.code == 0, told.err
    assert "parameters are those of file.pt\n" in told.out and ", until epoch 2\n" in told.out, told.out
    assert "learning rate x 0.3 on" in told.out
    monkeypatch.setattr(checkpoint, "write", write)

    begun, whole = torch.load(first, weights_only=True), result(tmp_path)
    assert not same(whole["last"]["features.0.weight"], begun["features.0.weight"])
    for name in ("nothing saved", "1, 2", "2, 0", "2, 1"):
        shutil.rmtree(run)
        shutil.move(kept / name, run)
        if name != "nothing saved":
            first.unlink(missing_ok=True)
            stopped = torch.load(run / "last.pt", weights_only=True)
            assert len(stopped["optimizer"]["state"]) == (14 if name == "2, 1" else 2)
            frozen = stopped["step"]["weights"] | {f"averaged {key}": kept for key, kept in stopped["model"].items()}
            unchanged = [same(t, begun[key.split()[-1]]) for key, t in frozen.items() if "features" in key]
            assert all(unchanged) == (name != "2, 1")
        again = call("train", "resume=checkpoints/run")
        assert again.code == 0, again.err
        assert ("parameters are those of" in again.out) == (name == "nothing saved")
        assert same(result(tmp_path), whole), f"stopped at {name} it ended otherwise"
    assert call("evaluate", "checkpoint=checkpoints/run/best.pt").code == 0  # without the file
    for file in run.glob("*.pt"):
        file.unlink()
    assert "file.pt: no such checkpoint" in call("train", "resume=checkpoints/run").error
    assert run.is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["freeze=conv1"], "freeze: no parameter of CNN is named conv1"),
        (["lr_scale={feature: 0.1}"], "lr_scale: no parameter of CNN is named feature (did you mean features"),
        (["lr_scale={features.*: 0}"], "lr_scale={'features.*': 0}: expected a dictionary of numbers > 0 or null"),
        (["lr_scale=0.1"], "lr_scale=0.1: expected a dictionary of numbers > 0 or null"),
        (["unfreeze_epoch=3"], "unfreeze_epoch=3: nothing is frozen; say freeze= too, or unfreeze_epoch=null"),
        (["freeze=backbone", "unfreeze_epoch=1"], "expected an integer >= 2 or null"),
        (["init_from=gone.pt"], "gone.pt: no such checkpoint"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    call: Call, tmp_path: Path, words: list[str], said: str
) -> None:
    assert said in call("train", *SMALL, "epochs=1", *words).error
    assert list(tmp_path.iterdir()) == []


def test_of_a_strangers_run_patterns_are_taken_and_the_file_is_not(tmp_path: Path) -> None:
    known = known_settings("train", {"model": "cnn"})
    here = {"init_from": None, "freeze": None, "lr_scale": None, "unfreeze_epoch": None}
    own = {
        "init_from": "/etc/passwd",
        "freeze": ["features.*", "layer[12]"],
        "lr_scale": {"features.0.*": 0.1},
        "unfreeze_epoch": 2,
    }
    taken, left = trust.taken_over(here, own, [], tmp_path, known, ours=False)
    assert taken == {name: value for name, value in own.items() if name != "init_from"}
    assert left == ["init_from=/etc/passwd"]
    assert trust.taken_over(here, own, [], tmp_path, known, ours=True) == (own, [])


def test_what_is_frozen_can_be_let_go_when_a_run_goes_on(call: Call, tmp_path: Path) -> None:
    told = call("train", *SMALL, "epochs=1", "name=run", "freeze=backbone", "optimizer=adamw")
    assert "parameters; they stay as the model makes them, without init_from=\n" in told.out
    said = call("train", "resume=latest", "epochs=2", "freeze=null").error
    assert "freeze backbone -> null" in said
    said = call("train", "resume=latest", "init_from=a.pt", "resume_changed=true").error
    assert said.startswith("init_from=a.pt: checkpoints/run goes on with the weights that it has; leave init_from out")
    words = ["freeze=null", "lr_scale={features: 0.1}", "resume_changed=true", "epochs=2"]
    again = call("train", "resume=latest", *words)
    assert again.code == 0, again.err
    assert len(torch.load(tmp_path / "checkpoints/run/last.pt", weights_only=True)["optimizer"]["state"]) == 14
