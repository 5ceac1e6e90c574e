import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, train
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafactory import attach
from lorafactory.errors import UserError

CHANGES = {"drop_base": ([True], {"dropout": 0.5})}
OVER = ("dora", "dora+pissa", "vera+dora", "loha+dora", "lotr+dora", "shira+dora", "full+dora")


def trained(spelling, **options):
    torch.manual_seed(0)
    base = Net(transposed=options.pop("transposed", False))
    data = Regression(base)
    adapted = attached(spelling, base, data, **options)
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    perturb(adapted.adapter, 0.1)
    return adapted


def one(weight, variant="dora", **options):
    module = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    adapted = attach(nn.Sequential(module), variant, **options)
    return adapted, adapted.adapter.deltas["0"], adapted.model[0]


def test_equation_by_hand():
    """V = [3, 4] + [0, 0] and [0, 1] + [3, 3]: norms 5 and 5; magnitudes 10 and 2."""
    adapted, d, module = one(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), rank=1, alpha=1.0)
    assert d.magnitude.tolist() == [5.0, 1.0]
    with torch.no_grad():
        module.bias.copy_(torch.tensor([7.0, 8.0]))
        d.inner.low_rank.A.fill_(1.0)
        d.inner.low_rank.B.copy_(torch.tensor([[0.0], [3.0]]))
        d.magnitude.copy_(torch.tensor([10.0, 2.0]))
    # the bias is not scaled: 2 * 3 + 7 and 0.4 * 3 + 8 for the first unit vector
    assert close(adapted(torch.eye(2)), torch.tensor([[13.0, 9.2], [15.0, 9.6]]))


@pytest.mark.parametrize("spelling", ["dora", "vera+dora", "loha+dora", "lotr+dora", "shira+dora", "full+dora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_starts_at_the_base(spelling, transposed):
    torch.manual_seed(0)
    base, x = Net(transposed), torch.randn(9, 24)
    adapted = attached(spelling, base, Regression(base), trained_modules=[])
    for site, d in linear_sites(adapted):
        assert close(d.weight(site.base), site.base.weight) and close(d.magnitude, site.base.weight.norm(dim=1))
    assert "full" in spelling or torch.equal(adapted(x), base(x)), "with m = |V| nothing is added, to the last bit"


@pytest.mark.parametrize("spelling", OVER)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_have_length_m_and_the_factored_norm_is_the_dense_one(spelling, transposed):
    adapted = trained(spelling, transposed=transposed)
    for site, d in linear_sites(adapted):
        v = d.inner.weight(site.base)
        assert close(d.norm(site.base), v.norm(dim=1), 0.5)
        assert close(d.weight(site.base), d.magnitude[:, None] * v / v.norm(dim=1, keepdim=True))
        assert close(d.weight(site.base).norm(dim=1), d.magnitude.abs())
        assert not close(d.magnitude, site.base.weight.norm(dim=1)), "the magnitude trains"


def test_length_of_a_row_of_V_does_not_matter():
    adapted = trained("full+dora")
    for site, d in linear_sites(adapted):
        before = d.weight(site.base).detach()
        with torch.no_grad():
            d.inner.dense.mul_(torch.rand(site.d_out, 1) + 0.5)
        assert close(d.weight(site.base), before)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients(detach):
    """c constant: dL/dV = diag(m / c) G, dL/dm_i = <G_i, V_i> / c_i; differentiated: dL/dV loses its part along V."""
    base = Net().double()
    adapted = attach(base, "dora", rank=3, alpha=6.0, seed=0, trained_modules=[], decomposition={"detach_norm": detach})
    perturb(adapted.adapter, 0.3)
    x, g = torch.randn(5, 24, dtype=torch.double), torch.randn(5, 40, dtype=torch.double)
    (adapted.model.fc1(x) * g).sum().backward()
    d, full = adapted.adapter.deltas["fc1"], g.T @ x
    low, v = d.inner.low_rank, d.inner.weight(adapted.adapter.sites[0].base).detach()
    c = v.norm(dim=1, keepdim=True)
    dv = d.magnitude.detach()[:, None] / c * full
    if not detach:
        unit = v / c
        dv = dv - unit * (unit * dv).sum(1, keepdim=True)
        assert (dv * v).sum(1).abs().max() < 1e-12
    assert close(d.magnitude.grad, (full * v).sum(1) / c[:, 0])
    assert close(low.B.grad, 2 * dv @ low.A.T) and close(low.A.grad, 2 * low.B.T @ dv)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_zero_row_is_the_inner_deltas_B65(variant, dtype, detach):
    """One row of zeros and one so small that its square is none: finite, and while m stands, as without DoRA."""
    weight = torch.randn(6, 4)
    weight[1], weight[2] = 0, 1e-30
    options = {"rank": 2} if variant == "lora" else {}
    adapted, d, module = one(weight.to(dtype), f"{variant}+dora", decomposition={"detach_norm": detach}, **options)
    x = torch.randn(7, 4, dtype=dtype)
    for _ in range(3):
        y = adapted(x)
        y.float().square().sum().backward()
        assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in d.parameters())
        site = adapted.adapter.sites[0]
        rows = d.magnitude[1:3, None] * d.inner.weight(site.base)[1:3]
        assert close(y[:, 1:3], x.float() @ rows.T + d.bias(site.base)[1:3]), "these rows are m V"
        with torch.no_grad():
            for p in d.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
                p.grad = None
        assert d.inner.weight(site.base)[1].any(), "and train"
    y = adapted(x)
    adapted.merge(dtype=torch.float32)
    assert torch.isfinite(module.weight).all() and close(adapted(x.float()), y, 2)


def test_a_weight_tied_to_another_is_trained_as_one_and_not_rescaled():
    sizes = dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
    ids = torch.randint(0, 50, (2, 6))
    adapted = attach(copy.deepcopy(base), "full+dora", seed=0)
    perturb(adapted.adapter, 0.1)
    y = adapted(ids).logits.detach()
    assert not close(y, base(ids).logits)
    adapted.merge()
    assert close(adapted(ids).logits, y, 5)


def test_magnitudes_are_not_decayed():
    adapted = attach(Net(), "dora", rank=2, trained_modules=[])
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[d.magnitude] for _, d in linear_sites(adapted)} == {0.0}
    assert {decay[low.A] for _, low in adapted.adapter.low_ranks()} == {0.5}


