import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F

from ..adapter.spectral import Spectral, SpectralConfig, SpectralDelta
from ..errors import UserError
from ..registry import register

WAVELETS = [f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in range(2, 11)] + [f"coif{n}" for n in range(1, 4)]
EARLY = (2, 3, 7)  # the symlets that tables have with the shorter delay


def inside(order: int) -> torch.Tensor:
    """The roots z inside the unit circle of sum_k C(order - 1 + k, k) y^k, y = (2 - z - 1/z) / 4; [order - 1], complex."""
    terms = torch.tensor([math.comb(order - 1 + k, k) for k in range(order)], dtype=torch.float64)
    companion = torch.diag(torch.ones(max(order - 2, 0), dtype=torch.float64), -1)[: order - 1, : order - 1]
    if order > 1:
        companion[:, -1] = -terms[:-1] / terms[-1]
    half = 1 - 2 * torch.linalg.eigvals(companion)  # (z + 1/z) / 2
    z = half + (half * half - 1).sqrt()
    return torch.where(z.abs() < 1, z, 1 / z)


def with_roots(z: torch.Tensor) -> torch.Tensor:
    """The low-pass filter with these roots, and as many at -1 and one more."""
    low = torch.ones(1, dtype=z.dtype)
    for root in torch.cat([z, -torch.ones(len(z) + 1, dtype=z.dtype)]):
        low = F.pad(low, (0, 1)) - root * F.pad(low, (1, 0))
    return low.real * 2**0.5 / low.real.sum()


def daubechies(order: int) -> torch.Tensor:
    """[2 order]: of shortest delay."""
    return with_roots(inside(order))


def symlet(order: int) -> torch.Tensor:
    """[2 order]: of each real root or conjugate pair, it or its inverse, so that the phase is the nearest to a linear one.

    Inverting turns the sign of a root's phase but for a linear part. What is left, of a filter or its reverse, is settled
    by delay."""
    pairs = [torch.stack([z, z.conj()] if z.imag > 0 else [z]) for z in inside(order) if z.imag >= 0]
    turns = torch.exp(-1j * torch.linspace(0, math.pi, 1025, dtype=torch.float64))
    phases = torch.stack([torch.angle(1 - z[:, None] * turns).sum(0) for z in pairs])
    signs = torch.cartesian_prod(torch.ones(1), *[torch.tensor([1.0, -1.0])] * (len(pairs) - 1)).view(-1, len(pairs))
    best = signs[(signs.double() @ phases).square().sum(1).argmin()]
    low = with_roots(torch.cat([z**s for z, s in zip(pairs, best.tolist(), strict=True)]))
    late = (torch.arange(2 * order) * low).sum() > (order - 0.5) * low.sum()
    return low if late == (order not in EARLY) else low.flip(0)


