import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import Net, close, linear_sites, perturb, roberta_base
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

SMALL = {"rank": 16, "d_initial": 1.0}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def bank_of(adapted):
    return adapted.adapter.structure.bank


def test_equation_by_hand():
    """A = [1, 2], B = [3; 4; 5], d = 2, b = (1, 0, -1): the update is diag(b) B d A = [[6, 12], [0, 0], [-10, -20]]."""
    module = nn.Linear(2, 3)
    adapted = attach(nn.Sequential(module), "vera", rank=1)
    bank, d = bank_of(adapted), adapted.adapter.deltas["0"]
    with torch.no_grad():
        bank.A.copy_(torch.tensor([[1.0, 2.0]]))
        bank.B.copy_(torch.tensor([[3.0], [4.0], [5.0]]))
        d.d.fill_(2.0)
        d.b.copy_(torch.tensor([1.0, 0.0, -1.0]))
    update = torch.tensor([[6.0, 12.0], [0.0, 0.0], [-10.0, -20.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_start():
    adapted = attach(Net(), "vera", rank=7, **TARGETS)
    bank = bank_of(adapted)
    assert bank.A.shape == (7, 40) and bank.B.shape == (40, 7), "as large as the largest layer"
    for t, fan in ((bank.A, 40), (bank.B, 7)):
        bound = math.sqrt(2) * math.sqrt(3 / fan)
        assert 0.9 * bound < t.abs().max() <= bound and float(t.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    for _, d in linear_sites(adapted):
        assert (d.d == 0.1).all() and not d.b.any()


def test_one_bank_serves_all_layers_by_slices():
    adapted = attach(Net(), "vera", rank=5, **TARGETS)
    bank = bank_of(adapted)
    assert all(d.bank is bank for _, d in linear_sites(adapted))
    assert {n for n, _ in adapted.adapter.named_buffers()} == {f"structure.bank.{n}" for n in ("A", "B", "checksum")}
    with torch.no_grad():
        for site, d in linear_sites(adapted):
            d.d.fill_(1.0)
            d.b.fill_(1.0)
            update = d.weight(site.base) - site.base.weight
            assert close(update, bank.B[: site.d_out] @ bank.A[:, : site.d_in])
    assert not any(p is t for p in adapted.adapter.parameters() for t in (bank.A, bank.B))


def test_rank_may_exceed_the_layers():
    perturbed = {}
    for rank in (3, 100):
        adapted = attach(Net(), "vera", rank=rank, **TARGETS)
        perturb(adapted.adapter, 1.0)
        perturbed[rank] = [torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight) for s, d in linear_sites(adapted)]
    assert perturbed == {3: [3, 3, 3], 100: [24, 24, 24]}


def test_first_step_moves_b_alone():
    adapted = attach(Net(), "vera", rank=5, **TARGETS)
    adapted(torch.randn(9, 24)).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert not d.d.grad.any() and d.b.grad.any()


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "vera", rank=5, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_bank_depends_on_its_seed_alone():
    """Not on the run's seed, the generator's state, the dtype of the base or what was drawn before."""
    torch.manual_seed(3)
    first = bank_of(attach(Net(), "vera", rank=5, seed=1, **TARGETS))
    torch.randn(7)
    second = bank_of(attach(Net().bfloat16(), "vera", rank=5, seed=2, **TARGETS))
    wide = bank_of(attach(Net().double(), "vera", rank=5, **TARGETS))
    other = bank_of(attach(Net(), "vera", rank=5, bank_seed=1, **TARGETS))
    for name in ("A", "B", "checksum"):
        t = getattr(first, name)
        assert torch.equal(getattr(second, name), t) and torch.equal(
            getattr(wide, name), t.to(getattr(wide, name).dtype)
        )
        assert not torch.equal(getattr(other, name), t)
    assert second.A.dtype == torch.float32 and wide.A.dtype == torch.float64


CHILD = """
import json, sys
import torch
from support import Net
import lorafactory
folder = sys.argv[1]
model = Net()
model.load_state_dict(torch.load(folder + "/base.pt"))
print(json.dumps(lorafactory.load(model, folder + "/adapter")(torch.ones(2, 24)).double().tolist()))
"""


@pytest.mark.parametrize("keep", [False, True])
def test_a_new_process_draws_the_same_bank_B21(keep, tmp_path):
    """Without the bank the checkpoint is as small as what trains, and the function is the same to the last bit."""
    base = Net()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    adapted = attach(base, "vera", rank=5, save_bank=keep, **TARGETS)
    perturb(adapted.adapter, 1.0)
    adapted.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter.safetensors")
    numbers = sum(t.numel() for t in saved.values())
    assert numbers == adapted.num_trainable() + 5 + (5 * 40 + 40 * 5 if keep else 0)
    where = os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2))
    environment = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert json.loads(out.splitlines()[-1]) == adapted(torch.ones(2, 24)).double().tolist()


@pytest.mark.parametrize("keep", [False, True])
def test_another_bank_is_refused_B21(keep, tmp_path):
    """One bit of one number that this torch would draw differently, or that a disk lost."""
    base = Net()
    adapted = attach(copy.deepcopy(base), "vera", rank=5, save_bank=keep, **TARGETS)
    perturb(adapted.adapter, 1.0)
    adapted.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    state = load_file(file)
    if keep:
        state["structure.bank.B"][3, 2] = torch.nextafter(state["structure.bank.B"][3, 2], torch.tensor(9.0))
    else:
        state["structure.bank.checksum"][2] += 1
    save_file(state, file)
    with pytest.raises(UserError, match="damaged" if keep else "bank_seed 0 draws another bank .* save_bank=true"):
        load(base, tmp_path)
    assert type(base.fc1) is nn.Linear


def test_swapped_numbers_change_the_checksum():
    from lorafactory.adapter.bank import checksum

    a, b = torch.randn(3, 4), torch.randn(5, 3)
    assert not torch.equal(checksum(3, a[:, [1, 0, 2, 3]], b), checksum(3, a, b))
    assert not torch.equal(checksum(3, a, b[[0, 1, 2, 4, 3]]), checksum(3, a, b))


def test_ranks_that_disagree_are_refused():
    adapted = attach(Net(), "vera", rank=5, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    state["deltas.fc2.d"] = torch.ones(4)
    with pytest.raises(UserError, match="deltas.fc2.d has 4 ranks, the bank 5"):
        adapted.adapter.load(state)


def test_counts():
    """RoBERTa-base, query and value, rank 1024; a grouped-query 3B Llama at rank 256."""
    adapted = attach(copy.deepcopy(roberta_base()), "vera", rank=1024, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 43_008
    sizes = dict(hidden_size=3072, intermediate_size=64, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    assert attach(llama, "vera", target_modules=["q_proj", "v_proj"]).num_trainable() == 129_024


def test_nonsense():
    for options in ({"rank": 0}, {"d_initial": 0.0}, {"dropout": 1.0}, {"bank_seed": -1}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "vera", **options)
