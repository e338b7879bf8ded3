"""Comparing runs: one table of what checkpoints/ holds, read from the files of each run, without torch.

    python evaluate.py --runs model=cnn 'val_accuracy>0.9' sort=seconds

A row is a dictionary: what the run came to under the names of `RESULTS`, the option chosen of each group under the
group's name, and every setting under its dotted name. Whatever is a key can be shown, filtered and sorted by.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import fnmatch
import io
import json
import math
import operator
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine import files, terminal
from engine.config import as_typed, leaves
from engine.errors import RequestError, RunError, counted, did_you_mean, one_line, shortened
from engine.run import runs, trust

Row = dict[str, Any]

RESULTS = (
    "run", "state", "train_accuracy", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch", "epoch",
    "seconds",
)  # fmt: skip
REPEATED = ("seed", "dataset.fold")  # runs that differ in these alone are repetitions: a sweep's table has their mean
ALWAYS = ("model", "dataset")  # shown even where all runs agree
MOST_METRICS, MOST_EPOCHS = 1 << 23, 100_000  # bytes and lines of a metrics.csv
AVERAGED = ("train_accuracy", "val_accuracy", "test_accuracy")
NOT_COMPARED = ("logger", "hparams_search")  # groups that change nothing about what a run comes to by themselves
NOT_SETTINGS = (*RESULTS, "reason", "name", "runs", *(f"{name}_std" for name in AVERAGED))
WIDEST, WIDEST_LINE = 32, 100  # characters of a cell of the table; of a run's name, which people copy, and a reason
OPTIONS = ("columns", "sort", "mean", "output")
USAGE = """usage: python evaluate.py --runs [COLUMN=VALUE ...] [columns=...] [sort=COLUMN] [mean=seed] [output=FILE.csv]

The table of all runs: what differs in their configurations and what they came to, best first.
A column is a result (run, state, val_accuracy, test_accuracy, seconds), a group (model) or a setting (optimizer.lr).
A terminal that is too narrow gets fewer columns than there are; `columns=` chooses them, and the CSV file has them all.

