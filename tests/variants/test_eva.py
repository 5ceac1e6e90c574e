"""EVA: principal directions of the inputs, and ranks where they explain most."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close

from lorafactory import UserError, attach, load, registry
from lorafactory.variants.eva import EVA, Components

SMALL = {"batches": 8, "tau": 1.0}
CHANGES = {"tau": ([0.001], {}), "batches": ([1], {}), "rho": ([1.0], {}), "niter": ([0], {})}


def decaying(n, d, rate, **kind):
    """n rows whose directions have standard deviations 1, rate, rate^2 ..., rotated and shifted."""
    q, _ = torch.linalg.qr(torch.randn(d, d, **kind))
    return torch.randn(n, d, **kind) * rate ** torch.arange(float(d), **kind) @ q + 3


def fitted(parts, k, niter=0):
    pca = Components(k, niter)
    for part in parts:
        pca.add(part)
    return pca


def test_nothing_cut_off_it_is_the_covariance_of_all_rows_however_they_come():
    x = decaying(50, 6, 0.8, dtype=torch.float64)
    pca = fitted(x.split([1, 9, 40]), 6)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    assert close(pca.s.square() / 49, values.flip(0))
    assert close((pca.v * vectors.T.flip(0)).sum(1).abs(), torch.ones(6, dtype=torch.float64))
    assert close(pca.explained(), values.flip(0) / values.sum())
    assert close(pca.mean, x.mean(0))


def test_the_incremental_pca_is_pefts():
    """Cut off at 5 of 24 directions after each of several batches."""
    peft = pytest.importorskip("peft.utils.incremental_pca")
    theirs, parts = peft.IncrementalPCA(n_components=5), decaying(300, 24, 0.7).split([40, 100, 60, 100])
    for i in range(len(parts)):
        theirs.partial_fit(parts[i])
        ours = fitted(parts[: i + 1], 5)
        assert close(ours.s, theirs.singular_values_)
        assert close(ours.explained().float(), theirs.explained_variance_ratio_)
        assert close((ours.v * theirs.components_).sum(1).abs(), torch.ones(5))


def test_the_randomised_svd_finds_the_same_and_the_seed_settles_it():
    parts = decaying(300, 24, 0.7).split(100)
    torch.manual_seed(1)
    one = fitted(parts, 5, 4)
    torch.manual_seed(1)
    assert torch.equal(one.v, fitted(parts, 5, 4).v)
    exact = fitted(parts, 5)
    assert close(one.s, exact.s, 20) and close((one.v * exact.v).sum(1).abs(), torch.ones(5), 20)


def test_the_factor_holds_the_space_that_the_inputs_lie_in():
    span = torch.linalg.qr(torch.randn(24, 3))[0].T
    adapted = attach(nn.Sequential(nn.Linear(24, 30)), "eva", rank=4, init=dict(rho=1.0), loss=lambda m, b: m(b).sum(),
                     batches=[torch.randn(9, 3) @ span + 1 for _ in range(4)])  # fmt: skip
    ((_, low),) = adapted.adapter.low_ranks()
    assert close(span @ low.A.T @ low.A, span, 10)


class Two(nn.Module):
    """One layer reads inputs on a line, the other inputs in all directions."""

    def __init__(self):
        super().__init__()
        self.line, self.flat = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.line(x[..., :1] * torch.arange(1.0, 9.0)) + self.flat(x)


def two(rank=2, model=None, batches=None, **options):
    torch.manual_seed(0)
    batches = batches or [torch.randn(64, 8) for _ in range(3)]
    model, task = model or Two(), lambda m, b: m(b).square().mean()
    adapted = attach(model, "eva", rank=rank, batches=batches, loss=task, init=options)
    return adapted, {site.name: low for site, low in adapted.adapter.low_ranks()}


def test_ranks_go_by_pooled_explained_variance():
    """By hand: the line explains 1.0, 0, 0, 0; the flat one about 1/8 each: 1.0, and then three of the flat."""
    _, low = two(rho=2.0)
    assert (low["line"].rank, low["flat"].rank) == (1, 3)
    direction = torch.arange(1.0, 9.0) / torch.arange(1.0, 9.0).norm()
    assert close((low["line"].A[0] @ direction).abs(), torch.tensor(1.0), 10)
    _, low = two(rho=1.0)
    assert (low["line"].rank, low["flat"].rank) == (2, 2)


def test_directions_are_orthonormal_the_update_zero_and_the_scale_kept():
    base = Net()
    adapted = attached("eva", base, Regression(base))
    for _, low in adapted.adapter.low_ranks():
        assert low.rank == 0 or close(low.A @ low.A.T, torch.eye(low.rank), 10)
        assert not low.product().any() and float(low.scale) == 4.0
    assert sum(low.rank for _, low in adapted.adapter.low_ranks()) == 4 * 4


def test_whitening_divides_by_the_root_of_singular_values():
    x = decaying(64, 8, 0.9)
    _, plain = two(batches=[x], rho=1.0, niter=0)
    _, white = two(batches=[x], rho=1.0, niter=0, whiten=True)
    norms = white["flat"].A.norm(dim=1)
    assert close(norms, torch.linalg.svdvals(x - x.mean(0))[:2].rsqrt())
    assert close(white["flat"].A, plain["flat"].A * norms[:, None], 10)


def test_it_stops_when_the_directions_settle():
    torch.manual_seed(0)
    model, seen = Two(), []

    def batches(n):
        for _ in range(n):
            seen.append(1)
            yield torch.randn(2000, 8) * torch.arange(8.0, 0, -1)

    attach(model, "eva", rank=2, batches=batches, loss=lambda m, b: m(b).sum(), init=dict(batches=50, rho=1.0, tau=0.9))
    assert 2 <= len(seen) < 10


def patched(monkeypatch, shares):
    """The surveys of a start in which each layer is to get these ranks."""
    kept = []
    monkeypatch.setattr(EVA, "shares", lambda self, found: kept.append(found) or {n: shares.get(n, 1) for n in found})
    return kept


def test_a_settled_layer_is_done_while_others_go_on(monkeypatch):
    """The line is clear after two batches, though what else it might get is noise; the flat one turns on and on."""
    kept = patched(monkeypatch, {})
    two(rank=1, batches=[torch.randn(9, 8) for _ in range(6)], rho=4.0, tau=0.999)
    assert (kept[-1]["line"].n, kept[-1]["flat"].n) == (2 * 9, 6 * 9)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.out(self.query(x) + self.key(x) * self.value(x))


def test_layers_that_read_one_tensor_share_a_pca(monkeypatch):
    added, add = [], Components.add
    monkeypatch.setattr(Components, "add", lambda self, x: added.append(x) or add(self, x))
    _, low = two(model=Attention(), batches=[torch.randn(16, 4, 8) for _ in range(3)], rho=1.0, tau=1.0)
    assert len(added) == 3 * 2, "three batches, once for query, key and value and once for out"
    assert torch.equal(low["query"].A, low["value"].A) and not torch.equal(low["query"].A, low["out"].A)


def test_a_shared_pca_is_done_when_the_last_that_reads_it_is(monkeypatch):
    """One direction is clear at once; the three that key is to get are alike beyond it."""
    scales = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    batches = [torch.randn(9, 8) * scales for _ in range(6)]
    for shares, seen in (({}, 2), ({"key": 3}, 6)):
        kept = patched(monkeypatch, shares)
        two(rank=1, model=Attention(), batches=batches, rho=4.0, tau=0.999)
        assert kept[-1]["query"].n == seen * 9


class Three(Two):
    """A third layer reads inputs in a plane."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) + self.plane(x * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]))


