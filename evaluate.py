"""Evaluate a checkpoint: `python evaluate.py checkpoint=checkpoints/latest/best.pt`; see `--help` and README.md."""

from engine.command.cli import launch

if __name__ == "__main__":
    launch("evaluate")  # answers help, completion and typos, and only then imports torch and calls main() below

import csv
import io
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed, files
from engine.data.batches import Batches
from engine.data.devices import choose_device, use_threads
from engine.data.download import no_downloads
from engine.data.splits import COMMON, OF_FILES, Split, load_splits
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, RunError, counted, printable, shortened
from engine.pictures import evaluation, style
from engine.process import share_cores
from engine.run import checkpoint, runs, trust
from engine.terminal import aligned, watched
from engine.training.metrics import (
    Mistakes,
    Ranking,
    accuracy,
    added_up,
    balanced_accuracy,
    evaluate,
    mcnemar,
    per_class,
    wilson,
)

# Settings of a data set that evaluating has no use for: names that are imported, and files that are written.
ONLY_FOR_TRAINING = (
    "target_transform", "train_transforms", "balance", "cache", "cache_dir", "skip_unreadable", "match_model",
)  # fmt: skip

MOST_CLASSES = 2000  # of a checkpoint that was made elsewhere; the confusion matrix has their square
WIDEST = 60  # characters of a class name in the table


def main(config: dict[str, Any]) -> float:
    """Evaluate a checkpoint, or compare two, as the checked configuration says.

    Returns:
        the accuracy, 0 to 1; of two checkpoints that of the first.
    """
    device = choose_device(config["device"])
    use_threads(config["num_threads"])
    if device.type == "cpu" and not distributed.is_launched():
        share_cores(torch.get_num_threads())
    asked = config["checkpoint"] or str(runs.newest_best())
    distributed.start(device, {**config, "checkpoint": asked})
    if isinstance(asked, list):
        return compare([Path(str(name)) for name in asked], config, device)
    return evaluate_one(Path(asked), config, device)


def evaluate_one(path: Path, config: dict[str, Any], device: torch.device) -> float:
    """Print a checkpoint's metrics, write evaluation.json and draw its pictures; returns the accuracy, 0 to 1."""
    # The checkpoint, the data that it names or that was asked for, and the model.
    name = config["split"]
    saved = checkpoint.read(path)
    output = Path(config["output"]) if config["output"] else path.parent / f"{evaluation.EVALUATION[name]}.json"
    check_output(output, path)
    config = settings_for(saved, config, path)
    subject = subject_of(path, saved, config, data_of(config), device)

    # Its predictions.
    mistakes = Mistakes()
    found = predictions_of(subject, mistakes)
    if not distributed.is_first():
        return accuracy(found.confusion)
    figures = found.figures()

    # What is printed and written.
    print(f"{printable(str(path))}, {described(config, found.samples)}")
    if told := subject.about_classes():
        print(told)
    if "config" not in saved:
        print(checkpoint.transforms_line(config))
    print(f"accuracy {figures['accuracy']:.2%}, loss {found.loss:.4f}")
    print(further(figures, found.samples, len(subject.classes)))
    if "config" not in saved:  # whose training's script most likely averages so
        plain = statistics.fmean(torch.stack(found.batch_losses).tolist())  # MPS has no float64
        of = f"{len(found.batch_losses)} of {config['batch_size']}, a shorter last one counting as much as the others"
        print(f"loss {plain:.6f} as the average of batches, {of}")
    rows = per_class(found.confusion, subject.classes)
    print(f"\n{table(rows)}")
    about = {"checkpoint": str(path), **what_was_evaluated(config, found.samples), **figures}
    files.write_json(output, {**about, "per_class": rows, "confusion": found.confusion.tolist()})
    listed = evaluation.beside(output, "mistakes", ".csv")
    drawn = write_mistakes(mistakes, subject.split, subject.classes, listed, config["dataset"]["eval_transforms"])
    counts, picture = found.confusion.cpu().numpy(), evaluation.beside(output, "confusion")
    drawn &= style.draw(picture, evaluation.confusion_figure, counts, subject.classes)
    beside = f"{listed.name} and pictures" if drawn else listed.name
    print(f"\nwritten to {printable(str(output))}, {printable(beside)} beside it")
    return float(figures["accuracy"])


