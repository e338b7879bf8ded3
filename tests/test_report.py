"""Pictures: nothing clips or overlaps, they show what they should, and never make a run fail or wait."""

from __future__ import annotations

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
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from processes import run

from engine import report
from engine.augment import Normalize
from engine.metrics import Mistakes, evaluate

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
    width, height = figure.get_size_inches() * report.DPI
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
    with report.house_style():
        figure = report._new_figure(200, 100)
        figure.text(0.9, 0.5, "too far to the right")
        with pytest.raises(AssertionError, match="cut off"):
            assert_readable(figure)
        figure = report._new_figure(400, 100)
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
    with report.house_style():
        assert_readable(report.curves_figure(rows, "2026-11-21_10-00-00_resnet18_fashion_mnist_with_a_long_$name$" * 2))


def test_curves_show_the_history(tmp_path: Path) -> None:
    rows = history(5)
    with report.house_style():
        figure = report.curves_figure(rows, "run")
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
    assert report._best_so_far(tied) == ": best validation accuracy 50.00%, in epoch 5 of 5"

    assert report.curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.size == (1350, 450)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_live_curves_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def draw(rows: Any, path: Path) -> bool:
        drawn.append((now[0], len(rows)))
        now[0] += 0.2
        return True

    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report, "curves", draw)
    rows = history(300)
    with report.LiveCurves(tmp_path / "curves.png") as live:
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
        with report.LiveCurves(tmp_path / "curves.png") as live:
            live.update(history(3))
            assert not (tmp_path / "curves.png").exists()
            if how == "stopped":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert how == "stopped"
    assert (tmp_path / "curves.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# confusion.png


@pytest.mark.parametrize("number", [2, 10, 20, 21, 47, 100, 101, 300])
def test_confusion_is_readable(number: int) -> None:
    names = [f"{NAMES[place % 100]}{place // 100 or ''}" for place in range(number)]
    with report.house_style():
        figure = report.confusion_figure(counts(number), names)
        assert_readable(figure)
    assert max(figure.get_size_inches() * report.DPI) <= 1400  # a screen shows it unscaled


def test_confusion_takes_odd_names_as_they_are() -> None:
    with report.house_style():
        figure = report.confusion_figure(counts(10), ODD)
        assert_readable(figure)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels[0] == "a$b$" and "\n" not in labels[1]
        assert_readable(report.confusion_figure(counts(60), ODD * 6))


def test_small_confusion_tells_counts_and_rates() -> None:
    matrix = np.array([[3, 1, 0], [0, 1000, 0], [0, 0, 0]])
    with report.house_style():
        figure = report.confusion_figure(matrix, ["cat", "dog", "cow"])
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
    with report.house_style():
        said = [text.get_text() for text in report.confusion_figure(matrix, names).texts]
    at = said.index("class 7 → class 9")
    assert said[at - 2 : at] == ["12", _percent(12 / 62)]
    assert set(names) < set(said)  # each in the list of recalls
    at = said.index("class 7")
    assert said[at - 1] == "7" and said[at + 1 : at + 3] == [_percent(50 / 62), "50/62"]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def test_rates_are_not_rounded_to_none_or_all() -> None:
    assert [report._percent(rate) for rate in (0, 1e-6, 0.5, 0.99999, 1)] == ["0%", "0.1%", "50.0%", "99.9%", "100%"]


# ---------------------------------------------------------------------------------------------------------------------
# mistakes.png


@pytest.mark.parametrize(("number", "channels"), [(0, 1), (1, 3), (7, 4), (30, 3)])
def test_mistakes_are_readable(number: int, channels: int) -> None:
    images = torch.rand(number, channels, 9, 12, generator=torch.Generator().manual_seed(0))
    places = [place % 10 for place in range(number)]
    with report.house_style():
        for names in (NAMES, ODD):
            figure = report.mistakes_figure(images, places, places[::-1], [0.987] * number, names)
            assert_readable(figure)
            assert len(figure.axes) == min(24, number)


def test_mistakes_show_the_images_before_normalising() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normalize = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    with report.house_style():
        figure = report.mistakes_figure(normalize(images.clone()), [0, 1, 2], [1, 2, 0], [0.9] * 3, "abc", [normalize])
    for image, axes in zip(images, figure.axes, strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), image.permute(1, 2, 0).numpy(), atol=1e-6)


