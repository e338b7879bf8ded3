"""A step: micro-batches, precision, scaling, clipping, averages; each against what it has to be by its definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import RequestError
from engine.training.losses import cross_entropy
from engine.training.metrics import Share, Tally, evaluate
from engine.training.optimizers import Muon
from engine.training.schedules import cosine
from engine.training.step import Step, choose_precision, has_bf16
from models.cnn import CNN

CPU = torch.device("cpu")
LR = 0.1


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def made_step(model: nn.Module, batch_size: int = 64, optimizer: Any = None, **how: Any) -> Step:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR)
    return Step(model, optimizer, cosine(optimizer, 100, 10), CPU, batch_size=batch_size, **how)


def scaled_step(model: nn.Module, scale: float, **how: Any) -> Step:
    """One whose loss is scaled as that of fp16 is, with the arithmetic of fp32."""
    step = made_step(model, precision="fp16", **how)
    step.precision, step.scaler = "fp32", torch.amp.GradScaler("cpu", init_scale=scale)
    return step


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def take(step: Step, images: Tensor, labels: Tensor, criterion: nn.Module) -> float:
    """One step as train_epoch takes it; returns its loss."""
    whole = 0.0
    for x, y, share in step.micro_batches(images, labels, criterion):
        loss = criterion(step.forward(x), y)
        step.backward(loss, share)
        whole += float(loss.detach()) * float(share.gradient)
    step.update()
    return whole


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mean": nn.CrossEntropyLoss,
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "class weights": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2])),
    "smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
}


@pytest.mark.parametrize("size", [32, 25, 10, 7, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(name: str, size: int) -> None:
    """Of 50 samples; parts of 7 leave a last one of one sample."""
    images, labels = samples(50)
    model = linear()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    criterion = LOSSES[name]()
    expected = criterion(plain(images), labels)
    expected.backward()
    optimizer.step()
    loss = take(made_step(model, size), images, labels, criterion)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(weights(model), weights(plain), rtol=1e-5, atol=1e-6)


def test_soft_labels_in_parts() -> None:
    images, labels = samples(50)
    soft = nn.functional.one_hot(labels, 3).float() * 0.8 + 0.2 / 3
    model, plain = linear(), linear()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))
    criterion(plain(images), soft).backward()
    torch.optim.SGD(plain.parameters(), lr=LR).step()
    take(made_step(model, 16), images, soft, criterion)
    assert torch.allclose(weights(model), weights(plain), rtol=1e-5, atol=1e-6)


def test_one_part_is_the_plain_step_to_the_bit() -> None:
    images, labels = samples(64)
    model, plain = linear(), linear()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    nn.functional.cross_entropy(plain(images), labels).backward()
    optimizer.step()
    take(made_step(model, 64), images, labels, nn.CrossEntropyLoss())
    assert torch.equal(weights(model), weights(plain))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_without_a_share_counts_whole() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    made_step(nn.ParameterList([parameter])).backward((parameter * 2).sum())
    assert parameter.grad is not None and parameter.grad.tolist() == [2.0]


def test_a_bad_loss_is_counted_in_steps() -> None:
    tally = Tally(CPU, accumulate=3)
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for loss in [1.0] * 7 + [float("nan"), 1.0]:  # steps of three: 0 to 2, 3 to 5, 6 to 8
        tally.add(torch.tensor(loss), logits, labels)
    assert tally.first_bad_step() == 2


def test_accumulated_training_equals_training_of_larger_batches(call: Call) -> None:
    """101 samples, 20 a step: the last step holds one; and the rate and the saving count steps."""
    common = [
        "epochs=2",
        "dataset.limit=101",
        "dataset.val_fraction=0",
        "checkpoint.every_steps=1",
        "limit_batches=null",
    ]
    assert call("train", *common, "name=whole", "batch_size=20").code == 0
    assert call("train", *common, "name=parts", "batch_size=4", "accumulate=5").code == 0
    whole, parts = (torch.load(f"checkpoints/{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    for key, tensor in whole["model"].items():
        assert torch.allclose(tensor, parts["model"][key], rtol=1e-4, atol=1e-6), key
    assert whole["scheduler"] == parts["scheduler"]
    one, other = whole["progress"]["history"][-1], parts["progress"]["history"][-1]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4) and one["lr"] == other["lr"]


def test_more_micro_batches_than_an_epoch_has_are_refused(call: Call) -> None:
    common = ["epochs=1", "dataset.limit=101", "dataset.val_fraction=0", "batch_size=20"]
    error = call("train", *common, "accumulate=7").error
    assert "accumulate=7" in error and "101 samples" in error and "at most 6" in error
    assert call("train", *common, "accumulate=6").code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Precision, the scale of fp16, clipping


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
def test_the_scale_of_the_loss_changes_nothing(clip: float | None) -> None:
    """Powers of two scale without rounding, and clipping sees gradients that are unscaled again."""
    images, labels = samples(32)
    ends = []
    for scale in (None, 1.0, 2.0**16):
        step = scaled_step(linear(), scale, clip_grad_norm=clip) if scale else made_step(linear(), clip_grad_norm=clip)
        for _ in range(3):
            take(step, images, labels, nn.CrossEntropyLoss())
        ends.append(weights(step.model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_clipping_shortens_the_gradient_to_its_norm() -> None:
    images, labels = samples(32)
    step, plain = made_step(linear(), clip_grad_norm=0.05), linear()
    nn.functional.cross_entropy(plain(images), labels).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in plain.parameters() if parameter.grad is not None])
    assert float(gradient.norm()) > 0.05
    before = weights(step.model)
    take(step, images, labels, nn.CrossEntropyLoss())
    moved = (before - weights(step.model)) / LR
    assert float(moved.norm()) == pytest.approx(0.05, rel=1e-3)
    assert torch.allclose(moved / moved.norm(), gradient / gradient.norm(), atol=1e-3)


def test_a_step_that_overflows_changes_nothing_but_the_scale() -> None:
    images, labels = samples(32)
    step = scaled_step(linear(), 2.0**8, ema_decay=0.5)
    take(step, images, labels, nn.CrossEntropyLoss())
    before, averages, lr = weights(step.model), weights(step.evaluated), step.optimizer.param_groups[0]["lr"]
    loss = nn.functional.cross_entropy(step.forward(images), labels)
    step.backward(loss * float("inf"))
    step.update()
    assert step.skipped == 1 and step.scaler.get_scale() == 2.0**7
    assert torch.equal(weights(step.model), before) and torch.equal(weights(step.evaluated), averages)
    assert step.optimizer.param_groups[0]["lr"] == lr and step.schedule.steps == 1
    take(step, images, labels, nn.CrossEntropyLoss())
    assert step.schedule.steps == 2 and not torch.equal(weights(step.model), before)


def test_the_scaler_is_saved() -> None:
    step, other = scaled_step(linear(), 4.0), scaled_step(linear(), 4.0)
    images, labels = samples(32)
    step.backward(nn.functional.cross_entropy(step.forward(images), labels) * float("inf"))
    step.update()
    other.load_state_dict(step.state_dict())
    assert other.scaler.state_dict() == step.scaler.state_dict() and other.skipped == 1
    assert other.scaler.state_dict()["scale"] == 2.0


def test_bf16_is_near_fp32() -> None:
    """bfloat16 has 8 bits of mantissa, so that every number of the forward pass is off by 0.4 % at most."""
    images, labels = samples(64)
    ends = {}
    for precision in ("fp32", "bf16"):
        step = made_step(linear(), precision=precision)
        logits = step.forward(images)
        assert logits.dtype == torch.float32 and all(p.dtype == torch.float32 for p in step.model.parameters())
        for _ in range(20):
            take(step, images, labels, nn.CrossEntropyLoss())
        ends[precision] = (logits.detach(), weights(step.model))
    for one, other in zip(ends["fp32"], ends["bf16"], strict=True):
        assert not torch.equal(one, other)
        assert float((one - other).norm() / one.norm()) < 0.02


def test_the_precision_that_is_taken() -> None:
    assert choose_precision("fp32", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("auto", CPU) == ("bf16" if has_bf16(CPU) else "fp32")
    with pytest.raises(RequestError, match="precision=fp16: not on a CPU"):
        choose_precision("fp16", CPU)
    if Path("/proc/cpuinfo").exists() and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        flags = Path("/proc/cpuinfo").read_text()
        assert has_bf16(CPU) == ("amx_bf16" in flags or "avx512_bf16" in flags)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_gpus_with_bf16_are_those_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    """Turing has 7.5, Ampere 8.0 and 8.6, Hopper 9.0; fp16 needs none of these."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert has_bf16(gpu) is has and choose_precision("auto", gpu) == ("bf16" if has else "fp32")
    assert choose_precision("fp16", gpu) == "fp16" and choose_precision("bf16", gpu) == "bf16"


