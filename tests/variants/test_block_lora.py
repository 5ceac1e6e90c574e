import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach, registry

TALL = 2  # arms, by default
SMALL = {"alpha": 8.0}  # both arms of B learn, so half of what else would do
CHANGES = {"partition": (["input"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def pair(d):
    return d.arms_pair if hasattr(d, "arms_pair") else d.head_pair


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_equation_by_hand(partition):
    """alpha / rank = 2. By rank: A = [1, 2, 3, 4], B_1 + B_2 = [1; 0] + [2; -1]. By input: A = [1, 2], B = [3; -1]."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "block_lora", rank=1, alpha=2.0, arms=2, partition=partition)
    low = pair(adapted.adapter.deltas["0"])
    with torch.no_grad():
        if partition == "rank":
            low.A.copy_(torch.tensor([[1.0, 2, 3, 4]]))
            low.B.copy_(torch.tensor([[1.0], [0], [2], [-1]]))
            update = torch.tensor([[6.0, 12, 18, 24], [-2, -4, -6, -8]])
        else:
            low.A.copy_(torch.tensor([[1.0, 2]]))
            low.B.copy_(torch.tensor([[3.0], [-1]]))
            update = torch.tensor([[6.0, 12, 6, 12], [-2, -4, -2, -4]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_fast_path_is_the_matrix(partition):
    """Outputs and gradients in float64, square layer or not."""
    adapted = attach(Net().double(), "block_lora", rank=3, alpha=6.0, arms=4, partition=partition, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        low = pair(d)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        if partition == "rank":
            m = 2 * sum(low.B.chunk(4)) @ low.A
        else:
            m = 2 * low.B @ torch.cat([low.A] * 4, 1)
            blocks = d.weight(s.base).sub(s.base.weight).chunk(4, 1)
            assert all(close(b, blocks[0]) for b in blocks)
        got, want = d.update(x, s.base, None), F.linear(x, m)
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (low.A, low.B, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(p, t) and t.any() for p, t in zip(mine, true, strict=True))
        assert torch.linalg.matrix_rank(m, rtol=1e-9) == 3


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_one_arm_is_lora(partition):
    base, x = Net(), torch.randn(5, 24)
    ours = attach(copy.deepcopy(base), "block_lora", rank=3, arms=1, partition=partition, seed=0, **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, seed=0, **TARGETS)
    for adapted in (ours, lora):
        perturb(adapted.adapter, 1.0)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))


def test_arms_stay_alike_and_learn_n_times_as_fast():
    """By rank, under SGD: the function is LoRA's with arms times the rate for B."""
    base, x = Net().double(), torch.randn(5, 24, dtype=torch.float64)
    ours = attach(copy.deepcopy(base), "block_lora", rank=3, arms=4, **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, **TARGETS)
    with torch.no_grad():
        for (_, d), (_, theirs) in zip(linear_sites(ours), linear_sites(lora), strict=True):
            theirs.low_rank.A.copy_(d.arms_pair.A)
    low_ranks = [low for _, low in lora.adapter.low_ranks()]
    rates = [{"params": [low.A for low in low_ranks]}, {"params": [low.B for low in low_ranks], "lr": 0.04}]
    for adapted, groups in ((ours, list(ours.adapter.parameters())), (lora, rates)):
        optimizer = torch.optim.SGD(groups, lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            adapted(x).square().sum().backward()
            optimizer.step()
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))
    for _, low in ours.adapter.low_ranks():
        arms = low.B.chunk(4)
        assert all(close(b, arms[0]) for b in arms) and arms[0].any()


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_start(partition):
    base, x = nn.Sequential(nn.Linear(400, 200)), torch.randn(5, 400)
    adapted = attach(copy.deepcopy(base), "block_lora", rank=8, arms=4, partition=partition)
    low = pair(adapted.adapter.deltas["0"])
    bound = (400 if partition == "rank" else 100) ** -0.5
    assert torch.equal(adapted(x), base(x)) and 0.98 * bound < low.A.abs().max() <= bound and not low.B.any()


@pytest.mark.parametrize("partition", ["rank", "input"])
def test_dropout_is_of_what_A_reads(partition):
    adapted = attach(Net(), "block_lora", rank=4, dropout=0.5, partition=partition, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    (site, d), x = next(linear_sites(adapted)), torch.randn(6, 24)
    torch.manual_seed(1)
    got = d.update(x, site.base, None)
    torch.manual_seed(1)
    assert close(got, F.linear(F.dropout(x, 0.5), d.weight(site.base) - site.base.weight)) and got.any()


def test_what_reads_a_sum_gives_no_input():
    assert "input" in registry.config("block_lora").gives()
    assert registry.config("block_lora+gelora")
    with pytest.raises(UserError, match="input, which 'block_lora' has not under these options"):
        registry.config("block_lora+gelora", partition="input")


def test_counts():
    """768 square, the paper's rank 8 in 8 blocks: 6,912 a matrix in both readings, where LoRA has 12,288."""
    for options in ({"rank": 1, "arms": 8}, {"rank": 8, "arms": 8, "partition": "input"}):
        adapted = attach(copy.deepcopy(roberta_base()), "block_lora", target_modules=["query", "value"], **options)
        assert adapted.cost()["adapter_parameters"] == 24 * 6_912


def test_nonsense():
    for options in ({"arms": 0}, {"partition": "output"}, {"rank": 0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "block_lora", **options)
    with pytest.raises(UserError, match="arms is 5; it must divide 24, the inputs of fc1"):
        attach(Net(), "block_lora", arms=5, partition="input", **TARGETS)
    with pytest.raises(UserError, match="rank 7 is more than fc1 .* at most 6"):
        attach(Net(), "block_lora", rank=7, arms=4, partition="input", **TARGETS)
