"""Loss and counts, summed on the device, and what follows from them: accuracy, its interval, AUC, F1 and the like."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.distributed import gathered, in_turn, is_first, lowest, total
from engine.training.losses import WeightedCrossEntropy


def class_of(labels: Tensor) -> Tensor:
    """Class indices `[batch]` of labels that are class indices, or probabilities `[batch, num_classes]`."""
    return labels.argmax(1) if labels.ndim == 2 else labels


class Share(NamedTuple):
    """What the loss of this process's part of a micro-batch counts.

    Attributes:
        gradient: in the gradient of the step, a number or a tensor of one.
        loss: in the loss of the micro-batch, the same; with one process all of it.
        samples: of the micro-batch, in all processes together.
    """

    gradient: Any
    loss: Any
    samples: int


class Tally:
    """Loss and accuracy of a training epoch; nothing here waits for the device until it is read.

    Micro-batches are put aside and counted many at a time: counting each would cost as much as a small model's layer.
    What several processes counted is added up when it is read, or its state is taken, by all of them.

    Args:
        device: where they are counted.
        accumulate: micro-batches of a step.
    """

    MOST = 1 << 18  # logits put aside at most

    def __init__(self, device: torch.device, accumulate: int = 1) -> None:
        self.device, self.accumulate = device, accumulate
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self.samples = self.own = 0  # of all processes, of this one
        self.losses: list[Tensor] = []  # `[micro-batches]` each, on the device; all are kept, to name a bad one
        self.sizes: list[Tensor] = []  # as many, on the CPU: the samples of each
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sizes_aside: list[int] = []
        self._logits = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, share: Share | None = None) -> None:
        """Count a micro-batch, or a process's share of it: its mean loss, logits `[batch, num_classes]` and labels."""
        loss, samples = loss.detach(), len(labels) if share is None else share.samples
        if samples > len(labels):
            assert share is not None
            loss = loss * share.loss if len(labels) else torch.zeros_like(loss)  # of no sample there is no mean
        self._aside.append((loss, logits.detach(), labels))
        self._sizes_aside.append(samples)
        self.samples += samples
        self.own += len(labels)
        self._logits += logits.numel()
        if self._logits > self.MOST:
            self._count()

    def _count(self) -> None:
        if self._aside:
            losses, logits, labels = zip(*self._aside, strict=True)
            together = torch.stack(losses)
            self.losses.append(together if together.dtype == torch.float64 else together.float())
            self.sizes.append(torch.tensor(self._sizes_aside))
            self.correct += (torch.cat(logits).argmax(1) == class_of(torch.cat(labels))).sum()
            self._aside, self._sizes_aside, self._logits = [], [], 0

    def _counted(self) -> tuple[Tensor, Tensor]:
        """Losses and sizes of the micro-batches so far, on the CPU."""
        self._count()
        if not self.losses:
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        self.losses, self.sizes = [torch.cat(self.losses)], [torch.cat(self.sizes)]
        return self.losses[0].cpu(), self.sizes[0]

    def first_bad_step(self) -> int | None:
        """The first step, from 0, whose loss is not a finite number. Waits for the device."""
        bad = (~self._counted()[0].isfinite()).nonzero()
        first = lowest(int(bad[0]) // self.accumulate if len(bad) else sys.maxsize)
        return None if first == sys.maxsize else first

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) over the samples so far. Waits for the device."""
        losses, sizes = self._counted()
        whole = total(torch.stack([(losses.double() * sizes).sum(), self.correct.cpu().double()]))
        return float(whole[0] / self.samples), int(whole[1]) / self.samples

    def read_own(self) -> tuple[float, float]:
        """The same of this process's samples alone, for what is shown meanwhile."""
        losses, sizes = self._counted()
        own = max(1, self.own)
        return float((losses.double() * sizes).sum() / own), int(self.correct) / own

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch keeps."""
        losses, sizes = self._counted()
        return {"losses": total(losses.clone()), "sizes": sizes, "correct": int(total(self.correct.cpu().clone()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; of several processes the first one goes on with what all have counted."""
        self.reset()
        losses, self.sizes = state["losses"].to(self.device), [torch.as_tensor(state["sizes"])]
        self.losses = [losses if is_first() else torch.zeros_like(losses)]
        self.samples = int(self.sizes[0].sum())
        self.own = self.samples if is_first() else 0
        self.correct.fill_(state["correct"] if is_first() else 0)


