"""B12, B14: every option of every variant does something, and what makes no sense is refused before training."""

import ast
import copy
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, loss, needs_head, on_linear, small, told, train

from lorafactory import UserError, registry

STEPS = 8
OPTIONS = [
    (n, f.name)
    for n in registry.names()
    for f in fields(registry.get(n).Config)
    if f.name not in ("name", *registry.PARTS)
]
# of what is not linear the base has one layer: no choice
CHOICE = [(n, o) for n, o in OPTIONS if o != "target_modules" or on_linear(registry.parse(n)[0].name)]


def outcome(name: str, options: dict[str, Any]) -> tuple:
    """What a short run leaves: losses, tensors, optimiser groups, rates, counters, truncations, ranks and scales. Of a
    continual learner it has three stages."""
    if (own := getattr(told(name), "outcome", None)) is not None:
        return own(options)
    torch.manual_seed(0)
    base = Net()
    data, x = Regression(base), torch.randn(3, 5, 24)
    adapted = attached(name, base, data, **options)
    optimizer = adapted.optimizer(adamw, STEPS)
    first = [{k: v for k, v in g.items() if k != "params"} | {"n": len(g["params"])} for g in optimizer.param_groups]
    losses = train(adapted.train(), data, optimizer, steps=STEPS)
    adapted.end()
    stages = 3 if "continual" in {a for c in registry.parse(name) for a in (c.axis, *c.also)} else 1
    for index in range(1, stages):
        data = Regression(base, index + 1)
        begun(adapted, data, index)
        losses += train(adapted, data, adapted.optimizer(adamw, STEPS), steps=STEPS)
        adapted.end()
    about = (
        type(optimizer).__name__,
        str(first),
        str(losses),
        str(adapted.adapter.describe()),
        str(adapted.adapter.counters()),
        str(sorted(adapted.adapter.truncations())),
    )
    state = {n: t.tolist() for n, t in adapted.adapter.state_dict().items()}
    return (*about, str(state), str(adapted.eval()(x).tolist()))


def merged(name: str, **own: Any) -> dict[str, Any]:
    """small(), and options of this variant in their place: its own under its axis, the structure's at the root."""
    cls = registry.get(name)
    made = small(name)
    for key, value in own.items():
        if cls.axis != "structure" and key in cls.Config.__dataclass_fields__:
            made[cls.axis] = {**made.get(cls.axis, {}), key: value}
        else:
            made[key] = value
    return made


def now(name: str, option: str) -> Any:
    made = merged(name)
    cls = registry.get(name)
    given = made if cls.axis == "structure" else made.get(cls.axis, {})
    return given.get(option, getattr(cls.Config(), option))


def guesses(name: str, option: str) -> list[Any]:
    """Other values of the option's type."""
    value, kind = now(name, option), str(registry.get(name).Config.__dataclass_fields__[option].type)
    if option == "target_modules":
        return [["fc1"]]
    if option == "trained_modules":
        return [["head"] if not needs_head(registry.parse(name)[0].name) else ["head", "fc1"]]
    if isinstance(value, bool):
        return [not value]
    if "Dict" in kind or isinstance(value, dict):
        return [{"fc1": 2}]
    if isinstance(value, str) or (value is None and "str" in kind):
        tree = ast.parse(inspect.getsource(inspect.getmodule(registry.get(name))))
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return sorted(w for w in words if w.isidentifier() and w != value)
    if isinstance(value, int) and "float" not in kind:
        return list(dict.fromkeys(v for v in (value + 1, value * 2, value // 2, value - 1, 1, 2, 3, 0) if v != value))
    numbers = (
        (0.0, 0.1, 0.5, 0.9, 1.0, 2.0) if value is None else (value * 2, value / 2, value + 0.1, 0.5, 0.1, 0.0, 1.0)
    )
    return [v for v in numbers if v != value]


@pytest.mark.parametrize("name, option", CHOICE)
def test_option_acts_B12_B14(name, option):
    values, given = getattr(told(name), "CHANGES", {}).get(option, (None, {}))
    before = outcome(name, merged(name, **given))
    tried = {}
    for value in guesses(name, option) if values is None else values:
        try:
            after = outcome(name, merged(name, **given, **{option: value}))
        except UserError as e:
            if f"{option}=" in str(e) and "no meaning" in str(e):
                return  # this variant has no use for an option that all have, and says so
            tried[str(value)] = str(e)
            continue
        if after != before:
            return
        tried[str(value)] = "no change"
    raise AssertionError(f"{name}.{option} = {now(name, option)!r} does nothing: {tried}")


@pytest.mark.parametrize("name, option", OPTIONS)
def test_nonsense_is_refused(name, option):
    cls = registry.get(name)
    kind, value = str(cls.Config.__dataclass_fields__[option].type), now(name, option)
    wrong = [object(), "no_such_thing"] if not isinstance(value, dict) else ["no_such_thing", {"no_such_layer": 2}]
    if option == "target_modules":
        wrong = [[], 3, [3], "", ["no_such_layer"], "("]
    elif option == "trained_modules":
        wrong = ["no_such_layer", ["no_such_layer"]]
    elif isinstance(value, float) or "float" in kind:
        wrong.append(float("nan"))
    for w in wrong:
        base = Net()
        state = {n: t.clone() for n, t in base.state_dict().items()}
        with pytest.raises(UserError) as e:
            attached_in_place(name, base, merged(name, **{option: w}))
        assert "\n" not in str(e.value)
        assert type(base.fc1) is torch.nn.Linear and all(p.requires_grad for p in base.parameters())
        assert all(torch.equal(t, state[n]) for n, t in base.state_dict().items())


def attached_in_place(name, base, options):
    from lorafactory import attach

    return attach(base, name, batches=Regression(copy.deepcopy(base)), loss=loss, **options)


@pytest.mark.parametrize("name", registry.names())
def test_an_unknown_option_is_refused_by_name(name):
    cls = registry.get(name)
    near = next((f.name for f in fields(cls.Config) if f.name not in ("name", *registry.PARTS)), None)
    options = {"no_such_option": 1} if cls.axis == "structure" else {cls.axis: {"no_such_option": 1}}
    with pytest.raises(UserError, match="no_such_option"):
        registry.config(name, **options)
    if near is not None:
        wrong = near + "s"
        with pytest.raises(UserError, match=near):
            registry.config(name, **({wrong: 1} if cls.axis == "structure" else {cls.axis: {wrong: 1}}))
