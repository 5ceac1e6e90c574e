import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach

TOTAL = 2  # minis, by default
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def filled(**options):
    adapted = attach(Net().double(), "melora", **{"rank": 3, "minis": 4, **TARGETS, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def test_equation_by_hand():
    """alpha / rank = 2, A_1 = [1, 2], B_1 = [3], A_2 = [-1, 1], B_2 = [5]: the update is [[6, 12, 0, 0], [0, 0, -10, 10]]."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "melora", rank=1, minis=2, alpha=2.0)
    pairs = adapted.adapter.deltas["0"].pairs
    with torch.no_grad():
        for low, a, b in zip(pairs, ([1.0, 2.0], [-1.0, 1.0]), (3.0, 5.0), strict=True):
            low.A.copy_(torch.tensor([a]))
            low.B.fill_(b)
    update = torch.tensor([[6.0, 12.0, 0.0, 0.0], [0.0, 0.0, -10.0, 10.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_fast_path_is_the_loop_over_slices():
    """The authors' loop: slice j of x through pair j, the outputs side by side; with gradients, square layer or not."""
    adapted = filled()
    for s, d in linear_sites(adapted):
        x = torch.randn(2, 5, s.d_in, dtype=torch.float64, requires_grad=True)
        parts = x.chunk(4, -1)
        want = torch.cat([z @ low.A.T @ low.B.T * low.scale for z, low in zip(parts, d.pairs, strict=True)], -1)
        got = d.update(x, s.base, None)
        assert close(got, want) and close(got, F.linear(x, d.weight(s.base) - s.base.weight)) and want.abs().max() > 1e-2
        g, of = torch.randn_like(got), [x, *d.parameters()]
        mine, true = (torch.autograd.grad(y, of, g) for y in (got, want))
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_rank_is_that_of_all_minis_together_and_blocks_off_the_diagonal_are_zero():
    adapted = filled()
    for u in updates(adapted):
        assert torch.linalg.matrix_rank(u, rtol=1e-9) == 12
        (p, q), blocks = u.shape, u.unflatten(1, (4, -1)).unflatten(0, (4, -1))
        for i in range(4):
            for j in range(4):
                assert bool(blocks[i, :, j].any()) == (i == j), (p, q)
    assert {m["rank"] for m in adapted.adapter.describe()} == {12}


def test_one_mini_is_lora():
    base, x = Net(), torch.randn(5, 24)
    ours = attach(copy.deepcopy(base), "melora", rank=3, minis=1, seed=0, **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, seed=0, **TARGETS)
    for adapted in (ours, lora):
        perturb(adapted.adapter, 1.0)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))


def test_start():
    """Each pair as a LoRA of its own width: uniform in +-1/sqrt(d_in / n)."""
    adapted = attach(nn.Sequential(nn.Linear(400, 200)), "melora", rank=20, minis=4, seed=0)
    for low in adapted.adapter.deltas["0"].pairs:
        assert not low.B.any() and 0.099 < float(low.A.detach().abs().max()) <= 0.1


def test_pairs_of_different_ranks():
    """What a budget leaves: one pair without a rank, one with fewer."""
    adapted = filled()
    s, d = next(linear_sites(adapted))
    x = torch.randn(6, s.d_in, dtype=torch.float64)
    for low, kept in ((d.pairs[1], []), (d.pairs[2], [0, 2])):
        low.keep(torch.tensor(kept, dtype=torch.long))
    assert close(d.update(x, s.base, None), F.linear(x, d.weight(s.base) - s.base.weight))
    assert not d.update(x, s.base, None)[:, 10:20].any()
    for low in d.pairs:
        low.keep(torch.tensor([], dtype=torch.long))
    assert not d.update(x, s.base, None).any() and not d.weight(s.base).sub(s.base.weight).any()


def test_dropout_is_of_what_A_reads():
    adapted = filled(dropout=0.5).train()
    s, d = next(linear_sites(adapted))
    x = torch.randn(6, s.d_in, dtype=torch.float64)
    torch.manual_seed(1)
    got = d.update(x, s.base, None)
    torch.manual_seed(1)
    assert close(got, F.linear(F.dropout(x, 0.5), d.weight(s.base) - s.base.weight)) and got.any()
    for low in d.pairs:
        low.fold()
    past = F.linear(x, d.weight(s.base) - s.base.weight)
    assert close(d.update(x, s.base, None), past), "a frozen past sees all of x"


def test_counts():
    """RoBERTa-base, query and value, n = 4, rank 2 (8 in all): 3,072 a matrix, where LoRA of rank 8 has 12,288."""
    options = {"target_modules": ["query", "value"]}
    adapted = attach(copy.deepcopy(roberta_base()), "melora", rank=2, minis=4, **options)
    assert adapted.cost()["adapter_parameters"] == 24 * 3_072
    lora = attach(copy.deepcopy(roberta_base()), "lora", rank=8, **options)
    assert lora.cost()["adapter_parameters"] == 24 * 12_288


def test_nonsense():
    with pytest.raises(UserError, match=r"minis is 5; it must divide \[40, 24\], the shape of fc1"):
        attach(Net(), "melora", minis=5)
    with pytest.raises(UserError, match="rank 7 is more than fc1 .* at most 6"):
        attach(Net(), "melora", rank=7, minis=4)
    with pytest.raises(UserError, match="minis is 0"):
        attach(Net(), "melora", minis=0)
