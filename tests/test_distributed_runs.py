"""Several processes of one run, as torchrun starts them: one directory, one line, one decision for all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import processes
import pytest
import torch
from conftest import Call
from processes import Command, start_several

Launch = dict[str, str]


@pytest.fixture
def launch() -> Iterator[Launch]:
    with processes.launcher() as variables:
        yield variables


def ended(commands: list[Command]) -> tuple[list[int], str]:
    """The exit codes, and what all have said on standard error."""
    codes = [command.wait() for command in commands]
    return codes, "".join(command.err for command in commands)


def last(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)


def test_a_launch_is_one_run(tmp_path: Path, call: Call, launch: Launch) -> None:
    """The first process starts last, two seconds after the others."""
    arguments = ["batch_size=8", "device=cpu", "dataset.limit=103", "epochs=2", "model=cnn", "name=run"]
    arguments += ["model.dropout=0"]  # so that no process draws, and only seeds of their own tell their states apart
    commands = start_several(3, *arguments, cwd=tmp_path, launch=launch, apart=1)
    assert ended(commands) == ([0, 0, 0], "")
    assert commands[1].out == commands[2].out == ""
    said = commands[0].out.splitlines()
    assert "device   cpu, 3 processes" in said
    assert "norm     batch norm sees each process's part of a batch; sync_batchnorm=true lets it see the whole" in said
    run = tmp_path / "checkpoints" / "run"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "run"]
    rows = (run / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,") and [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]
    assert (run / "train.log").read_text().count("epoch 2/2") == 1
    assert json.loads((run / "summary.json").read_text())["processes"] == 3

    found = last(run)
    assert len(found["random"]["others"]) == 2 and not any(name.startswith("module.") for name in found["model"])
    states = [found["random"]["torch"], *(other["torch"] for other in found["random"]["others"])]
    assert len({tuple(state.tolist()) for state in states}) == 3

    test = next(line for line in said if line.startswith("test "))
    accuracy = test.split("accuracy ")[1].split(",")[0]
    assert f"accuracy {accuracy}, loss" in call("evaluate", "checkpoint=checkpoints/run/best.pt", "device=cpu").out

    on = call("train", "resume=checkpoints/run", "epochs=3")
    assert on.code == 0 and "warning  processes 3 -> 1 since the run was saved: dropout draws other" in on.out


def test_synchronised_batch_norm_is_that_of_one_process(tmp_path: Path, call: Call, launch: Launch) -> None:
    common = ["batch_size=8", "device=cpu", "dataset.limit=101", "epochs=1", "model=cnn", "model.dropout=0"]
    common += ["model.width=4", "sync_batchnorm=true"]
    commands = start_several(2, *common, "name=run", cwd=tmp_path, launch=launch)
    assert ended(commands) == ([0, 0], "") and "norm     " not in commands[0].out
    assert call("train", *common, "name=alone").code == 0
    found, alone = (last(tmp_path / "checkpoints" / name)["model"] for name in ("run", "alone"))
    assert [name for name in found if "running_var" in name]
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path: Path, launch: Launch) -> None:
    arguments = ["dataset.limit=101", "device=cpu", "epochs=10000", "checkpoint.every_steps=3", "name=run"]
    commands = start_several(2, *arguments, cwd=tmp_path, launch=launch)
    run = tmp_path / "checkpoints" / "run"
    while not (run / "last.pt").exists():
        time.sleep(0.05)
    os.kill(commands[1].pid, signal.SIGTERM)
    codes, said = ended(commands)
    assert codes == [143, 143]
    assert said.startswith("error: stopped by SIGTERM in epoch ") and said.count("\n") == 1
    progress = last(run)["progress"]
    assert f"in epoch {progress['epoch']}, step {progress['batch']};" in said
    assert json.loads((run / "end.json").read_text()) == {"state": "stopped", "reason": said[len("error: ") : -1]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["batch_size=1"], "batch_size=1: fewer samples than the 2 processes that share them; take batch_size=2 or"),
        (["device=cuda"], "device=cuda: 2 processes here and 0 GPUs; --nproc-per-node=1, or device=cpu"),
        (["-m", "seed=0,1"], "torchrun starts the processes of one run, a sweep (-m, hparams_search=) starts runs;"),
        (["model=cnn", "batch_size=8"], "batch_size=8: the last batch of 99 samples holds 1 in one of the processes: "),
        (["optimizer.lr=-1"], "optimizer.lr=-1: expected a number > 0"),
    ],
)
def test_a_wrong_request_is_told_once(tmp_path: Path, launch: Launch, arguments: list[str], says: str) -> None:
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    common = ["dataset.limit=99"] + ["device=cpu"] * ("device=cuda" not in arguments)
    codes, said = ended(start_several(2, *common, *arguments, cwd=tmp_path, launch=launch))
    assert codes[0] == 2 and codes[1] in (1, 2)  # torchrun ends the others, where they do not find it themselves
    assert said.startswith(f"error: {says}") and said.count("\n") == 1
    assert not any((tmp_path / "checkpoints").glob("[!.]*"))


def test_processes_that_were_asked_for_different_things(tmp_path: Path) -> None:
    """Of which no launcher keeps the store, but the first one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
    commands = [
        processes.start("train", f"seed={rank}", cwd=tmp_path, variables=address | processes.numbers(rank, 2))
        for rank in range(2)
    ]
    codes, said = ended(commands)
    assert codes == [2, 2] and said.count("\n") == 1
    assert "with different settings: seed is 0 in rank 0, 1 in rank 1; start them all with the same" in said


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = processes.start("train", cwd=tmp_path, variables=address | processes.numbers(0, 2))
        assert command.wait() == 2
    assert command.err == f"error: MASTER_PORT={port}: another program uses it; choose another port\n"