def test_counts_on_llama_7b():
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    for variant, count in (("lora", 56_098_816), ("dora", 56_975_360)):
        adapted = attach(base, variant, rank=32, alpha=64, target_modules=targets)
        assert adapted.num_trainable() == count
        adapted.detach()


@pytest.mark.parametrize("spelling", ["dora", "vera+dora", "dora+relora"])
def test_drop_base_is_of_the_structures_one_draw(spelling):
    """W = diag(g) W0 with B = 0: y = W0 x + (g - 1) W0 x', the same x' that A reads; nothing in evaluation."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(400, 6)
    adapted = attach(nn.Sequential(layer), spelling, rank=3, dropout=0.5, decomposition={"drop_base": True})
    d, base = adapted.adapter.deltas["0"], layer(x)
    with torch.no_grad():
        d.magnitude.mul_(3)
    torch.manual_seed(1)
    got = adapted.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert close(got, base + 2 * (dropped @ layer.weight.T), 10)
    perturb(adapted.adapter, 0.5)
    torch.manual_seed(1)
    got, g = adapted(x), d.gain(adapted.adapter.sites[0].base)
    dense = d.inner.weight(adapted.adapter.sites[0].base) - layer.weight
    assert close(got, base + (g - 1) * (dropped @ layer.weight.T) + g * (dropped @ dense.T), 10)
    assert torch.equal(adapted.eval()(x), adapted(x))


def test_drop_base_without_dropout_is_refused():
    for spelling in ("dora", "full+dora"):
        with pytest.raises(UserError, match="drop_base is true, of no effect: what is inside has no dropout"):
            attach(nn.Sequential(nn.Linear(16, 9)), spelling, decomposition={"drop_base": True})
