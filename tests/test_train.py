"""train.py: the main job on real data, what it leaves in its run directory, and that one seed gives the same bits."""

from __future__ import annotations

import csv
import json
import os
import re
import time
import urllib.error
from pathlib import Path

import processes
import pytest
import torch
from conftest import Call
from test_datasets import cifar_folder
from test_models import LARGE, MODELS
from test_tutorial import write_fashion_mnist

from engine.config import group_options
from engine.run import checkpoint


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def test_the_bundled_digits_from_another_folder(process: Call, tmp_path: Path) -> None:
    """`python train.py` as a user runs it, and everything it leaves behind."""
    answer = process("train")
    assert answer.code == 0 and answer.err == "", answer.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]

    (run,) = (p for p in (tmp_path / "checkpoints").iterdir() if not p.is_symlink())
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run.name)  # safe to paste unquoted
    assert run.name.endswith("_mlp_digits")
    latest = tmp_path / "checkpoints" / "latest"
    assert latest.resolve() == run.resolve()
    made = {p.name for p in run.iterdir()}
    assert made >= {"best.pt", "last.pt", "metrics.csv", "summary.json", "train.log", ".hydra"}
    assert {p.name for p in (run / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}

    # The terminal: a summary first, one plain line an epoch, the test figures and how to get them again.
    lines = answer.out.splitlines()
    for what in (r"model +mlp, 301,066 parameters", r"data +digits, .*1x8x8, 10 classes", r"device +\w+", r"run +\S+"):
        assert any(re.match(what, line) for line in lines[:5]), what
    assert sum(line.startswith("epoch") for line in lines) == 20
    assert "\r" not in answer.out
    assert f"python evaluate.py checkpoint=checkpoints/{run.name}/best.pt" in lines[-1]

    # summary.json and metrics.csv.
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.95
    assert f"accuracy {summary['test_accuracy']:.2%}" in answer.out
    assert {"test_loss", "best_epoch", "device", "git_commit", "torch", "python"} <= set(summary)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    columns = "epoch train_loss train_accuracy val_loss val_accuracy lr seconds images_per_second"
    assert list(rows[0]) == columns.split()
    assert [int(row["epoch"]) for row in rows] == list(range(1, 21))
    assert float(rows[0]["lr"]) == 0.05 and float(rows[-1]["lr"]) < 0.001  # half a cosine
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert accuracies[summary["best_epoch"] - 1] == max(accuracies)

    # train.log has the printed model with its parameter shapes; the checkpoint is data, with a plain state_dict.
    log = (run / "train.log").read_text()
    assert "Linear(in_features=64, out_features=512" in log and "linear_relu_stack.0.weight [512, 64]" in log
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == summary["best_epoch"]
    assert weights(run / "last.pt")["linear_relu_stack.0.weight"].shape == (512, 64)


def meet(folder: str) -> None:
    """Go to `folder` and wait there for the starting signal."""
    os.chdir(folder)
    while not Path("go").exists():
        time.sleep(0.001)


def test_runs_started_at_once_have_a_directory_each(tmp_path: Path) -> None:
    arguments = ("debug=fast", "device=cpu", "model.hidden=[8]")
    started = [
        processes.start("train", *arguments, cwd=tmp_path / f"output-{i}", before=meet, argument=str(tmp_path))
        for i in range(5)
    ]
    (tmp_path / "go").touch()
    for run in started:
        assert run.wait() == 0 and run.err == "", run.err
    directories = [p for p in (tmp_path / "checkpoints").iterdir() if not p.is_symlink()]
    assert len(directories) == 5
    for directory in directories:
        assert {"best.pt", "last.pt", "metrics.csv", "summary.json"} <= {p.name for p in directory.iterdir()}
        assert len(list(csv.DictReader((directory / "metrics.csv").open()))) == 1
    assert (tmp_path / "checkpoints" / "latest").resolve() in [d.resolve() for d in directories]


def test_data_that_is_neither_there_nor_downloadable(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_arguments: object, **_named: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for dataset, layout in (("mnist", "MNIST/raw"), ("kmnist", "KMNIST/raw"), ("cifar10", "cifar-10-batches-py")):
        answer = call("train", f"dataset={dataset}", "dataset.root=here/data")
        assert f"here/data/{layout}/ with " in answer.error  # which folder and layout would be used
        assert "tried http" in answer.error and "no route to host" in answer.error  # what was tried
        assert "dataset=digits, which needs nothing" in answer.error
        assert list(tmp_path.iterdir()) == []


def test_a_run_can_be_named_once(call: Call, tmp_path: Path) -> None:
    assert call("train", "debug=fast", "name=first").code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    assert "checkpoints/first" in call("train", "debug=fast", "name=first").error
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == before
    for name in ("a/b", "'a b'", "..", "latest", "'a=b'", "-x", "'a[1]'"):
        assert "expected letters" in call("train", "debug=fast", f"name={name}").error
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == before


@pytest.mark.parametrize("recipe", group_options()["experiment"])
def test_every_recipe_trains(call: Call, tmp_path: Path, recipe: str) -> None:
    """On files of the true format with random images; what it reaches on the real ones is benchmarks/recipes.py's."""
    write_fashion_mnist(tmp_path / "FashionMNIST/raw")
    cifar_folder(tmp_path)
    words = ["epochs=2", "batch_size=8", "limit_batches=2", "compile=false", "num_threads=1", "name=run"]
    root = [] if recipe in ("digits_best", "finetune") else ["dataset.root=."]
    if recipe == "finetune":
        assert call("train", "debug=fast", "name=first").code == 0
        words.append("init_from=checkpoints/first/best.pt")
    trained = call("train", f"experiment={recipe}", *words, *root)
    assert trained.code == 0 and trained.err == "", trained.err
    assert call("evaluate", "tta=flip", "num_threads=1").code == 0


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m in LARGE)) for m in MODELS])
def test_debug_fast_takes_one_batch_of_each_phase(call: Call, tmp_path: Path, model: str) -> None:
    answer = call("train", "debug=fast", f"model={model}", "name=fast")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader((tmp_path / "checkpoints/fast/metrics.csv").open()))
    assert len(rows) == 1
    again = call("evaluate")
    assert "test     accuracy" in answer.out and " 355 samples" in again.out  # an evaluation is of the whole split


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_debug_overfit_learns_a_handful_of_samples_by_heart(call: Call, tmp_path: Path, model: str) -> None:
    assert call("train", "debug=overfit", f"model={model}", "name=overfit").code == 0
    rows = list(csv.DictReader((tmp_path / "checkpoints/overfit/metrics.csv").open()))
    assert float(rows[-1]["train_accuracy"]) == 1.0
    assert rows[-1]["val_accuracy"] == ""  # no validation part; the last epoch counts as the best