def test_a_layer_left_without_rank_trains_beside_the_others_merges_and_reloads(tmp_path):
    """By hand: the line explains 1.0, the plane about .5 twice, the flat one 1/8 eight times: three ranks are taken."""
    model = Three()
    pristine = copy.deepcopy(model)
    adapted, low = two(1, model)
    assert {n: pair.rank for n, pair in low.items()} == {"line": 1, "plane": 2, "flat": 0}
    assert adapted.adapter.counters() == {"layers_without_rank": 1, "rank_total": 3}
    optimizer = adapted.optimizer(adamw, 2)
    for _ in range(2):
        adapted(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    x = torch.randn(3, 8)
    y = adapted(x).detach()
    assert low["plane"].B.any() and not close(y, pristine(x))
    adapted.save(tmp_path)
    loaded = load(copy.deepcopy(pristine), tmp_path)
    assert torch.equal(loaded(x), y)
    assert {site.name: pair.rank for site, pair in loaded.adapter.low_ranks()} == {"line": 1, "flat": 0, "plane": 2}
    adapted.merge()
    assert close(adapted(x), y)
    adapted.unmerge()
    assert torch.equal(adapted(x), y)
    assert torch.equal(adapted.detach()(x), pristine(x))


def test_padding_is_left_out():
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    x = torch.randn(5, 3, 4)
    mask = torch.tensor([[1, 1, 0]] * 5)
    x[:, 2] = 1000.0
    adapted = attach(
        model, "eva", rank=1, batches=[x] * 2, loss=lambda m, b: m(b).sum(), mask=lambda b: seen.append(1) or mask
    )
    (low,) = [low for _, low in adapted.adapter.low_ranks()]
    values, vectors = torch.linalg.eigh(torch.cov(x[:, :2].reshape(-1, 4).T))
    assert seen and close((low.A[0] @ vectors[:, -1]).abs(), torch.tensor(1.0), 10)


class Routed(Two):
    """Its second layer gets no row of a batch of negative numbers."""

    def forward(self, x):
        return self.line(x).mean() + self.flat(x[x[:, 0] > 0]).sum()


def test_a_layer_without_rows_in_a_batch_waits_for_the_next():
    x = decaying(64, 8, 0.9)
    _, low = two(model=Routed(), batches=[-x.abs(), x], tau=0.5)
    assert sum(pair.rank for pair in low.values()) == 4 and all(pair.A.isfinite().all() for pair in low.values())
    with pytest.raises(UserError, match="no input reached flat"):
        two(model=Routed(), batches=[-x.abs()])


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"tau": 0.0}, {"batches": 0}, {"niter": -1}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        registry.config("eva", init=options)


