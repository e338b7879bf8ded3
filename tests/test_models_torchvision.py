"""torchvision's models: as torchvision has them but for both ends, with weights from where its cache looks."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Call
from test_run_checkpoint import small
from torch import Tensor, nn
from torchvision import models

from engine.build import build
from engine.data.draws import Draws
from engine.data.transforms import apply, parse_transforms
from engine.errors import RequestError
from engine.run import checkpoint
from engine.training.pretrained import read_weights
from engine.training.transfer import named_by
from models.torchvision import NAMES, classifier, trained_with
from models.torchvision import _load as load

SIDES = {
    "alexnet": 63,
    "efficientnet_v2": 33,
    "densenet": 29,
    "inception": 75,
    "maxvit": 224,
    "vit_h_14": 14,
    "vit_b_16": 16,
    "vit_l_16": 16,
}
FAMILIES = [  # one of each of torchvision's files
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "vgg11", "vit_b_32",
]  # fmt: skip
SMALL = ["model=torchvision", "model.name=shufflenet_v2_x0_5", "dataset.limit=20", "batch_size=10", "epochs=1"]
FILE = "shufflenetv2_x0.5-f707e7126e.pth"  # of its weights, by torchvision's list


def side(name: str) -> int:
    """Pixels of the smallest square that a model takes, or of one that is small enough."""
    return next((pixels for start, pixels in SIDES.items() if name.startswith(start)), 32)


def made(name: str, **settings: Any) -> nn.Module:
    return build({"_target_": "models.torchvision.classifier", "name": name, **settings}, "model",
                 input_shape=(1, side(name), side(name)), num_classes=10)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch looks for weights; there is no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "torch" / "hub" / "checkpoints"


def lay(folder: Path, file: str, state: dict[str, Tensor], *, old: bool = True) -> Path:
    """Weights as torchvision's files have them, most of which are older than torch's archives."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / file, _use_new_zipfile_serialization=not old)
    return folder / file


def used(model: nn.Module) -> nn.Module:
    """With the statistics of a model that has seen images, in evaluation mode."""
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64))
    return model.eval()


def test_there_is_one_of_each_family() -> None:
    of_files = {models.get_model_builder(name).__module__ for name in NAMES}
    assert [models.get_model_builder(name).__module__ for name in FAMILIES] == sorted(of_files)
    assert len(NAMES) >= 80 and not any("quantized" in name or "3d" in name or "rcnn" in name for name in NAMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_torchvisions_but_for_both_ends(name: str) -> None:
    """Ten classes, one channel, and none of the second heads; without memory for its weights."""
    options = {"image_size": side(name)} if name.startswith("vit") else {}
    options |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"), checkpoint.Numbers():
        model, known = made(name), models.get_model(name, weights=None, **options)
        for training in (True, False):
            assert model.train(training)(torch.empty(2, 1, side(name), side(name))).shape == (2, 10)
    own, theirs = ({key: tensor.shape for key, tensor in of.state_dict().items()} for of in (model, known))
    others = {key for key in own if own[key] != theirs[key]}
    assert all(re.match(r"AuxLogits|aux[12]", key) for key in theirs.keys() - own.keys())
    backbone = named_by("backbone", model, "freeze")
    head = {key for key, parameter in model.named_parameters() if parameter not in backbone}
    (first,) = others - head
    assert own[first][1] == 1 and theirs[first][1] == 3 and own[first][2:] == theirs[first][2:]
    assert {theirs[key][0] for key in head} == {1000} and {own[key][0] for key in head} == {10}


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121", "squeezenet1_1"])
def test_with_weights_it_answers_as_torchvisions(cache: Path, name: str) -> None:
    """Colours as they are, grey as an image of three equal channels; of a file with former names too."""
    torch.manual_seed(0)
    known = used(models.get_model(name, weights=None))
    state = dict(known.state_dict())
    if name == "densenet121":
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): x for key, x in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    lay(cache, Path(models.get_model_weights(name).DEFAULT.url).name, state)
    images = torch.rand(2, 3, 32, 32)
    for channels in (3, 1):
        model = classifier((channels, 32, 32), 5, name, "DEFAULT", read_weights).eval()
        head = sorted(key for key in state if state[key].shape[:1] == (1000,))
        with torch.no_grad():
            for key in head:
                model.get_parameter(key).copy_(state[key][:5])
            given = images[:, :channels]
            expected = known(given.expand(-1, 3, -1, -1))[:, :5]
            torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-5)


