"""What a checkpoint has to hold, what its model has to fit, and what is said where it does not."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_run_checkpoint import small
from torch import nn

from engine.errors import RequestError
from engine.run import checkpoint, trust
from models.mlp import MLP

FILE = Path("a.pt")


def read(found: Any, folder: Path) -> dict[str, Any]:
    torch.save(found, folder / "a.pt")
    return checkpoint.read(folder / "a.pt")


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append((tmp_path / "a.pt").exists()), sync(file)))
    checkpoint.write(tmp_path / "a.pt", small(number=1))
    assert synced == [False, True]  # the file, and then its folder
    checkpoint.write(tmp_path / "a.pt", small(number=2), keep=tmp_path / "before.pt")
    assert [checkpoint.read(tmp_path / name)["number"] for name in ("a.pt", "before.pt")] == [2, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What it holds


def test_a_path_that_is_no_file_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"a folder; expected a checkpoint file such as .*best\.pt$"):
        checkpoint.read(tmp_path)
    with pytest.raises(RequestError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "a.pt")

    def broken(_: Path) -> None:
        raise OSError("Input/output error")

    (tmp_path / "a.pt").touch()
    monkeypatch.setattr(checkpoint.archive, "load", broken)
    with pytest.raises(RequestError, match=r"a damaged one \(Input/output error\); use another$"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", ""])
def test_a_bare_state_dict_may_be_wrapped(tmp_path: Path, key: str) -> None:
    state = {"module.weight": torch.ones(2), "_orig_mod.bias": torch.zeros(1)}
    found = read({"epoch": 3, "optimizer": {}, key: state} if key else state, tmp_path)
    assert list(found) == ["model"] and list(found["model"]) == ["weight", "bias"]
    assert torch.equal(found["model"]["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([1], "it holds list"),
        ({}, "it holds no weights"),
        ({"a": 1}, "'a' is int"),
        ({0: torch.ones(1)}, "0 is Tensor"),
        ({"model": torch.ones(1), "x": 1}, "'x' is int"),
        ({"model": {}}, "it holds no weights"),
        (small(model={}), "it holds no weights"),
        (small(model=[torch.ones(1)]), "it holds no weights"),
        (small(format=0), "its format is 0; this program reads 1"),
        (small(format=2), "its format is 2; this program reads 1"),
        (small(config=[]), "no configuration"),
        (small(config__model="mlp"), "no configuration"),
        (small(config__dataset=None), "no configuration"),
        (small(config__choices=[]), "no configuration"),
        (small(input_shape=(1, 8, 8)), "its input shape"),
        (small(input_shape=[8, 8]), "its input shape"),
        (small(input_shape=[1, 8, 8, 1]), "its input shape"),
        (small(input_shape=[0, 8, 8]), "its input shape"),
        (small(input_shape=[1, 8, -8]), "its input shape"),
        (small(input_shape=[True, 8, 8]), "its input shape"),
        (small(input_shape=[1, 8.0, 8]), "its input shape"),
        (small(input_shape=[1, 4096, 4097]), "more than 16,777,216 numbers"),
        (small(classes=("a", "b")), "no class names"),
        (small(classes=[]), "no class names"),
        (small(classes=["a", 1]), "no class names"),
        (small(classes=["a", "b", "a"]), "same name"),
        (small(config__name="${now}"), "an interpolation"),
    ],
)  # fmt: skip
def test_what_no_run_writes_is_refused(tmp_path: Path, found: Any, said: str) -> None:
    with pytest.raises(RequestError, match=r"^\S*a\.pt: not a checkpoint, or a damaged one \(") as error:
        read(found, tmp_path)
    assert said in str(error.value)


def test_what_is_just_within_the_limits_is_read(tmp_path: Path) -> None:
    for changes in ({"input_shape": [1, 4096, 4096]}, {"input_shape": [1, 1, 1]}, {"classes": ["a"]}):
        found = read(small(**changes), tmp_path)
        assert {key: found[key] for key in changes} == changes


# ---------------------------------------------------------------------------------------------------------------------
# Its model


def test_weights_that_do_not_fit_are_named_five_at_most() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = model.state_dict()
    checkpoint.check_fit(model, state, FILE)
    other = {**state, "0.weight": torch.zeros(2, 3), "2.weight": torch.zeros(1)}
    del other["1.bias"]
    with pytest.raises(RequestError) as error:
        checkpoint.check_fit(model, other, FILE)
    assert str(error.value) == (
        "a.pt: does not fit Sequential: 1.bias is missing in the file; 2.weight is not in the model; "
        "0.weight is [2, 3] in the file, [3, 2] in the model; "
        "was it trained with another model or other model settings?"
    )
    for count, more in ((5, "; x4 is not in the model; was"), (6, "; x4 is not in the model and 1 more; was")):
        with pytest.raises(RequestError) as error:
            checkpoint.check_fit(model, state | {f"x{n}": torch.zeros(1) for n in range(count)}, FILE)
        assert more in str(error.value)


def test_a_model_comes_back_from_any_thread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hidden = [2] * 60  # more than a hundred tensors
    whole = MLP(input_shape=(1, 8, 8), num_classes=10, hidden=hidden)
    found = read(small(model=whole.state_dict(), config__model__hidden=hidden), tmp_path)
    built = [checkpoint.build_model(found, FILE)]
    thread = threading.Thread(target=lambda: built.append(checkpoint.build_model(found, FILE)))
    thread.start()
    thread.join()
    for model in built:
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert len(built) == 2


def test_a_model_of_terabytes_is_refused_before_it_is_made() -> None:
    with pytest.raises(RequestError, match="does not fit MLP"):
        checkpoint.build_model(small(config__model__hidden=[1_000_000, 1_000_000]), FILE)


def test_settings_of_a_stranger_s_model_are_not_typed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = small(config__model={"_target_": "models.mlp.MLP", "hidden": [3], "dropout": 0.0, "where": "/tmp"})
    found["config"]["choices"]["model"] = "mine"
    with pytest.raises(RequestError, match=r"model\.where=/tmp: paths"):
        checkpoint.build_model(found, FILE)
    found["signature"] = trust.signature(found["config"])
    with pytest.raises(RequestError, match=r"does not fit its YAML.*'where'"):
        checkpoint.build_model(found, FILE)
    assert checkpoint.is_ours(found)
    found["signature"] = trust.signature({})
    assert not checkpoint.is_ours(found) and not checkpoint.is_ours(small())


def test_buffers_are_at_most_twice_the_weights_and_16_million(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self, input_shape: Any, num_classes: int, size: int) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5, bias=False)
            for number, part in enumerate((size - 3, 3)):
                self.register_buffer(f"buffer{number}", torch.empty(part), persistent=False)

    monkeypatch.setattr(trust, "_class_of_models", lambda name, where: Net)
    state = {"head.weight": torch.ones(5, 4)}

    def asked(size: int) -> dict[str, Any]:
        settings = {"_target_": "models.net.Net", "size": size}
        found = small(model=state, config__model=settings, config__choices__model="net")
        return found | {"signature": trust.signature(found["config"])}

    most = 2 * 20 + 2**24
    assert torch.equal(checkpoint.build_model(asked(most), FILE).head.weight, torch.ones(5, 4))
    with pytest.raises(RequestError, match="far more buffers than the file has weights"):
        checkpoint.build_model(asked(most + 1), FILE)


def test_patience_ends_and_leaves_no_clock_behind() -> None:
    before, until = signal.getsignal(signal.SIGVTALRM), time.monotonic() + 120
    with checkpoint._patience(60, FILE):
        assert 0 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] <= 60.1
    with (
        pytest.raises(RequestError, match=r"^a\.pt: its model takes too long to build"),
        checkpoint._patience(0.05, FILE),
    ):
        while time.monotonic() < until:
            pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) is before


def with_numbers(parameter: list[float], buffer: list[float]) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(parameter))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("mask", torch.tensor(buffer))
    return model


@pytest.mark.parametrize(
    ("parameter", "buffer", "said"),
    [
        ([1.0, math.nan, math.inf, 2.0], [0.0], "2 of the 4 numbers of weight"),
        ([-math.inf, 1.0], [0.0], "1 of the 2 numbers of weight"),
        ([1.0], [0.0, math.nan, 1.0], "1 of the 3 numbers of mask"),
        ([1.0], [math.inf, -math.inf], "1 of the 2 numbers of mask"),
        ([math.nan] * 1234, [0.0], "1,234 of the 1,234 numbers of weight"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(parameter: list[float], buffer: list[float], said: str) -> None:
    checkpoint.check_finite(with_numbers([1.0, 0.0], [-math.inf, 1.0]), FILE)
    with pytest.raises(RequestError) as error:
        checkpoint.check_finite(with_numbers(parameter, buffer), FILE)
    assert str(error.value).startswith(f"a.pt: {said} are not finite")


# ---------------------------------------------------------------------------------------------------------------------
# A bare state_dict


def test_a_bare_state_dict_wants_model_and_data_named() -> None:
    checkpoint.check_bare({"model": {"hidden": [3]}, "choices": {"dataset": "digits"}}, FILE)
    for config in ({}, {"model": {"hidden": [3]}}, {"choices": {"dataset": "digits"}},
                   {"model": {"hidden": [3]}, "choices": {"dataset": None}},
                   {"model": None, "choices": {"dataset": "digits"}}):  # fmt: skip
        with pytest.raises(RequestError, match=r"^a\.pt: a bare state_dict, which tells neither model nor data"):
            checkpoint.check_bare(config, FILE)


def test_a_bare_state_dict_gets_the_model_that_is_named() -> None:
    torch.manual_seed(0)
    whole = MLP(input_shape=(1, 2, 3), num_classes=4, hidden=[5])
    config = {"model": {"_target_": "models.mlp.MLP", "hidden": [5], "dropout": 0.0}}
    built = checkpoint.build_bare(whole.state_dict(), config, [1, 2, 3], 4, FILE)
    images = torch.randn(7, 1, 2, 3)
    assert torch.equal(built(images), whole(images))
    with pytest.raises(RequestError, match="does not fit MLP"):
        checkpoint.build_bare(whole.state_dict(), config, [1, 2, 3], 5, FILE)


def test_what_is_done_to_images_before_a_bare_state_dict_is_told() -> None:
    transforms = [name for size in range(9) for name in ({"Resize": {"size": [size, 8]}}, "RandomHorizontalFlip")]
    config = {"dataset": {"eval_transforms": transforms}, "choices": {"dataset": "digits"}}
    said = checkpoint.transforms_line(config)
    assert said.startswith("dataset.eval_transforms=[{Resize: {size: [0, 8]}}, RandomHorizontalFlip, {")
    assert yaml.safe_load(said.partition("=")[2].partition(", of ")[0]) == transforms
    assert "of dataset=digits;" in said and "\n" not in said
    config["choices"]["experiment"] = "tutorial"
    assert "of experiment=tutorial;" in checkpoint.transforms_line(config)
