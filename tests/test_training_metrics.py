"""Loss and counts: numbers worked out by hand, and scikit-learn's on random predictions."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from engine.errors import RunError
from engine.training.metrics import (
    Mistakes,
    Ranking,
    Tally,
    accuracy,
    balanced_accuracy,
    class_of,
    evaluate,
    loss_name,
    mcnemar,
    per_class,
    wilson,
)

CPU = torch.device("cpu")
LN3 = math.log(3.0)  # the logits (ln 3, 0) mean the probabilities 3/4 and 1/4


def logits_for(predicted: list[int], num_classes: int = 3) -> Tensor:
    """Logits whose largest is that of the class, `[batch, num_classes]`."""
    return nn.functional.one_hot(torch.tensor(predicted), num_classes).float()


# ---------------------------------------------------------------------------------------------------------------------
# Tally

# A training epoch of 7 samples in batches of 3, 3 and 1.
#   mean loss of the step   labels     predicted   right
#   1.0                     0 1 2      0 1 1       2
#   2.0                     2 2 0      2 0 1       1
#   8.0                     1          1           1
# Loss: (3 * 1 + 3 * 2 + 1 * 8) / 7 = 17 / 7, where the mean over the steps would be 11 / 3. Accuracy: 4 / 7.
STEPS = [(1.0, [0, 1, 2], [0, 1, 1]), (2.0, [2, 2, 0], [2, 0, 1]), (8.0, [1], [1])]


def counted(steps: list[tuple[float, list[int], list[int]]], tally: Tally | None = None) -> Tally:
    tally = tally or Tally(CPU)
    for loss, labels, predicted in steps:
        tally.add(torch.tensor(loss, requires_grad=True), logits_for(predicted), torch.tensor(labels))
    return tally


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples() -> None:
    tally = counted(STEPS)
    assert tally.samples == 7
    assert tally.read() == (pytest.approx(17 / 7, abs=1e-12), pytest.approx(4 / 7, abs=1e-12))
    assert tally.read() == (pytest.approx(17 / 7, abs=1e-12), pytest.approx(4 / 7, abs=1e-12))  # reading takes nothing


def test_a_running_epoch_can_be_read_after_every_step() -> None:
    tally = Tally(CPU)
    expected = [(1.0, 2 / 3), ((3 + 6) / 6, 3 / 6), (17 / 7, 4 / 7)]
    for step, (loss, right) in zip(STEPS, expected, strict=True):
        counted([step], tally)
        assert tally.read() == (pytest.approx(loss), pytest.approx(right))


@pytest.mark.parametrize("most", [0, 5, 12, 1 << 18])  # logits put aside: counted at every step, at some, at none
def test_counting_many_steps_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(Tally, "MOST", most)
    tally = counted(STEPS * 10)
    assert tally.samples == 70
    assert tally.read() == (pytest.approx(17 / 7), pytest.approx(4 / 7))
    assert len(tally.losses[0]) == 30 and tally.first_bad_step() is None


def test_steps_are_put_aside_up_to_so_many_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one logit each where two are the most: the third is one too many, and then it begins anew."""
    monkeypatch.setattr(Tally, "MOST", 2)
    tally = Tally(CPU)
    held = []
    for _ in range(7):
        tally.add(torch.tensor(1.0), torch.zeros(1, 1), torch.tensor([0]))
        held.append(len(tally._aside))
    assert held == [1, 2, 0, 1, 2, 0, 1]


