"""SVF: singular values alone, by four papers' formulas, between singular vectors that loading makes sure of."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, linear_sites, loss, perturb, roberta_base, train

from lorafactory import UserError, attach, load
from lorafactory.adapter import singular

TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
MODES = ("scale", "shift", "free", "scale_shift")
CHANGES = {"penalty": ([0.3], {"mode": "scale_shift"}), "mode": (["shift", "free", "scale_shift"], {})}
CHANGES |= {"fraction": ([0.5], {}), "renormalise": ([True], {})}


def built(**options):
    torch.manual_seed(0)
    adapted = attach(Net(), "svf", seed=1, **TARGETS, **options)
    perturb(adapted.adapter, 0.5)
    return adapted


def parts(site, k=None):
    u, s, vt = torch.linalg.svd(site.base.weight.detach().double(), full_matrices=False)
    return u[:, :k], s[:k], vt[:k]


def test_equation_by_hand():
    """W0 = diag(3, 2) on three inputs; z = (2, 0.5) makes it diag(6, 1)."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    adapted = attach(nn.Sequential(module), "svf")
    d = adapted.adapter.deltas["0"]
    assert close(d.S, torch.tensor([3.0, 2.0])) and d.gain.tolist() == [1.0, 1.0]
    with torch.no_grad():
        d.gain.copy_(torch.tensor([2.0, 0.5]))
    want = torch.tensor([[6.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(3)), want.T + module.bias)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_singular_values_are_the_formulas(mode, fraction):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "svf", mode=mode, fraction=fraction, **TARGETS)
    assert torch.equal(adapted(x), base(x)), "the start is the base"
    perturb(adapted.adapter, 0.5)
    for site, d in linear_sites(adapted):
        u, s, vt = parts(site)
        k = max(1, int(fraction * len(s)))
        core = (u.T @ d.weight(site.base).double() @ vt.T).float()
        assert close(core - core.diag().diag(), torch.zeros_like(core)), "between the same vectors"
        assert k == len(s) or close(core.diag()[k:], s[k:].float(), 5)
        top = s[:k].float()
        gain, offset = (getattr(d, n, v) for n, v in (("gain", 1.0), ("offset", 0.0)))
        want = d.values if mode == "free" else (gain * top if mode == "scale" else torch.relu(gain * top + offset))
        assert close(core.diag()[:k], want, 5) and not close(want, top, 100)
        assert sum(p.numel() for p in d.parameters()) == k * (2 if mode == "scale_shift" else 1)


def test_a_singular_value_does_not_go_below_zero():
    adapted = built(mode="shift")
    d, base = adapted.adapter.deltas["fc1"], adapted.adapter.sites[0].base
    with torch.no_grad():
        d.offset.copy_(-d.S - 1)
    assert close(d.weight(base), torch.zeros(40, 24))


def test_renormalised_values_keep_their_sum():
    adapted = built(renormalise=True)
    for _, d in linear_sites(adapted):
        new = (d.S + d.change()).sum()
        assert close(new, d.S.sum()) and not close(d.gain * d.S, d.S + d.change(), 10)
        assert close(d.S + d.change(), d.gain * d.S * d.S.sum() / (d.gain * d.S).sum())


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    """dL/dsigma'_j = u_j^T G v_j, by autograd of the whole weight."""
    adapted = attach(Net().double(), "svf", mode=mode, **TARGETS)
    perturb(adapted.adapter, 0.5)
    x, g = torch.randn(5, 24, dtype=torch.double), torch.randn(5, 40, dtype=torch.double)
    (adapted.model.fc1(x) * g).sum().backward()
    d = adapted.adapter.deltas["fc1"]
    of = ((d.U.T @ (g.T @ x)) * d.Vt).sum(1)
    alive = 1.0 if mode in ("scale", "free") else (d.S + d.change() > 0).double()
    for name, factor in (("gain", d.S), ("offset", 1.0), ("values", 1.0)):
        if name in d._parameters:
            assert close(getattr(d, name).grad, of * alive * factor)


@pytest.mark.parametrize("transposed", [False, True])
def test_training_keeps_the_vectors(transposed):
    torch.manual_seed(0)
    base = Net(transposed)
    adapted = attached("svf", base, Regression(base), **TARGETS)
    data = Regression(base)
    before = [float(loss(adapted, b).detach()) for b in data(4)]
    train(adapted, data, adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=2e-2), 8), steps=8)
    assert sum(float(loss(adapted, b).detach()) for b in data(4)) < sum(before)
    for site, d in linear_sites(adapted):
        u, s, vt = parts(site)
        core = u.T @ d.weight(site.base).double() @ vt.T
        assert (core - core.diag().diag()).abs().max() < 1e-5


def test_penalty_by_hand():
    adapted = built(mode="scale_shift", penalty=0.5)
    want = sum((1 - d.gain).norm() + d.offset.norm() for _, d in linear_sites(adapted))
    assert close(adapted.penalty(), 0.5 * want)
    fresh = attach(Net(), "svf", mode="scale_shift", penalty=0.5, **TARGETS)
    assert float(fresh.penalty()) == 0
    fresh.penalty().backward()
    assert all(p.grad.isfinite().all() for p in fresh.adapter.parameters() if p.grad is not None)
    assert built().penalty() == 0 and not built().adapter.has_penalty


