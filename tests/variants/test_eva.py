"""EVA: the exact principal directions of the inputs, and ranks where they explain most."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close

from lorafactory import UserError, attach, load, registry
from lorafactory.variants.eva import Moments

SMALL = {"batches": 8, "tau": 1.0}
CHANGES = {"tau": ([0.001], {}), "batches": ([1], {}), "rho": ([1.0], {})}


def test_moments_are_the_covariance_of_all_rows_however_they_come():
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    m = Moments()
    for part in x.split([1, 9, 40]):
        m.add(part)
    assert torch.allclose(m.scatter / 49, torch.cov(x.T))
    values, vectors, total = m.components(3)
    assert torch.allclose(total, torch.cov(x.T).trace() * 49)
    assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-9)


class Two(nn.Module):
    """One layer reads inputs on a line, the other inputs in all directions."""

    def __init__(self):
        super().__init__()
        self.line, self.flat = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.line(x[..., :1] * torch.arange(1.0, 9.0)) + self.flat(x)


def ranks(rho, **options):
    torch.manual_seed(0)
    model = Two()
    batches = [torch.randn(64, 8) for _ in range(3)]
    adapted = attach(
        model, "eva", rank=2, batches=batches, loss=lambda m, b: m(b).square().mean(), init={"rho": rho, **options}
    )
    return adapted, {site.name: low for site, low in adapted.adapter.low_ranks()}


def test_ranks_go_by_pooled_explained_variance():
    """By hand: the line explains 1.0, 0, 0, 0; the flat one about 1/8 each: 1.0, and then three of the flat."""
    _, low = ranks(2.0)
    assert (low["line"].rank, low["flat"].rank) == (1, 3)
    direction = torch.arange(1.0, 9.0) / torch.arange(1.0, 9.0).norm()
    assert close((low["line"].A[0] @ direction).abs(), torch.tensor(1.0), 10)
    _, low = ranks(1.0)
    assert (low["line"].rank, low["flat"].rank) == (2, 2)


def test_directions_are_orthonormal_the_update_zero_and_the_scale_kept():
    base = Net()
    adapted = attached("eva", base, Regression(base))
    for _, low in adapted.adapter.low_ranks():
        assert low.rank == 0 or close(low.A @ low.A.T, torch.eye(low.rank), 10)
        assert not low.product().any() and float(low.scale) == 4.0
    assert sum(low.rank for _, low in adapted.adapter.low_ranks()) == 4 * 4


def test_whitening_divides_by_the_root_of_singular_values():
    _, plain = ranks(1.0, tau=1.0)
    _, white = ranks(1.0, tau=1.0, whiten=True)
    assert close(white["flat"].A / white["flat"].A.norm(dim=1, keepdim=True), plain["flat"].A, 10)
    assert (white["flat"].A.norm(dim=1) < 0.5).all()


def test_it_stops_when_the_directions_settle():
    torch.manual_seed(0)
    model, seen = Two(), []

    def batches(n):
        for _ in range(n):
            seen.append(1)
            yield torch.randn(2000, 8) * torch.arange(8.0, 0, -1)

    attach(model, "eva", rank=2, batches=batches, loss=lambda m, b: m(b).sum(), init={"batches": 50, "rho": 1.0, "tau": 0.9})
    assert len(seen) < 10


def test_a_layer_without_rank_runs_merges_and_reloads(tmp_path):
    torch.manual_seed(0)
    model = Two()
    pristine = copy.deepcopy(model)
    batches = [torch.randn(64, 8) for _ in range(3)]
    adapted = attach(model, "eva", rank=1, batches=batches, loss=lambda m, b: m(b).square().mean())
    low = {site.name: low for site, low in adapted.adapter.low_ranks()}
    assert sorted([low["line"].rank, low["flat"].rank]) in ([0, 2], [1, 1])
    low["flat"].resize(0)
    with torch.no_grad():
        low["line"].B.normal_()
    x = torch.randn(3, 8)
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(pristine, tmp_path)(x), y)
    adapted.merge()
    assert close(adapted(x), y)


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


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"tau": 0.0}, {"batches": 0}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        registry.config("eva", init=options)


def test_a_budget_beside_it_is_refused():
    with pytest.raises(UserError, match="'adalora' and 'eva' both decide the budget"):
        registry.config("adalora+eva")


def test_the_subspace_is_pefts():
    """On data that come in one batch the incremental PCA of PEFT is the exact one."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Net(), torch.randn(400, 24) @ torch.randn(24, 24)
    ours = attach(copy.deepcopy(base), "eva", rank=4, batches=[x], loss=lambda m, b: m(b).sum(), init={"rho": 1.0, "tau": 1.0},
                  target_modules=["fc1"])  # fmt: skip
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.initialize_lora_eva_weights(
        theirs, [x], forward_fn=lambda m, b: m(b), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    (low,) = [low for _, low in ours.adapter.low_ranks()]
    a = theirs.base_model.model.fc1.lora_A["default"].weight
    assert close((low.A * a).sum(1).abs(), torch.ones(4), 50)
