"""Pictures: nothing clips or overlaps, they show what they should, and never make a run fail or wait."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from processes import run

import evaluate as evaluate_program
import predict
import train
from engine.data.augment import Normalize
from engine.pictures import curves, evaluation, style, sweep
from engine.pictures.curves import LiveCurves
from engine.run import compare
from engine.terminal import watched
from engine.training.metrics import Mistakes, evaluate, loss_name

pytestmark = pytest.mark.pictures
ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"a_{word}_of_the_northern_hemisphere_seen_from_{place:03}" for place in range(100) for word in ("sandpiper",)]
ODD = ["a$b$", "Größe\nneu", r"\frac{1}{2}", "$", "日本語", "", "x" * 300, "ﬁﬂ", "tab\there", "W" * 80]


def history(epochs: int, validation: bool = True, lr: float = 0.1, scale: float = 1) -> list[dict[str, Any]]:
    """Rows of metrics.csv that look like a run's."""
    return [
        {
            "epoch": epoch,
            "train_loss": scale * (2.3 * math.exp(-epoch / 5)),
            "train_accuracy": 1 - 0.9 * math.exp(-epoch / 4),
            "val_loss": scale * (2.3 * math.exp(-epoch / 5) + 0.1) if validation else None,
            "val_accuracy": 0.95 - 0.9 * math.exp(-epoch / 4) if validation else None,
            "lr": lr * (1 - (epoch - 1) / epochs),
            "seconds": 1.0,
            "images_per_second": 100.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def draw_curves(rows: list[dict[str, Any]], path: Path) -> bool:
    return style.draw(path, curves.curves_figure, rows, "run")


def counts(number: int) -> np.ndarray:
    """A confusion matrix with errors of all sizes."""
    generator = np.random.default_rng(0)
    matrix = (generator.random((number, number)) ** 12 * 60).astype(np.int64)
    matrix[np.arange(number), np.arange(number)] = generator.integers(0, 30_000, number)
    return matrix


def texts(figure: Figure) -> Iterator[Text]:
    """Every text that can be seen."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from axes.texts
        if not axes.axison:
            continue
        axis: Axis
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            yield from (label for place, label in ticks if low <= place <= high)
            yield axis.label
        yield from (child for child in axes.get_children() if isinstance(child, Text) and child not in axes.texts)


def assert_readable(figure: Figure) -> None:
    """No text is cut off, lies on another one or on somebody else's axes, or is too small."""
    figure.canvas.draw()
    shown = [text for text in texts(figure) if text.get_text().strip()]
    assert shown
    boxes = np.array([text.get_window_extent().extents for text in shown])
    width, height = figure.get_size_inches() * style.DPI
    for text, (left, bottom, right, top) in zip(shown, boxes, strict=True):
        assert left >= 0 and bottom >= 0 and right <= width and top <= height, f"{text.get_text()!r} is cut off"
        assert float(text.get_fontsize()) >= 8, f"{text.get_text()!r} is {text.get_fontsize()} points"
    straight = np.array([text.get_rotation() in (0, 90) for text in shown])  # the others' boxes say little
    boxes = boxes[straight]
    shown = [text for text, is_straight in zip(shown, straight, strict=True) if is_straight]
    margin = 0.5
    for place, (left, bottom, right, top) in enumerate(boxes[:-1]):
        others = boxes[place + 1 :]
        apart = (others[:, 0] > right - margin) | (others[:, 2] < left + margin)
        apart |= (others[:, 1] > top - margin) | (others[:, 3] < bottom + margin)
        if not apart.all():
            other = shown[place + 1 + int((~apart).argmax())]
            raise AssertionError(f"{shown[place].get_text()!r} lies on {other.get_text()!r}")


def test_the_check_itself_sees_clipping_and_overlap() -> None:
    with style.house_style():
        figure = style.Page(200, 100).figure
        figure.text(0.9, 0.5, "too far to the right")
        with pytest.raises(AssertionError, match="cut off"):
            assert_readable(figure)
        figure = style.Page(400, 100).figure
        figure.text(0.1, 0.5, "one text")
        figure.text(0.12, 0.52, "another")
        with pytest.raises(AssertionError, match="lies on"):
            assert_readable(figure)


# ---------------------------------------------------------------------------------------------------------------------
# curves.png


@pytest.mark.parametrize(
    "rows",
    [
        history(1),
        history(2, validation=False),
        history(30, scale=1e6),
        history(31, lr=3e-7),
        history(1000, scale=1e-6),
        [{**row, "train_loss": value} for row, value in zip(history(3), (1.0, math.nan, math.inf), strict=True)],
        [{**row, "train_loss": math.nan, "val_loss": math.nan} for row in history(2)],
    ],
    ids=["one", "no validation", "large", "small rate", "long", "not finite", "never finite"],
)
def test_curves_are_readable(rows: list[dict[str, Any]]) -> None:
    with style.house_style():
        assert_readable(curves.curves_figure(rows, "2026-11-21_10-00-00_resnet18_fashion_mnist_with_a_long_$name$" * 2))


def test_curves_show_the_history(tmp_path: Path) -> None:
    rows = history(5)
    with style.house_style():
        figure = curves.curves_figure(rows, "run")
    shown = {
        (axes.get_title(loc="left"), line.get_label()): np.asarray(line.get_ydata()).tolist()
        for axes in figure.axes
        for line in axes.lines
    }
    assert set(shown) == {
        ("Loss", "training"),
        ("Loss", "validation"),
        ("Accuracy", "training"),
        ("Accuracy", "validation"),
        ("Learning rate", "learning rate"),
    }
    assert shown["Loss", "validation"] == [row["val_loss"] for row in rows]
    assert shown["Accuracy", "training"] == [row["train_accuracy"] for row in rows]
    assert shown["Learning rate", "learning rate"] == [row["lr"] for row in rows]
    assert "in epoch 5 of 5" in figure.texts[0].get_text()
    tied = [{**row, "val_accuracy": 0.5} for row in rows]  # then the lower loss is the better, as for best.pt
    assert curves._best_so_far(tied) == ": best validation accuracy 50.00%, in epoch 5 of 5"

    assert draw_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.size == (1350, 450)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def panels(figure: Figure) -> dict[str, tuple[str, set[str]]]:
    """By the title of each axes: what its vertical axis measures, and its lines."""
    return {
        axes.get_title(loc="left"): (axes.get_ylabel(), {str(line.get_label()) for line in axes.lines})
        for axes in figure.axes
    }


def test_one_axis_shows_one_quantity() -> None:
    rest = {"Accuracy": ("", {"training", "validation"}), "Learning rate": ("", {"learning rate"})}
    plain = "cross-entropy in nats"
    with style.house_style():
        both = {"Loss": (plain, {"training", "validation"})}
        assert panels(curves.curves_figure(history(3), "run")) == {**both, **rest}
        for other in ("MSELoss", "cross-entropy with class weights and label_smoothing=0.1 and some more words"):
            for rows in (history(1000, scale=1e6), history(1)):
                figure = curves.curves_figure(rows, "run", other)
                assert_readable(figure)
                found = panels(figure)
                assert found.pop("Validation loss") == (plain, {"validation"})
                measured, lines = found.pop("Training loss")
                assert measured.startswith(other[:7]) and lines == {"training"} and found == rest
                assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation"]
            figure = curves.curves_figure(history(3, validation=False), "run", other)
            assert_readable(figure)
            assert list(panels(figure)) == ["Training loss", "Accuracy", "Learning rate"]


@pytest.mark.parametrize(
    ("criterion", "transform", "said"),
    [
        (torch.nn.CrossEntropyLoss(), None, None),
        (torch.nn.CrossEntropyLoss(), "torch.nn.functional.one_hot", None),
        (torch.nn.CrossEntropyLoss(), "mine.smooth", "cross-entropy with labels by mine.smooth"),
        (torch.nn.CrossEntropyLoss(label_smoothing=0.1), None, "cross-entropy with label_smoothing=0.1"),
        (torch.nn.CrossEntropyLoss(torch.ones(3)), None, "cross-entropy with class weights"),
        (torch.nn.CrossEntropyLoss(reduction="sum"), None, "cross-entropy with reduction=sum"),
        (torch.nn.MSELoss(), "torch.nn.functional.one_hot", "MSELoss"),
    ],
)
def test_what_is_trained_with_has_a_name(criterion: torch.nn.Module, transform: str | None, said: str | None) -> None:
    assert loss_name(criterion, transform) == said


def test_a_run_says_what_its_losses_are(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(style, "draw", lambda path, make, *arguments: drawn.append(arguments[2:]) or True)
    told = "loss     cross-entropy with label_smoothing=0.1 in training, plain cross-entropy in validation and test"
    answer = call("train", "limit_batches=1", "epochs=1", "model.hidden=[4]", "criterion.label_smoothing=0.1")
    assert told in answer.out.splitlines()
    assert drawn == [("cross-entropy with label_smoothing=0.1",)]


def test_live_curves_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def draw(path: Path, make: Any, rows: Any, *_: Any) -> bool:
        drawn.append((now[0], len(rows)))
        now[0] += 0.2
        return True

    monkeypatch.setattr(curves.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(style, "draw", draw)
    rows = history(300)
    with LiveCurves(tmp_path / "curves.png") as live:
        for epoch in range(1, 301):
            now[0] += 1
            live.update(rows[:epoch])
    times = [at for at, _ in drawn]
    assert 0.2 * len(drawn[:-1]) <= 0.01 * now[0]
    assert times[0] >= 49 and all(20 <= later - earlier < 22.5 for earlier, later in pairwise(times[:-1]))
    assert drawn[-1][1] == 300, "the end is not shown"


@pytest.mark.parametrize("how", ["ended", "stopped"])
def test_live_curves_are_drawn_at_the_end(tmp_path: Path, how: str) -> None:
    try:
        with LiveCurves(tmp_path / "curves.png") as live:
            live.update(history(3))
            assert not (tmp_path / "curves.png").exists()
            if how == "stopped":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert how == "stopped"
    assert (tmp_path / "curves.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# confusion.png


@pytest.mark.parametrize("number", [2, 10, 20, 21, 100, 101, 300])
def test_confusion_is_readable(number: int) -> None:
    names = [f"{NAMES[place % 100]}{place // 100 or ''}" for place in range(number)]
    with style.house_style():
        figure = evaluation.confusion_figure(counts(number), names)
        assert_readable(figure)
    assert max(figure.get_size_inches() * style.DPI) <= 1400  # a screen shows it unscaled


def test_confusion_takes_odd_names_as_they_are() -> None:
    with style.house_style():
        figure = evaluation.confusion_figure(counts(10), ODD)
        assert_readable(figure)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels[0] == "a$b$" and "\n" not in labels[1]
        assert_readable(evaluation.confusion_figure(counts(60), ODD * 6))


def test_small_confusion_tells_counts_and_rates() -> None:
    matrix = np.array([[3, 1, 0], [0, 1000, 0], [0, 0, 0]])
    with style.house_style():
        figure = evaluation.confusion_figure(matrix, ["cat", "dog", "cow"])
    cells: dict[Any, list[str]] = {
        (text.get_position()[0], round(text.get_position()[1])): [] for text in figure.axes[0].texts
    }
    for text in figure.axes[0].texts:
        cells[text.get_position()[0], round(text.get_position()[1])].append(text.get_text())
    assert cells == {(0, 0): ["3", "75.0%"], (1, 0): ["1", "25.0%"], (1, 1): ["1,000", "100%"]}
    assert "1,003 of 1,004 right (99.90%)" in figure.texts[0].get_text()


def test_large_confusion_tells_counts_rates_and_names() -> None:
    matrix = np.diag(np.full(40, 50))
    matrix[7, 9] = 12
    names = [f"class {place}" for place in range(40)]
    with style.house_style():
        said = [text.get_text() for text in evaluation.confusion_figure(matrix, names).texts]
    at = said.index("class 7 → class 9")
    assert said[at - 2 : at] == ["12", _percent(12 / 62)]
    assert set(names) < set(said)  # each in the list of recalls
    at = said.index("class 7")
    assert said[at - 1] == "7" and said[at + 1 : at + 3] == [_percent(50 / 62), "50/62"]


def test_the_lowest_recalls_are_of_classes_that_have_samples() -> None:
    matrix = np.diag(np.full(30, 50))
    matrix[[0, 1, 5], [0, 1, 5]] = 0  # no sample of the first two, none right of the sixth
    matrix[5, 6], matrix[8, 9], matrix[20, 3] = 10, 150, 50
    with style.house_style():
        said = [
            text.get_text() for text in evaluation.confusion_figure(matrix, [f"class {n}" for n in range(30)]).texts
        ]
    at = said.index("Lowest recall") + 1
    lowest = ["0%", "class 5   0 of 10", "25.0%", "class 8   50 of 200", "50.0%", "class 20   50 of 100"]
    assert said[at : at + 8] == [*lowest, "100%", "class 2   50 of 50"]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def test_rates_are_not_rounded_to_none_or_all() -> None:
    assert [evaluation._percent(rate) for rate in (0, 1e-6, 0.5, 0.99999, 1)] == [
        "0%",
        "0.1%",
        "50.0%",
        "99.9%",
        "100%",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# mistakes.png


@pytest.mark.parametrize(("number", "channels"), [(0, 1), (1, 3), (7, 4), (30, 3)])
def test_mistakes_are_readable(number: int, channels: int) -> None:
    images = torch.rand(number, channels, 9, 12, generator=torch.Generator().manual_seed(0))
    places = [place % 10 for place in range(number)]
    with style.house_style():
        for names in (NAMES, ODD):
            figure = evaluation.mistakes_figure(images, places, places[::-1], [0.987] * number, names)
            assert_readable(figure)
            assert len(figure.axes) == min(24, number)


def test_mistakes_show_the_images_before_normalising() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normalize = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    with style.house_style():
        figure = evaluation.mistakes_figure(
            normalize(images.clone()), [0, 1, 2], [1, 2, 0], [0.9] * 3, "abc", [normalize]
        )
    for image, axes in zip(images, figure.axes, strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), image.permute(1, 2, 0).numpy(), atol=1e-6)


def test_mistakes_are_all_errors_and_the_images_of_the_most_confident() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 1, 2, 2, generator=generator)
    logits, labels = torch.randn(100, 5, generator=generator), torch.randint(5, (100,), generator=generator)
    logits[40:] = logits[20]  # equally sure: the earlier come first
    labels[40:] = (logits[20].argmax() + 1) % 5
    rows = []
    for place in range(100):  # by hand
        exponents = [math.exp(x) for x in logits[place].tolist()]
        found = exponents.index(max(exponents))
        if found != labels[place]:
            rows.append((-max(exponents) / sum(exponents), place, int(labels[place]), found))
    rows.sort(key=lambda row: (round(row[0], 6), row[1]))
    assert 60 < len(rows) < 100
    for size in (7, 100):
        mistakes = Mistakes(24)
        for part in torch.arange(100).split(size):
            mistakes.add(images[part], logits[part], labels[part])
        places, truths, found_classes, sure, pictures = mistakes.read()
        assert places.tolist() == [row[1] for row in rows]
        assert truths.tolist() == [row[2] for row in rows] and found_classes.tolist() == [row[3] for row in rows]
        assert sure.tolist() == pytest.approx([-row[0] for row in rows])
        assert torch.equal(pictures, images[places[:24]])


def test_no_mistakes_where_all_is_right() -> None:
    mistakes = Mistakes()
    labels = torch.arange(3)
    model = torch.nn.Flatten()
    evaluate(model, [(torch.eye(3).view(3, 1, 1, 3), labels)], 3, mistakes)
    assert [len(tensor) for tensor in mistakes.read()] == [0, 0, 0, 0, 0]


def test_mistakes_name_the_files() -> None:
    images, places = torch.zeros(8, 3, 4, 4), list(range(8))
    files = [f"IMG_{n:04}.jpeg" for n in range(7)] + ["a_very_long_name_of_a_photograph_of_the_sea_in_2021-07-13.png"]
    with style.house_style():
        figure = evaluation.mistakes_figure(images, places, places[::-1], [0.9] * 8, NAMES, names=files)
        assert_readable(figure)
        shown = [text.get_text() for text in figure.texts]
        assert set(files[:7]) < set(shown) and any(text.startswith("a_very") and "…" in text for text in shown)
        assert_readable(evaluation.mistakes_figure(images[:1], [0], [1], [0.9], NAMES, names=["sample 12345"]))


# ---------------------------------------------------------------------------------------------------------------------
# sweep.png


def runs_of(seeds: int, **settings: list[Any]) -> list[dict[str, Any]]:
    """The rows of a sweep over all combinations of settings (`optimizer__lr` is optimizer.lr)."""
    random, rows = np.random.default_rng(0), []
    for values in itertools.product(*settings.values(), range(seeds)):
        row = dict(zip([name.replace("__", ".") for name in settings] + ["seed"], values, strict=True))
        accuracy = float(random.random())
        common = {
            "run": f"{len(rows):02}",
            "state": "finished",
            "train_accuracy": None,
            "val_accuracy": accuracy,
            "test_accuracy": accuracy,
        }
        rows.append({**common, "model": "mlp", "dataset": "digits", "seconds": 1.0, **row})
    return rows


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "one run": runs_of(1),
    "only seeds": runs_of(3),
    "one setting": runs_of(1, optimizer__lr=[1e-3, 1e-2, 0.3]),
    "forty rates": runs_of(1, optimizer__lr=[10.0**-n for n in range(40)]),
    "numbers and names": runs_of(2, model=["mlp", "cnn"], batch_size=[16, 32, 64, 128, 256, 512, 1024]),
    "none and lists": runs_of(1, clip_grad_norm=[None, 0.5], model__hidden=[[512] * n for n in (1, 9, 20)]),
    "long names": runs_of(3, model=[name * 2 for name in NAMES[:6]], nesterov=[True, False]),
    "odd names": runs_of(1, model=ODD[:6], optimizer__lr=[0.1, 0.2]),
    "six settings": runs_of(1, **{f"optimizer__setting_{n}": [0.1 * n, 0.2] for n in range(2, 8)}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_is_readable(kind: str) -> None:
    rows = SWEEPS[kind]
    shown = compare.mean_over(rows, "seed") if len({row["seed"] for row in rows}) > 1 else rows
    with style.house_style():
        figure = sweep.sweep_figure(rows, compare.sorted_by(shown, "val_accuracy"), "val_accuracy", NAMES[0])
        assert_readable(figure)
    assert max(figure.get_size_inches() * style.DPI) <= 1920


def test_a_sweep_shows_every_run_where_it_belongs(tmp_path: Path) -> None:
    rows = runs_of(2, optimizer__lr=[1e-3, 0.1], model=["mlp", "cnn"])
    shown = compare.sorted_by(compare.mean_over(rows, "seed"), "val_accuracy")
    with style.house_style():
        listed, *settings = sweep.sweep_figure(rows, shown, "val_accuracy", "rates").axes
    places = [label.get_text() for label in listed.get_yticklabels()]
    dots = {
        (places[round(float(y))], float(x))
        for line in listed.lines
        if line.get_color() == style.BLUE
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
    }
    assert dots == {(f"model={row['model']}  lr={row['optimizer.lr']:g}", row["val_accuracy"]) for row in rows}
    means = [np.mean([x for name, x in dots if name == place]) for place in places]
    assert means == sorted(means, reverse=True)
    others = [line for line in listed.lines if line.get_marker() == "o" and line.get_color() != style.BLUE]
    rings = [np.asarray(line.get_xdata())[0] for line in others]
    assert rings == pytest.approx(means)
    by_name = {axes.get_title(loc="left"): axes for axes in settings}
    assert list(by_name) == ["model", "optimizer.lr"]
    [line] = by_name["optimizer.lr"].lines
    points = set(zip(line.get_xdata(), line.get_ydata(), strict=True))  # type: ignore[arg-type]
    assert points == {(row["optimizer.lr"], row["val_accuracy"]) for row in rows}

    assert style.draw(tmp_path / "sweep.png", sweep.sweep_figure, rows, shown, "val_accuracy", "rates")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_drawn_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None; from engine.pictures import style, sweep\n"
        "rows = [dict(run=str(n), state='finished', val_accuracy=n / 9, model='mlp', lr=n) for n in (1, 2)]\n"
        f"path = Path({str(tmp_path / 's.png')!r})\n"
        "assert style.draw(path, sweep.sweep_figure, rows, rows, 'val_accuracy', 'rates')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A bar


class Terminal(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.3), (True, 0.01), (False, 0.3)])
def test_long_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float) -> None:
    now = [0.0]
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", screen)

    def work() -> Iterator[int]:
        for number in range(10):
            now[0] += seconds
            yield number

    assert list(watched(work(), "validation", 10)) == list(range(10))
    if terminal and seconds > 0.1:
        assert "validation" in screen.getvalue() and "/10" in screen.getvalue()
    else:
        assert screen.getvalue() == ""


def test_evaluations_are_watched(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def watch(batches: Any, title: str, total: int) -> Any:
        seen.append((title, total))
        return batches

    for module in (train, evaluate_program, predict):
        monkeypatch.setattr(module, "watched", watch)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(style, "draw", lambda *_: True)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("a.png")
    assert call("train", "epochs=1", "batch_size=100", "model.hidden=[4]").code == 0
    assert call("evaluate").code == 0 and call("predict", "images=a.png").code == 0
    assert seen == [("validation", 2), ("test", 4), ("test split", 4), ("predicting", 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Never in the way


@pytest.mark.parametrize("trouble", ["missing", "broken", "unwritable"])
def test_a_picture_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    path = tmp_path / "curves.png"
    if trouble == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    elif trouble == "broken":
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    else:
        path = tmp_path / "no such folder" / "curves.png"
    with LiveCurves(path, share=1e9) as live:
        for epochs in (1, 2, 3):
            live.update(history(epochs))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} was not drawn: ")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw_curves(history(1), tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def half_written(self: Figure, file: io.BytesIO, **_: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", half_written)
    assert not draw_curves(history(2), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_settings_of_matplotlib_are_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib

    assert draw_curves(history(2), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 33, "axes.facecolor": "red", "savefig.dpi": 300}):
        assert draw_curves(history(2), tmp_path / "plain2.png")
        assert matplotlib.rcParams["font.size"] == 33
    with Image.open(tmp_path / "plain2.png") as image:
        assert image.size == (1350, 450)
        assert (255, 0, 0, 255) not in {color for _, color in image.getcolors(1 << 20)}


def test_matplotlib_is_imported_when_drawn_and_pyplot_never(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from engine.pictures import curves, style\n"
        "assert 'matplotlib' not in sys.modules\n"
        "row = dict(epoch=1, train_loss=1., train_accuracy=.5, val_loss=None, val_accuracy=None, lr=.1)\n"
        f"assert style.draw(Path({str(tmp_path / 'c.png')!r}), curves.curves_figure, [row], 'run')\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_of_two_evaluations_in_a_folder_do_not_meet() -> None:
    assert evaluation.beside(Path("run/evaluation.json"), "confusion") == Path("run/confusion.png")
    assert evaluation.beside(Path("run/other.json"), "confusion") == Path("run/other_confusion.png")


def without_matplotlib(_: str) -> None:
    """Run in the process of the entry point, before it starts."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]


def test_train_and_evaluate_draw_and_go_on_without_matplotlib(tmp_path: Path) -> None:
    from processes import start

    few = ("limit_batches=2", "epochs=2", "device=cpu")
    drawn = run("train", *few, "name=drawn", cwd=tmp_path, pictures=True)
    assert drawn.wait() == 0, drawn.err
    assert run("evaluate", cwd=tmp_path, pictures=True).wait() == 0
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "checkpoints" / "drawn" / name) as image:
            image.load()
    bare = start("train", *few, "name=bare", cwd=tmp_path, before=without_matplotlib, pictures=True)
    assert bare.wait() == 0, bare.err
    told = [line for line in bare.out.splitlines() if "was not drawn" in line]
    assert [line.split(" ")[0].rpartition("/")[2] for line in told][:1] == ["curves.png"]
    assert (tmp_path / "checkpoints/bare/summary.json").exists()
    assert "curves.png was not drawn" in (tmp_path / "checkpoints/bare/train.log").read_text()

    bare = start("evaluate", cwd=tmp_path, before=without_matplotlib, pictures=True)
    assert bare.wait() == 0 and (tmp_path / "checkpoints/bare/evaluation.json").exists()
    assert bare.err.count("was not drawn") == len(bare.err.splitlines()) == 2 and "pictures" not in bare.out
