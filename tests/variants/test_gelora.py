"""GeLoRA: intrinsic dimensions by TwoNN, and ranks from their growth through each block."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from support import roberta_base
from transformers import BertConfig, BertModel

from lorafactory import Adapted, UserError, attach, probe, registry
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


def cloud(kind, d, n=2000):
    """n points of a d-dimensional sphere or of a Gaussian, which have no edge, turned into 50 dimensions."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d + (kind == "sphere"), generator=g, dtype=torch.float64)
    if kind == "sphere":
        x = x / x.norm(dim=1, keepdim=True)
    q, _ = torch.linalg.qr(torch.randn(50, x.shape[1], generator=g, dtype=torch.float64))
    return x @ q.T


@pytest.mark.parametrize("kind", ["sphere", "gaussian"])
@pytest.mark.parametrize(("dims", "tolerance"), [((2, 3, 5, 8, 10), 0.1), ((15, 20), 0.25)])
def test_two_nn_without_an_edge(kind, dims, tolerance):
    """Within a tenth from 2 to 10, within a quarter to 20, where it is low; by both estimators."""
    for d in dims:
        x = cloud(kind, d)
        assert two_nn(x, "fit") == pytest.approx(d, rel=tolerance), d
        assert two_nn(x, "mle") == pytest.approx(d, rel=tolerance), d
    assert d < 20 or two_nn(x) < d


def test_two_nn_ignores_rotation_shift_scale_and_duplicates():
    x = manifold(3, 500)
    q, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))
    assert two_nn(x @ q * 7 + 3) == pytest.approx(two_nn(x), rel=1e-6)
    assert two_nn(torch.cat([x, x])) == pytest.approx(two_nn(x), rel=1e-9)


@pytest.mark.parametrize("estimator", ["fit", "mle"])
def test_copies_that_differ_in_the_last_digits_are_copies(estimator):
    """As when one text was padded to two lengths: their ratio would be a million."""
    x = manifold(3, 500).float()
    noisy = x[:100] + 1e-6 * torch.randn(100, 50)
    assert two_nn(torch.cat([x, noisy]), estimator) == pytest.approx(two_nn(x, estimator), rel=1e-3)


def test_two_nn_by_hand():
    """Twenty triples at 0, 1, 3, far apart: the neighbours stand at (1, 3), (1, 2) and (2, 3), so mu is 3, 2 and 1.5."""
    x = (torch.arange(20.0)[:, None] * 1000 + torch.tensor([0.0, 1, 3])).reshape(60, 1)
    assert two_nn(x, "mle") == pytest.approx(3 / math.log(9))
    ratios = [math.log(m) for m in (1.5, 2, 3) for _ in range(20)][:54]
    heights = [-math.log(1 - i / 60) for i in range(1, 55)]
    slope = sum(m * h for m, h in zip(ratios, heights, strict=True)) / sum(m * m for m in ratios)
    assert two_nn(x, "fit") == pytest.approx(slope)


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


@pytest.mark.parametrize(("dims", "want"), [([5, 5, 8, 3], [1, 4, 1]), ([2.4, 2.6, 60.0, 60.4], [2, 12, 1])])
def test_ranks_by_hand(dims, want, monkeypatch):
    """max(d' - d, 0) + 1 of rounded dimensions, never more than the layer's own."""
    pairs = [d for i in range(3) for d in dims[i : i + 2]]
    found = iter([*pairs, 1.0, 1.0])
    monkeypatch.setattr("lorafactory.variants.gelora.two_nn", lambda x, estimator: next(found))
    adapted = adapted_to(Blocks())
    assert [ranks(adapted)[f"blocks.{b}.0"] for b in range(3)] == want
    profile = adapted.adapter.parts["budget"].dimensions
    assert torch.allclose(profile[::2].flatten(), torch.tensor([*pairs, 1.0, 1.0]))


def test_no_growth_gives_rank_one():
    assert set(ranks(adapted_to(Blocks())).values()) == {1}


