"""SaRA: the smallest weights train, those that grow are frozen, and the rest of the base never moves."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, roberta_base, train

from lorafactory import UserError, attach, load

SMALL = {"fraction": 0.3, "penalty_over": 8}
CHANGES = {"penalty": ([0.3, 0.0], {}), "penalty_over": ([30, 100], {}), "freeze_at": ([0.0, 0.25], {})}
CHANGES |= {"threshold": ([0.02], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def mask_of(d):
    ones = torch.ones(d.index.shape[1])
    return torch.zeros(d.d_out, d.d_in).index_put((d.index[0], d.index[1]), ones).bool()


def run(steps=8, until=None, lr=5e-3, **options):
    """(base, adapted, its optimiser) after `until` of so many steps."""
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached("sara", base, data, **{"fraction": 0.3, **TARGETS, **options})
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=lr, weight_decay=0.0), steps)
    train(adapted, data, optimizer, steps=until or steps)
    return base, adapted, optimizer


def test_equation_by_hand():
    """Below 0.5: -0.1, 0.2 and 0, to which 1, 2 and 3 are added."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, -0.1, 0.5], [0.2, -0.6, 0.0]]))
    adapted = attach(nn.Sequential(module), "sara", threshold=0.5)
    d = adapted.adapter.deltas["0"]
    assert d.index.tolist() == [[0, 1, 1], [1, 0, 2]] and not d.values.any()
    with torch.no_grad():
        d.values.copy_(torch.tensor([1.0, 2.0, 3.0]))
    want = torch.tensor([[3.0, 0.9, 0.5], [2.2, -0.6, 3.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(3)), want.T + module.bias)


@pytest.mark.parametrize("options", [{"fraction": 0.2}, {"threshold": 0.05}])
def test_the_mask_is_the_smallest_weights_of_a_layer(options):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "sara", **TARGETS, **options)
    assert torch.equal(adapted(x), base(x)), "no change at step 0"
    for site, d in linear_sites(adapted):
        size, mask = site.base.weight.detach().abs(), mask_of(d)
        assert size[mask].max() < d.threshold <= size[~mask].min()
        if "fraction" in options:
            assert len(d.values) == round(0.2 * size.numel())
        else:
            assert float(d.threshold) == pytest.approx(0.05) and torch.equal(mask, size < 0.05)


def test_what_does_not_train_stays_to_the_bit():
    base, adapted, optimizer = run(freeze_at=0.0)
    for site, d in linear_sites(adapted):
        w, w0 = d.weight(site.base).detach(), base.get_submodule(site.name).weight
        assert torch.equal(w[~mask_of(d)], w0[~mask_of(d)]) and (w[mask_of(d)] != w0[mask_of(d)]).all()
    sizes = {t.numel() for p, s in optimizer.state.items() for t in s.values() if t.dim()}
    assert sizes == {len(d.values) for _, d in linear_sites(adapted)}, "moments and gradients are |M|-sized"
    assert all(d.values.grad.shape == d.values.shape for _, d in linear_sites(adapted))


def test_weights_that_grow_are_frozen_where_they_are():
    _, before, _ = run(steps=8, until=3)
    _, at, optimizer = run(steps=8, until=4)
    _, after, _ = run(steps=8)
    grew = 0
    for (site, d), (_, e), (_, f) in zip(*(linear_sites(m) for m in (before, at, after)), strict=True):
        assert d.past_values is None and e.past_values is not None
        old, new = mask_of(d), mask_of(e)
        w = e.weight(site.base).detach()
        assert not (new & ~old).any() and (w[new].abs() < e.threshold).all(), "M2 lies in M"
        assert (w[old & ~new].abs() >= e.threshold).all() and len(e.past_values) == (old & ~new).sum()
        assert torch.equal(e.past_values, f.past_values) and torch.equal(e.past_index, f.past_index)
        later = f.weight(site.base).detach()
        assert torch.equal(later[~new], w[~new]) and (later[new] != w[new]).all(), "and never again"
        grew += len(e.past_values)
    assert at.adapter.counters()["frozen_entries"] == grew == after.adapter.counters()["frozen_entries"] > 0
    owned = {p for g in optimizer.param_groups for p in g["params"]}
    assert owned == set(at.adapter.parameters()) and set(optimizer.state) <= owned, "the moments are fresh"


