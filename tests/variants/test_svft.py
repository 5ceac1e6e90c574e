"""SVFT: a sparse matrix between the singular vectors of the base."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, close, linear_sites, perturb, roberta_base
from transformers import GemmaConfig, GemmaForCausalLM

from lorafactory import UserError, attach, load
from lorafactory.variants.svft import count

TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
SQUARE = {"target_modules": ["fc3"], "trained_modules": []}
CHANGES = {"pattern": (["banded", "random"], {}), "band": ([4], {"pattern": "banded"}), "triplets": ([5], {})}
CHANGES |= {"fill": (["orthonormal"], {"triplets": 5, "save_basis": True})}


def built(pattern="plain", **options):
    torch.manual_seed(0)
    targets = SQUARE if pattern == "top_k" else TARGETS
    adapted = attach(Net(), "svft", pattern=pattern, seed=1, **targets, **options)
    perturb(adapted.adapter, 0.5)
    return adapted


def matrix(d):
    return d.entries().diag() if d.plain else d.matrix()


def test_equation_by_hand():
    """W0 = diag(3, 2): its vectors are the unit ones, up to a sign that u and v share, so M is added to it, up to signs."""
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    adapted = attach(nn.Sequential(module), "svft", pattern="banded", band=1)
    d = adapted.adapter.deltas["0"]
    assert d.index.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    with torch.no_grad():
        d.values.copy_(torch.tensor([1.0, 4.0, -5.0, 7.0]))
    s = float(d.U[0, 0] * d.U[1, 1])
    want = torch.tensor([[4.0, 4 * s], [-5 * s, 9.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(2)), want.T + module.bias)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
@pytest.mark.parametrize("gate", [False, True])
def test_sparse_path_is_the_dense_formula(pattern, gate):
    base = Net()
    x = torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "svft", pattern=pattern, gate=gate, **(SQUARE if pattern == "top_k" else TARGETS))
    assert torch.equal(adapted(x), base(x)), "M = 0"
    adapted = built(pattern, gate=gate)
    for site, d in linear_sites(adapted):
        u, s, vt = torch.linalg.svd(site.base.weight.detach().double(), full_matrices=False)
        update = d.weight(site.base) - site.base.weight
        core = (d.U.T @ update @ d.Vt.T).detach()
        m = matrix(d)
        assert close(core, m, 3) and close(update, d.U @ m @ d.Vt, 3)
        assert close((d.U.double() * s @ d.Vt.double()).float(), site.base.weight, 3)
        x = torch.randn(6, site.d_in)
        assert close(d.update(x, site.base, None), x @ update.T, 3)
        if gate:
            assert close(m[m != 0].sum(), (torch.sigmoid(d.gate) * d.values).sum(), 3)


@pytest.mark.parametrize("pattern", ["banded", "random", "top_k"])
def test_gradients(pattern):
    """dL/dM = U^T G V at the pattern."""
    targets = SQUARE if pattern == "top_k" else TARGETS
    adapted = attach(Net().double(), "svft", pattern=pattern, **targets)
    perturb(adapted.adapter, 0.5)
    (site, d), *_ = linear_sites(adapted)
    x, g = torch.randn(5, site.d_in, dtype=torch.double), torch.randn(5, site.d_out, dtype=torch.double)
    (site.base.module(x) * g).sum().backward()
    assert close(d.values.grad, (d.U.T @ (g.T @ x) @ d.Vt.T)[d.index[0], d.index[1]])


def test_patterns():
    for pattern in ("banded", "random", "top_k"):
        for site, d in linear_sites(built(pattern, band=3)):
            k = min(site.d_in, site.d_out)
            assert len(d.values) == count(k, 3) == k * 7 - 12
            flat = d.index[0].long() * k + d.index[1]
            assert len(flat.unique()) == len(flat), "drawn without replacement"
            if pattern == "banded":
                assert (d.index[0] - d.index[1]).abs().max() == 3
            if pattern == "top_k":
                scores = d.U.T @ d.Vt.T
                outside = torch.ones_like(scores).index_put_((d.index[0], d.index[1]), torch.zeros(len(d.values))).bool()
                assert scores[~outside].min() >= scores[outside].max()
    assert count(5, 100) == 25 and count(5, 0) == 5


def test_plain_keeps_the_singular_vectors_and_a_full_pattern_reaches_every_matrix():
    for site, d in linear_sites(built()):
        core = d.U.T @ d.weight(site.base) @ d.Vt.T
        assert close(core, core.diag().diag(), 3) and int(torch.linalg.matrix_rank(d.left())) == len(d.S)
    adapted = built("banded", band=23)
    d, site = adapted.adapter.deltas["fc3"], adapted.adapter.sites[2]
    target = torch.randn(24, 24)
    with torch.no_grad():
        d.values.copy_((d.U.T @ (target - site.base.weight) @ d.Vt.T)[d.index[0], d.index[1]])
    assert close(d.weight(site.base), target, 5)


def test_plain_is_svf_with_the_change_of_its_values():
    torch.manual_seed(0)
    other = attach(Net(), "svf", mode="free", **TARGETS)
    perturb(other.adapter, 0.5)
    for (site, d), (_, e) in zip(linear_sites(built()), linear_sites(other), strict=True):
        with torch.no_grad():
            d.values.copy_(e.change())
        assert close(d.weight(site.base), e.weight(site.base))


def test_triplets_are_the_largest():
    for site, d in linear_sites(built(triplets=5)):
        assert d.U.shape == (site.d_out, 5) and len(d.values) == 5
        assert close(d.S, torch.linalg.svdvals(site.base.weight.detach())[:5])
        assert int(torch.linalg.matrix_rank(d.weight(site.base) - site.base.weight, atol=1e-5)) == 5


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_vectors_drawn_in_place_of_triplets(pattern, tmp_path):
    """M [k, k] between the first 5 singular vectors and drawn ones, orthonormal among themselves; W0 stays whole."""
    base, x = Net(), torch.randn(5, 24)
    options = {"triplets": 5, "fill": "orthonormal", "save_basis": True}
    targets = SQUARE if pattern == "top_k" else TARGETS
    fresh = attach(copy.deepcopy(base), "svft", pattern=pattern, **options, **targets)
    assert torch.equal(fresh(x), base(x))
    adapted = built(pattern, **options)
    for site, d in linear_sites(adapted):
        k = min(site.d_out, site.d_in)
        u, s, vt = torch.linalg.svd(site.base.weight.detach().double(), full_matrices=False)
        assert d.U.shape == (site.d_out, k) and d.Vt.shape == (k, site.d_in) and matrix(d).shape == (k, k)
        assert close((d.U[:, :5] * d.S[:5] @ d.Vt[:5]).double(), (u[:, :5] * s[:5] @ vt[:5]), 1e4) and not d.S[5:].any()
        for drawn, own in ((d.U[:, 5:].T, u[:, 5:].T), (d.Vt[5:], vt[5:])):
            assert close(drawn @ drawn.T, torch.eye(k - 5), 3)
            assert not close(drawn.abs().double(), own.abs(), 1e4)
        update = d.weight(site.base) - site.base.weight
        assert close(update, d.U @ matrix(d) @ d.Vt, 3)
        z = torch.randn(6, site.d_in)
        assert close(d.update(z, site.base, None), z @ update.T, 3)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    torch.manual_seed(0)
    assert torch.equal(load(Net(), tmp_path / "a")(x), y), "the drawn vectors are saved"
    again = built(pattern, **options)
    assert torch.equal(again(x), y), "the seed draws them"


def test_the_authors_start():
    adapted = attach(Net(), "svft", pattern="banded", band=4, start="normal", gate=True, seed=0, **TARGETS)
    for _, d in linear_sites(adapted):
        assert abs(float(d.values.std()) / (2 / len(d.values)) ** 0.5 - 1) < 0.3
        assert float(torch.sigmoid(d.gate)) == 0.5
    x = torch.randn(5, 24)
    with adapted.disabled() as base:
        y = base(x)
    assert not close(adapted(x), y, 100), "not the base"


@pytest.mark.parametrize("pattern", ["plain", "random", "top_k"])
@pytest.mark.parametrize("save_basis", [False, True])
def test_reloaded(pattern, save_basis, tmp_path):
    adapted = built(pattern, save_basis=save_basis)
    x = torch.randn(5, 24)
    y = adapted(x).detach()
    adapted.save(tmp_path / "a")
    torch.manual_seed(0)
    assert torch.equal(load(Net(), tmp_path / "a")(x), y), "a drawn pattern is saved, too"


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"pattern top_k compares U with V: fc1 \[40, 24\] is not square"):
        attach(Net(), "svft", pattern="top_k", **TARGETS)
    with pytest.raises(UserError, match=r"triplets is 25, and fc1 \[40, 24\] has 24"):
        attach(Net(), "svft", triplets=25, **TARGETS)
    adapted = built("random")
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    state["deltas.fc2.index"][1, 4] = 24
    with pytest.raises(UserError, match=r"deltas.fc2.index points outside \[24, 24\]"):
        adapted.adapter.load(state)


def test_counts():
    """RoBERTa-base, query and value, plain: 768 a matrix. Gemma-2B, all seven, plain: 10,752 a block."""
    roberta = copy.deepcopy(roberta_base())
    assert attach(roberta, "svft", target_modules=["query", "value"]).cost()["adapter_parameters"] == 18_432
    sizes = dict(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    with torch.device("meta"):
        gemma = GemmaForCausalLM(GemmaConfig(num_hidden_layers=18, vocab_size=1000, **sizes))
    assert attach(gemma, "svft").cost()["adapter_parameters"] == 18 * 10_752 == 193_536


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pattern": "dense"}, "pattern is 'dense'; it takes plain, banded, random, top_k"),
        ({"start": "kaiming"}, "start is 'kaiming'"),
        ({"band": 2}, "band is 2, of no effect on pattern=plain"),
        ({"band": 0, "pattern": "random"}, "band is 0"),
        ({"triplets": 0}, "triplets is 0"),
        ({"fill": "zero", "triplets": 5}, "fill is 'zero'; it takes orthonormal"),
        ({"fill": "orthonormal", "save_basis": True}, "fill is orthonormal, of no effect without triplets"),
        ({"fill": "orthonormal", "triplets": 5}, "of vectors that no base gives back: it needs save_basis=true"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "svft", **options)
