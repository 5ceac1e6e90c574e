import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, cloned, close, linear_sites, perturb
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load, registry

CHANGES = {"activation": (["none"], {})}


class Blocks(nn.Module):
    def __init__(self, d=12, wide=20):
        super().__init__()
        make = lambda: nn.ModuleDict({"q": nn.Linear(d, d), "v": nn.Linear(d, d), "up": nn.Linear(d, wide)})  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(3))

    def forward(self, x):
        for b in self.blocks:
            x = x + torch.tanh(b["v"](torch.tanh(b["q"](x)))) + b["up"](x)[..., : x.shape[-1]]
        return x


def dense(base=None, **options):
    adapted = attach(base or Blocks().double(), "denselora", **{"rank": 3, "alpha": 6.0, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def test_equation_by_hand():
    """s = 2, E = [1, 1], M = [3], D = [1; -1], x = (1, 1): gelu(2) = 1.9545, times 3 is 5.8635, gelu(-5.8635) = 0."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "denselora", rank=1, alpha=2.0)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.coder.E.copy_(torch.tensor([[1.0, 1]]))
        d.coder.D.copy_(torch.tensor([[1.0], [-1]]))
        d.M.fill_(3.0)
        got = adapted(torch.ones(2)) - module.base_forward(torch.ones(2))
    assert got.tolist() == pytest.approx([2 * 5.8635, 0.0], abs=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_the_authors_formula(activation):
    """With gradients, square layer or not."""
    act = F.gelu if activation == "gelu" else lambda x: x
    for s, d in linear_sites(dense(activation=activation)):
        x = torch.randn(2, 5, s.d_in, dtype=torch.float64, requires_grad=True)
        e, m, dec = d.coder.E, d.M, d.coder.D
        got, want = d.update(x, s.base, None), 2 * act(act(x @ e.T) @ m.T @ dec.T)
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (x, e, m, dec), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(p, t) and t.any() for p, t in zip(mine, true, strict=True))


def test_without_an_activation_it_merges():
    base, x = Blocks().double(), torch.randn(5, 12, dtype=torch.float64)
    adapted = dense(copy.deepcopy(base), activation="none")
    y = adapted(x).detach()
    for s, d in linear_sites(adapted):
        assert close(d.weight(s.base) - s.base.weight, 2 * d.coder.D @ d.M @ d.coder.E)
    adapted.merge()
    assert close(adapted(x), y, 5) and not close(y, base(x))
    with pytest.raises(UserError, match="depends on its input"):
        dense(copy.deepcopy(base)).merge()


def test_without_an_activation_it_can_be_wrapped():
    assert registry.config("denselora+dora", activation="none").gives() == {"additive", "weight"}
    with pytest.raises(UserError, match="'dora' needs a structure with weight"):
        registry.config("denselora+dora")
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "denselora+dora", rank=3, activation="none")
    assert close(adapted(x), base(x))
    perturb(adapted.adapter, 0.3)
    y = adapted(x).detach()
    adapted.merge()
    assert close(adapted(x), y, 5) and not close(y, base(x))
    for _, d in linear_sites(adapted):
        d.inner.randomize()
        assert d.inner.coder.D.all()


def test_layers_of_a_kind_share_one_coder(tmp_path):
    base, x = Blocks().double(), torch.randn(5, 12, dtype=torch.float64)
    adapted = dense(copy.deepcopy(base))
    coders = adapted.adapter.structure.coders
    assert set(coders) == {"blocks/*/q/12x12", "blocks/*/v/12x12", "blocks/*/up/20x12"}
    assert all(d.coder is coders[s.kind] for s, d in linear_sites(adapted))
    assert adapted.num_trainable() == 2 * 3 * 24 + 3 * 32 + 9 * 9, "each coder once, a 3 by 3 core a layer"
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y) and not close(y, base(x))
    before = {s.name: d.update(x, s.base, None) for s, d in linear_sites(adapted)}
    with torch.no_grad():
        adapted.adapter.deltas["blocks/1/q"].M.add_(1.0)
    moved = {s.name for s, d in linear_sites(adapted) if not torch.equal(d.update(x, s.base, None), before[s.name])}
    assert moved == {"blocks.1.q"}


def test_start():
    """The decoder is zero and alone has a gradient in the first step, which gelu halves."""
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "denselora", rank=4)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert not d.coder.D.any() and d.coder.D.grad.any() and not d.coder.E.grad.any() and not d.M.grad.any()
        assert d.coder.E.abs().max() <= 12**-0.5 and 0 < d.M.abs().max() <= 0.5


def test_dropout_is_of_the_input_the_code_and_the_output():
    adapted = dense(dropout=0.5).train()
    (s, d), x = next(linear_sites(adapted)), torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(1)
    got = d.update(x, s.base, None)
    torch.manual_seed(1)
    code = F.dropout(F.gelu(F.dropout(x, 0.5) @ d.coder.E.T), 0.5)
    assert close(got, 2 * F.dropout(F.gelu(code @ d.M.T @ d.coder.D.T), 0.5)) and got.any()


def test_counts():
    """Of a grouped-query model with 32 layers, rank 16: each of q, k, v once, and 256 a layer."""
    sizes = dict(hidden_size=4096, intermediate_size=8, num_hidden_layers=32, num_attention_heads=32, vocab_size=8)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    adapted = attach(llama, "denselora", rank=16, target_modules=["q_proj", "k_proj", "v_proj"], trained_modules=[])
    assert adapted.num_trainable() == 16 * (4096 + 4096) + 2 * 16 * (4096 + 1024) + 96 * 256


def test_ranks_that_disagree_are_refused():
    adapted = dense()
    state = cloned(adapted.adapter.state_dict())
    state["deltas.blocks/1/q.M"] = torch.ones(2, 2)
    with pytest.raises(UserError, match="blocks/1/q.M has another rank than"):
        adapted.adapter.load(state)


def test_nonsense():
    for options in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"activation": "relu"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "denselora", **options)
    with pytest.raises(UserError, match="rank 13 is more than blocks.0.q"):
        attach(Blocks(), "denselora", rank=13)
