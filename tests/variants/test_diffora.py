"""DiffoRA: the relaxed matrix by hand, what becomes 1, and pairs that are shared by what was not selected."""

import copy

import pytest
import torch
from support import Blocks, Net, Regression, adamw, attached, close, loss, perturb, roberta_base, same, train

from lorafactory import Adapted, UserError, attach, checkpoint, load, registry
from lorafactory.variants.diffora import discrete

SMALL = {"steps": 3, "logit_lr": 0.1, "lr": 0.01, "scope": "model"}


def built(spelling="diffora", model=None, options=None, **budget):
    torch.manual_seed(0)
    base = model or Net()
    data = Blocky(base) if isinstance(base, Blocks) else Regression(base)
    return base, data, attached(spelling, base, data, budget={**SMALL, "scope": "layer", **budget}, **(options or {}))


class Blocky(Regression):
    """For a base with 12 inputs."""

    def __init__(self, base):
        g = torch.Generator().manual_seed(1)
        teacher = copy.deepcopy(base)
        with torch.no_grad():
            for p in teacher.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=g))
            x = torch.randn(8, 4, 12, generator=g)
            self.all = [{"x": b, "y": teacher(b)} for b in x]


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def part(adapted):
    return adapted.adapter.parts["budget"]


def test_discretisation_by_hand():
    gamma = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.3])
    rows = [[0, 1, 2], [3, 4, 5, 6], [7]]
    assert discrete(gamma, rows, 0.5).int().tolist() == [0, 1, 1, 1, 1, 0, 0, 1], "3 x 0.5 rounds up; the earlier of equals"
    assert discrete(gamma, rows, 0.1).int().tolist() == [0, 1, 0, 1, 0, 0, 0, 1], "at least one"
    assert discrete(gamma, [list(range(8))], 0.5).int().tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert discrete(gamma, rows, 1.0).all()


def test_relaxation_by_hand():
    _, _, adapted = built(relax="softmax")
    a = torch.tensor([0.0, 0.0, 1.0, 0.0])
    e = 2.718281828
    want = [2 / 2, 2 / 2, 2 * e / (e + 1), 2 / (e + 1)]
    assert part(adapted).relaxed(a, [[0, 1], [2, 3]]).tolist() == pytest.approx(want)
    assert part(adapted).relaxed(torch.zeros(4), [[0, 1, 2, 3]]).tolist() == pytest.approx([1.0] * 4)
    _, _, sigmoid = built()
    assert part(sigmoid).relaxed(torch.tensor([0.0, 2.0]), []).tolist() == pytest.approx([0.5, 0.880797])


def test_layers_are_blocks_and_each_has_its_share():
    """Three blocks of q, v and up: two each; what lies outside of every block is a layer of its own."""
    _, _, adapted = built(model=Blocks())
    found = pairs(adapted)
    for i in range(3):
        assert sum(found[f"blocks.{i}.{n}"].rank == 4 for n in ("q", "v", "up")) == 2
    assert adapted.adapter.counters() == {"modules": 9, "modules_selected": 6, "pairs": 6, "rank_total": 24}
    assert part(adapted).gamma.std() > 0
    _, _, across = built(model=Blocks(), scope="model", selected=0.34)
    assert sum(low.rank > 0 for low in pairs(across).values()) == 3
    assert sum(low.rank > 0 for low in pairs(built()[2]).values()) == 4


