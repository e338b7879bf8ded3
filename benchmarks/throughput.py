"""How fast training is, beside the bare arithmetic and what people would use instead.

    python benchmarks/throughput.py                   # everything, a few minutes
    python benchmarks/throughput.py --only mlp --rounds 3 --samples 6000

Every loop trains the same model on Fashion-MNIST (random images of its shape where it is missing) and is timed over one
whole epoch. The loops take turns, so that a machine that slows down slows them all; medians count.

- bare: one fixed batch, as many times forward, backward, step and zero_grad as an epoch has batches;
- this project: the epoch as train.py does it, with bar, metrics and a checkpoint at its end;
- tutorial: the loop of the PyTorch quickstart (a sample at a time through ToTensor, DataLoader, num_workers=0);
- skorch, Keras on torch, Lightning: the same model and data through their own loops, where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.process import keep_memory, spin  # noqa: E402

spin()  # as the program does, before torch is imported; here, and so is memory, to the good of all
keep_memory()
os.chdir(ROOT)

import torch  # noqa: E402  (the project is found first)
from hydra import compose, initialize_config_dir  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import datasets  # noqa: E402
import train  # noqa: E402
from engine.build import build  # noqa: E402
from engine.config import CONFIGS, check  # noqa: E402
from engine.data.devices import choose_device  # noqa: E402
from engine.data.splits import load_splits  # noqa: E402
from engine.errors import RunError  # noqa: E402
from engine.pictures.curves import LiveCurves  # noqa: E402
from engine.run import checkpoint, runs  # noqa: E402
from engine.run.saver import Saver  # noqa: E402
from engine.run.state import Progress, RandomStates  # noqa: E402
from engine.training.metrics import Tally  # noqa: E402
from engine.training.schedules import build_schedule  # noqa: E402
from engine.training.step import Step  # noqa: E402

Loop = Callable[[], None]  # trains one epoch
SHOWING: list[float] = []  # seconds that pictures and CSV took after each of this project's epochs
AUGMENTED = (
    "dataset.train_transforms=[{RandomCrop: {size: 28, padding: 2}},RandomHorizontalFlip,"
    "{Normalize: {mean: [0.2860], std: [0.3530]}}]"
)
# The sections: name, batch size, overrides of the configuration.
SECTIONS = {
    "mlp": (64, ["model=mlp", "dataset.train_transforms=[]"]),
    "cnn": (128, ["model=cnn", AUGMENTED]),
}


def fashion_mnist(samples: int | None) -> tuple[Tensor, Tensor]:
    """Training images uint8 `[n, 1, 28, 28]` and labels; random ones where the files are not on this machine."""
    try:
        if not Path("/usr/share/datasets/fashion-mnist").is_dir() and not Path("data/FashionMNIST/raw").is_dir():
            raise RunError("Fashion-MNIST is not on this machine")
        images, labels = datasets.fashion_mnist("data").train  # type: ignore[misc]
    except RunError as error:
        print(f"{error}; random images of its shape are used")
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (60000, 1, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (60000,), generator=generator)
    return images[:samples], labels[:samples]


def made_data(samples: int | None) -> datasets.ImageData:
    """What `dataset._target_` names in this benchmark: all training images, no test to speak of."""
    images, labels = fashion_mnist(samples)
    return datasets.ImageData((images, labels), (images[:100], labels[:100]), [str(c) for c in range(10)])


def composed(overrides: list[str]) -> dict[str, Any]:
    """The checked configuration of `python train.py OVERRIDES`."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        whole = compose("train", overrides, return_hydra_config=True)
    choices = dict(whole.hydra.runtime.choices)
    return check(compose_without_hydra(whole), choices, [CONFIGS], "train")


