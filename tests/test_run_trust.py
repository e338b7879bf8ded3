"""What a stranger's file says is data: nothing it names is imported, opened, fetched or adopted; no work is endless."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Call
from test_run_checkpoint import refused, small

from engine.config import Setting, known_settings
from engine.errors import RequestError
from engine.run import archive, checkpoint, trust

QUICK = ["dataset.limit=40", "epochs=1", "limit_batches=1", "model.hidden=[3]"]


def run_made_elsewhere(tmp_path: Path, name: str = "theirs", **changes: Any) -> Path:
    """The directory of a run in which a stranger changed the configuration at dotted names."""
    directory = tmp_path / "checkpoints" / name
    file = directory / ".hydra" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        target = config
        for step in path:
            target = target.setdefault(step, {})
        target[last] = value
    file.write_text(yaml.safe_dump(config))
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "dataset",
    [
        {"_target_": "datasets.main", "config": {"dataset": {"_target_": "os.system", "command": "touch it-ran"}}},
        {"_target_": "engine.build.build", "settings": {"_target_": "os.system", "command": "touch it-ran"}},
        {"_target_": "engine.build.locate", "target": "canary.module", "option": ""},
        {"_target_": "datasets.fashion_mnist", "root": "."},
        {"_target_": "datasets.digits", "command": "touch it-ran"},
    ],
)
def test_a_data_set_is_an_option_with_the_target_of_its_yaml(
    call: Call, tmp_path: Path, dataset: dict[str, Any]
) -> None:
    own = small()["config"]["dataset"]
    torch.save(small(config__dataset={**own, **dataset}), tmp_path / "evil.pt")
    assert "evil.pt" in call("evaluate", "checkpoint=evil.pt").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


@pytest.mark.parametrize(
    ("target", "is_there"),
    [
        ("models.mlp.MLP", True),
        ("torchvision.models.squeezenet1_1", True),
        ("torchvision.models.squeezenet.squeezenet1_1", True),
        ("models.mlp.nn.Linear", False),  # what a file of models/ has only imported
        ("models.resnet18.resnet", False),
        ("models.torchvision.VisionTransformer", False),
        ("models.resnet.models.resnet18", False),
        ("models.mlp", False),
        ("models.MLP", False),
        ("torchvision.models.ResNet", False),  # takes classes as arguments
        ("torchvision.models.detection.fasterrcnn_resnet50_fpn", False),
        ("torchvision.models.detection.faster_rcnn.fasterrcnn_resnet50_fpn", False),
        ("torchvision.models.fasterrcnn_resnet50_fpn", False),
        ("torchvision.models.quantization.resnet.resnet18", False),
        ("torchvision.models.get_model", False),
        ("datasets.main", False),
        ("engine.build.build", False),
        ("train.main", False),
    ],
)
def test_which_models_without_a_yaml_are_there(target: str, is_there: bool) -> None:
    config = {"model": {"_target_": target}, "choices": {"model": "mine"}}
    if is_there:
        assert callable(trust.target_of("model", config, Path("a.pt"))[0])
    else:
        with pytest.raises(RequestError, match=r"a\.pt"):
            trust.target_of("model", config, Path("a.pt"))


NO_OPTIONS: list[dict[str, Any]] = [
    {"+hydra.callbacks.x": "y"},
    {"hydra.searchpath": "[file:///tmp]"},
    {"--config-dir": "elsewhere"},
    {"hydra/launcher": "joblib"},
    {"criterion": "../../elsewhere/evil"},
    {"criterion": "/tmp/evil"},
    {"criterion": ["cross_entropy"]},
    {"dataset": "_base"},
    {"model": "mlp,cnn"},
    {"logger": ["csv", "../csv"]},
    {"logger": [["csv"]]},
    {"logger": ["csv", None]},
    {"optimizer": {"a": 1}},
    {"model": 7},
]


def test_choices_of_a_run_are_options_of_the_groups_here(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=theirs", *QUICK).code == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.yaml").write_text("_target_: os.system\ncommand: touch it-ran\n")
    own = yaml.safe_load((tmp_path / "checkpoints/theirs/.hydra/config.yaml").read_text())["choices"]
    for choices in NO_OPTIONS:
        run_made_elsewhere(tmp_path, choices={**own, **choices})
        said = call("train", "resume=checkpoints/theirs", "epochs=2").error
        assert ("which configs/ does not have" in said or "is no name" in said) and len(said) < 500, choices
        assert not (tmp_path / "it-ran").exists(), choices


def test_a_function_that_a_run_names_is_not_imported(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=theirs", *QUICK).code == 0
    run_made_elsewhere(tmp_path, dataset__target_transform="canary_module.function")
    said = call("train", "resume=checkpoints/theirs", "epochs=2").error
    assert "dataset.target_transform" in said and "made elsewhere" in said
    run_made_elsewhere(tmp_path, dataset__target_transform=None)


def test_where_metrics_go_is_not_taken_from_a_run(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=theirs", *QUICK).code == 0
    directory = run_made_elsewhere(tmp_path)
    config = yaml.safe_load((directory / ".hydra" / "config.yaml").read_text())
    known = known_settings("train", {**config["choices"], "logger": ["csv", "mlflow", "wandb"]})
    logger = {"mlflow": {"uri": "http://elsewhere", "pictures": False}, "wandb": {"mode": "online"}}
    here = {"mlflow": {"uri": "sqlite:///checkpoints/mlflow.db", "pictures": True}, "wandb": {"mode": "offline"}}
    taken, left = trust.taken_over({"logger": here}, {"logger": logger}, [], directory, known, ours=False)
    assert taken == {} and len(left) == 3
    taken, left = trust.taken_over({"logger": here}, {"logger": logger}, [], directory, known, ours=True)
    assert taken["logger.mlflow.uri"] == "http://elsewhere" and left == []


def test_a_link_in_a_run_does_not_lead_writing_elsewhere(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=theirs", *QUICK).code == 0
    directory = tmp_path / "checkpoints" / "theirs"
    for name in ("train.log", ".lock", "metrics.csv", ".hydra"):
        copy = tmp_path / "checkpoints" / f"with{name}"
        shutil.copytree(directory, copy)
        outside = tmp_path / f"outside{name}"
        (copy / name).rename(outside)
        (copy / name).symlink_to(outside)
        before = outside.read_bytes() if outside.is_file() else (outside / "config.yaml").read_bytes()
        assert "is a link" in call("train", f"resume={copy}", "epochs=2").error
        assert before == (outside.read_bytes() if outside.is_file() else (outside / "config.yaml").read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (3, True),
        (0.5, True),
        (None, True),
        ([64, 64], True),
        ("gelu", True),
        ("os.system", False),
        ("a/b", False),
        ("~", False),
        ("http://x", False),
        ("C:x", False),
        (10**9, False),
        ([1] * 300_000, False),
        ({"a": {"b": "c.d"}}, False),
        (float("inf"), False),
    ],
)
def test_a_value_is_a_number_or_a_word(value: Any, taken: bool) -> None:
    setting = Setting("model.x", "relu", "any", "", True, "")
    assert trust.is_data(setting, value) is taken


@pytest.mark.parametrize("name", ["dataset.root", "dataset.annotations_file", "dataset.mine", "device", "name"])
def test_no_text_for_a_data_set_comes_from_a_file(name: str) -> None:
    assert not trust.is_data(Setting(name, "data", "str", "", True, ""), "secrets")
    assert trust.is_data(Setting(name, "data", "str", "", True, ""), "data")  # the same as here
    assert trust.is_data(Setting(name, "a", "str", "one of a, b", True, ""), "b") is (name != "device")


def test_paths_are_taken_from_a_checkpoint_that_was_made_here_only(call: Call, tmp_path: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / "photos" / label / f"{number}.png")
    folder = ["dataset=image_folder", "dataset.root=photos", "epochs=1", "num_workers=0", "model.hidden=[3]"]
    assert call("train", "name=mine", *folder).code == 0
    assert call("evaluate").code == 0  # as typed when it was trained
    said = call("evaluate", "dataset.cache=true")
    assert said.code == 0 and "dataset.cache=true: not used" in said.out and not (tmp_path / "data").exists()
    assert call("train", "resume=latest", "epochs=2").code == 0
    saved = torch.load(tmp_path / "checkpoints/mine/best.pt", weights_only=True)
    saved["config"]["seed"] = 7
    torch.save(saved, tmp_path / "changed.pt")
    assert "dataset.root=photos" in call("evaluate", "checkpoint=changed.pt").error
    assert call("evaluate", "checkpoint=changed.pt", "dataset.root=photos", "output=out.json").code == 0
    assert json.loads((tmp_path / "out.json").read_text())["samples"] == 2
    run_made_elsewhere(tmp_path, "mine", seed=7)
    assert "say dataset.root=photos" in call("train", "resume=checkpoints/mine", "epochs=3").error


def test_the_first_line_of_a_file_is_not_told(call: Call, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish,x\n")
    listed = {"annotations_file": "secret", "img_dir": ".", "_target_": "datasets.csv_images"}
    own = small()["config"]["dataset"]
    changed = {"config__dataset": {**own, **listed}, "config__choices__dataset": "csv_images"}
    torch.save(small(**changed), tmp_path / "evil.pt")
    said = call("evaluate", "checkpoint=evil.pt")
    assert "swordfish" not in said.out + said.err and "dataset.annotations_file=secret" in said.error


def test_a_model_is_not_fetched_to_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrained` of a model of one's own means what it does to the model, not that weights are fetched again."""
    import models

    module = tmp_path / "fetching.py"
    module.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, input_shape, num_classes, pretrained):\n"
        "        assert not pretrained, 'it would fetch'\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(64, num_classes)\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(trust, "ROOT", tmp_path)
    (tmp_path / "models").symlink_to(tmp_path)
    config = {"_target_": "models.fetching.Net", "pretrained": True}
    saved = small(model=torch.nn.Linear(64, 10).state_dict(prefix="head."), config__model=config)
    saved["config"]["choices"]["model"] = "fetching"
    assert checkpoint.build_model(saved, Path("a.pt")).head.out_features == 10


