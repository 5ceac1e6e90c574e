import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, perturb, roberta_base

from lorafactory import UserError, attach


def layer(weight, bias=None):
    made = nn.Linear(len(weight[0]), len(weight), bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return nn.Sequential(made)


def low_rank(adapted, name):
    return next(low for s, low in adapted.adapter.low_ranks() if s.name == name)


def test_equation_by_hand():
    """W0 = [[1, 2], [3, 4]], B A = [[1, 2], [2, 4]], alpha / rank = 3: W = [[4, 8], [9, 16]]."""
    adapted = attach(layer([[1.0, 2.0], [3.0, 4.0]], [10.0, 20.0]), "lora", rank=1, alpha=3.0)
    low = low_rank(adapted, "0")
    with torch.no_grad():
        low.A.copy_(torch.tensor([[1.0, 2.0]]))
        low.B.copy_(torch.tensor([[1.0], [2.0]]))
    assert adapted(torch.tensor([1.0, 1.0])).tolist() == [22.0, 45.0]
    adapted.merge()
    assert adapted.model[0].weight.tolist() == [[4.0, 8.0], [9.0, 16.0]]


def test_start():
    adapted = attach(Net(), "lora", rank=4, alpha=8.0, seed=0, trained_modules=[])
    for site, low in adapted.adapter.low_ranks():
        bound = site.d_in**-0.5
        assert low.A.abs().max() <= bound and float(low.A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.3)
        assert not low.B.any() and float(low.scale) == 2.0


def test_gradients_are_the_chain_rule():
    """dL/dB = s G x A^T and dL/dA = s B^T G x, with G = dL/dy."""
    adapted = attach(Net().double(), "lora", rank=3, alpha=6.0, seed=0, trained_modules=[])
    perturb(adapted.adapter, 0.3)
    low, module = low_rank(adapted, "fc1"), adapted.model.fc1
    x, g = torch.randn(5, 24, dtype=torch.double), torch.randn(5, 40, dtype=torch.double)
    (module(x) * g).sum().backward()
    assert close(low.B.grad, 2 * g.T @ x @ low.A.T) and close(low.A.grad, 2 * low.B.T @ g.T @ x)


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "lora", rank=4, dropout=0.5, seed=0, trained_modules=[]).train()
    perturb(adapted.adapter, 0.3)
    low, module, x = low_rank(adapted, "fc1"), adapted.model.fc1, torch.randn(5, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    want = F.linear(x, module.weight, module.bias) + 4 * F.dropout(x, 0.5) @ low.A.T @ low.B.T
    assert close(got, want)


def test_rank_bounds():
    """A rank above the layer's is refused by name, for every way to ask for it; the layer's own is allowed."""
    for options in ({"rank": 25}, {"rank": 4, "rank_pattern": {"fc3": 25}}):
        with pytest.raises(UserError, match="fc[13].*at most 24"):
            attach(Net(), "lora", trained_modules=["head"], **options)
    for rank in (0, -1):
        with pytest.raises(UserError, match=f"rank is {rank}"):
            attach(Net(), "lora", rank=rank)
    adapted = attach(Net(), "lora", rank=24, trained_modules=["head"])
    perturb(adapted.adapter)
    assert torch.linalg.matrix_rank(low_rank(adapted, "fc3").product()) == 24
    small = attach(Net(), "lora", rank=3, trained_modules=[])
    perturb(small.adapter, 1.0)
    assert all(torch.linalg.matrix_rank(low.product()) == 3 for _, low in small.adapter.low_ranks())


def test_count_on_roberta():
    adapted = attach(copy.deepcopy(roberta_base()), "lora", rank=2, target_modules=["query", "value"])
    assert adapted.cost() == {"adapter_parameters": 73_728, "head_parameters": 592_130, "total_parameters": 124_647_170}