def compare(paths: Sequence[Path], config: dict[str, Any], device: torch.device) -> float:
    """Print and write how two checkpoints do on the same samples, and whether that could be chance.

    Each sees the images as its own settings say. Returns the accuracy of the first, 0 to 1.
    """
    # Both checkpoints, and the samples, which have to be the same.
    default = evaluation.beside(Path(evaluation.EVALUATION[config["split"]]), "comparison", ".json").name
    output = Path(config["output"]) if config["output"] else paths[0].parent / default
    subjects = both_of(paths, output, config, device)
    config = subjects[0].config

    # Their predictions.
    one, two = [predictions_of(subject) for subject in subjects]
    if not distributed.is_first():
        return accuracy(one.confusion)
    check_truths(subjects, one, two)
    figures, samples = [one.figures(), two.figures()], one.samples
    first, second = one.right, two.right
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    p_value = mcnemar(only_first, only_second)

    # What is printed and written.
    print(described(config, samples))
    for subject in subjects:
        for told in filter(None, (subject.about_classes(), subject.about_transforms())):
            print(f"{printable(str(subject.path))}: {told}")
    print(f"\n{comparison_table(paths, figures)}\n")
    right = f"only the first is right on {only_first:,}, only the second on {only_second:,}"
    print(f"{right}, both on {both:,}, neither on {neither:,}")
    print(f"McNemar's exact test: {verdict(p_value, only_first, only_second, paths)}")
    result = {
        "checkpoints": [{"checkpoint": str(path), **own} for path, own in zip(paths, figures, strict=True)],
        **what_was_evaluated(config, samples),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "both_right": both,
        "neither_right": neither,
        "p_value": p_value,
    }
    files.write_json(output, result)
    print(f"\nwritten to {printable(str(output))}")
    return float(figures[0]["accuracy"])


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint and its data, and that they fit together


@dataclass(frozen=True)
class Subject:
    """A checkpoint's model and the samples that it is evaluated on, known to fit together.

    Attributes:
        path: the checkpoint.
        saved: what it holds.
        config: what it is evaluated with, as `settings_for` gives it.
        split: the samples.
        data_classes: the names of the data's classes, as the data numbers them.
        classes: those of the model.
        batches: images and labels on the device; labels as the data numbers them. Of several processes those of this
            one, or None.
        model: on the device.
        device: of both.
    """

    path: Path
    saved: dict[str, Any]
    config: dict[str, Any]
    split: Split
    data_classes: list[str]
    classes: list[str]
    batches: Batches | None
    model: nn.Module
    device: torch.device

    def about_classes(self) -> str:
        """How the data's classes differ from the model's; empty where they do not."""
        here, there = len(self.data_classes), len(self.classes)
        if here < there:
            return f"the data has {here} of the model's {there} classes; they are compared by name"
        if self.data_classes != self.classes:
            return "the data numbers its classes otherwise than the model; they are compared by name"
        return ""

    def about_transforms(self) -> str:
        """How the images are prepared, where that is not known to be as in the model's training; else empty."""
        if "config" not in self.saved:
            return checkpoint.transforms_line(self.config)
        used, own = (of["dataset"].get("eval_transforms") for of in (self.config, self.saved["config"]))
        if used == own:
            return ""
        here, there = (shortened(checkpoint.as_text(transforms), 200) for transforms in (used, own))
        return f"dataset.eval_transforms={here}; its training had {there}"


def data_of(config: dict[str, Any]) -> tuple[Split, list[str]]:
    """The samples that a configuration asks for, and the class names of the data; RequestError if there are none."""
    data, name = config["dataset"], config["split"]
    with no_downloads():
        splits, named = load_splits(data, only=name)
    if name not in splits:
        raise RequestError(f"split={name}: there is none with dataset.val_fraction={data['val_fraction']}")
    return splits[name], [printable(known) for known in named]


def subject_of(
    path: Path,
    saved: dict[str, Any],
    config: dict[str, Any],
    data: tuple[Split, list[str]],
    device: torch.device,
) -> Subject:
    """A checkpoint made ready to be evaluated on these samples; RequestError where they do not fit."""
    split, data_classes = data
    how = {key: config[key] for key in ("batch_size", "seed", "num_workers")}  # no limit: the whole split
    own = own_part(split, config["batch_size"])
    batches = Batches(own or split, config["dataset"]["eval_transforms"], device, **how)
    model = model_of(saved, config, path, batches.sample_shape(), data_classes).to(device)
    checkpoint.check_finite(model, path)
    classes = [printable(known) for known in saved.get("classes", data_classes)]
    return Subject(path, saved, config, split, data_classes, classes, batches if own else None, model, device)


