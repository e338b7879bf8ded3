"""Exported files: whoever runs them gets what predict.py says, for images of any size; weights alone are read back."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Call
from PIL import Image
from test_predict import picture
from torch import Tensor, nn

import export
from engine.data.graph import cropped, scaled
from engine.run import checkpoint, tensors, trust
from models.mlp import MLP

CLASSES = ["bee", "cat", "dog"]
TRANSFORMS = [{"Resize": {"size": [12, 12]}}, {"Normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}]
SIZES = [(12, 12), (31, 17), (5, 40), (130, 100), (1, 1), (7, 9), (64, 200), (12, 30), (13, 12)]
NEEDS_EXTRA = "pip install '.[export]'"


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, as torch and torchvision do them


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_scaled_bytes_are_torchs_bytes(interpolation: str) -> None:
    """Bit by bit, up and down, strongly and hardly, for grey and for colour."""
    generator = torch.Generator().manual_seed(0)
    mode = "nearest-exact" if interpolation == "nearest" else interpolation
    how: dict[str, Any] = {"mode": mode} | ({} if interpolation == "nearest" else {"antialias": True})
    for before in [*SIZES, (300, 451), (2, 999)]:
        for after in [(12, 12), (224, 64), (1, 3)]:
            channels = 1 + 2 * (after[0] % 2)
            images = torch.randint(256, (2, channels, *before), generator=generator, dtype=torch.uint8)
            images[1] = 255 * (images[1] > 127)  # overshoots of bicubic are cut off
            wanted = nn.functional.interpolate(images, list(after), **how)
            assert torch.equal(scaled(images, after, interpolation), wanted), (before, after)
            wanted = nn.functional.interpolate(images / 255, list(after), **how)
            assert torch.allclose(scaled(images / 255, after, interpolation), wanted, atol=1e-5), (before, after)


def test_cropped_is_torchvisions() -> None:
    from torchvision.transforms import v2

    for before in [*SIZES, (11, 8), (8, 11)]:
        image = torch.arange(before[0] * before[1]).view(1, 1, *before).to(torch.int32) + 1
        for after in [(12, 12), (5, 8), (8, 41)]:
            assert torch.equal(cropped(image, after), v2.functional.center_crop(image, list(after))), (before, after)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint, pictures of many sizes, and what predict.py says of them


@dataclass(frozen=True)
class Place:
    """A folder with best.pt and photos/, and the probabilities that predict.py gives, by path, in order of CLASSES."""

    folder: Path
    said: dict[str, list[float]]

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def largest_difference(self, answers: Callable[[np.ndarray], Any]) -> float:
        """Of probabilities that somebody else's program gets for the same files."""
        found = []
        for path, probabilities in self.said.items():
            pixels = np.asarray(Image.open(self.folder / path))[None].copy()
            found.append(np.abs(np.asarray(answers(pixels)) - np.array([probabilities])).max())
        return float(max(found))


