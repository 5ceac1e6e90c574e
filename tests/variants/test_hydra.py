import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach

TOTAL = 2  # both branches have the rank
CHANGES = {"branches": (["parallel", "sequential"], {}), "sequential_rank": ([2, 5], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def perturbed(transposed=False, **options):
    adapted = attach(Net(transposed).double(), "hydra", **TARGETS, **options)
    perturb(adapted.adapter, 1.0)
    return adapted


def test_equation_by_hand():
    """f(x) = [x1 + 1, 2 x2]; B A = [[1, 1], [0, 0]], B_s A_s = [[0, 0], [0, 3]]: y = f + [x1 + x2, 0] + [0, 6 x2]."""
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.diag(torch.tensor([1.0, 2.0])))
        module.bias.copy_(torch.tensor([1.0, 0.0]))
    adapted = attach(nn.Sequential(module), "hydra", rank=1, sequential_rank=1)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.parallel.low.A.copy_(torch.tensor([[1.0, 1.0]]))
        d.parallel.low.B.copy_(torch.tensor([[1.0], [0.0]]))
        d.sequential.low.A.copy_(torch.tensor([[0.0, 3.0]]))
        d.sequential.low.B.copy_(torch.tensor([[0.0], [1.0]]))
    x = torch.tensor([[5.0, 7.0]])
    assert close(adapted(x), torch.tensor([[18.0, 56.0]]))
    adapted.merge()
    assert close(module.weight, torch.tensor([[2.0, 1.0], [0.0, 8.0]])) and close(module.bias, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_sequential_branch_reads_the_frozen_output(transposed, branch_bias, alpha):
    adapted = perturbed(transposed, rank=3, sequential_rank=5, branch_bias=branch_bias, alpha=alpha)
    s = 1.0 if alpha is None else 2.0
    for site, d in linear_sites(adapted):
        x = torch.randn(6, site.d_in, dtype=torch.float64)
        f = F.linear(x, site.base.weight, site.base.bias)
        want = f
        for branch, read in ((d.parallel, x), (d.sequential, f)):
            z = F.linear(read, branch.low.A, branch.down)
            want = want + s * F.linear(z, branch.low.B, branch.up)
        assert close(d(x, site.base), want)
        assert close(F.linear(x, d.weight(site.base), d.bias(site.base)), want), "b0 goes through B_s A_s, too"


def test_one_branch_alone():
    """Without the sequential branch it is a LoRA with alpha = rank; without the other it depends on W0 alone."""
    x = torch.randn(5, 24).double()
    base = Net().double()
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=3, **TARGETS)
    alone = attach(base, "hydra", rank=3, branches="parallel", **TARGETS)
    for (_, d), (_, mine) in zip(linear_sites(lora), linear_sites(alone), strict=True):
        with torch.no_grad():
            d.low_rank.B.normal_()
            mine.parallel.low.B.copy_(d.low_rank.B)
            mine.parallel.low.A.copy_(d.low_rank.A)
    assert close(alone(x), lora(x))
    behind = perturbed(rank=4, branches="sequential")
    for site, d in linear_sites(behind):
        assert d.parallel is None
        site.base.weight.data.zero_()
        assert not d.weight(site.base).any(), "B_s A_s W0 is zero with W0"
        assert d.shift(site.base) is None if site.base.bias is None else d.shift(site.base).any()


@pytest.mark.parametrize("sequential_rank, want", [(3, {"fc1": 5, "fc2": 7, "fc3": 5}), (None, {"fc1": 4, "fc2": 8, "fc3": 4})])
def test_rank_of_the_update(sequential_rank, want):
    adapted = perturbed(rank=2, sequential_rank=sequential_rank, rank_pattern={"fc2": 4})
    updates = {s.name: d.weight(s.base) - s.base.weight for s, d in linear_sites(adapted)}
    assert {n: int(torch.linalg.matrix_rank(u)) for n, u in updates.items()} == want
    assert {a["name"]: a["rank"] for a in adapted.adapter.describe()} == want


def test_starts_at_the_base():
    base = Net()
    x = torch.randn(5, 24)
    want = base(x)
    assert torch.equal(attach(base, "hydra", branch_bias=True, **TARGETS)(x), want)


def test_gradients_are_those_of_the_dense_formula():
    adapted = perturbed(rank=3, sequential_rank=5, branch_bias=True)
    for site, d in linear_sites(adapted):
        trained = list(d.parameters())
        x, g = torch.randn(6, site.d_in).double(), torch.randn(6, site.d_out).double()
        fast = torch.autograd.grad((d(x, site.base) * g).sum(), trained)
        dense = torch.autograd.grad((F.linear(x, d.weight(site.base), d.bias(site.base)) * g).sum(), trained)
        assert len(trained) == 8 and all(close(a, b) for a, b in zip(fast, dense, strict=True))


def test_counts():
    """RoBERTa-base, the feed-forward output of 12 layers, r = 4 and 8: 331,776 (the paper: 0.3M)."""
    options = {"target_modules": [rf"encoder.layer.{i}.output.dense" for i in range(12)], "trained_modules": []}
    options |= {"rank": 4, "sequential_rank": 8}
    assert attach(copy.deepcopy(roberta_base()), "hydra", **options).num_trainable() == 331_776
    biased = attach(copy.deepcopy(roberta_base()), "hydra", **options, branch_bias=True).num_trainable()
    assert biased == 331_776 + 12 * (4 + 8 + 2 * 768)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"branches": "two"}, "branches is 'two'; it takes both, parallel, sequential"),
        ({"branches": "parallel", "sequential_rank": 4}, "branches is parallel: use rank"),
        ({"sequential_rank": 0}, "sequential_rank is 0; it must be at least 1"),
        ({"sequential_rank": 25}, "at most 24"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        attach(Net(), "hydra", **TARGETS, **options)