def own_part(split: Split, batch_size: int) -> Split | None:
    """The samples of this process's batches: every so many-th, so that each batch is as it is in one process; or None.

    An iterable-style data set comes as a whole, as only reading tells what is in it.
    """
    if split.indices is None:
        return split
    own = split.indices.split(batch_size)[distributed.every_own()]
    return replace(split, indices=torch.cat(own)) if own else None


def both_of(
    paths: Sequence[Path], output: Path, config: dict[str, Any], device: torch.device
) -> tuple[Subject, Subject]:
    """Two checkpoints made ready to be evaluated on the same samples.

    Raises:
        RequestError: they do not fit their data, that is not or may not be the same, or the output cannot be written.
    """
    states = [checkpoint.read(path) for path in paths]
    if paths[0].samefile(paths[1]):
        raise RequestError(f"checkpoint=[{paths[0]},{paths[1]}]: the same file twice; name two different ones")
    check_output(output, *paths)
    a_bare_one = any("config" not in saved for saved in states)
    settings = [settings_for(saved, config, path, a_bare_one) for saved, path in zip(states, paths, strict=True)]
    named = [{k: v for k, v in own["dataset"].items() if not k.endswith("transforms")} for own in settings]
    data = [data_of(settings[0])]
    data.append(data[0] if named[0] == named[1] else data_of(settings[1]))
    first, second = (
        subject_of(path, saved, own, samples, device)
        for path, saved, own, samples in zip(paths, states, settings, data, strict=True)
    )
    if not has_same_samples(first, second):
        of = [f"{one.config['choices']['dataset']}, {counted(len(one.split), 'sample')}" for one in (first, second)]
        # Not dataset.val_fraction= for both: one of them may have been trained on what the other held out.
        way_out = (
            "compare on split=test" if config["split"] != "test" else "name the data of both, dataset.root= or dataset="
        )
        raise RequestError(
            f"{paths[0]} and {paths[1]} can only be compared on the same samples; theirs are not, or it cannot be told "
            f"({of[0]}; {of[1]}); {way_out}"
        )
    return first, second


def has_same_samples(first: Subject, second: Subject) -> bool:
    """Whether two splits are known to be of the same samples in the same order."""
    one, two = first.split, second.split
    if one is two:
        return True
    if one.indices is None or two.indices is None:
        return False
    sources = [
        {key: value for key, value in subject.config["dataset"].items() if key not in COMMON + OF_FILES}
        for subject in (first, second)
    ]
    if sources[0] == sources[1]:
        return torch.equal(one.indices, two.indices)
    if isinstance(one.part, tuple) and isinstance(two.part, tuple):
        return all(torch.equal(a[one.indices], b[two.indices]) for a, b in zip(one.part, two.part, strict=True))
    return paths_of(one) is not None and paths_of(one) == paths_of(two)


def paths_of(split: Split) -> list[str] | None:
    """The files of a split's samples, links in their paths followed; None where they are no files."""
    paths = getattr(split.part, "paths", None)
    if paths is None or split.indices is None:
        return None
    return [os.path.realpath(str(paths[index])) for index in split.indices.tolist()]


def check_output(output: Path, *checkpoints: Path) -> None:
    """Refuse an output that cannot be written, before the work, and one that is a checkpoint itself."""
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise RequestError(f"{output}: cannot be written; set output= to a file in a folder that exists")
    if output.exists() and any(map(output.samefile, checkpoints)):
        raise RequestError(f"{output}: is the checkpoint; set output= to another file")


