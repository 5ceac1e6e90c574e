import re
from dataclasses import dataclass, field
from typing import Any, List, Optional  # noqa: UP035  OmegaConf

import torch
import torch.nn as nn

from ..adapter import Delta, Structure, linear
from ..adapter.peft import exactly
from ..errors import UserError
from ..kernels import rescale
from ..registry import StructureConfig, nearest, register
from ..targets import matches

KEYS_VALUES = r"(.*\.)?((k|v|key|value)(_proj|_lin)?|c_attn|qkv(_proj)?|query_key_value|Wqkv)"
SECOND = (
    r"(.*\.)?(down_proj|fc2|fc_out|lin2|linear2|dense_4h_to_h|ffn_output|mlp\.(c_proj|Wo)|w2|"
    r"(?<!attention\.)(output\.dense|wo))"
)
VECTOR = "ia3_l"  # PEFT's name of l


class Scaled(Delta):
    """l [d_out], or [d_in] where `second`: trained, 1 at the start"""

    def __init__(self, site, size: int):
        super().__init__()
        w = site.base.weight
        self.l = nn.Parameter(torch.ones(size, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device))


class OutputScaled(Scaled):
    """y = l * (W0 x + b): W = diag(l) W0, bias = l * b"""

    def weight(self, base):
        return self.l[:, None] * base.weight

    def shift(self, base):
        return None if base.bias is None else (self.l - 1) * base.bias

    def update(self, x, base, y):
        return (self.l - 1) * y

    def forward(self, x, base):
        return rescale(base(x), self.l)


class InputScaled(Scaled):
    """y = W0 (l * x) + b: W = W0 diag(l)"""

    def weight(self, base):
        return base.weight * self.l

    def update(self, x, base, y):
        return linear((self.l - 1) * x, base.weight)

    def forward(self, x, base):
        return base(rescale(x, self.l))


@register("ia3")
class IA3(Structure):
    """IA3: keys, values and the hidden activation of each feed-forward block are multiplied by trained vectors l.

    Liu et al. 2022. A key or value projection is scaled at its output, W = diag(l) W0 and bias l * b; the
    second feed-forward layer at its input, W = W0 diag(l). (The authors scale the output of a gated block's linear
    half, the same function.) Which layers these are only their names tell: grouped-query keys are as narrow as a second
    feed-forward layer. The defaults know the names of BERT, GPT-2, Llama, T5, ViT and their kin; any other model is
    refused until it is told. A fused projection is scaled whole, its queries too. PEFT's defaults take queries
    for keys in some models, and in BERT also scale the attention's own output layer.

    Cost: one pass over an output or an input; no product."""

    paper = "IA3, arXiv 2205.05638"
    gives = frozenset({"weight"})
    does = frozenset({"scales rows"})

    @dataclass
    class Config(StructureConfig):
        """feedforward_modules: which targets are scaled at their input, named as target_modules names them (null: the
        second feed-forward layers that the default targets know); all others at their output."""

        target_modules: Any = field(default_factory=lambda: [KEYS_VALUES, SECOND])
        feedforward_modules: Optional[List[str]] = None  # noqa: UP006, UP045

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        given = config.feedforward_modules
        names = [s.name for s in adapter.sites]
        hits = {e: {n for n in names if matches(e, n)} for e in ([SECOND] if given is None else given)}
        if given is not None and (idle := [e for e, hit in hits.items() if not hit]):
            raise UserError(f"feedforward_modules entry {idle[0]!r} matches no target; {nearest(idle[0], names)}")
        self.__dict__["second"] = set().union(*hits.values())

    def build(self, site, make):
        return InputScaled(site, site.d_in) if site.name in self.second else OutputScaled(site, site.d_out)

    def vectors(self):
        """(layer, l as PEFT keeps it): [1, d_in] of an input, [d_out, 1] of an output."""
        for site, d in self.adapter.inside(Scaled):
            yield site.name, d.l[None] if isinstance(d, InputScaled) else d.l[:, None]

    def to_peft(self, out):
        # a regular expression: PEFT's list would also take names that only end in one of them
        second = "|".join(re.escape(n) for n in sorted(self.second))
        out.fields |= {"peft_type": "IA3", "feedforward_modules": second or []}
        out.layers = {name: {VECTOR: v} for name, v in self.vectors()}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "IA3":
            return None
        saved.drop("peft_type", "feedforward_modules", "init_ia3_weights")
        shapes = {n: t[VECTOR].shape for n, t in saved.layers.items() if VECTOR in t}
        return {"feedforward_modules": [exactly(n) for n, (rows, columns) in shapes.items() if rows == 1 < columns]}

    def fill(self, saved):
        for name, v in self.vectors():
            saved.take(name, VECTOR, v)
