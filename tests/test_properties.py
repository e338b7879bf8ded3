"""Where inputs are many: what holds for all of them, tried on fifty that Hypothesis makes up, the same every time."""

from __future__ import annotations

import csv
import io
import math
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[test]'")

import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as tried
from hypothesis import strategies as st
from splitmix import numbers, order_of

import datasets
from engine import files
from engine.config import Setting, read_settings
from engine.data.batches import Batches
from engine.data.draws import Draws
from engine.data.splits import Split, load_splits
from engine.errors import RequestError, interrupt_behind, one_line, printable

slow = [HealthCheck.too_slow]  # as on a busy machine
fifty = tried(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=slow)
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Draws and batches


@fifty
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6), place=st.integers(0, 30))
def test_any_window_shows_what_its_samples_draw_alone(data: st.DataObject, seed: int, epoch: int, place: int) -> None:
    index = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=12))
    begin = data.draw(st.integers(0, len(index) - 1))
    count = data.draw(st.integers(1, len(index) - begin))
    calls = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))  # numbers asked for, call by call
    draws = Draws(seed, epoch, torch.tensor(index)).window(begin, count).at(place)
    found = torch.cat([draws.uniform(n) for n in calls], 1).tolist()
    assert found == [numbers(seed, epoch, i, place, sum(calls)) for i in index[begin : begin + count]]


@fifty
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 6),
    drop_last=st.booleans(),
    start=st.integers(0, 9),
    epoch=st.integers(1, 99),
)
def test_batches_of_an_epoch_from_any_start(
    count: int, batch_size: int, limit: int | None, drop_last: bool, start: int, epoch: int
) -> None:
    """Each image has its number as its value, so a batch says which samples it has."""
    assume(not drop_last or count >= batch_size)
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    split = Split((images, torch.arange(count)), torch.arange(count), num_classes=count)
    run = {"batch_size": batch_size, "seed": 3, "shuffle": True, "drop_last": drop_last, "limit_batches": limit}
    batches = Batches(split, [], CPU, training=True, **run)
    order = order_of(3, epoch, count)
    expected = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    expected = [batch for batch in expected if len(batch) == batch_size or not drop_last][:limit]
    assert len(batches) == len(expected) and batches.num_samples == sum(map(len, expected))
    found = list(batches.epoch(epoch, start=start))
    assert [labels.tolist() for _, labels in found] == expected[start:]
    for pixels, labels in found:
        assert torch.equal(pixels.flatten(), labels.float() / 255)


# ---------------------------------------------------------------------------------------------------------------------
# Splits

LABELS: list[int] = []


def labelled() -> datasets.ImageData:
    labels = torch.tensor(LABELS)
    part = (torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    return datasets.ImageData(part, part, [str(label) for label in range(4)])


@fifty
@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=120),
    fraction=st.floats(0.0, 0.9),
    limit=st.none() | st.integers(1, 150),
)
def test_splits_part_the_samples(labels: list[int], fraction: float, limit: int | None) -> None:
    assume(len(set(labels)) > 1)
    LABELS[:] = labels
    own = {"val_fraction": fraction, "target_transform": None, "train_transforms": [], "eval_transforms": []}
    own |= {"steps_per_epoch": None, "_target_": f"{__name__}.labelled"}

    def members(limit: int | None) -> dict[str, list[int]]:
        splits, _ = load_splits({**own, "limit": limit})
        return {name: split.indices.tolist() for name, split in splits.items() if split.indices is not None}

    try:
        whole = members(None)
    except RequestError:  # so few that nothing would be left for training
        assert max(labels.count(label) for label in range(4)) * (1 - fraction) < 4
        return
    val = whole.get("val", [])
    assert sorted(whole["train"] + val) == whole["test"] == list(range(len(labels)))
    for label in range(4):
        share = sum(labels[i] == label for i in val)
        assert abs(share - fraction * labels.count(label)) <= 1  # rounded, whichever way
    limited = members(limit)
    assert limited == members(limit) and limited.keys() == whole.keys()
    for name, chosen in limited.items():
        assert len(set(chosen)) == len(chosen) == min(len(whole[name]), limit or len(labels))
        assert set(chosen) <= set(whole[name])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def texts(others: str) -> st.SearchStrategy[str]:
    """What may stand in a cell: any character but control characters, line ends and these others."""
    allowed = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters=others)
    return st.text(allowed, min_size=1, max_size=12).filter(lambda text: text.strip() == text)