def settings_for(
    saved: dict[str, Any], config: dict[str, Any], path: Path, beside_bare: bool = False
) -> dict[str, Any]:
    """The configuration to evaluate with: the checkpoint's own, overridden by what was asked for.

    Args:
        saved: what the checkpoint holds.
        config: what was asked for.
        path: the checkpoint.
        beside_bare: it is compared with a bare state_dict, of which `model=` and the transforms of `dataset=` are.

    Raises:
        RequestError: a bare state_dict without `model=` and `dataset=`, or a setting that the dataset does not have.
    """
    dataset, choices = config.get("dataset") or {}, config["choices"]
    if "config" not in saved:
        checkpoint.check_bare(config, path)
        how = {"seed": 0, "batch_size": config["batch_size"] or 64}
    else:
        for group in ("experiment", "model"):
            if choices.get(group) and not beside_bare:
                raise RequestError(f"{group}={choices[group]}: {path} names its own model; leave {group}= out")
        own, ours = saved["config"], checkpoint.is_ours(saved)
        if not ours and len(saved["classes"]) > MOST_CLASSES:
            raise RequestError(f"{path}: it has {len(saved['classes']):,} classes, and was made elsewhere; refused")
        how = trust.evaluation_of(own, saved["input_shape"], path, config["batch_size"], ours=ours)
        if not choices.get("dataset"):
            data = {key: value for key, value in own["dataset"].items() if key not in ONLY_FOR_TRAINING}
            _, dataset = trust.settings_of("dataset", own | {"dataset": data}, path, ours=ours, typed=dataset)
        elif beside_bare:
            dataset = {**dataset, "eval_transforms": how["eval_transforms"]}
        choices = {**own["choices"], **{group: option for group, option in choices.items() if option}}
    if dataset.get("cache"):
        print("dataset.cache=true: not used here, as evaluating writes nothing but its results")
    dataset = {**dataset, "target_transform": None, "balance": False, "cache": False}
    return {**config, "dataset": dataset, "choices": choices, "seed": how["seed"], "batch_size": how["batch_size"]}


def model_of(
    saved: dict[str, Any], config: dict[str, Any], path: Path, input_shape: tuple[int, int, int], classes: list[str]
) -> nn.Module:
    """The checkpoint's model with its weights, once it is known to fit the data."""
    if "config" not in saved:
        return checkpoint.build_bare(saved["model"], config, input_shape, len(classes), path)
    if list(saved["input_shape"]) != list(input_shape):
        raise RequestError(
            f"{path}: its model takes images {saved['input_shape']}, the data has {list(input_shape)}; "
            "set dataset.eval_transforms"
        )
    check_classes([printable(name) for name in saved["classes"]], classes, path)
    return checkpoint.build_model(saved, path)