def test_a_failure_of_one_ends_all_with_one_line(tmp_path: Path, launch: Launch) -> None:
    """An image that cannot be read, of which only the process knows that has it in its slice."""
    from PIL import Image

    for number in range(24):
        file = tmp_path / "pictures" / ("train" if number < 18 else "test") / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(file)
    (tmp_path / "pictures" / "train" / "b" / "13.png").write_bytes(b"no picture")
    data = ["dataset=image_folder", "dataset.root=pictures", "dataset.val_fraction=0", "num_workers=0", "shuffle=false"]
    for phase in ("train", "eval"):
        data.append(f"dataset.{phase}_transforms=[{{Resize: {{size: [8, 8]}}}}]")
    codes, said = ended(start_several(2, *data, "device=cpu", "name=run", cwd=tmp_path, launch=launch))
    assert codes == [1, 1] and said.count("\n") == 1
    assert said.startswith("error: pictures/train/b/13.png: ")
    end = json.loads((tmp_path / "checkpoints" / "run" / "end.json").read_text())
    assert end == {"state": "failed", "reason": said[len("error: ") : -1]}  # as the other process told the first one


def test_the_run_goes_on_where_processes_are_started_anew(tmp_path: Path, launch: Launch) -> None:
    """As torchrun does after one of them was killed; what comes out is what comes of a run that nobody disturbed."""
    common = ["dataset.limit=101", "device=cpu", "batch_size=8", "model.dropout=0.3", "checkpoint.every_steps=5"]
    few = [*common, "epochs=3", "model.hidden=[16]"]
    assert ended(start_several(2, *few, "name=calm", cwd=tmp_path, launch=launch)) == ([0, 0], "")
    with processes.launcher() as other:
        before = start_several(2, *few, "name=run", cwd=tmp_path, launch=other, before=die, argument="1 20")
        codes, said = ended(before)
        assert codes == [1, -signal.SIGKILL]
        assert said.count("\n") == 1 and "has lost another process, which said nothing: it was killed" in said
        after = []
        for rank in range(2):  # of which one is on a machine that is new
            anew = other | processes.numbers(rank, 2) | {"TORCHELASTIC_RESTART_COUNT": str(rank % 2)}
            after.append(processes.start("train", *few, "name=run", cwd=tmp_path, variables=anew))
        assert ended(after) == ([0, 0], "")
    assert "resumed  in epoch 2, after 5 steps" in after[0].out
    runs = tmp_path / "checkpoints"
    assert sorted(path.name for path in runs.iterdir()) == ["calm", "latest", "run"]
    calm, disturbed = last(runs / "calm"), last(runs / "run")
    assert all(torch.equal(tensor, disturbed["model"][name]) for name, tensor in calm["model"].items())
    assert (runs / "run" / "metrics.csv").read_text().count("epoch") == 1


def die(argument: str) -> None:
    """The process of a rank is killed in a step."""
    from engine.training.step import Step

    rank, number = map(int, argument.split())
    update, steps = Step.update, iter(range(number))

    def or_die(step: Step) -> None:
        if os.environ["RANK"] == str(rank) and next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        update(step)

    Step.update = or_die  # type: ignore[method-assign]


