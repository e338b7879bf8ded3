"""What only a GPU can show: `python benchmarks/gpu.py`, under ten minutes on a machine with CUDA, prints a table.

    python benchmarks/gpu.py                          # every check, a row each: pass or fail, seconds, figures
    python benchmarks/gpu.py speed_mlp speed_cnn      # these alone
    python benchmarks/gpu.py --device cpu             # what a CPU can do of it, to try the checks themselves

Each check stands alone: one that fails, however it does, is a row with its reason, and the others run. Exit code 1
where one failed, 2 without CUDA. Wherever they can be they are the commands that a user types, in a folder of their
own; on Fashion-MNIST where the Debian package dataset-fashion-mnist or data/ has it, else on the digits; CIFAR-10 where
data/ has it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

from throughput import ROOT, SECTIONS, Setup, bare, take_turns, this_project  # first: it sets up threads and memory

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import datasets
from engine.data import devices
from engine.data.batches import Batches
from engine.data.splits import Split
from engine.training.metrics import Share, Tally, evaluate
from engine.training.step import Step, autocast
from models.cnn import CNN
from models.resnet import ResNet18

TARGET = 0.95  # of the bare loop's speed
HELD_UP = 30_000_000  # cycles that a stream waits before each batch, some 15 ms: longer than it takes to read one
PATIENCE = 200  # seconds that a command may take
SHIFTED = [
    {"RandomCrop": {"size": 32, "padding": 4}},
    "RandomHorizontalFlip",
    {"Normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}},
]


class Failed(Exception):
    """What a check found is not as it has to be."""


class Skipped(Exception):
    """A check cannot be made on this machine."""


DEVICE = torch.device("cuda")
FOLDER = Path()  # where the commands run


def expect(holds: bool, figures: str) -> str:
    """The figures of a check, which fails with them unless it holds."""
    if not holds:
        raise Failed(figures)
    return figures


def on_gpu() -> bool:
    """Whether this is the real thing, and not a rehearsal."""
    return DEVICE.type == "cuda"


def wait() -> None:
    """Until the device has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def command(*words: str, under: Iterable[str] = ()) -> str:
    """What a program of this project prints; `under` is what starts it in place of Python alone.

    Raises:
        Failed: its exit code is not 0.
    """
    line = [sys.executable, *under, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(line, cwd=FOLDER, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.startswith("error: ")] or done.stderr.splitlines()
        raise Failed(f"{' '.join(words)}: exit code {done.returncode}, {(said or ['nothing said'])[-1]}")
    return done.stdout


def has_fashion_mnist() -> bool:
    """Whether it is on this machine."""
    return Path("/usr/share/datasets/fashion-mnist").is_dir() or (ROOT / "data/FashionMNIST/raw").is_dir()


def data() -> list[str]:
    """The words of a command that choose data of the size that suits the device."""
    if not has_fashion_mnist():
        return ["dataset=digits"]
    return ["dataset=fashion_mnist", f"dataset.root={ROOT / 'data'}", *([] if on_gpu() else ["dataset.limit=1000"])]


@functools.cache
def trained(device: str, *words: str, under: tuple[str, ...] = ()) -> Path:
    """The folder of a CNN that was trained so; two epochs of Fashion-MNIST."""
    name = f"run_{trained.cache_info().misses}"
    epochs = "epochs=2" if has_fashion_mnist() else "epochs=10"
    common = ["model=cnn", "batch_size=128", *data(), epochs, f"device={device}", f"name={name}"]
    command("train.py", *common, *words, under=under)
    return FOLDER / "checkpoints" / name


def summary(run: Path) -> dict:
    """What summary.json of a run says."""
    return json.loads((run / "summary.json").read_text())


def rate(run: Path) -> float:
    """Images a second in a run's last epoch."""
    with (run / "metrics.csv").open() as file:
        return float([*csv.DictReader(file)][-1]["images_per_second"])


def noise(accuracy: float) -> float:
    """Three standard deviations of the difference of two accuracies on the test set that `data` has, both this one."""
    samples = (10_000 if on_gpu() else 1_000) if has_fashion_mnist() else 355
    return 3 * math.sqrt(2 * max(accuracy * (1 - accuracy), 0.01) / samples)


def alike(run: Path, other: Path) -> str:
    """That two runs' test accuracies are within noise of each other."""
    one, two = (summary(each)["test_accuracy"] for each in (run, other))
    return expect(abs(one - two) <= noise(two), f"accuracy {one:.2%} beside {two:.2%} (noise {noise(two):.2%})")


def same_bits(run: Path, other: Path) -> bool:
    """Whether two runs' last.pt have the same weights, optimizer and losses."""

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return [tensor for part in value for tensor in tensors(part)]
        return [value] if isinstance(value, Tensor) else []

    states = [torch.load(each / "last.pt", map_location="cpu", weights_only=True) for each in (run, other)]
    one, two = (tensors([state[part] for part in ("model", "optimizer", "step", "tally")]) for state in states)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The same results as a CPU's


def training() -> str:
    """Trained on the device as on the CPU: the accuracy is the same but for noise."""
    return alike(trained(str(DEVICE)), trained("cpu"))


def evaluation() -> str:
    """evaluate.py gives one checkpoint the same figures on both devices, and those that training printed."""
    run = trained(str(DEVICE))
    found = []
    for device in (str(DEVICE), "cpu"):
        output = FOLDER / f"evaluation_{device}.json"
        command("evaluate.py", f"checkpoint={run / 'best.pt'}", f"device={device}", f"output={output}")
        found.append(json.loads(output.read_text()))
    one, two = found
    told, most = summary(run)["test_accuracy"], 0.001 + 1 / one["samples"]
    apart = max(abs(one["accuracy"] - two["accuracy"]), abs(one["accuracy"] - told))
    figures = f"accuracy {one['accuracy']:.2%} and {two['accuracy']:.2%}, training's {told:.2%}; "
    figures += f"loss {one['loss']:.6f} and {two['loss']:.6f}"
    return expect(apart <= most and math.isclose(one["loss"], two["loss"], rel_tol=2e-3), figures)


def prediction() -> str:
    """predict.py says the same of 300 image files on both devices."""
    from PIL import Image

    run = trained(str(DEVICE))
    images = datasets.fashion_mnist(str(ROOT / "data")).test if has_fashion_mnist() else datasets.digits().test
    (FOLDER / "pictures").mkdir()
    for number, image in enumerate(images[0][:300, 0]):
        Image.fromarray(image.numpy()).save(FOLDER / "pictures" / f"{number}.png")
    tables = []
    for device in (str(DEVICE), "cpu"):
        output = FOLDER / f"predictions_{device}.csv"
        words = [f"checkpoint={run / 'best.pt'}", "images=pictures", f"device={device}", f"output={output}"]
        command("predict.py", *words)
        tables.append([*csv.DictReader(output.open())])
    pairs = [(one, two) for one, two in zip(*tables, strict=True) if one["predicted"] == two["predicted"]]
    apart = max(abs(float(one["probability"]) - float(two["probability"])) for one, two in pairs)
    other = len(tables[0]) - len(pairs)
    return expect(other <= 2 and apart < 0.01, f"{other} of {len(tables[0])} differ, probabilities by {apart:.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# Batches arrive whole


class Pictures(Dataset):
    """Images of bytes and labels as a user's Dataset has them, which worker processes read."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
        self.labels = torch.randint(0, 10, (count,), generator=draw)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def sums(batches: Iterable[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Of every batch a number that a change of any pixel or label changes; the device is not waited for meanwhile."""
    found = []
    for images, labels in batches:
        pixels = (images.flatten() * 1000).round().long()
        places = torch.arange(1, len(pixels) + 1, device=pixels.device)
        found.append(torch.stack([(pixels * places).sum(), (labels * places[: len(labels)]).sum()]))
    return torch.stack(found).tolist()


def held_up(batches: Iterable[tuple[Tensor, Tensor]], stream: torch.cuda.Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; what is put on a stream waits some milliseconds before each."""
    for batch in batches:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(HELD_UP)
        yield batch


def batches_of(part: object, transforms: list, device: torch.device, workers: int = 0) -> Batches:
    """2,048 training samples in 64 batches."""
    split = Split(part, torch.arange(2048), 10)
    return Batches(split, transforms, device, batch_size=32, seed=0, num_workers=workers, training=True)


def in_memory() -> str:
    """Samples on the device, and those that do not fit there, make the batches that the CPU makes, augmented too."""
    pictures, worst = Pictures(2048), 0.0
    for transforms in ([], SHIFTED[:2], SHIFTED):
        for fits in (True, False):
            part = pictures.images.clone(), pictures.labels.clone()
            expected = [*batches_of(part, transforms, torch.device("cpu")).epoch(1)]
            nothing_free = mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (0, 1))
            with contextlib.nullcontext() if fits else nothing_free:
                batches = batches_of(part, transforms, DEVICE)
            assert batches.in_memory is not None
            if on_gpu() and batches.in_memory[0].is_cuda != fits:
                raise Failed(f"samples {'that fit are not' if fits else 'that do not fit are'} on the device")
            pairs = [*zip(batches.epoch(1), expected, strict=True)]
            worst = max(worst, *(float((one[0].cpu() - two[0]).abs().max()) for one, two in pairs))
            if worst > 1e-5 or not all(torch.equal(one[1].cpu(), two[1]) for one, two in pairs):
                raise Failed(f"transforms {transforms}, {fits=}: pixels differ by {worst:.1e}, or labels do")
    return f"pixels differ by {worst:.1e} at most, labels not at all"


def from_workers() -> str:
    """Worker processes use their memory again and again; no batch shows another's samples, whichever stream lags.

    That this would be seen is shown first, by copies that are taken from that memory itself.
    """
    expected = sums(batches_of(Pictures(2048), [], torch.device("cpu")).epoch(1))
    batches = batches_of(Pictures(2048), [], DEVICE, workers=2)
    assert batches.workers is not None
    streams = {"the copies": devices._copying(DEVICE), "the user": torch.cuda.current_stream()} if on_gpu() else {}
    wrong = {}
    for name, stream in streams.items():
        wrong[name] = differing(sums(held_up(batches.epoch(1), stream)), expected)
    if not on_gpu():
        wrong["no stream"] = differing(sums(batches.epoch(1)), expected)
    figures = ", ".join(f"{count} of 64 wrong where {name} lagged" for name, count in wrong.items())

    slots = batches.workers.slots
    if slots is None or slots.memory is None:
        raise Failed(f"{figures}; there is no shared memory")
    if on_gpu():  # memory that counts as pinned is copied from as it is: the mistake that has to show
        cudart, place = torch.cuda.cudart(), slots.memory.data_ptr()
        torch.cuda.check_error(cudart.cudaHostRegister(place, slots.memory.numel(), 0))
        try:
            seen = differing(sums(held_up(batches.epoch(1), streams["the copies"])), expected)
        finally:
            wait()
            torch.cuda.check_error(cudart.cudaHostUnregister(place))
    else:  # on a CPU the same mistake: images that are looked at when the next are in their place
        order = batches.order(1).split(32)
        late = [(images, labels) for images, labels, _ in batches.workers.read(1, order)]
        seen = differing(sums((images / 255, labels) for images, labels in late), expected)
    return expect(not any(wrong.values()) and seen > 0, f"{figures}; of copies without a copy in between {seen} wrong")


def differing(found: list[list[int]], expected: list[list[int]]) -> int:
    """How many batches differ."""
    return sum(one != other for one, other in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def speed(section: str) -> str:
    """The program's loop beside a bare one on a fixed batch."""
    setup = Setup(*SECTIONS[section], None if on_gpu() else 1000, str(DEVICE))
    seconds = take_turns({"bare": bare(setup), "project": this_project(setup)}, rounds=5 if on_gpu() else 1)
    ratio = statistics.median(a / b for a, b in zip(seconds["bare"], seconds["project"], strict=True))
    step = {name: statistics.median(times) / setup.steps * 1e6 for name, times in seconds.items()}
    figures = f"{ratio:.2f} of the bare loop's speed, {step['project']:.0f} and {step['bare']:.0f} us a step"
    return expect(ratio >= TARGET or not on_gpu(), figures)


def where_time_goes(section: str) -> str:
    """Microseconds a step of the loop's parts, each put to those before it, and how long the device works of that."""
    setup = Setup(*SECTIONS[section], None if on_gpu() else 1000, str(DEVICE))
    config, model, criterion = setup.config, setup.model(), nn.CrossEntropyLoss()
    split = Split((setup.images, setup.labels), torch.arange(len(setup.labels)), 10)
    transforms = config["dataset"]["train_transforms"]
    batches = Batches(split, transforms, setup.device, batch_size=setup.batch_size, training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    step, tally = Step(model, optimizer, schedule, setup.device, batch_size=setup.batch_size), Tally(setup.device)
    levels = ("batches", "forward and loss", "backward", "update", "counts")

    def epoch(level: int) -> None:
        tally.reset()
        for images, labels in batches.epoch(1):
            if level > 0:
                logits = step.forward(images)
                loss = criterion(logits, labels)
            if level > 1:
                step.backward(loss, Share(1.0, 1.0, len(labels)))
            if level > 2:
                step.update()
            else:
                optimizer.zero_grad()
            if level > 3:
                tally.add(loss, logits, labels)
        wait()

    seconds = take_turns({name: functools.partial(epoch, level) for level, name in enumerate(levels)}, 3)
    reached = [statistics.median(seconds[name]) / setup.steps * 1e6 for name in levels]
    parts = [f"{name} {now - before:.0f}" for name, now, before in zip(levels, reached, [0, *reached], strict=False)]
    said = f"us a step: {', '.join(parts)}, in all {reached[-1]:.0f}"
    if not on_gpu():
        return said
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        epoch(len(levels) - 1)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / setup.steps
    return f"{said}; the device works {busy:.0f} of them"


def cheaper(*words: str) -> str:
    """Another precision, or compiled: the accuracy of the plain run but for noise, and at what speed."""
    plain, other = trained(str(DEVICE)), trained(str(DEVICE), *words)
    return f"{alike(other, plain)}, {rate(other) / rate(plain):.2f} of fp32's images/s ({rate(other):,.0f})"


def fp16() -> str:
    """Of half precision with a gradient scaler."""
    if not on_gpu():
        raise Skipped("fp16 is not for a CPU")
    return cheaper("precision=fp16")


def channels_last() -> str:
    """The CNN's filters lie so, also after a step with averages; what a ResNet-18 would gain by it, in bf16."""
    model = CNN((3, 32, 32), 10).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    step = Step(model, optimizer, schedule, DEVICE, batch_size=8, precision="bf16", ema_decay=0.9)
    for _ in range(2):
        step.backward(step.forward(torch.rand(8, 3, 32, 32, device=DEVICE)).sum(), Share(1.0, 1.0, 8))
        step.update()
    filters = [p for module in (model, step.evaluated) for p in module.parameters() if p.ndim == 4]
    kept = all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    rates = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        network = ResNet18((3, 32, 32), 10).to(DEVICE, memory_format=layout)
        images = torch.rand(256 if on_gpu() else 16, 3, 32, 32, device=DEVICE).to(memory_format=layout)

        def steps(count: int, network: nn.Module = network, images: Tensor = images) -> None:
            for _ in range(count):
                with autocast(DEVICE, "bf16"):
                    loss = network(images).float().square().mean()
                loss.backward()
                network.zero_grad()
            wait()

        steps(3 if on_gpu() else 1)
        began, count = time.perf_counter(), 30 if on_gpu() else 1
        steps(count)
        rates[name] = count * len(images) / (time.perf_counter() - began)
    said = ", ".join(f"{name} {images_a_second:,.0f} images/s" for name, images_a_second in rates.items())
    return expect(kept, f"the CNN {'keeps' if kept else 'has lost'} its layout; ResNet-18 in bf16: {said}")


# ---------------------------------------------------------------------------------------------------------------------
# Repeatable, and for long


def twice() -> str:
    """deterministic=true gives every model the same bits twice, in a sweep of one process."""
    models = ("mlp", "cnn", "fastnet", "resnet18", "vit")
    words = [f"model={','.join(models)}", "deterministic=true", "epochs=2", "dataset.limit=256", f"device={DEVICE}"]
    for name in ("twice_1", "twice_2"):
        command("train.py", "-m", f"name={name}", *words)
    runs = [sorted((FOLDER / "checkpoints" / name).glob("*/last.pt")) for name in ("twice_1", "twice_2")]
    pairs = zip(models, *runs, strict=True)
    other = [model for model, one, two in pairs if not same_bits(one.parent, two.parent)]
    return expect(not other, f"{', '.join(other) or 'none'} of {', '.join(models)} differ")


def deterministic_later() -> str:
    """One process trains without and then with deterministic=true: cuBLAS asks for its settings only once."""
    words = ["deterministic=false,true", "epochs=1", "dataset.limit=256", f"device={DEVICE}", "name=later"]
    command("train.py", "-m", *words)
    return "both runs of a sweep came to their end"


def killed_and_resumed() -> str:
    """deterministic=true: a run that was killed within an epoch and went on ends with the bits of one that was not."""
    words = ["model=cnn", "dataset=digits", "deterministic=true", "epochs=6", f"device={DEVICE}", "ema.decay=0.9"]
    words += ["checkpoint.every_steps=1", "dataset.train_transforms=[{RandomCrop: {size: 8, padding: 1}}]"]
    command("train.py", "name=whole", *words)
    line = [sys.executable, str(ROOT / "train.py"), "name=killed", *words]
    run = FOLDER / "checkpoints" / "killed"
    process = subprocess.Popen(line, cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + PATIENCE
    while not (run / "last.pt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = command("train.py", f"resume={run}")
    where = next((line for line in said.splitlines() if line.startswith("resumed")), "it had ended before")
    figures = " ".join(where.split())
    return expect("after" in where and same_bits(run, FOLDER / "checkpoints" / "whole"), figures)


def memory() -> str:
    """Memory after each epoch of training and evaluation, which stays as it is from the second on."""
    setup = Setup(*SECTIONS["cnn"], 20_000 if on_gpu() else 1_000, str(DEVICE))
    epoch, model = this_project(setup), setup.model()
    split = Split((setup.images, setup.labels), torch.arange(1_000), 10)
    batches = Batches(split, [], setup.device, batch_size=128)
    taken = []
    for _ in range(6):
        epoch()
        evaluate(model, batches, 10)
        wait()
        own = torch.cuda.memory_allocated() / 1e6 if on_gpu() else 0.0
        taken.append((own, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6))
    device, host = zip(*taken, strict=True)
    figures = f"device {device[1]:.1f} to {device[-1]:.1f} MB, host {host[1]:.0f} to {host[-1]:.0f} MB"
    return expect(device[-1] - device[1] < 1 and host[-1] - host[1] < 0.05 * host[1], figures)


# ---------------------------------------------------------------------------------------------------------------------
# All GPUs, and the recipe


def several() -> str:
    """torchrun with all GPUs: training reaches the accuracy of one process, evaluate.py has its very figures."""
    count = torch.cuda.device_count() if on_gpu() else 2
    under = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
    name = DEVICE.type  # each process takes a device of its own
    run, alone = trained(name, under=under), trained(str(DEVICE))
    words, found = ["evaluate.py", f"checkpoint={run / 'best.pt'}", f"device={name}"], []
    for start in (under, ()):
        output = FOLDER / f"several_{len(found)}.json"
        command(*words, f"output={output}", under=start)
        found.append(json.loads(output.read_text()))
    figures = f"{count} processes: {alike(run, alone)}, {rate(run) / rate(alone):.2f} of one's images/s; evaluate.py "
    figures += f"loss {found[0]['loss']:.9f} and alone {found[1]['loss']:.9f}"
    return expect(all(found[0][key] == found[1][key] for key in ("confusion", "accuracy", "loss", "auc")), figures)


def cifar10_94() -> str:
    """The recipe with the mirrored evaluation; on a CPU a few steps of it."""
    if not (ROOT / "data" / "cifar-10-batches-py").is_dir():
        raise Skipped("CIFAR-10 is not in data/")
    words = [f"dataset.root={ROOT / 'data'}", f"device={DEVICE}", "name=cifar10"]
    words += [] if on_gpu() else ["epochs=1", "limit_batches=2", "compile=false", "batch_size=64"]
    command("train.py", "experiment=cifar10_94", *words)
    run = FOLDER / "checkpoints" / "cifar10"
    command("evaluate.py", f"checkpoint={run / 'best.pt'}", *words[:2], "tta=flip")
    accuracy = json.loads((run / "evaluation.json").read_text())["accuracy"]
    figures = f"{accuracy:.2%} in {summary(run)['seconds']:.1f} s of epochs"
    return expect(accuracy >= 0.935 or not on_gpu(), figures)


CHECKS: dict[str, Callable[[], str]] = {
    "training": training,
    "evaluation": evaluation,
    "prediction": prediction,
    "in_memory": in_memory,
    "from_workers": from_workers,
    "speed_mlp": functools.partial(speed, "mlp"),
    "speed_cnn": functools.partial(speed, "cnn"),
    "time_mlp": functools.partial(where_time_goes, "mlp"),
    "time_cnn": functools.partial(where_time_goes, "cnn"),
    "bf16": functools.partial(cheaper, "precision=bf16"),
    "fp16": fp16,
    "compile": functools.partial(cheaper, "compile=true"),
    "channels_last": channels_last,
    "twice": twice,
    "deterministic_later": deterministic_later,
    "killed_and_resumed": killed_and_resumed,
    "memory": memory,
    "several": several,
    "cifar10_94": cifar10_94,
}


def row(check: Callable[[], str]) -> tuple[str, str]:
    """pass, fail or skip, and figures or reason on one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return "pass", check()
    except (Skipped, Failed) as error:
        return "skip" if isinstance(error, Skipped) else "fail", str(error)
    except Exception as error:  # a check may find anything; the others are made all the same
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> int:
    """Print a row a check; returns the exit code."""
    global DEVICE, FOLDER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"{', '.join(CHECKS)}; all if left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the checks themselves")
    asked = parser.parse_args()
    if unknown := [name for name in asked.checks if name not in CHECKS]:
        parser.error(f"{unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device on this machine; --device cpu tries the checks themselves", file=sys.stderr)
        return 2
    DEVICE = torch.device("cuda:0" if asked.device == "cuda" else "cpu")
    name = torch.cuda.get_device_name() if on_gpu() else "CPU, a rehearsal"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n\n{'check':<20} {'':<4} {'s':>5}  figures")
    results, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for check in asked.checks or CHECKS:
            start = time.monotonic()
            result, figures = row(CHECKS[check])
            results.append(result)
            print(f"{check:<20} {result:<4} {time.monotonic() - start:5.0f}  {figures}", flush=True)
    counts = ", ".join(f"{results.count(result)} {result}" for result in ("pass", "fail", "skip"))
    print(f"\n{counts}, {(time.monotonic() - began) / 60:.1f} minutes")
    return 1 if "fail" in results else 0


if __name__ == "__main__":
    sys.exit(main())
