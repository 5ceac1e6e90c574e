"""Which layers an adapter went to, and at what strength: faults that change a number and say nothing."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, close, loss, perturb, small

from lorafactory import UserError, attach, load, registry

LOW_RANK = [n for n in registry.names("structure") if "low_rank" in registry.get(n).gives]


class Block(nn.Module):
    def __init__(self, values=True):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        if values:
            self.v_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(x) + (self.v_proj(x) if hasattr(self, "v_proj") else 0)


class Blocks(nn.Module):
    """Three blocks, of which one lacks v_proj."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(False), Block()])

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def test_a_wrong_name_in_the_list_is_an_error_B08():
    with pytest.raises(UserError, match="'foo_proj' matches no module; nearest: .*q_proj"):
        attach(Blocks(), "lora", rank=2, target_modules=["q_proj", "v_proj", "foo_proj"])


def test_partial_coverage_is_warned_and_recorded_B08(caplog):
    adapted = attach(Blocks(), "lora", rank=2, target_modules=["q_proj", "v_proj"])
    assert "layers.*.v_proj exists in 2 of 3 blocks" in caplog.text
    assert adapted.targets == {"q_proj": 3, "v_proj": 2}
    assert [a["name"] for a in adapted.adapter.describe()] == [
        "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.2.q_proj", "layers.2.v_proj"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "blocks"),
    [("q_proj", "012"), ("layers.0.q_proj", "0"), (r"layers\.\d\.q_proj", "012"), (r"^layers\.[02]\.q_proj$", "02")],
)
def test_names_suffixes_and_expressions_B08(entry, blocks):
    found = [a["name"] for a in attach(Blocks(), "lora", rank=2, target_modules=entry).adapter.describe()]
    assert found == [f"layers.{i}.q_proj" for i in blocks]


def test_a_suffix_is_whole_words_B08():
    with pytest.raises(UserError, match="'proj' matches no module"):
        attach(Blocks(), "lora", rank=2, target_modules="proj")


def test_rank_and_alpha_tables_are_resolved_apart_B13():
    adapted = attach(
        Blocks(), "lora", rank=4, alpha=8, target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2}, alpha_pattern={r"^layers\.2\.q_proj$": 32.0},
    )  # fmt: skip
    found = {a["name"]: (a["rank"], a["scale"]) for a in adapted.adapter.describe()}
    assert found["layers.0.q_proj"] == (2, 4.0)
    assert found["layers.2.q_proj"] == (2, 16.0)
    assert found["layers.2.v_proj"] == (4, 2.0)


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_or_twice_is_an_error_B13(table):
    with pytest.raises(UserError, match="matches no adapted layer"):
        attach(Blocks(), "lora", rank=2, target_modules="q_proj", **{table: {"v_proj": 1}})
    with pytest.raises(UserError, match="both match layers.0.q_proj"):
        attach(Blocks(), "lora", rank=2, target_modules="q_proj", **{table: {"q_proj": 1, "layers.0.q_proj": 2}})


@pytest.mark.parametrize("name", LOW_RANK)
def test_scale_is_saved_per_layer_and_does_not_follow_a_config_B19(name, tmp_path):
    """Mixed ranks and alphas; the saved scale counts, whatever the config in the file says."""
    base = Net()
    adapted = attached(name, base, Regression(base), rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 4.0})
    perturb(adapted.adapter, 0.3)
    x = torch.randn(3, 24)
    y = adapted.eval()(x)
    adapted.save(tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    about["config"] |= {"alpha": 77.0, "rank": 3, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    again = load(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(x), y)
    assert again.adapter.describe() == adapted.adapter.describe()


@pytest.mark.parametrize("init", registry.names("init"))
def test_a_start_that_takes_from_the_weight_leaves_the_base_B20(init, tmp_path):
    """Merged, reloaded on the untouched base, and as bare LoRA: one function; and a second adapter is refused."""
    base = Net()
    pristine = copy.deepcopy(base)
    data = Regression(base)
    adapted = attach(base, init, batches=data, loss=loss, seed=1, **small(init, rank_pattern={"fc1": 2}))
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), pristine.parameters(), strict=True))
    perturb(adapted.adapter, 0.3)
    x = torch.randn(3, 24)
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(pristine), tmp_path)(x), y)
    with pytest.raises(UserError, match="already has an adapter"):
        attach(base, init, batches=data, loss=loss)
    adapted.merge()
    assert close(base(x), y, 5)
    with pytest.raises(UserError, match="another base model"):
        load(copy.deepcopy(adapted).bake(), tmp_path)


def test_trained_head_is_saved_and_a_wrong_name_is_an_error_B11(tmp_path):
    base = Net()
    with pytest.raises(UserError, match="'haed' matches no module; nearest: head"):
        attach(base, "lora", rank=2, trained_modules=["haed"])
    adapted = attach(base, "lora", rank=2, trained_modules=["head"])
    perturb(adapted.adapter, 1.0)
    x = torch.randn(3, 24)
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(adapted).detach(), tmp_path)(x), y)
    assert adapted.cost()["head_parameters"] == 24 * 8 + 8


def test_going_on_from_a_saved_adapter_trains_it_B31(tmp_path):
    base = Net()
    attached("lora", base, Regression(base)).save(tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert again.num_trainable() > 0
    optimizer = again.optimizer(lambda g: torch.optim.SGD(g, lr=0.1), 1)
    before = {n: p.detach().clone() for n, p in again.adapter.named_parameters()}
    loss(again, Regression(base)(1)[0]).backward()
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in again.adapter.named_parameters())


def test_nothing_to_train_is_an_error_B31():
    with pytest.raises(UserError, match="would train nothing"):
        attach(Net(), "head_only")
