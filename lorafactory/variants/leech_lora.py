from dataclasses import dataclass

import torch

from .. import linalg
from ..adapter.framed import Framed, FramedConfig, FramedDelta
from ..registry import register

SIZE = 24


def character(n: int, p: int) -> int:
    """1 where n is a square modulo the prime p, -1 where it is not, 0 where p divides it."""
    n %= p
    return 0 if n == 0 else 1 if any(k * k % p == n for k in range(1, p)) else -1


def hadamard() -> torch.Tensor:
    """Paley's Hadamard matrix of order 24, its first row all ones: the minus signs of its rows span the Golay code, and
    the rows of 2 H / sqrt 8 are 24 orthogonal vectors of the Leech lattice."""
    h = torch.eye(SIZE, dtype=torch.float64)
    h[0, 1:], h[1:, 0] = 1, -1
    h[1:, 1:] += torch.tensor([[character(j - i, 23) for j in range(23)] for i in range(23)])
    return h * h[0]


def golay() -> list[list[int]]:
    """Twelve generators of the extended binary Golay code, [I | B]."""
    b = [[0] + [1] * 11] + [[1] + [int(character(j - i, 11) != 1) for j in range(11)] for i in range(11)]
    return [[int(i == k) for k in range(12)] + row for i, row in enumerate(b)]


def hermite(rows: list[list[int]]) -> list[list[int]]:
    """The Hermite normal form of the lattice that integer vectors of full rank span: an upper triangular basis."""
    rows = [list(r) for r in rows]
    basis: list[list[int]] = []
    for c in range(len(rows[0])):
        while len(live := sorted((r for r in rows if r[c]), key=lambda r: abs(r[c]))) > 1:
            for r in live[1:]:
                subtract(r, live[0], r[c] // live[0][c])
        pivot = [v if live[0][c] > 0 else -v for v in live[0]]
        rows = [r for r in rows if r is not live[0]]
        for b in basis:
            subtract(b, pivot, b[c] // pivot[c])
        basis.append(pivot)
    return basis


def subtract(row: list[int], other: list[int], times: int) -> None:
    row[:] = [v - times * w for v, w in zip(row, other, strict=True)]


def basis() -> torch.Tensor:
    """Of sqrt 8 times the Leech lattice, [24, 24]."""
    unit = lambda *at: [dict(at).get(k, 0) for k in range(SIZE)]  # noqa: E731
    rows = [[2 * v for v in c] for c in golay()]
    rows += [unit((0, 4), (j, sign)) for j in range(1, SIZE) for sign in (4, -4)]
    return torch.tensor(hermite([*rows, unit((0, 8)), [-3] + [1] * 23]), dtype=torch.float64)


def sketch() -> torch.Tensor:
    """The author's placeholder: 2 on the diagonal and above it, -2 in the corner. Not the Leech lattice."""
    m = 2 * (torch.eye(SIZE, dtype=torch.float64) + torch.eye(SIZE, dtype=torch.float64).roll(1, 1))
    m[-1, 0] = -2
    return m


class LeechDelta(FramedDelta):
    """W = W0 + s M; M [d_out, d_in] is a block [24, 24] again and again along the diagonal; s [1] trained"""


@register("leech_lora")
class LeechLoRA(Framed):
    """Leech-LoRA: y = W0 x + s Q x, Q a fixed orthogonal block [24, 24] repeated along the diagonal; s trains.

    Kornienko 2026, without measured results. The public code orthonormalises a placeholder (`paper_sketch`, which is not
    the Leech lattice), starts at s = 1 and fits only layers of 24 by 24. Here Q is `leech_frame`, 24 orthogonal vectors of
    the lattice (Paley's Hadamard matrix over sqrt 24), or `leech_basis_polar`, the orthogonal matrix nearest to a basis of
    it; both, the tiling and s = 0 are inferred. The controls random and identity tell whether the lattice matters. 768 is
    a whole number of blocks, 512 and 1024 are not: what is left over maps to itself unless `tail` says otherwise.

    Cost: 24 products an input of each position."""

    paper = "Leech-LoRA, doi 10.5281/zenodo.18798802"
    delta, size = LeechDelta, SIZE
    constructions = {
        "leech_frame": lambda: hadamard() / SIZE**0.5,
        "leech_basis_polar": lambda: linalg.polar(basis()),
        "paper_sketch": lambda: linalg.orthonormal(sketch().T).T,
    }

    @dataclass
    class Config(FramedConfig):
        """construction: leech_frame, leech_basis_polar, paper_sketch, random or identity."""

        construction: str = "leech_frame"
