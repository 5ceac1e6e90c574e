import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, cloned, close, linear_sites, perturb
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

CHANGES = {"shared": ([2, 4], {})}


class Blocks(nn.Module):
    """Four blocks with two square layers and one that is not."""

    def __init__(self, d=12, wide=20):
        super().__init__()
        make = lambda: nn.ModuleDict({"q": nn.Linear(d, d), "v": nn.Linear(d, d), "up": nn.Linear(d, wide)})  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(4))

    def forward(self, x):
        for b in self.blocks:
            x = x + torch.tanh(b["v"](torch.tanh(b["q"](x)))) + b["up"](x)[..., : x.shape[-1]]
        return x


def rasa(base=None, **options):
    adapted = attach(base or Blocks().double(), "rasa", **{"rank": 3, "shared": 1, "alpha": 6.0, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def updates(adapted):
    return {s.name: (d.weight(s.base) - s.base.weight).detach() for s, d in linear_sites(adapted)}


def test_equation_by_hand():
    """A = [1, 2], B = [3; 1], A_pool = [0, 1], B_pool = [1; -1], D = (2, 5): [[6, 12], [2, 4]] + [[0, 5], [0, -5]]."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "rasa", rank=2, shared=1)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.A.copy_(torch.tensor([[1.0, 2]]))
        d.B.copy_(torch.tensor([[3.0], [1]]))
        d.pool.A.copy_(torch.tensor([[0.0, 1]]))
        d.pool.B.copy_(torch.tensor([[1.0], [-1]]))
        d.D.copy_(torch.tensor([2.0, 5]))
    update = torch.tensor([[6.0, 17], [2, -1]])
    assert close(updates(adapted)["0"], update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_fast_path_is_the_authors_product(shared):
    """One product through what is private and shared side by side, with D between; gradients too."""
    adapted = rasa(shared=shared)
    for s, d in linear_sites(adapted):
        x = torch.randn(2, 5, s.d_in, dtype=torch.float64, requires_grad=True)
        a, b = torch.cat([d.A, d.pool.A]), torch.cat([d.B, d.pool.B], 1)
        got, want = d.update(x, s.base, None), F.linear(F.linear(x, a) * d.D, b)
        of = [p for p in (x, d.A, d.B, d.D, d.pool.A, d.pool.B) if p.numel()]
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, of, g) for y in (got, want))
        assert close(got, want) and close(got, F.linear(x, d.weight(s.base) - s.base.weight)) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_effective_rank(shared):
    """rank - k + k layers, at LoRA's count of parameters plus D."""
    adapted = rasa(shared=shared)
    effective = 3 - shared + 4 * shared
    for u in updates(adapted).values():
        assert torch.linalg.matrix_rank(u, rtol=1e-9) == effective
    lora = attach(Blocks(), "lora", rank=3)
    assert adapted.num_trainable() == lora.num_trainable() + 12 * effective


def test_layers_of_a_kind_share_one_pool(tmp_path):
    """Owned and saved once; its gradient is the sum over the layers; another layer's update moves with it."""
    base, x = Blocks().double(), torch.randn(5, 12, dtype=torch.float64)
    adapted = rasa(copy.deepcopy(base))
    pools = adapted.adapter.structure.pools
    assert set(pools) == {"blocks/*/q/12x12", "blocks/*/v/12x12", "blocks/*/up/20x12"}
    assert all(d.pool is pools[s.kind] for s, d in linear_sites(adapted))
    assert sum("pool" in n for n in adapted.adapter.state_dict()) == 6
    adapted(x).square().sum().backward()
    pool = pools["blocks/*/q/12x12"]
    got, total = pool.A.grad.clone(), 0
    for k in range(4):
        mine = copy.deepcopy(adapted)
        for s, d in linear_sites(mine):
            if s.kind == "blocks/*/q/12x12" and s.name != f"blocks.{k}.q":
                frozen = copy.deepcopy(d.pool)
                d.__dict__["pool"] = frozen.requires_grad_(False)
        mine.adapter.zero_grad()
        mine(x).square().sum().backward()
        total = total + mine.adapter.structure.pools["blocks/*/q/12x12"].A.grad
    assert close(got, total, 5) and got.any()
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y) and not close(y, base(x))


def test_start():
    """Every B is zero, D is alpha / 2 over the ranks of its own and of the pool's; only the Bs have a gradient at first."""
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "rasa", rank=3, shared=1, alpha=6.0)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert d.D.tolist() == [1.5] * 2 + [0.75] * 4 and not d.B.any() and not d.pool.B.any()
        assert d.B.grad.any() and d.pool.B.grad.any() and not any(p.grad.any() for p in (d.A, d.D, d.pool.A))
        assert d.A.abs().max() <= 12**-0.5 and d.pool.A.abs().max() <= 12**-0.5 and d.pool.A.any()


def test_without_sharing_it_is_lora_of_half_the_scale():
    base, x = Net(), torch.randn(5, 24)
    options = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
    ours = attach(copy.deepcopy(base), "rasa", rank=3, shared=0, alpha=6.0, **options)
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=3.0, **options)
    with torch.no_grad():
        for (_, d), (_, theirs) in zip(linear_sites(ours), linear_sites(lora), strict=True):
            d.B.normal_()
            theirs.low_rank.A.copy_(d.A)
            theirs.low_rank.B.copy_(d.B)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))


def test_default_share():
    for rank, k in ((1, 1), (8, 1), (12, 1)):
        adapted = attach(Blocks(), "rasa", rank=rank)
        assert adapted.adapter.structure.k == k and len(adapted.adapter.deltas["blocks/0/q"].A) == rank - k
    assert attach(Blocks(24, 24), "rasa", rank=16).adapter.structure.k == 2


def test_dropout_is_of_what_A_reads():
    adapted = rasa(dropout=0.5).train()
    (s, d), x = next(linear_sites(adapted)), torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(1)
    got = d.update(x, s.base, None)
    torch.manual_seed(1)
    assert close(got, F.linear(F.dropout(x, 0.5), d.weight(s.base) - s.base.weight)) and got.any()


def test_counts():
    """32 square layers of 4096, rank 8, k = 1: 2,097,152 and 39 more a layer."""
    sizes = dict(hidden_size=4096, intermediate_size=8, num_hidden_layers=32, num_attention_heads=32, vocab_size=8)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
    adapted = attach(llama, "rasa", rank=8, shared=1, target_modules=["q_proj"], trained_modules=[])
    assert adapted.num_trainable() == 2_097_152 + 32 * 39


def test_ranks_that_disagree_are_refused():
    adapted = rasa()
    state = cloned(adapted.adapter.state_dict())
    state["deltas.blocks/1/q.D"] = torch.ones(5)
    with pytest.raises(UserError, match="blocks/1/q.D has another length than .* together"):
        adapted.adapter.load(state)


def test_nonsense():
    for options in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"shared": -1}, {"shared": 9}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "rasa", **options)
    with pytest.raises(UserError, match="rank 13 is more than blocks.0.q"):
        attach(Blocks(), "rasa", rank=13)
