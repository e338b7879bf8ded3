"""Who each of several processes is, what is its own, and what they say to each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import processes
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import distributed
from engine.data import devices
from engine.errors import RequestError, RunError


@settings(deadline=None, database=None)  # no time to keep on a busy machine, and no folder in the tree
@given(count=st.integers(0, 10_000), world_size=st.integers(1, 200))
def test_slices_make_up_the_whole(count: int, world_size: int) -> None:
    slices = [distributed.own_slice(count, rank, world_size) for rank in range(world_size)]
    assert [place for own in slices for place in range(count)[own]] == list(range(count))
    sizes = [own.stop - own.start for own in slices]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_hears_itself_and_needs_no_torch() -> None:
    code = """
import sys
from engine import distributed as d
assert (d.rank(), d.world_size(), d.is_first(), d.is_launched(), d.restarts()) == (0, 1, True, False, 0)
assert (d.total(3), d.lowest(4), d.gathered(5), d.from_first(lambda: 6), d.recalled("run"), d.ended()) == (
    3, 4, [5], 6, None, None)
with d.one_before_others():
    d.start(None, {}), d.meet(), d.finish(), d.as_first([]), d.remember("run", "x"), d.leave(1)
assert d.is_ours_to_tell("x") and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2 and no RANK, MASTER_ADDR, MASTER_PORT; start several"),
        ({"WORLD_SIZE": "two"}, "the environment has WORLD_SIZE=two; expected a number, as torchrun sets it"),
        ({"WORLD_SIZE": "-2"}, "the environment has WORLD_SIZE=-2; expected a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "the environment has RANK=2 and WORLD_SIZE=2; expected a smaller rank",
        ),
    ],
)
def test_an_environment_that_no_launcher_makes(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError) as error:
        distributed.start(torch.device("cpu"), {})
    assert str(error.value).startswith(says)


def told() -> dict[str, Any]:
    """What a process of three hears."""
    rank = distributed.rank()
    agreement, heard = distributed.Agreement(), []
    for number in (0, 5, 0):
        heard.append(agreement.heard())
        agreement.say(number if rank == 1 else 0)
    heard.append(agreement.heard())
    tensors = [torch.full((2,), rank), torch.tensor([float(rank)])]
    distributed.as_first(tensors)
    with distributed.one_before_others():
        entered = time.monotonic()
        time.sleep(0.0 if rank else 0.1)
        left = time.monotonic()
    return {
        "heard": heard,
        "total": distributed.total(torch.tensor([rank, 1.0])).tolist(),
        "lowest": distributed.lowest(7 - rank),
        "gathered": distributed.gathered({"rank": rank}),
        "from_first": distributed.from_first(lambda: f"of rank {rank}"),
        "as_first": [tensor.tolist() for tensor in tensors],
        "inside": (entered, left),
    }


def test_what_several_processes_hear() -> None:
    several = processes.group(3, told)
    for rank, found in enumerate(several):
        assert found["heard"] == [0, 0, 5, 0]  # a step later
        assert found["total"] == [3.0, 3.0] and found["lowest"] == 5
        assert found["gathered"] == [{"rank": other} for other in range(3)]
        assert found["from_first"] == "of rank 0" and found["as_first"] == [[0, 0], [0.0]]
        assert rank == 0 or found["inside"][0] >= several[0]["inside"][1]  # on the machine's clock


def test_the_first_to_fail_tells_and_the_others_know_what(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.launcher() as variables:
        for name, value in (variables | processes.numbers(0, 2)).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "_reached", [])
        lost = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        assert str(distributed.as_ours(lost)).startswith("rank 0 has lost another process, which said nothing")
        assert distributed.is_ours_to_tell("a full disk") and not distributed.is_ours_to_tell("another")
        ours = distributed.as_ours(lost)
        assert type(ours) is RunError and str(ours) == "a full disk"
        bug = RuntimeError("a bug")
        assert distributed.as_ours(bug) is bug
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert distributed.ended() is None  # a failure at work may not come again
        assert distributed.is_ours_to_tell("a wrong request", for_good=2)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        assert distributed.ended() == 2
        distributed.remember("run", "checkpoints/run")
        assert distributed.recalled("run") == "checkpoints/run" and distributed.recalled("other") is None


@pytest.mark.parametrize(
    ("name", "gpus", "mps", "taken"),
    [
        ("auto", 0, False, "cpu"),
        ("cpu", 4, False, "cpu"),
        ("auto", 4, False, "cuda:1"),
        ("cuda", 2, False, "cuda:1"),
        ("auto", 1, False, "device=auto: 2 processes here and 1 GPU; --nproc-per-node=1, or device=cpu"),
        ("cuda", 0, False, "device=cuda: 2 processes here and 0 GPUs; --nproc-per-node=1, or device=cpu"),
        ("cuda:0", 2, False, "device=cuda:0: 4 processes cannot share it; device=cuda gives each a GPU of its own"),
        ("mps", 0, True, "device=mps: 4 processes cannot share it;"),
    ],
)
def test_each_process_has_its_own_device(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, mps: bool, taken: str
) -> None:
    """The third of four processes, two on each machine: the second one of its own."""
    for variable, value in {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if taken.startswith("device="):
        with pytest.raises(RequestError) as error:
            devices.choose_device(name)
        assert str(error.value).startswith(taken)
    else:
        assert devices.choose_device(name) == torch.device(taken)


def test_each_process_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(9))
    for variable, value in {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(variable, str(value))
    try:
        assert devices.cores() == 2
        devices.use_threads(None)
        assert torch.get_num_threads() == 2  # not the one that torchrun sets
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")
        assert devices.cores() == 1
    finally:
        torch.set_num_threads(before)


def test_a_setting_that_differs_is_named() -> None:
    first = json.loads('{"a": 1, "b": {"c": [1, 2], "d": 3}}')
    other = json.loads('{"a": 1, "b": {"c": [1, 3], "d": 3}}')
    assert distributed._difference(first, other, 2) == "b.c is [1, 2] in rank 0, [1, 3] in rank 2"