@st.composite
def listings(draw: st.DrawFn) -> tuple[str, list[tuple[str, str]]]:
    """A delimiter, and file names with labels; names and labels may hold the delimiter, quotes and spaces."""
    delimiter = draw(st.sampled_from(",;\t"))
    others = ",;\t".replace(delimiter, "") + "/" + ("\t" if delimiter == "\t" else "")
    names = draw(st.lists(texts(others), min_size=4, max_size=6, unique_by=lambda n: unicodedata.normalize("NFC", n)))
    classes = [f"label {draw(texts(others))}" for _ in range(2)]
    labels = [classes[number % 2] for number in range(len(names))]
    assume(classes[0] != classes[1] and not {".", ".."} & set(names))
    return delimiter, list(zip(names, labels, strict=True))


@fifty
@given(
    listing=listings(),
    header=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_a_list_of_images_that_was_written_is_read(
    listing: tuple[str, list[tuple[str, str]]], header: bool, quoting: Any, end: str, mark: str
) -> None:
    delimiter, rows = listing
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting, lineterminator=end)
    if header:
        writer.writerow(["file name", "label"])
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for name, _ in rows:
            (images / name).touch()
        file = Path(folder, "list.csv")
        file.write_bytes((mark + written.getvalue()).encode())
        data = datasets.csv_images(str(file), str(images), str(file), 0.0, None, 3, 100)
    assert list(data.classes) == sorted({label for _, label in rows})
    for part in (data.train, data.test):
        assert isinstance(part, datasets.ImageFiles)
        assert [Path(path).name for path in part.paths.tolist()] == [name for name, _ in rows]
        assert [data.classes[label] for label in part.targets.tolist()] == [label for _, label in rows]


@fifty
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), rest=st.integers(-1, 1), compressed=st.booleans())
def test_an_idx_file_that_was_written_is_read(shape: list[int], rest: int, compressed: bool) -> None:
    import gzip

    values = bytes(number * 37 % 256 for number in range(math.prod(shape)))
    content = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape) + values
    content = content[:rest] if rest < 0 else content + b"\0" * rest
    assume(rest >= 0 or values)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a-idx-ubyte.gz" if compressed else "a-idx-ubyte")
        file.write_bytes(gzip.compress(content) if compressed else content)
        if rest:
            with pytest.raises(RequestError, match="damaged"):
                datasets.read_idx(file)
            return
        assume(values)  # an empty one has no bytes to take
        found = datasets.read_idx(file)
    assert list(found.shape) == shape and bytes(found.flatten().tolist()) == values


# ---------------------------------------------------------------------------------------------------------------------
# The grammar of settings


def small() -> st.SearchStrategy[float]:
    return st.sampled_from([-2, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 3, 7])


@st.composite
def rules(draw: st.DrawFn) -> tuple[str, Any]:
    """A rule as it is written, and whether a number obeys it."""
    kind = draw(st.sampled_from(["none", ">=", ">", "in"]))
    low = draw(small())
    if kind == "none":
        return "", lambda value: True
    if kind != "in":
        return f" {kind} {low}", lambda value: value > low or (kind == ">=" and value == low)
    high = low + draw(st.sampled_from([0.5, 1, 4]))
    left, right = draw(st.sampled_from("[(")), draw(st.sampled_from("])"))
    inside = {
        "[]": lambda v: low <= v <= high,
        "[)": lambda v: low <= v < high,
        "(]": lambda v: low < v <= high,
        "()": lambda v: low < v < high,
    }
    return f" in {left}{low}, {high}{right}", inside[left + right]


def numbers_or_not() -> st.SearchStrategy[Any]:
    odd = st.sampled_from([math.nan, math.inf, -math.inf, True, False, None, "1", "abc", "", {}, {"a": 1}])
    return small() | st.integers(-3, 8) | odd


WORDS = ["cpu", "3", "cuda:1", "0.5", "a-b"]


