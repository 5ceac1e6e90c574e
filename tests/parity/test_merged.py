"""What export_merged writes, transformers alone loads: the adapted model's outputs, ties and dtype as they were."""

import json

import pytest
import torch
from safetensors import safe_open
from small_models import adapt
from support import TOLERANCE, Net, linear_sites, perturb, same
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, export_merged
from lorafactory.adapter import Base

IDS = torch.arange(14).reshape(2, 7) + 1


def gpt2():
    """Conv1D, the output embedding tied to the input's."""
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = dict(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, initializer_range=0.15)), "lm_head", "transformer.wte"


def llama(tied=True):
    """Grouped queries; no biases."""
    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip
    config = LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config), "lm_head", "model.embed_tokens"


MODELS = {"gpt2": gpt2, "llama": llama}


def sharded(kind, dtype, folder):
    """A base that transformers read from several files."""
    torch.manual_seed(0)
    model, output, inputs = MODELS[kind]()
    model.to(dtype).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), output, inputs


def saved(folder):
    """{name: dtype} of what lies in the folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {n: f.get_tensor(n).dtype for n in f.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def near(a, b):
    """To the rounding of the narrower dtype, of which a base of two blocks loses a few."""
    return bool((a.double() - b.double()).abs().max() <= max(TOLERANCE[a.dtype], TOLERANCE[b.dtype]) * b.double().abs().max())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spelling", ("lora", "dora+pissa", "full", "ia3"))
def test_transformers_alone_computes_the_same(spelling, kind, dtype, tmp_path):
    base, output, inputs = sharded(kind, dtype, tmp_path / "base")
    before = {n: t.clone() for n, t in base.state_dict().items()}
    config, plain = base.config.to_dict(), logits(base)
    adapted = attach(base, spelling, seed=1, **({"rank": 4} if "+" in spelling or spelling == "lora" else {})).eval()
    perturb(adapted.adapter, 0.2)
    want = logits(adapted)
    weights = {s.name: d.weight(s.base).to(dtype) for s, d in linear_sites(adapted) if not s.tied}
    errors = export_merged(adapted, tmp_path / "m")
    assert (max(errors.values()) > 0) == (dtype is torch.bfloat16)
    assert torch.equal(logits(adapted), want) and base.config.to_dict() == config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    assert near(logits(model), want) and not near(plain, want)
    assert all(torch.equal(Base(model.get_submodule(n)).weight, w) for n, w in weights.items()), "rounded more than once"
    assert model.get_submodule(output).weight is model.get_submodule(inputs).weight
    assert f"{output}.weight" not in saved(tmp_path / "m") and set(saved(tmp_path / "m").values()) == {dtype}
    adapted.detach()
    assert same(base.state_dict(), before)


def test_a_loss_to_rounding_is_refused_until_a_dtype_is_given(tmp_path):
    """An update far below the base's own spacing."""
    base, *_ = sharded("llama", torch.bfloat16, tmp_path / "base")
    adapted = attach(base, "lora", rank=4, seed=1).eval()
    with torch.no_grad():
        for _, low in adapted.adapter.low_ranks():
            low.B.normal_(0, 1e-3)
    with pytest.raises(UserError, match="rounding to bfloat16 would lose .* float32 keeps it, dtype bfloat16 accepts"):
        export_merged(adapted, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not adapted.merged
    assert min(export_merged(adapted, tmp_path / "narrow", torch.bfloat16).values()) > 0.1
    assert max(export_merged(adapted, tmp_path / "wide", torch.float32).values()) < 1e-3
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        assert set(saved(tmp_path / name).values()) == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert base.dtype == torch.bfloat16 and base.config.dtype == torch.bfloat16


def test_an_untied_output_stays_its_own(tmp_path):
    """A head trained whole beside an embedding that is not."""
    torch.manual_seed(0)
    base, output, inputs = llama(tied=False)
    adapted = attach(base.eval(), "lora", rank=4, target_modules=["q_proj"], trained_modules=[output], seed=1)
    perturb(adapted.adapter, 0.5)
    export_merged(adapted, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert near(logits(model), logits(adapted))
    assert torch.equal(model.get_submodule(inputs).weight, base.get_submodule(inputs).weight)
    assert not torch.equal(model.get_submodule(output).weight, base.get_submodule(output).weight)


def test_what_no_checkpoint_holds_is_refused(tmp_path):
    base = llama()[0].eval()
    adapted = attach(base, "bitfit", target_modules=["q_proj"], add_missing=True)
    perturb(adapted.adapter)
    with pytest.raises(UserError, match="adds model.layers.0.self_attn.q_proj.bias, which no LlamaForCausalLM has"):
        export_merged(adapted, tmp_path / "m")
    assert not adapted.merged and "model.layers.0.self_attn.q_proj.bias" not in base.state_dict()
    with pytest.raises(UserError, match="depends on its input"):
        export_merged(adapt("bert", "molora"), tmp_path / "m")
    with pytest.raises(UserError, match="a Net is no transformers model"):
        export_merged(attach(Net(), "lora", trained_modules=[]), tmp_path / "m")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        export_merged(adapt("bert", "lora"), tmp_path / "base")
    assert not (tmp_path / "m").exists()
