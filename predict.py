"""Tell what is in images: `python predict.py images=photo.png`; see `--help` and README.md.

Predictions go to standard output, a line an image; all else (progress, what could not be read) to standard error.
"""

from engine.command.cli import launch

if __name__ == "__main__":
    launch("predict")  # answers help, completion and typos, and only then imports torch and calls main() below

import csv
import io
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine import distributed, files
from engine.data.augment import Normalize, Resize, to_float
from engine.data.batches import Batches
from engine.data.devices import choose_device, cores, use_threads
from engine.data.download import no_downloads
from engine.data.draws import Draws, own_randomness
from engine.data.folders import is_leftover
from engine.data.images import MAX_PIXELS, read_image
from engine.data.splits import load_splits
from engine.data.transforms import PerImage, apply, parse_transforms
from engine.errors import RequestError, RunError, counted, one_line, printable, shortened
from engine.run import checkpoint, runs, trust
from engine.terminal import watched

Ranked = list[tuple[str, float]]  # classes with their probabilities, the likeliest first
WIDEST = 60  # characters of a column
FEW = 100  # images that are read before worker processes would have started


def main(config: dict[str, Any]) -> None:
    """Predict as the checked configuration says.

    Raises:
        RequestError: no image, no checkpoint, or none of the images can be read.
        RunError: some images could not be predicted; the others were.
    """
    # What is asked for.
    device = choose_device(config["device"])
    use_threads(config["num_threads"])
    path = Path(config["checkpoint"]) if config["checkpoint"] else runs.newest_best()
    distributed.start(device, {**config, "checkpoint": str(path)})
    output = Path(config["output"]) if config["output"] else None
    check_output(output)
    paths, problems = distributed.from_first(lambda: find_images(config["images"]))
    for problem in problems:
        tell(f"not predicted: {problem}")
    if not paths:
        raise RequestError("images: there is nothing to predict" + (f" ({problems[0]})" if problems else ""))

    # The model, and what is done to an image before it.
    model, settings = load(checkpoint.read(path), path, config, device)
    classes = settings.classes
    images = Images(paths, settings.input_shape, settings.eval_transforms, settings.max_pixels)
    classifier = Classifier(model, images, classes, config["top_k"], device)
    shape = "x".join(map(str, settings.input_shape))
    tell(f"{path}, {len(classes)} classes, images {shape}, on {device}")

    # The predictions.
    truths = [true_class(path, classes) for path in paths]
    layout = Layout([*map(str, paths)], classes, with_truth=any(truths))
    predictions: list[Prediction] = []
    count, own = math.ceil(len(paths) / settings.batch_size), distributed.every_own()
    batches = of_all(predicted(classifier, truths, settings.batch_size, config["num_workers"], own), count)
    say(layout.header())
    for batch in watched(batches, "predicting", count):
        for prediction in batch:
            if prediction.error:
                tell(f"not predicted: {prediction.image}: {prediction.error}")
        lines = [layout.line(prediction) for prediction in batch if not prediction.error]
        if lines:
            say("\n".join(lines))
        predictions += batch

    finish(predictions, problems, output, images.input_shape)


@dataclass(frozen=True)
class Settings:
    """What a model goes with.

    Attributes:
        classes: the names of its classes.
        input_shape: (channels, height, width) of the images that it takes.
        eval_transforms: the YAML's list.
        max_pixels: width times height of a file's image allowed.
        batch_size: images a step.
    """

    classes: list[str]
    input_shape: tuple[int, int, int]
    eval_transforms: list[Any]
    max_pixels: int
    batch_size: int