def test_with_every_module_selected_it_is_lora():
    base, data, adapted = built(selected=1.0)
    lora = attached("lora", base, data)
    assert same(adapted.adapter.export(), lora.adapter.state_dict()), "the search leaves the start as it was"
    losses = [train(m, data, m.optimizer(adamw, 6), steps=6) for m in (adapted, lora)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("unselected", ["none", "shared"])
def test_attaching_changes_nothing(unselected):
    base, _, adapted = built(model=Blocks(), unselected=unselected)
    x = torch.randn(5, 12)
    assert torch.equal(adapted(x), base(x))


def shared(**budget):
    """All that was not selected: one module a block, so a q, a v or an up of three blocks."""
    base, data, adapted = built(model=Blocks(), unselected="shared", selected=0.3, **budget)
    groups = {}
    for (name, low), own in zip(pairs(adapted).items(), part(adapted).selected.tolist(), strict=True):
        if not own:
            groups.setdefault(name.split(".")[-1], []).append(low)
    assert any(len(g) > 1 for g in groups.values())
    return base, data, adapted, groups


def test_shared_pairs_are_one_pair_counted_once():
    """Same storage, one parameter, a gradient that is the sum over its uses."""
    base, data, adapted, groups = shared()
    for lows in groups.values():
        assert len({(low.A.data_ptr(), low.B.data_ptr()) for low in lows}) == 1
    own = int(part(adapted).selected.sum())
    assert adapted.adapter.counters()["pairs"] == own + len(groups)
    assert adapted.num_trainable() == sum(p.numel() for p in {q for low in pairs(adapted).values() for q in (low.A, low.B)})
    perturb(adapted.adapter, 1.0)
    loss(adapted, data(1)[0]).backward()
    apart = copy.deepcopy(adapted)
    with torch.no_grad():
        for low in pairs(apart).values():
            low.A, low.B = (torch.nn.Parameter(p.detach().clone()) for p in (low.A, low.B))
    loss(apart, data(1)[0]).backward()
    names = list(pairs(adapted))
    for lows in groups.values():
        uses = [n for n in names if any(pairs(adapted)[n] is low for low in lows)]
        for k in "AB":
            assert close(getattr(lows[0], k).grad, sum(getattr(pairs(apart)[n], k).grad for n in uses), 5)


def test_shared_pairs_stay_shared_through_save_load_resume_copy_and_merge(tmp_path):
    base, data, straight, groups = shared()
    optimizer = straight.optimizer(adamw, 8)
    train(straight, data, optimizer, steps=4)
    checkpoint.save(straight, tmp_path / "a", {"step": 4}, optimizer)
    want = train(straight, data, optimizer, start=4, steps=8)
    again = Adapted(copy.deepcopy(base), straight.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    again.begin(data, loss)
    optimizer = again.optimizer(adamw, 8)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=4, steps=8) == want
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    x = torch.randn(5, 12)
    straight.save(tmp_path / "b")
    loaded = load(copy.deepcopy(base), tmp_path / "b")
    for twin in (again, loaded, copy.deepcopy(straight)):
        assert torch.equal(twin(x), straight(x)) and twin.num_trainable() == straight.num_trainable()
        assert twin.adapter.counters() == straight.adapter.counters()
    y = straight(x)
    straight.merge()
    assert close(straight(x), y)


def test_the_cards_count():
    """RoBERTa-base, q, k, v, o, r = 8, half selected, one module of each kind left over somewhere: 344,064, LoRA 589,824."""
    targets = ["query", "key", "value", "attention.output.dense"]
    options = {"rank": 8, "target_modules": targets, "trained_modules": []}
    adapted = Adapted(copy.deepcopy(roberta_base()), registry.config("diffora", budget={"unselected": "shared"}, **options))
    assert adapted.num_trainable() == 589_824
    part(adapted).selected.copy_(torch.tensor([True, True, False, False, False, False, True, True] * 6))
    part(adapted).drop()
    assert adapted.num_trainable() == 344_064


@pytest.mark.parametrize("spelling", ["diffora+pissa", "diffora+relora", "melora+diffora"])
def test_sharing_refuses_what_moves_pairs_one_by_one(spelling):
    with pytest.raises(UserError, match="unselected='shared'"):
        built(spelling, unselected="shared")


@pytest.mark.parametrize(("options", "said"), [
    ({"selected": 0.0}, "selected is 0.0"), ({"selected": 1.5}, "selected is 1.5"), ({"scope": "row"}, "layer, model"),
    ({"relax": "tanh"}, "sigmoid, softmax"), ({"unselected": "one"}, "none, shared"), ({"steps": 0}, "steps is 0"),
    ({"held_out": 1.0}, "held_out is 1.0"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("diffora", budget=options)


def test_it_starts_from_data():
    with pytest.raises(UserError, match="'diffora' starts from data"):
        attach(Net(), "diffora")
