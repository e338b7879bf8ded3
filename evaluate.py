"""Evaluate a checkpoint: `python evaluate.py checkpoint=checkpoints/latest/best.pt`; see `--help` and README.md."""

from engine.command.cli import launch

if __name__ == "__main__":
    launch("evaluate")  # answers help, completion and typos, and only then imports torch and calls main() below

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import files
from engine.data.batches import Batches
from engine.data.devices import choose_device, use_threads
from engine.data.download import no_downloads
from engine.data.splits import Split, load_splits
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, RunError, counted, printable, shortened
from engine.pictures import evaluation, style
from engine.process import share_cores
from engine.run import checkpoint, runs, trust
from engine.terminal import watched
from engine.training.metrics import Mistakes, accuracy, evaluate, per_class

# Settings of a data set that evaluating has no use for: names that are imported, and files that are written.
ONLY_FOR_TRAINING = ("target_transform", "train_transforms", "balance", "cache", "cache_dir", "skip_unreadable")

MOST_CLASSES = 2000  # of a checkpoint that was made elsewhere; the confusion matrix has their square
WIDEST = 60  # characters of a class name in the table


def main(config: dict[str, Any]) -> float:
    """Evaluate as the checked configuration says, print the metrics, write evaluation.json and draw its pictures.

    Returns:
        the accuracy, 0 to 1.
    """
    # The checkpoint, the data that it names or that was asked for, and the model.
    device, name = choose_device(config["device"]), config["split"]
    use_threads(config["num_threads"])
    if device.type == "cpu":
        share_cores(torch.get_num_threads())
    tta = config["tta"]
    path = Path(config["checkpoint"]) if config["checkpoint"] else runs.newest_best()
    saved = checkpoint.read(path)
    output = Path(config["output"]) if config["output"] else path.parent / f"{evaluation.EVALUATION[name]}.json"
    check_output(output, path)
    config = settings_for(saved, config, path)
    data = config["dataset"]
    with no_downloads():
        splits, named = load_splits(data, only=name)
    data_classes = [printable(known) for known in named]
    if name not in splits:
        raise RequestError(f"split={name}: there is none with dataset.val_fraction={data['val_fraction']}")
    split = splits[name]
    how = {key: config[key] for key in ("batch_size", "seed", "num_workers")}  # no limit: the whole split
    batches = Batches(split, data["eval_transforms"], device, **how)
    model = model_of(saved, config, path, batches.sample_shape(), data_classes).to(device)
    checkpoint.check_finite(model, path)
    if tta == "flip":
        model = Flipped(model)
    classes = [printable(known) for known in saved.get("classes", data_classes)]
    places = {known: number for number, known in enumerate(classes)}
    numbers = torch.tensor([places[known] for known in data_classes], device=device)

    # Its predictions.
    mistakes, batch_losses = Mistakes(), list[Tensor]()
    shown = watched(by_name(batches, numbers, len(classes)), f"{name} split", len(batches))
    loss, confusion = evaluate(model, shown, len(classes), mistakes, batch_losses)
    samples = int(confusion.sum())
    if not math.isfinite(loss):
        raise RunError(f"{path}: the loss on the {name} split is {loss}: the model gives no finite numbers there")

    # What is printed and written.
    of = f"{name} split of {config['choices']['dataset']}, {counted(samples, 'sample')}"
    limit = f" (dataset.limit={data['limit']})" if data["limit"] else ""
    print(f"{printable(str(path))}, {of}{limit}{', each image and its mirror image' if tta else ''}")
    if len(data_classes) < len(classes):
        print(f"the data has {len(data_classes)} of the model's {len(classes)} classes; they are compared by name")
    elif data_classes != classes:
        print("the data numbers its classes otherwise than the model; they are compared by name")
    if "config" not in saved:
        print(checkpoint.transforms_line(config))
    print(f"accuracy {accuracy(confusion):.2%}, loss {loss:.4f}")
    if "config" not in saved:  # whose training's script most likely averages so
        plain = float(torch.stack(batch_losses).double().mean())
        of = f"{len(batch_losses)} of {config['batch_size']}, a shorter last one counting as much as the others"
        print(f"loss {plain:.6f} as the average of batches, {of}")
    rows = per_class(confusion, classes)
    print(f"\n{table(rows)}")
    files.write_json(
        output,
        {
            "checkpoint": str(path),
            "dataset": config["choices"]["dataset"],
            "split": name,
            "samples": samples,
            "tta": tta,
            "accuracy": accuracy(confusion),
            "loss": loss,
            "per_class": rows,
            "confusion": confusion.tolist(),
        },
    )
    listed = evaluation.beside(output, "mistakes", ".csv")
    drawn = write_mistakes(mistakes, split, classes, listed, data["eval_transforms"])
    counts, picture = confusion.cpu().numpy(), evaluation.beside(output, "confusion")
    drawn &= style.draw(picture, evaluation.confusion_figure, counts, classes)
    beside = f"{listed.name} and pictures" if drawn else listed.name
    print(f"\nwritten to {printable(str(output))}, {printable(beside)} beside it")
    return accuracy(confusion)


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


def check_output(output: Path, path: Path) -> None:
    """Refuse an output that cannot be written, before the work, and one that is the checkpoint itself."""
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise RequestError(f"{output}: cannot be written; set output= to a file in a folder that exists")
    if output.exists() and output.samefile(path):
        raise RequestError(f"{output}: is the checkpoint; set output= to another file")


def settings_for(saved: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration to evaluate with: the checkpoint's own, overridden by what was asked for.

    Raises:
        RequestError: a bare state_dict without `model=` and `dataset=`, or a setting that the dataset does not have.
    """
    dataset, choices = config.get("dataset") or {}, config["choices"]
    if "config" not in saved:
        checkpoint.check_bare(config, path)
        how = {"seed": 0, "batch_size": config["batch_size"] or 64}
    else:
        for group in ("experiment", "model"):
            if choices.get(group):
                raise RequestError(f"{group}={choices[group]}: {path} names its own model; leave {group}= out")
        own, ours = saved["config"], checkpoint.is_ours(saved)
        if not ours and len(saved["classes"]) > MOST_CLASSES:
            raise RequestError(f"{path}: it has {len(saved['classes']):,} classes, and was made elsewhere; refused")
        how = trust.evaluation_of(own, saved["input_shape"], path, config["batch_size"], ours=ours)
        if not choices.get("dataset"):
            data = {key: value for key, value in own["dataset"].items() if key not in ONLY_FOR_TRAINING}
            _, dataset = trust.settings_of("dataset", own | {"dataset": data}, path, ours=ours, typed=dataset)
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
