"""Predicting: any file as evaluation sees it, the broken ones named, and output that programs can read."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run

import datasets
import predict
from engine.data.batches import Batches
from engine.data.images import read_image
from engine.data.splits import load_splits
from engine.errors import RequestError, RunError
from engine.run import checkpoint
from engine.training.metrics import accuracy, evaluate
from models.mlp import MLP

CLASSES = ["bee", "cat", "dog"]
NORMALIZE = {"Normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}


@dataclass(frozen=True)
class Said:
    """What a call came to: the error it ended with, if any, and the lines of stdout and stderr."""

    error: RunError | None
    out: list[str]
    err: list[str]

    @property
    def rows(self) -> list[list[str]]:
        """The words of each line of stdout below the header."""
        return [line.split() for line in self.out[1:]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """`call(images=...)` is `python predict.py images=...` in this process."""

    def call_predict(**settings: Any) -> Said:
        defaults = {"checkpoint": None, "top_k": 3, "output": None, "batch_size": None, "device": "cpu"}
        error = None
        capsys.readouterr()
        try:
            predict.main({**defaults, "num_workers": 0, "num_threads": None, **settings})
        except RunError as raised:
            error = raised
        out, err = capsys.readouterr()
        return Said(error, out.splitlines(), err.splitlines())

    return call_predict


def write_checkpoint(path: Path, shape: tuple[int, int, int], classes: list[str], dataset: dict[str, Any]) -> str:
    """A checkpoint of a model with random weights, whose predictions vary from image to image."""
    torch.manual_seed(1)
    model = MLP(shape, len(classes), hidden=[16])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    common = {"val_fraction": 0.0, "limit": None, "target_transform": None, "steps_per_epoch": None}
    config = {
        "model": {"_target_": "models.mlp.MLP", "hidden": [16], "dropout": 0.0},
        "dataset": {**common, "train_transforms": [], "eval_transforms": [], **dataset},
        "choices": {"model": "mlp", "dataset": "image_folder"},
        "batch_size": 4,
        "seed": 0,
        "limit_batches": None,
    }
    about = {"format": 1, "classes": classes, "input_shape": list(shape), "config": config}
    checkpoint.write(path, {**about, "model": model.state_dict()})
    return str(path)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured image, uint8 `[height, width, 3]`, that survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_formats(folder: Path) -> list[Path]:
    """The formats that people have, in class folders; every fourth of another size."""
    paths: list[Path] = []

    def save(name: str, image: Image.Image, **options: Any) -> None:
        place = folder / CLASSES[len(paths) % 3]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / name, **options)
        paths.append(place / name)

    for seed, (height, width) in enumerate([(12, 12), (31, 17), (12, 40), (130, 100)]):
        image = Image.fromarray(picture(seed, height, width))
        alpha = Image.fromarray(picture(seed + 90, height, width)).convert("L")
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        rotated = Image.Exif()
        rotated[0x0112] = 6  # to be turned by 90 degrees
        save(f"{seed}.png", image)
        save(f"{seed}.jpg", image, quality=95)
        save(f"{seed}_rotated.jpg", image, exif=rotated)
        save(f"{seed}_palette.png", image.quantize(16))
        save(f"{seed}_palette.gif", image.quantize(16))
        save(f"{seed}_alpha.png", Image.merge("RGBA", (*image.split(), alpha)))
        save(f"{seed}_grey.png", image.convert("L"))
        save(f"{seed}_grey_alpha.png", Image.merge("LA", (image.convert("L"), alpha)))
        save(f"{seed}_16bit.png", Image.fromarray(deep))
        save(f"{seed}_one_bit.png", image.convert("1"))
        save(f"{seed}_cmyk.jpg", image.convert("CMYK"))
        save(f"{seed}.webp", image)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# As evaluation does it


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_format_and_size_is_seen_as_in_evaluation(
    tmp_path: Path, call: Any, channels: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_formats(tmp_path / "photos")
    normalize = {"Normalize": {"mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.3, 0.4][:channels]}}
    transforms = [{"Resize": {"size": [14, 14]}}, {"CenterCrop": {"size": 12}}, normalize]
    settings = {"_target_": "datasets.image_folder", "root": str(tmp_path / "photos"), "test_fraction": 0.5}
    settings |= {"channels": channels, "max_pixels": 20_000, "eval_transforms": transforms}
    file = write_checkpoint(tmp_path / "best.pt", (channels, 12, 12), CLASSES, settings)
    config = checkpoint.read(Path(file))["config"]

    files = datasets.ImageFiles([str(p) for p in paths], [CLASSES.index(p.parent.name) for p in paths], channels)
    splits, _ = load_splits({**config["dataset"], "skip_unreadable": False, "cache": False, "cache_dir": ""})
    everything = type(splits["test"])(files, torch.arange(len(files)), len(CLASSES))
    batches = Batches(everything, transforms, torch.device("cpu"), batch_size=config["batch_size"])
    model = checkpoint.build_model(checkpoint.read(Path(file)), Path(file)).eval()
    _, confusion = evaluate(model, batches, len(CLASSES))
    with torch.inference_mode():
        expected = torch.cat([model(images).softmax(1) for images, _ in batches])
    assert len(set(expected.argmax(1).tolist())) > 1, "a model that says the same of all shows nothing"

    output = tmp_path / "result.json"
    said = call(images=[str(path) for path in paths], checkpoint=file, output=str(output), num_workers=workers)
    assert said.error is None and not any("scaled" in line for line in said.err)
    found = json.loads(output.read_text())
    assert [row["image"] for row in found] == [str(path) for path in paths]
    assert [row["true"] for row in found] == [path.parent.name for path in paths]
    for row, probabilities in zip(found, expected, strict=True):
        told = {entry["class"]: entry["probability"] for entry in row["top"]}
        assert [told[name] for name in CLASSES] == pytest.approx(probabilities.tolist(), abs=1e-6)
        assert row["predicted"] == row["top"][0]["class"] == CLASSES[int(probabilities.argmax())]
    assert f"accuracy {accuracy(confusion):.2%} of {len(paths)} images whose folder is named after a class" in said.err
    monkeypatch.chdir(paths[0].parent)
    call(images=[paths[0].name], checkpoint=file, output=str(output), num_workers=0)  # where no folder is typed, either
    assert json.loads(output.read_text())[0]["true"] == paths[0].parent.name


def test_digits_as_files_give_the_accuracy_of_evaluation(tmp_path: Path, call: Any) -> None:
    settings = {"_target_": "datasets.digits"}
    file = write_checkpoint(tmp_path / "best.pt", (1, 8, 8), [str(c) for c in range(10)], settings)
    images, labels = cast(tuple[torch.Tensor, torch.Tensor], datasets.digits().test)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / str(label) / f"{number}.png")
    model = checkpoint.build_model(checkpoint.read(Path(file)), Path(file)).eval()
    _, confusion = evaluate(model, [(images / 255, labels)], 10)
    said = call(images=str(tmp_path / "[0-9]"), checkpoint=file, batch_size=100)
    assert said.err[-1].startswith(f"accuracy {accuracy(confusion):.2%} of {len(labels)} images")


def test_images_of_another_size_are_scaled_where_the_transforms_do_not_and_that_is_said(
    tmp_path: Path, call: Any
) -> None:
    file = write_checkpoint(tmp_path / "best.pt", (3, 12, 12), CLASSES, {"eval_transforms": [NORMALIZE]})
    Image.fromarray(picture(0, 12, 12)).save(tmp_path / "right.png")
    Image.fromarray(picture(0, 50, 30)).save(tmp_path / "larger.png")
    said = call(images=[str(tmp_path / "right.png"), str(tmp_path / "larger.png")], checkpoint=file)
    assert said.error is None and len(said.rows) == 2
    assert "1 of 2 images was scaled to the 12x12 pixels of the model" in said.err

    model = checkpoint.build_model(checkpoint.read(Path(file)), Path(file)).eval()
    pixels = read_image(tmp_path / "larger.png", 3)[None]
    scaled = torch.nn.functional.interpolate(pixels, (12, 12), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(NORMALIZE["Normalize"][key]).view(3, 1, 1) for key in ("mean", "std"))
    best = model((scaled - mean) / std).softmax(1).max().detach()
    assert said.rows[1][2] == f"{float(best):.2%}"


# ---------------------------------------------------------------------------------------------------------------------
# Which images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """photos/: cat/1.png, cat/2.png, dog/deep/3.jpg and a hidden file; best.pt beside it."""
    write_checkpoint(tmp_path / "best.pt", (3, 12, 12), CLASSES, {})
    photos = tmp_path / "photos"
    for number, name in enumerate(["cat/2.png", "cat/1.png", "dog/deep/3.jpg"]):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 12, 12)).save(photos / name)
    (photos / ".DS_Store").write_text("hidden")
    return photos


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("photos", ["photos/cat/1.png", "photos/cat/2.png", "photos/dog/deep/3.jpg"]),
        ("photos/cat/2.png", ["photos/cat/2.png"]),
        ("photos/**/*.png", ["photos/cat/1.png", "photos/cat/2.png"]),
        ("photos/*", ["photos/cat/1.png", "photos/cat/2.png", "photos/dog/deep/3.jpg"]),
        (
            ["photos/dog", "photos/cat/1.png", "photos/cat"],
            ["photos/dog/deep/3.jpg", "photos/cat/1.png", "photos/cat/2.png"],
        ),
        ("photos/odd [1], (x)=y.png", ["photos/odd [1], (x)=y.png"]),
    ],
)
def test_files_folders_globs_and_lists(folder: Path, monkeypatch: Any, asked: Any, expected: list[str]) -> None:
    monkeypatch.chdir(folder.parent)
    if "odd" in asked:
        Image.fromarray(picture(0, 5, 5)).save(asked)
    found, problems = predict.find_images(asked)
    assert [str(path) for path in found] == expected and problems == []


def test_a_link_in_a_circle_ends(folder: Path) -> None:
    (folder / "cat" / "round").symlink_to(folder, target_is_directory=True)
    found, problems = predict.find_images(str(folder))
    assert len(found) == 3 and problems == []


@pytest.mark.parametrize("asked", ["**/*.png", "**", "*", "cat/**/[12].png", "**/*/*.png"])
def test_links_in_many_circles_end(folder: Path, asked: str) -> None:
    """Five folders that each hold links to all five make 5^40 paths of what a link may lead through."""
    for place in (folder / name for name in "abcde"):
        place.mkdir()
        for name in "abcde":
            (place / f"to_{name}").symlink_to(folder / name, target_is_directory=True)
    (folder / "cat" / "up").symlink_to(folder, target_is_directory=True)
    found, _ = predict.find_images(str(folder / asked))
    images = {path.resolve().relative_to(folder).as_posix() for path in found}
    assert images >= {"cat/1.png", "cat/2.png"} and len(found) <= 20


def test_what_is_no_regular_file_is_not_opened(folder: Path, call: Any) -> None:
    os.mkfifo(folder / "cat" / "fifo.png")
    (folder / "cat" / "zero.png").symlink_to("/dev/zero")
    (folder / "cat" / "nowhere.png").symlink_to("nowhere")
    said = call(images=[str(folder), "/dev/zero"], checkpoint=str(folder.parent / "best.pt"))
    assert str(said.error) == "4 not predicted, named above; 3 predicted" and len(said.rows) == 3
    assert sum(line.endswith("not a regular file") for line in said.err) == 3
    assert any("nowhere.png: a link that leads nowhere" in line for line in said.err)


def test_thousands_that_cannot_be_read_are_all_named(folder: Path, call: Any) -> None:
    (folder / "many").mkdir()
    for number in range(3000):
        (folder / "many" / f"{number}.png").touch()
    said = call(images=str(folder), checkpoint=str(folder.parent / "best.pt"), batch_size=64)
    assert str(said.error) == "3,000 not predicted, named above; 3 predicted"
    assert sum(line.startswith("not predicted: ") for line in said.err) == 3000


def test_names_that_are_no_utf_8_or_would_steer_a_terminal(tmp_path: Path, call: Any) -> None:
    classes = ["b\x1b[2Jee", "c\nat", "dog\x9b"]
    file = write_checkpoint(tmp_path / "best.pt", (3, 12, 12), classes, {})
    place = tmp_path / "photos" / classes[1]
    place.mkdir(parents=True)
    names = [b"\xff.png", b"a\x1b]0;title\x07.png", b"line\nend.png", b"broken\x1b.png"]
    for name in names:
        Image.fromarray(picture(0, 12, 12)).save(tmp_path / "plain.png")
        os.replace(tmp_path / "plain.png", os.fsencode(place) + b"/" + name)
    Path(os.fsdecode(os.fsencode(place) + b"/" + names[3])).write_text("no image")
    for output in (tmp_path / "r.csv", tmp_path / "r.json"):
        said = call(images=str(tmp_path / "photos"), checkpoint=file, output=str(output))
        assert str(said.error) == "1 not predicted, named above; 3 predicted"
        written = output.read_text(encoding="utf-8")
        assert all(text.isprintable() for text in (*said.out, *said.err, *written.splitlines()))
        assert len(said.out) == 4 and any("\\udcff.png" in line for line in said.out)
        assert "accuracy " in said.err[-1] and "3 images whose folder" in said.err[-1]
    paths = {os.fsencode(row["image"]).rpartition(b"/")[2] for row in json.loads(written)}
    assert paths == set(names)


def test_a_file_does_not_raise_the_limit_of_pixels(folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_checkpoint(folder.parent / "best.pt", (3, 12, 12), CLASSES, {"max_pixels": 10**12})
    monkeypatch.setattr(predict, "MAX_PIXELS", 200)
    Image.fromarray(picture(0, 15, 15)).save(folder / "large.png")
    said = call(images=str(folder), checkpoint=file)
    assert any("large.png: 15x15 pixels are more than the 200 allowed" in line for line in said.err)


@pytest.mark.parametrize("broken", [{"max_pixels": "many"}, {"eval_transforms": [3]}, {"eval_transforms": None}])
def test_settings_that_make_no_sense_are_one_line(folder: Path, call: Any, broken: dict[str, Any]) -> None:
    file = write_checkpoint(folder.parent / "best.pt", (3, 12, 12), CLASSES, broken)
    said = call(images=str(folder), checkpoint=file)
    assert isinstance(said.error, RequestError) and said.out == []
    saved = torch.load(file, weights_only=True)
    saved["config"]["dataset"] |= {"max_pixels": 10**6, "eval_transforms": []}
    saved["config"]["batch_size"] = "4"
    torch.save(saved, file)
    said = call(images=str(folder), checkpoint=file)
    assert isinstance(said.error, RequestError) and "batch_size is 4; expected an integer >= 1" in str(said.error)


def test_one_image_is_singular(folder: Path, call: Any) -> None:
    Image.fromarray(picture(0, 15, 15)).save(folder / "cat" / "larger.png")
    said = call(images=str(folder / "cat" / "larger.png"), checkpoint=str(folder.parent / "best.pt"))
    assert "1 of 1 image was scaled to the 12x12 pixels of the model" in said.err
    assert said.err[-1].endswith("of 1 image whose folder is named after a class")


def test_what_cannot_be_predicted_is_named_and_the_others_are(folder: Path, call: Any) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "nothing").mkdir()
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "zero.jpg").touch()
    output = folder.parent / "result.csv"
    asked = [str(folder), str(folder / "gone.png"), str(folder / "*.tif")]
    said = call(images=asked, checkpoint=str(folder.parent / "best.pt"), output=str(output), batch_size=2)
    assert said.error is not None and said.error.exit_code == 1
    assert str(said.error) == "6 not predicted, named above; 3 predicted"
    for name in ("notes.txt", "nothing", "cat/broken.png", "cat/zero.jpg", "gone.png", "*.tif"):
        [line] = [line for line in said.err if f"{folder / name}: " in line]
        assert line.startswith("not predicted: ") and "skip_unreadable" not in line
    assert [Path(row[0]).name for row in said.rows] == ["1.png", "2.png", "3.jpg"]
    with output.open(newline="") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["error"]} == {"notes.txt", "broken.png", "zero.jpg"}
    assert all(bool(row["predicted"]) != bool(row["error"]) for row in rows.values())


def test_the_limit_of_pixels_is_the_data_sets(folder: Path, call: Any) -> None:
    file = write_checkpoint(folder.parent / "best.pt", (3, 12, 12), CLASSES, {"max_pixels": 200})
    Image.fromarray(picture(0, 15, 15)).save(folder / "large.png")
    said = call(images=str(folder), checkpoint=file)
    assert len(said.rows) == 3 and any("large.png: 15x15 pixels are more than the 200 allowed" in e for e in said.err)


def test_nothing_to_predict_is_a_wrong_request(folder: Path, call: Any) -> None:
    file = str(folder.parent / "best.pt")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no image")
    output = folder.parent / "result.csv"
    for asked in (str(folder / "gone.png"), str(folder / "empty"), str(folder / "*.tif"), str(folder / "notes.txt")):
        said = call(images=asked, checkpoint=file, output=str(output))
        assert isinstance(said.error, RequestError) and said.out[1:] == [], asked
    assert not output.exists()


@pytest.mark.parametrize("name", ["result.txt", "no/such/result.csv", "folder.csv"])
def test_an_output_that_cannot_be_written_is_found_first(folder: Path, call: Any, name: str) -> None:
    (folder.parent / "folder.csv").mkdir()
    said = call(images=str(folder), checkpoint=str(folder.parent / "best.pt"), output=str(folder.parent / name))
    assert isinstance(said.error, RequestError) and "output=" in str(said.error) and said.out == []


def test_a_bare_state_dict_needs_a_model_and_a_dataset(folder: Path, call: Any, tmp_path: Path) -> None:
    torch.save(MLP((3, 12, 12), 3, hidden=[4]).state_dict(), tmp_path / "bare.pt")
    said = call(images=str(folder), checkpoint=str(tmp_path / "bare.pt"))
    assert isinstance(said.error, RequestError) and "bare state_dict" in str(said.error)
    assert "model=" in str(said.error) and "experiment=" in str(said.error)


def test_a_bare_state_dict_takes_classes_and_transforms_of_the_data(folder: Path, call: Any) -> None:
    """It says what a checkpoint of the same weights, classes and transforms says."""
    file = write_checkpoint(folder.parent / "best.pt", (3, 12, 12), CLASSES, {"eval_transforms": [NORMALIZE]})
    write_formats(folder.parent / "data")
    saved = torch.load(file, weights_only=True)
    torch.save(saved["model"], folder.parent / "bare.pt")
    dataset = {"_target_": "datasets.image_folder", "root": str(folder.parent / "data"), "test_fraction": 0.5}
    dataset |= {"channels": 3, "max_pixels": 10**6, "skip_unreadable": False, "cache": True, "cache_dir": "cache"}
    resize = {"Resize": {"size": [12, 12]}}
    dataset |= {**saved["config"]["dataset"], **dataset, "eval_transforms": [resize, NORMALIZE]}
    asked = {"model": saved["config"]["model"], "dataset": dataset, "choices": {"model": "mlp", "dataset": "mine"}}
    said = call(images=str(folder), checkpoint=str(folder.parent / "bare.pt"), **asked)
    assert said.error is None and said.out == call(images=str(folder), checkpoint=file).out
    assert any("Resize: {size: [12, 12]}" in line and "dataset=mine" in line for line in said.err)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bare.pt", "best.pt", "data", "photos"]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_csv_and_json_and_the_lines_say_the_same(folder: Path, call: Any) -> None:
    file, table, objects = str(folder.parent / "best.pt"), folder.parent / "r.csv", folder.parent / "r.json"
    said = call(images=str(folder), checkpoint=file, output=str(table), top_k=2)
    assert said.error is None and said.out[0].split() == ["image", "true", "predicted", "next", "best"]
    assert call(images=str(folder), checkpoint=file, output=str(objects), top_k=2, num_workers=1).out == said.out
    with table.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert list(lines[0]) == ["image", "true", "predicted", "probability", "predicted_2", "probability_2", "error"]
    for line, one in zip(lines, json.loads(objects.read_text()), strict=True):
        best, second = one["top"]
        assert (line["image"], line["true"] or None) == (one["image"], one["true"])
        assert (line["predicted"], line["predicted_2"]) == (one["predicted"], second["class"])
        assert float(line["probability"]) == pytest.approx(best["probability"], abs=1e-6)
        assert best["probability"] >= second["probability"] and one["error"] is None
        assert f"{best['probability']:.2%}" in " ".join(said.out)
    assert [line["true"] for line in lines] == ["cat", "cat", ""]  # deep/ is no class


def test_more_classes_than_there_are(folder: Path, call: Any) -> None:
    said = call(images=str(folder / "dog"), checkpoint=str(folder.parent / "best.pt"), top_k=50)
    assert said.error is None
    assert sorted(word for word in said.rows[0] if word in CLASSES) == CLASSES
    assert said.out[0].split() == ["image", "predicted", "next", "best"]  # no folder tells: no column


def test_the_newest_run_is_taken(folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "checkpoints" / "mine" / ".hydra").mkdir(parents=True)
    (folder.parent / "checkpoints" / "mine" / ".hydra" / "config.yaml").write_text("epochs: 1\n")
    os.replace("best.pt", "checkpoints/mine/best.pt")
    (folder.parent / "checkpoints" / "latest").symlink_to("mine")
    said = call(images="photos")
    assert said.error is None and any("checkpoints/mine/best.pt, 3 classes" in line for line in said.err)


@pytest.fixture
def forking() -> Iterator[None]:
    """Worker processes are copies of this one, with what a test put in the place of something."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_a_dead_reader_is_one_line(folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch, forking: None) -> None:
    monkeypatch.setattr(predict, "read_image", lambda *_, **__: os._exit(9))
    said = call(images=str(folder), checkpoint=str(folder.parent / "best.pt"), num_workers=1)
    assert said.error is not None and said.error.exit_code == 1 and "num_workers=0" in str(said.error)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def test_the_command_line(folder: Path) -> None:
    odd = folder / "odd (1), x=y.png"
    os.replace(folder / "cat" / "1.png", odd)
    done = run("predict", f"images={odd}", "checkpoint=best.pt", "device=cpu", cwd=folder.parent)
    assert done.wait() == 0, done.err
    assert done.out.splitlines()[1].startswith(str(odd)) and "\r" not in done.out and "\x1b" not in done.out
    assert done.err.splitlines() == ["best.pt, 3 classes, images 3x12x12, on cpu"]

    (folder / "notes.txt").write_text("no image")
    done = run("predict", f"images=[{folder}/cat,{folder}/notes.txt]", "checkpoint=best.pt", cwd=folder.parent)
    assert done.wait() == 1 and done.err.splitlines()[-1].startswith("error: 1 not predicted")
    assert not (folder.parent / "checkpoints").exists() and not (folder.parent / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "images has to be given"),
        (["images=null"], "images=null: expected text or a list of texts"),
        (["image=a.png"], "did you mean images?"),
        (["images=a.png", "top_k=0"], "top_k=0: expected an integer >= 1"),
        (["images=a.png", "dataset.root=x"], "there is no setting 'dataset.root'"),
        (["images=a.png", "+dataset.root=x"], "there is no setting 'dataset.root'"),
    ],
)
def test_a_wrong_request_is_answered_without_torch(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.command import cli

    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    monkeypatch.setitem(sys.modules, "predict", None)  # which imports torch: to import it now fails, with exit code 1
    with pytest.raises(SystemExit) as end:
        cli.launch("predict")
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(3, 0, 5),  # nothing to see
        torch.zeros(5, 5, dtype=torch.uint8),
        torch.zeros(1, 3, 5, 5),
        torch.zeros(3, 5, 5, dtype=torch.int64),
        torch.zeros(3, 5, 5, dtype=torch.bool),
    ],
)
def test_tensors_that_are_no_images(given: torch.Tensor) -> None:
    images = predict.Images([given, torch.ones(3, 5, 5), torch.full((3, 5, 5), 255).byte()], (3, 5, 5), [], 100)
    assert images[0][1] == f"{given.dtype} {list(given.shape)}; expected uint8 or floats [channels, height, width]"
    for number, most in ((1, 1.0), (2, 255.0)):
        assert torch.equal(images[number][1], torch.full((3, 5, 5), most).to(images[number][1].dtype))
