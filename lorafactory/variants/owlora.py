from dataclasses import dataclass
from typing import Optional

from ..adapter import Continual, used
from ..errors import UserError
from ..registry import ContinualConfig, register


@register("owlora")
class OWLoRA(Continual):
    """OWLoRA-style: a pair a stage, s B diag(w) A with w trained and A V^T = 0, V spanning the rows of all earlier A.

    After OWLoRA in CoMEL (2025), whose equations were not to be had: reconstructed from its name and aim, so no number of
    theirs may be expected of it. `hard`: A (I - V^T V) in every step, as if it stood in the forward pass;
    gradient and factor are projected instead, which gives the same numbers. What earlier stages read, this one does not
    change (a decomposition that re-scales rows still does). `soft`: weight sum |A_old A^T|_F^2 beside the loss.
    w, one number a rank, starts at 1. Their other parts (attention, pseudo-labels) are no adapter's.
    Cost: a product with V [m, d_in] a step, m the earlier ranks together; nothing in the forward pass."""

    paper = "OWLoRA, arXiv 2507.02395"
    needs = frozenset({"low_rank", "input"})
    does = frozenset({"penalty on the factors"})

    @dataclass
    class Config(ContinualConfig):
        """mode: hard or soft; weight: of the soft penalty (null: 0.5)."""

        mode: str = "hard"
        weight: Optional[float] = None  # noqa: UP045  OmegaConf

        def check(self):
            self.check_choices(mode=("hard", "soft"))
            if self.weight is not None and self.mode == "hard":
                raise UserError(f"weight is {self.weight}, but mode=hard has no penalty: drop it, or mode=soft")
            self.check_least(0, "weight")

    def attach(self):
        self.__dict__["own"] = []
        for _, low in self.adapter.low_ranks():
            if low.gate is None:  # a budget's gate is w, and starts where the budget says
                low.add_gate()
                self.own.append(low)
        super().attach()

    def orthonormal(self):
        return self.config.mode == "hard"

    def remember(self, low, memory):
        (memory.extend if self.config.mode == "hard" else memory.add)(used(low))

    def start(self, stage):
        for site, low, memory in self.pairs():
            if low in self.own and (stage.index or not self.adapter.started):
                low.gate.fill_(1.0)
            if self.config.mode == "hard" and len(memory.rows):
                if len(memory.rows) >= site.d_in:
                    told = f"earlier stages use all {site.d_in} directions of {site.name}"
                    raise UserError(f"{told}: a lower rank leaves some free")
                self.project(low.A, memory)

    def project(self, rows, memory):
        rows.sub_(memory.inside(rows))

    def before_step(self, step):
        self.hard(lambda low: low.A.grad)

    def after_step(self, step):
        self.hard(lambda low: low.A.data)

    def hard(self, of):
        """Projects what `of` gives of each pair, away from what earlier stages read."""
        if self.config.mode == "hard":
            for _, low, memory in self.pairs():
                if len(memory.rows) and (rows := of(low)) is not None:
                    self.project(rows, memory)

    def penalises(self):
        return self.config.mode == "soft"

    def penalty(self):
        if self.config.mode == "hard":
            return 0.0
        weight = 0.5 if self.config.weight is None else self.config.weight
        return weight * sum(((m.rows @ low.A.T).square().sum() for _, low, m in self.pairs() if len(m.rows)), 0.0)