class Mistakes:
    """The errors of an evaluation, the most confident first; the device is never waited for.

    Of all of them there are numbers, of the first `keep` the images too.

    Args:
        keep: how many.
    """

    def __init__(self, keep: int = 24) -> None:
        self.keep = keep
        self.images: Tensor | None = None  # the most confident so far, in order
        self.sure: Tensor | None = None  # of those, as below
        self.batches: list[tuple[Tensor, ...]] = []  # truths, predictions, probabilities (-1 where there is no error)

    def add(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: images `[batch, channels, height, width]`, logits `[batch, num_classes]` and labels."""
        probabilities, predictions = logits.float().softmax(1).max(1)
        truths = class_of(labels)
        sure = torch.where(predictions != truths, probabilities, -1.0)
        self.batches.append((truths, predictions, sure))
        images, sure = self._most_sure(images, sure)  # images are copied for these few only
        if self.images is not None and self.sure is not None:
            images, sure = self._most_sure(torch.cat((self.images, images)), torch.cat((self.sure, sure)))
        self.images, self.sure = images, sure

    def _most_sure(self, images: Tensor, sure: Tensor) -> tuple[Tensor, Tensor]:
        places = sure.sort(descending=True, stable=True).indices[: self.keep]  # of equally sure ones the earlier
        return images[places], sure[places]

    def gather(self) -> None:
        """Take in what the others have met of several processes, each of which evaluates every so many-th batch."""
        self.batches = in_turn([tuple(part.cpu() for part in batch) for batch in self.batches])
        own = gathered(None if self.images is None else self.images.cpu())
        images: list[Iterator[Tensor]] = [iter([] if kept is None else kept) for kept in own]  # as these are in order
        process = torch.tensor([number % len(own) for number, batch in enumerate(self.batches) for _ in batch[0]])
        sure = torch.cat([batch[2] for batch in self.batches])
        first = sure.sort(descending=True, stable=True).indices[: self.keep]
        self.images, self.sure = torch.stack([next(images[of]) for of in process[first].tolist()]), sure[first]

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Places, truths, predictions and probabilities `[n]` of all errors, and the images of the first.

        Places count the samples in the order in which they came, from 0. Images are `[at most keep, channels, height,
        width]`, as the model saw them. All on the CPU. Waits for the device.
        """
        assert self.images is not None and self.sure is not None
        truths, predictions, sure = (torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True))
        places = sure.sort(descending=True, stable=True).indices[: int((sure >= 0).sum())]
        return places, truths[places], predictions[places], sure[places], self.images[self.sure >= 0].cpu()