def compose_without_hydra(whole: Any) -> Any:
    """The configuration alone, without Hydra's own part."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(whole):
        del whole["hydra"]
    return OmegaConf.create(OmegaConf.to_container(whole))


# ---------------------------------------------------------------------------------------------------------------------
# The loops


class Setup:
    """What the loops of a section share: data, batch size, device and how to make a fresh model and optimizer.

    Args:
        batch_size: samples a step.
        overrides: of the configuration.
        samples: training samples to use; None is all 60,000.
    """

    def __init__(self, batch_size: int, overrides: list[str], samples: int | None, device: str) -> None:
        self.config = composed(
            [
                "dataset=fashion_mnist",
                "dataset.val_fraction=0",
                f"batch_size={batch_size}",
                f"device={device}",
                "optimizer.lr=1e-3",
                "optimizer.momentum=0",
                *overrides,
            ]
        )
        self.batch_size, self.samples = batch_size, samples
        self.device = choose_device(device)
        self.images, self.labels = fashion_mnist(samples)
        self.steps = -(-len(self.labels) // batch_size)

    def model(self) -> nn.Module:
        """The section's model, fresh."""
        torch.manual_seed(0)
        return build(self.config["model"], "model", input_shape=(1, 28, 28), num_classes=10).to(self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bare(setup: Setup) -> Loop:
    """One fixed batch, nothing but arithmetic."""
    model, criterion = setup.model(), nn.CrossEntropyLoss()
    optimizer = build(setup.config["optimizer"], "optimizer", model.parameters())  # the same arithmetic as below
    images = setup.images[: setup.batch_size].float().div(255).to(setup.device)
    labels = setup.labels[: setup.batch_size].to(setup.device)

    def epoch() -> None:
        model.train()
        for _ in range(setup.steps):
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        setup.wait()

    return epoch


def this_project(setup: Setup) -> Loop:
    """train.py's own epoch, with its bar shown to nobody, its metrics, and a checkpoint written at its end."""
    config = setup.config
    config["dataset"] = {**config["dataset"], "_target_": f"{__name__}.made_data", "samples": setup.samples}
    config["dataset"].pop("root")
    splits, classes = load_splits(config["dataset"])
    batches = train.batches_of(splits, config, setup.device)["train"]
    model = setup.model()
    criterion = build(config["criterion"], "criterion")
    optimizer = build(config["optimizer"], "optimizer", model.parameters())
    schedule = build_schedule(config["scheduler"], optimizer, 10**4, len(batches))
    step = Step(model, optimizer, schedule, setup.device, batch_size=config["batch_size"])
    progress, tally = Progress(), Tally(setup.device)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": schedule, "step": step}
    about = {"format": checkpoint.FORMAT, "config": config, "classes": classes, "input_shape": [1, 28, 28]}
    directory = tempfile.TemporaryDirectory()
    folder = Path(directory.name)
    parts |= {"tally": tally, "progress": progress, "random": RandomStates()}
    saver = Saver(folder, about, parts, **config["checkpoint"])
    curves = LiveCurves(folder / "curves.png")

    def epoch(directory: Any = directory) -> None:  # in step with train.main, less the validation that others lack
        with Terminal():
            train.train_epoch(batches, criterion, step, saver, config["epochs"])
        loss, accuracy = tally.read()
        row = dict.fromkeys(runs.COLUMNS) | {"epoch": progress.epoch, "train_loss": loss, "train_accuracy": accuracy}
        row |= {"lr": progress.lr, "seconds": progress.seconds}
        saver.check_finite()
        tally.reset()
        saver.save_epoch(best=progress.end_epoch(row))
        began = time.perf_counter()
        runs.write_metrics(folder / "metrics.csv", progress.history)
        curves.update(progress.history)
        SHOWING.append(time.perf_counter() - began)
        setup.wait()

    return epoch


class Terminal:
    """Standard output and error that claim to be a terminal, so that the progress bar is drawn, into nothing."""

    def __enter__(self) -> None:
        self.streams = sys.stdout, sys.stderr
        nowhere = open(os.devnull, "w")
        nowhere.isatty = lambda: True  # type: ignore[method-assign]
        sys.stdout = sys.stderr = nowhere

    def __exit__(self, *_: Any) -> None:
        sys.stdout.close()
        sys.stdout, sys.stderr = self.streams


def tutorial(setup: Setup) -> Loop:
    """The loop of https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html, less its prints."""
    from recipes import Samples
    from torch.utils.data import DataLoader

    loader = DataLoader(Samples(setup.images, setup.labels), batch_size=setup.batch_size)
    model, criterion = setup.model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def epoch() -> None:
        model.train()
        for batch, (images, labels) in enumerate(loader):
            images, labels = images.to(setup.device), labels.to(setup.device)
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch % 100 == 0:
                loss.item()

    return epoch


def skorch(setup: Setup) -> Loop:
    """skorch on arrays that are floats in memory already."""
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(
        setup.model(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=1e-3,
        batch_size=setup.batch_size,
        train_split=None,
        iterator_train__shuffle=True,
        verbose=0,
        device=str(setup.device),
    ).initialize()
    images, labels = setup.images.float().div(255).numpy(), setup.labels.numpy()
    return lambda: net.partial_fit(images, labels, epochs=1) and None


def keras_on_torch(setup: Setup) -> Loop:
    """Keras with its torch backend, the tutorial's MLP (there is no CNN here that is the same in Keras)."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Flatten(),
            layers.Dense(512, "relu"),
            layers.Dense(512, "relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(1e-3), loss=loss, metrics=["accuracy"])
    images, labels = setup.images[:, 0].float().div(255).numpy(), setup.labels.numpy()
    return lambda: model.fit(images, labels, batch_size=setup.batch_size, epochs=1, verbose=0) and None


def lightning(setup: Setup) -> Loop:
    """Lightning's Trainer with a bar, logging loss and accuracy, the data read a sample at a time."""
    import logging
    import warnings

    import lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = setup.model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            logits = self.model(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1])
            self.log("loss", loss)
            self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Module()
    data = TensorDataset(setup.images.float().div(255), setup.labels)
    loader = DataLoader(data, batch_size=setup.batch_size, shuffle=True)
    folder = tempfile.mkdtemp()

    def epoch() -> None:
        with Terminal():
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu" if setup.device.type == "cpu" else "auto",
                default_root_dir=folder,
                enable_checkpointing=False,
                logger=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)

    return epoch


