"""Which rows a step trains on and at what rate: functions of (seed, step), so that a resumed run has nothing to recall."""

from __future__ import annotations

import math

import torch

from .config import TrainConfig
from .errors import UserError


class Plan:
    """An epoch is a seeded permutation of the rows, cut into batches; its last batch holds what is left, and counts
    for as much as a full one: each step's gradient is the mean over its own examples."""

    def __init__(self, rows: int, config: TrainConfig, seed: int):
        if rows < 1:
            raise UserError("the training split is empty: raise task.train_size or give other data")
        self.rows, self.config, self.seed = rows, config, seed
        self.per_epoch = math.ceil(rows / config.batch_size)
        self.total = config.steps or max(1, round(config.epochs * self.per_epoch))
        self.warmup = round(config.warmup * self.total)

    def batch(self, step: int) -> list[int]:
        """The rows of one optimiser step, over all processes."""
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))
        return order[place * self.config.batch_size :][: self.config.batch_size].tolist()

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied by: linear warm-up, then the schedule down to zero."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.config.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if self.config.schedule == "cosine" else 1.0


def mix(*numbers: int) -> int:
    """One seed of several numbers; neighbours give unrelated seeds (splitmix64)."""
    state = 0
    for n in numbers:
        state = (state + n + 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = ((state ^ (state >> shift)) * factor) % 2**64
        state ^= state >> 31
    return state % 2**63
