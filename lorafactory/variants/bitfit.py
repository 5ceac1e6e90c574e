from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Delta, Site, Structure, alike
from ..adapter.site import has_bias, is_linear
from ..errors import UserError
from ..registry import StructureConfig, register
from ..targets import WORDS

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class BitFitDelta(Delta):
    """bias = b0 + delta, [d_out]; the weight is not touched"""

    def __init__(self, site: Site):
        super().__init__()
        self.linear = site.is_linear
        b = site.base.weight[:, 0] if site.base.bias is None else site.base.bias
        self.delta = nn.Parameter(torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)))

    def shift(self, base):
        return self.delta

    def forward(self, x, base):
        if self.linear and alike(x, self.delta) and alike(x, base.weight):
            return F.linear(x, base.weight, self.bias(base))
        return super().forward(x, base)

    def update(self, x, base, y):
        first = isinstance(base.module, CHANNELS_FIRST)  # y is [batch, d_out, ...]
        return self.delta.reshape(-1, *[1] * (y.dim() - 2)) if first else self.delta


@register("bitfit")
class BitFit(Structure):
    """BitFit: b = b0 + delta b for every bias of the base, norms included; weights stay.

    Ben-Zaken et al. 2021. Their half-size variant trains the biases of the queries and of the first feed-forward
    layers: target_modules=[query,intermediate.dense] in a BERT. The gradient of a key's bias is zero: softmax does not
    see it."""

    paper = "BitFit, arXiv 2106.10199"
    # a linear layer with another forward may do anything to its bias
    fits = staticmethod(lambda module: is_linear(module) or (has_bias(module) and not isinstance(module, nn.Linear)))

    @dataclass
    class Config(StructureConfig):
        """add_missing: a linear layer without a bias gets one, zero at first. Otherwise `all` passes over it, and
        naming it is refused."""

        target_modules: Any = "all"
        add_missing: bool = False

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        bare = [s.name for s in adapter.sites if not has_bias(s.base.module)]
        named = not set(config.target_modules) <= set(WORDS)
        if bare and not config.add_missing and (named or len(bare) == len(adapter.sites)):
            raise UserError(
                f"{', '.join(bare[:3])}{' and more' if bare[3:] else ''} ({len(bare)} of {len(adapter.sites)} targets) "
                "have no bias: add_missing=true gives them one"
            )

    def build(self, site, make):
        return BitFitDelta(site) if has_bias(site.base.module) or self.config.add_missing else None
