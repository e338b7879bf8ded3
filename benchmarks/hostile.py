"""Attack the program with files and command lines made to hurt: python benchmarks/hostile.py [--cases 1000] [--seed 0]

From valid checkpoints, run directories and command lines, hostile ones are made by changing them where it matters:
names, paths, sizes, kinds of values, structure, bytes. Each is given to evaluate.py, predict.py, train.py or the
table of runs. A case fails if anything is executed, connected to, or written outside of the case's own folder (an
audit hook of Python's watches), if a traceback or a control character is printed, if a message is long, if the exit
code is none of ours, or if it takes more than 3 s of the processor's time or 1 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (imported by the first model on the meta device, in seconds)
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

from engine.command.cli import launch  # noqa: E402
from engine.run import trust  # noqa: E402

SECONDS, MEMORY, LINE = 3.0, 1 << 30, 2000  # that a case may take, and characters of a line of its messages
CODES = (0, 1, 2, 130, 141, 143)

# ---------------------------------------------------------------------------------------------------------------------
# Watching


class Watch:
    """What happened in a case that must not happen."""

    EXECUTED = ("os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")
    CONNECTED = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "http.client.connect")
    CHANGED = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
    CANARIES = ("antigravity", "this", "canary", "turtle")

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        honest = event == "subprocess.Popen" and str(arguments[0]) in ("git", "nvidia-smi")
        if (event.startswith((*self.EXECUTED, "subprocess.Popen")) and not honest) or event in self.CONNECTED:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif event == "import" and arguments[0] in self.CANARIES:
            self.seen.append(f"import {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            mode, flags = arguments[1], arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (
                isinstance(mode, str) and set(mode) & set("wax+")
            )
            if writes and not self.is_inside(arguments[0]):
                self.seen.append(f"writes {arguments[0]!r:.100}")
        elif event in self.CHANGED:
            paths = [path for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]]
            if event == "os.symlink":
                paths = paths[1:]
            if not all(self.is_inside(path) for path in paths if isinstance(path, (str, bytes, os.PathLike))):
                self.seen.append(f"{event} {arguments!r:.100}")

    def is_inside(self, path: Any) -> bool:
        place = os.path.realpath(os.fsdecode(path))
        free = ("/dev/null", "/dev/tty", "/proc/self", "/dev/shm", "/tmp/pymp-")
        return place.startswith((str(self.allowed), *free)) or "matplotlib" in place or "__pycache__" in place


# ---------------------------------------------------------------------------------------------------------------------
# What is hostile


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value, value]
    return value


def pool(mark: str, fifo: str, draw: random.Random) -> list[Callable[[], Any]]:
    """Values that no honest file has, by what they try."""
    touch = f"touch {mark}"
    names = [
        *("os.system", "posix.system", "subprocess.run", "builtins.exec", "builtins.eval", "pathlib.Path.touch"),
        *("datasets.main", "engine.build.build", "engine.build.locate", "train.main", "evaluate.main", "this"),
        *("models.mlp.os.system", "datasets.gzip.os.system", "torchvision.models.get_model", "canary", "antigravity"),
        *(
            "engine.data.download.download",
            "engine.run.trackers.MLflow",
            "torch.load",
            "torch.hub.load",
            "models.mlp.MLP.forward",
        ),
        *("../../evil", "/etc/passwd", "..", "../..", "/", ".", "~", "evil/option", "_base", "__init__", "none"),
    ]
    paths = [mark, fifo, "/dev/zero", "/dev/random", "/etc/passwd", "/proc/self/mem", "..", "/", "\0", "a" * 5000]
    return [
        lambda: draw.choice(names),
        lambda: draw.choice(paths),
        lambda: {"_target_": draw.choice(names), "command": touch, "path": mark, "args": ["touch", mark]},
        lambda: {draw.choice(names): {"command": touch, "size": 10**9}},
        lambda: [{draw.choice(("Resize", "RandomCrop", "Pad", "CenterCrop", "Lambda", "os.system", "RandomErasing")): a}
                 for a in ({"size": [65000, 65000]}, {"size": 10**9}, {"padding": 10**9}, {"lambd": touch}, {})],
        lambda: draw.choice((10**9, 10**18, 2**63, 2**64, 10**400, -1, 0, -(10**9), 65000, 300_000)),
        lambda: draw.choice((float("inf"), float("nan"), 1e308, -1e-308, 5e-324, 0.5)),
        lambda: [draw.choice((1, 10**9, "x", None))] * draw.choice((0, 3, 300_000)),
        lambda: nested(draw.choice((3, 28, 60))),
        lambda: draw.choice(("${oc.env:HOME}", "${oc.env:SECRET}", "${hydra.runtime.cwd}", "${.}", "$(touch x)")),
        lambda: "\x1b]0;steered\x07\x1b[2J\r\nerror: forged\u202e" + "x" * draw.choice((0, 10**5)),
        lambda: draw.choice((True, None, "", b"bytes", "null", "true", "[1,2]", "{a: b}", "1e9", "\udc80")),
        lambda: draw.choice(("DEFAULT", "IMAGENET1K_V1", "online", "http://127.0.0.1:9/x", "sqlite:////etc/x.db")),
    ]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree, without looking into tensors."""
    yield path
    if len(path) > 6:  # what was made hostile before may be without end
        return
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*path, key))
    elif isinstance(tree, list) and len(tree) < 50:
        for number in range(len(tree)):
            yield from places(tree[number], (*path, number))


