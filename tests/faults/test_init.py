"""INIT: the start, the scale and frozen factors mean the same after saving, loading and converting."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Net, Regression, adamw, attached, cloned, close, loss, perturb, same, train

from lorafactory import UserError, attach, load, registry

NAMES = registry.names()
LOW_RANK = [n for n in NAMES if "low_rank" in registry.parse(n)[0].gives]
RANKED = [n for n in LOW_RANK if "rank_pattern" in registry.parse(n)[0].Config.__dataclass_fields__]
INITS = registry.names("init")
SCALERS = ["", *(n for n in registry.names("dynamics") if "low_rank" in registry.get(n).needs)]


def setting(transposed=False):
    torch.manual_seed(0)
    base = Net(transposed).eval()
    return base, Regression(base), torch.randn(3, 5, 24)


@pytest.mark.parametrize("name", RANKED)
def test_B19_the_scale_of_every_layer_is_saved_and_restored(name, tmp_path):
    """Mixed ranks and alphas; the file's config is changed behind its back, and the saved scale still counts."""
    base, data, x = setting()
    adapted = attached(name, base, data, rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 4.0}).eval()
    perturb(adapted.adapter, 0.3)
    y = adapted(x)
    adapted.save(tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["adapted"] == adapted.adapter.describe()
    about["config"] |= {"alpha": 77.0, "rank": 3, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    again = load(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(x), y) and again.adapter.describe() == adapted.adapter.describe()


@pytest.mark.parametrize("name", LOW_RANK)
def test_B19_a_missing_scale_is_refused(name, tmp_path):
    base, data, x = setting()
    adapted = attached(name, base, data)
    adapted.save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    scales = [n for n in tensors if n.endswith("scale")]
    assert scales
    save_file({n: t for n, t in tensors.items() if n != scales[0]}, tmp_path / "adapter.safetensors")
    plain = copy.deepcopy(base)
    with pytest.raises(UserError, match="scale is missing"):
        load(plain, tmp_path)
    assert type(plain.fc1) is type(base.fc1) and all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("name", INITS)
def test_B20_a_start_that_takes_from_the_weight_leaves_the_base(name, scaler, transposed, tmp_path):
    """With a rank pattern and every scale: trained, loaded on an untouched base, exported bare, merged: one function."""
    base, data, x = setting(transposed)
    spelling = "+".join(filter(None, (name, scaler)))
    try:
        registry.config(spelling)
    except UserError:
        pytest.skip("refused before training")
    pristine = cloned(base.state_dict())
    adapted = attach(
        base, spelling, batches=data, loss=loss, seed=1, rank=4, target_modules=["fc1", "fc2", "fc3"], rank_pattern={"fc1": 2}
    )  # fmt: skip
    with adapted.disabled():
        assert same(base.state_dict(), pristine)
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    perturb(adapted.adapter, 0.3)
    y = adapted.eval()(x)
    adapted.save(tmp_path)
    untouched = Net(transposed).eval()
    untouched.load_state_dict(pristine)
    once = load(untouched, tmp_path)
    assert torch.equal(once(x), y)
    with pytest.raises(UserError, match="already has an adapter"):
        load(untouched, tmp_path)
    with pytest.raises(UserError, match="already has an adapter"):
        attach(untouched, spelling, batches=data, loss=loss)
    again = load(once.detach(), tmp_path)
    assert torch.equal(again(x), y), "a second load, from the clean base, is the first"
    adapted.merge()
    assert close(adapted(x), y, 5)
    with pytest.raises(UserError, match="another base model"):
        load(copy.deepcopy(adapted).bake(), tmp_path)


@pytest.mark.parametrize("name", INITS)
def test_B20_a_start_runs_once(name):
    base, data, x = setting()
    adapted = attached(name, base, data)
    perturb(adapted.adapter, 0.3)
    y, state = adapted(x), cloned(adapted.adapter.state_dict())
    for index in (0, 1):  # by mistake again, or a second stage
        adapted.begin(data, loss, index=index)
        assert torch.equal(adapted(x), y) and same(adapted.adapter.state_dict(), state), "what was learnt is wiped out"


@pytest.mark.parametrize("name", NAMES)
def test_B21_a_checkpoint_holds_each_tensor_once_and_needs_no_luck(name, tmp_path):
    """Size on disk is the counted tensors; loading under any state of torch's generator gives the same function."""
    base, data, x = setting()
    adapted = attached(name, base, data, trained_modules=["head"]).eval()
    perturb(adapted.adapter, 0.3)
    y = adapted(x)
    adapted.save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    held = {
        (t.data_ptr(), t.shape): t.numel() * t.element_size()
        for t in adapted.adapter.state_dict().values()
        if t.numel()
    }
    assert stored == sum(held.values())
    file = (tmp_path / "adapter.safetensors").stat().st_size
    assert stored <= file <= stored + 300 * (len(tensors) + 1)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert torch.equal(load(copy.deepcopy(base), tmp_path).eval()(x), y)


@pytest.mark.parametrize("name", NAMES)
def test_B21_frozen_numbers_that_were_changed_are_refused_or_used(name, tmp_path):
    """A frozen tensor of the file is either what the function is computed with, or checked: never read and ignored."""
    base, data, x = setting()
    adapted = attached(name, base, data).eval()
    perturb(adapted.adapter, 0.3)
    y = adapted(x)
    adapted.save(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    trained = {n for n, _ in adapted.adapter.named_parameters()}
    idle = ("parts.", *(f"deltas.{k}." for k in adapted.adapter.idle()))
    idle += tuple(n for n, t in tensors.items() if n.startswith("structure.") and t.dtype == torch.long and not t.dim())  # counts
    for n in (n for n, t in tensors.items() if n not in trained and not n.startswith(idle) and t.numel()):
        changed = {**tensors, n: tensors[n] + 1}
        save_file(changed, tmp_path / "adapter.safetensors")
        try:
            assert not torch.equal(load(copy.deepcopy(base), tmp_path).eval()(x), y), f"{n} is ignored"
        except UserError as e:
            assert n.rpartition(".")[2] in str(e)
