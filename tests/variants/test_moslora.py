import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, attached, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach, load, registry

CHANGES = {"start": (["identity"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
STARTS = ("kaiming", "orthogonal", "normal", "identity", "pairs")


def test_equation_by_hand():
    """alpha / rank = 2, A = [[1, 0], [0, 2]], M = [[0, 3], [1, 0]], B = [1, 10]: 2 B M A = [20, 12]."""
    module = nn.Linear(2, 1)
    adapted = attach(nn.Sequential(module, nn.Linear(1, 2)), "moslora", rank=1, target_modules=["0"])
    d = adapted.adapter.deltas["0"].mixed
    with torch.no_grad():
        d.A, d.M, d.B = (nn.Parameter(torch.tensor(t)) for t in ([[1.0, 0], [0, 2]], [[0.0, 3], [1, 0]], [[1.0, 10]]))
        d.scale.fill_(2.0)
    assert close(updates(adapted)[0], torch.tensor([[20.0, 12.0]]))
    x = torch.randn(4, 2)
    assert close(module(x), F.linear(x, module.weight + torch.tensor([[20.0, 12.0]]), module.bias))


@pytest.mark.parametrize("start", STARTS)
def test_fast_path_is_the_product(start):
    """Outputs and gradients in float64, square layer or not."""
    adapted = attach(Net().double(), "moslora", rank=4, start=start, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        x, m = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True), d.mixed
        got, want = d.update(x, s.base, None), F.linear(x, 4 * m.B @ m.M @ m.A)
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (m.A, m.M, m.B, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))
        assert torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight, rtol=1e-9) == 4


@pytest.mark.parametrize("start", STARTS)
def test_start(start):
    """B is zero and alone has a gradient in the first step."""
    base, x = nn.Sequential(nn.Linear(64, 40)), torch.randn(9, 64)
    adapted = attach(copy.deepcopy(base), "moslora", rank=32, start=start)
    d = adapted.adapter.deltas["0"].mixed
    assert torch.equal(adapted(x), base(x)) and not d.B.any()
    adapted(x).square().sum().backward()
    assert d.B.grad.any() and not d.A.grad.any() and not d.M.grad.any()
    m, eye = d.M.detach(), torch.eye(32)
    assert d.A.abs().max() <= 1 / 8 and 0.95 / 8 < d.A.abs().max()
    if start == "kaiming":
        assert m.abs().max() <= 32**-0.5 and 0.9 * 32**-0.5 < m.abs().max()
    elif start == "normal":
        assert float(m.std()) == pytest.approx(1.0, rel=0.1)
    elif start == "orthogonal":
        assert close(m @ m.T, eye) and not close(m, eye)
    elif start == "identity":
        assert torch.equal(m, eye)


def test_a_mixer_at_the_identity_starts_as_lora():
    """The first step of B is LoRA's, then M departs; LoRA's gradients are those of A and B while M is the identity."""
    base, x = Net(), torch.randn(5, 24)
    ours = attach(copy.deepcopy(base), "moslora", rank=3, start="identity", **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, **TARGETS)
    with torch.no_grad():
        for (_, d), (_, theirs) in zip(ours.adapter.low_ranks(), lora.adapter.low_ranks(), strict=True):
            theirs.A.copy_(d.A)
            d.B.normal_()
            theirs.B.copy_(d.B)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))
    for adapted in (ours, lora):
        adapted(x).square().sum().backward()
    for (_, d), (_, theirs) in zip(ours.adapter.low_ranks(), lora.adapter.low_ranks(), strict=True):
        assert close(d.A.grad, theirs.A.grad) and close(d.B.grad, theirs.B.grad) and d.M.grad.any()


def test_the_fixed_mixer_sums_the_halves():
    """(B_1 + B_2)(A_1 + A_2), of half the rank, and M does not train."""
    adapted = attach(Net().double(), "moslora", rank=4, alpha=4.0, start="pairs", frozen=True, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for (_, d), u in zip(adapted.adapter.low_ranks(), updates(adapted), strict=True):
        assert close(u, (d.B[:, :2] + d.B[:, 2:]) @ (d.A[:2] + d.A[2:])) and not d.M.requires_grad
        assert torch.linalg.matrix_rank(u, rtol=1e-9) == 2
    frozen = sum(d.M.numel() for _, d in adapted.adapter.low_ranks())
    assert adapted.num_trainable() == sum(p.numel() for p in adapted.adapter.parameters()) - frozen


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "moslora", rank=4, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    d, module, x = adapted.adapter.deltas["fc1"].mixed, adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ (4 * d.B @ d.M @ d.A).T)


