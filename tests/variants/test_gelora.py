"""GeLoRA: intrinsic dimensions by TwoNN, and ranks from their growth through each block."""

import copy

import pytest
import torch
import torch.nn as nn

from lorafactory import UserError, attach, probe, registry
from lorafactory.variants.gelora import two_nn

SMALL = {"samples": 50}
CHANGES = {"samples": ([60], {}), "pooling": (["cls"], {}), "estimator": (["mle"], {})}


def manifold(d, n=2000, seed=0):
    """n points of a d-dimensional cube, embedded linearly in 50 dimensions."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, 50, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["fit", "mle"])
@pytest.mark.parametrize(("d", "tolerance"), [(2, 0.1), (5, 0.1), (10, 0.25)])
def test_two_nn_finds_known_dimensions(d, tolerance, estimator):
    assert two_nn(manifold(d), estimator) == pytest.approx(d, rel=tolerance)


def test_two_nn_ignores_rotation_shift_scale_and_duplicates():
    x = manifold(3, 500)
    q, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))
    assert two_nn(x @ q * 7 + 3) == pytest.approx(two_nn(x), rel=1e-6)
    assert two_nn(torch.cat([x, x])) == pytest.approx(two_nn(x), rel=1e-9)


class Blocks(nn.Module):
    """States of 8, then 3 + 8 and 3 dimensions: the blocks' growth is chosen, not learnt."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(3))
        self.out = nn.Linear(12, 4)
        with torch.no_grad():
            for b in self.blocks:
                for layer in b:
                    layer.weight.copy_(torch.eye(12))
                    layer.bias.zero_()

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.out(x)


def adapted_to(model, **options):
    g = torch.Generator().manual_seed(1)
    batches = [torch.rand(100, 12, generator=g) for _ in range(4)]
    return attach(model, "gelora", rank=4, batches=batches, loss=lambda m, b: m(b).square().mean(), seed=0,
                  budget={"samples": 400, **options})  # fmt: skip


def ranks(adapted):
    return {site.name: low.rank for site, low in adapted.adapter.low_ranks()}


def test_a_blocks_layers_share_the_rank_of_its_growth(monkeypatch):
    """d = [5, 8, 8, 3]: ranks 4, 1, 1, shared by the layers of a block; the layer outside is a block of its own."""
    dims = iter([5.2, 8.4, 8.1, 7.9, 8.0, 3.0, 2.6, 6.4])
    monkeypatch.setattr("lorafactory.variants.gelora.two_nn", lambda x, estimator: next(dims))
    found = ranks(adapted_to(Blocks()))
    assert [found[f"blocks.{b}.{i}"] for b in range(3) for i in range(2)] == [4, 4, 1, 1, 1, 1]
    assert found["out"] == 4  # 6 - 3 + 1


def test_no_growth_gives_rank_one_and_a_projection_too():
    model = Blocks()
    assert set(ranks(adapted_to(model)).values()) == {1}


def test_it_equals_lora_of_those_ranks_and_leaves_everything_else(monkeypatch):
    model = Blocks()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    adapted = adapted_to(model)
    assert torch.equal(torch.get_rng_state(), state), "the training's generator was touched"
    assert all(torch.equal(t, before[n.replace(".base", "")]) for n, t in model.state_dict().items())
    assert not any(low.product().any() for _, low in adapted.adapter.low_ranks())
    assert all(float(low.scale) == 4.0 for _, low in adapted.adapter.low_ranks())
    assert all(float(low.scale) == 32.0 for _, low in adapted_to(Blocks(), scale=32.0).adapter.low_ranks())
    assert ranks(adapted) == ranks(adapted_to(Blocks()))


def test_pooling_by_hand():
    x = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert torch.equal(probe._pooled(x, mask, "mean"), torch.stack([x[0, :2].mean(0), x[1, :3].mean(0)]))
    assert torch.equal(probe._pooled(x, mask, "cls"), torch.stack([x[0, 0], x[1, 0]]))
    assert torch.equal(probe._pooled(x, mask, "last"), torch.stack([x[0, 1], x[1, 2]]))
    assert torch.equal(probe._pooled(x, mask.flip(1), "cls"), torch.stack([x[0, 2], x[1, 1]]))
    assert torch.equal(probe._pooled(x[:, 0], mask, "mean"), x[:, 0])


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="too few"):
        attach(Blocks(), "gelora", rank=4, batches=[torch.rand(20, 12)], loss=lambda m, b: m(b).sum())
    with pytest.raises(UserError, match="fewer than 50"):
        registry.config("gelora", budget={"samples": 20})
    with pytest.raises(UserError, match="mean, cls, last"):
        registry.config("gelora", budget={"pooling": "max"})


def blocky():
    torch.manual_seed(0)
    model = Blocks()
    for b in model.blocks:
        for layer in b:
            layer.reset_parameters()
    return model


@pytest.mark.parametrize("options", [{"estimator": "mle"}, {"samples": 60}])
def test_options_reach_the_estimate(options, monkeypatch):
    seen = []
    monkeypatch.setattr("lorafactory.variants.gelora.two_nn", lambda x, e: seen.append((len(x), e)) or 1.0)
    adapted_to(blocky(), **options)
    assert {(options.get("samples", 400), options.get("estimator", "fit"))} == set(seen)