def check_classes(known: Sequence[str], found: Sequence[str], path: Path) -> None:
    """Hold the class names of the data against those that a model has learned: names decide, not numbers.

    The data may have them in another order, or only some of them.

    Raises:
        RequestError: it has others, or names of which several mean the same.
    """
    names = set(known)
    strange = [name for name in found if name not in names]
    if strange:
        raise RequestError(
            f"{path}: its classes are {few(known)}; the data has {few(strange)}, which it does not know; "
            "choose the data set that it was trained on"
        )
    if list(known) != list(found) and (len(names) < len(known) or len(set(found)) < len(found)):
        raise RequestError(f"{path}: names of its classes or of the data's occur twice, so they cannot be told apart")


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, each shortened, and how many more there are."""
    shown = [name if len(name) <= 24 else name[:23] + "…" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


@dataclass(frozen=True)
class Found:
    """What a model made of the samples.

    Attributes:
        loss: mean cross-entropy.
        confusion: counts int64 `[num_classes, num_classes]`, rows the true class, columns the predicted.
        ranking: how high the true classes stand.
        batch_losses: the mean loss of each batch.
        classes: the names of the model's classes.
    """

    loss: float
    confusion: Tensor
    ranking: Ranking
    batch_losses: list[Tensor]
    classes: list[str]

    @property
    def samples(self) -> int:
        """How many there were."""
        return int(self.confusion.sum())

    @property
    def right(self) -> Tensor:
        """Which of them the model has right, bool `[n]`."""
        return self.ranking.read()[1] == 0

    def figures(self) -> dict[str, Any]:
        """The metrics of all classes, 0 to 1 but for the loss; None where there is none."""
        _, ranks = self.ranking.read()
        areas = self.ranking.auc()
        return {
            "accuracy": accuracy(self.confusion),
            "accuracy_interval": wilson(int(self.confusion.diagonal().sum()), self.samples),
            "balanced_accuracy": balanced_accuracy(self.confusion),
            "top5_accuracy": int((ranks < 5).sum()) / self.samples if len(self.classes) > 5 else None,
            "auc": sum(areas.values()) / len(areas) if areas else None,
            "auc_per_class": None if areas is None else {self.classes[label]: area for label, area in areas.items()},
            "loss": self.loss,
        }


def predictions_of(subject: Subject, mistakes: Mistakes | None = None) -> Found:
    """Let a model predict all samples; `mistakes`, if given, takes them in.

    Raises:
        RunError: it gives no finite numbers.
    """
    name = subject.config["split"]
    model = Flipped(subject.model) if subject.config["tta"] == "flip" else subject.model
    places = {known: number for number, known in enumerate(subject.classes)}
    numbers = torch.tensor([places[known] for known in subject.data_classes], device=subject.device)
    count = 0 if subject.batches is None else len(subject.batches)  # of a stream 0, as only reading tells
    own: Iterable[tuple[Tensor, Tensor]] = () if subject.batches is None else subject.batches
    if subject.split.indices is None:
        own = islice(own, distributed.rank(), None, distributed.world_size())
    ranking, batch_losses = Ranking(), list[Tensor]()
    shown = watched(by_name(own, numbers, len(subject.classes)), f"{name} split", count)
    loss, confusion = evaluate(model, shown, len(subject.classes), mistakes, batch_losses, ranking)
    if distributed.world_size() > 1:
        ranking.gather()
        if mistakes is not None:
            mistakes.gather()
        batch_losses = distributed.in_turn([batch_loss.cpu() for batch_loss in batch_losses])
        in_all, samples = added_up(batch_losses, [len(truths) for truths, _ in ranking.batches])
        loss = float(in_all / samples)  # in the order in which one process adds up
    if not math.isfinite(loss):
        raise RunError(
            f"{subject.path}: the loss on the {name} split is {loss}: the model gives no finite numbers there"
        )
    return Found(loss, confusion, ranking, batch_losses, subject.classes)


def check_truths(subjects: Sequence[Subject], one: Found, two: Found) -> None:
    """Refuse (RunError) to compare where a sample's true class is not the same for both models, by name."""
    truths = [[found.classes[label] for label in found.ranking.read()[0].tolist()] for found in (one, two)]
    if truths[0] != truths[1]:
        first, second = subjects
        raise RunError(
            f"dataset={first.config['choices']['dataset']}: the samples that {second.path} was given are of other "
            f"classes than those of {first.path}; compare on samples that do not change"
        )


