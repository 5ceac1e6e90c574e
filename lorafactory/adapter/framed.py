"""Framed: structures that train one number a layer, for a fixed orthogonal block tiled along the layer's diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .. import linalg
from ..errors import UserError
from ..registry import StructureConfig
from .delta import Delta
from .part import Structure
from .site import Base, Site

if TYPE_CHECKING:
    from .adapter import Adapter

RANDOM, IDENTITY = "random", "identity"  # the controls: does the lattice matter, does a rotation
RECTANGLES, TAILS, SHARES = ("truncate", "fold"), ("identity", "zero", "cut"), ("module", "block")


class Frame(nn.Module):
    """Q [b, b], orthogonal and frozen, once for all layers; saved, so that loading depends on no config and no LAPACK."""

    Q: Tensor

    def __init__(self, q: Tensor):
        super().__init__()
        self.register_buffer("Q", q)


class Scalar(nn.Module):
    """s [1], trained"""

    def __init__(self, site: Site, start: float):
        super().__init__()
        self.s = nn.Parameter(site.new(1, fill=start))


class FramedDelta(Delta):
    """W = W0 + s M; M [d_out, d_in] is Q [b, b] again and again along the diagonal"""

    frame: Frame

    def __init__(self, frame: Frame, site: Site, c: FramedConfig):
        super().__init__()
        self.__dict__["frame"] = frame
        self.d_in, self.d_out = site.d_in, site.d_out
        self.rectangle, self.tail, self.dropout = c.rectangle, c.tail, c.dropout

    def hold(self, scalar: Scalar, own: bool) -> None:
        if own:
            self.scalar = scalar
        else:
            self.__dict__["scalar"] = scalar

    def tiled(self, x: Tensor, d_out: int) -> Tensor:
        """The first d_out rows of the tiled Q times x [..., d_in]; `tail` says what becomes of a last, partial block."""
        b, m = len(self.frame.Q), min(x.shape[-1], d_out)
        whole = m // b * b
        if self.tail == "cut":
            whole = -(-m // b) * b
            x = F.pad(x, (0, max(0, whole - x.shape[-1])))
        y = linalg.blockwise(x[..., :whole], self.frame.Q.T[None])
        if self.tail == "identity":
            y = torch.cat([y, x[..., whole:m].to(y.dtype)], -1)
        return F.pad(y, (0, d_out - y.shape[-1]))  # cuts where it is negative

    def frames(self, x: Tensor) -> Tensor:
        """M x; in the frame's dtype, or in autocast's."""
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.frame.Q.dtype)
        if self.rectangle == "truncate" or self.d_in == self.d_out:
            return self.tiled(x, self.d_out)
        m = min(self.d_in, self.d_out)
        k = -(-max(self.d_in, self.d_out) // m)
        if self.d_in > m:  # sum the k chunks of the input
            return self.tiled(F.pad(x, (0, k * m - self.d_in)).unflatten(-1, (k, m)).sum(-2) / math.sqrt(k), m)
        y = self.tiled(x, m) / math.sqrt(k)
        return y.repeat(*[1] * (y.dim() - 1), k)[..., : self.d_out]

    def weight(self, base: Base) -> Tensor:
        q = self.frame.Q
        return base.weight + self.scalar.s * self.frames(torch.eye(self.d_in, dtype=q.dtype, device=q.device)).T

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        return self.scalar.s * self.frames(self.drop(x))


@dataclass
class FramedConfig(StructureConfig):
    """construction: of Q, from the lattice, or one of two controls, random and identity; frame_seed: draws the random one;
    init_scale: s at first (1.0 as the author's sketch has it, which changes the model; 0 leaves it as it is); share: s is
    a module's own or one for all adapted modules of a block (the number in their names); rectangle: truncate takes d_out
    rows and d_in columns of the tiling, fold sums or repeats chunks of min(d_in, d_out) so that every coordinate counts;
    tail: what becomes of the coordinates that fill no block, identity, zero or cut (a cut block, not orthogonal);
    dropout: of what the update reads."""

    construction: str = ""
    frame_seed: int = 0
    init_scale: float = 0.0
    share: str = "module"
    rectangle: str = "truncate"
    tail: str = "identity"
    dropout: float = 0.0

    def check(self) -> None:
        known = (*self.owner.constructions, RANDOM, IDENTITY)  # type: ignore[attr-defined]
        self.check_choices(construction=known, share=SHARES, rectangle=RECTANGLES, tail=TAILS)
        self.check_shares("dropout")
        self.check_seeds("frame_seed")
        if self.frame_seed and self.construction != RANDOM:
            raise UserError(f"frame_seed is {self.frame_seed}, but only construction={RANDOM} is drawn: drop one of them")


class Framed(Structure):
    """A subclass names its delta, the size of Q and its constructions."""

    delta: ClassVar[type[FramedDelta]]
    size: ClassVar[int]
    constructions: ClassVar[dict[str, Callable[[], Tensor]]]
    gives = frozenset({"weight"})

    def __init__(self, config: Any, adapter: Adapter):
        super().__init__(config, adapter)
        shapes = [(s.d_out, s.d_in) for s in adapter.sites]
        if config.rectangle != "truncate" and all(p == q for p, q in shapes):
            raise UserError(f"rectangle={config.rectangle} has no meaning here: every layer is square")
        if config.tail != "identity" and not any(min(s) % self.size for s in shapes):
            raise UserError(f"tail={config.tail} has no meaning here: every layer is a whole number of {self.size}-blocks")
        self.frame = Frame(self.block().to(adapter.sites[0].new()))
        self.scalars = nn.ModuleDict()  # those that modules share

    def block(self) -> Tensor:
        """Q [size, size] in float64."""
        how = self.config.construction
        if how == IDENTITY:
            return torch.eye(self.size, dtype=torch.float64)
        if how == RANDOM:
            drawn = torch.Generator().manual_seed(self.config.frame_seed)
            return linalg.orthonormal(torch.randn(self.size, self.size, generator=drawn, dtype=torch.float64))
        return self.constructions[how]()

    def build(self, site: Site, make: Any) -> Delta:
        delta, c = self.delta(self.frame, site, self.config), self.config
        if c.share == "module":
            delta.hold(Scalar(site, c.init_scale), own=True)
            return delta
        key = block_of(site).replace(".", "/")
        if key not in self.scalars:
            self.scalars[key] = Scalar(site, c.init_scale)
        delta.hold(self.scalars[key], own=False)  # type: ignore[arg-type]
        return delta


def block_of(site: Site) -> str:
    """The name of the block that a layer is in: up to its first number; without one, the layer's own."""
    parts = site.name.split(".")
    return ".".join(parts[: next((i for i, p in enumerate(parts) if p.isdigit()), len(parts)) + 1])
