import copy

import pytest
import torch
from support import Net, Regression, attached, loss, perturb, train

from lorafactory import registry

TARGETS = ["fc1", "fc2", "fc3"]
SMALL = {"ratio": 4.0}  # the contract's steps are large as they are


def setting(variant="lora_plus", **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return attached(variant, base, data, target_modules=TARGETS, **options), data


def adamw(lr=1e-3, decay=0.0):
    return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=decay)


def rates(optimizer):
    return {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}


def test_one_step_of_gradient_descent():
    """dA = -lr gA and dB = -ratio lr gB."""
    adapted, data = setting(dynamics={"ratio": 5.0})
    perturb(adapted.adapter, 0.3)
    low = next(low for _, low in adapted.adapter.low_ranks())
    a, b = low.A.detach().clone(), low.B.detach().clone()
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=0.1), 1)
    loss(adapted, data(1)[0]).backward()
    optimizer.step()
    assert torch.allclose(low.A - a, -0.1 * low.A.grad, atol=1e-7)
    assert torch.allclose(low.B - b, -0.5 * low.B.grad, atol=1e-7) and low.B.grad.abs().max() > 1e-3


def test_ratio_one_is_lora_step_by_step():
    plus, data = setting(dynamics={"ratio": 1.0})
    lora, _ = setting("lora")
    perturb(plus.adapter)
    perturb(lora.adapter)
    losses = [train(m, data, m.optimizer(adamw(), 6), steps=6) for m in (plus, lora)]
    assert losses[0] == losses[1]
    assert all(torch.equal(p, q) for p, q in zip(plus.adapter.parameters(), lora.adapter.parameters(), strict=True))


def low_rank_structures():
    return [n for n in registry.names("structure") if "low_rank" in registry.get(n).gives]


@pytest.mark.parametrize("structure", low_rank_structures())
def test_b_is_found_by_its_role(structure):
    """Every trainable stands in exactly one group; the fast ones are the B of the pairs, whatever they are called."""
    base = Net()
    options = {"trained_modules": ["head"], "dynamics": {"ratio": 4.0}}
    adapted = attached(f"{structure}+lora_plus", base, Regression(base), **options)
    optimizer = adapted.optimizer(adamw(1e-3), 1)
    listed = [p for g in optimizer.param_groups for p in g["params"]]
    trained = {p for p in adapted.parameters() if p.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained
    b = {low.B for _, low in adapted.adapter.low_ranks()}
    assert b and {p for p, lr in rates(optimizer).items() if lr == pytest.approx(4e-3)} == b
    assert {lr for p, lr in rates(optimizer).items() if p not in b} == {1e-3}


def test_both_rates_follow_the_scheduler():
    adapted, data = setting(dynamics={"ratio": 8.0})
    optimizer = adapted.optimizer(adamw(1e-3), 4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        of = rates(optimizer)
        for _, low in adapted.adapter.low_ranks():
            assert of[low.A] == pytest.approx(1e-3 * 0.5**step) and of[low.B] == pytest.approx(8e-3 * 0.5**step)
        optimizer.zero_grad()
        loss(adapted, data(1)[0]).backward()
        optimizer.step()
        scheduler.step()


def test_the_decay_of_b_is_coupled_to_its_rate():
    """With a zero gradient only AdamW's decay is left: A shrinks by 1 - lr wd, B by 1 - ratio lr wd."""
    adapted, _ = setting(dynamics={"ratio": 4.0})
    perturb(adapted.adapter, 0.3)
    pairs = [(low, low.A.detach().clone(), low.B.detach().clone()) for _, low in adapted.adapter.low_ranks()]
    optimizer = adapted.optimizer(adamw(0.01, decay=0.5), 1)
    for p in adapted.adapter.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for low, a, b in pairs:
        assert torch.allclose(low.A, a * (1 - 0.01 * 0.5)) and torch.allclose(low.B, b * (1 - 0.04 * 0.5))


def test_parity_with_peft():
    """Five AdamW steps of PEFT's optimiser from the same factors on the same batches."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ours, data = setting(rank=4, dynamics={"ratio": 16.0})
    base = copy.deepcopy(ours).detach()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    layers = {n: theirs.base_model.model.get_submodule(n) for n in TARGETS}
    with torch.no_grad():
        for s, low in ours.adapter.low_ranks():
            layers[s.name].lora_A["default"].weight.copy_(low.A)
            layers[s.name].lora_B["default"].weight.copy_(low.B)
    kind = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
    optimizers = ours.optimizer(adamw(1e-3, 0.1), 5), create_loraplus_optimizer(theirs, **kind)
    for i in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss(model, data(i + 1)[i]).backward()
            optimizer.step()
    for s, low in ours.adapter.low_ranks():
        assert (low.A - layers[s.name].lora_A["default"].weight).abs().max() < 1e-5
        assert (low.B - layers[s.name].lora_B["default"].weight).abs().max() < 1e-5
        assert low.B.abs().max() > 0.05
