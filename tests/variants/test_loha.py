import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates
from torch.utils.flop_counter import FlopCounterMode

from lorafactory import Adapted, UserError, attach, linalg, registry

TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
CHANGES = {"rank_dropout_scale": ([False], {"rank_dropout": 0.5}), "start": (["normal"], {})}


def test_equation_by_hand():
    """B1 = [1; 2], A1 = [3, 4, 5], B2 = [1; -1], A2 = [1, 0, 2]: 6 [[3, 4, 5], [6, 8, 10]] * [[1, 0, 2], [-1, 0, -2]]."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "loha", rank=1, alpha=6.0)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.B1.copy_(torch.tensor([[1.0], [2.0]]))
        d.A1.copy_(torch.tensor([[3.0, 4.0, 5.0]]))
        d.B2.copy_(torch.tensor([[1.0], [-1.0]]))
        d.A2.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
    update = torch.tensor([[18.0, 0.0, 60.0], [-36.0, 0.0, -120.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_the_pair_of_rank_rank_squared_is_the_product():
    """Entry by entry, for two pairs of different ranks."""
    b1, a1, b2, a2 = torch.randn(5, 2), torch.randn(2, 7), torch.randn(5, 3), torch.randn(3, 7)
    b, a = linalg.hadamard(b1, a1, b2, a2)
    assert b.shape == (5, 6) and a.shape == (6, 7) and close(b @ a, (b1 @ a1) * (b2 @ a2))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_both_ways_to_compute_are_one_function(rank):
    """Below and above the rank where the dense update is the cheaper way; outputs and gradients in float64."""
    torch.manual_seed(0)
    adapted = attach(Net().double(), "loha", rank=rank, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        x = torch.randn(6, s.d_in, dtype=torch.float64, requires_grad=True)
        ps = [d.B1, d.A1, d.B2, d.A2, x]
        got = d.product(x)
        want = F.linear(x, d.scale * (d.B1 @ d.A1) * (d.B2 @ d.A2))
        assert close(got, want) and got.abs().max() > 1e-3
        g = torch.randn_like(got)
        mine, true = torch.autograd.grad(got, ps, g), torch.autograd.grad(want, ps, g)
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_where_the_second_product_is_all_ones_it_is_lora():
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    loha = attach(copy.deepcopy(base), "loha", rank=3, alpha=6.0)
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=6.0)
    perturb(lora.adapter, 1.0)
    d, low = loha.adapter.deltas["0"], lora.adapter.deltas["0"].low_rank
    with torch.no_grad():
        d.B1.copy_(low.B)
        d.A1.copy_(low.A)
        d.B2.fill_(1.0)
        d.A2.fill_(1 / 3)
    assert close(loha(x), lora(x)) and not close(loha(x), base(x))


def test_rank_is_up_to_rank_squared():
    for rank, want in ((1, 1), (2, 4), (4, 16), (6, 24)):
        adapted = attach(Net(), "loha", rank=rank, start="normal", **TARGETS)
        with torch.no_grad():
            for _, d in linear_sites(adapted):
                d.B2.normal_()
        assert [int(torch.linalg.matrix_rank(u.double(), rtol=1e-6)) for u in updates(adapted)] == [want] * 3


def test_signs_of_both_pairs_cancel():
    adapted = attach(Net(), "loha", rank=3, **TARGETS)
    perturb(adapted.adapter, 1.0)
    before = updates(adapted)
    with torch.no_grad():
        for _, d in linear_sites(adapted):
            d.B1.neg_()
            d.A2.neg_()
    assert all(torch.equal(b, u) for b, u in zip(before, updates(adapted), strict=True))


@pytest.mark.parametrize("start, zero", [("uniform", "A2"), ("normal", "B2")])
def test_start(start, zero):
    """One tensor is zero, and it alone has a gradient in the first step."""
    base = nn.Sequential(nn.Linear(300, 200))
    x = torch.randn(9, 300)
    adapted = attach(copy.deepcopy(base), "loha", rank=8, start=start)
    d = adapted.adapter.deltas["0"]
    assert torch.equal(adapted(x), base(x)) and float(d.scale) == 1.0
    adapted(x).square().sum().backward()
    assert [n for n, p in d.named_parameters() if p.grad.any()] == [zero]
    deviation = {n: float(p.detach().std()) for n, p in d.named_parameters() if n != zero}
    if start == "uniform":
        want = {"B1": (8 * 3) ** -0.5, "A1": 900**-0.5, "B2": (8 * 3) ** -0.5}
        assert d.A1.abs().max() <= 300**-0.5 and d.B1.abs().max() <= 8**-0.5
    else:
        want = {"B1": 0.1, "A1": 1.0, "A2": 1.0}
    assert deviation == pytest.approx(want, rel=0.05)


def test_a_wrapper_that_silences_it_gets_a_random_start():
    for start in ("uniform", "normal"):
        made = Adapted(Net(), registry.config("loha", rank=2, start=start), seed=0)
        for _, d in linear_sites(made):
            d.randomize()
        assert all(u.abs().max() > 1e-3 for u in updates(made.begin()))


def test_dropouts():
    """Of the input, of outputs (the others multiplied up), of the whole update; in training only."""
    x = torch.randn(40, 24)
    for options in ({"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}):
        adapted = attach(Net(), "loha", rank=2, **options, **TARGETS)
        perturb(adapted.adapter, 1.0)
        d, s = adapted.adapter.deltas["fc1"], adapted.adapter.sites[0]
        full = d.eval().update(x, s.base, None)
        assert torch.equal(full, d.product(x))
        d.train()
        seen = [d.update(x, s.base, None) for _ in range(60)]
        if "dropout" in options:
            mean = sum(seen) / 60
            assert (mean - full).norm() < 0.4 * full.norm() and not any(torch.equal(u, full) for u in seen)
        elif "rank_dropout" in options:
            for u in seen:
                kept = u.any(0)
                assert 0 < kept.sum() < 40 and close(u, full * kept / kept.float().mean())
        else:
            silent = [not u.any() for u in seen]
            assert 15 < sum(silent) < 45 and all(n or torch.equal(u, full) for n, u in zip(silent, seen, strict=True))
    plain = attach(Net(), "loha", rank=2, rank_dropout=0.5, rank_dropout_scale=False, **TARGETS)
    perturb(plain.adapter, 1.0)
    d, s = plain.adapter.deltas["fc1"], plain.adapter.sites[0]
    u, full = d.train().update(x, s.base, None), d.product(x)
    assert 0 < u.any(0).sum() < 40 and torch.equal(u, full * u.any(0))


def test_outputs_that_are_all_dropped_stay_finite():
    adapted = attach(nn.Sequential(nn.Linear(3, 2)), "loha", rank=1, rank_dropout=0.9).train()
    perturb(adapted.adapter, 1.0)
    assert all(adapted(torch.randn(4, 3)).isfinite().all() for _ in range(20))


def test_a_mixture_keeps_the_dropouts():
    adapted = attach(Net(), "loha+molora", rank=2, rank_dropout=0.5, **TARGETS)
    perturb(adapted.adapter, 1.0)
    x = torch.randn(4, 24)
    assert not torch.equal(adapted.train()(x), adapted(x)) and torch.equal(adapted.eval()(x), adapted(x))


@pytest.mark.parametrize("rank, flops", [(2, 2 * 24 * (24 * 4 + 2 * 4 * 4)), (6, 2 * 2 * 24 * 24 * 6)])
def test_dora_over_it_takes_the_cheaper_norm(rank, flops):
    """Of rank 4 as a pair: W0 A^T, A A^T and B times that; of rank 36, more than 24: the weight, two products of rank 6."""
    adapted = attach(Net(), "loha+dora", rank=rank, target_modules=["fc3"])
    perturb(adapted.adapter, 1.0)
    d, base = adapted.adapter.deltas["fc3"], adapted.adapter.sites[0].base
    with FlopCounterMode(display=False) as counter:
        square = d.squares(base)
    assert counter.get_total_flops() == flops
    assert close(square, d.inner.weight(base).square().sum(1))


def test_counts():
    adapted = attach(copy.deepcopy(roberta_base()), "loha", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 2 * 8 * (768 + 768) == 589_824


def test_nonsense():
    with pytest.raises(UserError, match=r"rank 25 is more than fc1 \[40, 24\] can have: at most 24"):
        attach(Net(), "loha", rank=25)
    for options in ({"rank": 0}, {"alpha": 0.0}, {"rank_dropout": 1.0}, {"module_dropout": -0.1}, {"start": "zero"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "loha", **options)