ADDED = (
    *(
        "_target_",
        "_partial_",
        "_args_",
        "_recursive_",
        "weights",
        "pretrained",
        "target_transform",
        "cache_dir",
        "root",
    ),
    *(
        "annotations_file",
        "img_dir",
        "max_pixels",
        "cache",
        "num_layers",
        "hidden",
        "command",
        "hydra",
        "logger",
        "evil",
    ),
    *("hydra.callbacks.x", "hydra.searchpath", "--config-dir", "+hydra.run.dir", "hydra/launcher", "defaults", "limit"),
)


def changed(tree: dict[str, Any], hurts: list[Callable[[], Any]], draw: random.Random) -> tuple[dict[str, Any], str]:
    """The tree with one to three hostile changes, and what they were."""
    tree = copy.deepcopy(tree)
    told = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        spots = [place for place in places(tree) if place]
        inner = [place for place in spots if "config" in place or len(place) == 1] or spots
        place = draw.choice(inner if draw.random() < 0.8 else spots)
        target: Any = tree
        for key in place[:-1]:
            target = target[key]
        action = draw.choice(("replace", "replace", "replace", "delete", "add", "add"))
        if action == "delete":
            del target[place[-1]]
        elif action == "add" and isinstance(target, dict):
            place = (*place[:-1], draw.choice(ADDED))
            target[place[-1]] = draw.choice(hurts)()
        else:
            target[place[-1]] = draw.choice(hurts)()
        told.append(f"{action} {'.'.join(map(str, place))}")
    return tree, ", ".join(told)


class Calls:
    """Pickled, it asks the reader to call a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def saved(tree: Any, path: Path, mark: str, draw: random.Random) -> str:
    """Write a checkpoint, perhaps with hostile bytes; returns what was done."""
    how = draw.choice(["plain"] * 6 + ["call", "flip", "cut", "entries", "memo", "bomb", "overlap", "fifo", "text"])
    if how == "call" and isinstance(tree, dict):
        tree["evil"] = draw.choice((Calls(os.system, f"touch {mark}"), Calls(bytearray, 2 * 10**9), Calls(eval, "1")))
    try:
        torch.save(tree, path)
    except Exception:  # what torch refuses to write
        path.write_bytes(b"")
        return "nothing"
    content = bytearray(path.read_bytes())
    if how == "flip":
        for _ in range(3):
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how in ("entries", "memo", "bomb", "overlap"):
        _repack(path, how)
    elif how == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif how == "text":
        path.write_text("import os\n")
    return how


def _repack(path: Path, how: str) -> None:
    """The same archive with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    if how == "memo":  # a memo of 2^31 places, and a list that is copied over and over
        records[pickled] = b"\x80\x02}r\xff\xff\xff\x7f."
    elif how == "bomb":
        pairs = b"".join(b"K\x01M" + number.to_bytes(2, "little") + b"\x86" for number in range(60_000))
        copies = b"ccollections\nOrderedDict\nq\x01(h\x02tR" * 1000
        records[pickled] = b"\x80\x02(](" + pairs + b"eq\x02(" + copies + b"lt."
    elif how == "overlap":
        records[pickled] = records[pickled].replace(b"X\x05\x00\x00\x00model", b"X\x05\x00\x00\x00medol")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if how == "overlap" else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
        if how == "entries":
            for number in range(200_000):
                archive.writestr(f"archive/{number}", b"")