@pytest.mark.parametrize(("count", "which"), [(64, "compiled"), (63, "plain"), (1, "plain")])
def test_compiled_is_what_whole_batches_go_through(monkeypatch: pytest.MonkeyPatch, count: int, which: str) -> None:
    monkeypatch.setattr(torch, "compile", lambda plain, **how: lambda images: "compiled")
    step = made_step(linear(), 64)
    monkeypatch.setattr(step.model, "forward", lambda images: "plain")
    step.compile()
    assert step.model(samples(count)[0]) == which


def test_what_was_taken_is_printed(call: Call) -> None:
    done = call("train", "epochs=1", "precision=auto", "limit_batches=2")
    assert done.code == 0 and f"device   cpu, {'bf16' if has_bf16(CPU) else 'fp32'}\n" in done.out


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights


def batch_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_averages_follow_their_formula(decay: float) -> None:
    """From the first step's weights on: average = decay * average + (1 - decay) * weights; buffers are the model's."""
    step = made_step(batch_norm_model(), ema_decay=decay)
    by_hand: Tensor | None = None
    for number in range(6):
        take(step, *samples(32, number), nn.CrossEntropyLoss())
        now = weights(step.model).double()
        by_hand = now if by_hand is None else decay * by_hand + (1 - decay) * now
    assert by_hand is not None
    assert torch.allclose(weights(step.evaluated).double(), by_hand, rtol=1e-5, atol=1e-7)
    buffers = list(zip(step.model.buffers(), step.evaluated.buffers(), strict=True))
    assert len(buffers) == 3 and all(torch.equal(one, other) for one, other in buffers)
    if decay == 0:
        assert torch.equal(weights(step.evaluated), weights(step.model))
    else:
        assert not torch.equal(weights(step.evaluated), weights(step.model))


