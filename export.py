"""Put a checkpoint into a file for other programs: `python export.py output=model.onnx`; see `--help` and README.md."""

from engine.command.cli import launch

if __name__ == "__main__":
    launch("export")  # answers help, completion and typos, and only then imports torch and calls main() below

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import files
from engine.data.augment import Normalize, Resize
from engine.data.devices import use_threads
from engine.data.download import no_downloads
from engine.data.graph import cropped, in_graph
from engine.data.images import ImageFiles
from engine.data.splits import Split, load_splits
from engine.errors import RequestError, RunError, one_line, printable
from engine.run import checkpoint, runs, tensors, trust
from evaluate import check_output, settings_for
from predict import Classifier, Images, Settings, load

NEEDS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": (), ".safetensors": ("safetensors",)}
SAMPLES = 200  # that both the file and the program predict
BATCH = 32  # of them at once, at most
ROUNDING = 1e-4  # difference of a probability that the order of sums may make

Answers = Callable[[Tensor], Tensor]  # uint8 [batch, height, width, channels] -> probabilities [batch, classes]


def main(config: dict[str, Any]) -> None:
    """Export as the checked configuration says; the file is there afterwards only if it predicts what predict.py does.

    Raises:
        RequestError: there is no such checkpoint, it cannot be exported, or the file cannot be written.
        RunError: what was made predicts otherwise.
    """
    # The checkpoint, and what goes with it.
    use_threads(None)
    output = Path(config["output"])
    path = Path(config["checkpoint"]) if config["checkpoint"] else runs.newest_best()
    check_format(output)
    saved = checkpoint.read(path)
    check_output(output, path)
    config = {**config, "batch_size": None}
    model, settings = load(saved, path, config, torch.device("cpu"))
    whole = described(saved, config, settings)

    # The file's content, and what it answers.
    about = metadata(whole, settings)
    if output.suffix == ".safetensors":
        content = as_safetensors(model, about | checkpoint.as_metadata(whole))
        if not same(tensors.read(io.BytesIO(content))[0], model.state_dict()):
            raise RunError(f"{output}: not written, as its weights are not those of {path}")
    else:
        graph = traced(Whole(model, settings), settings.input_shape, path)
        content = as_onnx(graph, about, path) if output.suffix == ".onnx" else as_pt2(graph, about)
        images, what = samples(saved, config, path, settings.input_shape)
        answers = answers_of_onnx(content) if output.suffix == ".onnx" else answers_of_pt2(content)
        print(f"{compared(answers, model, images, settings, output)} {what}")
    files.write(output, content, sync=True)
    print(f"written to {printable(str(output))}: {len(settings.classes)} classes, {len(content) / 1e6:,.1f} MB")


class Whole(nn.Module):
    """All that lies between an image as it is read and the probabilities of its classes.

    Args:
        model: takes floats `[batch, channels, height, width]`, gives logits `[batch, classes]`.
        settings: what the model goes with.

    Raises:
        RequestError: a transform cannot be part of a graph.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model = model
        prepared = Images([], settings.input_shape, settings.eval_transforms, settings.max_pixels)
        transforms = [transform for _, transform in prepared.for_image + prepared.for_batch]
        self.transforms = [in_graph(transform) for transform in transforms]
        shaping = [transform for transform in transforms if not isinstance(transform, Normalize)]
        if isinstance(shaping[-1], Resize) and len(shaping[-1].size) == 1:
            print(
                "note: Resize to the shorter side; of what then is too long for the network the graph takes the middle"
            )
            self.transforms.append(partial(cropped, size=settings.input_shape[1:]))

    def forward(self, images: Tensor) -> Tensor:
        """Of uint8 images `[batch, height, width, channels]` the probabilities, float32 `[batch, classes]`."""
        images = images.permute(0, 3, 1, 2)
        for transform in self.transforms:
            images = transform(images)
        images = images if images.is_floating_point() else images.float() / 255
        return self.model(images).float().softmax(1)


def check_format(output: Path) -> None:
    """Refuse (RequestError) a file of no format that there is, or of one that needs what is not installed."""
    if output.suffix not in NEEDS:
        known = f"{', '.join([*NEEDS][:-1])} or {[*NEEDS][-1]}"
        raise RequestError(f"output={printable(str(output))}: expected a name that ends in {known}")
    missing = [name for name in NEEDS[output.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise RequestError(f"output={output}: {', '.join(missing)} {are} not installed: pip install '.[export]'")


def described(saved: dict[str, Any], config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A checkpoint without its weights; for a bare state_dict it is made of what was typed."""
    if "config" in saved:
        return {key: saved.get(key) for key in checkpoint.ABOUT.values()}
    own = {key: config[key] for key in ("model", "dataset", "choices")}
    own |= {"batch_size": settings.batch_size, "seed": 0}
    about = {"format": checkpoint.FORMAT, "classes": settings.classes, "input_shape": list(settings.input_shape)}
    return {**about, "config": own, "signature": trust.signature(own)}


