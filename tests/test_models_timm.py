"""timm's models: weights from where the hub's cache looks, and no way from a file to the network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from test_models_torchvision import used
from test_run_checkpoint import small
from torch import nn

from engine.build import build, locate
from engine.errors import RequestError
from engine.run import checkpoint
from engine.training.pretrained import read_weights
from engine.training.transfer import named_by

TEN = [  # of different families, and of one several layers make the logits
    ("resnet18.a1_in1k", 32), ("mobilenetv3_small_050", 32), ("efficientnet_b0", 32), ("convnext_atto", 32),
    ("vit_tiny_patch16_224", 32), ("deit_tiny_distilled_patch16_224", 32), ("swin_tiny_patch4_window7_224", 56),
    ("mixer_s32_224", 64), ("regnetx_002", 32), ("ghostnet_100", 32), ("levit_128s", 224), ("inception_v4", 96),
]  # fmt: skip


def made(name: str, size: int = 32, channels: int = 1, **settings: Any) -> nn.Module:
    return build({"_target_": "models.timm.classifier", "name": name, **settings}, "model",
                 input_shape=(channels, size, size), num_classes=5, read_weights=read_weights)  # fmt: skip


def test_without_timm_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "models.timm", raising=False)
    with pytest.raises(RequestError, match=r"needs 'timm', which is not installed: pip install '.\[timm\]'"):
        locate("models.timm.classifier", "model._target_")


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="needs timm: pip install '.[timm]'")


@pytest.fixture
def hub(timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's files are looked for; there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "hub"


def lay(hub: Path, name: str, model: nn.Module) -> Path:
    """A model's weights as the hub's cache has them."""
    from safetensors.torch import save_file

    folder = hub / f"models--timm--{name}" / "snapshots" / "main"
    folder.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_with_weights_it_answers_as_timms(timm: Any, hub: Path) -> None:
    """Colours as they are, grey as an image of three equal channels; the head is new."""
    torch.manual_seed(0)
    known = used(timm.create_model("test_resnet"))
    name = f"test_resnet.{timm.get_pretrained_cfg('test_resnet').tag}"
    lay(hub, name, known)
    images = torch.rand(2, 3, 64, 64)
    for channels in (3, 1):
        for asked in ("test_resnet", name):
            model = made(asked, 64, channels, pretrained=True).eval()
            assert not any(torch.is_tensor(x) for x in model.pretrained_cfg.values())
            assert "state_dict" not in model.pretrained_cfg
            with torch.no_grad():
                model.get_classifier().weight.copy_(known.get_classifier().weight[:5])
                model.get_classifier().bias.copy_(known.get_classifier().bias[:5])
                given = images[:, :channels]
                torch.testing.assert_close(
                    model(given), known(given.expand(-1, 3, -1, -1))[:, :5], rtol=1e-4, atol=1e-5
                )


def test_a_run_begins_with_weights_and_needs_their_file_no_more(timm: Any, call: Call, hub: Path) -> None:
    torch.manual_seed(3)
    file = lay(hub, "test_vit.r160_in1k", timm.create_model("test_vit"))
    size = "[Resize: {size: [32, 32]}]"
    words = [
        "model=timm",
        "model.name=test_vit.r160_in1k",
        "model.pretrained=true",
        "dataset.limit=20",
        "batch_size=10",
    ]
    words += [f"dataset.train_transforms={size}", f"dataset.eval_transforms={size}", "freeze=backbone", "name=run"]
    told = call("train", *words, "epochs=1")
    assert told.code == 0, told.err
    assert (
        f"weights  {file}\n" in told.out
        and "the weights were trained with 160x160 of mean [0.5] and std [0.5]" in told.out
    )
    shutil.rmtree(hub)
    for entry, *more in (("evaluate", "checkpoint=checkpoints/run/best.pt"), ("train", "resume=latest", "epochs=2")):
        told = call(entry, *more)
        assert told.code == 0, told.err
    assert not hub.exists()


def test_without_a_network_the_file_and_its_place_are_named(
    timm: Any, call: Call, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub asks six times, 23 seconds in all
    words = ["model=timm", "model.name=test_resnet.r160_in1k", "model.pretrained=true"]
    said = call("train", *words).error
    folder = hub / "models--timm--test_resnet.r160_in1k" / "snapshots" / "main"
    assert "model.safetensors of timm/test_resnet.r160_in1k is not in the hub's cache and cannot be downloaded" in said
    assert f"put it there as {folder / 'model.safetensors'}" in said
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_told(timm: Any, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    file = str(tmp_path / "other.pth")
    for name, size, settings, said in (
        ("resnet19", 32, {}, "name=resnet19: timm has no such model; near are resnet1"),
        ("resnet18.a1_in2k", 32, {}, "no such model; near are resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", 32, {}, "timm has no such model"),
        ("local-dir:/tmp", 32, {}, "timm has no such model"),
        ("vit_tiny_patch16_224", 28, {}, r"does not take images of 28x28 pixels .*size: \[224, 224\]"),
        ("test_resnet", 32, {"weights": file}, "the weights do not fit test_resnet for images of 32x32"),
        ("test_resnet", 32, {"weights": file, "pretrained": True}, "choose one"),
        ("test_resnet", 32, {"weights": "DEFAULT"}, "expected a file ending in"),
    ):
        with pytest.raises(RequestError, match=said) as refused:
            made(name, size, **settings)
        assert "\n" not in str(refused.value)
    assert made("test_vit", 32, weights=file).pretrained_cfg["num_classes"] == 1000


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/etc", "timm/resnet18", "test_vit.r160_in1k"]
)
def test_a_checkpoint_makes_nobody_ask_the_network(
    timm: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    settings = {"_target_": "models.timm.classifier", "name": name, "pretrained": True, "weights": "/etc/passwd"}
    about = small(config__model=settings, config__choices__model="timm", input_shape=[3, 160, 160])
    state = timm.create_model("test_vit", num_classes=10).state_dict()
    for sign in ("", "ours"):
        path = tmp_path / "stranger.pt"
        checkpoint.write(path, {**about, "model": dict(state), "signature": sign})
        monkeypatch.setattr("engine.run.trust.is_ours", lambda _, sign: sign == "ours")
        if name == "test_vit.r160_in1k":
            checkpoint.build_model(checkpoint.read(path), path)
            continue
        with pytest.raises(RequestError, match=r"not taken from a file|timm has no such model"):
            checkpoint.build_model(checkpoint.read(path), path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), TEN)
def test_ten_families_train_are_evaluated_and_exported(
    timm: Any, call: Call, name: str, size: int, tmp_path: Path
) -> None:
    scaled = f"[Resize: {{size: [{size}, {size}]}}]"
    words = ["model=timm", f"model.name={name}", "dataset.limit=20", "batch_size=4", "limit_batches=1", "name=run"]
    words += [f"dataset.train_transforms={scaled}", f"dataset.eval_transforms={scaled}", "freeze=backbone", "epochs=1"]
    told = call("train", *words, "dataset.val_fraction=0")
    assert told.code == 0, told.err
    model = checkpoint.build_model(checkpoint.read(tmp_path / "checkpoints/run/best.pt"), tmp_path)
    backbone = named_by("backbone", model, "freeze")
    head = [parameter.shape[0] for parameter in model.parameters() if parameter not in backbone]
    assert set(head) == {10} and len(head) == (4 if "distilled" in name or "levit" in name else 2), head
    told = call("evaluate", "checkpoint=checkpoints/run/best.pt", "dataset.limit=4")
    assert told.code == 0, told.err
    told = call("export", "checkpoint=checkpoints/run/best.pt", "output=model.pt2")
    assert told.code == 0 and " 0 predictions differ" in told.out, told.err
