"""What export_lora writes, PEFT loads: the same outputs, heads included, over every registered name."""

import copy
import json

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, needs_head, perturb, small, train
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lorafactory import UserError, attach, export_lora, load, registry

peft = pytest.importorskip("peft")
EXACT = ("lora", "rslora", "lora_plus", "pissa", "adalora", "vera", "lotr", "adalora+pissa", "relora")
DENSE = ("dora", "dora+pissa", "adalora+dora")
REFUSED = {"molora": "depends on its input", "hydra_lora": "depends on its input"}
IDS = torch.arange(12).reshape(2, 6)


def bert():
    sizes = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(**sizes, **off, initializer_range=0.2, num_labels=3)).eval()


def gpt2():
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, initializer_range=0.15, **off)).eval()


MODELS = {"bert": (bert, ["query", "output.dense", "intermediate.dense"]), "gpt2": (gpt2, ["c_attn", "c_fc"])}


def adapt(kind, spelling, **options):
    base, targets = MODELS[kind]
    model = base()
    adapted = attach(model, spelling, target_modules=targets, seed=1, **small(spelling, **options)).eval()
    perturb(adapted.adapter, 0.3)
    return copy.deepcopy(model), adapted


def loaded(adapted, folder):
    """PEFT on the base as it was."""
    plain = copy.deepcopy(adapted).detach()
    return peft.PeftModel.from_pretrained(plain, folder).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spelling", EXACT)
def test_peft_computes_the_same(kind, spelling, tmp_path):
    _, adapted = adapt(kind, spelling)
    assert set(export_lora(adapted, tmp_path / "a").values()) == {0.0}
    with torch.no_grad():
        ours, theirs = adapted(IDS).logits, loaded(adapted, tmp_path / "a")(IDS).logits
        plain = copy.deepcopy(adapted).detach()(IDS).logits
    assert not close(ours, plain, 1e-2) and (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spelling", DENSE)
def test_what_is_not_low_rank_is_refused_or_fitted(kind, spelling, tmp_path):
    _, adapted = adapt(kind, spelling)
    with pytest.raises(UserError, match="not exactly low-rank: give rank="):
        export_lora(adapted, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    errors = export_lora(adapted, tmp_path / "a", rank=24)
    assert max(errors.values()) < 1e-5
    with torch.no_grad():
        ours, theirs = adapted(IDS).logits, loaded(adapted, tmp_path / "a")(IDS).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("spelling", ("full", "bitfit"))
def test_trained_biases_are_refused(spelling, tmp_path):
    _, adapted = adapt("bert", spelling)
    with pytest.raises(UserError, match="changes the bias of .*query"):
        export_lora(adapted, tmp_path / "a", rank=24)
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_fit_is_measured(tmp_path):
    _, adapted = adapt("bert", "dora")
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
    _, adapted = adapt("bert", "lora", rank_pattern={"encoder.layer.0.intermediate.dense": 2, "query": 3})
    assert "classifier" in adapted.adapter.trained
    export_lora(adapted, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and sorted(set(config["rank_pattern"].values())) == [2, 3]
    with torch.no_grad():
        assert close(adapted(IDS).logits, loaded(adapted, tmp_path / "a")(IDS).logits, 1e-5)


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
    _, adapted = adapt("bert", "lora")
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


def from_peft(tmp_path, kind, **options):
    base, targets = MODELS[kind]
    model = base()
    more = {"modules_to_save": ["classifier"]} if kind == "bert" else {"fan_in_fan_out": True}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, **more, **options)).eval()
    perturb(theirs, 0.2)
    theirs.save_pretrained(tmp_path / "p")
    frozen = {n.replace("base_layer.", ""): t for n, t in theirs.base_model.model.state_dict().items()}
    model.load_state_dict({n: frozen.get(n, t) for n, t in model.state_dict().items()})  # perturb moved what trains only
    return model, theirs


PLAIN = {"r": 4, "lora_alpha": 12}
PATTERNS = {**PLAIN, "rank_pattern": {"query": 2, "c_fc": 3}, "alpha_pattern": {"query": 5, "c_fc": 7}}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", (PLAIN, PATTERNS, {**PATTERNS, "use_rslora": True}), ids=("plain", "patterns", "rslora"))
def test_load_reads_what_peft_saved(kind, options, tmp_path):
    model, theirs = from_peft(tmp_path, kind, **options)
    adapted = load(model, tmp_path / "p").eval()
    with torch.no_grad():
        ours, want = adapted(IDS).logits, theirs(IDS).logits
    assert (ours - want).abs().max() < 1e-5 * want.abs().max()
    adapted.save(tmp_path / "ours")
    export_lora(adapted, tmp_path / "again")
    plain = adapted.detach()
    for folder in ("ours", "again"):
        again = load(plain, tmp_path / folder).eval()
        with torch.no_grad():
            assert (again(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()
        again.detach()


def test_what_load_cannot_read_is_refused_and_the_model_left_alone(tmp_path):
    model, _ = from_peft(tmp_path, "bert", **PLAIN, use_dora=True)
    before = model(IDS).logits
    with pytest.raises(UserError, match="lora_magnitude_vector.*use_dora=True"):
        load(model, tmp_path / "p")
    _, theirs = from_peft(tmp_path, "bert", **PLAIN)
    small_one = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=12, num_hidden_layers=2,
                                              num_attention_heads=2, intermediate_size=40, num_labels=3))  # fmt: skip
    with pytest.raises(UserError, match=r"\[4, 24\].*\[4, 12\]"):
        load(small_one, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="type IA3; only LORA"):
        load(model, tmp_path / "p")
    assert torch.equal(model(IDS).logits, before)
    assert not any("_held" in vars(m) for m in (*model.modules(), *small_one.modules()))