# ---------------------------------------------------------------------------------------------------------------------
# Cases


class Answer:
    """What a command came to."""

    def __init__(self, code: int, out: str, err: str, seconds: float, memory: int) -> None:
        self.code, self.out, self.err, self.seconds, self.memory = code, out, err, seconds, memory


class Hung(BaseException):
    """A command that does not end."""


def command(entry: str, arguments: list[str], watch: Watch | None = None, folder: Path | None = None) -> Answer:
    """What `python ENTRY.py ARGUMENTS` does, in this process; watched, it may write to `folder` alone."""

    def hung(*_: object) -> None:
        raise Hung

    sys.argv = [str(ROOT / f"{entry}.py"), *arguments]
    streams = [os.dup(number) for number in (1, 2)]
    caught = [tempfile.TemporaryFile() for _ in streams]  # noqa: SIM115
    outside = sys.stdout, sys.stderr
    for number, file in zip((1, 2), caught, strict=True):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(os.dup(n), "w", buffering=1, errors="backslashreplace") for n in (1, 2))  # noqa: SIM115
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak of memory counts from here
    before, began = memory_peak(), time.process_time()
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    code: Any = None
    if watch:
        watch.seen, watch.allowed = [], folder
    try:
        launch(entry)
    except SystemExit as end:
        code = end.code or 0
    except Hung:
        code = "it did not end"
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        if watch:
            watch.allowed = None
        seconds = time.process_time() - began
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = outside
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
    texts = []
    for file in caught:
        file.seek(0)
        texts.append(file.read().decode("utf-8", "backslashreplace"))
        file.close()
    return Answer(code, *texts, seconds, memory_peak() - before)


