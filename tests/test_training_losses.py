"""The losses against torch's own, and where torch has none or is wrong, against their formula in a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import Call
from torch import Tensor, nn

from engine.training.losses import BCE, MSE, NLL, Focal, WeightedCrossEntropy, cross_entropy
from engine.training.step import weight_of

WEIGHT = [1.0, 5.0, 0.2]


def samples(count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class indices and probabilities."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, 3, generator=draw)
    return logits, torch.randint(0, 3, (count,), generator=draw), torch.rand(count, 3, generator=draw).softmax(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_against_torchs_own(reduction: str) -> None:
    logits, labels, soft = samples()
    hot = nn.functional.one_hot(labels, 3).float()
    pairs: list[tuple[nn.Module, nn.Module, Tensor, Tensor]] = [
        (NLL(reduction), nn.CrossEntropyLoss(reduction=reduction), labels, labels),
        (MSE(), nn.MSELoss(), labels, hot),
        (BCE(), nn.BCEWithLogitsLoss(), labels, hot),
        (BCE(), nn.BCEWithLogitsLoss(), soft, soft),
        (Focal(0.0, reduction), nn.CrossEntropyLoss(reduction=reduction), labels, labels),
        (Focal(0.0, reduction), nn.CrossEntropyLoss(reduction=reduction), soft, soft),
        (
            WeightedCrossEntropy(torch.tensor(WEIGHT), 0.0, reduction),
            nn.CrossEntropyLoss(torch.tensor(WEIGHT), reduction=reduction),
            *(labels, labels),
        ),
        (
            WeightedCrossEntropy(torch.ones(3), 0.3, reduction),
            nn.CrossEntropyLoss(label_smoothing=0.3, reduction=reduction),
            *(soft, soft),
        ),
    ]
    for ours, theirs, own_labels, their_labels in pairs:
        assert torch.allclose(ours(logits, own_labels), theirs(logits, their_labels), rtol=1e-5), type(ours).__name__
    log_probabilities = logits.log_softmax(1)  # of a model that ends so
    assert torch.allclose(NLL()(log_probabilities, labels), nn.NLLLoss()(log_probabilities, labels))
    assert MSE("sum")(logits, labels).item() == pytest.approx(40 * MSE()(logits, labels).item(), rel=1e-5)


def by_hand(logits: Tensor, targets: list[list[float]], smoothing: float) -> float:
    """The weighted mean of what each class of each sample loses, number by number."""
    total = weight = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        norm = math.log(sum(math.exp(x) for x in row))
        surprise = [norm - x for x in row]
        for label, share in enumerate(target):
            smooth = (1 - smoothing) * surprise[label] + smoothing * sum(surprise) / len(row)
            total += share * WEIGHT[label] * smooth
            weight += share * WEIGHT[label]
    return total / weight


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_class_weights_with_smoothing_weigh_the_sample_and_not_what_is_spread(smoothing: float) -> None:
    logits, labels, soft = samples()
    loss = WeightedCrossEntropy(torch.tensor(WEIGHT), smoothing)
    hot = nn.functional.one_hot(labels, 3).tolist()
    assert loss(logits, labels).item() == pytest.approx(by_hand(logits, hot, smoothing), rel=1e-5)
    assert loss(logits, soft).item() == pytest.approx(by_hand(logits, soft.tolist(), smoothing), rel=1e-5)
    # A batch is the mean of its parts by their weights.
    parts = [(logits[:7], labels[:7]), (logits[7:], labels[7:])]
    whole = weight_of(loss, labels)
    assert sum(float(loss(x, y) * weight_of(loss, y) / whole) for x, y in parts) == pytest.approx(
        float(loss(logits, labels)), rel=1e-5
    )


def test_with_weights_and_smoothing_the_best_logits_are_of_the_right_class() -> None:
    """A single sample of the light class: whatever the weights, its own class has to come out the likeliest."""
    for smoothing in (0.1, 0.5):
        logits = torch.zeros(1, 3, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=0.5)
        loss = WeightedCrossEntropy(torch.tensor([1.0, 100.0, 0.01]), smoothing)
        for _ in range(300):
            optimizer.zero_grad()
            loss(logits, torch.tensor([2])).backward()
            optimizer.step()
        found = logits.softmax(1)[0].tolist()
        assert found == pytest.approx([smoothing / 3, smoothing / 3, 1 - 2 * smoothing / 3], abs=0.01)


def test_focal_is_its_formula() -> None:
    logits, labels, _ = samples()
    p = logits.double().softmax(1)[torch.arange(40), labels]
    expected = ((1 - p) ** 1.5 * -p.log()).mean()
    assert Focal(1.5)(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)  # its probability is 1 in float32
    Focal(0.5)(sure, torch.tensor([0])).backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


def test_balanced_weights_make_classes_count_alike() -> None:
    """10 samples of 4 + 5 + 1 in 3 classes: 10 / (3 * 4), 10 / (3 * 5), 10 / 3; as scikit-learn's."""
    counts = {"a": 4, "b": 5, "c": 1}
    loss = cross_entropy(weight="balanced", class_counts=counts)
    assert isinstance(loss, WeightedCrossEntropy)
    assert loss.weight.tolist() == pytest.approx([10 / 12, 10 / 15, 10 / 3])
    labels = torch.tensor([0] * 4 + [1] * 5 + [2])
    from sklearn.utils.class_weight import compute_class_weight

    assert loss.weight.tolist() == pytest.approx(
        compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy()).tolist()
    )
    # Each class's samples together weigh the same.
    assert [float(weight_of(loss, labels[labels == k])) for k in range(3)] == pytest.approx([10 / 3] * 3)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: cross_entropy(weight="even"), "weight=even: expected balanced"),
    (lambda: cross_entropy(weight="balanced"), "only reading all samples could tell"),
    (lambda: cross_entropy(weight="balanced", class_counts={"cat": 3, "dog": 0}), "no training sample is of class dog"),
    (lambda: cross_entropy(weight=[1, 2], class_counts={"a": 1, "b": 1, "c": 1}), "has 2 numbers; expected 3"),
    (lambda: cross_entropy(weight=[1, -2]), "expected numbers >= 0"),
    (lambda: cross_entropy(weight=[0, 0.0]), "not all of them 0"),
    (lambda: cross_entropy(weight=["1"]), "expected numbers >= 0"),  # type: ignore[list-item]
    (lambda: cross_entropy(reduction="none"), "expected mean or sum"),
    (lambda: Focal(2.0, "none"), "expected mean or sum"),
    (lambda: NLL()(torch.zeros(2, 3), torch.zeros(2, 3)), "no probabilities"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_every_loss_trains(call: Call) -> None:
    for name in ("cross_entropy", "nll", "mse", "bce", "focal"):
        done = call("train", f"criterion={name}", "epochs=2", "optimizer=adam", "optimizer.lr=3e-3", f"name={name}")
        assert done.code == 0, done.err
        assert float(done.out.split("test     accuracy ")[1].split("%")[0]) > 75, name
    done = call("train", "criterion.weight=balanced", "criterion.label_smoothing=0.1", "mixup=0.2", "epochs=1")
    assert (
        done.code == 0
        and "cross-entropy with class weights and label_smoothing=0.1 and mixed samples in training" in done.out
    )
    weights = "criterion.weight=[1,1,1,1,1,1,1,1,1,9]"
    assert call("train", weights, "epochs=1").code == 0


def test_what_does_not_fit_is_refused_before_anything_is_made(call: Call) -> None:
    assert "criterion NLL does not take" in (said := call("train", "criterion=nll", "mixup=1").error)
    assert "no probabilities" in said
    assert "weight has 2 numbers; expected 10" in call("train", "criterion.weight=[1,2]").error
    assert "expected balanced, or a list of numbers" in call("train", "criterion.weight=even").error
    assert call("evaluate").code == 2  # there is no run


def test_nothing_is_smoothed_unless_asked_for() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    assert torch.equal(cross_entropy()(logits, labels), nn.functional.cross_entropy(logits, labels))
    weight = torch.tensor([1.0, 2.0, 3.0])
    expected = nn.functional.cross_entropy(logits, labels, weight=weight)
    for criterion in (WeightedCrossEntropy(weight), cross_entropy(weight=weight.tolist())):
        torch.testing.assert_close(criterion(logits, labels), expected)