def test_mistakes_are_the_most_confident_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 1, 2, 2, generator=generator)
    logits, labels = torch.randn(100, 5, generator=generator), torch.randint(5, (100,), generator=generator)
    probabilities, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    expected = wrong[probabilities[wrong].argsort(descending=True)][:24]
    for size in (7, 100):
        mistakes = Mistakes(24)
        for part in torch.arange(100).split(size):
            mistakes.add(images[part], logits[part], labels[part])
        found_images, truths, found, sure = mistakes.read()
        assert torch.equal(found_images, images[expected]) and torch.equal(truths, labels[expected])
        assert torch.equal(found, predictions[expected]) and torch.equal(sure, probabilities[expected])


def test_no_mistakes_where_all_is_right() -> None:
    mistakes = Mistakes()
    labels = torch.arange(3)
    model = torch.nn.Flatten()
    evaluate(model, [(torch.eye(3).view(3, 1, 1, 3), labels)], 3, mistakes)
    assert [len(tensor) for tensor in mistakes.read()] == [0, 0, 0, 0]


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
    with report.LiveCurves(path, share=1e9) as live:
        for epochs in (1, 2, 3):
            live.update(history(epochs))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} was not drawn: ")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.curves(history(1), tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def half_written(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", half_written)
    assert not report.curves(history(2), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_settings_of_matplotlib_are_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib

    assert report.curves(history(2), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 33, "axes.facecolor": "red", "savefig.dpi": 300}):
        assert report.curves(history(2), tmp_path / "plain2.png")
        assert matplotlib.rcParams["font.size"] == 33
    with Image.open(tmp_path / "plain2.png") as image:
        assert image.size == (1350, 450)
        assert (255, 0, 0, 255) not in {color for _, color in image.getcolors(1 << 20)}


def test_matplotlib_is_imported_when_drawn_and_pyplot_never(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from engine import report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "row = dict(epoch=1, train_loss=1., train_accuracy=.5, val_loss=None, val_accuracy=None, lr=.1)\n"
        f"assert report.curves([row], Path({str(tmp_path / 'c.png')!r}))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_of_two_evaluations_in_a_folder_do_not_meet() -> None:
    assert report.beside(Path("run/evaluation.json"), "confusion") == Path("run/confusion.png")
    assert report.beside(Path("run/other.json"), "confusion") == Path("run/other_confusion.png")


def without_matplotlib(_: str) -> None:
    """Run in the process of the entry point, before it starts."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]


def test_train_and_evaluate_draw_and_go_on_without_matplotlib(tmp_path: Path) -> None:
    from processes import start

    few = ("limit_batches=2", "epochs=2", "device=cpu")
    drawn = run("train", *few, "name=drawn", cwd=tmp_path)
    assert drawn.wait() == 0, drawn.err
    assert run("evaluate", cwd=tmp_path).wait() == 0
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "checkpoints" / "drawn" / name) as image:
            image.load()
    bare = start("train", *few, "name=bare", cwd=tmp_path, before=without_matplotlib)
    assert bare.wait() == 0, bare.err
    told = [line for line in bare.out.splitlines() if "was not drawn" in line]
    assert [line.split(" ")[0].rpartition("/")[2] for line in told][:1] == ["curves.png"]
    assert (tmp_path / "checkpoints/bare/summary.json").exists()
    assert "curves.png was not drawn" in (tmp_path / "checkpoints/bare/train.log").read_text()

    bare = start("evaluate", cwd=tmp_path, before=without_matplotlib)
    assert bare.wait() == 0 and (tmp_path / "checkpoints/bare/evaluation.json").exists()
    assert bare.err.count("was not drawn") == len(bare.err.splitlines()) == 2 and "pictures" not in bare.out