def test_what_ended_for_good_is_not_told_again(tmp_path: Path, launch: Launch) -> None:
    assert ended(start_several(2, "epochs=0", cwd=tmp_path, launch=launch))[0] == [2, 2]
    anew = launch | {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert ended(start_several(2, "epochs=0", cwd=tmp_path, launch=anew)) == ([2, 2], "")


# ---------------------------------------------------------------------------------------------------------------------
# torchrun itself, which takes seconds to start


def torchrun(*arguments: str, cwd: Path, name: str = "log", count: int = 2, **variables: str) -> subprocess.Popen:
    """A started torchrun; what it and the processes print is in the file `name`."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", *arguments]
    with (cwd / name).open("w") as file:
        return subprocess.Popen(
            command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, stdout=file, stderr=file
        )


def members(agent: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started, in their order."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def gone(pids: Iterable[int]) -> bool:
    """Whether processes have ended."""
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


FEW = [str(processes.ROOT / "train.py"), "dataset.limit=200", "device=cpu", "model=cnn", "model.dropout=0.3"]


def test_torchrun_starts_a_run(tmp_path: Path) -> None:
    """The command of the README."""
    arguments = ["--standalone", *FEW, "epochs=2", "name=run"]
    agent = torchrun(*arguments, cwd=tmp_path)
    assert agent.wait(300) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("device   cpu, 2 processes") == said.count("\ntest     accuracy ") == 1
    run = tmp_path / "checkpoints" / "run"
    assert len((run / "metrics.csv").read_text().splitlines()) == 3 and len(last(run)["random"]["others"]) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "run"]


@pytest.mark.slow
def test_torchrun_starts_a_run_anew_that_goes_on(tmp_path: Path) -> None:
    """The command of the README; the second process is killed once the run has saved its first epoch."""
    arguments = ["--standalone", "--max-restarts=3", *FEW, "epochs=30", "checkpoint.every_steps=1", "name=run"]
    agent = torchrun(*arguments, cwd=tmp_path)
    run = tmp_path / "checkpoints" / "run"
    while not (run / "last.pt").exists():
        time.sleep(0.05)
        assert agent.poll() is None, (tmp_path / "log").read_text()
    os.kill(members(agent)[1], signal.SIGKILL)
    assert agent.wait(300) == 0
    said = (tmp_path / "log").read_text()
    assert said.count("resumed  in epoch ") == 1 and said.count("\ntest     accuracy ") == 1
    assert len((run / "metrics.csv").read_text().splitlines()) == 31
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "run"]


@pytest.mark.slow
def test_ten_kills_at_random(tmp_path: Path) -> None:
    """A random one of three processes is killed at a random moment: ten runs end with the bits of one left alone."""
    draw, began = random.Random(time.time_ns()), time.monotonic()
    few = ["--standalone", "--max-restarts=3", *FEW, "epochs=40", "checkpoint.every_steps=3"]
    assert torchrun(*few, "name=calm", cwd=tmp_path, count=3).wait(300) == 0
    took, lost = time.monotonic() - began, list[str]()
    calm = last(tmp_path / "checkpoints" / "calm")
    for number in range(30):
        agent = torchrun(*few, f"name=run{number}", cwd=tmp_path, name=f"log{number}", count=3)
        moment = draw.uniform(2, took)
        time.sleep(moment)
        alive = members(agent) if agent.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            if alive:
                os.kill(victim := draw.choice(alive), signal.SIGKILL)
                lost.append(f"rank {alive.index(victim)} after {moment:.1f} s")
        code = agent.wait(200)
        said = (tmp_path / f"log{number}").read_text()
        assert code == 0 and "terminate called" not in said, said
        found = last(tmp_path / "checkpoints" / f"run{number}")
        assert found["progress"]["epoch"] == 41
        assert all(torch.equal(tensor, found["model"][name]) for name, tensor in calm["model"].items()), number
        assert gone(alive)
        if len(lost) == 10:
            break
    print(f"one alone took {took:.1f} s; killed: {', '.join(lost)}")
    assert len(lost) == 10


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "the second process"])
@pytest.mark.parametrize("restarts", [0, 2])
def test_sigterm_saves_the_same_step_and_ends_all(tmp_path: Path, to: str, restarts: int) -> None:
    few = ["--standalone", f"--max-restarts={restarts}", *FEW, "epochs=10000", "name=run"]
    agent = torchrun(*few, cwd=tmp_path, count=3)
    run = tmp_path / "checkpoints" / "run"
    while not (run / "last.pt").exists():
        time.sleep(0.05)
    alive = members(agent)
    os.kill(agent.pid if to == "torchrun" else alive[1], signal.SIGTERM)
    assert agent.wait(120) != 0
    said = (tmp_path / "log").read_text()
    assert said.count("error: ") == 1
    progress = last(run)["progress"]
    assert f"error: stopped by SIGTERM in epoch {progress['epoch']}, step {progress['batch']};" in said
    assert gone(alive) and json.loads((run / "end.json").read_text())["state"] == "stopped"
    if to != "torchrun" and restarts == 0:
        assert "exitcode  : 143" in said


@pytest.mark.slow
def test_two_machines_are_as_one(tmp_path: Path) -> None:
    """Two torchruns that meet on this one, one process each, and one torchrun with two."""
    few = [*FEW, "epochs=3"]
    assert torchrun("--standalone", *few, "name=one", cwd=tmp_path).wait(300) == 0
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{processes.free_port()}", "--rdzv-id=7"]
    agents = [
        torchrun(*meeting, f"--node-rank={node}", *few, "name=two", cwd=tmp_path, name=f"log{node}", count=1)
        for node in range(2)
    ]
    assert [agent.wait(300) for agent in agents] == [0, 0]
    one, two = (last(tmp_path / "checkpoints" / name) for name in ("one", "two"))
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "one", "two"]
