from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, Staged
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..registry import register


def basis(columns, k, center, variance=None):
    """[d, k] orthonormal: the leading left singular vectors of columns [d, n], then random ones; center: less their mean.
    variance: k is the least number of vectors that hold this share of the squared singular values."""
    x = columns - columns.mean(1, keepdim=True) if center else columns
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    if variance is not None:
        held = s.square().cumsum(0)
        k = min(int((held < variance * held[-1]).sum()) + 1, len(s))
    u = u[:, s > 1e-6 * s.max().clamp_min(1e-30)][:, :k]
    more = torch.randn(len(u), k - u.shape[1], dtype=u.dtype, device=u.device)
    for _ in range(2):  # once is not enough in float32
        more = torch.linalg.qr(more - u @ (u.T @ more))[0]
    return torch.cat([u, more], 1)


class ShareDelta(Elastic, Additive, Staged):
    """W = W0 + B_t A_t; of stage t: A_t^T = alpha a + a1 a2, B_t = beta b + b1 b2; in the first stage a pair s B A

    alpha [d_in, k], beta [d_out, k]   frozen, orthonormal, shared by all stages; they come when the first stage ends
    a, b [k, rank]                     trained: the coefficients of the stage at hand
    a1, a2, b1, b2                     trained while a stage lasts: `extra` directions beyond the basis
    past_a, past_b [stages, k, rank]   the coefficients of earlier stages"""

    grown = (("A", "B"), ("alpha", "beta", "a", "b"), ("a1", "a2", "b1", "b2"), ("past_a", "past_b"))
    TRAINED, KEPT = ("A", "B", "a", "b", "a1", "a2", "b1", "b2"), ("alpha", "beta", "past_a", "past_b")

    def __init__(self, site, rank, scale, dropout):
        super().__init__()
        self.d_in, self.d_out, self.dropout = site.d_in, site.d_out, dropout
        for name in self.TRAINED:
            self.register_parameter(name, None)
        for name in self.KEPT:
            self.register_buffer(name, None)
        self.register_buffer("scale", site.new(fill=scale))
        bound = site.d_in**-0.5
        self.A = nn.Parameter(site.new(rank, site.d_in).uniform_(-bound, bound))
        self.B = nn.Parameter(site.new(site.d_out, rank))

    def shapes(self):
        r, n, m = "r", self.d_in, self.d_out
        pair = {"A": (r, n), "B": (m, r), "scale": ()}
        coefficients = {"alpha": (n, "k"), "beta": (m, "l"), "a": ("k", r), "b": ("l", r)}
        extra = {"a1": (n, "e"), "a2": ("e", r), "b1": (m, "e"), "b2": ("e", r)}
        return {**pair, **coefficients, **extra, "past_a": ("t", "k", r), "past_b": ("t", "l", r)}

    def complaints(self, saved):
        bad = super().complaints(saved)
        return bad or ([] if {"A", "alpha"} & saved.keys() else ["A is missing, and so is alpha"])

    @property
    def rank(self):
        return len(self.A) if self.a is None else self.a.shape[1]

    def randomize(self):
        bound = self.d_in**-0.5
        with torch.no_grad():
            self.B.uniform_(-bound, bound)

    def stages(self):
        """How many lie behind the one at hand."""
        return 0 if self.past_a is None else len(self.past_a)

    def pair(self, t):
        """(B_t, A_t)."""
        if self.a is None:
            return self.scale * self.B, self.A
        if t is not None and t < self.stages():
            return self.beta @ self.past_b[t], (self.alpha @ self.past_a[t]).T
        a, b = self.alpha @ self.a, self.beta @ self.b
        return (b, a.T) if self.a1 is None else (b + self.b1 @ self.b2, (a + self.a1 @ self.a2).T)

    def factors(self):
        return self.pair(self.at)

    def begin(self, start, extra):
        """A stage after the first one: the coefficients of the last one become past, and new ones start."""
        for name in ("a", "b"):
            now, past = getattr(self, name).detach(), getattr(self, f"past_{name}")
            setattr(self, f"past_{name}", now[None].clone() if past is None else torch.cat([past, now[None]]))
        if start == "zero":
            self.a.uniform_(-0.5, 0.5)
            self.b.zero_()
        if extra:
            for name, d in (("a", self.d_in), ("b", self.d_out)):
                setattr(self, f"{name}1", nn.Parameter(self.a.new_empty(d, extra).uniform_(-0.5, 0.5)))
                setattr(self, f"{name}2", nn.Parameter(self.a.new_zeros(extra, self.rank)))

    def end(self, components, center, variance):
        """A new basis for all stages so far, and each one's coefficients in it."""
        pairs = [tuple(x.detach() for x in self.pair(t)) for t in range(self.stages() + 1)]
        sides = {"a": (torch.stack([a.T for _, a in pairs]), "alpha"), "b": (torch.stack([b for b, _ in pairs]), "beta")}
        for name, (factors, of) in sides.items():
            t, d, r = factors.shape
            k = min(components, d)
            center_here = center and t * r > (k if variance is None else 1)
            new = basis(factors.permute(1, 0, 2).reshape(d, t * r), k, center_here, variance)
            *past, now = new.T @ factors
            setattr(self, of, new)
            setattr(self, name, nn.Parameter(now.contiguous()))
            if past:
                setattr(self, f"past_{name}", torch.stack(past))
        self.A = self.B = self.a1 = self.a2 = self.b1 = self.b2 = None
        self.scale.fill_(1.0)