# Name, the loop, the package that it needs, the sections that it is in.
LOOPS: list[tuple[str, Callable[[Setup], Loop], str | None, str]] = [
    ("bare arithmetic", bare, None, "mlp cnn"),
    ("this project", this_project, None, "mlp cnn"),
    ("PyTorch quickstart tutorial", tutorial, None, "mlp"),
    ("skorch", skorch, "skorch", "mlp"),
    ("Keras on torch", keras_on_torch, "keras", "mlp"),
    ("Lightning", lightning, "lightning", "mlp"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def take_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` epochs of every loop, after one epoch each that does not count."""
    for epoch in loops.values():
        epoch()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        names = list(loops) if number % 2 == 0 else list(loops)[::-1]  # so that none always follows the same other
        for name in names:
            began = time.perf_counter()
            loops[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Median seconds, the spread, and speed as a share of the first loop's; the median of the ratios round by round."""
    first = next(iter(seconds.values()))
    lines = [f"{'':<28} seconds an epoch (fastest to slowest)   speed, bare = 1"]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        spread = f"({min(times):.3f} to {max(times):.3f})"
        lines.append(f"{name:<28} {statistics.median(times):8.3f} {spread:<32} {ratio:8.3f}")
    return "\n".join(lines)


def measure_section(name: str, rounds: int, samples: int | None, device: str) -> None:
    """Time the loops of a section and print its table."""
    batch_size, overrides = SECTIONS[name]
    setup = Setup(batch_size, overrides, samples, device)
    loops: dict[str, Loop] = {}
    for label, make, package, sections in LOOPS:
        if name not in sections.split():
            continue
        if package and importlib.util.find_spec(package) is None:
            print(f"{label}: not installed, left out")
            continue
        loops[label] = make(setup)
    print(f"\n{name}, batch {batch_size}, {len(setup.labels):,} samples, {rounds} rounds, {setup.device}")
    gc.freeze()  # as train.py does, here to the good of all
    SHOWING.clear()
    seconds = take_turns(loops, rounds)
    print(table(seconds), flush=True)
    share = sum(SHOWING) / sum(seconds["this project"])  # of a run that has just begun: its first picture comes later
    print(f"CSV and pictures: {share:.2%} of this project's time", flush=True)


def measure_help(rounds: int) -> None:
    """How long `train.py --help` takes, beside importing torch."""
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "train.py --help": [sys.executable, "train.py", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first reads from disk
    print(f"\n{'':<28} seconds")
    for name, median in medians.items():
        print(f"{name:<28} {median:7.3f}   {median / medians['import torch']:.2f} of importing torch")


def main() -> None:
    """Measure the sections asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SECTIONS, "help"], help="one section")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each loop that count (7)")
    parser.add_argument("--samples", type=int, help="training samples (all 60,000)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {os.cpu_count()} cores")
    for name in SECTIONS if arguments.only is None else [arguments.only]:
        if name in SECTIONS:
            measure_section(name, arguments.rounds, arguments.samples, arguments.device)
    if arguments.only in (None, "help"):
        measure_help(arguments.rounds)


if __name__ == "__main__":
    main()
