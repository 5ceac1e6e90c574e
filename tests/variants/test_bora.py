"""BoRA: DoRA on rows, then on columns."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, linear_sites, perturb, trained

from lorafactory import attach

OVER = ("bora", "vera+bora", "loha+bora", "shira+bora", "full+bora", "bora+pissa")


def one(weight, **options):
    module = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    adapted = attach(nn.Sequential(module), "bora", **options)
    return adapted, adapted.adapter.deltas["0"], adapted.model[0]


def test_equation_by_hand():
    """V = [3, 4; 0, 1]: rows of length 5 and 1. With m_r = (5, 3), H = [3, 4; 0, 3]: columns of length 3 and 5; with
    m_c = (6, 5), W = [6, 4; 0, 3]."""
    adapted, d, module = one(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), rank=1)
    assert d.rows.tolist() == [5.0, 1.0] and close(d.columns, torch.tensor([3.0, 17**0.5]))
    with torch.no_grad():
        d.rows.copy_(torch.tensor([5.0, 3.0]))
        d.columns.copy_(torch.tensor([6.0, 5.0]))
        module.bias.copy_(torch.tensor([7.0, 8.0]))
    want = torch.tensor([[6.0, 4.0], [0.0, 3.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(2)), want.T + module.bias), "the bias is not scaled"


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spelling", ["bora", "vera+bora", "shira+bora"])
def test_starts_at_the_base(spelling, transposed, columns_first):
    torch.manual_seed(0)
    base, x = Net(transposed), torch.randn(9, 24)
    options = {"decomposition": {"columns_first": columns_first}, "trained_modules": []}
    adapted = attached(spelling, base, Regression(base), **options)
    assert torch.equal(adapted(x), base(x)), "to the last bit"


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("spelling", OVER)
def test_the_side_that_comes_last_has_its_lengths(spelling, columns_first):
    adapted = trained(spelling, 0.3, transposed=columns_first, decomposition={"columns_first": columns_first})
    for site, d in linear_sites(adapted):
        v, w = d.inner.weight(site.base), d.weight(site.base)
        if columns_first:
            h = v * (d.columns / v.norm(dim=0))
            want = (d.rows / h.norm(dim=1))[:, None] * h
        else:
            h = (d.rows / v.norm(dim=1))[:, None] * v
            want = h * (d.columns / h.norm(dim=0))
        assert close(w, want, 2)
        last, first = (d.rows, d.columns) if columns_first else (d.columns, d.rows)
        assert close(w.norm(dim=1 if columns_first else 0), last.abs(), 2)
        assert not close(w.norm(dim=0 if columns_first else 1), first.abs(), 100), "only of H"


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_one_side_alone_is_dora(name):
    """Where the other side's magnitudes are its norms, its gain is 1."""
    torch.manual_seed(0)
    adapted = attach(Net(), "bora", rank=3, seed=1, trained_modules=[], decomposition={"columns_first": name == "rows"})
    perturb(adapted.adapter, 0.3)
    for site, d in linear_sites(adapted):
        v, dim = d.inner.weight(site.base).detach(), 0 if name == "rows" else 1
        with torch.no_grad():
            getattr(d, "columns" if name == "rows" else "rows").copy_(v.norm(dim=dim))
        m, norm = getattr(d, name), v.norm(dim=1 - dim)
        want = (m / norm)[:, None] * v if name == "rows" else v * (m / norm)
        assert close(d.weight(site.base), want, 2)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients(detach):
    """By autograd of the dense formula."""
    base = Net().double()
    adapted = attach(base, "bora", rank=3, seed=0, trained_modules=[], decomposition={"detach_norm": detach})
    perturb(adapted.adapter, 0.3)
    x = torch.randn(5, 24, dtype=torch.double, requires_grad=True)
    g, d = torch.randn(5, 40, dtype=torch.double), adapted.adapter.deltas["fc1"]
    (adapted.model.fc1(x) * g).sum().backward()
    low = d.inner.low_rank
    a, b, rows, columns, z = (p.detach().clone().requires_grad_() for p in (low.A, low.B, d.rows, d.columns, x))
    v = base.fc1.weight + low.scale * b @ a
    rho = v.norm(dim=1)
    rho = rho.detach() if detach else rho
    h = (rows / rho)[:, None] * v
    kappa = h.norm(dim=0)
    kappa = kappa.detach() if detach else kappa
    (nn.functional.linear(z, h * (columns / kappa), base.fc1.bias) * g).sum().backward()
    for mine, want in ((low.A, a), (low.B, b), (d.rows, rows), (d.columns, columns), (x, z)):
        assert close(mine.grad, want.grad, 2)
    if not detach:
        assert abs(float((d.rows.grad * d.rows).sum())) < 1e-10, "a common factor of m_r leaves W as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_of_zeros_are_the_inner_deltas(dtype):
    weight = torch.randn(6, 5)
    weight[1], weight[:, 2] = 0, 0
    adapted, d, module = one(weight.to(dtype), rank=2)
    base, x = adapted.adapter.sites[0].base, torch.randn(7, 5, dtype=dtype)
    for _ in range(3):
        y = adapted(x)
        y.float().square().sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in d.parameters())
        with torch.no_grad():
            for p in d.parameters():
                p.add_(0.1 * torch.randn_like(p))
                p.grad = None
    w, v = d.weight(base), d.inner.weight(base)
    r, c = d.gains(base)
    assert close(r[1], d.rows[1]) and close(c[2], d.columns[2]) and v[1].any() and w[1].any() and w[:, 2].any()


def test_a_gain_near_1_is_not_lost_beside_a_narrow_base():
    """c x would round to x."""
    weight = torch.randn(40, 24).bfloat16()
    adapted, d, module = one(weight, rank=2)
    base, x = adapted.adapter.sites[0].base, torch.randn(9, 24).bfloat16()
    with torch.no_grad():
        d.columns.mul_(1 + 1e-3 * torch.randn(24))
    want = x.float() @ (d.weight(base) - weight.float()).T
    got = d.update(x, base, base(x))
    assert want.abs().max() > 1e-3 and (got - want).abs().max() < 0.05 * want.abs().max()


def test_count_and_decay():
    """A LoRA's, and d_in + d_out a layer."""
    counts = [attach(Net(), v, rank=4, trained_modules=[]).num_trainable() for v in ("lora", "bora")]
    assert counts[1] - counts[0] == sum(m.in_features + m.out_features for m in Net().modules() if isinstance(m, nn.Linear))
    adapted = attach(Net(), "bora", rank=2, trained_modules=[])
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[p] for _, d in linear_sites(adapted) for p in (d.rows, d.columns)} == {0.0}


def test_merge():
    adapted = trained("bora", 0.3).eval()
    x = torch.randn(5, 24)
    y, before = adapted(x).detach(), copy.deepcopy(adapted.model.state_dict())
    adapted.merge()
    assert close(adapted(x), y, 5)
    adapted.unmerge()
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items())
