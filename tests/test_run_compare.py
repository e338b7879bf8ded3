"""The table of all runs: read from made run directories, without torch and without training."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Call

from engine.command import sweep
from engine.errors import RunError
from engine.run import compare, runs


def make_run(
    root: Path, name: str, test: float | None = None, val: float = 0.5, end: str = "", **settings: Any
) -> Path:
    """A run's directory as training leaves it; without `test` it did not come to its end."""
    directory = root / name
    (directory / ".hydra").mkdir(parents=True)
    model = settings.pop("model", "mlp")
    own = {"mlp": {"hidden": [8], "dropout": 0.0}, "cnn": {"width": 4, "dropout": 0.0}}[model]
    config: dict[str, Any] = {
        "choices": {"model": model, "dataset": "digits", "optimizer": "sgd", "experiment": None, "logger": ["csv"]},
        "model": {"_target_": f"models.{model}", **own},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": settings.pop("lr", 0.1)},
        "logger": {"csv": {}},
        "name": name,
        "seed": 0,
        **settings,
    }
    (directory / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["epoch,train_loss,val_loss,val_accuracy,seconds", f"1,1.0,1.0,{val - 0.1},2.0", f"2,0.9,0.9,{val},2.0"]
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    if test is not None:
        summary = {"test_accuracy": test, "val_accuracy": val, "best_epoch": 2, "seconds": 4.0}
        (directory / "summary.json").write_text(json.dumps(summary))
    if end:
        (directory / "end.json").write_text(json.dumps({"state": end, "reason": "because"}))
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs of every state, some of them in a sweep."""
    root = tmp_path / "checkpoints"
    make_run(root, "first", test=0.81, val=0.8)
    make_run(root, "killed", val=0.3)
    make_run(root, "broken", val=0.2, end="failed", lr=9.0)
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        make_run(root, f"rates/0{seed}", test=accuracy, val=accuracy, lr=0.01, seed=seed)
    make_run(root, "rates/wide", test=0.9, val=0.9, model="cnn", lr=0.01)
    (root / "latest").symlink_to("rates/wide")
    (root / "rates" / "sweep.json").write_text("{}")
    return root


def shown(root: Path, *arguments: str) -> list[str]:
    """The runs of the table, from its top."""
    lines = compare.command(arguments, root).splitlines()
    return [line.split()[0] for line in lines[1:] if line and not line.startswith("written")]


def test_all_runs_are_listed_once_best_first_with_what_differs(root: Path) -> None:
    text = compare.command([], root)
    assert text.splitlines()[0].split() == [
        "run", "state", "model", "dataset", "lr", "seed", "best_epoch", "val_accuracy", "test_accuracy", "seconds",
    ]  # fmt: skip
    assert shown(root) == ["rates/wide", "first", "rates/02", "rates/01", "rates/00", "killed", "broken"]
    assert "width" not in text and "logger" not in text, "what only one model has is no difference"


def test_states_are_told_apart(root: Path) -> None:
    held = make_run(root, "held")
    other_process = (
        "import sys; from pathlib import Path; from engine.run import runs; runs.lock(Path(sys.argv[1])); input()"
    )
    command = [sys.executable, "-c", other_process, str(held)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        while not (held / ".lock").is_file() or not (held / ".lock").read_text():
            assert process.poll() is None
        states = {row["run"]: row["state"] for row in compare.read_runs(root)}
        process.communicate(b"\n")
    assert states["held"] == "running" and states["first"] == "finished"
    assert states["killed"] == "stopped" and states["broken"] == "failed"
    assert {row["run"]: row["state"] for row in compare.read_runs(root)}["held"] == "stopped"


@pytest.mark.parametrize(
    ("typed", "runs_shown"),
    [
        (["model=cnn"], ["rates/wide"]),
        (["model=cnn,mlp", "run=rates/*", "seed=0"], ["rates/wide", "rates/00"]),
        (["state!=finished"], ["killed", "broken"]),
        (["val_accuracy>0.7", "val_accuracy<=0.8"], ["first", "rates/02"]),
        (["lr=1e-2", "sort=seed", "model=mlp"], ["rates/00", "rates/01", "rates/02"]),
        (["optimizer.lr=0.01", "sort=-seed", "model=mlp"], ["rates/02", "rates/01", "rates/00"]),
        (["sort=test_accuracy", "state=finished", "model=mlp"], ["first", "rates/02", "rates/01", "rates/00"]),
        (["hidden=[8]", "state=failed"], ["broken"]),
    ],
)
def test_rows_are_filtered_and_sorted_by_any_column(root: Path, typed: list[str], runs_shown: list[str]) -> None:
    assert shown(root, *typed) == runs_shown


def test_mean_over_seeds(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    make_run(root, "rates/03", val=0.1, lr=0.01, seed=3)  # stopped, which the mean leaves out
    make_run(root, "rates/04", val=0.1, end="failed", lr=0.01, seed=4)
    text = compare.command(["run=rates/*", "mean=seed", f"output={file}"], root)
    assert "0.7000 ± 0.1000" in text
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["model"] for row in rows] == ["cnn", "mlp"] and rows[1]["runs"] == "3"
    assert float(rows[1]["val_accuracy_std"]) == pytest.approx(0.1) and rows[0]["val_accuracy_std"] == ""


def test_a_file_has_the_numbers_unrounded(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "one", test=0.123456789, val=2 / 3)
    compare.command([f"output={tmp_path / 'table.csv'}"], tmp_path / "runs")
    with (tmp_path / "table.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (float(row["test_accuracy"]), float(row["val_accuracy"])) == (0.123456789, 2 / 3)


def test_mean_over_folds_and_over_folds_and_seeds(tmp_path: Path) -> None:
    for number, accuracy in enumerate((0.5, 0.6, 0.8, 0.9)):
        fold = {"folds": 2, "fold": number % 2}
        make_run(tmp_path, f"0{number}", test=accuracy, val=accuracy, seed=number // 2, dataset=fold)
    file = tmp_path / "table.csv"
    for asked, means in (("fold", [0.85, 0.55]), ("dataset.fold", [0.85, 0.55]), ("seed,fold", [0.7])):
        compare.command([f"mean={asked}", f"output={file}"], tmp_path)
        with file.open(newline="") as lines:
            assert [float(row["val_accuracy"]) for row in csv.DictReader(lines)] == pytest.approx(means)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optimizr.lr=1", "no run has a column 'optimizr.lr' (did you mean optimizer.lr"),
        ("sort=vall_accuracy", "no run has a column 'vall_accuracy' (did you mean val_accuracy"),
        ("dropout", "expected COLUMN=VALUE"),
        ("val_accuracy>high", "'high' is not a number"),
        ("mean=sed", "no run has a column 'sed' (did you mean seed"),
        ("output=.", "output=.: cannot be written"),
    ],
)
def test_a_wrong_request_is_one_line(call: Call, root: Path, typed: str, said: str) -> None:
    assert said in call("evaluate", "--runs", typed).error


def test_no_runs_yet(call: Call) -> None:
    assert "there is no run in" in call("evaluate", "--runs").error


DAMAGES: list[tuple[str, str | bytes, str]] = [  # the file, its content, what is said of it
    (".hydra/config.yaml", "{", "not valid YAML"),
    (".hydra/config.yaml", "- 1\n", "names no choices"),
    (".hydra/config.yaml", "choices: [mlp]\n", "names no choices"),
    (".hydra/config.yaml", "choices: {model: {a: 1}}\n", "choice of model is no name"),
    (".hydra/config.yaml", "choices: {model: mlp}\na: &x [1]\nb: [*x, *x]\n", "refers to itself"),
    (".hydra/config.yaml", "choices: {model: mlp}\nseed: " + 60 * "[" + 60 * "]", "levels"),
    ("metrics.csv", b"\x89PNG\x00\xff", "metrics.csv"),
    ("metrics.csv", "epoch,val_accuracy\n1,\0\n", "zero bytes"),
    ("metrics.csv", f"epoch,val_accuracy\n1,{'9' * 200_000}\n", "field larger"),
    ("metrics.csv", "epoch,val_accuracy\n1,7.5\n", "not between 0 and 1"),
    ("summary.json", "[", "summary.json"),
    ("summary.json", "[1]", "no test accuracy"),
    ("summary.json", '{"test_accuracy": "0.5"}', "test_accuracy is no finite number"),
    ("summary.json", '{"test_accuracy": NaN}', "test_accuracy is no finite number"),
    ("summary.json", '{"test_accuracy": 0.5, "val_accuracy": [1]}', "val_accuracy is no finite number"),
    ("summary.json", '{"test_accuracy": 0.5, "seconds": true}', "seconds is no finite number"),
    ("summary.json", 5000 * "[", "summary.json"),
]


@pytest.mark.parametrize("arguments", [[], ["mean=seed"], ["sort=-seconds"], ["lr<1"]])
def test_a_damaged_run_costs_its_own_row(root: Path, arguments: list[str]) -> None:
    whole = compare.command(arguments, root).splitlines()
    for number, (name, content, _) in enumerate(DAMAGES):
        file = make_run(root, f"zz{number:02}", lr=5.0) / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "zz00" / "metrics.csv").unlink()
    os.mkfifo(root / "zz00" / "metrics.csv")
    os.truncate(make_run(root, "zz98") / "metrics.csv", 1 << 30)
    file = make_run(root, "zz99") / ".hydra" / "config.yaml"
    file.unlink()
    file.mkdir()
    damaged = {row["run"]: row for row in compare.read_runs(root) if row["state"] == "damaged"}
    assert len(damaged) == len(DAMAGES) + 2
    for number, (_, _, said) in enumerate(DAMAGES):
        assert said in damaged[f"zz{number:02}"]["reason"] and len(damaged[f"zz{number:02}"]["reason"]) < 300
    lines = compare.command(arguments, root).splitlines()
    table = [line for line in lines[: lines.index("")] if not line.startswith("zz")]
    assert [line.split() for line in table] == [line.split() for line in whole], "the others' rows are as before"
    if not arguments:
        assert sum(line.startswith("zz") for line in lines) == len(damaged)
        assert len([line for line in lines if line.startswith("damaged  zz")]) == 5
        assert lines[-1] == "damaged  14 more runs; state=damaged columns=run,reason lists them"


def test_the_table_fits_the_terminal_and_columns_are_chosen(root: Path, tmp_path: Path) -> None:
    transforms = [{"RandomRotation": {"degrees": degrees}} for degrees in range(20)]
    make_run(root, "augmented", test=0.85, val=0.85, clip=1.5, dataset={"train_transforms": transforms})
    make_run(root, "\x1b[31mred", test=0.1, val=0.1, dataset={"train_transforms": []})
    wide = compare.command([], root)
    assert max(map(len, wide.splitlines())) < 200 and "train_transforms" in wide and "\x1b" not in wide
    narrow = compare.command([f"output={tmp_path / 'all.csv'}"], root, width=100)
    table, _, rest = narrow.partition("\n\n")
    assert max(map(len, table.splitlines())) <= 100 and "lr" in table and "val_accuracy" in table
    assert "too narrow for 2 columns: dataset.train_transforms, " in rest
    assert "RandomRotation" in (tmp_path / "all.csv").read_text()
    chosen = compare.command(["columns=run,lr,val_accuracy", "run=first"], root, width=10).splitlines()
    assert [line.split() for line in chosen] == [["run", "lr", "val_accuracy"], ["first", "0.1", "0.8000"]]


def test_a_run_that_did_not_end_is_judged_by_its_best_epoch(tmp_path: Path) -> None:
    """The highest validation accuracy, of equal ones that of the lower loss; the figures of one and the same epoch."""
    directory = make_run(tmp_path, "a")
    rows = "1,0.6,0.9,0.7,1\n2,0.7,0.8,0.9,1\n3,0.8,0.6,0.9,1\n4,0.9,0.1,0.8,1\n"
    (directory / "metrics.csv").write_text(f"epoch,train_accuracy,val_loss,val_accuracy,seconds\n{rows}")
    (row,) = compare.read_runs(tmp_path)
    found = [row[name] for name in ("best_epoch", "train_accuracy", "val_loss", "val_accuracy", "epoch", "seconds")]
    assert found == [3, 0.8, 0.6, 0.9, 4, 4.0]


def test_a_run_without_validation_is_judged_by_training(tmp_path: Path) -> None:
    for name, accuracy, test in (("a", 0.8, 0.9), ("b", 0.9, 0.7)):
        directory = make_run(tmp_path, name, test=test)
        (directory / "summary.json").write_text(json.dumps({"test_accuracy": test, "val_accuracy": None}))
        rows = f"1,0.1,,,1\n2,{accuracy},,,1\n"  # the last epoch counts
        (directory / "metrics.csv").write_text(f"epoch,train_accuracy,val_loss,val_accuracy,seconds\n{rows}")
    assert shown(tmp_path) == ["b", "a"] and "train_accuracy" in compare.command([], tmp_path)
    text = sweep.summary(tmp_path, compare.read_runs(tmp_path))
    assert f"best     {tmp_path}/b/best.pt (by training accuracy: there is no validation part)" in text
    (tmp_path / "a" / "metrics.csv").write_text("epoch,train_accuracy,val_accuracy\n1,0.1,0.2\n")
    text = sweep.summary(tmp_path, compare.read_runs(tmp_path))
    assert f"best     {tmp_path}/a/best.pt (by validation accuracy)" in text


# ---------------------------------------------------------------------------------------------------------------------
# Which run is the newest, and what a failed start leaves


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs `a`, `sweep/b` and `c`, started in this order; `latest` leads to `c`."""
    monkeypatch.chdir(tmp_path)
    for second, name in enumerate(("a", "sweep/b", "c")):
        file = make_run(Path("checkpoints"), name) / ".hydra" / "config.yaml"
        os.utime(file, (1000 + second, 1000 + second))
    Path("checkpoints/latest").symlink_to("c")
    return Path("checkpoints")


def test_the_newest_run_is_found_where_the_link_is_not(three: Path) -> None:
    assert runs.newest() == three / "c"
    shutil.move(three / "c", three.parent / "moved")
    assert runs.newest() == three / "sweep" / "b", "the newest there is"
    shutil.copytree(three / "a", three.parent / "copied")
    (three / "latest").unlink()
    shutil.move(three.parent / "copied", three / "latest")
    assert runs.newest() == three / "sweep" / "b" and runs.find("latest") == three / "sweep" / "b"
    assert [row["run"] for row in compare.read_runs(three)] == ["a", "sweep/b"], "a copy is not one more run"
    shutil.rmtree(three / "a")
    shutil.rmtree(three / "sweep")
    assert runs.newest() == three / "latest"


def test_a_folder_in_the_way_of_the_link_is_told_and_kept(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (three / "latest").unlink()
    (three / "latest").mkdir()
    runs._point_latest(three / "a")
    assert (three / "latest").is_dir() and "it is left as it is" in capsys.readouterr().out
    (three / "latest").rmdir()
    (three / "latest").symlink_to("gone")
    runs._point_latest(three / "a")
    assert (three / "latest").resolve() == (three / "a").resolve()


def test_a_start_that_is_refused_leaves_no_folder(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        file.mkdir()
        start_log(file)

    start_log = runs.start_log
    monkeypatch.setattr(runs, "start_log", refuse)
    assert "train.log: cannot be written" in call("train", "epochs=1", "model.hidden=[4]", "name=run").error
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_finished_run_that_is_resumed_says_so(call: Call, tmp_path: Path) -> None:
    recipe = ("epochs=1", "model.hidden=[4]", "dataset.limit=60")
    assert call("train", *recipe, "name=run").code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    answer = call("train", "resume=latest")
    summary = json.loads((tmp_path / "checkpoints/run/summary.json").read_text())
    assert answer.code == 0 and answer.out.startswith("checkpoints/run finished before: test accuracy ")
    assert f"{summary['test_accuracy']:.2%}" in answer.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "epoch 2/2" in call("train", "resume=latest", "epochs=2").out


def test_the_log_cannot_steer_a_terminal(tmp_path: Path) -> None:
    runs.start_log(tmp_path / "train.log")
    runs.log.info("class \x1b]0;mine\x07 and \udcff\n  second line")
    runs.stop_log()
    assert (tmp_path / "train.log").read_text().endswith("class \\x1b]0;mine\\x07 and \\udcff\n  second line\n")


def test_the_command_answers_without_torch(process: Call, root: Path) -> None:
    answer = process("evaluate", "--runs", "model=cnn", PYTHONPROFILEIMPORTTIME="1")
    assert answer.code == 0 and "rates/wide" in answer.out
    assert not any(line.split("|")[-1].strip() == "torch" for line in answer.err.splitlines())


def test_a_run_that_fails_says_so_afterwards(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "run")
    runs.lock(directory)
    runs.abandon(RunError("the loss is not a number"))
    row = compare.run_row(directory, tmp_path)
    assert row is not None and (row["state"], row["reason"]) == ("failed", "the loss is not a number")