def test_googlenet_sees_images_as_its_weights_do(cache: Path) -> None:
    """They want values from -1 to 1: of colours its own first step makes them, of grey the transforms."""
    torch.manual_seed(0)
    known = models.GoogLeNet(transform_input=True, init_weights=True)
    for module in known.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)  # its own are so small that every image looks the same
    known = used(known)
    lay(cache, "googlenet-1378be20.pth", dict(known.state_dict()))
    values = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        for channels in (3, 1):
            model = classifier((channels, 32, 32), 1000, "googlenet", "IMAGENET1K_V1", read_weights).eval()
            model.fc.load_state_dict(known.fc.state_dict())
            of_weights = trained_with(channels, "googlenet", "IMAGENET1K_V1")
            assert of_weights is not None
            mean, std = (torch.tensor(of_weights[2]["Normalize"][key])[:, None, None] for key in ("mean", "std"))
            images = (values.expand(-1, channels, -1, -1) - mean) / std
            expected = known((values - torch.tensor([[[0.485]], [[0.456]], [[0.406]]])) / torch.tensor(
                [[[0.229]], [[0.224]], [[0.225]]]))  # fmt: skip
            torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-5)


def test_a_vision_transformer_begins_at_another_size_with_its_positions_spread() -> None:
    torch.manual_seed(0)

    def vit(size: int) -> models.VisionTransformer:
        return models.VisionTransformer(size, 4, 1, 1, 8, 8, num_classes=3)

    known, model = vit(16), vit(32)
    nn.init.normal_(known.encoder.pos_embedding)
    state = {re.sub(r"mlp\.0", "mlp.linear_1", key): x for key, x in known.state_dict().items()}  # as in its files
    load(model, "vit", "conv_proj", {re.sub(r"mlp\.3", "mlp.linear_2", key): x for key, x in state.items()})
    for key, tensor in known.state_dict().items():
        if key not in ("encoder.pos_embedding", "heads.head.weight", "heads.head.bias"):
            assert torch.equal(model.state_dict()[key], tensor), key
    spread, before = model.encoder.pos_embedding[0], known.encoder.pos_embedding[0]
    assert torch.equal(spread[0], before[0])  # of the class
    torch.testing.assert_close(spread[1], before[1])  # corners stay what they are
    torch.testing.assert_close(spread[-1], before[-1])


