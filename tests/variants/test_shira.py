"""SHiRA: which entries train, that nothing else moves, and that merging touches only them."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, attached, close, linear_sites, loss, perturb, roberta_base, same

from lorafactory import UserError, attach, load
from lorafactory.adapter.sparse import Sparse

LAYERS = ["fc1", "fc2", "fc3"]
TARGETS = {"target_modules": LAYERS, "trained_modules": []}
CHANGES = {
    "fraction": ([0.1], {}),
    "mask_type": (["magnitude", "gradient", "snip", "structured"], {}),
    "mask_offset": ([1], {"rank": 3, "mask_type": "magnitude"}),
    "mask_batches": ([1], {"mask_type": "gradient"}),
}


def mask_of(delta):
    return torch.zeros(delta.d_out, delta.d_in).index_put_(delta.entries()[0], torch.ones(len(delta.values)), accumulate=True)


def built(**options):
    torch.manual_seed(0)
    base = Net()
    return base, Regression(base), attached("shira", base, Regression(base), rank=2, **TARGETS, **options)


def gradient(base, data, name, count):
    """The mean dL/dW, by autograd on the whole base."""
    model = copy.deepcopy(base)
    sum(loss(model, b) for b in data(count)).div(count).backward()
    return model.get_submodule(name).weight.grad


def test_equation_by_hand():
    """S has 7 at (0, 2) and -1 at (1, 0)."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "shira", fraction=1 / 3)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.move(torch.tensor([2, 3]))
        d.values.copy_(torch.tensor([7.0, -1.0]))
    s = torch.tensor([[0.0, 0.0, 7.0], [-1.0, 0.0, 0.0]])
    x = torch.randn(4, 3)
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + s)
    assert close(adapted(x), F.linear(x, module.weight + s, module.bias))
    assert close(d.update(x, adapted.adapter.sites[0].base, None), x @ s.T)


def test_gradients_are_those_of_the_dense_weight_at_the_mask():
    torch.manual_seed(0)
    base = Net()
    adapted = attach(copy.deepcopy(base), "shira", rank=3, seed=1, **TARGETS)
    perturb(adapted.adapter, 1.0)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for s, d in linear_sites(adapted):
            plain.get_submodule(s.name).weight.copy_(d.weight(s.base))
    x = torch.randn(6, 5, 24, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    for model, inputs in ((adapted, x), (plain, z)):
        model(inputs).square().sum().backward()
    assert close(x.grad, z.grad)
    for s, d in linear_sites(adapted):
        assert close(d.values.grad, plain.get_submodule(s.name).weight.grad[d.entries()[0]])
        assert d.values.grad.shape == (3 * (s.d_in + s.d_out),), "no dense gradient is kept"


@pytest.mark.parametrize("mask", ["random", "magnitude", "gradient", "snip"])
def test_n_is_a_loras_count_and_the_update_has_more_rank(mask):
    base, _, adapted = built(mask_type=mask)
    x = torch.randn(5, 24)
    assert torch.equal(adapted(x), base(x)), "zero at the start"
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        assert len(d.values) == 2 * (s.d_in + s.d_out) and mask_of(d).max() == 1
        update, mask_ = d.weight(s.base) - s.base.weight, mask_of(d)
        assert not update[mask_ == 0].any() and (update[mask_ == 1] != 0).all()
        if mask == "random":
            assert int(torch.linalg.matrix_rank(update)) > 12 > 2


def test_the_seed_settles_a_random_mask():
    one, two, other = (attach(Net(), "shira", rank=2, seed=s, **TARGETS) for s in (1, 1, 2))
    for (_, a), (_, b), (_, c) in zip(*(linear_sites(m) for m in (one, two, other)), strict=True):
        assert torch.equal(a.index, b.index) and not torch.equal(a.index, c.index)
    assert len({int(i) for _, d in linear_sites(one) for i in d.index[1, :3]}) > 3, "layers have masks of their own"


@pytest.mark.parametrize("mask", ["magnitude", "gradient", "snip"])
def test_the_mask_holds_the_largest_scores(mask):
    base, data, adapted = built(mask_type=mask, **({} if mask == "magnitude" else {"mask_batches": 3}))
    for s, d in linear_sites(adapted):
        w, g = base.get_submodule(s.name).weight.detach(), gradient(base, data, s.name, 3)
        scores = {"magnitude": w, "gradient": g, "snip": w * g}[mask].abs()
        inside = mask_of(d).bool()
        assert scores[inside].min() >= scores[~inside].max() * (1 - 1e-5)


@pytest.mark.parametrize("mask", ["magnitude", "gradient"])
def test_offsets_are_blocks_that_do_not_overlap(mask):
    masks = [dict(linear_sites(built(mask_type=mask, mask_offset=k)[2])) for k in (0, 1, 2)]
    for deltas in zip(*(m.values() for m in masks), strict=True):
        assert torch.stack([mask_of(d) for d in deltas]).sum(0).max() == 1


@pytest.mark.parametrize("name", LAYERS)
def test_structured_is_a_diagonal_and_whole_rows(name):
    shifted = []
    for offset in (0, 1):
        _, _, adapted = built(mask_type="structured", mask_offset=offset)
        (s, d), = [(s, d) for s, d in linear_sites(adapted) if s.name == name]  # fmt: skip
        found = mask_of(d)
        rows = found.all(1)
        rest = found[~rows]
        assert 1 <= rows.sum() and (rest.sum(1) <= 1).all() and (rest.sum(0) <= 1).all()
        assert len(d.values) <= 2 * (s.d_in + s.d_out) < len(d.values) + s.d_in + rows.sum()
        perturb(adapted.adapter, 1.0)
        least = min(s.d_in, s.d_out)
        assert int(torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight)) > least // 2
        shifted.append((rows, found))
    assert not (shifted[0][0] & shifted[1][0]).any()
    assert (shifted[0][1] * shifted[1][1]).sum() < 0.1 * shifted[0][1].sum(), "only where rows cross the other diagonal"


