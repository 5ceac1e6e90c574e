import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach
from lorafactory.variants.krona import shape

CHANGES = {"outer": ([[2, 4]], {}), "start": (["normal"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """s = 2, A = [1, 3], B = [[1, 2], [0, -1]]: A is the outer one, 2 [[1, 2, 3, 6], [0, -1, 0, -3]]."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "krona", outer=[1, 2], scale=2.0)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.A.copy_(torch.tensor([[1.0, 3.0]]))
        d.B.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    update = torch.tensor([[2.0, 4.0, 6.0, 12.0], [0.0, -2.0, 0.0, -6.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("outer", [None, [1, 1], [8, 2], [2, 8], [8, 8]])
def test_fast_path_is_the_kronecker_product(outer):
    """Outputs and gradients in float64, with more rows in A or more columns."""
    adapted = attach(Net().double(), "krona", outer=outer, scale=3.0, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), F.linear(x, 3 * torch.kron(d.A, d.B))
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (d.A, d.B, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_rank_is_the_product_and_can_be_full():
    for outer, want in (([4, 4], [24, 24, 24]), ([8, 2], [10, 6, 6]), ([1, 8], [3, 5, 3])):
        adapted = attach(Net().double(), "krona", outer=outer, **TARGETS)
        perturb(adapted.adapter, 1.0)
        assert [int(torch.linalg.matrix_rank(u, rtol=1e-9)) for u in updates(adapted)] == want


def test_default_shape():
    """The fewest parameters, a1 a2 = sqrt(d_out d_in) where that can be; of those the update's largest rank."""
    assert shape(768, 768) == (24, 32) and shape(2, 2) == (1, 2) and shape(1, 1) == (1, 1)
    assert shape(29, 31) == (1, 31), "primes: a row kron a column, of rank 1"
    for d_out, d_in in ((3072, 768), (40, 24), (17, 24)):
        a1, a2 = shape(d_out, d_in)
        assert d_out % a1 == 0 == d_in % a2
        sizes = [i * j for i in range(1, d_out + 1) for j in range(1, d_in + 1) if not d_out % i and not d_in % j]
        assert a1 * a2 + d_out * d_in // (a1 * a2) == min(n + d_out * d_in // n for n in sizes)


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_start(start):
    """B is zero and alone has a gradient in the first step."""
    base, x = nn.Sequential(nn.Linear(1600, 900)), torch.randn(9, 1600)
    adapted = attach(copy.deepcopy(base), "krona", start=start, outer=[30, 40])
    d = adapted.adapter.deltas["0"]
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    assert d.B.grad.any() and not d.A.grad.any() and not d.B.any()
    bound = 40**-0.5
    assert float(d.A.detach().std()) == pytest.approx(bound / 3**0.5 if start == "uniform" else bound, rel=0.06)
    assert (d.A.abs().max() <= bound) == (start == "uniform")


def test_it_is_lokr_with_whole_matrices():
    base, x = Net(), torch.randn(5, 24)
    lokr = attach(copy.deepcopy(base), "lokr", rank=8, alpha=24.0, **TARGETS)
    perturb(lokr.adapter, 1.0)
    for s, theirs in linear_sites(lokr):
        krona = attach(copy.deepcopy(base), "krona", outer=list(theirs.W1.shape), scale=3.0, target_modules=[s.name])
        d = krona.adapter.deltas[s.key]
        with torch.no_grad():
            d.A.copy_(theirs.W1)
            d.B.copy_(theirs.W2)
        assert close(d.weight(s.base), theirs.weight(s.base))
        x = torch.randn(5, s.d_in)
        assert close(d.update(x, s.base, None), theirs.update(x, s.base, None)) and theirs.product(x).any()


def test_dropout_is_of_what_the_update_reads():
    adapted = attach(Net(), "krona", dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    d, module, x = adapted.adapter.deltas["fc1"], adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ torch.kron(d.A, d.B).T)


def test_counts():
    """RoBERTa-base, query and value: 768 + 768 a matrix."""
    adapted = attach(copy.deepcopy(roberta_base()), "krona", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 1_536 == 36_864
    adapted = attach(copy.deepcopy(roberta_base()), "krona", outer=[24, 24], target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * (24 * 24 + 32 * 32)


def test_nonsense():
    with pytest.raises(UserError, match=r"outer is \[5, 8\]; it must divide \[24, 40\], the shape of fc2"):
        attach(Net(), "krona", outer=[5, 8], target_modules=["fc1", "fc2"])
    for options in ({"outer": [2]}, {"outer": [0, 2]}, {"scale": 0.0}, {"start": "zero"}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "krona", **options)