def test_more_logits_than_are_put_aside() -> None:
    """100 steps of 64 samples and 100 classes are 640,000 logits; step i has the loss i and i mod 65 right."""
    tally = Tally(CPU)
    for step in range(100):
        right = step % 65
        labels = torch.zeros(64, dtype=torch.int64)
        predicted = [0] * right + [99] * (64 - right)
        tally.add(torch.tensor(float(step)), logits_for(predicted, 100), labels)
        assert sum(logits.numel() for _, logits, _ in tally._aside) <= Tally.MOST == 262_144
    # 0 + 1 + ... + 99 = 4950. Right: 0 + ... + 64 = 2080, and for the steps 65 to 99 0 + ... + 34 = 595.
    assert tally.read() == (pytest.approx(49.5), pytest.approx((2080 + 595) / 6400))


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([1.0, 2.0, 3.0], None),
        ([math.nan, 1.0, 1.0], 0),
        ([1.0, math.inf, math.nan], 1),
        ([1.0, 1.0, -math.inf], 2),
        ([], None),
    ],
)
@pytest.mark.parametrize("most", [0, 1 << 18])
def test_the_first_step_whose_loss_is_no_number(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], first: int | None, most: int
) -> None:
    monkeypatch.setattr(Tally, "MOST", most)
    assert counted([(loss, [0], [0]) for loss in losses]).first_bad_step() == first


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_tally_goes_on_from_its_state(done: int) -> None:
    before = counted(STEPS[:done])
    state = copy.deepcopy(before.state_dict())
    after = Tally(CPU)
    counted([(5.0, [0, 0], [0, 0])], after)  # what it held is forgotten
    after.load_state_dict(state)
    assert after.samples == before.samples == [0, 3, 6, 7][done]
    counted(STEPS[done:], after)
    assert after.read() == (pytest.approx(17 / 7), pytest.approx(4 / 7))
    counted(STEPS[done:], before)  # giving the state away changed nothing
    assert after.read() == before.read()


def test_the_step_with_the_bad_loss_is_named_across_a_resumption() -> None:
    after = Tally(CPU)
    after.load_state_dict(counted(STEPS[:2]).state_dict())
    assert after.first_bad_step() is None
    assert counted([(math.nan, [0], [0])], after).first_bad_step() == 2


def test_a_run_resumed_before_its_first_step_has_counted_none() -> None:
    after = Tally(CPU)
    after.load_state_dict(Tally(CPU).state_dict())
    assert after.samples == 0 and after.first_bad_step() is None
    assert counted([(math.nan, [0], [0])], after).first_bad_step() == 0


def test_an_epoch_begins_with_nothing() -> None:
    tally = counted([(math.nan, [0, 1], [2, 2])])
    tally.reset()
    assert tally.samples == 0 and tally.first_bad_step() is None
    assert counted(STEPS, tally).read() == (pytest.approx(17 / 7), pytest.approx(4 / 7))


def test_labels_may_be_probabilities() -> None:
    labels = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])  # of the classes 2 and 0
    assert class_of(labels).tolist() == [2, 0] and class_of(torch.tensor([1, 2])).tolist() == [1, 2]
    tally = Tally(CPU)
    tally.add(torch.tensor(0.5), logits_for([2, 1]), labels)
    assert tally.samples == 2 and tally.read() == (0.5, 0.5)


def test_a_tally_holds_no_graph() -> None:
    tally = counted(STEPS)
    assert not any(tensor.requires_grad for step in tally._aside for tensor in step)
    assert not tally._counted()[0].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

# Two classes, whose logits are the "pixels"; the batches are of 2, 2 and 1 samples.
#   logits      truth  predicted  loss
#   (ln 3, 0)   0      0          -ln 3/4
#   (ln 3, 0)   1      0          -ln 1/4
#   (0, ln 3)   1      1          -ln 3/4
#   (ln 3, 0)   0      0          -ln 3/4
#   (ln 3, 0)   1      0          -ln 1/4
# Loss: (3 * ln 4/3 + 2 * ln 4) / 5 = 0.727126. The mean over the batches would be 0.836988.
ROWS = [(0, 0), (1, 0), (1, 1), (0, 0), (1, 0)]  # truth, predicted
LOSS = (3 * math.log(4 / 3) + 2 * math.log(4)) / 5