def test_the_function_does_not_change_when_weights_are_frozen():
    _, adapted, _ = run(freeze_at=0.0)
    x = torch.randn(5, 24)
    y = adapted(x).detach()
    assert all([d.freeze(s.base) for s, d in linear_sites(adapted)])
    assert close(adapted(x), y) and not any(d.freeze(s.base) for s, d in linear_sites(adapted))


def test_a_frozen_past_is_saved_merged_and_brought_back(tmp_path):
    base, adapted, _ = run()
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    x = torch.randn(5, 24)
    perturb(adapted.eval().adapter, 1.0)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    again = load(copy.deepcopy(base), tmp_path / "a").eval()
    assert torch.equal(again(x), y)
    assert again.adapter.deltas["fc1"].past_index.dtype == torch.int32
    adapted.merge()
    assert close(adapted(x), y)
    adapted.unmerge()
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items())
    state = {n: t.clone() for n, t in again.adapter.state_dict().items()}
    state["deltas.fc1.past_index"][0, 0] = 40
    with pytest.raises(UserError, match=r"deltas.fc1.past_index points outside \[40, 24\]"):
        again.adapter.load(state)


def test_penalty_is_the_nuclear_norm_of_what_trains():
    """Of one matrix: W where it trains. Its gradient is U V^T there."""
    torch.manual_seed(0)
    adapted = attach(Net(), "sara", fraction=0.3, penalty=0.5, penalty_over=8, seed=1, **{**TARGETS, "target_modules": ["fc1"]})
    perturb(adapted.adapter, 1.0)
    d, base = adapted.adapter.deltas["fc1"], adapted.adapter.sites[0].base
    want = d.weight(base).detach() * mask_of(d)
    got = adapted.penalty()
    assert close(got, 0.5 * torch.linalg.matrix_norm(want, "nuc"))
    got.backward()
    u, _, vt = torch.linalg.svd(want, full_matrices=False)
    assert close(d.values.grad, 0.5 * (u @ vt)[d.index[0], d.index[1]], 5)


def test_penalty_draws_one_of_the_matrices_that_are_large_enough():
    adapted = attach(Net(), "sara", fraction=0.3, penalty=1.0, penalty_over=20, seed=1, **TARGETS)
    seen = {round(float(adapted.penalty().detach()), 4) for _ in range(40)}
    norms = [torch.linalg.matrix_norm(d.weight(s.base) * mask_of(d), "nuc") for s, d in linear_sites(adapted)]
    assert seen == {round(float(n.detach()), 4) for n in norms}
    for options in ({"penalty_over": 24}, {"fraction": 0.04, "penalty_over": 20}):
        other = attach(Net(), "sara", **{"fraction": 0.3, "penalty": 1.0, **TARGETS, **options})
        assert all(other.penalty() == 0 for _ in range(10)), "24 rows, or at most 100 entries"
    assert not attach(Net(), "sara", penalty=0.0, **TARGETS).adapter.has_penalty


def test_the_penalty_lowers_the_rank():
    def rest(penalty):
        _, adapted, _ = run(steps=16, penalty=penalty, penalty_over=20, freeze_at=0.0)
        return sum(float(torch.linalg.svdvals(d.masked(s.base).detach()).sum()) for s, d in linear_sites(adapted))

    assert rest(0.3) < 0.9 * rest(0.0)


def test_groups():
    adapted = attach(Net(), "sara", **TARGETS)
    assert {g["weight_decay"] for g in adapted.optimizer(adamw, 4).param_groups} == {0.0}


def test_counts():
    """RoBERTa-base, query and value: a tenth of 768 x 768."""
    adapted = attach(copy.deepcopy(roberta_base()), "sara", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 58_982


@pytest.mark.parametrize(
    "options, said",
    [
        ({"fraction": 1.0}, "fraction is 1.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1e-9}, "threshold is 1e-09, and no weight of these layers is below it"),
        ({"freeze_at": 1.0}, "freeze_at is 1.0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"penalty_over": -1}, "penalty_over is -1"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "sara", **TARGETS, **options)
