"""Train an image classifier: `python train.py model=mlp optimizer.lr=1e-3`; see `--help` and README.md.

From top to bottom: main() sets up and runs the epochs, train_epoch() is the loop over the batches.
"""

from engine.command.cli import launch

if __name__ == "__main__":
    launch("train")  # answers help, completion and typos, and only then imports torch and calls main() below

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import distributed, files
from engine.build import build
from engine.data.batches import Batches
from engine.data.devices import choose_device, use_threads
from engine.data.draws import sample_seed
from engine.data.mixing import Mixing
from engine.data.splits import Split, class_counts, fingerprint, load_splits
from engine.errors import RequestError
from engine.pictures.curves import LiveCurves
from engine.process import share_cores
from engine.run import checkpoint, runs, trust
from engine.run.saver import Saver
from engine.run.state import EveryRandomStates, Progress
from engine.run.trackers import Trackers
from engine.terminal import log, watched
from engine.training.display import Bar, epoch_line
from engine.training.metrics import Tally, accuracy, evaluate, loss_name
from engine.training.optimizers import build_optimizer, shares
from engine.training.parallel import has_batchnorm, synchronise_batchnorm
from engine.training.pretrained import as_trained, disagreement, read_weights
from engine.training.schedules import build_schedule
from engine.training.step import Step, choose_precision
from engine.training.transfer import Frozen, scale_rates, take_weights
from engine.training.trial import to_device, try_step


def main(config: dict[str, Any]) -> float:
    """Train as the checked configuration says.

    Returns:
        the best validation accuracy (0 to 1), or the last training accuracy without a validation part; for sweepers.
    """
    # Data.
    config = runs.going_on(config)
    runs.check_name(config)
    device = prepare_device(config["device"], config["deterministic"], config["num_threads"])
    distributed.start(device, config)
    with distributed.one_before_others():  # it may have to download the data
        config = as_trained(config)  # prepares images as the model's weights want them, if that is asked
        splits, classes = load_splits(config["dataset"])
    patience = config["early_stopping"]["patience"]
    check_early_stopping(patience, splits)
    batches = batches_of(splits, config, device)
    input_shape, steps = batches["train"].sample_shape(), len(batches["train"])
    precision = choose_precision(config["precision"], device)

    # Model, loss, optimizer, schedule.
    torch.manual_seed(config["seed"])
    begins = not runs.is_saved(config["resume"])  # else the weights are those that were saved
    given: dict[str, Any] = {"input_shape": input_shape, "num_classes": len(classes)}
    given["read_weights"] = read_weights if begins else None
    with distributed.one_before_others():  # it may have to download the weights
        model = to_device(build(config["model"], "model", **given), device)
    if config["sync_batchnorm"] and distributed.world_size() > 1:
        synchronise_batchnorm(model)
    counts = class_counts(splits["train"], classes)
    criterion = to_device(build(config["criterion"], "criterion", class_counts=counts), device)
    trained_with = loss_name(criterion, config["dataset"]["target_transform"], batches["train"].mixing is not None)
    try_step(model, criterion, config["optimizer"], batches["train"], input_shape, len(classes), precision)
    taken = ""
    if config["init_from"] and begins:
        taken = take_weights(model, Path(config["init_from"]), classes)
    optimizer = build_optimizer(config["optimizer"], model, config["decay_norms"])
    scale_rates(optimizer, model, config["lr_scale"])
    frozen = Frozen(model, config["freeze"], config["unfreeze_epoch"])
    schedule = build_schedule(config["scheduler"], optimizer, config["epochs"], steps)
    step = Step(
        model,
        optimizer,
        schedule,
        device,
        batch_size=config["batch_size"],
        precision=precision,
        clip_grad_norm=config["clip_grad_norm"],
        ema_decay=config["ema"]["decay"],
        frozen=frozen,
    )
    if config["compile"]:
        step.compile()
        try_step(model, criterion, config["optimizer"], batches["train"], input_shape, len(classes), precision)

    if distributed.rank():  # each process draws other numbers for dropout; the first one those of a single process
        torch.manual_seed(int(sample_seed(config["seed"], 0, distributed.rank())))

    # The run: its directory, and what it saves.
    directory = runs.opened(config)
    about = {
        "format": checkpoint.FORMAT,
        "config": runs.own_config(config),
        "signature": trust.signature(runs.own_config(config)),
        "classes": classes,
        "input_shape": list(input_shape),
        "data": fingerprint(splits),
        "environment": {"device": str(device), "threads": torch.get_num_threads(), **runs.environment()},
    }
    progress, tally = Progress(), Tally(device, config["accumulate"])
    parts: dict[str, Any] = {"model": step.evaluated, "optimizer": optimizer, "scheduler": schedule, "step": step}
    parts |= {"tally": tally, "progress": progress, "random": EveryRandomStates()}
    saver = Saver(directory, about, parts, **config["checkpoint"])
    describe(config, model, optimizer, splits, input_shape, device, precision, directory, trained_with)
    log_transfer(config, taken, frozen.said(model, config["epochs"]), disagreement(config, input_shape))
    if config["resume"]:
        saver.restore(config["changed"], steps)
        runs.save_config(directory, config)

    # The epochs.
    trackers = Trackers(config, directory, next_epoch=progress.epoch)
    curves = LiveCurves(directory / "curves.png", trained_with)
    with frozen_memory(), curves, trackers, saver:
        while progress.epoch <= config["epochs"] and not stop_early(progress, patience):
            train_epoch(batches["train"], criterion, step, saver, config["epochs"])
            step.end_epoch()
            row = row_of(progress, tally)
            if "val" in batches:
                shown = watched(saver.until_stopped(batches["val"]), "validation", len(batches["val"]))
                row["val_loss"], confusion = evaluate(step.evaluated, shown, len(classes))
                row["val_accuracy"] = accuracy(confusion)

            saver.check_finite(row["val_loss"])
            tally.reset()
            is_best = progress.end_epoch(row)
            saver.save_epoch(is_best)
            runs.write_metrics(directory / "metrics.csv", progress.history)
            curves.update(progress.history)
            trackers.epoch(row)
            log.info(epoch_line(row, config["epochs"], progress.history))

        # The test set, once, with the best weights.
        best = distributed.from_first(lambda: checkpoint.read(directory / "best.pt"))
        checkpoint.load_weights(step.evaluated, best["model"], directory / "best.pt")
        shown = watched(saver.until_stopped(batches["test"]), "test", len(batches["test"]))
        test_loss, confusion = evaluate(step.evaluated, shown, len(classes))
        saver.check_test_loss(test_loss)
    summary = summarise(progress, about, test_loss, accuracy(confusion))
    runs.write_metrics(directory / "metrics.csv", progress.history)  # again: a run may have been killed before it did
    files.write_json(directory / "summary.json", summary)
    trackers.finish(summary)
    log.info(f"test     accuracy {accuracy(confusion):.2%}, loss {test_loss:.4f} (weights of epoch {best['epoch']})")
    if config["choices"].get("debug") == "overfit":
        learned = f"{progress.history[-1]['train_accuracy']:.2%} of the {len(splits['train'])} training samples"
        log.info(f"by heart {learned}: 100 % is right, and the accuracy on the test set means nothing here")
    log.info(f"again    python evaluate.py checkpoint={directory / 'best.pt'}")
    runs.close(directory)
    return progress.best["val_accuracy" if "val" in batches else "train_accuracy"]


