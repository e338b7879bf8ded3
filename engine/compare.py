"""Comparing runs: one table of what checkpoints/ holds, read from the files of each run, without torch.

    python evaluate.py --runs model=cnn 'val_accuracy>0.9' sort=seconds

A row is a dictionary: what the run came to under the names of `RESULTS`, the option chosen of each group under the
group's name, and every setting under its dotted name. Whatever is a key can be shown, filtered and sorted by.
"""

from __future__ import annotations

import csv
import fcntl
import fnmatch
import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import RequestError, did_you_mean

Row = dict[str, Any]

RESULTS = ("run", "state", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch", "epoch", "seconds")
ALWAYS = ("model", "dataset")  # shown even where all runs agree
AVERAGED = ("val_accuracy", "test_accuracy")
NOT_COMPARED = ("logger", "hparams_search")  # groups that change nothing about what a run comes to by themselves
NOT_SETTINGS = (*RESULTS, "reason", "name", "runs", *(f"{name}_std" for name in AVERAGED))
USAGE = """usage: python evaluate.py --runs [COLUMN=VALUE ...] [sort=COLUMN] [mean=seed] [output=FILE.csv]

The table of all runs: what differs in their configurations and what they came to, best first.
A column is a result (run, state, val_accuracy, test_accuracy, seconds), a group (model) or a setting (optimizer.lr).

Examples:
  python evaluate.py --runs
  python evaluate.py --runs model=cnn,mlp state=finished sort=-seconds
  python evaluate.py --runs 'val_accuracy>0.9' 'run=lr_search/*' mean=seed
  python evaluate.py --runs dataset=digits output=runs.csv"""


# ---------------------------------------------------------------------------------------------------------------------
# From files to rows


def read_runs(root: Path) -> list[Row]:
    """A row for each run below `root`, in sweeps too, oldest first."""
    directories = {
        file.parent.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/.hydra/config.yaml")
    }
    real = [
        directory for directory in directories if not directory.is_symlink()
    ]  # `latest` is one that is there already
    return [row for row in (read_run(d, root) for d in sorted(real, key=_began)) if row is not None]


def _began(directory: Path) -> tuple[float, str]:
    return (directory / ".hydra" / "config.yaml").stat().st_mtime, str(directory)


def read_run(directory: Path, root: Path) -> Row | None:
    """The row of one run; None where its configuration cannot be read (it is being made or removed)."""
    try:
        text = (directory / ".hydra" / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return None
    if not isinstance(config, dict):
        return None
    row: Row = {"run": directory.relative_to(root).as_posix(), "state": "", **{key: None for key in RESULTS[2:]}}
    choices = config.pop("choices", None) or {}
    for group in NOT_COMPARED:
        choices.pop(group, None)
        config.pop(group, None)
    row |= {group: option for group, option in choices.items() if option is not None}
    row |= {name: value for name, value in flatten(config).items() if name not in row and not name.endswith("_target_")}
    row |= _metrics(directory / "metrics.csv")
    summary = read_json(directory / "summary.json")
    row |= {key: summary[key] for key in RESULTS if key in summary}
    row["state"], row["reason"] = _state(directory, finished="test_accuracy" in summary)
    return row


def _state(directory: Path, finished: bool) -> tuple[str, str]:
    """How a run stands, and why."""
    if finished:
        return "finished", ""
    if _is_running(directory):
        return "running", ""
    end = read_json(directory / "end.json")  # not there where the process was killed
    return str(end.get("state", "stopped")), str(end.get("reason", ""))


def _is_running(directory: Path) -> bool:
    """Whether a process holds the lock of the run."""
    try:
        with (directory / ".lock").open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is none, or it is somebody else's
    return False


def _metrics(file: Path) -> Row:
    """What metrics.csv tells of a run that may not have come to its end."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            epochs = list(csv.DictReader(lines))
    except OSError:
        return {}
    result: Row = {"epoch": len(epochs), "seconds": round(sum(as_number(e.get("seconds")) or 0 for e in epochs), 3)}
    measured = [epoch for epoch in epochs if as_number(epoch.get("val_accuracy")) is not None]
    if measured:
        best = max(measured, key=lambda e: (as_number(e["val_accuracy"]), -(as_number(e.get("val_loss")) or 0)))
        result |= {key: as_number(best.get(key)) for key in ("val_accuracy", "val_loss")}
        result["best_epoch"] = int(as_number(best.get("epoch")) or 0)
    return result


def as_number(text: Any) -> float | None:
    """A cell as a number, None where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's dictionary, an empty one where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1}}` as `{"optimizer.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# Rows: which columns, which rows, in which order


def differing(rows: Sequence[Row]) -> list[str]:
    """The groups and settings that are not the same in all rows.

    A group's settings are compared between runs that chose the same option: that a CNN has a width and an MLP has
    none is said by the column `model`.
    """
    names = dict.fromkeys(key for row in rows for key in row if key not in NOT_SETTINGS)
    found = []
    for name in names:
        group = name.partition(".")[0]
        values: dict[str, set[str]] = {}
        for row in rows:
            if name in row:
                option = str(row.get(group)) if "." in name else ""
                values.setdefault(option, set()).add(json.dumps(row[name], default=str))
        if any(len(different) > 1 for different in values.values()):
            found.append(name)
        elif "." not in name and any(name not in row for row in rows) and name not in ALWAYS:
            found.append(name)  # an experiment that only some runs name
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
        raise RequestError(f"--runs: {name!r} may be {' or '.join(ending)}; type the whole name")
    raise RequestError(f"--runs: no run has a column {name!r}{did_you_mean(name, known)}")


_CONDITION = re.compile(r"(?P<name>[\w./@-]+?)\s*(?P<operator>>=|<=|!=|=|>|<)\s*(?P<value>.*)", re.DOTALL)
_ORDER: dict[str, Callable[[float, float], bool]] = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}


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
        column, operator, value = column_named(found["name"], rows), found["operator"], found["value"]
        if operator in _ORDER:
            bound = as_number(value)
            if bound is None:
                raise RequestError(f"--runs {condition}: {value!r} is not a number")
            numbers = [(row, as_number(row.get(column))) for row in kept]
            kept = [row for row, held in numbers if held is not None and _ORDER[operator](held, bound)]
        else:
            kept = [row for row in kept if _is_one_of(row.get(column), value) == (operator == "=")]
    return kept


def _is_one_of(value: Any, wanted: str) -> bool:
    """Whether a cell is what was typed; commas separate alternatives unless they are part of the value itself."""
    text = cell(value)
    for alternative in (wanted, *wanted.split(",")):
        number = as_number(alternative)
        if fnmatch.fnmatchcase(text, alternative) or (number is not None and number == as_number(value)):
            return True
        if text == alternative or (value is None and alternative in ("", "null")):
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


def mean_over(rows: Sequence[Row], setting: str) -> list[Row]:
    """One row for the finished runs that differ only in `setting`: their number, mean, standard deviation (n - 1)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["state"] == "finished":
            own = {key: v for key, v in row.items() if key not in (*NOT_SETTINGS, setting)}
            groups.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(row)
    means = []
    for group in groups.values():
        mean = {key: value for key, value in group[0].items() if key not in (*RESULTS, setting)} | {"runs": len(group)}
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
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{','.join(cell(v) for v in value)}]"
    return str(value)


def shown_columns(rows: Sequence[Row], always: Sequence[str] = ALWAYS) -> list[str]:
    """The columns of the table, left to right: the run, `always` and what differs, what came out."""
    settings = [*always, *(name for name in differing(rows) if name not in always)]
    head = [key for key in ("run", "state") if any(key in row for row in rows)]
    results = ("runs", "best_epoch", "val_accuracy", "test_accuracy", "seconds")
    tail = [key for key in results if any(key in row for row in rows)]
    return [*head, *settings, *tail]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Aligned text; a heading is the last part of a name where that is enough to tell it."""
    last = [column.rpartition(".")[2] for column in columns]
    headings = [short if last.count(short) == 1 else column for short, column in zip(last, columns, strict=True)]
    cells = [headings, *([_shown(row, column) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    numeric = [all(as_number(row.get(c)) is not None for row in rows if row.get(c) is not None) for c in columns]
    lines = []
    for line in cells:
        padded = (f"{t:>{w}}" if right else f"{t:<{w}}" for t, w, right in zip(line, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _shown(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-" if column in RESULTS else ("" if column not in row else "null")
    if column in AVERAGED:
        spread = row.get(f"{column}_std")
        return f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
    if column == "seconds":
        return f"{value:.1f}"
    return cell(value)


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


def command(arguments: Sequence[str], root: Path) -> str:
    """The answer to `python evaluate.py --runs ARGUMENTS`.

    Raises:
        RequestError: there are no runs, or an argument is not understood.
    """
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("sort=", "mean=", "output=")))
    conditions = [a for a in arguments if a.partition("=")[0] not in options]
    rows = read_runs(root)
    if not rows:
        raise RequestError(f"--runs: there is no run in {root.resolve()} yet; train one: python train.py")
    total = len(rows)
    rows = matching(rows, conditions)
    if not rows:
        return f"none of {total} runs fulfils {' '.join(conditions)}"
    if "mean" in options:
        rows = mean_over(rows, column_named(options["mean"], rows))
        if not rows:
            raise RequestError(f"--runs mean={options['mean']}: none of these runs has finished")
    columns = shown_columns(rows)
    if "sort" in options:
        rows = sorted_by(rows, options["sort"])
    else:  # the best first within each dataset, which is where accuracies can be compared
        rows = sorted(sorted_by(rows, "val_accuracy"), key=lambda row: str(row.get("dataset")))
    if "sort" in options and (chosen := column_named(options["sort"].removeprefix("-"), rows)) not in columns:
        columns.append(chosen)
    text = table(rows, columns)
    if "output" in options:
        try:
            Path(options["output"]).write_text(csv_text(rows, columns), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"output={options['output']}: cannot be written ({error.strerror})") from None
        text += f"\n\nwritten to {options['output']}"
    return text
