from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter.spectral import Spectral, SpectralConfig, SpectralDelta
from ..registry import register

STARTS = ("normal", "zero")


class FourierFTDelta(SpectralDelta):
    """W_pq = W0_pq + s / (d_out d_in) sum_k c_k cos(2 pi (p j_k / d_out + q l_k / d_in)); c [n] trained, at (j_k, l_k)"""

    own = "fourier"

    def analyse(self, x):
        return torch.fft.fft(x, norm="forward")

    def synthesise(self, z):
        return torch.fft.fft(z, norm="forward").real

    def transform(self, f):
        return torch.fft.ifft2(f).real


@register("fourierft")
class FourierFT(Spectral):
    """FourierFT: W = W0 + s Re(IDFT2(F)), F [d_out, d_in] zero but for n trained coefficients at random entries.

    Gao et al. 2024; the entries are the same for all layers of a shape. s multiplies the inverse transform, which divides
    by d_out d_in. c is real, so the update is even, dW_pq = dW_-p,-q (indices modulo d_out and d_in): even with all entries
    of F it has only about half of the dimensions of all matrices. (j, l) and (-j, -l) are one and the same cosine. The
    start is the authors', c ~ N(0, 1), so that attaching changes the output, of small layers more than they bear;
    start=zero does not. Their bias of the entries to a frequency is left out.

    Cost: with few entries, 512 n < d_out d_in, F is applied between two transforms of the activations, complex:
    about d_in log d_in + n + d_out log d_out products a position, and once more in the backward pass, which keeps x
    alone. An entry counts that much because it is gathered and scattered (measured on a CPU). Otherwise the update
    [d_out, d_in] is formed, one transform in two dimensions a step, as PEFT always does, and kept for the backward pass; W0 and
    it are multiplied as one."""

    paper = "FourierFT, arXiv 2405.03003"
    gives = frozenset({"weight"})
    zero_start = False
    kind = "FOURIERFT"

    @dataclass
    class Config(SpectralConfig):
        """start: of c, normal or zero."""

        scale: float = 150.0
        start: str = "normal"

        def check(self):
            super().check()
            self.check_choices(start=STARTS)

    def build(self, site, make):
        delta = FourierFTDelta(self.positions[site.sizes], site, self.n[site.name], self.config.scale)
        if self.config.start == "normal":
            nn.init.normal_(delta.c)
        return delta
