import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach
from lorafactory.variants.tera import modes

CHANGES = {"zero": (["first"], {}), "order": ([3], {}), "ratio": ([0.5], {}), "network_seed": ([1], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """Two modes, A_n the identity: s diag(d_1) G diag(d_2)."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "tera", order=2, scale=2.0)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.network.core.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        d.network.factor0.copy_(torch.eye(2))
        d.network.factor1.copy_(torch.eye(3))
        d.d[0].copy_(torch.tensor([1.0, -1.0]))
        d.d[1].copy_(torch.tensor([1.0, 0.0, 10.0]))
    update = 2 * torch.tensor([[1.0, 0.0, 30.0], [-4.0, 0.0, -60.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("order, ratio", [(2, 1.0), (4, 1.0), (5, 0.6), (6, 1.5), (6, 0.3)])
def test_both_paths_are_the_tucker_network(order, ratio):
    """Outputs and gradients in float64 against the tensor, mode by mode, reshaped row by row."""
    adapted = attach(Net().double(), "tera", order=order, ratio=ratio, scale=3.0, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        factors = [a * v for a, v in zip(d.network.factors(), d.d, strict=True)]
        full = d.network.core.view([f.shape[1] for f in factors])
        for i, f in enumerate(factors):
            full = torch.tensordot(full.movedim(i, -1), f, dims=([-1], [1])).movedim(-1, i)
        assert len(factors) == order and all(n > 1 for n in full.shape)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), F.linear(x, 3 * full.reshape(s.d_out, s.d_in))
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (*d.d, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-3
        assert close(d.weight(s.base) - s.base.weight, 3 * full.reshape(s.d_out, s.d_in))
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_rank_is_the_smaller_product():
    base = nn.Sequential(nn.Linear(16, 16)).double()
    for order, ratio, want in ((4, 1.0, 16), (4, 0.5, 4), (3, 0.5, 4), (2, 0.25, 4), (4, 0.75, 9)):
        adapted = attach(copy.deepcopy(base), "tera", order=order, ratio=ratio)
        perturb(adapted.adapter, 1.0)
        assert int(torch.linalg.matrix_rank(updates(adapted)[0], rtol=1e-9)) == want


def test_modes_are_about_equal_and_never_one():
    assert modes(768, 3) == [8, 8, 12] and modes(768, 2) == [24, 32] and modes(4096, 3) == [16, 16, 16]
    assert modes(29, 3) == [29] and modes(1, 2) == [1] and modes(6, 2) == [2, 3]


@pytest.mark.parametrize("zero", ["last", "first"])
def test_start(zero):
    """One vector is zero, and it alone has a gradient in the first step."""
    base, x = Net(), torch.randn(9, 24)
    adapted = attach(copy.deepcopy(base), "tera", zero=zero, d_initial=0.5, **TARGETS)
    assert close(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        still = d.d[-1 if zero == "last" else 0]
        assert not still.any() and still.grad.any()
        assert all((v == 0.5).all() and not v.grad.any() for v in d.d if v is not still)


def test_unit_vectors_make_entries_of_a_layer_s_own_size():
    adapted = attach(nn.Sequential(nn.Linear(300, 400)), "tera")
    d = adapted.adapter.deltas["0"]
    nn.init.ones_(d.d[-1])
    assert float(updates(adapted)[0].std()) == pytest.approx(300**-0.5, rel=0.5)
    k = d.network
    assert float(k.core.std()) == pytest.approx(300**-0.5, rel=0.02)
    assert all(float(f.std()) == pytest.approx(f.shape[1] ** -0.5, rel=0.15) for f in k.factors())


def test_scalings_between_vectors_change_nothing():
    adapted = attach(Net(), "tera", **TARGETS)
    perturb(adapted.adapter, 1.0)
    before = updates(adapted)
    with torch.no_grad():
        for _, d in linear_sites(adapted):
            d.d[0].mul_(4.0)
            d.d[2].div_(4.0)
    assert all(close(a, b) and a.any() for a, b in zip(before, updates(adapted), strict=True))


def test_a_network_is_shared_by_shape_and_depends_on_its_seed_alone():
    base = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 20))
    one = attach(copy.deepcopy(base), "tera", seed=1).adapter
    torch.randn(7)
    two = attach(copy.deepcopy(base).bfloat16(), "tera", seed=2).adapter
    wide = attach(copy.deepcopy(base).double(), "tera").adapter
    other = attach(copy.deepcopy(base), "tera", network_seed=1).adapter
    assert set(one.structure.networks) == {"12x12", "20x12"}
    assert len({id(one.deltas[n].network) for n in "012"}) == 1
    for shape, name in itertools.product(("12x12", "20x12"), ("core", "factor0", "factor3", "checksum")):
        first, second, third, fourth = (getattr(a.structure.networks[shape], name) for a in (one, two, wide, other))
        assert (
            torch.equal(first, second) and torch.equal(first.to(third.dtype), third) and not torch.equal(first, fourth)
        )
    assert all("d." in n for n, p in one.named_parameters()) and third.dtype == torch.int64
    assert {n for n in one.state_dict() if "network" in n} == {
        f"structure.networks.{s}.checksum" for s in ("12x12", "20x12")
    }


@pytest.mark.parametrize("keep", [False, True])
def test_another_network_is_refused_B21(keep):
    """One bit of one number that this torch would draw differently, or that a disk lost."""
    base, x = Net(), torch.randn(3, 24)
    saved, other = (attach(copy.deepcopy(base), "tera", save_network=keep, **TARGETS) for _ in range(2))
    perturb(saved.adapter, 1.0)
    state = {n: t.clone() for n, t in saved.adapter.state_dict().items()}
    other.adapter.load(state)
    assert torch.equal(other(x), saved(x))
    name = "structure.networks.40x24." + ("core" if keep else "checksum")
    assert (name in state) and ("structure.networks.40x24.core" in state) == keep
    changed = state[name].clone()
    if keep:
        changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    else:
        changed += 1
    told = (
        "checksum is not that of its tensors: the file is damaged"
        if keep
        else "network_seed 0 draws another .* save_network=true"
    )
    with pytest.raises(UserError, match=told):
        other.adapter.load({**state, name: changed})


def test_counts():
    """RoBERTa-base, query and value: 768 = 8 8 12, or 24 32, or itself."""
    for order, count in ((6, 24 * 2 * 28), (4, 24 * 2 * 56), (2, 24 * 2 * 768)):
        adapted = attach(copy.deepcopy(roberta_base()), "tera", order=order, target_modules=["query", "value"])
        assert adapted.cost()["adapter_parameters"] == count
    assert 24 * 2 * 28 == 1_344


def test_nonsense():
    for options in (
        {"order": 1}, {"ratio": 0.0}, {"scale": 0.0}, {"d_initial": 0.0}, {"zero": "both"}, {"network_seed": -1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "tera", **options)