def test_a_budget_beside_it_is_refused():
    with pytest.raises(UserError, match="'adalora' and 'eva' both decide the budget"):
        registry.config("adalora+eva")


def test_too_little_data_is_refused():
    with pytest.raises(UserError, match="the batches hold 6 directions for 8 ranks"):
        two(rank=4, batches=[torch.randn(3, 8)])


def test_a_layer_that_is_never_called_is_refused():
    model = Two()
    model.idle = nn.Linear(8, 8)
    with pytest.raises(UserError, match="no input reached idle"):
        two(model=model)


def peft_eva(base, batches, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2", "fc3"], init_lora_weights="eva",
                             eva_config=peft.EvaConfig(tau=0.0, **options))  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(model, batches, forward_fn=lambda m, b: m(b), **plain)
    return model


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_directions_outputs_and_gradients_are_pefts(rho, whiten):
    """With tau 0 PEFT sees two batches. Its alpha follows the rank, which is our constant scale."""
    torch.manual_seed(0)
    base, batches = Net(), decaying(160, 24, 0.75).split(80)
    theirs = peft_eva(base, batches, rho=rho, whiten=whiten)
    ours = attach(copy.deepcopy(base), "eva", rank=4, alpha=8.0, target_modules=["fc1", "fc2", "fc3"], trained_modules=[],
                  batches=batches, loss=lambda m, b: m(b).sum(),
                  init={"rho": rho, "tau": 1.0, "batches": 2, "niter": 0, "whiten": whiten})  # fmt: skip
    pairs = {s.name: (low, getattr(theirs.base_model.model, s.name)) for s, low in ours.adapter.low_ranks()}
    for name, (low, layer) in pairs.items():
        a = layer.lora_A["default"].weight.data
        assert a.shape == low.A.shape, name
        sign = torch.sign((low.A * a).sum(1, keepdim=True)).detach()
        assert close(low.A * sign, a, 10), name  # theirs is a randomised SVD
        with torch.no_grad():
            low.A.copy_(a)
            low.B.normal_(0, 0.1)
            layer.lora_B["default"].weight.copy_(low.B)
    x = torch.randn(5, 24)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert close(ours(x), theirs(x))
    for low, layer in pairs.values():
        assert close(low.A.grad, layer.lora_A["default"].weight.grad)
        assert close(low.B.grad, layer.lora_B["default"].weight.grad)
