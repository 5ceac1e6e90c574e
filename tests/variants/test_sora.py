"""SoRA: proximal steps on numbers by hand, gates that close for good, and a plain LoRA in the end."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, perturb, same, train
from transformers import BertConfig, BertModel

from lorafactory import Adapted, UserError, attach, checkpoint, gates, load, registry
from lorafactory.peft_folder import export_lora, export_peft

SMALL = {"threshold": 0.02}
RISING = {"schedule": "linear", "most": 0.2}
CHANGES = {"schedule": (["linear"], {"threshold": 1e-4}), "most": ([0.9], {"threshold": 1e-4, "schedule": "linear"}),
           "levels": ([2], RISING), "first": ([0.8], RISING)}  # fmt: skip


def built(spelling="sora", **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, budget={**SMALL, **options})


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def part(adapted):
    return adapted.adapter.parts["budget"]


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def test_soft_threshold_by_hand():
    g = torch.tensor([1.0, 0.3, 0.1, 0.0999, -0.1, -0.25, 0.0])
    gates.soft_threshold(g, 0.1)
    assert torch.allclose(g, torch.tensor([0.9, 0.2, 0.0, 0.0, 0.0, -0.15, 0.0]))
    assert (g[[2, 3, 4, 6]] == 0).all(), "exact zeros"


def test_it_is_the_proximal_step():
    """argmin_u (u - g)^2 / 2 + t |u|, against a grid."""
    u = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    for g, t in ((1.3, 0.4), (-0.9, 0.25), (0.2, 0.3), (-0.3, 0.3)):
        best = u[((u - g).square() / 2 + t * u.abs()).argmin()]
        found = torch.tensor([g], dtype=torch.float64)
        gates.soft_threshold(found, t)
        assert abs(float(found - best)) < 1e-5


@pytest.mark.parametrize("times_lr", [False, True])
def test_a_step_is_the_optimisers_and_then_the_threshold(times_lr):
    """SGD: g - lr dL/dg, less t; t = lambda or lr lambda, the gates' own lr."""
    _, data, adapted = built(threshold=0.05, times_lr=times_lr, gate_lr=2.0)
    perturb(adapted.adapter, 0.3)
    before, gradients = [low.gate.detach().clone() for low in pairs(adapted)], []
    train(adapted, data, adapted.optimizer(sgd, 4), steps=1,
          watch=lambda i: gradients.extend(low.gate.grad.clone() for low in pairs(adapted)))  # fmt: skip
    t = 0.05 * (0.2 if times_lr else 1)
    for low, g, d in zip(pairs(adapted), before, gradients, strict=True):
        moved = g - 0.2 * d
        assert close(low.gate.detach(), moved.sign() * (moved.abs() - t).clamp_min(0))


def test_it_starts_at_lora_with_random_gates():
    """g ~ N(0, 1), B = 0; gates of a group of their own, without decay unless told."""
    _, _, adapted = built(gate_lr=3.0)
    found = torch.cat([low.gate.detach() for low in pairs(adapted)])
    assert found.std() > 0.5 and not any(low.B.any() for low in pairs(adapted))
    groups = adapted.optimizer(adamw, 4).param_groups
    own = [g for g in groups if any(p is low.gate for p in g["params"] for low in pairs(adapted))]
    assert len(groups) == 2 and len(own) == 1 and len(own[0]["params"]) == 4
    assert own[0]["lr"] == pytest.approx(3 * groups[0]["lr"]) and own[0]["weight_decay"] == 0
    _, _, decayed = built(gate_decay=0.1)
    assert {g["weight_decay"] for g in decayed.optimizer(adamw, 4).param_groups} == {0.0, 0.1}


def test_open_gates_without_a_threshold_are_lora():
    base, data, adapted = built(threshold=0.0)
    lora = attached("lora", base, data)
    for low, plain in zip(pairs(adapted), pairs(lora), strict=True):
        low.gate.requires_grad_(False).fill_(1.0)
        low.A.data.copy_(plain.A.detach())
    losses = [train(m, data, m.optimizer(adamw, 8), steps=8) for m in (adapted, lora)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_pruning_is_exact_and_leaves_a_plain_lora(tmp_path):
    """Rank = gates that are not zero; what is exported is a LoRA of that rank with the same outputs."""
    base, data, adapted = built(threshold=0.06)
    train(adapted, data, adapted.optimizer(adamw, 16))
    open_gates = [int(low.gate.count_nonzero()) for low in pairs(adapted)]
    assert 0 < sum(open_gates) < 16 and [low.rank for low in pairs(adapted)] == [4] * 4
    x = torch.randn(6, 24)
    y = adapted(x)
    assert adapted.end() is False
    assert [low.rank for low in pairs(adapted)] == open_gates and close(adapted(x), y)
    assert part(adapted).counters() == {"ranks_kept": sum(open_gates)}
    assert max(export_lora(adapted, tmp_path / "lora").values()) == 0.0
    plain = load(copy.deepcopy(base), tmp_path / "lora")
    assert plain.variant == "lora" and close(plain(x), y, 3)
    ranks = {s.name: low.rank for s, low in plain.adapter.low_ranks()}
    assert ranks == {s.name: low.rank for s, low in adapted.adapter.low_ranks() if low.rank}
    adapted.save(tmp_path / "own")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "own")(x), adapted(x))


def test_peft_reads_it_as_the_lora_that_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    base, data, adapted = built(threshold=0.06)
    train(adapted, data, adapted.optimizer(adamw, 16))
    adapted.end()
    assert export_peft(adapted, tmp_path / "a") == "LORA"
    x = torch.randn(6, 24)
    assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))(x), adapted(x), 3)


