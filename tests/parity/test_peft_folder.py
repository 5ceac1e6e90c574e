"""What export_lora writes, PEFT loads: the same outputs, heads included, over every registered name."""

import json

import pytest
import torch
from small_models import MODELS, adapt, bare, far, logits
from support import Net, Regression, adamw, attached, loss, needs_head, train

from lorafactory import UserError, export_lora, registry

peft = pytest.importorskip("peft")
EXACT = ("loha", "lora", "rslora", "lora_plus", "pissa", "adalora", "vera", "lotr", "miss", "delora", "adalora+pissa", "relora")
EXACT += ("randlora", "vb_lora", "lora_xs", "mos", "tied_lora", "nola")
DENSE = ("dora", "dora+pissa", "adalora+dora")
REFUSED = {"molora": "depends on its input", "hydra_lora": "depends on its input"}


def loaded(adapted, folder):
    """PEFT on the base as it was."""
    return peft.PeftModel.from_pretrained(bare(adapted), folder).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spelling", EXACT)
def test_peft_computes_the_same(kind, spelling, tmp_path):
    adapted = adapt(kind, spelling)
    assert set(export_lora(adapted, tmp_path / "a").values()) == {0.0}
    ours = logits(adapted)
    assert far(logits(bare(adapted)), ours) > 1e-2 and far(logits(loaded(adapted, tmp_path / "a")), ours) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spelling", DENSE)
def test_what_is_not_low_rank_is_refused_or_fitted(kind, spelling, tmp_path):
    adapted = adapt(kind, spelling)
    with pytest.raises(UserError, match="not exactly low-rank: give rank="):
        export_lora(adapted, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    errors = export_lora(adapted, tmp_path / "a", rank=24)
    assert max(errors.values()) < 1e-5
    assert far(logits(loaded(adapted, tmp_path / "a")), logits(adapted)) < 1e-5


@pytest.mark.parametrize("spelling", ("full", "bitfit"))
def test_trained_biases_are_refused(spelling, tmp_path):
    adapted = adapt("bert", spelling)
    with pytest.raises(UserError, match="changes the bias of .*query"):
        export_lora(adapted, tmp_path / "a", rank=24)
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_fit_is_measured(tmp_path):
    adapted = adapt("bert", "dora")
    errors = export_lora(adapted, tmp_path / "a", rank=2)
    theirs = loaded(adapted, tmp_path / "a")
    for s in adapted.adapter.sites:
        layer = theirs.get_submodule(f"base_model.model.{s.name}")
        with torch.no_grad():
            update = adapted.adapter.deltas[s.key].weight(s.base) - s.base.weight
            lost = float((update - layer.get_delta_weight("default")).norm() / update.norm())
        assert errors[s.name] == pytest.approx(lost, rel=1e-4) and 0.05 < lost < 1
    more = export_lora(adapted, tmp_path / "a", rank=6)
    assert all(more[n] < errors[n] for n in errors)


def test_ranks_and_trained_heads_of_their_own(tmp_path):
    """One rank a layer by rank_pattern, and a head that PEFT loads by name."""
    adapted = adapt("bert", "lora", rank_pattern={"encoder.layer.0.intermediate.dense": 2, "query": 3})
    assert "classifier" in adapted.adapter.trained
    export_lora(adapted, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and sorted(set(config["rank_pattern"].values())) == [2, 3]
    assert far(logits(loaded(adapted, tmp_path / "a")), logits(adapted)) < 1e-5


@pytest.mark.parametrize("name", registry.names())
def test_every_name_is_exported_or_refused_in_one_line(name, tmp_path):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    options = {"trained_modules": ["head"]} if needs_head(registry.parse(name)[0].name) else {"trained_modules": []}
    adapted = attached(name, base, data, **options)
    train(adapted, data, adapted.optimizer(adamw, 4), steps=2)
    for rank in (None, 3):
        folder = tmp_path / f"{rank}"
        try:
            errors = export_lora(adapted, folder, rank)
        except UserError as e:
            assert "\n" not in str(e) and not folder.exists()
            assert REFUSED.get(name, "") in str(e)
        else:
            assert name not in REFUSED and all(0 <= e < 1 for e in errors.values())
            assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert float(loss(adapted, data(1)[0])) > 0, "it still runs"


def test_misuse(tmp_path):
    adapted = adapt("bert", "lora")
    with pytest.raises(UserError, match="rank is 0"):
        export_lora(adapted, tmp_path / "a", rank=0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        export_lora(adapted, tmp_path / "b")
    adapted.merge()
    with pytest.raises(UserError, match="unmerged"):
        export_lora(adapted, tmp_path / "a")
    adapted.detach()
    with pytest.raises(UserError, match="unmerged"):
        export_lora(adapted, tmp_path / "a")
