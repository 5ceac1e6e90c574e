"""DyLoRA: a rank a step, what it trains and what it leaves alone, and one adapter for every rank."""

import pytest
import torch
from support import Net, Regression, adamw, attached, cloned, close, loss, perturb, train

from lorafactory import UserError, attach, registry

CHANGES = {"ranks": ([[3]], {}), "keep": ([2], {}), "scored": ([[1]], {}), "least": ([4], {}), "scaling": (["none"], {})}


def built(spelling="dylora", **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, **options)


def part(adapted):
    return adapted.adapter.parts["budget"]


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def test_a_step_is_the_truncations_and_no_other_rank_has_a_gradient():
    """h = W0 x + (alpha / b) B[:, :b] A[:b] x; alpha 16."""
    _, data, adapted = built(budget={"ranks": [3]})
    perturb(adapted.adapter)
    loss(adapted, data(1)[0]).backward()
    for low in pairs(adapted):
        x = torch.randn(5, low.A.shape[1])
        assert close(low(x), 16 / 3 * x @ low.A[:3].T @ low.B[:, :3].T)
        assert low.A.grad[:3].any(1).all() and low.B.grad[:, :3].any(0).all()
        assert not low.A.grad[3:].any() and not low.B.grad[:, 3:].any()


def test_every_rank_is_drawn_and_one_for_all_layers():
    _, data, adapted = built(budget={"least": 2})
    seen = set()

    def watch(_):
        masks = {tuple(low.mask.tolist()) for low in pairs(adapted)}
        assert len(masks) == 1
        seen.add(sum(m > 0 for m in masks.pop()))

    train(adapted, data, adapted.optimizer(adamw, 40), steps=40, watch=watch)
    assert seen == {2, 3, 4}
    assert part(adapted).counters()["nested_steps"] == 40 and 2 < part(adapted).counters()["mean_rank_drawn"] < 4


def test_the_full_rank_alone_is_lora():
    found = []
    for spelling, options in (("lora", {}), ("dylora", {"budget": {"least": 4}})):
        _, data, adapted = built(spelling, **options)
        losses = train(adapted, data, adapted.optimizer(adamw, 8), steps=8)
        adapted.end()
        found.append((losses, [t.tolist() for t in adapted.adapter.export().values()]))
    assert found[0] == found[1]


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_moves_one_rank_a_step(frozen):
    """Also where Adam still has momentum and decays; without it every rank up to b moves."""
    _, data, adapted = built(budget={"frozen": frozen})
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1), 12)
    before, drawn = [], []

    def watch(_):
        drawn.append(int(part(adapted).drawn))
        before.append([cloned({"A": low.A, "B": low.B}) for low in pairs(adapted)])

    train(adapted, data, optimizer, steps=12, watch=watch)
    before.append([cloned({"A": low.A, "B": low.B}) for low in pairs(adapted)])
    assert len(set(drawn)) == 4
    for i, b in enumerate(drawn[1:], 1):
        for old, new in zip(before[i], before[i + 1], strict=True):
            moved = ((old["A"] != new["A"]).any(1) | (old["B"] != new["B"]).any(0)).tolist()
            assert moved == [k == b - 1 for k in range(4)] if frozen else all(moved[:b])


def test_one_training_serves_every_rank():
    _, data, adapted = built()
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    assert adapted.end() and all(low.mask is None for low in pairs(adapted))
    for r, cut in adapted.adapter.truncations().items():
        with adapted.adapter.tried(cut):
            now = [low.product() for low in pairs(adapted)]
        assert all(close(p, 16 / r * low.B[:, :r] @ low.A[:r]) for p, low in zip(now, pairs(adapted), strict=True))


def test_evaluation_between_steps_is_of_the_whole():
    _, data, adapted = built(budget={"ranks": [1]})
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    adapted.eval()
    assert all(close(low.product(), 4 * low.B @ low.A) for low in pairs(adapted))


@pytest.mark.parametrize(
    ("options", "said"), [({"least": 0}, "at least 1"), ({"least": 2, "ranks": [3]}, "leave one out")]
)
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("dylora", budget=options)


def test_a_least_rank_that_no_pair_has_is_refused():
    with pytest.raises(UserError, match="least is 9"):
        attach(Net(), "dylora", rank=8, budget={"least": 9})