def test_a_huge_threshold_empties_every_layer():
    base, data, adapted = built(threshold=50.0)
    train(adapted, data, adapted.optimizer(adamw, 4), steps=2)
    adapted.end()
    x = torch.randn(6, 24)
    assert torch.equal(adapted(x), base(x)) and not any(low.rank for low in pairs(adapted))


def test_l1_is_the_mean_gate():
    _, _, adapted = built(l1=10.0)
    with torch.no_grad():
        for low, v in zip(pairs(adapted), (1.0, -2.0, 3.0, 2.0), strict=True):
            low.gate.fill_(v)
    assert float(adapted.penalty().detach()) == pytest.approx(20.0)
    _, _, without = built()
    assert not without.adapter.has_penalty


@pytest.mark.parametrize(("schedule", "want"), [
    ("linear", [0.1, 0.4, 0.7]),
    ("log", [0.1, 0.4444, 0.7]),  # ln((e^0.1 + e^0.7) / 2)
    ("exp", [0.1, 0.26458, 0.7]),  # sqrt(0.1 x 0.7)
])  # fmt: skip
def test_levels_by_hand(schedule, want):
    assert gates.levels(schedule, 0.1, 0.7, 3) == pytest.approx(want, abs=1e-3)
    assert gates.levels("none", 0.1, 0.7, 7) == [0.1]


def test_lambda_rises_and_ranks_at_zero_go_each_time():
    """40 steps, a first level of half of them, four more of five each."""
    _, data, adapted = built(threshold=0.0, schedule="linear", most=0.08, levels=5, first=0.5)
    p = part(adapted)
    assert [p.level(i, 40) for i in range(40)] == [0] * 20 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    ranks = []
    watch = lambda i: ranks.append(sum(low.rank for low in pairs(adapted)))  # noqa: E731
    train(adapted, data, adapted.optimizer(adamw, 40), steps=40, watch=watch)
    assert ranks[:25] == [16] * 25, "lambda = 0 closes none"
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] < 16
    changes = {i for i in range(1, 40) if ranks[i] != ranks[i - 1]}
    assert changes <= {20, 25, 30, 35}
    found = p.counters()
    assert found["ranks_at_level_0"] == 16 and found["ranks_at_level_4"] == found["ranks_kept"] < 16


def test_dropping_ranks_keeps_the_optimisers_state_of_the_others():
    """As if they had never been there: the same run with the ranks left in."""
    _, data, adapted = built(threshold=0.06, schedule="linear", most=0.0601, levels=2, first=0.5)
    _, _, whole = built(threshold=0.06)
    optimizers = [m.optimizer(adamw, 16) for m in (adapted, whole)]
    for m, o in zip((adapted, whole), optimizers, strict=True):
        train(m, data, o, steps=8)
    dropped = [set(range(4)) - set(low.gate.nonzero().flatten().tolist()) for low in pairs(whole)]
    assert any(dropped) and [low.rank for low in pairs(adapted)] == [4 - len(d) for d in dropped]
    for low, other in zip(pairs(adapted), pairs(whole), strict=True):
        index = other.gate.nonzero().flatten()
        for name, dim in (("A", 0), ("B", 1), ("gate", 0)):
            p, q = getattr(low, name), getattr(other, name)
            mine, theirs = optimizers[0].state[p], optimizers[1].state[q]
            assert close(p.detach(), q.detach().index_select(dim, index))
            assert float(mine["step"]) == float(theirs["step"]) == 8
            for k in ("exp_avg", "exp_avg_sq"):
                assert close(mine[k], theirs[k].index_select(dim, index)) and mine[k].any()


@pytest.mark.parametrize("kill", [3, 10])
def test_resume_before_and_after_ranks_are_dropped(kill, tmp_path):
    options = {"threshold": 0.03, "schedule": "linear", "most": 0.09, "levels": 3, "first": 0.3}
    _, data, straight = built(**options)
    want = train(straight, data, straight.optimizer(adamw, 14), steps=14)
    _, _, first = built(**options)
    optimizer = first.optimizer(adamw, 14)
    train(first, data, optimizer, steps=kill)
    checkpoint.save(first, tmp_path / "a", {"step": kill}, optimizer)
    assert (sum(low.rank for low in pairs(first)) < 16) == (kill == 10)
    base, _, _ = built(**options)
    again = Adapted(base, first.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 14)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=kill, steps=14) == want[kill:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_the_cards_count():
    """DeBERTaV3-base's shapes, r = 8, six matrices a block: 1,327,104 and 576 gates."""
    with torch.device("meta"):
        model = BertModel(BertConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072))
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", r"encoder\.layer\.\d+\.output\.dense"]
    adapted = attach(model, "sora", target_modules=targets, trained_modules=[], rank=8)
    assert adapted.num_trainable() == 1_327_104 + 576


@pytest.mark.parametrize(("options", "said"), [
    ({"levels": 3}, "levels is 3, but there is no schedule"), ({"most": 1.0}, "there is no schedule"),
    ({"schedule": "linear", "most": 1e-5}, "ends above threshold"), ({"gate_lr": 0.0}, "gate_lr is 0.0"),
    ({"schedule": "exp", "threshold": 0.0, "most": 1.0}, "never rises"), ({"threshold": -1.0}, "threshold is -1.0"),
    ({"schedule": "cubic"}, "none, linear, log, exp"), ({"first": 1.0}, "first is 1.0"), ({"levels": 1}, "levels is 1"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("sora", budget=options)
