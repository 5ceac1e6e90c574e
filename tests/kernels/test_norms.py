"""sqnorm: every implementation against float64 from the definition."""

import pytest
import torch
from support_kernels import SHAPES, near

from lorafactory import kernels
from lorafactory.kernels import norms


def definition(w, a, b, s, axis, q):
    square = (w.double() + s * b.double() @ a.double()).square()
    return square.sum(axis) if q is None else (square * (q.double() if axis else q.double()[:, None])).sum(axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 70, 4)], ids=str)
def test_it_is_its_definition(where, axis, weighted, dtype, shape):
    device, kind = where
    d_out, d_in, r = shape
    w, a, b = (torch.randn(s, device=device) for s in ((d_out, d_in), (r, d_in), (d_out, r)))
    w, b = w.to(dtype), b * max(r, 1) ** -0.5
    q = torch.rand(d_in if axis else d_out, device=device) if weighted else None
    for s in (0.0, 0.3, 2.0, torch.tensor(16 / max(r, 1) ** 0.5, device=device)):
        exact = definition(w, a, b, float(s), axis, q)
        found = kernels.sqnorm(w, a, b, s, axis, q)
        base = kernels.squares(w, axis, q) if kind == "eager" else None
        assert found.dtype == torch.float32 and near(found.sqrt(), exact.sqrt(), 5e-7)
        assert near(kernels.sqnorm(w, a, b, s, axis, q, base).sqrt(), exact.sqrt(), 5e-7)
        given = [t.clone().requires_grad_() for t in (a, b)]  # with a gradient: the factored form
        wide = [t.detach().double().requires_grad_() for t in given]
        n = kernels.sqnorm(w, *given, s, axis, q)
        assert near(n.detach().sqrt(), exact.sqrt(), 2e-6)
        of = torch.randn_like(n)
        theirs = torch.autograd.grad(definition(w, *wide, float(s), axis, q), wide, of.double())
        for mine, exact_ in zip(torch.autograd.grad(n, given, of), theirs, strict=True):
            assert near(mine, exact_, 3e-6)


def test_zero_rows_nan_and_a_zero_update(where):
    device, kind = where
    a, b = torch.randn(4, 30, device=device), torch.randn(20, 4, device=device)
    w = torch.randn(20, 30, device=device)
    w[3] = -(b @ a)[3]
    w[5], w[6, 0] = 0.0, float("nan")
    w[7], w[8] = 1e-12 * w[7], 1e4 * w[8]
    n = kernels.sqnorm(w, a, b)
    assert 0 <= n[3] < 1e-5 and n[6].isnan() and torch.isfinite(n[[0, 5, 7, 8]]).all() and (n[[0, 5, 7, 8]] > 0).all()
    with torch.no_grad():
        same = torch.equal if kind != "reference" else torch.allclose
        assert same(kernels.sqnorm(w, a, torch.zeros_like(b), base=kernels.squares(w))[8:], kernels.squares(w)[8:])


def test_forms_agree_where_memory_is_split(monkeypatch):
    w, a, b = torch.randn(23, 40), torch.randn(3, 40), torch.randn(23, 3)
    q, p = torch.rand(40), torch.rand(23)
    whole = [kernels.sqnorm(w, a, b, 1.0, axis, weights) for axis, weights in ((1, None), (0, None), (1, q), (0, p))]
    monkeypatch.setattr(norms, "CACHED", 5 * 40)
    parts = [kernels.sqnorm(w, a, b, 1.0, axis, weights) for axis, weights in ((1, None), (0, None), (1, q), (0, p))]
    assert all(near(x, y.double(), 1e-6) for x, y in zip(parts, whole, strict=True))


def test_two_narrow_matrices_hold_a_wide_one():
    """What a GPU multiplies W with: exact products in float32, so the rest is what `high + low` loses of A."""
    a, w = torch.randn(16, 512), torch.randn(256, 512).to(torch.bfloat16)
    high, low = norms.halves(a, torch.bfloat16)
    assert high.dtype == low.dtype == torch.bfloat16 and near(high.double() + low.double(), a.double(), 2**-16)
    exact = w.double() @ a.double().T
    assert near(w.float() @ high.float().T + w.float() @ low.float().T, exact, 2**-16)
    assert not near(w.float() @ high.float().T, exact, 2**-12)


def test_under_autocast_it_stays_exact():
    w, a, b = torch.randn(50, 60), torch.randn(4, 60), torch.randn(50, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert near(kernels.sqnorm(w, a, b).sqrt(), definition(w, a, b, 1.0, 1, None).sqrt(), 5e-7)
        found = kernels.sqnorm(w, a.requires_grad_(), b)
    assert near(found.detach().sqrt(), definition(w, a.detach(), b, 1.0, 1, None).sqrt(), 2e-6)