def test_a_signature_holds_for_the_configuration_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"a": [1, 2.5, None], "b": {"c": "d"}}
    sign = trust.signature(config)
    assert trust.is_ours(config, sign) and trust.is_ours({"b": {"c": "d"}, "a": [1, 2.5, None]}, sign)
    assert not trust.is_ours({**config, "e": 1}, sign)
    assert not any(trust.is_ours(config, other) for other in ("", None, 7, sign[:-1], b"", [sign]))
    key = Path(os.environ["XDG_DATA_HOME"]) / "image-classifier-training" / "key"
    assert key.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    assert not trust.is_ours(config, sign) and not (tmp_path / "another").exists()  # looking makes no key
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "a-file"))
    assert trust.signature(config) == "" and not trust.is_ours(config, "")


# ---------------------------------------------------------------------------------------------------------------------
# Work before trust is bounded


def shared(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] * 10
    return value


def with_pickle(path: Path, pickled: bytes, more: int = 0) -> None:
    """An archive as torch.save writes it, with this pickle in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as records:
        records.writestr("archive/data.pkl", pickled)
        for number in range(more):
            records.writestr(f"archive/{number}", b"")


PAIRS = b"".join(b"K\x01M" + number.to_bytes(2, "little") + b"\x86" for number in range(1000))
HOSTILE_PICKLES = {
    "a memo of 2^31 places": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text said to have 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 2 GB, made by a call": pickle.dumps({"a": bytearray(3)}, protocol=2).replace(
        b"K\x03", b"J\x00\x00\x00\x70"
    ),
    "a list that is copied over and over": b"\x80\x02](" + PAIRS + b"e0ccollections\nOrderedDict\n(K\x01tR.",
    "a call of a call": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.",
    "an instance": b"\x80\x02(i__main__\nA\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "attributes": b"\x80\x02]}b.",
    "an empty stack": b"\x80\x020.",
    "no end": b"\x80\x02}",
    "a set": b"\x80\x04\x8f.",
    "a key that is hashed for ever": b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40)) + b"K\x01s.",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_pickle_can_call_and_allocate_nothing(tmp_path: Path, name: str) -> None:
    with_pickle(tmp_path / "evil.pt", HOSTILE_PICKLES[name])
    assert "not a checkpoint" in refused(tmp_path / "evil.pt")


def layers(count: int) -> dict[str, Any]:
    return small(config__model={"_target_": "models.mlp.MLP", "hidden": [3] * count, "dropout": 0.0})


BOUNDED: dict[str, Callable[[Path], None]] = {
    "shared lists": lambda path: torch.save(small(config__shared=shared(28)), path),
    "a list in itself": lambda path: torch.save(small(config__shared=(lambda a: a.append(a) or a)([])), path),
    "20,000 layers": lambda path: torch.save(layers(20_000), path),
    "999 layers": lambda path: torch.save(layers(999), path),
    "a layer of 10^9": lambda path: torch.save(small(config__model__hidden=[10**9]), path),
    "an image of 65,000 squared": lambda path: torch.save(small(input_shape=[1, 65_000, 65_000]), path),
    "the same class twice": lambda path: torch.save(small(classes=["a"] * 10), path),
    "40,000 records": lambda path: with_pickle(path, pickle.dumps({}, protocol=2), more=40_000),
    "a model of 10^9 layers": lambda path: torch.save(
        small(config__model={"_target_": "models.layered.Net", "depth": 10**9}, config__choices__model="layered"), path
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_a_file_asks_for_is_bounded(tmp_path: Path, name: str) -> None:
    BOUNDED[name](tmp_path / "evil.pt")
    assert len(refused(tmp_path / "evil.pt")) < 600


def test_building_a_model_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are copies of one, as in torch's TransformerEncoder, are counted by nobody while they are made."""
    from copy import deepcopy

    from torch import nn

    def endless(input_shape: Any, num_classes: int, depth: int) -> nn.Module:
        layer = nn.Linear(1, 1)
        return nn.Sequential(*[deepcopy(layer) for _ in range(10**9)])

    monkeypatch.setattr(trust, "target_of", lambda group, config, where: (endless, None))
    monkeypatch.setattr(checkpoint, "FIRST_SECONDS", 0.2)
    saved = small(config__model={"_target_": "models.endless", "depth": 1})
    with pytest.raises(RequestError, match="takes too long to build"):
        checkpoint.build_model(saved, Path("a.pt"))


