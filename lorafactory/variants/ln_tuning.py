from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from ..adapter import Copy, Structure
from ..registry import StructureConfig, register

TENSORS = "ln_tuning_layers."  # PEFT's name of the copy


def is_norm(module):
    """A LayerNorm or RMSNorm, torch's or a model's own, with a gain: known by its class or the class's name."""
    named = any(c.__name__.endswith(("LayerNorm", "RMSNorm")) for c in type(module).__mro__)
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not list(module.children()) and (isinstance(module, nn.LayerNorm | nn.RMSNorm) or named)


@register("ln_tuning")
class LNTuning(Structure):
    """LayerNorm tuning: y = (g0 + dg) * norm(x) + (b0 + db); gain and bias of every norm layer train, all else stays.

    Zhao et al. 2023 (an RMSNorm has a gain alone). Each layer is trained as a copy, as in PEFT, so whatever a model's
    norm does with its gain stays right; the last norm is among them. PEFT's defaults name the norms of the models that it
    knows; here they are all layers that are one by their class or its name, and BatchNorm and GroupNorm are none.

    Cost: that of the norm layer itself."""

    paper = "LayerNorm tuning, arXiv 2312.11420"
    fits = staticmethod(is_norm)

    @dataclass
    class Config(StructureConfig):
        target_modules: Any = "all"

    def build(self, site, make):
        return Copy(site.base.module, self.adapter.memo)

    def copies(self):
        return self.adapter.inside(Copy)

    def to_peft(self, out):
        out.fields["peft_type"] = "LN_TUNING"
        for site, copy in self.copies():
            out.layers[site.name] = {TENSORS + n: t for n, t in copy.module.state_dict().items()}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "LN_TUNING":
            return None
        saved.drop("peft_type")
        return {}

    def fill(self, saved):
        for site, copy in self.copies():
            for n, t in copy.module.state_dict().items():
                saved.take(site.name, TENSORS + n, t)
