"""Where a run is: everything that continuing needs has `state_dict()` and `load_state_dict()`."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import torch

from engine.distributed import gathered, rank
from engine.terminal import log


class Progress:
    """Where a run is.

    Attributes:
        epoch: the epoch being trained, from 1; one more than the last when all are done.
        batch: how many of its batches are done.
        lr: learning rate at its start.
        history: the rows of metrics.csv.
        best: the row of the best epoch so far, or {}.
    """

    def __init__(self) -> None:
        self.epoch, self.batch, self.lr = 1, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self._began = time.perf_counter()

    def begin_epoch(self, lr: float) -> None:
        """Start the clock of an epoch; one that was resumed goes on."""
        if self.batch == 0:
            self.lr, self._began = lr, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on this epoch, without the time between a stop and a resumption."""
        return time.perf_counter() - self._began

    def end_epoch(self, row: dict[str, Any]) -> bool:
        """Add the epoch's row and go to the next; returns whether it is the best so far.

        Best is the highest validation accuracy, the lower loss where that is the same; without validation the last.
        """
        self.history.append(row)
        self.epoch, self.batch = self.epoch + 1, 0
        better = (
            not self.best
            or row["val_loss"] is None
            or (row["val_accuracy"], -row["val_loss"]) > (self.best["val_accuracy"], -self.best["val_loss"])
        )
        if better:
            self.best = row
        return better

    def epochs_since_best(self) -> int:
        """How many epochs brought nothing better; early stopping counts these."""
        return len(self.history) - self.best["epoch"] if self.best else 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {key: getattr(self, key) for key in ("epoch", "batch", "lr", "seconds", "history", "best")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.epoch, self.batch, self.lr = state["epoch"], state["batch"], state["lr"]
        self.history, self.best = list(state["history"]), state["best"]
        self._began = time.perf_counter() - state["seconds"]


class RandomStates:
    """The states of torch's generators (CPU, and CUDA or MPS where used), NumPy's and Python's."""

    def state_dict(self) -> dict[str, Any]:
        """As tensors and numbers."""
        _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
            "python": random.getstate(),
        }
        if torch.cuda.is_initialized():  # to ask makes it so, which with device=cpu would take a GPU's memory
            state["cuda"] = torch.cuda.get_rng_state_all()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        torch.set_rng_state(state["torch"])
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])
        saved = [f"cuda:{number}" for number in range(len(state.get("cuda", [])))] + ["mps"] * ("mps" in state)
        cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        mps = ["mps"] * torch.backends.mps.is_available()
        for number, of_device in enumerate(state.get("cuda", [])):
            if f"cuda:{number}" in cuda:
                torch.cuda.set_rng_state(of_device, number)
        if "mps" in saved and mps:
            torch.mps.set_rng_state(state["mps"])
        used = cuda * torch.cuda.is_initialized() + mps
        absent, new = [name for name in saved if name not in cuda + mps], [name for name in used if name not in saved]
        told = ((absent, "not in this machine"), (new, "not saved"))
        if said := [f"{', '.join(names)}, {why}" for names, why in told if names]:
            log.info(f"warning  random states not restored: those of {', and of '.join(said)}; dropout may differ")


class EveryRandomStates(RandomStates):
    """Those of all processes, which have dropout of their own; state and loading are for all of them together."""

    def state_dict(self) -> dict[str, Any]:
        """The first process's states, and with them the others'."""
        first, *others = gathered(super().state_dict())
        return first | ({"others": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, as far as there were so many processes."""
        states = [state, *state.get("others", [])]
        if rank() < len(states):
            super().load_state_dict(states[rank()])
