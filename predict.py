"""Tell what is in images: `python predict.py images=photo.png`; see `--help` and README.md.

Predictions go to standard output, a line an image; all else (progress, what could not be read) to standard error.
"""

from engine.cli import launch

if __name__ == "__main__":
    launch("predict")  # answers help, completion and typos, and only then imports torch and calls main() below

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import MAX_PIXELS, read_image
from engine import checkpoint, files, runs, trust
from engine.augment import Draws, Normalize, PerImage, Resize, apply, own_randomness, resized_to, to_float
from engine.errors import RequestError, RunError, one_line
from engine.loader import choose_device, parse_transforms

Ranked = list[tuple[str, float]]  # classes with their probabilities, the likeliest first
FEW = 100  # images that are read before worker processes would have started


def main(config: dict[str, Any]) -> None:
    """Predict as the checked configuration says.

    Raises:
        RequestError: no image, no checkpoint, or none of the images can be read.
        RunError: some images could not be predicted; the others were.
    """
    # What is asked for.
    device = choose_device(config["device"])
    output = Path(config["output"]) if config["output"] else None
    check_output(output)
    paths, problems = find_images(config["images"])
    for problem in problems:
        tell(problem)
    if not paths:
        raise RequestError("images: there is nothing to predict" + (f" ({problems[0]})" if problems else ""))

    # The model, and what is done to an image before it.
    path = Path(config["checkpoint"]) if config["checkpoint"] else runs.newest_best()
    saved = checkpoint.read(path)
    if "config" not in saved:
        raise RequestError(
            f"{path}: a bare state_dict, which tells neither model nor classes; expected a run's best.pt"
        )
    ours = checkpoint.is_ours(saved)
    own = trust.evaluation_of(saved["config"], saved["input_shape"], path, config["batch_size"], ours=ours)
    model = checkpoint.build_model(saved, path).to(device).eval()
    classes: list[str] = saved["classes"]
    max_pixels = saved["config"]["dataset"].get("max_pixels")
    if not isinstance(max_pixels, int) or not (ours or 0 < max_pixels < MAX_PIXELS):  # a stranger may ask for less only
        max_pixels = MAX_PIXELS
    images = Images(paths, saved["input_shape"], own["eval_transforms"], max_pixels)
    classifier = Classifier(model, images, classes, config["top_k"], device)
    shape = "x".join(map(str, saved["input_shape"]))
    print(f"{path}, {len(classes)} classes, images {shape}, on {device}", file=sys.stderr)

    # The predictions.
    truths = [true_class(path, classes) for path in paths]
    layout = Layout([*map(str, paths)], classes, with_truth=any(truths))
    predictions: list[Prediction] = []
    bar = tqdm(total=len(paths), unit=" images", disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)
    say(layout.header())
    for batch in predicted(classifier, truths, own["batch_size"], config["num_workers"]):
        for prediction in batch:
            if prediction.error:
                tell(f"{prediction.image}: {prediction.error}")
        lines = [layout.line(prediction) for prediction in batch if not prediction.error]
        if lines:
            say("\n".join(lines))
        predictions += batch
        bar.update(len(batch))
    bar.close()

    finish(predictions, problems, output, images.input_shape)


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


# ---------------------------------------------------------------------------------------------------------------------
# Which images