def memory_peak() -> int:
    """The most memory that this process has had at once, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wrong(answer: Answer, watch: Watch, mark: Path) -> list[str]:
    """What the answer shows that must not be."""
    found = list(watch.seen)
    if mark.exists():
        found.append("the mark of executed code is there")
    if answer.code not in CODES:
        found.append(f"it ended with {answer.code!r}")
    if "Traceback" in answer.err + answer.out:
        found.append("a traceback: " + answer.err.strip().splitlines()[-1][:300])
    for text in (answer.out, answer.err):
        if any(not c.isprintable() and c not in "\n\t" for c in text):
            found.append("a control character is printed")
        if any(len(line) > LINE for line in text.splitlines()):
            found.append(f"a line of {max(map(len, text.splitlines()))} characters")
    errors = [line for line in answer.err.splitlines() if not line.startswith("not predicted: ")]  # a line a file
    if answer.code == 2 and len(errors) > 3 and "1 job failed" not in answer.err:
        found.append(f"{len(errors)} lines for a wrong request")
    if answer.seconds > SECONDS:
        found.append(f"{answer.seconds:.1f} s")
    if answer.memory > MEMORY:
        found.append(f"{answer.memory / 1e9:.1f} GB")
    return found


def valid(folder: Path) -> dict[str, dict[str, Any]]:
    """Checkpoints of honest runs, and their directories: folder/checkpoints/NAME."""
    draw = np.random.default_rng(0)
    for name, level in (("cat", 60), ("dog", 180)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = draw.integers(level - 30, level + 30, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    rows = [f"{name}/{number}.png,{name}" for name in ("cat", "dog") for number in range(8)]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    small = ["epochs=1", "model.hidden=[4]", "limit_batches=2", "num_workers=0"]
    runs = {
        "digits": ["dataset.limit=40", *small],
        "cnn": ["model=cnn", "model.width=2", "dataset.limit=40", "epochs=1", "limit_batches=2"],
        "photos": ["dataset=image_folder", "dataset.root=photos", *small],
        "listed": ["dataset=csv_images", "dataset.annotations_file=labels.csv", "dataset.img_dir=photos", *small],
    }
    found = {}
    for name, arguments in runs.items():
        answer = command("train", [f"name={name}", *arguments])
        if answer.code:
            raise SystemExit(f"the honest run {name} failed: {answer.out}{answer.err}")
        found[name] = torch.load(folder / "checkpoints" / name / "last.pt", weights_only=True)
    return found


def file_case(folder: Path, honest: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, list[str], str]:
    """A hostile checkpoint or run directory in `folder`, and the command that meets it: entry, arguments, name."""
    mark, fifo = str(folder / "mark"), str(folder / "fifo")
    os.mkfifo(fifo)
    hurts = pool(mark, fifo, draw)
    name = draw.choice(list(honest))
    kind = draw.choice(("checkpoint", "checkpoint", "run", "table"))
    if kind == "checkpoint":
        tree, told = changed(honest[name], hurts, draw)
        told += f", {saved(tree, folder / 'evil.pt', mark, draw)}"
        if draw.random() < 0.5:
            return "evaluate", ["checkpoint=evil.pt", "output=out.json"], f"{name}: {told}"
        return "predict", ["images=photos/cat/1.png", "checkpoint=evil.pt", "num_workers=0"], f"{name}: {told}"
    run = folder / "checkpoints" / "evil"
    shutil.copytree(Path.cwd() / "honest" / name, run)
    told = ""
    if draw.random() < 0.6:
        config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
        tree, told = changed(config, hurts, draw)
        (run / ".hydra" / "config.yaml").write_text(as_yaml(tree))
    if draw.random() < 0.5:
        tree, more = changed(honest[name], hurts, draw)
        (run / "last.pt").unlink()
        told += f"; last.pt: {more}, {saved(tree, run / 'last.pt', mark, draw)}"
    for file in draw.sample(sorted(p for p in run.iterdir() if p.is_file()), draw.choice((0, 1, 2))):
        told += f"; {file.name}: {spoiled(file, fifo, mark, draw)}"
    if kind == "table":
        return "evaluate", ["--runs"], f"{name}: {told}"
    return (
        "train",
        ["resume=checkpoints/evil", "epochs=2", *draw.choice(([], ["resume_changed=true"]))],
        f"{name}: {told}",
    )


def as_yaml(tree: Any) -> str:
    try:
        return yaml.safe_dump(tree)
    except (yaml.YAMLError, RecursionError):
        return json.dumps(str(tree)[:1000])


def spoiled(file: Path, fifo: str, mark: str, draw: random.Random) -> str:
    """Put something else in place of a run's file."""
    how = draw.choice(("fifo", "link", "zero", "bytes", "deep", "empty", "folder", "anchors"))
    file.unlink(missing_ok=True)
    if how == "fifo":
        os.mkfifo(file)
    elif how == "link":
        file.symlink_to(Path(mark).parent.parent / "elsewhere")
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "bytes":
        file.write_bytes(draw.randbytes(2000))
    elif how == "deep":
        file.write_text("[" * 100_000)
    elif how == "empty":
        file.touch()
    elif how == "folder":
        file.mkdir()
    else:
        lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
        file.write_text("\n".join(lines))
    return how