def test_mixtures_of_experts(tmp_path):
    """z = sum_k alpha_k z_k, layer by layer; one hot it is that expert to the bit; of a saved mixture too."""
    x, states, weights = torch.randn(5, 24), [], [0.5, 2.0, -0.25]
    adapted = built()
    outputs = []
    for seed in range(3):
        torch.manual_seed(seed)
        perturb(adapted.adapter, 0.5)
        states.append({n: t.clone() for n, t in adapted.adapter.state_dict().items()})
        outputs.append(adapted(x).detach())
    adapted.adapter.structure.combine(states, weights)
    for key, d in adapted.adapter.deltas.items():
        z = [s[f"deltas.{key}.gain"] for s in states]
        assert torch.equal(d.gain.detach(), 0.5 * z[0] + 2.0 * z[1] - 0.25 * z[2]) and not close(z[0], z[1], 100)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    torch.manual_seed(0)
    assert torch.equal(load(Net(), tmp_path / "a")(x), y)
    for k, output in enumerate(outputs):
        adapted.adapter.structure.combine(states, [float(i == k) for i in range(3)])
        assert torch.equal(adapted(x), output)


def test_what_is_no_mixture(tmp_path):
    adapted = built()
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    other = {**state, "deltas.fc2.mark": state["deltas.fc2.mark"] + 1}
    combine = adapted.adapter.structure.combine
    for states, weights, said in (
        ([state], [0.5, 0.5], "2 weights for 1 adapters: it takes one each"),
        ([], [], "0 weights for 0 adapters"),
        ([{n: 2 * t for n, t in state.items() if "gain" in n} | {n: t for n, t in state.items() if "mark" in n}, other],
         [1.0, 1.0], "deltas.fc2.mark: the base has other singular vectors"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            combine(states, weights)
        assert all(torch.equal(t, state[n]) for n, t in adapted.adapter.state_dict().items()), "as before"
    with pytest.raises(UserError, match=r"also trains deltas.fc1.offset"):
        built(mode="shift").adapter.structure.combine([state], [1.0])
    head = attach(Net(), "svf", target_modules=["fc1"], trained_modules=["head"])
    with pytest.raises(UserError, match=r"also trains trained.head"):
        head.adapter.structure.combine([head.adapter.state_dict()], [1.0])


# the basis: every Singular structure has it


def test_vectors_are_computed_again_to_the_same_bits(tmp_path):
    adapted = built()
    x = torch.randn(5, 24)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    state = adapted.adapter.state_dict()
    assert {n.rpartition(".")[2] for n in state} == {"gain", "mark"}
    torch.manual_seed(0)
    assert torch.equal(load(Net(), tmp_path / "a")(x), y)


def test_other_vectors_are_refused_and_kept_ones_are_used(monkeypatch):
    """B21: as if another library had chosen other signs."""
    adapted, kept = built(), built(save_basis=True)
    x = torch.randn(5, 24)
    states = [{n: t.clone() for n, t in m.adapter.state_dict().items()} for m in (adapted, kept)]
    assert sum(t.numel() for t in states[1].values()) > 20 * sum(t.numel() for t in states[0].values())
    own = singular.svd
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.double))[0]

    def other(w):
        u, s, vt = own(w)
        u[:, :2], vt[:2] = u[:, :2] @ turn, turn.T @ vt[:2]
        return u, s, vt

    monkeypatch.setattr(singular, "svd", other)
    torch.manual_seed(0)
    again = attach(Net(), "svf", **TARGETS)
    with pytest.raises(UserError, match="mark: the base has other singular vectors .*save_basis=true"):
        again.adapter.load(states[0])
    torch.manual_seed(0)
    again = attach(Net(), "svf", save_basis=True, **TARGETS)
    again.adapter.load(states[1])
    assert torch.equal(again(x), kept(x))
    states[1]["deltas.fc1.U"][:, 3] *= -1
    with pytest.raises(UserError, match="deltas.fc1.mark is not that of U and Vt: the file is damaged"):
        again.adapter.load(states[1])


def test_signs_do_not_depend_on_the_library(monkeypatch):
    w = torch.randn(9, 6)
    u, s, vt = singular.svd(w)
    assert close((u * s @ vt).float(), w) and (singular.mark(u, vt)[0] >= 0).all()
    own, sign = torch.linalg.svd, torch.tensor([1, -1, -1, 1, -1, 1], dtype=torch.double)

    def flipped(m, full_matrices):
        a, b, c = own(m, full_matrices=full_matrices)
        return a * sign, b, c * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(singular.svd(w)[0], u) and torch.equal(singular.svd(w)[2], vt)


def test_the_rounding_of_the_vectors_is_float32s():
    """Computed in float64: the update between them is exact to float32."""
    adapted = built()
    for site, d in linear_sites(adapted):
        u, s, vt = parts(site)
        dense = (u * (d.gain.double() - 1) * s) @ vt
        assert (d.weight(site.base) - site.base.weight - dense).abs().max() < 1e-6 * (1 + dense.abs().max())


def test_counts():
    """RoBERTa-base, query and value: 768 a matrix."""
    roberta = copy.deepcopy(roberta_base())
    assert attach(roberta, "svf", target_modules=["query", "value"]).cost()["adapter_parameters"] == 24 * 768 == 18_432


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": "mul"}, "mode is 'mul'; it takes scale, shift, free, scale_shift"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"renormalise": True, "mode": "shift"}, "renormalise is of no effect on mode=shift"),
        ({"renormalise": True, "fraction": 0.5}, "renormalise is of no effect on mode=scale, fraction=0.5"),
        ({"penalty": 0.1}, "penalty is 0.1, of no effect on mode=scale"),
        ({"penalty": -0.1, "mode": "scale_shift"}, "penalty is -0.1"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "svf", **options)