def write_checkpoint(path: Path, dataset: dict[str, Any]) -> None:
    """Of a model with random weights whose predictions vary from image to image; typed here."""
    torch.manual_seed(1)
    model = MLP((3, 12, 12), 3, hidden=[16])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    config = {
        "model": {"_target_": "models.mlp.MLP", "hidden": [16], "dropout": 0.0},
        "dataset": {"_target_": "datasets.image_folder", "eval_transforms": TRANSFORMS, **dataset},
        "choices": {"model": "mlp", "dataset": "image_folder"},
        "batch_size": 4,
        "seed": 0,
    }
    about = {"format": 1, "classes": CLASSES, "input_shape": [3, 12, 12], "config": config}
    checkpoint.write(path, {**about, "signature": trust.signature(config), "model": model.state_dict()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    from predict import Predictor

    folder = tmp_path_factory.mktemp("export")
    for number, (height, width) in enumerate(SIZES):
        file = folder / "photos" / CLASSES[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, height, width)).save(file)
    write_checkpoint(folder / "best.pt", {"root": str(folder / "photos"), "test_fraction": 0.5})
    paths = sorted(folder.glob("photos/*/*.png"))
    said = {}
    for prediction in Predictor(folder / "best.pt", "cpu")(paths, top_k=3):
        shares = dict(prediction.ranked)
        said[str(Path(prediction.image).relative_to(folder))] = [shares[name] for name in CLASSES]
    assert len({max(CLASSES, key=dict(zip(CLASSES, p, strict=True)).get) for p in said.values()}) > 1
    return Place(folder, said)


def check_metadata(found: dict[str, str]) -> None:
    assert json.loads(found["classes"]) == CLASSES
    assert json.loads(found["preprocessing"]) == TRANSFORMS
    assert json.loads(found["config"])["model"]["hidden"] == [16]
    assert found["input"].startswith("images: uint8 [batch, height, width, 3], red, green, blue")


def test_a_pt2_file_predicts_what_predict_does(call: Call, made: Place, tmp_path: Path) -> None:
    answer = call("export", str(made.best), "output=model.pt2")
    assert answer.code == 0, answer.err
    assert "0 predictions differ of 6 samples of the test split of image_folder" in answer.out
    extra = {"metadata.json": ""}
    graph = torch.export.load(str(tmp_path / "model.pt2"), extra_files=extra).module()
    check_metadata(json.loads(extra["metadata.json"]))
    assert made.largest_difference(lambda pixels: graph(torch.from_numpy(pixels)).detach()) < 1e-5
    several = torch.from_numpy(np.stack([picture(n, 20, 30) for n in range(5)]))
    assert torch.allclose(graph(several)[3:4], graph(several[3:4]), atol=1e-5)


def test_an_onnx_file_predicts_what_predict_does(call: Call, made: Place, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=NEEDS_EXTRA)
    runtime = pytest.importorskip("onnxruntime", reason=NEEDS_EXTRA)
    answer = call("export", f"checkpoint={made.best}", "output=model.onnx")
    assert answer.code == 0, answer.err
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    check_metadata(session.get_modelmeta().custom_metadata_map)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    assert made.largest_difference(lambda pixels: session.run(["probabilities"], {"images": pixels})[0]) < 1e-5
    several = np.stack([picture(n, 20, 30) for n in range(5)])
    assert session.run(None, {"images": several})[0].shape == (5, 3)


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [{"Resize": {"size": 14}}, {"CenterCrop": {"size": 12}}, TRANSFORMS[1]],
        [{"CenterCrop": {"size": [12, 12]}}],
        [{"Resize": {"size": [20, 9], "interpolation": "bicubic"}}, *TRANSFORMS],
        [{"Resize": {"size": 12, "interpolation": "nearest"}}],
    ],
)
def test_what_lies_before_the_network_is_what_predict_does(made: Place, tmp_path: Path, transforms: list[Any]) -> None:
    from predict import Predictor

    write_checkpoint(tmp_path / "best.pt", {"root": "gone", "eval_transforms": transforms})
    predictor = Predictor(tmp_path / "best.pt", "cpu")
    whole = export.Whole(predictor.model, predictor.settings)
    images = [torch.from_numpy(np.asarray(Image.open(made.folder / path)).copy()) for path in made.said]
    compared = 0
    for image, prediction in zip(images, predictor([image.permute(2, 0, 1) for image in images]), strict=True):
        if prediction.error is None:  # not square after Resize to the shorter side
            found = dict(zip(CLASSES, whole(image[None])[0].tolist(), strict=True))
            assert found == pytest.approx(dict(prediction.ranked), abs=1e-5)
            compared += 1
    assert compared == (2 if transforms and transforms[-1].get("Resize", {}).get("size") == 12 else len(SIZES))


# ---------------------------------------------------------------------------------------------------------------------
# Weights alone


