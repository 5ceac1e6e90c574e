"""RESUME: going on from what was saved, whole or damaged. (Bit-equal resume of every composite: tests/contract.)"""

import copy
import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file
from support import Net, Regression, adamw, attached, begun, cloned, overall, perturb, same, train

from lorafactory import Adapted, Part, UserError, attach, checkpoint, load, registry
from lorafactory.resume import Checkpoints

NAMES = registry.names()
OWN = [n for n in registry.names("dynamics") if registry.get(n).optimizer is not Part.optimizer]


def setting(name, **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(name, base, data, **options)


@pytest.mark.parametrize("name", NAMES)
def test_B26_three_and_three_steps_are_six(name, tmp_path):
    """The loss goes on where it was, the tensors are equal bit for bit, and there is one adapter."""
    base, data, straight = setting(name)
    losses = train(straight, data, straight.optimizer(adamw, 6), steps=6)
    _, _, first = setting(name)
    optimizer = first.optimizer(adamw, 6)
    begin = train(first, data, optimizer, steps=3)
    checkpoint.save(first, tmp_path / "step", {"step": 3}, optimizer)
    again = Adapted(copy.deepcopy(base), first.adapter.config, seed=99)
    checkpoint.restore(again, tmp_path / "step")
    begun(again, data)
    optimizer = again.optimizer(adamw, 6)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "step")["step"]
    assert begin + train(again, data, optimizer, steps=6, start=3) == losses
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    assert again.adapter.counters() == straight.adapter.counters()
    with pytest.raises(UserError, match="already has an adapter"):
        load(again.model, tmp_path / "step")


DAMAGE = {
    "zero bytes of tensors": lambda f: (f / "adapter.safetensors").write_bytes(b""),
    "half of the tensors": lambda f: cut(f / "adapter.safetensors"),
    "no tensors": lambda f: (f / "adapter.safetensors").unlink(),
    "no about": lambda f: (f / "adapter.json").unlink(),
    "half an about": lambda f: cut(f / "adapter.json"),
    "an empty about": lambda f: (f / "adapter.json").write_text("{}"),
    "a list for an about": lambda f: (f / "adapter.json").write_text("[1]"),
    "a newer schema": lambda f: edit(f / "adapter.json", schema=99),
    "an unknown variant": lambda f: edit(f / "adapter.json", config={"name": "no_such_variant"}),
    "no variant": lambda f: edit(f / "adapter.json", config={}),
    "an unknown option": lambda f: edit(f / "adapter.json", config={"name": "lora", "no_such_option": 1}),
    "another head": lambda f: edit(f / "adapter.json", heads=["no_such_head"]),
    "no folder": lambda f: os.rename(f, f.with_name("elsewhere")),
}
RUN_DAMAGE = {
    "zero bytes of the optimiser": lambda f: (f / "optimizer.safetensors").write_bytes(b""),
    "no optimiser": lambda f: (f / "optimizer.safetensors").unlink(),
    "half a state": lambda f: cut(f / "state.json"),
    "no state": lambda f: (f / "state.json").unlink(),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_B28_a_damaged_checkpoint_is_refused_in_one_line(damage, tmp_path):
    base, _, adapted = setting("lora", trained_modules=["head"])
    adapted.save(tmp_path / "a")
    DAMAGE[damage](tmp_path / "a")
    plain, pristine = copy.deepcopy(base), cloned(base.state_dict())
    with pytest.raises(UserError) as e:
        load(plain, tmp_path / "a")
    assert "\n" not in str(e.value)
    assert same(plain.state_dict(), pristine) and all(p.requires_grad for p in plain.parameters())
    assert type(plain.fc1) is type(base.fc1)


class OneProcess:
    is_main_process, scaler = True, None

    def wait_for_everyone(self):
        pass


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGE if d not in ("another head", "no folder", "an unknown option")] + [*RUN_DAMAGE]
)
def test_B28_the_last_whole_checkpoint_is_used_and_the_skipped_named(damage, tmp_path, caplog):
    base, data, adapted = setting("lora")
    optimizer = adapted.optimizer(adamw, 9)
    expected = {}
    for step in (3, 6, 9):
        train(adapted, data, optimizer, steps=step, start=step - 3)
        checkpoint.save(adapted, tmp_path / f"step-{step:06d}", {"step": step}, optimizer)
        expected[step] = cloned(adapted.adapter.state_dict())
    (DAMAGE | RUN_DAMAGE)[damage](tmp_path / "step-000009")
    again = Adapted(copy.deepcopy(base), adapted.adapter.config, seed=1)
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path, again, OneProcess()).newest()
    if damage in ("an unknown variant", "no variant"):  # the run's own config counts, the file's is not read
        assert found.name == "step-000009" and same(again.adapter.state_dict(), expected[9])
        return
    assert found.name == "step-000006" and "step-000009" in caplog.text
    assert same(again.adapter.state_dict(), expected[6])


