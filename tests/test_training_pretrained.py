"""Weights that others have trained: fetched whole or not at all; transforms as they want them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import RequestError
from engine.training.pretrained import as_trained, disagreement, fitted, read_weights

NORMALIZE = {"Normalize": {"mean": [0.5], "std": [0.25]}}
WANTED = [{"Resize": {"size": [10]}}, {"CenterCrop": {"size": [8, 6]}}, NORMALIZE]
FLIP, OTHER = "RandomHorizontalFlip", {"Normalize": {"mean": [0.1], "std": [0.2]}}


class Wants:
    """A model of a user's that tells what its weights were trained with."""

    @staticmethod
    def trained_with(channels: int, width: int) -> list[Any] | None:
        normal = {"Normalize": {"mean": [0.5] * channels, "std": [0.25] * channels}}
        return [*WANTED[:2], normal] if width else None


def config(**data: Any) -> dict[str, Any]:
    whole = {"_target_": "datasets.digits", "limit": None, "train_transforms": [], "eval_transforms": [], **data}
    model = {"_target_": "test_training_pretrained.Wants", "width": 1}
    return {"model": model, "dataset": whole, "resume": None, "choices": {"model": "wants"}}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([], WANTED),
        ([{"Resize": {"size": [64, 64]}}, FLIP, OTHER], [*WANTED[:2], FLIP, NORMALIZE]),
        ([FLIP, OTHER, "RandomErasing"], [*WANTED[:2], FLIP, NORMALIZE, "RandomErasing"]),
        (
            [{"RandomCrop": {"size": 32, "padding": 4}}, FLIP],
            [WANTED[0], {"RandomCrop": {"size": [8, 6], "padding": 4}}, FLIP, NORMALIZE],
        ),
        (
            [{"RandomResizedCrop": {"size": [64, 64], "scale": [0.5, 1]}}, OTHER],
            [{"RandomResizedCrop": {"size": [8, 6], "scale": [0.5, 1]}}, NORMALIZE],
        ),
    ],
)
def test_transforms_become_those_of_the_weights_and_the_rest_stays(listed: list[Any], expected: list[Any]) -> None:
    assert fitted(listed, WANTED, "train_transforms") == expected
    assert fitted(expected, WANTED, "train_transforms") == expected  # and nothing is added by doing it again
    with pytest.raises(RequestError, match=r"dataset.train_transforms: there is no transform 'RandomFlip'"):
        fitted(["RandomFlip"], WANTED, "train_transforms")


def test_a_model_of_ones_own_tells_what_its_weights_want() -> None:
    data = as_trained(config(match_model=True))["dataset"]
    assert data["eval_transforms"] == data["train_transforms"] == WANTED  # of one channel, as the digits have
    data = as_trained(config(match_model=True, channels=3))["dataset"]
    assert data["eval_transforms"][2] == {"Normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    resumed = config(match_model=True) | {"resume": "checkpoints/run", "changed": ["dataset.limit null -> 3"]}
    for same in (config(), config(match_model=False), resumed):
        assert as_trained(same) is same
    resumed["changed"].append("dataset.match_model false -> true")
    assert as_trained(resumed)["dataset"]["eval_transforms"] == WANTED
    with pytest.raises(RequestError, match=r"dataset.cache=true keeps images of one size"):
        as_trained(config(match_model=True, cache=True, channels=3))
    unknown = config(match_model=True)
    unknown["model"]["width"] = 0
    for one in (unknown, {**unknown, "model": {"_target_": "models.mlp.MLP"}}):
        with pytest.raises(RequestError, match=r"dataset.match_model=true: model=wants has here no trained weights"):
            as_trained(one)


def test_what_disagrees_is_told_with_what_to_set() -> None:
    def said(shape: tuple[int, int, int], train: list[Any], evaluation: list[Any]) -> str:
        return disagreement(config(train_transforms=train, eval_transforms=evaluation), shape)

    near = {"Normalize": {"mean": [0.502], "std": [0.25]}}
    assert said((1, 8, 6), [near], [NORMALIZE]) == said((1, 8, 6), *[[{"Resize": {"size": 9}}, NORMALIZE]] * 2) == ""
    start, end = (
        "the weights were trained with 8x6 of mean [0.5] and std [0.25], here they get ",
        "; dataset.match_model=true ",
    )
    assert said((1, 6, 8), [NORMALIZE], [NORMALIZE]).startswith(f"{start}6x8 of mean [0.5] and std [0.25]{end}")
    assert said((1, 8, 6), [OTHER], [NORMALIZE]).startswith(
        f"{start}8x6 of mean [0.1] and std [0.2] and 8x6 of mean [0.5] and std [0.25]{end}"
    )
    assert said((1, 8, 6), [], []).startswith(f"{start}8x6 without Normalize{end}")
    for silent in ({"_target_": "models.mlp.MLP"}, {"_target_": "test_training_pretrained.Wants", "width": 0}):
        assert disagreement({**config(), "model": silent}, (1, 28, 28)) == ""


def test_weights_are_fetched_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name's checksum; a file that lies there is taken as it is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"a": torch.ones(2)}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    right, wrong = (tmp_path / f"net-{start}.pth" for start in (hashlib.sha256(content).hexdigest()[:8], "0" * 8))
    for path in (right, wrong):
        path.write_bytes(content)
    cache = tmp_path / "home" / "hub" / "checkpoints"
    with pytest.raises(
        RequestError, match=f"{wrong.name} is not in torch's cache and cannot .*invalid hash value"
    ) as no:
        read_weights(wrong.as_uri())
    assert f"put it there as {cache / wrong.name}, or" in str(no.value) and not (tmp_path / "home").exists()
    assert torch.equal(read_weights(right.as_uri())["a"], torch.ones(2))
    assert [file.name for file in cache.iterdir()] == [right.name]
    assert f"weights  {cache / right.name}\n" in capsys.readouterr().out
    right.unlink()
    torch.save({"model": {"module.a": torch.zeros(2)}}, cache / right.name)
    assert torch.equal(read_weights(right.as_uri())["a"], torch.zeros(2))
    assert "downloading" not in capsys.readouterr().out
