"""MATH: gradients reach the adapter, and its numbers are float32 whatever the base. (B35 on and off: tests/contract.)"""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, loss, needs_head, perturb, same, small, train
from transformers import GPT2Config, GPT2LMHeadModel

from lorafactory import attach, load, registry

NAMES = registry.names()
BACKBONES = [n for n in NAMES if not needs_head(registry.parse(n)[0].name)]


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", BACKBONES)
def test_B35_labels_on_the_last_tokens_reach_every_layer(name, checkpointing):
    """A causal model whose loss reads three tokens of a row: after step 2 every layer has had a gradient."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, n_positions=16, n_embd=24, n_layer=2, n_head=2, initializer_range=0.2)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    ids = torch.randint(0, 30, (64, 8))
    labels = torch.where(torch.arange(8) >= 5, ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    options = {k: v for k, v in small(name).items() if k != "target_modules" or name.startswith("ia3")}
    adapted = attach(model, name, batches=[batch, batch], seed=1, **options).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = adapted.optimizer(adamw, 8)
    reached = set()
    for _ in range(2):
        (adapted(**batch).loss + adapted.penalty()).backward()
        for key, delta in adapted.adapter.deltas.items():
            shared = [m for part in delta.modules() for m in vars(part).values() if isinstance(m, nn.Module)]
            owned = [p for m in (delta, *shared) for p in m.parameters()]
            if any(p.grad is not None and p.grad.any() for p in owned):
                reached.add(key)
        optimizer.step()
        optimizer.zero_grad()
    assert set(adapted.adapter.deltas) - adapted.adapter.idle() == reached


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_B36_one_policy_of_dtypes(name, dtype, autocast, tmp_path):
    """Adapter, head and optimiser state are float32, fresh and resumed; in and out a layer has the base's dtype."""
    torch.manual_seed(0)
    base = Net().to(dtype)
    data, x = Regression(base), torch.randn(3, 5, 24).to(dtype)
    fresh = attached(name, base, data, trained_modules=["head"])
    perturb(fresh.adapter)
    fresh.save(tmp_path)
    for adapted in (fresh, load(copy.deepcopy(base), tmp_path)):
        optimizer = adapted.optimizer(adamw, 8)
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
            train(adapted.train(), data, optimizer, steps=2)
            assert torch.isfinite(loss(adapted.eval(), data(1)[0]))
        assert {p.dtype for p in adapted.adapter.parameters()} == {torch.float32}
        state = [
            t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.is_floating_point()
        ]
        assert state and {t.dtype for t in state} == {torch.float32}
        assert all(p.dtype == dtype for p in adapted.model.parameters())
        if not autocast:
            assert adapted(x).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_B36_penalties_hooks_and_steps_ignore_autocast(name):
    """Gram products, norms and a variant's own optimiser: the same bits whether the loop around them is in autocast."""
    states = []
    for autocast in (False, True):
        torch.manual_seed(0)
        base = Net()
        data = Regression(base)
        adapted = attached(name, base, data)
        optimizer = adapted.optimizer(adamw, 8)
        for batch in data(6):
            task = loss(adapted, batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                penalty = adapted.penalty()
            optimizer.zero_grad()
            (task + penalty).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                torch.manual_seed(1)
                optimizer.step()
        states.append(adapted.adapter.state_dict())
    assert same(*states)


@pytest.mark.parametrize("name", NAMES)
def test_B36_a_step_moves_float32_numbers_where_bfloat16_would_stand(name):
    """At a small rate a step is far below bfloat16's spacing; every entry with a gradient moves all the same."""
    torch.manual_seed(0)
    base = Net().bfloat16()
    data = Regression(base)
    adapted = attached(name, base, data, trained_modules=["head"])
    before = {n: p.detach().clone() for n, p in adapted.adapter.trained.named_parameters()}
    train(adapted, data, adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-5, weight_decay=0.0), 8), steps=1)
    moved = [(p != before[n]).float().mean() for n, p in adapted.adapter.trained.named_parameters()]
    assert min(moved) > 0.9


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", BACKBONES)
def test_B65_zero_and_tiny_rows_stay_finite(name, dtype):
    torch.manual_seed(0)
    base = Net()
    with torch.no_grad():
        base.fc1.weight[3] = 0
        base.fc2.weight[:, 5] = 0
        base.fc3.weight[7] *= 1e-6
    base = base.to(dtype)
    data = Regression(base)
    adapted = attached(name, base, data)
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    perturb(adapted.adapter, 0.1)
    adapted.eval()
    x = torch.randn(3, 5, 24).to(dtype)
    y = adapted(x).detach()
    assert torch.isfinite(y).all() and all(torch.isfinite(p).all() for p in adapted.adapter.parameters())
    if adapted.adapter.mergeable:
        adapted.merge(dtype=torch.float32)
        assert torch.isfinite(adapted(x.float())).all() and close(adapted(x.float()), y, 2)


@pytest.mark.parametrize("name", NAMES)
def test_B39_the_start_is_a_function_of_the_seed(name):
    """So processes agree without telling each other: torch's own generator may stand anywhere."""
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    states = []
    for own in (1, 2):
        torch.manual_seed(own)
        states.append(attached(name, base, data, seed=7, trained_modules=["head"]).adapter.state_dict())
    assert same(*states)


@pytest.mark.parametrize("name", BACKBONES)
def test_evaluation_of_torchs_own_encoder_runs_the_adapter(name):
    """In evaluation nn.TransformerEncoder reads its layers' weights without calling them: the adapter must still act."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True)
    base = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "out": nn.Linear(24, 8)})
    base.forward = None
    x, padding = torch.randn(64, 4, 24), torch.zeros(64, 4).bool()
    padding[1, 2:] = True

    def call(model):
        return model["out"](model["body"](x, src_key_padding_mask=padding))[~padding]

    base.eval()
    with torch.no_grad():
        y0 = call(base)
    options = {k: v for k, v in small(name).items() if k != "target_modules"} | targets_of(name)
    adapted = attach(base, name, batches=[{}, {}], loss=lambda m, b: call(m.model).square().mean(), seed=1, **options)
    perturb(adapted.adapter, 0.5)
    ys = []
    for mode in (True, False):
        adapted.train(mode)
        with torch.no_grad():
            ys.append(call(base))
    apart = any("trains truncations" in p.does for p in adapted.adapter.all_parts())  # of what is evaluated
    assert (apart or close(*ys, 3)) and not close(ys[1], y0)
    with adapted.disabled(), torch.no_grad():
        assert torch.equal(call(base), y0)
    if adapted.adapter.mergeable:
        adapted.merge()
        with torch.no_grad():
            assert close(call(base), ys[1], 10)
    plain = adapted.detach()
    with torch.no_grad():
        assert torch.equal(call(plain), y0)


def targets_of(name):
    return {"target_modules": ["linear2", "out"]} if registry.parse(name)[0].name == "ia3" else {}
