import math
from dataclasses import dataclass, field
from typing import Dict, Optional  # noqa: UP035  as in registry

import torch
import torch.nn as nn

from ..adapter import Delta, Elastic, Structure, linear
from ..adapter.peft import common, exactly, only_linear
from ..errors import UserError
from ..registry import StructureConfig, register
from ..targets import per_site

STARTS = ("xavier", "kaiming", "normal", "zero")
LEAST = 8  # blocks below this are quicker as one dense product, on a CPU


class C3ADelta(Elastic, Delta):
    """W = W0 + C / d_in, C of circulant blocks [b, b]: C_mn[k, j] = w_mn[(j - k) mod b]; w [d_out / b, d_in / b, b] trained"""

    def __init__(self, site, size: int, start: str):
        super().__init__()
        self.d_in, self.d_out = site.d_in, site.d_out
        self.w = nn.Parameter(site.new(site.d_out // size, site.d_in // size, size))
        bounds = {"xavier": math.sqrt(6 / (site.d_in + site.d_out)), "kaiming": math.sqrt(1 / site.d_in)}
        if start == "normal":
            nn.init.normal_(self.w)
        elif start in bounds:
            nn.init.uniform_(self.w, -bounds[start], bounds[start])

    def shapes(self):
        return {"w": ("m", "n", "b")}

    def complaints(self, saved):
        bad = super().complaints(saved)
        if not bad and (saved["w"].shape[0], saved["w"].shape[1]) != self.blocks(saved["w"].shape[2]):
            bad = [f"w is {list(saved['w'].shape)}, which are no blocks of [{self.d_out}, {self.d_in}]"]
        return bad

    def blocks(self, size: int):
        """How many of this size make the update, down and across; 0 where they do not."""
        fits = size and self.d_out % size == 0 == self.d_in % size
        return (self.d_out // size, self.d_in // size) if fits else (0, 0)

    def dense(self):
        """The update [d_out, d_in]."""
        k = torch.arange(self.w.shape[-1], device=self.w.device)
        circulant = self.w[..., (k - k[:, None]) % len(k)]
        return circulant.transpose(1, 2).reshape(self.d_out, self.d_in) / self.d_in

    def weight(self, base):
        return base.weight + self.dense()

    def update(self, x, base, y):
        n, b = self.w.shape[1:]
        if b < LEAST:
            return linear(x, self.dense())
        x = torch.fft.rfft(x.to(self.w.dtype).unflatten(-1, (n, b)))
        w = torch.fft.rfft(self.w / self.d_in).conj()  # a product with each row of a circulant is a correlation
        return torch.fft.irfft(torch.einsum("...nf,mnf->...mf", x, w), b).flatten(-2)


@register("c3a")
class C3A(Structure):
    """C3A: W = W0 + C / d_in; C of circulant blocks [b, b], each given by one trained row of b numbers.

    Chen et al. 2024, as PEFT has it, which divides by d_in. The rank of a block is the number of non-zero entries in its
    Fourier transform, up to b, at 1 / b of its numbers. b divides d_in and d_out; null: the largest that does, in each
    layer. The start is PEFT's, uniform, so that attaching changes the output a little; start=zero does not. The gradient is
    autograd's: the backward pass that PEFT 0.21 wrote for it is wrong in x for blocks above two, which misleads whatever
    lies below.

    Cost: circular correlations by Fourier transform, 2 d_in d_out / b products a position beside the transforms of x and
    y; for blocks under 8 the update [d_out, d_in] is formed instead, once a step, which is quicker (on a CPU)."""

    paper = "C3A, arXiv 2407.19342"
    gives = frozenset({"weight"})
    zero_start = False

    @dataclass
    class Config(StructureConfig):
        """block_size: b; block_pattern: another for some layers, {name, suffix or regular expression: b}; start: of w, xavier
        (uniform in +-sqrt(6 / (d_in + d_out))), kaiming (uniform in +-1/sqrt(d_in)), normal (of deviation 1) or zero."""

        block_size: Optional[int] = None  # noqa: UP045
        block_pattern: Dict[str, int] = field(default_factory=dict)  # noqa: UP006
        start: str = "xavier"

        def check(self):
            self.check_least(1, "block_size", "block_pattern")
            self.check_choices(start=STARTS)

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.__dict__["sizes"] = per_site(config.block_pattern, adapter.sites, "block_pattern")

    def build(self, site, make):
        size = self.sizes.get(site.name, self.config.block_size) or math.gcd(site.d_in, site.d_out)
        if site.d_in % size or site.d_out % size:
            raise UserError(
                f"block_size is {size}; it must divide [{site.d_out}, {site.d_in}], the shape of {site.name}"
            )
        return C3ADelta(site, size, self.config.start)

    def to_peft(self, out):
        only_linear(self.name, self.adapter.sites)
        found = {s.name: d.w for s, d in self.adapter.inside(C3ADelta)}
        size, others = common({n: w.shape[-1] for n, w in found.items()})
        pattern = {n: w.shape[-1] for n, w in found.items() if exactly(n) in others}
        for n in pattern:
            if alike := [o for o in found if o.endswith(f".{n}")]:
                raise UserError(f"PEFT has one block size for names that end alike, {n} and {alike[0]}")
        out.fields |= {"peft_type": "C3A", "block_size": size, "block_size_pattern": pattern}
        out.layers = {n: {"c3a_kernel": w} for n, w in found.items()}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "C3A":
            return None
        sizes = {n: t["c3a_kernel"].shape[-1] for n, t in saved.layers.items() if "c3a_kernel" in t}
        if not sizes:
            raise UserError("it has no c3a_kernel")
        saved.drop("peft_type", "block_size", "block_size_pattern", "init_weights")
        size, others = common(sizes)
        return {"block_size": size, "block_pattern": others}

    def fill(self, saved):
        for site, d in self.adapter.inside(C3ADelta):
            saved.take(site.name, "c3a_kernel", d.w)