def as_images(predicted: list[int], num_classes: int) -> Tensor:
    """Images `[batch, 1, 1, num_classes]` that `nn.Flatten` makes logits of, ln 3 for the class and 0 for others."""
    return LN3 * logits_for(predicted, num_classes)[:, None, None, :]


def in_batches(rows: list[tuple[int, int]], size: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [(as_images([p for _, p in part], num_classes), torch.tensor([t for t, _ in part])) for part in parts]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_the_loss_of_an_evaluation_is_the_mean_over_the_samples(size: int) -> None:
    loss, confusion = evaluate(nn.Flatten(), in_batches(ROWS, size, 2), 2)
    assert loss == pytest.approx(LOSS, rel=1e-6) and loss == pytest.approx(0.727126, abs=1e-6)
    assert confusion.tolist() == [[2, 0], [2, 1]]
    assert accuracy(confusion) == 3 / 5


def test_rows_are_the_true_classes_and_columns_the_predicted() -> None:
    rows = [(0, 0), (0, 1), (0, 1), (1, 1), (2, 2), (2, 0), (2, 2)]  # two of class 0 are taken for class 1
    _, confusion = evaluate(nn.Flatten(), in_batches(rows, 3, 4), 4)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert accuracy(confusion) == 4 / 7


def test_accuracy_is_the_share_on_the_diagonal() -> None:
    assert accuracy(torch.tensor([[3, 1], [0, 4]])) == 7 / 8
    assert accuracy(torch.tensor([[0, 5], [5, 0]])) == 0
    assert accuracy(torch.tensor([[1, 0], [0, 0]])) == 1
    assert accuracy(torch.zeros(2, 2, dtype=torch.int64)) == 0


def test_labels_of_an_evaluation_may_be_probabilities() -> None:
    """Probabilities (3/4, 1/4), label (0.9, 0.1): 0.9 ln 4/3 + 0.1 ln 4; label (0.2, 0.8): 0.2 ln 4/3 + 0.8 ln 4."""
    labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    loss, confusion = evaluate(nn.Flatten(), [(as_images([0, 0], 2), labels)], 2)
    assert loss == pytest.approx((1.1 * math.log(4 / 3) + 0.9 * math.log(4)) / 2, rel=1e-6)
    assert confusion.tolist() == [[1, 0], [1, 0]]


def test_an_evaluation_of_nothing_is_no_result() -> None:
    with pytest.raises((ValueError, RunError)):
        evaluate(nn.Flatten(), [], 2)


class Wavering(nn.Module):
    """A model that answers otherwise in training: dropout, and batch normalisation that learns while it looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def wavering() -> tuple[Wavering, Tensor, Tensor]:
    """The model after some training passes, 10 images and their labels."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(10, 3, 2, 2, generator=generator) * 3 + 1
    labels = torch.randint(0, 4, (10,), generator=generator)
    torch.manual_seed(5)
    model = Wavering()
    for _ in range(5):
        model(images)
    return model, images, labels


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_a_plain_forward_pass_in_evaluation_mode(training: bool) -> None:
    model, images, labels = wavering()
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, confusion = evaluate(model, list(zip(images.split(4), labels.split(4), strict=True)), 4)

    assert all(module.training is training for module in model.modules())  # as it was
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        log_probabilities = plain(images).double().log_softmax(1)
    expected = -sum(float(row[label]) for row, label in zip(log_probabilities, labels, strict=True)) / 10
    assert loss == pytest.approx(expected, rel=1e-5)
    counts = [[0] * 4 for _ in range(4)]
    for row, label in zip(log_probabilities.tolist(), labels.tolist(), strict=True):
        counts[label][row.index(max(row))] += 1
    assert confusion.tolist() == counts


def test_an_evaluation_hands_out_the_loss_of_every_batch() -> None:
    """Of the rows above in batches of 2, 2 and 1: (ln 4/3 + ln 4) / 2, ln 4/3, ln 4."""
    losses: list[Tensor] = []
    loss, _ = evaluate(nn.Flatten(), in_batches(ROWS, 2, 2), 2, batch_losses=losses)
    expected = [(math.log(4 / 3) + math.log(4)) / 2, math.log(4 / 3), math.log(4)]
    assert [float(one) for one in losses] == pytest.approx(expected, rel=1e-6) and loss == pytest.approx(LOSS, rel=1e-6)


def test_evaluation_leaves_no_graph_and_draws_nothing() -> None:
    model, images, labels = wavering()
    state = torch.get_rng_state()
    seen: list[bool] = []
    model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.requires_grad))
    evaluate(model, [(images, labels)], 4)
    assert seen == [False] and torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# Per class


