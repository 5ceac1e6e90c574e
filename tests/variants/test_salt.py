"""SALT: scaled and shifted singular values above, a low-rank matrix below, in the basis of the base."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, roberta_base, train

from lorafactory import UserError, attach, load

TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def built(**options):
    torch.manual_seed(0)
    adapted = attach(Net(), "salt", seed=1, **{"rank": 3, **TARGETS, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def z_of(d, relu="all"):
    """The whole core, as the authors build it."""
    z = d.S.diag()
    z[: d.k1, : d.k1] = (d.gain * d.S[: d.k1] + d.offset).diag()
    z[d.k1 :, d.k1 :] += d.X @ d.Y
    return torch.relu(z) if relu == "all" else z - z.diag().diag() + torch.relu(z.diag()).diag()


def test_equation_by_hand():
    """W0 = diag(4, 2, 1), the first one scaled by 2 and shifted by 1; X Y = [1, -3; 2, -6] makes the block [3, -3; 2, -5]:
    ReLU leaves [3, 0; 2, 0], or of the diagonal alone [3, -3; 2, 0]."""
    for relu, block in (("all", [[3.0, 0.0], [2.0, 0.0]]), ("diagonal", [[3.0, -3.0], [2.0, 0.0]])):
        module = nn.Linear(3, 3)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([4.0, 2.0, 1.0]).diag())
        adapted = attach(nn.Sequential(module), "salt", ratio=0.34, rank=1, relu=relu)
        d = adapted.adapter.deltas["0"]
        sign = d.U.diag()  # u_j = v_j is a unit vector, on one side or the other
        with torch.no_grad():
            d.gain.fill_(2.0)
            d.offset.fill_(1.0)
            d.X.copy_(torch.tensor([[1.0], [2.0]]))
            d.Y.copy_(torch.tensor([[1.0, -3.0]]))
        want = torch.zeros(3, 3)
        want[0, 0], want[1:, 1:] = 9.0, torch.tensor(block) * sign[1:] * sign[1:, None]
        assert close(d.weight(adapted.adapter.sites[0].base), want)
        assert close(adapted(torch.eye(3)), want.T + module.bias)


@pytest.mark.parametrize("relu", ["all", "diagonal"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_fast_path_is_the_dense_formula(ratio, relu):
    base, x = Net(), torch.randn(5, 24)
    assert torch.equal(attach(copy.deepcopy(base), "salt", ratio=ratio, relu=relu, rank=3, **TARGETS)(x), base(x)), "Y = 0"
    for site, d in linear_sites(built(ratio=ratio, relu=relu)):
        k = min(site.d_in, site.d_out)
        assert d.k1 == max(1, int(ratio * k)) and len(d.X) == k - d.k1
        w = d.U @ z_of(d, relu) @ d.Vt
        x = torch.randn(6, site.d_in)
        assert close(d.weight(site.base), w, 5) and not close(w, site.base.weight, 100)
        assert close(d.update(x, site.base, None), x @ (w - site.base.weight).T, 5)
        core = d.U.T @ d.weight(site.base) @ d.Vt.T
        top = core[: d.k1, : d.k1]
        assert close(top, top.diag().diag(), 5)
        assert ratio == 1 or close(core[d.k1 :, : d.k1], torch.zeros(k - d.k1, d.k1), 5)


@pytest.mark.parametrize("relu", ["all", "diagonal"])
def test_gradients(relu):
    """By autograd of the dense formula."""
    adapted = attach(Net().double(), "salt", rank=3, relu=relu, **TARGETS)
    perturb(adapted.adapter, 1.0)
    x, g = torch.randn(5, 24, dtype=torch.double), torch.randn(5, 40, dtype=torch.double)
    (adapted.model.fc1(x) * g).sum().backward()
    d = adapted.adapter.deltas["fc1"]
    mine = [p.grad.clone() for p in d.parameters()]
    d.zero_grad()
    (d.U @ z_of(d, relu) @ d.Vt * (g.T @ x)).sum().backward()
    assert all(close(m, p.grad) and m.any() for m, p in zip(mine, d.parameters(), strict=True))


@pytest.mark.parametrize("relu, alive", [("all", False), ("diagonal", True)])
def test_at_the_start_the_authors_relu_passes_the_diagonal_alone(relu, alive):
    adapted = attach(Net(), "salt", rank=3, relu=relu, seed=0, **TARGETS)
    x, g = torch.randn(5, 24), torch.randn(5, 40)
    (adapted.model.fc1(x) * g).sum().backward()
    d = adapted.adapter.deltas["fc1"]
    full = (d.U.T @ (g.T @ x) @ d.Vt.T)[d.k1 :, d.k1 :]
    want = d.X.T @ (full if alive else full.diag().diag())
    assert close(d.Y.grad, want) and not d.X.grad.any() and d.gain.grad.all() and d.offset.grad.all()


def test_it_is_trained_away_from_there():
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached("salt", base, data, **TARGETS)
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    for _, d in linear_sites(adapted):
        rest = d.rest().detach()
        assert (rest - rest.diag().diag()).any(), "off the diagonal, too"


def test_x_is_drawn_as_the_authors_call_draws_it():
    adapted = attach(Net(), "salt", rank=6, seed=0, **TARGETS)
    theirs = nn.init.kaiming_uniform_(torch.empty(4000, 6), a=20**0.5, mode="fan_in", nonlinearity="relu")
    assert float(theirs.abs().max()) == pytest.approx(1.0, abs=1e-3)  # sqrt(6 / rank)
    for _, d in linear_sites(adapted):
        assert 0.8 < d.X.abs().max() <= 1 and not d.Y.any()


def test_ratio_1_is_the_scale_and_shift_of_singular_values():
    torch.manual_seed(0)
    other = attach(Net(), "svf", mode="scale_shift", **TARGETS)
    adapted = built(ratio=1.0)
    for (site, d), (_, e) in zip(linear_sites(adapted), linear_sites(other), strict=True):
        with torch.no_grad():
            e.gain.copy_(d.gain)
            e.offset.copy_(d.offset)
        assert close(d.weight(site.base), e.weight(site.base)) and not d.X.numel()


def test_penalty_by_hand():
    adapted = built(penalty=0.5)
    want = 0.0
    for _, d in linear_sites(adapted):
        want = want + (d.gain * d.S[: d.k1] + d.offset - d.S[: d.k1]).norm() + (d.X @ d.Y).norm()
    assert close(adapted.penalty(), 0.5 * want)
    fresh = attach(Net(), "salt", penalty=0.5, rank=3, **TARGETS)
    assert float(fresh.penalty().detach()) == 0
    fresh.penalty().backward()
    assert all(p.grad.isfinite().all() for p in fresh.adapter.parameters())
    assert not built().adapter.has_penalty


@pytest.mark.parametrize("save_basis", [False, True])
def test_merged_and_reloaded(save_basis, tmp_path):
    adapted, x = built(save_basis=save_basis).eval(), torch.randn(5, 24)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    torch.manual_seed(0)
    assert torch.equal(load(Net(), tmp_path / "a").eval()(x), y)
    adapted.merge()
    assert close(adapted(x), y, 5)


def test_counts():
    """768 x 768, ratio 0.5, rank 4: 768 + 3,072."""
    options = {"rank": 4, "target_modules": ["query", "value"]}
    adapted = attach(copy.deepcopy(roberta_base()), "salt", **options)
    assert adapted.cost()["adapter_parameters"] == 24 * (768 + 3_072) == 92_160


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"rank": 0}, "rank is 0"),
        ({"relu": "none"}, "relu is 'none'; it takes all, diagonal"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"rank": 13}, r"rank 13 is more than fc1 \[40, 24\] can have: at most 12"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "salt", **TARGETS, **options)
