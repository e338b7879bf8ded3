"""Saving a run while it trains, so that it can be killed at any moment and go on with the same bits.

Everything that continuing needs is a part with `state_dict()` and `load_state_dict()`: model, optimizer, schedule,
step, tally, progress, random states. last.pt holds them all as data. It is written between two steps: every epoch,
every so many minutes or steps, and when the run is told to stop.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.build import build
from engine.distributed import Agreement, Rescue, from_first, is_first, world_size
from engine.errors import Interrupted, RequestError, RunError, one_line, out_of_memory, shortened
from engine.run import checkpoint
from engine.run.runs import COLUMNS
from engine.run.state import Progress
from engine.terminal import log

Item = TypeVar("Item")
TRY = "try a lower learning rate (optimizer.lr), or clip_grad_norm=1"
LOOK, SAVE, LEAVE = 1, 2, 100  # what is due; to leave for a signal is LEAVE and its number


class Saver:
    """Writes best.pt and last.pt of a run, and stops it between two steps when a signal says so.

    Several processes save and stop at the same step, whichever of them it is due in; the first one writes.

    Args:
        directory: the run's.
        about: what both files say of the run (configuration, classes, input shape ...).
        parts: what last.pt keeps, by name: model (as it is evaluated), optimizer, scheduler, step, tally, progress and
            others with a state.
        every_minutes: save last.pt within an epoch after so long, or None.
        every_steps: and after so many steps, or None.
    """

    def __init__(
        self,
        directory: Path,
        about: dict[str, Any],
        parts: dict[str, Any],
        every_minutes: float | None,
        every_steps: int | None,
    ) -> None:
        self.directory, self.about, self.parts = directory, about, parts
        self.tally, self.optimizer = parts["tally"], parts["optimizer"]
        self.progress: Progress = parts["progress"]
        self.best, self.last, self.previous = (directory / f"{name}.pt" for name in ("best", "last", "previous"))
        self.every_seconds = every_minutes * 60 if every_minutes else float("inf")
        self.every_steps = every_steps
        self.signal: int | None = None
        self._saved = self._looked = time.monotonic()
        self._agreement = Agreement() if world_size() > 1 else None
        self._rescue: Rescue | None = None

    def __enter__(self) -> Saver:
        """From here on Ctrl-C and SIGTERM wait for the end of the step, then save."""
        if threading.current_thread() is threading.main_thread():
            self._rescue = Rescue() if self._agreement else None
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Put the signals' handlers back; that memory ran out becomes a RunError with the batch size to try."""
        if self._rescue:
            self._rescue.stop()
        if kind is None and self._agreement:
            self._agreement.heard()
        if kind is None or not self._agreement:  # torchrun's signal to what is ending already shall not cut that off
            for number, handler in getattr(self, "_handlers", {}).items():
                signal.signal(number, handler)
        said = error and out_of_memory(error, self.about["config"]["batch_size"])
        if said:
            where = f"epoch {self.progress.epoch}, step {self.progress.batch + 1}"
            raise RunError(f"{where}: {said}; {self._last_good()}") from error

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal is not None and not self._agreement:  # torchrun tells a second time what a terminal has told
            os._exit(128 + number)  # a second time: leave at once; last.pt is whole at every moment
        self.signal = number

    def after_step(self) -> None:
        """Save last.pt if it is time to; leave if told to. Costs a microsecond otherwise."""
        due = self._due() if self._agreement is None else self._agreement.heard()
        if due > LEAVE:
            self._leave(due - LEAVE)
        elif due == SAVE or (self.every_steps and self.progress.batch % self.every_steps == 0):
            self.check_finite()
            self._save_last()
        elif due == LOOK:
            self.check_finite()
            self._looked = time.monotonic()
        if self._agreement:
            self._agreement.say(self._due())

    def _due(self) -> int:
        """What this process finds due by its clock or a signal, or 0."""
        now = time.monotonic()
        if self.signal is not None:
            return LEAVE + self.signal
        if now - self._saved >= self.every_seconds:
            return SAVE
        return LOOK if now - self._looked >= 1.0 else 0  # looking waits for the device, so not at every step

    def until_stopped(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches of an evaluation, which leaves between two of them when told to."""
        for batch in batches:
            due = self._due() if self._agreement is None else self._agreement.heard()
            if due > LEAVE:
                self._leave(due - LEAVE)
            if self._agreement:
                self._agreement.say(self._due())
            yield batch

    def _leave(self, number: int) -> None:
        if self._rescue:
            self._rescue.stop()
        if self.progress.batch:  # between epochs last.pt is up to date, and the model may hold the best weights
            self.check_finite()
            self._save_last()
        where = f"epoch {self.progress.epoch}, step {self.progress.batch}"
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        raise Interrupted(
            f"stopped by {name} in {where}; continue with: python train.py resume={self.directory}", 128 + number
        )

    def check_finite(self, val_loss: float | None = None) -> None:
        """Stop (RunError) at a loss, weight or rate that is not finite, naming step and last good checkpoint."""
        bad = self.tally.first_bad_step()
        weights = self.parts["model"].state_dict().values()
        found = {
            "the loss": bad is not None,
            "the learning rate": not all(math.isfinite(group["lr"]) for group in self.optimizer.param_groups),
            "a weight": not all(tensor.isfinite().all() for tensor in weights),
            "the validation loss": not math.isfinite(val_loss or 0.0),
        }
        what = next((name for name, is_bad in found.items() if is_bad), None)
        if what is not None:
            step = self.progress.batch if bad is None else bad + 1
            raise RunError(
                f"{what} is not a finite number any more, first in epoch {self.progress.epoch}, step {step}; "
                f"{self._last_good()}; {TRY}"
            )

    def check_test_loss(self, test_loss: float) -> None:
        """Stop at a test loss that is not a finite number, though all weights are."""
        if not math.isfinite(test_loss):
            raise RunError(
                f"the test loss is not a finite number, with the weights of epoch {self.progress.best['epoch']} in "
                f"{self.best}; {TRY}"
            )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint was saved yet"

    def save_epoch(self, best: bool) -> None:
        """Write last.pt at the end of an epoch that `check_finite` found good; before it best.pt, whose epoch it names.

        Args:
            best: whether the epoch is the best so far; best.pt holds its weights and what evaluation needs.
        """
        if best and is_first():
            state = {"model": self.parts["model"].state_dict(), "epoch": self.progress.best["epoch"]}
            checkpoint.write(self.best, {**self.about, **state, "metrics": self.progress.best})
        self._save_last()

    def _save_last(self) -> None:
        """Write last.pt of a state that `check_finite` found good, the one before it becomes previous.pt."""
        state = {**self.about, **{name: part.state_dict() for name, part in self.parts.items()}}
        if is_first():
            checkpoint.write(self.last, state, keep=self.previous)
        self._saved = time.monotonic()

    def restore(self, changed: list[str], steps_per_epoch: int) -> None:
        """Put every part where last.pt left it, or the one before it if that is damaged.

        Args:
            changed: settings that the user changed knowingly. The epoch in progress then begins again, with them and
                with the weights as they are; those from its beginning are not kept.
            steps_per_epoch: of this run; the saved one may have had another number.

        Raises:
            RequestError: neither file can be used, or the data is not what the run was started with.
        """
        saved = from_first(self._read)  # others may not reach the file
        if saved is None:
            log.info("resumed  from the beginning: nothing had been saved yet")
            return
        self._compare(saved, changed)
        try:
            self._load(saved, changed, steps_per_epoch)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            if said := out_of_memory(error, self.about["config"]["batch_size"]):
                raise RunError(f"{self.last}: {said}") from error
            raise RequestError(f"{self.last}: does not fit this run ({one_line(error)})") from error
        if changed:
            steps = saved["progress"]["batch"]
            again = f" begins again from its first sample, with the weights of step {steps}" if steps else " is next"
            log.info(f"changed  {', '.join(changed)}; epoch {self.progress.epoch}{again}")
        log.info(f"resumed  in epoch {self.progress.epoch}, after {self.progress.batch} steps")

    def _read(self) -> dict[str, Any] | None:
        """What last.pt holds, or the one before it; None where neither is there."""
        if not self.last.exists() and not self.previous.exists():
            return None
        try:
            saved = checkpoint.read(self.last)
        except RequestError as error:
            log.info(f"{error}: going on from {self.previous}, the one before")
            saved = checkpoint.read(self.previous)
        try:
            check_saved(saved, self.parts["model"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"{self.last}: holds no run that can go on ({one_line(error)})") from None
        return saved

    def _load(self, saved: dict[str, Any], changed: list[str], steps_per_epoch: int) -> None:
        optimizer = self.optimizer  # loading its state gives it other groups
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        new_curve = bool(changed) or saved["config"]["epochs"] != self.about["config"]["epochs"]
        for name, part in self.parts.items():
            if name == "scheduler" and new_curve:
                continue
            if name == "optimizer" and changed and not _fits(self.about["config"]["optimizer"], saved[name]):
                log.info(f"changed  {type(part).__name__} begins without averages: those saved are another kind's")
                continue
            part.load_state_dict(saved.get(name, {}) if name == "step" else saved[name])  # it is newer than the format
        steps = saved["scheduler"]["steps"]
        if changed:
            self.progress.batch, steps = 0, (self.progress.epoch - 1) * steps_per_epoch
            self.tally.reset()
        if new_curve and self.progress.epoch <= self.about["config"]["epochs"]:
            # The schedule is led along its curve from the beginning, in the steps of this run.
            for group, settings in zip(optimizer.param_groups, asked, strict=True):
                group.update(settings)
            self.parts["scheduler"].start(steps)

    def _compare(self, saved: dict[str, Any], changed: list[str]) -> None:
        if saved["data"] != self.about["data"] and not changed:
            raise RequestError(
                f"{self.directory}: the data is another than it was started with: "
                f"{shortened(saved['data'])} -> {self.about['data']}; "
                "resume_changed=true goes on all the same"
            )
        before, now = saved["environment"], self.about["environment"]
        names = [key for key in now if key not in ("git_commit", "processes") and before.get(key) != now[key]]
        other = [f"{key} {shortened(str(before.get(key)))} -> {now[key]}" for key in names]
        if other:
            log.info(f"warning  {', '.join(other)} since the run was saved: the last bits may come out differently")
        there, here = before.get("processes", 1), world_size()
        if there != here:
            log.info(
                f"warning  processes {shortened(str(there))} -> {here} since the run was saved: dropout draws other "
                "random numbers, and the last bits come out differently"
            )


def check_saved(saved: dict[str, Any], model: Any) -> None:
    """Refuse a last.pt whose values no run writes: they would be met in the middle of the work, or printed.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: what is wrong.
    """
    progress, tally, history = saved["progress"], saved["tally"], saved["progress"]["history"]
    if not isinstance(saved["data"], str) or not isinstance(saved["environment"], dict):
        raise ValueError("its data and environment are no descriptions")
    step = saved.get("step", {})
    counts = [progress["epoch"], progress["batch"], saved["scheduler"]["steps"], tally["correct"]]
    counts += [step.get("skipped", 0), step.get("averaged", 0)]
    if not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
        raise ValueError(f"its counts of epochs and steps are {shortened(str(counts))}")
    for row in [*history, *([progress["best"]] if progress["best"] else [])]:
        known = isinstance(row, dict) and set(row) == set(COLUMNS)
        if not known or not all(value is None or _is_finite_number(value) for value in row.values()):
            raise ValueError(f"a row of its metrics is {shortened(str(row))}")
    if progress["epoch"] != len(history) + 1 or [row["epoch"] for row in history] != list(range(1, len(history) + 1)):
        raise ValueError(f"it is in epoch {progress['epoch']}, after {len(history)} rows of metrics")
    if (progress["best"] or history) and progress["best"] not in history:
        raise ValueError("its best epoch is none of its epochs")
    if not _is_finite_number(progress["seconds"]) or not _is_finite_number(progress["lr"]):
        raise ValueError("its seconds and learning rate are no numbers")
    if tally["losses"].ndim != 1 or tally["losses"].shape != torch.as_tensor(tally["sizes"]).shape:
        raise ValueError("its losses and batches are not as many")
    if not all(map(_is_finite_number, step.get("scaler", {}).values())):
        raise ValueError(f"its gradient scaler is {shortened(str(step['scaler']))}")
    shapes = [parameter.shape for parameter in model.parameters()]
    for number, state in saved["optimizer"]["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != shapes[number]:
                raise ValueError(
                    f"{shortened(str(name))} of its optimizer is {list(value.shape)}, not {list(shapes[number])}"
                )


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def state_names(optimizer: dict[str, Any]) -> set[str]:
    """What an optimizer of these settings keeps of each parameter, `{"momentum_buffer"}` for instance; it makes a step.

    Whatever the optimizer raises comes through.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    small = build(optimizer, "optimizer", [parameter])
    small.step()
    return set(small.state[parameter])


def _fits(optimizer: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether an optimizer of these settings finds what it needs in a saved state, which may be another kind's."""
    kept = {name for state in saved["state"].values() for name in state}
    return not kept or state_names(optimizer) <= kept
