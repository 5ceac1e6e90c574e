import pytest
import torch
from support import Net, Regression, attached, close, loss, perturb, same, train

from lorafactory import UserError, checkpoint

TARGETS = ["fc1", "fc2", "fc3"]
CHANGES = {"damping": ([10.0], {})}


def setting(variant="riemannian", damping=1e-6, **options):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    own = {"dynamics": {"damping": damping}} if "riemannian" in variant else {}
    return attached(variant, base, data, target_modules=TARGETS, **{"rank": 3, **own, **options}), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def moved(adapted, data, make=sgd):
    """One step: (gradients before it, factors before it) of each pair."""
    optimizer = adapted.optimizer(make, 1)
    loss(adapted, data(1)[0]).backward()
    before = {n: [t.detach().clone() for t in (low.A, low.B, low.A.grad, low.B.grad)] for n, low in pairs(adapted).items()}
    optimizer.step()
    return before


def test_by_hand():
    """B = (2, 0, ...)^T and A = (1, 1, 0, ...) of rank 1, damping 1: g_A / 5 and g_B / 3."""
    adapted, data = setting(rank=1, damping=1.0)
    for low in pairs(adapted).values():
        with torch.no_grad():
            low.B.zero_()
            low.B[0] = 2.0
            low.A.zero_()
            low.A[0, :2] = 1.0
    before = moved(adapted, data)
    for n, low in pairs(adapted).items():
        a, b, ga, gb = before[n]
        assert close(low.A, a - 0.1 * ga / 5) and close(low.B, b - 0.1 * gb / 3) and ga.any() and gb.any()
        assert torch.equal(low.A.grad, ga) and torch.equal(low.B.grad, gb)


@pytest.mark.parametrize("rank", [1, 3])
def test_both_use_the_factors_before_the_step(rank):
    adapted, data = setting(rank=rank)
    perturb(adapted.adapter, 0.3)
    eye = 1e-6 * torch.eye(rank, dtype=torch.float64)
    before = moved(adapted, data)
    for n, low in pairs(adapted).items():
        a, b, ga, gb = before[n]
        assert close(low.A, a - 0.1 * torch.linalg.inv(b.T @ b + eye) @ ga, 1e3)
        assert close(low.B, b - 0.1 * gb @ torch.linalg.inv(a @ a.T + eye), 1e3)


def test_adamw_takes_the_scaled_gradient_into_both_moments():
    adapted, data = setting()
    perturb(adapted.adapter, 0.3)
    optimizers = []

    def make(groups):
        optimizers.append(torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)))
        return optimizers[0]

    eye = 1e-6 * torch.eye(3, dtype=torch.float64)
    optimizer = adapted.optimizer(make, 1)
    loss(adapted, data(1)[0]).backward()
    want = {low.A: torch.linalg.inv(low.B.T @ low.B + eye) @ low.A.grad for low in pairs(adapted).values()}
    optimizer.step()
    for p, g in want.items():
        state = optimizer.state[p]
        assert close(state["exp_avg"], 0.2 * g, 1e3) and close(state["exp_avg_sq"], 0.1 * g * g, 1e3)


@pytest.mark.parametrize("rescaling", ["scalar", "matrix"])
def test_what_the_pair_stands_for_decides(rescaling):
    """(B R, R^-1 A) changes B A alike to first order, without damping."""
    changes = []
    for r in (torch.eye(3, dtype=torch.float64), None):
        adapted, data = setting(damping=0.0)
        perturb(adapted.adapter, 0.3)
        if r is None:
            eye = torch.eye(3, dtype=torch.float64)
            r = 5 * eye if rescaling == "scalar" else torch.randn(3, 3, dtype=torch.float64) + 3 * eye
        with torch.no_grad():
            for low in pairs(adapted).values():
                low.B.copy_(low.B @ r)
                low.A.copy_(torch.linalg.solve(r, low.A))
        before = moved(adapted, data)
        changes.append({n: b @ (low.A - a) + (low.B - b) @ a for n, low in pairs(adapted).items() for a, b, *_ in [before[n]]})
    assert all(close(changes[0][n], changes[1][n], 1e5) and changes[0][n].any() for n in changes[0])


def test_great_damping_is_the_plain_gradient():
    adapted, data = setting(damping=1e5)
    perturb(adapted.adapter, 0.3)
    before = moved(adapted, data)
    for n, low in pairs(adapted).items():
        a, b, ga, gb = before[n]
        for change, gradient in ((low.A - a, ga), (low.B - b, gb)):
            assert (change * -1e6 - gradient).norm() < 1e-4 * gradient.norm()


def test_all_else_takes_the_plain_step():
    made = {}
    for variant in ("dora+riemannian", "dora"):
        adapted, data = setting(variant, trained_modules=["head"])
        moved(adapted, data)
        factors = {p for low in pairs(adapted).values() for p in (low.A, low.B)}
        made[variant] = {n: p for n, p in adapted.adapter.named_parameters() if p not in factors}
    assert same(*made.values()) and len(made["dora"]) == 5


def test_b_at_zero_and_dependent_rows_stay_finite():
    for damping in (0.0, 1e-6):
        adapted, data = setting(damping=damping)
        with torch.no_grad():
            for low in pairs(adapted).values():
                low.A[1] = low.A[0]
        before = moved(adapted, data)
        for n, low in pairs(adapted).items():
            assert torch.equal(low.A, before[n][0])  # g_A = s B^T G = 0
            assert low.B.isfinite().all() and low.B.any()


def test_resume(tmp_path):
    make = lambda groups: torch.optim.AdamW(groups, lr=1e-3)  # noqa: E731
    straight, data = setting()
    want = train(straight, data, straight.optimizer(make, 6), steps=6)
    first, _ = setting()
    optimizer = first.optimizer(make, 6)
    assert train(first, data, optimizer, steps=3) == want[:3]
    checkpoint.save(first, tmp_path / "a", {"step": 3}, optimizer)
    again, _ = setting()
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(make, 6)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=3, steps=6) == want[3:]
    assert again.adapter.counters() == {"preconditioned_pairs": 3, "preconditioned_steps": 6}


def test_values_without_meaning():
    with pytest.raises(UserError, match="damping"):
        setting(damping=-1.0)


def test_equal_to_peft():
    """Ten steps of its scaled AdamW, with a decay."""
    peft = pytest.importorskip("peft", reason="needs PEFT to compare with")
    from peft.optimizers import create_riemannian_optimizer

    adapted, data = setting(damping=1e-2, rank=4, alpha=8.0)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    theirs = peft.get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
    layers = {n: theirs.base_model.model.get_submodule(n) for n in pairs(adapted)}
    for n, low in pairs(adapted).items():
        layers[n].lora_A.default.weight.data.copy_(low.A)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, **options), 10)
    other = create_riemannian_optimizer(theirs, torch.optim.AdamW, reg=1e-2, **options)
    for i in range(10):
        for model, o in ((adapted, optimizer), (theirs, other)):
            o.zero_grad()
            loss(model, data(i + 1)[i]).backward()
            o.step()
    for n, low in pairs(adapted).items():
        assert close(low.A, layers[n].lora_A.default.weight, 100) and close(low.B, layers[n].lora_B.default.weight, 100)
        assert low.B.abs().max() > 0.01
