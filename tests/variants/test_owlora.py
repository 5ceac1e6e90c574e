import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, perturb, train

from lorafactory import UserError

TARGETS = ["fc1", "fc2", "fc3"]
CHANGES = {"weight": ([0.1], {"mode": "soft"})}


def setting(variant="owlora", rank=2, dtype=torch.float32, **continual):
    torch.manual_seed(0)
    base = Net().to(dtype)
    options = {"continual": continual} if continual else {}
    return attached(variant, base, Regression(base), rank=rank, target_modules=TARGETS, **options), base


def part(adapted):
    return adapted.adapter.parts["continual"]


def trained(index_of_last, **options):
    adapted, base = setting(**options)
    for index in range(index_of_last + 1):
        data = Regression(base, index + 1)
        if index:
            begun(adapted, data, index)
        train(adapted, data, adapted.optimizer(adamw, 12), steps=12)
        if index < index_of_last:
            adapted.end()
    return adapted, base


def test_one_stage_with_weights_of_one_is_lora():
    adapted, base = setting()
    lora, _ = setting("lora")
    x = torch.randn(3, 24)
    for (_, low, _), (_, other) in zip(part(adapted).pairs(), lora.adapter.low_ranks(), strict=True):
        assert torch.equal(low.gate, torch.ones(2)) and low.A.shape == other.A.shape and not low.B.any()
        with torch.no_grad():
            low.A.copy_(other.A)
            low.B.normal_()
            other.B.copy_(low.B)
    assert close(adapted(x), lora(x))


def test_what_earlier_stages_read_is_left_alone():
    """Adam's steps leave the span of the gradients, and even so A V^T = 0 after every one."""
    adapted, base = trained(1)
    for site, low, memory in part(adapted).pairs():
        v = memory.rows
        assert v.shape == (2, site.d_in) and close(v @ v.T, torch.eye(2))
        assert (low.A @ v.T).abs().max() < 1e-6 and low.A.abs().max() > 1e-2 and low.B.abs().max() > 1e-3
        inside = torch.randn(4, 2) @ v
        past = low.B_past @ low.A_past
        assert close(inside @ low.product().T, inside @ past.T), "outputs inside the span are those of the first stage"
        outside = torch.randn(4, site.d_in)
        assert not close(outside @ low.product().T, outside @ past.T)


def test_projecting_the_factor_is_projecting_in_forward():
    """A step of AdamW on A' under A = A' (I - V^T V), beside ours."""
    torch.manual_seed(1)
    v = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0].T
    p = torch.eye(6, dtype=torch.float64) - v.T @ v
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    b = torch.randn(3, 2, dtype=torch.float64)
    inner = torch.randn(2, 6, dtype=torch.float64).requires_grad_()
    ours = (inner.detach() @ p).requires_grad_()
    first, second = (torch.optim.AdamW([t], lr=0.1, weight_decay=0.1) for t in (inner, ours))
    for _ in range(10):
        for t, optimizer, eye in ((inner, first, p), (ours, second, torch.eye(6, dtype=torch.float64))):
            optimizer.zero_grad()
            (x @ (b @ t @ eye).T - y).square().mean().backward()
            if t is ours:
                t.grad = t.grad @ p
            optimizer.step()
        with torch.no_grad():
            ours.copy_(ours @ p)
    assert close(ours.detach(), inner.detach() @ p)


def test_weights_train_and_are_folded_with_their_stage():
    adapted, base = trained(0)
    want = {s.name: (low.scale * low.B * low.gate) @ low.A for s, low, _ in part(adapted).pairs()}
    assert all(not torch.equal(low.gate, torch.ones(2)) for _, low, _ in part(adapted).pairs())
    begun(adapted, Regression(base, 2), 1)
    for s, low, _ in part(adapted).pairs():
        assert close(low.product(), want[s.name]) and torch.equal(low.gate, torch.ones(2)) and not low.B.any()


def test_the_soft_penalty():
    adapted, base = trained(0, mode="soft", weight=0.25)
    assert float(adapted.penalty()) == 0.0
    begun(adapted, Regression(base, 2), 1)
    want = sum(0.25 * float((m.rows @ low.A.T).square().sum()) for _, low, m in part(adapted).pairs())
    assert float(adapted.penalty()) == pytest.approx(want) and want > 0
    with torch.no_grad():
        for _, low, m in part(adapted).pairs():
            basis = torch.linalg.qr(m.rows.T)[0].T
            low.A.sub_(low.A @ basis.T @ basis)
    assert float(adapted.penalty()) < 1e-10, "zero where the row spaces are orthogonal"


def test_directions_run_out():
    adapted, base = setting(rank=24)
    perturb(adapted.adapter)
    with pytest.raises(UserError, match="24 directions of fc1"):
        begun(adapted, Regression(base, 2), 1)


def test_a_budgets_gate_is_the_weight():
    adapted, base = setting("adalora+owlora")
    assert all(not low.gate.any() for _, low, _ in part(adapted).pairs())


def test_a_memory_holds_no_more_directions_than_there_are():
    """Where rounding leaves something of what it holds."""
    adapted, _ = setting()
    _, low, memory = adapted.adapter.parts["continual"].pairs()[0]
    d = low.A.shape[1]
    memory.add(0.999 * torch.eye(d)[: d - 1])
    memory.extend(torch.randn(d, d))
    assert len(memory.rows) == d


def test_values_without_meaning():
    for wrong, word in (({"mode": "firm"}, "mode"), ({"weight": 0.5}, "mode=hard"), ({"mode": "soft", "weight": -1.0}, "weight")):
        with pytest.raises(UserError, match=word):
            setting(**wrong)
