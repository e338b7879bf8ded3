"""torchvision's ResNets (He et al., arXiv:1512.03385) with a stem that fits small images, not pretrained."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torchvision import models


class ResNet18(nn.Module):
    """ResNet-18.

    Args:
        input_shape: (channels, height, width) of an image, any size.
        num_classes: number of logits.
        small_images: replace the 7x7 stride-2 stem and its max-pooling by one 3x3 convolution, as the paper does for
            CIFAR (section 4.2); None does so for images of up to 64 pixels.
    """

    builder: ClassVar[Callable[..., models.ResNet]] = staticmethod(models.resnet18)

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, small_images: bool | None = None) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.resnet = self.builder(num_classes=num_classes)
        if small_images or (small_images is None and max(height, width) <= 64):
            self.resnet.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
            self.resnet.maxpool = nn.Identity()
        elif channels != 3:
            self.resnet.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[batch, num_classes]` of images `[batch, channels, height, width]`."""
        return self.resnet(images)


class ResNet34(ResNet18):
    """ResNet-34, with the arguments of `ResNet18`."""

    builder = staticmethod(models.resnet34)


class ResNet50(ResNet18):
    """ResNet-50, of bottleneck blocks, with the arguments of `ResNet18`."""

    builder = staticmethod(models.resnet50)
