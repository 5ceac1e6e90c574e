"""A base of 4-bit weights (QLoRA): read through its codes, never written."""

import pytest
import torch
from support import on_linear
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorafactory import attach, load, models, registry, tiny
from lorafactory.adapter.site import is_quantized
from lorafactory.errors import UserError
from lorafactory.sources import quiet
from lorafactory.tasks.generation import Generation

pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install bitsandbytes")
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama in float32, with the tiny model's tokenizer: quantised as it loads."""
    place = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setenv("LORAFACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
        AutoTokenizer.from_pretrained(tiny.causal_folder()).save_pretrained(place)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=100, initializer_range=0.2, pad_token_id=0, eos_token_id=0, **SIZES))
        model.save_pretrained(place)
    return str(place)


def base(folder):
    config = models.ModelConfig(name="q", source=folder, quantization="4bit")
    models._loaded.clear()
    found = models.load(config, Generation(Generation.Config())).model
    models._loaded.clear()
    return found


def batch(seed=1):
    ids = torch.randint(3, 100, (8, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


NAMES = [n for n in registry.names() if on_linear(registry.parse(n)[0].name)]
NAMES = [n for n in NAMES if n not in ("head_only", "bitfit")]  # the model has neither head nor bias


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_over_four_bits(folder, name, tmp_path):
    model = base(folder)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        own = model(**batch()).logits
    batches = [batch(i) for i in range(8)]
    adapted = attach(model, name, seed=0, target_modules="all-linear", batches=batches)
    linear = [s for s in adapted.adapter.sites if s.is_linear]
    assert len(linear) == 14 and all(is_quantized(s.base.module) for s in linear)
    assert {(s.d_out, s.d_in) for s in linear} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2), total=12)
    losses = []
    for _ in range(12):
        adapted.adapter.before_forward(batch())
        loss = adapted(**batch()).loss
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0] - 1e-3, losses
    adapted.end()
    adapted.eval()
    with torch.no_grad():
        trained = adapted(**batch()).logits
        assert not torch.allclose(trained, own, atol=1e-3)
        with adapted.disabled() as plain:
            assert torch.equal(plain(**batch()).logits, own)
    with pytest.raises(UserError, match="4 bits" if adapted.adapter.mergeable else "depends on its input"):
        adapted.merge()
    adapted.save(tmp_path / "a")
    other = load(base(folder), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(other(**batch()).logits, trained)
    adapted.detach()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3", "lotr"])
def test_the_decoded_weight_is_what_a_layer_computes_with(folder, name):
    adapted = attach(base(folder), name, seed=0, target_modules="all-linear")
    for p in adapted.adapter.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    for site in adapted.adapter.sites:
        delta = adapted.adapter.deltas[site.key]
        x = torch.randn(5, site.d_in)
        with torch.no_grad():
            expected, found = x @ delta.weight(site.base).T, site.base.module(x)
        assert torch.allclose(found, expected, atol=2e-2 * float(expected.abs().max())), site.name


def test_what_it_needs_is_said(folder, monkeypatch):
    with pytest.raises(UserError, match="model.quantization=8bit"):
        models.ModelConfig(quantization="8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        base(folder)


def test_what_is_trained_whole_keeps_whole_numbers(folder):
    """A classifier's head, which the checkpoint does not hold."""
    from lorafactory.tasks.text import Text

    task = Text(Text.Config(name="t"))
    task.labels = ["one", "two", "three"]
    models._loaded.clear()
    found = models.load(models.ModelConfig(name="q", source=folder, quantization="4bit"), task)
    models._loaded.clear()
    found.redraw(0)
    assert type(found.model.score) is torch.nn.Linear and found.model.score.weight.is_floating_point()
    assert found.fresh == ["score.weight"] and found.describe()["quantization"] == "4bit"
    adapted = attach(found.model, "lora", seed=0, trained_modules=models.heads(found))
    logits = adapted(input_ids=batch()["input_ids"]).logits
    assert logits.shape == (8, 3) and logits.isfinite().all() and adapted.cost()["head_parameters"] == 3 * 64
    assert all(is_quantized(s.base.module) for s in adapted.adapter.sites) and len(adapted.adapter.sites) == 14
