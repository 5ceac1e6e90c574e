"""Sparse: a weight of which a few entries train; what is kept, trained, saved and merged is those entries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import sampled
from .delta import Delta, alike, linear, lost
from .elastic import Elastic
from .site import Base, Site


def dense(weight: Tensor, values: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """A copy of the weight with the values added at their places."""
    return weight.clone().index_put_(places, values, accumulate=True)


class Product(torch.autograd.Function):
    """W x + bias for W = dense(weight, values, places). Neither W nor its gradient outlives the call: backward forms W
    again and returns the gradient of the values alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, values, rows, columns, weight)
        return F.linear(x, dense(weight, values, (rows, columns)), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, values, rows, columns, weight = ctx.saved_tensors
        g = grads[0]
        back = g @ dense(weight, values, (rows, columns)) if ctx.needs_input_grad[0] else None
        own = sampled(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), rows, columns)
        return back, own, None, None, None, None


class Sparse(Elastic, Delta):
    """W = W0 + values at index; values [n] trained, zero at first; index [2, n] their rows and columns, no two places
    alike. Merging overwrites those entries of W0 and keeps them alone."""

    index: Tensor

    def __init__(self, site: Site, flat: Tensor):
        """flat [n]: the places, counted row by row."""
        super().__init__()
        self.d_out, self.d_in = site.d_out, site.d_in
        self.values = nn.Parameter(site.new(len(flat)))
        self.register_buffer("index", torch.empty(2, len(flat), dtype=torch.int32, device=self.values.device))
        self.move(flat)

    def move(self, flat: Tensor) -> None:
        """The same number of entries, elsewhere."""
        self.index.copy_(torch.stack([flat // self.d_in, flat % self.d_in]))

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        return {"values": ("n",), "index": (2, "n")}

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        return super().complaints(saved) or self.outside("index", saved)

    def outside(self, name: str, saved: dict[str, Tensor]) -> list[str]:
        """Complains of places that the layer has not."""
        index = saved[name]
        fine = (index >= 0).all() and (index < index.new_tensor([[self.d_out], [self.d_in]])).all()
        return [] if fine else [f"{name} points outside [{self.d_out}, {self.d_in}]"]

    def entries(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((rows, columns), what is added there)."""
        return (self.index[0], self.index[1]), self.values

    def weight(self, base: Base) -> Tensor:
        places, values = self.entries()
        return base.weight.to(values.dtype).index_put(places, values, accumulate=True)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        (rows, columns), values = self.entries()
        return Product.apply(x, values, rows, columns, weight, bias)  # type: ignore[no-any-return]

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        zeros = self.values.new_zeros(self.d_out, self.d_in)
        if torch.is_autocast_enabled(x.device.type):
            places, values = self.entries()
            return linear(x, zeros.index_put(places, values, accumulate=True))
        return self.product(x.to(zeros.dtype), zeros)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        w = base.weight
        return self.product(x, w, base.bias) if alike(x, w, self.values) else super().forward(x, base)

    # merging

    def keep(self, base: Base) -> dict[str, Tensor]:
        rows, columns = self.entries()[0]
        return {"rows": rows.clone(), "columns": columns.clone(), "entries": base.weight[rows, columns]}

    def write(self, base: Base) -> None:
        places, values = self.entries()
        w = base.weight
        w[places] = (w[places] + values).to(w.dtype)

    def restore(self, base: Base, kept: dict[str, Tensor]) -> None:
        base.weight[kept["rows"], kept["columns"]] = kept["entries"]

    @torch.no_grad()
    def error(self, base: Base) -> float:
        places, values = self.entries()
        return lost(base.weight[places] + values, base.weight[places])