def load(saved: dict[str, Any], path: Path, config: dict[str, Any], device: torch.device) -> tuple[nn.Module, Settings]:
    """A checkpoint's model, ready to predict, and what goes with it; of a bare state_dict as the command line says.

    Args:
        saved: as `checkpoint.read` gives it.
        path: its file, for messages.
        config: the checked configuration.
        device: where the model is to be.

    Raises:
        RequestError: it cannot be used.
    """
    if "config" in saved:
        for group in ("experiment", "model", "dataset"):
            if asked := config.get("choices", {}).get(group):
                raise RequestError(f"{group}={asked}: {path} names its own model and data; leave {group}= out")
        settings = settings_of_checkpoint(saved, path, config["batch_size"])
        model = checkpoint.build_model(saved, path)
    else:
        checkpoint.check_bare(config, path)
        settings = settings_of_data(config, device)
        model = checkpoint.build_bare(saved["model"], config, settings.input_shape, len(settings.classes), path)
        tell(checkpoint.transforms_line(config))
    checkpoint.check_finite(model, path)
    return model.to(device).eval(), settings


def settings_of_checkpoint(saved: dict[str, Any], path: Path, batch_size: int | None) -> Settings:
    """What goes with a checkpoint; one that was made elsewhere may allow fewer pixels, but no more."""
    ours, shape = checkpoint.is_ours(saved), saved["input_shape"]
    own = trust.evaluation_of(saved["config"], shape, path, batch_size, ours=ours)
    pixels = saved["config"]["dataset"].get("max_pixels", MAX_PIXELS)
    if type(pixels) is not int or pixels < 1:
        raise RequestError(f"{path}: its dataset.max_pixels is {shortened(str(pixels))}; expected an integer >= 1")
    pixels = pixels if ours else min(pixels, MAX_PIXELS)
    classes = [printable(name) for name in saved["classes"]]
    return Settings(classes, tuple(shape), own["eval_transforms"], pixels, own["batch_size"])


def settings_of_data(config: dict[str, Any], device: torch.device) -> Settings:
    """What goes with a bare state_dict: the class names and the shape of the images are those of the data asked for."""
    batch_size = config["batch_size"] or 64
    dataset = {**config["dataset"], "cache": False, "target_transform": None}
    aside = redirect_stdout(sys.stderr) if distributed.is_first() else nullcontext()  # where the predictions go
    with no_downloads(), aside:
        splits, classes = load_splits(dataset, only="test")
    transforms = dataset["eval_transforms"]
    shape = Batches(splits["test"], transforms, device, batch_size=batch_size).sample_shape()
    return Settings([printable(name) for name in classes], shape, transforms, MAX_PIXELS, batch_size)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        image: its path.
        true: the class that its folder is named after, if any.
        ranked: class and probability (0 to 1), the likeliest first; empty if there is an error.
        error: why it could not be predicted.
        scaled: whether its size is not the model's, and `eval_transforms` do not say how to change it.
    """

    image: str
    true: str | None
    ranked: Ranked
    error: str | None = None
    scaled: bool = False


class Predictor:
    """A checkpoint that tells what is in images, for a notebook or a program.

        predictor = Predictor("checkpoints/latest/best.pt")
        for prediction in predictor(["photo.png"]):
            print(prediction.image, prediction.ranked)

    Args:
        path: the checkpoint; None takes best.pt of the newest run.
        device: as the setting of that name.

    Attributes:
        model: the network, in evaluation mode.
        classes: the names of its classes.

    Raises:
        RequestError: there is no such checkpoint, or it cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, device: str = "auto") -> None:
        path = Path(path) if path is not None else runs.newest_best()
        self.device = choose_device(device)
        self.model, self.settings = load(checkpoint.read(path), path, {"batch_size": None}, self.device)
        self.classes = self.settings.classes

    def __call__(self, images: Sequence[str | os.PathLike[str] | Tensor], top_k: int = 3) -> list[Prediction]:
        """The predictions, in the order of the images; one that cannot be read has its `error` set.

        Args:
            images: paths, or tensors `[channels, height, width]` of any size, uint8 0 to 255 or floats 0 to 1.
            top_k: how many classes to tell of each.

        Raises:
            RunError: the device has too little memory.
        """
        if isinstance(images, (str, os.PathLike)):
            images = [images]
        given = [image if isinstance(image, Tensor) else Path(image) for image in images]
        settings = self.settings
        prepared = Images(given, settings.input_shape, settings.eval_transforms, settings.max_pixels)
        classifier = Classifier(self.model, prepared, self.classes, top_k, self.device)
        truths = [None if isinstance(image, Tensor) else true_class(image, self.classes) for image in given]
        return [one for batch in predicted(classifier, truths, settings.batch_size, num_workers=0) for one in batch]


