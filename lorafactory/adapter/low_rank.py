"""LowRank: the one pair of factors that initialisations, budgets and dynamics know how to handle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from .delta import dropped, linear
from .elastic import Elastic

# a parameter that replaces another -> (the other, how a tensor of its shape becomes one of the new shape)
Moved = dict[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]


class Noise(Protocol):
    """What a posterior adds to a pair's A [rank, d_in]; its own numbers follow the pair's ranks."""

    def __call__(self) -> Tensor | None: ...

    def keep(self, index: Tensor) -> None: ...

    def resize(self, rank: int) -> None: ...


class LowRank(Elastic):
    """update [d_out, d_in] = scale * (B diag(gate * mask) A - B0 diag(gate * mask) A0) + B_past A_past

    A [rank, d_in], B [d_out, rank]  trained, float32 or wider
    gate [rank]                      optional, trained: how much each rank counts
    mask [rank]                      optional, not saved, the part's that sets it: the same, fixed; see set_mask
    A0, B0                           optional: where A and B started, when that was away from zero; subtracted, so
                                     that a start leaves the base's function as it is and the base read-only
    A_past [R, d_in], B_past         optional: frozen earlier updates (restarts, earlier stages)
    scale []                         saved with the factors: loading never depends on a config's rank or alpha, and
                                     it does not follow the rank

    The verbs start, fold, unload, fresh, resize, keep, grow, become, add_gate and set_mask are the only ways a part changes
    it. All but resize, become and set_mask keep the update; resize expects it to be zero."""

    grown: ClassVar[tuple[tuple[str, ...], ...]] = (("A0", "B0"), ("A_past", "B_past"))
    A: nn.Parameter
    B: nn.Parameter
    gate: nn.Parameter | None
    mask: Tensor | None
    scale: Tensor
    A0: Tensor | None
    B0: Tensor | None
    A_past: Tensor | None
    B_past: Tensor | None

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, like: Tensor, dropout: float = 0.0):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        self.dropout = dropout
        self.gate_start: float | None = None
        self.unit_norm = False  # start() moves the norms of A's rows and B's columns into the gate
        self.silenced = False  # something outside holds the update at zero: see randomize
        self.noise: Noise | None = None  # what a posterior adds to A
        self.row_rates: Callable[[LowRank], Tensor] | None = None  # see factors
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(d_out, rank, dtype=dtype, device=like.device))
        self.register_parameter("gate", None)
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype, device=like.device))
        self.register_buffer("mask", None, persistent=False)
        self.mask_always = False
        for name in ("A0", "B0", "A_past", "B_past"):
            self.register_buffer(name, None)
        self.fresh()

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        d_in, d_out = self.A.shape[1], self.B.shape[0]
        trained: dict[str, tuple[int | str, ...]] = {"A": ("r", d_in), "B": (d_out, "r"), "gate": ("r",), "scale": ()}
        anchor: dict[str, tuple[int | str, ...]] = {"A0": ("r", d_in), "B0": (d_out, "r")}
        return {**trained, **anchor, "A_past": ("R", d_in), "B_past": (d_out, "R")}

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B [d_out, R], A [R, d_in]) with B A = update; R is rank, twice that with an anchor, more with a past.

        row_rates(self), [d_out], multiplies the rows of W's gradient on its way to A and B, and to nothing else, while the
        pair trains; its ranks that carry the gradient count once more in R."""
        b, a = self.trained()
        if self.row_rates is not None and self.training and torch.is_grad_enabled():
            b, a = _carrying(b, a, self.row_rates(self)[:, None])
        if self.A_past is None or self.B_past is None:
            return b, a
        return torch.cat([b, self.B_past], 1), torch.cat([a, self.A_past], 0)

    def trained(self) -> tuple[Tensor, Tensor]:
        """factors() without the past."""
        weights = self.weights()
        s = self.scale if weights is None else self.scale * weights
        if self.A0 is None or self.B0 is None:
            return self.B * s, self.drawn()
        return torch.cat([self.B * s, self.B0 * -s], 1), torch.cat([self.drawn(), self.A0], 0)

    def drawn(self) -> Tensor:
        """A, with what a posterior adds."""
        drawn = None if self.noise is None else self.noise()
        return self.A if drawn is None else self.A + drawn

    def masked(self) -> Tensor | None:
        """The mask, where it counts now."""
        return self.mask if self.training or self.mask_always else None

    def weights(self) -> Tensor | None:
        """How much each rank counts now, [rank]; None: all alike."""
        mask = self.masked()
        return self.gate if mask is None else mask if self.gate is None else self.gate * mask

    def partners(self) -> tuple[Tensor, Tensor]:
        """(B diag(weights), diag(weights) A): what a change of A, and one of B, is multiplied by in the update, but for scale."""
        weights = self.weights()
        return (self.B, self.A) if weights is None else (self.B * weights, weights[:, None] * self.A)

    def product(self) -> Tensor:
        """The update [d_out, d_in]."""
        b, a = self.factors()
        return b @ a

    def drop(self, x: Tensor) -> Tensor:
        return dropped(x, self)

    def forward(self, x: Tensor, through: Callable[[Tensor, Tensor, Tensor], Tensor] = linear) -> Tensor:
        """x [..., d_in] -> [..., d_out], through the factors, in their dtype: through(x, A, B), linear in B A."""
        first, *past = self.read(x)
        return through(*first) + through(*past[0]) if past else through(*first)

    def thin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h [..., R], B [d_out, R]) with h B^T = forward(x)."""
        first, *past = self.read(x)
        if not past:
            return linear(*first[:2]), first[2]
        return torch.cat([linear(x, a) for x, a, _ in (first, *past)], -1), torch.cat([b for _, _, b in (first, *past)], 1)

    def read(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x, A, B) of what trains and, where dropout tells it apart, of the past: frozen, it sees all of x as the base does."""
        b, a = self.factors()
        if self.A_past is None or not (self.dropout and self.training):
            return [(self.drop(x), a, b)]
        r = a.shape[0] - self.A_past.shape[0]
        return [(self.drop(x), a[:r], b[:, :r]), (x, a[r:], b[:, r:])]

    @torch.no_grad()
    def fresh(self) -> None:
        """Fresh A and B with a zero update: B = 0, or gate = 0 where the budget asked for a gate that starts there.

        A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), as LoRA's own code has it (Kaiming-uniform with a = sqrt 5)."""
        zero = not self.silenced
        if zero and self.gate is not None and self.gate_start is not None:
            self.A.normal_(0, 0.02)
            self.B.normal_(0, 0.02)
            self.gate.fill_(self.gate_start)
            return
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound)
        if zero:
            self.B.zero_()
        else:
            self.B.uniform_(-bound, bound)
        if self.gate is not None:
            if self.gate_start is None:
                self.gate.normal_()
            else:
                self.gate.fill_(1.0)

    def randomize(self) -> None:
        """From now on the update starts at random instead of zero: a wrapper multiplies it by zero at first."""
        self.silenced = True
        self.fresh()

    @torch.no_grad()
    def start(self, a: Tensor, b: Tensor | None = None) -> None:
        """Begin from a [rank, d_in] and b [d_out, rank] (the rank may differ from now). The update stays zero: b None
        means B = 0; otherwise (a, b) is also the anchor. Unless silenced: then the update is the start itself."""
        self.resize(a.shape[0])
        self.A.copy_(a)
        if b is not None:
            self.B.copy_(b)
        elif not self.silenced:
            self.B.zero_()
        if self.gate is not None:
            self.gate.fill_(1.0)
            if b is not None and self.unit_norm:
                na, nb = self.A.norm(dim=1).clamp_min(1e-12), self.B.norm(dim=0).clamp_min(1e-12)
                self.gate.copy_(na * nb)
                self.A.div_(na[:, None])
                self.B.div_(nb)
        anchored = b is not None and not self.silenced
        self.A0, self.B0 = (self.A.detach().clone(), self.B.detach().clone()) if anchored else (None, None)

    @torch.no_grad()
    def fold(self, compact: bool = True, rank: int | None = None) -> None:
        """Freeze the update so far into the past and begin afresh, at this rank if there is one. compact: past full rank,
        keep one product."""
        self._store(1.0, compact)
        self.A0 = self.B0 = None
        self.silenced = False
        if rank is not None:
            self._allocate(rank)
        self.fresh()

    @torch.no_grad()
    def unload(self, share: float, scale: bool = False) -> None:
        """Freeze `share` of what is trained into the past, and keep the rest of it: in B, or with `scale` in the scale, so
        that the factors stay."""
        self._store(share, compact=True)
        for t in (self.scale,) if scale else (self.B, self.B0):
            if t is not None:
                t.mul_(1 - share)

    def _store(self, share: float, compact: bool) -> None:
        b, a = (t.detach().clone() for t in self.trained())
        b = b * share
        if self.A_past is not None and self.B_past is not None:
            b, a = torch.cat([b, self.B_past], 1), torch.cat([a, self.A_past], 0)
        full = min(b.shape[0], a.shape[1])
        if compact and a.shape[0] > full:
            product, eye = b @ a, torch.eye(full, dtype=a.dtype, device=a.device)
            b, a = (product, eye) if a.shape[1] == full else (eye, product)
        self.A_past, self.B_past = (a, b) if len(a) else (None, None)  # no rank was left

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Another rank for a pair that has learnt nothing yet."""
        if rank == self.rank:
            return
        if self.A0 is not None or self.A_past is not None:
            raise RuntimeError("resize expects a zero update: this pair already has an anchor or a past")
        self._allocate(rank)
        self.fresh()

    def _allocate(self, rank: int) -> None:
        def new(t: Tensor, *shape: int) -> nn.Parameter:
            return nn.Parameter(t.new_zeros(*shape), t.requires_grad)

        self.A, self.B = new(self.A, rank, self.A.shape[1]), new(self.B, self.B.shape[0], rank)
        if self.gate is not None:
            self.gate = new(self.gate, rank)
        if self.noise is not None:
            self.noise.resize(rank)

    @torch.no_grad()
    def keep(self, index: Tensor) -> Moved:
        """Drop every rank but those of `index`; where the gate of the others is zero, the update stays. Returns what the
        optimiser's state of the old parameters becomes, for Step.rebuild_optimizer."""
        moved: Moved = {}
        for name, dim in (("A", 0), ("B", 1), ("gate", 0)):
            t = getattr(self, name)
            if t is not None:
                new = nn.Parameter(t.detach().index_select(dim, index), t.requires_grad)
                moved[new] = (t, lambda state, dim=dim: state.index_select(dim, index))  # type: ignore[misc]
                setattr(self, name, new)
        if self.A0 is not None and self.B0 is not None:
            self.A0, self.B0 = self.A0.index_select(0, index), self.B0.index_select(1, index)
        if self.noise is not None:
            self.noise.keep(index)
        return moved

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """That many ranks more, as fresh ones are. There is nothing to carry over for an optimiser: of a tensor it counts
        one number of steps, and with an old count the new ranks' first steps would be several times too long."""
        new = LowRank(self.A.shape[1], self.B.shape[0], count, 1.0, self.A)
        if self.gate is not None:
            new.add_gate(self.gate_start)
        for name, dim in (("A", 0), ("B", 1), ("gate", 0)):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, nn.Parameter(torch.cat([t.detach(), getattr(new, name).detach()], dim), t.requires_grad))
        if self.A0 is not None and self.B0 is not None:  # theirs start at B = 0, which needs no anchor
            self.A0, self.B0 = torch.cat([self.A0, new.A.detach()]), torch.cat([self.B0, torch.zeros_like(new.B)], 1)
        if self.noise is not None:
            self.noise.resize(self.rank)

    @torch.no_grad()
    def become(self, b: Tensor, a: Tensor) -> None:
        """Another update, scale * b a, b [d_out, r] and a [r, d_in], and nothing else: no anchor, no past, gates of 1."""
        self.A, self.B = nn.Parameter(a.to(self.A), self.A.requires_grad), nn.Parameter(b.to(self.B), self.B.requires_grad)
        if self.gate is not None:
            self.gate = nn.Parameter(self.A.new_ones(self.rank), self.gate.requires_grad)
        self.A0 = self.B0 = self.A_past = self.B_past = None
        if self.noise is not None:
            self.noise.resize(self.rank)

    def set_mask(self, mask: Tensor | None, always: bool = False) -> None:
        """How much each rank counts from now on, [rank]: in training, or always. It is not saved: whoever sets it does so
        again after loading, and takes it away before it changes the rank."""
        self.mask, self.mask_always = None if mask is None else mask.to(self.A), always

    @torch.no_grad()
    def add_gate(self, start: float | None = None, unit_norm: bool = False) -> None:
        """start: where a fresh gate stands (None: N(0, 1), with B = 0). unit_norm: factors of unit norm, the norms in
        the gate, as an orthogonality penalty needs them."""
        self.unit_norm, self.gate_start = unit_norm, start
        self.gate = nn.Parameter(self.A.new_ones(self.rank))
        self.fresh()


def _carrying(b: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose gradients reach a as (c b)^T G and b as c G a^T: [b, c b] and [a; 0]."""
    still_b, still_a = b.detach(), a.detach()
    return torch.cat([still_b + c * (b - still_b), c * still_b], 1), torch.cat([still_a, a - still_a], 0)
