"""LoRA-Squeeze: the best update of a lower rank, when it happens, and what is left of the optimiser."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, cloned, close, perturb, same, train

from lorafactory import UserError, attach, checkpoint, export_lora, linalg, load, registry

SMALL = {"target": 2}
POST = {"mode": "post", "least": 200}
CONT = {"mode": "cont", "refine": 4, "least": 200}
CHANGES = {
    "mode": (["cont", "post"], {}),
    "least": ([2], {}),
    "alloc": (["equal"], {"least": 1}),
    "refine": ([3, 0.25], {"mode": "cont"}),
    "warmup": ([2], {}),
    "oversample": ([0], {}),
    "scored": ([[1]], {}),
}


def built(spelling="lora_squeeze", budget=None, **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, **options, budget={**SMALL, "least": 2, **(budget or {})})


def part(adapted):
    return adapted.adapter.parts["budget"]


def ranks(adapted):
    return {low.rank for _, low in adapted.adapter.low_ranks()}


def factors(p, q, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(p, n, generator=g, dtype=torch.float64), torch.randn(n, q, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(30, 20, 8), (20, 30, 8), (12, 12, 20)])
def test_the_svd_of_a_product_is_that_of_the_matrix(shape):
    b, a = factors(*shape)
    u, s, vt = linalg.product_svd(b, a, 3)
    want = torch.linalg.svd(b @ a, full_matrices=False)
    assert close(s, want.S[:3]) and close(u * s @ vt, want.U[:, :3] * want.S[:3] @ want.Vh[:3])
    assert close(linalg.product_norm(b, a), (b @ a).norm())


def test_the_randomised_svd_is_within_one_percent_and_its_directions_matter():
    b, a = factors(80, 60, 40)
    tail = torch.linalg.svdvals(b @ a)[4:].norm()

    def lost(niter, oversample):
        torch.manual_seed(1)
        u, s, vt = linalg.product_svd(b, a, 4, niter, oversample)
        assert close(u.mT @ u, torch.eye(4).double()) and close(vt @ vt.mT, torch.eye(4).double())
        return float((b @ a - u * s @ vt).norm() / tail)

    assert 1 <= lost(2, 10) < 1.01 < lost(1, 0)


@pytest.mark.parametrize("budget", [{"niter": 0}, {"niter": 2}, {"split": "b"}])
@pytest.mark.parametrize("alpha", [16.0, -3.0])
def test_a_squeeze_is_the_best_of_its_rank(budget, alpha):
    """Eckart-Young: what is lost are the singular values beyond the target."""
    _, _, adapted = built(budget=budget, alpha=alpha)
    perturb(adapted.adapter)
    old = {s.name: low.product().detach() for s, low in adapted.adapter.low_ranks()}
    assert part(adapted).squeeze(2) and ranks(adapted) == {2}
    worst = 0.0
    for site, low in adapted.adapter.low_ranks():
        u, s, vt = torch.linalg.svd(old[site.name], full_matrices=False)
        assert close(low.product().detach(), u[:, :2] * s[:2] @ vt[:2], 5)
        worst = max(worst, float(s[2:].norm() / s.norm()))
        gram = low.A @ low.A.T
        assert close(gram, torch.eye(2) if budget.get("split") == "b" else low.B.T @ low.B, 50)
    assert part(adapted).counters()["worst_relative_error"] == pytest.approx(worst, rel=1e-3)


def test_what_has_the_rank_already_is_kept_and_idle_ranks_can_learn():
    _, _, adapted = built(budget={"target": 3})
    with torch.no_grad():
        for _, low in adapted.adapter.low_ranks():
            low.B[:, 0] = torch.randn(len(low.B))
    old = [low.product().detach() for _, low in adapted.adapter.low_ranks()]
    part(adapted).squeeze(3)
    for (_, low), p in zip(adapted.adapter.low_ranks(), old, strict=True):
        assert low.rank == 3 and close(low.product().detach(), p)
        assert low.A.norm(dim=1).min() > 0.1 and not low.B[:, 1:].any(), "B = 0 and A is not: it still learns"
    assert part(adapted).counters()["worst_relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("budget", "rank", "total", "want"),
    [({"target": 1, "least": 2, "alloc": "equal"}, 8, 16, {4: 4, 8: 2, 12: 1}),
     ({"target": 1, "least": 1}, 8, 19, {9: 4, 14: 2, 17: 1}),  # 4 + 15 x (8, 12, 14, 15) / 15
     ({"target": 3, "least": 200}, 8, 1500, {200 + 480: 4, 400 + 720: 3}),  # 900 spare steps over 8, 4 and 3
     ({"target": 2, "least": 200}, 8, 30, {10: 4, 20: 2}),  # a short run has equal stages
     (CONT | {"target": 2}, 8, 16, {12: 2}), (CONT | {"target": 2, "refine": 0.25}, 8, 20, {15: 2}),
     (POST | {"target": 2}, 8, 16, {}), ({"target": 8}, 8, 16, {})],
)  # fmt: skip
def test_stages_by_hand(budget, rank, total, want):
    _, _, adapted = built(budget=budget, rank=rank)
    assert part(adapted).schedule(total) == want


def test_training_squeezes_and_the_optimiser_forgets():
    _, data, adapted = built(budget={"target": 1, "least": 4, "alloc": "equal"})
    optimizer = adapted.optimizer(adamw, 12)
    seen = []
    train(adapted, data, optimizer, steps=12, watch=lambda i: seen.append(max(ranks(adapted))))
    assert seen == [4] * 4 + [2] * 4 + [1] * 4
    owned = {p for g in optimizer.param_groups for p in g["params"]}
    assert owned == set(adapted.adapter.parameters()) and set(optimizer.state) == owned
    assert all(float(s["step"]) == 4 for s in optimizer.state.values()), "a fresh state since the last squeeze"
    assert part(adapted).counters()["squeezes"] == 2
    assert not adapted.end()


def test_the_rate_rises_after_the_squeeze_of_cont():
    _, data, adapted = built(budget=CONT | {"warmup": 4})
    optimizer = adapted.optimizer(adamw, 16)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"] / 5e-3))
    train(adapted, data, optimizer, steps=16)
    assert rates == pytest.approx([1.0] * 12 + [0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("spelling", ["lora_squeeze", "lora_squeeze+pissa", "lora_squeeze+relora"])
def test_post_squeezes_the_whole_update_at_the_end(spelling, tmp_path):
    """An anchor and a past, too; and what is left is a plain LoRA."""
    base, data, adapted = built(spelling, budget=POST)
    train(adapted, data, adapted.optimizer(adamw, 8), steps=8)
    old = {s.name: low.product().detach() for s, low in adapted.adapter.low_ranks()}
    assert ranks(adapted) == {4} and adapted.end() and ranks(adapted) == {2}
    for site, low in adapted.adapter.low_ranks():
        u, s, vt = torch.linalg.svd(old[site.name], full_matrices=False)
        assert close(low.product().detach(), u[:, :2] * s[:2] @ vt[:2], 5)
        assert low.A0 is None and low.A_past is None
    x = torch.randn(3, 24)
    y = adapted(x)
    assert set(export_lora(adapted, tmp_path / "lora").values()) == {0.0}
    assert close(load(copy.deepcopy(base), tmp_path / "lora")(x), y)
    adapted.merge()
    assert close(adapted(x), y)


def test_a_run_goes_on_between_two_squeezes(tmp_path):
    base, data, adapted = built(budget={"target": 1, "least": 4, "alloc": "equal"})
    optimizer = adapted.optimizer(adamw, 12)
    train(adapted, data, optimizer, steps=6)
    checkpoint.save(adapted, tmp_path / "a", {"step": 6}, optimizer)
    losses = train(adapted, data, optimizer, steps=12, start=6)
    _, _, again = built(budget={"target": 1, "least": 4, "alloc": "equal"}, rank=3)
    checkpoint.restore(again, tmp_path / "a")
    begun(again, data)
    other = again.optimizer(adamw, 12)
    other.lifecycle.index = checkpoint.restore_optimizer(other, tmp_path / "a")["step"]
    assert train(again, data, other, steps=12, start=6) == losses
    assert same(again.adapter.state_dict(), adapted.adapter.state_dict())


def test_truncations_are_squeezes_that_leave_no_trace():
    _, data, adapted = built(budget=POST | {"target": 4})
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    adapted.end()
    before = cloned(adapted.adapter.state_dict())
    cuts = adapted.adapter.truncations()
    assert sorted(cuts) == [1, 2, 4]
    with adapted.adapter.tried(cuts[1]):
        assert ranks(adapted) == {1}
    assert same(adapted.adapter.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"target": 0}, "at least 1"), ({"mode": "late"}, "in, cont, post"), ({"refine": 1.5, "mode": "cont"}, "a share of the run"),
     ({"mode": "post", "alloc": "equal"}, "no use for"), ({"mode": "post", "warmup": 3}, "trains nothing"),
     ({"niter": 0, "oversample": 3}, "the exact SVD"), ({"scored": [0]}, "ranks, from 1")],
)  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("lora_squeeze", budget=options)


def test_a_target_above_the_ranks_is_refused():
    with pytest.raises(UserError, match="target is 9"):
        attach(Net(), "lora_squeeze", rank=8, budget={"target": 9})


@pytest.mark.parametrize(
    ("budget", "said"),
    [({"target": 1}, "2 steps are too few for 3 stages, of rank 4, 2, 1"), (CONT | {"refine": 2}, "leaves 2 of 2")],
)
def test_a_run_too_short_is_refused_at_its_first_step(budget, said):
    _, data, adapted = built(budget=budget)
    with pytest.raises(UserError, match=said):
        train(adapted, data, adapted.optimizer(adamw, 2), steps=1)
