"""Merging: the merged weights are the adapted model, or merging says why not."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, perturb

from lorafactory import UserError, attach, registry

ALONE = [n for n in registry.names() if n not in ("head_only",)]


@pytest.mark.parametrize("name", ALONE)
def test_transposed_layers_square_and_not_B02(name):
    """GPT-2's Conv1D: merged, unmerged and merged again, the magnitudes perturbed."""
    base = Net(transposed=True)
    pristine = copy.deepcopy(base.state_dict())
    adapted = attached(name, base, Regression(base), trained_modules=["head"]).eval()
    base = adapted.model
    perturb(adapted.adapter, 0.3)
    x = torch.randn(3, 24)
    y = adapted(x)
    if not adapted.adapter.mergeable:
        with pytest.raises(UserError, match="depends on its input"):
            adapted.merge()  # B05: refused with the reason
        return
    for _ in range(2):
        adapted.merge()
        assert close(adapted(x), y, 10)
        adapted.unmerge()
        assert torch.equal(adapted(x), y)
    assert all(torch.equal(t, pristine[n]) for n, t in adapted.detach().state_dict().items())


@pytest.mark.parametrize("name", [n for n in ALONE if n != "full"])
def test_a_small_update_is_not_rounded_away_B03(name):
    """A bf16 base and an update of 1e-3 of the weight: refused in bf16 with the share lost, exact in float32."""
    base = Net().bfloat16()
    adapted = attached(name, base, Regression(base), trained_modules=["head"]).eval()
    if not adapted.adapter.mergeable:
        pytest.skip("depends on its input: no merge")
    perturb(adapted.adapter, 1e-3)
    before = copy.deepcopy(adapted.model.state_dict())
    with pytest.raises(UserError, match=r"merging loses \d+% of the update of .* to rounding"):
        adapted.merge()
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items()), "something was half merged"
    errors = adapted.merge(dtype=torch.float32)
    assert max(errors.values()) < 1e-3
    assert {p.dtype for p in adapted.model.parameters()} == {torch.float32}
    adapted.unmerge()
    assert all(torch.equal(t, before[n]) and t.dtype == torch.bfloat16 for n, t in adapted.model.state_dict().items())
    assert max(adapted.merge(limit=float("inf")).values()) > 0.1


def test_a_narrower_dtype_is_refused_B03():
    base = Net()
    adapted = attached("lora", base, Regression(base))
    with pytest.raises(UserError, match="would narrow"):
        adapted.merge(dtype=torch.float16)


def test_every_trained_tensor_is_accounted_for_B05():
    """The variant's own part and the trained head are in the merged weights."""
    for name in ("dora", "full", "bitfit"):
        base = Net()
        adapted = attached(name, base, Regression(base), trained_modules=["head"])
        perturb(adapted.adapter, 0.5)
        x = torch.randn(3, 24)
        y, plain = adapted(x), copy.deepcopy(adapted).detach()
        merged = copy.deepcopy(adapted).bake()
        assert close(merged(x), y, 5) and not close(merged(x), plain(x))
        assert not torch.equal(merged.head.weight, plain.head.weight)


def test_convolutions_are_refused_when_attached_B04():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(UserError, match="'0' matches 0, a Conv1d that this variant cannot adapt"):
        attach(model, "lora", target_modules=["0", "2"])
    assert type(model[0]) is nn.Conv1d and type(model[2]) is nn.Linear


def test_what_is_read_without_being_called_is_refused_B04():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    with pytest.raises(UserError, match="reads its weight without calling it"):
        attach(model, "lora", rank=2, target_modules=["out_proj"])
    assert [a["name"] for a in attach(model, "lora", rank=2).adapter.describe()] == ["b"]