# ---------------------------------------------------------------------------------------------------------------------
# Which images


def find_images(requested: str | Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that files, folders and globs mean, each once and in order, and what is wrong with the rest."""
    found: dict[Path, None] = {}
    problems: dict[str, None] = {}
    walked: set[str] = set()
    for request in [requested] if not isinstance(requested, (list, tuple)) else requested:
        path = Path(str(request)).expanduser()
        matches = [str(path)] if path.exists() else matching(str(path), problems)
        if not matches:
            problems[f"{request}: {'matches nothing' if has_magic(str(request)) else 'no such file or folder'}"] = None
        for match in matches:
            for file in files_under(match, walked, problems) if os.path.isdir(match) else [match]:
                if os.path.isfile(file):
                    found[Path(file)] = None
                else:  # a FIFO would be waited for, a device might never end
                    gone = os.path.islink(file) and not os.path.exists(file)
                    problems[f"{file}: {'a link that leads nowhere' if gone else 'not a regular file'}"] = None
    return list(found), list(problems)


def files_under(folder: str, walked: set[str], problems: dict[str, None]) -> Iterator[str]:
    """The files of a folder and of those in it; a folder that holds none, or cannot be read, is a problem."""
    for place, folders, names in walk(folder, walked, problems):
        if not folders and not names:
            problems[f"{place}: an empty folder"] = None
        yield from (os.path.join(place, name) for name in names)


def walk(folder: str, walked: set[str], problems: dict[str, None]) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk, sorted, without what is hidden and without the folders `walked` already: links may lead in circles."""
    for place, folders, names in os.walk(folder, followlinks=True, onerror=lambda e: problems.setdefault(one_line(e))):
        here = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not is_leftover(name)) if here not in walked else []
        if here not in walked:
            walked.add(here)
            yield place, folders, sorted(name for name in names if not is_leftover(name))


def matching(pattern: str, problems: dict[str, None]) -> list[str]:
    """The paths that a pattern matches, as glob.glob finds them, which does not end where links lead in circles."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(glob(pattern))
    place = parts.index("**")
    top, rest = os.sep.join(parts[:place]), parts[place + 1 :]
    tops = glob(top) if has_magic(top) else [top or (os.sep if place else os.curdir)]
    if not rest:
        return sorted(tops)
    below = [folder for top in tops for folder, _, _ in walk(top, set(), problems)]
    return sorted(path for folder in below for path in matching(os.path.join(escape(folder), *rest), problems))


def true_class(path: Path, classes: Sequence[str]) -> str | None:
    """The class that the image's folder is named after, or None."""
    folder = printable(path.absolute().parent.name)
    return folder if folder in classes else None


# ---------------------------------------------------------------------------------------------------------------------
# From files to batches


