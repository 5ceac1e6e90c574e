import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Blocks, Net, close, linear_sites, perturb, roberta_base
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

SMALL = {"lora_rank": 4}
CHANGES = {"select": ([False], {"rank": None}), "rank": ([2, 3], {})}
TARGETS = {"target_modules": ["q", "up"], "trained_modules": []}
HERE = {"lora_rank": 3, "rank": 6, "shards": 2, **TARGETS}
PURE = {"select": False, "dissociate": False, "shards": 1, "private": 0}
KINDS = ("blocks/*/q/12x12", "blocks/*/up/20x12")


def layers(adapted, kind=KINDS[0]):
    return [d for s, d in linear_sites(adapted) if s.kind == kind]


def pool_of(adapted, kind=KINDS[0]):
    return adapted.adapter.structure.pools[kind]


def test_equation_by_hand():
    """Two shards a vector, of width 2 for A and 1 for B: A's rows are (p2, p0) and (p3, p1), B's columns (o1, o0) and
    (o3, o3); alpha / rank = 3."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "mos", lora_rank=2, rank=2, shards=2, alpha=6.0)
    pool, d = pool_of(adapted, "*/2x4"), adapted.adapter.deltas["0"]
    with torch.no_grad():
        pool.A.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]))
        pool.B.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        d.index_A.copy_(torch.tensor([2, 0, 3, 1]))
        d.index_B.copy_(torch.tensor([1, 0, 3, 3]))
    a = torch.tensor([[5.0, 6.0, 1.0, 2.0], [7.0, 8.0, 3.0, 4.0]])
    b = torch.tensor([[2.0, 4.0], [1.0, 4.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + 3 * b @ a)
    x = torch.randn(3, 4)
    assert close(adapted(x), F.linear(x, module.weight + 3 * b @ a, module.bias))


def test_outputs_and_gradients_of_a_pool_are_sums_over_its_layers():
    """In float64, by one-hot matrices that pick the shards."""
    adapted = attach(Blocks().double(), "mos", **HERE)
    perturb(adapted.adapter, 1.0)
    for kind in KINDS:
        pool, total = pool_of(adapted, kind), 0
        x, g = torch.randn(6, 12).double(), torch.randn(6, 12 if kind == KINDS[0] else 20).double()
        for d in layers(adapted, kind):
            a, b = (F.one_hot(i, len(pool.A)).double() for i in (d.index_A, d.index_B))
            want = 16 / 6 * (b @ pool.B).reshape(6, -1).T @ (a @ pool.A).reshape(6, -1)
            y = d.update(x, None, None)
            assert close(y, x @ want.T) and want.abs().max() > 1e-3
            total = total + (x @ want.T * g).sum()
        want = torch.autograd.grad(total, (pool.A, pool.B))
        mine = torch.autograd.grad(sum((d.update(x, None, None) * g).sum() for d in layers(adapted, kind)), (pool.A, pool.B))
        assert all(close(m, t) and t.any() for m, t in zip(mine, want, strict=True))


def test_who_takes_what():
    """Public rows at most once a layer, private ones in one layer alone; A and B by different draws."""
    adapted = attach(Blocks(), "mos", **HERE)
    found, public = layers(adapted), (3 - 1) * 3 * 2
    assert pool_of(adapted).A.shape == (18, 6) and pool_of(adapted, KINDS[1]).B.shape == (18, 10)
    for i, d in enumerate(found):
        for index in (d.index_A, d.index_B):
            assert len(index) == 12 and len(set(index.tolist())) == 12
            assert (index[:10] < public).all() and index[10:].tolist() == [public + 2 * i, public + 2 * i + 1]
        assert not torch.equal(d.index_A, d.index_B)
    assert not torch.equal(found[0].index_A[:10], found[1].index_A[:10])
    again = attach(Blocks(), "mos", seed=1, **HERE), attach(Blocks(), "mos", seed=1, **HERE)
    assert all(torch.equal(a.index_A, b.index_A) for a, b in zip(*map(layers, again), strict=True))


def test_each_step_of_the_paper_can_be_left_out():
    whole = layers(attach(Blocks(), "mos", **HERE))
    tied = layers(attach(Blocks(), "mos", **{**HERE, "dissociate": False}))
    assert all(torch.equal(d.index_A, d.index_B) for d in tied)
    open_ = layers(attach(Blocks(), "mos", **{**HERE, "private": 0}))
    assert all((d.index_A < 18).all() and len(d.index_A) == 12 for d in open_)
    unsharded = attach(Blocks(), "mos", **{**HERE, "shards": 1})
    assert pool_of(unsharded).A.shape == (9, 12) and len(layers(unsharded)[0].index_A) == 6
    everything = layers(attach(Blocks(), "mos", **{**HERE, "rank": None, "select": False}))
    assert [d.rank for d in whole] == [6, 6, 6] and [d.rank for d in everything] == [7, 7, 7]
    assert all(d.index_A[:12].tolist() == list(range(12)) and sorted(d.index_B[:12]) == list(range(12)) for d in everything)


def test_pure_sharing_is_one_pair_for_all_layers():
    adapted = attach(Blocks(), "mos", lora_rank=3, **PURE, **TARGETS)
    perturb(adapted.adapter, 1.0)
    pairs = [d.factors() for d in layers(adapted)]
    pool = pool_of(adapted)
    assert all(torch.equal(a, pool.A) and close(b, 16 / 9 * pool.B.T) for b, a in pairs) and pairs[0][1].shape == (9, 12)


@pytest.mark.parametrize("shards", [1, 4])
def test_all_private_is_lora(shards):
    """Each layer's own e pairs, whatever they are cut into; trained alike."""
    base, x = Blocks(), torch.randn(5, 12)
    mos = attach(copy.deepcopy(base), "mos", lora_rank=3, rank=3, private=3, shards=shards, seed=0, **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, **TARGETS)
    for (_, m), (_, d) in zip(linear_sites(mos), linear_sites(lora), strict=True):
        with torch.no_grad():
            d.low_rank.A.copy_(m.factors()[1])
    for adapted in (mos, lora):
        optimizer = torch.optim.AdamW(adapted.adapter.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
    assert close(mos(x), lora(x), 3) and not close(mos(x), base(x))
    assert mos.num_trainable() == lora.num_trainable()


def test_rank_is_the_assembled_one_and_may_exceed_the_budget():
    adapted = attach(Blocks().double(), "mos", **HERE)
    perturb(adapted.adapter, 1.0)
    found = [torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight, rtol=1e-10) for s, d in linear_sites(adapted)]
    assert [int(r) for r in found] == [6] * 6


