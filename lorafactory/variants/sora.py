from dataclasses import dataclass

import torch

from ..adapter import Part
from ..errors import UserError
from ..gates import SCHEDULES, active, drop_idle, levels, soft_threshold
from ..registry import BudgetConfig, register


@register("sora")
class SoRA(Part):
    """SoRA: update = s B diag(gate) A; every step of the gates ends in a soft threshold, and ranks at 0 are pruned.

    Ding et al. 2023, eq. 7-8. gate starts at N(0, 1), B at 0; after the optimiser's step, gate <- sign(gate)
    max(|gate| - t, 0), which leaves exact zeros. t = lambda as in the authors' scripts, or, `times_lr`, the paper's
    learning rate times lambda (their second file). Their code thresholds in place, so that what the shrinking leaves below
    lambda is set to 0 as well; ours is the proximal step alone. s = alpha / rank at the start. A rank at 0 keeps A and B,
    so its gate may move again, until the ranks at 0 are dropped: at the end, and in between where lambda rises.

    The schedule (algorithm 1): lambda rises over `levels` values to `most`; the first has the share `first` of the steps,
    the others share the rest. At each rise the ranks at 0 are dropped; the counters tell how many each level left. The
    authors start a scheduled run at lambda = 0. Their two optimisers are two groups of one here: Adam's step is by entry."""

    paper = "SoRA, arXiv 2311.11696"
    axis, needs = "budget", frozenset({"low_rank"})

    @dataclass
    class Config(BudgetConfig):
        """threshold: lambda; times_lr: t = learning rate times lambda; gate_lr: the gates' learning rate, as a multiple of
        the others'; gate_decay: their weight decay; l1: times the mean |gate|, added to the loss (10 in the authors'
        scripts); schedule: of lambda, none, linear, log or exp; most: its last value; levels: how many; first: share of
        the steps at the first."""

        threshold: float = 3e-4
        times_lr: bool = False
        gate_lr: float = 1.0
        gate_decay: float = 0.0
        l1: float = 0.0
        schedule: str = "none"
        most: float = 7e-4
        levels: int = 7
        first: float = 0.36

        def check(self):
            self.check_choices(schedule=SCHEDULES)
            self.check_least(0, "threshold", "gate_decay", "l1")
            self.check_least(2, "levels")
            self.check_positive("gate_lr")
            if not 0 < self.first < 1:
                raise UserError(f"first is {self.first}; it must lie in (0, 1)")
            if self.schedule == "none":
                plain = type(self).__dataclass_fields__
                if given := [n for n in ("most", "levels", "first") if getattr(self, n) != plain[n].default]:
                    raise UserError(f"{given[0]} is {getattr(self, given[0])}, but there is no schedule: leave it out")
            elif self.most <= self.threshold:
                raise UserError(f"most is {self.most}; a schedule ends above threshold={self.threshold}")
            elif self.schedule == "exp" and not self.threshold:
                raise UserError("threshold is 0, from where an exponential schedule never rises: take linear or log")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        for low in self.pairs():
            low.add_gate()
        self.__dict__["lambdas"] = levels(self.config.schedule, self.config.threshold, self.config.most, self.config.levels)
        self.register_buffer("kept", torch.zeros(len(self.lambdas), dtype=torch.long))

    def options(self):
        own = {"lr_scale": self.config.gate_lr, "weight_decay": self.config.gate_decay}
        return {low.gate: own for low in self.pairs()}

    def penalises(self):
        return self.config.l1 > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        gates = torch.cat([low.gate for low in self.pairs()])
        return self.config.l1 * gates.abs().sum() / max(1, len(gates))

    def level(self, index, total):
        """Which lambda the step of this index has."""
        rest, first = len(self.lambdas) - 1, self.config.first * total
        return 0 if index < first or not rest else min(rest, 1 + int((index - first) * rest / (total - first)))

    def after_step(self, step):
        level, c = self.level(step.index, step.total), self.config
        rates = {p: g["lr"] for g in step.optimizer.param_groups for p in g["params"]} if c.times_lr else {}
        for low in self.pairs():
            soft_threshold(low.gate, self.lambdas[level] * rates.get(low.gate, 1.0))
        self.kept[level] = active(self.pairs())
        if step.index + 1 < step.total and self.level(step.index + 1, step.total) > level:
            step.rebuild_optimizer(drop_idle(self.pairs()))

    def end(self, stage):
        drop_idle(self.pairs())
        return False

    def counters(self):
        found = {f"ranks_at_level_{i}": int(k) for i, k in enumerate(self.kept)} if len(self.kept) > 1 else {}
        return {"ranks_kept": active(self.pairs()), **found}
