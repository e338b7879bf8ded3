"""Training losses of logits `[batch, num_classes]` and labels: class indices `[batch]`, or probabilities of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import shortened


def cross_entropy(
    label_smoothing: float = 0.0,
    weight: str | Sequence[float] | None = None,
    reduction: str = "mean",
    class_counts: dict[str, int] | None = None,
) -> nn.Module:
    """Cross-entropy: torch's own, or where classes weigh differently `WeightedCrossEntropy`.

    Args:
        label_smoothing: share of each label that is spread over all classes, 0 to 1.
        weight: of each class; "balanced" makes all classes weigh the same in the training data, n / (K n_c) for n_c of
            n samples in one of K classes. None weighs none.
        reduction: "mean" or "sum" over the samples.
        class_counts: training samples of every class, where they are known.

    Raises:
        ValueError: the weights do not fit the classes.
    """
    if weight is None:
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction=checked(reduction))
    if isinstance(weight, str):
        if weight != "balanced":
            raise ValueError(f"weight={shortened(weight)}: expected balanced, or a list of numbers")
        if class_counts is None:
            raise ValueError("weight=balanced: only reading all samples could tell the classes' sizes; give a list")
        if empty := [name for name, count in class_counts.items() if count == 0]:
            raise ValueError(f"weight=balanced: no training sample is of class {shortened(empty[0])}; give a list")
        total = sum(class_counts.values())
        weight = [total / (len(class_counts) * count) for count in class_counts.values()]
    if not all(type(one) in (int, float) and 0 <= one < math.inf for one in weight) or not sum(weight):
        raise ValueError(f"weight={shortened(str(weight))}: expected numbers >= 0, not all of them 0")
    if class_counts is not None and len(weight) != len(class_counts):
        raise ValueError(f"weight has {len(weight)} numbers; expected {len(class_counts)}, one a class")
    return WeightedCrossEntropy(torch.tensor(weight), label_smoothing, reduction)


def checked(reduction: str) -> str:
    """Mean or sum, which leave one number of a batch."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={shortened(str(reduction))}: expected mean or sum")
    return reduction


def probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as a probability of each class, `[batch, num_classes]`."""
    return labels if labels.ndim == 2 else nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy of classes that weigh differently: a mean in which a sample counts as much as its class.

    A sample of several classes counts as each in its share. Smoothing spreads the label, not the weight: torch's own
    loss weighs the spread part by the class that it was spread to, so that training favours other classes than the
    weights say (pytorch/pytorch#104776). Without smoothing both are the same.

    Args:
        weight: of each class, `[num_classes]`.
        label_smoothing: share of each label that is spread over all classes, 0 to 1.
        reduction: "mean" or "sum" over the samples.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing, self.reduction = label_smoothing, checked(reduction)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One number in nats."""
        surprise = -logits.log_softmax(1)  # of every class, were it the label
        smooth = torch.lerp(surprise, surprise.mean(1, keepdim=True), self.label_smoothing)
        loss = (probabilities(labels, logits) * self.weight * smooth).sum()
        return loss / self.weight_of(labels) if self.reduction == "mean" else loss

    def weight_of(self, labels: Tensor) -> Tensor:
        """What samples weigh in all; parts of a batch are put together by it."""
        return (self.weight[labels] if labels.ndim == 1 else labels @ self.weight).sum()


class _Loss(nn.Module):
    """Mean or sum over the samples of what `each` gives."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = checked(reduction)

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample, `[batch]`, or of every sample and class."""
        raise NotImplementedError

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One number."""
        each = self.each(logits, labels)
        losses = each if each.ndim == 1 else each.mean(1)
        return losses.mean() if self.reduction == "mean" else losses.sum()


class NLL(_Loss):
    """Negative log likelihood, in nats, of a model that ends in `log_softmax`; on logits the same as cross-entropy.

    The logarithm of the softmax of such an output is the output; without it a model of logits would train to nonsense.
    """

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of class indices alone."""
        if labels.ndim != 1:
            raise ValueError("it takes class indices, no probabilities")
        return nn.functional.nll_loss(logits.log_softmax(1), labels, reduction="none")


class MSE(_Loss):
    """Mean over the classes of the squared difference between a logit and the label's probability, 1 or 0.

    Hui and Belkin, arXiv:2006.07322, without their rescaling.
    """

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[batch, num_classes]`."""
        return (logits - probabilities(labels, logits)).square()


class BCE(_Loss):
    """Mean over the classes of the binary cross-entropy, a yes or no each (Wightman et al., arXiv:2110.00476)."""

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[batch, num_classes]`."""
        return nn.functional.binary_cross_entropy_with_logits(logits, probabilities(labels, logits), reduction="none")


class Focal(_Loss):
    """Cross-entropy times (1 - p)^gamma, p the probability of the label: what is right already counts little.

    Lin et al., arXiv:1708.02002, equation 4, with softmax.

    Args:
        gamma: 0 is cross-entropy.
        reduction: "mean" or "sum" over the samples.
    """

    def __init__(self, gamma: float = 2.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.gamma = gamma

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[batch]`."""
        surprise = -logits.log_softmax(1)
        # 1 - p by expm1, as p is rounded to 1 long before it is one; at 0 the power has no finite slope.
        missing = (-torch.expm1(-surprise)).clamp(min=1e-12)
        return (probabilities(labels, logits) * missing**self.gamma * surprise).sum(1)
