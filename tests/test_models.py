"""The models: the tutorial's names and shapes, and every model on every dataset's images."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import ROOT
from omegaconf import OmegaConf
from torch import Tensor, nn

from engine.build import build
from engine.config import group_options
from engine.errors import RequestError
from engine.run import checkpoint
from models.vit import Attention, Block, ViT, choose_patch_size, sincos_positions

SHAPES = {  # of the datasets' images; classes
    "digits": ((1, 8, 8), 10),
    "the MNIST family": ((1, 28, 28), 10),
    "CIFAR-10": ((3, 32, 32), 10),
    "CIFAR-100": ((3, 32, 32), 100),
    "a folder of photographs": ((3, 96, 128), 3),
    "ImageNet": ((3, 224, 224), 5),
    "a small odd size": ((1, 7, 5), 4),
    "a larger odd size": ((3, 33, 31), 4),
}
REFUSED = {("vit", "a larger odd size"): "no patch_size from 2 to 4 divides images of 33x31 pixels"}
MODELS = [name for name in group_options()["model"] if name not in ("torchvision", "timm")]  # those that are ours
LARGE = {"resnet34", "resnet50"}  # seconds for what ResNet-18 shows too


def settings_of(name: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def build_model(name: str, shape: tuple[int, int, int], classes: int, **settings: object) -> nn.Module:
    return build({**settings_of(name), **settings}, "model", input_shape=shape, num_classes=classes)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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


NEEDED = ("digits", "CIFAR-10")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(name, data, marks=[pytest.mark.slow] * (name in LARGE and data not in NEEDED))
        for name in MODELS
        for data in SHAPES
    ],
)
def test_every_model_takes_every_image_and_passes_a_gradient_to_every_weight(name: str, data: str) -> None:
    shape, classes = SHAPES[data]
    if (name, data) in REFUSED:
        with pytest.raises(RequestError, match=REFUSED[name, data]):
            build_model(name, shape, classes)
        return
    model = build_model(name, shape, classes)
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, classes)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, classes - 1])).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), parameter


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet34", "resnet50")])  # as resnet18
def test_a_model_learns_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model, images, labels = build_model(name, (1, 8, 8), 4), torch.randn(12, 1, 8, 8), torch.arange(12) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        if loss.item() < 0.6 * math.log(4):  # the loss of a guess is log 4
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 60 steps the loss is still {loss.item():.2f}")


def written(path: Path, model: nn.Module, shape: tuple[int, int, int], **config: object) -> dict[str, Any]:
    """A checkpoint of a model of three classes, as it is read back."""
    made = {"model": config, "dataset": {}, "choices": {"model": path.stem}}
    whole = {"format": 1, "classes": ["a", "b", "c"], "input_shape": list(shape), "config": made}
    checkpoint.write(path, {**whole, "model": model.state_dict()})
    return checkpoint.read(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_every_model_gives_its_predictions(name: str, tmp_path: Path) -> None:
    shape = (2, 8, 12)
    model, path = build_model(name, shape, 3), tmp_path / f"{name}.pt"
    model(torch.randn(8, *shape))  # statistics of batch normalisation that are not those of the start
    found = checkpoint.build_model(written(path, model, shape, **settings_of(name)), path)
    images = torch.randn(2, *shape)
    assert torch.equal(found.eval()(images), model.eval()(images))


def test_the_readme_names_every_model_with_its_parameters() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", readme, re.MULTILINE)
    with torch.device("meta"):
        own = [(name, f"{count(build_model(name, (1, 28, 28), 10)):,}") for name in MODELS]
    assert sorted(table) == own


# ---------------------------------------------------------------------------------------------------------------------
# ResNets


RESNETS = ["resnet18", "resnet34", "resnet50"]


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_has_as_many_parameters_as_torchvision_says(name: str) -> None:
    known = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    features = 2048 if name == "resnet50" else 512
    stem = {True: 3 * 3 * 3 * 64, False: 7 * 7 * 3 * 64}
    for small in (True, False):
        model = build_model(name, (3, 32, 32), 10, small_images=small)
        assert count(model) == known - 990 * (features + 1) - stem[False] + stem[small]
    assert count(build_model(name, (1, 224, 224), 1000)) == known - 2 * 7 * 7 * 64


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_in_the_usual_form_is_torchvisions(name: str) -> None:
    model, known = build_model(name, (3, 96, 96), 7), torchvision.models.get_model(name, num_classes=7)
    model.load_state_dict({f"resnet.{key}": tensor for key, tensor in known.state_dict().items()})
    images = torch.rand(1, 3, 96, 96)
    assert torch.equal(model.eval()(images), known.eval()(images))


def test_a_checkpoint_by_the_former_name_of_resnet18_loads(tmp_path: Path) -> None:
    known = torchvision.models.resnet18(num_classes=3)
    known.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    known.maxpool = nn.Identity()  # type: ignore[assignment]
    whole, path = nn.ModuleDict({"resnet": known}), tmp_path / "resnet18.pt"
    former = {"_target_": "models.resnet18.ResNet18", "small_images": None}
    found = checkpoint.build_model(written(path, whole, (1, 8, 8), **former), path)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(found.eval()(images), known.eval()(images))


def test_resnet18_has_a_stem_fit_for_small_images() -> None:
    images = torch.rand(1, 3, 32, 32)
    small, large = (build_model("resnet18", (3, 32, 32), 10, small_images=value).eval() for value in (None, False))
    assert small.resnet.conv1.stride == (1, 1) and large.resnet.conv1.stride == (2, 2)
    seen = {}
    for key, model in (("small", small), ("large", large)):
        model.resnet.layer4.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out.shape[-1]}))
        model(images)
    assert seen == {"small": 4, "large": 1}
    for shape, stride in (((3, 64, 64), 1), ((3, 64, 65), 2), ((3, 65, 64), 2)):  # 64 is what is called small
        assert build_model("resnet18", shape, 10).resnet.conv1.stride == (stride, stride)


# ---------------------------------------------------------------------------------------------------------------------
# ViT


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (8, 8, 2),
        (28, 28, 4),
        (32, 32, 4),
        (224, 224, 16),
        (96, 128, 8),
        (30, 45, 3),  # 4 divides neither, 3 both
        (26, 26, 2),
        (7, 5, 1),
        (225, 225, 15),
        (512, 64, 16),
    ],
)
def test_the_patch_size_follows_from_the_image(height: int, width: int, size: int) -> None:
    assert choose_patch_size(height, width) == size
    model = build_model("vit", (1, height, width), 10)
    assert isinstance(model, ViT) and model.embed.kernel_size == model.embed.stride == (size, size)
    assert model.positions.shape == (height * width // size**2, 128)


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((1, 28, 28), {"patch_size": 5}, "patch_size=5 does not divide images of 28x28 pixels"),
        ((1, 28, 30), {"patch_size": 4}, "patch_size=4 does not divide images of 28x30 pixels"),
        ((1, 30, 28), {"patch_size": 4}, "patch_size=4 does not divide images of 30x28 pixels"),
        ((1, 8, 8), {"patch_size": 16}, "patch_size=16 does not divide images of 8x8 pixels"),
        ((1, 28, 28), {"heads": 3}, "heads=3 do not divide width=128"),
        ((1, 28, 28), {"width": 90, "heads": 3}, "width=90 is no multiple of 4"),
        ((3, 227, 227), {}, "no patch_size from 8 to 16 divides images of 227x227 pixels"),
    ],
)
def test_vit_refuses_what_does_not_divide(shape: tuple[int, int, int], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        build_model("vit", shape, 10, **settings)
    assert "\n" not in str(error.value)
    build_model("vit", (3, 33, 31), 10, patch_size=1)  # typed, it may be as small as it likes


def test_attention_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    own, known, tokens = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    nn.init.normal_(known.in_proj_bias)
    own.load_state_dict({key.replace("in_proj_", "in_proj."): tensor for key, tensor in known.state_dict().items()})
    torch.testing.assert_close(own(tokens), known(tokens, tokens, tokens, need_weights=True)[0])


def test_a_block_is_the_encoder_layer_of_pytorch() -> None:
    torch.manual_seed(0)
    known = nn.TransformerEncoderLayer(8, 2, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    own, tokens = Block(8, 2, 20, 0.0), torch.randn(3, 4, 8)
    for parameter in known.parameters():
        nn.init.normal_(parameter)
    names = {
        "self_attn.in_proj_": "attention.1.in_proj.",
        "self_attn.": "attention.1.",
        "norm1": "attention.0",
        "norm2": "mlp.0",
        "linear1": "mlp.1",
        "linear2": "mlp.4",
    }
    state = {}
    for key, tensor in known.state_dict().items():
        theirs = next(name for name in names if key.startswith(name))
        state[key.replace(theirs, names[theirs])] = tensor
    own.load_state_dict(state)
    torch.testing.assert_close(own(tokens), known(tokens), rtol=1e-4, atol=1e-4)


def test_vit_has_the_parameters_of_torchvisions_without_class_token_and_learned_positions() -> None:
    known = torchvision.models.VisionTransformer(32, 4, 6, 4, 128, 256, num_classes=10)
    assert count(build_model("vit", (3, 32, 32), 10)) == count(known) - 128 - 65 * 128
    # By hand, for depth 1: patches; two norms, attention and MLP of the block; norm and head.
    parts = [4 * 4 * 3 * 128 + 128, 2 * 2 * 128, 4 * (128 * 128 + 128), 2 * 128 * 256 + 256 + 128, 2 * 128, 1290]
    assert count(build_model("vit", (3, 32, 32), 10, depth=1)) == sum(parts)


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    found = sincos_positions(2, 3, 12)
    assert found.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            angles = [[place / 10_000 ** (i / 2) for i in range(3)] for place in (column, row)]
            expected = [f(angle) for of_axis in angles for f in (math.sin, math.cos) for angle in of_axis]
            torch.testing.assert_close(found[3 * row + column], torch.tensor(expected))


def test_a_patch_gets_the_position_of_its_place() -> None:
    model = build_model("vit", (1, 8, 12), 10, patch_size=4)
    assert isinstance(model, ViT)
    seen: list[Tensor] = []
    model.blocks.register_forward_hook(lambda _module, given, _result: seen.append(given[0][0]))
    blank = torch.zeros(1, 1, 8, 12)
    with_one = blank.clone()
    with_one[..., 4:8, 8:12] = 1  # second row, third column
    for images in (blank, with_one):
        model.eval()(images)
    assert (seen[0] != seen[1]).any(1).tolist() == [False] * 5 + [True]
    torch.testing.assert_close(seen[0], sincos_positions(2, 3, 128) + model.embed.bias)


def test_vit_without_positions_does_not_see_the_order_of_its_patches() -> None:
    model = build_model("vit", (1, 8, 8), 10, patch_size=4).eval()
    assert isinstance(model, ViT)
    images = torch.randn(1, 1, 8, 8)
    turned = torch.cat([images[..., 4:], images[..., :4]], 3)
    assert not torch.allclose(model(images), model(turned), atol=1e-4)
    model.positions.zero_()
    torch.testing.assert_close(model(images), model(turned))


def test_dropout_of_vit_acts_while_training_only() -> None:
    model, images = build_model("vit", (1, 8, 8), 10, dropout=0.5), torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    assert sum(isinstance(module, nn.Dropout) and module.p == 0.5 for module in model.modules()) == 1 + 3 * 6


# ---------------------------------------------------------------------------------------------------------------------
# FastNet


def test_fastnet_with_the_widths_of_the_paper_has_its_size() -> None:
    model, seen = build_model("fastnet", (3, 32, 32), 10, widths=[64, 256, 256]).eval(), []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda _module, _given, result: seen.append(tuple(result.shape[1:])))
    model(torch.rand(1, 3, 32, 32))
    assert seen == [
        (24, 31, 31),
        *[(64, 30, 30), (64, 15, 15), (64, 15, 15)],  # of 31 rows the pool would leave one out
        *[(256, 14, 14), (256, 7, 7), (256, 7, 7)],
        *[(256, 6, 6), (256, 3, 3), (256, 3, 3)],
    ]
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    norms = 2 * (2 * 64 + 4 * 256)
    assert count(model) == 2 * 2 * 3 * 24 + 24 + convolutions + norms + 256 * 10 == 1_972_792


def test_fastnets_last_map_without_padding_is_one_place_that_sees_all() -> None:
    """28 pixels are 14 after a step of two, 7 and 3 after the blocks; 1 after a 3x3 filter without padding."""
    settings = {"widths": [4, 6], "stride": 2, "last_padding": 0}
    model, seen = build_model("fastnet", (1, 28, 28), 10, **settings).eval(), []
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda _module, given, result: seen.append((given[0], result)))
    model(torch.rand(2, 1, 28, 28))
    assert [tuple(result.shape[1:]) for _, result in seen] == [
        (8, 14, 14),
        *[(4, 14, 14), (4, 7, 7)],
        *[(6, 6, 6), (6, 1, 1)],
    ]
    last_map, place = seen[-1]
    torch.testing.assert_close(place, nn.functional.conv2d(last_map, convs[-1].weight))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 29, 22), (1, 12, 31), (1, 5, 7)])
def test_fastnet_pools_what_whole_convolutions_give(shape: tuple[int, int, int]) -> None:
    """Rows and columns are left out only where the pool does so: 3x32x32 goes 31, 15, 7, the others odd and even."""
    model, met = build_model("fastnet", shape, 10, widths=[3, 5, 4]).eval(), []
    layers = list(model.features)
    pairs = [(a, b) for a, b in itertools.pairwise(layers) if isinstance(b, nn.MaxPool2d)]
    for conv, pool in pairs:
        conv.register_forward_hook(lambda _module, given, _result: met.append(given[0]))
        pool.register_forward_hook(lambda _module, _given, result: met.append(result))
    model(torch.rand(2, *shape))
    assert len(met) == 2 * len(pairs) == 6
    for (conv, pool), given, pooled in zip(pairs, met[::2], met[1::2], strict=True):
        whole = nn.functional.conv2d(given, conv.weight, padding=1)
        torch.testing.assert_close(pooled, nn.functional.max_pool2d(whole, pool.kernel_size))


def test_fastnet_passes_its_input_on_at_first() -> None:
    model = build_model("fastnet", (1, 28, 28), 10)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs[1:]] == [
        *[(8, 32), (32, 32)],
        *[(32, 128), (128, 128)],
        *[(128, 128), (128, 128)],
    ]
    sides = [4, 5, 4, 5, 5, 5]  # maps of 27, 13 and 6 are halved: of the odd ones the last row is not computed
    for conv, side in zip(convs[1:], sides, strict=True):
        images = torch.randn(1, conv.in_channels, 5, 5)
        result = conv(images)
        torch.testing.assert_close(result[:, : conv.in_channels], images[..., :side, :side])
        others = result[:, conv.in_channels :]
        assert others.numel() == 0 or others.std() > 0.1


def test_fastnet_is_scaled_as_it_is_told() -> None:
    images = torch.randn(4, 1, 28, 28)
    model, twice = (build_model("fastnet", (1, 28, 28), 10, logit_scale=scale).eval() for scale in (0.25, 0.5))
    twice.load_state_dict(model.state_dict())
    torch.testing.assert_close(twice(images), 2 * model(images))


def test_fastnets_newest_batch_counts_as_it_is_told() -> None:
    model = build_model("fastnet", (1, 8, 8), 10, norm_momentum=0.25)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    batches: list[Tensor] = []
    norms[0].register_forward_hook(lambda _module, given, _result: batches.append(given[0].mean((0, 2, 3))))
    model(torch.randn(6, 1, 8, 8) + 3)
    assert len(norms) == 6
    torch.testing.assert_close(norms[0].running_mean, 0.25 * batches[0])  # the mean was 0 before


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((1, 1, 8), {}, "images of 1x8 pixels are too small"),
        ((1, 8, 8), {"widths": []}, "expected the channels of at least one"),
        ((1, 8, 8), {"activation": "tanh"}, "activation=tanh: expected one of gelu, relu, silu"),
        ((1, 8, 8), {"last_padding": 0}, "at least 3x3 places; it is 1x1 after 3 blocks of images of 8x8 pixels"),
    ],
)
def test_fastnet_refuses_what_it_cannot_take(
    shape: tuple[int, int, int], settings: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        build_model("fastnet", shape, 10, **settings)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_fastnets_activation_is_the_one_that_is_named(activation: str) -> None:
    """Of 0.5, by hand: itself times 0.691462 of the normal distribution, 1, and 0.622459 of the logistic function."""
    model = build_model("fastnet", (1, 28, 28), 10, activation=activation)
    expected = {"gelu": 0.345731, "relu": 0.5, "silu": 0.311230}[activation]
    found = [
        module for module in model.features if not list(module.parameters()) and "Pool" not in type(module).__name__
    ]
    assert len(found) == 1 + 3 * 2
    for module in found:
        assert module(torch.tensor(0.5)).item() == pytest.approx(expected, abs=1e-6)


def test_fastnet_of_many_blocks_halves_what_can_be_halved() -> None:
    model = build_model("fastnet", (1, 3, 9), 10, widths=[4, 4, 4, 4, 4])
    assert [module.kernel_size for module in model.modules() if isinstance(module, nn.MaxPool2d)] == [
        (2, 2),
        (1, 2),
        (1, 2),
        (1, 1),
        (1, 1),
    ]
    assert model(torch.rand(2, 1, 3, 9)).shape == (2, 10)