def test_the_same_seed_gives_the_same_bits(call: Call, tmp_path: Path) -> None:
    common = ("epochs=2", "dataset.limit=300", "model.dropout=0.2", "device=cpu")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(7)  # what was drawn before does not matter
        assert call("train", *common, f"seed={seed}", f"name={name}").code == 0
    a, b, c = (weights(tmp_path / "checkpoints" / name / "last.pt") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        *((optimizer, "cosine") for optimizer in group_options()["optimizer"]),
        *(("sgd", scheduler) for scheduler in group_options()["scheduler"] if scheduler != "cosine"),
    ],
)
def test_every_optimizer_and_every_schedule(call: Call, tmp_path: Path, optimizer: str, scheduler: str) -> None:
    arguments = ("epochs=3", "dataset.limit=128", "model.hidden=[8]", "name=run", "scheduler.warmup_epochs=1")
    drop = ["scheduler.every_epochs=2"] if scheduler == "step" else []
    answer = call("train", *arguments, f"optimizer={optimizer}", f"scheduler={scheduler}", "optimizer.lr=0.01", *drop)
    assert answer.code == 0, answer.err
    rates = [float(r["lr"]) for r in csv.DictReader((tmp_path / "checkpoints/run/metrics.csv").open())]
    assert rates[0] < rates[1] == 0.01  # warm-up takes the first epoch
    assert rates[2] == 0.01 if scheduler == "constant" else rates[2] < 0.01


def test_main_returns_the_validation_accuracy(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweepers read it."""
    import train

    returned = []
    real = train.main
    monkeypatch.setattr(train, "main", lambda config: returned.append(real(config)) or returned[-1])
    assert call("train", "epochs=2", "dataset.limit=200", "name=run").code == 0
    rows = list(csv.DictReader((tmp_path / "checkpoints/run/metrics.csv").open()))
    assert returned == [pytest.approx(max(float(row["val_accuracy"]) for row in rows), abs=1e-6)]


def test_a_multirun_makes_one_directory_a_run(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "debug=fast", "model.hidden=[8]", "seed=0,1,2")
    assert answer.code == 0, answer.err
    files = sorted((tmp_path / "checkpoints").rglob("best.pt"))
    files = [file for file in files if "latest" not in file.parts]
    assert len(files) == 3
    assert sorted(checkpoint.read(file)["config"]["seed"] for file in files) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["device=cuda:77"], "device=cuda:77"),
        (["device=toaster"], "device=toaster"),
        (["dataset.train_transforms=[Normalise]"], "'Normalise' (did you mean Normalize?)"),
        (["optimizer.nesterov=true", "optimizer.momentum=0"], "Nesterov momentum requires a momentum"),
        (["optimizer._target_=torch.optim.SDG"], "torch.optim has no 'SDG' (did you mean SGD?)"),
        (["drop_last=true", "batch_size=9999"], "1299 training samples, batch_size=9999"),
    ],
)
def test_what_only_torch_can_tell_is_told_before_anything_is_made(
    call: Call, tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert said in call("train", *arguments).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(call: Call) -> None:
    assert call("train", "device=cuda").error.startswith("device=cuda: not on this machine; there is ")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_runs_cannot_be_made_here(call: Call, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert str(tmp_path / "checkpoints") in call("train", "debug=fast").error


def test_training_and_test_images_of_different_sizes_are_refused(call: Call, tmp_path: Path) -> None:
    error = call("train", "dataset.train_transforms=[{RandomCrop:{size:6}}]").error
    assert "[1, 6, 6] for training and [1, 8, 8] for testing" in error
    assert not (tmp_path / "checkpoints").exists()


def test_several_processes_that_no_launcher_started_are_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "no RANK, MASTER_ADDR, MASTER_PORT; start several processes with torchrun" in call("train").error
    assert not (tmp_path / "checkpoints").exists()


def test_numbers_that_another_launcher_has_left_do_not_silence_a_process(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")  # and no WORLD_SIZE: it is one process
    answer = call("train", "epochs=1", "model.hidden=[8]", "dataset.limit=100", "name=run")
    assert answer.code == 0 and "test     accuracy" in answer.out, answer.err
    assert {"best.pt", "last.pt", "metrics.csv"} <= {file.name for file in (tmp_path / "checkpoints/run").iterdir()}


@pytest.mark.parametrize("entry", ["export", "datasets"])
def test_what_one_process_does_is_refused_to_several(call: Call, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert call(entry).error == f"{entry}.py is one process; start it without torchrun"
