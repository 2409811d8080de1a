"""How far a run has come, when it ends, and its learning rate on the way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class TrainState:
    """How far a run has come. The position in the data is in rows, because the number of processes may change."""

    step: int = 0
    epoch: int = 0
    row: int = 0  # of this epoch's order
    tokens: int = 0  # without padding, since the start
    seconds: float = 0.0
    skipped: int = 0  # consecutive steps that were not finite

    def advance(self, rows: int, n_rows: int, sums: Mapping[str, float]):
        """After a step over `rows` of the epoch's n_rows."""
        self.step += 1
        self.row += rows
        self.tokens += int(sums["real_tokens"])
        self.seconds += sums["seconds"]
        if self.row >= n_rows:
            self.epoch += 1
            self.row = 0


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then half a cosine from learning_rate to min_learning_rate. The first limit ends both."""

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    epochs: int
    max_steps: int | None = None
    max_minutes: float | None = None

    def progress(self, state: TrainState, n_rows: int) -> float:
        """From 0 to 1: how far the run is towards the nearest of its limits. n_rows: rows of an epoch."""
        fractions = [(state.epoch * n_rows + state.row) / (self.epochs * n_rows)]
        if self.max_steps:
            fractions.append(state.step / self.max_steps)
        if self.max_minutes:
            fractions.append(state.seconds / (60 * self.max_minutes))
        return max(fractions)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return warm * (self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine)
