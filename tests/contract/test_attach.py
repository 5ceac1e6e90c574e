"""attach and detach around everything else that a user does with a model: once, twice, in the wrong order, and failing."""

import contextlib
import copy
import tempfile

import pytest
import torch
import torch.nn as nn
from support import (
    Net,
    Regression,
    adamw,
    attached,
    cloned,
    close,
    loss,
    needs_head,
    on_linear,
    perturb,
    same,
    small,
    train,
)

from lorafactory import Adapted, UserError, attach, registry

NAMES = registry.names()
HUNGRY = [n for n in NAMES if any(c.data for c in registry.parse(n))]


def setting(transposed=False):
    torch.manual_seed(0)
    base = Net(transposed)
    return base, Regression(base), torch.randn(3, 5, 24)


def untouched(base, pristine):
    assert {type(m) for m in base.modules()} <= {Net, nn.Linear, nn.LayerNorm}
    assert same(base.state_dict(), pristine) and all(p.requires_grad and p.grad is None for p in base.parameters())
    assert not any("_held" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_one_base_serves_a_whole_sweep():
    base, data, x = setting()
    pristine, y = cloned(base.state_dict()), base(x)
    for name in NAMES:
        adapted = attach(base, name, batches=data, loss=loss, seed=1, **small(name))
        train(adapted, data, adapted.optimizer(adamw, 8), steps=2)
        perturb(adapted.adapter)
        if adapted.adapter.mergeable:
            adapted.merge()
        assert adapted.detach() is base
        untouched(base, pristine)
        assert torch.equal(base(x), y)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("name", NAMES)
def test_begin_leaves_no_gradients_hooks_or_modes(name):
    base, data, _ = setting()
    base.norm.eval()
    adapted = attach(base, name, batches=data, loss=loss, seed=1, **small(name))
    assert all(p.grad is None for p in adapted.parameters())
    new = Adapted(setting()[0], adapted.adapter.config)  # a part may watch its deltas while it trains
    for m, fresh in ((adapted.model, new.model), (adapted.adapter, new.adapter)):
        assert hooks(m) <= hooks(fresh)
    assert base.fc1.training is not needs_head(registry.parse(name)[0].name) and not base.norm.training
    base.eval()
    adapted.detach()
    assert base.fc1.training and not base.norm.training, "detach gives back the modes that attach found"


@pytest.mark.parametrize("name", HUNGRY)
def test_a_start_from_data_that_fails_leaves_the_model_alone(name):
    measured = []

    def broken(model, batch):
        measured.append(loss(model, batch))
        raise RuntimeError("no more memory")

    for given, error in (
        ({"loss": broken}, RuntimeError),
        ({"loss": loss, "batches": []}, UserError),
        ({"batches": None}, UserError),
    ):
        base, data, x = setting()
        pristine = cloned(base.state_dict())
        try:
            attach(base, name, **{"batches": data, "seed": 1} | given, **small(name))
        except error:
            untouched(base, pristine)
        else:
            assert error is RuntimeError and not measured, "only what asks for the loss while it trains starts without it"


def test_misuse_is_told_and_changes_nothing():
    base, data, x = setting()
    adapted = attached("lora", base, data)
    perturb(adapted.adapter, 0.3)
    y = adapted(x)
    with adapted.disabled() as plain:
        assert plain is adapted.model
        for call in (adapted.merge, adapted.detach, adapted.bake):
            with pytest.raises(UserError, match="inside disabled"):
                call()
        with adapted.disabled():
            pass
        assert torch.equal(adapted(x), base(x)), "the inner one does not end the outer one"
    with contextlib.suppress(ZeroDivisionError), adapted.disabled():
        raise ZeroDivisionError
    assert torch.equal(adapted(x), y)
    with pytest.raises(UserError, match="already has an adapter"):
        attach(adapted, "lora")
    with pytest.raises(UserError, match="bake"):
        adapted.save_pretrained("nowhere")
    model = adapted.detach()
    assert adapted.detach() is model
    for call in (adapted.merge, adapted.bake, lambda: adapted.disabled().__enter__()):
        with pytest.raises(UserError, match="detached"):
            call()
    with pytest.raises(UserError, match="options rank beside a ready config"):
        attach(model, registry.config("lora"), rank=2)


@pytest.mark.parametrize("name", HUNGRY)
def test_a_loaded_start_needs_no_batches_again(name):
    base, data, x = setting()
    first, again = attached(name, base, data), Adapted(copy.deepcopy(base), attached(name, base, data).adapter.config, seed=9)
    with pytest.raises(UserError, match="batches"):
        again.begin()
    again.adapter.load(first.adapter.state_dict())
    assert close(again.begin()(x), first(x))


def test_what_a_stage_draws_depends_on_the_seed_and_the_stage(monkeypatch):
    adapted, drawn = attach(setting()[0], "lora", seed=3), []
    for hook in ("begin", "end"):
        monkeypatch.setattr(adapted.adapter, hook, lambda stage: drawn.append(torch.rand(1)))
    before = torch.get_rng_state()
    for index in (0, 1):
        adapted.begin(index=index).end()
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn == [torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4, 4)]


