from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from ..adapter import Delta, Site, Structure
from ..adapter.site import has_bias
from ..registry import StructureConfig, register


class BitFitDelta(Delta):
    """bias = b0 + delta, [d_out]; the weight is not touched"""

    def __init__(self, site: Site):
        super().__init__()
        b = site.base.bias
        self.delta = nn.Parameter(torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)))

    def shift(self, base):
        return self.delta

    def update(self, x, base, y):
        return self.delta


@register("bitfit")
class BitFit(Structure):
    """BitFit: b = b0 + delta b for every bias of the base, norms included; weights stay.

    Ben-Zaken et al. 2021. A layer without a bias gets none."""

    paper = "BitFit, arXiv 2106.10199"
    fits = staticmethod(has_bias)

    @dataclass
    class Config(StructureConfig):
        target_modules: Any = "all"

    def build(self, site, make):
        return BitFitDelta(site)