def metadata(whole: dict[str, Any], settings: Settings) -> dict[str, str]:
    """What people and programs want to know of the file; classes, input_shape, preprocessing and config are JSON."""
    channels = settings.input_shape[0]
    colours = {1: "grey", 3: "red, green, blue"}.get(channels, "as in training")
    of_checkpoint = checkpoint.as_metadata(whole)
    return {
        **{name: of_checkpoint[name] for name in ("classes", "input_shape", "config")},
        "input": f"images: uint8 [batch, height, width, {channels}], {colours}, of any height and width",
        "output": f"probabilities: float32 [batch, {len(whole['classes'])}], in the order of classes",
        "preprocessing": json.dumps(settings.eval_transforms, ensure_ascii=False),
        "torch": str(torch.__version__),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def traced(whole: Whole, input_shape: tuple[int, int, int], path: Path) -> torch.export.ExportedProgram:
    """The graph of all, with batch, height and width free.

    Raises:
        RequestError: torch.export cannot trace it.
    """
    channels, height, width = input_shape
    images = torch.zeros(2, height + 3, width + 5, channels, dtype=torch.uint8)  # of sizes that nothing else has
    free = {axis: torch.export.Dim(name) for axis, name in enumerate(("batch", "height", "width"))}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(whole.eval(), (images,), dynamic_shapes={"images": free})
    except Exception as error:  # whatever a model does that cannot be traced
        name, reason = type(whole.model).__name__, first_words(error)
        raise RequestError(f"{path}: torch.export cannot trace {name}: {reason}") from error


def as_onnx(graph: torch.export.ExportedProgram, about: dict[str, str], path: Path) -> bytes:
    """The graph as an ONNX file; RequestError where it has no form there."""
    import onnx

    try:
        with quiet():
            made = torch.onnx.export(
                graph,
                dynamo=True,
                external_data=False,
                input_names=["images"],
                output_names=["probabilities"],
                verbose=False,
            )
            assert made is not None
            proto = made.model_proto
            name_sizes(proto.graph)
            onnx.helper.set_model_props(proto, about)
            return proto.SerializeToString()
    except Exception as error:  # of the exporter, or of protobuf for more than 2 GB
        first: BaseException = error
        while first.__cause__ is not None:  # those above it say how to report it
            first = first.__cause__
        raise RequestError(f"{path}: torch.onnx cannot write it: {first_words(first)}") from error


def name_sizes(graph: Any) -> None:
    """Call the free sizes of an ONNX graph what they are, in place of torch's numbers for them."""
    shape = graph.input[0].type.tensor_type.shape.dim
    names = {size.dim_param: name for size, name in zip(shape, ("batch", "height", "width", ""), strict=True)}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names and size.dim_param:
                size.dim_param = names[size.dim_param]


def first_words(error: BaseException) -> str:
    """The first paragraph of what torch's exporters say; pages follow."""
    return one_line(ValueError(str(error).strip().partition("\n\n")[0] or type(error).__name__))


def as_pt2(graph: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    """The graph as torch.export.load reads it, with a file metadata.json in it."""
    content = io.BytesIO()
    with quiet():
        torch.export.save(graph, content, extra_files={"metadata.json": json.dumps(about, ensure_ascii=False)})
    return content.getvalue()


def as_safetensors(model: nn.Module, about: dict[str, str]) -> bytes:
    """The weights alone, as evaluate.py and predict.py read them too."""
    import safetensors.torch

    return safetensors.torch.save({name: t.clone().contiguous() for name, t in model.state_dict().items()}, about)


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether they are the same tensors by name, bit by bit."""
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it torch's exporters keep their progress, warnings and graphs to themselves; what matters is raised."""
    said = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------------------------
# What it answers


def answers_of_onnx(content: bytes) -> Answers:
    """The ONNX file's answers, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def answers_of_pt2(content: bytes) -> Answers:
    """The .pt2 file's answers."""
    return torch.export.load(io.BytesIO(content)).module()


def samples(
    saved: dict[str, Any], config: dict[str, Any], path: Path, input_shape: tuple[int, int, int]
) -> tuple[list[Tensor], str]:
    """Images to compare by, uint8 `[channels, height, width]`, and what they are.

    They are from all over the test split of the checkpoint's data; to have other sizes too, of every fourth only a part
    is taken. Where there is none to be had, which is told, they are random.
    """
    try:
        asked = settings_for(saved, config, path)
        with no_downloads():
            splits, _ = load_splits(asked["dataset"], only="test")
        images = read(splits["test"])
        what = f"samples of the test split of {printable(str(asked['choices']['dataset']))}"
    except Exception as error:  # a data set may be anybody's code
        print(f"compared on random images, as the test split cannot be had: {one_line(error)}")
        channels, height, width = input_shape
        generator = torch.Generator().manual_seed(0)
        shape = (SAMPLES, channels, height, width)
        images = [*torch.randint(256, shape, generator=generator, dtype=torch.uint8)]
        what = "random images"
    parts = [image[:, : 1 + image.shape[1] * 2 // 3, : 1 + image.shape[2] // 2] for image in images]
    return [part if n % 4 == 3 else whole for n, (whole, part) in enumerate(zip(images, parts, strict=True))], what


def read(split: Split) -> list[Tensor]:
    """Samples from all over a split, as they are before any transform."""
    assert split.indices is not None
    places = torch.linspace(0, len(split.indices) - 1, min(SAMPLES, len(split.indices))).long()
    part, chosen = split.part, split.indices[places].tolist()
    if isinstance(part, tuple):
        return [part[0][index] for index in chosen]
    return [part.read(index) if isinstance(part, ImageFiles) else part[index][0] for index in chosen]


@torch.inference_mode()
def compared(answers: Answers, model: nn.Module, images: Sequence[Tensor], settings: Settings, output: Path) -> str:
    """How far the file's answers are from those of predict.py, in words.

    Raises:
        RunError: further than rounding.
    """
    device = torch.device("cpu")
    prepared = Images(images, settings.input_shape, settings.eval_transforms, settings.max_pixels)
    classifier = Classifier(model, prepared, settings.classes, 1, device)
    of_size: dict[torch.Size, list[tuple[int, Any, bool]]] = {}
    refused = "there are no images"
    for sample in (prepared[index] for index in range(len(images))):
        if isinstance(sample[1], str):  # by predict.py too
            refused = sample[1]
        else:
            of_size.setdefault(images[sample[0]].shape, []).append(sample)
    differences, others = [], 0
    for batch in (same_size[n : n + BATCH] for same_size in of_size.values() for n in range(0, len(same_size), BATCH)):
        indices = [index for index, _, _ in batch]
        own = classifier.probabilities(torch.stack([pixels for _, pixels, _ in batch]), torch.tensor(indices))
        try:
            found = answers(torch.stack([images[index] for index in indices]).permute(0, 2, 3, 1).contiguous())
        except Exception as error:  # of onnxruntime or torch
            raise RunError(f"{output}: not written, as it cannot be run: {first_words(error)}") from error
        differences.append((found - own).abs().amax(1))
        others += int((found.argmax(1) != own.argmax(1)).sum())
    if not differences:
        raise RunError(f"{output}: not written, as there is nothing to compare it by: {refused}")
    largest = float(torch.cat(differences).max())
    said = f"the largest difference of a probability is {largest:.1e}, and {others:,} predictions differ"
    said = f"{said} of {sum(map(len, of_size.values())):,}"
    if not largest <= ROUNDING:
        raise RunError(f"{output}: not written: it predicts otherwise than predict.py: {said}")
    return said
