import copy
import math

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, loss, perturb, train

from lorafactory import LowRank, attach, load


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def test_scale_is_alpha_over_root_rank():
    options = {"rank": 4, "alpha": 12.0, "rank_pattern": {"fc2": 9}, "alpha_pattern": {"fc3": 6.0}}
    found = pairs(attach(Net(), "rslora", trained_modules=[], target_modules=["fc1", "fc2", "fc3"], **options))
    scales = {n: float(low.scale) for n, low in found.items()}
    assert scales == pytest.approx({"fc1": 12 / 2, "fc2": 12 / 3, "fc3": 6 / 2})


def test_rank_one_is_lora():
    base = Net()
    data = Regression(base)
    ours, lora = (attached(v, base, data, rank=1) for v in ("rslora", "lora"))
    for adapted in (ours, lora):
        train(adapted, data, adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 4), steps=4)
    x = torch.randn(5, 24)
    assert torch.equal(ours(x), lora(x)) and not torch.equal(ours(x), base(x))


def test_update_neither_vanishes_nor_explodes_with_the_rank():
    """B, A ~ N(0, 1/d): under alpha / sqrt(rank) the update's standard deviation stays, under alpha / rank it falls."""
    d, x, spread = 1024, torch.randn(64, 1024), {}
    for variant in ("rslora", "lora"):
        for rank in (4, 64, 1024):
            layer = nn.Sequential(nn.Linear(d, d, bias=False))
            low = pairs(attach(layer, variant, rank=rank, target_modules=["0"]))["0"]
            with torch.no_grad():
                low.A.normal_(0, d**-0.5)
                low.B.normal_(0, d**-0.5)
            spread[variant, rank] = float(low(x).detach().std())
    stable = [spread["rslora", r] for r in (4, 64, 1024)]
    assert max(stable) / min(stable) < 1.2
    assert spread["lora", 4] / spread["lora", 1024] == pytest.approx(16, rel=0.2)


def test_the_saved_scale_counts(tmp_path):
    base = Net()
    adapted = attached("rslora", base, Regression(base), rank=4)
    perturb(adapted.adapter, 0.3)
    x = torch.randn(5, 24)
    loaded = load(copy.deepcopy(base), adapted.save(tmp_path / "a"))
    assert torch.equal(loaded(x), adapted(x))
    other = attached("rslora", base, Regression(base), rank=7, alpha=1.0)
    other.adapter.load(adapted.adapter.state_dict())
    assert torch.equal(other(x), adapted(x))


def test_a_start_sees_the_scale():
    """s B A of a start that splits W0 is the same part of W0, whatever s is."""
    base = Net().double()
    start = {v: pairs(attached(v, base, Regression(base), rank=4))["fc1"] for v in ("pissa+rslora", "pissa")}
    assert float(start["pissa+rslora"].scale) == pytest.approx(2 * float(start["pissa"].scale))
    products = [low.scale * low.B @ low.A for low in start.values()]
    assert close(*products) and products[0].abs().max() > 0.01


def test_ranks_that_change_later_leave_the_scale():
    base = Net()
    low: LowRank = pairs(attached("rslora", base, Regression(base), rank=4))["fc1"]
    low.resize(9)
    assert float(low.scale) == pytest.approx(16 / 2)


def test_parity_with_peft():
    peft = pytest.importorskip("peft")
    base = Net()
    data = Regression(base)
    ours = attached("rslora", base, data, rank=4, alpha=12.0, target_modules=["fc1", "fc2"])
    names = ["fc1", "fc2"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=names, use_rslora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    perturb(ours.adapter, 0.3)
    layers = {n: theirs.base_model.model.get_submodule(n) for n in names}
    with torch.no_grad():
        for n, low in pairs(ours).items():
            assert layers[n].scaling["default"] == pytest.approx(12 / math.sqrt(4)) == pytest.approx(float(low.scale))
            layers[n].lora_A["default"].weight.copy_(low.A)
            layers[n].lora_B["default"].weight.copy_(low.B)
    batch = data(1)[0]
    for model in (ours, theirs):
        loss(model, batch).backward()
    assert (ours(batch["x"]) - theirs(batch["x"])).abs().max() < 1e-5
    for n, low in pairs(ours).items():
        assert (low.A.grad - layers[n].lora_A["default"].weight.grad).abs().max() < 1e-5
        assert (low.B.grad - layers[n].lora_B["default"].weight.grad).abs().max() < 1e-5
        assert low.A.grad.abs().max() > 1e-4