def test_start():
    base, x = Blocks(64, 80), torch.randn(5, 64)
    adapted = attach(copy.deepcopy(base), "mos", lora_rank=4, shards=4, **TARGETS)
    assert torch.equal(adapted(x), base(x))
    pool = pool_of(adapted, "blocks/*/q/64x64")
    assert 0.12 < pool.A.abs().max() <= 64**-0.5 and not pool.B.any()
    adapted(x).square().sum().backward()
    assert pool.B.grad.any() and not pool.A.grad.any()


def test_indices_are_saved(tmp_path):
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "mos", seed=3, **HERE)
    perturb(adapted.adapter, 1.0)
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)
    other = attach(copy.deepcopy(base), "mos", seed=4, **{**HERE, "rank": 5, "alpha": 1.0})
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    other.adapter.load(state)
    assert torch.equal(other(x), y) and all(d.rank == 6 for d in layers(other))
    name = next(n for n in state if n.endswith("index_B"))
    for wrong in (state[name][:11], state[name] + 18, state[name] - 18):
        with pytest.raises(UserError, match="index"):
            other.adapter.load({**state, name: wrong, name.replace("_B", "_A"): wrong})


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "mos", dropout=0.5, lora_rank=4, target_modules=["fc1"], trained_modules=[]).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_counts():
    """As a LoRA of rank e, whatever the rank and the shards: RoBERTa-base's queries and values; a 7B Llama's seven kinds."""
    for more in ({}, {"rank": 16, "shards": 8, "private": 0}):
        adapted = attach(copy.deepcopy(roberta_base()), "mos", lora_rank=2, target_modules=["query", "value"], **more)
        assert adapted.cost()["adapter_parameters"] == 2 * 12 * 2 * 1536 == 73_728
        assert {d.rank for _, d in linear_sites(adapted)} == {more.get("rank", 8)}
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=100)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
    assert attach(llama, "mos", lora_rank=2, trained_modules=[]).num_trainable() == 4_997_120


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"private": 3}, "private is 3; of lora_rank=2"),
        ({"private": -1}, "private is -1"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1, "private": 2}, "rank is 1; it must be at least 2"),
        ({"rank": 5}, r"rank 5 is more than blocks.0.q \[12, 12\] can have: at most 4"),
        ({"rank": 4, "select": False}, "rank is 4 beside select=false"),
        ({"shards": 5}, r"shards is 5; it must divide \[12, 12\], the shape of blocks.0.q"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Blocks(), "mos", **options)