def find_images(requested: str | Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that files, folders and globs mean, each once and in order, and what is wrong with the rest."""
    found: dict[Path, None] = {}
    problems = []
    for request in [requested] if not isinstance(requested, (list, tuple)) else requested:
        path = Path(str(request)).expanduser()
        matches = [path] if path.exists() else sorted(Path(match) for match in glob(str(path), recursive=True))
        if not matches:
            problems.append(f"{request}: {'matches nothing' if has_magic(str(request)) else 'no such file or folder'}")
        for match in matches:
            for file in files_under(match, problems) if match.is_dir() else [match]:
                found[file] = None
    return list(found), problems


def files_under(folder: Path, problems: list[str]) -> Iterator[Path]:
    """The files of a folder and of those in it, sorted, without hidden ones; a folder that holds none is a problem."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=lambda e: problems.append(one_line(e))):
        here = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if here not in seen else []
        names = sorted(name for name in names if not name.startswith(".")) if here not in seen else []
        problem = f"{place}: an empty folder"
        if not names and not folders and here not in seen and problem not in problems:
            problems.append(problem)
        seen.add(here)  # a link may lead back to a folder above
        yield from (Path(place, name) for name in names)


def true_class(path: Path, classes: Sequence[str]) -> str | None:
    """The class that the image's folder is named after, or None."""
    folder = path.absolute().parent.name
    return folder if folder in classes else None


# ---------------------------------------------------------------------------------------------------------------------
# From files to batches


class Images(Dataset):
    """Image files, brought to the model's shape as evaluation does it.

    Args:
        paths: the files.
        input_shape: the model's (channels, height, width).
        eval_transforms: the YAML's list; without Resize it gets one to the model's size first. What comes before
            `Normalize` is done here, in the process that reads, the rest in batches on the device.
        max_pixels: width times height of a file's image allowed.
    """

    def __init__(
        self, paths: Sequence[Path], input_shape: Sequence[int], eval_transforms: Sequence[Any], max_pixels: int
    ) -> None:
        self.paths, self.input_shape, self.max_pixels = paths, tuple(input_shape), max_pixels
        transforms = parse_transforms(eval_transforms, "dataset.eval_transforms")
        self.scales = not any(isinstance(transform, (Resize, PerImage)) for transform in transforms)
        if self.scales:
            transforms.insert(0, Resize(list(input_shape[1:])))
        self.at_least = resized_to(transforms)
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
            image = read_image(self.paths[index], self.input_shape[0], self.max_pixels, self.at_least)
            scaled = self.scales and image.shape != self.input_shape
            needed = self.for_image if scaled or not self.scales else self.for_image[1:]
            image = self._transformed(needed, image[None], index)[0] if needed else image
        except RunError as error:
            reason = str(error).removeprefix(f"{self.paths[index]}: ")
            reason = re.split("; (?:replace|make it) ", reason)[0]  # advice for a data set; here the others go on
            return index, reason, False
        if image.shape != self.input_shape:
            return index, f"comes out as {list(image.shape)}, the model takes {list(self.input_shape)}", False
        return index, image, scaled

    def on_device(self, images: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        """A batch of images as the model gets them, floats `[batch, channels, height, width]`."""
        return to_float(self._transformed(self.for_batch, images.to(device, non_blocking=True), indices))

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
        """What the images of a batch `[batch, channels, height, width]` are."""
        if pixels is None:
            return []
        indices = torch.tensor([index for index, error, _ in about if error is None])
        probabilities = self.model(self.images.on_device(pixels, indices, self.device)).float().softmax(1)
        values, places = probabilities.topk(min(self.top_k, len(self.classes)))
        rows = zip(values.tolist(), places.tolist(), strict=True)
        return [[(self.classes[c], p) for p, c in zip(row, column, strict=True)] for row, column in rows]

    def classified(self, samples: Sequence[tuple[int, Tensor | str, bool]]) -> tuple[list[Ranked], list[About]]:
        """`collate`, with the classes of the images in place of the images."""
        pixels, about = collate(samples)
        return self(pixels, about), about


def predicted(
    classifier: Classifier, truths: Sequence[str | None], batch_size: int, num_workers: int | None
) -> Iterator[list[Prediction]]:
    """The predictions, in the order of the images, a batch at a time.

    Raises:
        RunError: the device has too little memory for a batch, or a process that reads has died.
    """
    images, device = classifier.images, classifier.device
    if num_workers is None:
        num_workers = 0 if len(images) <= FEW else os.cpu_count() or 1
    # Where the readers take all cores, a model on the CPU runs in them: beside them its threads would wait for a core.
    in_workers = device.type == "cpu" and num_workers >= torch.get_num_threads()
    collate_fn = classifier.classified if in_workers else collate
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collate_fn)
    try:
        for found, about in loader:
            ranked = iter(found if in_workers else classifier(found, about))
            yield [
                Prediction(str(images.paths[i]), truths[i], [] if error else next(ranked), error, scaled)
                for i, error, scaled in about
            ]
    except torch.OutOfMemoryError:
        raise RunError(f"batch_size={batch_size}: too much for the memory of {device}; try {batch_size // 2}") from None
    except RuntimeError as error:
        if not re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)):
            raise
        raise RunError(f"a process that reads images has died ({one_line(error)}); try num_workers=0") from None


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


def tell(problem: str) -> None:
    """To standard error: what is not predicted, and why."""
    tqdm.write(f"not predicted: {problem}", file=sys.stderr)


class Layout:
    """Predictions in columns, for reading.

    Args:
        images: the paths of all.
        classes: the class names.
        with_truth: whether there is a column for the class that folders tell.
    """

    def __init__(self, images: Iterable[str], classes: Sequence[str], with_truth: bool) -> None:
        self.with_truth = with_truth
        self.image = min(60, max(5, *map(len, images)))
        self.name = max(9, *map(len, classes))

    def header(self) -> str:
        """The names of the columns."""
        return self._row("image", "true", "predicted", "", "next best")

    def line(self, prediction: Prediction) -> str:
        """One prediction."""
        (name, probability), *others = prediction.ranked
        rest = ", ".join(f"{other} {p:.2%}" for other, p in others)
        return self._row(prediction.image, prediction.true or "", name, f"{probability:.2%}", rest)

    def _row(self, image: str, true: str, predicted: str, probability: str, rest: str) -> str:
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
    if output:
        text = as_csv(predictions) if output.suffix == ".csv" else as_json(predictions)
        files.write(output, text)
        print(f"written to {output}", file=sys.stderr)
    scaled = sum(prediction.scaled for prediction in done)
    if scaled:
        size = "x".join(map(str, input_shape[1:]))
        print(f"{scaled:,} of {len(done):,} images were scaled to the {size} pixels of the model", file=sys.stderr)
    known = [prediction for prediction in done if prediction.true is not None]
    if known:
        right = sum(prediction.true == prediction.ranked[0][0] for prediction in known)
        of = f"{len(known):,} images whose folder is named after a class"
        print(f"accuracy {right / len(known):.2%} of {of}", file=sys.stderr)
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
        table.writerow(row)
    return text.getvalue()


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list of objects: image, true (null where no folder tells), predicted, probability, top, error (null: none)."""
    rows = [
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
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
