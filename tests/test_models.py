"""The models: the tutorial's names and shapes, and every model on every dataset's images."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from engine.build import build
from engine.config import group_options

SHAPES = {  # of the datasets' images; classes
    "digits": ((1, 8, 8), 10),
    "the MNIST family": ((1, 28, 28), 10),
    "CIFAR-10": ((3, 32, 32), 10),
    "CIFAR-100": ((3, 32, 32), 100),
    "a folder of photographs": ((3, 96, 128), 3),
}


def build_model(name: str, shape: tuple[int, int, int], classes: int, **settings: object) -> torch.nn.Module:
    values = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{name}.yaml"))
    assert isinstance(values, dict)
    return build({**values, **settings}, "model", input_shape=shape, num_classes=classes)


def test_mlp_has_the_names_and_shapes_of_the_tutorial() -> None:
    model = build_model("mlp", (1, 28, 28), 10)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "linear_relu_stack.0.weight": (512, 784),
        "linear_relu_stack.0.bias": (512,),
        "linear_relu_stack.2.weight": (512, 512),
        "linear_relu_stack.2.bias": (512,),
        "linear_relu_stack.4.weight": (10, 512),
        "linear_relu_stack.4.bias": (10,),
    }
    assert sum(p.numel() for p in model.parameters()) == 669_706


def test_mlp_with_other_hidden_sizes() -> None:
    widths = [tuple(p.shape) for p in build_model("mlp", (3, 4, 5), 7, hidden=[11, 13, 17]).parameters() if p.ndim == 2]
    assert widths == [(11, 60), (13, 11), (17, 13), (7, 17)]
    assert [tuple(p.shape) for p in build_model("mlp", (1, 8, 8), 10, hidden=[]).parameters()] == [(10, 64), (10,)]


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("name", group_options()["model"])
def test_every_model_takes_every_image_and_passes_a_gradient_to_every_weight(name: str, data: str) -> None:
    shape, classes = SHAPES[data]
    model = build_model(name, shape, classes)
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, classes)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, classes - 1])).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter


def test_resnet18_has_a_stem_fit_for_small_images() -> None:
    images = torch.rand(1, 3, 32, 32)
    small, large = (build_model("resnet18", (3, 32, 32), 10, small_images=value).eval() for value in (None, False))
    assert small.resnet.conv1.stride == (1, 1) and large.resnet.conv1.stride == (2, 2)
    seen = {}
    for key, model in (("small", small), ("large", large)):
        model.resnet.layer4.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out.shape[-1]}))
        model(images)
    assert seen == {"small": 4, "large": 1}
    assert build_model("resnet18", (3, 96, 96), 10).resnet.conv1.stride == (2, 2)
