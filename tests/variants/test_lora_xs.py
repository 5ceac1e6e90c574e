import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import Net, close, linear_sites, perturb
from transformers import RobertaConfig, RobertaModel

from lorafactory import UserError, attach, load
from lorafactory.variants.lora_xs import triplets

SMALL = {"core_std": 1e-3}
CHANGES = {"factors": (["bottom", "random_svd", "random"], {}), "niter": ([1], {}), "save_factors": ([False], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """W0 = diag(4, 3, 1) with the first two rows exchanged: P = (e2, e1), Sigma = (4, 3); R = [[1, 2], [0, -1]], s = 3."""
    module = nn.Linear(3, 3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    adapted = attach(nn.Sequential(module), "lora_xs", rank=2, alpha=6.0)
    d = adapted.adapter.deltas["0"]
    assert close(d.B, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    assert close(d.A, torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    with torch.no_grad():
        d.R.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    update = 3 * torch.tensor([[0.0, -3.0, 0.0], [4.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + update)
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_identity_core_is_the_best_approximation_of_the_weight(transposed):
    adapted = attach(Net(transposed).double(), "lora_xs", rank=5, alpha=5.0, **TARGETS)
    for s, d in linear_sites(adapted):
        with torch.no_grad():
            d.R.copy_(torch.eye(5))
        update = (d.weight(s.base) - s.base.weight).detach()
        u, values, vt = torch.linalg.svd(s.base.weight.detach(), full_matrices=False)
        assert close(update, u[:, :5] * values[:5] @ vt[:5])
        assert float((s.base.weight - update).norm()) == pytest.approx(float(values[5:].norm()))


def test_the_update_stays_in_the_span_of_the_leading_vectors():
    adapted = attach(Net().double(), "lora_xs", rank=4, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        update = (d.weight(s.base) - s.base.weight).detach()
        u, _, vt = torch.linalg.svd(s.base.weight.detach(), full_matrices=False)
        assert close(u[:, :4] @ u[:, :4].T @ update @ vt[:4].T @ vt[:4], update) and update.abs().max() > 1e-3
        assert int(torch.linalg.matrix_rank(update, rtol=1e-9)) == 4


def test_choices_of_factors():
    """In float64: the last triplets, those of a random matrix, and uniform ones; a randomised SVD is near the exact one."""
    made = {f: attach(Net().double(), "lora_xs", rank=4, seed=1, factors=f, **TARGETS) for f in
            ("top", "bottom", "random_svd", "random")}  # fmt: skip
    for f, adapted in made.items():
        for s, d in linear_sites(adapted):
            u, values, vt = torch.linalg.svd(s.base.weight.detach(), full_matrices=False)
            norms = d.A.norm(dim=1)
            if f != "random":
                assert close(d.B.T @ d.B, torch.eye(4).double())
                assert (d.B.gather(0, d.B.abs().argmax(0, keepdim=True)) > 0).all(), "the signs are fixed"
            if f == "bottom":
                assert close(norms, values[-4:]) and close((d.B * (u[:, -4:])).sum(0).abs(), torch.ones(4).double())
            elif f == "random_svd":
                assert not close(norms, values[:4]) and (norms.diff() <= 0).all()
            elif f == "random":
                assert 0.45 < d.A.abs().max() <= 0.5 and d.B.abs().max() <= s.d_out**-0.5
                assert float(d.B.std()) == pytest.approx((3 * s.d_out) ** -0.5, rel=0.25)
    w = torch.randn(30, 20).double() @ torch.diag(0.7 ** torch.arange(20.0)).double()
    for exact, near in zip(triplets(w, 3), triplets(w, 3, niter=20), strict=True):
        assert not torch.equal(exact, near) and close(exact, near, 100)


def test_only_the_core_trains_from_near_zero():
    base, x = Net(), torch.randn(9, 24)
    adapted = attach(copy.deepcopy(base), "lora_xs", rank=4, **TARGETS)
    assert {n.rpartition(".")[2] for n, _ in adapted.adapter.named_parameters()} == {"R"}
    assert 0 < (adapted(x) - base(x)).abs().max() < 1e-2
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert d.R.abs().max() < 1e-4 and d.R.grad.all()
    zero = attach(copy.deepcopy(base), "lora_xs", rank=4, core_std=0.0, **TARGETS)
    assert torch.equal(zero(x), base(x))
    zero(x).square().sum().backward()
    assert all(d.R.grad.all() for _, d in linear_sites(zero))


def test_gradient_of_the_core():
    adapted = attach(nn.Sequential(nn.Linear(5, 7)).double(), "lora_xs", rank=2, alpha=6.0)
    perturb(adapted.adapter, 1.0)
    d, x, y = adapted.adapter.deltas["0"], torch.randn(9, 5).double(), torch.randn(9, 7).double()
    (adapted(x) * y).sum().backward()
    assert close(d.R.grad, 3 * d.B.T @ (y.T @ x) @ d.A.T)


def test_factors_are_saved_or_computed_again_B21(tmp_path):
    """r^2 numbers, a scale and r integers a layer, the same function to the last bit; under another rank's config, too."""
    base, x = Net(), torch.randn(5, 24)
    for keep in (True, False):
        adapted = attach(copy.deepcopy(base), "lora_xs", rank=4, save_factors=keep, rank_pattern={"fc2": 3}, **TARGETS)
        perturb(adapted.adapter, 1.0)
        folder, y = adapted.save(tmp_path / str(keep)), adapted(x)
        held = sum(t.numel() for t in load_file(folder / "adapter.safetensors").values())
        factors = 64 * 4 + 64 * 3 + 48 * 4
        assert held == adapted.num_trainable() + 3 + (factors if keep else 4 + 3 + 4)
        assert torch.equal(load(copy.deepcopy(base), folder)(x), y)
        other = attach(copy.deepcopy(base), "lora_xs", rank=2, alpha=3.0, save_factors=keep, **TARGETS)
        other.adapter.load(adapted.adapter.state_dict())
        assert torch.equal(other(x), y)
    file = folder / "adapter.safetensors"
    state = load_file(file)
    state["deltas.fc2.checksum"][1] += 1
    save_file(state, file)
    with pytest.raises(UserError, match="fc2.checksum: the SVD of the weight is another one .* save_factors=true"):
        load(copy.deepcopy(base), folder)


def test_factors_that_chance_decided_are_drawn_once(tmp_path):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "lora_xs", rank=4, factors="random", seed=1, **TARGETS)
    perturb(adapted.adapter, 1.0)
    adapted.save(tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), adapted(x)) and torch.equal(again.begin()(x), adapted(x))
    adapted.begin(index=1)
    assert torch.equal(again(x), adapted(x))


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "lora_xs", rank=4, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_counts():
    """RoBERTa-large, four modules a layer, rank 25."""
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=100)
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(**sizes))
    targets = ["query", "value", "attention.output.dense", r".*\d\.output\.dense"]
    assert attach(model, "lora_xs", rank=25, target_modules=targets).num_trainable() == 96 * 625 == 60_000


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 25}, r"rank 25 is more than fc1 \[40, 24\] can have: at most 24"),
        ({"factors": "middle"}, "factors is 'middle'"),
        ({"niter": -1}, "niter is -1"),
        ({"niter": 2, "factors": "random"}, "niter is 2 beside factors=random"),
        ({"core_std": -1.0}, "core_std is -1.0"),
        ({"save_factors": False, "niter": 2}, "save_factors is false"),
        ({"save_factors": False, "factors": "random_svd"}, "save_factors is false"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "lora_xs", **options)