def test_what_the_weights_were_trained_with_is_what_torchvision_says() -> None:
    blurred = nn.functional.interpolate(torch.rand(1, 3, 12, 10), (300, 260), mode="bilinear")  # noise would be clipped
    image = (blurred[0] * 255).byte()
    for name, weights in (("resnet50", "DEFAULT"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"), ("inception_v3", "DEFAULT")):
        listed = trained_with(3, name, weights)
        assert listed is not None
        transforms = [*enumerate(parse_transforms(listed, ""))]
        own = apply(transforms, image[None], Draws(0, 0, torch.zeros(1, dtype=torch.int64)))
        known = models.get_model_weights(name)[weights].transforms()(image)
        torch.testing.assert_close(own[0], known, rtol=0, atol=0.02)  # a step of a byte is 0.018
    assert trained_with(1, "resnet18", "DEFAULT")[2] == {"Normalize": {"mean": [0.449], "std": [0.226]}}  # type: ignore[index]
    assert trained_with(3, "resnet18") is None and trained_with(3, "resnet18", "my.pt") is None
    assert trained_with(3, "resnet18", "a/resnet18-f37072fd.pth") == trained_with(3, "resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("name", "settings", "shape", "said"),
    [
        ("resnet81", {}, (3, 64, 64), "name=resnet81: torchvision has no such classification model; near are res"),
        ("ResNet18", {}, (3, 64, 64), "near are resnet18"),
        ("fasterrcnn_resnet50_fpn", {}, (3, 64, 64), "no such classification model"),
        ("resnet18", {"weights": "default"}, (3, 64, 64), "weights=default: resnet18 has IMAGENET1K_V1, DEFAULT; a "),
        ("vit_b_16", {}, (3, 28, 28), r"squares whose side is a multiple of 16 pixels, these images have 28x28; "
                                      r"put Resize: \{size: \[224, 224\]\} into dataset.train_transforms and eval"),
        ("vit_b_16", {}, (3, 32, 48), "these images have 32x48"),
        ("maxvit_t", {}, (3, 224, 112), "multiples of 224 pixels, these images have 224x112"),
        ("alexnet", {}, (3, 28, 28), "alexnet takes at least 63x63 pixels, these images have 28x28"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(name: str, settings: dict[str, Any], shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        build({"_target_": "models.torchvision.classifier", "name": name, **settings}, "model",
              input_shape=shape, num_classes=3)  # fmt: skip
    assert "\n" not in str(refused.value)


def test_weights_of_another_architecture_are_told(tmp_path: Path) -> None:
    other = models.get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    bare = {key: tensor for key, tensor in other.items() if "num_batches" not in key and key != "fc.bias"}
    file = str(lay(tmp_path, "a.pth", bare))  # as files of before torch 0.4.1
    classifier((3, 32, 32), 3, "shufflenet_v2_x0_5", file, read_weights)
    for name, said in (("shufflenet_v2_x1_0", r" is \[.* there, "), ("squeezenet1_1", "it has no features.0.weight")):
        with pytest.raises(ValueError, match=f"those of another architecture than {name}: .*{said}"):
            classifier((3, 32, 32), 3, name, file, read_weights)
    file = str(lay(tmp_path, "a.pth", {**other, "more": torch.zeros(1)}))
    with pytest.raises(ValueError, match="it has more"):
        classifier((3, 32, 32), 3, "shufflenet_v2_x0_5", file, read_weights)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_a_run_begins_with_weights_and_needs_their_file_no_more(call: Call, cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    known = used(models.get_model("shufflenet_v2_x0_5", weights=None))
    state = known.state_dict()
    file = lay(cache, FILE, dict(state))
    words = [*SMALL, "model.weights=DEFAULT", "experiment=finetune", "unfreeze_epoch=2", "name=run"]
    told = call("train", *words)
    assert told.code == 0, told.err
    assert f"weights  {file}\n" in told.out and "torchvision shufflenet_v2_x0_5, " in told.out
    assert "without init_from" not in told.out
    said = "the weights were trained with 224x224 of mean [0.449] and std [0.226], here they get 8x8 without Normalize"
    assert f"images   {said}; dataset.match_model=true" in told.out
    best = torch.load("checkpoints/run/best.pt", weights_only=True)
    for name, tensor in best["model"].items():
        expected = state[name].sum(1, keepdim=True) if name == "conv1.0.weight" else state[name]
        assert name.startswith("fc.") or torch.equal(tensor, expected), name

    file.unlink()
    assert call("evaluate", "checkpoint=checkpoints/run/best.pt").code == 0
    again = call("train", "resume=latest", "epochs=2")
    assert again.code == 0, again.err
    last = torch.load("checkpoints/run/last.pt", weights_only=True)["model"]
    assert not torch.equal(last["conv5.0.weight"], state["conv5.0.weight"])
    assert not any(cache.iterdir())


def test_without_a_network_the_file_and_its_place_are_named(call: Call, cache: Path, tmp_path: Path) -> None:
    said = call("train", *SMALL, "model.weights=DEFAULT").err.strip().splitlines()
    assert said[-1].startswith(f"error: {FILE} is not in torch's cache and cannot be downloaded from https://")
    assert f"; put it there as {cache / FILE}, or begin without" in said[-1] and len(said) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_local_file_is_read_as_data_and_only_as_that(call: Call, tmp_path: Path) -> None:
    state = models.get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    lay(tmp_path, "mine.pth", dict(state), old=False)
    told = call("train", *SMALL, "model.weights=mine.pth", "name=mine", "limit_batches=1")
    assert told.code == 0 and "weights  mine.pth\n" in told.out and "images   " not in told.out

    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "made"), "w"))

    for old in (True, False):
        lay(tmp_path, "mine.pth", {"conv1.0.weight": Evil()}, old=old)  # type: ignore[dict-item]
        assert "mine.pth: not a checkpoint, or a damaged one" in call("train", *SMALL, "model.weights=mine.pth").error
        assert not (tmp_path / "made").exists()
    assert "gone.pth: no such checkpoint" in call("train", *SMALL, "model.weights=gone.pth").error


def test_match_model_prepares_images_as_the_weights_want_them_for_good(call: Call, cache: Path, tmp_path: Path) -> None:
    lay(cache, FILE, dict(models.get_model("shufflenet_v2_x0_5", weights=None).state_dict()))
    words = [*SMALL, "model.weights=DEFAULT", "name=run", "limit_batches=1", "num_workers=0"]
    told = call("train", *words, "dataset.match_model=true", "dataset.train_transforms=[RandomHorizontalFlip]")
    assert told.code == 0, told.err
    assert "images 1x224x224" in told.out and "images   the weights" not in told.out
    end = [{"CenterCrop": {"size": [224, 224]}}, {"Normalize": {"mean": [0.449], "std": [0.226]}}]
    data = torch.load("checkpoints/run/best.pt", weights_only=True)["config"]["dataset"]
    scaled = {"Resize": {"size": [256], "interpolation": "bilinear"}}
    assert data["eval_transforms"] == [scaled, *end]
    assert data["train_transforms"] == [scaled, end[0], "RandomHorizontalFlip", end[1]]
    answer = call("evaluate", "checkpoint=checkpoints/run/best.pt", "dataset.limit=2", "num_workers=0")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("entry", ["evaluate", "datasets"])
def test_match_model_is_for_training(call: Call, entry: str) -> None:
    assert "dataset.match_model=true: for train.py" in call(entry, "dataset=digits", "dataset.match_model=true").error


def test_match_model_of_a_model_that_does_not_tell(call: Call, tmp_path: Path) -> None:
    for model in (["model=mlp"], SMALL):
        assert "dataset.match_model=true: model=" in call("train", *model, "dataset.match_model=true").error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Files of others

events: list[tuple[str, Any]] = []
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and (event.startswith("socket.") or event in ("open", "os.listdir", "os.scandir")):
        events.append((event, arguments))


sys.addaudithook(watch)


@pytest.mark.parametrize(
    "weights", ["/etc/passwd", "secret.pth", "DEFAULT", "https://127.0.0.1:9/shufflenetv2_x0.5-f707e7126e.pth"]
)
def test_a_checkpoint_makes_nobody_read_its_weights_file(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global watching
    settings = {"_target_": "models.torchvision.classifier", "name": "squeezenet1_1", "weights": weights}
    model = models.squeezenet1_1(num_classes=2)
    about = small(config__model=settings, config__choices__model="torchvision", input_shape=[3, 32, 32])
    checkpoint.write(tmp_path / "stranger.pt", {**about, "model": dict(model.state_dict()), "classes": ["a", "b"]})
    saved = checkpoint.read(tmp_path / "stranger.pt")
    checkpoint.build_model(saved, tmp_path / "stranger.pt")  # imports what it needs
    events.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))  # where the key would be read
    watching = True
    try:
        found = checkpoint.build_model(saved, tmp_path / "stranger.pt")
    finally:
        watching = False
    assert [event for event in events if not str(event[1][0]).startswith(str(ROOT))] == []
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(found.eval()(images), model.eval()(images))


@pytest.mark.parametrize("name", ["../secret", "hf-hub:timm/x", "os.path.join", "https://a/b", "resnet18_nope"])
def test_a_checkpoint_cannot_name_another_model(name: str, tmp_path: Path) -> None:
    settings = {"_target_": "models.torchvision.classifier", "name": name, "weights": None}
    about = small(config__model=settings, config__choices__model="torchvision", input_shape=[3, 32, 32])
    checkpoint.write(tmp_path / "stranger.pt", about)
    with pytest.raises(RequestError, match=r"not taken from a file|no such classification model"):
        checkpoint.build_model(checkpoint.read(tmp_path / "stranger.pt"), tmp_path / "stranger.pt")


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_is_evaluated_and_exported(call: Call, name: str, tmp_path: Path) -> None:
    size = f"[Resize: {{size: [{side(name)}, {side(name)}]}}]"
    words = ["model=torchvision", f"model.name={name}", "dataset.limit=20", "batch_size=4", "limit_batches=1"]
    words += [
        f"dataset.train_transforms={size}",
        f"dataset.eval_transforms={size}",
        "optimizer.momentum=0",
        "optimizer.lr=1e-6",
    ]
    told = call("train", *words, "epochs=1", "name=run", "dataset.val_fraction=0")
    assert told.code == 0, told.err
    told = call("evaluate", "checkpoint=checkpoints/run/best.pt", "dataset.limit=4")
    assert told.code == 0, told.err
    told = call("export", "checkpoint=checkpoints/run/best.pt", "output=model.pt2")
    assert told.code == 0 and " 0 predictions differ" in told.out, told.err
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "model.pt2").unlink()