def test_a_stage_reads_as_many_batches_as_it_asks_for_and_their_mask():
    stage = attach(setting()[0], "lora", batches=[{"attention_mask": k} for k in range(5)])._stage
    assert [stage.mask(batch) for batch in stage.batches(2)] == [0, 1]
    assert stage.mask({}) is None and stage.mask(torch.ones(1)) is None


def test_a_trained_head_is_no_target_and_counts_apart():
    adapted = attach(setting()[0], "lora", target_modules=["all"], trained_modules=["head"], rank=2)
    assert {s.name for s in adapted.adapter.sites} == {"fc1", "fc2", "fc3"}
    total = sum(p.numel() for p in adapted.adapter.parameters() if p.requires_grad)
    assert adapted.cost()["head_parameters"] == 24 * 8 + 8 == total - adapted.cost()["adapter_parameters"]


def test_an_adapter_takes_the_mode_of_its_model():
    assert attach(setting()[0], "lora").adapter.training
    evaluated = attach(setting()[0].eval(), "lora")
    assert not evaluated.training and not evaluated.adapter.training


def test_where_the_base_cannot_wait_in_a_file(monkeypatch):
    base, _, _ = setting()
    pristine = cloned(base.state_dict())
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(UserError, match="TMPDIR"):
        attach(base, "full")
    untouched(base, pristine)


def test_parameters_outside_every_layer_are_not_passed_over():
    class Owner(Net):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    for name in registry.names("structure"):
        cls = registry.get(name)
        if cls.Config().target_modules == ["all"] and cls.fits(Owner()):
            with pytest.raises(UserError, match="itself owns parameters"):
                attach(Owner(), name)
            assert attach(nn.Sequential(Owner()), name).cost()["adapter_parameters"] == sum(
                p.numel() for p in Owner().parameters()
            )


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Computes what nn.Linear does."""


@pytest.mark.parametrize("name", [n for n in registry.names("structure") if on_linear(n)])
def test_what_only_looks_like_a_linear_layer(name):
    """A subclass with another forward and a computed weight: refused by name, left out of all-linear, or exact."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
    options = {k: v for k, v in small(name).items() if k not in ("target_modules", "trained_modules")}
    for layer in (Doubled(24, 24), normed, Renamed(24, 24)):
        base = nn.Sequential(nn.Linear(24, 24), layer, nn.Linear(24, 24))
        kind, x = type(layer), torch.randn(3, 24)
        y0 = base(x).detach()
        for wanted in (["1"], ["0", "2"], r"\d"):
            heads = ["2"] if needs_head(name) else []
            try:
                given = {} if needs_head(name) else {"target_modules": wanted}
                adapted = attach(copy.deepcopy(base), name, trained_modules=heads, seed=1, **given, **options)
            except UserError as e:
                assert "cannot adapt" in str(e) or "cannot be adapted" in str(e) or name == "ia3", e
                assert kind is not Renamed
                continue
            assert close(adapted(x), y0) or not registry.parse(name)[0].zero_start
            perturb(adapted.adapter, 0.3)
            y = adapted(x).detach()
            if adapted.adapter.mergeable:
                adapted.merge()
                assert close(adapted(x), y, 5), (kind, wanted)
                adapted.unmerge()
            assert torch.equal(adapted.detach()(x), y0)


def test_a_forward_replaced_on_the_instance_is_refused():
    """As accelerate's device_map hooks do: the adapter would never be called."""
    base, _, _ = setting()
    pristine = cloned(base.state_dict())
    base.fc2.forward = base.fc2.forward
    with pytest.raises(UserError, match="device_map"):
        attach(base, "lora", rank=2)
    del base.fc2.forward
    untouched(base, pristine)


@pytest.mark.parametrize("name", NAMES)
def test_dynamo_sees_one_graph(name):
    base, data, x = setting()
    adapted = attached(name, base, data)
    perturb(adapted.adapter, 0.1)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    for mode in (True, False):
        adapted.train(mode)
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        assert close(adapted(x), y)
    with adapted.disabled():
        assert torch.equal(compiled(x), adapted.model(x)), "a compiled model does not see that it is disabled"
    torch._dynamo.reset()