Examples:
  python evaluate.py --runs
  python evaluate.py --runs model=cnn,mlp state=finished sort=-seconds
  python evaluate.py --runs 'val_accuracy>0.9' 'run=lr_search/*' mean=seed
  python evaluate.py --runs dataset=digits output=runs.csv
  python evaluate.py --runs columns=run,lr,val_accuracy sort=lr"""


# ---------------------------------------------------------------------------------------------------------------------
# From files to rows


def read_runs(root: Path) -> list[Row]:
    """A row for each run below `root`, in sweeps too, oldest first."""
    return [row for row in (run_row(d, root) for d in runs.all_directories(root)) if row is not None]


def run_row(directory: Path, root: Path) -> Row | None:
    """The row of one run; None where there is none (any more).

    A file of it that cannot be read costs what it would have told; the row's state is `damaged` and its reason why.
    """
    row: Row = {"run": directory.relative_to(root).as_posix(), "state": "", **dict.fromkeys(RESULTS[2:])}
    there, damages = [], []
    for name, read in ((".hydra/config.yaml", _configuration), ("metrics.csv", _metrics), ("summary.json", _summary)):
        try:
            found = read(directory / name)
            for key in AVERAGED:
                if found.get(key) is not None and not 0 <= found[key] <= 1:
                    raise ValueError(f"{key} is not between 0 and 1")
            there.append(name)
            row |= found
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            damages.append(f"{name}: {one_line(error, 120)}")
    if not there and not damages:
        return None
    row["state"], row["reason"] = _state(directory, finished="summary.json" in there)
    if damages:
        row["state"], row["reason"] = "damaged", "; ".join(damages)
    return row


def _configuration(file: Path) -> Row:
    """The option chosen of each group, and every setting."""
    config = trust.parse_config(files.read_text(file))
    choices = {group: option for group, option in config.pop("choices").items() if option is not None}
    settings = {name: value for name, value in leaves(config) if not name.endswith("_target_")}
    return {
        name: value
        for name, value in {**settings, **choices}.items()
        if name.partition(".")[0] not in NOT_COMPARED and (name == "name" or name not in NOT_SETTINGS)
    }


def _summary(file: Path) -> Row:
    """What summary.json tells of a run that has finished."""
    summary = json.loads(files.read_text(file))
    if not isinstance(summary, dict) or "test_accuracy" not in summary:
        raise ValueError("it tells no test accuracy")
    found = {key: summary[key] for key in RESULTS[2:] if summary.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, (bool, str)) or as_number(value) is None:
            raise ValueError(f"{key} is no finite number")
    return found


def _state(directory: Path, finished: bool) -> tuple[str, str]:
    """How a run stands, and why."""
    if finished:
        return "finished", ""
    if _is_running(directory):
        return "running", ""
    end = files.read_json(directory / "end.json")  # not there where the process was killed
    state = end.get("state")
    return state if state in ("failed", "stopped") else "stopped", str(end.get("reason", ""))


def _is_running(directory: Path) -> bool:
    """Whether a process holds the lock of the run."""
    with contextlib.suppress(OSError):  # it is somebody else's
        if (directory / ".lock").is_file():
            with (directory / ".lock").open("r+", encoding="utf-8") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
    return False


def _metrics(file: Path) -> Row:
    """What metrics.csv tells of a run that may not have come to its end."""
    text = files.read_text(file, MOST_METRICS)
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    if text.count("\n") > MOST_EPOCHS:
        raise ValueError(f"it has more than {MOST_EPOCHS:,} lines")
    epochs = list(csv.DictReader(io.StringIO(text, newline="")))
    result: Row = {"epoch": len(epochs), "seconds": round(sum(as_number(e.get("seconds")) or 0 for e in epochs), 3)}
    if epochs:  # without a validation part the last one counts
        measured = [epoch for epoch in epochs if as_number(epoch.get("val_accuracy")) is not None]
        best = max(measured, key=_goodness, default=epochs[-1])
        result |= {key: as_number(best.get(key)) for key in ("train_accuracy", "val_accuracy", "val_loss")}
        result["best_epoch"] = int(as_number(best.get("epoch")) or 0)
    return result


def _goodness(epoch: dict[str, str]) -> tuple[float, float]:
    return as_number(epoch["val_accuracy"]) or 0, -(as_number(epoch.get("val_loss")) or 0)


def as_number(text: Any) -> float | None:
    """A cell as a number, None where it is none."""
    try:
        number = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows: which columns, which rows, in which order


def differing(rows: Sequence[Row]) -> list[str]:
    """The groups and settings that are not the same in all rows.

    A group's settings are compared between runs that chose the same option: that a CNN has a width and an MLP has
    none is said by the column `model`. A keyword that was added to some of them is no setting of the others.
    """
    rows = [row for row in rows if "model" in row]  # a damaged one may tell nothing of its settings
    names = dict.fromkeys(key for row in rows for key in row if key not in NOT_SETTINGS)
    found = []
    for name in names:
        group, dot, _ = name.partition(".")
        values = {(str(row.get(group)) if dot else "", repr(row[name])) for row in rows if name in row}
        options = {option for option, _ in values}
        some_lack = name not in ALWAYS and any(  # as of an experiment
            name not in row and (not dot or (group in row and str(row[group]) in options)) for row in rows
        )
        if some_lack or len(values) > len(options):
            found.append(name)
    return found


def column_named(name: str, rows: Sequence[Row]) -> str:
    """The column that was typed, by its whole name or by its last part where that is unique (`lr`).

    Raises:
        RequestError: there is none of this name, or more than one.
    """
    known = dict.fromkeys(key for row in rows for key in row)
    if name in known or not rows:
        return name
    ending = [key for key in known if key.rpartition(".")[2] == name]
    if len(ending) == 1:
        return ending[0]
    if len(ending) > 1:
        raise RequestError(f"--runs: {name!r} may be {shortened(' or '.join(ending), 200)}; type the whole name")
    raise RequestError(f"--runs: no run has a column {shortened(name)!r}{did_you_mean(name, known)}")


_CONDITION = re.compile(r"(?P<name>[\w./@-]+?)\s*(?P<operator>>=|<=|!=|=|>|<)\s*(?P<value>.*)", re.DOTALL)
_ORDER = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


def matching(rows: Sequence[Row], conditions: Iterable[str]) -> list[Row]:
    """The rows that fulfil all conditions: `model=cnn,mlp`, `run=lr_*`, `state!=failed`, `val_accuracy>0.9`.

    Raises:
        RequestError: a condition is not understood or names no column.
    """
    kept = list(rows)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        if not found:
            raise RequestError(f"--runs {condition}: expected COLUMN=VALUE, COLUMN>NUMBER, sort=COLUMN or output=FILE")
        column, sign, value = column_named(found["name"], rows), found["operator"], found["value"]
        if sign in _ORDER:
            bound = as_number(value)
            if bound is None:
                raise RequestError(f"--runs {condition}: {value!r} is not a number")
            numbers = [(row, as_number(row.get(column))) for row in kept]
            kept = [row for row, number in numbers if number is not None and _ORDER[sign](number, bound)]
        else:
            kept = [row for row in kept if _is_one_of(row.get(column), value) == (sign == "=")]
    return kept


def _is_one_of(value: Any, wanted: str) -> bool:
    """Whether a cell is what was typed; commas separate alternatives unless they are part of the value itself."""
    for alternative in (wanted, *wanted.split(",")):
        number = as_number(alternative)
        if alternative == cell(value) or fnmatch.fnmatchcase(cell(value), alternative):
            return True
        if (number is not None and number == as_number(value)) or (value is None and alternative == ""):
            return True
    return False


def sorted_by(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows in the order of a column, accuracies from the best down, others from the smallest up; a leading - turns it.

    Rows without a value come last either way.
    """
    name = column_named(column.removeprefix("-"), rows)
    down = name.endswith("accuracy") != column.startswith("-")

    def key(row: Row) -> tuple[bool, float, str]:
        number = as_number(row[name])
        return number is None, number or 0.0, cell(row[name])

    present = sorted((row for row in rows if row.get(name) is not None), key=key, reverse=down)
    return present + [row for row in rows if row.get(name) is None]