def by_name(
    batches: Iterable[tuple[Tensor, Tensor]], numbers: Tensor, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with labels as the model numbers the classes.

    Args:
        batches: images, and labels as the data numbers them, int64 `[batch]` or probabilities `[batch, classes]`.
        numbers: int64 `[classes of the data]`, the model's number of each.
        num_classes: of the model.
    """
    for images, labels in batches:
        if labels.ndim == 1:
            yield images, numbers[labels]
        else:
            spread = labels.new_zeros(len(labels), num_classes)
            spread[:, numbers] = labels
            yield images, spread


class Flipped(nn.Module):
    """The mean of a model's probabilities of an image and of its mirror image, as logits; test-time augmentation.

    Args:
        model: takes images `[batch, channels, height, width]`, gives logits `[batch, num_classes]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The logarithm of the mean, whose softmax is the mean."""
        both = torch.stack([self.model(x).float().log_softmax(1) for x in (images, images.flip(3))])
        return both.logsumexp(0) - math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written


def described(config: dict[str, Any], samples: int) -> str:
    """What is evaluated, for the first line."""
    data = config["dataset"]
    limit = f" (dataset.limit={data['limit']})" if data["limit"] else ""
    mirrored = ", each image and its mirror image" if config["tta"] else ""
    return f"{config['split']} split of {config['choices']['dataset']}, {counted(samples, 'sample')}{limit}{mirrored}"


def what_was_evaluated(config: dict[str, Any], samples: int) -> dict[str, Any]:
    """The same for a file."""
    return {
        "dataset": config["choices"]["dataset"],
        "split": config["split"],
        "samples": samples,
        "tta": config["tta"],
    }


def further(figures: dict[str, Any], samples: int, num_classes: int) -> str:
    """The metrics beside accuracy and loss, on one line."""
    low, high = figures["accuracy_interval"]
    told = [f"95% interval {low:.2%} to {high:.2%}"]
    if figures["top5_accuracy"] is not None:
        told.append(f"top-5 {figures['top5_accuracy']:.2%}")
    told.append(f"balanced {figures['balanced_accuracy']:.2%}")
    areas = figures["auc_per_class"]
    if areas is None:
        told.append(f"no AUC: {samples:,} samples times {num_classes:,} classes are too many scores to keep")
    elif not areas:
        told.append("no AUC: all samples are of one class")
    else:
        of = f" over the {len(areas)} classes that have samples" if len(areas) < num_classes else ""
        told.append(f"AUC {figures['auc']:.4f}{of}")
    return ", ".join(told)


def comparison_table(paths: Sequence[Path], figures: Sequence[dict[str, Any]]) -> str:
    """Accuracy, its interval and loss of the checkpoints."""
    rows = [("", "accuracy", "95% interval", "loss")]
    for path, own in zip(paths, figures, strict=True):
        low, high = own["accuracy_interval"]
        name = printable(str(path))
        rows.append((name, f"{own['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", f"{own['loss']:.4f}"))
    return aligned(zip(*rows, strict=True), (False, True, True, True))


def verdict(p_value: float, only_first: int, only_second: int, paths: Sequence[Path]) -> str:
    """What the p-value of McNemar's test says, in one sentence."""
    if only_first == only_second == 0:
        return "p = 1: no sample tells them apart"
    p, share = f"= {p_value:.3g}", f"{100 * p_value:.3g}%"
    if p_value < 0.0001:
        p, share = "< 0.0001", "less than 0.01%"
    better = printable(str(paths[0 if only_first > only_second else 1]))
    said = f"{better} is better" if p_value < 0.05 else "no sign that one is better"
    return f"p {p}: {said}; two equally good models would differ as much in {share} of such comparisons"


def names_of(split: Split, places: Tensor) -> tuple[str, list[str]]:
    """What samples are called, given their places in the split: ("file", paths) or ("sample", indices)."""
    indices = places if split.indices is None else split.indices[places]
    paths = getattr(split.part, "paths", None)
    if paths is None:
        return "sample", [str(index) for index in indices.tolist()]
    return "file", [str(paths[index]) for index in indices.tolist()]


def write_mistakes(
    mistakes: Mistakes, split: Split, classes: Sequence[str], file: Path, transforms: Sequence[Any]
) -> bool:
    """List all errors in a CSV file and draw the most confident in a PNG beside it; returns whether that was drawn."""
    errors, truths, predictions, probabilities, images = mistakes.read()
    column, names = names_of(split, errors)
    files.write(file, mistakes_table(column, names, truths, predictions, probabilities, classes))
    first = slice(len(images))
    return style.draw(
        file.with_suffix(".png"),
        evaluation.mistakes_figure,
        images,
        truths[first].tolist(),
        predictions[first].tolist(),
        probabilities[first].tolist(),
        classes,
        parse_transforms(transforms, "dataset.eval_transforms"),
        [Path(name).name if column == "file" else f"sample {name}" for name in names[first]],
    )


def mistakes_table(
    column: str,
    names: Sequence[str],
    truths: Tensor,
    predictions: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
) -> str:
    """All errors as CSV, the most confident first: file or sample, true, predicted, probability (0 to 1)."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([column, "true", "predicted", "probability"])
    told = zip(names, truths.tolist(), predictions.tolist(), probabilities.tolist(), strict=True)
    rows.writerows([printable(name), classes[true], classes[found], f"{sure:.6f}"] for name, true, found, sure in told)
    return text.getvalue()


def table(rows: dict[str, dict[str, float]]) -> str:
    """Precision, recall and F1 of each class, and their plain average over the classes that have samples."""
    width = min(WIDEST, max(len("average"), *map(len, rows)))
    lines = [f"{'':<{width}}  precision  recall      f1  samples"]
    present = [row for row in rows.values() if row["samples"]]
    mean = {key: sum(row[key] for row in present) / len(present) for key in ("precision", "recall", "f1")}
    mean["samples"] = sum(row["samples"] for row in present)
    for name, row in [*rows.items(), ("average", mean)]:
        figures = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['samples']:7,}"
        lines.append(f"{shortened(name, WIDEST):<{width}}  {figures}")
    return "\n".join(lines)
