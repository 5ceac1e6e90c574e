from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter.spectral import Spectral, SpectralConfig, SpectralDelta
from ..errors import UserError
from ..registry import register

STARTS = ("normal", "zero")
BANDWIDTH = 200.0


def bandpass(d_out: int, d_in: int, center: float, width: float) -> torch.Tensor:
    """log p [d_out, d_in] of the entries, -((D^2 - center^2) / (D width))^2; D is an entry's distance from frequency (0, 0),
    which the paper draws in the middle of the matrix and a transform has in its corner."""
    rows, columns = (torch.fft.fftfreq(d, 1 / d) for d in (d_out, d_in))
    distance = torch.hypot(rows[:, None], columns)
    log_p = -(((distance**2 - center**2) / (distance * width)) ** 2)
    return log_p.nan_to_num(nan=0.0, neginf=-torch.inf)  # 0 / 0: at the origin, center 0


def drawn_by(log_p: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n different positions, one after the other, each by p among those left: the least of exponential times over p."""
    times = torch.empty(log_p.numel()).exponential_(generator=torch.Generator().manual_seed(seed))
    return (log_p.flatten() - times.log()).topk(n).indices.to(torch.int32 if log_p.numel() < 2**31 else torch.int64)


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
    start=zero does not. With central_frequency f the entries are drawn by equation 5,
    p = exp(-((D^2 - f^2) / (D bandwidth))^2), D the distance from frequency (0, 0) in entries; theirs can draw an entry
    twice. PEFT has no such positions.

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
        """start: of c, normal or zero; central_frequency: entries rather at this distance from frequency (0, 0), in entries
        (null: anywhere); bandwidth: of that bias (null: 200, as in the paper)."""

        scale: float = 150.0
        start: str = "normal"
        central_frequency: Optional[float] = None  # noqa: UP045  OmegaConf
        bandwidth: Optional[float] = None  # noqa: UP045

        def check(self):
            super().check()
            self.check_choices(start=STARTS)
            self.check_least(0, "central_frequency")
            if self.bandwidth is not None and not self.bandwidth > 0:
                raise UserError(f"bandwidth is {self.bandwidth}; it must be positive")
            if self.bandwidth is not None and self.central_frequency is None:
                raise UserError(f"bandwidth is {self.bandwidth}, of no effect without central_frequency")

    def draw(self, site, n):
        c = self.config
        if c.central_frequency is None:
            return super().draw(site, n)
        log_p = bandpass(site.d_out, site.d_in, c.central_frequency, c.bandwidth or BANDWIDTH)
        return drawn_by(log_p, n, c.position_seed)

    def build(self, site, make):
        delta = FourierFTDelta(self.positions[site.sizes], site, self.n[site.name], self.config.scale)
        if self.config.start == "normal":
            nn.init.normal_(delta.c)
        return delta