def test_evaluation_between_two_steps_changes_nothing() -> None:
    ends = []
    for evaluated in (False, True):
        step = made_step(batch_norm_model(), ema_decay=0.9)
        for number in range(4):
            take(step, *samples(32, number), nn.CrossEntropyLoss())
            if evaluated:
                for module in (step.evaluated, step.model):
                    evaluate(module, [samples(32, 100)], 3)
        ends.append({**step.model.state_dict(), **{f"average {k}": v for k, v in step.evaluated.state_dict().items()}})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_checkpoints_hold_the_averages_and_the_run_goes_on_with_its_weights(call: Call) -> None:
    run = ["model=cnn", "model.width=4", "dataset.limit=200", "ema.decay=0.9", "optimizer=adam"]
    assert call("train", *run, "epochs=2", "name=one").code == 0
    last, best = (torch.load(f"checkpoints/one/{name}.pt", weights_only=True) for name in ("last", "best"))
    assert last["progress"]["best"]["epoch"] == 2 and best["epoch"] == 2
    for name, tensor in last["model"].items():
        assert torch.equal(tensor, best["model"][name])  # evaluated and saved: the averages
        is_buffer = "running" in name or "tracked" in name
        assert torch.equal(tensor, last["step"]["weights"][name]) == is_buffer, name
    model = CNN((1, 8, 8), 10, width=4)
    model.load_state_dict(last["model"])  # plain names
    for epochs in ("3", "4"):
        assert call("train", "resume=checkpoints/one", f"epochs={epochs}").code == 0


def test_averages_begin_when_a_run_goes_on_with_them(call: Call) -> None:
    run = ["epochs=1", "name=run", "dataset.limit=200"]
    assert call("train", *run).code == 0
    before = torch.load("checkpoints/run/last.pt", weights_only=True)
    assert "weights" not in before["step"]
    del before["step"]  # as a version without steps wrote it
    torch.save(before, "checkpoints/run/last.pt")
    again = call("train", "resume=checkpoints/run", "epochs=2", "ema.decay=0.5", "resume_changed=true")
    assert again.code == 0, again.err
    after = torch.load("checkpoints/run/last.pt", weights_only=True)
    assert after["step"]["averaged"] > 0


