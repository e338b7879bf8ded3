"""Loss and counts, summed on the device, and what follows from them: accuracy, precision, recall and F1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def class_of(labels: Tensor) -> Tensor:
    """Class indices `[batch]` of labels that are class indices, or probabilities `[batch, num_classes]`."""
    return labels.argmax(1) if labels.ndim == 2 else labels


class Tally:
    """Loss and accuracy of a training epoch; nothing here waits for the device until it is read.

    Args:
        num_batches: in the epoch.
        device: where losses and logits are.
    """

    def __init__(self, num_batches: int, device: torch.device) -> None:
        self.losses = torch.zeros(num_batches, device=device)  # one a step, so that a bad one can be named
        self.sizes: list[int] = []
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Begin an epoch."""
        self.losses.zero_()
        self.sizes.clear()
        self.correct.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step: its mean loss, logits `[batch, num_classes]` and labels."""
        self.losses[len(self.sizes)] = loss.detach()
        self.correct += (logits.detach().argmax(1) == class_of(labels)).sum()
        self.sizes.append(len(labels))

    def first_bad_step(self) -> int | None:
        """The first step, from 0, whose loss is not a finite number. Waits for the device."""
        bad = (~self.losses[: len(self.sizes)].isfinite()).nonzero()
        return int(bad[0]) if len(bad) else None

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) over the samples so far. Waits for the device."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        loss = (self.losses[: len(sizes)].cpu().double() * sizes).sum() / sizes.sum()
        return float(loss), int(self.correct) / int(sizes.sum())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch keeps."""
        return {"losses": self.losses[: len(self.sizes)].cpu(), "sizes": list(self.sizes), "correct": int(self.correct)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.reset()
        self.sizes += state["sizes"]
        self.losses[: len(self.sizes)] = state["losses"]
        self.correct.fill_(state["correct"])


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[float, Tensor]:
    """Mean cross-entropy in nats, and the confusion matrix, of a model over batches.

    The loss is plain cross-entropy whatever the training criterion, so that runs can be compared.

    Returns:
        loss, and counts int64 `[num_classes, num_classes]` on the CPU, rows the true class, columns the predicted.
    """
    training = model.training
    model.eval()
    losses: list[Tensor] = []
    sizes: list[int] = []
    confusion = None
    for images, labels in batches:
        logits = model(images)
        losses.append(nn.functional.cross_entropy(logits, labels))
        sizes.append(len(images))
        if confusion is None:
            confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=logits.device)
        pairs = class_of(labels) * num_classes + logits.argmax(1)
        confusion.scatter_add_(0, pairs, torch.ones_like(pairs))
    model.train(training)
    if confusion is None:
        raise ValueError("no batch to evaluate")
    weights = torch.tensor(sizes, dtype=torch.float64)
    loss = (torch.stack(losses).cpu().double() * weights).sum() / weights.sum()
    return float(loss), confusion.view(num_classes, num_classes).cpu()


def accuracy(confusion: Tensor) -> float:
    """Share of the samples on the diagonal, 0 to 1."""
    return int(confusion.diagonal().sum()) / max(1, int(confusion.sum()))


def per_class(confusion: Tensor, classes: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of samples of each class; a rate without samples counts as 0."""
    right, predicted, true = confusion.diagonal().double(), confusion.sum(0).double(), confusion.sum(1).double()
    rows = {
        "precision": right / predicted.clamp(min=1),
        "recall": right / true.clamp(min=1),
        "f1": 2 * right / (predicted + true).clamp(min=1),
    }
    return {
        name: {**{key: float(values[i]) for key, values in rows.items()}, "samples": int(true[i])}
        for i, name in enumerate(classes)
    }
