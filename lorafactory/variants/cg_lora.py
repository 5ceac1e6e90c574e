import math
from dataclasses import dataclass, field
from typing import List  # noqa: UP035  as in registry

import torch
import torch.nn as nn

from ..adapter import Delta, Elastic, Structure, linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

ABSENT, SPLITS = ("learned", "base"), ("input", "rank")


class Codes(Elastic):
    """What the examples of this batch are conditioned on: codes [batch, m, code_dim], or [1, m, code_dim] for all of them.

    learned [m, code_dim]: stands in where a batch brings none; None: such a batch sees the base. fixed [m, code_dim]: what
    counts whatever a batch brings, and is saved."""

    learned: nn.Parameter | None
    fixed: torch.Tensor | None

    def __init__(self, names, like: torch.Tensor, learned: torch.Tensor | None):
        super().__init__()
        self.names, self.dim = names, like.shape[-1]
        self.register_buffer("like", like, persistent=False)  # its length, dtype and device
        self.register_parameter("learned", None if learned is None else nn.Parameter(learned))
        self.register_buffer("fixed", None)
        self.given: torch.Tensor | None = None

    def shapes(self):
        return {"learned": (len(self.names), self.dim), "fixed": (len(self.names), self.dim)}

    def read(self, batch) -> None:
        found = [n for n in self.names if hasattr(batch, "get") and batch.get(n) is not None]
        if found and len(found) < len(self.names):
            raise UserError(f"the batch has {', '.join(found)} but not all of {', '.join(self.names)}")
        self.give(*(batch[n] for n in self.names)) if found else self.give()

    def give(self, *codes: torch.Tensor) -> None:
        """One code a name, [code_dim] or [batch, code_dim]; none: what stands in for them."""
        if not codes:
            self.given = None
            return
        for n, c in zip(self.names, codes, strict=True):
            if c.shape[-1] != self.dim or c.dim() > 2:
                raise UserError(f"{n} is {list(c.shape)}; it must be [batch, {self.dim}], code_dim being {self.dim}")
        self.given = torch.stack(torch.broadcast_tensors(*(c if c.dim() == 2 else c[None] for c in codes)), 1)

    def now(self) -> torch.Tensor | None:
        if self.fixed is not None:
            return self.fixed[None]
        return self.given if self.given is not None or self.learned is None else self.learned[None]