def test_yaml_of_a_run_is_bounded(call: Call, tmp_path: Path) -> None:
    directory = tmp_path / "run" / ".hydra"
    directory.mkdir(parents=True)
    anchors = [
        "a0: &a0 [x, x]",
        *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)),
        "choices: {model: mlp}",
    ]
    for text in ("\n".join(anchors), "[" * 10_000, "a: " * 10_000, "choices: [1]", "\x00", "x" * (1 << 25)):
        (directory / "config.yaml").write_text(text)
        assert "not a run's configuration" in call("train", "resume=run").error
    (directory / "config.yaml").unlink()
    os.mkfifo(directory / "config.yaml")
    assert "config.yaml is a link or no file" in call("train", "resume=run").error


@pytest.mark.parametrize("what", ["a FIFO", "a device", "a folder"])
def test_a_checkpoint_is_a_regular_file(call: Call, tmp_path: Path, what: str) -> None:
    file = tmp_path / "evil.pt"
    {"a FIFO": os.mkfifo, "a device": lambda p: p.symlink_to("/dev/zero"), "a folder": Path.mkdir}[what](file)
    assert "evil.pt" in call("evaluate", "checkpoint=evil.pt").error


# ---------------------------------------------------------------------------------------------------------------------
# What honest files hold comes back


