"""Singular: what trains between the frozen singular vectors of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Additive, linear
from .elastic import Elastic
from .site import Site

TOLERANCE = 1e-3  # of a mark, whose numbers are about 1


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of W [d_out, d_in], computed in float64 so that float32 holds the same numbers wherever two singular values
    differ at all; u_j is on the side of mark()'s direction."""
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    sign = torch.where(along(u.T) < 0, -1.0, 1.0).to(u)
    return u * sign, s, vt * sign[:, None]


def along(rows: Tensor) -> Tensor:
    """Each row's part along one fixed direction without structure, [k]."""
    return rows @ torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).sin()


def mark(u: Tensor, vt: Tensor) -> Tensor:
    """[2, k] numbers that another choice of singular vectors, or of their signs, would not have."""
    return torch.stack([along(u.double().T), along(vt.double())])


class Singular(Elastic, Additive):
    """W = W0 + U C V^T; U [d_out, k] and V^T [k, d_in] the leading singular vectors of W0, S [k] their singular values, all
    frozen; C [k, k], zero at first, is what trains: left() is U C, core(z) is C z.

    The vectors are twice the layer's size. Unless `kept`, a checkpoint holds a mark of them instead: loading computes them
    again from the same base and compares, so that what was trained never acts between other vectors."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    mark: Tensor

    def __init__(self, site: Site, k: int, kept: bool):
        super().__init__()
        self.d_out, self.d_in, self.kept = site.d_out, site.d_in, kept
        u, s, vt = svd(site.base.weight)
        like = site.new(0)
        self.register_buffer("U", u[:, :k].to(like).contiguous(), persistent=kept)
        self.register_buffer("S", s[:k].to(like), persistent=False)
        self.register_buffer("Vt", vt[:k].to(like).contiguous(), persistent=kept)
        self.register_buffer("mark", mark(u[:, :k], vt[:k]).to(like))

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        k = len(self.S)
        vectors: dict[str, tuple[int | str, ...]] = {"U": (self.d_out, k), "Vt": (k, self.d_in)}
        return {"mark": (2, k), **(vectors if self.kept else {}), **self.trained()}

    def trained(self) -> dict[str, tuple[int | str, ...]]:
        """The shapes of what trains."""
        raise NotImplementedError

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        bad = super().complaints(saved)
        if bad:
            return bad
        now = mark(saved["U"], saved["Vt"]) if self.kept else self.mark
        if (now - saved["mark"].to(now)).abs().max() < TOLERANCE:
            return []
        if self.kept:
            return ["mark is not that of U and Vt: the file is damaged"]
        return ["mark: the base has other singular vectors here (equal singular values?): train with save_basis=true"]

    def left(self) -> Tensor:
        raise NotImplementedError

    def core(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.left(), self.Vt

    def thin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.core(linear(x, self.Vt)), self.U
