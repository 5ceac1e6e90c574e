"""compose: a layer's output and its low-rank update, scaled row by row, without the update in between; rescale: without one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .choice import pick
from .narrow import crossed, transposed

WORTH = 1 << 20  # entries of y, from which a pass over memory outweighs a launch


def compose(y: Tensor, h: Tensor, b: Tensor, gain: Tensor | None = None, bias: Tensor | None = None,
            whole: bool = True, fresh: bool = False) -> Tensor:  # fmt: skip
    """y + h B^T; with a gain g, g * (y + h B^T) + (1 - g) * bias, or where not `whole`, y + g * (h B^T). In y's dtype.

    y [..., d_out], any float dtype, bias included; h [..., r]; b [d_out, r] and gain [d_out], float32 or wider; bias
    [d_out], constant. fresh: y is of use to nobody else, no backward pass either, and may be written over. Differentiable,
    with a gain once, in y, h, b and gain. No digits cancel near g = 1: the sum is rounded to y's dtype at its end, and with
    g = 1 and B = 0 it is y.

    Kept for the backward pass: h, and where g trains what it multiplies, in y's dtype. With `whole` the result would do
    (dg = sum_i dz_i (z_i - bias) / g), but a next layer that works in place, as nn.ReLU(inplace=True), overwrites it."""
    tensors = (y, h, b) if gain is None else (y, h, b, gain)
    kind = pick("compose", *tensors, twin=gain is not None, worth=y.numel() >= WORTH)
    if kind == "reference":
        return _definition(y, h, b, gain, bias, whole)
    if gain is None:
        return eager.add(y, h, b, fresh)
    if kind == "eager" and not whole:
        return eager.add_scaled(y, h, b, gain, fresh)
    return _Compose.apply(*eager.rows(y, h), b, gain, bias, whole, kind).view(y.shape)


def rescale(y: Tensor, gain: Tensor) -> Tensor:
    """gain * y, without an update: y [..., d_out], gain [d_out], float32 or wider. In y's dtype, rounded once."""
    if pick("rescale", y, gain, twin=True, worth=y.numel() >= WORTH) != "triton":
        return (gain * y).to(y.dtype)
    flat = y.reshape(-1, len(gain))
    nothing = flat.new_empty(len(flat), 0), gain.new_empty(len(gain), 0)
    return _Compose.apply(flat, *nothing, gain, None, True, "triton").view(y.shape)  # type: ignore[no-any-return]


def _definition(y: Tensor, h: Tensor, b: Tensor, g: Tensor | None, bias: Tensor | None, whole: bool) -> Tensor:
    with torch.autocast(y.device.type, enabled=False):
        wide = torch.promote_types(y.dtype, b.dtype)
        y_, update = y.to(wide), h.to(wide) @ b.to(wide).T
        if g is None:
            return (y_ + update).to(y.dtype)
        if not whole:
            return (y_ + g * update).to(y.dtype)
        return (g * (y_ + update) if bias is None else g * (y_ + update) + (1 - g) * bias).to(y.dtype)


def _passes(kind: str) -> ModuleType:
    """forward and backward, the passes over [positions, d_out], of an implementation."""
    if kind == "eager":
        return eager
    from . import twins  # imports Triton, which not every machine has

    return twins


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, whole: bool, kind: str) -> Tensor:
        ctx.whole, ctx.kind = whole, kind
        with torch.autocast(y.device.type, enabled=False):
            z, inner = _passes(kind).forward(y, h, b.to(h.dtype), g, bias, whole, whole and ctx.needs_input_grad[3])
        ctx.save_for_backward(h, b, g, bias, inner)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        """dy = g dz, or dz; dh = dz (g B); with Q = dz^T h, dB = g Q, and dg = sum_i dz_i (inner_i - bias), or sum_k B_k Q_k."""
        h, b, g, bias, inner = ctx.saved_tensors
        of_y, of_h, of_b, of_g = ctx.needs_input_grad[:4]
        dy = dg = dh = db = None
        with torch.autocast(dz.device.type, enabled=False):
            if ctx.whole and (of_y or of_g):
                dy, dg = _passes(ctx.kind).backward(dz, g, bias, inner, of_y)
            elif of_y:
                dy = dz
            narrow = dz.to(h.dtype)
            if of_h:
                dh = narrow @ transposed((g[:, None] * b).to(h.dtype)).T
            if of_b or (of_g and not ctx.whole):
                q = crossed(narrow, h).to(g.dtype)
                db = g[:, None] * q if of_b else None
                dg = (b * q).sum(1) if of_g and not ctx.whole else dg
        return dy, dh, db, dg, None, None, None