def safetensors(state: dict[str, Tensor], metadata: dict[str, str] | None = None, **changed: Any) -> bytes:
    """A file as the format's description has it: length of the table, the table, the bytes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in state.items():
        content = tensor.numpy().tobytes()
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(content)]}
        table[name], data = entry | changed, data + content
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_evaluate_and_predict_read_exported_weights(call: Call, made: Place, tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors", reason=NEEDS_EXTRA)
    answer = call("export", str(made.best), "output=weights.safetensors")
    assert answer.code == 0, answer.err
    with package.safe_open(tmp_path / "weights.safetensors", "pt") as opened:
        check_metadata(opened.metadata())
        assert set(opened.keys()) == set(MLP((3, 12, 12), 3, hidden=[16]).state_dict())
    found, wanted = (checkpoint.read(file) for file in (tmp_path / "weights.safetensors", made.best))
    assert found.keys() == wanted.keys() and checkpoint.is_ours(found)
    assert call("evaluate", "weights.safetensors", "output=result.json", "device=cpu").code == 0
    answer = call("predict", str(made.folder / "photos"), "weights.safetensors", "output=said.json", "device=cpu")
    assert answer.code == 0, answer.err
    for prediction in json.loads((tmp_path / "said.json").read_text()):
        shares = {one["class"]: one["probability"] for one in prediction["top"]}
        said = made.said[str(Path(prediction["image"]).relative_to(made.folder))]
        assert [shares[name] for name in CLASSES] == pytest.approx(said, abs=1e-6)


def test_a_file_of_weights_without_metadata_is_a_bare_state_dict(call: Call, made: Place, tmp_path: Path) -> None:
    state = checkpoint.read(made.best)["model"]
    (tmp_path / "plain.safetensors").write_bytes(safetensors(state, {"format": "pt"}))
    found = checkpoint.read(tmp_path / "plain.safetensors")
    assert found.keys() == {"model"} and all(torch.equal(found["model"][name], state[name]) for name in state)
    assert "a bare state_dict" in call("evaluate", "plain.safetensors").error
    assert "a bare state_dict" in call("export", "plain.safetensors", "output=model.pt2").error


@pytest.mark.parametrize(
    ("dtype", "content", "numbers"),
    [
        ("F64", struct.pack("<2d", 1.5, -0.1), [1.5, -0.1]),
        ("F32", struct.pack("<2f", 1.5, -0.25), [1.5, -0.25]),
        ("F16", struct.pack("<2e", 1.5, -0.25), [1.5, -0.25]),
        ("BF16", struct.pack("<2f", 1.5, -0.25)[2:4] + struct.pack("<2f", 1.5, -0.25)[6:8], [1.5, -0.25]),
        ("I64", struct.pack("<2q", 1 << 40, -3), [1 << 40, -3]),
        ("I32", struct.pack("<2i", 1 << 20, -3), [1 << 20, -3]),
        ("I16", struct.pack("<2h", 300, -3), [300, -3]),
        ("I8", struct.pack("<2b", 100, -3), [100, -3]),
        ("U8", struct.pack("<2B", 200, 3), [200, 3]),
        ("BOOL", b"\1\0", [True, False]),
    ],
)
def test_numbers_of_every_type(dtype: str, content: bytes, numbers: list[Any], tmp_path: Path) -> None:
    """A bfloat16 is the upper half of a float of 32 bits."""
    table = json.dumps({"a": {"dtype": dtype, "shape": [2, 1], "data_offsets": [0, len(content)]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(table)) + table + content)
    found = tensors.load(tmp_path / "w.safetensors")[0]["a"]
    assert found.tolist() == [[number] for number in numbers]
    assert found.dtype.is_floating_point == ("F" in dtype) and found.element_size() == len(content) // 2


def test_tensors_that_share_a_part_of_their_bytes(tmp_path: Path) -> None:
    entries = {name: {"dtype": "U8", "shape": [12], "data_offsets": [at, at + 12]} for name, at in (("a", 0), ("b", 4))}
    table = json.dumps(entries).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(table)) + table + bytes(16))
    with pytest.raises(ValueError, match="the data of its b is not where it should be"):
        tensors.load(tmp_path / "w.safetensors")


def test_metadata_of_a_stranger_obeys_the_same_rules(call: Call, made: Place, tmp_path: Path) -> None:
    """Made elsewhere, a configuration names no paths, nothing that is not here, and no model that is not the file's."""
    saved = checkpoint.read(made.best)
    texts = checkpoint.as_metadata({**saved, "signature": ""})
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(safetensors(saved["model"], checkpoint.as_metadata(saved)))  # made here, and signed
    assert call("evaluate", file.name, "device=cpu").code == 0
    file.write_bytes(safetensors(saved["model"], texts))
    assert "paths, addresses and names are not taken from a file" in call("evaluate", file.name, "device=cpu").error
    evil = saved["config"] | {"model": {"_target_": "os.system", "command": "true"}}
    file.write_bytes(safetensors(saved["model"], texts | {"config": json.dumps(evil)}))
    assert "none of this program's" in call("predict", str(made.folder / "photos"), file.name, "device=cpu").error


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is no file of safetensors"),
        (struct.pack("<Q", 1 << 40) + b"{}", "it is no file of safetensors"),
        (struct.pack("<Q", 3) + b"{]}", "no JSON"),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "no JSON"),
        (struct.pack("<Q", 2) + b"[]", "no dictionary"),
        (struct.pack("<Q", 2) + b"{}", "no weights"),
        (struct.pack("<Q", 2) + b"{}rest", "4 bytes that belong to no tensor"),
        (safetensors({"a": torch.ones(3)})[:-1], "not where it should be"),
        (safetensors({"a": torch.ones(3)}, dtype="F8"), "no dtype, shape and data_offsets"),
        (safetensors({"a": torch.ones(3)}, shape=[4]), "no dtype, shape and data_offsets"),
        (safetensors({"a": torch.ones(3)}, shape=[-3]), "no dtype, shape and data_offsets"),
        (safetensors({"a": torch.ones(3)}, shape=[1 << 62]), "no dtype, shape and data_offsets"),
        (safetensors({"a": torch.ones(3), "b": torch.ones(3)}, data_offsets=[0, 12]), "not where it should be"),
        (safetensors({"a": torch.ones(3)}, {"checkpoint_format": "[" * 90_000}), "nested too deeply"),
        (safetensors({"a": torch.ones(3)}, {"checkpoint_format": "1"}), "no configuration"),
    ],
)
def test_damaged_files_of_weights_are_refused_in_a_line(tmp_path: Path, content: bytes, says: str) -> None:
    from engine.errors import RequestError

    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(says)):
        checkpoint.read(tmp_path / "w.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and leaves nothing


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["output=model.onx"], "expected a name that ends in .onnx, .pt2 or .safetensors"),
        (["output=no/such/model.pt2"], "cannot be written; set output= to a file in a folder that exists"),
        (["checkpoint=nothing.pt", "output=model.pt2"], "no such checkpoint"),
        (["model=mlp", "output=model.pt2"], "names its own model and data; leave model= out"),
    ],
)
def test_wrong_requests(call: Call, made: Place, tmp_path: Path, arguments: list[str], says: str) -> None:
    if not arguments[0].startswith("checkpoint="):
        arguments = [str(made.best), *arguments]
    assert says in call("export", *arguments).error
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_not_overwritten(call: Call, made: Place, tmp_path: Path) -> None:
    state = checkpoint.read(made.best)["model"]
    (tmp_path / "plain.safetensors").write_bytes(safetensors(state))
    before = (tmp_path / "plain.safetensors").read_bytes()
    if importlib.util.find_spec("safetensors"):
        assert "is the checkpoint" in call("export", "plain.safetensors", "output=plain.safetensors").error
    assert (tmp_path / "plain.safetensors").read_bytes() == before