def test_whatever_torch_saves_as_plain_data_comes_back() -> None:
    base = torch.arange(24.0).view(4, 6)
    plain = {
        "view": base[1:3, 2:4],
        "transposed": base.t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
        "parameter": torch.nn.Parameter(base.clone()),
        "bfloat16": base.bfloat16(),
        "bool": base > 3,
        "channels_last": torch.arange(120).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        7: [1, 2.5, None, True, False, "é\n", -5, 2**40, -(2**70), (1, 2, 3, 4, 5), (), {}, []],
    }
    raw = io.BytesIO()
    torch.save(plain, raw)
    path = Path(os.environ["XDG_DATA_HOME"]) / "plain.pt"
    path.write_bytes(raw.getvalue())
    found, expected = archive.load(path), torch.load(path, weights_only=True)
    assert found[7] == expected[7] and list(found) == list(plain)
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride(), name
            assert found[name].dtype == tensor.dtype and found[name].storage_offset() == tensor.storage_offset()


# ---------------------------------------------------------------------------------------------------------------------
# What stands for more than it holds


def test_what_is_shared_counts_as_often_as_it_is_met(tmp_path: Path) -> None:
    storage = torch.zeros(1000, 1000)
    text = "x" * (1 << 20)
    asked = {
        "a name of many parts": small(model={"module." * 200_000 + "a": storage}),
        "one text a hundred times": small(config__texts=[text] * 100),
        "one storage a hundred times": small(model={f"a{n}": storage for n in range(100)}),
        "40,000 tensors": small(model={f"a{n}": storage[0, :1] for n in range(40_000)}),
    }
    for name, content in asked.items():
        torch.save(content, tmp_path / "evil.pt")
        assert len(refused(tmp_path / "evil.pt")) < 600, name