@pytest.mark.parametrize("broken", ["save_file", "rename", "second rename"])
def test_B28_a_save_that_fails_leaves_the_old_checkpoint(broken, tmp_path, monkeypatch):
    base, _, adapted = setting("lora")
    adapted.save(tmp_path / "a")
    y = adapted(torch.ones(2, 24))
    perturb(adapted.adapter, 0.5)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if broken == "second rename" and len(calls) != 2:
            return real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    real = os.rename
    monkeypatch.setattr(
        *((checkpoint, "save_file", fail) if broken == "save_file" else (checkpoint.os, "rename", fail))
    )
    with pytest.raises(UserError, match="No space left"):
        adapted.save(tmp_path / "a")
    monkeypatch.undo()
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a")(torch.ones(2, 24)), y)
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "something half-written is left"


def test_B28_a_folder_that_is_somebody_elses_is_not_overwritten(tmp_path):
    _, _, adapted = setting("lora")
    (tmp_path / "thesis.txt").write_text("precious")
    file = tmp_path / "thesis.txt"
    for place in (tmp_path, file, file / "below"):
        with pytest.raises(UserError):
            adapted.save(place)
    assert file.read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", OWN)
def test_B30_an_optimiser_of_its_own_is_saved_as_plain_tensors(name, tmp_path):
    _, data, adapted = setting(name)
    optimizer = adapted.optimizer(adamw, 8)
    train(adapted, data, optimizer, steps=5)
    checkpoint.save(adapted, tmp_path / "a", {"step": 5}, optimizer)
    tensors = load_file(tmp_path / "a" / "optimizer.safetensors")
    assert tensors and all(torch.isfinite(t.float()).all() for t in tensors.values())
    json.loads((tmp_path / "a" / "state.json").read_text())
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}


def test_B30_another_optimisers_state_is_refused(tmp_path):
    base, data, adapted = setting("lora")
    optimizer = adapted.optimizer(adamw, 8)
    train(adapted, data, optimizer, steps=1)
    checkpoint.save(adapted, tmp_path / "a", {"step": 1}, optimizer)
    _, _, other = setting("lora_plus")
    with pytest.raises(UserError, match="another optimiser"):
        checkpoint.restore_optimizer(other.optimizer(adamw, 8), tmp_path / "a")


@pytest.mark.parametrize("name", NAMES)
def test_B31_going_on_from_a_saved_adapter_trains_it(name, tmp_path):
    base, data, adapted = setting(name)
    adapted.save(tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert again.num_trainable() == adapted.num_trainable() > 0
    again.begin(data, lambda m, b: m(b["x"]).square().mean())
    before, state = overall(again, data), cloned(again.adapter.state_dict())
    train(again, data, again.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3), 12), steps=12)
    assert overall(again, data) < before and not same(again.adapter.state_dict(), state)


def test_B31_nothing_to_train_stops_at_once():
    with pytest.raises(UserError, match="would train nothing"):
        attach(Net(), "head_only")
    adapted = attach(Net(), "lora", rank=2)
    adapted.adapter.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        adapted.optimizer(adamw, 3)
