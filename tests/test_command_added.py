"""What a YAML does not have: keywords added with `+`, another `_target_`, and how many threads there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Call
from torch import nn

import datasets
import models.mlp
from engine.build import refusal
from engine.command import cli
from engine.data import devices
from engine.data.images import ImageData
from engine.run import compare, trust

QUICK = ["dataset.limit=40", "epochs=1", "limit_batches=1", "model.hidden=[3]", "device=cpu"]
DIGITS = datasets.digits


class Noisy(models.mlp.MLP):
    """The MLP with keywords that configs/model/mlp.yaml does not have."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        hidden: list[int],
        dropout: float = 0.0,
        dropout2d: float = 0.0,
        extra: int = 0,
        note: str | None = None,
    ) -> None:
        super().__init__(input_shape, num_classes, hidden, dropout)
        self.flatten = nn.Sequential(nn.Dropout2d(dropout2d), nn.Flatten())
        self.extra = nn.Linear(1, extra) if extra else None
        self.note = note


Noisy.__module__, Noisy.__qualname__ = "models.mlp", "MLP"


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`model=mlp` has more keywords than its YAML."""
    monkeypatch.setattr(models.mlp, "MLP", Noisy)


@pytest.fixture
def copied_digits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`dataset=digits` takes `copies=`; the values that it was read with."""
    asked: list[int] = []

    def digits(copies: int = 1) -> ImageData:
        asked.append(copies)
        return DIGITS()

    monkeypatch.setattr(datasets, "digits", digits)
    return asked


def kept(tmp_path: Path, name: str) -> dict[str, Any]:
    """The configuration in a run's directory."""
    found: dict[str, Any] = yaml.safe_load((tmp_path / "checkpoints" / name / ".hydra" / "config.yaml").read_text())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Keywords


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optimizer=adam +optimizer.amsgard=true", "optimizer: torch.optim.Adam takes no 'amsgard' (did you mean ams"),
        ("++optimizer.lrr=1", "optimizer: torch.optim.SGD takes no 'lrr' (did you mean lr?)"),
        ("+optimizer.foo=1", "takes no 'foo'; it takes lr, momentum, dampening, weight_decay, nesterov"),
        ("+optimizer.params=3", "torch.optim.SGD gets 'params' from the program; leave it out"),
        ("+model.input_shape=[1,8,8]", "models.mlp.MLP gets 'input_shape' from the program"),
        ("+model.num_classes=3", "models.mlp.MLP gets 'num_classes' from the program"),
        ("+scheduler.total_steps=3", "engine.training.schedules.cosine gets 'total_steps' from the program"),
        ("+scheduler.optimizer=3", "gets 'optimizer' from the program"),
        ("+dataset.copies=3", "dataset: datasets.digits takes no 'copies'; it takes none"),
        ("+criterion.reduction=none", "criterion: engine.training.losses.cross_entropy refuses its settings"),
        ("+optimizer.dampening={a:1}", "expected a finite number, text, true, false, null or a list of these"),
        ("+optimizer.dampening=[[1],{a:1}]", "expected a finite number, text, true, false, null or a list of these"),
        ("+optimizer.dampening={}", "expected a finite number, text, true, false, null or a list of these"),
        ("+optimizer.dampening=nan", "expected a finite number"),
        ("+optimizer.dampening=99999999999999999999", "holds a number beyond"),
        ("+optimizer.dampening=\\${seed}", "expected a finite number"),  # no interpolation, but one in the run's files
        ("+optimizer._target_=os.system", "optimizer._target_"),
    ],
)
def test_an_added_keyword_is_held_against_the_signature(call: Call, tmp_path: Path, typed: str, said: str) -> None:
    answer = call("train", *typed.split()).error
    assert said in answer and len(answer) < 400
    assert list(tmp_path.iterdir()) == []


def test_what_a_callable_takes_beside_what_the_program_gives() -> None:
    def anything(params: Any, **others: Any) -> None: ...

    def by_position(a: int, /, b: int, *rest: int, c: int = 0) -> None: ...

    assert refusal(anything, "optimizer", "amsgard") == ""
    assert refusal(anything, "optimizer", "params") == "gets 'params' from the program; leave it out"
    assert refusal(anything, "model", "num_classes").startswith("gets 'num_classes'")  # always handed over
    assert refusal(anything, "model", "input_shape") == ""  # only to who takes it by that name
    assert refusal(by_position, "criterion", "b") == refusal(by_position, "criterion", "c") == ""
    assert refusal(by_position, "criterion", "a") == "takes no 'a'; it takes b, c"
    assert refusal(by_position, "criterion", "rest") == "takes no 'rest'; it takes b, c"


