"""PiSSA: the principal part of W0 in the factors, the rest in the anchor, the function as it was."""

import copy

import pytest
import torch
from support import Net, Regression, attached, close, perturb

from lorafactory import UserError, attach, registry

SMALL: dict = {}


def residual(site, low):
    return site.base.weight - low.scale * low.B @ low.A


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


def test_the_randomised_svd_is_the_same_for_the_same_seed():
    made = [attach(copy.deepcopy(Net()), "pissa", rank=2, seed=s, init={"niter": 1}) for s in (0, 0)]
    a, b = ([low.A for _, low in m.adapter.low_ranks()] for m in made)
    torch.manual_seed(0)
    nets = Net()
    a, b = ([low.A for _, low in attach(copy.deepcopy(nets), "pissa", rank=2, seed=7, init={"niter": 1}).adapter.low_ranks()]
            for _ in range(2))  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
