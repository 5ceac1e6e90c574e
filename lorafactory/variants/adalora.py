from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
from torch.nn.functional import pad

from .. import linalg
from ..adapter import Elastic, Part
from ..adapter.peft import A, exactly
from ..errors import UserError
from ..registry import BudgetConfig, register

TRIPLET = ("A", "B", "gate")


class Score(Elastic):
    """Importance of each rank of one pair, from smoothed sensitivities I of |p grad p| and their uncertainty U.

    i_*, u_* have the shapes of A, B, gate; mask [rank] is the last decision. Shrinks with the pair."""

    def __init__(self, low):
        super().__init__()
        self.d_in, self.d_out = low.A.shape[1], low.B.shape[0]
        self.register_buffer("mask", torch.ones_like(low.gate))
        for n in TRIPLET:
            for kind in "iu":
                self.register_buffer(f"{kind}_{n}", torch.zeros_like(getattr(low, n)))

    def shapes(self):
        each = {"A": ("r", self.d_in), "B": (self.d_out, "r"), "gate": ("r",)}
        return {"mask": ("r",), **{f"{kind}_{n}": shape for n, shape in each.items() for kind in "iu"}}

    def update(self, low, beta1, beta2):
        """Eq. 9-11 of the paper."""
        for n in TRIPLET:
            p, i, u = getattr(low, n), getattr(self, f"i_{n}"), getattr(self, f"u_{n}")
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            i.lerp_(now, 1 - beta1)
            u.lerp_((now - i).abs(), 1 - beta2)

    def importance(self):
        """Eq. 8: S = s(gate) + mean_j s(A_kj) + mean_j s(B_jk), s = I U; [rank]."""
        s = {n: getattr(self, f"i_{n}") * getattr(self, f"u_{n}") for n in TRIPLET}
        return s["gate"] + s["A"].mean(1) + s["B"].mean(0)

    def keep(self, index):
        for name, shape in self.shapes().items():
            setattr(self, name, getattr(self, name).index_select(shape.index("r"), index))