def train_epoch(batches: Batches, criterion: nn.Module, step: Step, saver: Saver, epochs: int) -> None:
    """Train on the batches of an epoch that are still to come; loss and counts are in the saver's tally afterwards."""
    tally: Tally = saver.tally
    progress = saver.progress
    step.train(progress.epoch)  # but for what is frozen
    progress.begin_epoch(lr=step.optimizer.param_groups[0]["lr"])
    bar = Bar(f"epoch {progress.epoch}/{epochs}", len(batches), progress.batch, tally, step.optimizer)
    for batch in batches.epoch(progress.epoch, start=progress.batch):
        samples = batches.samples_in(progress.batch)  # in all processes together
        for images, labels, share in step.micro_batches(*batch, criterion, samples):  # one, unless accumulate=N
            logits = step.forward(images)  # in the chosen precision
            loss = criterion(logits, labels)
            step.backward(loss, share)
            tally.add(loss, logits, labels, share)
        step.update()  # unscale, clip, step, zero; then the next learning rate, and the averaged weights

        progress.batch += 1
        bar.update()
        saver.after_step()  # saves when it is time, leaves when told to
    bar.close()


def prepare_device(name: str, deterministic: bool, num_threads: int | None) -> torch.device:
    """The device of a run, with so many threads on the CPU, and deterministic algorithms only where that is asked."""
    device = choose_device(name)
    if device.type == "cuda":  # cuBLAS asks for it once, and a later run of this process may be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # to set it imports the compiler
        torch.use_deterministic_algorithms(deterministic)
    use_threads(num_threads)
    if device.type == "cpu" and not distributed.is_launched():  # the cores of those are divided
        share_cores(torch.get_num_threads())
    return device