class Images(Dataset):
    """Image files, brought to the model's shape as evaluation does it.

    Args:
        paths: the files; tensors `[channels, height, width]` are taken as images that are read already.
        input_shape: the model's (channels, height, width).
        eval_transforms: the YAML's list; without Resize it gets one to the model's size first. What comes before
            `Normalize` is done here, in the process that reads, the rest in batches on the device.
        max_pixels: width times height of a file's image allowed.
    """

    def __init__(
        self,
        paths: Sequence[Path | Tensor],
        input_shape: Sequence[int],
        eval_transforms: Sequence[Any],
        max_pixels: int,
    ) -> None:
        self.paths, self.input_shape, self.max_pixels = paths, tuple(input_shape), max_pixels
        transforms = parse_transforms(eval_transforms, "dataset.eval_transforms")
        self.scales = not any(isinstance(transform, (Resize, PerImage)) for transform in transforms)
        if self.scales:
            transforms.insert(0, Resize(list(input_shape[1:])))
        numbered = list(enumerate(transforms))
        cut = next((n for n, t in numbered if isinstance(t, Normalize) or t.needs_float), len(numbered))
        if any(isinstance(transform, PerImage) for transform in transforms[cut:]):
            cut = len(numbered)  # those see one image at a time
        self.for_image, self.for_batch = numbered[:cut], numbered[cut:]
        self.random = any(transform.random for transform in transforms)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, bool]:
        """Index, the image `[channels, height, width]` or why there is none, whether a Resize was put in for it."""
        try:
            image = self._read(self.paths[index])
            scaled = self.scales and image.shape != self.input_shape
            needed = self.for_image if scaled or not self.scales else self.for_image[1:]
            image = self._transformed(needed, image[None], index)[0] if needed else image
        except RunError as error:
            reason = str(error).removeprefix(f"{self.name(index)}: ")
            reason = re.split("; (?:replace|make it) ", reason)[0]  # advice for a data set; here the others go on
            return index, reason, False
        if image.shape != self.input_shape:
            return index, f"comes out as {list(image.shape)}, the model takes {list(self.input_shape)}", False
        return index, image, scaled

    def name(self, index: int) -> str:
        """An image's path; of a tensor its number."""
        given = self.paths[index]
        return f"image {index}" if isinstance(given, Tensor) else str(given)

    def _read(self, given: Path | Tensor) -> Tensor:
        if not isinstance(given, Tensor):
            return read_image(given, self.input_shape[0], self.max_pixels)
        if given.ndim != 3 or not (given.dtype == torch.uint8 or given.is_floating_point()) or 0 in given.shape:
            raise RunError(f"{given.dtype} {list(given.shape)}; expected uint8 or floats [channels, height, width]")
        return given.cpu() if given.dtype == torch.uint8 else given.cpu().float()

    def on_device(self, images: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        """A batch of images as the model gets them, floats `[batch, channels, height, width]`."""
        return to_float(self._transformed(self.for_batch, images.to(device), indices))

    def _transformed(self, transforms: Sequence[Any], images: Tensor, index: int | Tensor) -> Tensor:
        if not self.random:  # as nearly always; draws would cost more than decoding a small image
            return apply(transforms, images, None)
        with own_randomness():
            return apply(transforms, images, Draws(0, 0, torch.as_tensor(index).reshape(-1)))


About = tuple[int, str | None, bool]  # of an image: its index, why it cannot be read, whether it was scaled


def collate(samples: Sequence[tuple[int, Tensor | str, bool]]) -> tuple[Tensor | None, list[About]]:
    """The images that could be read, as one tensor, which travels between processes at once; what is known of all."""
    tensors = [image for _, image, _ in samples if isinstance(image, Tensor)]
    about = [(index, image if isinstance(image, str) else None, scaled) for index, image, scaled in samples]
    return torch.stack(tensors) if tensors else None, about


@dataclass
class Classifier:
    """The model with what it takes to name classes; picklable, as worker processes may run it.

    Attributes:
        model: in evaluation mode, on `device`.
        images: what its batches are made of.
        classes: the class names.
        top_k: how many of them to tell.
        device: where the model is.
    """

    model: nn.Module
    images: Images
    classes: Sequence[str]
    top_k: int
    device: torch.device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor | None, about: Sequence[About]) -> list[Ranked]:
        """What the images of a batch `[batch, channels, height, width]` are; nothing where it gives no number."""
        if pixels is None:
            return []
        indices = torch.tensor([index for index, error, _ in about if error is None])
        probabilities = self.probabilities(pixels, indices)
        values, places = probabilities.topk(min(self.top_k, len(self.classes)))
        rows = zip(values.tolist(), places.tolist(), strict=True)
        return [
            [(self.classes[c], p) for p, c in zip(row, column, strict=True)] if math.isfinite(sum(row)) else []
            for row, column in rows
        ]

    def probabilities(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """Of a batch of what `Images` gives, and the indices of these, floats `[batch, classes]`."""
        return self.model(self.images.on_device(pixels, indices, self.device)).float().softmax(1)

    def classified(self, samples: Sequence[tuple[int, Tensor | str, bool]]) -> tuple[list[Ranked], list[About]]:
        """`collate`, with the classes of the images in place of the images."""
        pixels, about = collate(samples)
        return self(pixels, about), about


def predicted(
    classifier: Classifier,
    truths: Sequence[str | None],
    batch_size: int,
    num_workers: int | None,
    own: slice = slice(None),
) -> Iterator[list[Prediction]]:
    """The predictions, in the order of the images, a batch at a time.

    Args:
        classifier: with the images.
        truths: the class that the folder of each tells.
        batch_size: images a step.
        num_workers: processes that read; None takes none for few images, else one a core.
        own: which of the batches.

    Raises:
        RunError: the device has too little memory for a batch, or a process that reads has died.
    """
    images, device = classifier.images, classifier.device
    if num_workers is None:
        num_workers = 0 if len(images) <= FEW else cores()
    # Where the readers take all cores, a model on the CPU runs in them: beside them its threads would wait for a core.
    in_workers = device.type == "cpu" and num_workers >= torch.get_num_threads()
    collate_fn = classifier.classified if in_workers else collate
    batches: Any = [range(len(images))[first : first + batch_size] for first in range(0, len(images), batch_size)][own]
    loader = DataLoader(images, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_fn)
    try:
        for found, about in loader:
            ranked = iter(found if in_workers else classifier(found, about))
            batch = []
            for i, error, scaled in about:
                first = [] if error else next(ranked)
                error = error or (None if first else "the model gives no finite numbers for it")
                batch.append(Prediction(images.name(i), truths[i], first, error, scaled))
            yield batch
    except torch.OutOfMemoryError:
        raise RunError(f"batch_size={batch_size}: too much for the memory of {device}; try {batch_size // 2}") from None
    except RuntimeError as error:
        if not re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
            raise
        raise RunError(f"a process that reads images has died ({one_line(error)}); try num_workers=0") from None


def of_all(own: Iterable[list[Prediction]], count: int) -> Iterator[list[Prediction]]:
    """The `count` batches of all processes in their order, of which each has every so many-th; known to all of them."""
    batches, processes = iter(own), distributed.world_size()
    for done in range(0, count, processes):
        yield from distributed.gathered(next(batches, []))[: count - done]


# ---------------------------------------------------------------------------------------------------------------------
# What is said and written


def say(text: str) -> None:
    """To standard output, past a progress bar; quietly leave when nobody reads any more (`| head`)."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed into the pipe at exit
        sys.exit(141)  # as a shell reports SIGPIPE


def tell(text: str) -> None:
    """To standard error, past a progress bar; of several processes the first one says it."""
    if distributed.is_first():
        tqdm.write(printable(text), file=sys.stderr)


class Layout:
    """Predictions in columns, for reading.

    Args:
        images: the paths of all.
        classes: the class names.
        with_truth: whether there is a column for the class that folders tell.
    """

    def __init__(self, images: Iterable[str], classes: Sequence[str], with_truth: bool) -> None:
        self.with_truth = with_truth
        self.image = min(WIDEST, max(5, *(len(printable(image)) for image in images)))
        self.name = min(WIDEST, max(9, *map(len, classes)))

    def header(self) -> str:
        """The names of the columns."""
        return self._row("image", "true", "predicted", "", "next best")

    def line(self, prediction: Prediction) -> str:
        """One prediction."""
        (name, probability), *others = prediction.ranked
        rest = ", ".join(f"{shortened(other, WIDEST)} {p:.2%}" for other, p in others)
        true, name = shortened(prediction.true or "", WIDEST), shortened(name, WIDEST)
        return self._row(prediction.image, true, name, f"{probability:.2%}", rest)

    def _row(self, *cells: str) -> str:
        image, true, predicted, probability, rest = map(printable, cells)
        truth = f"  {true:<{self.name}}" if self.with_truth else ""
        return f"{image:<{self.image}}{truth}  {predicted:<{self.name}}  {probability:>7}  {rest}".rstrip()


def check_output(output: Path | None) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        RequestError: it cannot, or the name does not tell the format.
    """
    if output is None:
        return
    if output.suffix not in (".csv", ".json"):
        raise RequestError(f"output={output}: expected a name that ends in .csv or .json")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise RequestError(f"output={output}: cannot be written; name a file in a folder that exists")


def finish(
    predictions: Sequence[Prediction], problems: Sequence[str], output: Path | None, input_shape: tuple[int, ...]
) -> None:
    """Write the output, sum up, and let the exit code tell whether everything was predicted.

    Raises:
        RequestError: nothing was.
        RunError: some were not.
    """
    done = [prediction for prediction in predictions if not prediction.error]
    if not done:
        raise RequestError("images: none of them could be read; they are named above")
    if output and output.suffix == ".csv":
        files.write(output, as_csv(predictions))
    elif output:
        files.write_json(output, as_json(predictions))
    if output:
        tell(f"written to {output}")
    scaled = sum(prediction.scaled for prediction in done)
    if scaled:
        size = "x".join(map(str, input_shape[1:]))
        were = "was" if scaled == 1 else "were"
        of = f"{scaled:,} of {counted(len(done), 'image')}"
        tell(f"{of} {were} scaled to the {size} pixels of the model")
    known = [prediction for prediction in done if prediction.true is not None]
    if known:
        right = sum(prediction.true == prediction.ranked[0][0] for prediction in known)
        of = f"{counted(len(known), 'image')} whose folder is named after a class"
        tell(f"accuracy {right / len(known):.2%} of {of}")
    failed = len(predictions) - len(done) + len(problems)
    if failed:
        raise RunError(f"{failed:,} not predicted, named above; {len(done):,} predicted")


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A table: image, true (if any folder tells), predicted, probability, predicted_2, probability_2, ..., error."""
    columns = ["image", "predicted", "probability"]
    if any(prediction.true for prediction in predictions):
        columns.insert(1, "true")
    for rank in range(2, max(len(prediction.ranked) for prediction in predictions) + 1):
        columns += [f"predicted_{rank}", f"probability_{rank}"]
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns, "error"], lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for prediction in predictions:
        row = {"image": prediction.image, "true": prediction.true, "error": prediction.error}
        for rank, (name, probability) in enumerate(prediction.ranked, 1):
            end = "" if rank == 1 else f"_{rank}"
            row |= {f"predicted{end}": name, f"probability{end}": f"{probability:.6f}"}
        table.writerow({column: printable(cell or "") for column, cell in row.items()})
    return text.getvalue()


def as_json(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """A list of objects: image, true (null where no folder tells), predicted, probability, top, error (null: none)."""
    return [
        {
            "image": prediction.image,
            "true": prediction.true,
            "predicted": prediction.ranked[0][0] if prediction.ranked else None,
            "probability": prediction.ranked[0][1] if prediction.ranked else None,
            "top": [{"class": name, "probability": probability} for name, probability in prediction.ranked],
            "error": prediction.error,
        }
        for prediction in predictions
    ]
