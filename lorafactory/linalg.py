"""Linear algebra that several variants share, in the inputs' own dtype; Gram matrices are batched over leading
dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

Spectrum = tuple[Tensor, Tensor]  # eigenvalues [..., n], ascending, and eigenvectors [..., n, n]


def truncated_svd(m: Tensor, rank: int, niter: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of m [p, q]: U [p, rank], S [rank], V^T [rank, q]; fewer where m has fewer.

    niter 0: exact; otherwise randomised (Halko et al. 2011), on 2 rank directions from torch's generator with that many
    power iterations."""
    rank = min(rank, *m.shape)
    if niter:
        u, s, v = torch.svd_lowrank(m, min(2 * rank, *m.shape), niter)
        vt = v.mT
    else:
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def product_svd(b: Tensor, a: Tensor, rank: int, niter: int = 0, oversample: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of B A, for B [p, n] and A [n, q], without forming it: U [p, rank], S [rank], V^T
    [rank, q]; fewer where n, p or q is less.

    niter 0: exact, by QR of both factors; otherwise randomised (Halko et al. 2011), on rank + oversample directions from
    torch's generator with that many power iterations."""
    if niter:
        omega = torch.randn(a.shape[1], min(rank + oversample, *b.shape, *a.shape), dtype=a.dtype, device=a.device)
        q = torch.linalg.qr(b @ (a @ omega))[0]
        for _ in range(niter):
            q = torch.linalg.qr(a.mT @ (b.mT @ q))[0]
            q = torch.linalg.qr(b @ (a @ q))[0]
        b, a = q, (q.mT @ b) @ a
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    return qb @ u[:, :rank], s[:rank], vt[:rank] @ qa.mT


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """Frobenius, of B A, without forming it."""
    return torch.linalg.matrix_norm(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.mT)[1].mT)


def spectrum(gram: Tensor) -> Spectrum:
    """Of a Gram matrix [..., n, n]; rounding leaves no eigenvalue below zero."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0), vectors


def inverse(of: Spectrum, damping: float = 0.0, condition: float = 1e6) -> Tensor:
    """(gram + damping I)^-1, [..., n, n]; a pseudo-inverse: an eigenvalue below 1 / condition of the largest counts as
    zero, so that zero has the inverse zero."""
    values, vectors = of[0] + damping, of[1]
    kept = values > values.amax(-1, keepdim=True) / condition
    return (vectors * torch.where(kept, 1 / values, 0.0)[..., None, :]) @ vectors.mT


def sylvester(p: Spectrum, q: Spectrum, c: Tensor) -> Tensor:
    """X [..., n, n] with P X + X Q = c, for Gram matrices P and Q given by their spectra; zero where both are zero."""
    sums = p[0][..., :, None] + q[0][..., None, :]
    x = p[1].mT @ c @ q[1]
    return p[1] @ torch.where(sums > 0, x / sums, 0.0) @ q[1].mT


def hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """(B [p, r1 r2], A [r1 r2, q]) with B A = (B1 A1) * (B2 A2), entry by entry: Khatri-Rao products, of B1 and B2 row by
    row, of A1 and A2 column by column."""
    return (b1[:, :, None] * b2[:, None, :]).flatten(1), (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)


def orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt on the rows [n, d], in their order: each new one points as its own row does."""
    q, r = torch.linalg.qr(rows.mT)
    return (q * r.diagonal().sign()).mT


def off_orthonormal(rows: Tensor) -> Tensor:
    """|R R^T - I|^2, zero for orthonormal rows [n, d]."""
    return (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().sum()


def mean_off_orthonormal(matrices: list[Tensor]) -> Tensor:
    """The mean of |R R^T - I| over matrices of rows, the norm not squared."""
    return torch.stack([off_orthonormal(m).clamp_min(1e-24).sqrt() for m in matrices]).mean()


def polar(m: Tensor) -> Tensor:
    """The orthogonal matrix that is nearest to m [n, n]."""
    u, _, vt = torch.linalg.svd(m)
    return u @ vt


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def split(n: int, parts: int) -> list[int]:
    """n as a product of about equal factors: each the largest divisor of what is left that is not above its root."""
    factors = []
    for left in range(parts, 1, -1):
        factors.append(next(k for k in range(round(n ** (1 / left)) + 1, 0, -1) if n % k == 0 and k**left <= n))
        n //= factors[-1]
    return [*factors, n]


def skew(upper: Tensor, size: int) -> Tensor:
    """[..., size (size - 1) / 2], the entries above the diagonal row by row -> S [..., size, size] with S^T = -S."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    s = upper.new_zeros(*upper.shape[:-1], size, size)
    s[..., rows, columns] = upper
    return s - s.mT


def upper(s: Tensor) -> Tensor:
    """What skew() made S of."""
    rows, columns = torch.triu_indices(s.shape[-1], s.shape[-1], 1, device=s.device)
    return s[..., rows, columns]


def cayley(s: Tensor, terms: int | None = None) -> Tensor:
    """(I + S)(I - S)^-1, a rotation for every skew S [..., n, n]; its inverse is that of -S.

    terms: its Neumann series, cut to I + 2 S + ... + 2 S^(terms - 2) + S^(terms - 1): no solve, and nearly a rotation
    while S is small."""
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    if terms is None:
        return 2 * torch.linalg.inv(eye - s) - eye  # the same, and its gradient needs no further solve
    total, power = eye + 2 * s, s
    for _ in range(terms - 3):
        power = power @ s
        total = total + 2 * power
    return total + power @ s


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., n b] times the block-diagonal matrix of blocks [n or 1, b, c], row by row: [..., n c]."""
    rows = x.unflatten(-1, (len(blocks) if len(blocks) > 1 else -1, blocks.shape[-2]))
    if len(blocks) == 1:
        return (rows @ blocks[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", rows, blocks).flatten(-2)