@register("share")
class Share(Ranked):
    """Share: every stage is a combination of one basis a layer and side, A_t^T = alpha a_t, B_t = beta b_t; a_t, b_t train.

    2026. The first stage trains a LoRA; when a stage ends, an SVD of the factors of all stages gives the basis anew, and
    each stage's coefficients in it: no data is read. A stage is scored with its own coefficients. `extra` directions train
    beside the basis until the stage ends. The basis is filled up with random directions to `components`, as theirs is, whose
    eigenvectors of zero eigenvalues are none of the data's. From the second stage on a stage starts at the one before it
    (`start: zero`: at no update) and the extra ones at zero; theirs start both at U(-1/2, 1/2), a jump. Where all columns
    fit into the basis nothing is centred, so no stage changes then; theirs always centres, and drops the mean. `variance`
    is the paper's rule (0.6), in which no random directions follow. Their fine-tuning after a new basis is left out.
    s = alpha / rank is folded into B when the first stage ends.

    Cost: that of LoRA and of forming the factors, [d, components] x [components, rank]; an SVD a side and stage."""

    paper = "Share, arXiv 2602.06043"
    also = ("continual",)
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(RankedConfig):
        """components: of the basis of each side; extra: directions that train beside it; start: of a stage after the first,
        previous or zero; center: the factors, before the SVD, where they are more than components; variance: in place of
        components, the share of the factors' variance that the basis of each side is to hold (null: components)."""

        components: int = 32
        extra: int = 2
        start: str = "previous"
        center: bool = True
        variance: Optional[float] = None  # noqa: UP045  OmegaConf

        def check(self):
            super().check()
            self.check_least(0, "extra")
            self.check_positive("variance")
            if self.variance is None:
                self.check_least(self.rank, "components")
            elif self.variance > 1:
                raise UserError(f"variance is {self.variance}; it is a share of the whole, at most 1")
            elif self.components != type(self).components:
                raise UserError(f"components is {self.components}, but variance={self.variance} sets them: leave one out")
            self.check_choices(start=("previous", "zero"))

    def build(self, site, make):
        return ShareDelta(site, self.fitting(site), self.scale(site), self.config.dropout)

    def begin(self, stage):
        for _, delta in self.adapter.inside(ShareDelta):
            if stage.index > delta.stages():  # else it has begun: a resumed run begins it once more
                delta.begin(self.config.start, self.config.extra)

    def end(self, stage):
        for _, delta in self.adapter.inside(ShareDelta):
            delta.end(self.config.components, self.config.center, self.config.variance)
        return True

    def counters(self):
        found = [d for _, d in self.adapter.inside(ShareDelta)]
        return {"stages_held": float(max((d.stages() + 1 for d in found if d.alpha is not None), default=0))}
