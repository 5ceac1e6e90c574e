"""AdaLoRA: the paper's scores and budget by hand, ranks that compete, and what a loop must not forget."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
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


def test_shares_of_the_steps_are_whole_steps():
    """0.29 x 100 is 28.999999999999996 in binary."""
    _, _, adapted = built(warmup=0.29, final=0.57)
    assert part(adapted).phases(100) == (29, 43)


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
    """Every second step decides; in between what was masked trains on, and in the end it does not."""
    _, data, adapted = built(target=2.0, every=2, warmup=2 / 16, final=4 / 16)
    counts = []

    class Counting(torch.optim.AdamW):
        def zero_grad(self, *args):
            super().zero_grad(*args)
            counts.append(gates(adapted))

    train(adapted, data, adapted.optimizer(lambda groups: Counting(groups, lr=5e-3, weight_decay=0.0), 16))
    after = counts[1:]  # the number of gates that are not zero after each step but the last
    want = [part(adapted).budget(t, 16) for t in range(1, 16)]
    for t, (got, budget) in enumerate(zip(after, want, strict=True), 1):
        decided = t >= 12 or (t > 2 and t % 2 == 0)
        assert got == (budget if decided else 16), t
    for _, low in adapted.adapter.low_ranks():
        assert low.rank == 4 and low.A.norm(dim=1).min() > 0


def test_training_that_stops_between_decisions_keeps_its_function():
    _, data, adapted = built(target=2.0, every=3)
    train(adapted, data, adapted.optimizer(adamw, 16), steps=7)
    assert part(adapted).counters()["ranks_kept"] < 16 == gates(adapted)
    x = torch.randn(5, 24)
    y = adapted(x)
    adapted.end()
    assert torch.equal(adapted(x), y)


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


class WithLoss(nn.Module):
    """PEFT adds its penalty to an output's loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return SimpleNamespace(loss=loss(self.net, batch))


LAYERS = ("fc1", "fc2", "fc3")
TRIPLET = {"A": "lora_A", "B": "lora_B", "gate": "lora_E"}


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_pefts(every):
    """Sixteen steps of both: losses with the penalty, gradients, scores, masks, parameters and outputs."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    total, base = 16, Net()
    data = Regression(base)
    config = peft.AdaLoraConfig(target_modules=list(LAYERS), init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=every,
                                total_step=total, lora_alpha=6, orth_reg_weight=0.3)  # fmt: skip
    theirs = peft.get_peft_model(WithLoss(copy.deepcopy(base)), config)
    budget = {"target": 2.0, "warmup": 2 / total, "final": 4 / total, "every": every}
    budget |= {"penalty": 0.3, "orthogonality": "mean"}
    options = {"rank": 4, "alpha": 6.0, "target_modules": list(LAYERS), "trained_modules": []}
    ours = attach(copy.deepcopy(base), "adalora", budget=budget, **options)
    net, lows = theirs.base_model.model.net, {site.name: low for site, low in ours.adapter.low_ranks()}
    triplets = [(n, k, getattr(lows[n], k), getattr(net.get_submodule(n), kind)["default"])
                for n in LAYERS for k, kind in TRIPLET.items()]  # fmt: skip
    with torch.no_grad():
        for _, _, p, q in triplets:
            p.copy_(q.view_as(p))
    optimizers = ours.optimizer(adamw, total), adamw([q for *_, q in triplets])
    scores = dict(zip(LAYERS, part(ours).scores, strict=True))
    allocator = theirs.base_model.rankallocator
    for t in range(1, total + 1):
        batch = data(t)[t - 1]
        for o in optimizers:
            o.zero_grad()
        a, b = loss(ours, batch) + ours.penalty(), theirs.base_model(batch).loss
        a.backward()
        b.backward()
        assert close(a.detach(), b.detach()), t
        assert all(near(p.grad, q.grad.view_as(p)) for _, _, p, q in triplets), t
        for o in optimizers:
            o.step()
        theirs.base_model.update_and_allocate(t)
        for n, k, p, q in triplets:
            assert near(p.detach(), q.detach().view_as(p)), (t, n, k)
            assert k != "gate" or torch.equal(p == 0, q.flatten() == 0), (t, n)
            if t < total - 4:  # then the scores stand, and PEFT forgets them
                kept = allocator.exp_avg_ipt, allocator.exp_avg_unc
                key = f"net.{n}.{TRIPLET[k]}.default"
                for kind, average in zip("iu", kept, strict=True):
                    mine = getattr(scores[n], f"{kind}_{k}")
                    assert mine.max() > 0 and near(mine, average[key].view_as(mine), 1e-5 * float(mine.max())), (t, n, k)
        if t == total - 5:
            last = [scores[n].importance() for n in LAYERS]
    assert all(torch.equal(scores[n].importance(), s) for n, s in zip(LAYERS, last, strict=True))
    assert sum(int((low.gate != 0).sum()) for low in lows.values()) == 6
    x = torch.randn(5, 24)
    assert near(ours(x).detach(), net(x).detach())


def near(a, b, tolerance=1e-5):
    """PEFT divides by the rank + 1e-5."""
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def test_the_budget_is_pefts():
    peft = pytest.importorskip("peft.tuners.adalora.layer")
    _, _, adapted = built(target=2.0, warmup=0.13, final=0.24)
    for total in (16, 50, 101):
        start, stop = part(adapted).phases(total)
        assert (start, total - stop) == (round(0.13 * total), round(0.24 * total))
        config = SimpleNamespace(beta1=0.5, beta2=0.5, target_r=2, tinit=start, tfinal=total - stop, total_step=total, deltaT=1)
        allocator = peft.RankAllocator(nn.Module(), config, "default")
        allocator.init_bgt, allocator.target_bgt = 16, 8
        for t in range(1, total + 1):
            assert part(adapted).budget(t, total) == allocator.budget_schedule(t)[0], (t, total)