def test_counts():
    """RoBERTa-base, query and value, rank 8: LoRA's 12,288 a matrix and 64 for the mixer."""
    adapted = attach(copy.deepcopy(roberta_base()), "moslora", rank=8, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * (12_288 + 64)


def test_nonsense():
    with pytest.raises(UserError, match="start is 'zero'; it takes kaiming"):
        attach(Net(), "moslora", start="zero")
    with pytest.raises(UserError, match="M changes nothing"):
        attach(Net(), "moslora", start="identity", frozen=True)
    with pytest.raises(UserError, match="a layer's rank is 3; it must be even"):
        attach(Net(), "moslora", rank=3, start="pairs")
    with pytest.raises(UserError, match="rank 25 is more than fc1"):
        attach(Net(), "moslora", rank=25)


# as a pair


def pairs(rank=4, gated=False, anchored=True, **options):
    """Perturbed pairs in float64 whose start is anchored."""
    torch.manual_seed(0)
    base = Net().double()
    adapted = attach(copy.deepcopy(base), "moslora+pissa" if anchored else "moslora", rank=rank, **options, **TARGETS)
    lows = [low for _, low in adapted.adapter.low_ranks()]
    for low in lows if gated else ():
        low.gate = nn.Parameter(torch.rand(rank, dtype=torch.float64) + 0.5)
    perturb(adapted.adapter, 0.5)
    return base, adapted, lows


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva"])
def test_a_start_of_the_pair_leaves_the_base(init, start):
    torch.manual_seed(0)
    base = Net().double()
    x = torch.randn(5, 24, dtype=torch.float64)
    adapted = attached(f"moslora+{init}", copy.deepcopy(base), Regression(base), rank=4, start=start, **TARGETS)
    assert close(adapted(x), base(x)) and any(low.A.any() for _, low in adapted.adapter.low_ranks())
    if init != "eva":
        assert all(torch.equal(low.M0, low.M) and low.M0.data_ptr() != low.M.data_ptr() for _, low in adapted.adapter.low_ranks())


def test_at_the_identity_pissa_starts_as_loras():
    base, x = Net().double(), torch.randn(5, 24, dtype=torch.float64)
    ours, lora = (attach(copy.deepcopy(base), n, rank=4, **o, **TARGETS)
                  for n, o in (("moslora+pissa", {"start": "identity"}), ("pissa", {})))  # fmt: skip
    for adapted in (ours, lora):
        adapted(x).square().sum().backward()
    for (_, d), (_, theirs) in zip(ours.adapter.low_ranks(), lora.adapter.low_ranks(), strict=True):
        assert close(d.A, theirs.A) and close(d.A.grad, theirs.A.grad) and close(d.B.grad, theirs.B.grad)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_verbs_keep_the_update(anchored, gated):
    """A drop of ranks without a gate, more ranks, a past, part of one, in turn; a squeeze is another update, exactly."""
    base, adapted, lows = pairs(gated=gated, anchored=anchored)
    for low in lows:
        before = low.product().detach()
        if gated:
            with torch.no_grad():
                low.gate[1] = 0
            before = low.product().detach()
            moved = low.keep(torch.tensor([0, 2, 3]))
            old, change = moved[low.M]
            assert torch.equal(change(old.detach()), low.M) and low.M.shape == (3, 3)
            assert close(low.product(), before, 5) and before.any()
        low.grow(2)
        assert close(low.product(), before, 5) and len(low.M) == low.rank
        low.unload(0.3)
        assert close(low.product(), before, 5) and low.A_past is not None
        low.fold()
        assert close(low.product(), before, 5) and low.M0 is None and low.A0 is None
        b, a = torch.randn(len(low.B), 2, dtype=torch.float64), torch.randn(2, low.A.shape[1], dtype=torch.float64)
        low.become(b, a)
        assert close(low.product(), low.scale * b @ a) and torch.equal(low.M, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("anchored", [False, True])
def test_a_mask_cuts_a_truncation_out(anchored):
    """0 and 1: what keep() leaves; the sum of two truncations' masks: the sum of their updates; a number: its multiple."""
    for low in pairs(anchored=anchored)[2]:
        cut = []
        for r in (2, 3):
            low.set_mask(None)
            one = copy.deepcopy(low)
            one.keep(torch.arange(r))
            cut.append(one.product())
            low.set_mask(torch.arange(4) < r, always=True)
            assert close(low.product(), cut[-1])
        low.set_mask(torch.tensor([2.0, 2, 1, 0]), always=True)
        assert close(low.product(), cut[0] + cut[1]) and not close(cut[0], cut[1])
        low.set_mask(None)
        whole = low.product()
        low.set_mask(torch.full((4,), 0.3), always=True)
        assert close(low.product(), 0.3 * whole) or torch.allclose(low.product(), 0.3 * whole, rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_partners_multiply_a_change_of_a_factor(gated):
    for low in pairs(gated=gated)[2]:
        before, (b, a) = low.product().detach(), low.partners()
        da, db = torch.randn_like(low.A), torch.randn_like(low.B)
        with torch.no_grad():
            low.A.add_(da)
            assert close(low.product() - before, low.scale * b @ da, 5)
            low.A.sub_(da)
            low.B.add_(db)
            assert close(low.product() - before, low.scale * db @ a, 5)


@pytest.mark.parametrize("frozen", [False, True])
def test_another_rank_has_another_mixer(frozen):
    base, adapted, lows = pairs(anchored=False, start="orthogonal", frozen=frozen)
    for low in lows:
        low.resize(3)
        assert close(low.M @ low.M.T, torch.eye(3)) and low.M.dtype == torch.float64 and low.M.requires_grad is not frozen
        low.resize(0)
        assert not low.product().any()


def test_what_a_budget_left_comes_back(tmp_path):
    base, adapted, lows = pairs(gated=False)
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        lows[0].become(torch.randn(40, 2).double(), torch.randn(2, 24).double())
        lows[1].grow(3)
        lows[2].unload(0.5)
    perturb(adapted.adapter, 0.1)
    y = adapted.eval()(x)
    adapted.save(tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), y) and not close(y, base(x))
    again.merge()
    assert close(again.model(x), y)


@pytest.mark.parametrize("part", ["adalora", "airllm", "increlora", "lora_rite"])
def test_what_no_mixer_may_stand_between_is_refused(part):
    with pytest.raises(UserError, match="mixes ranks"):
        registry.config(f"moslora+{part}")