def test_an_added_keyword_reaches_its_class_and_stays_with_the_run(call: Call, tmp_path: Path) -> None:
    answer = call("train", "name=run", "optimizer=adam", "+optimizer.amsgrad=true", "+criterion.reduction=sum", *QUICK)
    assert answer.code == 0, answer.err
    assert "reduction=sum" in answer.out
    assert kept(tmp_path, "run")["optimizer"]["amsgrad"] is True

    def amsgrad() -> Any:
        return torch.load(tmp_path / "checkpoints/run/last.pt")["optimizer"]["param_groups"][0]["amsgrad"]

    assert amsgrad() is True
    assert call("train", "resume=latest", "epochs=2").code == 0
    assert call("train", "resume=latest", "epochs=3", "+optimizer.amsgrad=true").code == 0
    assert amsgrad() is True
    said = call("train", "resume=latest", "epochs=4", "+optimizer.amsgrad=false").error
    assert "started with other settings: optimizer.amsgrad true -> false" in said
    said = call("train", "resume=latest", "epochs=4", "+optimizer.maximize=null").error
    assert "started with other settings: optimizer.maximize none -> null" in said
    answer = call("train", "resume=latest", "epochs=4", "+optimizer.amsgrad=false", "resume_changed=true")
    assert answer.code == 0, answer.err
    assert kept(tmp_path, "run")["optimizer"]["amsgrad"] is False and amsgrad() is False


def test_another_optimizer_on_resume_does_not_get_the_keywords_of_the_first(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=run", "optimizer=adam", "+optimizer.amsgrad=true", *QUICK).code == 0
    answer = call("train", "resume=latest", "optimizer=rmsprop", "epochs=2", "resume_changed=true")
    assert answer.code == 0, answer.err
    assert "amsgrad" not in kept(tmp_path, "run")["optimizer"]


def test_an_added_keyword_can_be_swept(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "name=sweep", "optimizer=adam", "+optimizer.amsgrad=true,false", *QUICK)
    assert answer.code == 0, answer.err
    runs = sorted(path.parent.name for path in (tmp_path / "checkpoints/sweep").glob("*/summary.json"))
    assert runs == ["01_amsgrad-True", "02_amsgrad-False"]
    table = (tmp_path / "checkpoints/sweep/sweep.csv").read_text().splitlines()
    assert "optimizer.amsgrad" in table[0].split(",")
    assert "need -m" in call("train", "+optimizer.amsgrad=true,false").error


def test_the_table_of_runs_tells_who_has_an_added_keyword() -> None:
    adam = {"model": "mlp", "optimizer": "adam", "optimizer.eps": 1e-8}
    rows = [adam, {**adam, "optimizer.amsgrad": True}]
    assert compare.differing(rows) == ["optimizer.amsgrad"]
    sgd = {"model": "mlp", "optimizer": "sgd", "optimizer.momentum": 0.9}
    assert compare.differing([adam, sgd]) == ["optimizer"]  # as ever: SGD has no eps


@pytest.mark.usefixtures("noisy")
def test_evaluate_and_predict_build_the_model_with_its_added_keywords(call: Call, tmp_path: Path) -> None:
    answer = call("train", "name=run", "+model.dropout2d=0.1", "+model.extra=2", "+model.note=a/b", *QUICK)
    assert answer.code == 0, answer.err
    answer = call("evaluate", "checkpoint=checkpoints/latest/best.pt")  # without extra=2 the weights would not fit
    assert answer.code == 0, answer.err
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert call("predict", "images=a.png", "checkpoint=checkpoints/latest/best.pt").code == 0

    state = torch.load(tmp_path / "checkpoints/run/best.pt")["model"]
    torch.save(state, tmp_path / "bare.pt")
    named = ["checkpoint=bare.pt", "model=mlp", "model.hidden=[3]", "dataset=digits"]
    assert "extra.weight is not in the model" in call("evaluate", *named).error
    assert call("evaluate", *named, "+model.extra=2").code == 0
    assert "takes no 'extr' (did you mean extra?)" in call("evaluate", *named, "+model.extr=2").error


# ---------------------------------------------------------------------------------------------------------------------
# Keywords in a file of somebody else


def made_elsewhere(tmp_path: Path, group: str, **changes: Any) -> None:
    """evil.pt: the run's best.pt with other settings of a group, under nobody's signature."""
    saved = torch.load(tmp_path / "checkpoints/run/best.pt")
    saved["config"][group] |= changes
    torch.save({**saved, "signature": ""}, tmp_path / "evil.pt")


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout2d": 0.5, "note": "plain word"}, None),
        ({"note": None}, None),
        ({"note": "../../etc/passwd"}, "not taken from a file that was not made here"),
        ({"note": "os.system"}, "not taken from a file that was not made here"),
        ({"note": "http://somewhere"}, "not taken from a file that was not made here"),
        ({"note": "${oc.env:HOME}"}, "interpolation"),
        ({"note": ["a", ["../b"]]}, "not taken from a file that was not made here"),
        ({"note": list(range(2000))}, "not taken from a file that was not made here"),
        ({"extra": 10**9}, "not taken from a file that was not made here"),
        ({"extra": 10**30}, "holds a number beyond"),
        ({"extra": float("inf")}, "expected a finite number"),
        ({"extra": torch.ones(3)}, "expected a finite number"),
        ({"note": {}}, "expected a finite number"),
        ({"note": {"_target_": "os.system", "command": "touch it-ran"}}, "no setting 'model.note.command'"),
        ({"nothing": 1}, "its model takes no 'nothing'"),
        ({"input_shape": [1, 1, 1]}, "its model gets 'input_shape' from the program"),
        ({"num_classes": 3}, "its model gets 'num_classes' from the program"),
        ({"__init__": 3}, "no setting 'model.__init__'"),
        ({"_args_": [1]}, "no setting 'model._args_'"),
        ({"self": 3}, "its model takes no 'self'"),
    ],
)
def test_what_a_strangers_checkpoint_may_add(
    call: Call, tmp_path: Path, changes: dict[str, Any], said: str | None
) -> None:
    assert call("train", "name=run", *QUICK).code == 0
    made_elsewhere(tmp_path, "model", **changes)
    answer = call("evaluate", "checkpoint=evil.pt", "output=result.json")
    assert answer.code == 0 if said is None else said in answer.error and "evil.pt" in answer.error, answer.err
    assert not (tmp_path / "it-ran").exists()


