"""A checkpoint is data: damage is told in one line, and nothing in a hostile file is executed or leaked."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run, start
from torch import nn

from engine.errors import RequestError
from engine.run import checkpoint


def small(**changes: Any) -> dict[str, Any]:
    """A whole checkpoint of a tiny model, with changes at dotted names."""
    model = {"_target_": "models.mlp.MLP", "hidden": [3], "dropout": 0.0}
    dataset = {
        "_target_": "datasets.digits",
        "val_fraction": 0.1,
        "limit": None,
        "train_transforms": [],
        "eval_transforms": [],
    }
    weights = {
        "linear_relu_stack.0.weight": torch.randn(3, 64, generator=torch.Generator().manual_seed(0)),
        "linear_relu_stack.0.bias": torch.zeros(3),
        "linear_relu_stack.2.weight": torch.ones(10, 3),
        "linear_relu_stack.2.bias": torch.zeros(10),
    }
    found: dict[str, Any] = {
        "format": 1,
        "model": weights,
        "classes": [str(i) for i in range(10)],
        "input_shape": [1, 8, 8],
        "config": {
            "model": model,
            "dataset": dataset,
            "choices": {"model": "mlp", "dataset": "digits"},
            "batch_size": 64,
            "seed": 0,
            "limit_batches": None,
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        target = found
        for key in path:
            target = target[key]
        target[last] = value
    return found


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(RequestError) as error:
        checkpoint.build_model(checkpoint.read(path), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a.pt", small())
    saved = checkpoint.read(tmp_path / "a.pt")
    model = checkpoint.build_model(saved, tmp_path / "a.pt")
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_every_truncation_and_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    checkpoint.write(whole, {"model": {"weight": torch.arange(6.0)}})
    content = whole.read_bytes()
    path = tmp_path / "damaged.pt"
    for length in range(0, len(content), 7):  # every length with -m slow
        path.write_bytes(content[:length])
        assert "damaged" in refused(path)
    draw = random.Random(0)
    for _ in range(150):
        check_flip(path, content, draw)


@pytest.mark.slow
def test_every_truncation_and_a_thousand_flipped_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    checkpoint.write(whole, {"model": {"weight": torch.arange(6.0)}})
    content = whole.read_bytes()
    path = tmp_path / "damaged.pt"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "damaged" in refused(path)
    draw = random.Random(1)
    harmless = sum(check_flip(path, content, draw) for _ in range(1000))
    print(f"{len(content)} truncations refused; of 1000 flipped bytes {harmless} harmless, the others refused")


def check_flip(path: Path, content: bytes, draw: random.Random) -> bool:
    """Flip a byte; whether it was harmless. Anything but that or a refusal fails."""
    damaged = bytearray(content)
    damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
    path.write_bytes(damaged)
    try:
        found = checkpoint.read(path)
    except RequestError as error:
        assert "\n" not in str(error)
        return False
    assert found["model"].keys() == {"weight"} and torch.equal(found["model"]["weight"], torch.arange(6.0))
    return True


class Shell:
    """Pickled, it asks the reader to run a command that leaves a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def hostile(mark: str) -> dict[str, Any]:
    """Checkpoints made to hurt, as objects to torch.save or bytes; `mark` is the file that appears if one succeeds."""
    touch = f"touch {mark}"
    shells: dict[str, Any] = {
        f"target {target}": small(config__model={"_target_": target, **arguments})
        for target, arguments in {
            "os.system": {"command": touch},
            "posix.system": {"command": touch},
            "subprocess.run": {"args": ["touch", mark]},
            "subprocess.Popen": {"args": ["touch", mark]},
            "builtins.exec": {"object": f"open({mark!r}, 'w')"},
            "builtins.eval": {"source": f"open({mark!r}, 'w')"},
            "builtins.open": {"file": mark, "mode": "w"},
            "pathlib.Path.touch": {"self": mark},
            "models.resnet.nn.Module": {},
            "models.mlp.nn.Linear": {"in_features": 1, "out_features": 1},
            "models.mlp.pairwise": {"iterable": [1, 2]},
            "models.mlp.MLP.__init__.__globals__": {},
            "models.os.system": {"command": touch},
            "datasets.Path": {},
            "datasets.gzip.os.system": {"command": touch},
            "datasets.pickle.loads": {"data": touch},
            "engine.data.download.download": {"name": "MNIST", "root": mark, "layout": ""},
            "engine.run.checkpoint.os.system": {"command": touch},
            "torchvision.models.os.system": {"command": touch},
            "torchvision.models.resnet.nn.Linear": {"in_features": 1, "out_features": 1},
            "torchvision.models._api.importlib.import_module": {"name": "antigravity"},
            "torchvision.models.get_model": {"name": "resnet18"},
            "torchvision.datasets.folder.default_loader": {"path": mark},
            "train.main": {"config": {}},
            "this": {},
            "models.mlp.MLP; import os": {},
        }.items()
    }
    sizes = {
        "absurd width": small(config__model__hidden=[10**9, 10**9]),
        "absurd shape": small(input_shape=[1, 10**7, 10**7]),
        "negative shape": small(input_shape=[1, -8, 8]),
        "a shape of text": small(input_shape="1x8x8"),
        "a tensor without its data": small(model__big=torch.zeros(1).expand(10**6, 10**6)),
        "a sparse tensor": small(model__sparse=torch.eye(3).to_sparse()),
        "a CSR tensor": small(model__sparse=torch.eye(3).to_sparse_csr()),
        "a quantised tensor": small(model__q=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
        "a complex tensor": small(model__linear_relu_stack={}, model__c=torch.ones(3, dtype=torch.complex64)),
        "no number of classes": small(classes=[]),
        "classes of numbers": small(classes=list(range(10))),
        "an interpolation": small(config__model__hidden="${oc.env:SECRET}"),
        "an interpolation as a key": small(config__model={"_target_": "models.mlp.MLP", "${oc.env:SECRET}": 1}),
        "a target that is no text": small(config__model={"_target_": ["os.system"]}),
        "no target": small(config__model={}),
        "a model of text": small(model="weights"),
        "weights by number": small(model={0: torch.ones(1)}),
        "another format": small(format=99),
        "no weights": {key: value for key, value in small().items() if key != "model"},
        "deep nesting": small(config__deep=nested(100)),
        "an infinite learning": small(config__model={"_target_": "models.mlp.MLP", "hidden": [float("inf")]}),
    }
    raw = io.BytesIO()
    pickle.dump(Shell(touch), raw)
    return {
        **shells,
        **sizes,
        "a module": nn.Linear(1, 1),
        "a pickle in the archive": small(model__shell=Shell(touch)),
        "a bare pickle": raw.getvalue(),
        "text": b"import os\nos.system('true')\n",
        "an empty file": b"",
        "a zip of something else": zipped({"a.txt": b"hello"}),
        "a compressed archive": zipped({"x/data.pkl": b"\0" * 10**6}, zipfile.ZIP_DEFLATED),
    }


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


def test_hostile_files_are_refused_in_one_line_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    mark = tmp_path / "it-ran"
    files = hostile(str(mark))
    for number, (name, content) in enumerate(files.items()):
        path = tmp_path / f"{number}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        message = refused(path)
        assert not mark.exists(), f"{name} was executed"
        assert "swordfish" not in message, f"{name} leaked a variable"
    assert len(files) >= 30


def test_hostile_files_are_refused_on_the_command_line(tmp_path: Path) -> None:
    """Where the data set is what is named, or the values are of the wrong kind."""
    mark = tmp_path / "it-ran"
    for number, changes in enumerate(
        [
            {"config__dataset___target_": "os.system", "config__dataset__command": f"touch {mark}"},
            {"config__dataset___target_": "datasets.read_idx", "config__dataset__path": "/etc/passwd"},
            {"config__dataset": {"_target_": "datasets.digits"}},
            {"config__dataset__val_fraction": "half"},
            {"config__dataset__eval_transforms": [{"os.system": {"command": f"touch {mark}"}}]},
            {"config__dataset__limit": -5},
            {"config__batch_size": "many"},
            {"config__model___target_": "os.system", "config__model__command": f"touch {mark}"},
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(small(**changes), path)
        command = run("evaluate", f"checkpoint={path}", cwd=tmp_path)
        assert command.wait() == 2, (changes, command.out, command.err)
        assert command.err.count("\n") == 1 and "Traceback" not in command.err, command.err
        assert not mark.exists()
    assert not (tmp_path / "evaluation.json").exists()


def test_a_model_of_torchvision_needs_no_download_to_be_evaluated(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    state = squeezenet1_1(num_classes=10).state_dict()
    model = {"_target_": "torchvision.models.squeezenet1_1", "weights": "DEFAULT"}
    checkpoint.write(tmp_path / "a.pt", small(model=state, config__model=model, input_shape=[3, 64, 64]))
    built = checkpoint.build_model(checkpoint.read(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert type(built).__name__ == "SqueezeNet"


def test_prefixes_in_any_nesting_come_off() -> None:
    for name in ("module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "_orig_mod.module.module.a.b", "a._orig_mod.b"):
        assert checkpoint.strip_prefixes(name) == "a.b"
    assert checkpoint.strip_prefixes("a.module.b") == "a.module.b"


def save_for_ever(path: str) -> None:
    """Write one checkpoint after another, as fast as the disk goes."""
    state = small()
    state["model"]["ballast"] = torch.zeros(200_000)
    number = checkpoint.read(Path(path)).get("number", 0)
    while True:
        state["number"] = number = number + 1
        checkpoint.write(Path(path), state, keep=Path(path).with_name("previous.pt"))


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_saving_there_is_always_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    import signal
    import time

    draw = random.Random(0)
    path = tmp_path / "last.pt"
    checkpoint.write(path, small())
    for _ in range(kills):
        before = path.stat().st_ino
        process = start("train", cwd=tmp_path, before=save_for_ever, argument=str(path))
        while path.stat().st_ino == before:  # until it has begun to write, however busy the machine is
            assert process.process.is_alive(), process.err
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        process.signal(signal.SIGKILL)
        process.wait()
        checkpoint.read(path)
    assert checkpoint.read(path)["number"] > kills // 2