@register("adalora")
class AdaLoRA(Part):
    """AdaLoRA: update = s B diag(gate) A, near-orthonormal A and B; the ranks of all layers compete for a budget.

    Zhang et al. 2023. Sensitivity eq. 9-11, importance eq. 8, budget eq. 12: full during `warmup`, then cubic down to
    `target` ranks a layer on average, reached `final` before the end. variant.rank is the rank at the start. Phases are
    shares of the steps: they cannot overlap unseen. A masked rank keeps A and B and trains on until the next decision,
    so it may return while the budget falls; then the choice is fixed, and at the end what is masked is dropped.
    s = alpha / rank at the start, as their code has it. Penalty: the paper's sum of |A A^T - I|^2 + |B^T B - I|^2, or,
    `orthogonality: mean`, the mean of the norms not squared, as their code and PEFT have it."""

    paper = "AdaLoRA, arXiv 2303.10512"
    axis, needs, does = "budget", frozenset({"low_rank"}), frozenset({"penalty on the factors"})
    minds = frozenset({"mixes ranks"})  # gates from zero between orthogonal factors: the form of an SVD

    @dataclass
    class Config(BudgetConfig):
        target: Optional[float] = None  # noqa: UP045  average rank at the end; null: two thirds of the start
        warmup: float = 0.1
        final: float = 0.3
        every: int = 1  # steps between decisions
        penalty: float = 0.1
        orthogonality: str = "sum"
        beta1: float = 0.85
        beta2: float = 0.85

        def check(self):
            if not (0 <= self.warmup and 0 <= self.final and self.warmup + self.final < 1):
                raise UserError(f"warmup={self.warmup} and final={self.final} are shares of the steps and leave none between")
            if self.target is not None and self.target <= 0:
                raise UserError(f"target is {self.target}; it must be a positive average rank")
            if self.every < 1 or self.penalty < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
                raise UserError(f"every={self.every} >= 1, penalty={self.penalty} >= 0, betas in [0, 1) are needed")
            if self.orthogonality not in ("sum", "mean"):
                raise UserError(f"orthogonality is {self.orthogonality!r}; it takes sum, mean")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        for low in self.pairs():
            low.add_gate(0.0, unit_norm=True)
        self.scores = nn.ModuleList(Score(low) for low in self.pairs())
        start, target = sum(low.rank for low in self.pairs()), self.config.target
        self.__dict__["target"] = round(start / 1.5 if target is None else target * len(self.pairs()))
        if self.target > start:
            raise UserError(f"target {target} is more than the average rank at the start, {start / len(self.pairs()):g}")

    def penalty(self):
        rows = [rows for low in self.pairs() for rows in (low.A, low.B.T)]
        if self.config.orthogonality == "sum":
            return self.config.penalty * sum(map(linalg.off_orthonormal, rows))
        return self.config.penalty * linalg.mean_off_orthonormal(rows)

    def phases(self, total):
        """(last step with the full budget, first step with the final one), counted from 1."""
        return round(self.config.warmup * total), total - round(self.config.final * total)

    def budget(self, t, total):
        """Ranks of all layers together after step t of total, counted from 1."""
        start, stop = self.phases(total)
        full = sum(low.rank for low in self.pairs())
        least = min(self.target, full)  # a later stage starts with what an earlier one left
        done = min(1.0, max(0, t - start) / (stop - start))
        return int(least + (full - least) * (1 - done) ** 3)  # down, as the authors' code

    def before_step(self, step):
        start, stop = self.phases(step.total)
        if stop - start < 2:
            raise UserError(f"{step.total} steps leave none between warmup={self.config.warmup} and final={self.config.final}")

    def after_step(self, step):
        c, pairs, t = self.config, self.pairs(), step.index + 1
        start, stop = self.phases(step.total)
        if t < stop:  # the last choice is made on what came before it
            for s, low in zip(self.scores, pairs, strict=True):
                s.update(low, c.beta1, c.beta2)
        decide = t == stop or (start < t < stop and t % c.every == 0)
        if decide:
            self.choose(self.budget(t, step.total))
        if decide or t > stop:  # between decisions what is masked may grow back
            for s, low in zip(self.scores, pairs, strict=True):
                low.gate.mul_(s.mask)

    def choose(self, count):
        """Masks that leave the `count` most important ranks of all layers."""
        scores = [s.importance() for s in self.scores]
        mask = torch.zeros_like(torch.cat(scores))
        mask[torch.cat(scores).topk(count).indices] = 1
        for s, m in zip(self.scores, mask.split([len(i) for i in scores]), strict=True):
            s.mask.copy_(m)

    def end(self, stage):
        for s, low in zip(self.scores, self.pairs(), strict=True):
            index = (s.mask + low.gate.detach().abs()).nonzero().flatten()  # training may stop between decisions
            low.keep(index)
            s.keep(index)
        return False

    def counters(self):
        return {"ranks_kept": float(sum(s.mask.sum() for s in self.scores)), "target": float(self.target)}

    def to_peft(self, out):
        """W0 + alpha / (init_r + 1e-5) B diag(E) A, one init_r for all layers. Under DoRA, which PEFT's AdaLoRA refuses,
        it stays the LoRA that it is."""
        if out.fields.get("peft_type") != "LORA" or "use_dora" in out.fields:
            return
        rank = max(len(t[A]) for t in out.layers.values())
        for site, low in self.adapter.low_ranks():
            bare = low.A0 is None and low.A_past is None
            b, a = (low.B, low.A) if bare else low.factors()
            e = low.scale * low.gate if bare else a.new_ones(len(a))
            e, more = e[:, None] * ((rank + 1e-5) / rank), rank - len(a)
            a, b, e = pad(a, (0, 0, 0, more)), pad(b, (0, more)), pad(e, (0, 0, 0, more))
            out.layers[site.name] = {"lora_A": a, "lora_B": b, "lora_E": e}
        # total_step: PEFT wants one before it loads; who trains on gives the true one
        out.fields |= {"peft_type": "ADALORA", "init_r": rank, "target_r": rank, "lora_alpha": rank, "total_step": 1}
        out.alphas = {}

    @classmethod
    def from_peft(cls, saved):
        """Turns it into a LoRA, for the structure to read, beside whose factors E waits for fill()."""
        f = saved.fields
        if f.get("peft_type") != "ADALORA":
            return None
        for name, t in list(saved.layers.items()):
            a = t.get("lora_A")
            if a is not None and not len(a):  # a layer whose budget is spent
                del saved.layers[name]
            else:
                saved.layers[name] = {f"{n}.weight" if n != "lora_E" else n: v for n, v in t.items()}
        scale = (f["lora_alpha"] if f["lora_alpha"] > 0 else f["init_r"]) / (f["init_r"] + 1e-5)
        ranks = {n: len(t[A]) for n, t in saved.layers.items() if A in t}
        target = min(f.get("target_r", 8), sum(ranks.values()) / max(1, len(ranks)))
        saved.drop("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
                   "use_rslora", "rank_pattern")  # fmt: skip
        f |= {"peft_type": "LORA", "alpha_pattern": {exactly(n): scale * r for n, r in ranks.items()}}
        return {"target": target}

    def fill(self, saved):
        for site, low in self.adapter.low_ranks():
            saved.take(site.name, "lora_E", low.gate[:, None])
