"""A convolutional network for fast training on small images, after the one of K. Jordan (arXiv:2404.00498)."""

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class FastNet(nn.Module):
    """A 2x2 convolution, blocks of two 3x3 convolutions that halve the image, the maximum over places, a scaled head.

    With widths of 64, 256 and 256 it has the shape of the paper's network for CIFAR-10. The paper sets the first layer
    to the eigenvectors of the covariance of the training images' 2x2 patches and keeps it so ("whitening"); here it is
    learned like the others, as a model knows the shape of the images only. The scale of batch normalisation, which
    the paper keeps at 1, is learned too.

    Args:
        input_shape: (channels, height, width) of an image of at least 2x2 pixels.
        num_classes: number of logits.
        widths: channels of each block; a side that is down to one pixel is not halved any more.
        logit_scale: factor on the logits; small, the first predictions are unsure and the head learns slowly.
        norm_momentum: share that the newest batch has in the running mean and variance of batch normalisation, 0 to 1.
        stride: step of the first convolution in pixels; 2 halves the image at once, for a quarter of the arithmetic.
        activation: gelu, as in the paper, relu or silu; a CPU computes gelu, most of all of bfloat16, slowly.
        last_padding: of the last convolution, 1 or 0. Without it a map of 3x3 places becomes a single one, for a ninth
            of the arithmetic, and what is seen where counts.

    Raises:
        ValueError: the images are smaller than 2x2 pixels, there are no widths or no such activation, or the last map
            is smaller than 3x3 places and not padded.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        widths: list[int],
        logit_scale: float,
        norm_momentum: float,
        stride: int = 1,
        activation: str = "gelu",
        last_padding: int = 1,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 2:
            raise ValueError(f"images of {height}x{width} pixels are too small; expected at least 2x2")
        if not widths:
            raise ValueError("widths=[]: expected the channels of at least one block")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation}: expected one of {', '.join(ACTIVATIONS)}")
        active = ACTIVATIONS[activation]
        first = 2 * 4 * channels  # as many as a 2x2 patch has numbers, of both signs
        layers: list[nn.Module] = [nn.Conv2d(channels, first, 2, stride), active()]
        height, width = ((side - 2) // stride + 1 for side in (height, width))
        paddings = [*[1] * (len(widths) - 1), last_padding]
        for wide_in, wide_out, padding in zip([first, *widths[:-1]], widths, paddings, strict=True):
            halving = tuple(min(2, side) for side in (height, width))
            left_out = (height % halving[0], width % halving[1])
            height, width = height // halving[0], width // halving[1]
            layers += [
                _DiracConv(wide_in, wide_out, left_out=left_out),
                nn.MaxPool2d(halving),  # before the activation, of which there is then a quarter
                nn.BatchNorm2d(wide_out, momentum=norm_momentum),
                active(),
                _DiracConv(wide_out, wide_out, padding),
                nn.BatchNorm2d(wide_out, momentum=norm_momentum),
                active(),
            ]
        if min(height, width) < 3 and not last_padding:
            raise ValueError(
                f"last_padding=0 takes a last map of at least 3x3 places; it is {height}x{width} after "
                f"{len(widths)} blocks of images of {input_shape[1]}x{input_shape[2]} pixels"
            )
        self.features = nn.Sequential(*layers)
        self.features.to(memory_format=torch.channels_last)  # faster, as in models/cnn.py
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[batch, num_classes]` of images `[batch, channels, height, width]`."""
        features = self.features(images.to(memory_format=torch.channels_last))
        return self.head(features.amax((2, 3))) * self.logit_scale


class _DiracConv(nn.Conv2d):
    """A 3x3 convolution that at first passes its input on in its first channels; any others start at random.

    It computes no more than is used. Where its filters cover the whole map it is the matrix product that it is then: on
    two cores, for 256 images in bfloat16, the backward of the convolution took seven times as long as the product's.

    Args:
        channels_in, channels_out: of the images and of the result.
        padding: 1 or 0.
        left_out: rows and columns at the end of a padded map, 0 or 1 each, which the pooling after it would leave out.
    """

    def __init__(
        self, channels_in: int, channels_out: int, padding: int = 1, left_out: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(channels_in, channels_out, 3, padding=padding, bias=False)
        nn.init.dirac_(self.weight[:channels_in])
        self.left_out = left_out

    def forward(self, images: Tensor) -> Tensor:
        if self.padding == (0, 0) and images.shape[-2:] == self.kernel_size:
            return nn.functional.linear(images.flatten(1), self.weight.flatten(1))[:, :, None, None]
        if not any(self.left_out):
            return super().forward(images)
        rows, columns = self.left_out
        return nn.functional.conv2d(nn.functional.pad(images, (1, 1 - columns, 1, 1 - rows)), self.weight)
