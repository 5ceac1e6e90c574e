"""Restarting: dynamics that begin afresh every so many steps, with a learning rate that rises from 0 again each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..registry import DynamicsConfig
from .low_rank import LowRank
from .part import Part, Step


@dataclass
class RestartingConfig(DynamicsConfig):
    """every: optimiser steps between restarts, or below 1 as a share of the run's; warmup: steps from 0 to the full rate
    after a restart, or below 1 as a share of `every`."""

    every: float = 0.25
    warmup: float = 0.1

    def check(self) -> None:
        if not (0 < self.every < 1 or self.every >= 2):
            raise UserError(f"every is {self.every}; it must be a share of the run below 1, or 2 steps or more")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; it must be 0 or more")


class Restarting(Part):
    axis, needs = "dynamics", frozenset({"low_rank"})
    does = frozenset({"restarts the factors"})
    minds = frozenset({"trains truncations"})  # a past has no ranks to cut
    Config = RestartingConfig

    def attach(self) -> None:
        self.restarts: torch.Tensor
        self.register_buffer("restarts", torch.zeros((), dtype=torch.long))

    def cycle(self, step: Step) -> int:
        every = self.config.every
        return max(2, round(every * step.total)) if every < 1 else round(every)

    def rate(self, step: Step) -> float:
        cycle, warmup = self.cycle(step), self.config.warmup
        number, since = divmod(step.index, cycle)
        ramp = warmup * cycle if warmup < 1 else warmup
        return min(1.0, since / ramp) if number and ramp else 1.0

    def after_step(self, step: Step) -> None:
        done = step.index + 1
        if done % self.cycle(step) or done >= step.total:
            return
        self.restarts += 1
        for _, low in self.adapter.low_ranks():
            self.restart(low, step.optimizer.state)

    def restart(self, low: LowRank, state: dict[Any, dict[str, Any]]) -> None:
        """One pair begins afresh, the function as it is; state: the optimiser's, of every parameter."""
        raise NotImplementedError

    def counters(self) -> dict[str, float]:
        return {"restarts": int(self.restarts)}
