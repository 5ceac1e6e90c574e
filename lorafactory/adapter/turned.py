"""Turned: a delta that turns the input of its layer; and the dropout of block rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
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


def block_dropout(share: float, n: int, layer: str) -> float:
    """The share, where it is at least one of a layer's n blocks. Raises UserError where it is none."""
    if share and not int(share * n):
        raise UserError(f"dropout is {share}, which is none of the {n} blocks of {layer}: at least {1 / n:.3g}")
    return share


def some_identity(blocks: Tensor, share: float) -> Tensor:
    """floor(share n) of the blocks [n, b, b], drawn anew, are the identity."""
    n, eye = len(blocks), torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    lost = torch.randperm(n, device=blocks.device)[: int(share * n)]
    mask = torch.zeros(n, dtype=torch.bool, device=blocks.device).index_fill(0, lost, True)
    return torch.where(mask[:, None, None], eye, blocks)
