"""AdaLoRA: the paper's scores and budget by hand, ranks that compete, and what a loop must not forget."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, train

from lorafactory import UserError, attach, load, registry
from lorafactory.variants.adalora import Score

SMALL = {"warmup": 0.1, "final": 0.2}


def part(adapted):
    return adapted.adapter.parts["budget"]


def built(**options):
    base = Net()
    data = Regression(base)
    return base, data, attached("adalora", base, data, budget={**SMALL, **options})


def gates(adapted):
    return sum(int((low.gate != 0).sum()) for _, low in adapted.adapter.low_ranks())


def test_the_budget_is_full_then_cubic_then_the_target():
    """Eq. 12: 16 ranks, target 8, of 100 steps: 10 of warm-up, 20 at the end."""
    _, _, adapted = built(target=2.0)
    b = [part(adapted).budget(t, 100) for t in range(1, 101)]
    assert b[:10] == [16] * 10 and b[79:] == [8] * 21
    assert b == sorted(b, reverse=True)
    assert b[44] == int(8 + 8 * (1 - 35 / 70) ** 3)


def test_scores_are_the_papers_by_hand():
    """One pair with A, B, E of a single entry each: I = 0.15 |w g|, U = 0.15 |now - I|, S = sum of I U."""
    class Pair:
        A, B, gate = (torch.full(s, v) for s, v in (((1, 1), 2.0), ((1, 1), 3.0), ((1,), 0.5)))

    for t, g in ((Pair.A, 0.1), (Pair.B, -0.2), (Pair.gate, 1.0)):
        t.grad = torch.full_like(t, g)
    score = Score(Pair)
    score.update(Pair, 0.85, 0.85)
    want = 0.0
    for now in (0.2, 0.6, 0.5):
        i = 0.15 * now
        want += i * 0.15 * abs(now - i)
    assert close(score.importance(), torch.tensor([want]), 10)


def test_ranks_fall_to_the_target_and_go_at_the_end(tmp_path):
    base, data, adapted = built(target=2.0, every=2)
    seen = []
    train(adapted, data, adapted.optimizer(adamw, 16), watch=lambda i: seen.append(gates(adapted)))
    assert seen[0] == 0 and max(seen) == 16, "it starts at E = 0 and first trains every rank"
    assert gates(adapted) == 8 == part(adapted).counters()["ranks_kept"]
    x = torch.randn(5, 24)
    y = adapted(x)
    adapted.end()
    assert sum(low.rank for _, low in adapted.adapter.low_ranks()) == 8
    assert close(adapted(x), y)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), adapted(x))


def test_a_masked_rank_keeps_its_factors_and_may_return():
    _, data, adapted = built(target=2.0)
    train(adapted, data, adapted.optimizer(adamw, 16), steps=9)
    for _, low in adapted.adapter.low_ranks():
        assert low.rank == 4 and low.A.norm(dim=1).min() > 0
    assert 8 <= gates(adapted) < 16


def test_the_penalty_is_zero_for_orthonormal_factors_and_the_papers_otherwise():
    _, _, adapted = built()
    with torch.no_grad():
        for _, low in adapted.adapter.low_ranks():
            low.A.copy_(torch.linalg.qr(torch.randn(low.A.shape[1], 4))[0].T)
            low.B.copy_(torch.linalg.qr(torch.randn(low.B.shape[0], 4))[0])
        assert float(adapted.penalty()) < 1e-9
        for _, low in adapted.adapter.low_ranks():
            low.A.mul_(2)  # A A^T - I = 3 I: squared norm 9 x 4 a matrix
        assert float(adapted.penalty()) == pytest.approx(0.1 * 4 * 36, rel=1e-5)
    _, _, mean = built(orthogonality="mean")
    with torch.no_grad():
        for (_, low), (_, old) in zip(mean.adapter.low_ranks(), adapted.adapter.low_ranks(), strict=True):
            low.A.copy_(old.A)
            low.B.copy_(old.B)
        assert float(mean.penalty()) == pytest.approx(0.1 * 4 * 6 / 8, rel=1e-4)


def test_without_penalty_and_pruning_it_is_svd_form_lora():
    _, data, adapted = built(penalty=0.0, target=4.0)
    train(adapted, data, adapted.optimizer(adamw, 16))
    for _, low in adapted.adapter.low_ranks():
        assert (low.gate != 0).all()
        assert close(low.product(), float(low.scale) * low.B @ torch.diag(low.gate) @ low.A, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"warmup": 0.5, "final": 0.6}, "leave none between"), ({"target": 0.0}, "target is 0.0"), ({"every": 0}, "every=0"),
     ({"orthogonality": "max"}, "sum, mean")],
)  # fmt: skip
def test_impossible_phases_and_nonsense_are_refused_B15(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("adalora", budget=options)


def test_a_target_above_the_start_is_refused():
    with pytest.raises(UserError, match="target 9.0 is more than the average rank at the start, 8"):
        attach(Net(), "adalora", budget={"target": 9.0})


def test_a_run_too_short_for_its_phases_is_refused_at_its_first_step():
    base, data, adapted = built(warmup=0.4, final=0.5)
    optimizer = adapted.optimizer(adamw, 4)
    (loss(adapted, data(1)[0]) + adapted.penalty()).backward()
    with pytest.raises(UserError, match="4 steps leave none between"):
        optimizer.step()


def test_scores_and_masks_are_pefts():
    """PEFT's allocator on the same weights and gradients: the same ranks go, step by step."""
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora import RankAllocator

    torch.manual_seed(0)
    total, base = 16, Net()
    config = peft.AdaLoraConfig(
        target_modules=["fc1", "fc2", "fc3"], init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=total, lora_alpha=4
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = attach(base, "adalora", rank=4, alpha=4.0, target_modules=["fc1", "fc2", "fc3"],
                  budget={"target": 2.0, "warmup": 2 / total, "final": 4 / total})  # fmt: skip
    allocator, lows = RankAllocator(theirs.base_model.model, config, "default"), dict(ours.adapter.low_ranks())
    scores = part(ours).scores
    for step in range(1, 13):
        g = torch.Generator().manual_seed(step)
        for site, low in lows.items():
            layer = getattr(theirs.base_model.model, site.name)
            for p, q in ((low.A, layer.lora_A["default"]), (low.B, layer.lora_B["default"]), (low.gate, layer.lora_E["default"])):
                v, dv = torch.randn(p.shape, generator=g), torch.randn(p.shape, generator=g)
                with torch.no_grad():
                    p.copy_(v)
                    q.copy_(v.view(q.shape))
                p.grad, q.grad = dv.clone(), dv.view(q.shape).clone()

        class Now:
            index = step - 1

        Now.total = total
        with torch.no_grad():
            part(ours).after_step(Now)
        allocator.update_and_allocate(theirs.base_model.model, step)
        mine = {site.name: low.gate != 0 for site, low in lows.items()}
        for name, mask in mine.items():
            assert torch.equal(mask, (getattr(theirs.base_model.model, name).lora_E["default"] != 0).flatten()), (step, name)
    assert len(scores) == 3