def test_figures_of_each_class_by_hand() -> None:
    # true a: 3, of which 1 found; predicted a: 2. precision 1/2, recall 1/3, F1 2 * 1 / (2 + 3)
    # true b: 1, found; predicted b: 3. precision 1/3, recall 1, F1 2 * 1 / (3 + 1)
    # true c: 3, of which 1 found; predicted c: 1. precision 1, recall 1/3, F1 2 * 1 / (1 + 3)
    # true d: none; predicted d: 1. all 0
    # true e: none; predicted e: none. all 0
    confusion = torch.tensor([[1, 2, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    rows = per_class(confusion, ["a", "b", "c", "d", "e"])
    expected = {"a": (1 / 2, 1 / 3, 2 / 5, 3), "b": (1 / 3, 1, 1 / 2, 1), "c": (1, 1 / 3, 1 / 2, 3)}
    expected |= {"d": (0, 0, 0, 0), "e": (0, 0, 0, 0)}
    assert list(rows) == ["a", "b", "c", "d", "e"]
    for name, (precision, recall, f1, samples) in expected.items():
        assert rows[name]["precision"] == pytest.approx(precision)
        assert rows[name]["recall"] == pytest.approx(recall)
        assert rows[name]["f1"] == pytest.approx(f1)
        assert rows[name]["samples"] == samples


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    reference = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn: pip install '.[test]'")
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(57, 1, 1, 6, generator=generator)
    images[..., 5] -= 9  # a class that is never predicted
    labels = torch.randint(0, 4 + seed % 2, (57,), generator=generator)  # and one or two that never occur
    images[torch.arange(57), 0, 0, labels] += 1
    loss, confusion = evaluate(nn.Flatten(), list(zip(images.split(16), labels.split(16), strict=True)), 6)

    predicted, known = images.flatten(1).argmax(1).numpy(), list(range(6))
    probabilities = images.flatten(1).double().softmax(1).numpy()
    assert confusion.tolist() == reference.confusion_matrix(labels.numpy(), predicted, labels=known).tolist()
    assert loss == pytest.approx(reference.log_loss(labels.numpy(), probabilities, labels=known), rel=1e-6)
    assert accuracy(confusion) == pytest.approx(reference.accuracy_score(labels.numpy(), predicted))
    rows = list(per_class(confusion, [*"abcdef"]).values())
    figures = reference.precision_recall_fscore_support(labels.numpy(), predicted, labels=known, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "samples"), figures, strict=True):
        assert [row[key] for row in rows] == pytest.approx(values.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def numbered(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 3, 3)


# Samples numbered 0 to 6, their truth, and the logit of class 1 where that of class 0 is 0: the larger it is, the surer
# is the model that it is class 1.
SEEN = [(0, 0, 2.0), (1, 1, 2.5), (2, 0, 4.0), (3, 1, -1.0), (4, 1, -9.0), (5, 0, 0.5), (6, 0, -3.0)]
#        wrong      right       wrong      wrong       wrong       wrong       right
SUREST = [4, 2, 0, 3, 5]  # |logit| 9, 4, 2, 1, 0.5


def read(mistakes: Mistakes) -> tuple[Tensor, list[list[float]]]:
    """The images that were kept, and truths, predictions and probabilities."""
    found = mistakes.read()
    (images,) = (tensor for tensor in found if tensor.ndim == 4)
    return images, [tensor.tolist() for tensor in found if tensor.ndim == 1][-3:]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [1, 2, 4, 5, 24])
def test_the_most_confident_errors_are_kept(size: int, keep: int) -> None:
    mistakes = Mistakes(keep)
    for first in range(0, 7, size):
        numbers, truths, sure = zip(*SEEN[first : first + size], strict=True)
        logits = torch.stack([torch.zeros(len(sure)), torch.tensor(sure)], 1)
        mistakes.add(numbered(list(numbers)), logits, torch.tensor(truths))
    images, (truths, predictions, probabilities) = read(mistakes)
    assert images[:, 0, 0, 0].tolist() == SUREST[:keep] and images.shape[1:] == (2, 3, 3)
    by_number = {number: (truth, logit) for number, truth, logit in SEEN}
    assert truths[:keep] == [by_number[number][0] for number in SUREST[:keep]]
    assert predictions[:keep] == [1 - by_number[number][0] for number in SUREST[:keep]]
    expected = [1 / (1 + math.exp(-abs(by_number[number][1]))) for number in SUREST[:keep]]
    assert probabilities[:keep] == pytest.approx(expected, rel=1e-6)


def test_of_equally_sure_errors_the_earlier_come_first() -> None:
    mistakes = Mistakes(3)
    for numbers in ([0, 1], [2], [3, 4]):
        mistakes.add(numbered(numbers), torch.tensor([[0.0, 99.0]] * len(numbers)), torch.zeros(len(numbers)).long())
    places, *_, images = mistakes.read()
    assert places.tolist() == [0, 1, 2, 3, 4] and images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_what_was_right_is_no_mistake() -> None:
    mistakes = Mistakes()
    mistakes.add(numbered([0, 1]), torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
    assert all(len(tensor) == 0 for tensor in mistakes.read())
    assert mistakes.keep == 24


def test_mistakes_of_probability_labels_and_of_an_evaluation() -> None:
    mistakes = Mistakes(keep=3)
    labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    evaluate(nn.Flatten(), [(as_images([0, 0], 2), labels)], 2, mistakes)
    images, (truths, predictions, probabilities) = read(mistakes)
    assert torch.equal(images, as_images([0], 2))
    assert (truths, predictions) == ([1], [0]) and probabilities == pytest.approx([0.75])


# ---------------------------------------------------------------------------------------------------------------------
# How high the true class stands, and one class against the rest


def ranked(logits: Tensor, labels: Tensor, size: int = 4) -> Ranking:
    ranking = Ranking()
    for rows, truths in zip(logits.split(size), labels.split(size), strict=True):
        ranking.add(rows, truths)
    return ranking


def test_the_place_of_the_true_class() -> None:
    """Of equal logits the first counts as higher, as argmax takes it: a model that says nothing is right by chance."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [5.0, 5.0, 5.0], [5.0, 5.0, 5.0]])
    truths, ranks = ranked(logits, torch.tensor([0, 1, 2, 0, 2]), size=2).read()
    assert truths.tolist() == [0, 1, 2, 0, 2] and ranks.tolist() == [0, 2, 1, 0, 2]
    soft = torch.tensor([[0.1, 0.2, 0.7]])
    assert ranked(logits[:1], soft).read()[1].tolist() == [1]


def test_the_area_under_the_curve_by_hand() -> None:
    """Scores of class 1 are 1, 2, 2 where it is true and 0, 2, 3 elsewhere: of the 9 pairs 3 are won, 2 tied."""
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 3.0])
    logits = torch.stack([torch.zeros(6), scores], 1)  # of two classes: what one wins the other loses
    areas = ranked(logits, torch.tensor([1, 1, 1, 0, 0, 0])).auc()
    assert areas == {0: pytest.approx(4 / 9), 1: pytest.approx(4 / 9)}
    assert ranked(logits, torch.ones(6, dtype=torch.int64)).auc() == {}  # no rest to tell it from
    assert ranked(logits[:, [0, 1, 0]], torch.tensor([1, 1, 1, 0, 0, 0])).auc().keys() == {0, 1}  # type: ignore[union-attr]
    alike = ranked(torch.ones(5, 3), torch.tensor([0, 1, 2, 0, 0])).auc()
    assert alike == {0: 0.5, 1: 0.5, 2: 0.5}


@pytest.mark.parametrize(("samples", "classes"), [(400, 7), (60, 12), (9, 6), (500, 130)])
def test_rankings_are_those_of_scikit_learn(samples: int, classes: int) -> None:
    """Rows come from a few, so that there are many ties; in the last two cases some classes have no samples."""
    reference = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn: pip install '.[test]'")
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(0, classes if samples == 400 else classes - 2, (samples,), generator=generator)
    rows = torch.randn(20, classes, generator=generator)
    rows[torch.arange(20), torch.arange(20) % classes] += 1
    logits = rows[(labels + torch.randint(0, 3, (samples,), generator=generator) * 6) % 20]
    ranking = ranked(logits, labels, size=16)
    truths, ranks = ranking.read()
    assert truths.tolist() == labels.tolist()
    for k in (1, 2, 5):
        expected = reference.top_k_accuracy_score(labels, logits, k=k, labels=range(classes))
        assert float((ranks < k).double().mean()) == pytest.approx(expected)

    areas, probabilities = ranking.auc(), logits.double().softmax(1)
    assert areas is not None and sorted(areas) == labels.unique().tolist()
    for label, area in areas.items():
        assert area == pytest.approx(reference.roc_auc_score(labels == label, probabilities[:, label]), abs=1e-12)
    if samples == 400:
        mean = reference.roc_auc_score(labels, probabilities, average="macro", multi_class="ovr")
        assert sum(areas.values()) / len(areas) == pytest.approx(mean, abs=1e-12)


def test_probabilities_that_round_to_zero_or_one_are_told_apart() -> None:
    """1 - exp(-20), 1 - exp(-30) and 1 are all 1 as floats of 32 bits, exp(-110) and exp(-120) are 0."""
    sure = torch.tensor([[0.0, -20.0], [0.0, -30.0], [0.0, -math.inf]])
    assert ranked(sure, torch.tensor([1, 0, 0])).auc() == {0: 1.0, 1: 1.0}
    unlikely = torch.tensor([[0.0, 0.0, -110.0], [0.0, 0.0, -120.0]])
    assert ranked(unlikely, torch.tensor([2, 0])).auc() == {0: 0.5, 2: 1.0}


def test_too_many_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, kept in ((30, True), (29, False)):
        monkeypatch.setattr(Ranking, "MOST", most)
        ranking = ranked(torch.eye(10, 3), torch.arange(10) % 3)
        assert (ranking.auc() is not None) is kept and (ranking.scores is not None) is kept
        assert len(ranking.read()[1]) == 10


def test_a_ranking_does_not_wait_for_the_device() -> None:
    """Tensors without content cannot be read, as those on a device cannot before it has worked them out."""
    ranking = Ranking()
    ranking.add(torch.ones(4, 3, device="meta"), torch.ones(4, dtype=torch.int64, device="meta"))
    assert ranking.batches[0][1].shape == (4,)


def test_each_class_counts_the_same_in_the_balanced_accuracy() -> None:
    """Recalls of 9/10, 1/2 and, of a class without samples, none."""
    confusion = torch.tensor([[9, 0, 1], [0, 0, 0], [1, 0, 1]])
    assert balanced_accuracy(confusion) == pytest.approx((9 / 10 + 1 / 2) / 2)
    reference = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn: pip install '.[test]'")
    truths, predicted = [0] * 10 + [1] * 2, [0] * 9 + [1] + [0, 1]
    assert balanced_accuracy(confusion) == pytest.approx(reference.balanced_accuracy_score(truths, predicted))


# ---------------------------------------------------------------------------------------------------------------------
# What may be chance


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    """By hand: 5 of 10 with z = 1.96 is 0.5 -+ 1.96 * sqrt(2.5 + 0.9604) / 13.8416, about 0.2366 to 0.7634."""
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=5e-5), pytest.approx(0.7634, abs=5e-5))
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn: pip install '.[test]'")
    for right, samples in ((0, 1), (1, 1), (0, 355), (346, 355), (355, 355), (9_999_999, 10_000_000)):
        found = stats.binomtest(right, samples).proportion_ci(0.95, method="wilson")
        assert wilson(right, samples) == (pytest.approx(found.low, abs=1e-12), pytest.approx(found.high, abs=1e-12))
        assert 0 <= wilson(right, samples)[0] < wilson(right, samples)[1] <= 1


def test_mcnemars_test_is_that_of_a_fair_coin() -> None:
    # 6 heads of 6, or 6 tails: 2 / 64. One of six at most, or five at least: 2 * (1 + 6) / 64.
    assert mcnemar(6, 0) == mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(5, 1) == mcnemar(1, 5) == pytest.approx(14 / 64)
    for one, other in ((0, 0), (1, 0), (3, 3), (4, 5)):
        assert mcnemar(one, other) == pytest.approx(1) and mcnemar(one, other) <= 1
    for one, other in ((3, 17), (40, 61), (120, 240)):
        exact = 2 * Fraction(sum(math.comb(one + other, k) for k in range(one + 1)), 2 ** (one + other))
        assert mcnemar(one, other) == pytest.approx(float(exact), rel=1e-10)


def test_mcnemars_test_of_many_samples() -> None:
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn: pip install '.[test]'")
    for one, other in ((9_850, 10_150), (500_000, 501_500), (10_000_000, 10_000_001), (100, 4_000)):
        assert mcnemar(one, other) == pytest.approx(stats.binomtest(one, one + other).pvalue, rel=1e-6, abs=1e-300)


# ---------------------------------------------------------------------------------------------------------------------
# What a loss is called


@pytest.mark.parametrize(
    ("criterion", "target_transform", "name"),
    [
        (nn.CrossEntropyLoss(), None, None),
        (nn.CrossEntropyLoss(), "torch.nn.functional.one_hot", None),  # the same labels in another form
        (nn.CrossEntropyLoss(), "mine.blurred", "cross-entropy with labels by mine.blurred"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), None, "cross-entropy with label_smoothing=0.1"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), None, "cross-entropy with class weights"),
        (nn.CrossEntropyLoss(reduction="sum"), None, "cross-entropy with reduction=sum"),
        (
            nn.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.2),
            None,
            "cross-entropy with class weights and label_smoothing=0.2",
        ),
        (nn.CrossEntropyLoss(label_smoothing=1e-7), None, "cross-entropy with label_smoothing=1e-07"),
        (
            nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
            "mine.blurred",
            "cross-entropy with label_smoothing=0.1 and reduction=sum and labels by mine.blurred",
        ),
        (nn.CrossEntropyLoss(), "mine.one_hot_blurred", "cross-entropy with labels by mine.one_hot_blurred"),
        (nn.MSELoss(), "torch.nn.functional.one_hot", "MSELoss"),
        (nn.MSELoss(reduction="sum"), "mine.blurred", "MSELoss with labels by mine.blurred"),
        (nn.NLLLoss(), None, "NLLLoss"),
    ],
)
def test_a_loss_is_plain_cross_entropy_or_has_a_name(
    criterion: nn.Module, target_transform: str | None, name: str | None
) -> None:
    assert loss_name(criterion, target_transform) == name