def batches_of(splits: dict[str, Split], config: dict[str, Any], device: torch.device) -> dict[str, Batches]:
    """The batches of every split, by its name.

    Raises:
        RequestError: training's images come out in another shape than the test's.
    """
    common = {key: config[key] for key in ("batch_size", "seed", "num_workers", "limit_batches")}
    common |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
    only_training = {key: config[key] for key in ("shuffle", "drop_last", "accumulate")}
    if config["mixup"] or config["cutmix"]:
        only_training["mixing"] = Mixing(config["mixup"], config["cutmix"], config["seed"])
    batches = {}
    for name, split in splits.items():
        phase = "train" if name == "train" else "eval"
        transforms = config["dataset"][f"{phase}_transforms"]
        only = {"training": True, **only_training} if phase == "train" else {}
        batches[name] = Batches(split, transforms, device, **common, **only)
    shapes = [list(batches[name].sample_shape()) for name in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise RequestError(
            f"images come out as {shapes[0]} for training and {shapes[1]} for testing; "
            "make dataset.train_transforms and eval_transforms agree"
        )
    return batches


def row_of(progress: Progress, tally: Tally) -> dict[str, Any]:
    """The row of metrics.csv of an epoch that was trained, not yet validated."""
    loss, train_accuracy = tally.read()
    seconds = progress.seconds
    return {
        "epoch": progress.epoch,
        "train_loss": loss,
        "train_accuracy": train_accuracy,
        "val_loss": None,
        "val_accuracy": None,
        "lr": progress.lr,
        "seconds": seconds,
        "images_per_second": tally.samples / seconds,
    }


@contextmanager
def frozen_memory() -> Iterator[None]:
    """What there is by now stays: Python's search for garbage, 0.2 s each time, passes it over inside."""
    gc.freeze()
    gc.enable()  # off since the imports began
    try:
        yield
    finally:
        gc.unfreeze()  # or libraries that count what they have made (nanobind's, in Triton) complain when Python ends


def check_early_stopping(patience: int | None, splits: dict[str, Split]) -> None:
    """Refuse early stopping where there is nothing to watch; it would never stop."""
    if patience is not None and "val" not in splits:
        raise RequestError(
            f"early_stopping.patience={patience}: there is no validation part whose results could stop improving; "
            "raise dataset.val_fraction, or leave early_stopping.patience out"
        )


def stop_early(progress: Progress, patience: int | None) -> bool:
    """Whether validation has not become better for `patience` epochs."""
    if patience is None or progress.epochs_since_best() < patience:
        return False
    log.info(f"stopped early: nothing better than epoch {progress.best['epoch']} for {patience} epochs")
    return True


def summarise(progress: Progress, about: dict[str, Any], test_loss: float, test_accuracy: float) -> dict[str, Any]:
    """What summary.json says: the results of the best epoch, and what a repetition needs to know."""
    return {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "best_epoch": progress.best["epoch"],
        "val_accuracy": progress.best["val_accuracy"],
        "val_loss": progress.best["val_loss"],
        "epochs": len(progress.history),
        "seconds": round(sum(row["seconds"] for row in progress.history), 3),
        "seed": about["config"]["seed"],
        "data": about["data"],
        **about["environment"],
    }


def describe(
    config: dict[str, Any],
    model: nn.Module,
    optimizer: Any,
    splits: dict[str, Split],
    input_shape: tuple[int, int, int],
    device: torch.device,
    precision: str,
    directory: Path,
    trained_with: str | None,
) -> None:
    """Log what is about to be trained, on what and where."""
    choices, sizes = config["choices"], ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    shape, num_classes = "x".join(map(str, input_shape)), splits["train"].num_classes
    named = f" {config['model']['name']}" if config["model"].get("name") else ""  # of a library's
    log.info(f"model    {choices['model']}{named}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if said := shares(optimizer):
        log.info(f"updates  {said}")
    log.info(f"data     {choices['dataset']}, {sizes}, images {shape}, {num_classes} classes")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    processes = distributed.world_size()
    several = f", {processes} processes" if processes > 1 else ""
    log.info(f"device   {device}{name}" + (f", {precision}" if config["precision"] != "fp32" else "") + several)
    if processes > 1 and has_batchnorm(model) and not config["sync_batchnorm"]:
        log.info("norm     batch norm sees each process's part of a batch; sync_batchnorm=true lets it see the whole")
    log.info(f"run      {directory}")
    if "val" not in splits:
        reason = "dataset.val_fraction=0" if not config["dataset"]["val_fraction"] else "the samples cannot be divided"
        log.info(f"no validation part ({reason}): the last epoch counts as the best")
    if config["deterministic"]:
        log.info(
            "deterministic=true: PyTorch's deterministic algorithms only, which can be several times slower on a GPU"
        )
    log.debug(f"{model}\n" + "\n".join(f"{name} {list(p.shape)}" for name, p in model.named_parameters()))
    if trained_with:
        log.info(f"loss     {trained_with} in training, plain cross-entropy in validation and test")
    if config["mixup"] or config["cutmix"]:
        log.info("mixed    a training image is right with the class of its larger share")


def log_transfer(config: dict[str, Any], taken: str, frozen: str, apart: str) -> None:
    """Log which weights another run has given, which parameters do not learn, and how images are prepared otherwise."""
    begun = config["init_from"] or any(config["model"].get(name) for name in checkpoint.DOWNLOADS)
    if taken:
        log.info(f"weights  {taken}")
    if frozen:
        log.info(f"frozen   {frozen}" + "; they stay as the model makes them, without init_from=" * (not begun))
    if apart:
        log.info(f"images   {apart}")
