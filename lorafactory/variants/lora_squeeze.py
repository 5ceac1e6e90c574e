from dataclasses import dataclass
from functools import partial
from typing import List, Optional  # noqa: UP035  OmegaConf

import torch

from .. import linalg
from ..adapter import Part
from ..errors import UserError
from ..registry import BudgetConfig, register

MODES, ALLOCATIONS, SPLITS = ("in", "cont", "post"), ("rank", "equal"), ("balanced", "b")


@register("lora_squeeze")
class LoRASqueeze(Part):
    """LoRA-Squeeze: trains at a high rank, then s B A becomes the nearest update of a lower one, by a randomised SVD.

    Vulić et al. 2026. mode `post` squeezes once after training; `cont` once before the last `refine` steps; `in` at the end
    of each stage but the last, on ranks that halve from the structure's to `target`. Whatever ends training early, the end
    squeezes what is still above `target`. The SVD runs on the factors, in their float32 or wider; the paper's is of the
    full update. Undisclosed there and inferred: the scale s stays; the roots of the singular values go to both factors;
    ranks halve; stages get steps in proportion to their rank; the optimiser forgets the moments of what was replaced; the
    rate rises again over 10 steps after the squeeze of `cont`. An anchor or a past is squeezed too. Ranks that the update
    has not are kept with B = 0, as LoRA starts. A run scores the squeezes of its result to 1, 2, 4, ... as truncations.

    Cost: that of LoRA at the rank of each stage; a squeeze is two QR of [d, rank] and a [rank, rank] SVD a pair."""

    paper = "LoRA-Squeeze, arXiv 2602.10993"
    axis, needs = "budget", frozenset({"low_rank"})

    @dataclass
    class Config(BudgetConfig):
        """target: the rank in the end; mode: in, cont or post; least: steps that each stage of `in` has at least, where the
        run has that many; alloc: how the other steps go to its stages, by rank or equal; refine: steps after the squeeze of
        `cont`, or below 1 a share of the run's; warmup: steps from 0 to the full rate after a squeeze (null: 10 in `cont`,
        none in `in`); split: the singular values go to both factors, balanced, or to b; niter: power iterations of the SVD
        (0: the exact one); oversample: directions that it looks at beyond the target; scored: ranks to which a run squeezes
        the result and scores it (null: 1, 2, 4, ... and the whole)."""

        target: int = 4
        mode: str = "in"
        least: int = 200
        alloc: str = "rank"
        refine: float = 0.05
        warmup: Optional[int] = None  # noqa: UP045
        split: str = "balanced"
        niter: int = 2
        oversample: int = 10
        scored: Optional[List[int]] = None  # noqa: UP006, UP045

        def check(self):
            self.check_choices(mode=MODES, alloc=ALLOCATIONS, split=SPLITS)
            self.check_least(1, "target", "least")
            self.check_least(0, "warmup", "niter", "oversample")
            if not (0 < self.refine < 1 or (self.refine >= 1 and self.refine == int(self.refine))):
                raise UserError(f"refine is {self.refine}; it is a share of the run below 1, or a number of steps")
            if self.scored is not None and any(r < 1 for r in self.scored):
                raise UserError(f"scored is {list(self.scored)}; it takes ranks, from 1")
            for option, of in (("least", "in"), ("alloc", "in"), ("refine", "cont")):
                if self.mode != of and getattr(self, option) != getattr(type(self), option):
                    raise UserError(f"{option} is {getattr(self, option)}, which mode={self.mode} has no use for: leave it out")
            if self.mode == "post" and self.warmup is not None:
                raise UserError(f"warmup is {self.warmup}, and mode=post trains nothing after its squeeze: leave it out")
            if not self.niter and self.oversample != 10:
                raise UserError(f"oversample is {self.oversample}, but niter=0 is the exact SVD: leave it out")

    def attach(self):
        self.register_buffer("source", torch.zeros((), dtype=torch.long))  # the largest rank at the start of the stage
        self.register_buffer("squeezes", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))  # of the worst squeeze, as a share of the update

    def rank(self):
        return max((low.rank for _, low in self.adapter.low_ranks()), default=0)

    def begin(self, stage):
        if self.adapter.started and not stage.index:
            return
        self.source.fill_(self.rank())
        if not stage.index and self.config.target > self.rank():
            raise UserError(f"target is {self.config.target}, and no pair has more than {self.rank()} ranks")

    def chain(self):
        """The ranks of the stages."""
        ranks = [int(self.source)]
        while ranks[-1] > self.config.target:
            ranks.append(max(self.config.target, ranks[-1] // 2))
        return ranks

    def schedule(self, total):
        """{steps done: rank to squeeze to}. Raises UserError where a stage would be too short."""
        c, ranks = self.config, self.chain()
        if c.mode == "post" or len(ranks) == 1:
            return {}
        if c.mode == "cont":
            refine = max(1, round(c.refine * total)) if c.refine < 1 else int(c.refine)
            if not 0 < refine < total:
                raise UserError(f"refine={c.refine} leaves {refine} of {total} steps after the squeeze: give 1 to {total - 1}")
            return {total - refine: c.target}
        if total < len(ranks):
            raise UserError(f"{total} steps are too few for {len(ranks)} stages, of rank {', '.join(map(str, ranks))}")
        least = min(c.least, total // len(ranks))
        shares = [1] * len(ranks) if c.alloc == "equal" else ranks
        spare, ends, done = total - least * len(ranks), [], 0
        for i, share in enumerate(shares):
            done += share
            ends.append(least * (i + 1) + round(spare * done / sum(shares)))
        return dict(zip(ends, ranks[1:], strict=False))

    def before_step(self, step):
        self.schedule(step.total)

    def rate(self, step):
        c = self.config
        warmup = (10 if c.mode == "cont" else 0) if c.warmup is None else c.warmup
        since = min((step.index - at for at in self.schedule(step.total) if at <= step.index), default=warmup)
        return since / warmup if since < warmup else 1.0

    def after_step(self, step):
        rank = self.schedule(step.total).get(step.index + 1)
        if rank is not None and self.squeeze(rank):
            step.rebuild_optimizer()

    def end(self, stage):
        return self.squeeze(self.config.target)

    def squeeze(self, rank):
        """Every pair above `rank` to it. Whether there was one."""
        errors = [self.shrink(low, rank) for _, low in self.adapter.low_ranks() if low.rank > rank]
        if errors:
            self.squeezes += 1
            self.error.fill_(max(float(self.error), *errors))
        return bool(errors)

    def shrink(self, low, rank):
        """One pair; what it lost, as a share of its update."""
        c, (b, a) = self.config, (t.detach() for t in low.factors())
        u, s, vt = linalg.product_svd(b, a, rank, c.niter, c.oversample)
        scale = low.scale.abs()
        live = s > s.max() * len(s) * torch.finfo(s.dtype).eps
        split = torch.where(live, s, 1.0).sqrt() / scale.sqrt() if c.split == "balanced" else torch.ones_like(s)
        low.become(u * torch.where(live, s / split, 0.0) / low.scale, split[:, None] * vt)
        lost = linalg.product_norm(torch.cat([b, -u * s], 1), torch.cat([a, vt]))
        return float(lost / linalg.product_norm(b, a).clamp_min(torch.finfo(s.dtype).tiny))

    def truncations(self):
        most, scored = self.rank(), self.config.scored
        powers = [2**i for i in range(most.bit_length())]
        return {r: partial(self.squeeze, r) for r in (scored if scored is not None else [*powers, most]) if r <= most}

    def counters(self):
        ranks = sum(low.rank for _, low in self.adapter.low_ranks())
        return {"squeezes": int(self.squeezes), "worst_relative_error": float(self.error), "rank_total": ranks}
