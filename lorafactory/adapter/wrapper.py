"""Wrapper: a delta that re-scales another, and what such deltas share: outputs under a gain, lengths taken once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..kernels import Once, compose, sqnorm, squares
from .delta import Delta, exact, flat, numbers
from .site import Base


class Wrapper(Delta):
    """Re-scales V, the effective weight of the delta inside it."""

    constant = True  # lengths, in the backward pass

    def __init__(self, inner: Delta):
        super().__init__()
        self.inner = inner
        self.once = Once()

    def shift(self, base: Base) -> Tensor | None:
        return self.inner.shift(base)

    def sqnorm(self, base: Base, axis: int = 1, weights: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """kernels.sqnorm of V; own: of W0, where known. V itself is formed only where it has no thinner factors."""
        with exact():
            factors = self.inner.factors()
            if factors is None or len(factors[1]) > min(base.shape):
                v = self.inner.weight(base)
                return squares(v.to(torch.promote_types(v.dtype, torch.float32)), axis, weights)
            b, a = factors
            return sqnorm(base.weight, a, b, 1.0, axis, weights, own)

    def steady(self, compute: Callable[[], Any], *modules: nn.Module) -> Any:
        """compute(), which reads this delta and the modules: differentiated, or a `constant` of the optimiser step."""
        if not self.constant:
            return compute()
        with torch.no_grad():
            return self.once(compute, lambda: numbers(self, *modules), self.training)

    def rescaled(self, x: Tensor, base: Base, g: Tensor) -> Tensor:
        """g * (V x) + bias, rounded to the base's dtype once; g [d_out]."""
        b, rows = self.bias(base), flat(x)
        if self.shift(base) is None and (thin := self.inner.thin(rows)) is not None:
            return compose(base(rows), *thin, gain=g, bias=b).view(*x.shape[:-1], len(g))
        y = base(x)
        v = y.to(g.dtype) + self.inner.update(x, base, y)
        return (g * v if b is None else torch.addcmul(b - g * b, g, v)).to(y.dtype)

    def split(self, x: Tensor, base: Base, y: Tensor) -> tuple[Tensor, Tensor]:
        """(W0 x, (V - W0) x), biases left out, from y = base(x)."""
        u, s = self.inner.update(x, base, y), self.shift(base)
        return y if base.bias is None else y - base.bias, u if s is None else u - s.to(u.dtype)

    def joined(self, u: Tensor, base: Base) -> Tensor:
        """The update whose weight part is u."""
        s = self.shift(base)
        return u if s is None else u + s.to(u.dtype)


def length(square: Tensor, some: Tensor | None = None) -> Tensor:
    """The roots of squared lengths. What has none, or is not among `some`, has no direction and counts as 1."""
    found = square > 0 if some is None else some & (square > 0)
    return torch.where(found, square, 1.0).sqrt()
