"""Evaluate a checkpoint: `python evaluate.py checkpoint=checkpoints/latest/best.pt`; see `--help` and README.md."""

from engine.cli import launch

if __name__ == "__main__":
    launch("evaluate")  # answers help, completion and typos, and only then imports torch and calls main() below

import os
from pathlib import Path
from typing import Any

from torch import nn

from engine import checkpoint, files, report, runs, trust
from engine.config import build
from engine.errors import RequestError
from engine.loader import Batches, choose_device, load_splits, parse_transforms
from engine.metrics import Mistakes, accuracy, evaluate, per_class

# Settings of a data set that evaluating has no use for: names that are imported, and files that are written.
ONLY_FOR_TRAINING = ("target_transform", "train_transforms", "cache", "cache_dir", "skip_unreadable")


def main(config: dict[str, Any]) -> float:
    """Evaluate as the checked configuration says, print the metrics, write evaluation.json and draw its pictures.

    Returns:
        the accuracy, 0 to 1.
    """
    device = choose_device(config["device"])
    path = Path(config["checkpoint"]) if config["checkpoint"] else runs.newest_best()
    saved = checkpoint.read(path)
    output = Path(config["output"]) if config["output"] else path.parent / "evaluation.json"
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise RequestError(f"{output}: cannot be written; set output= to a file in a folder that exists")
    config = settings_for(saved, config, path)
    splits, classes = load_splits(config["dataset"], only=config["split"])
    if config["split"] not in splits:
        fraction = config["dataset"]["val_fraction"]
        raise RequestError(f"split={config['split']}: there is none with dataset.val_fraction={fraction}")
    batches = Batches(splits[config["split"]], config["dataset"]["eval_transforms"], config, device)
    model = model_of(saved, config, path, batches.sample_shape(), classes).to(device)

    mistakes = Mistakes()
    loss, confusion = evaluate(model, batches, len(classes), mistakes)

    print(f"{path}, {config['split']} split of {config['choices']['dataset']}, {int(confusion.sum()):,} samples")
    print(f"accuracy {accuracy(confusion):.2%}, loss {loss:.4f}\n")
    rows = per_class(confusion, classes)
    print(table(rows))
    files.write_json(
        output,
        {
            "checkpoint": str(path),
            "dataset": config["choices"]["dataset"],
            "split": config["split"],
            "samples": int(confusion.sum()),
            "accuracy": accuracy(confusion),
            "loss": loss,
            "per_class": rows,
            "confusion": confusion.tolist(),
        },
    )
    drawn = report.confusion(confusion, classes, report.beside(output, "confusion"))
    transforms = parse_transforms(config["dataset"]["eval_transforms"], "dataset.eval_transforms")
    drawn &= report.mistakes(*mistakes.read(), classes, report.beside(output, "mistakes"), transforms)
    print(f"\nwritten to {output}" + (", its pictures beside it" if drawn else ""))
    return accuracy(confusion)


def settings_for(saved: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration to evaluate with: the checkpoint's own, overridden by what was asked for.

    Raises:
        RequestError: a bare state_dict without `model=` and `dataset=`, or a setting that the dataset does not have.
    """
    asked_dataset = config.get("dataset") or {}
    if "config" not in saved:
        if not config.get("model") or not config["choices"].get("dataset"):
            raise RequestError(
                f"{path}: a bare state_dict; say which model and data it is for: model=mlp dataset=fashion_mnist"
            )
        own = {"batch_size": 64, "seed": 0, "limit_batches": None}
        return {**config, **own, "batch_size": config["batch_size"] or 64}
    own = saved["config"]
    if config.get("model"):
        raise RequestError(f"model={config['choices']['model']}: {path} names its own model; leave model= out")
    ours = checkpoint.is_ours(saved)
    how = trust.evaluation_of(own, saved["input_shape"], path, config["batch_size"], ours=ours)
    choices = {**own["choices"], **{group: option for group, option in config["choices"].items() if option}}
    if config["choices"].get("dataset"):
        dataset = asked_dataset
    else:
        data = {key: value for key, value in own["dataset"].items() if key not in ONLY_FOR_TRAINING}
        _, dataset = trust.settings_of("dataset", own | {"dataset": data}, path, ours=ours, typed=asked_dataset)
    return {
        **config,
        "dataset": {**dataset, "target_transform": None},
        "choices": choices,
        "batch_size": how["batch_size"],
        "seed": how["seed"],
        "limit_batches": None,
    }


def model_of(
    saved: dict[str, Any], config: dict[str, Any], path: Path, input_shape: tuple[int, int, int], classes: list[str]
) -> nn.Module:
    """The checkpoint's model with its weights, once it is known to fit the data."""
    if "config" not in saved:
        model = build(config["model"], "model", input_shape=input_shape, num_classes=len(classes))
        checkpoint.load_weights(model, saved["model"], path)
        return model
    if list(saved["input_shape"]) != list(input_shape):
        raise RequestError(
            f"{path}: its model takes images {saved['input_shape']}, the data has {list(input_shape)}; "
            "set dataset.eval_transforms"
        )
    if len(saved["classes"]) != len(classes):
        raise RequestError(
            f"{path}: its model has {len(saved['classes'])} classes, the data {len(classes)}; choose another dataset"
        )
    return checkpoint.build_model(saved, path)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Precision, recall and F1 of each class and their plain average, for reading."""
    width = max(len("average"), *(len(name) for name in rows))
    lines = [f"{'':<{width}}  precision  recall      f1  samples"]
    for name, row in rows.items():
        lines.append(
            f"{name:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['samples']:7,}"
        )
    mean = {key: sum(row[key] for row in rows.values()) / len(rows) for key in ("precision", "recall", "f1")}
    total = sum(row["samples"] for row in rows.values())
    lines.append(
        f"{'average':<{width}}  {mean['precision']:9.4f}  {mean['recall']:6.4f}  {mean['f1']:6.4f}  {total:7,}"
    )
    return "\n".join(lines)