def coiflet(order: int) -> torch.Tensor:
    """[6 order], from tap -2 order on: orthonormal to its shifts by two, sum_k k^p h_k = 0 for 0 < p < 2 order, and
    sum_k (-1)^k k^p h_k = 0 for 0 <= p < 2 order.

    By Gauss and Newton's method from a filter with these moments that is not orthonormal, a Daubechies filter's
    autocorrelation."""
    n, taps = 6 * order, torch.arange(-2 * order, 4 * order, dtype=torch.float64)
    powers = (taps / (4 * order)) ** torch.arange(2 * order)[:, None]
    moments = torch.cat([powers, powers * (-1.0) ** taps])
    shifts = torch.stack([torch.diag(torch.ones(n - k, dtype=torch.float64), k) for k in range(0, n, 2)])
    want = torch.zeros(n // 2 + 4 * order, dtype=torch.float64)
    want[0], want[n // 2] = 1, 2**0.5
    short = daubechies(order)[None]
    low = F.pad(F.conv1d(short, short[None], padding=2 * order - 1)[0] / 2**0.5, (1, 2 * order))
    for _ in range(8):
        equations = torch.cat([(shifts @ low) @ low, moments @ low])
        slopes = torch.cat([(shifts + shifts.mT) @ low, moments])
        low = low + torch.linalg.lstsq(slopes, (want - equations)[:, None], driver="gelsd").solution[:, 0]
    return low


def filters(wavelet: str) -> torch.Tensor:
    """[2, L]: the low-pass and the high-pass filter of an orthonormal wavelet, in float64."""
    family = wavelet.rstrip("0123456789")
    low = {"db": daubechies, "sym": symlet, "coif": coiflet}[family](int(wavelet[len(family) :]))
    high = low.flip(0) * (-1.0) ** torch.arange(len(low))
    return torch.stack([low, high])


def analysis(x, bank):
    """[..., d] -> [..., 2 h]: low-pass coefficients, then high-pass ones; synthesis transposed."""
    rows = F.pad(x.reshape(-1, 1, x.shape[-1]), (0, x.shape[-1] % 2))
    return F.conv1d(rows, bank[:, None], stride=2, padding=bank.shape[1] - 2).reshape(*x.shape[:-1], -1)


def synthesis(z, bank, d: int):
    """[..., 2 h] -> [..., d], one level."""
    pairs = z.reshape(-1, 2, z.shape[-1] // 2)
    out = F.conv_transpose1d(pairs, bank[:, None], stride=2, padding=bank.shape[1] - 2)
    return out[..., :d].reshape(*z.shape[:-1], d)


class WaveFTDelta(SpectralDelta):
    """W = W0 + s T_out F T_in^T; T_out and T_in one level of wavelet synthesis, F zero but for c [n], trained

    F is wider than the weight by the filters' length less two, and the positions lie in the middle of it."""

    own = "wavelets"

    def __init__(self, positions, site, n: int, scale: float, wavelet: str | None):
        super().__init__(positions, site, n, scale)
        bank = None if wavelet is None else filters(wavelet).to(self.c)
        self.register_buffer("bank", bank, persistent=False)

    def size(self):
        longer = 0 if self.bank is None else self.bank.shape[1] - 2
        return (
            (self.d_out, self.d_in) if self.bank is None else tuple(d + d % 2 + longer for d in (self.d_out, self.d_in))
        )

    def at(self):
        rows, columns = super().at()
        if self.bank is None:
            return rows, columns
        (p, q), a, b = self.size(), self.size()[0] // 2, self.size()[1] // 2
        rows, columns = rows + (p - self.d_out) // 2, columns + (q - self.d_in) // 2
        lower, right = rows >= a, columns >= b
        return (
            rows % a + a * right,
            columns % b + b * lower,
        )  # what is high along rows stands on the right in PyWavelets

    def analyse(self, x):
        return x if self.bank is None else analysis(x, self.bank)

    def synthesise(self, z):
        return z if self.bank is None else synthesis(z, self.bank, self.d_out)

    def transform(self, f):
        return f if self.bank is None else synthesis(synthesis(f, self.bank, self.d_in).T, self.bank, self.d_out).T


@register("waveft")
class WaveFT(Spectral):
    """WaveFT: W = W0 + s IDWT2(F); F [d_out, d_in] zero but for n trained wavelet coefficients at random entries.

    Bilican et al. 2025: FourierFT with one level of a wavelet transform. c = 0 at first. With db1, Haar's wavelet, each
    coefficient changes four neighbouring weights by s / 2, and |dW|_F = s |c| on even sizes. Quarters of F and what
    longer filters do at the borders are as in PEFT: F wider, its entries in the middle. Daubechies' wavelets, his symlets
    and coiflets are computed, to PyWavelets' and PEFT's tables; PEFT 0.21's coif4 and coif5 are no orthonormal filters and
    are left out. wavelet=null trains n weights themselves, times s, as sparse methods do.

    Cost: with few entries, 512 n < d_out d_in, F is applied between one level of the transform of x and one of the
    synthesis of y: about 2 L (d_in + d_out) + n products a position, L = 2 N for dbN and symN, 6 N for coifN, and once more in
    the backward pass, which keeps x alone. Otherwise the update [d_out, d_in] is formed, as PEFT always does, and W0 and it
    are multiplied as one."""

    paper = "WaveFT, arXiv 2505.12532"
    gives = frozenset({"weight"})
    kind = "WAVEFT"

    @dataclass
    class Config(SpectralConfig):
        """n: 2592 in PEFT; wavelet: db1 to db10, sym2 to sym10, coif1 to coif3, or null for none."""

        scale: float = 25.0
        wavelet: Optional[str] = "db1"  # noqa: UP045

        def check(self):
            super().check()
            if self.wavelet is not None and self.wavelet not in WAVELETS:
                raise UserError(f"wavelet is {self.wavelet!r}; it takes {', '.join(WAVELETS)} or null")

    def build(self, site, make):
        c = self.config
        return WaveFTDelta(self.positions[site.sizes], site, self.n[site.name], c.scale, c.wavelet)

    def to_peft(self, out):
        super().to_peft(out)
        out.fields |= {"use_idwt": self.config.wavelet is not None, "wavelet_family": self.config.wavelet or "db1"}

    @classmethod
    def from_peft(cls, saved):
        options = super().from_peft(saved)
        if options is None:
            return None
        plain = saved.fields.get("use_idwt") is False
        options["wavelet"] = None if plain else saved.fields.get("wavelet_family", "db1")
        saved.drop("use_idwt", "wavelet_family", "proportional_parameters")
        return options