WORDS = (
    *(
        "epochs",
        "optimizer.lr",
        "model",
        "dataset",
        "seed",
        "batch_size",
        "name",
        "optimizer",
        "scheduler",
        "criterion",
    ),
    *(
        "model.hidden",
        "dataset.limit",
        "dataset.train_transforms",
        "num_workers",
        "device",
        "resume",
        "logger",
        "hydra",
    ),
    *(
        "hydra.run.dir",
        "hydra.job.name",
        "experiment",
        "debug",
        "checkpoint",
        "--lr",
        "--epochs",
        "-m",
        "--cfg",
        "--help",
    ),
    *("+hydra.callbacks.x", "~model", "++evil", "dataset._target_", "hydra/launcher", "loss", "lr", "--multirun", "-h"),
)
VALUES = (
    *(
        "3",
        "0.1",
        "-1",
        "1e400",
        "10000000000000000000000",
        "null",
        "true",
        "[1,2",
        "[64]",
        "mlp",
        "SGD",
        "mse",
        "{a:1}",
    ),
    *(
        "a=b",
        "'",
        '"',
        "\\",
        "${oc.env:HOME}",
        "$(id)",
        "../..",
        "/etc/passwd",
        "\x1b[2J",
        "é",
        "\udc80",
        "x" * 300,
        "",
    ),
    *(
        "0,1",
        "range(0,3)",
        "choice(1,2)",
        "interval(0,1)",
        "job",
        " ",
        "=",
        "latest",
        "[[[[1]]]]",
        "{a: {b: [c]}}",
        "nan",
    ),
)


def line_case(draw: random.Random) -> tuple[str, list[str], str]:
    """A random command line; it trains nothing for long if it happens to be right."""
    entry = draw.choice(("train", "train", "evaluate", "predict", "datasets"))
    arguments = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        word, value = draw.choice(WORDS), draw.choice(VALUES)
        arguments.append(draw.choice((f"{word}={value}", f"{word}={value}", f"{word} = {value}", word, value)))
    if entry == "train" and not {"-m", "--multirun"} & set(arguments):
        arguments = ["epochs=1", "limit_batches=1", "dataset.limit=20", *arguments]
    elif entry == "train":
        arguments.append("--cfg=job")
    return entry, [argument for argument in arguments if "\0" not in argument], " ".join(map(ascii, arguments))


def main() -> int:
    """Run the cases; returns how many went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of files and of command lines each (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run the case of this number alone and show what it printed")
    options = parser.parse_args()
    watch = Watch()
    top = Path(tempfile.mkdtemp(prefix="hostile-"))
    os.environ["SECRET"] = "swordfish"
    os.environ["XDG_DATA_HOME"] = str(top / "data")  # what is made here counts as typed here by nobody else
    home = Path.cwd()
    os.chdir(top)
    honest = valid(top)
    (top / "checkpoints").rename(top / "honest")
    os.environ["XDG_DATA_HOME"] = str(top / "nobody")  # and from here on all of it is a stranger's
    trust.signature("")  # makes the key
    failures, codes, slowest, largest = [], Counter(), 0.0, 0
    for number in range(2 * options.cases) if options.only is None else [options.only]:
        draw = random.Random(f"{options.seed} {number}")
        folder = top / f"case{number}"
        folder.mkdir()
        (folder / "photos").symlink_to(top / "photos")
        shutil.copy(top / "labels.csv", folder)
        is_file = number % 2 == 0
        entry, arguments, told = file_case(folder, honest, draw) if is_file else line_case(draw)
        os.chdir(folder)
        answer = command(entry, arguments, watch, folder)
        os.chdir(top)
        codes[(entry, answer.code)] += 1
        slowest, largest = max(slowest, answer.seconds), max(largest, answer.memory)
        found = wrong(answer, watch, folder / "mark")
        if "swordfish" in answer.out + answer.err:
            found.append("a variable of the environment is told")
        if found:
            failures.append(number)
            print(f"case {number}: {entry} {' '.join(map(ascii, arguments))[:200]} | {told[:300]}")
            print(f"  {'; '.join(found)[:600]}", flush=True)
        if options.only is not None:
            print(told, answer.code, answer.out, answer.err, f"{answer.seconds:.2f} s", sep="\n")
        shutil.rmtree(folder, ignore_errors=True)
    os.chdir(home)
    shutil.rmtree(top, ignore_errors=True)
    print(", ".join(f"{entry} {code}: {count}" for (entry, code), count in sorted(codes.items(), key=str)))
    total = sum(codes.values())
    print(f"{total} cases, {len(failures)} wrong; at most {slowest:.1f} s and {largest / 1e6:.0f} MB")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(1, main()))