def mean_over(rows: Sequence[Row], *settings: str) -> list[Row]:
    """One row for the finished runs that differ only in `settings`: their number, mean, standard deviation (n - 1)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["state"] == "finished":
            own = sorted((key, repr(v)) for key, v in row.items() if key not in (*NOT_SETTINGS, *settings))
            groups.setdefault(repr(own), []).append(row)
    means = []
    for group in groups.values():
        mean = {key: value for key, value in group[0].items() if key not in (*RESULTS, *settings)}
        mean["runs"] = len(group)
        for key in AVERAGED:
            values = [row[key] for row in group if row[key] is not None]
            mean[key] = statistics.fmean(values) if values else None
            mean[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        mean["seconds"] = round(statistics.fmean(row["seconds"] or 0 for row in group), 3)
        means.append(mean)
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Rows to text


def cell(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"[{','.join(map(cell, value))}]" if isinstance(value, list) else as_typed(value)


def chosen_by(rows: Sequence[Row]) -> str:
    """The accuracy that says which run is the best: validation's, and that of training where none was validated."""
    return "val_accuracy" if any(row.get("val_accuracy") is not None for row in rows) else "train_accuracy"


def shown_columns(rows: Sequence[Row], always: Sequence[str] = ALWAYS) -> list[str]:
    """The columns of the table, left to right: the run, `always` and what differs, what came out."""
    settings = [*always, *(name for name in differing(rows) if name not in always)]
    head = [key for key in ("run", "state") if any(key in row for row in rows)]
    results = ("runs", "best_epoch", chosen_by(rows), "test_accuracy", "seconds")
    tail = [key for key in results if any(key in row for row in rows)]
    return [*head, *settings, *tail]


