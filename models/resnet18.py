"""torchvision's ResNet-18 (He et al., arXiv:1512.03385), with a stem that fits small images."""

from torch import Tensor, nn
from torchvision.models import resnet18


class ResNet18(nn.Module):
    """ResNet-18 without pretrained weights.

    Args:
        input_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        small_images: replace the 7x7 stride-2 stem and its max-pooling by one 3x3 convolution, as the paper does for
            CIFAR (section 4.2); None does so for images of up to 64 pixels.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, small_images: bool | None = None) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.resnet = resnet18(num_classes=num_classes)
        if small_images or (small_images is None and max(height, width) <= 64):
            self.resnet.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
            self.resnet.maxpool = nn.Identity()
        elif channels != 3:
            self.resnet.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[batch, num_classes]` of images `[batch, channels, height, width]`."""
        return self.resnet(images)