def test_averages_begin_with_the_weights_that_were_saved() -> None:
    """What a run without averages kept is loaded as what is evaluated; training goes on with it."""
    saved, begun = linear(), linear()
    nn.init.ones_(begun[1].weight)
    step = made_step(begun, ema_decay=0.5)
    step.evaluated.load_state_dict(saved.state_dict())
    step.load_state_dict({"skipped": 0, "scaler": {}})
    assert step.averaged == 0
    assert torch.equal(weights(step.model), weights(saved)) and torch.equal(weights(step.evaluated), weights(saved))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing waits for the device


class Watched(TorchDispatchMode):
    """Counts what makes the processor wait for a GPU: a number fetched from it, a copy to it or from it.

    And the numbers in float64 that are made elsewhere than on the CPU, which MPS does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fetched, self.copied, self.double = 0, 0, 0

    def __torch_dispatch__(self, called: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        made = called(*given, **(named or {}))
        tensors = [value for value in (*given, made) if isinstance(value, Tensor)]
        self.fetched += called is torch.ops.aten._local_scalar_dense.default
        copies = called in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.copied += copies and len({tensor.device.type for tensor in tensors}) > 1
        self.double += any(tensor.is_meta and tensor.dtype == torch.float64 for tensor in tensors)
        return made


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged and clipped": {"ema_decay": 0.9, "clip_grad_norm": 1.0},
    "in parts": {"batch_size": 7},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("how", HOW)
def test_a_step_waits_for_no_device(how: str, optimizer: str) -> None:
    """On the device `meta`, which has no numbers, so that to look at one is an error."""
    meta = torch.device("meta")
    model = CNN((1, 8, 8), 3, width=4).to(meta)
    criterion = cross_entropy(label_smoothing=0.1, weight=[1.0, 5.0, 0.2]).to(meta)
    settings = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "muon": Muon}
    steps = settings[optimizer](model.parameters(), lr=LR)
    step = Step(model, steps, cosine(steps, 100, 10), meta, **{"batch_size": 64, **HOW[how]})
    tally = Tally(meta)
    images, labels = (tensor.to(meta) for tensor in samples(20))
    with Watched() as watched:
        for _ in range(3):
            for x, y, share in step.micro_batches(images, labels, criterion):
                logits = step.forward(x)
                loss = criterion(logits, y)
                step.backward(loss, share)
                tally.add(loss, logits, y, share)
            step.update()
    assert (watched.copied, watched.double) == (0, 0)


def test_half_precision_waits_only_for_its_scaler() -> None:
    """Once a step, as the scaler asks whether the gradients are finite before it lets the optimizer go."""
    step = scaled_step(linear(), 1.0)
    take(step, *samples(8), nn.CrossEntropyLoss())
    loss = nn.functional.cross_entropy(step.forward(samples(8)[0]), samples(8)[1])
    with Watched() as watched:
        step.backward(loss, Share(1.0, 1.0, 8))
        step.update()
    assert watched.fetched == 1


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@pytest.mark.slow
def test_compiled_training_is_near_plain_training_and_compiles_once_each(call: Call) -> None:
    """The last batch of an epoch is shorter and not compiled for. Without dropout, whose numbers would be others."""
    run = ["model=cnn", "model.width=4", "model.dropout=0", "epochs=2", "batch_size=40", "ema.decay=0.5"]
    run += ["dataset.limit=100", "optimizer.lr=0.01"]
    for name, compile in (("plain", "false"), ("compiled", "true")):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        done = call("train", *run, f"compile={compile}", f"name={name}")
        assert done.code == 0, done.err
        # The model in training and, of its averages, in evaluation; each once.
        assert counters["stats"]["unique_graphs"] == (2 if compile == "true" else 0)
    plain, compiled = (torch.load(f"checkpoints/{name}/best.pt", weights_only=True) for name in ("plain", "compiled"))
    assert plain["model"].keys() == compiled["model"].keys()
    for name, tensor in plain["model"].items():
        assert torch.allclose(tensor.float(), compiled["model"][name].float(), rtol=1e-3, atol=1e-4), name
    assert call("evaluate", "checkpoint=checkpoints/compiled/best.pt").code == 0


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(process: Call, tmp_path: Path) -> None:
    error = process(
        "train", "compile=true", "epochs=1", CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    ).error
    assert "compile=true" in error and "compiler" in error
