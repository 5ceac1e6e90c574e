"""Products with a factor of few columns, laid out as a processor has them soonest."""

from __future__ import annotations

from torch import Tensor

FEW = 16  # columns; with 2 to 15 of a row-major matrix MKL takes up to six times as long, measured at 384 to 2048 rows


def transposed(b: Tensor) -> Tensor:
    """B^T [r, d_out], to multiply by: h B^T, and in its backward pass dz B and dz^T h, have no matrix of few columns."""
    return b.T.contiguous() if _few(b) else b.T


def crossed(dz: Tensor, h: Tensor) -> Tensor:
    """dz^T h [d_out, r]; dz [positions, d_out], h [positions, r]."""
    return (h.T @ dz).T if _few(h) else dz.T @ h


def _few(t: Tensor) -> bool:
    return t.device.type == "cpu" and 1 < t.shape[-1] < FEW
