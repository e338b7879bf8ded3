"""Train an image classifier: `python train.py model=mlp optimizer.lr=1e-3`; see `--help` and README.md.

From top to bottom: main() sets up and runs the epochs, train_epoch() is the loop over the batches.
"""

from engine.config import launch

if __name__ == "__main__":
    launch("train")  # answers help, completion and typos, and only then imports torch and calls main() below

import inspect
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import checkpoint, runs
from engine.config import build
from engine.errors import RequestError, one_line
from engine.loader import Batches, choose_device, load_splits
from engine.metrics import Tally, accuracy, evaluate
from engine.runs import log
from engine.trackers import Trackers


def main(config: dict[str, Any]) -> float:
    """Train as the checked configuration says.

    Returns:
        the best validation accuracy (0 to 1), or the last training accuracy without a validation part; for sweepers.
    """
    # Data.
    runs.check_name(config["name"])
    device = choose_device(config["device"])
    data = config["dataset"]
    splits, classes = load_splits(data)
    train_batches = Batches(splits["train"], data["train_transforms"], config, device, training=True)
    val_batches = Batches(splits["val"], data["eval_transforms"], config, device) if "val" in splits else None
    test_batches = Batches(splits["test"], data["eval_transforms"], config, device)
    input_shape = test_batches.sample_shape()

    # Model, loss, optimizer, schedule.
    torch.manual_seed(config["seed"])
    model = build(config["model"], "model", input_shape=input_shape, num_classes=len(classes)).to(device)
    probe(model, input_shape, len(classes), device)
    criterion = build(config["criterion"], "criterion").to(device)
    optimizer = build(config["optimizer"], "optimizer", model.parameters())
    total_steps = config["epochs"] * len(train_batches)
    scheduler = build(
        config["scheduler"], "scheduler", optimizer, total_steps=total_steps, steps_per_epoch=len(train_batches)
    )

    # The run directory.
    directory = runs.create(config)
    runs.start_log(directory / "train.log")
    log.info(f"model    {config['choices']['model']}, {sum(p.numel() for p in model.parameters()):,} parameters")
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    log.info(
        f"data     {config['choices']['dataset']}, {sizes}, images {'x'.join(map(str, input_shape))}, {len(classes)} classes"
    )
    log.info(f"device   {device}" + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""))
    log.info(f"run      {directory}")
    if val_batches is None:
        log.info("no validation part (dataset.val_fraction=0): the last epoch counts as the best")
    log.debug(f"{model}\n" + "\n".join(f"{name} {list(p.shape)}" for name, p in model.named_parameters()))

    # The epochs.
    trackers = Trackers(config, directory)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for epoch in range(1, config["epochs"] + 1):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        train_loss, train_accuracy = train_epoch(model, train_batches, criterion, optimizer, scheduler, epoch)
        val_loss, val_accuracy = None, None
        seconds = time.perf_counter() - began
        if val_batches:
            val_loss, confusion = evaluate(model, val_batches, len(classes))
            val_accuracy = accuracy(confusion)
        history.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": lr,
                "seconds": seconds,
                "images_per_second": train_batches.num_samples / seconds,
            }
        )
        state = {
            "format": checkpoint.FORMAT,
            "model": model.state_dict(),
            "config": config,
            "classes": classes,
            "input_shape": list(input_shape),
            "epoch": epoch,
            "metrics": history[-1],
        }
        if val_accuracy is None or not best or (val_accuracy, -val_loss) > (best["val_accuracy"], -best["val_loss"]):
            best = history[-1]
            checkpoint.write(directory / "best.pt", state)
        checkpoint.write(
            directory / "last.pt", {**state, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        )
        runs.write_metrics(directory / "metrics.csv", history)
        trackers.epoch(history[-1])
        log.info(epoch_line(history[-1], config["epochs"]))

    # The test set, once, with the best weights.
    checkpoint.load_weights(model, checkpoint.read(directory / "best.pt")["model"], directory / "best.pt")
    test_loss, confusion = evaluate(model, test_batches, len(classes))
    log.info(f"test     accuracy {accuracy(confusion):.2%}, loss {test_loss:.4f} (weights of epoch {best['epoch']})")
    log.info(f"again    python evaluate.py checkpoint={directory / 'best.pt'}")
    summary = {
        "test_accuracy": accuracy(confusion),
        "test_loss": test_loss,
        "best_epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "val_loss": best["val_loss"],
        "epochs": config["epochs"],
        "seconds": round(sum(row["seconds"] for row in history), 3),
        "device": str(device),
        "threads": torch.get_num_threads(),
        **runs.environment(),
    }
    runs.write_json(directory / "summary.json", summary)
    trackers.finish(summary)
    runs.stop_log()
    return best["val_accuracy"] if val_batches else best["train_accuracy"]


def train_epoch(
    model: nn.Module,
    batches: Batches,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    epoch: int,
) -> tuple[float, float]:
    """Train on every batch of an epoch; returns mean loss and accuracy (0 to 1) over its samples."""
    model.train()
    tally = Tally(len(batches), batches.device)
    bar = tqdm(
        total=len(batches), desc=f"epoch {epoch}", leave=False, disable=not sys.stdout.isatty(), dynamic_ncols=True
    )
    for images, labels in batches.epoch(epoch):
        logits = model(images)
        loss = criterion(logits, labels)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

        tally.add(loss, logits, labels)
        bar.update()
    bar.close()
    return tally.read()


def probe(model: nn.Module, input_shape: tuple[int, int, int], num_classes: int, device: torch.device) -> None:
    """Send one empty image through the model, so that a misfit is told before anything is made on disk.

    Raises:
        RequestError: the model does not take images of this shape, or does not give one logit a class.
    """
    model.eval()
    try:
        with torch.no_grad():
            shape = list(model(torch.zeros(1, *input_shape, device=device)).shape)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise RequestError(
            f"model {type(model).__name__} does not take images {list(input_shape)}: {one_line(error)}"
        ) from error
    if shape != [1, num_classes]:
        raise RequestError(
            f"model {type(model).__name__} gives {shape} for one image; expected [1, {num_classes}], a logit a class"
        )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One line of the log for an epoch."""
    val = "" if row["val_loss"] is None else f"   val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   train loss {row['train_loss']:.4f} accuracy "
        f"{row['train_accuracy']:.2%}{val}   lr {row['lr']:.2g}   {row['seconds']:.1f} s, {row['images_per_second']:,.0f} images/s"
    )
