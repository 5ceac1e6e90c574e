import copy

import pytest
import torch
from support import Net, Regression, attached, close, loss, perturb, same

from lorafactory import UserError, attach
from lorafactory.variants.allora import rates

TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="allora", eta=2.0, **options):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    own = {"dynamics": {"eta": eta}} if "allora" in variant else {}
    options = {"alpha": 3.0, **options}  # with rank 3 a scale of 1
    return attached(variant, base, data, target_modules=TARGETS, rank=3, **own, **options), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def one_layer(gate=False):
    """A perturbed pair of ALLoRA's, and a weight G of the loss sum(G * W)."""
    torch.manual_seed(1)
    adapted = attach(torch.nn.Sequential(torch.nn.Linear(5, 7).double()), "allora", rank=2, alpha=2).train()
    low = next(iter(pairs(adapted).values()))
    if gate:
        low.add_gate(1.0)
    perturb(low, 2.0)
    return adapted, low, torch.randn(7, 5, dtype=torch.float64)


def test_rates_by_hand():
    """Rows of B A of length 0, 3 and 4 with eta = 2: 1 / sqrt(0 + 1/4), 1 / sqrt(3 + 1/4), 1 / sqrt(4 + 1/4)."""
    low = one_layer()[1]
    with torch.no_grad():
        low.B.zero_()
        low.A.zero_()
        low.A[0, 1] = low.A[1, 2] = 1.0
        low.B[1, 0], low.B[2, 1] = 3.0, 4.0
    found = rates(low, 2.0)
    assert close(found[:3], torch.tensor([2.0, 3.25**-0.5, 4.25**-0.5], dtype=torch.float64)) and found.shape == (7,)


@pytest.mark.parametrize("gate", [False, True])
def test_rows_of_the_gradient_are_scaled_on_their_way_to_the_factors(gate):
    """g_B = C G A^T and g_A = B^T C G, while the input gets (W0 + B A)^T as ever."""
    adapted, low, g = one_layer(gate)
    gates = torch.ones(2, dtype=torch.float64) if low.gate is None else low.gate.detach()
    a, b = low.A.detach(), low.B.detach()
    c = (((b * gates) @ a).norm(dim=1) + 0.25).rsqrt()[:, None]
    x = torch.eye(5, dtype=torch.float64, requires_grad=True)
    (adapted(x).T * g).sum().backward()
    assert close(low.B.grad, (c * g) @ a.T * gates, 10) and close(low.A.grad, (b * gates).T @ (c * g), 10)
    weight = adapted.model[0].weight + (b * gates) @ a
    assert close(x.grad, (weight.T @ g).T, 10)
    assert c.max() > 1.3 * c.min()


def test_the_first_step():
    """B = 0: g_B is eta times LoRA's under a scale of 1, g_A is zero."""
    adapted, data = setting(eta=3.0)
    lora, _ = setting("lora")
    for m in (adapted, lora):
        loss(m, data(1)[0]).backward()
    for n, low in pairs(adapted).items():
        assert close(low.B.grad, 3.0 * pairs(lora)[n].B.grad, 1e3) and not low.A.grad.any()  # the loss is in float32


def test_a_small_eta_is_a_rate():
    adapted, data = setting(eta=1e-4)
    lora, _ = setting("lora")
    for m in (adapted, lora):
        perturb(m.adapter, 0.3)
        loss(m, data(1)[0]).backward()
    for n, low in pairs(adapted).items():
        for ours, theirs in ((low.A.grad, pairs(lora)[n].A.grad), (low.B.grad, pairs(lora)[n].B.grad)):
            assert (ours / 1e-4 - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("over", ["", "hydra_lora+", "hydra+", "melora+", "pissa+", "dora+", "molora+"])
def test_the_function_is_the_plain_one(over):
    """In training, up to rounding, and bit for bit in evaluation; what is not a pair's has its plain gradient at first."""
    adapted, data = setting(f"{over}allora")
    perturb(adapted.adapter, 0.3)
    plain = copy.deepcopy(adapted)
    for low in pairs(plain).values():
        low.row_rates = None
    for _, low in plain.adapter.low_ranks():
        low.row_rates = None
    x = torch.randn(5, 24, dtype=torch.float64)
    assert close(adapted.train()(x), plain.train()(x)) and torch.equal(adapted.eval()(x), plain.eval()(x))
    for m in (adapted.train(), plain.train()):
        loss(m, data(1)[0]).backward()
    for (_, ours), (_, theirs) in zip(adapted.adapter.low_ranks(), plain.adapter.low_ranks(), strict=True):
        assert ours.B.grad.any() and not close(ours.B.grad, theirs.B.grad, 1e3)
        assert ours.A.grad.any() and not close(ours.A.grad, theirs.A.grad, 1e3)


def test_norms_are_those_of_the_scaled_update():
    low = one_layer()[1]
    before = rates(low, 2.0)
    low.scale.fill_(3.0)
    assert close(rates(low, 2.0), (low.product().norm(dim=1) + 0.25).rsqrt()) and not close(rates(low, 2.0), before)


def test_the_rate_falls_as_a_row_grows():
    low = one_layer()[1]
    found = []
    for size in (0.0, 0.5, 1.0, 2.0):
        other = copy.deepcopy(low)
        with torch.no_grad():
            other.B.mul_(size)
        found.append(rates(other, 2.0))
    assert all(bool((a > b).all()) for a, b in zip(found, found[1:], strict=False))


def test_counters_say_how_far_the_rates_fell():
    adapted, _ = setting()
    assert adapted.adapter.counters() == {"row_rate_least": 2.0, "row_rate_mean": 2.0}
    perturb(adapted.adapter, 0.5)
    counted = adapted.adapter.counters()
    assert counted["row_rate_least"] < counted["row_rate_mean"] < 2.0


def test_rounding_is_that_of_the_factors_under_autocast():
    low = one_layer()[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = rates(low, 2.0)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, rates(low, 2.0))


def test_a_copy_keeps_its_rates():
    adapted, data = setting()
    perturb(adapted.adapter, 0.3)
    twin = copy.deepcopy(adapted)
    for m in (adapted, twin):
        loss(m, data(1)[0]).backward()
    grads = [{n: p.grad for n, p in m.adapter.named_parameters()} for m in (adapted, twin)]
    assert same(*grads)


@pytest.mark.parametrize("eta", [0.0, -1.0])
def test_values_without_meaning(eta):
    with pytest.raises(UserError, match="eta"):
        setting(eta=eta)
