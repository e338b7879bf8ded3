"""The name that ResNet-18 has in checkpoints of before models/resnet.py, which load by it."""

from models import resnet


class ResNet18(resnet.ResNet18):
    """ResNet-18, as in models/resnet.py; a class of its own, as a checkpoint may name only what its file defines."""