class Ranking:
    """How high each sample's true class stands among all, and each class's scores; the device is never waited for."""

    MOST = 1 << 26  # scores kept for `auc`, 256 MB: samples times classes; of more there is none

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []  # truths and ranks
        self.scores: list[Tensor] | None = []  # float32 `[batch, num_classes]` each; None when they became too many
        self._count = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits `[batch, num_classes]` and labels."""
        truths = class_of(labels)
        own = logits.gather(1, truths[:, None])
        earlier = torch.arange(logits.shape[1], device=logits.device) < truths[:, None]
        above = (logits > own) | ((logits == own) & earlier)  # of equal ones the first, as argmax takes it
        self.batches.append((truths, above.sum(1)))
        self._count += logits.numel()
        if self._count > self.MOST:
            self.scores = None
        elif self.scores is not None:
            # Logarithms of the probabilities, without the largest's 1 in the sum: so that even those which would round
            # to 0 or 1 keep their order.
            shifted = logits.float() - logits.float().max(1, keepdim=True).values
            others = shifted.exp().scatter(1, logits.argmax(1, keepdim=True), 0.0).sum(1, keepdim=True)
            self.scores.append(shifted - others.log1p())

    def gather(self) -> None:
        """Take in what the others have met of several processes, each of which evaluates every so many-th batch."""
        self.batches = in_turn([(truths.cpu(), ranks.cpu()) for truths, ranks in self.batches])
        self._count = sum(gathered(self._count))
        if self._count > self.MOST:
            self.scores = None
        elif self.scores is not None:
            self.scores = in_turn([scores.cpu() for scores in self.scores])

    def read(self) -> tuple[Tensor, Tensor]:
        """True classes, and how many classes the model puts before them, int64 `[n]` each, on the CPU. Waits."""
        truths, ranks = (torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True))
        return truths, ranks

    def auc(self) -> dict[int, float] | None:
        """The area under the ROC curve, 0 to 1, of each class against the rest; None where scores became too many.

        Exact: how often a sample of the class scores higher than another sample, a tie counting one half (Mann and
        Whitney 1947). Only of classes that some of the samples have, and not all. Waits for the device.
        """
        if self.scores is None:
            return None
        scores, truths = torch.cat(self.scores), torch.cat([truths for truths, _ in self.batches])
        members = truths.argsort().split(truths.bincount(minlength=scores.shape[1]).tolist())
        areas = {}
        for first in range(0, scores.shape[1], 64):  # of so many classes at once, for the sake of the cache
            for label, column in enumerate(scores[:, first : first + 64].t().contiguous(), first):
                inside, outside = len(members[label]), len(truths) - len(members[label])
                if not inside or not outside:
                    continue
                own = column[members[label]].sort().values
                # Of each sample twice the class's own below it and once those at its side; the own among themselves
                # have inside ** 2 of these.
                twice = torch.searchsorted(own, column).sum() + torch.searchsorted(own, column, right=True).sum()
                areas[label] = 1 - (int(twice) - inside**2) / (2 * inside * outside)
        return areas


def added_up(losses: list[Tensor], sizes: list[int]) -> Tensor:
    """The sum of the losses of all samples, and how many there are, float64 `[2]`, of mean losses of batches."""
    weights = torch.tensor(sizes, dtype=torch.float64)
    loss = (torch.stack(losses).cpu().double() * weights).sum() if losses else torch.zeros((), dtype=torch.float64)
    return torch.stack([loss, weights.sum()])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    mistakes: Mistakes | None = None,
    batch_losses: list[Tensor] | None = None,
    ranking: Ranking | None = None,
) -> tuple[float, Tensor]:
    """Mean cross-entropy in nats, and the confusion matrix, of a model over batches.

    The loss is plain cross-entropy whatever the training criterion, so that runs can be compared. `mistakes` and
    `ranking`, if given, take in every batch; `batch_losses` gets the mean loss of each. Of several processes each
    evaluates its own samples, and loss and counts are those of all; a batch may have no sample of this process.

    Returns:
        loss, and counts int64 `[num_classes, num_classes]` on the CPU, rows the true class, columns the predicted.
    """
    training = model.training
    model.eval()
    losses = [] if batch_losses is None else batch_losses
    sizes: list[int] = []
    confusion = None
    for images, labels in batches:
        if not len(images):
            continue
        logits = model(images)
        losses.append(nn.functional.cross_entropy(logits, labels))
        sizes.append(len(images))
        if confusion is None:
            confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=logits.device)
        pairs = class_of(labels) * num_classes + logits.argmax(1)
        confusion.scatter_add_(0, pairs, torch.ones_like(pairs))
        if mistakes is not None:
            mistakes.add(images, logits, labels)
        if ranking is not None:
            ranking.add(logits, labels)
    model.train(training)
    sums = total(added_up(losses, sizes))
    if not sums[1]:
        raise ValueError("no batch to evaluate")
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64) if confusion is None else confusion.cpu()
    return float(sums[0] / sums[1]), total(counts).view(num_classes, num_classes)


def loss_name(criterion: nn.Module, target_transform: str | None = None, mixed: bool = False) -> str | None:
    """What a training criterion measures, None where it is what `evaluate` measures: plain cross-entropy.

    Args:
        criterion: the loss.
        target_transform: the name of what is done to training labels before.
        mixed: whether training samples are mixed.
    """
    changes = []
    is_cross_entropy = type(criterion) in (nn.CrossEntropyLoss, WeightedCrossEntropy)
    if is_cross_entropy and criterion.weight is not None:
        changes.append("class weights")
    if is_cross_entropy and criterion.label_smoothing:
        changes.append(f"label_smoothing={criterion.label_smoothing:g}")
    if is_cross_entropy and criterion.reduction != "mean":
        changes.append(f"reduction={criterion.reduction}")
    if target_transform is not None and not target_transform.endswith(".one_hot"):  # the same in another form
        changes.append(f"labels by {target_transform}")
    if mixed:
        changes.append("mixed samples")
    if is_cross_entropy and not changes:
        return None
    name = "cross-entropy" if is_cross_entropy else type(criterion).__name__
    return f"{name} with {' and '.join(changes)}" if changes else name


def accuracy(confusion: Tensor) -> float:
    """Share of the samples on the diagonal, 0 to 1."""
    return int(confusion.diagonal().sum()) / max(1, int(confusion.sum()))


def balanced_accuracy(confusion: Tensor) -> float:
    """The plain mean of the recall of the classes that have samples, 0 to 1: each class counts as much as another."""
    true = confusion.sum(1)
    return float((confusion.diagonal()[true > 0].double() / true[true > 0]).mean())


def wilson(right: int, samples: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of an accuracy, 0 to 1, that the samples leave open at a level of confidence (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (right + z * z / 2) / (samples + z * z)
    half = z * math.sqrt(right * (samples - right) / samples + z * z / 4) / (samples + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test of two classifiers on the same samples, two-sided, 0 to 1.

    That of a fair coin to fall at least as unevenly (McNemar 1947), at any counts: the terms of the binomial sum are
    taken relative to the largest.

    Args:
        only_first, only_second: samples that only this one has right.
    """
    fewer, total = min(only_first, only_second), only_first + only_second
    largest = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1) - total * math.log(2)
    tail, term = 0.0, 1.0
    for count in range(fewer, -1, -1):
        tail += term
        term *= count / (total - count + 1)
        if term < 1e-17 * tail:
            break
    return min(1.0, 2 * math.exp(largest) * tail)


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
