from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Copy, Delta, Site, Structure
from ..adapter.site import has_parameters
from ..registry import StructureConfig, register


class FullDelta(Delta):
    """W = dense, a trained copy of W0; the bias likewise"""

    replaces = True

    def __init__(self, site: Site):
        super().__init__()
        w, b = site.base.weight.detach(), site.base.bias
        dtype = torch.promote_types(w.dtype, torch.float32)
        self.dense = nn.Parameter(w.to(dtype, copy=True).contiguous())
        self.dense_bias = None if b is None else nn.Parameter(b.detach().to(dtype, copy=True))

    def weight(self, base):
        return self.dense

    def shift(self, base):
        return None if self.dense_bias is None else self.dense_bias - base.bias

    def bias(self, base):
        return self.dense_bias

    def forward(self, x, base):
        if x.dtype == self.dense.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.dense, self.dense_bias)
        return F.linear(x.to(self.dense.dtype), self.dense, self.dense_bias).to(x.dtype)


@register("full")
class Full(Structure):
    """Full fine-tuning: W = a trained copy of W0, and of every other parameter of the base.

    target_modules `all` trains everything; `all-linear` or names only those. What is not a linear layer, or shares its
    weight with another module, is copied whole and keeps its ties. The base's own numbers wait in a file, so that
    memory is that of plain full fine-tuning."""

    paper = "the reference"
    gives = frozenset({"dense", "weight"})
    fits = staticmethod(has_parameters)
    ties = True

    @dataclass
    class Config(StructureConfig):
        target_modules: Any = "all"

    def build(self, site, make):
        return FullDelta(site) if site.is_linear and not site.tied else Copy(site.base.module, self.adapter.memo)