def test_a_missing_extra_is_named(call: Call, made: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    error = call("export", str(made.best), "output=model.onnx").error
    assert "onnxscript" in error and "not installed: pip install '.[export]'" in error
    assert list(tmp_path.iterdir()) == []


def test_a_transform_that_no_graph_can_have_is_named(call: Call, made: Place, tmp_path: Path) -> None:
    dataset = {"root": str(made.folder / "photos"), "eval_transforms": [*TRANSFORMS, "GaussianNoise"]}
    write_checkpoint(tmp_path / "best.pt", dataset)
    assert "GaussianNoise cannot be put into a graph" in call("export", "best.pt", "output=model.pt2").error
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


class Undecided(nn.Module):
    """Does with an image what its pixels say, which no graph can."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] * (2 if float(images.sum()) > 0 else 3)


def test_a_model_that_cannot_be_traced_is_told_in_a_line(
    call: Call, made: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = export.load
    monkeypatch.setattr(export, "load", lambda *given: (Undecided(), real(*given)[1]))
    assert "torch.export cannot trace Undecided: " in call("export", str(made.best), "output=model.pt2").error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answers",
    [lambda graph, images: graph(images.clamp(max=250)), lambda graph, images: graph(images) * float("nan")],
    ids=["250 for all brighter pixels", "no numbers"],
)
def test_a_file_that_answers_otherwise_is_not_left_behind(
    call: Call, made: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: Callable[..., Any]
) -> None:
    """Neither is the file harmed that was there before."""
    (tmp_path / "model.pt2").write_text("of yesterday")
    graphs: list[export.Whole] = []
    monkeypatch.setattr(export, "traced", lambda whole, *_: graphs.append(whole))
    monkeypatch.setattr(export, "as_pt2", lambda *_: b"of today")
    monkeypatch.setattr(export, "answers_of_pt2", lambda content: lambda images: answers(graphs[0], images))
    answer = call("export", str(made.best), "output=model.pt2")
    assert answer.code == 1 and len(answer.err.splitlines()) == 1
    assert "not written: it predicts otherwise than predict.py: the largest difference" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "of yesterday"


def test_without_the_data_random_images_are_compared_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "best.pt", {"root": str(tmp_path / "gone")})
    saved = checkpoint.read(tmp_path / "best.pt")
    images, what = export.samples(saved, {"choices": {}, "batch_size": None}, tmp_path / "best.pt", (3, 12, 12))
    said = capsys.readouterr().out
    assert said.startswith("compared on random images, as the test split cannot be had: ") and "gone" in said
    assert what == "random images" and len({image.shape for image in images}) == 2
    assert len(said.splitlines()) == 1 and len(images) == 200


# ---------------------------------------------------------------------------------------------------------------------
# From Python


def test_the_lines_of_the_readme(
    made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As printed, they say what predict.py says of the same image."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(from predict import .*?)```", text, re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest" / "best.pt").write_bytes(made.best.read_bytes())
    path, probabilities = next((path, said) for path, said in made.said.items() if path.endswith("3.png"))
    (tmp_path / "photo.png").write_bytes((made.folder / path).read_bytes())
    exec(lines[1], {})
    image, name, probability = capsys.readouterr().out.split()
    assert (image, name) == ("photo.png", CLASSES[int(np.argmax(probabilities))])
    assert float(probability) == pytest.approx(max(probabilities), abs=1e-6)


def test_tensors_are_predicted_like_their_files(made: Place) -> None:
    from predict import Predictor

    predictor = Predictor(made.best, device="cpu")
    paths = [made.folder / path for path in made.said]
    given = [torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) for path in paths]
    of_files, of_tensors = predictor(paths), predictor(given)
    assert [p.ranked for p in of_files] == [p.ranked for p in of_tensors]
    assert of_tensors[1].image == "image 1" and of_files[1].image == str(paths[1])
    bad = predictor([torch.zeros(3, 4), torch.zeros(4, 12, 12, dtype=torch.uint8), "nothing.png", given[0]])
    assert [bool(prediction.error) for prediction in bad] == [True, True, True, False]
    assert "expected uint8 or floats [channels, height, width]" in str(bad[0].error)
