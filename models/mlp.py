"""A multi-layer perceptron."""

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between; with the defaults, the model of the PyTorch quickstart tutorial.

    Args:
        input_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        hidden: width of each hidden layer.
        dropout: share of the activations set to zero while training, 0 to 1.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, hidden: list[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.flatten = nn.Flatten()
        layers: list[nn.Module] = []
        for wide, narrow in pairwise([channels * height * width, *hidden]):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.linear_relu_stack = nn.Sequential(
            *layers, nn.Linear([channels * height * width, *hidden][-1], num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[batch, num_classes]` of images `[batch, channels, height, width]`."""
        return self.linear_relu_stack(self.flatten(images))
