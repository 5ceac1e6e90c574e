import copy
import itertools

import pytest
import torch
import torch.nn as nn
from support import Blocks, Net, Regression, adamw, attached, cloned, close, linear_sites, perturb, roberta_base, train

from lorafactory import Adapted, UserError, attach, load, registry

CHANGES = {"group_by": (["module_name"], {"target_modules": ["fc1", "fc2", "fc3"]})}
STARTS = list(itertools.product(("normal", "svd", "zero"), ("zero", "neutral", "svd"), ("normal", "svd", "zero")))
LEGAL = [s for s in STARTS if s.count("zero") <= 1]


def updates(adapted):
    return {s.name: (d.weight(s.base) - s.base.weight).detach() for s, d in linear_sites(adapted)}


def test_equation_by_hand():
    """alpha / rank = 3, L = [1; 2], M = [5], R = [1, -1]: the update is [[15, -15], [30, -30]]."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "lotr", rank=1, alpha=3.0)
    bank, d = adapted.adapter.structure.banks["2x2"], adapted.adapter.deltas["0"]
    with torch.no_grad():
        bank.L.copy_(torch.tensor([[1.0], [2.0]]))
        bank.R.copy_(torch.tensor([[1.0, -1.0]]))
        d.M.fill_(5.0)
    update = torch.tensor([[15.0, -15.0], [30.0, -30.0]])
    assert close(updates(adapted)["0"], update)
    x = torch.randn(4, 2)
    assert close(adapted(x), module.base_forward(x) + x @ update.T)


def test_factors_are_shared_by_shape_or_by_place():
    shape = attach(Blocks(), "lotr", rank=2).adapter
    assert set(shape.structure.banks) == {"12x12", "20x12"}
    assert len({id(d.bank) for _, d in linear_sites_of(shape, ("q", "v"))}) == 1
    place = attach(Blocks(), "lotr", rank=2, group_by="module_name").adapter
    assert set(place.structure.banks) == {"blocks/*/q/12x12", "blocks/*/v/12x12", "blocks/*/up/20x12"}
    assert {len({id(d.bank) for _, d in linear_sites_of(place, n)}) for n in ("q", "v", "up")} == {1}


def linear_sites_of(adapter, tails):
    return [(s, adapter.deltas[s.key]) for s in adapter.sites if s.name.endswith(tails)]


def test_rank_and_spans():
    """rank(update) <= r; all columns in span(L), all rows in span(R): unfoldings of the stack have rank <= r."""
    adapted = attach(Blocks(), "lotr", rank=3, target_modules=["q", "v"])
    perturb(adapted.adapter, 1.0)
    found = updates(adapted)
    assert len(found) == 6 and all(torch.linalg.matrix_rank(u) == 3 for u in found.values())
    stack = list(found.values())
    for unfolding in (torch.cat(stack, 1), torch.cat(stack, 0)):
        assert torch.linalg.matrix_rank(unfolding, rtol=1e-5) == 3
    bank = adapted.adapter.structure.banks["12x12"]
    for u in stack:
        assert torch.linalg.matrix_rank(torch.cat([bank.L, u], 1), rtol=1e-5) == 3


def test_a_core_is_its_layers_own():
    adapted = attach(Blocks(), "lotr", rank=2, target_modules=["q"])
    perturb(adapted.adapter, 1.0)
    before, keys = updates(adapted), list(adapted.adapter.deltas)
    with torch.no_grad():
        adapted.adapter.deltas[keys[1]].M.add_(1.0)
    after = updates(adapted)
    assert [torch.equal(before[n], after[n]) for n in before] == [True, False, True]


def test_one_layer_with_an_identity_core_is_lora():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    lotr = attach(copy.deepcopy(base), "lotr", rank=3, alpha=6.0, left="zero", core="neutral")
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=6.0)
    low, bank = lora.adapter.deltas["0"].low_rank, lotr.adapter.structure.banks["20x12"]
    assert not bank.L.any() and torch.equal(lotr.adapter.deltas["0"].M, torch.eye(3)) and bank.L0 is None
    lotr.adapter.deltas["0"].M.requires_grad_(False)
    with torch.no_grad():
        low.A.copy_(bank.R)
    for adapted in (lotr, lora):
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
    assert close(lotr(x), lora(x)) and close(bank.L, low.B) and close(bank.R, low.A)


def test_default_start():
    adapted = attach(Blocks(64, 80), "lotr", rank=8, factor_std=0.5, seed=0)
    for bank in adapted.adapter.structure.banks.values():
        assert all(float(t.detach().std()) == pytest.approx(0.5, rel=0.2) for t in (bank.L, bank.R))
        assert bank.L0 is None
    assert not any(d.M.any() for _, d in linear_sites(adapted))
    adapted(torch.randn(5, 64)).square().sum().backward()
    assert all(d.M.grad.any() for _, d in linear_sites(adapted))
    assert not any(b.L.grad.any() or b.R.grad.any() for b in adapted.adapter.structure.banks.values())


@pytest.mark.parametrize("left, core, right", LEGAL)
def test_every_start_keeps_the_function_and_trains(left, core, right, tmp_path):
    torch.manual_seed(0)
    base, x = Blocks(), torch.randn(5, 12)
    pristine = cloned(base.state_dict())
    adapted = attach(copy.deepcopy(base), "lotr", rank=3, seed=0, left=left, core=core, right=right)
    y0 = base(x)
    assert close(adapted(x), y0, 5)
    anchored = "zero" not in (left, core, right)
    assert all((b.L0 is not None) == anchored for b in adapted.adapter.structure.banks.values())
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 3)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapter.parameters())
    perturb(adapted.adapter, 0.3)
    y = adapted(x).detach()
    assert not close(y, y0)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y), "no start runs again"
    adapted.merge()
    assert close(adapted(x), y, 3)
    assert all(torch.equal(t, pristine[n]) for n, t in adapted.detach().state_dict().items())


def test_svd_start_is_the_tucker_form_of_the_weights():
    """L and R are the leading singular vectors of the two unfoldings of the stack, M = L^T W0 R^T."""
    base = Blocks()
    options = dict(rank=3, alpha=3.0, target_modules=["q", "v"], left="svd", core="svd", right="svd")
    adapted = attach(base, "lotr", **options)
    bank = adapted.adapter.structure.banks["12x12"]
    weights = [s.base.weight.detach() for s, _ in linear_sites(adapted)]
    u, s, _ = torch.linalg.svd(torch.cat(weights, 1), full_matrices=False)
    assert close(bank.L.T @ bank.L, torch.eye(3)) and close(bank.R @ bank.R.T, torch.eye(3))
    assert close((u[:, :3].T @ bank.L).abs(), torch.eye(3), 5)
    _, _, vt = torch.linalg.svd(torch.cat(weights, 0), full_matrices=False)
    assert close((vt[:3] @ bank.R.T).abs(), torch.eye(3), 5)
    for (_, d), w in zip(linear_sites(adapted), weights, strict=True):
        assert close(d.M, bank.L.T @ w @ bank.R.T) and torch.equal(d.M, d.M0)
    low = attach(Blocks(), "lotr", **{**options, "rank": 12, "alpha": 12.0})
    for s, d in linear_sites(low):
        k = d.bank
        assert close(k.L @ d.M @ k.R, s.base.weight, 5), "at full rank the form is exact"


def test_a_wrapper_that_silences_it_gets_a_random_start():
    """Whatever the start: a random update, without an anchor that would take it away again."""
    for left, core, right in LEGAL:
        made = Adapted(Blocks(), registry.config("lotr", rank=2, left=left, core=core, right=right), seed=0)
        for _, d in linear_sites(made):
            d.randomize()
        made.begin()
        assert all(u.abs().max() > 1e-3 for u in updates(made).values()), (left, core, right)
        assert all(b.L0 is None for b in made.adapter.structure.banks.values())


def test_counts_on_roberta():
    for rank, count in ((2, 3_168), (8, 13_824), (32, 73_728)):
        adapted = attach(copy.deepcopy(roberta_base()), "lotr", rank=rank, target_modules=["query", "value"])
        assert adapted.cost()["adapter_parameters"] == count


def test_shared_factors_learn_at_a_rate_of_their_own():
    adapted = attach(Blocks(), "lotr", rank=2, factor_lr=0.25)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 1)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    shared = {p for b in adapted.adapter.structure.banks.values() for p in (b.L, b.R)}
    assert {rates[p] for p in shared} == {2.5e-3} and {r for p, r in rates.items() if p not in shared} == {1e-2}
    assert len(shared) == 4 and len(rates) == 4 + 9, "each shared factor once"


def test_what_makes_no_sense_is_refused():
    for start in (s for s in STARTS if s.count("zero") > 1):
        with pytest.raises(UserError, match="nothing would ever train"):
            attach(Net(), "lotr", **dict(zip(("left", "core", "right"), start, strict=True)))
    with pytest.raises(UserError, match="rank 13 is more than blocks.0.q .* at most 12"):
        attach(Blocks(), "lotr", rank=13)
    for options in ({"rank": 0}, {"alpha": 0.0}, {"factor_std": 0.0}, {"core": "normal"}, {"group_by": "depth"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "lotr", **options)


def test_parts_that_disagree_are_refused():
    base = Net()
    adapted = attached("lotr", base, Regression(base), rank=4, target_modules=["fc1"], core="neutral")
    state = cloned(adapted.adapter.state_dict())
    with pytest.raises(UserError, match="another rank"):
        adapted.adapter.load({**state, "deltas.fc1.M": torch.ones(3, 3), "deltas.fc1.M0": torch.ones(3, 3)})
    cut = {n: t for n, t in state.items() if not n.endswith(("L0", "R0"))}
    with pytest.raises(UserError, match="M0 and .*R0 go together"):
        adapted.adapter.load(cut)
    train(adapted, Regression(base), adapted.optimizer(adamw, 2), steps=2)