def test_names_in_a_pickle_are_cut(tmp_path: Path) -> None:
    long = b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
    with_pickle(tmp_path / "evil.pt", b"\x80\x04}" + long + b"\x94" + long + b"\x93" + b"0h\x00h\x00\x930" * 500 + b".")
    assert len(refused(tmp_path / "evil.pt")) < 600


def test_a_table_of_contents_is_bounded_wherever_its_size_stands(tmp_path: Path) -> None:
    """Python reads the record for large archives wherever its locator stands, whatever the ordinary record says."""
    path = tmp_path / "evil.pt"
    with_pickle(path, pickle.dumps({}, protocol=2), more=70_000)  # more than the ordinary record can count
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    assert content[end - 20 : end - 16] == b"PK\x06\x07"
    content[end + 12 : end + 16] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    assert "table of contents" in refused(path)


def test_a_stranger_does_not_choose_how_much_memory_a_batch_takes(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(config__batch_size=4096)["config"]
    asked = trust.evaluation_of(config, [3, 256, 256], Path("a.pt"), None, ours=False)
    assert asked["batch_size"] == (1 << 24) // (3 * 256 * 256) == 85 and "85 instead of 4096" in capsys.readouterr().err
    assert trust.evaluation_of(config, [3, 256, 256], Path("a.pt"), 4096, ours=False)["batch_size"] == 4096  # typed
    assert trust.evaluation_of(config, [3, 256, 256], Path("a.pt"), None, ours=True)["batch_size"] == 4096
    config["dataset"]["eval_transforms"] = [
        {"Resize": {"size": [4000, 4000]}},
        *[{"GaussianBlur": {"kernel_size": 63}}] * 3,
        {"Resize": {"size": [8, 8]}},
    ]
    with pytest.raises(RequestError, match="long at work"):
        trust.evaluation_of(config, [3, 8, 8], Path("a.pt"), 1, ours=False)


def test_a_confusion_matrix_of_a_stranger_is_bounded(call: Call, tmp_path: Path) -> None:
    classes = [str(number) for number in range(3000)]
    torch.save(small(classes=classes), tmp_path / "evil.pt")
    assert "3,000 classes" in call("evaluate", "checkpoint=evil.pt").error


def test_numbers_and_tables_of_a_run_are_bounded(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=good", *QUICK).code == 0
    file = tmp_path / "checkpoints" / "good" / ".hydra" / "config.yaml"
    text = file.read_text()
    for number in ("0x" + "f" * 10_000, "1:" * 10_000 + "1", "9" * 10_000, "-" + "1" * 5000):
        other = shutil.copytree(tmp_path / "checkpoints" / "good", tmp_path / "checkpoints" / "odd")
        (other / ".hydra" / "config.yaml").write_text(text.replace("seed: 0", f"seed: {number}"))
        answer = call("evaluate", "--runs")
        assert answer.code == 0 and "damaged" in answer.out and "good" in answer.out and len(answer.out) < 3000
        assert "digits" in call("train", f"resume={other}", "epochs=2").error
        shutil.rmtree(other)
    other = shutil.copytree(tmp_path / "checkpoints" / "good", tmp_path / "checkpoints" / "long")
    (other / "metrics.csv").write_text("epoch\n" + "1\n" * 200_000)
    answer = call("evaluate", "--runs")
    assert answer.code == 0 and "damaged" in answer.out and "good" in answer.out


# ---------------------------------------------------------------------------------------------------------------------
# Folders of a sweep, and of caches


def test_links_in_a_sweep_do_not_lead_writing_elsewhere(call: Call, tmp_path: Path) -> None:
    arguments = ["-m", "name=s", "seed=0,1", *QUICK]
    outside = tmp_path / "outside"
    outside.write_text("mine")
    sweep = tmp_path / "checkpoints" / "s"
    for name in ("multirun.yaml", "jobs.jsonl", "sweep.csv", "sweep.png"):
        sweep.mkdir(parents=True)
        (sweep / "sweep.json").write_text("{}")
        (sweep / name).symlink_to(outside)
        assert "is a link" in call("train", *arguments).error and outside.read_text() == "mine", name
        shutil.rmtree(sweep)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sweep.json").write_text("{}")
    sweep.symlink_to(elsewhere)
    assert "is taken" in call("train", *arguments).error and [path.name for path in elsewhere.iterdir()] == [
        "sweep.json"
    ]


def test_a_run_with_links_is_not_gone_on_with_by_a_sweep(call: Call, tmp_path: Path) -> None:
    arguments = ["-m", "name=s", "seed=0,1", *QUICK]
    assert call("train", *arguments).code == 0
    sweep, outside = tmp_path / "checkpoints" / "s", tmp_path / "outside"
    outside.write_text("mine")
    run = next(path for path in sorted(sweep.iterdir()) if path.is_dir())
    (run / "summary.json").unlink()
    journal = (sweep / "jobs.jsonl").read_text().splitlines()
    (sweep / "jobs.jsonl").write_text("\n".join(line for line in journal if '"finished"' not in line) + "\n")
    for name in (".lock", "train.log"):
        (run / name).unlink()
        (run / name).symlink_to(outside)
    answer = call("train", *arguments)
    assert answer.code == 0 and outside.read_text() == "mine", answer.err


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run that goes on


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"environment": ["x"]},
        {"progress.epoch": -(10**9)},
        {"progress.epoch": 7},
        {"progress.batch": -3},
        {"progress.history": [{"evil": 1}]},
        {"progress.history": ["x"]},
        {"progress.best": {"val_accuracy": "y"}},
        {"progress.lr": float("nan")},
        {"scheduler.steps": "many"},
        {"tally.losses": torch.zeros(3)},
        {"optimizer.state.0.momentum_buffer": torch.zeros(7)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_that_no_run_writes_is_refused(
    call: Call, tmp_path: Path, changes: dict[str, Any], honest_run: Callable[[], Path]
) -> None:
    directory = honest_run()
    saved = torch.load(directory / "last.pt", weights_only=True)
    for name, value in changes.items():
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        target = saved
        for key in path:
            target = target[key]
        target[last] = value
    torch.save(saved, directory / "last.pt")
    assert "holds no run that can go on" in call("train", "resume=checkpoints/honest", "epochs=2").error


def test_what_a_state_says_of_its_machine_forges_no_line(call: Call, honest_run: Callable[[], Path]) -> None:
    directory = honest_run()
    saved = torch.load(directory / "last.pt", weights_only=True)
    saved["environment"]["python"] = "\nforged line\n" + "x" * 10_000
    torch.save(saved, directory / "last.pt")
    answer = call("train", "resume=checkpoints/honest", "epochs=2")
    assert answer.code == 0 and not any(line.startswith("forged") for line in answer.out.splitlines())
    assert max(map(len, answer.out.splitlines())) < 500


@pytest.fixture
def honest_run(call: Call, tmp_path: Path, made_once: Path) -> Callable[[], Path]:
    """Puts a run of one epoch into checkpoints/honest; it is trained for the first test only."""

    def put() -> Path:
        directory = tmp_path / "checkpoints" / "honest"
        if not (made_once / "honest").exists():
            assert call("train", "name=honest", *QUICK).code == 0
            shutil.copytree(directory, made_once / "honest")
        else:
            shutil.copytree(made_once / "honest", directory)
        return directory

    return put


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made-once")