def test_masks_from_data_are_not_drawn_again_after_loading(tmp_path):
    base, data, adapted = built(mask_type="snip", mask_batches=2)
    perturb(adapted.adapter, 1.0)
    adapted.save(tmp_path / "a")
    again = load(copy.deepcopy(base), tmp_path / "a").begin()
    assert same(again.adapter.state_dict(), adapted.adapter.state_dict())
    state = adapted.adapter.state_dict()
    assert {n.rpartition(".")[2] for n in state} == {"values", "index"}


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_touches_the_entries_and_brings_them_back(transposed, monkeypatch):
    """Copied, not subtracted; what is kept meanwhile has the size of the mask."""
    torch.manual_seed(0)
    base = Net(transposed)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    adapted = attach(base, "shira", rank=2, seed=1, **TARGETS).eval()
    perturb(adapted.adapter, 1.0)
    x = torch.randn(5, 24)
    y = adapted(x).detach()
    monkeypatch.setattr(Sparse, "weight", None)  # no dense matrix is needed
    adapted.merge()
    assert close(adapted(x), y)
    for s, d in linear_sites(adapted):
        moved = s.base.weight != (before[f"{s.name}.weight"].T if transposed else before[f"{s.name}.weight"])
        assert torch.equal(moved.float(), mask_of(d))
        kept = s.base.module.__dict__["_held"].kept
        assert {t.numel() for t in kept.values()} == {len(d.values)}
    adapted.adapter.load({n: torch.zeros_like(t) for n, t in adapted.adapter.state_dict().items()})
    adapted.unmerge()
    assert same(adapted.model.state_dict(), before), "whatever happened to the adapter meanwhile"


def test_two_adapters_on_disjoint_masks_add_up():
    """Whichever is merged first."""
    base, x, weights = Net(), torch.randn(5, 24), []
    for order in ((0, 1), (1, 0)):
        model = copy.deepcopy(base)
        for k in order:
            chosen = attach(copy.deepcopy(base), "shira", rank=2, mask_type="magnitude", mask_offset=k, **TARGETS)
            perturb(chosen.adapter, 1.0)
            added = attach(model, "shira", rank=2, **TARGETS)
            added.adapter.load(chosen.adapter.state_dict())
            model = added.bake()
        weights.append(model.state_dict())
        assert not close(model(x), base(x), 100)
    assert same(*weights)


def test_a_narrow_base_keeps_small_values_wide():
    torch.manual_seed(0)
    module = nn.Linear(24, 40, dtype=torch.bfloat16)
    adapted = attach(nn.Sequential(module), "shira", rank=2, seed=1)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.values.fill_(1e-4)
    base, x = adapted.adapter.sites[0].base, torch.randn(6, 24)
    assert d.weight(base).dtype == torch.float32 and close(d.update(x, base, None), 1e-4 * (x @ mask_of(d).T))
    with pytest.raises(UserError, match="to rounding"):
        adapted.merge()


def test_values_are_not_decayed():
    adapted = attach(Net(), "shira", rank=2, **TARGETS)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}


def test_counts():
    """RoBERTa-base, query and value: a LoRA's count at the same rank; 1 percent of 768 x 768 is 5,898."""
    adapted = attach(copy.deepcopy(roberta_base()), "shira", rank=8, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 8 * 1536 == 294_912
    options = {"fraction": 0.01, "mask_type": "magnitude"}
    adapted = attach(copy.deepcopy(roberta_base()), "shira", target_modules=["query", "value"], **options)
    assert adapted.cost()["adapter_parameters"] == 24 * 5_898


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank is 0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"mask_type": "best"}, "mask_type is 'best'; it takes random, magnitude"),
        ({"mask_offset": 1}, "mask_offset is 1, of no effect on a random mask"),
        ({"mask_offset": -1, "mask_type": "magnitude"}, "mask_offset is -1"),
        ({"mask_batches": 3}, "mask_batches is 3, of no effect on mask_type=random"),
        ({"mask_batches": 0, "mask_type": "snip"}, "mask_batches is 0"),
        ({"rank": 16}, r"1024 entries are more than the 960 of fc1 \[40, 24\]"),
        ({"rank": 8, "mask_type": "magnitude", "mask_offset": 2}, "512 entries from mask_offset 2 are more than the 960 of fc1"),
        ({"fraction": 0.01, "mask_type": "structured"}, "no structured mask: a diagonal and a row are 48"),
        ({"mask_type": "gradient"}, "starts from data"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "shira", **options, **TARGETS)


def test_places_outside_the_layer_are_refused():
    adapted = attach(Net(), "shira", rank=2, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    state["deltas.fc2.index"][0, 3] = 24
    with pytest.raises(UserError, match=r"deltas.fc2.index points outside \[24, 40\]"):
        adapted.adapter.load(state)
