import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach, registry

CHANGES = {
    "gate": (["low"], {}),
    "gate_rank": ([2], {"gate": "low"}),
    "residual_start": (["uniform"], {}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def gated(base=None, **options):
    adapted = attach(base or Net().double(), "gated_lora", **{"rank": 3, "alpha": 6.0, **TARGETS, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def test_equation_by_hand():
    """s = 2, A = [1, 1], B = [3], G = 0 so a gate of 1/2, R = [5, 7], x = (1, 2): 2 * 3 * 3 / 2 + 19 = 28."""
    module = nn.Linear(2, 1)
    adapted = attach(nn.Sequential(module), "gated_lora", rank=1, alpha=2.0)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.gated.A.fill_(1.0)
        d.gated.B.fill_(3.0)
        d.gate[0].zero_()
        d.residual.copy_(torch.tensor([[5.0, 7]]))
    x = torch.tensor([1.0, 2])
    assert close(adapted(x), module.base_forward(x) + 28)


@pytest.mark.parametrize("gate", ["full", "low", "none"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_authors_layer(gate, residual):
    """With gradients, square or not, under each of their switches."""
    if gate == "none" and not residual:
        return
    for s, d in linear_sites(gated(gate=gate, residual=residual)):
        x = torch.randn(2, 5, s.d_in, dtype=torch.float64, requires_grad=True)
        want = 2 * x @ d.gated.A.T @ d.gated.B.T
        if gate != "none":
            g = d.gate[0] if gate == "full" else d.gate[1] @ d.gate[0]
            assert g.shape == s.base.weight.shape
            want = torch.sigmoid(x @ g.T) * want
        want = want + x @ d.residual.T if residual else want
        got, of = d.update(x, s.base, None), [x, *d.parameters()]
        seed = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, of, seed) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_an_open_gate_is_lora():
    """As G x grows the gate tends to 1."""
    adapted = gated(residual=False)
    s, d = next(linear_sites(adapted))
    x = torch.randn(4, s.d_in, dtype=torch.float64).abs()
    with torch.no_grad():
        d.gate[0].fill_(50.0)
    assert close(d.update(x, s.base, None), d.gated(x)) and d.gated(x).abs().max() > 1e-2


def test_start():
    """The base's function unless the residual starts as theirs; at first B and R have a gradient."""
    base, x = nn.Sequential(nn.Linear(100, 64)), torch.randn(5, 100)
    adapted = attach(copy.deepcopy(base), "gated_lora", rank=4)
    d = adapted.adapter.deltas["0"]
    assert torch.equal(adapted(x), base(x)) and 0.09 < d.gate[0].abs().max() <= 0.1
    adapted(x).square().sum().backward()
    assert d.gated.B.grad.any() and d.residual.grad.any() and not d.gate[0].grad.any() and not d.gated.A.grad.any()
    theirs = attach(copy.deepcopy(base), "gated_lora", rank=4, residual_start="uniform")
    assert not close(theirs(x), base(x)) and 0.09 < theirs.adapter.deltas["0"].residual.abs().max() <= 0.1
    low = attach(copy.deepcopy(base), "gated_lora", rank=4, gate="low", gate_rank=5).adapter.deltas["0"]
    assert [tuple(g.shape) for g in low.gate] == [(5, 100), (64, 5)] and torch.equal(low.gated.B, torch.zeros(64, 4))


def test_without_a_gate_it_merges():
    base, x = Net().double(), torch.randn(3, 24, dtype=torch.float64)
    adapted = gated(copy.deepcopy(base), gate="none")
    y = adapted(x).detach()
    for s, d in linear_sites(adapted):
        assert close(d.weight(s.base) - s.base.weight, 2 * d.gated.B @ d.gated.A + d.residual)
    adapted.merge()
    assert close(adapted(x), y, 5) and not close(y, base(x))
    with pytest.raises(UserError, match="depends on its input"):
        gated().merge()
    assert "weight" in registry.config("gated_lora+dora", gate="none").gives()
    with pytest.raises(UserError, match="'dora' needs a structure with weight"):
        registry.config("gated_lora+dora")


def test_counts():
    """768 square, rank 16: 24,576 of the pair, and 589,824 for the gate and for the residual each."""
    for options, more in (({}, 2 * 589_824), ({"gate": "none"}, 589_824), ({"gate": "low", "residual": False}, 4 * 1_536)):
        adapted = attach(copy.deepcopy(roberta_base()), "gated_lora", target_modules=["query"], **options)
        assert adapted.cost()["adapter_parameters"] == 12 * (24_576 + more)


def test_nonsense():
    for options in ({"gate": "half"}, {"residual_start": "one"}, {"gate_rank": 0}, {"rank": 0}, {"gate_rank": 3}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "gated_lora", **options)
    with pytest.raises(UserError, match="there is no residual"):
        attach(Net(), "gated_lora", residual=False, residual_start="uniform")
    with pytest.raises(UserError, match="without a gate and a residual this is lora"):
        attach(Net(), "gated_lora", gate="none", residual=False)


def test_dropout_is_of_what_A_reads():
    adapted = gated(dropout=0.5).train()
    s, d = next(linear_sites(adapted))
    x = torch.randn(6, s.d_in, dtype=torch.float64)
    torch.manual_seed(1)
    got = d.update(x, s.base, None)
    torch.manual_seed(1)
    low = 2 * F.dropout(x, 0.5) @ d.gated.A.T @ d.gated.B.T
    assert close(got, torch.sigmoid(x @ d.gate[0].T) * low + x @ d.residual.T)
