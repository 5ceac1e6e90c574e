"""PiSSA: the principal part of W0 in the factors, the rest in the anchor, the function as it was."""

import copy

import pytest
import torch
from support import Net, Regression, attached, close, perturb

from lorafactory import UserError, attach, registry

SMALL: dict = {}


def residual(site, low):
    return (site.base.weight - low.scale * low.B @ low.A).detach()


@pytest.mark.parametrize("niter", [0, 16])
def test_factors_are_the_leading_singular_part(niter):
    base = Net()
    adapted = attached("pissa", base, Regression(base), init={"niter": niter})
    for site, low in adapted.adapter.low_ranks():
        w = site.base.weight
        s = torch.linalg.svdvals(w).detach()
        for gram in (low.B.T @ low.B, low.A @ low.A.T):
            assert close(gram, torch.diag(s[:4] / low.scale), 50), site.name
        assert float(torch.linalg.matrix_norm(residual(site, low), 2)) == pytest.approx(float(s[4]), rel=1e-3)
        assert close(low.product(), torch.zeros_like(w)), "the start changes the function"


def test_full_rank_leaves_no_residual():
    base = torch.nn.Sequential(torch.nn.Linear(6, 9))
    adapted = attach(base, "pissa", rank=6, target_modules=["0"])
    ((site, low),) = adapted.adapter.low_ranks()
    assert close(residual(site, low), torch.zeros(9, 6), 5)


def test_the_seed_settles_the_randomised_svd():
    torch.manual_seed(0)
    base = Net()
    one, same, other = (attach(copy.deepcopy(base), "pissa", rank=2, seed=seed, init={"niter": 1}) for seed in (7, 7, 8))
    for (_, a), (_, b), (_, c) in zip(*(m.adapter.low_ranks() for m in (one, same, other)), strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and not torch.equal(a.A, c.A)


def test_dropout_and_a_negative_alpha_leave_the_function():
    """The anchor sees what A sees; the update's sign goes into B."""
    base = Net()
    x = torch.randn(5, 24)
    assert close(attach(copy.deepcopy(base), "pissa", rank=4, dropout=0.5).train()(x), base(x))
    ((site, low),) = attach(copy.deepcopy(base), "pissa", rank=4, alpha=-8.0, target_modules=["fc1"]).adapter.low_ranks()
    s = torch.linalg.svdvals(site.base.weight.detach())
    assert close(low.A @ low.A.T, torch.diag(s[:4] / 2), 50)
    assert float(torch.linalg.matrix_norm(residual(site, low), 2)) == pytest.approx(float(s[4]), rel=1e-3)


def test_a_negative_niter_is_refused():
    with pytest.raises(UserError, match="niter is -1"):
        registry.config("pissa", init={"niter": -1})


def test_outputs_and_gradients_are_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Net(), torch.randn(7, 24)
    targets = ["fc1", "fc2", "fc3"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = attach(copy.deepcopy(base), "pissa", rank=4, alpha=8.0, target_modules=targets)
    assert close(ours(x), theirs(x), 5)
    perturb(ours.adapter, 0.5)
    with torch.no_grad():
        for site, low in ours.adapter.low_ranks():
            layer = getattr(theirs.base_model.model, site.name)
            # singular vectors are theirs up to a sign a rank, so the same numbers go into both
            sign = torch.sign((low.A0 * layer.lora_A["default"].weight).sum(1))
            layer.lora_A["default"].weight.copy_(low.A * sign[:, None])
            layer.lora_B["default"].weight.copy_(low.B * sign)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert close(ours(x), theirs(x), 5)
    for site, low in ours.adapter.low_ranks():
        layer = getattr(theirs.base_model.model, site.name)
        sign = torch.sign((low.A * layer.lora_A["default"].weight).sum(1))
        assert close(low.A.grad, layer.lora_A["default"].weight.grad * sign[:, None], 50)
        assert close(low.B.grad, layer.lora_B["default"].weight.grad * sign, 50)
