import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach

CHANGES = {"start": (["identity"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
STARTS = ("kaiming", "orthogonal", "normal", "identity", "pairs")


def test_equation_by_hand():
    """alpha / rank = 2, A = [[1, 0], [0, 2]], M = [[0, 3], [1, 0]], B = [1, 10]: 2 B M A = [20, 12]."""
    module = nn.Linear(2, 1)
    adapted = attach(nn.Sequential(module, nn.Linear(1, 2)), "moslora", rank=1, target_modules=["0"])
    d = adapted.adapter.deltas["0"]
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
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), F.linear(x, 4 * d.B @ d.M @ d.A)
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (d.A, d.M, d.B, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))
        assert torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight, rtol=1e-9) == 4


@pytest.mark.parametrize("start", STARTS)
def test_start(start):
    """B is zero and alone has a gradient in the first step."""
    base, x = nn.Sequential(nn.Linear(64, 40)), torch.randn(9, 64)
    adapted = attach(copy.deepcopy(base), "moslora", rank=32, start=start)
    d = adapted.adapter.deltas["0"]
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
        for (_, d), (_, theirs) in zip(linear_sites(ours), linear_sites(lora), strict=True):
            theirs.low_rank.A.copy_(d.A)
            d.B.normal_()
            theirs.low_rank.B.copy_(d.B)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))
    for adapted in (ours, lora):
        adapted(x).square().sum().backward()
    for (_, d), (_, theirs) in zip(linear_sites(ours), linear_sites(lora), strict=True):
        assert close(d.A.grad, theirs.low_rank.A.grad) and close(d.B.grad, theirs.low_rank.B.grad) and d.M.grad.any()


def test_the_fixed_mixer_sums_the_halves():
    """(B_1 + B_2)(A_1 + A_2), of half the rank, and M does not train."""
    adapted = attach(Net().double(), "moslora", rank=4, alpha=4.0, start="pairs", frozen=True, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for (_, d), u in zip(linear_sites(adapted), updates(adapted), strict=True):
        assert close(u, (d.B[:, :2] + d.B[:, 2:]) @ (d.A[:2] + d.A[2:])) and not d.M.requires_grad
        assert torch.linalg.matrix_rank(u, rtol=1e-9) == 2
    frozen = sum(d.M.numel() for _, d in linear_sites(adapted))
    assert adapted.num_trainable() == sum(p.numel() for p in adapted.adapter.parameters()) - frozen


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "moslora", rank=4, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    d, module, x = adapted.adapter.deltas["fc1"], adapted.model.fc1, torch.randn(6, 24)
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
    with pytest.raises(UserError, match="rank of fc1 is 3; it must be even"):
        attach(Net(), "moslora", rank=3, start="pairs")
    with pytest.raises(UserError, match="rank 25 is more than fc1"):
        attach(Net(), "moslora", rank=25)
