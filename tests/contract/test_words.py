"""What a structure says that it gives is what it builds; what the registry refuses, it refuses for a reason."""

import copy

import pytest
import torch
from composites import of, sized
from support import Net, Regression, attached, close, linear_sites, perturb

from lorafactory import Delta, LowRank, UserError, registry


def built(name):
    """A perturbed adapter and the deltas of its linear sites."""
    torch.manual_seed(0)
    base = Net()
    adapted = attached(name, base, Regression(base))
    perturb(adapted.adapter, 0.2)
    return adapted, list(linear_sites(adapted))


def reads_input(adapted, deltas) -> bool:
    """Without some columns of every A, an update must be blind to those inputs; a router is not, so only shapes tell."""
    pairs = list(adapted.adapter.low_ranks())
    if not pairs or any(low.A.shape[1] != s.d_in for s, low in pairs):
        return False
    saved = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    with torch.no_grad():
        for _, low in pairs:
            low.A[:, 3] = 0
    blind = True
    for s, d in deltas:
        x = torch.randn(4, s.d_in)
        other = x + 2 * torch.eye(s.d_in)[3]
        blind &= not d.mergeable or close(d(x, s.base) - s.base(x), d(other, s.base) - s.base(other))
    adapted.adapter.load_state_dict(saved)
    return blind


@pytest.mark.parametrize("name", registry.names("structure"))
def test_gives_is_what_is_built(name):
    adapted, deltas = built(name)
    cls, found = registry.get(name), set()
    if any(adapted.adapter.low_ranks()):
        found.add("low_rank")
        if reads_input(adapted, deltas):
            found.add("input")
    if any(adapted.adapter.dense()):
        found.add("dense")
    if deltas and all(d.mergeable and type(d).weight is not Delta.weight for _, d in deltas):
        found.add("weight")
    if deltas and all(d.factors() is not None for _, d in deltas):
        found.add("additive")
    assert found == set(cls.gives)


@pytest.mark.parametrize("name", [n for n in registry.names("structure") if "additive" in registry.get(n).gives])
def test_additive_structures_are_additive(name):
    adapted, deltas = built(name)
    for s, d in deltas:
        b, a = d.factors()
        assert close(b @ a, d.weight(s.base) - s.base.weight, 2)
        if low := [m for m in d.modules() if isinstance(m, LowRank)]:
            assert close(sum(m.product() for m in low), b @ a)
        d.randomize()
        b, a = d.factors()
        assert (b @ a).abs().max() > 0, "a wrapper holds the update at zero, so it must be random"


@pytest.mark.parametrize("name", [n for n in registry.names("structure") if "dense" in registry.get(n).gives])
def test_dense_structures_train_weights(name):
    adapted, deltas = built(name)
    shapes = {s.name: p.shape for s, p in adapted.adapter.dense()}
    assert shapes == {s.name: s.base.weight.shape for s, _ in deltas}


@pytest.mark.parametrize("name", registry.names())
def test_words_are_known(name):
    cls = registry.get(name)
    words = {"low_rank", "input", "dense", "weight", "additive"}
    assert set(cls.needs) <= words and set(getattr(cls, "gives", ())) <= words
    assert cls.axis in registry.AXES and set(cls.also) <= set(registry.AXES)
    assert cls.paper and (cls.__doc__ or "").strip(), "the catalogue prints both"
    facts = set().union(*(registry.get(n).does for n in registry.names()))
    assert set(cls.minds) <= facts, "minds what nobody does"


@pytest.mark.parametrize("name", registry.names())
def test_every_name_stands_alone(name):
    assert name in of(1) and registry.spell(registry.config(name)) == name


def test_refusals_name_both_and_say_what_would_work():
    """B12: one line for every illegal pair, before anything is built."""
    refused = 0
    for i, a in enumerate(registry.names()):
        for b in registry.names()[i + 1 :]:
            try:
                registry.config(f"{a}+{b}")
            except UserError as e:
                refused += 1
                text = str(e)
                assert repr(b) in text or repr(a) in text
                assert "\n" not in text and ("drop one" in text or "these have:" in text), text
    assert refused > 0


def test_order_of_typing_does_not_matter():
    for spelling in sized(1, 3):
        names = spelling.split("+")
        assert registry.spell(registry.config("+".join(reversed(names)))) == spelling


def test_a_part_config_of_another_variant_is_refused():
    """A ready config under the wrong name would silently train another variant than the one that was asked for."""
    inits = registry.names("init")
    if len(inits) < 2:
        pytest.skip("one initialisation only")
    with pytest.raises(UserError, match=inits[0]):
        registry.config(inits[0], init=registry.get(inits[1]).Config())
    own = registry.get(inits[0]).Config()
    assert registry.config(inits[0], init=own).init == own


@pytest.mark.parametrize("name", registry.names())
def test_loading_into_another_variant_is_refused_or_means_the_same(name):
    """B22: tensors that find no place, or a place without its tensor, are an error; never another function in silence."""
    torch.manual_seed(0)
    base = Net()
    data, x = Regression(base), torch.randn(3, 5, 24)
    source = attached(name, base, data, trained_modules=["head"]).eval()
    perturb(source.adapter, 0.1)
    y, state = source(x), {n: t.clone() for n, t in source.adapter.state_dict().items()}
    for other in registry.names():
        target = attached(other, base, data, seed=6, trained_modules=["head"]).eval()
        before, y_before = copy.deepcopy(target.adapter.state_dict()), target(x)
        try:
            target.adapter.load(state)
            assert close(target(x), y), f"{name} loads into {other} as another function"
        except UserError as e:
            assert str(e).count("\n") == 0 and "cannot load" in str(e)
            assert all(torch.equal(t, before[n]) for n, t in target.adapter.state_dict().items()) and torch.equal(
                target(x), y_before
            )
