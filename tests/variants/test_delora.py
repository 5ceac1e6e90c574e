import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, adamw, close, linear_sites, perturb
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

SMALL = {"bound": 0.5}  # at 15 the update is many times the base
FINE = {"anchored": True}  # from zero any step is the whole bound
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """W0 = [[3, 0], [4, 2]], w = (5, 2); A = (0, 3), B = (8, 6), lambda 10, rank 1: dW = 10 (.8, .6)^T (0, 1) diag(w)."""
    module = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    adapted = attach(nn.Sequential(module), "delora", rank=1)
    d = adapted.adapter.deltas["0"]
    assert close(d.w, torch.tensor([5.0, 2.0])) and d.bound.tolist() == [15.0]
    with torch.no_grad():
        d.A.copy_(torch.tensor([[0.0, 3.0]]))
        d.B.copy_(torch.tensor([[8.0], [6.0]]))
        d.bound.fill_(10.0)
    want = torch.tensor([[3.0, 16.0], [4.0, 14.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(2)), want.T)
    adapted.merge()
    assert close(adapted(torch.eye(2)), want.T) and close(d.w, torch.tensor([5.0, 2.0])), "the norms are the base's"


def test_terms_and_their_sum_are_bounded_and_lengths_do_not_matter():
    adapted = attach(Net(), "delora", rank=6, bound=3.0, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        (b, a), bound = d.factors(), abs(float(d.bound))
        plain = a / d.w
        terms = b.norm(dim=0) * plain.norm(dim=1)
        assert close(terms, torch.full((6,), bound / 6))
        update = d.weight(s.base) - s.base.weight
        assert (update / d.w).norm() <= bound * (1 + 1e-5) and bound != 3.0
        assert int(torch.linalg.matrix_rank(update)) == 6
        with torch.no_grad():
            d.A.mul_(7.0)
            d.B.mul_(0.3)
        assert close(d.weight(s.base) - s.base.weight, update)


def test_dB_is_large_at_the_zero_start_and_the_update_full_after_one_step():
    """|B_k| counts as 1e-4 there."""
    adapted = attach(Net(), "delora", rank=4, bound=2.0, **TARGETS)
    adapted(torch.randn(5, 24)).square().sum().backward()
    assert all(d.B.grad.norm() > 1e2 and not d.A.grad.any() and not d.bound.grad.any() for _, d in linear_sites(adapted))
    adamw([{"params": [d.B for _, d in linear_sites(adapted)]}]).step()
    for _, d in linear_sites(adapted):
        b, a = d.factors()
        assert close(b.norm(dim=0) * (a / d.w).norm(dim=1), torch.full((4,), 0.5))


def test_anchored_start(tmp_path):
    """Zero at first, everything but lambda's share trains, moderate gradients; saved and loaded under either config."""
    base, x = Net(), torch.randn(5, 24)
    options = {"rank": 4, "bound": 2.0, **TARGETS}
    adapted = attach(copy.deepcopy(base), "delora", anchored=True, **options)
    assert close(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert all(p.grad.any() for p in (d.A, d.B, d.bound)) and d.B.grad.norm() < 1e2
        start = (d.B0 @ d.A0) * d.w
        assert close((start / d.w).norm(), (d.B * d.scales() @ d.A).norm()) and start.any()
    perturb(adapted.adapter, 0.5)
    for s, d in linear_sites(adapted):
        want = s.base.weight + ((d.B * d.scales()) @ d.A - d.B0 @ d.A0) * d.w
        assert close(d.weight(s.base), want)
    y = adapted(x).detach()
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)
    for anchored in (False, True):
        other = attach(copy.deepcopy(base), "delora", anchored=anchored, seed=8, **options)
        other.adapter.load(adapted.adapter.state_dict())
        assert torch.equal(other(x), y)
    plain = attach(copy.deepcopy(base), "delora", **options)
    perturb(plain.adapter, 0.5)
    other.adapter.load(plain.adapter.state_dict())
    assert torch.equal(other(x), plain(x))
    adapted.merge()
    assert close(adapted(x), y, 2)


def test_lambda_has_a_rate_of_its_own_and_no_decay():
    adapted = attach(Net(), "delora", rank=4, bound_lr=7.0, **TARGETS)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    rates = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert {rates[d.bound] for _, d in linear_sites(adapted)} == {(7e-3, 0.0)}
    assert {rates[d.A] for _, d in linear_sites(adapted)} == {(1e-3, 0.5)}


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "delora", rank=5, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 25}, r"rank 25 is more than fc1 \[40, 24\] can have: at most 24"),
        ({"bound": 0.0}, "bound is 0"),
        ({"bound_lr": -1.0}, "bound_lr is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "delora", **options)


def test_counts():
    """r (d_in + d_out) + 1 a layer: in a Llama-2-7B's queries and down-projections."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    adapted = attach(llama, "delora", rank=8, target_modules=["q_proj", "down_proj"])
    assert adapted.num_trainable() == 2 * (8 * (4096 + 4096) + 1 + 8 * (11008 + 4096) + 1)
