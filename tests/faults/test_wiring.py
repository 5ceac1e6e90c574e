"""WIRING: an option that is accepted acts. (tests/contract/test_options.py holds B12 and B14 over every single option.)"""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, perturb, small, told, train

from lorafactory import UserError, attach, registry

NAMES = registry.names()
PARTS = [n for a in registry.PARTS for n in registry.names(a)]
RANKED = [n for n in registry.names("structure") if "rank_pattern" in registry.get(n).Config.__dataclass_fields__]
LAYERS = ["fc1", "fc2", "fc3"]


def run(spelling, steps=8, seed=5, **options):
    """(losses, adapted) of a short run."""
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached(spelling, base, data, seed=seed, **options)
    return train(adapted.train(), data, adapted.optimizer(adamw, steps), steps=steps), adapted


@pytest.mark.parametrize("name", NAMES)
def test_B12_the_variant_asked_for_is_the_one_built(name):
    """Classes from the variant's own module stand in the adapter, and its config is the one that was given."""
    config = registry.config(name, **small(name))
    torch.manual_seed(0)
    base = Net()
    adapted = attach(base, config, batches=Regression(base), loss=lambda m, b: m(b["x"]).square().mean(), seed=1)
    cls = registry.get(name)
    parts = {type(p): p for p in adapted.adapter.all_parts()}
    assert cls in parts and parts[cls].config is (config if cls.axis == "structure" else getattr(config, cls.axis))
    assert adapted.variant == name == registry.spell(config)
    for delta in adapted.adapter.deltas.values() if cls.axis in ("structure", *registry.WRAPPING) else ():
        modules = {type(m).__module__ for m in delta.modules()}
        assert cls.__module__ in modules or not adapted.adapter.mergeable or is_copy(delta), modules


def is_copy(delta):
    return type(delta).__name__ == "Copy"


@pytest.mark.parametrize("name", PARTS)
def test_B14_a_part_changes_the_run(name):
    """Same seed, same structure, without the part: another run. Equal losses to the digit mean that it did not act."""
    structure = registry.parse(name)[0].name
    options = {k: v for k, v in small(name).items() if k not in registry.PARTS}
    alone, _ = run(structure, 12, **options)
    with_it, _ = run(name, 12)
    assert alone != with_it


@pytest.mark.parametrize("over", [n for n in PARTS if registry.parse(n)[0].name in RANKED])
@pytest.mark.parametrize(("option", "values"), [("alpha", (8.0, 32.0)), ("dropout", (0.0, 0.5)), ("rank", (2, 4))])
def test_B14_alpha_dropout_and_rank_act_under_every_part(over, option, values):
    a, b = (run(over, **{option: v})[0] for v in values)
    assert a != b


@pytest.mark.parametrize("name", NAMES)
def test_B14_all_that_is_declared_trainable_moves(name):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached(name, base, data, trained_modules=["head"])
    before = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters() if p.requires_grad}
    train(adapted.train(), data, adapted.optimizer(adamw, 12), steps=12)
    idle = tuple(f"deltas.{k}." for k in adapted.adapter.idle())
    after = dict(adapted.adapter.named_parameters())
    still = [
        n for n, p in before.items() if p.numel() and not n.startswith(idle) and n in after and torch.equal(p, after[n])
    ]
    assert not still


@pytest.mark.parametrize("name", RANKED)
def test_B13_rank_and_alpha_tables_are_resolved_apart(name):
    """A broad entry in one table, a narrow and anchored one in the other; rank, alpha and scale are told per layer."""
    tall = getattr(told(name), "TALL", getattr(registry.get(name).Config(), "experts", 1))
    total = getattr(told(name), "TOTAL", 1)
    torch.manual_seed(0)
    adapted = attach(
        Net(), name, rank=4, alpha=8.0, target_modules=LAYERS, rank_pattern={r"fc\d": 2}, alpha_pattern={"^fc2$": 32.0}
    )
    found = {a["name"]: (a["rank"] / total, a["scale"]) for a in adapted.adapter.describe()}
    assert found == {"fc1": (2, 4.0), "fc2": (2, 16.0), "fc3": (2, 4.0)}
    pairs = adapted.adapter.low_ranks() if total == 1 else ()
    assert all(low.A.shape[0] == 2 and low.B.shape[0] == tall * s.d_out for s, low in pairs)
    other = attach(
        Net(), name, rank=4, alpha=8.0, target_modules=LAYERS, rank_pattern={"fc1": 2}, alpha_pattern={"fc.*": 4.0}
    )
    found = {a["name"]: (a["rank"] / total, a["scale"]) for a in other.adapter.describe()}
    assert found == {"fc1": (2, 2.0), "fc2": (4, 1.0), "fc3": (4, 1.0)}


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("name", RANKED)
def test_B13_an_entry_that_matches_nothing_or_twice_is_an_error(name, table):
    for wrong, said in (
        ({"nope": 2}, "'nope' matches no adapted layer"),
        ({"fc1": 2, "fc.*": 3}, "both match fc1"),
        ({"head": 2}, "'head' matches no adapted layer"),
        ({"(": 2}, "regular expression"),
        ({"fc1": 0}, "fc1"),
    ):
        model = Net()
        with pytest.raises(UserError) as e:
            attach(model, name, rank=4, target_modules=LAYERS, trained_modules=["head"], **{table: wrong})
        assert said in str(e.value) and "\n" not in str(e.value)
        assert type(model.fc1) is nn.Linear and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="25.*fc"):
        attach(Net(), name, target_modules=LAYERS, rank_pattern={"fc1": 25})


@pytest.mark.parametrize("name", NAMES)
def test_B15_a_penalty_is_there_and_told_when_forgotten(name):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached(name, base, data)
    if not adapted.adapter.has_penalty:
        assert adapted.penalty() == 0.0
        return
    perturb(adapted.adapter, 0.3)
    adapted(data(1)[0]["x"])
    penalty = adapted.penalty()
    assert float(penalty) > 0 and penalty.requires_grad
    optimizer = adapted.optimizer(adamw, 8)
    adapted.adapter.__dict__.pop("penalty_taken", None)
    adapted(data(1)[0]["x"]).square().mean().backward()
    before = copy.deepcopy(adapted.adapter.state_dict())
    with pytest.raises(UserError, match="penalty"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in adapted.adapter.state_dict().items())
    (adapted(data(1)[0]["x"]).square().mean() + adapted.penalty()).backward()
    optimizer.step()
    assert optimizer.lifecycle.index == 1, "a refused step leaves the hooks in order"


@pytest.mark.parametrize("name", registry.names("budget"))
def test_B15_ranks_fall_as_planned_and_are_counted(name):
    before = sum(low.rank for _, low in attached_ranks(name, 0)[0].adapter.low_ranks())
    adapted, _ = attached_ranks(name, 16)
    adapted.end()
    counted = adapted.adapter.counters()
    after = sum(low.rank for _, low in adapted.adapter.low_ranks())
    assert after <= max(before, counted.get("rank_target", 0)) and counted, "no counter proves that the method acted"
    assert after in [int(v) for v in counted.values()]


def attached_ranks(name, steps):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached(name, base, data)
    if steps:
        train(adapted, data, adapted.optimizer(adamw, steps), steps=steps)
    return adapted, data


def test_B15_hooks_run_in_any_loop_and_a_wrong_total_is_told():
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached("lora", base, data)
    optimizer = adapted.optimizer(adamw, 2)
    train(adapted, data, optimizer, steps=2)
    with pytest.raises(UserError, match="step 3 of 2"):
        train(adapted, data, optimizer, steps=1)