class CGDelta(Elastic, Delta):
    """y = W0 x + s U A(c) x; the entries of A(c) [rank, d_in] are up [d_in, rank, hidden] times down [m, hidden, code_dim] c

    U [d_out, rank], up and down trained; each of the m codes generates its share of the inputs, or of the ranks."""

    def __init__(self, codes: Codes, site, rank: int, c):
        super().__init__()
        self.__dict__["codes"] = codes
        self.name, self.d_in, self.d_out, self.split, self.dropout = site.name, site.d_in, site.d_out, c.split, c.dropout
        self.m, hidden = len(c.codes), c.hidden
        self.down = nn.Parameter(xavier(site.new(self.m, hidden, c.code_dim), c.code_dim, hidden))
        self.up = nn.Parameter(xavier(site.new(site.d_in, rank, hidden), hidden, site.d_in * rank // self.m))
        self.U = nn.Parameter(site.new(site.d_out, rank))
        self.register_buffer("scale", site.new(fill=c.scale))

    def shapes(self):
        return {"down": (self.m, "h", "e"), "up": (self.d_in, "r", "h"), "U": (self.d_out, "r"), "scale": ()}

    @property
    def mergeable(self):
        return self.codes.fixed is not None

    def generated(self, codes):
        """A(c)^T [batch, d_in, rank]."""
        hidden = torch.einsum("mhe,bme->bmh", self.down, codes.to(self.down))
        if self.split == "input":
            return torch.einsum("mirh,bmh->bmir", self.up.unflatten(0, (self.m, -1)), hidden).flatten(1, 2)
        return torch.einsum("imrh,bmh->bimr", self.up.unflatten(1, (self.m, -1)), hidden).flatten(2, 3)

    def weight(self, base):
        codes = self.codes.now()
        return base.weight if codes is None else base.weight + self.scale * self.U @ self.generated(codes)[0].T

    def update(self, x, base, y):
        if (codes := self.codes.now()) is None:
            return torch.zeros_like(y)
        if len(codes) not in (1, len(x)):
            raise UserError(f"{len(codes)} codes for the {len(x)} examples that {self.name} sees: run before_forward(batch)")
        a = self.generated(codes)
        if len(codes) == 1:
            z = linear(x, a[0].T)
        else:
            x = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
            z = (x.flatten(1, -2) @ a).unflatten(1, x.shape[1:-1]) if x.dim() > 2 else (x[:, None] @ a)[:, 0]
        u = linear(z, self.scale * self.U)
        return self.drop(u)


def xavier(t: torch.Tensor, d_in: int, d_out: int) -> torch.Tensor:
    bound = math.sqrt(6 / (d_in + d_out))
    return t.uniform_(-bound, bound)


@register("cg_lora")
class CGLoRA(Structure):
    """CG-LoRA (X-Dreamer): y = W0 x + s U A(c) x, A(c) generated for every example from what it is conditioned on.

    Ma et al. 2023: c are a text and a camera embedding there; here the batch's entries that `codes` names, each [batch,
    code_dim], so a class, a task or a time step will do. Each code goes through two linear maps without an activation, to
    `hidden` numbers and to its share of A: with several codes the first generates A for the first inputs, the second for
    the next (their reshape has it so), or with split=rank each its share of the ranks. U starts at zero, the maps
    Xavier-uniform; dropout is of the update. Where a batch brings no code their layer is the base (absent=base); the
    default, a learned code, is an extension that trains on any task. Their camera encoder and their attention-mask loss
    belong to the task. It merges only once its codes are fixed for good: adapter.structure.fix(code, ...).

    Cost: hidden rank d_in products an example to generate A, rank (d_in + d_out) a position."""

    paper = "X-Dreamer, arXiv 2312.00085"

    @dataclass
    class Config(StructureConfig):
        """codes: names of the batch's entries; code_dim: their length; hidden: what a code is first mapped to; split:
        input or rank, with several codes; absent: learned or base; scale: s; dropout: of the update."""

        rank: int = 4
        codes: List[str] = field(default_factory=lambda: ["code"])  # noqa: UP006
        code_dim: int = 32
        hidden: int = 4
        split: str = "input"
        absent: str = "learned"
        scale: float = 1.0
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank", "code_dim", "hidden")
            if not self.codes or len(set(self.codes)) < len(self.codes) or not all(isinstance(n, str) and n for n in self.codes):
                raise UserError(f"codes is {self.codes}; it takes the names of different entries of a batch")
            self.check_choices(split=SPLITS, absent=ABSENT)
            if self.split == "rank" and len(self.codes) == 1:
                raise UserError("split is 'rank', but there is one code: leave it out")
            self.check_not_zero("scale")
            self.check_shares("dropout")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        like = adapter.sites[0].new(len(config.codes), config.code_dim)
        learned = torch.randn_like(like) if config.absent == "learned" else None
        self.codes = Codes(list(config.codes), like, learned)

    def build(self, site, make):
        rank, m, split = fitting(self.config.rank, min(site.d_in, site.d_out), site), len(self.config.codes), self.config.split
        if (site.d_in if split == "input" else rank) % m:
            what = f"{site.d_in} inputs" if split == "input" else f"rank {rank}"
            raise UserError(f"{m} codes do not divide the {what} of {site.name}: take another split or rank")
        return CGDelta(self.codes, site, rank, self.config)

    def before_forward(self, batch):
        self.codes.read(batch)

    def fix(self, *codes) -> None:
        """From now on every input has these codes [code_dim], one a name, whatever its batch says: it can be merged."""
        self.codes.give(*codes)
        self.codes.fixed, self.codes.given = self.codes.given[0].to(self.codes.like), None
