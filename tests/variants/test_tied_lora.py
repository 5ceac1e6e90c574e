import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Blocks, Net, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach, load

CHANGES = {"trained": ([["A", "B"], ["v"]], {})}
TARGETS = {"target_modules": ["q", "up"], "trained_modules": []}
HERE = {"rank": 3, **TARGETS}
CHOICES = [list(c) for n in range(1, 5) for c in itertools.combinations("ABuv", n)]
KINDS = ("blocks/*/q/12x12", "blocks/*/up/20x12")


def layers(adapted, kind=KINDS[0]):
    return [d for s, d in linear_sites(adapted) if s.kind == kind]


def pair_of(adapted, kind=KINDS[0]):
    return adapted.adapter.structure.pairs[kind]


def test_equation_by_hand():
    """alpha / rank = 2, B = [[1, 0], [2, 1]], u = (3, -1), A = [[1, 2], [0, 1]], v = (1, 10)."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "tied_lora", rank=2, alpha=4.0)
    pair, d = pair_of(adapted, "*/2x2"), adapted.adapter.deltas["0"]
    with torch.no_grad():
        pair.A.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        pair.B.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        d.u.copy_(torch.tensor([3.0, -1.0]))
        d.v.copy_(torch.tensor([1.0, 10.0]))
    update = 2 * torch.tensor([[3.0, 6.0], [60.0, 110.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_outputs_and_gradients_of_a_pair_are_sums_over_its_layers():
    adapted = attach(Blocks().double(), "tied_lora", alpha=6.0, **HERE)
    perturb(adapted.adapter, 1.0)
    for kind in KINDS:
        pair, found = pair_of(adapted, kind), layers(adapted, kind)
        x, g = torch.randn(6, 12).double(), torch.randn(6, len(pair.B)).double()
        ys = [d.update(x, None, None) for d in found]
        wants = [2 * x @ (torch.diag(d.v) @ pair.B @ torch.diag(d.u) @ pair.A).T for d in found]
        assert all(close(y, w) and w.abs().max() > 1e-3 for y, w in zip(ys, wants, strict=True))
        trained = [pair.A, pair.B, *(p for d in found for p in (d.u, d.v))]
        mine, true = (torch.autograd.grad(sum((t * g).sum() for t in some), trained) for some in (ys, wants))
        assert len(trained) == 8 and all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_one_pair_a_kind_saved_once(tmp_path):
    adapted = attach(Blocks(), "tied_lora", **HERE)
    for kind in KINDS:
        assert len(layers(adapted, kind)) == 3 and all(d.pair is pair_of(adapted, kind) for d in layers(adapted, kind))
    adapted.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() for t in saved.values()) == adapted.num_trainable() + 6
    assert adapted.num_trainable() == 3 * (12 + 12) + 3 * (12 + 20) + 3 * (3 + 12) + 3 * (3 + 20)


@pytest.mark.parametrize("trained", CHOICES, ids="".join)
def test_every_choice_starts_at_the_base_trains_what_it_says_and_comes_back(trained, tmp_path):
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "tied_lora", trained=trained, seed=0, **HERE)
    assert torch.equal(adapted(x), base(x))
    names = {n.rpartition(".")[2] for n, p in adapted.adapter.named_parameters() if p.requires_grad}
    assert names == set(trained)
    numbers = {"A": 3 * 24, "B": 3 * 32, "u": 18, "v": 3 * 32}
    assert adapted.num_trainable() == sum(numbers[t] for t in trained)
    start = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters()}
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2, weight_decay=0.0), 3)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in adapted.adapter.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if n.rpartition(".")[2] in trained}
    perturb(adapted.adapter, 0.3)
    assert not close(adapted(x), base(x))
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), adapted(x))
    for _, d in linear_sites(adapted):
        d.randomize()
        b, a = d.factors()
        assert (b @ a).abs().max() > 1e-3


def test_a_pair_of_one_layer_is_lora():
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    tied = attach(copy.deepcopy(base), "tied_lora", rank=3, alpha=6.0, trained=["A", "B"])
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=6.0)
    with torch.no_grad():
        lora.adapter.deltas["0"].low_rank.A.copy_(pair_of(tied, "*/20x12").A)
    for adapted in (tied, lora):
        optimizer = torch.optim.AdamW(adapted.adapter.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
    assert close(tied(x), lora(x)) and not close(tied(x), base(x))


def test_scaling_vectors_alone_are_vera_over_one_kind():
    base, x = Blocks(), torch.randn(5, 12)
    options = {"rank": 3, "target_modules": ["q"]}
    tied = attach(copy.deepcopy(base), "tied_lora", alpha=3.0, trained=["u", "v"], **options)
    vera = attach(copy.deepcopy(base), "vera", **options)
    perturb(tied.adapter, 1.0)
    with torch.no_grad():
        bank, pair = vera.adapter.structure.bank, pair_of(tied)
        bank.A.copy_(pair.A)
        bank.B.copy_(pair.B)
        for (_, t), (_, v) in zip(linear_sites(tied), linear_sites(vera), strict=True):
            v.b.copy_(t.v)
            v.d.copy_(t.u)
    assert close(tied(x), vera(x)) and not close(tied(x), base(x)) and tied.num_trainable() == vera.num_trainable()


def test_start():
    pair = pair_of(attach(Blocks(64, 80), "tied_lora", rank=8, trained=["u"], target_modules=["up"]), "blocks/*/up/80x64")
    assert all(0.12 < t.abs().max() <= 0.125 for t in (pair.A, pair.B))
    pair = pair_of(attach(Blocks(64, 80), "tied_lora", rank=8, target_modules=["up"]), "blocks/*/up/80x64")
    assert not pair.B.any() and 0.12 < pair.A.abs().max() <= 0.125


def test_loading_under_another_rank_and_alpha():
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "tied_lora", **HERE)
    perturb(adapted.adapter, 1.0)
    other = attach(copy.deepcopy(base), "tied_lora", alpha=1.0, **{**HERE, "rank": 5})
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    other.adapter.load(state)
    assert torch.equal(other(x), adapted(x)) and {d.rank for _, d in linear_sites(other)} == {3}
    with pytest.raises(UserError, match="u has 4 ranks, its pair 3"):
        other.adapter.load({**state, "deltas.blocks/1/q.u": torch.ones(4)})


def test_tied_factors_learn_at_a_rate_of_their_own():
    adapted = attach(Blocks(), "tied_lora", factor_lr=0.25, **HERE)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 1)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    shared = {p for k in KINDS for p in pair_of(adapted, k).parameters()}
    assert {rates[p] for p in shared} == {2.5e-3} and {r for p, r in rates.items() if p not in shared} == {1e-2}


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "tied_lora", dropout=0.5, rank=4, target_modules=["fc1"], trained_modules=[]).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_counts():
    """r (d_in + d_out) + L (r + d_out) a kind: RoBERTa-base's queries and values at rank 8."""
    adapted = attach(copy.deepcopy(roberta_base()), "tied_lora", rank=8, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 2 * (8 * 1536 + 12 * (8 + 768)) == 43_200


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 13}, r"rank 13 is more than blocks.0.q \[12, 12\] can have: at most 12"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"trained": []}, r"trained is \[\]"),
        ({"trained": ["A", "w"]}, r"trained is \['A', 'w'\]; it takes one or more of A, B, u, v"),
        ({"trained": ["A", "A"]}, "each once"),
        ({"factor_lr": 0.0}, "factor_lr is 0.0"),
        ({"factor_lr": 0.5, "trained": ["u"]}, "factor_lr is 0.5, of no effect"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Blocks(), "tied_lora", **options)
