"""Dtypes and starts: one written policy, and the same numbers in every process."""

import copy

import pytest
import torch
from support import Net, Regression, attached, loss, perturb

from lorafactory import load, registry


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "head_only"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_fresh_and_reloaded_B36(name, dtype, autocast, tmp_path):
    base = Net()
    data = Regression(base)
    base = base.to(dtype)
    halves = Regression.__new__(Regression)
    halves.all = [{k: v.to(dtype) for k, v in b.items()} for b in data.all]
    fresh = attached(name, base, halves, trained_modules=["head"])
    perturb(fresh.adapter)
    fresh.save(tmp_path)
    for adapted in (fresh, load(copy.deepcopy(base), tmp_path)):
        assert {p.dtype for p in adapted.adapter.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
            value = loss(adapted, halves.all[0])
        (value + adapted.penalty()).backward()
        assert torch.isfinite(value)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.adapter.parameters() if p.numel())


@pytest.mark.parametrize("name", registry.names())
def test_the_start_is_a_function_of_the_seed_B39(name):
    """So processes agree without telling each other: torch's own generator may stand anywhere."""
    states = []
    base = Net()
    data = Regression(base)
    for own in (1, 2):
        torch.manual_seed(own)
        states.append(attached(name, base, data, seed=7, trained_modules=["head"]).adapter.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
