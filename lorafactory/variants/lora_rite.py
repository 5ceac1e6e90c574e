from dataclasses import dataclass
from typing import Optional

import torch

from .. import linalg
from ..adapter import Part
from ..detour import OnPairs
from ..errors import UserError
from ..registry import DynamicsConfig, register


class Side:
    """One factor of n pairs of one shape, as X [n, d, r], seen in an orthonormal basis U [n, k, r] of the other, Y = U T: a
    step M T^-T of X moves X Y^T by M U^T, however the pair is written."""

    def __init__(self, x, y, gradient, states):
        self.basis, t = torch.linalg.qr(y)
        self.inverse = torch.linalg.pinv(t)
        self.gradient = gradient @ self.inverse  # unmagnified: s G U
        self.states = states
        fresh = {"m": x[0], "v": t[0], "basis": y[0], "escaped": t[0, 0, 0]}
        self.old = {k: torch.stack([s.get(k, torch.zeros_like(f)) for s in states]) for k, f in fresh.items()}
        self.steps = x.new_tensor([s.get("steps", 0) for s in states])[:, None, None]

    def step(self, betas, eps, escape, cap):
        """M T^-T [n, d, r], M capped; the moments turn with the basis, are updated and kept, not capped."""
        turn, g = self.basis.mT @ self.old["basis"], self.gradient
        first, second = (b * (1 - b**self.steps) / (1 - b ** (self.steps + 1)) for b in betas)  # bias-corrected
        turned = symmetric(turn @ self.old["v"] @ turn.mT)
        v = second * turned + (1 - second) * symmetric(g.mT @ g) / g.shape[1]
        lost = self.old["escaped"]
        if escape:
            lost = second[:, 0, 0] * (lost + escaped(self.old["v"], turned))
        values, vectors = linalg.spectrum(v)
        root = (vectors / ((values + lost[:, None]).sqrt() + eps)[:, None, :]) @ vectors.mT
        m = first * self.old["m"] @ turn.mT + (1 - first) * g @ root
        for i, state in enumerate(self.states):
            new = {"m": m[i], "v": v[i], "basis": self.basis[i], "escaped": lost[i]}
            state.update({k: t.clone() for k, t in new.items()}, steps=state.get("steps", 0) + 1)
        if cap is not None:
            m = m / (rms(m) / cap).clamp_min(1)
        return m @ self.inverse.mT


def rms(m):
    """[n, 1, 1]"""
    return m.square().mean((1, 2), keepdim=True).sqrt()


def symmetric(m):
    return (m + m.mT) / 2


def escaped(old, new):
    """How much of a second moment [n, r, r] the turn of the basis loses: at most what its trace loses."""
    fall = (torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(new)).amax(-1)
    trace = (old - new).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(fall, trace).clamp_min(0)


class LoRARITEOptimizer(OnPairs):
    def step_own(self, groups):
        self.part.steps += 1
        c, grouped = self.part.config, self.alike()
        sides = [self.sides(lows) for lows in grouped]
        both = [s for pair in sides for s in pair]
        for s in both if c.skip else ():
            great = rms(s.gradient) > c.skip
            self.part.skipped += int(great.sum())
            s.gradient = torch.where(great, 0.0, s.gradient)
        if c.clip and both:
            norm = torch.stack([s.gradient.square().sum() for s in both]).sum().sqrt()
            for s in both:
                s.gradient = s.gradient * (c.clip / norm).clamp_max(1)
        for lows, (b, a) in zip(grouped, sides, strict=True):
            betas = groups[lows[0].B]["betas"]
            db, da = (side.step(betas, c.eps, c.escape, c.cap) for side in (b, a))
            for low, *pair in zip(lows, db, da.mT, strict=True):
                for p, d in zip((low.B, low.A), pair, strict=True):
                    p.mul_(1 - groups[p]["lr"] * groups[p].get("weight_decay", 0.0)).add_(d, alpha=-groups[p]["lr"])
                if c.balance:
                    balance(low)

    def sides(self, lows):
        """B's and A's."""
        b, a = (torch.stack(t) for t in zip(*(low.partners() for low in lows), strict=True))
        own_b, own_a = torch.stack([low.B for low in lows]), torch.stack([low.A.T for low in lows])
        grad_b, grad_a = torch.stack([low.B.grad for low in lows]), torch.stack([low.A.grad.T for low in lows])
        first = Side(own_b, a.mT, grad_b, [self.state[low.B] for low in lows])
        return first, Side(own_a, b, grad_a, [self.state[low.A] for low in lows])


def balance(low):
    """Both factors of one norm; their product stays."""
    ratio = (low.A.norm() / low.B.norm()).sqrt()
    if ratio.isfinite() and ratio > 0:
        low.B.mul_(ratio)
        low.A.div_(ratio)


@register("lora_rite")
class LoRARITE(Part):
    """LoRA-RITE: Adam with r x r second moments in a basis of the other factor, so that W moves alike however B A is split.

    Yen et al. 2024, algorithm 1. With A^T = U T: gradient g_B T^-1, first and second moment (an [r, r] matrix V), both
    turned into the new basis at every step, and dB = M T^-T; A likewise, both from the factors before the step. Their code
    skips a gradient whose root mean square is above 1 and clips the norm over all pairs to 1; train.clip still comes before.
    betas, rate and decay are the run's AdamW's, with the bias-corrected decays of their code. Theirs takes the root of V as
    it is, and where rounding leaves an eigenvalue below zero the pair's whole update becomes 0; here the eigenvalue is 0.
    s stays in the gradient, as there. At B = 0 the first step moves B alone. Left out: relative_epsilon (it fails
    there). A gate counts with the factor whose change it multiplies.

    Cost: two QR factorisations and two [rank, rank] eigendecompositions a pair and step, pairs of one shape together; a
    state of moment, basis (a factor's shape each) and V: 2 rank (d_in + d_out) + 2 rank^2, as much as AdamW's but for V."""

    paper = "LoRA-RITE, arXiv 2410.20625"
    axis, needs = "dynamics", frozenset({"low_rank"})
    # it reads the gradient of W out of those of A and B, and what is between them may be near singular, where it inverts
    minds = frozenset({"penalty on the factors", "A is frozen", "mixes ranks"})

    @dataclass
    class Config(DynamicsConfig):
        """eps: added to the root of V; skip: the root mean square above which a pair's unmagnified gradient is left out
        (0: none is); clip: the most that the norm of all of them may be (0: anything); escape: add what V loses when the
        basis turns (their apply_escape); balance: give both factors one norm after each step; cap: the root mean square that a
        factor's M may have in a step, more is scaled down to it and kept in the moment (their update_capping, off there)."""

        eps: float = 1e-6
        skip: float = 1.0
        clip: float = 1.0
        escape: bool = False
        balance: bool = False
        cap: Optional[float] = None  # noqa: UP045  OmegaConf

        def check(self):
            self.check_least(0, "skip", "clip")
            self.check_positive("eps", "cap")

    def attach(self):
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long))

    def optimizer(self, groups, make):
        inner = make(groups)
        if "betas" not in inner.defaults:
            raise UserError(f"{self.name} takes the betas of AdamW, and {type(inner).__name__} has none: train.optimizer=adamw")
        return LoRARITEOptimizer(inner, self)

    def counters(self):
        return {"equilibrated_steps": int(self.steps), "skipped_gradients": int(self.skipped)}