def test_a_strangers_keywords_reach_no_data_set(call: Call, tmp_path: Path, copied_digits: list[int]) -> None:
    assert call("train", "name=run", "+dataset.copies=2", *QUICK).code == 0
    assert call("evaluate", "checkpoint=checkpoints/run/best.pt").code == 0
    assert copied_digits == [2, 2]
    made_elsewhere(tmp_path, "dataset", copies=5)
    assert "dataset.copies=5" in call("evaluate", "checkpoint=evil.pt").error
    assert call("evaluate", "checkpoint=evil.pt", "+dataset.copies=3").code == 0
    assert copied_digits == [2, 2, 3]
    answer = call("evaluate", "checkpoint=evil.pt", "+dataset.copies=3", "dataset.limt=4")
    assert "no setting 'dataset.limt' (did you mean dataset.limit?)" in answer.error


def test_a_strangers_keywords_reach_no_function_that_loads_models() -> None:
    where = Path("evil.pt")
    for name in ("torch.hub.load", "torchvision.models.get_model", "models.mlp", "models.mlp.nn.Linear", None, 3):
        assert not trust.is_model_here(name, where), name
    assert trust.is_model_here("models.mlp.MLP", where) and trust.is_model_here("torchvision.models.resnet18", where)


def test_a_run_that_was_made_elsewhere_goes_on_with_keywords_that_are_typed(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=run", "optimizer=adam", "+optimizer.amsgrad=true", *QUICK).code == 0
    file = tmp_path / "checkpoints/run/.hydra/config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text())))  # without the signature
    said = call("train", "resume=checkpoints/run", "epochs=2").error
    assert "say +optimizer.amsgrad=true (paths, addresses, names and added keywords are not taken" in said
    answer = call("train", "resume=checkpoints/run", "epochs=2", "+optimizer.amsgrad=true")
    assert answer.code == 0, answer.err


# ---------------------------------------------------------------------------------------------------------------------
# Another class


def test_another_target_says_what_to_take_out(call: Call, tmp_path: Path) -> None:
    other = "optimizer._target_=torch.optim.NAdam"
    way_out = ["~optimizer.momentum", "~optimizer.nesterov"]
    said = call("train", other).error
    what = "optimizer: torch.optim.NAdam takes no momentum, nesterov; take out what it does not take:"
    assert said == " ".join([what, *way_out])
    typed = ["name=run", other, *way_out, "+optimizer.momentum_decay=0.01", *QUICK]
    answer = call("train", *typed)
    assert answer.code == 0, answer.err
    group = torch.load(tmp_path / "checkpoints/run/last.pt")["optimizer"]["param_groups"][0]
    assert group["momentum_decay"] == 0.01
    said = call("train", "resume=latest", "epochs=2").error
    assert f"say {other} {' '.join(way_out)} +optimizer.momentum_decay=0.01 (" in said
    again = [other, *way_out, "+optimizer.momentum_decay=0.01"]
    assert call("train", "resume=latest", "epochs=2", *again).code == 0


def test_a_setting_of_another_type_takes_the_place_of_the_yamls(call: Call, tmp_path: Path) -> None:
    other = ["optimizer=adam", "optimizer._target_=torch.optim.Adafactor", "~optimizer.betas", "~optimizer.eps"]
    answer = call("train", "name=run", *other, "+optimizer.eps=[1e-20,1e-3]", *QUICK)
    assert answer.code == 0, answer.err
    assert kept(tmp_path, "run")["optimizer"]["eps"] == [1e-20, 1e-3]


def test_what_is_needed_cannot_be_taken_out(call: Call) -> None:
    other = "model._target_=models.cnn.CNN"
    assert call("train", other).error.endswith("takes no hidden; take out what it does not take: ~model.hidden")
    assert "'optimizer.lr' was taken out" in call("train", other, "~optimizer.lr").error  # of another group
    assert "'dataset.limit' was taken out" in call("train", "~dataset.limit").error
    small = ["model=resnet18", "model._target_=models.cnn.CNN"]
    assert call("train", *small).error.endswith("take out what it does not take: ~model.small_images")  # which is null
    assert call("train", *small, "~model.small_images", "+model.width=4", *QUICK[:3]).err == ""
    said = call("train", "model=cnn", "model._target_=models.mlp.MLP", "~model.width").error
    assert "missing a required argument: 'hidden'" in said


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.fixture
def threads() -> Iterator[None]:
    """PyTorch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_run_keeps_its_number_of_threads(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    own = torch.get_num_threads()
    other = 2 if own == 1 else 1

    def used(name: str) -> int:
        return int(json.loads((tmp_path / "checkpoints" / name / "summary.json").read_text())["threads"])

    assert call("train", "name=run", f"num_threads={other}", *QUICK).code == 0
    assert used("run") == torch.get_num_threads() == other
    assert call("train", "name=own", *QUICK).code == 0  # as a job of a sweep after another one
    assert used("own") == own
    assert call("train", "resume=checkpoints/run", "epochs=2").code == 0
    assert used("run") == other
    said = call("train", "resume=checkpoints/run", "epochs=3", "num_threads=3").error
    assert f"started with other settings: num_threads {other} -> 3" in said
    assert call("train", "num_threads=0").error == "num_threads=0: expected an integer in [1, 1024] or null"


@pytest.mark.usefixtures("threads")
def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(devices, "_OWN_THREADS", 1)
    devices.use_threads(2)
    assert (capsys.readouterr().err, torch.get_num_threads()) == ("", 2)
    devices.use_threads(3)
    assert capsys.readouterr().err == "note: num_threads=3: more than the 2 cores to be had\n"
    assert torch.get_num_threads() == 3
    devices.use_threads(None)
    assert (capsys.readouterr().err, torch.get_num_threads()) == ("", 1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("entry", ["evaluate", "predict"])
def test_evaluate_and_predict_take_a_number_of_threads(call: Call, entry: str) -> None:
    other = torch.get_num_threads() + 1
    call(entry, f"num_threads={other}", "device=cpu", "checkpoint=nothing.pt", *["images=."] * (entry == "predict"))
    assert torch.get_num_threads() == other


def test_what_is_typed_with_a_plus_is_taken_without_torch(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(cli, "_main", asked.update)
    words = [
        "+optimizer.a=1e-3",
        "++model.b=[a,[1,null]]",
        "+criterion.c='x y'",
        "+scheduler.d=null",
        "+dataset.e=true",
    ]
    assert call("train", *words, "epochs=${seed}", "seed=2").code == 0
    values = [asked["optimizer"]["a"], asked["model"]["b"], asked["criterion"]["c"], asked["dataset"]["e"]]
    assert values == [1e-3, ["a", [1, None]], "x y", True] and asked["epochs"] == 2
    assert "d" in asked["scheduler"] and asked["scheduler"]["d"] is None
