import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, roberta_base, train

from lorafactory import UserError, attach


def make(experts=3, **options):
    torch.manual_seed(0)
    options = {"rank": 4, "alpha": 8.0, "target_modules": ["fc1", "fc2", "fc3"], "trained_modules": [], **options}
    adapted = attach(options.pop("base", None) or Net(), "hydra_lora", experts=experts, seed=0, **options)
    return adapted


def reference(d, s, x):
    """As the authors' code has it: one A, an output for each B, summed with softmax weights in float32."""
    low = d.low_rank
    w = (x.float() @ d.router.T).softmax(-1)
    heads = low.B.unflatten(0, (d.experts, s.d_out))
    return s.base(x) + sum(w[..., i, None] * (x @ low.A.T @ heads[i].T) * low.scale for i in range(d.experts))


def test_equation_by_hand():
    """A x = 2, B = (1, -3), weights (3/4, 1/4), s = 5: 10 x + 5 (3/4 - 3/4) 2 = 10 x."""
    module = nn.Linear(1, 1, bias=False)
    adapted = attach(nn.Sequential(module), "hydra_lora", rank=1, alpha=5.0, experts=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        module.weight.fill_(10.0)
        d.low_rank.A.fill_(2.0)
        d.low_rank.B.copy_(torch.tensor([[1.0], [-3.0]]))
        d.router.copy_(torch.tensor([[1.0986123], [0.0]]))
    assert close(adapted(torch.ones(1, 1)), torch.tensor([[10.0]]))
    with torch.no_grad():
        d.router.zero_()
    assert close(adapted(torch.ones(1, 1)), torch.tensor([[0.0]]))


@pytest.mark.parametrize("experts", [1, 3])
def test_the_reference(experts):
    adapted = make(experts)
    perturb(adapted.adapter, 0.3)
    for s, d in linear_sites(adapted):
        x = torch.randn(2, 5, s.d_in)
        assert close(d(x, s.base), reference(d, s, x))
        w = d.gates(x)
        assert w.shape == (2, 5, experts) and close(w.sum(-1), torch.ones(2, 5))


def test_start():
    base, x = Net(), torch.randn(5, 24)
    adapted = make(base=copy.deepcopy(base))
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for s, d in linear_sites(adapted):
        low, bound = d.low_rank, s.d_in**-0.5
        assert d.router.abs().max() <= bound and low.A.abs().max() <= bound and not low.B.any()
        assert low.A.shape == (4, s.d_in) and low.B.shape == (3 * s.d_out, 4) and float(low.scale) == 2.0
        assert low.B.grad.any() and not low.A.grad.any() and not d.router.grad.any(), "only B moves at first"


def test_one_expert_and_equal_experts_are_lora():
    lora = attach(Net(), "lora", rank=4, alpha=8.0, target_modules=["fc1"], trained_modules=[], seed=0)
    perturb(lora.adapter, 0.3)
    low = lora.adapter.deltas["fc1"].low_rank
    for experts in (1, 3):
        adapted = make(experts, target_modules=["fc1"], base=copy.deepcopy(lora).detach())
        d = adapted.adapter.deltas["fc1"]
        with torch.no_grad():
            d.low_rank.A.copy_(low.A)
            d.low_rank.B.copy_(low.B.repeat(experts, 1))
            d.router.normal_()
        x = torch.randn(6, 24)
        assert close(adapted(x), lora(x))


def test_order_of_experts_does_not_matter():
    adapted = make()
    perturb(adapted.adapter, 0.3)
    s, d = next(linear_sites(adapted))
    x = torch.randn(6, s.d_in)
    y, order = d(x, s.base).detach(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        d.router.copy_(d.router[order])
        d.low_rank.B.copy_(d.low_rank.B.unflatten(0, (3, -1))[order].flatten(0, 1))
    assert close(d(x, s.base), y)
    with torch.no_grad():
        d.router.copy_(d.router[order])
    assert not close(d(x, s.base), y)


def test_router_reads_x_before_dropout_and_softmax_runs_in_float32():
    adapted = make(dropout=0.5, base=Net().bfloat16()).train()
    s, d = next(linear_sites(adapted))
    with torch.no_grad():
        d.router.zero_()
        d.router[:, 0] = torch.tensor([300.0, 301.0, 0.0])
    x = torch.eye(s.d_in)[:1].bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert close(d.gates(x), torch.tensor([[300.0, 301.0, 0.0]]).softmax(-1))


def test_experts_part_ways():
    base = Net()
    data = Regression(base)
    adapted = attached("hydra_lora", base, data, target_modules=["fc1"], trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    d = adapted.adapter.deltas["fc1"]
    heads = d.low_rank.B.unflatten(0, (d.experts, -1))
    assert not close(heads[0], heads[1]) and not close(heads[1], heads[2])
    assert adapted.adapter.counters() == {"routed_layers": 1, "experts": 3}


def test_count_and_refusals():
    options = {"rank": 4, "alpha": 32.0, "target_modules": ["query"]}
    cost = attach(copy.deepcopy(roberta_base()), "hydra_lora", experts=4, **options).cost()
    assert cost["adapter_parameters"] == 12 * (4 * 768 + 4 * 4 * 768 + 4 * 768)
    with pytest.raises(UserError, match="depends on its input"):
        make().merge()
    with pytest.raises(UserError, match="experts is 0"):
        make(0)
    with pytest.raises(UserError, match="at most 24"):
        make(rank=25)
    with pytest.raises(UserError, match="both decide the routing"):
        attach(Net(), "hydra_lora+molora")