@fifty
@given(data=st.data(), nullable=st.booleans(), rule=rules(), count=st.none() | st.integers(1, 3))
def test_a_setting_takes_what_its_comment_says(
    data: st.DataObject, nullable: bool, rule: tuple[str, Any], count: int | None
) -> None:
    written, obeys = rule
    kind = data.draw(st.sampled_from(["int", "float", "bool", "str", "list", "str or list of str", "one of"]))
    element = data.draw(st.sampled_from(["int", "float"]))

    def is_number(value: Any, kind: str) -> bool:
        allowed = (int,) if kind == "int" else (int, float)
        return type(value) in allowed and math.isfinite(value) and obeys(value)

    def is_text(value: Any) -> bool:
        return type(value) in (str, int, float)

    if kind in ("int", "float"):
        comment, right = f"{kind}{written}", lambda value: is_number(value, kind)
    elif kind == "list":
        comment = f"list of {f'{count} ' if count else ''}{element}{written}"

        def right(value: Any) -> bool:
            of_this_length = isinstance(value, list) and count in (None, len(value))
            return of_this_length and all(is_number(item, element) for item in value)

    elif kind == "one of":
        comment, right = "str one of cpu, 3, a-b", lambda value: is_text(value) and str(value) in ("cpu", "3", "a-b")
    elif kind == "bool":
        comment, right = "bool", lambda value: type(value) is bool
    elif kind == "str":
        comment, right = "str", lambda value: is_text(value) and (not isinstance(value, float) or math.isfinite(value))
    else:
        comment = kind
        right = lambda value: all(map(is_text, value)) if isinstance(value, list) else is_text(value)  # noqa: E731

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "group.yaml")
        file.write_text(f"# first\nother: 1\nname: 5  # {comment}{' or null' * nullable}: what it is for: this\n")
        setting = read_settings(file, "group.")["group.name"]
    assert setting.default == 5 and setting.nullable is nullable and setting.meaning == "what it is for: this"

    one = numbers_or_not() | st.sampled_from(WORDS)
    for value in data.draw(st.lists(one | st.lists(one, max_size=4), min_size=1, max_size=12)):
        expected = nullable if value is None else right(value)
        assert setting.accepts(value) is expected or setting.accepts(value) == expected, (comment, value)


def test_the_ends_of_a_range() -> None:
    """By hand, as they are what is got wrong."""
    table = {
        ">= 1": ([1, 2], [0, 0.999]),
        "> 0": ([1e-9, 1], [0, -1]),
        "in [0, 1)": ([0, 0.999], [-1e-9, 1]),
        "in (0, 1]": ([1e-9, 1], [0, 1.001]),
        "in [0, 1]": ([0, 1], [-0.001, 1.001]),
        "in (0, 1)": ([0.5], [0, 1]),
    }
    for rule, (good, bad) in table.items():
        setting = Setting("x", 1, "float", rule, False, "")
        assert all(setting.accepts(value) for value in good) and not any(setting.accepts(value) for value in bad)


# ---------------------------------------------------------------------------------------------------------------------
# Printing

HARMFUL = "\x00\x07\x08\x1b\x9b\r\n\x0b\x0c\x1c\x85\u2028\u2029\u202e\u2066\u200e\ufeff\x7f\udc80"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\r\n\x00", "a\\x1b[2J\\r\\n\\x00"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),  # turns the direction of writing
        ("a\u2066b\u200fc\ufeff", "a\\u2066b\\u200fc\\ufeff"),
        ("a\u2028b\udcffc", "a\\u2028b\\udcffc"),
        ("né 日本 \u3000\u200d🙂", "né 日本 \u3000\u200d🙂"),
    ],
)
def test_what_is_printed_as_it_is_and_what_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@fifty
@given(text=st.text(st.characters() | st.sampled_from(HARMFUL), max_size=60))
def test_what_is_printed_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1 and not set(shown) & set(HARMFUL)
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in shown)
    shown.encode("utf-8")
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text
    for limit in (20, 300):
        line = one_line(ValueError(text), limit)
        assert 0 < len(line) <= limit and len(line.splitlines()) == 1 and printable(line) == line


@pytest.mark.parametrize("behind", ["__cause__", "__context__"])
@pytest.mark.parametrize(
    ("interrupt", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit(2), None)]
)
def test_an_interrupt_is_found_behind_errors_that_lead_in_a_circle(
    behind: str, interrupt: BaseException, code: int | None
) -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__context__ = second, first
    assert interrupt_behind(first) is None
    setattr(second if behind == "__cause__" else first, behind, interrupt)
    assert interrupt_behind(first) == code and interrupt_behind(second) == code


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert files.read_bytes(tmp_path / "a", 10) == b"0123456789"
    with pytest.raises(OSError, match="larger than the 9 bytes"):
        files.read_bytes(tmp_path / "a", 9)
