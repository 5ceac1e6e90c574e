"""MAP: one length for the base, one for the update, whatever structure makes the update."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, linear_sites, perturb, trained
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, registry

OVER = ("map", "vera+map", "loha+map", "lotr+map", "miss+map", "map+pissa")
ADDITIVE = [n for n in registry.names("structure") if "additive" in registry.get(n).gives]


def test_equation_by_hand():
    """|W0| = |(3, 4; 0, 0)| = 5 and |B A| = |(0, 0; 3, 4)| = 5: a = 10 and b = -15 give 2 W0 - 3 B A."""
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    adapted = attach(nn.Sequential(module), "map", rank=1, alpha=1.0)
    d = adapted.adapter.deltas["0"]
    assert d.a.tolist() == [5.0] and d.b.tolist() == [0.0]
    with torch.no_grad():
        d.inner.low_rank.A.copy_(torch.tensor([[3.0, 4.0]]))
        d.inner.low_rank.B.copy_(torch.tensor([[0.0], [1.0]]))
        d.a.fill_(10.0)
        d.b.fill_(-15.0)  # alpha / rank is 1
        module.bias.copy_(torch.tensor([7.0, 8.0]))
    want = torch.tensor([[6.0, 8.0], [-9.0, -12.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(2)), want.T + module.bias), "the bias is not scaled"


@pytest.mark.parametrize("structure", [n for n in ADDITIVE if n != "delora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_starts_at_the_base_with_a_direction(structure, transposed):
    torch.manual_seed(0)
    base, x = Net(transposed), torch.randn(9, 24)
    adapted = attached(f"{structure}+map", base, Regression(base), trained_modules=[])
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        b, a = d.inner.factors()
        assert (b @ a).abs().max() > 0 and d.b.grad.any()


@pytest.mark.parametrize("spelling", OVER)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_parts_have_the_lengths_a_and_b(spelling, transposed):
    adapted = trained(spelling, 0.5, transposed=transposed)
    for site, d in linear_sites(adapted):
        b, a = d.inner.factors()
        assert close(d.norm(), (b @ a).norm()[None]), "from Gram matrices"
        of_base, of_update = d.gains()
        assert close((of_base * site.base.weight).norm(), d.a.abs()[0])
        scale = getattr(d.scaled, "scale", 1.0)
        assert close((of_update * (b @ a)).norm(), (scale * d.b).abs()[0])
        w0, update = site.base.weight, d.inner.weight(site.base) - site.base.weight
        assert close(d.weight(site.base), d.a * w0 / w0.norm() + scale * d.b * update / update.norm(), 2)
        assert not close(d.a, w0.norm()[None]) and not close(d.b, torch.zeros(1)), "both train"


def test_length_of_the_update_does_not_matter():
    adapted = trained("map", 0.5)
    for site, d in linear_sites(adapted):
        before = d.weight(site.base).detach()
        with torch.no_grad():
            d.inner.low_rank.A.mul_(3.7)
        assert close(d.weight(site.base), before)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients(detach):
    """Those of the dense formula; |D| differentiated, dL/dD has no part along D."""
    base = Net().double()
    options = {"trained_modules": [], "decomposition": {"detach_norm": detach}}
    adapted = attach(base, "map", rank=3, seed=0, **options)
    perturb(adapted.adapter, 0.5)
    x, g = torch.randn(5, 24, dtype=torch.double), torch.randn(5, 40, dtype=torch.double)
    (adapted.model.fc1(x) * g).sum().backward()
    d, full, w0 = adapted.adapter.deltas["fc1"], g.T @ x, base.fc1.weight
    low = d.inner.low_rank
    update = low.product().detach()
    length = update.norm()
    assert float(low.scale) == 16 / 3
    grad = low.scale * d.b.detach() / length * full
    if not detach:
        grad = grad - update / length * ((update / length) * grad).sum()
    assert close(d.a.grad[0], (full * w0).sum() / w0.norm()) and close(d.b.grad[0], low.scale * (full * update).sum() / length)
    assert close(low.B.grad, low.scale * grad @ low.A.T) and close(low.A.grad, low.scale * low.B.T @ grad)
    assert d.a.grad.shape == d.b.grad.shape == (1,)


def test_a_base_or_an_update_of_zeros_is_finite():
    module = nn.Linear(4, 6)
    nn.init.zeros_(module.weight)
    adapted = attach(nn.Sequential(module), "map", rank=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.inner.low_rank.B.zero_()
        d.b.fill_(2.0)
    adapted(torch.randn(3, 4)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in d.parameters())


def test_alpha_multiplies_b():
    """A direction has no scale of its own to multiply; loading keeps the scale that was saved."""
    one, four = (attach(Net(), "map", rank=2, alpha=2.0 * k, seed=1, trained_modules=[]) for k in (1, 4))
    for (_, d), (_, e) in zip(linear_sites(one), linear_sites(four), strict=True):
        with torch.no_grad():
            d.b.fill_(0.8)
            e.b.fill_(0.2)
        assert close(d.gains()[1] * d.inner.low_rank.product(), e.gains()[1] * e.inner.low_rank.product())


def test_what_only_scales_the_update_is_refused():
    with pytest.raises(UserError, match="'map' does not work with 'delora'"):
        registry.config("delora+map")
    with pytest.raises(UserError, match="'map' needs a structure with additive"):
        registry.config("ia3+map")


def test_lengths_are_not_decayed():
    adapted = attach(Net(), "map", rank=2, trained_modules=[])
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[p] for _, d in linear_sites(adapted) for p in (d.a, d.b)} == {0.0}


def test_counts_on_llama_7b():
    """A LoRA's 56,098,816 and two for each of the 160 layers."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))
    adapted = attach(base, "map", rank=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    assert adapted.num_trainable() == 56_098_816 + 320 == 56_099_136


def test_merge_is_exact_and_kept():
    adapted = trained("map", 0.5).eval()
    x = torch.randn(5, 24)
    y, before = adapted(x).detach(), copy.deepcopy(adapted.model.state_dict())
    adapted.merge()
    assert close(adapted(x), y, 5)
    adapted.unmerge()
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items())
