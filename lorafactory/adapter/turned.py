"""Turned: a delta that turns the input of its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta, linear
from .site import Base


class Turned(Delta):
    """y = W0 T x + b: W = W0 T, the base once and no matrix of its shape"""

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """T x for every row of x [..., d_in], in the delta's own dtype; back: T^T x."""
        raise NotImplementedError

    def weight(self, base: Base) -> Tensor:
        return self.turn(base.weight.to(self.dtype), back=True)

    def turned(self, x: Tensor) -> Tensor:
        """T x; under autocast it multiplies in the dtype that autocast has."""
        on = torch.is_autocast_enabled(x.device.type)
        return self.turn(x if on else x.to(self.dtype))

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        return linear(self.turned(x) - x, base.weight.to(self.dtype))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self.turned(x).to(x.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