class Keyword(Blocks):
    """Blocks that are called by keyword and lie in a list of lists."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList([self.blocks])
        del self.blocks

    def forward(self, x):
        for b in self.groups[0]:
            x = b(input=x)
        return self.out(x)


def test_blocks_called_by_keyword_in_nested_lists(monkeypatch):
    seen = []
    monkeypatch.setattr("lorafactory.variants.gelora.two_nn", lambda x, estimator: seen.append(x) or 1.0)
    adapted = adapted_to(Keyword())
    assert probe.block(adapted.model, "groups.0.1.0") == "groups.0.1"
    assert probe.block(adapted.model, "out") == "out"
    assert len(seen) == 2 * 4 and all(torch.equal(x, seen[0]) for x in seen[:7]), "identities: the states stay"


def test_a_block_that_is_never_called_is_refused():
    model = Blocks()
    model.idle = nn.Linear(12, 12)
    with pytest.raises(UserError, match="no state reached idle"):
        adapted_to(model)


def test_a_transformers_blocks_have_its_hidden_states(monkeypatch):
    """L + 1 states of L blocks: what output_hidden_states gives, pooled over the real tokens."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config)
    mask = (torch.arange(7) < torch.arange(1, 61)[:, None]).long()
    batch = {"input_ids": torch.randint(0, 30, (60, 7)), "attention_mask": mask}
    with torch.no_grad():
        hidden = copy.deepcopy(model).eval()(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"][..., None]
    pooled = [(h * real).sum(1) / real.sum(1) for h in hidden]
    seen = []
    monkeypatch.setattr("lorafactory.variants.gelora.two_nn", lambda x, estimator: seen.append(x) or 5.0)
    adapted = attach(model, "gelora", rank=4, batches=[batch], loss=lambda m, b: m(**b).last_hidden_state.mean(), seed=0)
    want = [pooled[0], pooled[1], pooled[1], pooled[2]]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(seen, want, strict=False))
    assert len(ranks(adapted)) == 2 * 6 + 1 and len(seen) == 2 * 3, "the pooler is a block of its own"


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


def test_the_profile_and_its_samples_are_told():
    """What leaves a block enters the next: L + 1 dimensions of L blocks."""
    found = adapted_to(blocky())
    dims = found.adapter.parts["budget"].dimensions
    assert torch.equal(dims[0:5:2, 1][:2], dims[2:5:2, 0]), "as two blocks share the state between them"
    assert found.adapter.counters()["samples"] == 400


def test_the_cards_count():
    """DeBERTaV3-base's shapes, q, k, v, o of 12 blocks: rank 1 gives 73,728; one block of rank 4 adds 3 x 4 x 1536."""
    targets = ["query", "key", "value", "attention.output.dense"]
    config = registry.config("gelora", target_modules=targets, trained_modules=[])
    adapted = Adapted(copy.deepcopy(roberta_base()), config)
    for _, low in adapted.adapter.low_ranks():
        low.resize(1)
    assert adapted.num_trainable() == 73_728
    for site, low in adapted.adapter.low_ranks():
        if "layer.3." in site.name:
            low.resize(4)
    assert adapted.num_trainable() == 73_728 + 3 * 4 * 1536


def test_pooling_by_hand():
    x = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert torch.equal(probe._pooled(x, mask, "mean"), torch.stack([x[0, :2].mean(0), x[1, :3].mean(0)]))
    assert torch.equal(probe._pooled(x, mask, "cls"), torch.stack([x[0, 0], x[1, 0]]))
    assert torch.equal(probe._pooled(x, mask, "last_token"), torch.stack([x[0, 1], x[1, 2]]))
    assert torch.equal(probe._pooled(x, mask.flip(1), "cls"), torch.stack([x[0, 2], x[1, 1]]))
    assert torch.equal(probe._pooled(x[:, 0], mask, "mean"), x[:, 0])


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="20 different samples are too few"):
        attach(Blocks(), "gelora", rank=4, batches=[torch.rand(20, 12)], loss=lambda m, b: m(b).sum())
    with pytest.raises(UserError, match="fewer than 50"):
        registry.config("gelora", budget={"samples": 20})
    with pytest.raises(UserError, match="mean, cls, last_token"):
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