def table(rows: Sequence[Row], columns: Sequence[str], width: int | None = None) -> str:
    """Aligned text of at most `width` characters a line, if that can be; a long value is cut in its middle.

    A heading is the last part of a name where that tells it. Where there is not room for all, settings are left out
    before results, and of these the widest, which say least at a glance, such as lists of transforms.
    """
    last = [column.rpartition(".")[2] for column in columns]
    texts = {}  # of each column its heading and its cells
    for column, short in zip(columns, last, strict=True):
        heading = short if last.count(short) == 1 else column
        texts[column] = [shortened(heading, WIDEST), *(_shown(row, column) for row in rows)]
    widths = {column: max(map(len, cells)) for column, cells in texts.items()}
    left_out: list[str] = []
    while width is not None and sum(widths.values()) + 2 * (len(widths) - 1) > width:
        settings = [column for column in reversed(widths) if column not in NOT_SETTINGS and column not in ALWAYS]
        others = [column for column in ("seconds", "best_epoch", *ALWAYS, "state") if column in widths]
        if not settings and not others:
            break
        left_out.append(max(settings, key=widths.__getitem__) if settings else others[0])
        del widths[left_out[-1]]
    numeric = [all(as_number(row.get(c)) is not None for row in rows if row.get(c) is not None) for c in widths]
    text = terminal.aligned([texts[column] for column in widths], numeric)
    if left_out:
        names = shortened(", ".join(left_out), 200)
        text += f"\n\ntoo narrow for {counted(len(left_out), 'column')}: {names}"
    return text


def _shown(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-" if column in RESULTS else ("" if column not in row else "null")
    if column in AVERAGED:
        spread = row.get(f"{column}_std")
        return f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
    if column == "seconds":
        return f"{value:.1f}"
    return shortened(cell(value), WIDEST_LINE if column in ("run", "reason") else WIDEST)


def damages(rows: Sequence[Row], most: int = 5) -> str:
    """Which runs are damaged, and how: lines below the table, or nothing."""
    damaged = [row for row in rows if row.get("state") == "damaged"]
    lines = [f"damaged  {shortened(row['run'], WIDEST_LINE)}: {row['reason']}" for row in damaged[:most]]
    if len(damaged) > most:
        more = counted(len(damaged) - most, "more run")
        lines.append(f"damaged  {more}; state=damaged columns=run,reason lists them")
    return "".join(f"\n{line}" for line in lines)


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The same table for a spreadsheet, numbers unrounded and standard deviations in columns of their own."""
    spread = {f"{name}_std" for name in AVERAGED if any(f"{name}_std" in row for row in rows)}
    names = [name for column in columns for name in (column, f"{column}_std") if name in columns or name in spread]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        lines.writerow(["" if v is None else cell(v) if isinstance(v, (list, bool)) else v for v in values])
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(arguments: Sequence[str], root: Path, width: int | None = None) -> str:
    """The answer to `python evaluate.py --runs ARGUMENTS`.

    Raises:
        RequestError: there are no runs, or an argument is not understood.
    """
    options = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in OPTIONS and "=" in a)
    conditions = [a for a in arguments if a.partition("=")[0] not in options]
    rows = read_runs(root)
    if not rows:
        raise RequestError(f"--runs: there is no run in {root.resolve()} yet; train one: python train.py")
    total = len(rows)
    rows = matching(rows, conditions)
    if not rows:
        return f"of {counted(total, 'run')} none fulfils {shortened(' '.join(conditions), 200)}"
    broken = damages(rows)
    if "mean" in options:
        rows = mean_over(rows, *(column_named(name.strip(), rows) for name in options["mean"].split(",")))
        if not rows:
            raise RequestError(f"--runs mean={options['mean']}: none of these runs has finished")
    if "sort" in options:
        rows = sorted_by(rows, options["sort"])
    else:  # the best first within each dataset, which is where accuracies can be compared
        rows = sorted(sorted_by(rows, chosen_by(rows)), key=lambda row: str(row.get("dataset")))
    columns = shown_columns(rows)
    if "columns" in options:
        columns = [column_named(name.strip(), rows) for name in options["columns"].split(",")]
        width = None
    elif "sort" in options:
        columns.append(column_named(options["sort"].removeprefix("-"), rows))
    columns = list(dict.fromkeys(columns))
    text = table(rows, columns, width)
    if width is not None and "too narrow" in text:
        text += "; columns= chooses, output=FILE.csv has all"
    if broken:
        text += f"\n{broken}"
    if "output" in options:
        file, typed = Path(options["output"]), f"output={shortened(options['output'])}"
        if os.path.exists(file) and not os.path.isfile(file):
            raise RequestError(f"{typed}: cannot be written (it is no file)")
        try:
            files.write(file, csv_text(rows, columns))
        except (RunError, ValueError) as error:
            raise RequestError(f"{typed}: cannot be written ({one_line(error)})") from None
        text += f"\n\nwritten to {file}"
    return text
