import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import probe
from ..adapter import Additive, Elastic, Structure
from ..registry import StructureConfig, register

NAMES = ("D_low", "U_low", "D_high", "U_high")


class ViDADelta(Elastic, Additive):
    """W = W0 + lam_low U_low D_low + lam_high U_high D_high

    teacher_*  where a stage without labels began: their moving averages, which answer outside of training
    source_*   what they were before the first such stage"""

    grown = tuple(tuple(f"{kind}_{n}" for n in NAMES) for kind in ("teacher", "source"))

    def __init__(self, site, low, high):
        super().__init__()
        self.d_in, self.d_out, self.teaching = site.d_in, site.d_out, False
        for kind, rank in (("low", low), ("high", high)):
            setattr(self, f"D_{kind}", nn.Parameter(site.new(rank, site.d_in).normal_(0, rank**-2)))
            setattr(self, f"U_{kind}", nn.Parameter(site.new(site.d_out, rank)))
        for kind in ("teacher", "source"):
            for n in NAMES:
                self.register_buffer(f"{kind}_{n}", None)
        self.register_buffer("lam", site.new(2, fill=1.0))  # low, high

    def shapes(self):
        own = {"D_low": ("l", self.d_in), "U_low": (self.d_out, "l"), "D_high": ("h", self.d_in), "U_high": (self.d_out, "h")}
        return {"lam": (2,), **own, **{f"{k}_{n}": s for k in ("teacher", "source") for n, s in own.items()}}

    def randomize(self):
        with torch.no_grad():
            for up in (self.U_low, self.U_high):
                up.uniform_(-1 / math.sqrt(self.d_in), 1 / math.sqrt(self.d_in))

    def factors(self):
        taught = self.teacher_D_low is not None and (self.teaching or not self.training)
        d1, u1, d2, u2 = (getattr(self, f"teacher_{n}" if taught else n) for n in NAMES)
        return torch.cat([self.lam[0] * u1, self.lam[1] * u2], 1), torch.cat([d1, d2])

    def note(self, kind):
        for n in NAMES:
            setattr(self, f"{kind}_{n}", getattr(self, n).detach().clone())

    def follow(self, rate):
        """The teacher moves towards the student."""
        for n in NAMES:
            getattr(self, f"teacher_{n}").lerp_(getattr(self, n), 1 - rate)

    def forget(self, share):
        """A random share of the student goes back to the source."""
        for n in NAMES:
            p, source = getattr(self, n), getattr(self, f"source_{n}")
            p.copy_(torch.where(torch.rand_like(p) < share, source, p))


@register("vida")
class ViDA(Structure):
    """ViDA: W = W0 + lam_low U_1 D_1 + lam_high U_2 D_2, a low rank for what domains share and a high one for what is theirs.

    Liu et al. 2024. D ~ N(0, 1 / rank^4), U = 0, no alpha; lam is 1 while there are labels. In a stage without them, step by
    step, as their code for CIFAR: u = 0.1 mean variance of the teacher's logits over `views` changed copies of the batch;
    u >= threshold: lam_high = 1 + u, lam_low = 1 - u, else the other way about; loss = cross entropy of the student with the
    teacher; teacher <- ema teacher + (1 - ema) student; each number of the student goes back to its source with
    probability `restore`. The teacher answers, each batch before the step. Theirs trains the backbone, too, and sets
    lam_high nowhere (an elif); here the adapter alone trains, at `rate` times the learning rate, and both are set. Their
    views are the changes of CoTTA; ours brightness, contrast, a turn with a shift, a flip and noise. With several processes
    each has its own lam.

    Cost: that of LoRA of rank low + high; in a stage without labels `views` + 1 passes more a step, and the teacher."""

    paper = "ViDA, arXiv 2306.04344"
    also = ("continual",)
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """low, high: ranks. All else is of stages without labels: views; threshold; ema; restore; rate: times train.lr;
        flip: views may be mirrored."""

        low: int = 1
        high: int = 128
        views: int = 10
        threshold: float = 0.2
        ema: float = 0.999
        restore: float = 0.1
        rate: float = 0.01
        flip: bool = True

        def check(self):
            self.check_least(1, "low", "high")
            self.check_least(2, "views")
            self.check_least(0, "threshold")
            self.check_shares("ema", "restore")
            self.check_not_zero("rate")

    def build(self, site, make):
        return ViDADelta(site, self.config.low, self.config.high)

    def attach(self):
        self.register_buffer("adapted", torch.tensor(0))
        self.register_buffer("high", torch.tensor(0))
        self.__dict__.update(model=None, online=False)

    def deltas(self):
        return [d for _, d in self.adapter.inside(ViDADelta)]

    def begin(self, stage):
        first = next(iter(stage.batches(1)), None)
        self.__dict__.update(model=stage.model, online=first is not None and "labels" not in first and "pixel_values" in first)
        for d in self.deltas() if self.online else ():
            if d.teacher_D_low is None:
                d.note("teacher")
                d.note("source")

    def options(self):
        return {p: {"lr_scale": self.config.rate} for d in self.deltas() for p in d.parameters()} if self.online else {}

    @torch.no_grad()
    def before_forward(self, batch):
        """Sets lam by the teacher's doubt, and gives the batch the teacher's logits to learn from."""
        if not (self.online and self.model.training and "labels" not in batch):
            return
        for d in self.deltas():
            d.teaching = True
        try:
            with probe.mode(self.model, False):
                x, rest = batch["pixel_values"], {k: v for k, v in batch.items() if k != "pixel_values"}
                views = (changed(x, self.config.flip) for _ in range(self.config.views))
                logits = torch.stack([self.model(pixel_values=v, **rest).logits.double() for v in views])
                self.weigh(0.1 * logits.var(0).mean())
                batch["teacher"] = self.model(pixel_values=x, **rest).logits
        finally:
            for d in self.deltas():
                d.teaching = False

    def weigh(self, doubt):
        up = doubt >= self.config.threshold
        self.high += up.long()
        shift = torch.stack([-doubt, doubt] if up else [doubt, -doubt])
        for d in self.deltas():
            d.lam.copy_(1 + shift)

    def after_step(self, step):
        if not self.online:
            return
        self.adapted += 1
        for d in self.deltas():
            d.follow(self.config.ema)
            d.forget(self.config.restore)

    def counters(self):
        return {"adapted_steps": float(self.adapted), "high_domain_steps": float(self.high)} if self.adapted else {}


def changed(x, flip):
    """Pictures [n, 3, h, w], all changed in one random way: brightness, contrast, a turn with a shift, a flip and noise."""
    r = torch.rand(6, device=x.device).tolist()
    mean, spread = x.mean((1, 2, 3), keepdim=True), x.std()
    x = (x - mean) * (0.7 + 0.6 * r[0]) + mean + (r[1] - 0.5) * 0.8 * spread
    angle, size = math.radians(30 * (r[2] - 0.5)), 0.9 + 0.2 * r[3]
    shift = (torch.rand(2, device=x.device) - 0.5) / 4  # a sixteenth of the side, to each side
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], device=x.device) / size
    grid = F.affine_grid(torch.cat([turn, shift[:, None]], 1).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid.to(x), padding_mode="border", align_corners=False)
    x = x.flip(-1) if flip and r[4] < 0.5 else x
    return x + 0.005 * spread * torch.randn_like(x)
